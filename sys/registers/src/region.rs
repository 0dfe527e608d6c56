//! A range of a device's BAR, mapped.

#![expect(unsafe_code)]
// UNSAFETY: device registers are memory that no Rust reference may describe.

use std::io;
use std::os::fd::AsFd;

use memmap2::{MmapOptions, MmapRaw};

/// Part of a BAR in this process's memory, unmapped on drop.
///
/// Invariant: `map` is a mapping that stays valid for all its bytes while this lives; a device
/// that vanishes turns accesses into SIGBUS or all ones, not into other memory.
#[derive(Debug)]
pub struct MappedRegion {
    map: MmapRaw,
}

/// An unsigned integer a device can be asked for in one access.
pub trait Width: Copy + private::Sealed {}

mod private {
    pub trait Sealed {}
}

macro_rules! widths {
    ($($int:ty)*) => { $(impl private::Sealed for $int {} impl Width for $int {})* };
}
widths!(u8 u16 u32 u64);

impl MappedRegion {
    /// Maps `len` bytes of a device's descriptor from `offset`, which is page-aligned.
    pub fn map(fd: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        let map = MmapOptions::new().offset(offset).len(len).map_raw(fd.as_fd().as_raw_fd())?;
        Ok(Self { map })
    }

    /// Bytes mapped.
    #[expect(clippy::len_without_is_empty, reason = "mmap refuses a length of zero")]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Where the region starts in this process. For handing it over the plugin ABI.
    pub fn address(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// One volatile load. `None` when out of bounds or not naturally aligned.
    pub fn read<T: Width>(&self, offset: usize) -> Option<T> {
        let at = self.at::<T>(offset)?;
        // SAFETY: `at` showed that a `T` at this offset is mapped and aligned; every bit pattern
        // is a value of an unsigned integer.
        Some(unsafe { at.read_volatile() })
    }

    /// One volatile store. `None` when out of bounds or not naturally aligned.
    pub fn write<T: Width>(&self, offset: usize, value: T) -> Option<()> {
        let at = self.at::<T>(offset)?;
        // SAFETY: as in `read`. Nobody holds a reference to these bytes: none is ever lent.
        unsafe { at.write_volatile(value) };
        Some(())
    }

    fn at<T: Width>(&self, offset: usize) -> Option<*mut T> {
        let fits = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.len());
        let aligned = offset.is_multiple_of(align_of::<T>());
        // The mapping itself starts on a page, so the offset's alignment is the address's.
        (fits && aligned).then(|| self.map.as_mut_ptr().wrapping_add(offset).cast())
    }
}
