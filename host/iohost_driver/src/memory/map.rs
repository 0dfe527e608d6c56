//! Mappings of memory descriptors.

use std::fmt;
use std::ops::Range;

use iohost_interface::IOReturn;
use iohost_memory::{MemoryView, SharedMemory, ViewError};
use iohost_registers::{RegisterWindow, Width};

use super::{DeviceMemory, IOMemoryDescriptor, Piece, Source};
use crate::pci::InUse;
use crate::{Error, Result, ensure};

/// How a mapping is to be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappingOptions {
    /// Nobody writes through it: the MMU sees to that. `kIOMemoryMapReadOnly`.
    pub read_only: bool,
    /// How the processor caches it.
    pub cache: CacheMode,
}

/// How the processor caches what it reads and writes through a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// As the memory has it: device memory not at all, all other write-back.
    #[default]
    Default,
    /// Not at all; what device memory has.
    Inhibit,
    /// Write-back; what memory of the machine has.
    Copyback,
    /// Write-through; what Linux offers for neither.
    WriteThrough,
}

/// `IOMemoryMap`: bytes of a descriptor at addresses of this process, until it is dropped. It keeps
/// the memory alive.
pub struct IOMemoryMap {
    bytes: Bytes,
    offset: u64,
    read_only: bool,
    /// Whose bytes they are.
    _memory: IOMemoryDescriptor,
}

enum Bytes {
    Memory(MemoryView),
    Device(Registers),
}

/// Part of a BAR. The window is the host's mapping, which stays while the device is in use.
struct Registers {
    /// From 8 bytes on, as a window has to begin.
    window: RegisterWindow,
    /// Where in it the part begins.
    lead: usize,
    _in_use: InUse,
}

impl IOMemoryMap {
    pub(super) fn new(
        memory: &IOMemoryDescriptor,
        options: MappingOptions,
        offset: u64,
        pieces: &[Piece],
    ) -> Result<Self> {
        let bytes = match pieces {
            [Piece { source, bytes }] if let Source::Device(device) = &**source => {
                check_cache(options.cache, CacheMode::Inhibit)?;
                Bytes::Device(Registers::map(device, bytes)?)
            }
            pieces => {
                check_cache(options.cache, CacheMode::Copyback)?;
                let parts = pieces.iter().map(part_of).collect::<Result<Vec<_>>>()?;
                Bytes::Memory(MemoryView::map(&parts, !options.read_only).map_err(refusal)?)
            }
        };
        Ok(Self { bytes, offset, read_only: options.read_only, _memory: memory.clone() })
    }

    /// Where the first byte is in this process; for people, and for code in other languages.
    /// `GetAddress`.
    pub fn address(&self) -> u64 {
        match &self.bytes {
            Bytes::Memory(view) => view.address().addr() as u64,
            Bytes::Device(registers) => (registers.window.address().addr() + registers.lead) as u64,
        }
    }

    /// Bytes mapped. `GetLength`.
    #[inline]
    pub fn length(&self) -> u64 {
        match &self.bytes {
            Bytes::Memory(view) => view.len() as u64,
            Bytes::Device(registers) => (registers.window.len() - registers.lead) as u64,
        }
    }

    /// Where in the descriptor the first byte is. `GetOffset`.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Copies bytes out; from device memory in its widest accesses at their natural alignment, up
    /// to 8 bytes each.
    ///
    /// Errors: `OVERRUN` past the end.
    #[inline]
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.check(offset, data.len())?;
        match &self.bytes {
            Bytes::Memory(view) => view.read_at(offset, data),
            Bytes::Device(registers) => registers.read_at(offset, data),
        }
        Ok(())
    }

    /// Copies bytes in, likewise.
    ///
    /// Errors: `OVERRUN` past the end; `NOT_WRITABLE` when it is for reading only.
    #[inline]
    pub fn write_at(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.check(offset, data.len())?;
        if self.read_only {
            return Err(not_writable());
        }
        match &self.bytes {
            Bytes::Memory(view) => view.write_at(offset, data),
            Bytes::Device(registers) => registers.write_at(offset, data),
        }
        Ok(())
    }

    #[inline]
    fn check(&self, offset: usize, len: usize) -> Result<()> {
        let fits = offset.checked_add(len).is_some_and(|end| end as u64 <= self.length());
        if fits { Ok(()) } else { Err(overrun(offset, len, self.length())) }
    }
}

