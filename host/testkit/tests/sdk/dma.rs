//! `IOBufferMemoryDescriptor` and `IODMACommand`.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use iohost_dispatch::{Engine, EngineClock};
use iohost_driver::prelude::*;
use iohost_driver::{
    AddressSegment, DmaOperation, DmaSpecification, IOMemoryDescriptor, MemoryDirection,
};

use crate::board::{Board, Unusual};
use crate::probe::{Bench, Host};

const PAGE: u64 = 4096;

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
}

/// A bench whose device may make DMA.
fn bench() -> Bench {
    let bench = Bench::new();
    bench.device.set_bus_master(true);
    bench
}

fn prepared(bench: &Bench, bits: u32, len: usize) -> PreparedDma {
    let command = IODMACommand::create(&bench.device, bits).unwrap();
    command.prepare_for_dma(IOBufferMemoryDescriptor::create(len).unwrap()).unwrap()
}

#[test]
fn a_buffer_is_zeroed_and_has_its_length_and_one_of_no_bytes_is_refused() {
    let _bench = bench();
    let buffer = IOBufferMemoryDescriptor::create(10_000).unwrap();
    assert_eq!(buffer.length(), 10_000);
    let mut data = vec![1; 10_000];
    buffer.read_at(0, &mut data).unwrap();
    assert_eq!(data, vec![0; 10_000]);
    assert_eq!(code(IOBufferMemoryDescriptor::create(0)), Some(IOReturn::NO_MEMORY));
}

#[test]
fn a_buffer_of_more_memory_than_there_is_is_refused() {
    let _bench = bench();
    assert_eq!(code(IOBufferMemoryDescriptor::create(usize::MAX)), Some(IOReturn::NO_MEMORY));
    assert_eq!(code(IOBufferMemoryDescriptor::create(1 << 62)), Some(IOReturn::NO_MEMORY));
}

#[test]
fn bytes_of_a_buffer_read_back_and_none_beyond_its_end_can_be_reached() {
    let _bench = bench();
    let mut buffer = IOBufferMemoryDescriptor::create(100).unwrap();
    buffer.write_at(90, b"0123456789").unwrap();
    let mut data = [0; 10];
    buffer.read_at(90, &mut data).unwrap();
    assert_eq!(&data, b"0123456789");
    for offset in [91, 100, 4096, usize::MAX] {
        assert_eq!(code(buffer.write_at(offset, &data)), Some(IOReturn::OVERRUN), "{offset}");
        assert_eq!(code(buffer.read_at(offset, &mut data)), Some(IOReturn::OVERRUN), "{offset}");
    }
}

#[test]
fn address_bits_that_no_device_has_are_refused() {
    let bench = bench();
    let create = |bits| code(IODMACommand::create(&bench.device, bits));
    assert_eq!(create(256), Some(IOReturn::BAD_ARGUMENT));
    assert_eq!(create(u32::MAX), Some(IOReturn::BAD_ARGUMENT));
    assert_eq!(create(5), Some(IOReturn::NO_MEMORY));
    for bits in 1..=12 {
        assert_eq!(create(bits), Some(IOReturn::NO_MEMORY), "{bits}");
    }
    for bits in [0, 13, 28, 32, 64, 255] {
        assert_eq!(create(bits), None, "{bits}");
    }
    for alignment in [0, 3, u64::MAX] {
        let specification = DmaSpecification { max_address_bits: 0, alignment };
        let refused = code(IODMACommand::create_with(&bench.device, specification));
        assert_eq!(refused, Some(IOReturn::BAD_ARGUMENT), "{alignment}");
    }
}

#[test]
fn every_limit_that_leaves_a_page_is_obeyed() {
    let bench = bench();
    for bits in 13..=64_u32 {
        let buffer = prepared(&bench, bits, 1);
        assert!(bits == 64 || buffer.address() >> bits == 0, "{bits}");
        // As many as there are below the limit, and no more: 2^14 has three pages without the
        // first one, which is never given out.
        if bits <= 14 {
            let mut all = vec![buffer];
            let command = IODMACommand::create(&bench.device, bits).unwrap();
            let refused = loop {
                let page = IOBufferMemoryDescriptor::create(1).unwrap();
                match command.prepare_for_dma(page) {
                    Ok(page) => all.push(page),
                    Err(err) => break err,
                }
            };
            assert_eq!(refused.code(), IOReturn::NO_SPACE);
            assert_eq!(all.len(), if bits == 13 { 1 } else { 3 });
        }
    }
}

