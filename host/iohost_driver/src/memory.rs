//! Memory that can be shared: with a device, with a client, with another view of it.

mod arena;
mod buffer;
mod map;

use std::fmt;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use iohost_interface::{ClientFile, IOReturn, Reply, Results};
use iohost_memory::SharedMemory;

use crate::{Error, IOPCIDevice, Result, abi, ensure};

pub use self::arena::{DmaArena, DmaArenaOptions};
pub use self::buffer::{ClientMemory, IOBufferMemoryDescriptor};
pub use self::map::{CacheMode, IOMemoryMap, MappingOptions};

/// Which way data goes, seen from memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryDirection {
    /// The device writes the memory. `kIOMemoryDirectionIn`.
    In,
    /// The device reads the memory. `kIOMemoryDirectionOut`.
    Out,
    /// Both. `kIOMemoryDirectionInOut`.
    InOut,
}

impl MemoryDirection {
    /// The device may write.
    pub fn device_writes(self) -> bool {
        self != MemoryDirection::Out
    }

    /// The device may read.
    pub fn device_reads(self) -> bool {
        self != MemoryDirection::In
    }

    fn includes(self, other: Self) -> bool {
        (self.device_writes() || !other.device_writes())
            && (self.device_reads() || !other.device_reads())
    }
}

/// `IOMemoryDescriptor`: bytes of memory, wherever they are.
///
/// A value of this type is a handle: clones, sub-descriptors and mappings are the same bytes, which
/// live as long as any of them. Nobody is kept from writing them meanwhile, the device least of
/// all; what is written while it is read arrives torn. Callable from any thread.
#[derive(Clone)]
pub struct IOMemoryDescriptor {
    direction: MemoryDirection,
    pieces: Arc<[Piece]>,
    /// The bytes of the pieces, taken together, that are this descriptor's.
    bytes: Range<u64>,
}

/// Bytes of one source.
#[derive(Clone)]
pub(crate) struct Piece {
    pub(crate) source: Arc<Source>,
    pub(crate) bytes: Range<u64>,
}

/// Where bytes are.
pub(crate) enum Source {
    /// A memory file of its own.
    File(Backing),
    /// Part of an arena, which is counted from the start of the arena.
    Arena(arena::Place),
    /// A BAR.
    Device(DeviceMemory),
}

/// A memory file: what a device is given, and the same bytes for us.
pub(crate) struct Backing {
    pub(crate) handle: abi::Memory,
    pub(crate) view: SharedMemory,
    /// What its address for a device is to be a multiple of.
    pub(crate) alignment: u64,
}

/// The memory of a BAR.
pub(crate) struct DeviceMemory {
    pub(crate) device: IOPCIDevice,
    pub(crate) bar: u8,
}

/// The most descriptors that make one. `kIOMemoryDescriptor…` of `CreateWithMemoryDescriptors`.
const MOST_DESCRIPTORS: usize = 32;

impl IOMemoryDescriptor {
    /// All of one source.
    pub(crate) fn of(direction: MemoryDirection, source: Source, bytes: Range<u64>) -> Self {
        let len = bytes.end - bytes.start;
        let piece = Piece { source: Arc::new(source), bytes };
        Self { direction, pieces: Arc::new([piece]), bytes: 0..len }
    }

    /// Memory that the caller of a method has offered, by the number that it passed. It stays,
    /// also when the client is gone. `CreateMemoryDescriptorFromClient`, and how structures above
    /// 4096 bytes travel, either way.
    ///
    /// The client can write it at any time; what is for reading only has the direction `Out`.
    ///
    /// Errors: `NOT_FOUND` for a number without memory; `NOT_READY` when the client is gone;
    /// `NO_MEMORY` when it cannot be mapped; `NO_RESOURCES`; `UNSUPPORTED` for a caller without a
    /// session.
    pub fn from_client<T: Results>(reply: &Reply<T>, memory: u64) -> Result<Self> {
        let ClientFile { file, len, read_only } = reply.client_memory(memory)?;
        let handle = abi::Memory::attach(file.as_fd(), len, read_only)?;
        let view = match read_only {
            true => SharedMemory::attach_read_only(file, len as usize),
            false => SharedMemory::attach(file, len as usize),
        };
        let view = view.map_err(|err| Error::new(IOReturn::NO_MEMORY, err.to_string()))?;
        let direction = if read_only { MemoryDirection::Out } else { MemoryDirection::InOut };
        let source = Source::File(Backing { handle, view, alignment: 1 });
        Ok(Self::of(direction, source, 0..len))
    }

