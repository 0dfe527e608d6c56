//! `IOInterruptDispatchSource`, and which interrupt an index means.

use std::sync::Arc;
use std::time::Duration;

use iohost_device_backend::InterruptKind;
use iohost_dispatch::{Clock, Engine, EngineClock};
use iohost_driver::prelude::*;

use crate::board::{Board, Unusual};
use crate::probe::{Bench, Host, Probe, Seen};

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
}

/// `kIOInterruptSourceContinuousTime`.
const CONTINUOUS_TIME: u32 = 0x1_0000;

#[test]
fn an_index_past_the_last_vector_is_no_interrupt() {
    let bench = Bench::new();
    bench.device.configure_interrupts(InterruptType::Messaged, 4, 4).unwrap();
    assert_eq!(code(bench.interrupt(3)), None);
    assert_eq!(code(bench.interrupt(4)), Some(IOReturn::NO_INTERRUPT));
    assert_eq!(code(bench.interrupt(0xffff)), Some(IOReturn::NO_INTERRUPT));
}

#[test]
fn flags_of_an_index_that_do_not_exist_are_a_bad_argument() {
    let bench = Bench::new();
    assert_eq!(code(bench.interrupt(0x2_0000)), Some(IOReturn::BAD_ARGUMENT));
}

#[test]
fn a_second_source_on_one_vector_is_refused_for_want_of_resources() {
    let bench = Bench::new();
    let first = bench.message_source();
    assert_eq!(code(bench.interrupt(0)), Some(IOReturn::NO_RESOURCES));
    assert_eq!(code(bench.interrupt(0)), Some(IOReturn::NO_RESOURCES));
    assert_eq!(code(bench.interrupt(1)), None, "another vector is free");
    first.set_enable(true).unwrap();
    bench.message(0);
    assert_eq!(bench.settled(), ["count 1"], "the first source has lost nothing");
}

#[test]
fn an_interrupt_source_starts_disabled() {
    let bench = Bench::new();
    let _source = bench.message_source();
    bench.message(0);
    assert!(bench.settled().is_empty());
}

#[test]
fn making_a_message_source_makes_the_device_bus_master_and_enables_its_messages() {
    const BUS_MASTER: u16 = 0x4;
    let bench = Bench::new();
    assert_eq!(bench.device.configuration_read16(0x04) & BUS_MASTER, 0);
    let _source = bench.message_source();
    assert_eq!(bench.device.configuration_read16(0x04) & BUS_MASTER, BUS_MASTER);
    assert!(bench.bus(|bus| bus.msi_enabled()));
}

#[test]
fn the_type_of_an_interrupt_is_the_number_of_its_kind() {
    let mut unusual = Unusual::new(Board::default());
    unusual.msi_x = 8;
    let host = Host::start(Engine::manual(EngineClock::Virtual).unwrap(), Arc::new(unusual));
    host.device.configure_interrupts(InterruptType::MessagedX, 1, 8).unwrap();
    let kind = |device, index| IOInterruptDispatchSource::interrupt_type(device, index);
    assert_eq!(kind(&host.device, 7).map(|kind| kind as u64), Ok(0x3_0000));
    let bench = Bench::new();
    assert_eq!(kind(&bench.device, 0).map(|kind| kind as u64 & 1), Ok(1), "level");
    assert_eq!(kind(&bench.device, 1).map(|kind| kind as u64), Ok(0x1_0000));
    assert_eq!(code(kind(&bench.device, 2)), Some(IOReturn::NO_INTERRUPT));
}

#[test]
fn a_source_dropped_without_cancel_frees_its_vector() {
    let bench = Bench::new();
    drop(bench.message_source());
    let source = bench.interrupt(0).unwrap();
    source.set_enable(true).unwrap();
    bench.message(0);
    assert_eq!(bench.settled(), ["count 1"]);
}

