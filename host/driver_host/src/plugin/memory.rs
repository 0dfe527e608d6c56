//! Memory and DMA of the device table.

use std::os::fd::{AsFd, IntoRawFd};

use iohost_driver_abi::{HostDevice, HostMemory};
use iohost_interface::IOReturn;
use iohost_memory::SharedMemory;

use super::object::{give, object, released, shared, written};
use crate::Device;

pub(super) unsafe extern "C" fn memory_create(
    len: u64,
    memory: *mut *mut HostMemory,
    fd: *mut i32,
) -> i32 {
    let made = usize::try_from(len).map_err(|_| IOReturn::NO_MEMORY).and_then(|len| {
        let memory = SharedMemory::create(c"iohost-dma", len).map_err(|_| IOReturn::NO_MEMORY)?;
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

pub(super) unsafe extern "C" fn memory_release(memory: *mut HostMemory) {
    // SAFETY: contract 2.
    unsafe { released::<SharedMemory>(memory) }
}

pub(super) unsafe extern "C" fn dma_prepare(
    device: *mut HostDevice,
    memory: *mut HostMemory,
    address_bits: u32,
    address: *mut u64,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    // SAFETY: contract 2.
    let memory = unsafe { shared::<SharedMemory>(memory) };
    let bits = u8::try_from(address_bits).ok().filter(|bits| *bits <= 64);
    let bits = bits.ok_or(IOReturn::BAD_ARGUMENT);
    // SAFETY: contract 4.
    unsafe { written(address, bits.and_then(|bits| device.prepare(memory, bits))) }
}

pub(super) unsafe extern "C" fn dma_complete(device: *mut HostDevice, address: u64) -> i32 {
    // SAFETY: contract 2.
    IOReturn::code(&unsafe { object::<Device>(device) }.complete(address))
}
