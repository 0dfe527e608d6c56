//! The `edu` device in this process: what QEMU's does, this does.

mod rig;

use iohost_device_models::edu::Timing;
use iohost_device_models::{Function, FunctionError, InterruptKind};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rig::*;
use std::time::Duration;

#[test]
fn configuration_space_names_qemus_device() {
    let rig = rig(Timing::Immediate);
    assert_eq!([rig.config(0x00), rig.config(0x02)], [0x1234, 0x11e8]);
    assert_eq!([rig.config(0x08), rig.config(0x0a)], [0x0010, 0x00ff]);
    assert_eq!([rig.config(0x2c), rig.config(0x2e)], [0x1af4, 0x1100]);
    assert_eq!(rig.config(0x3c), 0x0100, "interrupt pin A");
    assert_eq!(rig.config(CONFIG_STATUS), 0x0010, "a capability list");
    assert_eq!(rig.config(0x34), 0x40);
    assert_eq!(
        [rig.config(0x40), rig.config(MSI_CONTROL)],
        [0x0005, 0x0080],
        "64-bit MSI, 1 vector"
    );
}

#[test]
fn the_bar_tells_its_size_and_read_only_bits_stay() {
    let rig = rig(Timing::Immediate);
    for offset in (0..256).step_by(4) {
        rig.function.config_write(offset, &[0xff; 4]).unwrap();
    }
    assert_eq!([rig.config(0x10), rig.config(0x12)], [0x0000, 0xfff0], "1 MiB of memory");
    assert_eq!([rig.config(0x14), rig.config(0x16)], [0, 0], "no second BAR");
    assert_eq!([rig.config(0x00), rig.config(0x02)], [0x1234, 0x11e8]);
    assert_eq!(rig.config(COMMAND), 0x0507);
    assert_eq!(rig.config(0x3c), 0x01ff);
}

#[test]
fn identification_and_liveness_answer() {
    let rig = rig(Timing::Immediate);
    assert_eq!(rig.read(ID), 0x0100_00ed);
    rig.write(ID, 0);
    assert_eq!(rig.read(ID), 0x0100_00ed);
    rig.write(LIVENESS, 0x1234_5678);
    assert_eq!(rig.read(LIVENESS), 0xedcb_a987);
}

#[test]
fn factorials_are_right_modulo_two_to_the_32() {
    let rig = rig(Timing::Immediate);
    let cases =
        [(0, 1), (1, 1), (5, 120), (12, 479_001_600), (13, 1_932_053_504), (33, 0x8000_0000)];
    for (operand, result) in cases {
        rig.write(FACTORIAL, operand);
        assert_eq!(rig.read(FACTORIAL), result, "{operand}!");
    }
}

#[test]
fn a_factorial_shows_as_computing_until_it_is_done_and_takes_no_other_operand() {
    let rig = rig(Timing::Manual);
    rig.write(FACTORIAL, 5);
    assert_eq!(rig.read(STATUS), 0x01);
    rig.write(FACTORIAL, 6);
    assert_eq!(rig.read(FACTORIAL), 5, "the operand, until it is done");
    rig.finish();
    assert_eq!(rig.read(STATUS), 0x00);
    assert_eq!(rig.read(FACTORIAL), 120);
}

#[test]
fn a_factorial_interrupts_only_when_asked_to() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::Msi);
    rig.write(FACTORIAL, 5);
    assert_eq!((count(&event), rig.read(CAUSES)), (0, 0));
    rig.write(STATUS, 0xffff_ffff);
    assert_eq!(rig.read(STATUS), 0x80, "the other bits are not ours");
    rig.write(FACTORIAL, 5);
    assert_eq!((count(&event), rig.read(CAUSES)), (1, 0x001));
}

#[test]
fn asking_for_the_interrupt_while_it_computes_is_in_time() {
    let rig = rig(Timing::Manual);
    let event = rig.enable(InterruptKind::Msi);
    rig.write(FACTORIAL, 5);
    rig.write(STATUS, 0x80);
    assert_eq!(rig.read(STATUS), 0x81);
    rig.finish();
    assert_eq!(count(&event), 1);
}

#[test]
fn dma_moves_bytes_both_ways_and_interrupts() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::Msi);
    rig.memory.write_at(0, b"round trip");
    rig.dma(IOVA, BUFFER + 16, 10, TO_DEVICE | INTERRUPT);
    assert_eq!((count(&event), rig.read(CAUSES)), (1, 0x100));
    rig.write(ACKNOWLEDGE, 0x100);
    rig.dma(BUFFER + 16, IOVA + 0x1800, 10, TO_MEMORY);
    assert_eq!(rig.memory_at(0x1800, 10), b"round trip");
    assert_eq!((count(&event), rig.read(CAUSES)), (0, 0), "no interrupt was asked for");
    assert_eq!(rig.function.blocked_dma(), 0);
}

