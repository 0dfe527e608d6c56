//! Serial queues.
//!
//! What a queue is doing is one atomic [`Word`]; who makes it `RUNNING` runs the queue. Work comes
//! in through the inbox, under its lock. A plain queue's thread takes all of it from there as its
//! [`Batch`]. A block of a reentrant queue can give it up, and others then run what is left, so
//! there it is taken into the queue's turn.
//!
//! Sleeping and waking cost more than most items. So a thread that runs a stream of work looks for more
//! before it sleeps, and a sender that finds the queue idle wakes a worker before it puts its item
//! in. What several threads write is kept to one line of the cache, the [`Intake`].
//!
//! When the engine is gone, `abandon` drops what waits.

mod batch;
mod held;
mod word;

use std::any::Any;
use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use iohost_closure::Closure;
use iohost_event::ticks;
use iohost_interface::IOReturn;
use iohost_memory::flight_recorder::{Kind, Lane, Recorder};
use iohost_memory::prefetch;
use log::error;

use crate::baton::{Baton, Turn};
use crate::engine::{Shared, looking_next};
use crate::numbers::{Numbers, QueueNumbers, Stopwatch};
use crate::sleepers::Sleepers;
use crate::step::{Step, takes, wakes_first};
use crate::sync::atomic::AtomicBool;
use crate::sync::{Mutex, MutexGuard, has_failed, hint};
use crate::{Clock, Engine, NO_PANIC};

use batch::Batch;
use word::Word;

pub(crate) use batch::fetch_likely;
pub(crate) use held::holds_nothing;

/// The longest name in bytes; `IODispatchQueueName` has 256 with its terminator.
const LONGEST_NAME: usize = 255;

/// How many items one queue runs before it lets the others have the worker.
const TURN: usize = 256;

/// How many items further on a sender has the place of one fetched. A place takes as long to come
/// as some items take to be sent.
const AHEAD: usize = 4;

/// From so many steps of a turn on, a queue is one with a stream of work, which goes on a moment
/// after there is nothing left: to sleep and be woken costs the runner and the sender a trip into the
/// kernel each.
const STREAM: usize = 4;

/// How often it looks then whether more has come, and for how many pauses it leaves the senders alone
/// before each look: about as long as waking a thread takes. What comes meanwhile is taken all at once.
const STREAM_LOOKS: u32 = 3;
const STREAM_PAUSES: u32 = 200;

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
    options: QueueOptions,
    intake: Intake,
    turn: Mutex<TurnState>,
    /// After the inbox's lock, where both are held.
    ends: Mutex<Ends>,
    pub(crate) sleepers: Sleepers,
    numbers: Numbers,
    /// Where its doings are recorded, if they are.
    pub(crate) lane: Option<Lane>,
    owner: Option<Arc<dyn Owner>>,
    /// Dropped last: the work above may use it.
    kept: Mutex<Vec<Box<dyn Any + Send + Sync>>>,
}

/// What a thread that sends work touches: one line of the cache that changes, with nothing in it
/// that the running thread writes for each item, and one that does not. A line that another
/// processor has costs as much as all the rest of sending.
#[repr(C, align(128))]
struct Intake {
    word: Word,
    /// When the queue was put on the ready list, in ticks.
    scheduled_at: AtomicU64,
    inbox: Mutex<Inbox>,
    engine: Arc<Shared>,
    /// As the word says. The running thread looks here, for each item, and leaves the line above
    /// to the senders. Written before the word.
    cancelled: AtomicBool,
}

#[derive(Default)]
struct Inbox {
    items: VecDeque<Item>,
    /// Items that were put in, ever.
    pushed: u64,
}

/// Of a queue that was cancelled.
#[derive(Default)]
struct Ends {
    cancel_handlers: Vec<Closure>,
    /// Items that were dropped unrun.
    dropped: u64,
}

const _: () = assert!(cfg!(loom) || std::mem::offset_of!(Intake, engine) == 64);

/// What belongs to the running thread, and to the concurrent blocks of a reentrant queue.
#[derive(Default)]
struct TurnState {
    /// Taken from the inbox and not run yet; of a plain queue, what a turn left over.
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
    /// The place of one that has run, in a batch.
    Ran,
}

const _: () = assert!(size_of::<Item>() == 64);

