//! The rules, each a test of its own. `tests/checklist.md` says which row of DriverKit's classes
//! a rule is for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::channel;

use iohost_device_backend::DeviceBackend;
use iohost_dispatch::{Clock, Engine, EngineClock};
use iohost_driver::prelude::*;

use crate::Setup;
use crate::bench::{Bench, Probe, Seen};

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
}

// ---- Lines ----

pub(crate) fn a_level_line_stays_masked_until_its_handler_has_returned(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(1);
    let ringing = bench.ringing.clone();
    let mut calls = 0;
    let handler = move |probe: &mut Probe, event: InterruptEvent| {
        calls += 1;
        // The cause goes; the first time another one comes at once.
        ringing.deassert_line();
        if calls == 1 {
            ringing.assert_line();
        }
        let meanwhile = probe.source().last_interrupt().count;
        probe.note(format!("count {}, {meanwhile} meanwhile", event.count));
    };
    let source = Arc::new(bench.source(0, handler).unwrap());
    source.set_enable(true).unwrap();
    bench.keep(&source);
    bench.ringing.interrupt_by_line();
    bench.expect(["count 1, 0 meanwhile", "count 1, 0 meanwhile"]);
    bench.ringing.interrupt_by_line();
    bench.expect(["count 1, 0 meanwhile"]);
}

pub(crate) fn a_line_that_is_asserted_while_disabled_interrupts_once_when_enabled(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(1);
    let source = bench.source(0, clearing(&bench)).unwrap();
    bench.ringing.interrupt_by_line();
    bench.expect_nothing();
    source.set_enable(true).unwrap();
    bench.expect(["count 1"]);
}

pub(crate) fn the_type_of_a_line_is_level(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(1);
    let kind = |index| IOInterruptDispatchSource::interrupt_type(&bench.device, index);
    assert_eq!(kind(0).map(|kind| kind as u64), Ok(1));
    assert_eq!(code(kind(1)), Some(IOReturn::NO_INTERRUPT));
}

pub(crate) fn without_configuration_the_line_is_index_0_and_the_first_message_follows(on: &Setup) {
    let bench = Bench::new(on);
    let kind = |index| IOInterruptDispatchSource::interrupt_type(&bench.device, index).ok();
    let found = [0, 1, 2].map(kind);
    assert_eq!(found, [Some(InterruptType::Level), Some(InterruptType::Messaged), None]);
}

pub(crate) fn a_message_source_without_configuration_works(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.interrupt(1).unwrap();
    source.set_enable(true).unwrap();
    bench.send(0);
    bench.expect(["count 1"]);
}

pub(crate) fn a_synchronous_check_of_a_line_returns_after_its_handler(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(1);
    let source = bench.source(0, clearing(&bench)).unwrap();
    source.set_enable(true).unwrap();
    for _ in 0..2 {
        let ringing = bench.ringing.clone();
        bench.side().dispatch_async(move |_| ringing.interrupt_by_line());
        source.wait_for_work().unwrap();
        bench.seen.note("returned");
        bench.expect(["count 1", "returned"]);
    }
}

/// A handler that clears the line's cause, and notes the count.
fn clearing(bench: &Bench) -> impl FnMut(&mut Probe, InterruptEvent) + Send + 'static {
    let ringing = bench.ringing.clone();
    move |probe, event| {
        ringing.deassert_line();
        probe.note(format!("count {}", event.count));
    }
}

// ---- Messages ----

pub(crate) fn an_index_past_the_last_vector_is_no_interrupt(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(1);
    assert_eq!(code(bench.interrupt(0)), None);
    assert_eq!(code(bench.interrupt(1)), Some(IOReturn::NO_INTERRUPT));
    assert_eq!(code(bench.interrupt(0xffff)), Some(IOReturn::NO_INTERRUPT));
}

pub(crate) fn flags_of_an_index_that_do_not_exist_are_a_bad_argument(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(1);
    assert_eq!(code(bench.interrupt(0x2_0000)), Some(IOReturn::BAD_ARGUMENT));
}

pub(crate) fn an_interrupt_source_starts_disabled(on: &Setup) {
    let bench = Bench::new(on);
    let _source = bench.the_source();
    bench.send(0);
    bench.expect_nothing();
}

