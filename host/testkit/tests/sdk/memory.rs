//! `IOMemoryDescriptor`, `IOBufferMemoryDescriptor`, `IOMemoryMap`, and memory of the device.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use iohost_dispatch::{Engine, EngineClock};
use iohost_driver::prelude::*;
use iohost_driver::{
    CacheMode, DmaArena, DmaArenaOptions, IOMemoryDescriptor, MappingOptions, MemoryDirection,
    register_map,
};

use crate::board::{Board, Unusual};
use crate::probe::{Bench, Host};

const PAGE: u64 = 4096;

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
}

fn buffer(bytes: u64) -> IOBufferMemoryDescriptor {
    IOBufferMemoryDescriptor::create(bytes as usize).unwrap()
}

/// As many bytes as the buffer has, none of them like its neighbours, nor like those of another.
fn pattern(buffer: &mut IOBufferMemoryDescriptor, seed: usize) -> Vec<u8> {
    let bytes: Vec<u8> = (0..buffer.length() as usize).map(|n| (n * 7 + seed) as u8).collect();
    buffer.write_at(0, &bytes).unwrap();
    bytes
}

fn read(memory: &IOMemoryDescriptor) -> Vec<u8> {
    let mut bytes = vec![0; memory.length() as usize];
    memory.read_at(0, &mut bytes).unwrap();
    bytes
}

/// What the kernel says of the page at an address: its rights, or that nothing is there.
fn rights_at(address: u64) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let rights = words.next()?.to_owned();
        (number(start)..number(end)).contains(&address).then_some(rights)
    })
}

#[test]
fn a_mapping_is_the_same_bytes_at_other_addresses_with_its_length_and_offset() {
    let _bench = Bench::new();
    let mut buffer = buffer(3 * PAGE);
    let bytes = pattern(&mut buffer, 0);
    let memory = buffer.memory_descriptor();
    assert_eq!(memory.length(), 3 * PAGE);

    let map = memory.create_mapping(MappingOptions::default(), 100, 5000).unwrap();
    assert_eq!((map.offset(), map.length()), (100, 5000));
    assert_eq!(map.address() % PAGE, 100);
    assert_ne!(map.address(), buffer.address_range().0 + 100);
    let mut seen = vec![0; 5000];
    map.read_at(0, &mut seen).unwrap();
    assert_eq!(seen, bytes[100..5100]);
    map.write_at(4990, b"through it").unwrap();
    let mut seen = [0; 10];
    buffer.read_at(5090, &mut seen).unwrap();
    assert_eq!(&seen, b"through it");

    let whole = memory.create_mapping(MappingOptions::default(), 0, 0).unwrap();
    assert_eq!((whole.offset(), whole.length()), (0, 3 * PAGE));
}

#[test]
fn a_mapping_of_bytes_that_are_not_there_or_with_a_cache_mode_they_lack_is_refused() {
    let _bench = Bench::new();
    let memory = buffer(PAGE).memory_descriptor();
    let map =
        |offset, length| code(memory.create_mapping(MappingOptions::default(), offset, length));
    assert_eq!(map(0, PAGE), None);
    for (offset, length) in [(0, PAGE + 1), (PAGE, 1), (1, 0), (u64::MAX, 2), (0, u64::MAX)] {
        assert_eq!(map(offset, length), Some(IOReturn::ERROR), "{length} at {offset}");
    }
    let cached =
        |cache| code(memory.create_mapping(MappingOptions { cache, read_only: false }, 0, 0));
    assert_eq!(cached(CacheMode::Copyback), None);
    for mode in [CacheMode::Inhibit, CacheMode::WriteThrough] {
        assert_eq!(cached(mode), Some(IOReturn::UNSUPPORTED), "{mode:?}");
    }
    let map = memory.create_mapping(MappingOptions::default(), 0, 10).unwrap();
    for offset in [10, 4096, usize::MAX] {
        assert_eq!(code(map.read_at(offset, &mut [0])), Some(IOReturn::OVERRUN), "{offset}");
        assert_eq!(code(map.write_at(offset, &[0])), Some(IOReturn::OVERRUN), "{offset}");
    }
}

