//! A configuration that is read again.

use crate::rig::{Rig, WATCHDOG};
use iohost_client::ClientError;
use iohost_client::varlink::State;
use iohost_interface::Arguments;
use nix::sys::signal::Signal::SIGHUP;

/// A device behind a socket, named as its driver.
fn device(script: &str) -> String {
    format!("[[device]]\nname = {script:?}\nsocket = \"/{script}\"\ndriver = {script:?}\n")
}

fn refusal(rig: &Rig) -> iohost_client::Failure {
    match rig.connect().reload() {
        Err(ClientError::Refused(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_new_starts_what_is_gone_ends_and_the_others_are_not_disturbed() {
    let mut rig = Rig::start(&["good", "breaks"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();
    daemon.bind("breaks").unwrap();
    let session = daemon.open("good").unwrap();
    rig.install("recover");
    rig.configure(&(device("recover") + &device("good")));

    let reloaded = daemon.reload().unwrap();

    assert_eq!(reloaded.started, ["recover"]);
    assert_eq!(reloaded.stopped, ["breaks"]);
    assert_eq!(reloaded.kept, ["good"]);
    assert!(reloaded.restarted.is_empty());
    rig.wait_for("driver running device=recover");
    let good = rig.service("good").unwrap();
    assert_eq!((good.incarnation, good.sessions), (1, 1));
    assert!(session.call(0, Arguments::default()).wait(Some(WATCHDOG)).is_ok());
}

#[test]
fn a_device_that_is_configured_anew_starts_again_with_that() {
    let mut rig = Rig::start(&["good", "recover"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();
    rig.configure(&(device("good").replace("\"good\"\n", "\"recover\"\n") + &device("recover")));
    // The name stands in the first line of that kind: it is another one too.
    let reloaded = daemon.reload().unwrap_err();
    let ClientError::Refused(failure) = reloaded else { panic!("{reloaded}") };
    assert_eq!(failure.code, "config", "two devices of one name");
    assert_eq!(rig.service("good").unwrap().incarnation, 1);

    rig.configure(&(device("good") + "interrupts = [\"msi\"]\n" + &device("recover")));
    assert_eq!(daemon.reload().unwrap().restarted, ["good"]);
    rig.wait_for("driver running device=good");
    rig.wait_for("driver running device=good");
    assert_eq!(rig.service("good").unwrap().incarnation, 2);
    // What is done about errors is asked when there is one.
    let same = device("good") + "interrupts = [\"msi\"]\non_error = \"isolate\"\n";
    rig.configure(&(same + &device("recover")));
    assert_eq!(daemon.reload().unwrap().kept, ["good", "recover"]);
}

#[test]
fn a_device_that_is_gone_from_the_configuration_and_back_at_once_runs() {
    let mut rig = Rig::start(&["good"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();
    rig.configure("");
    assert_eq!(daemon.reload().unwrap().stopped, ["good"]);
    rig.configure(&device("good"));
    let again = daemon.reload().unwrap();
    assert_eq!([again.restarted, again.started].concat(), ["good"]);
    rig.wait_for("driver running device=good");
    rig.wait_for("driver running device=good");
    assert_eq!(rig.service("good").unwrap().state, State::Running);
}

#[test]
fn a_configuration_with_a_mistake_changes_nothing_and_names_its_line() {
    let mut rig = Rig::start(&["good"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();
    let line = Rig::FIRST_LINE;
    for (mistake, words) in [
        (device("nvme"), format!("iohost.toml:{line}: device \"nvme\": no plugin in")),
        ("[[device]\n".to_owned(), format!("iohost.toml:{line}: ")),
        ("[limits]\nsessions = 1\n".to_owned(), format!("iohost.toml:{}: unknown key", line + 1)),
        ("[[match]]\nclass = \"x\"\n".to_owned(), format!("iohost.toml:{}: key `class`", line + 1)),
    ] {
        rig.configure(&mistake);
        let failure = refusal(&rig);
        assert_eq!(failure.code, "config");
        assert!(failure.message.contains(&words), "no {words:?} in {}", failure.message);
        assert!(!failure.next.is_empty());
    }
    std::fs::remove_file(rig.path("iohost.toml")).unwrap();
    assert!(refusal(&rig).message.contains("cannot be read"));
    let service = rig.service("good").unwrap();
    assert_eq!((service.state, service.incarnation), (State::Running, 1));

    // The same by signal, which has nobody to answer.
    rig.configure("[[device]\n");
    rig.signal(SIGHUP);
    rig.wait_for("the configuration stays as it was");
    assert_eq!(rig.service("good").unwrap().incarnation, 1);
    rig.configure("");
    rig.signal(SIGHUP);
    rig.wait_for("the configuration was read again");
    assert!(rig.service("good").is_none_or(|service| service.state != State::Running));
}

#[test]
fn new_limits_are_those_of_the_next_session() {
    let rig = Rig::start(&["good"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();
    let _first = daemon.open("good").unwrap();
    rig.configure(&("[limits]\nsessions_per_service = 1\n".to_owned() + &device("good")));
    daemon.reload().unwrap();
    let Err(ClientError::Refused(failure)) = daemon.open("good") else { panic!("not refused") };
    assert_eq!(failure.code, "too-many-sessions");
}

#[test]
fn a_plugin_that_is_installed_is_found_by_a_reload() {
    let rig = Rig::start(&[]);
    rig.add_pci("0000:04:00.0", "0x1234", "0x11e8");
    let plugin = || rig.connect().devices().unwrap()[0].plugin.clone();
    rig.install("edu");
    assert_eq!(plugin(), None);
    rig.connect().reload().unwrap();
    assert_eq!(plugin().as_deref(), Some("edu"));
}
