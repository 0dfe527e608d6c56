//! Every order, and every reordering that the memory model allows, of threads at one queue.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p iohost_dispatch --lib --release loom`. The code
//! under test is the engine itself on loom's locks, atomics and threads: queues, batons, sources,
//! the ready list and its workers. Only the kernel is left out: workers do not wait for events.
//!
//! What is lost shows as a deadlock. Each block writes one word with relaxed accesses, and looks
//! whether another one is inside: two at once, or a block that does not see what the one before it
//! wrote, is noted.
//!
//! Each test named `without_…` leaves out one [`Step`] and expects to be caught, so that we know
//! that the model can see what it is there to see.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex as StdMutex};

use iohost_closure::Closure;
use iohost_event::Signal;
use iohost_interface::IOReturn;

use crate::baton::{Baton, Turn};
use crate::source::Then;
use crate::step::{LEFT_OUT, Step, WAKES_FIRST};
use crate::sync::atomic::{
    AtomicUsize as Word,
    Ordering::{Acquire, Relaxed, Release},
};
use crate::sync::{Condvar, Mutex, has_failed, thread};
use crate::{DescriptorSource, Engine, Owner, Queue, QueueOptions};

std::thread_local! {
    /// The first rule that was seen broken. A panic could not say it: the queue catches it.
    static BROKEN: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Looks at a rule, anywhere in a model.
fn check(holds: bool, rule: &str) {
    if !holds {
        BROKEN.with_borrow_mut(|broken| broken.get_or_insert_with(|| rule.to_owned()).len());
    }
}

/// Runs a model in every possible way, with at most `switches` switches away from a thread that
/// could go on.
fn explore(left_out: Option<Step>, switches: usize, model: impl Fn() + Sync + Send + 'static) {
    LEFT_OUT.set(left_out);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(switches);
    let explored = catch_unwind(AssertUnwindSafe(|| {
        builder.check(move || {
            model();
            BROKEN.with_borrow(|broken| assert_eq!(*broken, None));
        });
    }));
    if let Some(broken) = BROKEN.take() {
        panic!("{broken}");
    }
    explored.unwrap_or_else(|panic| resume_unwind(panic));
}

/// One queue, and what is seen of its blocks.
struct Model {
    queue: Queue,
    seen: Arc<Seen>,
    engine: Option<Engine>,
}

#[derive(Default)]
struct Seen {
    /// Blocks inside, and concurrent ones.
    inside: Word,
    beside: Word,
    /// How many blocks have run, as they count themselves.
    count: Word,
    /// The names of the blocks that have run.
    log: StdMutex<Vec<&'static str>>,
    /// How many have ended, run or not.
    ended: Mutex<usize>,
    one_ended: Condvar,
}

/// Says on drop that something has ended.
struct Ending(Arc<Seen>);

impl Drop for Ending {
    fn drop(&mut self) {
        if !has_failed() {
            *self.0.ended.lock().unwrap() += 1;
            self.0.one_ended.notify_all();
        }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        if has_failed() {
            std::mem::forget(self.engine.take());
        }
    }
}

/// No code of a model panics, but loom does.
struct NoFailure;

impl Owner for NoFailure {
    fn failed(&self, _queue: &str, reason: &str) {
        check(false, reason);
    }
}

impl Seen {
    /// What a block does.
    fn run(&self, name: &'static str) {
        // An exchange sees the newest value, and relaxed it orders nothing.
        check(self.inside.fetch_add(1, Relaxed) == 0, "two at once");
        check(self.beside.fetch_add(0, Relaxed) == 0, "two at once");
        self.count.store(self.count.load(Relaxed) + 1, Relaxed);
        check(self.inside.fetch_sub(1, Relaxed) == 1, "two at once");
        self.log.lock().unwrap().push(name);
    }

    /// What a concurrent block does.
    fn run_beside(&self) {
        self.beside.fetch_add(1, Relaxed);
        check(self.inside.fetch_add(0, Relaxed) == 0, "two at once");
        self.count.load(Relaxed);
        self.beside.fetch_sub(1, Relaxed);
    }
}

impl Model {
    fn new(workers: usize, reentrant: bool) -> Arc<Self> {
        let engine = Engine::with_workers(workers).unwrap();
        let options = QueueOptions { reentrant };
        let queue = Queue::create_for(Arc::new(NoFailure), &engine, "model", options).unwrap();
        Arc::new(Self { queue, seen: Arc::default(), engine: Some(engine) })
    }

    fn plain() -> Arc<Self> {
        Self::new(1, false)
    }

    fn reentrant() -> Arc<Self> {
        Self::new(1, true)
    }

    fn thread(self: &Arc<Self>, act: fn(&Self)) -> thread::JoinHandle<()> {
        let model = self.clone();
        thread::spawn(move || act(&model))
    }

    fn push(&self, name: &'static str) {
        let ending = Ending(self.seen.clone());
        self.queue.dispatch_async(move || ending.0.run(name));
    }

    fn push_concurrent(&self) {
        let ending = Ending(self.seen.clone());
        self.queue.dispatch_concurrent(move || ending.0.run_beside()).unwrap();
    }

    fn sync(&self) -> Result<(), IOReturn> {
        self.queue.dispatch_sync(|| self.seen.run("sync"))
    }

    fn cancel(&self) {
        let ending = Ending(self.seen.clone());
        self.queue.cancel(move || ending.0.run("cancel"));
    }

    /// Waits until so many have ended that were not waited for.
    fn wait_for(&self, count: usize) {
        let mut ended = self.seen.ended.lock().unwrap();
        while *ended < count {
            ended = self.seen.one_ended.wait(ended).unwrap();
        }
    }

    /// After all that acts has ended: so many blocks have run, each after the one before it.
    fn check_count(&self, count: usize) {
        check(self.seen.log.lock().unwrap().len() == count, "a block is missing, or ran twice");
        check(self.seen.count.load(Relaxed) == count, "a block does not see the one before it");
    }

    fn place_of(&self, name: &str) -> Option<usize> {
        self.seen.log.lock().unwrap().iter().position(|other| *other == name)
    }

    fn check_order(&self, first: &str, second: &str) {
        let (first, second) = (self.place_of(first), self.place_of(second));
        check(first.is_some() && first < second, "a block overtook another one");
    }
}

/// Two blocks from one thread meet a sync call from another.
fn blocks_meet_a_sync_call(left_out: Option<Step>) {
    explore(left_out, 2, || {
        let model = Model::plain();
        let other = model.thread(|model| model.sync().unwrap());
        model.push("first");
        model.push("second");
        other.join().unwrap();
        model.wait_for(2);
        model.check_count(3);
        model.check_order("first", "second");
    });
}

#[test]
fn loom_blocks_meet_a_sync_call() {
    blocks_meet_a_sync_call(None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_announcing_a_block_is_lost() {
    blocks_meet_a_sync_call(Some(Step::Announce));
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_a_look_before_idle_a_block_is_lost() {
    blocks_meet_a_sync_call(Some(Step::LookBeforeIdle));
}

#[test]
#[should_panic(expected = "does not see")]
fn loom_without_a_look_at_the_stage_a_running_queue_runs_twice() {
    blocks_meet_a_sync_call(Some(Step::ScheduleOnlyIdle));
}

/// A block whose worker is woken before it is there meets a sync call.
fn a_block_comes_after_its_worker(left_out: Option<Step>) {
    WAKES_FIRST.set(true);
    explore(left_out, 2, || {
        let model = Model::plain();
        let other = model.thread(|model| model.sync().unwrap());
        model.push("block");
        other.join().unwrap();
        model.wait_for(1);
        model.check_count(2);
    });
}

#[test]
fn loom_a_block_comes_after_its_worker() {
    a_block_comes_after_its_worker(None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_announcing_a_block_that_comes_after_its_worker_is_lost() {
    a_block_comes_after_its_worker(Some(Step::Announce));
}

/// A block whose worker is woken before it is there meets a cancel.
#[test]
fn loom_a_cancel_comes_before_a_block_whose_worker_was_woken() {
    WAKES_FIRST.set(true);
    a_cancel_meets_a_block(None);
}

/// Sync calls of two threads, on an idle queue or one behind the other.
fn sync_calls_meet(left_out: Option<Step>) {
    explore(left_out, 3, || {
        let model = Model::plain();
        let other = model.thread(|model| model.sync().unwrap());
        model.sync().unwrap();
        model.sync().unwrap();
        other.join().unwrap();
        model.check_count(3);
    });
}

#[test]
fn loom_sync_calls_exclude_and_see_each_other() {
    sync_calls_meet(None);
}

#[test]
#[should_panic(expected = "does not see")]
fn loom_without_release_ordering_a_write_is_missed() {
    sync_calls_meet(Some(Step::ReleaseIdle));
}

#[test]
#[should_panic(expected = "does not see")]
fn loom_without_acquire_ordering_a_write_is_missed() {
    sync_calls_meet(Some(Step::AcquireIdle));
}

/// A sync call stands behind a block, so a worker meets its baton.
fn a_worker_passes_the_queue_on(left_out: Option<Step>) {
    explore(left_out, 2, || {
        let model = Model::plain();
        let other = model.thread(|model| model.sync().unwrap());
        model.push("block");
        model.sync().unwrap();
        other.join().unwrap();
        model.wait_for(1);
        model.check_count(3);
    });
}

#[test]
fn loom_a_worker_passes_the_queue_on() {
    a_worker_passes_the_queue_on(None);
}

#[test]
#[should_panic(expected = "does not see")]
fn loom_without_keeping_the_queue_when_passed_on_two_are_in() {
    a_worker_passes_the_queue_on(Some(Step::PassOn));
}

/// A sync call that ends finds another one next, and a block behind that.
fn a_sync_call_passes_the_queue_on(left_out: Option<Step>) {
    explore(left_out, 2, || {
        let model = Model::plain();
        let others = [(); 2].map(|()| model.thread(|model| model.sync().unwrap()));
        model.push("block");
        others.into_iter().for_each(|other| other.join().unwrap());
        model.wait_for(1);
        model.check_count(3);
    });
}

#[test]
fn loom_a_sync_call_passes_the_queue_on() {
    a_sync_call_passes_the_queue_on(None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_keeping_pending_what_stands_behind_is_lost() {
    a_sync_call_passes_the_queue_on(Some(Step::KeepPending));
}

/// A block sends another one to its own queue, after it saw that somebody else had sent one.
fn a_block_sends_behind_what_came_before(left_out: Option<Step>) {
    explore(left_out, 3, || {
        let model = Model::plain();
        let sent = Arc::new(Word::new(0));
        let own = (model.clone(), sent.clone());
        model.queue.dispatch_async(move || {
            let (model, sent) = own;
            if sent.load(Acquire) == 1 {
                model.push("own");
            }
            model.seen.run("block");
        });
        model.push("other");
        sent.store(1, Release);
        model.wait_for(1);
        model.queue.dispatch_sync(|| ()).unwrap();
        if model.place_of("own").is_some() {
            model.check_order("other", "own");
        }
    });
}

#[test]
fn loom_a_block_sends_behind_what_came_before() {
    a_block_sends_behind_what_came_before(None);
}

#[test]
#[should_panic(expected = "overtook")]
fn loom_without_a_look_at_the_inbox_an_own_block_overtakes() {
    a_block_sends_behind_what_came_before(Some(Step::LookBeforeOwnPush));
}

/// A cancel meets a block; its handler runs, last.
fn a_cancel_meets_a_block(left_out: Option<Step>) {
    explore(left_out, 3, || {
        let model = Model::plain();
        let other = model.thread(Model::cancel);
        model.push("block");
        other.join().unwrap();
        model.wait_for(2);
        check(model.place_of("cancel").is_some(), "the handler of a cancel did not run");
        check(model.place_of("block") < model.place_of("cancel"), "a block ran after the cancel");
    });
}

#[test]
fn loom_a_cancel_meets_a_block() {
    a_cancel_meets_a_block(None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_a_look_for_a_cancel_its_handler_is_lost() {
    a_cancel_meets_a_block(Some(Step::LookForCancel));
}

/// A cancel meets two sync calls, one of which can pass the queue on to the other.
fn a_cancel_meets_sync_calls(left_out: Option<Step>) {
    explore(left_out, 2, || {
        let model = Model::plain();
        let others = [(); 2].map(|()| model.thread(|model| _ = model.sync()));
        model.cancel();
        others.into_iter().for_each(|other| other.join().unwrap());
        model.wait_for(1);
        check(model.place_of("cancel").is_some(), "the handler of a cancel did not run");
    });
}

#[test]
fn loom_a_cancel_meets_sync_calls() {
    a_cancel_meets_sync_calls(None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_a_sync_calls_look_for_a_cancel_its_handler_is_lost() {
    a_cancel_meets_sync_calls(Some(Step::LookForCancelAtEnd));
}

/// A cancel waits for a concurrent block.
fn a_cancel_meets_a_concurrent_block(left_out: Option<Step>) {
    explore(left_out, 2, || {
        let model = Model::reentrant();
        let other = model.thread(Model::cancel);
        model.push_concurrent();
        other.join().unwrap();
        model.wait_for(2);
        model.check_count(1);
    });
}

#[test]
fn loom_a_cancel_meets_a_concurrent_block() {
    a_cancel_meets_a_concurrent_block(None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_resuming_a_cancel_its_handler_is_lost() {
    a_cancel_meets_a_concurrent_block(Some(Step::ResumeCancel));
}

/// A sync call comes behind a block of its own thread, also when that waits for a concurrent one.
fn a_sync_call_stays_behind(left_out: Option<Step>) {
    explore(left_out, 2, || {
        let model = Model::reentrant();
        model.push_concurrent();
        model.push("block");
        model.sync().unwrap();
        model.check_order("block", "sync");
        model.wait_for(2);
        model.check_count(2);
    });
}

#[test]
fn loom_a_sync_call_stays_behind() {
    a_sync_call_stays_behind(None);
}

#[test]
#[should_panic(expected = "overtook")]
fn loom_without_announcing_what_is_left_a_sync_call_overtakes() {
    a_sync_call_stays_behind(Some(Step::AnnounceLeft));
}

/// A sync call meets a concurrent block.
fn a_sync_call_meets_a_concurrent_block(left_out: Option<Step>) {
    explore(left_out, 2, || {
        let model = Model::reentrant();
        let other = model.thread(|model| model.sync().unwrap());
        model.push_concurrent();
        other.join().unwrap();
        model.wait_for(1);
        model.check_count(1);
    });
}

#[test]
fn loom_a_sync_call_is_not_beside_a_concurrent_block() {
    a_sync_call_meets_a_concurrent_block(None);
}

#[test]
#[should_panic(expected = "two at once")]
fn loom_without_marking_concurrent_blocks_a_sync_call_is_beside() {
    a_sync_call_meets_a_concurrent_block(Some(Step::MarkShared));
}

/// A block sleeps until the one behind it, taken in the same turn, wakes it.
fn a_block_wakes_the_one_before_it(left_out: Option<Step>) {
    explore(left_out, 2, || {
        let model = Model::new(2, true);
        let (sleeping, waking) = (Ending(model.seen.clone()), Ending(model.seen.clone()));
        let (sleeper, waker) = (model.queue.clone(), model.queue.clone());
        model.queue.dispatch_async(move || {
            check(sleeper.sleep(1, None) == Ok(()), "a sleep ended on its own");
            sleeping.0.run("sleeper");
        });
        model.queue.dispatch_async(move || {
            check(waker.wakeup(1) == Ok(true), "nobody slept");
            waking.0.run("waker");
        });
        model.wait_for(2);
        model.check_count(2);
        model.check_order("waker", "sleeper");
    });
}

#[test]
fn loom_a_block_wakes_the_one_before_it() {
    a_block_wakes_the_one_before_it(None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_leaving_the_turn_to_others_a_sleep_has_no_end() {
    a_block_wakes_the_one_before_it(Some(Step::LeaveTurn));
}

/// A cancel ends a sleep, and what waits behind the sleeper.
fn a_cancel_meets_a_sleep(left_out: Option<Step>) {
    explore(left_out, 2, || {
        let model = Model::reentrant();
        let other = model.thread(Model::cancel);
        let slept = model.queue.dispatch_sync(|| {
            model.push("block");
            model.queue.sleep(1, None)
        });
        let aborted = matches!(slept, Err(IOReturn::ABORTED) | Ok(Err(IOReturn::ABORTED)));
        check(aborted, "a sleep ended on its own");
        other.join().unwrap();
        model.wait_for(if slept.is_ok() { 2 } else { 1 });
        check(model.place_of("cancel").is_some(), "the handler of a cancel did not run");
    });
}

#[test]
fn loom_a_cancel_ends_a_sleep() {
    a_cancel_meets_a_sleep(None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_a_look_before_it_a_sleep_has_no_end() {
    a_cancel_meets_a_sleep(Some(Step::LookForAbort));
}

/// Two events: one that a worker finds and deals with in some way, and one that another thread schedules.
fn every_event_is_seen(then: Then, left_out: Option<Step>) {
    explore(left_out, 3, move || {
        let model = Model::plain();
        let happened = Arc::new([Word::new(0), Word::new(0)]);
        let (seen, events) = (Arc::new((Mutex::new(0), Condvar::new())), happened.clone());
        let seeing = seen.clone();
        let handler = move || {
            let count = events.iter().map(|event| event.load(Relaxed)).sum();
            *seeing.0.lock().unwrap() = count;
            seeing.1.notify_all();
        };
        let source =
            DescriptorSource::create(&model.queue, Signal::new().unwrap(), handler).unwrap();

        let (watched, events) = (source.watched(), happened.clone());
        model.queue.engine().run_soon(Closure::new(move || {
            events[0].store(1, Relaxed);
            watched.became_ready(then);
        }));
        happened[1].store(1, Relaxed);
        source.nudge();

        let mut count = seen.0.lock().unwrap();
        while *count < 2 {
            count = seen.1.wait(count).unwrap();
        }
    });
}

#[test]
fn loom_every_event_is_seen_by_a_handler() {
    every_event_is_seen(Then::Schedule, None);
}

#[test]
fn loom_an_event_that_a_worker_delivers_itself_is_seen_beside_another_one() {
    every_event_is_seen(Then::RunHere, None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_acquiring_the_events_one_is_missed() {
    every_event_is_seen(Then::Schedule, Some(Step::AcquireEvents));
}

/// A worker delivers an event itself, unless somebody is in.
fn an_event_meets_a_sync_call(left_out: Option<Step>) {
    explore(left_out, 3, || {
        let model = Model::plain();
        let ending = Ending(model.seen.clone());
        let handler = move || ending.0.run("event");
        let source =
            DescriptorSource::create(&model.queue, Signal::new().unwrap(), handler).unwrap();
        let (watched, ending) = (source.watched(), Ending(model.seen.clone()));
        model.queue.engine().run_soon(Closure::new(move || {
            watched.became_ready(Then::RunHere);
            drop(ending);
        }));
        model.sync().unwrap();
        model.push("block");
        model.wait_for(2);
        model.queue.dispatch_sync(|| ()).unwrap();
        model.check_count(3);
        drop(source);
    });
}

#[test]
fn loom_an_event_is_delivered_beside_nobody() {
    an_event_meets_a_sync_call(None);
}

#[test]
#[should_panic(expected = "does not see")]
fn loom_without_acquire_ordering_an_event_misses_a_write() {
    an_event_meets_a_sync_call(Some(Step::AcquireIdle));
}

/// One thread waits twice, and must see what was written before each end.
fn waits_end_one_by_one(left_out: Option<Step>) {
    explore(left_out, 3, || {
        let written = Arc::new(Word::new(0));
        for round in 1..=2 {
            let baton = Arc::new(Baton::for_this_thread());
            let (ending, writing) = (baton.clone(), written.clone());
            let other = thread::spawn(move || {
                writing.store(round, Relaxed);
                check(ending.end(Turn::Granted), "a wait had ended");
            });
            baton.wait(1);
            check(baton.turn() == Turn::Granted, "a wait ended on its own");
            check(
                written.load(Relaxed) == round,
                "a waiter does not see the one who ended its wait",
            );
            other.join().unwrap();
        }
    });
}

#[test]
fn loom_waits_end_one_by_one() {
    waits_end_one_by_one(None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_an_unpark_a_wait_has_no_end() {
    waits_end_one_by_one(Some(Step::Unpark));
}

#[test]
#[should_panic(expected = "ended on its own")]
fn loom_without_a_look_after_the_park_an_earlier_wake_up_ends_a_wait() {
    waits_end_one_by_one(Some(Step::LookAfterPark));
}

#[test]
#[should_panic(expected = "does not see")]
fn loom_without_release_ordering_a_waiter_misses_a_write() {
    waits_end_one_by_one(Some(Step::ReleaseTurn));
}