#[test]
fn dma_registers_do_not_change_while_a_transfer_runs() {
    let rig = rig(Timing::Manual);
    rig.memory.write_at(0, b"first");
    rig.dma(IOVA, BUFFER, 5, TO_DEVICE);
    assert_eq!(rig.read(DMA_COMMAND), 0b001, "running");
    rig.dma(1, 2, 3, TO_MEMORY);
    let registers = [DMA_SOURCE, DMA_DESTINATION, DMA_COUNT, DMA_COMMAND];
    assert_eq!(registers.map(|at| rig.read_long(at)), [IOVA, BUFFER, 5, TO_DEVICE]);
    rig.finish();
    assert_eq!(rig.read(DMA_COMMAND), 0b000, "done");
}

#[test]
fn a_command_without_its_start_bit_is_ignored() {
    let rig = rig(Timing::Immediate);
    rig.write_long(DMA_COMMAND, 0b110);
    assert_eq!(rig.read_long(DMA_COMMAND), 0);
}

#[test]
fn dma_addresses_are_cut_to_28_bits() {
    let rig = rig(Timing::Immediate);
    rig.memory.write_at(0, b"cut");
    rig.dma(0xabc_f000_0000 | IOVA, BUFFER, 3, TO_DEVICE);
    rig.dma(BUFFER, 0x7000_0000 | IOVA | 8, 3, TO_MEMORY);
    assert_eq!(rig.memory_at(8, 3), b"cut");
    assert_eq!(rig.function.blocked_dma(), 0);
}

#[test]
fn dma_without_bus_master_is_blocked_and_completes_as_usual() {
    let rig = rig(Timing::Immediate);
    rig.memory.write_at(0, b"secret");
    rig.dma(IOVA, BUFFER, 6, TO_DEVICE);
    rig.set_command(0);
    rig.dma(IOVA, BUFFER, 3, TO_DEVICE | INTERRUPT);
    assert_eq!(rig.read(DMA_COMMAND), 0b100);
    assert_eq!(rig.read(CAUSES), 0x100);
    rig.dma(BUFFER, IOVA + 100, 6, TO_MEMORY);
    assert_eq!(rig.memory_at(100, 6), [0; 6], "the write was dropped");
    assert_eq!(rig.function.blocked_dma(), 2);

    rig.set_command(BUS_MASTER);
    rig.dma(BUFFER, IOVA + 100, 6, TO_MEMORY);
    assert_eq!(rig.memory_at(100, 6), b"\0\0\0ret", "the blocked read gave zeros");
}

#[test]
fn dma_outside_all_mappings_reads_zeros_drops_writes_and_is_counted() {
    let rig = rig(Timing::Immediate);
    rig.memory.write_at(0, &[0xee; 0x2000]);
    rig.dma(IOVA, BUFFER, 0x1000, TO_DEVICE);
    rig.dma(IOVA + 0x2000, BUFFER, 8, TO_DEVICE);
    assert_eq!(rig.function.blocked_dma(), 1);
    rig.dma(BUFFER, 0, 16, TO_MEMORY);
    assert_eq!(rig.function.blocked_dma(), 2);
    rig.dma(BUFFER, IOVA, 16, TO_MEMORY);
    assert_eq!(rig.memory_at(0, 16), [[0; 8], [0xee; 8]].concat());
}

#[test]
fn a_transfer_half_outside_moves_the_half_inside() {
    let rig = rig(Timing::Immediate);
    rig.memory.write_at(0, &[1, 2, 3, 4]);
    rig.memory.write_at(0x1ffc, &[5, 6, 7, 8]);
    rig.dma(IOVA - 4, BUFFER, 8, TO_DEVICE);
    rig.dma(IOVA + 0x1ffc, BUFFER + 8, 8, TO_DEVICE);
    rig.dma(BUFFER, IOVA + 0x100, 16, TO_MEMORY);
    assert_eq!(rig.memory_at(0x100, 16), [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]);
    assert_eq!(rig.function.blocked_dma(), 2);
}

