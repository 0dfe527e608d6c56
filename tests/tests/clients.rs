//! What a client can ask for beside calls and entries: services by what they are, news of them,
//! memory of a driver's; and what it is told when it asks for what cannot be.

use std::time::Duration;

use iohost_client::{ClientError, EventKind, Failure, NoAccess, ServiceMatch, ServiceWatch};
use iohost_interface::IOReturn;
use iohost_tests::{System, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn kill_process(pid: u32) {
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
}

/// The next event in words, and the code of its reason.
fn next(watch: &mut ServiceWatch) -> (String, Option<Failure>) {
    let event =
        watch.next_event_within(Duration::from_secs(60)).unwrap().expect("an event in time");
    let kind = match event.kind {
        EventKind::Began => "began",
        EventKind::Ended => "ended",
    };
    let words = format!("{} {} {kind} {}", event.service, event.interface, event.incarnation);
    let reason = event.reason.map(|why| Failure::new(why.code, why.message, why.next));
    (words, reason)
}

/// `edu0` with the driver `edu`, `probe0` with the driver `probe`.
fn two_services() -> (System, [iohost_tests::Emulated; 2]) {
    let mut system = System::new();
    let devices = [system.start_edu_device("edu0"), system.start_edu_device("probe0")];
    system.install_driver("edu");
    system.install_driver("probe");
    let config = system.device_config("edu0", "edu") + &system.device_config("probe0", "probe");
    system.start(&config);
    system.await_ready("edu0");
    system.await_ready("probe0");
    (system, devices)
}

#[test]
fn a_service_is_found_by_what_it_is() {
    let (system, _devices) = two_services();
    let mut daemon = system.connect();
    let any = ServiceMatch::new;
    assert_eq!(daemon.find(&any()).unwrap(), ["edu0", "probe0"]);
    assert_eq!(daemon.find(&any().driver("probe")).unwrap(), ["probe0"]);
    assert_eq!(daemon.find(&any().interface_named("edu")).unwrap(), ["edu0"]);
    assert!(daemon.find(&any().name("edu0").driver("probe")).unwrap().is_empty());
    // Behind a socket, so the daemon knows no ids.
    assert!(daemon.find(&any().pci(0x1234, 0x11e8)).unwrap().is_empty());

    let probes = any().interface::<probe_api::Client>();
    let session = daemon.open_matching(&probes).unwrap();
    assert_eq!(session.service(), "probe0");
    assert_eq!(session.client::<probe_api::Client>().unwrap().aborted().wait(), Ok(0));

    let several = daemon.open_matching(&any()).unwrap_err();
    assert!(matches!(&several, ClientError::Ambiguous { services, .. } if services.len() == 2));
    assert_eq!(several.failure().next, "name one of them: edu0, probe0");
    let none = daemon.open_matching(&any().driver("nvme")).unwrap_err();
    assert!(matches!(none, ClientError::NoMatch { .. }), "{none}");
    assert_eq!(none.to_string(), "no service runs that has driver nvme");
}

/// Another version of the probe's interface.
mod changed {
    iohost_interface::interface! {
        /// A method with other results.
        pub interface probe;
        methods { 5 => fn aborted() -> u64; }
        queues {}
    }
}

#[test]
fn a_program_built_for_another_version_is_told_what_is_different() {
    let (system, _device) = System::with_driver("probe");
    let mut daemon = system.connect();
    let session = daemon.open("edu0").unwrap();
    let err = session.client::<changed::Client>().map(drop).unwrap_err();
    let ClientError::OtherVersion { missing, .. } = &err else { panic!("{err}") };
    assert_eq!(missing, "method 5 aborted() -> (u64)");
    assert_eq!(err.failure().code, "other-version");
    let wrong = session.client::<edu_api::Client>().map(drop).unwrap_err();
    assert!(matches!(wrong, ClientError::WrongInterface { .. }), "{wrong}");
    let by_match = ServiceMatch::new().interface::<changed::Client>();
    assert!(matches!(daemon.open_matching(&by_match), Err(ClientError::NoMatch { .. })));
}

#[test]
fn a_client_hears_why_a_driver_ended_and_when_it_is_there_again() {
    let (system, _devices) = two_services();
    let mut daemon = system.connect();
    let mut watch = daemon.watch().unwrap();
    assert_eq!(next(&mut watch), ("edu0 edu began 1".to_owned(), None));
    assert_eq!(next(&mut watch), ("probe0 probe began 1".to_owned(), None));
    assert_eq!(watch.next_event_within(Duration::ZERO).unwrap(), None, "nothing else happened");

    kill_process(system.service("edu0").pid.unwrap());
    let (words, reason) = next(&mut watch);
    assert_eq!(words, "edu0 edu ended 1");
    let reason = reason.expect("an end has a reason");
    assert_eq!(reason.code, "driver-died");
    assert!(reason.message.contains("SIGKILL"), "{reason}");
    assert_eq!(next(&mut watch), ("edu0 edu began 2".to_owned(), None));
    // It is true what it says.
    daemon.open("edu0").unwrap();

    daemon.unbind("probe0").unwrap();
    let (words, reason) = next(&mut watch);
    assert_eq!(
        (words.as_str(), reason.unwrap().code.as_str()),
        ("probe0 probe ended 1", "stopped")
    );
    daemon.bind("probe0").unwrap();
    assert_eq!(next(&mut watch).0, "probe0 probe began 2");

    let mut later = daemon.watch().unwrap();
    assert_eq!(next(&mut later).0, "edu0 edu began 2", "what runs already comes first");
}

#[test]
fn a_watch_ends_with_the_daemon() {
    let (mut system, _device) = System::with_edu();
    let mut watch = system.connect().watch().unwrap();
    assert_eq!(next(&mut watch).0, "edu0 edu began 1");
    let waiting = std::thread::spawn(move || {
        loop {
            if let Err(err) = watch.next_event() {
                return err;
            }
        }
    });
    assert_eq!(system.stop(), Some(0));
    let err = waiting.join().unwrap();
    assert!(matches!(err, ClientError::Broken(_) | ClientError::Refused(_)), "{err:?}");
}

#[test]
fn clients_that_leave_a_watch_leave_nothing_behind() {
    let (system, _device) = System::with_edu();
    // More than there can be at a time, while nothing happens that they could be told.
    for _ in 0..200 {
        let mut watch = loop {
            // The daemon closes one that is too many; those that left make room.
            match system.connect().watch() {
                Ok(watch) => break watch,
                Err(_) => std::thread::yield_now(),
            }
        };
        let _ = watch.next_event_within(Duration::from_millis(1));
    }
    eventually("room for a connection", || {
        iohost_client::Daemon::connect(system.socket())
            .is_ok_and(|mut daemon| daemon.status().is_ok())
    });
}

#[test]
fn memory_of_a_driver_is_the_same_each_time_it_is_mapped() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    let map = |memory| session.map_memory(memory, Some(probe_api::MEMORY_BYTES)).unwrap();

    let memory = map(probe_api::SHARED);
    assert_eq!((memory.len(), memory.is_writable()), (10_000, true));
    memory.write_at(9_995, b"there").unwrap();
    assert_eq!(probe.peek(probe_api::SHARED, 9_995, 5).wait().unwrap(), b"there");
    drop(memory);

    let again = map(probe_api::SHARED);
    let twice = map(probe_api::SHARED);
    let mut seen = [0; 5];
    again.read_at(9_995, &mut seen).unwrap();
    assert_eq!(&seen, b"there", "unmapped and mapped again, it is the same memory");
    probe.poke(probe_api::SHARED, 0, b"back".to_vec()).wait().unwrap();
    let mut seen = [0; 4];
    twice.read_at(0, &mut seen).unwrap();
    assert_eq!(&seen, b"back");

    // Another client has the same.
    let other = system.connect().open("edu0").unwrap();
    let theirs = other.map_memory(probe_api::SHARED, None).unwrap();
    theirs.read_at(0, &mut seen).unwrap();
    assert_eq!(&seen, b"back");
    // And it stays when its session is over.
    drop(other);
    theirs.read_at(0, &mut seen).unwrap();
}

