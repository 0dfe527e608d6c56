//! The worker threads and what they wait for.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use iohost_event::{Clock, Poller, Ready, Signal};

use crate::deadlines::Deadlines;
use crate::queue::QueueCore;
use crate::source::Watched;
use crate::{NO_PANIC, QueueNumbers};

/// Runs queues. Dropping it stops the workers after the handlers in progress; work that waits
/// then is dropped unrun, and who waits in `dispatch_sync` is told `ABORTED`.
pub struct Engine {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// Where an engine's timers get the time from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineClock {
    /// The kernel's clocks.
    Real,
    /// A number that [`Engine::advance`] moves; starts at one second.
    Virtual,
}

/// What the workers, the queues and the sources of one engine share.
pub(crate) struct Shared {
    poller: Poller,
    /// Raised to wake one worker; never read, since watching is edge-triggered.
    bell: Signal,
    ready: Mutex<ReadyList>,
    watched: RwLock<HashMap<u64, Weak<dyn Watched>>>,
    next_token: AtomicU64,
    pub(crate) deadlines: Deadlines,
    queues: Mutex<Vec<Weak<QueueCore>>>,
    on_panic: OnceLock<PanicHook>,
}

thread_local! {
    /// This thread is a worker that looks at the ready list next, so what it puts there itself
    /// needs no wake-up: that keeps an interrupt at two system calls.
    static LOOKS_NEXT: Cell<bool> = const { Cell::new(false) };
}

/// Runs engine code of a worker that looks at the ready list right after it.
pub(crate) fn looking_next(code: impl FnOnce()) {
    LOOKS_NEXT.set(true);
    code();
    LOOKS_NEXT.set(false);
}

type PanicHook = Box<dyn Fn(&str, &str) + Send + Sync>;

/// The queues with work, and who is there to run them.
///
/// Invariant: a queue stands in `queues` exactly while its stage is `Scheduled`. If `queues` is
/// not empty, then a worker is awake and will look, or a wake-up is under way, or the engine is
/// a manual one.
struct ReadyList {
    queues: VecDeque<Arc<QueueCore>>,
    sleeping: usize,
    wake_under_way: bool,
    stopping: bool,
    /// Nobody sleeps in a manual engine; its owner turns it.
    manual: bool,
}

/// Tokens below this are the engine's own.
const FIRST_SOURCE: u64 = 8;
const BELL: u64 = 0;

impl Engine {
    /// Starts an engine with as many workers as the machine has processors, at least two (a
    /// handler that blocks must not hold up the others) and at most eight.
    pub fn start() -> io::Result<Self> {
        let processors = thread::available_parallelism().map_or(2, usize::from);
        Self::with_workers(processors.clamp(2, 8))
    }

    /// Starts an engine with `workers` worker threads, at least one.
    pub fn with_workers(workers: usize) -> io::Result<Self> {
        let shared = Shared::new(EngineClock::Real, false)?;
        let workers = (0..workers.max(1))
            .map(|number| {
                let shared = shared.clone();
                let name = format!("dispatch-{number}");
                thread::Builder::new().name(name).spawn(move || shared.work())
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { shared, workers })
    }

    /// An engine without threads, for tests: nothing runs but in [`settle`](Self::settle), on
    /// the calling thread.
    pub fn manual(clock: EngineClock) -> io::Result<Self> {
        Ok(Self { shared: Shared::new(clock, true)?, workers: Vec::new() })
    }

    /// Runs what there is to run on this thread until there is nothing left. For manual engines;
    /// on others it helps the workers.
    pub fn settle(&self) {
        let mut found = Ready::new(16);
        while self.shared.turn(&mut found) {}
    }

    /// Moves virtual time forward. Timers that came due fire at the next
    /// [`settle`](Self::settle).
    ///
    /// Panics on an engine with a real clock.
    pub fn advance(&self, by: Duration) {
        self.shared.deadlines.advance(by);
    }

    /// The time on a clock as this engine's timers see it, in nanoseconds.
    pub fn now(&self, clock: Clock) -> u64 {
        self.shared.deadlines.now(clock)
    }

    /// Has `hook(queue, message)` called when a handler panicked. The first hook stays.
    pub fn on_panic(&self, hook: impl Fn(&str, &str) + Send + Sync + 'static) {
        let _ = self.shared.on_panic.set(Box::new(hook));
    }

    /// The numbers of every queue that is alive.
    pub fn numbers(&self) -> Vec<QueueNumbers> {
        let queues = self.shared.queues.lock().expect(NO_PANIC);
        queues.iter().filter_map(Weak::upgrade).map(|queue| queue.numbers()).collect()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("workers", &self.workers.len()).finish()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.ready.lock().expect(NO_PANIC).stopping = true;
        // Each worker that leaves wakes the next one.
        self.shared.bell.raise();
        for worker in self.workers.drain(..) {
            // The last handle can go inside a handler; that worker cannot wait for itself.
            if worker.thread().id() != thread::current().id() {
                let _ = worker.join();
            }
        }
        // What waits holds its queue, and the ready list does: nothing of it would ever be freed.
        let queues = std::mem::take(&mut self.shared.ready.lock().expect(NO_PANIC).queues);
        queues.iter().for_each(|queue| queue.abandon());
    }
}

impl Shared {
    fn new(clock: EngineClock, manual: bool) -> io::Result<Arc<Self>> {
        let poller = Poller::new()?;
        let bell = Signal::new()?;
        poller.watch(&bell, BELL)?;
        let deadlines = Deadlines::new(clock)?;
        for (token, timer) in deadlines.timers() {
            poller.watch(timer, token)?;
        }
        Ok(Arc::new(Self {
            poller,
            bell,
            ready: Mutex::new(ReadyList {
                queues: VecDeque::new(),
                sleeping: 0,
                wake_under_way: false,
                stopping: false,
                manual,
            }),
            watched: RwLock::new(HashMap::new()),
            next_token: AtomicU64::new(FIRST_SOURCE),
            deadlines,
            queues: Mutex::new(Vec::new()),
            on_panic: OnceLock::new(),
        }))
    }

