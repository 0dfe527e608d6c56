//! Memory and DMA of the device table.

use std::os::fd::{AsFd, BorrowedFd, IntoRawFd};
use std::slice;

use iohost_driver_abi::{DmaPiece, DmaSegment, HostDevice, HostMemory};
use iohost_interface::{IOReturn, with_sources};
use iohost_memory::{HUGE_PAGE, SharedMemory};
use log::warn;

use super::object::{give, object, released, shared, written};
use crate::Device;
use crate::device::{Limits, Piece};

/// Memory is to have huge pages.
const HUGE: u32 = 0x1;

/// A memory file is for reading only.
const READ_ONLY: u32 = 0x1;

pub(super) unsafe extern "C" fn memory_create(
    len: u64,
    options: u32,
    memory: *mut *mut HostMemory,
    fd: *mut i32,
) -> i32 {
    let made = made(len, options).and_then(|memory| {
        let fd = memory.as_fd().try_clone_to_owned().map_err(|_| IOReturn::NO_RESOURCES)?;
        Ok((memory, fd))
    });
    match made {
        Ok((made, file)) => {
            // SAFETY: contract 4.
            unsafe { fd.write(file.into_raw_fd()) };
            // SAFETY: contract 4.
            unsafe { written(memory, Ok(give(made))) }
        }
        Err(status) => status.0,
    }
}

fn made(len: u64, options: u32) -> Result<SharedMemory, IOReturn> {
    let len = usize::try_from(len).map_err(|_| IOReturn::NO_MEMORY)?;
    let made = match options {
        0 => SharedMemory::create(c"iohost-dma", len),
        HUGE if !len.is_multiple_of(HUGE_PAGE) => return Err(IOReturn::BAD_ARGUMENT),
        HUGE => SharedMemory::create_huge(c"iohost-dma", len),
        _ => return Err(IOReturn::BAD_ARGUMENT),
    };
    made.map_err(|err| {
        warn!(len, options, reason = with_sources(&err); "no memory for the driver");
        IOReturn::NO_MEMORY
    })
}

pub(super) unsafe extern "C" fn memory_attach(
    fd: i32,
    len: u64,
    options: u32,
    memory: *mut *mut HostMemory,
) -> i32 {
    // SAFETY: contract 4: open for the call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let attached = fd.try_clone_to_owned().map_err(|_| IOReturn::NO_RESOURCES).and_then(|fd| {
        let len = usize::try_from(len).map_err(|_| IOReturn::NO_MEMORY)?;
        let attached = match options {
            0 => SharedMemory::attach(fd, len),
            READ_ONLY => SharedMemory::attach_read_only(fd, len),
            _ => return Err(IOReturn::BAD_ARGUMENT),
        };
        attached.map_err(|err| {
            warn!(len, options, reason = with_sources(&err); "a memory file cannot be used");
            IOReturn::NO_MEMORY
        })
    });
    // SAFETY: contract 4.
    unsafe { written(memory, attached.map(give)) }
}

pub(super) unsafe extern "C" fn memory_release(memory: *mut HostMemory) {
    // SAFETY: contract 2.
    unsafe { released::<SharedMemory>(memory) }
}

pub(super) unsafe extern "C" fn dma_prepare(
    device: *mut HostDevice,
    pieces: *const DmaPiece,
    piece_count: usize,
    address_bits: u32,
    alignment: u64,
    segments: *mut DmaSegment,
    segment_count: *mut usize,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    let pieces = match piece_count {
        0 => &[][..],
        // SAFETY: contract 4, and not empty, so the pointer is one.
        count => unsafe { slice::from_raw_parts(pieces, count) },
    };
    let owned = pieces.iter().map(|piece| {
        // SAFETY: contract 2.
        let memory = unsafe { shared::<SharedMemory>(piece.memory) };
        let end = piece.offset.checked_add(piece.len).ok_or(IOReturn::OVERRUN)?;
        Ok(Piece { memory, bytes: piece.offset..end })
    });
    let prepared = owned
        .collect::<Result<Vec<_>, _>>()
        .and_then(|pieces| device.prepare(pieces, limits(address_bits, alignment)?));
    let count = prepared.map(|prepared| {
        for (place, segment) in prepared.iter().enumerate() {
            let segment = DmaSegment { address: segment.address, len: segment.len };
            // SAFETY: contract 4: there is room for as many as there are pieces, and no more were
            // made of them.
            let at = unsafe { segments.add(place) };
            // SAFETY: the same.
            unsafe { at.write(segment) };
        }
        prepared.len()
    });
    // SAFETY: contract 4.
    unsafe { written(segment_count, count) }
}

fn limits(address_bits: u32, alignment: u64) -> Result<Limits, IOReturn> {
    let bits = u8::try_from(address_bits).ok().filter(|bits| *bits <= 64);
    let bits = match bits.ok_or(IOReturn::BAD_ARGUMENT)? {
        0 => 64,
        bits => bits,
    };
    if !alignment.is_power_of_two() {
        return Err(IOReturn::BAD_ARGUMENT);
    }
    Ok(Limits { bits, alignment })
}

pub(super) unsafe extern "C" fn dma_complete(device: *mut HostDevice, address: u64) -> i32 {
    // SAFETY: contract 2.
    IOReturn::code(&unsafe { object::<Device>(device) }.complete(address))
}
