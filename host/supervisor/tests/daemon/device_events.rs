//! What the daemon does about what happens to a device, with driver hosts that follow a script.

use crate::rig::{Rig, WATCHDOG};
use iohost_client::varlink::{EventKind, State};
use iohost_client::{ClientError, Daemon, ServiceWatch, Session};
use iohost_control::host::Outcome;
use iohost_interface::{Arguments, IOReturn};
use nix::sys::signal::Signal::SIGTERM;

const ERROR: u64 = 0;
pub(crate) const REMOVAL: u64 = 1;
const GONE: u64 = 2;

/// A service that runs, a session with it, and news of it.
fn running(rig: &Rig, name: &str) -> (Daemon, Session, ServiceWatch) {
    let mut daemon = rig.connect();
    daemon.bind(name).unwrap();
    let session = daemon.open(name).unwrap();
    let mut watch = rig.connect().watch().unwrap();
    let began = watch.next_event().unwrap();
    assert_eq!(began.kind, EventKind::Began);
    (daemon, session, watch)
}

/// Has something happen to the device. The answer may be cut off by what follows.
pub(crate) fn happen(session: &Session, event: u64) {
    let arguments = Arguments { scalars: vec![event], ..Default::default() };
    let _ = session.call(2, arguments).wait(Some(WATCHDOG));
}

/// The code of the reason for which the service ends.
pub(crate) fn end(watch: &mut ServiceWatch) -> String {
    let ended = watch.next_event_within(WATCHDOG).unwrap().expect("news within a minute");
    assert_eq!(ended.kind, EventKind::Ended);
    ended.reason.unwrap().code
}

fn is_over(session: &Session) -> bool {
    let answer = session.call(0, Arguments::default()).wait(Some(WATCHDOG));
    answer == Err(IOReturn::OFFLINE)
}

#[test]
fn a_device_that_somebody_wants_back_is_let_go_and_its_clients_are_told_why() {
    let mut rig = Rig::start(&["good"]);
    let (mut daemon, session, mut watch) = running(&rig, "good");
    happen(&session, REMOVAL);
    assert_eq!(end(&mut watch), "removed");
    rig.wait_for("device removed");
    assert!(is_over(&session));
    let service = &daemon.status().unwrap().services[0];
    assert_eq!((service.state, service.pid), (State::Down, None));
    assert_eq!(service.reason.as_ref().unwrap().code, "removed");
    // It is there again when a person says so.
    daemon.bind("good").unwrap();
    assert_eq!(watch.next_event().unwrap().kind, EventKind::Began);
}

#[test]
fn a_driver_that_keeps_a_device_that_somebody_wants_back_is_killed() {
    let mut rig = Rig::start(&["stubborn"]);
    let (mut daemon, session, mut watch) = running(&rig, "stubborn");
    happen(&session, REMOVAL);
    assert_eq!(end(&mut watch), "removed");
    rig.wait_for("did not stop within 1s");
    rig.wait_for("device removed");
    assert!(is_over(&session));
    assert_eq!(daemon.status().unwrap().services[0].state, State::Down);
}

#[test]
fn a_device_that_is_unbound_while_it_is_removed_is_given_back_at_once() {
    let rig = Rig::start(&["good"]);
    let (mut daemon, session, mut watch) = running(&rig, "good");
    happen(&session, REMOVAL);
    assert_eq!(end(&mut watch), "removed");
    assert_eq!(daemon.unbind("good").unwrap().kernel_driver, None);
}

#[test]
fn an_error_that_is_only_told_changes_nothing() {
    let mut rig = Rig::start(&["error-notify"]);
    let (mut daemon, session, _watch) = running(&rig, "error-notify");
    happen(&session, ERROR);
    rig.wait_for("the device has news device=error-notify event=Error");
    let again = session.call(0, Arguments::default()).wait(Some(WATCHDOG));
    assert_eq!(again, Ok(Arguments::default()));
    let service = &daemon.status().unwrap().services[0];
    assert_eq!((service.state, service.incarnation), (State::Running, 1));
}

#[test]
fn an_error_has_the_driver_started_again_where_the_policy_says_reset() {
    let rig = Rig::start(&["error-reset"]);
    let (mut daemon, session, mut watch) = running(&rig, "error-reset");
    happen(&session, ERROR);
    assert_eq!(end(&mut watch), "device-error");
    let began = watch.next_event_within(WATCHDOG).unwrap().unwrap();
    assert_eq!((began.kind, began.incarnation), (EventKind::Began, 2));
    let quiesced = daemon.status().unwrap().services[0].quiesced.clone().unwrap();
    assert_eq!(quiesced.outcome, Outcome::Reset);
    assert!(!is_over(&session), "another driver host is as good");
    assert_eq!(session.generation(), 2);
}