// Apart, so that an access that is in order is short enough to be inlined.

#[cold]
fn overrun(offset: usize, len: usize, length: u64) -> Error {
    let words = format!("{len} bytes at {offset} of a mapping of {length} bytes");
    Error::new(IOReturn::OVERRUN, words)
}

#[cold]
fn not_writable() -> Error {
    Error::new(IOReturn::NOT_WRITABLE, "the mapping is for reading only")
}

impl Registers {
    fn map(memory: &DeviceMemory, bytes: &Range<u64>) -> Result<Self> {
        let DeviceMemory { device, bar } = memory;
        let in_use = device.in_use()?;
        let from = bytes.start / 8 * 8;
        let window = device.raw().bar_map(*bar, from, bytes.end - from)?;
        Ok(Self { window, lead: (bytes.start - from) as usize, _in_use: in_use })
    }

    /// The range was checked.
    #[inline(never)]
    fn read_at(&self, offset: usize, data: &mut [u8]) {
        for (at, part) in accesses(self.lead + offset, data.len()) {
            let data = &mut data[part];
            match data.len() {
                8 => data.copy_from_slice(&self.load::<u64>(at).to_le_bytes()),
                4 => data.copy_from_slice(&self.load::<u32>(at).to_le_bytes()),
                2 => data.copy_from_slice(&self.load::<u16>(at).to_le_bytes()),
                _ => data[0] = self.load::<u8>(at),
            }
        }
    }

    /// The range was checked.
    #[inline(never)]
    fn write_at(&self, offset: usize, data: &[u8]) {
        for (at, part) in accesses(self.lead + offset, data.len()) {
            let data = &data[part];
            match data.len() {
                8 => self.store(at, u64::from_le_bytes(array(data))),
                4 => self.store(at, u32::from_le_bytes(array(data))),
                2 => self.store(at, u16::from_le_bytes(array(data))),
                _ => self.store(at, data[0]),
            }
        }
    }

    fn load<T: Width>(&self, at: usize) -> T {
        self.window.read(at).expect(CHECKED)
    }

    fn store<T: Width>(&self, at: usize, value: T) {
        self.window.write(at, value).expect(CHECKED);
    }
}

/// Why an access to a window is inside.
const CHECKED: &str = "the caller has checked the range, and `accesses` aligned it";

fn array<const N: usize>(part: &[u8]) -> [u8; N] {
    part.try_into().expect("as long as its width")
}

/// `len` bytes from `start` as accesses of 1, 2, 4 or 8 bytes, each at its natural alignment: the
/// place of each, and which of the bytes it has.
fn accesses(start: usize, len: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = start + done;
        let fits = |width: &usize| done + width <= len && at.is_multiple_of(*width);
        let width = [8, 4, 2, 1].into_iter().find(fits)?;
        done += width;
        Some((at, done - width..done))
    })
}

/// The bytes of a piece in its memory file.
fn part_of(piece: &Piece) -> Result<(&SharedMemory, Range<usize>)> {
    let Piece { source, bytes } = piece;
    Ok((&source.backing()?.view, bytes.start as usize..bytes.end as usize))
}

fn check_cache(asked: CacheMode, there_is: CacheMode) -> Result<()> {
    ensure!(
        asked == CacheMode::Default || asked == there_is,
        IOReturn::UNSUPPORTED,
        "a mapping of cache mode {asked:?}, this memory has {there_is:?}"
    );
    Ok(())
}

fn refusal(err: ViewError) -> Error {
    let code = match err {
        ViewError::NotAligned { .. } => IOReturn::NOT_ALIGNED,
        ViewError::ReadOnly => IOReturn::NOT_WRITABLE,
        ViewError::Range { .. } => IOReturn::ERROR,
        _ => IOReturn::VM_ERROR,
    };
    Error::new(code, err.to_string())
}

impl fmt::Debug for IOMemoryMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IOMemoryMap({:#x}, {} bytes)", self.address(), self.length())
    }
}
