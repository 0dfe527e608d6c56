//! `IOPCIDevice`: configuration space, BARs, bus mastering, reset.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use iohost_device_backend::BarInfo;
use iohost_device_backend::quiesce::Outcome;
use iohost_device_models::Function;
use iohost_dispatch::{Engine, EngineClock};
use iohost_driver::prelude::*;
use iohost_driver::{
    AspmStates, Capability, DevicePowerState, DmaArena, DmaArenaOptions, LinkStatus,
    MappingOptions, MemoryDirection,
};
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

const MEMORY_SPACE: u16 = 0x2;

fn command(function: &Function<Board>) -> u16 {
    let mut word = [0; 2];
    function.config_read(COMMAND as u16, &mut word).unwrap();
    u16::from_le_bytes(word)
}

#[test]
fn a_device_is_opened_by_one_owner_and_once() {
    let bench = Bench::new();
    let device = &bench.device;
    assert_eq!(code(device.open()), Some(IOReturn::NOT_OPEN), "the driver has it open");
    assert_eq!(code(device.close()), None);
    assert_eq!(code(device.close()), Some(IOReturn::NOT_OPEN));
    assert_eq!(code(device.clone().open()), None);
    assert_eq!(code(device.open()), Some(IOReturn::NOT_OPEN));
    let now = device.configuration_read16(COMMAND);
    assert_eq!(now & (MEMORY_SPACE | BUS_MASTER), MEMORY_SPACE);
    assert_eq!(code(device.map_bar::<regs::Memory>(0)), None);
}

#[test]
fn a_closed_device_is_quiet_and_answers_to_nobody() {
    let bench = Bench::new();
    let (device, function) = (&bench.device, bench.rig.function());
    let source = bench.message_source();
    source.set_enable(true).unwrap();
    device.set_bus_master(true);
    assert_eq!(command(&function) & (MEMORY_SPACE | BUS_MASTER), MEMORY_SPACE | BUS_MASTER);
    assert!(function.with_model(|_, bus| bus.msi_enabled()));

    device.close().unwrap();
    assert_eq!(command(&function) & (MEMORY_SPACE | BUS_MASTER), 0);
    assert!(!function.with_model(|_, bus| bus.msi_enabled()));
    assert_eq!(device.configuration_read32(0), u32::MAX);
    assert_eq!(device.configuration_read8(0x3d), u8::MAX);
    device.set_bus_master(true);
    device.configuration_write16(COMMAND, MEMORY_SPACE);
    assert_eq!(command(&function), 0, "a write is ignored");
    let command = IODMACommand::create(device, 0).unwrap();
    let buffer = || IOBufferMemoryDescriptor::create(1).unwrap();
    let not_open = Some(IOReturn::NOT_OPEN);
    assert_eq!(code(device.bar_info(0)), not_open);
    assert_eq!(code(device.map_bar::<regs::Memory>(0)), not_open);
    assert_eq!(code(device.copy_device_memory(0)), not_open);
    assert_eq!(code(command.prepare_for_dma(buffer())), not_open);
    assert_eq!(code(device.save_device_state(false)), not_open);
    assert_eq!(code(device.restore_device_state(false)), not_open);
    assert_eq!(code(device.bus_device_function()), not_open);
    assert_eq!(code(device.reset()), not_open);
    assert_eq!(code(device.configure_interrupts(InterruptType::Level, 1, 1)), not_open);
    assert_eq!(code(IOInterruptDispatchSource::interrupt_type(device, 0)), not_open);

    device.open().unwrap();
    assert_eq!(device.configuration_read16(0), VENDOR);
    assert_eq!(code(command.prepare_for_dma(buffer())), None);
}