#[test]
fn the_mmu_keeps_writes_from_a_mapping_that_is_for_reading_only() {
    let _bench = Bench::new();
    let memory = buffer(PAGE).memory_descriptor();
    let options = MappingOptions { read_only: true, ..MappingOptions::default() };
    let map = memory.create_mapping(options, 0, 0).unwrap();
    assert_eq!(rights_at(map.address()).as_deref(), Some("r--s"));
    assert_eq!(code(map.write_at(0, &[1])), Some(IOReturn::NOT_WRITABLE));
    memory.write_at(0, b"seen").unwrap();
    let mut seen = [0; 4];
    map.read_at(0, &mut seen).unwrap();
    assert_eq!(&seen, b"seen");
    let writable = memory.create_mapping(MappingOptions::default(), 0, 0).unwrap();
    assert_eq!(rights_at(writable.address()).as_deref(), Some("rw-s"));
}

#[test]
fn a_mapping_keeps_its_memory_and_ends_with_its_value_between_pages_nobody_may_touch() {
    let _bench = Bench::new();
    let mut buffer = buffer(PAGE);
    let bytes = pattern(&mut buffer, 3);
    let map = buffer.memory_descriptor().create_mapping(MappingOptions::default(), 0, 0).unwrap();
    drop(buffer);
    let mut seen = vec![0; PAGE as usize];
    map.read_at(0, &mut seen).unwrap();
    assert_eq!(seen, bytes);
    let address = map.address();
    for guard in [address - 1, address + PAGE] {
        assert_eq!(rights_at(guard).as_deref(), Some("---p"), "{guard:#x}");
    }
    let inode = inode_at(address).unwrap();
    drop(map);
    // Another test may have mapped its own memory there meanwhile, which is another file.
    assert_ne!(inode_at(address), Some(inode));
}

/// The file that is mapped at an address.
fn inode_at(address: u64) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let (start, end) = words[0].split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let here = (number(start)..number(end)).contains(&address);
        here.then(|| words[4].to_owned())
    })
}

#[test]
fn a_sub_descriptor_is_a_window_and_one_of_a_window_counts_from_there() {
    let _bench = Bench::new();
    let mut buffer = buffer(1000);
    let bytes = pattern(&mut buffer, 1);
    let memory = buffer.memory_descriptor();
    let window = memory.sub_descriptor(MemoryDirection::InOut, 100, 800).unwrap();
    assert_eq!(window.length(), 800);
    assert_eq!(read(&window), bytes[100..900]);
    let inner = window.sub_descriptor(MemoryDirection::Out, 50, 10).unwrap();
    assert_eq!(inner.direction(), MemoryDirection::Out);
    assert_eq!(read(&inner), bytes[150..160]);
    window.write_at(50, b"from outer").unwrap();
    assert_eq!(read(&inner), b"from outer");
    assert_eq!(code(window.read_at(799, &mut [0; 2])), Some(IOReturn::OVERRUN));
}

#[test]
fn a_sub_descriptor_that_is_not_inside_or_has_more_direction_is_refused() {
    let _bench = Bench::new();
    let memory = buffer(1000).memory_descriptor();
    let sub = |direction, offset, length| code(memory.sub_descriptor(direction, offset, length));
    for (offset, length) in [(0, 1001), (1001, 0), (999, 2), (u64::MAX, 2), (1, u64::MAX)] {
        let refused = sub(MemoryDirection::InOut, offset, length);
        assert_eq!(refused, Some(IOReturn::BAD_ARGUMENT), "{length} at {offset}");
    }
    let reading = memory.sub_descriptor(MemoryDirection::Out, 0, 10).unwrap();
    for more in [MemoryDirection::In, MemoryDirection::InOut] {
        let refused = code(reading.sub_descriptor(more, 0, 10));
        assert_eq!(refused, Some(IOReturn::BAD_ARGUMENT), "{more:?}");
        let refused =
            code(IOMemoryDescriptor::with_descriptors(more, std::slice::from_ref(&reading)));
        assert_eq!(refused, Some(IOReturn::BAD_ARGUMENT), "{more:?}");
    }
}

#[test]
fn descriptors_one_after_the_other_line_up() {
    let _bench = Bench::new();
    let (mut one, mut two) = (buffer(100), buffer(5000));
    let (first, second) = (pattern(&mut one, 0), pattern(&mut two, 90));
    let window = two.memory_descriptor().sub_descriptor(MemoryDirection::InOut, 7, 4990).unwrap();
    let list = [window.clone(), one.memory_descriptor(), window];
    let memory = IOMemoryDescriptor::with_descriptors(MemoryDirection::InOut, &list).unwrap();
    let expected = [&second[7..4997], &first[..], &second[7..4997]].concat();
    assert_eq!(memory.length(), 4990 + 100 + 4990);
    assert_eq!(read(&memory), expected);
    let across = memory.sub_descriptor(MemoryDirection::In, 4980, 120).unwrap();
    assert_eq!(read(&across), expected[4980..5100]);
    across.write_at(8, b"abcd").unwrap();
    let mut seen = [0; 2];
    two.read_at(4995, &mut seen).unwrap();
    assert_eq!(&seen, b"ab");
    one.read_at(0, &mut seen).unwrap();
    assert_eq!(&seen, b"cd");
}

