//! The known differences from QEMU's `edu`, by the numbers they have in the documentation of
//! `iohost_device_models::edu`. When one of these tests has to change, so has that list.

mod rig;

use iohost_device_models::InterruptKind;
use iohost_device_models::edu::Timing;
use rig::*;
use std::time::Duration;

#[test]
fn difference_1_a_transfer_that_leaves_the_buffer_moves_nothing_and_completes() {
    let rig = rig(Timing::Immediate);
    rig.memory.write_at(0, &[0xaa; 0x2000]);
    let cases = [
        (BUFFER - 1, 4),
        (BUFFER + 4093, 4),
        (BUFFER + 4096, 1),
        (BUFFER, 4097),
        (BUFFER, u64::MAX),
        (u64::MAX, 2),
        (0, 4),
    ];
    for (address, count) in cases {
        rig.dma(IOVA, address, count, TO_DEVICE | INTERRUPT);
        assert_eq!(rig.read(DMA_COMMAND), 0b100, "{count} bytes at {address:#x}");
        assert_eq!(rig.read(CAUSES), 0x100);
        rig.write(ACKNOWLEDGE, 0x100);
        rig.dma(address, IOVA, count, TO_MEMORY);
    }
    let rejected = rig.function.with_model(|edu, _| edu.rejected_transfers());
    assert_eq!(rejected, 2 * cases.len() as u64);
    assert_eq!(rig.memory_at(0, 0x2000), [0xaa; 0x2000]);
    rig.dma(BUFFER, IOVA, 4096, TO_MEMORY);
    assert_eq!(rig.memory_at(0, 4096), [0; 4096], "the buffer is untouched");
    assert_eq!(rig.function.blocked_dma(), 0, "no fault of the memory's");
}

#[test]
fn difference_2_the_whole_buffer_can_be_transferred() {
    let rig = rig(Timing::Immediate);
    rig.memory.write_at(0, &[0x33; 4096]);
    rig.dma(IOVA, BUFFER, 4096, TO_DEVICE);
    rig.dma(BUFFER, IOVA + 4096, 4096, TO_MEMORY);
    assert_eq!(rig.memory_at(4096, 4096), [0x33; 4096]);
}

#[test]
fn difference_3_the_largest_factorial_takes_no_time() {
    // Four billion multiplications under the lock would make this test stand out.
    let rig = rig(Timing::Immediate);
    rig.write(FACTORIAL, u32::MAX);
    assert_eq!(rig.read(FACTORIAL), 0);
}

#[test]
fn difference_4_without_latency_the_interrupt_is_there_before_the_write_returns() {
    for timing in [Timing::Immediate, Timing::Real { dma: Duration::ZERO }] {
        let rig = rig(timing);
        let event = rig.enable(InterruptKind::Msi);
        rig.dma(IOVA, BUFFER, 4, TO_DEVICE | INTERRUPT);
        assert_eq!(count(&event), 1, "{timing:?}");
    }
}

#[test]
fn difference_5_the_mask_has_28_bits() {
    let rig = rig(Timing::Immediate);
    rig.memory.write_at(0, b"low");
    rig.dma((1 << 28) | IOVA, BUFFER, 3, TO_DEVICE);
    rig.dma(BUFFER, IOVA + 16, 3, TO_MEMORY);
    assert_eq!(rig.memory_at(16, 3), b"low");
}

#[test]
fn difference_6_a_transfer_takes_the_memory_as_it_is_at_its_end() {
    let rig = rig(Timing::Manual);
    rig.memory.write_at(0, b"before");
    rig.dma(IOVA, BUFFER, 6, TO_DEVICE);
    rig.memory.write_at(0, b"later!");
    rig.finish();
    rig.dma(BUFFER, IOVA + 16, 6, TO_MEMORY);
    rig.finish();
    assert_eq!(rig.memory_at(16, 6), b"later!");
}

#[test]
fn difference_7_1_the_bar_answers_while_memory_decoding_is_off() {
    let rig = rig(Timing::Immediate);
    rig.set_command(0);
    assert_eq!(rig.read(ID), 0x0100_00ed);
}

#[test]
fn difference_7_2_a_reset_leaves_the_command_register_and_the_bar_at_power_on() {
    let rig = rig(Timing::Immediate);
    rig.function.config_write(0x10, &[0, 0, 0xf0, 0xfe]).unwrap();
    rig.function.reset();
    assert_eq!([rig.config(COMMAND), rig.config(0x10), rig.config(0x12)], [0, 0, 0]);
}

#[test]
fn difference_7_3_dma_is_checked_to_the_byte() {
    let rig = rig(Timing::Immediate);
    let memory = iohost_memory::SharedMemory::create(c"odd", 100).unwrap();
    rig.function.dma_map(0x50_0000, (&memory).try_into().unwrap()).unwrap();
    rig.dma(0x50_0000, BUFFER, 100, TO_DEVICE);
    assert_eq!(rig.function.blocked_dma(), 0);
    rig.dma(0x50_0000, BUFFER, 101, TO_DEVICE);
    assert_eq!(rig.function.blocked_dma(), 1);
}
