//! `IORawDispatchQueue`: what a queue that owns its state does not do.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use iohost_driver::IORawDispatchQueue;
use iohost_driver::prelude::*;

use crate::probe::Host;

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
}

fn reentrant(host: &Host) -> IORawDispatchQueue {
    IORawDispatchQueue::create(&host.queue, "raw", IORawDispatchQueue::REENTRANT, 0).unwrap()
}

const EVENT: usize = 7;

#[test]
fn unknown_options_and_priorities_are_refused_and_the_known_ones_taken() {
    let host = Host::with_threads();
    let create =
        |options, priority| code(IORawDispatchQueue::create(&host.queue, "raw", options, priority));
    for options in 0..4 {
        assert_eq!(create(options, 0), None);
    }
    assert_eq!(create(4, 0), Some(IOReturn::BAD_ARGUMENT));
    assert_eq!(create(0, 1), Some(IOReturn::BAD_ARGUMENT));
}

#[test]
fn two_concurrent_blocks_of_a_driver_meet_and_a_plain_one_overlaps_neither() {
    let host = Host::with_threads();
    let queue = reentrant(&host);
    let (meeting, inside) = (Arc::new(Barrier::new(2)), Arc::new(AtomicUsize::new(0)));
    for _ in 0..2 {
        let (meeting, inside) = (meeting.clone(), inside.clone());
        let block = move || {
            inside.fetch_add(1, SeqCst);
            meeting.wait();
            inside.fetch_sub(1, SeqCst);
        };
        queue.dispatch_concurrent(block).unwrap();
    }
    assert_eq!(queue.dispatch_sync(|| inside.load(SeqCst)), Ok(0));
    let plain = IORawDispatchQueue::create(&host.queue, "plain", 0, 0).unwrap();
    assert_eq!(code(plain.dispatch_concurrent(|| ())), Some(IOReturn::UNSUPPORTED));
}

#[test]
fn a_drivers_sleep_lets_others_run_and_holds_the_queue_again_on_return() {
    let host = Host::with_threads();
    let queue = reentrant(&host);
    let value = Arc::new(AtomicUsize::new(0));
    let (changed, waker) = (value.clone(), queue.clone());
    let slept = queue.dispatch_sync(|| {
        queue.dispatch_async(move || {
            changed.store(1, SeqCst);
            waker.wakeup(EVENT).unwrap();
        });
        while value.load(SeqCst) == 0 {
            queue.sleep(EVENT).unwrap();
        }
        queue.on_queue()
    });
    assert_eq!(slept, Ok(true));
}

#[test]
fn a_drivers_sleep_times_out_at_its_deadline_on_every_clock() {
    let host = Host::with_threads();
    let queue = reentrant(&host);
    for clock in [
        IOTimerClock::RealTime,
        IOTimerClock::MonotonicRaw,
        IOTimerClock::UptimeRaw,
        IOTimerClock::MachContinuousTime,
        IOTimerClock::MachAbsoluteTime,
    ] {
        let deadline = host.queue.now(clock) + 1_000_000;
        let slept = queue.dispatch_sync(|| queue.sleep_with_deadline(EVENT, clock, deadline));
        assert_eq!(code(slept.unwrap()), Some(IOReturn::TIMEOUT));
        assert!(host.queue.now(clock) >= deadline, "{clock:?} woke early");
    }
}

#[test]
fn a_sleep_with_a_timeout_ends_as_one_with_the_same_deadline() {
    let host = Host::with_threads();
    let queue = reentrant(&host);
    let slept = queue.dispatch_sync(|| queue.sleep_with_timeout(EVENT, Duration::from_millis(1)));
    assert_eq!(code(slept.unwrap()), Some(IOReturn::TIMEOUT));
    let waker = queue.clone();
    let woken = queue.dispatch_sync(|| {
        queue.dispatch_async(move || waker.wakeup(EVENT).unwrap());
        queue.sleep_with_timeout(EVENT, Duration::MAX)
    });
    assert_eq!(code(woken.unwrap()), None);
}

#[test]
fn one_of_three_sleepers_is_woken_and_wakeup_all_wakes_the_rest() {
    let host = Host::with_threads();
    let queue = reentrant(&host);
    let (ended_send, ended) = channel();
    let (asleep_send, asleep) = channel();
    for _ in 0..3 {
        let (queue, ended, asleep) = (queue.clone(), ended_send.clone(), asleep_send.clone());
        thread::spawn(move || {
            let slept = queue.dispatch_sync(|| {
                asleep.send(()).unwrap();
                queue.sleep(EVENT)
            });
            ended.send(code(slept.unwrap())).unwrap();
        });
    }
    // Who said so gives the queue up only once it sleeps.
    (0..3).for_each(|_| asleep.recv().unwrap());
    queue.dispatch_sync(|| queue.wakeup(EVENT)).unwrap().unwrap();
    assert_eq!(ended.recv(), Ok(None));
    // The other two are still asleep: nothing else can have ended them.
    assert!(ended.try_recv().is_err());
    queue.dispatch_sync(|| queue.wakeup_all(EVENT)).unwrap().unwrap();
    assert_eq!(ended.iter().take(2).collect::<Vec<_>>(), [None, None]);
}

#[test]
fn sleep_is_refused_on_a_plain_queue_and_off_the_queue() {
    let host = Host::with_threads();
    let plain = IORawDispatchQueue::create(&host.queue, "plain", 0, 0).unwrap();
    let slept = plain.dispatch_sync(|| plain.sleep(EVENT)).unwrap();
    assert_eq!(code(slept), Some(IOReturn::UNSUPPORTED));
    let queue = reentrant(&host);
    assert_eq!(code(queue.sleep(EVENT)), Some(IOReturn::NOT_PERMITTED));
    assert_eq!(code(queue.wakeup(EVENT)), Some(IOReturn::NOT_PERMITTED));
}

#[test]
fn log_names_every_queue_the_thread_holds() {
    let host = Host::with_threads();
    let (outer, inner) = (reentrant(&host), reentrant(&host));
    let held = outer.dispatch_sync(|| inner.dispatch_sync(|| inner.log("here")));
    assert_eq!(held, Ok(Ok(vec!["raw".to_owned(), "raw".to_owned()])));
    assert!(outer.log("nowhere").is_empty());
}
