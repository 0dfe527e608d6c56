//! What a device does wrong on purpose happens as often as it was asked for, and no more.

mod rig;

use std::os::fd::AsFd;

use iohost_device_models::edu::Timing;
use iohost_device_models::{DmaMemory, Fault, FunctionError, InterruptKind};
use rig::*;

#[test]
fn reads_are_wrong_as_often_as_they_were_to_be() {
    let rig = rig(Timing::Immediate);
    let cases = [
        (Fault::ReadsOnes, u32::MAX),
        (Fault::ReadsStale, 120),
        (Fault::ReadsInverted(4), 0x0100_00fd),
    ];
    for (fault, wrong) in cases {
        rig.write(FACTORIAL, 5);
        assert_eq!(rig.read(FACTORIAL), 120);
        rig.function.fail_next(fault, 1);
        assert_eq!(rig.read(ID), wrong, "{fault:?}");
        assert_eq!(rig.read(ID), 0x0100_00ed, "{fault:?} was to happen once");
    }
    assert_eq!(rig.function.faults(), 3);
}

#[test]
fn a_write_that_is_lost_changes_nothing() {
    let rig = rig(Timing::Immediate);
    rig.write(LIVENESS, 0);
    rig.function.fail_next(Fault::LosesWrite, 2);
    rig.write(LIVENESS, 1);
    rig.write(LIVENESS, 1);
    assert_eq!(rig.read(LIVENESS), u32::MAX);
    rig.write(LIVENESS, 1);
    assert_eq!(rig.read(LIVENESS), !1);
}

#[test]
fn interrupts_are_lost_and_repeated_and_come_without_cause() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::Msi);
    for (fault, sent) in
        [(Fault::LosesInterrupt, 0), (Fault::RepeatsInterrupt(3), 3), (Fault::LosesWrite, 0)]
    {
        rig.function.fail_next(fault, 1);
        rig.write(RAISE, 1);
        assert_eq!(count(&event), sent, "{fault:?}");
    }
    rig.write(RAISE, 1);
    assert_eq!(count(&event), 1);
    rig.function.interrupt_without_cause(0);
    assert_eq!(count(&event), 1);
}

#[test]
fn the_line_is_lost_once_and_comes_without_cause() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::IntX);
    rig.function.fail_next(Fault::LosesInterrupt, 1);
    rig.write(RAISE, 1);
    assert_eq!(count(&event), 0);
    rig.function.interrupt_without_cause(0);
    assert_eq!(count(&event), 1);
    rig.function.unmask_intx();
    assert_eq!(count(&event), 0, "the line was let go of");
}

#[test]
fn transfers_are_lost_cut_short_and_stray() {
    let rig = rig(Timing::Immediate);
    rig.memory.write_at(0, &[7; 8]);
    let round_trip = |fault: Option<Fault>| {
        rig.memory.write_at(64, &[1; 8]);
        rig.dma(IOVA, BUFFER, 8, TO_DEVICE);
        if let Some(fault) = fault {
            rig.function.fail_next(fault, 1);
        }
        rig.dma(BUFFER, IOVA + 64, 8, TO_MEMORY);
        rig.memory_at(64, 8)
    };
    assert_eq!(round_trip(None), [7; 8]);
    assert_eq!(round_trip(Some(Fault::LosesDma)), [1; 8]);
    assert_eq!(round_trip(Some(Fault::ShortensDma)), [7, 7, 7, 7, 1, 1, 1, 1]);
    assert_eq!(rig.function.blocked_dma(), 0);
    assert_eq!(round_trip(Some(Fault::StraysDma)), [1; 8]);
    assert_eq!(rig.function.blocked_dma(), 1);
    // What is read by a transfer that is lost are zeros.
    rig.function.fail_next(Fault::LosesDma, 1);
    rig.dma(IOVA, BUFFER, 8, TO_DEVICE);
    rig.dma(BUFFER, IOVA + 64, 8, TO_MEMORY);
    assert_eq!(rig.memory_at(64, 8), [0; 8]);
}

#[test]
fn mappings_and_triggers_are_refused_as_often_as_they_were_to_be_and_nothing_is_taken_away() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::Msi);
    let map = || rig.function.dma_map(2 * IOVA, DmaMemory::try_from(&rig.memory).unwrap());
    rig.function.fail_next(Fault::RefusesSetUp, 2);
    assert!(matches!(map(), Err(FunctionError::OnPurpose)));
    let refused = rig.function.set_irqs(InterruptKind::Msi, &[event.as_fd()]);
    assert!(matches!(refused, Err(FunctionError::OnPurpose)));
    map().unwrap();
    rig.write(RAISE, 1);
    assert_eq!(count(&event), 1, "as it was set before");
    // What takes away always works.
    rig.function.fail_next(Fault::RefusesSetUp, 1);
    rig.function.set_irqs(InterruptKind::Msi, &[]).unwrap();
    rig.function.dma_unmap(2 * IOVA, 0x2000).unwrap();
    assert_eq!(rig.function.faults(), 2);
}

#[test]
fn a_device_that_is_healed_does_nothing_wrong() {
    let rig = rig(Timing::Immediate);
    Fault::KINDS.into_iter().for_each(|fault| rig.function.fail_next(fault, u32::MAX));
    rig.function.reset();
    assert_ne!(rig.read(ID), 0x0100_00ed, "a reset heals nothing");
    rig.function.heal();
    assert_eq!(rig.read(ID), 0x0100_00ed);
}
