//! The rules on a model in this process.

use std::sync::Arc;

use iohost_device_backend::InterruptKind;
use iohost_device_models::Function;
use iohost_device_models::bells::Bells;
use iohost_interrupt_tests::{BellsRegisters, Ringing, Rule, Setup};
use iohost_testkit::FakeDevice;

fn try_rule(rule: Rule, kind: InterruptKind) {
    let device = FakeDevice::new(Arc::new(Function::new(Bells::default())));
    let device = Arc::new(Ringing::new(Box::new(device), Box::new(BellsRegisters)));
    (rule.test)(&Setup { device, kind });
}

iohost_interrupt_tests::tests_of_each_rule!(try_rule);