#[test]
fn memory_that_a_driver_publishes_can_be_read_and_not_written() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    let memory = session.map_memory(probe_api::PUBLISHED, None).unwrap();
    probe.poke(probe_api::PUBLISHED, 100, b"news".to_vec()).wait().unwrap();
    let mut seen = [0; 4];
    memory.read_at(100, &mut seen).unwrap();
    assert_eq!(&seen, b"news");
    assert_eq!(memory.write_at(100, b"mine"), Err(NoAccess::ReadOnly));
    // Not even a client that goes around the library: the mapping has no such right.
    let mapped = std::fs::read_to_string("/proc/self/maps").unwrap();
    let address = format!("{:x}-", memory.address().addr());
    let line = mapped.lines().find(|line| line.starts_with(&address)).expect("it is mapped");
    assert!(line.contains(" r--s "), "{line}");
}

#[test]
fn memory_that_is_not_there_or_of_another_size_is_an_error_of_its_own() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    let none = session.map_memory(7, None).unwrap_err();
    let ClientError::NoMemory { memory: 7, status } = none else { panic!("{none}") };
    assert_eq!(status, IOReturn::BAD_ARGUMENT, "whatever the driver said");
    let wrong = session.map_memory(probe_api::SHARED, Some(4096)).unwrap_err();
    assert_eq!(wrong.to_string(), "memory of type 0 has 10000 bytes, not 4096");
    assert_eq!(wrong.failure().code, "wrong-size");

    let memory = session.map_memory(probe_api::SHARED, None).unwrap();
    for (offset, len) in [(10_000, 1), (9_999, 2), (usize::MAX, 2), (0, 10_001)] {
        let outside = NoAccess::Outside { offset, len, size: 10_000 };
        assert_eq!(memory.read_at(offset, &mut vec![0; len]), Err(outside));
        assert_eq!(memory.write_at(offset, &vec![0; len]), Err(outside));
    }
    assert_eq!(memory.read_at(10_000, &mut []), Ok(()));

    kill_process(system.service("edu0").pid.unwrap());
    assert_eq!(session.wait_for_generation(1, Duration::MAX), Ok(2));
    memory.write_at(0, b"still ours").unwrap();
    // The next driver has memory of its own.
    let next = session.map_memory(probe_api::SHARED, None).unwrap();
    let mut bytes = [0; 5];
    next.read_at(0, &mut bytes).unwrap();
    assert_ne!(&bytes, b"still");
    system.connect().unbind("edu0").unwrap();
    let gone = session.map_memory(probe_api::SHARED, None);
    assert!(matches!(gone, Err(ClientError::NoMemory { status: IOReturn::OFFLINE, .. })));
}

