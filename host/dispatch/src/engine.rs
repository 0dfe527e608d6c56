//! The worker threads and what they wait for.
//!
//! A worker without work waits in one of two ways. A few (two, so that one is left while the
//! other runs a handler) wait for events in `epoll_wait`. The others are parked on a condition
//! variable, where waking one costs less: they take what threads dispatch.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, RwLock, Weak};
use std::thread::available_parallelism;
use std::time::Duration;

use iohost_closure::Closure;
use iohost_event::{Clock, Poller, Ready, Signal, TickScale};
use iohost_memory::flight_recorder::Recorder;
use iohost_memory::prefetch;

use crate::baton::{Baton, Turn};
use crate::deadlines::Deadlines;
use crate::queue::{QueueCore, fetch_likely};
use crate::source::{Then, Watched};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, Mutex, MutexGuard, has_failed, thread_local};
use crate::watchlist::Watchlist;
use crate::{NO_PANIC, QueueNumbers};

/// Runs queues. Dropping it stops the workers and waits for the handlers in progress; work that
/// waits then is dropped unrun, and who waits in `dispatch_sync` is told `ABORTED`.
pub struct Engine {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// Where an engine's timers get the time from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineClock {
    /// The kernel's clocks.
    Real,
    /// Numbers that only a test moves ([`Engine::advance`], [`Engine::suspend`],
    /// [`Engine::set_wall_clock`]); each starts at one second.
    Virtual,
}

/// What the workers, the queues and the sources of one engine share.
pub(crate) struct Shared {
    /// It has no threads; its owner turns it.
    manual: bool,
    /// How often a thread looks for what another one does before it sleeps.
    pub(crate) looks: u32,
    poller: Poller,
    /// Raised to wake one polling worker; never read, since watching is edge-triggered.
    bell: Signal,
    exchange: Exchange,
    watched: RwLock<Watchlist>,
    pub(crate) deadlines: Deadlines,
    queues: Mutex<Vec<Weak<QueueCore>>>,
    pub(crate) scale: TickScale,
    pub(crate) recorder: Option<Arc<Recorder>>,
    /// Those that have not left.
    stand_ins: Mutex<Vec<JoinHandle<()>>>,
    this: Weak<Shared>,
}

/// Where work meets workers. To hand a queue from one processor to another costs as much as the
/// lines of the cache that change hands with it, so this is one.
#[derive(Default)]
#[repr(align(64))]
struct Exchange {
    ready: Mutex<ReadyList>,
    /// Where the workers that do not poll are parked.
    parking: Condvar,
}

const _: () = assert!(cfg!(loom) || size_of::<Exchange>() == 64);

/// What is to be run, and who is there to run it.
///
/// Invariant: a queue stands in `work` exactly while its stage is `SCHEDULED`. If `work` is not
/// empty, then a worker is awake and will look, or a wake-up is under way, or the engine is a
/// manual one.
#[derive(Default)]
struct ReadyList {
    work: Work,
    /// Workers in `epoll_wait`.
    polling: u8,
    /// Workers that are parked, and those of them that may go.
    parked: u8,
    released: u8,
    /// Workers there are, and those that wait for a turn on some queue.
    workers: u8,
    blocked: u8,
    /// The bell was raised, and no worker has heard it yet.
    bell_under_way: bool,
    stopping: bool,
}

/// First in, first out. A queue that is alone here, as most are, needs no memory of the list's.
#[derive(Default)]
struct Work {
    first: Option<Arc<QueueCore>>,
    /// Behind it.
    rest: VecDeque<Runnable>,
}

impl Work {
    fn is_empty(&self) -> bool {
        self.first.is_none() && self.rest.is_empty()
    }

    fn push(&mut self, work: Runnable) {
        match work {
            Runnable::Queue(queue) if self.is_empty() => self.first = Some(queue),
            work => self.rest.push_back(work),
        }
    }

    fn pop(&mut self) -> Option<Runnable> {
        self.first.take().map(Runnable::Queue).or_else(|| self.rest.pop_front())
    }
}

enum Runnable {
    Queue(Arc<QueueCore>),
    /// A concurrent block.
    Block(Closure),
}

/// The bell's token; those of the deadlines follow, all below the watchlist's.
const BELL: u64 = 0;

/// Workers that wait for events when there is nothing to do.
const POLLERS: u8 = if cfg!(loom) { 0 } else { 2 };

/// How often a thread looks: most turns on a queue are shorter than a trip into the kernel and back.
const LOOKS: u32 = if cfg!(loom) { 1 } else { 200 };

/// The most extra workers that stand in for blocked ones.
const MOST_WORKERS: u8 = 64;

