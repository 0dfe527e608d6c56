//! `IOInterruptDispatchSource` from an eventfd, and which interrupts a device can be asked for. The
//! rules of sources from devices are those of `iohost_interrupt_tests`.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use iohost_device_backend::InterruptKind;
use iohost_dispatch::{Engine, EngineClock, Signal};
use iohost_driver::EventfdInterrupt;
use iohost_driver::prelude::*;

use crate::board::Board;
use crate::probe::{Bench, Host, Probe};

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
}

/// An eventfd that a driver owns, and a test raises.
fn eventfd() -> (Signal, OwnedFd) {
    let signal = Signal::new().unwrap();
    let copy = signal.as_fd().try_clone_to_owned().unwrap();
    (signal, copy)
}

fn from_eventfd(
    bench: &Bench,
    interrupt: EventfdInterrupt,
    flags: u32,
) -> Result<IOInterruptDispatchSource> {
    let handler = |probe: &mut Probe, event: InterruptEvent| {
        probe.note(format!("count {}", event.count));
    };
    IOInterruptDispatchSource::create_from_eventfd(interrupt, flags, &bench.queue, handler)
}

#[test]
fn an_eventfd_is_a_source_of_interrupts_as_a_device_is() {
    let bench = Bench::new();
    let (signal, copy) = eventfd();
    let source = from_eventfd(&bench, EventfdInterrupt::edge(copy), 0).unwrap();
    signal.raise();
    signal.raise();
    assert!(bench.settled().is_empty(), "it starts disabled");
    assert_eq!(source.last_interrupt().count, 2);
    source.set_enable(true).unwrap();
    assert_eq!(bench.settled(), ["count 2"]);
    signal.raise();
    assert_eq!(source.check_for_work(), Ok(()));
    assert_eq!(bench.settled(), ["count 1"]);
    signal.raise();
    source.cancel(&bench.queue, |probe| probe.note("cancelled"));
    assert_eq!(bench.settled(), ["cancelled"]);
}

#[test]
fn an_eventfd_of_a_level_line_is_unmasked_after_the_handler_and_not_while_disabled() {
    let bench = Bench::new();
    let ((signal, copy), (unmask, unmask_copy)) = (eventfd(), eventfd());
    let unmask = Arc::new(unmask);
    let seen_by_handler = unmask.clone();
    let handler = move |probe: &mut Probe, event: InterruptEvent| {
        let unmasked = seen_by_handler.take();
        probe.note(format!("count {}, unmasked {unmasked}", event.count));
    };
    let line = EventfdInterrupt::level(copy, unmask_copy);
    let source = IOInterruptDispatchSource::create_from_eventfd(line, 0, &bench.queue, handler);
    let source = source.unwrap();
    signal.raise();
    assert!(bench.settled().is_empty());
    assert_eq!(unmask.take(), 0, "disabled");
    source.set_enable(true).unwrap();
    assert_eq!(bench.settled(), ["count 1, unmasked 0"]);
    assert_eq!(unmask.take(), 1);
}

#[test]
fn the_two_times_of_an_interrupt_differ_by_the_time_asleep() {
    let bench = Bench::new();
    bench.device.configure_interrupts(InterruptType::Messaged, 2, 2).unwrap();
    let sources = [0, 1 | IOInterruptDispatchSource::CONTINUOUS_TIME]
        .map(|index| bench.interrupt(index).unwrap());
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
fn what_is_no_eventfd_and_flags_that_do_not_exist_are_a_bad_argument() {
    let bench = Bench::new();
    let null = || std::fs::File::open("/dev/null").unwrap();
    let refused = |interrupt, flags| code(from_eventfd(&bench, interrupt, flags));
    let bad = Some(IOReturn::BAD_ARGUMENT);
    assert_eq!(refused(EventfdInterrupt::edge(null()), 0), bad);
    assert_eq!(refused(EventfdInterrupt::level(eventfd().1, null()), 0), bad);
    assert_eq!(refused(EventfdInterrupt::edge(eventfd().1), 1), bad, "an index is no flag");
    let continuous = IOInterruptDispatchSource::CONTINUOUS_TIME;
    assert_eq!(refused(EventfdInterrupt::edge(eventfd().1), continuous), None);
}

#[test]
fn without_configuration_and_a_line_the_first_message_is_index_0() {
    let bench = Bench::on(Board { intx: false, ..Board::default() });
    let kind = |index| IOInterruptDispatchSource::interrupt_type(&bench.device, index).ok();
    assert_eq!([0, 1].map(kind), [Some(InterruptType::Messaged), None]);
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
