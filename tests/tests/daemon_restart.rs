//! The daemon is killed at any moment, and its drivers and their clients go on.
//!
//! Ten times here. More often, and again from the same seed, with
//!
//! ```sh
//! IOHOST_DAEMON_KILLS=100 IOHOST_SEED=... \
//!     cargo test -p iohost_tests --test daemon_restart -- --nocapture
//! ```

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use iohost_client::varlink::State;
use iohost_client::{ClientError, Daemon, QueueConsumer, QueueProducer, Session, WaitError};
use iohost_interface::IOReturn;
use iohost_tests::{System, eventually};

const PATIENCE: Duration = Duration::from_secs(60);
const DEVICES: [&str; 3] = ["edu0", "edu1", "edu2"];

/// What entry `number` of a stream is: its number, and bytes that depend on it.
fn entry(number: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number);
    let mut bytes = number.to_ne_bytes().to_vec();
    bytes.resize(8 + random.usize(..1000), 0);
    random.fill(&mut bytes[8..]);
    bytes
}

fn send(mut upload: QueueProducer, is_over: &AtomicBool) -> u64 {
    let mut sent = 0;
    while !is_over.load(SeqCst) {
        upload.send_within(&entry(sent), PATIENCE).unwrap();
        sent += 1;
    }
    sent
}

/// Receives until there are as many as `limit` says, and checks each.
fn receive(mut download: QueueConsumer, limit: &AtomicU64, seen: &AtomicU64) {
    let mut found = Vec::new();
    let mut number = 0;
    while number < limit.load(SeqCst) {
        match download.receive_within(&mut found, Duration::from_millis(100)) {
            Ok(()) => assert!(found == entry(number), "entry {number} is another one"),
            Err(WaitError::TimedOut { .. }) => continue,
            Err(err) => panic!("entry {number}: {err}"),
        }
        number += 1;
        seen.store(number, SeqCst);
    }
    let more = download.receive_within(&mut found, Duration::from_millis(100));
    assert!(matches!(more, Err(WaitError::TimedOut { .. })), "an entry too many: {more:?}");
}