    /// Bytes. `GetLength`.
    pub fn length(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }

    /// What a device may do with it.
    pub fn direction(&self) -> MemoryDirection {
        self.direction
    }

    /// `length` bytes from `offset`, for a device that moves data in this direction.
    /// `CreateSubMemoryDescriptor`.
    ///
    /// Errors: `BAD_ARGUMENT` when they are not inside, or the direction is more than this
    /// descriptor's.
    pub fn sub_descriptor(
        &self,
        direction: MemoryDirection,
        offset: u64,
        length: u64,
    ) -> Result<Self> {
        self.check_direction(direction)?;
        let bytes = self.inside(offset, length, IOReturn::BAD_ARGUMENT)?;
        Ok(Self { direction, pieces: self.pieces.clone(), bytes })
    }

    /// Several descriptors, one after the other. `CreateWithMemoryDescriptors`.
    ///
    /// Errors: `BAD_ARGUMENT` for none or more than 32, or when one lacks the direction.
    pub fn with_descriptors(direction: MemoryDirection, descriptors: &[Self]) -> Result<Self> {
        ensure!(
            (1..=MOST_DESCRIPTORS).contains(&descriptors.len()),
            IOReturn::BAD_ARGUMENT,
            "{} descriptors in one, it has to be 1 to {MOST_DESCRIPTORS}",
            descriptors.len()
        );
        for descriptor in descriptors {
            descriptor.check_direction(direction)?;
        }
        let pieces: Vec<_> = descriptors
            .iter()
            .flat_map(|descriptor| descriptor.pieces_in(descriptor.bytes.clone()))
            .collect();
        let length = pieces.iter().try_fold(0_u64, |length, piece| {
            length.checked_add(piece.bytes.end - piece.bytes.start)
        });
        let length = length.ok_or(IOReturn::BAD_ARGUMENT)?;
        Ok(Self { direction, pieces: pieces.into(), bytes: 0..length })
    }

