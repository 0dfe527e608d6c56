//! `IODispatchQueue`.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use iohost_driver::prelude::*;

use crate::probe::{Bench, Host, Seen, watched};

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
}

#[test]
fn ten_thousand_blocks_of_a_driver_run_in_order_and_never_two_at_once() {
    let host = Host::with_threads();
    let queue = IODispatchQueue::create(&host.queue, "order", Vec::new()).unwrap();
    let inside = Arc::new(AtomicUsize::new(0));
    for number in 0..10_000 {
        let inside = inside.clone();
        queue.dispatch_async(move |seen: &mut Vec<u32>| {
            let others = inside.fetch_add(1, SeqCst);
            seen.push(number + others as u32 * 1_000_000);
            inside.fetch_sub(1, SeqCst);
        });
    }
    assert_eq!(queue.dispatch_sync(|seen| seen.clone()), Ok((0..10_000).collect()));
}

#[test]
fn a_drivers_queue_takes_a_name_of_255_bytes_and_refuses_one_of_256() {
    let bench = Bench::new();
    let create = |len| IODispatchQueue::create(&bench.queue, &"n".repeat(len), ());
    assert_eq!(code(create(255)), None);
    assert_eq!(code(create(256)), Some(IOReturn::BAD_ARGUMENT));
    assert_eq!(
        code(IODispatchQueue::create(&bench.queue, "a\0b", ())),
        Some(IOReturn::BAD_ARGUMENT)
    );
}

#[test]
fn a_queue_says_the_name_it_was_made_with() {
    let bench = Bench::new();
    let queue = IODispatchQueue::create(&bench.queue, "side", ()).unwrap();
    assert_eq!(queue.name(), "side");
    assert_eq!(queue.clone().name(), "side");
    assert_eq!(bench.queue.name(), "Default");
}

#[test]
fn a_drivers_queue_outlives_its_last_handle_until_its_blocks_have_run() {
    let bench = Bench::new();
    let seen = bench.seen.clone();
    let queue = IODispatchQueue::create(&bench.queue, "short", Dropped(seen.clone())).unwrap();
    queue.dispatch_async(move |_| seen.note("ran"));
    drop(queue);
    assert_eq!(bench.settled(), ["ran", "state dropped"]);
}

struct Dropped(Seen);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.note("state dropped");
    }
}

#[test]
fn on_queue_is_true_for_both_queues_when_nested_and_false_on_a_foreign_thread() {
    watched(|| {
        let host = Host::with_threads();
        let (outer, inner) = (host.queue.clone(), host.queue.clone());
        let inner_queue = IODispatchQueue::create(&host.queue, "inner", ()).unwrap();
        let nested = inner_queue.clone();
        let held = outer.dispatch_sync(move |_| {
            nested.dispatch_sync(|()| (inner.on_queue(), nested.on_queue())).unwrap()
        });
        assert_eq!(held, Ok((true, true)));
        let (inside, waits) = channel();
        let (go, gone) = channel::<()>();
        outer.dispatch_async(move |_| {
            inside.send(()).unwrap();
            gone.recv().unwrap();
        });
        waits.recv().unwrap();
        assert!(!outer.on_queue(), "another thread runs it");
        go.send(()).unwrap();
    });
}

#[test]
fn an_async_block_runs_after_the_call_that_sent_it_and_on_another_thread() {
    let host = Host::with_threads();
    let (go, gone) = channel();
    let (ran, done) = channel();
    // If it ran inside the call, nobody could say `go`.
    host.queue.dispatch_async(move |_| {
        gone.recv().unwrap();
        ran.send(thread::current().id()).unwrap();
    });
    go.send(()).unwrap();
    assert_ne!(done.recv().unwrap(), thread::current().id());
}