#[test]
fn a_transfer_crosses_from_one_mapping_into_the_next() {
    let rig = rig(Timing::Immediate);
    let next = iohost_memory::SharedMemory::create(c"next", 0x1000).unwrap();
    rig.function.dma_map(IOVA + 0x2000, (&next).try_into().unwrap()).unwrap();
    rig.memory.write_at(0x1ffe, b"ab");
    next.write_at(0, b"cd");
    rig.dma(IOVA + 0x1ffe, BUFFER, 4, TO_DEVICE);
    rig.dma(BUFFER, IOVA, 4, TO_MEMORY);
    assert_eq!(rig.memory_at(0, 4), b"abcd");
    assert_eq!(rig.function.blocked_dma(), 0);
}

#[test]
fn memory_taken_back_is_out_of_reach() {
    let rig = rig(Timing::Immediate);
    rig.function.dma_unmap(IOVA, 0x2000).unwrap();
    rig.dma(BUFFER, IOVA, 4, TO_MEMORY);
    assert_eq!(rig.function.blocked_dma(), 1);
}

#[test]
fn mappings_that_overlap_or_are_not_there_are_refused() {
    let rig = rig(Timing::Immediate);
    for iova in [IOVA - 0x1000, IOVA, IOVA + 0x1fff] {
        let err = rig.function.dma_map(iova, (&rig.memory).try_into().unwrap()).unwrap_err();
        assert!(err.to_string().contains("overlap"), "{err}");
    }
    let err = rig.function.dma_map(u64::MAX - 0xfff, (&rig.memory).try_into().unwrap());
    assert!(err.unwrap_err().to_string().contains("no range"));
    for (iova, len) in [(IOVA, 0x1000), (IOVA + 0x1000, 0x1000), (0, 0x2000)] {
        let err = rig.function.dma_unmap(iova, len).unwrap_err();
        assert!(err.to_string().contains("no mapping"), "{err}");
    }
}

#[test]
fn narrow_and_unaligned_accesses_read_zeros_and_write_nothing() {
    let rig = rig(Timing::Immediate);
    rig.write(LIVENESS, 0);
    for (offset, len) in [(4, 1), (4, 2), (5, 4), (6, 4), (0x80, 1), (0x82, 2), (0x84, 8)] {
        let mut data = vec![0x55; len];
        rig.function.bar_read(0, offset, &mut data).unwrap();
        assert_eq!(data, vec![0; len], "{len} bytes at {offset:#x}");
        rig.function.bar_write(0, offset, &vec![0x55; len]).unwrap();
    }
    assert_eq!(rig.read(LIVENESS), 0xffff_ffff);
    assert_eq!(rig.read_long(DMA_SOURCE), 0);
}

#[test]
fn eight_bytes_below_0x80_read_ones_and_write_nothing() {
    let rig = rig(Timing::Immediate);
    assert_eq!(rig.read_long(ID), u64::MAX);
    rig.write_long(FACTORIAL, 5);
    assert_eq!(rig.read(FACTORIAL), 0);
}

#[test]
fn a_read_where_no_register_is_gives_ones() {
    let rig = rig(Timing::Immediate);
    for offset in [0x0c, RAISE, ACKNOWLEDGE, 0xa0, BUFFER, 0xf_fffc] {
        assert_eq!(rig.read(offset), u32::MAX, "{offset:#x}");
    }
}

#[test]
fn dma_registers_take_four_bytes_and_eight() {
    let rig = rig(Timing::Immediate);
    rig.write_long(DMA_SOURCE, 0x1_2345_6789);
    assert_eq!(rig.read_long(DMA_SOURCE), 0x1_2345_6789);
    assert_eq!(rig.read(DMA_SOURCE), 0x2345_6789);
    rig.write(DMA_SOURCE, 0x10);
    assert_eq!(rig.read_long(DMA_SOURCE), 0x10, "the upper half is cleared");
}

#[test]
fn accesses_outside_the_bar_and_configuration_space_are_errors() {
    let rig = rig(Timing::Immediate);
    for (offset, len) in [(0x10_0000, 4), (0xf_fffe, 4), (u64::MAX, 4)] {
        let err = rig.function.bar_read(0, offset, &mut vec![0; len]).unwrap_err();
        assert!(matches!(err, FunctionError::Range { .. }), "{err}");
    }
    let err = rig.function.bar_write(1, 0, &[0; 4]).unwrap_err();
    assert!(matches!(err, FunctionError::NoSuchBar { index: 1 }), "{err}");
    let err = rig.function.config_read(0xff, &mut [0; 2]).unwrap_err();
    assert!(matches!(err, FunctionError::Range { .. }), "{err}");
}

