//! Memory that a device reaches.

use std::fmt;
use std::ops::Range;

use iohost_driver_abi::DmaSegment;
use iohost_interface::IOReturn;

use crate::memory::{Piece, Source};
use crate::pci::InUse;
use crate::{
    IOBufferMemoryDescriptor, IOMemoryDescriptor, IOPCIDevice, MemoryDirection, Result, abi, ensure,
};

/// `IODMACommand`: gives memory to one device and takes it back.
///
/// A command can have any number of preparations at a time, each of which is a value.
#[derive(Clone, Debug)]
pub struct IODMACommand {
    device: IOPCIDevice,
    specification: DmaSpecification,
}

/// What a device can take. `IODMACommandSpecification`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaSpecification {
    /// Address lines: every byte lies below `2^max_address_bits`; 0 for no limit.
    pub max_address_bits: u32,
    /// What the address of each segment is a multiple of; a power of two.
    pub alignment: u64,
}

/// Where a device finds bytes, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressSegment {
    /// The address of the first byte, as the device sees it.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// What [`PreparedDma::perform_operation`] does, by the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaOperation {
    /// Copies from the prepared memory to the data. `kIODMACommandPerformOperationOptionRead`.
    Read,
    /// Copies from the data to the prepared memory. `kIODMACommandPerformOperationOptionWrite`.
    Write,
    /// Clears the prepared memory; the data is not used. `kIODMACommandPerformOperationOptionZero`.
    Zero,
}

impl IODMACommand {
    /// A command for a device that drives `max_address_bits` address lines, 0 for no limit.
    ///
    /// Errors: `BAD_ARGUMENT` above 255 bits, `NO_MEMORY` where no page can be reached, up to 12.
    pub fn create(device: &IOPCIDevice, max_address_bits: u32) -> Result<Self> {
        Self::create_with(device, DmaSpecification { max_address_bits, alignment: 1 })
    }

    /// A command for a device with these limits.
    ///
    /// Errors: as [`create`](Self::create); `BAD_ARGUMENT` for an alignment that is no power of
    /// two.
    pub fn create_with(device: &IOPCIDevice, specification: DmaSpecification) -> Result<Self> {
        let DmaSpecification { max_address_bits, alignment } = specification;
        let max_address_bits = check_address_bits(max_address_bits)?;
        ensure!(
            alignment.is_power_of_two(),
            IOReturn::BAD_ARGUMENT,
            "an alignment of {alignment}, it has to be a power of two"
        );
        let specification = DmaSpecification { max_address_bits, alignment };
        Ok(Self { device: device.clone(), specification })
    }

    /// Lets the device reach all of a buffer or descriptor. The memory moves into the result: what
    /// the device may touch is owned by a value that says so. The segments, in order, are all of
    /// it; one of a buffer is one segment.
    ///
    /// Memory of a [`DmaArena`](crate::DmaArena) of the same device is reached already: it takes no
    /// system call. Of other memory all pages that have one of the bytes are mapped; whole 2 MiB of it
    /// begin at a multiple of that, unless the limit is below 32 bits, so that where the kernel has
    /// huge pages behind them the IOMMU needs one entry for each.
    ///
    /// Errors: `NO_SPACE` when no address is left below the limit, `NOT_ALIGNED` for memory that
    /// begins elsewhere in its page than the alignment allows, `MESSAGE_TOO_LARGE` for memory of an
    /// arena above the limit, `OVERRUN` for no bytes, `UNSUPPORTED` for device memory or where the
    /// host maps none, `NOT_OPEN`; what the IOMMU says.
    pub fn prepare_for_dma<M: AsRef<IOMemoryDescriptor>>(
        &self,
        memory: M,
    ) -> Result<PreparedDma<M>> {
        self.prepare_part_for_dma(memory, 0, 0)
    }