#[test]
fn no_descriptors_and_more_than_32_are_refused() {
    let _bench = Bench::new();
    let one = buffer(10).memory_descriptor();
    let compose = |count| {
        let list = vec![one.clone(); count];
        code(IOMemoryDescriptor::with_descriptors(MemoryDirection::InOut, &list))
    };
    assert_eq!(compose(0), Some(IOReturn::BAD_ARGUMENT));
    assert_eq!(compose(32), None);
    assert_eq!(compose(33), Some(IOReturn::BAD_ARGUMENT));
}

#[test]
fn a_composed_descriptor_is_mapped_as_one_range_if_its_parts_meet_on_pages() {
    let _bench = Bench::new();
    let (mut one, mut two) = (buffer(2 * PAGE), buffer(PAGE));
    let (first, second) = (pattern(&mut one, 0), pattern(&mut two, 90));
    let compose = |list: &[IOMemoryDescriptor]| {
        IOMemoryDescriptor::with_descriptors(MemoryDirection::InOut, list).unwrap()
    };
    let tail = one.memory_descriptor().sub_descriptor(MemoryDirection::InOut, 10, 2 * PAGE - 10);
    let meeting = compose(&[tail.unwrap(), two.memory_descriptor()]);
    let map = meeting.create_mapping(MappingOptions::default(), 0, 0).unwrap();
    let mut seen = vec![0; map.length() as usize];
    map.read_at(0, &mut seen).unwrap();
    assert_eq!(seen, [&first[10..], &second[..]].concat());

    let head = one.memory_descriptor().sub_descriptor(MemoryDirection::InOut, 0, 10).unwrap();
    let apart = compose(&[head, two.memory_descriptor()]);
    let refused = apart.create_mapping(MappingOptions::default(), 0, 0);
    assert_eq!(code(refused), Some(IOReturn::NOT_ALIGNED));
    let inside = apart.create_mapping(MappingOptions::default(), 10, 20).unwrap();
    assert_eq!(inside.length(), 20, "one part alone can be mapped");
}

#[test]
fn a_buffers_valid_length_is_its_capacity_until_it_is_set() {
    let _bench = Bench::new();
    let mut buffer = buffer(1000);
    assert_eq!((buffer.length(), buffer.capacity()), (1000, 1000));
    let (address, length) = buffer.address_range();
    assert_eq!((address % PAGE, length), (0, 1000));
    assert_eq!(rights_at(address).as_deref(), Some("rw-s"));

    buffer.write_at(995, b"beyond").unwrap_err();
    buffer.write_at(990, b"0123456789").unwrap();
    buffer.set_length(992).unwrap();
    assert_eq!((buffer.length(), buffer.capacity()), (992, 1000));
    assert_eq!(buffer.address_range(), (address, 992));
    assert_eq!(buffer.memory_descriptor().length(), 992);
    assert_eq!(code(buffer.read_at(990, &mut [0; 3])), Some(IOReturn::OVERRUN));
    for length in [1001, u64::MAX] {
        assert_eq!(code(buffer.set_length(length)), Some(IOReturn::BAD_ARGUMENT), "{length}");
        assert_eq!(buffer.length(), 992);
    }
    buffer.set_length(0).unwrap();
    buffer.set_length(1000).unwrap();
    let mut seen = [0; 10];
    buffer.read_at(990, &mut seen).unwrap();
    assert_eq!(&seen, b"0123456789", "what was not valid is still there");
}

#[test]
fn a_buffer_of_an_alignment_that_is_no_power_of_two_is_refused() {
    let _bench = Bench::new();
    let create = |alignment| {
        code(IOBufferMemoryDescriptor::create_aligned(MemoryDirection::In, 100, alignment))
    };
    for alignment in [0, 3, 4097, u64::MAX] {
        assert_eq!(create(alignment), Some(IOReturn::BAD_ARGUMENT), "{alignment}");
    }
    assert_eq!(create(1), None);
    assert_eq!(create(1 << 30), None);
}

