//! Serial queues.
//!
//! # States of a queue
//!
//! ```text
//!            1                 2                3
//!   Idle ────────▶ Scheduled ──────▶ Running ──────▶ Idle        nothing left
//!    │                 ▲                │  │
//!    │ 4               └───────5────────┘  │ 6
//!    └────────────────▶ Running ◀──────────┘
//! ```
//!
//! 1. `push`: work arrived; the queue joins the engine's ready list.
//! 2. `run`: a worker took it from the list.
//! 3. `release`: nothing is left.
//! 4. `dispatch_sync` on an idle queue: the caller's own thread runs, without a hop.
//! 5. `release`: work is left; back to the list, behind the other queues.
//! 6. `run` met a [`Baton`]: a thread in `dispatch_sync` takes over as the running thread.
//!
//! When the engine is gone, `abandon` drops what waits and takes a queue from Scheduled to Idle.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};

use iohost_interface::IOReturn;
use log::error;

use crate::engine::{Shared, looking_next};
use crate::{Clock, Engine, NO_PANIC};

/// Work for a queue: runs once.
pub type Block = Box<dyn FnOnce() + Send>;

/// The longest name in bytes; `IODispatchQueueName` has 256 with its terminator.
const LONGEST_NAME: usize = 255;

/// How much work one queue does before it lets the others have the worker.
const TURN: usize = 256;

/// A list of work that runs in order, one item at a time.
///
/// A value of this type is a handle; clones are the same queue. Each waiting item holds the
/// queue, so it outlives its last handle until they have run.
#[derive(Clone)]
pub struct Queue {
    core: Arc<QueueCore>,
}

pub(crate) struct QueueCore {
    name: String,
    engine: Arc<Shared>,
    state: Mutex<State>,
    pushed: AtomicU64,
    executed: AtomicU64,
    dropped: AtomicU64,
    longest_ns: AtomicU64,
}

struct State {
    stage: Stage,
    inbox: VecDeque<Item>,
    cancelled: bool,
    cancel_handlers: Vec<Block>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle,
    Scheduled,
    Running,
}

/// What can wait on a queue.
pub(crate) enum Item {
    Block(Block),
    /// A source with something to deliver; it looks itself what that is.
    Delivery(Arc<dyn Deliver>),
    Baton(Arc<Baton>),
}

/// A source, seen from its queue.
pub(crate) trait Deliver: Send + Sync {
    /// Runs the handler for what there is to deliver now, which can be nothing.
    fn deliver(&self);
}

/// The turn that a thread in `dispatch_sync` waits for.
pub(crate) struct Baton {
    turn: Mutex<Turn>,
    changed: Condvar,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Waiting,
    Granted,
    Cancelled,
}

/// The numbers a queue keeps about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueNumbers {
    /// The queue's name.
    pub name: String,
    /// Items waiting now, or running.
    pub depth: u64,
    /// Items run.
    pub executed: u64,
    /// Items dropped because the queue was cancelled.
    pub dropped: u64,
    /// The longest single item, in nanoseconds.
    pub longest_ns: u64,
}

thread_local! {
    /// The queues this thread holds, innermost last.
    static HELD: RefCell<Vec<Arc<QueueCore>>> = const { RefCell::new(Vec::new()) };
}

impl Queue {
    /// Makes a serial queue.
    ///
    /// Errors: `BAD_ARGUMENT` for a name of more than 255 bytes or with a NUL in it.
    pub fn create(engine: &Engine, name: &str) -> Result<Self, IOReturn> {
        Self::on(engine.shared(), name)
    }

    /// Makes a queue on the engine that runs this one. Errors: as [`create`](Self::create).
    pub fn create_beside(&self, name: &str) -> Result<Self, IOReturn> {
        Self::on(&self.core.engine, name)
    }