pub(crate) fn making_a_message_source_makes_the_device_bus_master(on: &Setup) {
    const BUS_MASTER: u16 = 0x4;
    let bench = Bench::new(on);
    assert_eq!(bench.device.configuration_read16(0x04) & BUS_MASTER, 0);
    let _source = bench.the_source();
    assert_eq!(bench.device.configuration_read16(0x04) & BUS_MASTER, BUS_MASTER);
}

pub(crate) fn the_type_of_an_interrupt_is_the_number_of_its_kind(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(1);
    let number = match on.kind {
        iohost_device_backend::InterruptKind::MsiX => 0x3_0000,
        _ => 0x1_0000,
    };
    let kind = |index| IOInterruptDispatchSource::interrupt_type(&bench.device, index);
    assert_eq!(kind(0).map(|kind| kind as u64), Ok(number));
    assert_eq!(code(kind(1)), Some(IOReturn::NO_INTERRUPT));
}

pub(crate) fn a_source_dropped_without_cancel_frees_its_vector(on: &Setup) {
    let bench = Bench::new(on);
    drop(bench.the_source());
    let source = bench.interrupt(0).unwrap();
    source.set_enable(true).unwrap();
    bench.send(0);
    bench.expect(["count 1"]);
}

pub(crate) fn a_new_handler_gets_the_next_delivery_and_the_old_one_is_dropped(on: &Setup) {
    let bench = Bench::new(on);
    let owned = Arc::new(());
    let held = owned.clone();
    bench.configure(1);
    let old = move |probe: &mut Probe, _| {
        drop(held.clone());
        probe.note("old");
    };
    let source = bench.source(0, old).unwrap();
    source.set_enable(true).unwrap();
    bench.send(0);
    bench.expect(["old"]);
    source.set_handler(&bench.queue, |probe, _| probe.note("new")).unwrap();
    assert_eq!(Arc::strong_count(&owned), 1);
    bench.expect_nothing(); // and nothing is replayed
    bench.send(0);
    bench.expect(["new"]);
}

pub(crate) fn enabling_what_is_enabled_succeeds_and_only_a_change_after_cancel_is_refused(
    on: &Setup,
) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    for enable in [false, true, true, false, false] {
        assert_eq!(source.set_enable(enable), Ok(()));
    }
    source.cancel(&bench.queue, |_| ());
    assert_eq!(source.set_enable(false), Ok(()));
    assert_eq!(code(source.set_enable(true)), Some(IOReturn::UNSUPPORTED));
}

pub(crate) fn the_cancel_handler_finds_the_vector_free(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    let (device, queue) = (bench.device.clone(), bench.queue.clone());
    source.cancel(&bench.queue, move |probe| {
        let again = IOInterruptDispatchSource::create(&device, 0, &queue, |_: &mut Probe, _| ());
        probe.note(format!("made again: {}", again.is_ok()));
    });
    bench.expect(["made again: true"]);
}

pub(crate) fn the_last_interrupt_counts_what_is_undelivered_and_keeps_its_time(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    assert_eq!(source.last_interrupt(), InterruptEvent { count: 0, time: 0 });
    (0..3).for_each(|_| bench.send(0));
    let before = source.last_interrupt();
    assert_eq!(before.count, 3);
    assert_eq!(source.last_interrupt(), before, "looking changes nothing");
    source.set_enable(true).unwrap();
    bench.expect(["count 3"]);
    assert_eq!(source.last_interrupt(), InterruptEvent { count: 0, time: before.time });
}

pub(crate) fn looking_at_the_last_interrupt_takes_it_from_nobody(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    source.set_enable(true).unwrap();
    bench.expect_nothing();
    bench.send(0);
    // Before the engine has heard of it.
    assert_eq!(source.last_interrupt().count, 1);
    bench.expect(["count 1"]);
}