#[test]
fn more_than_four_kilobytes_go_both_ways_as_memory_that_the_client_offers() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    for len in [1, 4096, 4097, 1_000_003] {
        let from = session.offer_memory(len, true).unwrap();
        let to = session.offer_memory(len, false).unwrap();
        let mut sent: Vec<u8> = (0..len).map(|n| (n * 7 + n / 256) as u8).collect();
        from.write_at(0, &sent).unwrap();
        assert_eq!(probe.reverse(from.number(), to.number()).wait(), Ok(len as u64));
        let mut received = vec![0; len];
        to.read_at(0, &mut received).unwrap();
        sent.reverse();
        assert!(received == sent, "{len} bytes");
    }
    let outside = NoAccess::Outside { offset: 10, len: 1, size: 10 };
    assert_eq!(session.offer_memory(10, false).unwrap().write_at(10, &[0]), Err(outside));
}

#[test]
fn a_driver_cannot_write_memory_that_is_offered_for_reading_or_use_what_is_not_there() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    let (from, reading) =
        (session.offer_memory(10, true).unwrap(), session.offer_memory(10, true).unwrap());
    let refused = probe.reverse(from.number(), reading.number()).wait();
    assert_eq!(refused, Err(IOReturn::NOT_WRITABLE));
    let shorter = session.offer_memory(9, false).unwrap();
    let refused = probe.reverse(from.number(), shorter.number()).wait();
    assert_eq!(refused, Err(IOReturn::OVERRUN));
    for unknown in [0, 1000, u64::MAX] {
        let refused = probe.reverse(from.number(), unknown).wait();
        assert_eq!(refused, Err(IOReturn::NOT_FOUND), "{unknown}");
    }
    // Nor that of another client, whose numbers are its own.
    let other = system.connect().open("edu0").unwrap();
    let others = other.client::<probe_api::Client>().unwrap();
    let (number, taken_back) = (from.number(), shorter.number());
    assert_eq!(others.reverse(number, number).wait(), Err(IOReturn::NOT_FOUND));
    drop(shorter);
    assert_eq!(probe.reverse(number, taken_back).wait(), Err(IOReturn::NOT_FOUND));
    let err = session.offer_memory(0, false).unwrap_err();
    assert!(matches!(err, ClientError::Offer { bytes: 0, .. }), "{err}");
}