register_map! {
    /// The first registers of a BAR that is memory.
    struct Registers[0x1000] {
        0x10 Rw WORD: u32,
    }
}

fn on(backend: Unusual) -> (Host, Arc<Unusual>) {
    let backend = Arc::new(backend);
    (Host::start(Engine::manual(EngineClock::Virtual).unwrap(), backend.clone()), backend)
}

#[test]
fn memory_of_the_device_is_mapped_as_its_registers_are_read() {
    let (host, backend) = on(Unusual::with_memory(4));
    let memory = host.device.copy_device_memory(0).unwrap();
    assert_eq!(memory.length(), 4 * PAGE);
    let bar = backend.memory.as_ref().unwrap();
    let bytes: Vec<u8> = (1..=32).collect();
    bar.write_at(5000, &bytes);
    // Of every start and length within 8 bytes, so of every way to put accesses together.
    for (from, len) in (0..8).flat_map(|from| (0..18).map(move |len| (from, len))) {
        let map = memory.create_mapping(MappingOptions::default(), 5000 + from, 20).unwrap();
        assert_eq!((map.offset(), map.length()), (5000 + from, 20));
        let mut seen = vec![0; len];
        map.read_at(0, &mut seen).unwrap();
        let start = from as usize;
        assert_eq!(seen, bytes[start..start + len], "{len} at {from}");
        map.write_at(1, &vec![0xa0; len]).unwrap();
        let mut seen = vec![0; len + 2];
        bar.read_at(5000 + start, &mut seen);
        let neighbours = (bytes[start], bytes[start + len + 1]);
        assert_eq!((seen[0], seen[len + 1]), neighbours, "{len} at {from}");
        assert!(seen[1..=len].iter().all(|byte| *byte == 0xa0));
        bar.write_at(5000, &bytes);
    }
    let map = memory.create_mapping(MappingOptions::default(), PAGE, 0).unwrap_err();
    assert_eq!(map.code(), IOReturn::ERROR, "length 0 is from offset 0 on");
    let cached = MappingOptions { cache: CacheMode::Copyback, read_only: false };
    assert_eq!(code(memory.create_mapping(cached, PAGE, 10)), Some(IOReturn::UNSUPPORTED));
}

#[test]
fn memory_that_the_device_lets_nobody_map_is_unsupported() {
    let (host, _) = on(Unusual::with_memory(4));
    let memory = host.device.copy_device_memory(0).unwrap();
    let map =
        |offset, length| code(memory.create_mapping(MappingOptions::default(), offset, length));
    assert_eq!(map(0, 16), Some(IOReturn::UNSUPPORTED), "the first page is not offered");
    assert_eq!(map(PAGE - 8, 16), Some(IOReturn::UNSUPPORTED));
    assert_eq!(map(PAGE, 3 * PAGE), None);
    assert_eq!(map(PAGE, 3 * PAGE + 1), Some(IOReturn::ERROR));
    let bytes = code(memory.read_at(PAGE, &mut [0]));
    assert_eq!(bytes, Some(IOReturn::UNSUPPORTED), "not as memory of the machine");
    let command = IODMACommand::create(&host.device, 0).unwrap();
    assert_eq!(code(command.prepare_for_dma(memory)), Some(IOReturn::UNSUPPORTED));
    // A BAR that is reached by calls altogether.
    let (host, _) = on(Unusual::new(Board::default()));
    let memory = host.device.copy_device_memory(0).unwrap();
    let refused = memory.create_mapping(MappingOptions::default(), 0, 0);
    assert_eq!(code(refused), Some(IOReturn::UNSUPPORTED));
}

#[test]
fn memory_of_a_bar_of_ports_or_of_none_is_refused() {
    let mut unusual = Unusual::with_memory(1);
    let ports = iohost_device_backend::BarInfo { size: 0x20, kind: 0x01, mappable: Vec::new() };
    unusual.bars[1] = Some(ports);
    let (host, _) = on(unusual);
    let copy = |bar| code(host.device.copy_device_memory(bar));
    assert_eq!(copy(1), Some(IOReturn::UNSUPPORTED));
    assert_eq!(copy(2), Some(IOReturn::NOT_FOUND));
    assert_eq!(copy(7), Some(IOReturn::BAD_ARGUMENT));
    assert_eq!(copy(0), None);
    host.device.close().unwrap();
    assert_eq!(copy(0), Some(IOReturn::NOT_OPEN));
}