pub(crate) fn five_interrupts_during_one_handler_make_one_more_call_with_the_time_of_the_fifth(
    on: &Setup,
) {
    let bench = Bench::new(on);
    bench.configure(1);
    let (ringing, queue) = (bench.ringing.clone(), bench.queue.clone());
    let mut first = true;
    let handler = move |probe: &mut Probe, event: InterruptEvent| {
        if std::mem::take(&mut first) {
            (0..5).for_each(|_| ringing.send(0));
        }
        let age = queue.now(IOTimerClock::MachAbsoluteTime) - event.time;
        probe.note(format!("count {}, {age} ns ago", event.count));
    };
    let source = bench.source(0, handler).unwrap();
    source.set_enable(true).unwrap();
    bench.send(0);
    // The bench's time stands still.
    bench.expect(["count 1, 0 ns ago", "count 5, 0 ns ago"]);
}

pub(crate) fn messages_are_never_masked(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(1);
    let ringing = bench.ringing.clone();
    let mut first = true;
    let handler = move |probe: &mut Probe, event: InterruptEvent| {
        if std::mem::take(&mut first) {
            (0..2).for_each(|_| ringing.send(0));
        }
        let meanwhile = probe.source().last_interrupt().count;
        probe.note(format!("count {}, {meanwhile} meanwhile", event.count));
    };
    let source = Arc::new(bench.source(0, handler).unwrap());
    source.set_enable(true).unwrap();
    bench.keep(&source);
    bench.send(0);
    bench.expect(["count 1, 2 meanwhile", "count 2, 0 meanwhile"]);
}

pub(crate) fn messages_while_disabled_arrive_as_one_call_when_enabled(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    (0..3).for_each(|_| bench.send(0));
    source.set_enable(true).unwrap();
    bench.expect(["count 3"]);
    source.set_enable(false).unwrap();
    (0..2).for_each(|_| bench.send(0));
    bench.expect_nothing();
    source.set_enable(true).unwrap();
    bench.expect(["count 2"]);
}

pub(crate) fn the_time_of_an_interrupt_is_on_the_clock_that_its_index_asks_for(on: &Setup) {
    let bench = Bench::on_engine(on, Engine::manual(EngineClock::Real).unwrap());
    bench.configure(1);
    let continuous = IOInterruptDispatchSource::CONTINUOUS_TIME;
    for (flags, clock) in [(0, Clock::Uptime), (continuous, Clock::Continuous)] {
        let source = bench.interrupt(flags).unwrap();
        let before = clock.now();
        bench.send(0);
        let time = source.last_interrupt().time;
        assert!((before..=clock.now()).contains(&time), "{clock:?}");
    }
}

pub(crate) fn an_interrupt_handler_runs_on_the_queue_given_to_create(on: &Setup) {
    let bench = Bench::new(on);
    let side = bench.side();
    bench.configure(1);
    let (own, default) = (side.clone(), bench.queue.clone());
    let handler = move |seen: &mut Seen, _| {
        seen.note(format!("side {}, default {}", own.on_queue(), default.on_queue()));
    };
    let source = IOInterruptDispatchSource::create(&bench.device, 0, &side, handler).unwrap();
    source.set_enable(true).unwrap();
    bench.send(0);
    bench.expect(["side true, default false"]);
}

pub(crate) fn interrupts_reach_a_driver_on_an_engine_with_threads(on: &Setup) {
    let bench = Bench::on_engine(on, Engine::with_workers(3).unwrap());
    bench.configure(1);
    let (handled, counts) = channel();
    let handler = move |_: &mut Probe, event: InterruptEvent| handled.send(event.count).unwrap();
    let source = bench.source(0, handler).unwrap();
    source.set_enable(true).unwrap();
    for _ in 0..100 {
        bench.ringing.post(0);
        // A device that spaces messages out may repeat one whose cause still stands.
        let count = counts.recv_timeout(crate::ringing::PATIENCE);
        assert!(count.is_ok_and(|count| count >= 1), "{count:?}");
    }
}

