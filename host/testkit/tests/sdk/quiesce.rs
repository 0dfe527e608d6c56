//! What is done to a device between one driver and the next, on devices that lie.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use iohost_device_backend::quiesce::{Outcome, Quiesced, SavedBars, quiesce};
use iohost_device_backend::{DeviceBackend, DeviceError, InterruptKind, Reset, ResetLevel};
use iohost_device_models::Function;
use iohost_dispatch::Signal;
use iohost_driver_host::Device;
use iohost_testkit::{FakeDevice, ResetEffect};

use crate::board::{Board, Unusual};
use crate::probe::ANY;

const COMMAND: u16 = 0x04;
const MEMORY_AND_MASTER: u16 = 0x0006;
const BAR0: u16 = 0x10;

fn fake() -> (FakeDevice<Board>, Arc<Function<Board>>) {
    let function = Arc::new(Function::new(Board::default()));
    (FakeDevice::new(function.clone()), function)
}

/// What becomes of a device that its driver has left in the middle of its work.
fn after_work(device: &dyn DeviceBackend) -> Quiesced {
    let saved = SavedBars::of(device).unwrap();
    device.config_write(COMMAND, &MEMORY_AND_MASTER.to_le_bytes()).unwrap();
    quiesce(device, &saved)
}

fn bus(others: &[(&str, bool)]) -> Reset {
    let affected = others.iter().map(|(address, is_ours)| ((*address).to_owned(), *is_ours));
    Reset { level: ResetLevel::Bus, methods: vec!["hot".to_owned()], affected: affected.collect() }
}

fn command(device: &dyn DeviceBackend) -> u16 {
    let mut word = [0; 2];
    device.config_read(COMMAND, &mut word).unwrap();
    u16::from_le_bytes(word)
}

#[test]
fn a_device_in_the_middle_of_its_work_is_disarmed_stopped_and_reset() {
    let (device, function) = fake();
    let trigger = Signal::new().unwrap();
    device.enable_interrupts(InterruptKind::Msi, &[trigger.as_fd()]).unwrap();
    let Quiesced { outcome, how, found, left } = after_work(&device);
    assert_eq!((outcome, how.as_str()), (Outcome::Reset, "function reset"));
    assert!(found.contains("(memory, bus master") && found.contains("MSI on"), "{found}");
    assert!(left.starts_with("command 0x") && !left.contains("memory"), "{left}");
    assert!(!left.contains("bus master") && !left.contains("MSI on"), "{left}");
    assert_eq!(command(&device) & MEMORY_AND_MASTER, 0);
    device.config_write(COMMAND, &MEMORY_AND_MASTER.to_le_bytes()).unwrap();
    function.with_model(|_, bus| bus.send_msi(0));
    assert_eq!(trigger.take(), 0, "it interrupts still");
    assert_eq!(function.with_model(|board, _| board.resets), 1);
}

#[test]
fn a_device_without_a_reset_is_stopped_and_clean() {
    let (device, function) = fake();
    device.set_resets(Vec::new());
    let trigger = Signal::new().unwrap();
    device.enable_interrupts(InterruptKind::Msi, &[trigger.as_fd()]).unwrap();
    let Quiesced { outcome, how, .. } = after_work(&device);
    assert_eq!((outcome, how.as_str()), (Outcome::Clean, "it has no reset"));
    assert_eq!(command(&device) & MEMORY_AND_MASTER, 0);
    device.config_write(COMMAND, &MEMORY_AND_MASTER.to_le_bytes()).unwrap();
    function.with_model(|_, bus| bus.send_msi(0));
    assert_eq!(trigger.take(), 0, "it interrupts still");
}

#[test]
fn a_reset_that_fails_is_followed_by_the_next_one() {
    for first in [ResetEffect::Fails, ResetEffect::Kills] {
        let (device, _) = fake();
        let siblings = bus(&[("0000:01:00.0", true), ("0000:01:00.1", true)]);
        device.set_resets(vec![(Reset::of_function(), first), (siblings, ResetEffect::Works)]);
        let Quiesced { outcome, how, .. } = after_work(&device);
        assert_eq!(outcome, Outcome::Reset, "{first:?}: {how}");
        assert_eq!(how, "bus reset (hot) with 0000:01:00.0, 0000:01:00.1");
    }
}

#[test]
fn a_reset_that_would_reset_devices_of_others_is_never_made() {
    let others = || bus(&[("0000:01:00.0", true), ("0000:01:00.1", false)]);
    // The fake panics when it is asked for that one.
    let (device, _) = fake();
    device.set_resets(vec![(others(), ResetEffect::Works)]);
    let Quiesced { outcome, how, .. } = after_work(&device);
    assert_eq!(outcome, Outcome::Clean);
    assert!(how.contains("would reset 0000:01:00.1"), "{how}");

    let (device, _) = fake();
    let function = (Reset::of_function(), ResetEffect::Fails);
    device.set_resets(vec![function, (others(), ResetEffect::Works)]);
    let Quiesced { outcome, how, .. } = after_work(&device);
    assert_eq!(outcome, Outcome::Quarantined);
    assert!(how.contains("its reset failed: function reset"), "{how}");
}

#[test]
fn a_device_that_does_not_answer_after_its_reset_is_quarantined() {
    let (device, _) = fake();
    device.set_resets(vec![(Reset::of_function(), ResetEffect::Kills)]);
    let Quiesced { outcome, how, left, .. } = after_work(&device);
    assert_eq!(outcome, Outcome::Quarantined);
    assert!(how.contains("does not answer"), "{how}");
    assert_eq!(left, "all ones: it does not answer");
}

#[test]
fn base_addresses_that_a_driver_changed_are_restored() {
    let (device, _) = fake();
    device.config_write(BAR0, &0xfeb0_0000_u32.to_le_bytes()).unwrap();
    let saved = SavedBars::of(&device).unwrap();
    device.config_write(BAR0, &0xdead_0000_u32.to_le_bytes()).unwrap();
    assert_eq!(quiesce(&device, &saved).outcome, Outcome::Reset);
    assert_eq!(SavedBars::of(&device).unwrap(), saved);
    device.set_resets(Vec::new());
    device.config_write(BAR0, &0xdead_0000_u32.to_le_bytes()).unwrap();
    assert_eq!(quiesce(&device, &saved).outcome, Outcome::Clean);
    assert_eq!(SavedBars::of(&device).unwrap(), saved);
}

/// A device with pending transactions, so many times as it is asked.
fn pending(times: u32, no_reset: bool) -> Quiesced {
    let mut device = Unusual::new(Board::default());
    device.pending = Some(AtomicU32::new(times));
    device.no_reset = no_reset;
    after_work(&device)
}

#[test]
fn pending_transactions_are_waited_for_and_those_that_never_end_need_a_reset() {
    assert_eq!(pending(3, true).outcome, Outcome::Clean);
    assert_eq!(pending(u32::MAX, false).outcome, Outcome::Reset);
    let Quiesced { outcome, how, .. } = pending(u32::MAX, true);
    assert_eq!(outcome, Outcome::Quarantined);
    assert!(how.contains("transactions pending after 1s"), "{how}");
}

#[test]
fn a_device_that_is_not_there_is_not_taken_over() {
    let (device, _) = fake();
    device.set_lost(true);
    device.set_resets(Vec::new());
    let err = Device::take_over(Arc::new(device), ANY.to_vec()).unwrap_err();
    assert!(matches!(err, DeviceError::Quarantined(_)), "{err}");
}
