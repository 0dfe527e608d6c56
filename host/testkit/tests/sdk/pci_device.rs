//! `IOPCIDevice`: configuration space, BARs, bus mastering, reset.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use iohost_device_backend::BarInfo;
use iohost_device_backend::quiesce::Outcome;
use iohost_device_models::Function;
use iohost_dispatch::{Engine, EngineClock};
use iohost_driver::prelude::*;
use iohost_driver_host::Device;
use iohost_testkit::FakeDevice;

use crate::board::{BAR_SIZE, Board, DEVICE, Unusual, VENDOR};
use crate::probe::{ANY, Bench, Host};

mod regs {
    use iohost_driver::register_map;

    register_map! {
        /// The board's BAR, one register of each width.
        pub struct Memory[0x100] {
            0x00 Rw BYTE: u8,
            0x02 Rw HALF: u16,
            0x04 Rw WORD: u32,
            0x08 Rw LONG: u64,
            0xf8 Rw LAST: u64,
        }
    }

    register_map! {
        /// A map for a larger device than the board is.
        pub struct Larger[0x200] {
            0x00 Rw FIRST: u32,
        }
    }
}

const COMMAND: u64 = 0x04;
const BUS_MASTER: u16 = 0x4;
const INTERRUPT_LINE: u64 = 0x3c;

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
}

fn on(backend: Unusual) -> (Host, Arc<Unusual>) {
    let backend = Arc::new(backend);
    (Host::start(Engine::manual(EngineClock::Virtual).unwrap(), backend.clone()), backend)
}

#[test]
fn configuration_reads_of_every_width_give_the_bytes_of_configuration_space() {
    let bench = Bench::new();
    let function = bench.rig.function();
    for offset in 0..256_u16 {
        let mut bytes = [0xff; 4];
        function.config_read(offset, &mut bytes[..usize::from(4.min(256 - offset))]).unwrap();
        let at = u64::from(offset);
        assert_eq!(bench.device.configuration_read8(at), bytes[0], "{offset:#x}");
        if at.is_multiple_of(2) {
            let half = u16::from_le_bytes([bytes[0], bytes[1]]);
            assert_eq!(bench.device.configuration_read16(at), half, "{offset:#x}");
        }
        if at.is_multiple_of(4) {
            let word = u32::from_le_bytes(bytes);
            assert_eq!(bench.device.configuration_read32(at), word, "{offset:#x}");
        }
    }
    let ids = u32::from(DEVICE) << 16 | u32::from(VENDOR);
    assert_eq!(bench.device.configuration_read32(0), ids);
}

#[test]
fn a_configuration_read_that_is_not_aligned_or_outside_gives_all_ones() {
    let device = Bench::new().device;
    assert_eq!(device.configuration_read32(0xffe), u32::MAX);
    assert_eq!(device.configuration_read16(0x01), u16::MAX);
    assert_eq!(device.configuration_read32(0x02), u32::MAX);
    for offset in [0x1000, 0x1_0000, 0x1_0000_0000, u64::MAX] {
        assert_eq!(device.configuration_read8(offset), u8::MAX, "{offset:#x}");
        assert_eq!(device.configuration_read16(offset), u16::MAX, "{offset:#x}");
        assert_eq!(device.configuration_read32(offset), u32::MAX, "{offset:#x}");
    }
}

#[test]
fn configuration_writes_read_back_and_those_that_cannot_be_made_change_nothing() {
    let device = Bench::new().device;
    device.configuration_write8(INTERRUPT_LINE, 0x5a);
    assert_eq!(device.configuration_read8(INTERRUPT_LINE), 0x5a);
    device.configuration_write16(COMMAND, 0x0106);
    assert_eq!(device.configuration_read16(COMMAND), 0x0106);
    device.configuration_write32(0x10, 0xfeb0_0000);
    assert_eq!(device.configuration_read32(0x10), 0xfeb0_0000);
    let everything = || (0..256).step_by(4).map(|at| device.configuration_read32(at));
    let before: Vec<_> = everything().collect();
    device.configuration_write16(0x05, 0xffff);
    device.configuration_write32(0x12, 0xffff_ffff);
    device.configuration_write32(0xffe, 0);
    device.configuration_write8(u64::MAX, 0);
    device.configuration_write16(0x00, 0);
    assert_eq!(everything().collect::<Vec<_>>(), before);
}