    /// As [`prepare_for_dma`](Self::prepare_for_dma), `length` bytes from `offset`; length 0 is all
    /// of it, from offset 0.
    ///
    /// Errors: `OVERRUN` also for bytes that are not inside.
    pub fn prepare_part_for_dma<M: AsRef<IOMemoryDescriptor>>(
        &self,
        memory: M,
        offset: u64,
        length: u64,
    ) -> Result<PreparedDma<M>> {
        let descriptor = memory.as_ref();
        ensure!(
            descriptor.length() > 0,
            IOReturn::OVERRUN,
            "there are no bytes to prepare: the memory has length 0"
        );
        let bytes = descriptor.whole_or_inside(offset, length, IOReturn::OVERRUN)?;
        let length = bytes.end - bytes.start;
        let device = self.device.in_use()?;
        let reach = match descriptor.single(&bytes) {
            Some((source, at)) if let Some(address) = self.reached(source, at) => {
                let segment = AddressSegment { address, length };
                self.check(segment)?;
                Reach::Arena([segment])
            }
            _ => {
                let pieces: Vec<_> = descriptor.pieces_in(bytes).collect();
                Reach::Mapped(self.map(&pieces)?)
            }
        };
        Ok(PreparedDma { memory: Some(memory), offset, length, reach, device })
    }

    /// Where the device finds memory that it reaches anyway.
    fn reached(&self, source: &Source, offset: u64) -> Option<u64> {
        match source {
            Source::Arena(place) => place.address_for(&self.device, offset),
            _ => None,
        }
    }

    fn check(&self, segment: AddressSegment) -> Result<()> {
        let DmaSpecification { max_address_bits: bits, alignment } = self.specification;
        let AddressSegment { address, length } = segment;
        let last = address + (length - 1);
        ensure!(
            bits == 0 || bits >= 64 || last >> bits == 0,
            IOReturn::MESSAGE_TOO_LARGE,
            "the arena has these bytes at {address:#x} to {last:#x}, which is not below 2^{bits}"
        );
        ensure!(
            address.is_multiple_of(alignment),
            IOReturn::NOT_ALIGNED,
            "the arena has these bytes at {address:#x}, which is no multiple of {alignment}"
        );
        Ok(())
    }

    fn map(&self, pieces: &[Piece]) -> Result<Vec<AddressSegment>> {
        let DmaSpecification { max_address_bits: bits, mut alignment } = self.specification;
        let is_single = pieces.len() == 1;
        let mut given: Vec<(&abi::Memory, u64, u64)> = Vec::with_capacity(pieces.len());
        for Piece { source, bytes } in pieces {
            let backing = source.backing()?;
            // A buffer's own alignment is that of its first byte, and of a buffer alone.
            if is_single && bytes.start.is_multiple_of(backing.alignment) {
                alignment = alignment.max(backing.alignment);
            }
            if is_single && are_huge_pages(bytes) && (bits == 0 || bits >= ROOMY_BITS) {
                alignment = alignment.max(HUGE_PAGE);
            }
            given.push((&backing.handle, bytes.start, bytes.end - bytes.start));
        }
        let segments = self.device.raw().dma_prepare(&given, bits, alignment)?;
        let segment = |DmaSegment { address, len }| AddressSegment { address, length: len };
        Ok(segments.into_iter().map(segment).collect())
    }
}

const HUGE_PAGE: u64 = iohost_memory::HUGE_PAGE as u64;

/// With so many address lines there is room to be generous with addresses.
const ROOMY_BITS: u32 = 32;

/// Whether bytes of a memory file are all of its huge pages that they touch, if it has such.
fn are_huge_pages(bytes: &Range<u64>) -> bool {
    bytes.start.is_multiple_of(HUGE_PAGE) && bytes.end.is_multiple_of(HUGE_PAGE)
}

/// The bits as the host takes them.
pub(crate) fn check_address_bits(max_address_bits: u32) -> Result<u32> {
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
    Ok(max_address_bits.min(64))
}

/// Memory that the device can reach. Dropping it takes the memory back, as
/// [`complete_dma`](Self::complete_dma) does; be sure that the device is done with it.
pub struct PreparedDma<M: AsRef<IOMemoryDescriptor> = IOBufferMemoryDescriptor> {
    /// `None` once it was completed.
    memory: Option<M>,
    offset: u64,
    length: u64,
    reach: Reach,
    device: InUse,
}

/// How the device reaches the memory.
enum Reach {
    /// As all of the arena that it is in.
    Arena([AddressSegment; 1]),
    /// Mapped for this.
    Mapped(Vec<AddressSegment>),
}

impl<M: AsRef<IOMemoryDescriptor>> PreparedDma<M> {
    /// Where the device finds the first byte.
    pub fn address(&self) -> u64 {
        self.segments()[0].address
    }

    /// Where the device finds the bytes, in order; at least one segment.
    pub fn segments(&self) -> &[AddressSegment] {
        match &self.reach {
            Reach::Arena(segment) => segment,
            Reach::Mapped(segments) => segments,
        }
    }

