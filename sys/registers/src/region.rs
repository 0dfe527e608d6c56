//! A range of a device's BAR, mapped.

#![expect(unsafe_code)]
// UNSAFETY: device registers are memory that no Rust reference may describe.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use memmap2::{MmapOptions, MmapRaw};

use crate::fault::Watched;
use crate::{
    OutOfRegion, Readable, Register, RegisterMap, RegisterSpace, RegisterValue, Width, Writable,
};

/// Part of a BAR in this process's memory, unmapped on drop.
///
/// A device that vanishes, or does not decode memory, turns reads into all ones; see
/// [`is_lost`](Self::is_lost).
///
/// Invariant: `map` is a mapping that stays valid for all its bytes while this lives.
#[derive(Debug)]
pub struct MappedRegion {
    /// Before the mapping, so that a fault in what is mapped there next is not ours.
    watched: Watched,
    map: MmapRaw,
}

impl MappedRegion {
    /// Maps `len` bytes of a device's descriptor from `offset`, which is page-aligned.
    pub fn map(fd: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        let map = MmapOptions::new().offset(offset).len(len).map_raw(fd.as_fd().as_raw_fd())?;
        let watched = Watched::new(map.as_ptr().addr(), map.len())?;
        Ok(Self { watched, map })
    }

    /// Whether an access found no device there. What it found were ones; such a page keeps what
    /// is written to it, and never shows the device again.
    pub fn is_lost(&self) -> bool {
        self.watched.is_lost()
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
        self.window().read(offset)
    }

    /// One volatile store. `None` when out of bounds or not naturally aligned.
    pub fn write<T: Width>(&self, offset: usize, value: T) -> Option<()> {
        self.window().write(offset, value)
    }

    /// A view that must not outlive `self`, and does not: it never leaves this file.
    fn window(&self) -> RegisterWindow {
        let start = NonNull::new(self.map.as_mut_ptr()).expect("a mapping is never at null");
        // SAFETY:
        // 1. `map` covers `len` bytes from `start` for as long as `self` lives; the callers use
        //    the window within a borrow of `self` and drop it.
        // 2. A mapping starts on a page, which is aligned for every width.
        // 3. No reference to the bytes is ever lent.
        unsafe { RegisterWindow::from_raw(start, self.map.len()) }
    }
}

/// Registers that somebody else keeps mapped: the plugin's view of a region its host owns.
///
/// Invariant: what [`from_raw`](Self::from_raw) was promised. Every access is one volatile load
/// or store of the register's own width; no reference to the bytes exists.
#[derive(Debug)]
pub struct RegisterWindow {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the window is an address and a length; the mapping it names belongs to the process, not
// to a thread, and a volatile access is valid from any thread.
unsafe impl Send for RegisterWindow {}

// SAFETY: as for `Send`. Two threads that reach one register at once are two accesses on the bus,
// in some order: no memory of the program is involved.
unsafe impl Sync for RegisterWindow {}

impl RegisterWindow {
    /// A view of `len` bytes from `start`.
    ///
    /// # Safety
    ///
    /// 1. The bytes `start..start + len` stay mapped, readable and writable, for as long as the
    ///    window lives.
    /// 2. `start` is aligned to 8 bytes, and `len` is at most `isize::MAX`.
    /// 3. Nobody holds a reference to any of the bytes while the window lives.
    pub unsafe fn from_raw(start: NonNull<u8>, len: usize) -> Self {
        debug_assert!(start.addr().get().is_multiple_of(align_of::<u64>()));
        Self { start, len }
    }

    /// Bytes in view.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where the first byte is in this process.
    pub fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Whether there is nothing in view.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// One volatile load. `None` when out of bounds or not naturally aligned.
    pub fn read<T: Width>(&self, offset: usize) -> Option<T> {
        let at = self.at::<T>(offset)?;
        // SAFETY:
        // 1. `at` showed that a `T` at this offset lies in the window, which is mapped by the
        //    promise to `from_raw`, and that it is aligned.
        // 2. Every bit pattern is a value of an unsigned integer, which `Width` is sealed to.
        Some(unsafe { at.read_volatile() })
    }

    /// One volatile store. `None` when out of bounds or not naturally aligned.
    pub fn write<T: Width>(&self, offset: usize, value: T) -> Option<()> {
        let at = self.at::<T>(offset)?;
        // SAFETY: as in `read`. Nobody holds a reference to these bytes, by the same promise.
        unsafe { at.write_volatile(value) };
        Some(())
    }

    fn at<T: Width>(&self, offset: usize) -> Option<*mut T> {
        let fits = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.len);
        let aligned = offset.is_multiple_of(size_of::<T>());
        // The window starts aligned for every width, so the offset's alignment is the address's.
        (fits && aligned).then(|| self.start.as_ptr().wrapping_add(offset).cast())
    }

    fn out_of_region(&self, offset: u64, width: usize) -> OutOfRegion {
        OutOfRegion { offset, width, size: self.len as u64 }
    }
}