#[test]
fn a_new_handler_gets_the_next_delivery_and_the_old_one_is_dropped() {
    let bench = Bench::new();
    let owned = Arc::new(());
    let held = owned.clone();
    bench.device.configure_interrupts(InterruptType::Messaged, 1, 1).unwrap();
    let old = move |probe: &mut Probe, _| {
        drop(held.clone());
        probe.note("old");
    };
    let source = IOInterruptDispatchSource::create(&bench.device, 0, &bench.queue, old).unwrap();
    source.set_enable(true).unwrap();
    bench.message(0);
    assert_eq!(bench.settled(), ["old"]);
    source.set_handler(&bench.queue, |probe, _| probe.note("new")).unwrap();
    assert_eq!(Arc::strong_count(&owned), 1);
    assert!(bench.settled().is_empty(), "nothing is replayed");
    bench.message(0);
    assert_eq!(bench.settled(), ["new"]);
}

#[test]
fn enabling_what_is_enabled_succeeds_and_only_a_change_after_cancel_is_refused() {
    let bench = Bench::new();
    let source = bench.message_source();
    for enable in [false, true, true, false, false] {
        assert_eq!(source.set_enable(enable), Ok(()));
    }
    source.cancel(&bench.queue, |_| ());
    assert_eq!(source.set_enable(false), Ok(()));
    assert_eq!(code(source.set_enable(true)), Some(IOReturn::UNSUPPORTED));
}

#[test]
fn cancel_frees_the_vector_loses_what_was_counted_and_can_be_called_twice() {
    let bench = Bench::new();
    let source = bench.message_source();
    let _other = bench.interrupt(1).unwrap();
    bench.message(0);
    source.cancel(&bench.queue, |probe| probe.note("first"));
    source.cancel(&bench.queue, |probe| probe.note("second"));
    assert_eq!(bench.settled(), ["first", "second"]);
    let again = bench.interrupt(0).unwrap();
    again.set_enable(true).unwrap();
    assert!(bench.settled().is_empty(), "what the cancelled source did not deliver is lost");
    bench.message(0);
    assert_eq!(bench.settled(), ["count 1"]);
}

#[test]
fn the_cancel_handler_finds_the_vector_free() {
    let bench = Bench::new();
    let source = bench.message_source();
    let device = bench.device.clone();
    let queue = bench.queue.clone();
    source.cancel(&bench.queue, move |probe| {
        let again = IOInterruptDispatchSource::create(&device, 0, &queue, |_: &mut Probe, _| ());
        probe.note(format!("made again: {}", again.is_ok()));
    });
    assert_eq!(bench.settled(), ["made again: true"]);
}

#[test]
fn the_last_interrupt_counts_what_is_undelivered_and_keeps_its_time() {
    let bench = Bench::new();
    let source = bench.message_source();
    assert_eq!(source.last_interrupt(), InterruptEvent { count: 0, time: 0 });
    (0..3).for_each(|_| bench.message(0));
    let before = source.last_interrupt();
    assert_eq!(before.count, 3);
    assert_eq!(source.last_interrupt(), before, "looking changes nothing");
    source.set_enable(true).unwrap();
    assert_eq!(bench.settled(), ["count 3"]);
    assert_eq!(source.last_interrupt(), InterruptEvent { count: 0, time: before.time });
}

#[test]
fn looking_at_the_last_interrupt_takes_it_from_nobody() {
    let bench = Bench::new();
    let source = bench.message_source();
    source.set_enable(true).unwrap();
    assert!(bench.settled().is_empty());
    bench.message(0);
    // Before the engine has heard of it.
    assert_eq!(source.last_interrupt().count, 1);
    assert_eq!(bench.settled(), ["count 1"]);
}

#[test]
fn five_interrupts_during_one_handler_make_one_more_call_with_the_time_of_the_fifth() {
    let bench = Bench::new();
    bench.device.configure_interrupts(InterruptType::Messaged, 1, 1).unwrap();
    let (function, queue) = (bench.rig.function(), bench.queue.clone());
    let mut first = true;
    let handler = move |probe: &mut Probe, event: InterruptEvent| {
        if std::mem::take(&mut first) {
            (0..5).for_each(|_| function.with_model(|_, bus| bus.send_msi(0)));
        }
        let age = queue.now(IOTimerClock::MachAbsoluteTime) - event.time;
        probe.note(format!("count {}, {age} ns ago", event.count));
    };
    let source = IOInterruptDispatchSource::create(&bench.device, 0, &bench.queue, handler);
    source.as_ref().unwrap().set_enable(true).unwrap();
    bench.message(0);
    // The rig's time stands still unless the test moves it.
    assert_eq!(bench.settled(), ["count 1, 0 ns ago", "count 5, 0 ns ago"]);
}