thread_local! {
    /// This thread is a worker that looks at the ready list next, so what it puts there itself
    /// needs no wake-up: that keeps an interrupt at two system calls.
    static LOOKS_NEXT: Cell<bool> = const { Cell::new(false) };

    /// This thread is a worker.
    static IS_WORKER: Cell<bool> = const { Cell::new(false) };
}

/// Runs engine code of a worker that looks at the ready list right after it.
pub(crate) fn looking_next(code: impl FnOnce()) {
    LOOKS_NEXT.set(true);
    code();
    LOOKS_NEXT.set(false);
}

impl Engine {
    /// Starts an engine with one worker more than the machine has processors, at least three (two
    /// to wait for events, one to take what threads dispatch) and at most nine.
    pub fn start() -> io::Result<Self> {
        Self::of(default_workers(), None)
    }

    /// As [`start`](Self::start), and what the queues do is recorded: for those that find a lane.
    pub fn start_recorded(recorder: Arc<Recorder>) -> io::Result<Self> {
        Self::of(default_workers(), Some(recorder))
    }

    /// Starts an engine with `workers` worker threads, at least one and at most 64.
    pub fn with_workers(workers: usize) -> io::Result<Self> {
        Self::of(workers, None)
    }

    fn of(workers: usize, recorder: Option<Arc<Recorder>>) -> io::Result<Self> {
        let shared = Shared::new(EngineClock::Real, false, recorder)?;
        let workers = workers.clamp(1, MOST_WORKERS.into()) as u8;
        shared.exchange.ready.lock().expect(NO_PANIC).workers = workers;
        let workers = (0..workers)
            .map(|number| {
                let shared = shared.clone();
                let name = format!("dispatch-{number}");
                thread::Builder::new().name(name).spawn(move || shared.work(Worker::Permanent))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { shared, workers })
    }

    /// An engine without threads, for tests: nothing runs but in [`settle`](Self::settle), on
    /// the calling thread.
    pub fn manual(clock: EngineClock) -> io::Result<Self> {
        Ok(Self { shared: Shared::new(clock, true, None)?, workers: Vec::new() })
    }

    /// Runs what there is to run on this thread until there is nothing left. On an engine with
    /// workers it does nothing: what a look here took from the kernel, they would miss.
    pub fn settle(&self) {
        let mut found = Ready::new(16);
        while self.shared.manual && self.shared.turn(&mut found) {}
    }

    /// The time on a clock as this engine's timers see it, in nanoseconds.
    pub fn now(&self, clock: Clock) -> u64 {
        self.shared.deadlines.now(clock)
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
        // What waits holds its queue, and the ready list does: nothing of it would ever be freed.
        // It goes before the workers do, since one of them may wait for a turn in it.
        let mut work = {
            let mut ready = self.shared.exchange.ready.lock().expect(NO_PANIC);
            ready.stopping = true;
            std::mem::take(&mut ready.work)
        };
        std::iter::from_fn(|| work.pop()).for_each(Runnable::abandon);
        // Nobody is left to wake those who sleep, nor to see their deadlines pass.
        self.shared.abort_sleepers();
        self.shared.exchange.parking.notify_all();
        // Each worker that leaves wakes the next one.
        self.shared.bell.raise();
        self.workers.drain(..).for_each(wait_for_end);
        // None is added any more that would find something to run.
        let stand_ins = std::mem::take(&mut *self.shared.stand_ins.lock().expect(NO_PANIC));
        stand_ins.into_iter().for_each(wait_for_end);
    }
}

/// Waits for a worker to leave, unless this is the one: the last handle of an engine can go inside
/// a handler.
fn wait_for_end(worker: JoinHandle<()>) {
    if worker.thread().id() != thread::current().id() {
        let _ = worker.join();
    }
}

fn default_workers() -> usize {
    (processors() + 1).clamp(3, 9)
}

fn processors() -> usize {
    available_parallelism().map_or(2, usize::from)
}

/// How long a worker stays.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Worker {
    Permanent,
    /// As long as it is needed for blocked ones.
    StandIn,
}

impl Shared {
    fn new(
        clock: EngineClock,
        manual: bool,
        recorder: Option<Arc<Recorder>>,
    ) -> io::Result<Arc<Self>> {
        // Nobody else does anything while this thread looks, if it is alone.
        let looks = if manual || processors() == 1 { 0 } else { LOOKS };
        let poller = Poller::new()?;
        let bell = Signal::new()?;
        poller.watch(&bell, BELL)?;
        let deadlines = Deadlines::new(clock)?;
        for (token, timer) in deadlines.timers() {
            poller.watch(timer, token)?;
        }
        Ok(Arc::new_cyclic(|this| Self {
            manual,
            looks,
            poller,
            bell,
            exchange: Exchange::default(),
            watched: RwLock::default(),
            deadlines,
            queues: Mutex::new(Vec::new()),
            scale: TickScale::start(),
            recorder,
            stand_ins: Mutex::new(Vec::new()),
            this: this.clone(),
        }))
    }