#[test]
fn intx_stays_masked_after_an_interrupt_and_fires_again_at_the_unmask_while_asserted() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::IntX);
    rig.write(RAISE, 0b01);
    rig.write(RAISE, 0b10);
    assert_eq!(count(&event), 1, "masked by the first");
    rig.function.unmask_intx();
    assert_eq!(count(&event), 1, "still asserted");
    rig.write(ACKNOWLEDGE, 0b01);
    rig.function.unmask_intx();
    assert_eq!(count(&event), 1, "one cause is left");
    rig.write(ACKNOWLEDGE, 0b10);
    rig.function.unmask_intx();
    assert_eq!(count(&event), 0, "nothing is left");
    rig.write(RAISE, 0b01);
    assert_eq!(count(&event), 1, "unmasked, it fires by itself");
}

#[test]
fn a_masked_line_waits() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::IntX);
    rig.function.mask_intx();
    rig.write(RAISE, 1);
    assert_eq!(count(&event), 0);
    rig.function.unmask_intx();
    assert_eq!(count(&event), 1);
}

#[test]
fn a_line_that_is_asserted_already_fires_when_it_is_enabled() {
    let rig = rig(Timing::Immediate);
    rig.write(RAISE, 1);
    let event = rig.enable(InterruptKind::IntX);
    assert_eq!(count(&event), 1);
}

#[test]
fn the_intx_disable_bit_hides_the_line_and_the_status_bit_shows_it() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::IntX);
    rig.set_command(BUS_MASTER | INTX_DISABLE);
    rig.write(RAISE, 1);
    assert_eq!(count(&event), 0);
    assert_eq!(rig.config(CONFIG_STATUS) & 0x8, 0x8);
    rig.set_command(BUS_MASTER);
    assert_eq!(count(&event), 1);
    rig.write(ACKNOWLEDGE, 1);
    assert_eq!(rig.config(CONFIG_STATUS) & 0x8, 0);
}

#[test]
fn each_raise_sends_a_message_also_for_a_cause_that_is_set() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::Msi);
    rig.write(RAISE, 1);
    rig.write(RAISE, 1);
    assert_eq!(count(&event), 2);
    rig.write(ACKNOWLEDGE, 1);
    rig.write(RAISE, 0);
    assert_eq!(count(&event), 0, "no cause at all");
}

#[test]
fn messages_need_bus_master() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::Msi);
    rig.set_command(0);
    rig.write(RAISE, 1);
    assert_eq!(count(&event), 0);
    assert_eq!(rig.read(CAUSES), 1, "the device knows nothing of that");
}

#[test]
fn messages_take_the_place_of_the_line() {
    let rig = rig(Timing::Immediate);
    let line = rig.enable(InterruptKind::IntX);
    rig.function.mask_intx();
    rig.write(RAISE, 1);
    let message = rig.enable(InterruptKind::Msi);
    assert_eq!(rig.config(MSI_CONTROL), 0x0081, "enabled");
    rig.function.unmask_intx();
    assert_eq!(count(&line), 0, "enabling MSI let go of the line");
    rig.write(RAISE, 2);
    assert_eq!((count(&line), count(&message)), (0, 1));

    rig.function.set_irqs(InterruptKind::Msi, &[]).unwrap();
    assert_eq!(rig.config(MSI_CONTROL), 0x0080);
    assert_eq!(count(&line), 0, "and a cause from before does not bring it back");
    rig.write(RAISE, 2);
    assert_eq!((count(&line), count(&message)), (1, 0));
}

#[test]
fn msi_cannot_be_enabled_in_configuration_space_while_nothing_takes_the_messages() {
    let rig = rig(Timing::Immediate);
    rig.function.config_write(MSI_CONTROL, &[1, 0]).unwrap();
    assert_eq!(rig.config(MSI_CONTROL), 0x0080);
    rig.enable(InterruptKind::Msi);
    rig.function.config_write(MSI_CONTROL, &[0, 0]).unwrap();
    assert_eq!(rig.config(MSI_CONTROL), 0x0080, "but it can be disabled");
    rig.function.config_write(MSI_CONTROL, &[1, 0]).unwrap();
    assert_eq!(rig.config(MSI_CONTROL), 0x0081, "and enabled again");
}

#[test]
fn more_vectors_than_there_are_are_refused_with_both_numbers() {
    let rig = rig(Timing::Immediate);
    let event = event();
    let two = [std::os::fd::AsFd::as_fd(&event); 2];
    let err = rig.function.set_irqs(InterruptKind::Msi, &two).unwrap_err();
    assert_eq!(err.to_string(), "MSI vectors 0..2 of a function that has 1");
}