    fn on(engine: &Arc<Shared>, name: &str) -> Result<Self, IOReturn> {
        if name.len() > LONGEST_NAME || name.contains('\0') {
            return Err(IOReturn::BAD_ARGUMENT);
        }
        let core = Arc::new(QueueCore {
            name: name.to_owned(),
            engine: engine.clone(),
            state: Mutex::new(State {
                stage: Stage::Idle,
                inbox: VecDeque::new(),
                cancelled: false,
                cancel_handlers: Vec::new(),
            }),
            pushed: AtomicU64::new(0),
            executed: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            longest_ns: AtomicU64::new(0),
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
        HELD.with_borrow(|held| held.iter().any(|core| Arc::ptr_eq(core, &self.core)))
    }

    /// Appends work and returns; it never runs inside this call. Callable from any thread.
    /// After [`cancel`](Self::cancel) the work is dropped unrun and counted.
    pub fn dispatch_async(&self, block: impl FnOnce() + Send + 'static) {
        self.core.push(Item::Block(Box::new(block)));
    }

    /// Runs `block` in its turn on the calling thread and returns what it returns. On an idle
    /// queue there is no thread change; on a queue the thread already holds it runs at once.
    ///
    /// Errors: `ABORTED` when the queue is cancelled before the turn comes.
    pub fn dispatch_sync<R>(&self, block: impl FnOnce() -> R) -> Result<R, IOReturn> {
        if self.on_queue() {
            return Ok(block());
        }
        self.core.acquire()?;
        let held = Holding::of(self.core.clone());
        let start = Clock::Uptime.now();
        let result = block();
        self.core.note_run(start, Clock::Uptime.now());
        drop(held);
        Ok(result)
    }

    /// Stops the queue: no further work starts; `done` runs after the work in progress, last.
    ///
    /// Callable from any thread, also on the queue itself. Cancelling twice runs the second
    /// `done` too, after the first.
    pub fn cancel(&self, done: impl FnOnce() + Send + 'static) {
        self.core.cancel(Box::new(done));
    }

    /// The time on a clock as this queue's timers see it, in nanoseconds.
    pub fn now(&self, clock: Clock) -> u64 {
        self.core.engine.deadlines.now(clock)
    }

    /// The queue's numbers now. Reading them takes no lock.
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
        let mut state = self.state.lock().expect(NO_PANIC);
        if state.cancelled {
            self.dropped.fetch_add(1, Relaxed);
            drop(state);
            item.cancelled();
            return;
        }
        self.pushed.fetch_add(1, Relaxed);
        state.inbox.push_back(item);
        self.schedule(state);
    }

    fn cancel(self: &Arc<Self>, done: Block) {
        let mut state = self.state.lock().expect(NO_PANIC);
        state.cancelled = true;
        state.cancel_handlers.push(done);
        self.schedule(state);
    }

    fn schedule(self: &Arc<Self>, mut state: std::sync::MutexGuard<'_, State>) {
        if state.stage == Stage::Idle {
            state.stage = Stage::Scheduled;
            drop(state);
            self.engine.make_ready(self.clone());
        }
    }

    /// Becomes the running thread of the queue, waiting for its turn.
    fn acquire(self: &Arc<Self>) -> Result<(), IOReturn> {
        let mut state = self.state.lock().expect(NO_PANIC);
        if state.cancelled {
            return Err(IOReturn::ABORTED);
        }
        self.pushed.fetch_add(1, Relaxed);
        if state.stage == Stage::Idle {
            state.stage = Stage::Running;
            return Ok(());
        }
        let baton = Arc::new(Baton { turn: Mutex::new(Turn::Waiting), changed: Condvar::new() });
        state.inbox.push_back(Item::Baton(baton.clone()));
        drop(state);
        self.engine.while_waiting(|| baton.is_waiting());
        baton.wait()
    }

    /// Runs the queue's work on this worker, for one turn.
    pub(crate) fn run(self: &Arc<Self>) {
        self.state.lock().expect(NO_PANIC).stage = Stage::Running;
        let held = Holding::of(self.clone());
        self.run_items(&held);
        looking_next(|| drop(held));
    }

    fn run_items(self: &Arc<Self>, held: &Holding) {
        let mut now = Clock::Uptime.now();
        for _ in 0..TURN {
            let mut state = self.state.lock().expect(NO_PANIC);
            if state.cancelled {
                drop(state);
                self.run_cancelled();
                return;
            }
            let Some(item) = state.inbox.pop_front() else { return };
            drop(state);
            let start = now;
            match item {
                Item::Block(block) => self.guarded(block),
                Item::Delivery(source) => self.guarded(|| source.deliver()),
                Item::Baton(baton) => {
                    held.pass_on();
                    baton.end(Turn::Granted);
                    return;
                }
            }
            now = Clock::Uptime.now();
            self.note_run(start, now);
        }
    }

    /// Drops what waits, then runs the cancel handlers, one after the other.
    fn run_cancelled(self: &Arc<Self>) {
        loop {
            let mut state = self.state.lock().expect(NO_PANIC);
            let dropped = std::mem::take(&mut state.inbox);
            let handlers = std::mem::take(&mut state.cancel_handlers);
            drop(state);
            if dropped.is_empty() && handlers.is_empty() {
                return;
            }
            self.dropped.fetch_add(dropped.len() as u64, Relaxed);
            self.pushed.fetch_sub(dropped.len() as u64, Relaxed);
            dropped.into_iter().for_each(Item::cancelled);
            handlers.into_iter().for_each(|handler| self.guarded(handler));
        }
    }

    /// Drops what waits on a scheduled queue whose engine is gone.
    pub(crate) fn abandon(&self) {
        let mut state = self.state.lock().expect(NO_PANIC);
        let dropped = std::mem::take(&mut state.inbox);
        let handlers = std::mem::take(&mut state.cancel_handlers);
        state.stage = Stage::Idle;
        drop(state);
        self.dropped.fetch_add(dropped.len() as u64, Relaxed);
        self.pushed.fetch_sub(dropped.len() as u64, Relaxed);
        dropped.into_iter().for_each(Item::cancelled);
        drop(handlers);
    }

    /// Runs foreign code. A panic in it is that code's failure, not the queue's.
    fn guarded(&self, code: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(code)) {
            let message = panic_message(&*panic);
            error!(queue = self.name.as_str(), message; "a handler panicked");
            self.engine.report_panic(&self.name, message);
        }
    }