#[test]
fn an_alignment_of_a_command_or_of_a_buffer_is_that_of_its_address() {
    let bench = bench();
    let other = prepared(&bench, 0, 1);
    for shift in [0, 3, 12, 13, 16, 21] {
        let alignment = 1 << shift;
        let specification = DmaSpecification { max_address_bits: 0, alignment };
        let command = IODMACommand::create_with(&bench.device, specification).unwrap();
        let buffer = IOBufferMemoryDescriptor::create(10_000).unwrap();
        assert_eq!(command.prepare_for_dma(buffer).unwrap().address() % alignment, 0);

        let buffer =
            IOBufferMemoryDescriptor::create_aligned(MemoryDirection::In, 10_000, alignment);
        let any = IODMACommand::create(&bench.device, 0).unwrap();
        assert_eq!(any.prepare_for_dma(buffer.unwrap()).unwrap().address() % alignment, 0);
    }
    drop(other);
    let specification = DmaSpecification { max_address_bits: 0, alignment: 16 };
    let command = IODMACommand::create_with(&bench.device, specification).unwrap();
    let prepare = |offset| {
        let buffer = IOBufferMemoryDescriptor::create(10_000).unwrap();
        code(command.prepare_part_for_dma(buffer, offset, 100))
    };
    assert_eq!(prepare(32), None);
    assert_eq!(prepare(8), Some(IOReturn::NOT_ALIGNED));
}

#[test]
fn whole_huge_pages_are_huge_pages_for_the_device_too_where_it_has_room_for_them() {
    const HUGE_PAGE: u64 = 2 << 20;
    let bench = bench();
    let other = prepared(&bench, 0, 1);
    for bits in [0, 32, 64] {
        assert_eq!(prepared(&bench, bits, 2 * HUGE_PAGE as usize).address() % HUGE_PAGE, 0);
    }
    assert_ne!(prepared(&bench, 31, 2 * HUGE_PAGE as usize).address() % HUGE_PAGE, 0);
    drop(other);
}

#[test]
fn a_prepared_buffer_is_one_range_of_its_length_on_a_page_below_the_limit() {
    let bench = bench();
    for bits in [16, 28, 32, 64, 255] {
        let buffer = prepared(&bench, bits, 10_000);
        assert_eq!(buffer.length(), 10_000);
        assert_eq!(buffer.address() % PAGE, 0);
        assert_ne!(buffer.address(), 0);
        let last = buffer.address() + 9_999;
        assert!(bits >= 64 || last >> bits == 0, "{last:#x} has more than {bits} bits");
    }
}

#[test]
fn the_device_reaches_every_byte_of_a_prepared_buffer_and_the_driver_sees_its_writes() {
    let bench = bench();
    let mut buffer = prepared(&bench, 0, 10_000);
    let sent: Vec<u8> = (0..10_000_u32).map(|n| (n * 7) as u8).collect();
    bench.bus(|bus| bus.dma_write(buffer.address(), &sent));
    let mut seen = vec![0; 10_000];
    buffer.read_at(0, &mut seen).unwrap();
    assert_eq!(seen, sent);
    buffer.write_at(5_000, b"from the driver").unwrap();
    let mut fetched = [0; 15];
    bench.bus(|bus| bus.dma_read(buffer.address() + 5_000, &mut fetched));
    assert_eq!(&fetched, b"from the driver");
    assert_eq!(bench.rig.function().blocked_dma(), 0);
}