pub(crate) fn a_completion_runs_once_after_the_handler_in_flight_and_also_when_nothing_changed(
    on: &Setup,
) {
    let bench = Bench::new(on);
    bench.configure(1);
    let queue = bench.queue.clone();
    let handler = move |probe: &mut Probe, _| {
        let disabled = |probe: &mut Probe| probe.note("disabled");
        probe.source().set_enable_with_completion(&queue, false, disabled).unwrap();
        probe.note("handled");
    };
    let source = Arc::new(bench.source(0, handler).unwrap());
    source.set_enable_with_completion(&bench.queue, true, |probe| probe.note("enabled")).unwrap();
    source.set_enable_with_completion(&bench.queue, true, |probe| probe.note("again")).unwrap();
    bench.keep(&source);
    bench.expect(["enabled", "again"]);
    bench.send(0);
    bench.expect(["handled", "disabled"]);
    bench.expect_nothing();
}

pub(crate) fn no_interrupt_handler_starts_after_the_cancel_handler(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    source.set_enable(true).unwrap();
    bench.send(0);
    source.cancel(&bench.queue, |probe| probe.note("cancelled"));
    bench.expect(["cancelled"]);
    bench.ringing.post(0);
    bench.expect_nothing();
}

pub(crate) fn a_source_can_be_cancelled_in_its_own_handler(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(1);
    let queue = bench.queue.clone();
    let handler = move |probe: &mut Probe, _| {
        let source = probe.source.take().unwrap();
        source.cancel(&queue, |probe| probe.note("cancelled"));
        probe.note("handled");
    };
    let source = Arc::new(bench.source(0, handler).unwrap());
    source.set_enable(true).unwrap();
    bench.keep(&source);
    drop(source);
    bench.send(0);
    bench.expect(["handled", "cancelled"]);
}

// ---- CheckForWork ----

pub(crate) fn a_check_for_work_with_nothing_to_deliver_is_not_ready(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    let not_ready = Some(IOReturn::NOT_READY);
    bench.send(0);
    assert_eq!(code(source.check_for_work()), not_ready, "disabled");
    source.set_enable(true).unwrap();
    bench.expect(["count 1"]); // so the check has taken it from nobody
    assert_eq!(code(source.check_for_work()), not_ready, "idle");
    bench.send(0);
    source.cancel(&bench.queue, |_| ());
    assert_eq!(code(source.check_for_work()), not_ready, "cancelled");
    bench.expect_nothing();
}

pub(crate) fn a_check_for_work_has_what_there_is_delivered_after_the_call(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    source.set_enable(true).unwrap();
    (0..2).for_each(|_| bench.send(0));
    assert_eq!(source.check_for_work(), Ok(()));
    bench.seen.note("checked");
    bench.expect(["checked", "count 2"]);
}

pub(crate) fn a_check_for_work_inside_the_handler_leads_to_one_more_call(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(1);
    let ringing = bench.ringing.clone();
    let mut first = true;
    let handler = move |probe: &mut Probe, event: InterruptEvent| {
        if std::mem::take(&mut first) {
            ringing.send(0);
        }
        let checked = code(probe.source().check_for_work());
        probe.note(format!("count {}, {}", event.count, checked.is_none()));
    };
    let source = Arc::new(bench.source(0, handler).unwrap());
    source.set_enable(true).unwrap();
    bench.keep(&source);
    bench.send(0);
    bench.expect(["count 1, true", "count 1, false"]);
}

pub(crate) fn a_synchronous_check_waits_for_the_next_interrupt_and_its_handler(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    source.set_enable(true).unwrap();
    // Nobody but this thread runs queues, so the side does its work while this one waits.
    let ringing = bench.ringing.clone();
    bench.side().dispatch_async(move |seen| {
        seen.note("sent");
        ringing.send(0);
    });
    assert_eq!(source.wait_for_work(), Ok(()));
    bench.seen.note("returned");
    bench.expect(["sent", "count 1", "returned"]);
    // And one that has come already is waited for no longer than for its handler.
    bench.send(0);
    assert_eq!(source.wait_for_work(), Ok(()));
    bench.seen.note("returned");
    bench.expect(["count 1", "returned"]);
}

pub(crate) fn a_synchronous_check_of_a_disabled_source_waits_until_it_is_enabled(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    bench.send(0);
    let enabling = source.clone();
    bench.side().dispatch_async(move |seen| {
        seen.note("enabled");
        enabling.set_enable(true).unwrap();
    });
    assert_eq!(source.wait_for_work(), Ok(()));
    bench.seen.note("returned");
    bench.expect(["enabled", "count 1", "returned"]);
}

