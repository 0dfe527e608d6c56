//! Serial queues.
//!
//! What a queue is doing is one atomic [`Word`]; who makes it `RUNNING` runs the queue. Work comes
//! in through the inbox, under its lock, and is taken from there in batches.
//!
//! When the engine is gone, `abandon` drops what waits.
//!
//! Only the thread that made a queue `RUNNING` touches its turn, so the turn's lock is free
//! whenever it is taken, but for the ends of concurrent blocks.

mod word;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use iohost_closure::Closure;
use iohost_event::ticks;
use iohost_interface::IOReturn;
use log::error;

use crate::baton::{Baton, Turn};
use crate::engine::{Shared, looking_next};
use crate::numbers::{Numbers, QueueNumbers};
use crate::sleepers::Sleepers;
use crate::{Clock, Engine, NO_PANIC};

use word::Word;

/// The longest name in bytes; `IODispatchQueueName` has 256 with its terminator.
const LONGEST_NAME: usize = 255;

/// How many items one queue runs before it lets the others have the worker.
const TURN: usize = 256;

/// A list of work that runs in order, one item at a time.
///
/// A value of this type is a handle; clones are the same queue. Each waiting item holds the
/// queue, so it outlives its last handle until they have run.
#[derive(Clone)]
pub struct Queue {
    core: Arc<QueueCore>,
}

/// Who answers for the code that runs on a queue.
pub trait Owner: Send + Sync {
    /// A block or a handler panicked on a queue. The queue goes on. On the thread that ran it.
    fn failed(&self, queue: &str, reason: &str);
}

/// What a queue can do beyond running work in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueOptions {
    /// `kIODispatchQueueReentrant`: the holder may give the queue up in [`Queue::sleep`], and
    /// [`Queue::dispatch_concurrent`] works.
    pub reentrant: bool,
}

pub(crate) struct QueueCore {
    name: String,
    engine: Arc<Shared>,
    options: QueueOptions,
    word: Word,
    inbox: Mutex<Inbox>,
    turn: Mutex<TurnState>,
    pub(crate) sleepers: Sleepers,
    numbers: Numbers,
    /// When the queue was put on the ready list, in ticks.
    scheduled_at: AtomicU64,
    owner: Option<Arc<dyn Owner>>,
    /// Dropped last: the work above may use it.
    kept: Mutex<Vec<Box<dyn Any + Send + Sync>>>,
}

#[derive(Default)]
struct Inbox {
    items: VecDeque<Item>,
    cancel_handlers: Vec<Closure>,
    /// Items that were put in, ever; and those that were dropped unrun.
    pushed: u64,
    dropped: u64,
}

/// What belongs to the running thread.
#[derive(Default)]
struct TurnState {
    /// Taken from the inbox and not run yet.
    items: VecDeque<Item>,
    /// Concurrent blocks under way.
    concurrent: usize,
}

/// What can wait on a queue.
pub(crate) enum Item {
    Block(Closure),
    /// May run beside other concurrent ones.
    Concurrent(Closure),
    /// A source with something to deliver; it looks itself what that is.
    Delivery(Arc<dyn Deliver>),
    Baton(Arc<Baton>),
}

/// A source, seen from its queue.
pub(crate) trait Deliver: Send + Sync {
    /// Runs the handler for what there is to deliver now, which can be nothing.
    fn deliver(&self);
}