#[test]
fn a_part_of_a_buffer_is_prepared_at_its_place_in_the_page_and_the_other_pages_are_not_reached() {
    let bench = bench();
    let mut buffer = IOBufferMemoryDescriptor::create(5 * PAGE as usize).unwrap();
    buffer.write_at(0, &[0xee; 5 * PAGE as usize]).unwrap();
    let command = IODMACommand::create(&bench.device, 0).unwrap();
    let (offset, length) = (PAGE + 100, 2 * PAGE);
    let mut prepared = command.prepare_part_for_dma(buffer, offset, length).unwrap();
    let (at, len, memory) = prepared.preparation();
    assert_eq!((at, len, memory.length()), (offset, length, 5 * PAGE));
    let address = prepared.address();
    assert_eq!(address % PAGE, 100);
    let sent: Vec<u8> = (0..length).map(|n| n as u8).collect();
    bench.bus(|bus| bus.dma_write(address, &sent));
    assert_eq!(bench.rig.function().blocked_dma(), 0);
    let mut seen = vec![0; length as usize];
    prepared.read_at(0, &mut seen).unwrap();
    assert_eq!(seen, sent);
    // Before the first page of the part, and behind its last byte, which is all that the model of
    // an IOMMU maps of the last page.
    bench.bus(|bus| bus.dma_write(address - 101, &[1]));
    bench.bus(|bus| bus.dma_write(address + length, &[1]));
    assert_eq!(bench.rig.function().blocked_dma(), 2);
    prepared.write_at(0, b"first").unwrap();
    let buffer = prepared.complete_dma().unwrap();
    let mut all = vec![0; 5 * PAGE as usize];
    buffer.read_at(0, &mut all).unwrap();
    let (start, end) = (offset as usize, (offset + length) as usize);
    assert_eq!(all[start..start + 5], *b"first");
    assert_eq!(all[start + 5..end], sent[5..]);
    assert!(all[..start].iter().chain(&all[end..]).all(|byte| *byte == 0xee));
}

#[test]
fn a_part_that_is_not_inside_or_has_no_bytes_is_an_overrun() {
    let bench = bench();
    let command = IODMACommand::create(&bench.device, 0).unwrap();
    let prepare = |offset, length| {
        let buffer = IOBufferMemoryDescriptor::create(1000).unwrap();
        code(command.prepare_part_for_dma(buffer, offset, length))
    };
    assert_eq!(prepare(0, 0), None, "all of it");
    assert_eq!(prepare(999, 1), None);
    for (offset, length) in [(0, 1001), (1000, 1), (1, 0), (u64::MAX, 2), (2, u64::MAX)] {
        assert_eq!(prepare(offset, length), Some(IOReturn::OVERRUN), "{length} at {offset}");
    }
    let mut empty = IOBufferMemoryDescriptor::create(1000).unwrap();
    empty.set_length(0).unwrap();
    assert_eq!(code(command.prepare_for_dma(empty)), Some(IOReturn::OVERRUN));
    let mut some = IOBufferMemoryDescriptor::create(1000).unwrap();
    some.set_length(10).unwrap();
    assert_eq!(command.prepare_for_dma(some).unwrap().length(), 10);
}

/// A composed descriptor of parts of new buffers, each with its first byte and length.
fn composed(parts: &[(u64, u64)]) -> IOMemoryDescriptor {
    let part = |&(offset, length): &(u64, u64)| {
        let buffer = IOBufferMemoryDescriptor::create((offset + length) as usize).unwrap();
        buffer.memory_descriptor().sub_descriptor(MemoryDirection::InOut, offset, length).unwrap()
    };
    let parts: Vec<_> = parts.iter().map(part).collect();
    IOMemoryDescriptor::with_descriptors(MemoryDirection::InOut, &parts).unwrap()
}

#[test]
fn segments_are_all_of_the_memory_in_order_and_as_few_as_its_pages_allow() {
    let bench = bench();
    let command = IODMACommand::create(&bench.device, 0).unwrap();
    for (parts, expected) in [
        (&[(0, 10_000)][..], &[10_000][..]),
        // These meet on pages, though their memory is not one.
        (&[(0, PAGE), (0, 2 * PAGE), (0, 77)], &[3 * PAGE + 77]),
        (&[(100, PAGE - 100), (PAGE, 10)], &[PAGE - 90]),
        // These meet inside a page.
        (&[(0, 100), (0, 100)], &[100, 100]),
        (&[(0, PAGE), (8, 100), (0, 100), (0, PAGE), (0, PAGE)], &[PAGE, 100, 100, 2 * PAGE]),
    ] {
        let memory = composed(parts);
        let length = memory.length();
        let prepared = command.prepare_for_dma(memory.clone()).unwrap();
        let lengths: Vec<_> = prepared.segments().iter().map(|segment| segment.length).collect();
        assert_eq!(lengths, expected, "{parts:?}");
        assert_eq!(lengths.iter().sum::<u64>(), length);
        let sent: Vec<u8> = (0..length).map(|n| (n * 7 + n / 251) as u8).collect();
        let mut at = 0;
        for AddressSegment { address, length } in prepared.segments() {
            let part = &sent[at..at + *length as usize];
            bench.bus(|bus| bus.dma_write(*address, part));
            at += part.len();
        }
        let mut seen = vec![0; length as usize];
        memory.read_at(0, &mut seen).unwrap();
        assert!(seen == sent, "{parts:?}");
        let addresses: Vec<_> = prepared.segments().iter().map(|one| one.address).collect();
        prepared.complete_dma().unwrap();
        let before = bench.rig.function().blocked_dma();
        for address in &addresses {
            bench.bus(|bus| bus.dma_write(*address, &[1]));
        }
        assert_eq!(bench.rig.function().blocked_dma() - before, addresses.len() as u64);
    }
    assert!(
        IODMACommand::create(&bench.device, 14)
            .unwrap()
            .prepare_for_dma(composed(&[(0, PAGE), (0, PAGE), (0, PAGE),]))
            .is_ok(),
        "all addresses were given back"
    );
}