#[test]
fn a_level_line_stays_masked_until_its_handler_has_returned() {
    let bench = Bench::new();
    bench.device.configure_interrupts(InterruptType::Level, 1, 1).unwrap();
    let function = bench.rig.function();
    let mut calls = 0;
    let handler = move |probe: &mut Probe, event: InterruptEvent| {
        calls += 1;
        function.with_model(|_, bus| {
            // The cause goes; the first time another one comes at once.
            bus.deassert_intx();
            if calls == 1 {
                bus.assert_intx();
            }
        });
        let meanwhile = probe.interrupt.as_ref().unwrap().last_interrupt().count;
        probe.note(format!("count {}, {meanwhile} meanwhile", event.count));
    };
    let source = IOInterruptDispatchSource::create(&bench.device, 0, &bench.queue, handler);
    let source = source.unwrap();
    source.set_enable(true).unwrap();
    bench.queue.dispatch_sync(|probe| probe.interrupt = Some(source)).unwrap();
    bench.bus(|bus| bus.assert_intx());
    assert_eq!(bench.settled(), ["count 1, 0 meanwhile", "count 1, 0 meanwhile"]);
    bench.bus(|bus| bus.assert_intx());
    assert_eq!(bench.settled(), ["count 1, 0 meanwhile"], "and it was unmasked");
}

#[test]
fn messages_are_never_masked() {
    let bench = Bench::new();
    bench.device.configure_interrupts(InterruptType::Messaged, 1, 1).unwrap();
    let function = bench.rig.function();
    let mut first = true;
    let handler = move |probe: &mut Probe, event: InterruptEvent| {
        if std::mem::take(&mut first) {
            (0..2).for_each(|_| function.with_model(|_, bus| bus.send_msi(0)));
        }
        let meanwhile = probe.interrupt.as_ref().unwrap().last_interrupt().count;
        probe.note(format!("count {}, {meanwhile} meanwhile", event.count));
    };
    let source = IOInterruptDispatchSource::create(&bench.device, 0, &bench.queue, handler);
    let source = source.unwrap();
    source.set_enable(true).unwrap();
    bench.queue.dispatch_sync(|probe| probe.interrupt = Some(source)).unwrap();
    bench.message(0);
    assert_eq!(bench.settled(), ["count 1, 2 meanwhile", "count 2, 0 meanwhile"]);
}

#[test]
fn messages_while_disabled_arrive_as_one_call_when_enabled() {
    let bench = Bench::new();
    let source = bench.message_source();
    (0..3).for_each(|_| bench.message(0));
    source.set_enable(true).unwrap();
    assert_eq!(bench.settled(), ["count 3"]);
    source.set_enable(false).unwrap();
    (0..2).for_each(|_| bench.message(0));
    assert!(bench.settled().is_empty());
    source.set_enable(true).unwrap();
    assert_eq!(bench.settled(), ["count 2"]);
}

#[test]
fn a_line_that_is_asserted_while_disabled_interrupts_once_when_enabled() {
    let bench = Bench::new();
    bench.device.configure_interrupts(InterruptType::Level, 1, 1).unwrap();
    let function = bench.rig.function();
    let handler = move |probe: &mut Probe, event: InterruptEvent| {
        function.with_model(|_, bus| bus.deassert_intx());
        probe.note(format!("count {}", event.count));
    };
    let source = IOInterruptDispatchSource::create(&bench.device, 0, &bench.queue, handler);
    let source = source.unwrap();
    bench.bus(|bus| bus.assert_intx());
    assert!(bench.settled().is_empty());
    source.set_enable(true).unwrap();
    assert_eq!(bench.settled(), ["count 1"]);
}

#[test]
fn the_time_of_an_interrupt_is_on_the_clock_that_its_index_asks_for() {
    let function = Arc::new(iohost_device_models::Function::new(Board::default()));
    let fake = iohost_testkit::FakeDevice::new(function.clone());
    let host = Host::start(Engine::manual(EngineClock::Real).unwrap(), Arc::new(fake));
    host.device.configure_interrupts(InterruptType::Messaged, 2, 2).unwrap();
    for (index, clock) in [(0, Clock::Uptime), (1 | CONTINUOUS_TIME, Clock::Continuous)] {
        let handler = |_: &mut Probe, _: InterruptEvent| ();
        let source = IOInterruptDispatchSource::create(&host.device, index, &host.queue, handler);
        let source = source.unwrap();
        let before = clock.now();
        function.with_model(|_, bus| bus.send_msi((index & 0xffff) as u8));
        let time = source.last_interrupt().time;
        assert!((before..=clock.now()).contains(&time), "{clock:?}");
    }
}

