//! `IOBufferMemoryDescriptor` and `IODMACommand`.

use std::sync::Arc;

use iohost_dispatch::{Engine, EngineClock};
use iohost_driver::prelude::*;

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
    assert_eq!(buffer.len(), 10_000);
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
    for bits in [0, 13, 28, 32, 64, 255] {
        assert_eq!(create(bits), None, "{bits}");
    }
}

#[test]
fn a_prepared_buffer_is_one_range_of_its_length_on_a_page_below_the_limit() {
    let bench = bench();
    for bits in [16, 28, 32, 64, 255] {
        let buffer = prepared(&bench, bits, 10_000);
        assert_eq!(buffer.len(), 10_000);
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