#[test]
fn registers_that_are_mapped_are_read_and_written_where_they_are() {
    let mut unusual = Unusual::with_memory(1);
    unusual.bars[0].as_mut().unwrap().mappable.push(0..PAGE);
    let (host, backend) = on(unusual);
    let bar = host.device.map_bar::<Registers>(0).unwrap();
    let mapped = bar.mapped().expect("all of it can be mapped");
    bar.write(WORD, 0x1234_5678);
    let mut seen = [0; 4];
    backend.memory.as_ref().unwrap().read_at(0x10, &mut seen);
    assert_eq!(u32::from_le_bytes(seen), 0x1234_5678);
    mapped.write(WORD, 7);
    assert_eq!((bar.read(WORD), mapped.read(WORD)), (7, 7));
}

fn arena(device: &IOPCIDevice, length: u64, max_address_bits: u32) -> Result<DmaArena> {
    DmaArena::create(device, DmaArenaOptions { length, max_address_bits, huge_pages: false })
}

#[test]
fn buffers_of_an_arena_are_prepared_and_completed_without_mapping_anything() {
    let (host, backend) = on(Unusual::new(Board::default()));
    let arena = arena(&host.device, 64 * PAGE, 0).unwrap();
    assert_eq!(backend.maps.load(SeqCst), 1);
    let command = IODMACommand::create(&host.device, 0).unwrap();
    let mut addresses = Vec::new();
    for _ in 0..100 {
        let buffer = arena.allocate(MemoryDirection::InOut, 3 * PAGE, 1).unwrap();
        let prepared = command.prepare_part_for_dma(buffer, 10, 5000).unwrap();
        assert_eq!((prepared.segments().len(), prepared.length()), (1, 5000));
        addresses.push(prepared.address());
        prepared.complete_dma().unwrap();
    }
    assert_eq!(backend.maps.load(SeqCst), 1, "mapped once, with the arena");
    // What is free again is given out again.
    assert!(addresses.iter().all(|address| *address == addresses[0]), "{addresses:x?}");
    let own = command.prepare_for_dma(buffer(PAGE)).unwrap();
    assert_eq!(backend.maps.load(SeqCst), 2, "a buffer of its own is mapped for itself");
    drop(own);
}

#[test]
fn the_device_reaches_buffers_of_an_arena_where_they_are_said_to_be() {
    let bench = Bench::new();
    bench.device.set_bus_master(true);
    let arena = arena(&bench.device, 64 * PAGE, 0).unwrap();
    let command = IODMACommand::create(&bench.device, 0).unwrap();
    let mut held = Vec::new();
    for n in 0..10_u8 {
        let alignment = 1 << (n % 4 + 12);
        let buffer = arena.allocate(MemoryDirection::InOut, 5000, alignment).unwrap();
        let prepared = command.prepare_for_dma(buffer).unwrap();
        assert_eq!(prepared.address() % alignment, 0);
        bench.bus(|bus| bus.dma_write(prepared.address(), &[n; 5000]));
        held.push(prepared);
    }
    for (n, prepared) in held.iter().enumerate() {
        let mut seen = vec![0xff; 5000];
        prepared.read_at(0, &mut seen).unwrap();
        assert_eq!(seen, vec![n as u8; 5000], "buffer {n}");
    }
    assert_eq!(bench.rig.function().blocked_dma(), 0);
}

#[test]
fn a_buffer_of_an_arena_is_zeroed_and_one_that_has_no_room_is_refused() {
    let bench = Bench::new();
    let arena = arena(&bench.device, 4 * PAGE - 5, 0).unwrap();
    assert_eq!(arena.length(), 4 * PAGE);
    let allocate = |bytes, alignment| arena.allocate(MemoryDirection::InOut, bytes, alignment);
    let mut first = allocate(4 * PAGE, 1).unwrap();
    pattern(&mut first, 1);
    assert_eq!(code(allocate(1, 1)), Some(IOReturn::NO_MEMORY));
    drop(first);
    let mut again = allocate(4 * PAGE, 1).unwrap();
    assert_eq!(read(&again.memory_descriptor()), vec![0; 4 * PAGE as usize]);
    again.set_length(10).unwrap();
    let handle = again.memory_descriptor();
    drop(again);
    assert_eq!(code(allocate(1, 1)), Some(IOReturn::NO_MEMORY), "a handle still has it");
    drop(handle);
    assert_eq!(code(allocate(4 * PAGE + 1, 1)), Some(IOReturn::NO_MEMORY));
    assert_eq!(code(allocate(u64::MAX, 1)), Some(IOReturn::NO_MEMORY));
    assert_eq!(code(allocate(0, 1)), Some(IOReturn::NO_MEMORY));
    assert_eq!(code(allocate(1, 3)), Some(IOReturn::BAD_ARGUMENT));
    assert_eq!(code(super::memory::arena(&bench.device, 0, 0)), Some(IOReturn::NO_MEMORY));
    assert_eq!(code(super::memory::arena(&bench.device, u64::MAX, 0)), Some(IOReturn::NO_MEMORY));
}

