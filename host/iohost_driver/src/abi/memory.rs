//! Memory for devices.

use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;

use iohost_driver_abi::HostMemory;
use iohost_interface::IOReturn;

use super::{adopt, host, owned};

owned! {
    /// Memory for a device.
    Memory(HostMemory) released by device.memory_release
}

impl Memory {
    /// Option 1: of huge pages.
    pub(crate) fn create(len: u64, options: u32) -> Result<(Self, OwnedFd), IOReturn> {
        let (mut memory, mut fd) = (ptr::null_mut(), -1);
        let status = host!(device.memory_create(len, options, &raw mut memory, &raw mut fd));
        let memory = Self(adopt(status, memory)?);
        // SAFETY: contract of `memory_create`: on success an open descriptor that is ours.
        Ok((memory, unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}