#[test]
fn a_device_stays_open_while_its_registers_or_memory_it_was_given_are_in_use() {
    let bench = Bench::new();
    let device = &bench.device;
    let still_open = || assert_eq!(code(device.close()), Some(IOReturn::STILL_OPEN));
    let bar = device.map_bar::<regs::Memory>(0).unwrap();
    still_open();
    let other = device.map_bar::<regs::Memory>(0).unwrap();
    drop(bar);
    still_open();
    drop(other);
    let command = IODMACommand::create(device, 0).unwrap();
    let buffer = IOBufferMemoryDescriptor::create(1).unwrap();
    let prepared = command.prepare_for_dma(buffer).unwrap();
    still_open();
    let buffer = prepared.complete_dma().unwrap();
    let options = DmaArenaOptions { length: 1, max_address_bits: 0, huge_pages: false };
    let arena = DmaArena::create(device, options).unwrap();
    let part = arena.allocate(MemoryDirection::In, 1, 1).unwrap();
    drop(arena);
    still_open();
    drop(part);
    assert_eq!(code(device.close()), None, "a buffer of its own is not the device's");
    drop(buffer);

    let (host, _) = on(Unusual::with_memory(2));
    let memory = host.device.copy_device_memory(0).unwrap();
    let map = memory.create_mapping(MappingOptions::default(), 4096, 8).unwrap();
    assert_eq!(code(host.device.close()), Some(IOReturn::STILL_OPEN));
    drop(map);
    assert_eq!(code(host.device.close()), None);
    let again = memory.create_mapping(MappingOptions::default(), 4096, 8);
    assert_eq!(code(again), Some(IOReturn::NOT_OPEN));
}

/// Configuration space of a PCI Express function: 4096 bytes.
fn express() -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0x00, &[0x34, 0x12, 0x0a, 0x0b]);
    put(0x06, &[0x10, 0x00]);
    put(0x34, &[0x40]);
    // Power management with D1, in D0; MSI; a vendor's; PCI Express; a vendor's second.
    put(0x40, &[0x01, 0x50, 0x03, 0x02, 0x00, 0x00]);
    put(0x50, &[0x05, 0x64]);
    put(0x64, &[0x09, 0x70]);
    put(0x70, &[0x10, 0xb0]);
    // The link: 16 GT/s and 8 lanes, L0s and L1 of which L1 is on; it runs at 8 GT/s and 4 lanes.
    put(0x70 + 0x0c, &(4_u32 | 8 << 4 | 3 << 10).to_le_bytes());
    put(0x70 + 0x10, &0x0002_u16.to_le_bytes());
    put(0x70 + 0x12, &(3_u16 | 4 << 4).to_le_bytes());
    put(0xb0, &[0x09, 0x00]);
    // Error reporting; a vendor's; a serial number; a vendor's second.
    put(0x100, &(0x0001_u32 | 1 << 16 | 0x140 << 20).to_le_bytes());
    put(0x140, &(0x000b_u32 | 1 << 16 | 0x150 << 20).to_le_bytes());
    put(0x150, &(0x0003_u32 | 1 << 16 | 0xff0 << 20).to_le_bytes());
    put(0xff0, &(0x000b_u32 | 1 << 16).to_le_bytes());
    bytes
}

fn on_config(config: Vec<u8>) -> (Host, Arc<Unusual>) {
    let mut unusual = Unusual::new(Board::default());
    unusual.config = Some(Mutex::new(config));
    on(unusual)
}

#[test]
fn capabilities_are_found_by_number_and_from_one_to_the_next() {
    let (host, _) = on_config(express());
    let find = |capability, after| host.device.find_capability(capability, after);
    assert_eq!(find(Capability::POWER_MANAGEMENT, None), Ok(0x40));
    assert_eq!(find(Capability::MSI, None), Ok(0x50));
    assert_eq!(find(Capability::EXPRESS, None), Ok(0x70));
    let vendors = Capability::Standard(0x09);
    assert_eq!(find(vendors, None), Ok(0x64));
    assert_eq!(find(vendors, Some(0x64)), Ok(0xb0));
    assert_eq!(find(vendors, Some(0x40)), Ok(0x64), "after any of the list");
    assert_eq!(find(Capability::ADVANCED_ERROR_REPORTING, None), Ok(0x100));
    let vendors = Capability::Extended(0x0b);
    assert_eq!(find(vendors, None), Ok(0x140));
    assert_eq!(find(vendors, Some(0x140)), Ok(0xff0));
    for (capability, after) in [
        (Capability::MSI_X, None),
        (Capability::MSI, Some(0x50)),
        (Capability::MSI, Some(0x44)),
        (Capability::Standard(0x01), Some(0x100)),
        (Capability::Extended(0x01), Some(0x100)),
        (Capability::Extended(0x05), None),
        (vendors, Some(0xff0)),
        (vendors, Some(u64::MAX)),
    ] {
        let refused = code(find(capability, after));
        assert_eq!(refused, Some(IOReturn::NOT_FOUND), "{capability:?} after {after:?}");
    }
    // The rig's device has 256 bytes, and MSI among them.
    let bench = Bench::new();
    assert_eq!(bench.device.find_capability(Capability::MSI, None), Ok(0x40));
    let extended = bench.device.find_capability(Capability::Extended(0x01), None);
    assert_eq!(code(extended), Some(IOReturn::NOT_FOUND));
}

