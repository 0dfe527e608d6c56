//! A driver is upgraded under its clients, and goes back to the version before where the new one does
//! not start.
//!
//! Twelve times here, a third of them with a version that does not start. More often, a tenth of them
//! then, with
//!
//! ```sh
//! IOHOST_UPGRADES=100 cargo test -p iohost_tests --test upgrade -- --nocapture
//! ```

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use iohost_client::varlink::State;
use iohost_client::{ClientError, Failure, WaitError};
use iohost_tests::{System, built_files, eventually};

const PATIENCE: Duration = Duration::from_secs(60);

/// The ways in which a version does not start, and what is said of each.
const FAILURES: [(u8, &str); 5] = [
    (b'e', "this version does not start"),
    (b'p', "this version panics"),
    (b'x', "exited with code 9"),
    (b'r', "a state of another form"),
    (b'h', "did not become ready"),
];

/// A version of the probe that starts as `how` says; see `probe_api::HOW_IT_STARTS`.
fn version(system: &System, how: u8) -> PathBuf {
    let mut bytes = fs::read(built_files().join("libprobe.so")).unwrap();
    let wanted = probe_api::HOW_IT_STARTS;
    let places: Vec<usize> = bytes
        .windows(wanted.len())
        .enumerate()
        .filter_map(|(place, found)| (found == wanted).then_some(place))
        .collect();
    assert!(!places.is_empty(), "the probe has no mark to change");
    for place in places {
        bytes[place + probe_api::HOW] = how;
    }
    let path = system.path(&format!("version-{}.so", char::from(how)));
    fs::write(&path, bytes).unwrap();
    path
}

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Failure {
    match result {
        Err(ClientError::Refused(failure)) => failure,
        other => panic!("not refused, but {other:?}"),
    }
}

fn installed(system: &System) -> Vec<u8> {
    let files: Vec<_> = fs::read_dir(system.path("drivers")).unwrap().map(Result::unwrap).collect();
    assert_eq!(files.len(), 1, "one plugin, and nothing else: {files:?}");
    fs::read(files[0].path()).unwrap()
}

#[test]
fn a_driver_is_upgraded_again_and_again_and_no_client_hears_of_it() {
    let wanted = std::env::var("IOHOST_UPGRADES");
    let (upgrades, every) = wanted.map_or((15, 3), |word| (word.parse().expect("a number"), 10));
    let (system, _device) = System::with_driver("probe");
    let sessions = [(); 3].map(|()| system.connect().open("edu0").unwrap());
    let (is_over, calls) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut failures = 0;
    thread::scope(|scope| {
        let end = End(&is_over);
        for session in &sessions {
            scope.spawn(|| {
                let probe = session.client::<probe_api::Client>().unwrap();
                let mut last = 0;
                while !is_over.load(SeqCst) {
                    let counted = probe.count().wait_for(PATIENCE).expect("no call fails");
                    assert!(counted > last, "{counted} after {last}: the driver forgot");
                    last = counted;
                    calls.fetch_add(1, SeqCst);
                }
            });
        }
        let probe = sessions[0].client::<probe_api::Client>().unwrap();
        let mut running = u32::from(b'0');
        for round in 0..upgrades {
            let before = (installed(&system), calls.load(SeqCst));
            if round % every == every - 1 {
                let (how, said) = FAILURES[failures % FAILURES.len()];
                failures += 1;
                let failure = refused(system.connect().upgrade("edu0", version(&system, how)));
                assert_eq!(failure.code, "upgrade-failed");
                assert!(failure.message.contains(said), "{failure}");
                assert_eq!(installed(&system), before.0);
            } else {
                running = u32::from(b'1') + u32::from(round as u8 % 9);
                let new = version(&system, running as u8);
                // By the name of its driver, too.
                let name = if round % 2 == 0 { "edu0" } else { "probe" };
                let upgraded = system.connect().upgrade(name, &new).unwrap();
                assert_eq!(
                    (upgraded.service.as_str(), upgraded.driver.as_str()),
                    ("edu0", "probe")
                );
                assert_eq!(installed(&system), fs::read(new).unwrap());
            }
            assert_eq!(probe.version().wait_for(PATIENCE), Ok(running));
            eventually("calls to be answered again", || calls.load(SeqCst) > before.1);
        }
        drop(end);
    });
    let probe = sessions[0].client::<probe_api::Client>().unwrap();
    let counted = probe.count().wait().unwrap();
    assert_eq!(counted, calls.load(SeqCst) + 1, "each call was done once, by whichever version");
    let service = system.service("edu0");
    assert_eq!((service.state, service.sessions), (State::Running, 3));
    println!("{upgrades} upgrades, {failures} of them failed and gone back; {counted} calls");
}

