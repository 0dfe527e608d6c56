//! Memory of a driver's in this process.

use std::os::fd::OwnedFd;

use iohost_memory::{AttachError, SharedMemory};

/// Memory that a driver offers, mapped; from
/// [`Session::map_memory`](crate::Session::map_memory). Dropping it unmaps it.
///
/// It stays what it is when the session or the driver ends, but then nobody writes there any more.
/// Driver and device may write at any time: bytes are copied in and out, nothing is lent, and what
/// is being written meanwhile arrives torn. Callable from any thread.
#[derive(Debug)]
pub struct ClientMemory(SharedMemory);

/// An access that the memory does not allow. Nothing was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoAccess {
    /// The range is not inside the memory.
    #[error("{len} bytes at {offset} are not inside {size} bytes of memory")]
    Outside {
        /// First byte meant.
        offset: usize,
        /// Bytes meant.
        len: usize,
        /// Bytes there are.
        size: usize,
    },
    /// The driver offers the memory for reading.
    #[error("the driver offers this memory for reading only")]
    ReadOnly,
}

impl ClientMemory {
    pub(crate) fn map(file: OwnedFd, len: usize, read_only: bool) -> Result<Self, AttachError> {
        match read_only {
            true => SharedMemory::attach_read_only(file, len).map(Self),
            false => SharedMemory::attach(file, len).map(Self),
        }
    }

    /// Bytes; never zero.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the driver lets this program write.
    pub fn is_writable(&self) -> bool {
        self.0.is_writable()
    }

    /// Copies bytes out. Errors: `Outside`.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<(), NoAccess> {
        self.check(offset, data.len())?;
        self.0.read_at(offset, data);
        Ok(())
    }

    /// Copies bytes in. Errors: `Outside`, `ReadOnly`.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> Result<(), NoAccess> {
        self.check(offset, data.len())?;
        if !self.is_writable() {
            return Err(NoAccess::ReadOnly);
        }
        self.0.write_at(offset, data);
        Ok(())
    }

    /// Where it starts in this process, for code in another language. Page-aligned; a write faults
    /// unless it [`is_writable`](Self::is_writable).
    pub fn address(&self) -> *mut u8 {
        self.0.address()
    }

    fn check(&self, offset: usize, len: usize) -> Result<(), NoAccess> {
        let size = self.len();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(NoAccess::Outside { offset, len, size }),
        }
    }
}