    /// Copies bytes out. Errors: `OVERRUN` past the end, `UNSUPPORTED` for device memory, which has
    /// to be mapped.
    pub fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let bytes = self.inside(offset, data.len() as u64, IOReturn::OVERRUN)?;
        let mut rest = data;
        for Piece { source, bytes } in self.pieces_in(bytes) {
            let (now, later) = rest.split_at_mut((bytes.end - bytes.start) as usize);
            source.backing()?.view.read_at(bytes.start as usize, now);
            rest = later;
        }
        Ok(())
    }

    /// Copies bytes in. Errors: as [`read_at`](Self::read_at); `NOT_WRITABLE` for memory of a
    /// client's that is for reading only.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let bytes = self.inside(offset, data.len() as u64, IOReturn::OVERRUN)?;
        let mut rest = data;
        for Piece { source, bytes } in self.pieces_in(bytes) {
            let (now, later) = rest.split_at((bytes.end - bytes.start) as usize);
            let view = &source.backing()?.view;
            ensure!(
                view.is_writable(),
                IOReturn::NOT_WRITABLE,
                "the client offers this memory for reading only"
            );
            view.write_at(bytes.start as usize, now);
            rest = later;
        }
        Ok(())
    }

    /// Maps `length` bytes from `offset` once more, as one range of this process's addresses.
    /// Length 0 is all of it, from offset 0. `CreateMapping`; an alignment or an address that the
    /// caller chooses there is none.
    ///
    /// Errors: `ERROR` for bytes that are not inside, or offset that is not 0 with length 0;
    /// `NOT_ALIGNED` where the parts of a composed descriptor meet inside a page;
    /// `UNSUPPORTED` for a cache mode that the memory does not have, for device memory that is not
    /// mapped alone or that the device lets nobody map; what the kernel says as `VM_ERROR`.
    pub fn create_mapping(
        &self,
        options: MappingOptions,
        offset: u64,
        length: u64,
    ) -> Result<IOMemoryMap> {
        let bytes = self.whole_or_inside(offset, length, IOReturn::ERROR)?;
        IOMemoryMap::new(self, options, offset, &self.pieces_in(bytes).collect::<Vec<_>>())
    }

    /// What `length` bytes from `offset` are, where length 0 is all of them.
    pub(crate) fn whole_or_inside(
        &self,
        offset: u64,
        length: u64,
        code: IOReturn,
    ) -> Result<Range<u64>> {
        let whole = if length == 0 { self.length() } else { length };
        self.inside(offset, whole, code)
    }

    /// The one piece that has these bytes of the pieces, if there is one, and where in its source
    /// they begin.
    pub(crate) fn single(&self, bytes: &Range<u64>) -> Option<(&Arc<Source>, u64)> {
        let [piece] = &*self.pieces else { return None };
        Some((&piece.source, piece.bytes.start + bytes.start))
    }

    /// The pieces that make up these bytes of the pieces.
    pub(crate) fn pieces_in(&self, bytes: Range<u64>) -> impl Iterator<Item = Piece> {
        let mut at = 0;
        self.pieces.iter().filter_map(move |piece| {
            let start = at;
            at += piece.bytes.end - piece.bytes.start;
            let from = bytes.start.max(start);
            let to = bytes.end.min(at);
            (from < to).then(|| {
                let first = piece.bytes.start + (from - start);
                Piece { source: piece.source.clone(), bytes: first..first + (to - from) }
            })
        })
    }

    /// Another length from the same start on; not more than the pieces have.
    pub(crate) fn set_length(&mut self, length: u64) {
        self.bytes.end = self.bytes.start + length;
    }

    fn inside(&self, offset: u64, length: u64, code: IOReturn) -> Result<Range<u64>> {
        let end = offset.checked_add(length).filter(|end| *end <= self.length());
        ensure!(
            end.is_some(),
            code,
            "{length} bytes at {offset} of memory of {} bytes",
            self.length()
        );
        let start = self.bytes.start + offset;
        Ok(start..start + length)
    }

    fn check_direction(&self, direction: MemoryDirection) -> Result<()> {
        ensure!(
            self.direction.includes(direction),
            IOReturn::BAD_ARGUMENT,
            "direction {direction:?} of memory that is for {:?}",
            self.direction
        );
        Ok(())
    }
}

impl AsRef<IOMemoryDescriptor> for IOMemoryDescriptor {
    fn as_ref(&self) -> &IOMemoryDescriptor {
        self
    }
}

impl fmt::Debug for IOMemoryDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IOMemoryDescriptor")
            .field("length", &self.length())
            .field("direction", &self.direction)
            .field("pieces", &self.pieces.len())
            .finish()
    }
}

impl Source {
    /// The memory file that has the bytes.
    pub(crate) fn backing(&self) -> Result<&Backing> {
        match self {
            Source::File(backing) => Ok(backing),
            Source::Arena(place) => Ok(place.backing()),
            Source::Device(DeviceMemory { bar, .. }) => Err(Error::new(
                IOReturn::UNSUPPORTED,
                format!("BAR {bar} is the device's memory: map it, and access it there"),
            )),
        }
    }
}

impl Backing {
    /// Makes zeroed bytes.
    pub(crate) fn create(length: u64, alignment: u64, huge_pages: bool) -> Result<Self> {
        let (handle, fd) = abi::Memory::create(length, u32::from(huge_pages))?;
        let view = SharedMemory::attach(fd, length as usize)
            .map_err(|err| Error::new(IOReturn::NO_MEMORY, err.to_string()))?;
        Ok(Self { handle, view, alignment })
    }
}