    /// A worker's life.
    fn work(&self, worker: Worker) {
        IS_WORKER.set(true);
        let mut found = Ready::new(16);
        let lock = || self.exchange.ready.lock().expect(NO_PANIC);
        let mut ready = lock();
        loop {
            if ready.stopping {
                self.bell.raise();
                return;
            }
            if let Some(work) = ready.work.pop() {
                self.share_the_rest(ready);
                work.run();
                ready = lock();
                continue;
            }
            if worker == Worker::StandIn && ready.blocked == 0 {
                ready.workers -= 1;
                // It may have been released to wait for events: then another one has to.
                if ready.polling == 0 && ready.parked > ready.released {
                    ready.released += 1;
                    self.exchange.parking.notify_one();
                }
                drop(ready);
                self.strike_stand_in();
                return;
            }
            if ready.polling < POLLERS {
                self.poll(ready, &mut found);
                ready = lock();
            } else {
                ready.parked += 1;
                while ready.released == 0 && !ready.stopping {
                    ready = self.exchange.parking.wait(ready).expect(NO_PANIC);
                    fetch_likely();
                }
                ready.parked -= 1;
                ready.released = ready.released.saturating_sub(1);
            }
        }
    }

    /// Waits for events and has their sources schedule themselves.
    fn poll(&self, mut ready: MutexGuard<'_, ReadyList>, found: &mut Ready) {
        ready.polling += 1;
        drop(ready);
        let waited = self.poller.wait(found, None);
        let mut ready = self.exchange.ready.lock().expect(NO_PANIC);
        ready.polling -= 1;
        if found.tokens().any(|token| token == BELL) {
            ready.bell_under_way = false;
        }
        // Somebody has to be there for the next event, however long this one's handler takes.
        let alone = ready.polling == 0 && ready.parked > ready.released;
        if alone {
            ready.released += 1;
        }
        drop(ready);
        if alone {
            self.exchange.parking.notify_one();
        }
        waited.expect("epoll_wait fails only for a descriptor that is no epoll set");
        if let Some(source) = self.only_source(found) {
            return source.became_ready(Then::RunHere);
        }
        looking_next(|| self.take_in(found));
    }

    /// The source of an event that came alone.
    fn only_source(&self, found: &Ready) -> Option<Arc<dyn Watched>> {
        let mut tokens = found.tokens();
        let token = tokens.next().filter(|_| tokens.next().is_none())?;
        self.source(token)
    }

    fn source(&self, token: u64) -> Option<Arc<dyn Watched>> {
        self.watched.read().expect(NO_PANIC).get(token).and_then(Weak::upgrade)
    }

    /// Looks once, without waiting, and runs one thing. `false` when there was nothing.
    fn turn(&self, found: &mut Ready) -> bool {
        self.poller.wait(found, Some(Duration::ZERO)).expect("an epoll set can be asked");
        self.take_in(found);
        self.deadlines.expire_virtual();
        let work = self.exchange.ready.lock().expect(NO_PANIC).work.pop();
        let Some(work) = work else { return false };
        work.run();
        true
    }

    /// Has the sources whose events came schedule themselves on their queues.
    fn take_in(&self, found: &Ready) {
        for token in found.tokens() {
            if token == BELL {
                continue;
            }
            if token < Watchlist::FIRST_TOKEN {
                self.deadlines.expire(token);
                continue;
            }
            if let Some(source) = self.source(token) {
                source.became_ready(Then::Schedule);
            }
        }
    }

    /// Has the ready list's line come, for a thread that is about to put something there.
    pub(crate) fn fetch_exchange(&self) {
        prefetch::to_write(&raw const self.exchange);
    }

    /// Puts a queue on the ready list and sees that somebody takes it from there.
    pub(crate) fn make_ready(&self, queue: Arc<QueueCore>) {
        self.put(Runnable::Queue(queue));
    }

    /// Has a block run on some worker, beside everything else.
    pub(crate) fn run_soon(&self, block: Closure) {
        self.put(Runnable::Block(block));
    }

    fn put(&self, work: Runnable) {
        let mut ready = self.exchange.ready.lock().expect(NO_PANIC);
        if ready.stopping {
            drop(ready);
            return work.abandon();
        }
        ready.work.push(work);
        if !LOOKS_NEXT.get() {
            self.share_the_rest(ready);
        }
    }

