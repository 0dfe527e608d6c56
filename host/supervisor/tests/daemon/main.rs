//! The daemon as a process, with driver hosts that follow a script.

mod configured;
mod device_events;
mod matching;
mod restart;
mod rig;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use iohost_client::varlink::State;
use iohost_client::{BindOptions, ClientError, Daemon, Failure};
use iohost_event::Packets;
use iohost_interface::{Arguments, IOReturn, ToClient, ToDriver};
use nix::sys::signal::Signal::{SIGKILL, SIGTERM};
use rig::{Rig, WATCHDOG};

fn number(scalar: u64) -> Arguments {
    Arguments { scalars: vec![scalar], ..Default::default() }
}

fn refused<T>(result: Result<T, ClientError>) -> Failure {
    match result {
        Err(ClientError::Refused(failure)) => failure,
        Err(other) => panic!("refused with {other:?}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn a_session_carries_calls_and_entries() {
    let rig = Rig::start(&["good"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();

    let session = daemon.open_with_queues("good", &[4096, 4096]).unwrap();
    let mut upload = session.producer(ToDriver(0)).unwrap();
    let mut download = session.consumer(ToClient(1)).unwrap();

    assert_eq!(session.call(0, number(7)).wait(Some(WATCHDOG)), Ok(number(7)));
    let mut entry = Vec::new();
    for round in 0..100_u32 {
        upload.send_within(&round.to_le_bytes().repeat(200), WATCHDOG).unwrap();
        download.receive_within(&mut entry, WATCHDOG).unwrap();
        assert_eq!(entry, round.to_le_bytes().repeat(200));
    }
    assert!(matches!(session.producer(ToDriver(0)), Err(ClientError::QueueInUse { place: 0 })));
    assert!(matches!(session.producer(ToDriver(1)), Err(ClientError::NoSuchQueue { .. })));
}

#[test]
fn a_session_that_is_dropped_is_over_for_the_daemon_too() {
    let mut rig = Rig::start(&["good"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();
    drop(daemon.open("good").unwrap());
    rig.wait_for("session closed device=good session=1");
    assert_eq!(daemon.status().unwrap().services[0].sessions, 0);
}

#[test]
fn a_driver_host_that_is_killed_is_replaced_and_its_clients_go_on() {
    let mut rig = Rig::start(&["good"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();
    let session = daemon.open("good").unwrap();
    let mut upload = session.producer(ToDriver(0)).unwrap();
    let mut download = session.consumer(ToClient(1)).unwrap();
    let before = &daemon.status().unwrap().services[0];

    rig::kill(before.pid.unwrap(), SIGKILL);

    // While it is away, and when it is back.
    assert_eq!(session.call(0, number(7)).wait(Some(WATCHDOG)), Ok(number(7)));
    rig.wait_for("driver host died, restarting device=good");
    rig.wait_for("driver running device=good");
    assert_eq!(session.generation(), 2);
    upload.send_within(b"entry", WATCHDOG).unwrap();
    let mut entry = Vec::new();
    download.receive_within(&mut entry, WATCHDOG).unwrap();
    assert_eq!(entry, b"entry");
    let after = &daemon.status().unwrap().services[0];
    assert_eq!((before.incarnation, after.incarnation), (1, 2));
    assert_ne!(before.pid, after.pid);
}

#[test]
fn sessions_end_when_the_service_is_given_up() {
    let mut rig = Rig::start(&["once"]);
    let mut daemon = rig.connect();
    daemon.bind("once").unwrap();
    let session = daemon.open("once").unwrap();
    rig::kill(daemon.status().unwrap().services[0].pid.unwrap(), SIGKILL);
    // Held for a driver that comes twice, and dies at its start.
    let answer = session.call(0, number(7)).wait(Some(WATCHDOG));
    assert_eq!(answer, Err(IOReturn::OFFLINE));
    rig.wait_for("device quarantined device=once");
    assert_eq!(daemon.status().unwrap().services[0].sessions, 0);
}

#[test]
fn a_driver_that_serves_another_interface_after_its_death_gets_new_sessions_only() {
    let mut rig = Rig::start(&["changes"]);
    let mut daemon = rig.connect();
    daemon.bind("changes").unwrap();
    let session = daemon.open("changes").unwrap();
    rig::kill(daemon.status().unwrap().services[0].pid.unwrap(), SIGKILL);
    assert_eq!(session.call(0, number(7)).wait(Some(WATCHDOG)), Err(IOReturn::OFFLINE));
    rig.wait_for("driver running device=changes");
    let session = daemon.open("changes").unwrap();
    assert_eq!(session.call(0, number(7)).wait(Some(WATCHDOG)), Ok(number(7)));
}

#[test]
fn a_session_that_the_next_driver_refuses_ends() {
    let mut rig = Rig::start(&["choosy"]);
    let mut daemon = rig.connect();
    daemon.bind("choosy").unwrap();
    let session = daemon.open("choosy").unwrap();
    rig::kill(daemon.status().unwrap().services[0].pid.unwrap(), SIGKILL);
    assert_eq!(session.call(0, number(7)).wait(Some(WATCHDOG)), Err(IOReturn::OFFLINE));
    rig.wait_for("session closed device=choosy session=1 reason=\"not this one\"");
}

#[test]
fn the_reason_of_a_death_is_said_in_words() {
    let mut rig = Rig::start(&["good"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();
    let session = daemon.open("good").unwrap();
    let answer = session.call(1, Arguments::default()).wait(Some(WATCHDOG));
    assert_eq!(answer, Err(IOReturn::NO_COMPLETION), "it was begun");
    rig.wait_for("exited with code 5");
    daemon.bind("good").unwrap();
    rig::kill(daemon.status().unwrap().services[0].pid.unwrap(), SIGKILL);
    rig.wait_for("killed by signal 9 (SIGKILL)");
}

#[test]
fn a_driver_host_that_hangs_at_start_is_killed_and_at_last_left_alone() {
    let mut rig = Rig::start(&["hang"]);
    rig.wait_for("device quarantined");
    let service = &rig.connect().status().unwrap().services[0];
    let reason = service.reason.as_ref().unwrap();
    assert_eq!(service.state, State::Quarantined);
    assert_eq!(reason.message, "the driver host of \"hang\" did not become ready within 3s");
    assert_eq!(reason.next, "correct the cause, then start it again: iohost bind hang");
    assert_eq!(service.incarnation, 3, "two restarts, then no more");
}

#[test]
fn a_quarantined_device_starts_again_when_a_person_asks() {
    let mut rig = Rig::start(&["exit"]);
    rig.wait_for("device quarantined");
    let failure = refused(rig.connect().bind("exit"));
    assert!(failure.message.ends_with("exited with code 3"), "{failure}");
    rig.wait_for("device quarantined");
}

#[test]
fn a_driver_host_that_breaks_the_protocol_is_killed_with_what_it_did() {
    for (script, did) in [
        ("garbage", "a message that makes no sense"),
        ("long", "a packet of more than 65536 bytes"),
        ("unasked", "an unexpected message: Stopped"),
    ] {
        let mut rig = Rig::start(&[script]);
        rig.wait_for("device quarantined");
        let service = &rig.connect().status().unwrap().services[0];
        let reason = service.reason.as_ref().unwrap();
        assert_eq!(reason.code, "driver-protocol");
        assert!(reason.message.contains(did), "{script}: {}", reason.message);
    }
}

#[test]
fn a_driver_host_that_says_why_it_cannot_run_is_not_started_again() {
    let rig = Rig::start(&["refuse"]);
    let mut daemon = rig.connect();
    let failure = refused(daemon.bind("refuse"));
    assert_eq!(failure, Failure::new("no-device", "there is no device", "plug it in"));
    let service = &daemon.status().unwrap().services[0];
    assert_eq!(service.state, State::Down);
    let refusal = refused(daemon.open("refuse"));
    assert_eq!(refusal.message, "service \"refuse\" is down: there is no device");
    assert_eq!(refusal.next, "plug it in");
}

#[test]
fn a_driver_host_that_dies_once_at_start_gets_another_chance() {
    let mut rig = Rig::start(&["recover"]);
    rig.wait_for("driver running device=recover");
    assert_eq!(rig.connect().status().unwrap().services[0].incarnation, 2);
}

#[test]
fn a_driver_that_has_not_registered_takes_no_clients_and_is_news_when_it_does() {
    let rig = Rig::start(&["good", "shy"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();
    daemon.bind("shy").unwrap();
    let mut watch = rig.connect().watch().unwrap();
    assert_eq!(watch.next_event().unwrap().service, "good");
    assert_eq!(refused(daemon.open("shy")).code, "not-registered");
    let shy = rig.service("shy").unwrap();
    assert_eq!((shy.state, shy.is_registered), (State::Running, false));
    daemon.properties("shy").unwrap();
    assert_eq!(watch.next_event_within(WATCHDOG).unwrap().unwrap().service, "shy");
    daemon.open("shy").unwrap();
    assert_eq!(refused(daemon.open_as("shy", 1)).code, "client-type");
}

#[test]
fn a_session_that_the_driver_does_not_take_is_refused_in_time() {
    let rig = Rig::start(&["deaf"]);
    let mut daemon = rig.connect();
    daemon.bind("deaf").unwrap();
    let failure = refused(daemon.open("deaf"));
    assert_eq!(failure.message, "the driver did not take the session within 3s");
    assert_eq!(daemon.status().unwrap().services[0].sessions, 0);
}

#[test]
fn sigterm_stops_every_driver_and_leaves_nothing_behind() {
    let mut rig = Rig::start(&["good", "refuse"]);
    rig.connect().bind("good").unwrap();
    rig.signal(SIGTERM);
    assert_eq!(rig.exit_code(), 0);
    assert!(!rig.socket().exists());
}

#[test]
fn a_driver_host_that_cannot_start_does_not_spoil_the_stop() {
    for _ in 0..10 {
        let mut rig = Rig::start(&["refuse"]);
        // Before, while or after the driver host says so.
        rig.signal(SIGTERM);
        assert_eq!(rig.exit_code(), 0);
    }
}

#[test]
fn a_driver_that_does_not_stop_is_killed_and_the_exit_code_says_so() {
    let mut rig = Rig::start(&["stubborn"]);
    rig.connect().bind("stubborn").unwrap();
    rig.signal(SIGTERM);
    rig.wait_for("driver-hung: the driver host of \"stubborn\" did not stop within 3s");
    assert_eq!(rig.exit_code(), 1);
    assert!(!rig.socket().exists());
}

#[test]
fn unbinding_stops_a_driver_and_binding_starts_it_again() {
    let rig = Rig::start(&["good"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();
    daemon.unbind("good").unwrap();
    assert_eq!(daemon.status().unwrap().services[0].state, State::Down);
    daemon.unbind("good").unwrap();
    assert_eq!(daemon.bind("good").unwrap().driver, "good");
    assert_eq!(daemon.bind("good").unwrap().driver, "good");
    assert_eq!(daemon.status().unwrap().services[0].incarnation, 2);
}

#[test]
fn what_cannot_be_opened_is_refused_with_what_to_do() {
    let rig = Rig::start(&["good"]);
    let mut daemon = rig.connect();
    daemon.bind("good").unwrap();

    let failure = refused(daemon.open("bad"));
    assert_eq!(failure.to_string(), "there is no service \"bad\"\n  next: name one of: good");
    assert_eq!(refused(daemon.open_with_queues("good", &[4096])).code, "queue-count");
    assert_eq!(refused(daemon.open_with_queues("good", &[4096, u32::MAX])).code, "queue-size");
    assert_eq!(refused(daemon.open_with_queues("good", &[4096, 6])).code, "queue-size");

    let open: Vec<_> = (0..16).map(|_| daemon.open("good").unwrap()).collect();
    assert_eq!(refused(daemon.open("good")).code, "too-many-sessions");
    drop(open);
}

#[test]
fn a_pci_device_is_matched_by_the_plugins_table_and_says_what_it_lacks() {
    let rig = Rig::start(&["edu"]);
    rig.add_pci("0000:00:04.0", "0x1234", "0x11e8");
    rig.add_pci("0000:00:05.0", "0x8086", "0x100e");
    let mut daemon = rig.connect();

    let devices = daemon.devices().unwrap();
    let plugins: Vec<_> = devices.iter().map(|device| device.plugin.as_deref()).collect();
    assert_eq!(plugins, [Some("edu"), None, Some("edu")]);

    assert_eq!(refused(daemon.bind("00:04.0")).code, "no-iommu");
    assert_eq!(
        refused(daemon.bind("00:05.0")).message,
        format!(
            "no plugin in {} is for device 0000:00:05.0 (8086:100e, class 00ff00)",
            rig.path("drivers").display()
        )
    );
    assert_eq!(refused(daemon.bind("00:06.0")).code, "no-such-device");
    assert_eq!(daemon.status().unwrap().services.len(), 1, "what cannot be bound is forgotten");
}

#[test]
fn a_kernel_driver_that_does_not_let_go_holds_up_its_own_device_only() {
    const SLOW: &str = "0000:00:04.0";
    let rig = Rig::start(&["good", "edu"]);
    rig.add_pci(SLOW, "0x1234", "0x11e8");
    let unbind = rig.give_to_slow_driver(SLOW);
    let note = rig.path("state").join(format!("{SLOW}.json"));

    std::thread::scope(|scope| {
        let mut daemon = rig.connect();
        let binding = scope.spawn(move || refused(daemon.bind(SLOW)));
        // The note is there before the driver is asked to let go.
        wait_until(|| note.exists());
        let mut daemon = rig.connect();
        let services = daemon.status().unwrap().services;
        let slow = services.iter().find(|service| service.location == SLOW).unwrap();
        assert_eq!(slow.state, State::Starting);
        daemon.bind("good").unwrap();
        assert_eq!(refused(daemon.open(SLOW)).code, "not-running");

        // The driver lets go; as no kernel is there to do it, it is bound to it still.
        assert_eq!(std::fs::read_to_string(&unbind).unwrap(), SLOW);
        let failure = binding.join().unwrap();
        assert_eq!(
            (&*failure.code, &*failure.message),
            (
                "bind-failed",
                "PCI device 0000:00:04.0 did not bind to vfio-pci, it is now bound to slow"
            )
        );
        assert!(!note.exists(), "nothing is left to undo");
        assert_eq!(daemon.status().unwrap().services.len(), 2, "it is forgotten");
    });
}

#[test]
fn a_device_that_is_unbound_while_it_is_being_taken_is_given_back() {
    const SLOW: &str = "0000:00:04.0";
    let rig = Rig::start(&["edu"]);
    rig.add_pci(SLOW, "0x1234", "0x11e8");
    let unbind = rig.give_to_slow_driver(SLOW);
    let note = rig.path("state").join(format!("{SLOW}.json"));

    std::thread::scope(|scope| {
        let (mut daemon, mut other) = (rig.connect(), rig.connect());
        let binding = scope.spawn(move || refused(daemon.bind(SLOW)));
        wait_until(|| note.exists());
        let unbinding = scope.spawn(move || other.unbind(SLOW));
        assert_eq!(binding.join().unwrap().message, "the device was given back");
        assert!(note.exists(), "the driver has not let go yet");
        std::fs::read_to_string(&unbind).unwrap();
        unbinding.join().unwrap().unwrap();
        assert!(!note.exists(), "nothing is left to undo");
        assert_eq!(rig.connect().status().unwrap().services.len(), 1, "it is forgotten");
    });
}

#[test]
fn a_daemon_that_is_to_stop_waits_for_a_kernel_driver_until_it_is_told_again() {
    const SLOW: &str = "0000:00:04.0";
    let mut rig = Rig::start(&[]);
    std::fs::write(rig.path("drivers/edu.so"), "").unwrap();
    rig.add_pci(SLOW, "0x1234", "0x11e8");
    rig.give_to_slow_driver(SLOW);
    let note = rig.path("state").join(format!("{SLOW}.json"));
    std::thread::scope(|scope| {
        let mut daemon = rig.connect();
        // Who waits is told, or loses the connection: the daemon ends at once.
        scope.spawn(move || daemon.bind(SLOW).unwrap_err());
        wait_until(|| note.exists());
        rig.signal(SIGTERM);
        rig.wait_for("stopping");
        rig.signal(SIGTERM);
        rig.wait_for("not waiting for kernel drivers");
        assert_eq!(rig.exit_code(), 1);
    });
    assert!(note.exists(), "the next daemon finds what to undo");
}

#[test]
fn a_group_and_persistence_are_for_pci_devices() {
    let rig = Rig::start(&["good"]);
    for options in [
        BindOptions { group: true, ..BindOptions::default() },
        BindOptions { persist: true, ..BindOptions::default() },
    ] {
        let failure = refused(rig.connect().bind_with("good", options));
        assert_eq!(failure.code, "not-pci");
        assert!(failure.next.contains("without --group and --persist"), "{}", failure.next);
    }
}

/// Waits for something that has no event of its own.
fn wait_until(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + WATCHDOG;
    while !is_so() {
        assert!(Instant::now() < deadline, "it never came to that");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_config_that_names_a_missing_plugin_stops_the_daemon_before_anything_starts() {
    let mut rig = Rig::with_config("[[device]]\nsocket = \"/run/x\"\ndriver = \"nvme\"\n");
    rig.wait_for("iohost.toml:4: device \"/run/x\": no plugin in");
    assert_eq!(rig.exit_code(), 2);
    assert!(!rig.socket().exists());
}

#[test]
fn a_second_daemon_is_refused_and_the_first_goes_on() {
    let rig = Rig::start(&["good"]);
    let mut second = rig.second_daemon();
    second.wait_for(&format!("already-running: a daemon with process id {}", rig.pid()));
    assert_eq!(second.exit_code(), 1);
    rig.connect().bind("good").unwrap();
}

#[test]
fn a_hostile_client_loses_its_own_connection_and_nobody_elses() {
    let rig = Rig::start(&["good"]);
    let mut honest = rig.connect();
    honest.bind("good").unwrap();
    let session = honest.open("good").unwrap();

    let mut hostile: Vec<UnixStream> = Vec::new();
    let attacks: [&[u8]; 6] = [
        b"\0",
        b"not json\0",
        b"{\"method\":\"io.iohost.Status\"",
        b"{\"method\":\"io.iohost.Open\",\"parameters\":{\"service\":7}}\0",
        &[b'['; 60_000],
        &[b' '; 200_000],
    ];
    for attack in attacks {
        let mut stream = UnixStream::connect(rig.socket()).unwrap();
        // The daemon may hang up in the middle of it.
        let _ = stream.write_all(attack);
        hostile.push(stream);
    }
    let stream = UnixStream::connect(rig.socket()).unwrap();
    let many = Packets::from(OwnedFd::from(stream.try_clone().unwrap()));
    let fds = vec![stream.as_fd(); 250];
    many.send(b"{\"method\":\"io.iohost.Status\"}\0", &fds).unwrap();
    hostile.push(stream);
    // Asks without end and never reads an answer.
    let mut stream = UnixStream::connect(rig.socket()).unwrap();
    stream.set_nonblocking(true).unwrap();
    while stream.write_all(&b"{\"method\":\"io.iohost.Status\"}\0".repeat(100)).is_ok() {}
    hostile.push(stream);

    assert_eq!(honest.status().unwrap().services[0].state, State::Running);
    assert_eq!(rig.connect().status().unwrap().services[0].sessions, 1);
    assert_eq!(session.call(0, number(7)).wait(Some(WATCHDOG)), Ok(number(7)));
    drop(hostile);
    assert_eq!(Daemon::connect(rig.socket()).unwrap().status().unwrap().services.len(), 1);
}

#[test]
fn the_interface_describes_itself() {
    let rig = Rig::start(&["good"]);
    let ask = |call: &str| {
        let mut stream = UnixStream::connect(rig.socket()).unwrap();
        stream.write_all(call.as_bytes()).unwrap();
        let mut answer = Vec::new();
        BufReader::new(stream).read_until(0, &mut answer).unwrap();
        String::from_utf8(answer).unwrap()
    };
    let info = ask("{\"method\":\"org.varlink.service.GetInfo\"}\0");
    assert!(info.contains("\"io.iohost\""), "{info}");
    let text = ask("{\"method\":\"org.varlink.service.GetInterfaceDescription\",\
         \"parameters\":{\"interface\":\"io.iohost\"}}\0");
    for word in
        ["method Open(service: string, queue_bytes: ?[]int, client_type: ?int)", "error Refused"]
    {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
}