pub(crate) fn the_waiter_of_a_check_is_told_when_the_source_or_its_queue_is_cancelled(on: &Setup) {
    let aborted = Some(IOReturn::ABORTED);
    let bench = Bench::new(on);
    let source = bench.the_source();
    source.set_enable(true).unwrap();
    let (cancelling, queue) = (source.clone(), bench.queue.clone());
    bench.side().dispatch_async(move |_| cancelling.cancel(&queue, |_| ()));
    assert_eq!(code(source.wait_for_work()), aborted);
    assert_eq!(code(source.wait_for_work()), aborted, "it stays so");
    drop(bench);

    let bench = Bench::new(on);
    let source = bench.the_source();
    source.set_enable(true).unwrap();
    let queue = bench.queue.clone();
    bench.side().dispatch_async(move |_| queue.cancel(|_| ()));
    assert_eq!(code(source.wait_for_work()), aborted);
    bench.expect_nothing();
    assert_eq!(code(source.wait_for_work()), aborted, "it stays so");
}

pub(crate) fn a_synchronous_check_on_the_queue_and_a_second_waiter_are_refused(on: &Setup) {
    let bench = Bench::new(on);
    let source = bench.the_source();
    let own = bench.queue.dispatch_sync(|_| code(source.wait_for_work())).unwrap();
    assert_eq!(own, Some(IOReturn::NOT_PERMITTED));
    let (second, queue) = (source.clone(), bench.queue.clone());
    bench.side().dispatch_async(move |seen| {
        let busy = code(second.wait_for_work()) == Some(IOReturn::BUSY);
        seen.note(format!("busy: {busy}"));
        second.cancel(&queue, |_| ());
    });
    assert_eq!(code(source.wait_for_work()), Some(IOReturn::ABORTED));
    bench.expect(["busy: true"]);
}

// ---- Several vectors ----

pub(crate) fn a_second_source_on_one_vector_is_refused_for_want_of_resources(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(2);
    let first = bench.interrupt(0).unwrap();
    assert_eq!(code(bench.interrupt(0)), Some(IOReturn::NO_RESOURCES));
    assert_eq!(code(bench.interrupt(0)), Some(IOReturn::NO_RESOURCES));
    assert_eq!(code(bench.interrupt(1)), None, "another vector is free");
    first.set_enable(true).unwrap();
    bench.send(0);
    bench.expect(["count 1"]); // it has lost nothing
}

pub(crate) fn cancel_frees_the_vector_loses_what_was_counted_and_can_be_called_twice(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(2);
    let source = bench.interrupt(0).unwrap();
    let _other = bench.interrupt(1).unwrap();
    bench.send(0);
    source.cancel(&bench.queue, |probe| probe.note("first"));
    source.cancel(&bench.queue, |probe| probe.note("second"));
    bench.expect(["first", "second"]);
    let again = bench.interrupt(0).unwrap();
    again.set_enable(true).unwrap();
    bench.expect_nothing(); // what the cancelled source did not deliver is lost
    bench.send(0);
    bench.expect(["count 1"]);
}

pub(crate) fn a_configured_vector_is_the_index_of_its_number(on: &Setup) {
    let bench = Bench::new(on);
    bench.configure(4);
    let sources: Vec<_> = (0..4)
        .map(|index| {
            let handler = move |probe: &mut Probe, event: InterruptEvent| {
                probe.note(format!("{index}: {}", event.count));
            };
            bench.source(index, handler).unwrap()
        })
        .collect();
    sources.iter().for_each(|source| source.set_enable(true).unwrap());
    for vector in [2, 0, 3] {
        bench.send(vector);
        bench.expect([format!("{vector}: 1")]);
    }
}

// ---- How many vectors there are ----

/// Rounds of the rule on a device in a test of every day; `vfio-check resize` makes more.
const ROUNDS: u32 = 20;

pub(crate) fn vectors_are_resized_under_interrupts_and_none_is_lost_or_foreign(on: &Setup) {
    resize_rounds(on, ROUNDS);
}

