//! Parts of memory files, mapped one after the other.

#![expect(unsafe_code)]
// UNSAFETY: as in `shared.rs`: the bytes are reached through raw pointers only.

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::SharedMemory;
use crate::iova::PAGE;
use crate::shared::{copy_in, copy_out};

/// Bytes of [`PAGE`], as lengths are counted here.
const PAGE_BYTES: usize = PAGE as usize;

/// Parts of memory files, mapped so that each begins where the one before it ends; a mapping of
/// its own, which does not change those of the files.
///
/// Invariant: `start..start + len` is mapped for reading, and for writing if `is_writable`, from
/// files whose size is sealed. An inaccessible page stands on either side. What the head of
/// [`SharedMemory`] says of copies that race holds here too.
#[derive(Debug)]
pub struct MemoryView {
    start: NonNull<u8>,
    len: usize,
    is_writable: bool,
    /// All the address space that is ours, the guards included.
    reserved: NonNull<u8>,
    reserved_len: usize,
}

/// Why parts of files cannot be mapped one after the other.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// No parts, an empty one, or one that is not inside its file.
    #[error("bytes {start:#x}..{end:#x} of a file of {size:#x} bytes")]
    Range {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
        /// Bytes of the file; 0 where there is none.
        size: usize,
    },
    /// A part ends, or the next one begins, inside a page: they cannot lie side by side.
    #[error(
        "a part of a mapping ends at {end:#x} and the next one begins at {start:#x}: both have to be on a page"
    )]
    NotAligned {
        /// Where the one ends in its file.
        end: usize,
        /// Where the other begins in its own.
        start: usize,
    },
    /// The file is mapped for reading only.
    #[error("a file that is mapped for reading only cannot be mapped for writing")]
    ReadOnly,
    /// The kernel refused.
    #[error("mapping parts of memory files")]
    Map(#[from] io::Error),
}

impl MemoryView {
    /// Maps `parts`, the bytes of a file each.
    pub fn map(
        parts: &[(&SharedMemory, Range<usize>)],
        is_writable: bool,
    ) -> Result<Self, ViewError> {
        check(parts, is_writable)?;
        let lead = parts[0].1.start % PAGE_BYTES;
        let len = parts.iter().map(|(_, range)| range.len()).sum::<usize>();
        let too_long = || io::Error::from(nix::Error::ENOMEM);
        let pages = lead.checked_add(len).and_then(|end| end.checked_next_multiple_of(PAGE_BYTES));
        let reserved_len = pages.and_then(|pages| pages.checked_add(2 * PAGE_BYTES));
        let reserved_len = reserved_len.and_then(NonZeroUsize::new).ok_or_else(too_long)?;

        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: without an address the kernel picks unused space, so nothing is replaced.
        let reserved = unsafe { mmap_anonymous(None, reserved_len, ProtFlags::PROT_NONE, flags) };
        let reserved = reserved.map_err(io::Error::from)?.cast::<u8>();
        // SAFETY: two pages and more are reserved, so this is inside.
        let first = unsafe { reserved.add(PAGE_BYTES) };
        // SAFETY: `lead` is less than the page that follows.
        let start = unsafe { first.add(lead) };
        // From here on the address space is released on every way out.
        let view = Self { start, len, is_writable, reserved, reserved_len: reserved_len.get() };

        let mut rights = ProtFlags::PROT_READ;
        rights.set(ProtFlags::PROT_WRITE, is_writable);
        let mut at = first;
        for (memory, range) in parts {
            let from = range.start / PAGE_BYTES * PAGE_BYTES;
            let bytes = (range.end - from).next_multiple_of(PAGE_BYTES);
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            let place = NonZeroUsize::new(at.as_ptr().addr());
            let bytes_mapped = NonZeroUsize::new(bytes).expect("no part is empty");
            // SAFETY:
            // 1. MAP_FIXED replaces whole pages of what was reserved above for this alone: the
            //    parts meet on pages, so together they have the `pages` between the guards.
            // 2. The kernel keeps its own reference to the file.
            unsafe { mmap(place, bytes_mapped, rights, flags, memory.as_fd(), from as i64) }
                .map_err(io::Error::from)?;
            // SAFETY: still inside, or at the guard behind the last part.
            at = unsafe { at.add(bytes) };
        }
        Ok(view)
    }

    /// Bytes mapped; never zero.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is mapped for writing too.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Where the first byte is in this process.
    pub fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Copies bytes out. A peer that writes meanwhile can tear what is read; nothing else.
    ///
    /// Panics when the range is not inside the view.
    #[inline]
    pub fn read_at(&self, offset: usize, data: &mut [u8]) {
        let source = self.at(offset, data.len());
        // SAFETY: `at` showed that the bytes are inside the mapping, which nothing refers to.
        unsafe { copy_out(source, data) }
    }

