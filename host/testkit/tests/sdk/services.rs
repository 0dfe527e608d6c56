//! `IOService` and the calls of clients.

use iohost_driver::prelude::*;
use iohost_interface::Arguments;

use crate::probe::{Bench, Probe, Seen, api};

#[test]
fn a_start_that_fails_says_why_and_stop_is_not_called() {
    let seen = Seen::default();
    let noting = seen.clone();
    let refused = Bench::rig(move |_, queue| {
        let probe = Probe::new(queue, &noting);
        drop(probe);
        Err(Error::new(IOReturn::UNSUPPORTED, "not a board"))
    })
    .unwrap_err();
    assert_eq!(refused.status, IOReturn::UNSUPPORTED);
    assert_eq!(refused.to_string(), "not a board: unsupported (0xe00002c7)");
    assert_eq!(seen.take(), ["dropped"]);
}

#[test]
fn a_start_that_panics_is_an_error_with_the_panics_words() {
    let refused = Bench::rig(|_, _| panic!("no luck")).unwrap_err();
    assert_eq!(refused.status, IOReturn::INTERNAL_ERROR);
    let words = refused.to_string();
    assert!(words.starts_with("panicked: no luck, at "), "{words}");
    assert!(words.contains("services.rs:25:"), "{words}");
}

#[test]
fn what_a_failed_start_had_made_is_gone() {
    let seen = Seen::default();
    let noting = seen.clone();
    let refused = Bench::rig(move |device, queue| {
        let source = IOInterruptDispatchSource::create(&device, 0, queue, |_: &mut Probe, _| ())?;
        source.set_enable(true)?;
        queue.dispatch_async(|probe| probe.note("never"));
        drop(Probe::new(queue, &noting));
        Err(IOReturn::BUSY.into())
    });
    assert_eq!(refused.unwrap_err().status, IOReturn::BUSY);
    assert_eq!(seen.take(), ["dropped"]);
}

#[test]
fn handlers_of_what_start_made_run_after_start_has_returned() {
    let seen = Seen::default();
    let noting = seen.clone();
    let rig = Bench::rig(move |_, queue| {
        assert!(queue.on_queue(), "start runs on the default queue");
        let timer = IOTimerDispatchSource::create(queue, |probe: &mut Probe, _| {
            probe.note("timer");
        })?;
        timer.wake_at_time(IOTimerClock::UptimeRaw, 0, 0)?;
        queue.dispatch_async(|probe| probe.note("block"));
        noting.note("started");
        let mut probe = Probe::new(queue, &noting);
        probe.timer = Some(timer);
        Ok(probe)
    });
    rig.unwrap().settle();
    assert_eq!(seen.take()[..3], ["started", "block", "timer"]);
}

#[test]
fn stop_is_called_once_on_the_queue_and_the_driver_is_dropped_right_after() {
    let mut bench = Bench::new();
    bench.rig.stop();
    bench.rig.stop();
    assert_eq!(bench.settled(), ["stop, on the queue: true", "dropped"]);
    let seen = bench.seen.clone();
    drop(bench);
    assert!(seen.take().is_empty());
}

#[test]
fn nothing_of_a_driver_runs_after_it_was_stopped() {
    let mut bench = Bench::new();
    let (source, timer) = (bench.message_source(), bench.timer());
    source.set_enable(true).unwrap();
    timer.wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
    bench.message(0);
    bench.queue.dispatch_async(|probe| probe.note("block"));
    bench.rig.stop();
    bench.seen.take();
    bench.message(0);
    assert!(bench.settled().is_empty());
    let late = bench.queue.dispatch_sync(|_| ()).unwrap_err();
    assert_eq!(late.code(), IOReturn::NOT_READY);
}

#[test]
fn a_driver_that_cancelled_its_own_queue_is_stopped_and_its_callers_are_answered() {
    let mut bench = Bench::new();
    let client = bench.rig.client::<api::Client>();
    let mut waiting = client.wait();
    bench.rig.settle();
    bench.queue.cancel(|probe| probe.note("cancelled"));
    let mut late = client.wait();
    assert_eq!(bench.settled(), ["cancelled"]);
    assert_eq!(late.poll(), Some(Err(IOReturn::NOT_READY)));
    bench.rig.stop();
    assert_eq!(bench.seen.take(), ["stop, on the queue: false", "dropped"]);
    assert_eq!(waiting.poll(), Some(Err(IOReturn::ABORTED)));
}