#[test]
fn each_register_access_is_one_access_of_the_bus_with_the_registers_width() {
    let bench = Bench::new();
    let bar = bench.device.map_bar::<regs::Memory>(0).unwrap();
    bar.write(regs::BYTE, 0x11);
    bar.write(regs::HALF, 0x2233);
    bar.write(regs::WORD, 0x4455_6677);
    bar.write(regs::LONG, 0x8899_aabb_ccdd_eeff);
    assert_eq!(bar.read(regs::BYTE), 0x11);
    assert_eq!(bar.read(regs::HALF), 0x2233);
    assert_eq!(bar.read(regs::WORD), 0x4455_6677);
    assert_eq!(bar.read(regs::LONG), 0x8899_aabb_ccdd_eeff);
    let places = [(1, 0), (2, 2), (4, 4), (8, 8)];
    let writes = places.map(|(len, at)| format!("write {len} bytes at {at:#x} of BAR 0"));
    let reads = places.map(|(len, at)| format!("read {len} bytes at {at:#x} of BAR 0"));
    bench.rig.model(|board, _| {
        assert_eq!(board.accesses, [writes, reads].concat());
        assert_eq!(board.memory[..8], [0x11, 0, 0x33, 0x22, 0x77, 0x66, 0x55, 0x44]);
    });
}

#[test]
fn a_register_map_that_does_not_fit_its_bar_is_refused_so_no_access_is_outside() {
    let bench = Bench::new();
    let map = |bar| code(bench.device.map_bar::<regs::Larger>(bar));
    assert_eq!(map(0), Some(IOReturn::OVERRUN));
    assert_eq!(map(1), Some(IOReturn::NOT_FOUND));
    assert_eq!(map(7), Some(IOReturn::BAD_ARGUMENT));
    assert!(bench.device.map_bar::<regs::Memory>(0).is_ok());
}

#[test]
fn a_device_that_does_not_answer_reads_as_all_ones_and_swallows_writes() {
    let (host, backend) = on(Unusual::new(Board::default()));
    let bar = host.device.map_bar::<regs::Memory>(0).unwrap();
    bar.write(regs::WORD, 1);
    backend.gone.store(true, SeqCst);
    bar.write(regs::WORD, 2);
    assert_eq!(bar.read(regs::BYTE), u8::MAX);
    assert_eq!(bar.read(regs::LAST), u64::MAX);
    assert_eq!(host.device.configuration_read32(0), u32::MAX);
    backend.gone.store(false, SeqCst);
    assert_eq!(bar.read(regs::WORD), 1);
}

#[test]
fn the_size_and_type_of_each_bar_are_told_and_an_upper_half_is_not_found() {
    let mut unusual = Unusual::new(Board::default());
    let bar = |size, kind| Some(BarInfo { size, kind, mappable: Vec::new() });
    // A 64-bit BAR 2 takes the register of BAR 3 too; BAR 6 is the expansion ROM.
    let rom = bar(0x1_0000, 0);
    unusual.bars =
        vec![bar(0x1000, 0x00), bar(0x20, 0x01), bar(1 << 33, 0x0c), None, None, None, rom];
    let (host, _) = on(unusual);
    let info = |index| host.device.bar_info(index).map(|info| (info.size, info.kind));
    assert_eq!(info(0), Ok((0x1000, 0x00)));
    assert_eq!(info(1), Ok((0x20, 0x01)));
    assert_eq!(info(2), Ok((1 << 33, 0x0c)));
    assert_eq!(info(6).map(|(size, _)| size), Ok(0x1_0000));
    for absent in 3..6 {
        assert_eq!(code(info(absent)), Some(IOReturn::NOT_FOUND), "{absent}");
    }
    for impossible in [7, 255] {
        assert_eq!(code(info(impossible)), Some(IOReturn::BAD_ARGUMENT), "{impossible}");
    }
    assert_eq!(Bench::new().device.bar_info(0).map(|info| info.size), Ok(u64::from(BAR_SIZE)));
}

#[test]
fn dma_works_only_while_the_device_is_bus_master() {
    let bench = Bench::new();
    let command = IODMACommand::create(&bench.device, 0).unwrap();
    let buffer = IOBufferMemoryDescriptor::create(4096).unwrap();
    let buffer = command.prepare_for_dma(buffer).unwrap();
    let write = |byte| bench.bus(|bus| bus.dma_write(buffer.address(), &[byte]));
    let read = || {
        let mut byte = [0];
        buffer.read_at(0, &mut byte).unwrap();
        byte[0]
    };
    write(1);
    assert_eq!((read(), bench.rig.function().blocked_dma()), (0, 1));
    bench.device.set_bus_master(true);
    assert_eq!(bench.device.configuration_read16(COMMAND) & BUS_MASTER, BUS_MASTER);
    write(2);
    assert_eq!((read(), bench.rig.function().blocked_dma()), (2, 1));
    bench.device.set_bus_master(false);
    assert_eq!(bench.device.configuration_read16(COMMAND) & BUS_MASTER, 0);
    write(3);
    assert_eq!((read(), bench.rig.function().blocked_dma()), (2, 2));
}