    /// Copies bytes in. Panics when the range is not inside the view, or the view is for reading
    /// only.
    #[inline]
    pub fn write_at(&self, offset: usize, data: &[u8]) {
        let target = self.at(offset, data.len());
        assert!(self.is_writable, "writing to a view that is for reading only");
        // SAFETY: `at` showed that the bytes are inside the mapping, which is writable and which
        // nothing refers to.
        unsafe { copy_in(target, data) }
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} are not inside a view of {} bytes",
            self.len
        );
        // SAFETY: just shown to be inside the mapping.
        unsafe { self.start.add(offset) }
    }
}

fn check(parts: &[(&SharedMemory, Range<usize>)], is_writable: bool) -> Result<(), ViewError> {
    if parts.is_empty() {
        return Err(ViewError::Range { start: 0, end: 0, size: 0 });
    }
    for (memory, range) in parts {
        if range.start >= range.end || range.end > memory.len() {
            let Range { start, end } = *range;
            return Err(ViewError::Range { start, end, size: memory.len() });
        }
        if is_writable && !memory.is_writable() {
            return Err(ViewError::ReadOnly);
        }
    }
    for (before, after) in parts.iter().zip(&parts[1..]) {
        let (end, start) = (before.1.end, after.1.start);
        if !end.is_multiple_of(PAGE_BYTES) || !start.is_multiple_of(PAGE_BYTES) {
            return Err(ViewError::NotAligned { end, start });
        }
    }
    Ok(())
}

impl Drop for MemoryView {
    fn drop(&mut self) {
        let start: NonNull<c_void> = self.reserved.cast();
        // SAFETY: reserved by `map` and ours alone; whoever copies through it borrows `self`.
        let unmapped = unsafe { munmap(start, self.reserved_len) };
        debug_assert!(unmapped.is_ok(), "unmapping whole pages of ours: {unmapped:?}");
    }
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl Send for MemoryView {}
// SAFETY: copies through it need no exclusive access: see "Copies that race with the peer" at
// `SharedMemory`.
unsafe impl Sync for MemoryView {}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(pages: usize) -> SharedMemory {
        SharedMemory::create(c"view", pages * PAGE_BYTES).unwrap()
    }

    #[test]
    fn parts_of_files_lie_side_by_side_and_are_the_files_bytes() {
        let (one, two) = (memory(3), memory(2));
        let parts = [(&one, PAGE_BYTES - 10..2 * PAGE_BYTES), (&two, PAGE_BYTES..PAGE_BYTES + 7)];
        let view = MemoryView::map(&parts, true).unwrap();
        assert_eq!(view.len(), PAGE_BYTES + 10 + 7);
        view.write_at(0, b"start");
        view.write_at(PAGE_BYTES + 7, b"across");
        let mut seen = [0; 5];
        one.read_at(PAGE_BYTES - 10, &mut seen);
        assert_eq!(&seen, b"start");
        let mut seen = [0; 3];
        one.read_at(2 * PAGE_BYTES - 3, &mut seen);
        assert_eq!(&seen, b"acr");
        two.read_at(PAGE_BYTES, &mut seen);
        assert_eq!(&seen, b"oss");
    }

    #[test]
    fn parts_that_do_not_meet_on_a_page_or_are_not_inside_are_refused() {
        let (one, two) = (memory(2), memory(2));
        let map = |first: Range<usize>, second: Range<usize>| {
            MemoryView::map(&[(&one, first), (&two, second)], true).unwrap_err()
        };
        let err = map(0..10, 0..10);
        assert!(matches!(err, ViewError::NotAligned { end: 10, start: 0 }), "{err}");
        let err = map(0..PAGE_BYTES, 10..20);
        assert!(matches!(err, ViewError::NotAligned { end: PAGE_BYTES, start: 10 }), "{err}");
        let err = map(0..PAGE_BYTES, 0..2 * PAGE_BYTES + 1);
        assert!(matches!(err, ViewError::Range { end: 0x2001, size: 0x2000, .. }), "{err}");
        let err = map(PAGE_BYTES..PAGE_BYTES, 0..1);
        assert!(matches!(err, ViewError::Range { .. }), "{err}");
        assert!(matches!(MemoryView::map(&[], true), Err(ViewError::Range { .. })));
    }

    #[test]
    fn a_view_of_memory_for_reading_cannot_be_for_writing() {
        let whole = memory(1);
        let file = whole.as_fd().try_clone_to_owned().unwrap();
        let reading = SharedMemory::attach_read_only(file, PAGE_BYTES).unwrap();
        let refused = MemoryView::map(&[(&reading, 0..10)], true);
        assert!(matches!(refused, Err(ViewError::ReadOnly)));
        assert!(!MemoryView::map(&[(&reading, 0..10)], false).unwrap().is_writable());
    }
}
