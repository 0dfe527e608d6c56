//! Memory of a driver's in this process, and of this process's for a driver.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Weak;

use iohost_interface::IOReturn;
use iohost_memory::{AttachError, SharedMemory};

use crate::calls::Calls;

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

/// Memory of this program's that the driver of a session can use, from
/// [`Session::offer_memory`](crate::Session::offer_memory): for what is too long for a call's
/// bytes, either way, and for what a device is to read or write in place. A call passes its
/// [`number`](Self::number).
///
/// Dropping it takes the offer back. A driver that has it already keeps it until it is done. Bytes
/// are copied in and out, as the driver and its device may write at any time. Callable from any
/// thread.
pub struct OfferedMemory {
    memory: ClientMemory,
    number: u64,
    calls: Weak<Calls>,
}

impl OfferedMemory {
    pub(crate) fn offer(
        calls: Weak<Calls>,
        bytes: usize,
        read_only: bool,
    ) -> Result<Self, OfferError> {
        let memory = SharedMemory::create(c"iohost-offer", bytes).map_err(OfferError::Memory)?;
        let file = memory.as_fd().try_clone_to_owned().map_err(OfferError::Memory)?;
        let (file, _) = iohost_memory::offer(file, read_only).map_err(OfferError::Attach)?;
        let session = calls.upgrade().ok_or(IOReturn::OFFLINE).map_err(OfferError::Driver)?;
        let number = session.offer_memory(file, read_only).map_err(OfferError::Driver)?;
        Ok(Self { memory: ClientMemory(memory), number, calls })
    }

    /// What a call passes for it: a number that is never used twice in its session.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Bytes; never zero.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Copies bytes out. Errors: `Outside`.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<(), NoAccess> {
        self.memory.read_at(offset, data)
    }

    /// Copies bytes in. Errors: `Outside`.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> Result<(), NoAccess> {
        self.memory.write_at(offset, data)
    }
}

impl Drop for OfferedMemory {
    fn drop(&mut self) {
        if let Some(calls) = self.calls.upgrade() {
            calls.withdraw_memory(self.number);
        }
    }
}

impl fmt::Debug for OfferedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OfferedMemory({}, {} bytes)", self.number, self.len())
    }
}

/// Why memory was not offered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// There is none, or none of that length.
    #[error("making the memory")]
    Memory(#[source] io::Error),
    /// It cannot be shared.
    #[error("sharing the memory")]
    Attach(#[source] AttachError),
    /// The driver was not told: `OFFLINE`; `BUSY` when it has not read the earlier calls.
    #[error("telling the driver: {0}")]
    Driver(IOReturn),
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

    /// Reads bytes of a file into the memory, without a copy in between.
    ///
    /// Errors: `InvalidInput` for what [`write_at`](Self::write_at) refuses; `UnexpectedEof` for a
    /// file that has fewer bytes, and what `pread(2)` says, after a part may have been read.
    pub fn read_from(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        position: u64,
    ) -> io::Result<()> {
        self.check(offset, len).map_err(invalid)?;
        if !self.is_writable() {
            return Err(invalid(NoAccess::ReadOnly));
        }
        self.0.read_from(offset, len, file, position)
    }

    /// Writes bytes of the memory to a file, without a copy in between.
    ///
    /// Errors: `InvalidInput` for what [`read_at`](Self::read_at) refuses; what `pwrite(2)` says,
    /// after a part may have been written.
    pub fn write_to(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        position: u64,
    ) -> io::Result<()> {
        self.check(offset, len).map_err(invalid)?;
        self.0.write_to(offset, len, file, position)
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

fn invalid(err: NoAccess) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, err)
}