#[test]
fn the_two_times_of_an_interrupt_differ_by_the_time_asleep() {
    let bench = Bench::new();
    bench.device.configure_interrupts(InterruptType::Messaged, 2, 2).unwrap();
    let sources = [0, 1 | CONTINUOUS_TIME].map(|index| bench.interrupt(index).unwrap());
    let times = || {
        (0..2).for_each(|vector| bench.message(vector));
        sources.each_ref().map(|source| source.last_interrupt().time)
    };
    let [uptime, continuous] = times();
    assert_eq!(uptime, continuous);
    bench.rig.suspend(Duration::from_secs(3600));
    assert_eq!(times(), [uptime, continuous + 3_600_000_000_000]);
}

#[test]
fn an_interrupt_handler_runs_on_the_queue_given_to_create() {
    let bench = Bench::new();
    let side = IODispatchQueue::create(&bench.queue, "side", bench.seen.clone()).unwrap();
    bench.device.configure_interrupts(InterruptType::Messaged, 1, 1).unwrap();
    let (own, default) = (side.clone(), bench.queue.clone());
    let handler = move |seen: &mut Seen, _| {
        seen.note(format!("side {}, default {}", own.on_queue(), default.on_queue()));
    };
    let source = IOInterruptDispatchSource::create(&bench.device, 0, &side, handler).unwrap();
    source.set_enable(true).unwrap();
    bench.message(0);
    assert_eq!(bench.settled(), ["side true, default false"]);
}

#[test]
fn a_configured_vector_is_the_index_of_its_number() {
    let bench = Bench::new();
    bench.device.configure_interrupts(InterruptType::Messaged, 4, 4).unwrap();
    let sources: Vec<_> = (0..4)
        .map(|index| {
            let handler = move |probe: &mut Probe, event: InterruptEvent| {
                probe.note(format!("{index}: {}", event.count));
            };
            IOInterruptDispatchSource::create(&bench.device, index, &bench.queue, handler).unwrap()
        })
        .collect();
    sources.iter().for_each(|source| source.set_enable(true).unwrap());
    for vector in [2, 0, 3] {
        bench.message(vector);
        assert_eq!(bench.settled(), [format!("{vector}: 1")]);
    }
}

#[test]
fn without_configuration_the_line_is_index_0_and_the_first_message_follows() {
    let bench = Bench::new();
    let kinds = |device| {
        (0..3).map(|index| IOInterruptDispatchSource::interrupt_type(device, index).ok()).collect()
    };
    let (level, message) = (Some(InterruptType::Level), Some(InterruptType::Messaged));
    let found: Vec<_> = kinds(&bench.device);
    assert_eq!(found, [level, message, None]);
    let without_line = Bench::on(Board { intx: false, ..Board::default() });
    let found: Vec<_> = kinds(&without_line.device);
    assert_eq!(found, [message, None, None]);
}

#[test]
fn a_message_source_without_configuration_works() {
    let bench = Bench::new();
    let source = bench.interrupt(1).unwrap();
    source.set_enable(true).unwrap();
    bench.message(0);
    assert_eq!(bench.settled(), ["count 1"]);
}

#[test]
fn more_messages_are_granted_as_far_as_the_device_has_them() {
    let count = |required, requested| {
        let bench = Bench::new();
        bench.device.configure_interrupts(InterruptType::Messaged, required, requested).unwrap();
        let kind = |index| IOInterruptDispatchSource::interrupt_type(&bench.device, index);
        (0..64).take_while(|index| kind(*index).is_ok()).count()
    };
    assert_eq!(count(1, 1), 1);
    assert_eq!(count(1, 2), 2);
    assert_eq!(count(1, 3), 4, "messages come in powers of two");
    assert_eq!(count(4, 64), 4);
    assert_eq!(count(1, u32::MAX), 4);
}

