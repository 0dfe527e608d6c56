//! The daemon is killed, or goes, and the next one takes its driver hosts over.

use std::path::Path;

use iohost_client::varlink::{EventKind, Service, State};
use iohost_client::{ClientError, Session};
use iohost_interface::{IOReturn, ToClient, ToDriver};
use nix::sys::signal::Signal::{SIGKILL, SIGTERM, SIGUSR2};

use crate::rig::{Rig, WATCHDOG, kill};
use crate::{number, wait_until};

fn service(rig: &Rig, name: &str) -> Service {
    let services = rig.connect().status().unwrap().services;
    services.into_iter().find(|service| service.name == name).unwrap()
}

/// Waits until a service runs, and gives it.
fn await_running(rig: &Rig, name: &str) -> Service {
    wait_until(|| service(rig, name).state == State::Running);
    service(rig, name)
}

fn is_gone(pid: u32) -> bool {
    // Its parent may be one that does not wait for it.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |stat| stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')))
}

fn assert_answers(session: &Session, scalar: u64) {
    assert_eq!(session.call(0, number(scalar)).wait(Some(WATCHDOG)), Ok(number(scalar)));
}

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).unwrap().next().is_none()
}

#[test]
fn the_next_daemon_finds_drivers_and_sessions_as_they_were() {
    let mut rig = Rig::start(&["stay"]);
    let mut daemon = rig.connect();
    daemon.bind("stay").unwrap();
    let session = daemon.open("stay").unwrap();
    let mut upload = session.producer(ToDriver(0)).unwrap();
    let mut download = session.consumer(ToClient(1)).unwrap();
    let before = service(&rig, "stay");

    rig.replace_daemon(|_| upload.send_within(b"sent while nobody was there", WATCHDOG).unwrap());

    let mut entry = Vec::new();
    download.receive_within(&mut entry, WATCHDOG).unwrap();
    assert_eq!(entry, b"sent while nobody was there");
    let after = await_running(&rig, "stay");
    assert_eq!((after.pid, after.incarnation, after.sessions), (before.pid, 1, 1));
    assert!(after.taken_over && !before.taken_over);
    assert_answers(&session, 7);
    assert_eq!(session.generation(), 1, "nothing has happened to it");

    // The connection is one to the new daemon by now.
    let second = daemon.open("stay").unwrap();
    assert!(second.number() > session.number());
    assert_answers(&second, 8);
    drop(session);
    wait_until(|| service(&rig, "stay").sessions == 1);

    rig.signal(SIGTERM);
    assert_eq!(rig.exit_code(), 0);
    assert!(is_gone(before.pid.unwrap()));
    assert!(is_empty(&rig.path("run/hosts")));
    assert_eq!(second.call(0, number(9)).wait(Some(WATCHDOG)), Err(IOReturn::OFFLINE));
}

#[test]
fn a_driver_host_that_dies_after_it_was_taken_over_is_replaced_and_its_sessions_go_on() {
    let mut rig = Rig::start(&["stay"]);
    let session = {
        rig.connect().bind("stay").unwrap();
        rig.connect().open("stay").unwrap()
    };
    rig.replace_daemon(|_| ());
    let taken_over = await_running(&rig, "stay");
    kill(taken_over.pid.unwrap(), SIGKILL);
    session.wait_for_generation(1, WATCHDOG).unwrap();
    assert_answers(&session, 7);
    let next = service(&rig, "stay");
    assert_eq!((next.incarnation, next.taken_over, next.sessions), (2, false, 1));
}

#[test]
fn a_driver_host_that_died_while_there_was_no_daemon_is_replaced_and_its_sessions_are_over() {
    let mut rig = Rig::start(&["stay"]);
    rig.connect().bind("stay").unwrap();
    let session = rig.connect().open("stay").unwrap();
    rig.replace_daemon(|rig| {
        let host = rig.noted_hosts()[0];
        kill(host, SIGKILL);
        wait_until(|| is_gone(host));
    });
    assert_eq!(session.call(0, number(7)).wait(Some(WATCHDOG)), Err(IOReturn::OFFLINE));
    let next = await_running(&rig, "stay");
    assert_eq!((next.incarnation, next.taken_over, next.sessions), (2, false, 0));
}

