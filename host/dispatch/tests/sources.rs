//! Sources: counting, latching, deadlines, the end. On a manual engine with virtual time, so
//! each step is one the test takes.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iohost_dispatch::{
    BellSource, Clock, DescriptorSource, Engine, EngineClock, InterruptEvent, InterruptLine,
    InterruptSource, Queue, QueueOptions, Signal, TimerSource,
};
use iohost_interface::IOReturn;

/// A manual engine with one queue, and a list of what happened.
struct Bench {
    engine: Engine,
    queue: Queue,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Bench {
    fn new() -> Self {
        let engine = Engine::manual(EngineClock::Virtual).unwrap();
        let queue = Queue::create(&engine, "bench", QueueOptions::default()).unwrap();
        Self { engine, queue, seen: Arc::default() }
    }

    fn note(&self, what: impl Into<String>) -> Box<dyn FnOnce() + Send> {
        let (seen, what) = (self.seen.clone(), what.into());
        Box::new(move || seen.lock().unwrap().push(what))
    }

    /// What happened since the last call, after everything has settled.
    fn settled(&self) -> Vec<String> {
        self.engine.settle();
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    fn interrupt(&self, signal: &Arc<Signal>, line: InterruptLine) -> InterruptSource {
        let seen = self.seen.clone();
        let handler = move |event: InterruptEvent| {
            seen.lock().unwrap().push(format!("count {}", event.count));
        };
        InterruptSource::create(&self.queue, signal.clone(), line, Clock::Uptime, handler).unwrap()
    }

    fn timer(&self) -> TimerSource {
        let seen = self.seen.clone();
        TimerSource::create(&self.queue, move |time| {
            seen.lock().unwrap().push(format!("fired at {time}"));
        })
    }

    fn advance(&self, ns: u64) {
        self.engine.advance(Duration::from_nanos(ns));
    }
}

const SECOND: u64 = 1_000_000_000;

#[test]
fn interrupts_while_disabled_are_latched_and_delivered_as_one_call_on_enable() {
    let bench = Bench::new();
    let signal = Arc::new(Signal::new().unwrap());
    let source = bench.interrupt(&signal, InterruptLine::Edge);
    signal.raise();
    signal.raise();
    assert!(bench.settled().is_empty(), "a source starts disabled");
    source.set_enable(true, Some(bench.note("enabled"))).unwrap();
    assert_eq!(bench.settled(), ["count 2", "enabled"]);
    source.set_enable(false, None).unwrap();
    signal.raise();
    assert!(bench.settled().is_empty());
    source.set_enable(true, None).unwrap();
    assert_eq!(bench.settled(), ["count 1"]);
}

#[test]
fn five_interrupts_during_one_handler_make_one_further_call() {
    let bench = Bench::new();
    let signal = Arc::new(Signal::new().unwrap());
    let seen = bench.seen.clone();
    let raised = signal.clone();
    let source = InterruptSource::create(
        &bench.queue,
        signal.clone(),
        InterruptLine::Edge,
        Clock::Uptime,
        move |event| {
            let mut seen = seen.lock().unwrap();
            if seen.is_empty() {
                (0..5).for_each(|_| raised.raise());
            }
            seen.push(format!("count {}", event.count));
        },
    )
    .unwrap();
    source.set_enable(true, None).unwrap();
    signal.raise();
    assert_eq!(bench.settled(), ["count 1", "count 5"]);
}

#[test]
fn the_last_interrupt_is_the_count_not_delivered_and_keeps_its_time() {
    let bench = Bench::new();
    let signal = Arc::new(Signal::new().unwrap());
    let source = bench.interrupt(&signal, InterruptLine::Edge);
    (0..3).for_each(|_| signal.raise());
    let before = source.last_interrupt();
    assert_eq!(before.count, 3);
    source.set_enable(true, None).unwrap();
    assert_eq!(bench.settled(), ["count 3"]);
    assert_eq!(source.last_interrupt(), InterruptEvent { count: 0, time: before.time });
}

#[test]
fn a_level_line_stays_masked_until_its_handler_returned_and_while_disabled() {
    let bench = Bench::new();
    let signal = Arc::new(Signal::new().unwrap());
    let seen = bench.seen.clone();
    let unmask = move || seen.lock().unwrap().push("unmask".to_owned());
    let source = bench.interrupt(&signal, InterruptLine::Level(Box::new(unmask)));
    source.set_enable(true, None).unwrap();
    assert!(bench.settled().is_empty(), "a line that never fired needs no unmask");
    signal.raise();
    assert_eq!(bench.settled(), ["count 1", "unmask"]);
    source.set_enable(false, None).unwrap();
    signal.raise();
    assert!(bench.settled().is_empty());
    source.set_enable(true, None).unwrap();
    assert_eq!(bench.settled(), ["count 1", "unmask"]);
}

#[test]
fn no_interrupt_handler_starts_after_cancel_and_a_change_is_refused() {
    let bench = Bench::new();
    let signal = Arc::new(Signal::new().unwrap());
    let source = bench.interrupt(&signal, InterruptLine::Edge);
    source.set_enable(true, None).unwrap();
    signal.raise();
    source.cancel(Some(bench.note("cancelled")));
    source.cancel(Some(bench.note("again")));
    signal.raise();
    assert_eq!(bench.settled(), ["cancelled", "again"]);
    assert_eq!(source.set_enable(true, None), Err(IOReturn::UNSUPPORTED));
    assert_eq!(source.set_enable(false, None), Ok(()), "no change");
}

#[test]
fn a_handler_can_be_replaced_and_the_old_one_is_dropped() {
    let bench = Bench::new();
    let signal = Arc::new(Signal::new().unwrap());
    let owned = Arc::new(());
    let held = owned.clone();
    let source = InterruptSource::create(
        &bench.queue,
        signal.clone(),
        InterruptLine::Edge,
        Clock::Uptime,
        move |_| drop(held.clone()),
    )
    .unwrap();
    let seen = bench.seen.clone();
    source.set_handler(Some(move |_| seen.lock().unwrap().push("new".into())));
    assert_eq!(Arc::strong_count(&owned), 1);
    source.set_enable(true, None).unwrap();
    signal.raise();
    assert_eq!(bench.settled(), ["new"]);
}

#[test]
fn a_completion_comes_after_the_handler_in_flight() {
    let bench = Bench::new();
    let signal = Arc::new(Signal::new().unwrap());
    let source = Arc::new(Mutex::new(None::<InterruptSource>));
    let (seen, inner) = (bench.seen.clone(), source.clone());
    let handler = move |_| {
        let seen = seen.clone();
        let done = seen.clone();
        let disabled = Box::new(move || done.lock().unwrap().push("disabled".into()));
        inner.lock().unwrap().as_ref().unwrap().set_enable(false, Some(disabled)).unwrap();
        seen.lock().unwrap().push("handled".into());
    };
    *source.lock().unwrap() = Some(
        InterruptSource::create(
            &bench.queue,
            signal.clone(),
            InterruptLine::Edge,
            Clock::Uptime,
            handler,
        )
        .unwrap(),
    );
    source.lock().unwrap().as_ref().unwrap().set_enable(true, None).unwrap();
    signal.raise();
    assert_eq!(bench.settled(), ["handled", "disabled"]);
}

#[test]
fn a_timer_fires_once_per_arming_and_not_before_its_deadline() {
    let bench = Bench::new();
    let timer = bench.timer();
    assert!(bench.settled().is_empty(), "constructing never fires");
    timer.wake_at(Clock::Uptime, 2 * SECOND, 0).unwrap();
    bench.advance(SECOND - 1);
    assert!(bench.settled().is_empty());
    bench.advance(1);
    assert_eq!(bench.settled(), ["fired at 2000000000"]);
    bench.advance(SECOND);
    assert!(bench.settled().is_empty());
}

#[test]
fn a_past_deadline_fires_at_once_but_not_inside_the_call() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at(Clock::Wall, 0, 0).unwrap();
    assert!(bench.seen.lock().unwrap().is_empty());
    assert_eq!(bench.settled().len(), 1);
}

#[test]
fn arming_again_takes_back_an_expiration_that_waits_on_the_queue() {
    let bench = Bench::new();
    let timer = Arc::new(bench.timer());
    timer.wake_at(Clock::Uptime, SECOND, 0).unwrap();
    let again = timer.clone();
    // Runs before the expiration is delivered: it was queued first.
    bench.queue.dispatch_async(move || again.wake_at(Clock::Uptime, 5 * SECOND, 0).unwrap());
    assert!(bench.settled().is_empty());
    bench.advance(4 * SECOND);
    assert_eq!(bench.settled(), ["fired at 5000000000"]);
}

#[test]
fn a_disabled_timer_keeps_its_deadline_and_fires_when_enabled() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at(Clock::Continuous, 2 * SECOND, 0).unwrap();
    timer.set_enable(false, Some(bench.note("disabled"))).unwrap();
    bench.advance(2 * SECOND);
    assert_eq!(bench.settled(), ["disabled"]);
    timer.set_enable(true, None).unwrap();
    assert_eq!(bench.settled(), ["fired at 3000000000"]);
}