thread_local! {
    /// The queues this thread holds, innermost last, by the address of their core. A core lives
    /// for as long as it is held: its holder has a reference. An address with [`BESIDE`] set is
    /// held by a concurrent block.
    static HELD: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// Marks a held queue whose holder is a concurrent block. Addresses of cores are even.
const BESIDE: usize = 1;

impl Queue {
    /// Makes a serial queue.
    ///
    /// Errors: `BAD_ARGUMENT` for a name of more than 255 bytes or with a NUL in it.
    pub fn create(engine: &Engine, name: &str, options: QueueOptions) -> Result<Self, IOReturn> {
        Self::on(engine.shared(), name, options, None)
    }

    /// Makes a queue whose owner is told of panics. Errors: as [`create`](Self::create).
    pub fn create_for(
        owner: Arc<dyn Owner>,
        engine: &Engine,
        name: &str,
        options: QueueOptions,
    ) -> Result<Self, IOReturn> {
        Self::on(engine.shared(), name, options, Some(owner))
    }

    /// Makes a queue on the engine that runs this one, with the same owner. Errors: as
    /// [`create`](Self::create).
    pub fn create_beside(&self, name: &str, options: QueueOptions) -> Result<Self, IOReturn> {
        Self::on(&self.core.engine, name, options, self.core.owner.clone())
    }

    fn on(
        engine: &Arc<Shared>,
        name: &str,
        options: QueueOptions,
        owner: Option<Arc<dyn Owner>>,
    ) -> Result<Self, IOReturn> {
        if name.len() > LONGEST_NAME || name.contains('\0') {
            return Err(IOReturn::BAD_ARGUMENT);
        }
        let core = Arc::new(QueueCore {
            name: name.to_owned(),
            engine: engine.clone(),
            options,
            word: Word::default(),
            inbox: Mutex::default(),
            turn: Mutex::default(),
            sleepers: Sleepers::default(),
            numbers: Numbers::default(),
            scheduled_at: AtomicU64::new(0),
            owner,
            kept: Mutex::default(),
        });
        engine.remember(&core);
        Ok(Self { core })
    }

    /// The name given at creation.
    pub fn name(&self) -> &str {
        &self.core.name
    }

    /// Whether the calling thread is running work of this queue, also further out.
    pub fn on_queue(&self) -> bool {
        self.core.is_held()
    }

    /// Appends work and returns; it never runs inside this call. Callable from any thread.
    /// After [`cancel`](Self::cancel) the work is dropped unrun and counted.
    pub fn dispatch_async(&self, block: impl FnOnce() + Send + 'static) {
        self.core.push(Item::Block(Closure::new(block)));
    }

    /// Appends work that may run beside other concurrent work of the queue, never beside any
    /// other; the order of what is not concurrent stays.
    ///
    /// Errors: `UNSUPPORTED` on a queue that is not reentrant; the work is dropped.
    pub fn dispatch_concurrent(
        &self,
        block: impl FnOnce() + Send + 'static,
    ) -> Result<(), IOReturn> {
        if !self.core.options.reentrant {
            return Err(IOReturn::UNSUPPORTED);
        }
        self.core.push(Item::Concurrent(Closure::new(block)));
        Ok(())
    }

    /// Runs `block` in its turn on the calling thread and returns what it returns. On an idle
    /// queue there is no thread change; on a queue the thread already holds it runs at once.
    ///
    /// Errors: `ABORTED` when the queue is cancelled before the turn comes.
    pub fn dispatch_sync<R>(&self, block: impl FnOnce() -> R) -> Result<R, IOReturn> {
        if self.on_queue() {
            return Ok(block());
        }
        let stood = !self.core.acquire()?;
        let _held = Holding::of(&self.core);
        let _counted = self.core.numbers.count_synchronous(stood);
        Ok(block())
    }

    /// Gives the queue up until somebody who holds it calls [`wakeup`](Self::wakeup) for the same
    /// event, or the deadline (nanoseconds on its clock) has passed; holds it again before it
    /// returns, in any case. Other work runs meanwhile, so look again at what was waited for.
    ///
    /// Errors: `TIMEOUT`; `UNSUPPORTED` on a queue that is not reentrant; `NOT_PERMITTED` on a
    /// thread that does not hold the queue, holds it twice, or holds it in a concurrent block
    /// beside others; `ABORTED` when the queue was
    /// cancelled (it is not held then), or when a manual engine has nothing left to run.
    pub fn sleep(&self, event: usize, deadline: Option<(Clock, u64)>) -> Result<(), IOReturn> {
        if !self.core.options.reentrant {
            return Err(IOReturn::UNSUPPORTED);
        }
        if !self.core.is_held_once_and_alone() {
            return Err(IOReturn::NOT_PERMITTED);
        }
        // Registered before the queue is given up, so no wakeup is lost.
        let sleeper = self.core.sleepers.add(event);
        let deadlines = &self.core.engine.deadlines;
        let timer = deadline.map(|(clock, at)| sleeper.end_at(deadlines, clock, at));
        self.core.put_down();
        self.core.engine.wait_for(sleeper.baton());
        timer.into_iter().for_each(|armed| deadlines.disarm(armed));
        let turn = sleeper.baton().turn();
        self.core.sleepers.remove(&sleeper);
        self.core.acquire()?;
        self.core.pick_up(self.core.address());
        match turn {
            Turn::Granted => Ok(()),
            Turn::TimedOut => Err(IOReturn::TIMEOUT),
            Turn::Waiting | Turn::Cancelled => Err(IOReturn::ABORTED),
        }
    }

    /// Wakes one thread that sleeps on an event, the one that has slept longest. `false` when
    /// there is none; that is not remembered.
    ///
    /// Errors: `NOT_PERMITTED` on a thread that does not hold the queue.
    pub fn wakeup(&self, event: usize) -> Result<bool, IOReturn> {
        self.check_held()?;
        Ok(self.core.sleepers.wake(event, 1) == 1)
    }

    /// Wakes all threads that sleep on an event. Returns how many.
    ///
    /// Errors: as [`wakeup`](Self::wakeup).
    pub fn wakeup_all(&self, event: usize) -> Result<usize, IOReturn> {
        self.check_held()?;
        Ok(self.core.sleepers.wake(event, usize::MAX))
    }

    fn check_held(&self) -> Result<(), IOReturn> {
        if self.on_queue() { Ok(()) } else { Err(IOReturn::NOT_PERMITTED) }
    }

    /// The names of the queues of this queue's engine that the calling thread holds, outermost
    /// first.
    pub fn held(&self) -> Vec<String> {
        HELD.with_borrow(|held| {
            held.iter().filter_map(|core| self.core.engine.name_of(*core & !BESIDE)).collect()
        })
    }

    /// Stops the queue: no further work starts; `done` runs after the work in progress, last.
    ///
    /// Callable from any thread, also on the queue itself. Cancelling twice runs the second
    /// `done` too, after the first. Threads that sleep on the queue are told `ABORTED`.
    pub fn cancel(&self, done: impl FnOnce() + Send + 'static) {
        self.core.cancel(Closure::new(done));
    }

    /// Runs code that waits for something other than this crate's own. On a worker of the engine
    /// another one takes its place meanwhile, up to 64, so that what is waited for can run.
    pub fn blocking<R>(&self, code: impl FnOnce() -> R) -> R {
        self.core.engine.blocking(code)
    }

    /// Keeps a value for as long as any work of the queue can run: until the last handle has gone
    /// and what waited has run or was dropped.
    pub fn keep(&self, value: impl Any + Send + Sync) {
        self.core.kept.lock().expect(NO_PANIC).push(Box::new(value));
    }

    /// Tells the queue's owner that its code failed in another way than by a panic.
    pub fn report_failure(&self, reason: &str) {
        self.core.report_failure(reason);
    }

    /// The time on a clock as this queue's timers see it, in nanoseconds.
    pub fn now(&self, clock: Clock) -> u64 {
        self.core.engine.deadlines.now(clock)
    }

    /// The queue's numbers now.
    pub fn numbers(&self) -> QueueNumbers {
        self.core.numbers()
    }

    pub(crate) fn core(&self) -> &Arc<QueueCore> {
        &self.core
    }

    pub(crate) fn engine(&self) -> &Arc<Shared> {
        &self.core.engine
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Queue").field(&self.core.name).finish()
    }
}

impl QueueCore {
    /// Appends an item, and has the queue run if nobody sees to that yet.
    pub(crate) fn push(self: &Arc<Self>, item: Item) {
        let mut inbox = self.inbox.lock().expect(NO_PANIC);
        if self.word.is_cancelled() {
            inbox.dropped += 1;
            drop(inbox);
            return item.cancelled();
        }
        inbox.pushed += 1;
        inbox.items.push_back(item);
        let announced = self.word.announce();
        drop(inbox);
        if announced {
            self.schedule();
        }
    }

    fn cancel(self: &Arc<Self>, done: Closure) {
        let mut inbox = self.inbox.lock().expect(NO_PANIC);
        inbox.cancel_handlers.push(done);
        self.word.cancel();
        drop(inbox);
        self.schedule();
        self.sleepers.abort();
    }

    /// Puts an idle queue on the ready list.
    fn schedule(self: &Arc<Self>) {
        if self.word.schedule() {
            self.become_ready();
        }
    }

    fn become_ready(self: &Arc<Self>) {
        self.scheduled_at.store(ticks(), Relaxed);
        self.engine.make_ready(self.clone());
    }

    /// Becomes the running thread of the queue, waiting for its turn. `true` when there was
    /// nothing to wait for.
    fn acquire(self: &Arc<Self>) -> Result<bool, IOReturn> {
        if self.word.take_if_idle() {
            return Ok(true);
        }
        let baton = Arc::new(Baton::for_this_thread());
        self.push(Item::Baton(baton.clone()));
        self.engine.wait_for(&baton);
        match baton.turn() {
            Turn::Granted => Ok(false),
            _ => Err(IOReturn::ABORTED),
        }
    }

    /// Delivers on this thread if the queue is idle. `false` when it is not; nothing is done then.
    pub(crate) fn run_if_idle(self: &Arc<Self>, source: &dyn Deliver) -> bool {
        if !self.word.take_if_idle() {
            return false;
        }
        let held = Holding::of(self);
        let start = ticks();
        let counted = self.numbers.count_synchronous(false);
        self.numbers.note_wait(0);
        self.guarded(|| source.deliver());
        // After a sleep another thread may have it, if the queue was cancelled meanwhile.
        if self.is_held() {
            self.numbers.note_time(ticks().saturating_sub(start));
        }
        drop(counted);
        looking_next(|| drop(held));
        true
    }

    /// Runs the queue's work on this worker, for one turn.
    pub(crate) fn run(self: &Arc<Self>) {
        self.word.start();
        let held = Holding::of(self);
        self.run_items(&held);
        looking_next(|| drop(held));
    }

    fn run_items(self: &Arc<Self>, held: &Holding<'_>) {
        let mut now = ticks();
        self.numbers.note_wait(now.saturating_sub(self.scheduled_at.load(Relaxed)));
        // A block of a reentrant queue can give it up and others then run what is left: there it
        // stays in the turn. On a plain queue this thread keeps it to itself.
        let mut mine = VecDeque::new();
        for _ in 0..TURN {
            if self.word.is_cancelled() {
                return self.run_cancelled(mine);
            }
            let Some(item) = self.next_item(&mut mine) else { return };
            let start = now;
            match item {
                Item::Block(block) => self.guarded(|| block.run()),
                Item::Delivery(source) => self.guarded(|| source.deliver()),
                Item::Concurrent(block) => {
                    self.start_concurrent(block);
                    continue;
                }
                Item::Baton(baton) => {
                    self.leave(mine);
                    held.pass_on();
                    baton.end(Turn::Granted);
                    return;
                }
            }
            if self.options.reentrant && !self.is_held() {
                // The block slept, and the queue was cancelled meanwhile: somebody else has it.
                return;
            }
            now = ticks();
            self.numbers.note_run(now.saturating_sub(start));
        }
        self.leave(mine);
    }

    /// The next item this thread may run.
    fn next_item(&self, mine: &mut VecDeque<Item>) -> Option<Item> {
        if let Some(item) = mine.pop_front() {
            return Some(item);
        }
        let mut turn = self.turn.lock().expect(NO_PANIC);
        if turn.items.is_empty() || self.word.is_pending() {
            let mut inbox = self.inbox.lock().expect(NO_PANIC);
            if turn.items.is_empty() {
                std::mem::swap(&mut turn.items, &mut inbox.items);
            } else {
                turn.items.append(&mut inbox.items);
            }
            self.word.clear_pending();
        }
        if turn.concurrent > 0 && !matches!(turn.items.front(), Some(Item::Concurrent(_))) {
            // The last concurrent block schedules the queue again.
            return None;
        }
        if !self.options.reentrant {
            std::mem::swap(&mut turn.items, mine);
            return mine.pop_front();
        }
        turn.items.pop_front()
    }

    /// Leaves items for the next turn, in front of what is there.
    fn leave(&self, mut mine: VecDeque<Item>) {
        let mut turn = self.turn.lock().expect(NO_PANIC);
        mine.append(&mut turn.items);
        turn.items = mine;
        if !turn.items.is_empty() {
            self.word.set_pending();
        }
    }

    /// Runs a concurrent block on some worker.
    fn start_concurrent(self: &Arc<Self>, block: Closure) {
        self.turn.lock().expect(NO_PANIC).concurrent += 1;
        self.word.set_shared(true);
        let core = self.clone();
        self.engine.run_soon(Closure::new(move || {
            let core = &core;
            let start = ticks();
            core.pick_up(core.address() | BESIDE);
            core.guarded(|| block.run());
            core.lay_down();
            let mut turn = core.turn.lock().expect(NO_PANIC);
            core.numbers.note_run(ticks().saturating_sub(start));
            turn.concurrent -= 1;
            if turn.concurrent == 0 {
                core.word.set_shared(false);
                let cancelled = core.word.is_cancelled();
                let more = !turn.items.is_empty() || cancelled;
                drop(turn);
                if more {
                    core.word.set_pending();
                    core.schedule();
                }
            }
        }));
    }

    /// Drops what waits, then runs the cancel handlers, one after the other.
    fn run_cancelled(self: &Arc<Self>, mut mine: VecDeque<Item>) {
        loop {
            let mut turn = self.turn.lock().expect(NO_PANIC);
            let mut inbox = self.inbox.lock().expect(NO_PANIC);
            let mut dropped = std::mem::take(&mut mine);
            dropped.append(&mut turn.items);
            dropped.append(&mut inbox.items);
            inbox.dropped += dropped.len() as u64;
            // Concurrent blocks are work in progress: the handlers wait for them.
            let handlers = match turn.concurrent {
                0 => std::mem::take(&mut inbox.cancel_handlers),
                _ => Vec::new(),
            };
            self.word.clear_pending();
            drop((turn, inbox));
            if dropped.is_empty() && handlers.is_empty() {
                return;
            }
            dropped.into_iter().for_each(Item::cancelled);
            handlers.into_iter().for_each(|handler| self.guarded(|| handler.run()));
        }
    }

    /// Drops what waits on a scheduled queue whose engine is gone.
    pub(crate) fn abandon(&self) {
        let mut turn = self.turn.lock().expect(NO_PANIC);
        let mut inbox = self.inbox.lock().expect(NO_PANIC);
        let mut dropped = std::mem::take(&mut turn.items);
        dropped.append(&mut inbox.items);
        inbox.dropped += dropped.len() as u64;
        let handlers = std::mem::take(&mut inbox.cancel_handlers);
        self.word.abandon();
        drop((turn, inbox));
        dropped.into_iter().for_each(Item::cancelled);
        drop(handlers);
    }

    /// Runs foreign code. A panic in it is that code's failure, not the queue's.
    fn guarded(&self, code: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(code)) {
            self.report_failure(panic_message(&*panic));
            // A payload can be anything, also something that panics when dropped.
            std::mem::forget(panic);
        }
    }

    fn report_failure(&self, reason: &str) {
        error!(queue = self.name.as_str(), reason; "code on a queue failed");
        if let Some(owner) = &self.owner {
            owner.failed(&self.name, reason);
        }
    }

    /// Ends this thread's turn.
    fn release(self: &Arc<Self>) {
        if self.word.end() {
            self.become_ready();
        }
    }

    /// Gives the queue up for a sleep.
    fn put_down(self: &Arc<Self>) {
        self.lay_down();
        if !self.turn.lock().expect(NO_PANIC).items.is_empty() {
            self.word.set_pending();
        }
        self.release();
    }

    /// This thread holds the queue from now on, as `mark` says.
    fn pick_up(&self, mark: usize) {
        HELD.with_borrow_mut(|held| held.push(mark));
    }

    /// This thread does not hold the queue any more, as far as its innermost hold goes.
    fn lay_down(&self) {
        HELD.with_borrow_mut(|held| {
            if let Some(at) = held.iter().rposition(|mark| mark & !BESIDE == self.address()) {
                held.remove(at);
            }
        });
    }

    fn is_held(&self) -> bool {
        HELD.with_borrow(|held| held.iter().any(|mark| mark & !BESIDE == self.address()))
    }

    fn is_held_once_and_alone(&self) -> bool {
        HELD.with_borrow(|held| {
            let mut marks = held.iter().filter(|mark| **mark & !BESIDE == self.address());
            marks.next() == Some(&self.address()) && marks.next().is_none()
        })
    }

    pub(crate) fn address(&self) -> usize {
        (&raw const *self).addr()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn numbers(&self) -> QueueNumbers {
        let inbox = self.inbox.lock().expect(NO_PANIC);
        let depth = self.numbers.depth(inbox.pushed - inbox.dropped);
        self.numbers.read(&self.name, depth, inbox.dropped, self.engine.scale.rate())
    }
}

/// Whether the calling thread runs no queue at all.
pub(crate) fn holds_nothing() -> bool {
    HELD.with_borrow(Vec::is_empty)
}

impl Item {
    /// Ends an item that will not run.
    fn cancelled(self) {
        if let Item::Baton(baton) = self {
            baton.end(Turn::Cancelled);
        }
    }
}

/// This thread runs a queue: recorded for `on_queue`, released on drop, also by a panic that
/// passes through `dispatch_sync`.
struct Holding<'a> {
    core: &'a Arc<QueueCore>,
    passed_on: Cell<bool>,
}

impl<'a> Holding<'a> {
    fn of(core: &'a Arc<QueueCore>) -> Self {
        core.pick_up(core.address());
        Self { core, passed_on: Cell::new(false) }
    }

    /// Gives the queue up without releasing it: another thread runs it from here on.
    fn pass_on(&self) {
        self.passed_on.set(true);
        self.core.lay_down();
    }
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        if !self.passed_on.get() && self.core.is_held() {
            self.core.lay_down();
            self.core.release();
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