#[test]
fn changing_bus_mastering_leaves_the_other_bits_of_the_command_register() {
    let device = Bench::new().device;
    device.configuration_write16(COMMAND, 0x0502);
    device.set_bus_master(true);
    assert_eq!(device.configuration_read16(COMMAND), 0x0506);
    device.set_bus_master(false);
    assert_eq!(device.configuration_read16(COMMAND), 0x0502);
}

#[test]
fn a_reset_reaches_the_device_and_its_interrupts_work_again_afterwards() {
    let bench = Bench::new();
    let source = bench.message_source();
    source.set_enable(true).unwrap();
    let bar = bench.device.map_bar::<regs::Memory>(0).unwrap();
    bar.write(regs::WORD, 7);
    let before = bench.rig.model(|board, _| board.resets);
    assert_eq!(code(bench.device.reset()), None);
    assert_eq!(bench.rig.model(|board, _| board.resets), before + 1);
    assert_eq!(bar.read(regs::WORD), 0, "and its registers can be reached");
    bench.message(0);
    assert_eq!(bench.settled(), ["count 1"]);
}

#[test]
fn a_device_without_a_reset_says_unsupported_and_can_be_driven_all_the_same() {
    let mut unusual = Unusual::new(Board::default());
    unusual.no_reset = true;
    let (host, _) = on(unusual);
    assert_eq!(code(host.device.reset()), Some(IOReturn::UNSUPPORTED));
    assert_eq!(host.device.configuration_read16(0), VENDOR);
}

#[test]
fn a_driver_gets_a_device_that_was_reset_decodes_memory_and_is_no_bus_master() {
    const MEMORY_SPACE: u16 = 0x2;
    let bench = Bench::new();
    assert_eq!(bench.rig.model(|board, _| board.resets), 1);
    let command = bench.device.configuration_read16(COMMAND);
    assert_eq!(command & (MEMORY_SPACE | BUS_MASTER), MEMORY_SPACE);
}

#[test]
fn what_a_driver_leaked_of_its_device_is_taken_back_by_the_host() {
    let function = Arc::new(Function::new(Board::default()));
    let backend = Arc::new(FakeDevice::new(function.clone()));
    let (device, _) = Device::take_over(backend, ANY.to_vec()).unwrap();
    let host = Host::on_device(Engine::manual(EngineClock::Virtual).unwrap(), device.clone());
    let command = IODMACommand::create(&host.device, 0).unwrap();
    let buffer = IOBufferMemoryDescriptor::create(4096).unwrap();
    let buffer = command.prepare_for_dma(buffer).unwrap();
    let address = buffer.address();
    host.device.set_bus_master(true);
    std::mem::forget(buffer);
    drop((host, command));
    assert_eq!(device.give_back().outcome, Outcome::Reset);
    function.config_write(COMMAND as u16, &BUS_MASTER.to_le_bytes()).unwrap();
    function.with_model(|_, bus| bus.dma_write(address, &[1]));
    assert_eq!(function.blocked_dma(), 1);
}

#[test]
fn what_a_driver_leaves_of_its_device_is_taken_back_when_it_is_gone() {
    let bench = Bench::new();
    let source = bench.message_source();
    let command = IODMACommand::create(&bench.device, 0).unwrap();
    let buffer = IOBufferMemoryDescriptor::create(4096).unwrap();
    let buffer = command.prepare_for_dma(buffer).unwrap();
    let address = buffer.address();
    let function = bench.rig.function();
    let keep = |probe: &mut crate::probe::Probe| {
        probe.interrupt = Some(source);
        probe.buffer = Some(buffer);
    };
    bench.queue.dispatch_sync(keep).unwrap();
    drop((bench, command));
    let mut word = [0; 2];
    function.config_read(COMMAND as u16, &mut word).unwrap();
    assert_eq!(u16::from_le_bytes(word) & BUS_MASTER, 0);
    assert!(!function.with_model(|_, bus| bus.msi_enabled()));
    // Also were it bus master again, there is nothing left to reach.
    function.config_write(COMMAND as u16, &BUS_MASTER.to_le_bytes()).unwrap();
    function.with_model(|_, bus| bus.dma_write(address, &[1]));
    assert_eq!(function.blocked_dma(), 1);
}