    fn note_run(&self, start: u64, end: u64) {
        // Only the running thread writes these, so a load and a store are enough.
        self.executed.store(self.executed.load(Relaxed) + 1, Relaxed);
        let took = end.saturating_sub(start);
        if took > self.longest_ns.load(Relaxed) {
            self.longest_ns.store(took, Relaxed);
        }
    }

    /// Ends this thread's turn.
    fn release(self: &Arc<Self>) {
        let mut state = self.state.lock().expect(NO_PANIC);
        let work_left = !state.inbox.is_empty() || !state.cancel_handlers.is_empty();
        state.stage = if work_left { Stage::Scheduled } else { Stage::Idle };
        drop(state);
        if work_left {
            self.engine.make_ready(self.clone());
        }
    }

    pub(crate) fn numbers(&self) -> QueueNumbers {
        let executed = self.executed.load(Relaxed);
        QueueNumbers {
            name: self.name.clone(),
            depth: self.pushed.load(Relaxed).saturating_sub(executed),
            executed,
            dropped: self.dropped.load(Relaxed),
            longest_ns: self.longest_ns.load(Relaxed),
        }
    }
}

impl Item {
    /// Ends an item that will not run.
    fn cancelled(self) {
        if let Item::Baton(baton) = self {
            baton.end(Turn::Cancelled);
        }
    }
}

impl Baton {
    fn is_waiting(&self) -> bool {
        *self.turn.lock().expect(NO_PANIC) == Turn::Waiting
    }

    fn wait(&self) -> Result<(), IOReturn> {
        let turn = self.turn.lock().expect(NO_PANIC);
        let turn = self.changed.wait_while(turn, |turn| *turn == Turn::Waiting).expect(NO_PANIC);
        if *turn == Turn::Granted { Ok(()) } else { Err(IOReturn::ABORTED) }
    }

    fn end(&self, turn: Turn) {
        *self.turn.lock().expect(NO_PANIC) = turn;
        self.changed.notify_one();
    }
}

/// This thread runs a queue: recorded for `on_queue`, released on drop, also by a panic that
/// passes through `dispatch_sync`.
struct Holding {
    /// `None` once somebody else took over.
    core: RefCell<Option<Arc<QueueCore>>>,
}

impl Holding {
    fn of(core: Arc<QueueCore>) -> Self {
        HELD.with_borrow_mut(|held| held.push(core.clone()));
        Self { core: RefCell::new(Some(core)) }
    }

    /// Gives the queue up without releasing it: another thread runs it from here on.
    fn pass_on(&self) {
        self.core.take();
        HELD.with_borrow_mut(|held| held.pop());
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        if let Some(core) = self.core.take() {
            HELD.with_borrow_mut(|held| held.pop());
            core.release();
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