/// The registers of the map `M`, in a window that has room for all of them.
///
/// Invariant: the window has at least `M::SIZE` bytes. Whether a register lies in them is a
/// question about constants, which the compiler has answered once it has inlined the access: that
/// is one instruction then.
pub struct MapWindow<M> {
    window: RegisterWindow,
    map: PhantomData<fn() -> M>,
}

impl<M: RegisterMap> MapWindow<M> {
    /// `None` for a window that is smaller than the map.
    pub fn new(window: RegisterWindow) -> Option<Self> {
        (window.len as u64 >= M::SIZE).then_some(Self { window, map: PhantomData })
    }

    /// One volatile load.
    #[inline(always)]
    pub fn read<T: RegisterValue, A: Readable>(&self, register: Register<M, T, A>) -> T {
        let at = self.at(register);
        // SAFETY:
        // 1. `at` showed that the register lies in the map and is aligned, and the map lies in
        //    the window, which is mapped by the promise to `from_raw`.
        // 2. Every bit pattern is a value of an unsigned integer, which `Width` is sealed to.
        T::from_register(unsafe { at.read_volatile() })
    }

    /// One volatile store.
    #[inline(always)]
    pub fn write<T: RegisterValue, A: Writable>(&self, register: Register<M, T, A>, value: T) {
        let at = self.at(register);
        // SAFETY: as in `read`. Nobody holds a reference to these bytes, by the same promise.
        unsafe { at.write_volatile(value.to_register()) };
    }

    /// Panics for a register that `register_map!` has not made.
    #[inline(always)]
    fn at<T: RegisterValue, A>(&self, register: Register<M, T, A>) -> *mut T::Bits {
        let (offset, width) = (register.offset(), size_of::<T::Bits>() as u64);
        let fits = offset.checked_add(width).is_some_and(|end| end <= M::SIZE);
        // Widths are powers of two up to 8, and a window starts on 8 bytes.
        assert!(fits && offset.is_multiple_of(width), "checked by `register_map!`");
        self.window.start.as_ptr().wrapping_add(offset as usize).cast()
    }
}

impl<M> fmt::Debug for MapWindow<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MapWindow").field(&self.window).finish()
    }
}

impl RegisterSpace for RegisterWindow {
    type Error = OutOfRegion;

    fn load<W: Width>(&self, offset: u64) -> Result<W, OutOfRegion> {
        let at = usize::try_from(offset).ok();
        at.and_then(|at| self.read(at)).ok_or_else(|| self.out_of_region(offset, size_of::<W>()))
    }

    fn store<W: Width>(&self, offset: u64, value: W) -> Result<(), OutOfRegion> {
        let at = usize::try_from(offset).ok();
        at.and_then(|at| self.write(at, value))
            .ok_or_else(|| self.out_of_region(offset, size_of::<W>()))
    }
}

impl RegisterSpace for MappedRegion {
    type Error = OutOfRegion;

    fn load<W: Width>(&self, offset: u64) -> Result<W, OutOfRegion> {
        self.window().load(offset)
    }

    fn store<W: Width>(&self, offset: u64, value: W) -> Result<(), OutOfRegion> {
        self.window().store(offset, value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page of ordinary memory that stands for a BAR.
    fn region() -> MappedRegion {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        MappedRegion::map(&file, 0, 4096).unwrap()
    }

    #[test]
    fn what_is_written_at_one_width_is_read_at_another() {
        let region = region();
        region.write(8, 0x1122_3344_5566_7788_u64).unwrap();
        assert_eq!(region.read::<u32>(8), Some(0x5566_7788));
        assert_eq!(region.read::<u16>(12), Some(0x3344));
        assert_eq!(region.read::<u8>(15), Some(0x11));
    }

    #[test]
    fn an_access_past_the_end_is_refused() {
        let region = region();
        assert_eq!(region.read::<u32>(4092), Some(0));
        assert_eq!(region.read::<u32>(4096), None);
        assert_eq!(region.write(4096, 1_u8), None);
        assert_eq!(region.read::<u8>(usize::MAX), None);
    }

    #[test]
    fn an_access_off_its_natural_alignment_is_refused() {
        let region = region();
        assert_eq!(region.read::<u32>(2), None);
        assert_eq!(region.write(4, 1_u64), None);
    }

    #[test]
    fn the_registers_of_a_map_are_where_it_says_in_a_window_that_has_room_for_it() {
        crate::register_map! {
            struct Whole[0x1000] { 0x8 Rw LONG: u64, 0xffc Rw LAST: u32 }
        }
        crate::register_map! {
            struct Larger[0x1001] { 0x0 Ro FIRST: u8 }
        }
        let region = region();
        let window = MapWindow::<Whole>::new(region.window()).unwrap();
        window.write(LAST, 0x1234_5678);
        assert_eq!(region.read::<u32>(0xffc), Some(0x1234_5678));
        region.write(8, 7_u64).unwrap();
        assert_eq!(window.read(LONG), 7);
        assert!(MapWindow::<Larger>::new(region.window()).is_none());
    }

    #[test]
    fn the_refusal_through_a_register_space_carries_its_values() {
        let err = region().load::<u64>(4092).unwrap_err();
        assert_eq!(err.to_string(), "8 bytes at offset 0xffc of a region of 0x1000 bytes");
    }
}