#[test]
fn an_error_has_the_device_left_alone_where_the_policy_says_isolate() {
    let mut rig = Rig::start(&["error-isolate"]);
    let (mut daemon, session, mut watch) = running(&rig, "error-isolate");
    happen(&session, ERROR);
    assert_eq!(end(&mut watch), "device-error");
    rig.wait_for("device quarantined device=error-isolate");
    let service = &daemon.status().unwrap().services[0];
    assert_eq!((service.state, service.incarnation), (State::Quarantined, 1));
    // A person who asks has looked.
    daemon.bind("error-isolate").unwrap();
    assert_eq!(daemon.status().unwrap().services[0].state, State::Running);
}

#[test]
fn a_device_that_cannot_be_made_safe_is_not_started_again() {
    let mut rig = Rig::start(&["unfit"]);
    rig.wait_for("device quarantined device=unfit");
    let mut daemon = rig.connect();
    let service = daemon.status().unwrap().services[0].clone();
    assert_eq!((service.state, service.incarnation), (State::Quarantined, 1));
    assert_eq!(service.quiesced.unwrap().outcome, Outcome::Quarantined);
    let reason = service.reason.unwrap();
    assert_eq!(reason.code, "device-quarantined");
    assert!(reason.next.contains("iohost bind unfit"), "{}", reason.next);
    let Err(ClientError::Refused(again)) = daemon.bind("unfit") else { panic!("not refused") };
    assert_eq!(again.code, "device-quarantined");
    assert_eq!(daemon.status().unwrap().services[0].incarnation, 2, "tried once, on request");
}

#[test]
fn a_device_that_breaks_while_it_is_given_back_is_kept() {
    let mut rig = Rig::start(&["breaks"]);
    let mut daemon = rig.connect();
    daemon.bind("breaks").unwrap();
    let Err(ClientError::Refused(why)) = daemon.unbind("breaks") else { panic!("not refused") };
    assert_eq!(why.code, "device-quarantined");
    assert_eq!(daemon.status().unwrap().services[0].state, State::Quarantined);
    rig.signal(SIGTERM);
    assert_eq!(rig.exit_code(), 0);
}

#[test]
fn a_device_whose_server_has_left_is_tried_again() {
    let rig = Rig::start(&["good"]);
    let (_daemon, session, mut watch) = running(&rig, "good");
    happen(&session, GONE);
    assert_eq!(end(&mut watch), "removed");
    let began = watch.next_event_within(WATCHDOG).unwrap().unwrap();
    assert_eq!((began.kind, began.incarnation), (EventKind::Began, 2));
    assert!(!is_over(&session));
}

#[test]
fn a_device_whose_driver_did_not_make_it_safe_is_made_safe_by_a_driver_host_without_one() {
    let mut rig = Rig::start(&["stubborn"]);
    let mut daemon = rig.connect();
    daemon.bind("stubborn").unwrap();
    daemon.unbind("stubborn").unwrap();
    rig.wait_for("killing driver host");
    rig.wait_for("making the device safe device=stubborn");
    rig.wait_for("the device is safe device=stubborn outcome=Clean");
    let service = daemon.status().unwrap().services[0].clone();
    assert_eq!((service.state, service.incarnation), (State::Down, 1));

    // So is one whose drivers died too often.
    let mut rig = Rig::start(&["exit"]);
    rig.wait_for("driver host died too often");
    rig.wait_for("the device is safe device=exit outcome=Clean");
    rig.wait_for("device quarantined device=exit");
}

#[test]
fn an_isolated_driver_that_does_not_stop_leaves_a_device_that_is_made_safe() {
    let mut rig = Rig::start(&["isolate-stubborn"]);
    let (mut daemon, session, mut watch) = running(&rig, "isolate-stubborn");
    happen(&session, ERROR);
    assert_eq!(end(&mut watch), "device-error");
    rig.wait_for("killing driver host");
    rig.wait_for("the device is safe device=isolate-stubborn outcome=Clean");
    rig.wait_for("device quarantined device=isolate-stubborn");
    let service = daemon.status().unwrap().services[0].clone();
    assert_eq!((service.state, service.incarnation), (State::Quarantined, 1));
}