#[test]
fn bytes_that_follow_in_the_same_memory_are_one_segment_though_they_meet_inside_a_page() {
    let bench = bench();
    let command = IODMACommand::create(&bench.device, 0).unwrap();
    let memory = IOBufferMemoryDescriptor::create(1000).unwrap().memory_descriptor();
    let part =
        |offset, length| memory.sub_descriptor(MemoryDirection::InOut, offset, length).unwrap();
    let joined = [part(10, 90), part(100, 50)];
    let joined = IOMemoryDescriptor::with_descriptors(MemoryDirection::InOut, &joined).unwrap();
    let prepared = command.prepare_for_dma(joined).unwrap();
    assert_eq!(prepared.segments().len(), 1);
    assert_eq!((prepared.address() % PAGE, prepared.length()), (10, 140));
}

#[test]
fn memory_whose_second_segment_finds_no_address_leaves_nothing_mapped() {
    let mut unusual = Unusual::new(Board::default());
    unusual.iova = vec![0x10_0000..=0x10_0fff];
    let backend = Arc::new(unusual);
    let engine = Engine::manual(EngineClock::Virtual).unwrap();
    let host = Host::start(engine, backend.clone());
    let command = IODMACommand::create(&host.device, 0).unwrap();
    let refused = command.prepare_for_dma(composed(&[(0, 10), (0, 10)]));
    assert_eq!(code(refused), Some(IOReturn::NO_SPACE));
    assert_eq!(backend.maps.load(SeqCst), 1, "the first one was");
    assert_eq!(code(command.prepare_for_dma(composed(&[(0, 10)]))), None, "and is no more");
}

#[test]
fn an_operation_copies_either_way_or_clears_and_needs_room_on_both_sides() {
    let bench = bench();
    let mut buffer = prepared(&bench, 0, 10_000);
    let mut data = IOBufferMemoryDescriptor::create(6_000).unwrap();
    let bytes: Vec<u8> = (0..6_000_u32).map(|n| (n * 11) as u8).collect();
    data.write_at(0, &bytes).unwrap();
    let data = data.memory_descriptor();
    buffer.perform_operation(DmaOperation::Write, 4_000, 5_000, 1_000, &data).unwrap();
    let mut seen = vec![0; 5_000];
    buffer.read_at(4_000, &mut seen).unwrap();
    assert_eq!(seen, bytes[1_000..]);
    buffer.perform_operation(DmaOperation::Zero, 4_500, 4_400, 0, &data).unwrap();
    buffer.perform_operation(DmaOperation::Read, 4_000, 5_000, 0, &data).unwrap();
    let mut seen = vec![0; 6_000];
    data.read_at(0, &mut seen).unwrap();
    let expected = [&bytes[1_000..1_500], &[0; 4_400], &bytes[5_900..], &bytes[5_000..]].concat();
    assert_eq!(seen, expected);

    let mut perform = |operation, at, length, from| {
        code(buffer.perform_operation(operation, at, length, from, &data))
    };
    for operation in [DmaOperation::Read, DmaOperation::Write] {
        assert_eq!(perform(operation, 0, 6_001, 0), Some(IOReturn::BAD_ARGUMENT));
        assert_eq!(perform(operation, 0, 10, 5_991), Some(IOReturn::UNDERRUN));
        assert_eq!(perform(operation, 0, 10, u64::MAX), Some(IOReturn::UNDERRUN));
    }
    for operation in [DmaOperation::Read, DmaOperation::Write, DmaOperation::Zero] {
        assert_eq!(perform(operation, 9_991, 10, 0), Some(IOReturn::UNDERRUN));
        assert_eq!(perform(operation, u64::MAX, 10, 0), Some(IOReturn::UNDERRUN));
        assert_eq!(perform(operation, 0, 10_001, 0), Some(IOReturn::BAD_ARGUMENT));
        assert_eq!(perform(operation, 10_000, 0, 0), None);
    }
}