#[test]
fn a_reset_resets_configuration_space_and_interrupts_but_no_register() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::Msi);
    rig.write(LIVENESS, 7);
    rig.write(STATUS, 0x80);
    rig.write(RAISE, 0x20);
    assert_eq!(count(&event), 1);
    rig.function.reset();

    assert_eq!([rig.config(COMMAND), rig.config(MSI_CONTROL)], [0, 0x0080]);
    rig.set_command(BUS_MASTER);
    rig.write(RAISE, 0x40);
    assert_eq!(count(&event), 0, "the trigger is gone");
    assert_eq!([rig.read(LIVENESS), rig.read(STATUS), rig.read(CAUSES)], [!7, 0x80, 0x60]);
    rig.memory.write_at(0, b"kept");
    rig.dma(IOVA, BUFFER, 4, TO_DEVICE);
    assert_eq!(rig.function.blocked_dma(), 0, "mappings stay");
}

#[test]
fn a_reset_lets_go_of_the_triggers() {
    let rig = rig(Timing::Immediate);
    for kind in [InterruptKind::IntX, InterruptKind::Msi] {
        // A pipe tells when the last descriptor of its writing end is closed.
        let (mut reader, writer) = std::io::pipe().unwrap();
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        rig.function.set_irqs(kind, &[std::os::fd::AsFd::as_fd(&writer)]).unwrap();
        drop(writer);
        rig.function.reset();
        assert_eq!(std::io::Read::read(&mut reader, &mut [0]).unwrap(), 0, "{kind}");
    }
}

#[test]
fn a_reset_drops_the_line_until_the_next_cause() {
    let rig = rig(Timing::Immediate);
    rig.write(RAISE, 1);
    rig.function.reset();
    let event = rig.enable(InterruptKind::IntX);
    assert_eq!(count(&event), 0);
    assert_eq!(rig.read(CAUSES), 1, "a driver can still find its predecessor's cause");
    rig.write(RAISE, 2);
    assert_eq!(count(&event), 1);
}

#[test]
fn a_transfer_survives_a_reset_and_is_then_blocked() {
    let rig = rig(Timing::Manual);
    rig.dma(BUFFER, IOVA, 4, TO_MEMORY);
    rig.function.reset();
    assert_eq!(rig.read(DMA_COMMAND), TO_MEMORY as u32, "still running");
    rig.finish();
    assert_eq!(rig.function.blocked_dma(), 1, "no longer bus master");
}

#[test]
fn a_user_who_leaves_leaves_no_mapping_and_no_trigger() {
    let rig = rig(Timing::Immediate);
    let event = rig.enable(InterruptKind::Msi);
    rig.function.disconnect();
    rig.set_command(BUS_MASTER);
    rig.dma(BUFFER, IOVA, 4, TO_MEMORY | INTERRUPT);
    assert_eq!(rig.function.blocked_dma(), 1);
    assert_eq!(count(&event), 0);
    rig.function.dma_map(IOVA, (&rig.memory).try_into().unwrap()).unwrap();
}

#[test]
fn with_real_timing_the_factorial_and_the_transfer_interrupt_later() {
    let rig = rig(Timing::Real { dma: Duration::from_millis(20) });
    let event = rig.enable(InterruptKind::Msi);
    rig.write(STATUS, 0x80);
    rig.write(FACTORIAL, 10);
    assert_eq!(wait(&event), 1);
    assert_eq!((rig.read(CAUSES), rig.read(FACTORIAL)), (0x001, 3_628_800));
    rig.write(ACKNOWLEDGE, 0x001);

    rig.memory.write_at(0, b"later");
    let started = std::time::Instant::now();
    rig.dma(IOVA, BUFFER, 5, TO_DEVICE | INTERRUPT);
    assert_eq!(wait(&event), 1);
    assert!(started.elapsed() >= Duration::from_millis(20));
    assert_eq!((rig.read(CAUSES), rig.read(DMA_COMMAND)), (0x100, 0b100));
}

#[test]
fn a_function_can_be_dropped_in_the_middle_of_a_transfer() {
    let rig = rig(Timing::Real { dma: Duration::from_secs(3600) });
    rig.dma(IOVA, BUFFER, 5, TO_DEVICE);
    drop(rig);
}

#[test]
fn a_function_can_be_shared_by_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Function<iohost_device_models::edu::Edu>>();
}
