//! What all sources have in common.

use std::sync::Arc;

use iohost_driver::prelude::*;

use crate::probe::{Bench, Probe};

const SECOND: u64 = 1_000_000_000;

#[test]
fn sources_that_are_dropped_give_back_what_their_handlers_own() {
    let mut bench = Bench::new();
    let owned = Arc::new(());
    let (of_interrupt, of_timer, of_queue) = (owned.clone(), owned.clone(), owned.clone());
    let interrupt = IOInterruptDispatchSource::create(
        &bench.device,
        0,
        &bench.queue,
        move |_: &mut Probe, _| {
            drop(of_interrupt.clone());
        },
    );
    let timer = IOTimerDispatchSource::create(&bench.queue, move |_: &mut Probe, _| {
        drop(of_timer.clone());
    });
    let timer = timer.unwrap();
    timer.wake_at_time(IOTimerClock::UptimeRaw, u64::MAX, 0).unwrap();
    let _client = bench.rig.open_session(512).unwrap();
    let mut session = bench.queue.dispatch_sync(|probe| probe.session.take()).unwrap().unwrap();
    let end = session.consumer(crate::probe::api::UPLOAD).unwrap();
    let queue = IODataQueueDispatchSource::create(end, &bench.queue, move |_: &mut Probe| {
        drop(of_queue.clone());
    });
    assert_eq!(Arc::strong_count(&owned), 4);
    drop((interrupt, timer, queue));
    bench.rig.settle();
    assert_eq!(Arc::strong_count(&owned), 1);
}

#[test]
fn sources_that_live_when_the_driver_ends_give_back_what_their_handlers_own() {
    let bench = Bench::new();
    let owned = Arc::new(());
    let (of_interrupt, of_timer) = (owned.clone(), owned.clone());
    let interrupt = IOInterruptDispatchSource::create(
        &bench.device,
        0,
        &bench.queue,
        move |_: &mut Probe, _| {
            drop(of_interrupt.clone());
        },
    )
    .unwrap();
    interrupt.set_enable(true).unwrap();
    let timer = IOTimerDispatchSource::create(&bench.queue, move |_: &mut Probe, _| {
        drop(of_timer.clone());
    })
    .unwrap();
    timer.wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
    let keep = |probe: &mut Probe| {
        probe.interrupt = Some(interrupt);
        probe.timer = Some(timer);
    };
    bench.queue.dispatch_sync(keep).unwrap();
    bench.bus(|bus| bus.assert_intx());
    drop(bench);
    assert_eq!(Arc::strong_count(&owned), 1);
}

#[test]
fn set_enable_does_what_it_does_with_a_completion() {
    let bench = Bench::new();
    let (plain, timer) = (bench.message_source(), bench.timer());
    let completing = bench.interrupt(1).unwrap();
    plain.set_enable(true).unwrap();
    completing.set_enable_with_completion(&bench.queue, true, |_| ()).unwrap();
    (0..2).for_each(|vector| bench.message(vector));
    assert_eq!(bench.settled(), ["count 1", "count 1"]);
    plain.set_enable(false).unwrap();
    completing.set_enable_with_completion(&bench.queue, false, |_| ()).unwrap();
    (0..2).for_each(|vector| bench.message(vector));
    assert!(bench.settled().is_empty());
    timer.set_enable(false).unwrap();
    timer.wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
    assert!(bench.settled().is_empty());
    timer.set_enable(true).unwrap();
    assert_eq!(bench.settled().len(), 1);
}

#[test]
fn a_timers_completion_runs_once_after_the_handler_in_flight() {
    let bench = Bench::new();
    let queue = bench.queue.clone();
    let timer = IOTimerDispatchSource::create(&bench.queue, move |probe: &mut Probe, _| {
        let disabled = |probe: &mut Probe| probe.note("disabled");
        let timer = probe.timer.as_ref().unwrap();
        timer.set_enable_with_completion(&queue, false, disabled).unwrap();
        probe.note("fired");
    });
    let timer = timer.unwrap();
    timer.wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
    bench.queue.dispatch_sync(|probe| probe.timer = Some(timer)).unwrap();
    assert_eq!(bench.settled(), ["fired", "disabled"]);
    assert!(bench.settled().is_empty());
}

#[test]
fn no_handler_starts_after_the_cancel_handler_and_a_change_is_refused() {
    let bench = Bench::new();
    let (source, timer) = (bench.message_source(), bench.timer());
    source.set_enable(true).unwrap();
    timer.wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
    bench.message(0);
    source.cancel(&bench.queue, |probe| probe.note("interrupt cancelled"));
    timer.cancel(&bench.queue, |probe| probe.note("timer cancelled"));
    assert_eq!(bench.settled(), ["interrupt cancelled", "timer cancelled"]);
    bench.message(0);
    assert!(bench.after(SECOND).is_empty());
    assert_eq!(source.set_enable(true).unwrap_err().code(), IOReturn::UNSUPPORTED);
    assert_eq!(timer.set_enable(true).unwrap_err().code(), IOReturn::UNSUPPORTED);
    assert_eq!(source.set_enable(false), Ok(()), "it is not enabled, so nothing changes");
}