#[test]
fn memory_is_offered_64_at_a_time_as_often_as_one_likes() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    let mut numbers = std::collections::BTreeSet::new();
    for _ in 0..5 {
        let all: Vec<_> = (0..64).map(|_| session.offer_memory(10, false).unwrap()).collect();
        let (first, last) = (all[0].number(), all[63].number());
        assert_eq!(probe.reverse(first, last).wait(), Ok(10));
        numbers.extend(all.iter().map(iohost_client::OfferedMemory::number));
    }
    assert_eq!(numbers.len(), 320, "a number is never used twice");
}

#[test]
fn memory_of_a_client_that_is_gone_is_not_ready() {
    let (system, _device) = System::with_driver("probe");
    let leaving = system.connect().open("edu0").unwrap();
    let memory = leaving.offer_memory(10, false).unwrap();
    let held = leaving.client::<probe_api::Client>().unwrap().hold();
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    let look = || IOReturn(probe.look_for_memory_of_held(memory.number()).wait().unwrap());
    eventually("the call that is held", || {
        probe.look_for_memory_of_held(memory.number()).wait().is_ok()
    });
    assert_eq!(look(), IOReturn::SUCCESS);
    drop((held, leaving));
    eventually("the end of the session", || look() == IOReturn::NOT_READY);
}

#[test]
fn queues_and_sessions_over_the_limits_are_refused_by_name() {
    let mut system = System::new();
    let _device = system.start_edu_device("edu0");
    system.install_edu_driver();
    let limits = "[limits]\nsessions_per_service = 2\nlargest_queue_bytes = 8192\n\
                  queue_bytes = 4096\n";
    system.start(&format!("{limits}{}", system.edu_config("edu0")));
    system.await_ready("edu0");
    let mut daemon = system.connect();
    let code = |refused: Result<_, ClientError>| match refused.map(|_: iohost_client::Session| ()) {
        Err(ClientError::Refused(failure)) => failure.code,
        other => panic!("not refused: {other:?}"),
    };
    for (sizes, expected) in [
        (&[4096][..], "queue-count"),
        (&[4096, 4096, 4096], "queue-count"),
        (&[4096, 8196], "queue-size"),
        (&[4096, u32::MAX], "queue-size"),
        (&[0, 4096], "queue-size"),
        (&[4098, 4096], "queue-size"),
    ] {
        assert_eq!(code(daemon.open_with_queues("edu0", sizes)), expected, "{sizes:?}");
    }
    let sessions = [daemon.open("edu0").unwrap(), daemon.open("edu0").unwrap()];
    assert_eq!(code(daemon.open("edu0")), "too-many-sessions");
    // One end of a queue at a time.
    let _upload = sessions[0].producer(edu_api::UPLOAD).unwrap();
    let twice = sessions[0].producer(edu_api::UPLOAD).map(drop).unwrap_err();
    assert!(matches!(twice, ClientError::QueueInUse { place: 0 }), "{twice}");
    drop(sessions);
    eventually("room for a session", || daemon.open("edu0").is_ok());
}