    /// Bytes the device can reach; never zero.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// What the device does with the memory.
    pub fn direction(&self) -> MemoryDirection {
        self.descriptor().direction()
    }

    /// Which bytes of which memory are prepared: offset, length, and the memory; to offer it to a
    /// client, say, while the device can reach it. `GetPreparation`.
    pub fn preparation(&self) -> (u64, u64, &M) {
        (self.offset, self.length, self.memory.as_ref().expect(HELD))
    }

    /// The memory, whole.
    pub fn memory(&self) -> &M {
        self.preparation().2
    }

    /// Copies bytes out while the device may be writing: what it is writing now arrives torn.
    /// Errors: `UNDERRUN` past the end of what is prepared.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        let at = self.check(offset as u64, data.len() as u64)?;
        self.descriptor().read_at(at, data)
    }

    /// Copies bytes in while the device may be reading. Errors: as [`read_at`](Self::read_at).
    pub fn write_at(&mut self, offset: usize, data: &[u8]) -> Result<()> {
        let at = self.check(offset as u64, data.len() as u64)?;
        self.descriptor().write_at(at, data)
    }

    /// Copies `length` bytes between the prepared memory, from `dma_offset`, and `data`, from
    /// `data_offset`, or clears them. `PerformOperation`.
    ///
    /// Errors: `BAD_ARGUMENT` for more bytes than either memory has, `UNDERRUN` for bytes past the
    /// end of either.
    pub fn perform_operation(
        &mut self,
        operation: DmaOperation,
        dma_offset: u64,
        length: u64,
        data_offset: u64,
        data: &IOMemoryDescriptor,
    ) -> Result<()> {
        let longest = match operation {
            DmaOperation::Zero => self.length,
            _ => self.length.min(data.length()),
        };
        ensure!(
            length <= longest,
            IOReturn::BAD_ARGUMENT,
            "an operation on {length} bytes of memory that has {longest}"
        );
        let at = self.check(dma_offset, length)?;
        let data_end = data_offset.checked_add(length).filter(|end| *end <= data.length());
        ensure!(
            operation == DmaOperation::Zero || data_end.is_some(),
            IOReturn::UNDERRUN,
            "{length} bytes at {data_offset} of data of {} bytes",
            data.length()
        );
        let mut part = [0; 4096];
        let mut done = 0;
        while done < length {
            let count = (length - done).min(part.len() as u64);
            let part = &mut part[..count as usize];
            match operation {
                DmaOperation::Read => {
                    self.descriptor().read_at(at + done, part)?;
                    data.write_at(data_offset + done, part)?;
                }
                DmaOperation::Write => {
                    data.read_at(data_offset + done, part)?;
                    self.descriptor().write_at(at + done, part)?;
                }
                DmaOperation::Zero => self.descriptor().write_at(at + done, part)?,
            }
            done += count;
        }
        Ok(())
    }

    /// Takes the memory back. Afterwards the device's accesses to its addresses fault, unless the
    /// memory is of an arena.
    pub fn complete_dma(mut self) -> Result<M> {
        self.complete()?;
        Ok(self.memory.take().expect(HELD))
    }

    /// Where in the memory `length` bytes at `offset` of what is prepared begin.
    fn check(&self, offset: u64, length: u64) -> Result<u64> {
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.length);
        ensure!(
            fits,
            IOReturn::UNDERRUN,
            "{length} bytes at {offset} of {} bytes that are prepared",
            self.length
        );
        Ok(self.offset + offset)
    }

    fn descriptor(&self) -> &IOMemoryDescriptor {
        self.memory().as_ref()
    }

    fn complete(&self) -> Result<()> {
        match &self.reach {
            Reach::Arena(_) => Ok(()),
            Reach::Mapped(segments) => Ok(self.device.raw().dma_complete(segments[0].address)?),
        }
    }
}

/// Why the memory is there.
const HELD: &str = "taken by `complete_dma` only, which consumes the value";

impl<M: AsRef<IOMemoryDescriptor>> Drop for PreparedDma<M> {
    fn drop(&mut self) {
        // The host keeps the memory that it could not take back from the device, and says so.
        if self.memory.is_some() {
            let _ = self.complete();
        }
    }
}

impl<M: AsRef<IOMemoryDescriptor>> fmt::Debug for PreparedDma<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PreparedDma({:#x}, {} bytes)", self.address(), self.length)
    }
}