#[test]
fn a_list_of_capabilities_that_leads_nowhere_or_round_in_a_circle_ends() {
    type Spoil = fn(&mut [u8]);
    let lists: [(&str, Spoil); 6] = [
        ("to itself", |config| config[0x41] = 0x40),
        ("round", |config| config[0xb1] = 0x50),
        ("into the header", |config| config[0x41] = 0x10),
        ("to nothing", |config| config[0x40..0x100].fill(0xff)),
        ("there is none", |config| config[0x06] = 0),
        ("round, extended", |config| {
            config[0xff0..0xff4].copy_from_slice(&(0x000b_u32 | 0x100 << 20).to_le_bytes());
        }),
    ];
    for (what, spoil) in lists {
        let mut config = express();
        spoil(&mut config);
        let (host, _) = on_config(config);
        for absent in [Capability::MSI_X, Capability::Extended(0x77)] {
            let refused = code(host.device.find_capability(absent, None));
            assert_eq!(refused, Some(IOReturn::NOT_FOUND), "{what}");
        }
        let after_itself = host.device.find_capability(Capability::Standard(0x01), Some(0x40));
        assert_eq!(code(after_itself), Some(IOReturn::NOT_FOUND), "{what}");
    }
}

#[test]
fn the_place_of_a_device_is_told_and_an_emulated_one_has_none() {
    let mut unusual = Unusual::new(Board::default());
    unusual.location = "0001:82:1f.3".parse().ok();
    let (host, _) = on(unusual);
    assert_eq!(host.device.bus_device_function(), Ok((0x82, 0x1f, 3)));
    let nowhere = Bench::new().device.bus_device_function();
    assert_eq!(code(nowhere), Some(IOReturn::NOT_FOUND));
}

#[test]
fn the_speed_and_width_of_a_link_are_told_and_a_speed_that_no_link_has_is_refused() {
    let (host, _) = on_config(express());
    let device = &host.device;
    assert_eq!(device.link_status(), Ok(LinkStatus { speed: 3, width: 4 }));
    assert_eq!(device.link_capabilities(), Ok(LinkStatus { speed: 4, width: 8 }));
    for impossible in [0, 6, 255] {
        assert_eq!(code(device.set_link_speed(impossible)), Some(IOReturn::BAD_ARGUMENT));
    }
    assert_eq!(code(device.set_link_speed(3)), Some(IOReturn::UNSUPPORTED));
    let plain = Bench::new().device;
    assert_eq!(code(plain.link_status()), Some(IOReturn::UNSUPPORTED));
    assert_eq!(code(plain.link_capabilities()), Some(IOReturn::UNSUPPORTED));
    assert_eq!(code(plain.set_link_speed(0)), Some(IOReturn::BAD_ARGUMENT));
}

#[test]
fn the_states_of_a_link_are_set_as_far_as_it_has_them_and_the_host_lets_it() {
    let states = |l0s, l1| AspmStates { l0s, l1 };
    let (host, backend) = on_config(express());
    let device = &host.device;
    assert_eq!(device.aspm_capabilities(), Ok(states(true, true)));
    assert_eq!(device.aspm_states(), Ok(states(false, true)));
    backend.config.as_ref().unwrap().lock().unwrap()[0x80] |= 0x40;
    for wanted in [states(true, false), states(false, false), states(true, true)] {
        assert_eq!(device.set_aspm_states(wanted), Ok(()));
        assert_eq!(device.aspm_states(), Ok(wanted));
    }
    assert_eq!(device.configuration_read16(0x80), 0x43, "the other bits stay");

    let mut config = express();
    config[0x70 + 0x0d] = 0x04 | config[0x70 + 0x0d] & 0xf3;
    let (host, _) = on_config(config);
    assert_eq!(host.device.aspm_capabilities(), Ok(states(true, false)));
    let refused = host.device.set_aspm_states(states(false, true));
    assert_eq!(code(refused), Some(IOReturn::UNSUPPORTED), "the link has no L1");

    let mut unusual = Unusual::new(Board::default());
    unusual.config = Some(Mutex::new(express()));
    unusual.read_only = vec![0x80, 0x81];
    let (host, _) = on(unusual);
    let refused = host.device.set_aspm_states(states(true, true));
    assert_eq!(code(refused), Some(IOReturn::UNSUPPORTED), "as behind VFIO");
    let plain = Bench::new().device;
    assert_eq!(code(plain.set_aspm_states(states(true, true))), Some(IOReturn::UNSUPPORTED));
    assert_eq!(code(plain.aspm_states()), Some(IOReturn::UNSUPPORTED));
}