#[test]
fn calls_run_on_the_drivers_queue_in_their_turn() {
    let bench = Bench::new();
    bench.queue.dispatch_async(|probe| probe.note("before"));
    let mut sum = bench.rig.client::<api::Client>().add(2, 3);
    assert_eq!(sum.poll(), None, "not inside the call");
    assert_eq!(bench.settled(), ["before"]);
    assert_eq!(sum.poll(), Some(Ok(5)));
}

#[test]
fn each_argument_that_does_not_fit_its_method_is_a_bad_argument() {
    let bench = Bench::new();
    let call = |selector, scalars: &[u64], structure: &[u8]| {
        let arguments = Arguments {
            scalars: scalars.to_vec(),
            structure: structure.to_vec(),
            ..Default::default()
        };
        let mut answer = bench.caller().call(selector, arguments);
        bench.rig.settle();
        answer.poll().unwrap()
    };
    let sum = Arguments { scalars: vec![3], structure: Vec::new(), ..Default::default() };
    assert_eq!(call(1, &[1, 2], b""), Ok(sum));
    assert_eq!(call(1, &[1], b""), Err(IOReturn::BAD_ARGUMENT), "a scalar is missing");
    assert_eq!(call(1, &[1, 2, 3], b""), Err(IOReturn::BAD_ARGUMENT), "one is left over");
    assert_eq!(call(1, &[1, 1 << 32], b""), Err(IOReturn::BAD_ARGUMENT), "out of range");
    assert_eq!(call(1, &[1, 2], b"x"), Err(IOReturn::BAD_ARGUMENT), "bytes where none are");
    assert_eq!(call(9, &[], b""), Err(IOReturn::BAD_MESSAGE_ID), "no such method");
}

#[test]
fn four_kilobytes_go_both_ways_and_a_longer_result_is_an_error() {
    let bench = Bench::new();
    let client = bench.rig.client::<api::Client>();
    let longest = vec![7; Arguments::LONGEST_STRUCTURE];
    let mut echo = client.echo(longest.clone());
    let mut too_long = client.zeros(Arguments::LONGEST_STRUCTURE as u32 + 1);
    bench.rig.settle();
    assert_eq!(echo.poll(), Some(Ok(longest)));
    assert_eq!(too_long.poll(), Some(Err(IOReturn::MESSAGE_TOO_LARGE)));
}

#[test]
fn arguments_over_the_limits_never_reach_the_driver() {
    let bench = Bench::new();
    let call = |arguments| {
        let mut answer = bench.caller().call(4, arguments);
        bench.rig.settle();
        answer.poll().unwrap()
    };
    let scalars = Arguments { scalars: vec![0; 17], structure: Vec::new(), ..Default::default() };
    assert_eq!(call(scalars), Err(IOReturn::BAD_ARGUMENT));
    let bytes = vec![0; Arguments::LONGEST_STRUCTURE + 1];
    let structure = Arguments { scalars: Vec::new(), structure: bytes, ..Default::default() };
    assert_eq!(call(structure), Err(IOReturn::MESSAGE_TOO_LARGE));
}

#[test]
fn a_session_that_the_driver_refuses_is_refused_with_its_status() {
    let mut bench = Bench::new();
    let _first = bench.rig.open_session(64).unwrap();
    assert_eq!(bench.rig.open_session(64).map(|_| ()), Err(IOReturn::BUSY));
}

#[test]
fn a_panic_in_a_method_fails_the_driver_and_answers_the_caller() {
    let bench = Bench::new();
    let mut answer = bench.rig.client::<api::Client>().panic();
    let mut next = bench.rig.client::<api::Client>().add(1, 1);
    bench.rig.settle();
    assert_eq!(answer.poll(), Some(Err(IOReturn::ABORTED)));
    let failure = bench.rig.failure().unwrap();
    assert!(failure.starts_with("panicked: asked to, at "), "{failure}");
    assert_eq!(next.poll(), Some(Ok(2)));
}