fn call(session: &Session, is_over: &AtomicBool) -> u64 {
    let edu = session.client::<edu_api::Client>().unwrap();
    let mut answered = 0;
    while !is_over.load(SeqCst) {
        match edu.factorial(5).wait_for(PATIENCE) {
            Ok(120) => answered += 1,
            // The device computes for the other session.
            Err(IOReturn::BUSY) => {}
            other => panic!("a call ended with {other:?}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
    answered
}

/// Opens sessions, whether a daemon is there or not. One that was opened is as good as any.
fn open(mut daemon: Daemon, is_over: &AtomicBool) -> (u64, u64) {
    let (mut opened, mut without_daemon) = (0, 0);
    while !is_over.load(SeqCst) {
        match daemon.open("edu0") {
            Ok(session) => {
                let edu = session.client::<edu_api::Client>().unwrap();
                let answer = edu.factorial(4).wait_for(PATIENCE);
                assert!(matches!(answer, Ok(24) | Err(IOReturn::BUSY)), "{answer:?}");
                opened += 1;
            }
            Err(
                ClientError::Broken(_)
                | ClientError::NotRunning { .. }
                | ClientError::Connect { .. },
            ) => without_daemon += 1,
            Err(err) => panic!("{err:?}"),
        }
        thread::sleep(Duration::from_millis(2));
    }
    (opened, without_daemon)
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn is_gone(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |stat| stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')))
}

#[test]
fn drivers_and_streams_and_calls_go_on_while_the_daemon_is_killed_again_and_again() {
    let kills = std::env::var("IOHOST_DAEMON_KILLS");
    let kills: u64 = kills.map_or(10, |word| word.parse().expect("a number"));
    let seed = std::env::var("IOHOST_SEED");
    let seed = seed.map_or_else(|_| fastrand::u64(..), |word| word.parse().expect("a seed"));
    println!("again with IOHOST_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);

    let mut system = System::new();
    let devices = DEVICES.map(|name| system.start_edu_device(name));
    system.install_edu_driver();
    let config: String = DEVICES.iter().map(|name| system.edu_config(name)).collect();
    system.start(&config);
    let hosts = DEVICES.map(|name| system.await_ready(name));
    let sessions = DEVICES.map(|name| system.connect().open(name).unwrap());
    let open_before = hosts.map(descriptors);

    let (is_over, daemon) = (AtomicBool::new(false), system.connect());
    let limits = DEVICES.map(|_| AtomicU64::new(u64::MAX));
    let seen = DEVICES.map(|_| AtomicU64::new(0));
    thread::scope(|scope| {
        // Whatever fails, the others do not run for ever.
        let end = End { is_over: &is_over, limits: &limits };
        let mut sending = Vec::new();
        let mut calling = Vec::new();
        let mut receiving = Vec::new();
        for ((session, limit), seen) in sessions.iter().zip(&limits).zip(&seen) {
            let upload = session.producer(edu_api::UPLOAD).unwrap();
            let download = session.consumer(edu_api::DOWNLOAD).unwrap();
            sending.push(scope.spawn(|| send(upload, &is_over)));
            receiving.push(scope.spawn(|| receive(download, limit, seen)));
            calling.push(scope.spawn(|| call(session, &is_over)));
        }
        let opening = scope.spawn(|| open(daemon, &is_over));

        for _ in 0..kills {
            // From the moment that it listens on, the next one can be killed: also before it has
            // taken everything over.
            thread::sleep(Duration::from_micros(random.u64(..100_000)));
            system.kill_daemon();
            let before = seen.each_ref().map(|seen| seen.load(SeqCst));
            for (seen, before) in seen.iter().zip(before) {
                eventually("a stream to flow on without a daemon", || seen.load(SeqCst) > before);
            }
            system.start(&config);
            if random.bool() {
                assert_eq!(DEVICES.map(|name| system.await_ready(name)), hosts);
            }
        }
        assert_eq!(DEVICES.map(|name| system.await_ready(name)), hosts, "the same processes");
        drop(end);
        let sent: Vec<u64> = sending.into_iter().map(|sending| sending.join().unwrap()).collect();
        for (limit, sent) in limits.iter().zip(&sent) {
            limit.store(*sent, SeqCst);
        }
        receiving.into_iter().for_each(|receiving| receiving.join().unwrap());
        let answered: Vec<u64> = calling.into_iter().map(|it| it.join().unwrap()).collect();
        let (opened, without_daemon) = opening.join().unwrap();
        println!(
            "{kills} kills: entries {sent:?}, calls {answered:?}, {opened} sessions opened, \
             {without_daemon} not for want of a daemon"
        );
        assert!(opened > 0 && answered.iter().all(|count| *count > 0));
    });

    for (name, session) in DEVICES.iter().zip(&sessions) {
        let service = system.service(name);
        assert_eq!((service.state, service.incarnation), (State::Running, 1));
        assert!(service.taken_over);
        assert_eq!(session.generation(), 1, "nothing has happened to the session");
        eventually("the other sessions to be over", || system.service(name).sessions == 1);
        let more = system.connect().open(name).unwrap();
        assert!(more.number() > session.number());
        assert_eq!(more.client::<edu_api::Client>().unwrap().factorial(3).wait(), Ok(6));
    }
    for (host, before) in hosts.iter().zip(open_before) {
        eventually("no descriptor too many", || descriptors(*host) <= before);
    }
    assert_eq!(system.stop(), Some(0));
    assert!(hosts.iter().all(|host| is_gone(*host)));
    assert_eq!(fs::read_dir(system.path("run/hosts")).unwrap().count(), 0);
    drop(devices);
}

/// Ends what runs until it is over, also when a test fails.
struct End<'a> {
    is_over: &'a AtomicBool,
    limits: &'a [AtomicU64],
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.is_over.store(true, SeqCst);
        if thread::panicking() {
            self.limits.iter().for_each(|limit| limit.store(0, SeqCst));
        }
    }
}
