//! News of services, from the daemon to a driver that asked for them.

use iohost_tests::{System, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn a_driver_hears_of_services_that_run_die_restart_and_are_given_back() {
    let mut system = System::new();
    let _devices = [system.start_edu_device("edu0"), system.start_edu_device("edu1")];
    system.install_driver("probe");
    system.install_driver("edu");
    let config = system.device_config("edu0", "probe") + &system.device_config("edu1", "edu");
    system.start(&config);
    system.await_ready("edu0");
    let first = system.await_ready("edu1");
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    let await_news = |expected: &str| {
        eventually(expected, || probe.news().wait().unwrap() == expected);
    };

    assert_eq!(probe.news().wait().unwrap(), "", "it did not ask");
    probe.watch("edu".to_owned()).wait().unwrap();
    await_news("+edu1");

    kill(Pid::from_raw(first as i32), Signal::SIGKILL).unwrap();
    await_news("+edu1 -edu1 +edu1");

    system.connect().unbind("edu1").unwrap();
    await_news("+edu1 -edu1 +edu1 -edu1");

    // A source of its own is told of what runs now, and of nothing else.
    probe.watch("probe".to_owned()).wait().unwrap();
    await_news("+edu1 -edu1 +edu1 -edu1 +edu0");
}