#[test]
fn a_timer_that_is_cancelled_or_dropped_never_fires_again() {
    let bench = Bench::new();
    let (cancelled, dropped) = (bench.timer(), bench.timer());
    cancelled.wake_at(Clock::Uptime, SECOND, 0).unwrap();
    dropped.wake_at(Clock::Uptime, SECOND, 0).unwrap();
    drop(dropped);
    cancelled.cancel(Some(bench.note("cancelled")));
    assert_eq!(bench.settled(), ["cancelled"]);
    assert_eq!(cancelled.wake_at(Clock::Uptime, SECOND, 0), Err(IOReturn::UNSUPPORTED));
}

#[test]
fn a_timer_without_a_handler_cannot_be_armed() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.set_handler(None::<fn(u64)>);
    assert_eq!(timer.wake_at(Clock::Uptime, SECOND, 0), Err(IOReturn::NO_RESOURCES));
}

#[test]
fn real_timers_on_all_clocks_fire_after_their_deadlines() {
    let engine = Engine::with_workers(2).unwrap();
    let queue = Queue::create(&engine, "real", QueueOptions::default()).unwrap();
    for clock in [Clock::Uptime, Clock::Continuous, Clock::Wall] {
        let (send, receive) = std::sync::mpsc::channel();
        let timer = TimerSource::create(&queue, move |_| send.send(clock.now()).unwrap());
        let deadline = clock.now() + 2_000_000;
        timer.wake_at(clock, deadline, 100_000).unwrap();
        assert!(receive.recv().unwrap() >= deadline, "{clock:?} fired early");
    }
}