#[test]
fn an_async_block_sent_from_the_queue_itself_waits_for_the_present_one() {
    let bench = Bench::new();
    let queue = bench.queue.clone();
    bench.queue.dispatch_async(move |probe| {
        queue.dispatch_async(|probe| probe.note("second"));
        probe.note("first");
    });
    assert_eq!(bench.settled(), ["first", "second"]);
}

#[test]
fn a_sync_call_comes_after_what_the_caller_sent_before_and_its_writes_are_seen() {
    let host = Host::with_threads();
    let queue = IODispatchQueue::create(&host.queue, "sync", 0).unwrap();
    for round in 1..1_000 {
        queue.dispatch_async(move |state| *state = round);
        let mut written = 0;
        let read = queue.dispatch_sync(|state| {
            written = -round;
            *state
        });
        assert_eq!((read, written), (Ok(round), -round));
    }
}

#[test]
fn a_sync_call_on_a_queue_the_thread_holds_is_refused_and_does_not_hang() {
    watched(|| {
        let bench = Bench::new();
        let (own, seen) = (bench.queue.clone(), bench.seen.clone());
        let other = IODispatchQueue::create(&bench.queue, "other", ()).unwrap();
        let refusals = bench.queue.dispatch_sync(move |_| {
            // The state is lent out already, so running at once is not possible.
            let direct = code(own.dispatch_sync(|_| seen.note("never")));
            let through_another =
                other.dispatch_sync(|()| code(own.dispatch_sync(|_| ()))).unwrap();
            (direct, through_another)
        });
        let refused = Some(IOReturn::CANNOT_LOCK);
        assert_eq!(refusals, Ok((refused, refused)));
        assert!(bench.settled().is_empty());
    });
}

#[test]
fn a_sync_call_returns_the_status_of_its_block_unchanged() {
    let bench = Bench::new();
    for status in [IOReturn::SUCCESS, IOReturn::NOT_READY, IOReturn::ABORTED, IOReturn(7)] {
        assert_eq!(bench.queue.dispatch_sync(|_| status), Ok(status));
    }
}

#[test]
fn a_cancelled_queue_ends_its_block_runs_the_handler_once_and_nothing_afterwards() {
    let bench = Bench::new();
    let queue = IODispatchQueue::create(&bench.queue, "cancelled", bench.seen.clone()).unwrap();
    let own = queue.clone();
    queue.dispatch_async(move |seen: &mut Seen| {
        own.cancel(|seen| seen.note("cancelled"));
        own.cancel(|seen| seen.note("cancelled again"));
        own.dispatch_async(|seen| seen.note("sent after cancel"));
        seen.note("running");
    });
    queue.dispatch_async(|seen| seen.note("sent before cancel"));
    assert_eq!(bench.settled(), ["running", "cancelled", "cancelled again"]);
    queue.dispatch_async(|seen| seen.note("much later"));
    assert!(bench.settled().is_empty());
    assert_eq!(code(queue.dispatch_sync(|_| ())), Some(IOReturn::ABORTED));
}

#[test]
fn no_source_of_a_cancelled_queue_calls_its_handler() {
    let bench = Bench::new();
    let queue = IODispatchQueue::create(&bench.queue, "cancelled", bench.seen.clone()).unwrap();
    bench.device.configure_interrupts(InterruptType::Messaged, 1, 1).unwrap();
    let interrupt =
        IOInterruptDispatchSource::create(&bench.device, 0, &queue, |seen: &mut Seen, _| {
            seen.note("interrupt");
        });
    let interrupt = interrupt.unwrap();
    interrupt.set_enable(true).unwrap();
    let timer = IOTimerDispatchSource::create(&queue, |seen: &mut Seen, _| seen.note("timer"));
    timer.as_ref().unwrap().wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
    bench.message(0);
    queue.cancel(|seen| seen.note("cancelled"));
    assert_eq!(bench.settled(), ["cancelled"]);
    bench.message(0);
    assert!(bench.settled().is_empty());
}