/// Resizes all vectors to one and back, while the first one interrupts all the time, and the others
/// in all the moments that matter: before they are disabled, told to their source or not yet, and
/// while they are. Each interrupt reaches its own source once, or is counted as dropped.
pub fn resize_rounds(on: &Setup, rounds: u32) {
    let bench = Bench::new(on);
    // Not all: the fifth vector of an `e1000e` is that of its link too, which has its own to say.
    let vectors = on.device.interrupt_count(on.kind).min(4);
    bench.configure(vectors);
    let told: Vec<Arc<AtomicU64>> = (0..vectors).map(|_| Arc::default()).collect();
    let sources = told.iter().zip(0..).map(|(told, vector)| {
        let told = told.clone();
        let handler = move |_: &mut Probe, event: InterruptEvent| {
            told.fetch_add(event.count, SeqCst);
        };
        let source = bench.source(vector, handler).unwrap();
        source.set_enable(true).unwrap();
        source
    });
    let sources: Vec<_> = sources.collect();

    // The first vector, one interrupt after the other, for as long as the rounds go on.
    let stop = Arc::new(AtomicBool::new(false));
    let (ringing, heard, enough) = (bench.ringing.clone(), told[0].clone(), stop.clone());
    let storm = std::thread::spawn(move || {
        let mut sent = 0;
        while !enough.load(SeqCst) {
            ringing.post_at_once(0);
            sent += 1;
            while heard.load(SeqCst) < sent && !enough.load(SeqCst) {
                std::thread::yield_now();
            }
        }
        sent
    });

    let mut expected = vec![0; vectors as usize];
    let mut dropped = 0;
    for round in 0..rounds {
        let other = 1 + round % (vectors - 1);
        let before = told[0].load(SeqCst);
        bench.ringing.send_at_once(other);
        match round % 2 {
            0 => {
                bench.settle();
                expected[other as usize] += 1;
            }
            // Not told yet: it is late.
            _ => dropped += 1,
        }
        bench.device.resize_interrupts(1).unwrap();
        bench.ringing.send_at_once(other);
        dropped += 1;
        bench.device.resize_interrupts(vectors).unwrap();
        bench.settle();
        bench.settle_until("the first vector, in this round", || told[0].load(SeqCst) > before);
        let all: Vec<u64> = told.iter().map(|told| told.load(SeqCst)).collect();
        assert_eq!(all[1..], expected[1..], "in round {round}");
        assert_eq!(bench.device.dropped_interrupts(), dropped, "in round {round}");
    }
    stop.store(true, SeqCst);
    let sent = storm.join().unwrap();
    bench.settle_until("the last interrupt of the first vector", || told[0].load(SeqCst) >= sent);
    assert_eq!(told[0].load(SeqCst), sent);
    drop(sources);
}

pub(crate) fn vectors_that_are_disabled_have_no_source_and_a_reset_keeps_them_so(on: &Setup) {
    let bench = Bench::new(on);
    assert_eq!(code(bench.device.resize_interrupts(1)), Some(IOReturn::NOT_READY));
    bench.configure(2);
    let available = on.device.interrupt_count(on.kind);
    let refused = bench.device.resize_interrupts(available + 1);
    assert_eq!(code(refused), Some(IOReturn::NO_SPACE));
    let first = bench.interrupt(0).unwrap();
    let second = bench.interrupt(1).unwrap();
    for source in [&first, &second] {
        source.set_enable(true).unwrap();
    }
    bench.device.resize_interrupts(1).unwrap();
    drop(second);
    assert_eq!(code(bench.interrupt(1)), Some(IOReturn::NO_INTERRUPT));
    bench.device.reset().unwrap();
    bench.send(0);
    bench.expect(["count 1"]);
    bench.send(1);
    bench.expect_nothing();
    assert_eq!(bench.device.dropped_interrupts(), 1);
    // More than was chosen at first.
    bench.device.resize_interrupts(3).unwrap();
    let third = bench.interrupt(2).unwrap();
    third.set_enable(true).unwrap();
    bench.send(2);
    bench.expect(["count 1"]);
    bench.send(0);
    bench.expect(["count 1"]);
}