#[test]
fn ten_thousand_interrupts_from_another_thread_are_all_counted() {
    let engine = Engine::with_workers(3).unwrap();
    let queue = Queue::create(&engine, "storm", QueueOptions::default()).unwrap();
    let signal = Arc::new(Signal::new().unwrap());
    let (send, receive) = std::sync::mpsc::channel();
    let source = InterruptSource::create(
        &queue,
        signal.clone(),
        InterruptLine::Edge,
        Clock::Uptime,
        move |event| send.send(event.count).unwrap(),
    )
    .unwrap();
    source.set_enable(true, None).unwrap();
    std::thread::spawn(move || (0..10_000).for_each(|_| signal.raise()));
    let mut total = 0;
    while total < 10_000 {
        total += receive.recv().unwrap();
    }
    assert_eq!(total, 10_000);
}

#[test]
fn an_interrupt_that_was_looked_at_before_it_was_delivered_is_delivered() {
    let bench = Bench::new();
    let signal = Arc::new(Signal::new().unwrap());
    let source = bench.interrupt(&signal, InterruptLine::Edge);
    source.set_enable(true, None).unwrap();
    assert!(bench.settled().is_empty());
    signal.raise();
    assert_eq!(source.last_interrupt().count, 1);
    assert_eq!(bench.settled(), ["count 1"]);
}

/// A reentrant queue whose handlers can sleep, on which a block wakes them in turn.
fn reentrant(bench: &Bench) -> Queue {
    Queue::create(&bench.engine, "reentrant", QueueOptions { reentrant: true }).unwrap()
}