    /// A worker's life.
    fn work(&self) {
        let mut found = Ready::new(16);
        loop {
            let mut ready = self.ready.lock().expect(NO_PANIC);
            if ready.stopping {
                self.bell.raise();
                return;
            }
            if let Some(queue) = ready.queues.pop_front() {
                self.share_the_rest(ready);
                queue.run();
                continue;
            }
            ready.sleeping += 1;
            drop(ready);
            let waited = self.poller.wait(&mut found, None);
            let mut ready = self.ready.lock().expect(NO_PANIC);
            ready.sleeping -= 1;
            if waited.is_ok() && found.tokens().any(|token| token == BELL) {
                ready.wake_under_way = false;
            }
            drop(ready);
            waited.expect("epoll_wait fails only for a descriptor that is no epoll set");
            looking_next(|| self.take_in(&found));
        }
    }

    /// Looks once, without waiting, and runs one queue. `false` when there was nothing.
    fn turn(&self, found: &mut Ready) -> bool {
        self.poller.wait(found, Some(Duration::ZERO)).expect("an epoll set can be asked");
        self.take_in(found);
        self.deadlines.expire_virtual();
        let queue = self.ready.lock().expect(NO_PANIC).queues.pop_front();
        let Some(queue) = queue else { return false };
        queue.run();
        true
    }

    /// Has the sources whose events came schedule themselves on their queues.
    fn take_in(&self, found: &Ready) {
        for token in found.tokens() {
            if token == BELL {
                continue;
            }
            if token < FIRST_SOURCE {
                self.deadlines.expire(token);
                continue;
            }
            let source = self.watched.read().expect(NO_PANIC).get(&token).and_then(Weak::upgrade);
            if let Some(source) = source {
                source.became_ready();
            }
        }
    }

    /// Puts a queue on the ready list and sees that somebody takes it from there.
    pub(crate) fn make_ready(&self, queue: Arc<QueueCore>) {
        let mut ready = self.ready.lock().expect(NO_PANIC);
        if ready.stopping {
            drop(ready);
            queue.abandon();
            return;
        }
        ready.queues.push_back(queue);
        if !LOOKS_NEXT.get() {
            self.share_the_rest(ready);
        }
    }

    /// Wakes one sleeper if queues wait; it will wake the next one when more than one waits.
    fn share_the_rest(&self, mut ready: std::sync::MutexGuard<'_, ReadyList>) {
        let wake = !ready.queues.is_empty()
            && ready.sleeping > 0
            && !ready.wake_under_way
            && !ready.manual;
        if wake {
            ready.wake_under_way = true;
            drop(ready);
            self.bell.raise();
        }
    }

    /// What a thread does that has to wait for a queue: nothing, unless the engine is manual and
    /// the thread itself has to turn it.
    pub(crate) fn while_waiting(&self, waiting: impl Fn() -> bool) {
        if !self.ready.lock().expect(NO_PANIC).manual {
            return;
        }
        let mut found = Ready::new(16);
        while waiting() && self.turn(&mut found) {}
    }

    /// Watches a descriptor for a source. Returns the token to forget it by.
    pub(crate) fn watch(&self, fd: impl AsFd, source: Weak<dyn Watched>) -> io::Result<u64> {
        let token = self.next_token.fetch_add(1, Relaxed);
        self.watched.write().expect(NO_PANIC).insert(token, source);
        if let Err(err) = self.poller.watch(fd, token) {
            self.watched.write().expect(NO_PANIC).remove(&token);
            return Err(err);
        }
        Ok(token)
    }

    /// Stops watching. An event that was under way finds no source and is dropped.
    pub(crate) fn forget(&self, fd: impl AsFd, token: u64) {
        if self.watched.write().expect(NO_PANIC).remove(&token).is_some() {
            // The descriptor is open: its source still owns it.
            let _ = self.poller.forget(fd);
        }
    }

    pub(crate) fn remember(&self, queue: &Arc<QueueCore>) {
        let mut queues = self.queues.lock().expect(NO_PANIC);
        // Growth pays for the clean-up, so a million short-lived queues stay cheap.
        if queues.len() == queues.capacity() {
            queues.retain(|queue| queue.strong_count() > 0);
        }
        queues.push(Arc::downgrade(queue));
    }

    pub(crate) fn report_panic(&self, queue: &str, message: &str) {
        if let Some(hook) = self.on_panic.get() {
            hook(queue, message);
        }
    }
}
