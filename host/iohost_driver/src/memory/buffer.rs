//! Memory that a driver makes.

use std::fmt;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};

use iohost_interface::IOReturn;

use super::{Backing, IOMemoryDescriptor, MemoryDirection, Source};
use crate::{Error, Result, abi, ensure};

/// `IOBufferMemoryDescriptor`: zeroed, page-aligned memory that a device can be given.
///
/// Of its capacity a part is valid, all of it at first: that is what a device is given, and what
/// can be read and written.
pub struct IOBufferMemoryDescriptor {
    /// The valid bytes.
    memory: IOMemoryDescriptor,
    capacity: u64,
}

impl IOBufferMemoryDescriptor {
    /// Makes `capacity` zeroed bytes that a device may read and write.
    ///
    /// Errors: `NO_MEMORY` for a capacity of zero, or when there is none.
    pub fn create(capacity: usize) -> Result<Self> {
        Self::create_aligned(MemoryDirection::InOut, capacity as u64, 1)
    }

    /// Makes `capacity` zeroed bytes for a device that moves data in this direction and gets
    /// addresses that are multiples of `alignment`; of a page they are in any case.
    ///
    /// Errors: as [`create`](Self::create); `BAD_ARGUMENT` for an alignment that is no power of
    /// two.
    pub fn create_aligned(
        direction: MemoryDirection,
        capacity: u64,
        alignment: u64,
    ) -> Result<Self> {
        ensure!(
            alignment.is_power_of_two(),
            IOReturn::BAD_ARGUMENT,
            "an alignment of {alignment}, it has to be a power of two"
        );
        let source = Source::File(Backing::create(capacity, alignment, false)?);
        Ok(Self::of(IOMemoryDescriptor::of(direction, source, 0..capacity)))
    }

    /// All bytes of a descriptor.
    pub(super) fn of(memory: IOMemoryDescriptor) -> Self {
        Self { capacity: memory.length(), memory }
    }

    /// Valid bytes. `GetLength`.
    pub fn length(&self) -> u64 {
        self.memory.length()
    }

    /// Bytes there are.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Where the memory is in this process, and how many bytes of it are valid. The address is for
    /// people and for code in other languages. `GetAddressRange`.
    pub fn address_range(&self) -> (u64, u64) {
        let (backing, offset) = self.backing();
        (backing.view.address().addr() as u64 + offset, self.length())
    }

    /// Changes how many bytes are valid; what is beyond them keeps its contents. `SetLength`.
    ///
    /// Errors: `BAD_ARGUMENT` for more than the capacity.
    pub fn set_length(&mut self, length: u64) -> Result<()> {
        ensure!(
            length <= self.capacity,
            IOReturn::BAD_ARGUMENT,
            "a length of {length} bytes in a buffer of {}",
            self.capacity
        );
        self.memory.set_length(length);
        Ok(())
    }

    /// Copies bytes out. Errors: `OVERRUN` past the valid ones.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.memory.read_at(offset as u64, data)
    }

    /// Copies bytes in. Errors: `OVERRUN` past the valid ones.
    pub fn write_at(&mut self, offset: usize, data: &[u8]) -> Result<()> {
        self.memory.write_at(offset as u64, data)
    }

    /// Another handle to the bytes that are valid now.
    pub fn memory_descriptor(&self) -> IOMemoryDescriptor {
        self.memory.clone()
    }

    /// The memory file, and where in it the buffer begins.
    fn backing(&self) -> (&Backing, u64) {
        let (source, offset) = self.memory.single(&self.memory.bytes).expect(ONE_PIECE);
        (source.backing().expect(ONE_PIECE), offset)
    }
}

/// What a buffer is made of.
const ONE_PIECE: &str = "a buffer is one piece of memory of the host's";

impl AsRef<IOMemoryDescriptor> for IOBufferMemoryDescriptor {
    fn as_ref(&self) -> &IOMemoryDescriptor {
        &self.memory
    }
}

impl fmt::Debug for IOBufferMemoryDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IOBufferMemoryDescriptor")
            .field("length", &self.length())
            .field("capacity", &self.capacity)
            .finish()
    }
}

/// Memory for a client to map, from
/// [`copy_client_memory_for_type`](crate::IOService::copy_client_memory_for_type). It is the whole
/// buffer, and stays the client's until it unmaps it, also when the driver has dropped its own.
///
/// What the client may write it can write at any time, also while the driver or a device reads.
pub struct ClientMemory {
    file: OwnedFd,
    read_only: bool,
}

impl ClientMemory {
    /// The client may read and write.
    ///
    /// Errors: `NO_RESOURCES` when no descriptor is left; `UNSUPPORTED` for a buffer of an arena,
    /// which has no file of its own.
    pub fn read_write(buffer: &IOBufferMemoryDescriptor) -> Result<Self> {
        Self::of(buffer, false)
    }

    /// The client may read; the MMU keeps it from writing. `kIOUserClientMemoryReadOnly`.
    ///
    /// Errors: as [`read_write`](Self::read_write).
    pub fn read_only(buffer: &IOBufferMemoryDescriptor) -> Result<Self> {
        Self::of(buffer, true)
    }

    fn of(buffer: &IOBufferMemoryDescriptor, read_only: bool) -> Result<Self> {
        let (source, _) = buffer.memory.single(&buffer.memory.bytes).expect(ONE_PIECE);
        let Source::File(backing) = &**source else {
            return Err(Error::new(
                IOReturn::UNSUPPORTED,
                "a buffer of an arena has no memory of its own: a client would get all of the arena",
            ));
        };
        let file = backing.view.as_fd().try_clone_to_owned();
        let file = file.map_err(|err| Error::new(IOReturn::NO_RESOURCES, err.to_string()))?;
        Ok(Self { file, read_only })
    }

    pub(crate) fn into_abi(self) -> abi::ClientMemory {
        abi::ClientMemory { fd: self.file.into_raw_fd(), options: u32::from(self.read_only) }
    }
}

impl fmt::Debug for ClientMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientMemory").field("read_only", &self.read_only).finish_non_exhaustive()
    }
}