#[test]
fn an_arena_obeys_the_devices_limit_and_a_command_refuses_one_above_its_own() {
    let mut unusual = Unusual::new(Board::default());
    unusual.iova = vec![0x10_0000..=0x1f_ffff];
    let (host, _) = on(unusual);
    assert_eq!(code(arena(&host.device, PAGE, 20)), Some(IOReturn::NO_SPACE), "all is above");
    assert_eq!(code(arena(&host.device, PAGE, 256)), Some(IOReturn::BAD_ARGUMENT));
    assert_eq!(code(arena(&host.device, PAGE, 5)), Some(IOReturn::NO_MEMORY));
    let arena = arena(&host.device, PAGE, 21).unwrap();
    let prepare = |bits| {
        let buffer = arena.allocate(MemoryDirection::InOut, PAGE, 1).unwrap();
        code(IODMACommand::create(&host.device, bits).unwrap().prepare_for_dma(buffer))
    };
    assert_eq!(prepare(21), None);
    assert_eq!(prepare(20), Some(IOReturn::MESSAGE_TOO_LARGE));
}

#[test]
fn an_arena_is_out_of_the_devices_reach_when_its_last_buffer_is_gone() {
    let bench = Bench::new();
    bench.device.set_bus_master(true);
    let arena = arena(&bench.device, 4 * PAGE, 0).unwrap();
    let command = IODMACommand::create(&bench.device, 0).unwrap();
    let buffer = arena.allocate(MemoryDirection::InOut, PAGE, 1).unwrap();
    drop(arena);
    let prepared = command.prepare_for_dma(buffer).unwrap();
    let address = prepared.address();
    bench.bus(|bus| bus.dma_write(address, b"there"));
    assert_eq!(bench.rig.function().blocked_dma(), 0);
    drop(prepared);
    bench.bus(|bus| bus.dma_write(address, b"gone"));
    assert_eq!(bench.rig.function().blocked_dma(), 1);
}

#[test]
fn an_arena_of_huge_pages_begins_on_one_or_says_what_to_set() {
    let bench = Bench::new();
    let options = DmaArenaOptions { length: 1, max_address_bits: 0, huge_pages: true };
    match DmaArena::create(&bench.device, options) {
        Ok(arena) => {
            assert_eq!(arena.length(), 2 << 20);
            let buffer = arena.allocate(MemoryDirection::InOut, PAGE, 2 << 20).unwrap();
            let command = IODMACommand::create(&bench.device, 0).unwrap();
            assert_eq!(command.prepare_for_dma(buffer).unwrap().address() % (2 << 20), 0);
        }
        Err(err) => {
            assert_eq!(err.code(), IOReturn::NO_MEMORY);
            assert!(err.message().contains("sysctl vm.nr_hugepages"), "{err}");
        }
    }
}

#[test]
fn a_buffer_of_an_arena_is_not_for_clients_who_would_get_all_of_it() {
    let bench = Bench::new();
    let arena = arena(&bench.device, 4 * PAGE, 0).unwrap();
    let part = arena.allocate(MemoryDirection::InOut, PAGE, 1).unwrap();
    let refused = iohost_driver::ClientMemory::read_only(&part);
    assert_eq!(code(refused), Some(IOReturn::UNSUPPORTED));
    drop(part);
    let all = arena.allocate(MemoryDirection::InOut, 4 * PAGE, 1).unwrap();
    let refused = iohost_driver::ClientMemory::read_only(&all);
    assert_eq!(code(refused), Some(IOReturn::UNSUPPORTED), "nor one that is all of it");
    assert!(iohost_driver::ClientMemory::read_only(&buffer(10)).is_ok());
}