#[test]
fn a_stream_goes_through_upgrades_with_nothing_lost_and_nothing_doubled() {
    let (system, _device) = System::with_edu();
    let session = system.connect().open("edu0").unwrap();
    let mut upload = session.producer(edu_api::UPLOAD).unwrap();
    let mut download = session.consumer(edu_api::DOWNLOAD).unwrap();
    let (is_over, received) = (AtomicBool::new(false), AtomicU64::new(0));
    let sent = AtomicU64::new(u64::MAX);
    thread::scope(|scope| {
        let end = End(&is_over);
        let sending = scope.spawn(|| {
            let mut number = 0_u64;
            while !is_over.load(SeqCst) {
                upload.send_within(&number.to_ne_bytes().repeat(20), PATIENCE).unwrap();
                number += 1;
            }
            sent.store(number, SeqCst);
        });
        let receiving = scope.spawn(|| {
            let (mut entry, mut number) = (Vec::new(), 0_u64);
            while number < sent.load(SeqCst) {
                match download.receive_within(&mut entry, Duration::from_millis(100)) {
                    Ok(()) => assert_eq!(entry, number.to_ne_bytes().repeat(20)),
                    Err(WaitError::TimedOut { .. }) => continue,
                    Err(err) => panic!("entry {number}: {err}"),
                }
                number += 1;
                received.store(number, SeqCst);
            }
        });
        for _ in 0..5 {
            let before = received.load(SeqCst);
            system.connect().upgrade("edu0", built_files().join("libedu.so")).unwrap();
            eventually("the stream to flow on", || received.load(SeqCst) > before);
        }
        drop(end);
        sending.join().unwrap();
        receiving.join().unwrap();
    });
    assert_eq!(received.load(SeqCst), sent.load(SeqCst));
    assert_eq!(session.generation(), 6);
}

#[test]
fn what_cannot_be_upgraded_is_refused_and_the_driver_goes_on() {
    let (system, _device) = System::with_driver("probe");
    let host = system.await_ready("edu0");
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    let before = installed(&system);
    let upgrade =
        |service: &str, file: PathBuf| refused(system.connect().upgrade(service, file)).code;
    let text = system.path("text.so");
    fs::write(&text, "no library").unwrap();
    assert_eq!(upgrade("edu0", text), "plugin-not-a-library");
    assert_eq!(upgrade("edu0", system.path("missing.so")), "plugin-unreadable");
    assert_eq!(upgrade("edu0", built_files().join("libedu.so")), "upgrade-mismatch");
    assert_eq!(upgrade("nobody", version(&system, b'1')), "no-such-service");

    // A call that is never answered.
    let _held = probe.hold();
    assert_eq!(probe.count().wait(), Ok(1));
    assert_eq!(upgrade("edu0", version(&system, b'1')), "driver-busy");
    assert_eq!(probe.count().wait(), Ok(2));
    assert_eq!(probe.version().wait(), Ok(u32::from(b'0')));
    assert_eq!(system.await_ready("edu0"), host, "the same process");
    assert_eq!((installed(&system), session.generation()), (before, 1));
}

/// Ends what runs until a flag is set, also when a test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}