#[test]
fn a_panic_in_a_drivers_block_fails_the_driver_and_the_queue_goes_on() {
    let bench = Bench::new();
    bench.queue.dispatch_async(|_| panic!("on purpose"));
    bench.queue.dispatch_async(|probe| probe.note("next"));
    assert_eq!(bench.settled(), ["next"]);
    let failure = bench.rig.failure().unwrap();
    assert!(failure.starts_with("panicked: on purpose, at "), "{failure}");
    assert!(failure.contains("queues.rs:"), "{failure}");
}

#[test]
fn a_panic_in_a_sync_call_is_its_callers_own() {
    let bench = Bench::new();
    let queue = bench.queue.clone();
    let caught = thread::spawn(move || queue.dispatch_sync(|_| -> () { panic!("mine") })).join();
    assert!(caught.is_err());
    assert_eq!(bench.rig.failure(), None, "the driver's handlers are fine");
    assert_eq!(code(bench.queue.dispatch_sync(|_| ())), None);
}

#[test]
fn a_sync_caller_that_waits_for_its_turn_is_told_when_the_queue_is_cancelled() {
    watched(|| {
        let host = Host::with_threads();
        let queue = IODispatchQueue::create(&host.queue, "busy", ()).unwrap();
        let (inside, waits) = channel();
        let (go, gone) = channel::<()>();
        queue.dispatch_async(move |()| {
            inside.send(()).unwrap();
            gone.recv().unwrap();
        });
        waits.recv().unwrap();
        let waiter = queue.clone();
        let waiting = thread::spawn(move || waiter.dispatch_sync(|()| ()));
        let depth = || {
            let numbers = host.engine.numbers();
            numbers.iter().find(|queue| queue.name == "busy").map_or(0, |queue| queue.depth)
        };
        while depth() < 2 {
            thread::yield_now();
        }
        queue.cancel(|()| ());
        go.send(()).unwrap();
        assert_eq!(code(waiting.join().unwrap()), Some(IOReturn::ABORTED));
    });
}

#[test]
fn work_that_never_ran_is_dropped_with_its_engine() {
    let owned = Arc::new(Mutex::new(()));
    let bench = Bench::new();
    let (held, again) = (owned.clone(), bench.queue.clone());
    bench.queue.dispatch_async(move |_| drop((held, again)));
    let side = IODispatchQueue::create(&bench.queue, "side", ()).unwrap();
    let (held, again) = (owned.clone(), side.clone());
    side.dispatch_async(move |()| drop((held, again)));
    drop((bench, side));
    assert_eq!(Arc::strong_count(&owned), 1);
}

/// Eight queues wait, each for an action, on an engine with three threads.
#[test]
fn queues_that_wait_for_actions_leave_a_thread_for_the_invocations() {
    let host = Host::with_threads();
    let (entered, arrived) = channel();
    let mut actions = Vec::new();
    let mut waiting = Vec::new();
    for number in 0..8 {
        let target = IODispatchQueue::create(&host.queue, "target", ()).unwrap();
        let waiter = IODispatchQueue::create(&host.queue, "waiter", ()).unwrap();
        let action = OSAction::create(&target, (), |(), (), ()| {}).unwrap();
        let wait = action.will_wait().unwrap();
        let (ended, end) = channel();
        let entered = entered.clone();
        waiter.dispatch_async(move |()| {
            entered.send(number).unwrap();
            ended.send(wait.wait(None)).unwrap();
        });
        actions.push(action);
        waiting.push((waiter, end));
    }
    // All of them wait now, or are about to.
    for _ in 0..8 {
        arrived.recv_timeout(Duration::from_secs(60)).expect("a thread is left");
    }
    actions.iter().for_each(|action| action.invoke(()).unwrap());
    for (_waiter, end) in waiting {
        assert_eq!(end.recv_timeout(Duration::from_secs(60)).expect("a wait ends"), Ok(()));
    }
}