#[test]
fn an_interrupt_while_its_handler_sleeps_is_delivered_once_the_handler_returned() {
    let bench = Bench::new();
    let queue = reentrant(&bench);
    let signal = Arc::new(Signal::new().unwrap());
    let (seen, raised, on) = (bench.seen.clone(), signal.clone(), queue.clone());
    let source = InterruptSource::create(
        &queue,
        signal.clone(),
        InterruptLine::Edge,
        Clock::Uptime,
        move |event| {
            let first = seen.lock().unwrap().is_empty();
            seen.lock().unwrap().push(format!("count {}", event.count));
            if first {
                raised.raise();
                // Sent twice, so that the interrupt is looked at before the wakeup.
                let (waker, relay) = (on.clone(), on.clone());
                on.dispatch_async(move || {
                    relay.dispatch_async(move || assert_eq!(waker.wakeup(7), Ok(true)));
                });
                assert_eq!(on.sleep(7, None), Ok(()));
                seen.lock().unwrap().push("returned".to_owned());
            }
        },
    )
    .unwrap();
    source.set_enable(true, None).unwrap();
    signal.raise();
    assert_eq!(bench.settled(), ["count 1", "returned", "count 1"]);
}

#[test]
fn a_timer_that_expires_while_its_handler_sleeps_fires_once_the_handler_returned() {
    let bench = Bench::new();
    let queue = reentrant(&bench);
    let (seen, on) = (bench.seen.clone(), queue.clone());
    let timer: Arc<Mutex<Option<TimerSource>>> = Arc::default();
    let again = timer.clone();
    *timer.lock().unwrap() = Some(TimerSource::create(&queue, move |_| {
        let first = seen.lock().unwrap().is_empty();
        seen.lock().unwrap().push("fired".to_owned());
        if first {
            again.lock().unwrap().as_ref().unwrap().wake_at(Clock::Uptime, 1, 0).unwrap();
            let (waker, relay) = (on.clone(), on.clone());
            on.dispatch_async(move || {
                relay.dispatch_async(move || assert_eq!(waker.wakeup(7), Ok(true)));
            });
            assert_eq!(on.sleep(7, None), Ok(()));
            seen.lock().unwrap().push("returned".to_owned());
        }
    }));
    timer.lock().unwrap().as_ref().unwrap().wake_at(Clock::Uptime, 1, 0).unwrap();
    assert_eq!(bench.settled(), ["fired", "returned", "fired"]);
    timer.lock().unwrap().take();
}

#[test]
fn a_descriptor_event_while_its_handler_panics_asleep_is_not_forgotten() {
    let bench = Bench::new();
    let queue = reentrant(&bench);
    let signal = Arc::new(Signal::new().unwrap());
    let (seen, raised, on) = (bench.seen.clone(), signal.clone(), queue.clone());
    let source = DescriptorSource::create(&queue, signal.clone(), move || {
        let first = seen.lock().unwrap().is_empty();
        seen.lock().unwrap().push(format!("took {}", raised.take()));
        if first {
            raised.raise();
            let (waker, relay) = (on.clone(), on.clone());
            on.dispatch_async(move || {
                relay.dispatch_async(move || assert_eq!(waker.wakeup(7), Ok(true)));
            });
            assert_eq!(on.sleep(7, None), Ok(()));
            panic!("a handler that panics");
        }
    })
    .unwrap();
    signal.raise();
    assert_eq!(bench.settled(), ["took 1", "took 1"]);
    drop(source);
}

#[test]
fn a_bell_that_rings_while_its_handler_sleeps_is_heard_once_the_handler_returned() {
    let bench = Bench::new();
    let queue = reentrant(&bench);
    let signal = Signal::new().unwrap();
    let bell = signal.as_fd().try_clone_to_owned().unwrap();
    let (seen, on) = (bench.seen.clone(), queue.clone());
    let source = BellSource::create(&queue, bell, move || {
        let first = seen.lock().unwrap().is_empty();
        seen.lock().unwrap().push("heard".to_owned());
        if first {
            signal.raise();
            let (waker, relay) = (on.clone(), on.clone());
            on.dispatch_async(move || {
                relay.dispatch_async(move || assert_eq!(waker.wakeup(7), Ok(true)));
            });
            assert_eq!(on.sleep(7, None), Ok(()));
            seen.lock().unwrap().push("returned".to_owned());
        }
    })
    .unwrap();
    source.nudge();
    assert_eq!(bench.settled(), ["heard", "returned", "heard"]);
}