/// A source, seen from its queue.
pub(crate) trait Deliver: Send + Sync {
    /// Runs the handler for what there is to deliver now, which can be nothing.
    fn deliver(&self);
}

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
        Self::on(&self.core.intake.engine, name, options, self.core.owner.clone())
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
            options,
            intake: Intake {
                word: Word::default(),
                scheduled_at: AtomicU64::new(0),
                inbox: Mutex::default(),
                engine: engine.clone(),
                cancelled: AtomicBool::new(false),
            },
            turn: Mutex::default(),
            ends: Mutex::default(),
            sleepers: Sleepers::default(),
            numbers: Numbers::default(),
            lane: engine.recorder.as_ref().and_then(|recorder| recorder.lane(name)),
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
    #[inline]
    pub fn on_queue(&self) -> bool {
        self.core.is_held()
    }

    /// Appends work and returns; it never runs inside this call. Callable from any thread.
    /// After [`cancel`](Self::cancel) the work is dropped unrun and counted.
    #[inline]
    pub fn dispatch_async(&self, block: impl FnOnce() + Send + 'static) {
        if batch::is_of(self.core.address()) && self.core.intake.word.is_quiet() {
            // The queue's own item adds to it, and nothing that came before waits in the inbox.
            self.core.numbers.count_own_push();
            batch::add(block);
        } else {
            self.core.push(Item::Block(Closure::new(block)));
        }
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
    #[inline]
    pub fn dispatch_sync<R>(&self, block: impl FnOnce() -> R) -> Result<R, IOReturn> {
        let mut at_once = self.core.intake.word.take_if_idle();
        if !at_once {
            if self.on_queue() {
                return Ok(block());
            }
            at_once = self.core.take_soon();
            if !at_once {
                self.core.take_in_turn()?;
            }
        }
        let _held = Holding::of(&self.core);
        let _counted = self.core.numbers.count_synchronous(!at_once);
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
        if !held::holds_once_and_alone(self.core.address()) {
            return Err(IOReturn::NOT_PERMITTED);
        }
        // Registered before the queue is given up, so no wakeup is lost.
        let sleeper = self.core.sleepers.add(event);
        // The engine's end, if it came before, could not end this sleep.
        if self.core.intake.engine.is_stopping() {
            sleeper.baton().end(Turn::Cancelled);
        }
        let deadlines = &self.core.intake.engine.deadlines;
        let timer = deadline.map(|(clock, at)| sleeper.end_at(deadlines, clock, at));
        self.core.put_down();
        self.core.intake.engine.wait_for(sleeper.baton());
        timer.into_iter().for_each(|armed| deadlines.disarm(armed));
        let turn = sleeper.baton().turn();
        self.core.sleepers.remove(&sleeper);
        if turn == Turn::Cancelled && self.core.intake.engine.is_stopping() {
            return Err(IOReturn::ABORTED);
        }
        self.core.take_again()?;
        held::pick_up(self.core.address());
        self.core.at_work();
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
        let held = held::addresses().into_iter();
        held.filter_map(|address| self.core.intake.engine.name_of(address)).collect()
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
        self.core.intake.engine.blocking(code)
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

    /// Says that the work in progress on the queue is getting on, however long it takes. Any thread.
    pub fn report_progress(&self) {
        if let Some(lane) = &self.core.lane {
            lane.progress();
        }
    }

    /// Runs code on the queue, and has the flight recorder know what that is.
    pub fn recorded<R>(&self, kind: Kind, first: u64, second: u64, code: impl FnOnce() -> R) -> R {
        let _during = self.core.lane.as_ref().map(|lane| lane.during(kind, first, second));
        code()
    }

    /// Has the flight recorder know of something that happened on the queue. Only the thread that
    /// runs the queue can say so; of any other one nothing is recorded.
    pub fn note(&self, kind: Kind, first: u64, second: u64) {
        if let Some(lane) = self.core.lane.as_ref().filter(|_| self.on_queue()) {
            lane.note(kind, first, second);
        }
    }

    /// The flight recorder of the queue's engine, if it has one.
    pub fn recorder(&self) -> Option<&Arc<Recorder>> {
        self.core.intake.engine.recorder.as_ref()
    }

    /// The time on a clock as this queue's timers see it, in nanoseconds.
    pub fn now(&self, clock: Clock) -> u64 {
        self.core.intake.engine.deadlines.now(clock)
    }

    /// The queue's numbers now.
    pub fn numbers(&self) -> QueueNumbers {
        self.core.numbers()
    }

    pub(crate) fn core(&self) -> &Arc<QueueCore> {
        &self.core
    }

    pub(crate) fn engine(&self) -> &Arc<Shared> {
        &self.core.intake.engine
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
        prefetch::to_write(&raw const self.intake);
        if wakes_first() && self.intake.word.is_idle() && self.intake.engine.looks > 0 {
            // A worker is woken before there is something to run: it takes longer to come than this
            // thread takes to go on, and looks until then if it does not.
            self.fetch_for_waking();
            self.schedule();
        }
        let mut inbox = self.intake.inbox.lock().expect(NO_PANIC);
        if self.intake.word.is_cancelled() {
            self.ends().dropped += 1;
            drop(inbox);
            return item.cancelled();
        }
        inbox.pushed += 1;
        inbox.items.push_back(item);
        inbox.fetch_ahead();
        let scheduled = self.intake.word.announce();
        drop(inbox);
        if scheduled {
            self.become_ready();
        }
    }

    /// Has the lines come, at once, that a sender needs who finds the queue idle: the one that
    /// counts the queue's references, and the engine's exchange.
    fn fetch_for_waking(self: &Arc<Self>) {
        let counts = Arc::as_ptr(self).wrapping_byte_sub(align_of::<Self>());
        prefetch::to_write(counts);
        self.intake.engine.fetch_exchange();
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().expect(NO_PANIC)
    }

    fn cancel(self: &Arc<Self>, done: Closure) {
        let inbox = self.intake.inbox.lock().expect(NO_PANIC);
        self.ends().cancel_handlers.push(done);
        self.intake.cancelled.store(true, Relaxed);
        self.intake.word.cancel();
        drop(inbox);
        self.schedule();
        self.sleepers.abort();
    }

    /// Puts an idle queue on the ready list.
    fn schedule(self: &Arc<Self>) {
        if self.intake.word.schedule() {
            self.become_ready();
        }
    }

    fn become_ready(self: &Arc<Self>) {
        self.intake.scheduled_at.store(ticks(), Relaxed);
        self.intake.engine.make_ready(self.clone());
    }

    /// Becomes the running thread of the queue again, after a sleep.
    fn take_again(self: &Arc<Self>) -> Result<(), IOReturn> {
        if !self.intake.word.take_if_idle() {
            self.take_in_turn()?;
            // The return stood on the queue, and is no item that was sent.
            self.intake.inbox.lock().expect(NO_PANIC).pushed -= 1;
        }
        Ok(())
    }

    /// Becomes the running thread of a queue that falls idle while this thread looks. It does not
    /// look for long, and not where something waits already.
    #[cold]
    fn take_soon(&self) -> bool {
        for _ in 0..self.intake.engine.looks {
            if self.intake.word.is_idle() && self.intake.word.take_if_idle() {
                return true;
            }
            if !self.intake.word.is_quiet() {
                return false;
            }
            hint::spin_loop();
        }
        false
    }

    /// Becomes the running thread of the queue, behind what waits.
    #[cold]
    fn take_in_turn(self: &Arc<Self>) -> Result<(), IOReturn> {
        let baton = Arc::new(Baton::for_this_thread());
        self.push(Item::Baton(baton.clone()));
        self.intake.engine.wait_for(&baton);
        match baton.turn() {
            Turn::Granted => Ok(()),
            _ => Err(IOReturn::ABORTED),
        }
    }

    /// Runs a delivery on this thread if the queue is idle. `false` when it is not; nothing is done then.
    pub(crate) fn run_if_idle(self: &Arc<Self>, delivery: impl FnOnce()) -> bool {
        if !self.intake.word.take_if_idle() {
            return false;
        }
        let held = Holding::of(self);
        let start = ticks();
        let counted = self.numbers.count_synchronous(false);
        self.guarded(delivery);
        // After a sleep another thread may have it, if the queue was cancelled meanwhile.
        if self.is_held() {
            self.numbers.note_wait(0);
            self.numbers.note_time(ticks().saturating_sub(start));
        }
        drop(counted);
        looking_next(|| drop(held));
        true
    }

    /// Runs the queue's work on this worker, for one turn.
    pub(crate) fn run(self: &Arc<Self>) {
        self.intake.word.start();
        let held = Holding::of(self);
        let start = ticks();
        let waited = start.saturating_sub(self.intake.scheduled_at.load(Relaxed));
        if let Some(lane) = &self.lane {
            lane.turn(start);
        }
        let mut watch = Stopwatch::start(&self.numbers, start);
        if self.options.reentrant {
            self.run_turn(&held, &mut watch);
        } else {
            self.run_batch(&held, &mut watch);
        }
        watch.read_rest(ticks);
        self.numbers.note_wait(waited);
        looking_next(|| drop(held));
    }

    /// Runs items of a plain queue.
    fn run_batch(self: &Arc<Self>, held: &Holding<'_>, watch: &mut Stopwatch<'_>) {
        let mut batch = Batch::of(self.address());
        for step in 0..TURN {
            if self.intake.cancelled.load(Relaxed) {
                let mut left = VecDeque::new();
                batch.put_before(&mut left);
                return self.run_cancelled(left);
            }
            let Some(item) = batch.next() else {
                if batch.has_added() {
                    self.guarded(|| batch.run_added());
                    self.item_done();
                    watch.item_ran(ticks);
                } else if !self.refill(&mut batch) && !self.goes_on(step, watch) {
                    return;
                }
                continue;
            };
            match item {
                Item::Block(block) => self.guarded(|| block.run_in_place()),
                Item::Delivery(source) => {
                    self.guarded(|| source.deliver());
                    // Not kept until the batch is through: it owns a descriptor.
                    *item = Item::Ran;
                }
                Item::Concurrent(_) | Item::Ran => unreachable!("never on a plain queue"),
                Item::Baton(baton) => {
                    let baton = baton.clone();
                    self.leave(&mut batch);
                    if held.pass_on(&baton) {
                        return;
                    }
                    continue;
                }
            }
            self.item_done();
            watch.item_ran(ticks);
        }
        self.leave(&mut batch);
    }

    /// Waits for something to run, not for long, at a step of a turn that found nothing. The word
    /// says whether there is something.
    #[cold]
    fn goes_on(&self, step: usize, watch: &mut Stopwatch<'_>) -> bool {
        if cfg!(loom) {
            // A model need not wait for what may come: it has that come before, in another run.
            return false;
        }
        let looks = self.intake.engine.looks;
        let (looks, pauses) = match step {
            // Who woke this thread is about to put something in.
            0 => (looks, 1),
            1..STREAM => return false,
            _ => (looks.min(STREAM_LOOKS), STREAM_PAUSES),
        };
        watch.read_rest(ticks);
        let goes_on = (0..looks).any(|_| {
            (0..pauses).for_each(|_| hint::spin_loop());
            self.intake.word.is_pending()
        });
        watch.skip_to(ticks());
        goes_on
    }

    /// Takes what an earlier turn left, or else all there is. `false` when there is nothing, or the
    /// queue was cancelled since this thread looked: the handlers are still to be run then.
    fn refill(&self, batch: &mut Batch) -> bool {
        let mut turn = self.turn.lock().expect(NO_PANIC);
        let mut inbox = self.intake.inbox.lock().expect(NO_PANIC);
        let left = !turn.items.is_empty();
        // Behind what was left, what stands in the inbox stays announced.
        if (!left || inbox.items.is_empty()) && !self.intake.word.take_pending() {
            return false;
        }
        let items = if left { &mut turn.items } else { &mut inbox.items };
        let some = !items.is_empty();
        batch.take_all(items);
        some
    }

    /// Leaves a batch for the next turn. It comes before the inbox, whose lock it does not need:
    /// a sender would wait for items to be moved.
    fn leave(&self, batch: &mut Batch) {
        let mut turn = self.turn.lock().expect(NO_PANIC);
        batch.put_before(&mut turn.items);
        if !turn.items.is_empty() {
            self.intake.word.set_pending();
        }
    }

    /// Runs items of a reentrant queue.
    fn run_turn(self: &Arc<Self>, held: &Holding<'_>, watch: &mut Stopwatch<'_>) {
        for _ in 0..TURN {
            if self.intake.word.is_cancelled() {
                return self.run_cancelled(VecDeque::new());
            }
            let Some(item) = self.next_of_turn() else { return };
            match item {
                Item::Block(block) => self.guarded(|| block.run()),
                Item::Delivery(source) => self.guarded(|| source.deliver()),
                Item::Concurrent(block) => {
                    self.start_concurrent(block);
                    continue;
                }
                Item::Ran => unreachable!("only in batches"),
                Item::Baton(baton) => {
                    self.leave_turn();
                    if held.pass_on(&baton) {
                        return;
                    }
                    continue;
                }
            }
            if !self.is_held() {
                // The block slept, and the queue was cancelled meanwhile: somebody else has it.
                return;
            }
            self.item_done();
            watch.item_ran(ticks);
        }
        self.leave_turn();
    }

    /// The next item of a reentrant queue that this thread may run.
    fn next_of_turn(&self) -> Option<Item> {
        let mut turn = self.turn.lock().expect(NO_PANIC);
        if turn.items.is_empty() || self.intake.word.is_pending() {
            let mut inbox = self.intake.inbox.lock().expect(NO_PANIC);
            if !self.intake.word.take_pending() {
                // Cancelled since this thread looked: the handlers are still to be run.
                return None;
            }
            turn.items.append(&mut inbox.items);
        }
        if turn.concurrent > 0 && !matches!(turn.items.front(), Some(Item::Concurrent(_))) {
            // The last concurrent block schedules the queue again.
            return None;
        }
        turn.items.pop_front()
    }

    /// What is left of the turn is for whoever holds the queue next.
    fn leave_turn(&self) {
        if !self.turn.lock().expect(NO_PANIC).items.is_empty() {
            self.intake.word.set_pending();
        }
    }

    /// Runs a concurrent block on some worker.
    fn start_concurrent(self: &Arc<Self>, block: Closure) {
        self.turn.lock().expect(NO_PANIC).concurrent += 1;
        self.intake.word.start_shared();
        let beside = Beside(self.clone());
        self.intake.engine.run_soon(Closure::new(move || {
            let core = &beside.0;
            let start = ticks();
            held::pick_up_beside(core.address());
            core.lane.iter().for_each(Lane::begin_beside);
            core.guarded(|| block.run());
            core.lane.iter().for_each(Lane::end_beside);
            held::lay_down(core.address());
            let _turn = core.turn.lock().expect(NO_PANIC);
            core.numbers.count_run();
            core.numbers.note_time(ticks().saturating_sub(start));
        }));
    }

    /// A concurrent block has run, or its engine has gone.
    fn end_concurrent(self: &Arc<Self>) {
        let mut turn = self.turn.lock().expect(NO_PANIC);
        turn.concurrent -= 1;
        if turn.concurrent > 0 {
            return;
        }
        let cancelled = self.intake.word.is_cancelled() && takes(Step::ResumeCancel);
        let more = !turn.items.is_empty() || cancelled;
        self.intake.word.end_shared(more);
        drop(turn);
        if more {
            self.schedule();
        }
    }

    /// Drops what waits, then runs the cancel handlers, one after the other.
    fn run_cancelled(self: &Arc<Self>, mut mine: VecDeque<Item>) {
        loop {
            let mut turn = self.turn.lock().expect(NO_PANIC);
            let mut inbox = self.intake.inbox.lock().expect(NO_PANIC);
            let mut dropped = std::mem::take(&mut mine);
            dropped.append(&mut turn.items);
            dropped.append(&mut inbox.items);
            let mut ends = self.ends();
            ends.dropped += dropped.len() as u64;
            // Concurrent blocks are work in progress: the handlers wait for them.
            let handlers = match turn.concurrent {
                0 => std::mem::take(&mut ends.cancel_handlers),
                _ => Vec::new(),
            };
            self.intake.word.clear_pending();
            drop((turn, inbox, ends));
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
        let mut inbox = self.intake.inbox.lock().expect(NO_PANIC);
        let mut dropped = std::mem::take(&mut turn.items);
        dropped.append(&mut inbox.items);
        let mut ends = self.ends();
        ends.dropped += dropped.len() as u64;
        let handlers = std::mem::take(&mut ends.cancel_handlers);
        self.intake.word.abandon();
        drop((turn, inbox, ends));
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
    #[inline]
    fn release(self: &Arc<Self>) {
        if !self.intake.word.end_if_quiet() {
            self.release_to_next();
        }
    }

    #[cold]
    fn release_to_next(self: &Arc<Self>) {
        while let Some(baton) = self.next_baton() {
            if baton.end(Turn::Granted) {
                return;
            }
        }
        if self.intake.word.end() {
            self.become_ready();
        }
    }

    /// The thread that is to run next, when it is one in `dispatch_sync`: it needs no worker to
    /// hand it the queue.
    fn next_baton(&self) -> Option<Arc<Baton>> {
        if self.options.reentrant {
            return None;
        }
        let mut turn = self.turn.lock().expect(NO_PANIC);
        let mut inbox = self.intake.inbox.lock().expect(NO_PANIC);
        if self.intake.word.is_cancelled() && takes(Step::LookForCancelAtEnd) {
            return None;
        }
        let items = if turn.items.is_empty() { &mut inbox.items } else { &mut turn.items };
        let baton = items.pop_front_if(|item| matches!(item, Item::Baton(_)));
        if turn.items.is_empty() && inbox.items.is_empty() || !takes(Step::KeepPending) {
            self.intake.word.clear_pending();
        }
        match baton {
            Some(Item::Baton(baton)) => Some(baton),
            _ => None,
        }
    }

    /// Gives the queue up for a sleep.
    fn put_down(self: &Arc<Self>) {
        held::lay_down(self.address());
        if takes(Step::LeaveTurn) {
            self.leave_turn();
        }
        self.at_rest();
        self.release();
    }

    /// This thread has begun to run the queue.
    #[inline]
    fn at_work(&self) {
        if let Some(lane) = &self.lane {
            lane.begin();
        }
    }

    /// One piece of work has ended.
    #[inline]
    fn item_done(&self) {
        if let Some(lane) = &self.lane {
            lane.done();
        }
    }

    /// This thread is about to give the queue up.
    #[inline]
    fn at_rest(&self) {
        if let Some(lane) = &self.lane {
            lane.end();
        }
    }

    #[inline]
    fn is_held(&self) -> bool {
        held::holds(self.address())
    }

    #[inline]
    pub(crate) fn address(&self) -> usize {
        (&raw const *self).addr()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn numbers(&self) -> QueueNumbers {
        let inbox = self.intake.inbox.lock().expect(NO_PANIC);
        let dropped = self.ends().dropped;
        let depth = self.numbers.depth(inbox.pushed, dropped);
        self.numbers.read(&self.name, depth, dropped, self.intake.engine.scale.rate())
    }
}

impl Inbox {
    /// Has the places of the next items come: the thread that ran the items before them has them.
    #[inline]
    fn fetch_ahead(&self) {
        if let Some(last) = self.items.back() {
            prefetch::to_write((&raw const *last).wrapping_add(AHEAD));
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

/// A concurrent block that runs or will; ended on drop.
struct Beside(Arc<QueueCore>);

impl Drop for Beside {
    fn drop(&mut self) {
        self.0.end_concurrent();
    }
}

/// This thread runs a queue: recorded for `on_queue`, released on drop, also by a panic that
/// passes through `dispatch_sync`.
struct Holding<'a> {
    core: &'a Arc<QueueCore>,
    passed_on: Cell<bool>,
}

impl<'a> Holding<'a> {
    #[inline]
    fn of(core: &'a Arc<QueueCore>) -> Self {
        held::pick_up(core.address());
        core.at_work();
        Self { core, passed_on: Cell::new(false) }
    }

    /// Gives the queue up without releasing it: another thread runs it from here on. `false` when
    /// that thread does not wait any more.
    fn pass_on(&self, baton: &Baton) -> bool {
        let taken = baton.end(Turn::Granted);
        if taken && takes(Step::PassOn) {
            self.passed_on.set(true);
            held::lay_down(self.core.address());
        }
        taken
    }
}

impl Drop for Holding<'_> {
    #[inline]
    fn drop(&mut self) {
        // After a sleep the queue may be somebody else's, if it was cancelled meanwhile.
        if !has_failed() && !self.passed_on.get() && held::lay_down(self.core.address()) {
            self.core.at_rest();
            self.core.release();
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