    /// Wakes one worker if work waits; it will wake the next one when more than one waits.
    fn share_the_rest(&self, mut ready: MutexGuard<'_, ReadyList>) {
        if ready.work.is_empty() || self.manual {
            return;
        }
        if ready.parked > ready.released {
            ready.released += 1;
            drop(ready);
            self.exchange.parking.notify_one();
        } else if ready.released == 0 && ready.polling > 0 && !ready.bell_under_way {
            ready.bell_under_way = true;
            drop(ready);
            self.bell.raise();
        }
    }

    /// Waits until a baton's wait has ended.
    pub(crate) fn wait_for(&self, baton: &Baton) {
        if self.manual {
            self.turn_until_ended(baton);
        } else {
            self.blocking(|| baton.wait(self.looks));
        }
    }

    /// Runs code that waits. A worker that does is replaced meanwhile, if that leaves too few.
    pub(crate) fn blocking<R>(&self, code: impl FnOnce() -> R) -> R {
        if !IS_WORKER.get() {
            return code();
        }
        let mut ready = self.exchange.ready.lock().expect(NO_PANIC);
        ready.blocked += 1;
        let stand_in = ready.workers - ready.blocked < POLLERS && ready.workers < MOST_WORKERS;
        if stand_in {
            ready.workers += 1;
        }
        drop(ready);
        if stand_in {
            self.add_stand_in();
        }
        let _blocked = Blocked(&self.exchange.ready);
        code()
    }

    /// In a manual engine the waiting thread turns it. Inside of a handler, with nothing left to
    /// run that could end the wait, the wait is cancelled.
    fn turn_until_ended(&self, baton: &Baton) {
        let inside = !crate::queue::holds_nothing();
        let mut found = Ready::new(16);
        while baton.is_waiting() {
            let turned = self.turn(&mut found);
            if !turned && inside {
                baton.end(Turn::Cancelled);
            }
            if !turned {
                thread::yield_now();
            }
        }
    }

    fn add_stand_in(&self) {
        let Some(shared) = self.this.upgrade() else { return };
        // Held meanwhile, so that it is there when the thread leaves.
        let mut stand_ins = self.stand_ins.lock().expect(NO_PANIC);
        let started = thread::Builder::new()
            .name("dispatch-extra".to_owned())
            .spawn(move || shared.work(Worker::StandIn));
        match started {
            Ok(stand_in) => stand_ins.push(stand_in),
            // No thread to be had: the others go on, with one less.
            Err(_) => self.exchange.ready.lock().expect(NO_PANIC).workers -= 1,
        }
    }

    /// This thread is a stand-in that leaves.
    fn strike_stand_in(&self) {
        let this = thread::current().id();
        self.stand_ins.lock().expect(NO_PANIC).retain(|stand_in| stand_in.thread().id() != this);
    }

    /// Watches a descriptor for a source. Returns the token to forget it by.
    pub(crate) fn watch(&self, fd: impl AsFd, source: Weak<dyn Watched>) -> io::Result<u64> {
        let token = self.watched.write().expect(NO_PANIC).add(source);
        if let Err(err) = self.poller.watch(fd, token) {
            self.watched.write().expect(NO_PANIC).remove(token);
            return Err(err);
        }
        Ok(token)
    }

    /// Stops watching. An event that was under way finds no source and is dropped.
    pub(crate) fn forget(&self, fd: impl AsFd, token: u64) {
        if self.watched.write().expect(NO_PANIC).remove(token) {
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

    fn abort_sleepers(&self) {
        let queues = self.queues.lock().expect(NO_PANIC);
        let queues: Vec<_> = queues.iter().filter_map(Weak::upgrade).collect();
        queues.iter().for_each(|queue| queue.sleepers.abort());
    }

    /// Whether the engine is being dropped, or was.
    pub(crate) fn is_stopping(&self) -> bool {
        self.exchange.ready.lock().expect(NO_PANIC).stopping
    }

    /// The name of a queue that is alive, by the address of its core.
    pub(crate) fn name_of(&self, address: usize) -> Option<String> {
        let queues = self.queues.lock().expect(NO_PANIC);
        let mut queues = queues.iter().filter_map(Weak::upgrade);
        queues.find(|queue| queue.address() == address).map(|queue| queue.name().to_owned())
    }
}

/// A worker waits; on drop, also by a panic, it does no longer.
struct Blocked<'a>(&'a Mutex<ReadyList>);

impl Drop for Blocked<'_> {
    fn drop(&mut self) {
        if !has_failed() {
            self.0.lock().expect(NO_PANIC).blocked -= 1;
        }
    }
}

impl Runnable {
    fn run(self) {
        match self {
            Runnable::Queue(queue) => queue.run(),
            Runnable::Block(block) => block.run(),
        }
    }

    /// The engine is gone.
    fn abandon(self) {
        match self {
            Runnable::Queue(queue) => queue.abandon(),
            Runnable::Block(block) => drop(block),
        }
    }
}
