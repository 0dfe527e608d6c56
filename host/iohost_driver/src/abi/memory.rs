//! Memory for devices.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use iohost_driver_abi::HostMemory;
use iohost_interface::IOReturn;

use super::{adopt, host, owned};

owned! {
    /// Memory for a device.
    Memory(HostMemory) released by device.memory_release
}

impl Memory {
    pub(crate) fn attach(
        file: BorrowedFd<'_>,
        len: u64,
        read_only: bool,
    ) -> Result<Self, IOReturn> {
        let (file, options, mut memory) = (file.as_raw_fd(), u32::from(read_only), ptr::null_mut());
        let status = host!(device.memory_attach(file, len, options, &raw mut memory));
        Ok(Self(adopt(status, memory)?))
    }

    /// Option 1: of huge pages.
    pub(crate) fn create(len: u64, options: u32) -> Result<(Self, OwnedFd), IOReturn> {
        let (mut memory, mut fd) = (ptr::null_mut(), -1);
        let status = host!(device.memory_create(len, options, &raw mut memory, &raw mut fd));
        let memory = Self(adopt(status, memory)?);
        // SAFETY: contract of `memory_create`: on success an open descriptor that is ours.
        Ok((memory, unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}
