//! Memory that is shared with a device.

use std::fmt;
use std::mem;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};

use iohost_interface::IOReturn;
use iohost_memory::SharedMemory;

use crate::{Error, IOPCIDevice, Result, abi, ensure};

/// `IOBufferMemoryDescriptor`: zeroed, page-aligned memory that a device can be given.
pub struct IOBufferMemoryDescriptor {
    /// What the device is given.
    memory: abi::Memory,
    /// The same bytes, for us.
    view: SharedMemory,
}

impl IOBufferMemoryDescriptor {
    /// Makes `len` zeroed bytes.
    ///
    /// Errors: `NO_MEMORY` for a length of zero, or when there is none.
    pub fn create(len: usize) -> Result<Self> {
        let (memory, fd) = abi::Memory::create(len as u64)?;
        let view = SharedMemory::attach(fd, len)
            .map_err(|err| crate::Error::new(IOReturn::NO_MEMORY, err.to_string()))?;
        Ok(Self { memory, view })
    }

    /// Bytes; never zero.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.view.len()
    }

    /// Copies bytes out. Errors: `OVERRUN` past the end.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.check(offset, data.len())?;
        self.view.read_at(offset, data);
        Ok(())
    }

    /// Copies bytes in. Errors: `OVERRUN` past the end.
    pub fn write_at(&mut self, offset: usize, data: &[u8]) -> Result<()> {
        self.check(offset, data.len())?;
        self.view.write_at(offset, data);
        Ok(())
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len());
        ensure!(
            fits,
            IOReturn::OVERRUN,
            "{len} bytes at {offset} of a buffer of {} bytes",
            self.len()
        );
        Ok(())
    }
}

impl fmt::Debug for IOBufferMemoryDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IOBufferMemoryDescriptor").field("len", &self.len()).finish()
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
    /// Errors: `NO_RESOURCES` when no descriptor is left.
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
        let file = buffer.view.as_fd().try_clone_to_owned();
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

/// `IODMACommand`: gives buffers to one device and takes them back.
#[derive(Clone, Debug)]
pub struct IODMACommand {
    device: IOPCIDevice,
    max_address_bits: u32,
}

impl IODMACommand {
    /// A command for a device that drives `max_address_bits` address lines, 0 for no limit.
    ///
    /// Errors: `BAD_ARGUMENT` above 255 bits, `NO_MEMORY` where no page can be reached, up to 12.
    pub fn create(device: &IOPCIDevice, max_address_bits: u32) -> Result<Self> {
        ensure!(
            max_address_bits <= 255,
            IOReturn::BAD_ARGUMENT,
            "{max_address_bits} address bits, the most is 255"
        );
        ensure!(
            max_address_bits == 0 || max_address_bits > 12,
            IOReturn::NO_MEMORY,
            "no page lies below 2^{max_address_bits}"
        );
        // An address has 64; DriverKit takes more.
        Ok(Self { device: device.clone(), max_address_bits: max_address_bits.min(64) })
    }

    /// Lets the device reach a buffer, as one contiguous range. The buffer moves into the result:
    /// what the device may touch is owned by a value that says so.
    ///
    /// Errors: `NO_SPACE` when no address is left below the limit; what the IOMMU says.
    pub fn prepare_for_dma(&self, buffer: IOBufferMemoryDescriptor) -> Result<PreparedDma> {
        let address = self.device.raw().dma_prepare(&buffer.memory, self.max_address_bits)?;
        Ok(PreparedDma { state: Some((self.device.clone(), buffer)), address })
    }
}

/// A buffer that the device can reach. Dropping it takes the buffer back, as
/// [`complete_dma`](Self::complete_dma) does; be sure that the device is done with it.
pub struct PreparedDma {
    /// `None` once it was completed.
    state: Option<(IOPCIDevice, IOBufferMemoryDescriptor)>,
    address: u64,
}

impl PreparedDma {
    /// Where the device finds the buffer's first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes the device can reach.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.buffer().len()
    }

    /// Copies bytes out while the device may be writing: what it is writing now arrives torn.
    /// `PerformOperation` with `Read`. Errors: `UNDERRUN` past the end.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.buffer().read_at(offset, data).map_err(underrun)
    }

    /// Copies bytes in while the device may be reading. `PerformOperation` with `Write`.
    /// Errors: `UNDERRUN` past the end.
    pub fn write_at(&mut self, offset: usize, data: &[u8]) -> Result<()> {
        let (_, buffer) = self.state.as_mut().expect(HELD);
        buffer.write_at(offset, data).map_err(underrun)
    }

    /// The buffer, to offer it to a client while the device can reach it.
    pub fn memory(&self) -> &IOBufferMemoryDescriptor {
        self.buffer()
    }

    /// Takes the buffer back. Afterwards the device's accesses to the address fault.
    pub fn complete_dma(mut self) -> Result<IOBufferMemoryDescriptor> {
        let (device, buffer) = self.state.take().expect(HELD);
        device.raw().dma_complete(self.address)?;
        Ok(buffer)
    }

    fn buffer(&self) -> &IOBufferMemoryDescriptor {
        &self.state.as_ref().expect(HELD).1
    }
}

/// What DriverKit calls an access past the end of a prepared range.
fn underrun(err: Error) -> Error {
    Error::new(IOReturn::UNDERRUN, err.message().to_owned())
}

/// Why the state is there.
const HELD: &str = "taken by `complete_dma` and by drop only, which consume the value";

impl Drop for PreparedDma {
    fn drop(&mut self) {
        if let Some((device, buffer)) = self.state.take()
            && device.raw().dma_complete(self.address).is_err()
        {
            // The device may still reach it: better lost than used for something else.
            mem::forget(buffer);
        }
    }
}

impl fmt::Debug for PreparedDma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PreparedDma({:#x}, {} bytes)", self.address, self.len())
    }
}