#[test]
fn the_power_states_of_a_function_are_told() {
    let (host, backend) = on_config(express());
    let device = &host.device;
    let states =
        [DevicePowerState::D0, DevicePowerState::D1, DevicePowerState::D2, DevicePowerState::D3Hot];
    let has = states.map(|state| device.has_power_state(state).unwrap());
    assert_eq!(has, [true, true, false, true]);
    for (bits, state) in (0..).zip(states) {
        backend.config.as_ref().unwrap().lock().unwrap()[0x44] = bits;
        assert_eq!(device.power_state(), Ok(state));
    }
    let plain = Bench::new().device;
    assert_eq!(code(plain.power_state()), Some(IOReturn::UNSUPPORTED));
    let none = plain.has_power_state(DevicePowerState::D3Hot);
    assert_eq!(code(none), Some(IOReturn::UNSUPPORTED));
}

#[test]
fn a_saved_state_is_there_again_after_a_reset() {
    let bench = Bench::new();
    let device = &bench.device;
    assert_eq!(code(device.restore_device_state(false)), Some(IOReturn::NOT_READY));
    // BAR 0, command, interrupt line, and the MSI capability's address, data and messages.
    device.configuration_write32(0x10, 0xfeb0_0000);
    device.configuration_write16(COMMAND, 0x0506);
    device.configuration_write8(INTERRUPT_LINE, 11);
    device.configuration_write32(0x44, 0xfee0_1000);
    device.configuration_write32(0x48, 0x0000_0001);
    device.configuration_write16(0x4c, 0x4021);
    device.configuration_write16(0x42, 0x0020);
    let everything = || (0..256).step_by(4).map(|at| device.configuration_read32(at)).collect();
    let before: Vec<_> = everything();
    device.save_device_state(false).unwrap();
    device.reset().unwrap();
    assert_ne!(before, everything());
    device.restore_device_state(false).unwrap();
    assert_eq!(before, everything());
}

#[test]
fn a_permanent_snapshot_stands_apart_until_the_device_is_closed() {
    let bench = Bench::new();
    let device = &bench.device;
    let line = |value| device.configuration_write8(INTERRUPT_LINE, value);
    line(1);
    device.save_device_state(true).unwrap();
    line(2);
    device.save_device_state(false).unwrap();
    line(3);
    device.restore_device_state(true).unwrap();
    assert_eq!(device.configuration_read8(INTERRUPT_LINE), 1);
    device.restore_device_state(false).unwrap();
    assert_eq!(device.configuration_read8(INTERRUPT_LINE), 2);
    device.close().unwrap();
    device.open().unwrap();
    assert_eq!(code(device.restore_device_state(true)), Some(IOReturn::NOT_READY));
    assert_eq!(code(device.restore_device_state(false)), None);
}

#[test]
fn a_register_that_does_not_take_its_old_value_fails_the_restoring() {
    let mut unusual = Unusual::new(Board::default());
    unusual.config = Some(Mutex::new(express()));
    // The high byte of BAR 1.
    unusual.read_only = vec![0x17];
    let (host, backend) = on(unusual);
    host.device.save_device_state(false).unwrap();
    host.device.restore_device_state(false).unwrap();
    backend.config.as_ref().unwrap().lock().unwrap()[0x17] = 0xfe;
    let refused = host.device.restore_device_state(false);
    assert_eq!(code(refused), Some(IOReturn::IO_ERROR));
}
