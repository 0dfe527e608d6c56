//! The life of a driver as processes: its stop, its clients, what it says of itself.

use std::process::{Command, Stdio};

use iohost_client::varlink::State;
use iohost_client::{ClientError, Session};
use iohost_tests::{System, eventually};
use probe_api::Client as Probe;
use probe_api::registering::Client as Registering;

fn probe(session: &Session) -> Probe {
    session.client().unwrap()
}

#[test]
fn a_client_of_another_type_has_another_interface() {
    let (system, _device) = System::with_driver("probe");
    let first = system.connect().open("edu0").unwrap();
    let second = system.connect().open_as("edu0", 1).unwrap();
    assert_eq!(second.client::<Registering>().unwrap().client_type().wait(), Ok(1));
    assert!(second.client::<Probe>().is_err(), "it has not the interface of the first");
    assert!(first.client::<Registering>().is_err());
    let Err(ClientError::Refused(refused)) = system.connect().open_as("edu0", 3) else {
        panic!("there is no fourth kind")
    };
    assert_eq!(refused.code, "client-type");
}

#[test]
fn what_a_driver_says_of_itself_is_shown() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    assert!(!system.service("edu0").is_busy);
    probe(&session).describe("green".into()).wait().unwrap();
    eventually("the driver to be busy", || system.service("edu0").is_busy);
    let shown = system.iohost(&["properties", "edu0"]);
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    let entries: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!(entries[0]["properties"]["vendor-id"], 0x1234);
    assert_eq!(entries[1]["properties"]["colour"], "green");
    assert_eq!(entries[1]["properties"]["IOClass"], "probe");
    assert_eq!(entries[1]["provider"], entries[0]["id"]);

    let powered = system.iohost(&["power", "edu0", "low"]);
    assert_eq!(powered.code, Some(0), "{}", powered.stderr);
    let status = system.iohost(&["status"]);
    assert!(status.stdout.contains("running, busy, power low"), "{}", status.stdout);
    assert_eq!(system.iohost(&["power", "edu0", "half"]).code, Some(2));
}

#[test]
fn a_stop_that_takes_its_time_is_waited_for_by_the_daemon() {
    let (mut system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    probe(&session).stop_after(300).wait().unwrap();
    drop(session);
    system.connect().unbind("edu0").unwrap();
    let log = system.daemon_log();
    let (slowly, stopped) = (log.find("stopping, slowly"), log.find("driver stopped"));
    assert!(slowly.is_some() && slowly < stopped, "{log}");
    assert!(!log.contains("killing driver host"), "{log}");
    // Longer than the daemon waits for.
    system.connect().bind("edu0").unwrap();
    let session = system.connect().open("edu0").unwrap();
    probe(&session).stop_after(60_000).wait().unwrap();
    assert_eq!(system.stop(), Some(1));
    assert!(system.daemon_log().contains("did not stop within 5s"));
}

#[test]
fn a_driver_that_ends_itself_is_stopped_and_down_for_that_reason() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    probe(&session).terminate().wait().unwrap();
    eventually("the driver to have ended", || system.service("edu0").state == State::Down);
    assert_eq!(system.service("edu0").reason.unwrap().code, "terminated");
    system.connect().bind("edu0").unwrap();
    system.await_ready("edu0");
}

#[test]
fn a_client_that_dies_is_told_from_one_that_leaves() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    drop(system.connect().open("edu0").unwrap());
    eventually("the session to be over", || system.service("edu0").sessions == 1);
    assert_eq!(probe(&session).crashed_clients().wait(), Ok(0));

    let mut dying = Command::new(env!("CARGO_BIN_EXE_iohost-test-client"))
        .arg(system.socket())
        .arg("edu0")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the other session", || system.service("edu0").sessions == 2);
    dying.kill().unwrap();
    dying.wait().unwrap();
    eventually("the session to be over", || system.service("edu0").sessions == 1);
    assert_eq!(probe(&session).crashed_clients().wait(), Ok(1));
}
