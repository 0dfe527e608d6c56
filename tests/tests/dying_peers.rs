//! `kill -9` of either end of a data queue, at random moments: the other end is told, or waits for the
//! next driver, and nothing is left behind, neither there nor in the daemon.
//!
//! A few deaths here, since each takes a process or two. More of them, and the times, with
//!
//! ```sh
//! IOHOST_DEATHS=1000 cargo test --release -p iohost_tests --test dying_peers -- --nocapture
//! ```

use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use iohost_client::{QueueConsumer, QueueError, QueueProducer, Session, WaitError};
use iohost_event::{Poller, Ready};
use iohost_tests::{System, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A survivor that has not heard of the death by then never will.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a survivor may take from the kernel's word to its own; the figure is for a machine that has
/// nothing else to do, so it is told and not asserted.
const PROMPT: Duration = Duration::from_millis(10);

/// Entries between two looks at the descriptors.
const PER_TURN: usize = 64;

/// The tests take turns: one counts what this process holds.
fn turn_of_this_test() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn deaths(few: usize) -> usize {
    std::env::var("IOHOST_DEATHS").map_or(few, |word| word.parse().expect("a number of deaths"))
}

fn random() -> fastrand::Rng {
    let seed = std::env::var("IOHOST_SEED");
    let seed = seed.map_or_else(|_| fastrand::u64(..), |word| word.parse().expect("a seed"));
    println!("again with IOHOST_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

fn kill_process(pid: u32) {
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
}

/// What a process holds that a session brings with it: descriptors, and mappings of memory files.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    mappings: usize,
}

impl Held {
    fn by(pid: u32) -> Self {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process of ours");
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("a process of ours");
        let mappings = maps.lines().filter(|line| line.contains("memfd:")).count();
        Self { descriptors: descriptors.count(), mappings }
    }

    fn is_no_more_than(&self, other: &Self) -> bool {
        self.descriptors <= other.descriptors && self.mappings <= other.mappings
    }
}

/// Kilobytes of private memory.
fn private_memory(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process of ours");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.expect("a number of kB").trim().parse().expect("a number")
}

/// What processes hold while nothing is open, and whether it is no more later.
struct Before(Vec<(u32, Held, usize)>);

impl Before {
    fn of(pids: &[u32]) -> Self {
        Self(pids.iter().map(|pid| (*pid, Held::by(*pid), private_memory(*pid))).collect())
    }

    /// Waits for the counts, since descriptors are closed a little after a session is forgotten. For
    /// that reason there may have been more of them before, too.
    fn assert_no_more_after(&self, deaths: usize) {
        for (pid, held, memory) in &self.0 {
            eventually(&format!("at most {held:?} in {pid}, has {:?}", Held::by(*pid)), || {
                Held::by(*pid).is_no_more_than(held)
            });
            let grown = private_memory(*pid).saturating_sub(*memory);
            println!("{pid} after {deaths} deaths: no more than {held:?}, {grown} kB more memory");
            // A session that stays shows above, by its memory files. This is for what only grows, which
            // many deaths show: allocators keep an arena for each thread of a busy moment.
            assert!(grown < 64 * 1024, "{pid} has {grown} kB more after {deaths} deaths");
        }
    }
}

#[test]
fn clients_killed_at_random_moments_leave_nothing_in_the_daemon_and_the_driver_host() {
    let _turn = turn_of_this_test();
    let (system, _device) = System::with_edu();
    let host = system.await_ready("edu0");
    let daemon = system.connect().status().unwrap().pid;
    let mut random = random();
    let client = |life: Duration| {
        let mut client = Command::new(env!("CARGO_BIN_EXE_iohost-test-client"))
            .args([system.socket().as_os_str(), "edu0".as_ref(), "stream".as_ref()])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(life);
        client.kill().unwrap();
        client.wait().unwrap();
    };
    let none_left =
        || eventually("the end of its session", || system.service("edu0").sessions == 0);
    // What is made once and kept is made by then.
    for _ in 0..8 {
        client(Duration::from_millis(20));
        none_left();
    }

    let before = Before::of(&[daemon, host]);
    let count = deaths(60);
    for number in 0..count {
        // From the middle of opening the session to the middle of the stream.
        client(Duration::from_micros(random.u64(..20_000)));
        if number % 16 == 0 {
            none_left();
        }
    }
    none_left();
    assert_eq!(system.service("edu0").pid, Some(host), "the driver host lives on");
    before.assert_no_more_after(count);
    let session = system.connect().open("edu0").unwrap();
    assert_eq!(session.client::<edu_api::Client>().unwrap().factorial(5).wait(), Ok(120));
}

/// A client of the stream in an event loop, until its service is over.
struct Survivor {
    upload: QueueProducer,
    download: QueueConsumer,
    poller: Poller,
    entry: Vec<u8>,
    received: Arc<AtomicUsize>,
}

impl Survivor {
    fn new(session: &Session) -> Self {
        let upload = session.producer(edu_api::UPLOAD).unwrap();
        let download = session.consumer(edu_api::DOWNLOAD).unwrap();
        let poller = Poller::new().unwrap();
        poller.watch_while_readable(&upload, 0).unwrap();
        poller.watch_while_readable(&download, 1).unwrap();
        let received = Arc::new(AtomicUsize::new(0));
        Self { upload, download, poller, entry: Vec::new(), received }
    }

    /// Streams until both ends say that the service is over. How long that took from the last
    /// report of the descriptors on.
    fn outlive(&mut self) -> Duration {
        let mut ready = Ready::new(2);
        let (mut sending, mut receiving) = (true, true);
        let mut is_more = true;
        loop {
            let timeout = if is_more { Duration::ZERO } else { PATIENCE };
            self.poller.wait(&mut ready, Some(timeout)).unwrap();
            let woken = Instant::now();
            assert!(is_more || ready.tokens().count() > 0, "never told of anything");
            is_more = false;
            if sending {
                let sent = turn(|| self.upload.try_send(&[7; 100]));
                sending = sent.is_some();
                is_more |= sent == Some(true);
            }
            if receiving {
                let received = turn(|| {
                    let is_one = self.download.try_receive(&mut self.entry)?;
                    self.received.fetch_add(usize::from(is_one), SeqCst);
                    Ok(is_one)
                });
                receiving = received.is_some();
                is_more |= received == Some(true);
            }
            if !sending && !receiving {
                return woken.elapsed();
            }
        }
    }
}

/// Some entries. Whether there may be more, or `None` at the end of the service.
fn turn(mut next: impl FnMut() -> Result<bool, WaitError>) -> Option<bool> {
    for _ in 0..PER_TURN {
        match next() {
            Ok(true) => {}
            Ok(false) => return Some(false),
            Err(WaitError::Queue(QueueError::Offline)) => return None,
            Err(err) => panic!("{err}"),
        }
    }
    Some(true)
}

#[test]
fn a_driver_host_killed_at_random_moments_keeps_its_clients_streaming_and_leaves_nothing() {
    let _turn = turn_of_this_test();
    let (system, _device) = System::with_edu();
    let daemon = system.connect().status().unwrap().pid;
    let mut random = random();
    let mut slowest = Duration::ZERO;
    let mut late = 0;
    let mut die = |life: Duration| {
        let host = system.await_ready("edu0");
        let session = system.connect().open("edu0").unwrap();
        let mut survivor = Survivor::new(&session);
        let received = survivor.received.clone();
        let streaming = thread::spawn(move || survivor.outlive());
        thread::sleep(life);
        kill_process(host);
        // The daemon starts it again; being asked for it, at once.
        eventually("the next driver host", || {
            let _ = system.connect().bind("edu0");
            session.generation() == 2
        });
        let before = received.load(SeqCst);
        eventually("the stream to flow on", || received.load(SeqCst) > before);
        assert!(!streaming.is_finished());
        system.connect().unbind("edu0").unwrap();
        let took = streaming.join().unwrap();
        slowest = slowest.max(took);
        late += usize::from(took > PROMPT);
        system.connect().bind("edu0").unwrap();
    };
    for _ in 0..3 {
        die(Duration::from_millis(10));
    }
    system.await_ready("edu0");
    let before = Before::of(&[daemon, std::process::id()]);
    let count = deaths(10);
    for _ in 0..count {
        die(Duration::from_micros(random.u64(..20_000)));
    }
    println!("told of the end within {slowest:?}, {late} of {count} later than {PROMPT:?}");
    system.await_ready("edu0");
    before.assert_no_more_after(count);
}