#[test]
fn numbers_of_interrupts_that_make_no_sense_are_a_bad_argument() {
    let bench = Bench::new();
    for (required, requested) in [(0, 0), (0, 1), (2, 1)] {
        let refused =
            bench.device.configure_interrupts(InterruptType::Messaged, required, requested);
        assert_eq!(code(refused), Some(IOReturn::BAD_ARGUMENT), "{required} {requested}");
    }
}

#[test]
fn more_required_interrupts_than_the_device_has_are_no_space_and_another_kind_can_be_tried() {
    let bench = Bench::new();
    let refused = bench.device.configure_interrupts(InterruptType::Messaged, 5, 8);
    assert_eq!(code(refused), Some(IOReturn::NO_SPACE));
    let line = bench.device.configure_interrupts(InterruptType::Level, 1, 1);
    assert_eq!(code(line), None);
}

#[test]
fn a_kind_of_interrupt_that_the_device_lacks_is_refused() {
    let neither = Bench::on(Board { intx: false, msi_vectors: 0, ..Board::default() });
    let asked = |bench: &Bench, kind| code(bench.device.configure_interrupts(kind, 1, 1));
    for kind in [InterruptType::Level, InterruptType::Messaged, InterruptType::MessagedX] {
        assert_eq!(asked(&neither, kind), Some(IOReturn::UNSUPPORTED), "{kind:?}");
    }
    // A device with the other kind of message only: the caller named the wrong one.
    let messages = Bench::new();
    assert_eq!(asked(&messages, InterruptType::MessagedX), Some(IOReturn::BAD_ARGUMENT));
}

#[test]
fn the_first_configuration_of_interrupts_stays() {
    let bench = Bench::new();
    let again = |kind, required, requested| {
        code(bench.device.configure_interrupts(kind, required, requested))
    };
    assert_eq!(again(InterruptType::Messaged, 1, 2), None);
    assert_eq!(again(InterruptType::Messaged, 2, 4), None, "what is there is enough");
    assert_eq!(again(InterruptType::Messaged, 3, 4), Some(IOReturn::UNSUPPORTED));
    assert_eq!(again(InterruptType::Level, 1, 1), Some(IOReturn::UNSUPPORTED));
}

#[test]
fn asking_for_an_interrupts_type_freezes_what_there_is() {
    let bench = Bench::on(Board { intx: false, ..Board::default() });
    IOInterruptDispatchSource::interrupt_type(&bench.device, 0).unwrap();
    let configure =
        |required| code(bench.device.configure_interrupts(InterruptType::Messaged, required, 4));
    assert_eq!(configure(2), Some(IOReturn::UNSUPPORTED), "one message was resolved");
    assert_eq!(configure(1), None);
    assert_eq!(code(bench.interrupt(1)), Some(IOReturn::NO_INTERRUPT));
}

#[test]
fn interrupts_configured_after_a_source_was_made_are_refused_and_the_source_works() {
    let bench = Bench::on(Board { intx: false, ..Board::default() });
    let source = bench.interrupt(0).unwrap();
    let late = bench.device.configure_interrupts(InterruptType::Messaged, 2, 4);
    assert_eq!(code(late), Some(IOReturn::UNSUPPORTED));
    assert_eq!(code(bench.interrupt(1)), Some(IOReturn::NO_INTERRUPT));
    source.set_enable(true).unwrap();
    bench.message(0);
    assert_eq!(bench.settled(), ["count 1"]);
}

#[test]
fn a_kind_that_the_host_does_not_allow_is_as_if_the_device_had_none() {
    let allowed = [InterruptKind::IntX];
    let function = Arc::new(iohost_device_models::Function::new(Board::default()));
    let backend = Arc::new(iohost_testkit::FakeDevice::new(function));
    let (device, _) = iohost_driver_host::Device::take_over(backend, allowed.to_vec()).unwrap();
    let host = Host::on_device(Engine::manual(EngineClock::Virtual).unwrap(), device);
    let messages = host.device.configure_interrupts(InterruptType::Messaged, 1, 1);
    assert_eq!(code(messages), Some(IOReturn::UNSUPPORTED));
    assert_eq!(code(host.device.configure_interrupts(InterruptType::Level, 1, 1)), None);
}