#[test]
fn a_driver_host_that_lies_or_is_silent_is_killed_and_its_device_started_anew() {
    for script in ["stay-lies", "stay-doubles", "stay-blind", "stay-garbage", "stay-silent"] {
        let mut rig = Rig::start(&[script, "stay"]);
        for name in [script, "stay"] {
            rig.connect().bind(name).unwrap();
        }
        let session = rig.connect().open(script).unwrap();
        let kept = rig.connect().open("stay").unwrap();
        assert_answers(&session, 1);
        let host = service(&rig, script).pid.unwrap();
        rig.replace_daemon(|_| ());
        wait_until(|| is_gone(host));
        let next = await_running(&rig, script);
        assert_eq!((next.incarnation, next.taken_over), (2, false), "{script}");
        assert!(await_running(&rig, "stay").taken_over, "{script}");
        assert_answers(&kept, 2);
    }
}

#[test]
fn a_daemon_that_is_killed_while_a_driver_starts_leaves_it_to_the_next_one() {
    let mut rig = Rig::start(&["hang"]);
    wait_until(|| !rig.noted_hosts().is_empty());
    let first = rig.noted_hosts()[0];
    rig.replace_daemon(|_| ());
    rig.wait_for("killing driver host");
    wait_until(|| is_gone(first));
    wait_until(|| service(&rig, "hang").incarnation > 1);
}

#[test]
fn a_daemon_that_is_killed_while_a_driver_stops_leaves_it_to_the_next_one() {
    let mut rig = Rig::start(&["stay-stubborn"]);
    rig.connect().bind("stay-stubborn").unwrap();
    let host = service(&rig, "stay-stubborn").pid.unwrap();
    let unbinding = std::thread::scope(|scope| {
        let mut daemon = rig.connect();
        let unbinding = scope.spawn(move || daemon.unbind("stay-stubborn"));
        wait_until(|| service(&rig, "stay-stubborn").state == State::Stopping);
        kill(rig.pid(), SIGKILL);
        unbinding.join().unwrap()
    });
    assert!(matches!(unbinding, Err(ClientError::Broken(_))), "{unbinding:?}");
    rig.replace_daemon(|_| ());
    // The configuration has it, so it runs; but not in the process that was to stop.
    wait_until(|| is_gone(host));
    assert_eq!(await_running(&rig, "stay-stubborn").incarnation, 2);
}

#[test]
fn a_daemon_that_is_killed_right_after_a_driver_leaves_its_restart_to_the_next_one() {
    let mut rig = Rig::start(&["stay"]);
    for _ in 0..5 {
        let host = await_running(&rig, "stay").pid.unwrap();
        kill(host, SIGKILL);
        rig.replace_daemon(|_| ());
        wait_until(|| is_gone(host));
        // A person who asks starts it again where it died too often.
        wait_until(|| rig.connect().bind("stay").is_ok());
        let hosts = rig.noted_hosts();
        assert_eq!(hosts, [service(&rig, "stay").pid.unwrap()], "one, and no other");
    }
}

#[test]
fn a_driver_host_whose_device_is_not_configured_any_more_is_stopped() {
    let mut rig = Rig::start(&["stay", "good"]);
    rig.connect().bind("stay").unwrap();
    let host = service(&rig, "stay").pid.unwrap();
    let config = std::fs::read_to_string(rig.path("iohost.toml")).unwrap();
    let (rest, good) = (config.split("[[device]]").next().unwrap(), "name = \"good\"");
    let good = config.split("[[device]]").find(|device| device.contains(good)).unwrap();
    let config = format!("{rest}[[device]]{good}");
    rig.replace_daemon(|rig| std::fs::write(rig.path("iohost.toml"), config).unwrap());
    wait_until(|| is_gone(host));
    wait_until(|| rig.connect().status().unwrap().services.len() == 1);
    await_running(&rig, "good");
}

#[test]
fn sigusr2_ends_the_daemon_and_leaves_the_drivers() {
    let mut rig = Rig::start(&["stay"]);
    let mut daemon = rig.connect();
    let mut watch = daemon.watch().unwrap();
    daemon.bind("stay").unwrap();
    let session = daemon.open("stay").unwrap();
    assert_eq!(watch.next_event().unwrap().kind, EventKind::Began);
    rig.signal(SIGUSR2);
    assert_eq!(rig.exit_code(), 0);
    assert!(matches!(daemon.status(), Err(ClientError::NotRunning { .. })));
    assert!(watch.next_event().is_err());
    assert_answers(&session, 3);

    rig.start_daemon();
    watch.resume().unwrap();
    let event = watch.next_event().unwrap();
    assert_eq!((event.kind, event.incarnation), (EventKind::Began, 1));
    assert!(service(&rig, "stay").taken_over);
    assert_answers(&session, 4);
}