#[test]
fn two_prepared_buffers_do_not_overlap() {
    let bench = bench();
    let (one, two) = (prepared(&bench, 0, 10_000), prepared(&bench, 0, 10_000));
    bench.bus(|bus| {
        bus.dma_write(one.address(), &[1; 10_000]);
        bus.dma_write(two.address(), &[2; 10_000]);
    });
    let mut data = vec![0; 10_000];
    one.read_at(0, &mut data).unwrap();
    assert_eq!(data, [1; 10_000]);
}

#[test]
fn a_completed_buffer_comes_back_with_its_bytes_and_is_out_of_the_devices_reach() {
    let bench = bench();
    let buffer = prepared(&bench, 0, 4096);
    let address = buffer.address();
    bench.bus(|bus| bus.dma_write(address, b"before"));
    let buffer = buffer.complete_dma().unwrap();
    bench.bus(|bus| bus.dma_write(address, b"after!"));
    assert_eq!(bench.rig.function().blocked_dma(), 1);
    let mut data = [0; 6];
    buffer.read_at(0, &mut data).unwrap();
    assert_eq!(&data, b"before");
    let command = IODMACommand::create(&bench.device, 0).unwrap();
    assert!(command.prepare_for_dma(buffer).is_ok(), "it can be prepared again");
}

#[test]
fn a_prepared_buffer_that_is_forgotten_is_completed() {
    let bench = bench();
    let buffer = prepared(&bench, 0, 4096);
    let address = buffer.address();
    drop(buffer);
    bench.bus(|bus| bus.dma_write(address, b"after"));
    assert_eq!(bench.rig.function().blocked_dma(), 1);
}

#[test]
fn addresses_that_were_given_back_are_given_out_again() {
    let bench = bench();
    // 2^14 has three pages without the first one, which is never given out.
    for _ in 0..100 {
        drop((prepared(&bench, 14, 4096), prepared(&bench, 14, 8192)));
    }
}

#[test]
fn a_buffer_that_finds_no_address_below_the_limit_is_refused() {
    let mut unusual = Unusual::new(Board::default());
    unusual.iova = vec![0x10_0000..=0x10_1fff];
    let host = Host::start(Engine::manual(EngineClock::Virtual).unwrap(), Arc::new(unusual));
    let prepare = |bits, len| {
        let command = IODMACommand::create(&host.device, bits).unwrap();
        command.prepare_for_dma(IOBufferMemoryDescriptor::create(len).unwrap())
    };
    assert_eq!(code(prepare(20, 4096)), Some(IOReturn::NO_SPACE), "all of it is above");
    assert_eq!(code(prepare(0, 0x2001)), Some(IOReturn::NO_SPACE));
    let whole = prepare(21, 0x2000).unwrap();
    assert_eq!(whole.address(), 0x10_0000);
    assert_eq!(code(prepare(0, 1)), Some(IOReturn::NO_SPACE));
    drop(whole);
    assert_eq!(code(prepare(0, 1)), None);
}

#[test]
fn memory_for_a_device_that_is_reached_without_dma_is_unsupported() {
    let mut unusual = Unusual::new(Board::default());
    unusual.iova = Vec::new();
    let host = Host::start(Engine::manual(EngineClock::Virtual).unwrap(), Arc::new(unusual));
    let command = IODMACommand::create(&host.device, 0).unwrap();
    let refused = command.prepare_for_dma(IOBufferMemoryDescriptor::create(1).unwrap());
    assert_eq!(code(refused), Some(IOReturn::UNSUPPORTED));
}

#[test]
fn an_operation_past_the_end_of_the_prepared_range_is_an_underrun() {
    let bench = bench();
    let mut buffer = prepared(&bench, 0, 100);
    let mut data = [0; 10];
    assert_eq!(buffer.write_at(90, &data), Ok(()));
    assert_eq!(buffer.read_at(90, &mut data), Ok(()));
    for offset in [91, 100, usize::MAX] {
        assert_eq!(code(buffer.write_at(offset, &data)), Some(IOReturn::UNDERRUN), "{offset}");
        assert_eq!(code(buffer.read_at(offset, &mut data)), Some(IOReturn::UNDERRUN), "{offset}");
    }
}
