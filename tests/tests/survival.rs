//! Sessions outlive their driver: the driver host dies in every way, at any time, and clients go on.
//!
//! The driver on the device can be killed; one that panics and hangs is the probe. The streams run for some
//! seconds here. Longer, and again from the same seed, with
//!
//! ```sh
//! IOHOST_SURVIVE_SECONDS=600 IOHOST_SEED=... \
//!     cargo test --release -p iohost_tests --test survival -- --nocapture
//! ```

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use iohost_client::varlink::State;
use iohost_client::{
    ClientError, QueueConsumer, QueueError, QueueProducer, Session, WaitError, WhenAway,
};
use iohost_event::{PacketError, Packets};
use iohost_interface::packet::{Call, FromDriver, LONGEST, encode_resumed};
use iohost_interface::{Arguments, IOReturn};
use iohost_memory::SharedMemory;
use iohost_memory::ring::TAIL_OFFSET;
use iohost_tests::{Emulated, System, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use probe_api::echo;

const PATIENCE: Duration = Duration::from_secs(60);

/// How a driver host ends.
#[derive(Clone, Copy, Debug)]
enum Death {
    Killed,
    Segfault,
    Abort,
    /// It stops where it is, with all its threads, until the daemon notices.
    Stopped,
    /// The probe panics.
    Panic,
    /// A handler of the probe does not return, until the daemon notices.
    Hang,
}

impl Death {
    /// What is returned has to stay until it is dead.
    fn strike(self, system: &System, host: u32) -> Option<Session> {
        let pid = Pid::from_raw(host as i32);
        let send = |signal| kill(pid, signal).unwrap();
        match self {
            Death::Killed => send(Signal::SIGKILL),
            // Rust's handler looks for a stack overflow first, and lets the next one through.
            Death::Segfault => {
                while kill(pid, Signal::SIGSEGV).is_ok() {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            Death::Abort => send(Signal::SIGABRT),
            Death::Stopped => send(Signal::SIGSTOP),
            Death::Panic | Death::Hang => {
                let session = system.connect().open("edu0").unwrap();
                let probe = session.client::<probe_api::Client>().unwrap();
                // Whoever dies of a call does not answer it.
                match self {
                    Death::Panic => drop(probe.die(2)),
                    _ => drop(probe.spin(0, 0)),
                }
                return Some(session);
            }
        }
        None
    }
}

/// Has the driver host die, and waits until the session has the next one, which the daemon starts by
/// itself.
fn kill_driver(system: &System, session: &Session, death: Death) {
    let known = session.generation();
    let host = system.await_ready("edu0");
    let _dying = death.strike(system, host);
    eventually("the next driver", || session.generation() > known);
    assert_eq!(session.generation(), known + 1, "one death, one generation");
}

/// A service `edu0` that is started again at once, however often it dies, and is soon found to hang.
fn restless(driver: &str) -> (System, Emulated) {
    let mut system = System::new();
    let device = system.start_edu_device("edu0");
    system.install_driver(driver);
    let restart = "[restart]\nmost = 1000000\npause_seconds = 0\nhang_seconds = 1\n";
    system.start(&format!("{restart}{}", system.device_config("edu0", driver)));
    system.await_ready("edu0");
    (system, device)
}

fn seed() -> u64 {
    let seed = std::env::var("IOHOST_SEED");
    let seed = seed.map_or_else(|_| fastrand::u64(..), |word| word.parse().expect("a seed"));
    println!("again with IOHOST_SEED={seed}");
    seed
}

/// What entry `number` of a stream is: its number, and bytes that depend on it.
fn entry(number: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number);
    let mut bytes = number.to_ne_bytes().to_vec();
    bytes.resize(8 + random.usize(..1000), 0);
    random.fill(&mut bytes[8..]);
    bytes
}

fn send_until(mut upload: QueueProducer, is_over: &AtomicBool) -> u64 {
    let mut sent = 0;
    while !is_over.load(SeqCst) {
        upload.send_within(&entry(sent), PATIENCE).unwrap();
        sent += 1;
    }
    sent
}

/// Makes calls of a method that can be repeated. They never fail, but for the device being busy. How
/// many were answered.
fn call_until(edu: &edu_api::Client, is_over: &AtomicBool) -> u64 {
    let mut answered = 0;
    while !is_over.load(SeqCst) {
        match edu.factorial(5).wait_for(PATIENCE) {
            Ok(120) => answered += 1,
            Err(IOReturn::BUSY) => {}
            other => panic!("a call that can be repeated ended with {other:?}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
    answered
}

/// Sends entries through the driver and back while it dies in one way after the other. How many
/// entries, and how many deaths.
fn stream_through_deaths(
    system: &System,
    session: &Session,
    upload: QueueProducer,
    mut download: QueueConsumer,
    deaths: &[Death],
) -> (u64, u64) {
    let seconds = std::env::var("IOHOST_SURVIVE_SECONDS");
    let seconds = seconds.map_or(10, |word| word.parse().expect("seconds"));
    let mut random = fastrand::Rng::with_seed(seed());
    let is_over = Arc::new(AtomicBool::new(false));
    let over = is_over.clone();
    let sending = thread::spawn(move || send_until(upload, &over));
    let (count, received) = (Arc::new(AtomicU64::new(u64::MAX)), Arc::new(AtomicU64::new(0)));
    let (limit, seen) = (count.clone(), received.clone());
    let receiving = thread::spawn(move || {
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
        download
    });

    let end = Instant::now() + Duration::from_secs(seconds);
    let mut died = 0;
    // Each way once, at least.
    while Instant::now() < end || died < deaths.len() {
        let next = Instant::now() + APART;
        let before = received.load(SeqCst);
        kill_driver(system, session, deaths[died % deaths.len()]);
        died += 1;
        eventually("the stream to flow on", || received.load(SeqCst) > before);
        let rest = next.saturating_duration_since(Instant::now());
        thread::sleep(rest + Duration::from_micros(random.u64(..20_000)));
    }
    is_over.store(true, SeqCst);
    let sent = sending.join().unwrap();
    count.store(sent, SeqCst);
    let mut download = receiving.join().unwrap();
    assert_eq!(received.load(SeqCst), sent);
    let more = download.receive_within(&mut Vec::new(), Duration::from_millis(100));
    assert!(matches!(more, Err(WaitError::TimedOut { .. })), "an entry too many: {more:?}");
    assert_eq!(session.generation(), 1 + died as u64);
    (sent, died as u64)
}

/// From one death to the next one, where the daemon notices at once and the driver is back by then.
const APART: Duration = Duration::from_millis(200);

#[test]
fn a_stream_through_a_device_survives_every_death_with_nothing_lost_and_nothing_doubled() {
    let (system, _device) = restless("edu");
    let session = system.connect().open("edu0").unwrap();
    let upload = session.producer(edu_api::UPLOAD).unwrap();
    let download = session.consumer(edu_api::DOWNLOAD).unwrap();
    let edu = session.client::<edu_api::Client>().unwrap();
    let is_over = Arc::new(AtomicBool::new(false));
    let over = is_over.clone();
    let calling = thread::spawn(move || call_until(&edu, &over));
    let deaths = [Death::Killed, Death::Segfault, Death::Abort, Death::Stopped];
    let (sent, died) = stream_through_deaths(&system, &session, upload, download, &deaths);
    is_over.store(true, SeqCst);
    let answered = calling.join().unwrap();
    assert!(answered > 0);
    println!("{sent} entries and {answered} calls through {died} deaths");
}

#[test]
fn a_stream_survives_a_driver_that_panics_and_hangs_with_nothing_lost_and_nothing_doubled() {
    const ECHO: u64 = 2;
    let (system, _device) = restless("probe");
    let session = system.connect().open_as("edu0", ECHO).unwrap();
    let upload = session.producer(echo::UPLOAD).unwrap();
    let download = session.consumer(echo::DOWNLOAD).unwrap();
    let deaths = [Death::Killed, Death::Segfault, Death::Panic, Death::Hang];
    let (sent, died) = stream_through_deaths(&system, &session, upload, download, &deaths);
    println!("{sent} entries through {died} deaths");
}

#[test]
fn a_call_that_was_begun_and_cannot_be_repeated_fails_with_a_status_of_its_own() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    let begun = probe.hold();
    assert_eq!(probe.aborted().wait(), Ok(0), "so the call before it was begun");
    kill_driver(&system, &session, Death::Killed);
    assert_eq!(begun.wait(), Err(IOReturn::NO_COMPLETION));
    assert_eq!(probe.aborted().wait(), Ok(0), "the session works");
}

#[test]
fn calls_that_the_driver_had_not_begun_are_made_once_to_the_next_one() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    // Behind this one nothing is begun.
    assert_eq!(probe.hang().wait(), Ok(()));
    let offered: Vec<_> = (0..5).map(|_| probe.offer()).collect();
    kill_driver(&system, &session, Death::Killed);
    let actions: Vec<_> = offered.into_iter().map(|offer| offer.wait().unwrap()).collect();
    for (number, action) in (0..).zip(&actions) {
        action.invoke(number).unwrap();
    }
    let noted = (0..5_u32).flat_map(u32::to_ne_bytes).collect::<Vec<u8>>();
    eventually("each invocation", || probe.noted().wait() == Ok(noted.clone()));
    drop(actions);
    eventually("the end of each action", || probe.aborted().wait() == Ok(5));
}

#[test]
fn memory_that_a_client_offers_is_there_for_the_next_driver() {
    let (system, _device) = System::with_driver("probe");
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    let (from, to) =
        (session.offer_memory(5000, true).unwrap(), session.offer_memory(5000, false).unwrap());
    from.write_at(0, b"abc").unwrap();
    kill_driver(&system, &session, Death::Killed);
    assert_eq!(probe.reverse(from.number(), to.number()).wait(), Ok(5000));
    let mut reversed = [0; 3];
    to.read_at(4997, &mut reversed).unwrap();
    assert_eq!(&reversed, b"cba");
}

/// Takes the device away, kills the driver host and waits until the daemon waits for the next try.
fn go_away(system: &System, device: Emulated) {
    let host = system.await_ready("edu0");
    drop(device);
    Death::Killed.strike(system, host);
    eventually("a pause before the next try", || {
        let service = system.service("edu0");
        service.state == State::Restarting
    });
}

#[test]
fn a_client_that_dies_while_its_driver_is_away_is_forgotten_at_once() {
    let (system, device) = System::with_edu();
    let (kept, dropped) =
        (system.connect().open("edu0").unwrap(), system.connect().open("edu0").unwrap());
    eventually("both sessions", || system.service("edu0").sessions == 2);
    go_away(&system, device);
    drop(dropped);
    eventually("the end of one session", || system.service("edu0").sessions == 1);
    assert_ne!(system.service("edu0").state, State::Running);
    assert_eq!(kept.generation(), 1);
}

#[test]
fn a_client_may_choose_not_to_wait_for_a_driver_that_is_away() {
    let (system, device) = System::with_edu();
    let session = system.connect().open("edu0").unwrap();
    session.set_when_away(WhenAway::Fail);
    let edu = session.client::<edu_api::Client>().unwrap();
    go_away(&system, device);
    eventually("the news of the death", || edu.factorial(5).wait() == Err(IOReturn::NOT_READY));
    let _device = system.start_edu_device("edu0");
    eventually("the next driver", || {
        let _ = system.connect().bind("edu0");
        session.generation() == 2
    });
    assert_eq!(edu.factorial(5).wait(), Ok(120));
}

#[test]
fn a_service_that_is_given_back_while_it_restarts_takes_its_sessions_along() {
    let (system, device) = System::with_edu();
    let session = system.connect().open("edu0").unwrap();
    let edu = session.client::<edu_api::Client>().unwrap();
    let mut download = session.consumer(edu_api::DOWNLOAD).unwrap();
    go_away(&system, device);
    let waiting = edu.factorial(5);
    system.connect().unbind("edu0").unwrap();
    assert_eq!(waiting.wait(), Err(IOReturn::OFFLINE));
    let gone = download.receive(&mut Vec::new()).unwrap_err();
    assert!(matches!(gone, WaitError::Queue(QueueError::Offline)), "{gone}");
    assert_eq!(session.wait_for_generation(1, PATIENCE), Err(IOReturn::OFFLINE));
    assert_eq!(system.service("edu0").sessions, 0);
}

#[test]
fn a_session_that_is_opened_while_the_service_restarts_waits_for_it() {
    let (system, _device) = System::with_edu();
    let host = system.await_ready("edu0");
    Death::Killed.strike(&system, host);
    // From before the daemon hears of it until the next one runs: any moment is good.
    for _ in 0..20 {
        let session = match system.connect().open("edu0") {
            Ok(session) => session,
            Err(ClientError::Refused(why)) if why.code == "driver-silent" => continue,
            Err(err) => panic!("{err}"),
        };
        assert_eq!(session.client::<edu_api::Client>().unwrap().factorial(4).wait(), Ok(24));
    }
}

fn factorial(id: u64, n: u64) -> Vec<u8> {
    let arguments = Arguments { scalars: vec![n], ..Default::default() };
    Call { id, selector: 0, arguments }.encode().unwrap()
}

fn receive(socket: &Packets) -> Result<FromDriver, PacketError> {
    let mut buffer = [0; LONGEST];
    let packet = socket.receive(&mut buffer, 0)?;
    Ok(FromDriver::decode(&buffer[..packet.len]).unwrap())
}

#[test]
fn what_was_sent_before_a_client_has_heard_of_its_next_driver_is_not_done() {
    let (system, _device) = System::with_edu();
    let watched = system.connect().open("edu0").unwrap();
    let (socket, _queues) = system.open_raw("edu0");
    kill_driver(&system, &watched, Death::Killed);
    // Meant for the dead driver, as far as the next one can tell.
    socket.send(&factorial(1, 4), &[]).unwrap();
    socket.send(&encode_resumed(2), &[]).unwrap();
    socket.send(&factorial(2, 5), &[]).unwrap();
    assert_eq!(receive(&socket).unwrap(), FromDriver::Away { generation: 1, begun: 0 });
    assert_eq!(receive(&socket).unwrap(), FromDriver::Resumed { generation: 2 });
    let FromDriver::Reply(reply) = receive(&socket).unwrap() else { panic!("no reply") };
    assert_eq!((reply.id, reply.answer.unwrap().scalars), (2, vec![120]));
}

#[test]
fn a_client_whose_bells_are_full_and_block_holds_up_no_driver() {
    let (system, _device) = System::with_edu();
    let (_hostile, queues) = system.open_raw("edu0");
    let kept = system.connect().open("edu0").unwrap();
    for bell in queues.chunks(3).flat_map(|queue| &queue[1..]) {
        // One that it only hears takes nothing.
        let _ = nix::unistd::write(bell, &(u64::MAX - 1).to_ne_bytes());
        nix::fcntl::fcntl(bell, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
    }
    // The next driver host wakes the clients of all sessions.
    kill_driver(&system, &kept, Death::Killed);
    assert_eq!(kept.client::<edu_api::Client>().unwrap().factorial(5).wait(), Ok(120));
}

#[test]
fn garbage_that_a_client_leaves_behind_while_its_driver_is_away_ends_its_session_alone() {
    let (system, device) = System::with_edu();
    let kept = system.connect().open("edu0").unwrap();
    let mut upload = kept.producer(edu_api::UPLOAD).unwrap();
    let mut download = kept.consumer(edu_api::DOWNLOAD).unwrap();
    let (garbage, _queues) = system.open_raw("edu0");
    let (early, _queues) = system.open_raw("edu0");
    let (astray, queues) = system.open_raw("edu0");
    go_away(&system, device);
    upload.send(b"sent while nobody was there").unwrap();
    garbage.send(b"GET / HTTP/1.1\r\n\r\n", &[]).unwrap();
    early.send(&encode_resumed(7), &[]).unwrap();
    // An index that no ring has, for the first of its queues.
    let ring = queues[0].as_fd().try_clone_to_owned().unwrap();
    let len = iohost_memory::sealed_len(&ring).unwrap();
    SharedMemory::attach(ring, len).unwrap().write_at(TAIL_OFFSET, &3_u32.to_ne_bytes());

    let _device = system.start_edu_device("edu0");
    eventually("the next driver", || {
        let _ = system.connect().bind("edu0");
        kept.generation() == 2
    });
    for (what, socket) in [("garbage", garbage), ("a generation to be", early), ("a ring", astray)]
    {
        loop {
            match receive(&socket) {
                Ok(FromDriver::Away { .. } | FromDriver::Resumed { .. }) => {}
                Err(PacketError::Closed) => break,
                other => panic!("{what}: {other:?}"),
            }
        }
    }
    let mut entry = Vec::new();
    download.receive(&mut entry).unwrap();
    assert_eq!(entry, b"sent while nobody was there");
    eventually("one session", || system.service("edu0").sessions == 1);
}
