//! `DeviceEventSource`, `ExpectedInterrupt`, and resets by kind.

use std::sync::Arc;
use std::time::Duration;

use iohost_device_backend::{DeviceEvent as Happens, Reset, ResetLevel};
use iohost_dispatch::{Engine, EngineClock};
use iohost_driver::prelude::*;
use iohost_driver::{DeviceEventSource, ExpectedInterrupt, ResetType};
use iohost_testkit::ResetEffect;

use crate::board::{BAR_SIZE, Board, Unusual};
use crate::probe::{Bench, Host, Probe};

mod regs {
    use iohost_driver::register_map;

    register_map! {
        /// The board's BAR.
        pub struct Memory[0x100] {
            0x00 Rw WORD: u32,
        }
    }
}

const _: () = assert!(BAR_SIZE == 0x100);

const BAR0: u64 = 0x10;
const INTERRUPT_LINE: u64 = 0x3c;

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
}

fn listening(bench: &Bench) -> DeviceEventSource {
    let handler = |probe: &mut Probe, event| probe.note(format!("{event:?}"));
    DeviceEventSource::create(&bench.device, &bench.queue, handler).unwrap()
}

#[test]
fn a_driver_that_listens_is_told_what_happens_to_its_device() {
    let bench = Bench::new();
    bench.rig.device_happens(Happens::Error);
    let source = listening(&bench);
    assert!(bench.settled().is_empty(), "what was before is not told");
    bench.rig.device_happens(Happens::Error);
    assert_eq!(bench.settled(), ["Error"]);
    bench.rig.device_happens(Happens::RemovalRequested);
    assert_eq!(bench.settled(), ["RemovalRequested"]);
    drop(source);
    bench.rig.device_happens(Happens::Error);
    assert!(bench.settled().is_empty());
}

#[test]
fn a_device_that_reads_as_ones_because_it_has_gone_is_told_of_once() {
    let bench = Bench::new();
    let _source = listening(&bench);
    let bar = bench.device.map_bar::<regs::Memory>(0).unwrap();
    // Ones that the device means are no news.
    bar.write(regs::WORD, u32::MAX);
    assert_eq!(bar.read(regs::WORD), u32::MAX);
    assert!(!bench.device.is_gone());
    assert!(bench.settled().is_empty());
    bench.rig.backend().set_lost(true);
    assert_eq!(bar.read(regs::WORD), u32::MAX);
    assert_eq!(bench.settled(), ["Gone"]);
    assert!(bench.device.is_gone());
    assert_eq!(bar.read(regs::WORD), u32::MAX);
    assert!(bench.settled().is_empty(), "once");
    let _late = listening(&bench);
    assert_eq!(bench.settled(), ["Gone"], "who asks late is told that");
}

#[test]
fn an_access_that_the_backend_says_found_nobody_is_news() {
    let backend = Arc::new(Unusual::new(Board::default()));
    let host = Host::start(Engine::manual(EngineClock::Virtual).unwrap(), backend.clone());
    let bar = host.device.map_bar::<regs::Memory>(0).unwrap();
    backend.gone.store(true, std::sync::atomic::Ordering::SeqCst);
    bar.write(regs::WORD, 1);
    let gone = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = gone.clone();
    let handler = move |_: &mut Probe, event| {
        assert_eq!(event, iohost_driver::DeviceEvent::Gone);
        seen.store(true, std::sync::atomic::Ordering::SeqCst);
    };
    let _source = DeviceEventSource::create(&host.device, &host.queue, handler).unwrap();
    host.engine.settle();
    assert!(gone.load(std::sync::atomic::Ordering::SeqCst));
}

#[test]
fn an_interrupt_that_does_not_come_in_time_is_missed_once_and_one_that_does_is_not() {
    let bench = Bench::new();
    let missed = |probe: &mut Probe| probe.note("missed");
    let expected = ExpectedInterrupt::create(&bench.queue, missed).unwrap();
    let within = Duration::from_millis(50);
    bench.rig.advance(within * 2);
    assert!(bench.settled().is_empty(), "nothing is expected yet");

    expected.expect_within(within).unwrap();
    bench.rig.advance(within / 2);
    assert!(bench.settled().is_empty(), "not late yet");
    bench.rig.advance(within);
    assert_eq!(bench.settled(), ["missed"]);
    bench.rig.advance(within * 2);
    assert!(bench.settled().is_empty(), "once");

    expected.expect_within(within).unwrap();
    bench.rig.advance(within / 2);
    expected.arrived().unwrap();
    bench.rig.advance(within * 2);
    assert!(bench.settled().is_empty(), "it came");
    // The old deadline is over, and does not fire when the next is set.
    expected.expect_within(within).unwrap();
    assert!(bench.settled().is_empty());
    bench.rig.advance(within * 2);
    assert_eq!(bench.settled(), ["missed"]);
    assert_eq!(code(expected.expect_within(Duration::MAX)), Some(IOReturn::OVERRUN));
}

#[test]
fn a_reset_leaves_configuration_space_as_it_was() {
    let bench = Bench::new();
    bench.device.configuration_write32(BAR0, 0xfeb0_0000);
    bench.device.configuration_write8(INTERRUPT_LINE, 11);
    bench.device.reset_by(ResetType::Function).unwrap();
    assert_eq!(bench.device.configuration_read32(BAR0), 0xfeb0_0000);
    assert_eq!(bench.device.configuration_read8(INTERRUPT_LINE), 11);
    assert_eq!(bench.device.configuration_read16(0x04) & 0x2, 0x2, "it decodes memory");
}

#[test]
fn a_reset_of_a_kind_that_the_device_lacks_is_unsupported() {
    let bench = Bench::new();
    assert_eq!(code(bench.device.reset_by(ResetType::Hot)), Some(IOReturn::UNSUPPORTED));
    let affected = vec![("0000:01:00.0".to_owned(), true)];
    let bus = Reset { level: ResetLevel::Bus, methods: Vec::new(), affected };
    bench.rig.backend().set_resets(vec![(bus, ResetEffect::Works)]);
    assert_eq!(code(bench.device.reset_by(ResetType::Hot)), None);
    assert_eq!(code(bench.device.reset_by(ResetType::Function)), Some(IOReturn::UNSUPPORTED));
}

#[test]
fn a_device_that_does_not_answer_after_a_reset_is_offline() {
    let bench = Bench::new();
    let _source = listening(&bench);
    bench.rig.backend().set_resets(vec![(Reset::of_function(), ResetEffect::Kills)]);
    assert_eq!(code(bench.device.reset()), Some(IOReturn::OFFLINE));
    assert_eq!(bench.settled(), ["Gone"]);
}
