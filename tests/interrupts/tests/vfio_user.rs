//! The rules on a model behind a vfio-user socket, which a thread of the test serves.

use std::sync::Arc;

use iohost_device_backend::{InterruptKind, VfioUserBackend};
use iohost_device_models::bells::Bells;
use iohost_device_models::{DeviceServer, Function};
use iohost_interrupt_tests::{BellsRegisters, Ringing, Rule, Setup};

fn try_rule(rule: Rule, kind: InterruptKind) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bells");
    let server = DeviceServer::bind(&path).unwrap();
    let stopper = server.stopper();
    let thread = std::thread::spawn(move || server.run(&Function::new(Bells::default())));
    let device = VfioUserBackend::open(&path).unwrap();
    let device = Arc::new(Ringing::new(Box::new(device), Box::new(BellsRegisters)));
    (rule.test)(&Setup { device, kind });
    // The rule has let go of the device, so the server has no client any more.
    stopper.stop();
    thread.join().unwrap().unwrap();
}

iohost_interrupt_tests::tests_of_each_rule!(try_rule);
