//! The words and bytes of a ring, in shared memory.

#![expect(unsafe_code)]
// UNSAFETY: the words belong to two processes, so they are made from raw pointers into a mapping.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32};

use super::layout::{
    ALIGNMENT, CONSUMER_AWAKE_OFFSET, ENTRY_HEADER_SIZE, HEAD_OFFSET, MEMORY_HEADER_SIZE,
    NEED_SERVICED_OFFSET, PRODUCER_AWAKE_OFFSET, READ_TO_OFFSET, ROOM_WANTED_OFFSET, TAIL_OFFSET,
};
use crate::shared::{copy_in, copy_out};
use crate::{SharedMemory, prefetch};

/// Bytes that are fetched ahead. A processor has some ten lines on their way at a time.
const MOST_FETCHED: usize = 16 * prefetch::LINE;

/// Access to the memory of one ring.
///
/// Invariant: `base` is the start of `memory`, which holds `MEMORY_HEADER_SIZE + capacity` bytes,
/// is page-aligned and stays mapped as long as this lives.
///
/// Every word is touched by atomics alone while it serves as an index or a flag. Bytes that hold a
/// size at one time and payload at another are ordered by the indices between two honest ends; what
/// a dishonest one can do is described at [`SharedMemory`].
#[derive(Debug, Clone)]
pub(super) struct Cells {
    base: NonNull<u8>,
    capacity: u32,
    memory: Arc<SharedMemory>,
}

// SAFETY: `base` points into the mapping that `memory` owns; both may be used from any thread.
unsafe impl Send for Cells {}
// SAFETY: everything that `&Cells` offers is an atomic, or a copy that `SharedMemory` allows from
// any thread.
unsafe impl Sync for Cells {}

impl Cells {
    /// Expects a memory of exactly `MEMORY_HEADER_SIZE + capacity` bytes, mapped for writing.
    pub(super) fn new(memory: Arc<SharedMemory>, capacity: u32) -> Self {
        assert_eq!(memory.len(), MEMORY_HEADER_SIZE + capacity as usize);
        assert!(memory.is_writable(), "a ring in memory that is mapped for reading only");
        let base = NonNull::new(memory.address()).expect("a mapping is never at address 0");
        Self { base, capacity, memory }
    }

    pub(super) fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    #[inline]
    pub(super) fn head(&self) -> &AtomicU32 {
        const { assert!(HEAD_OFFSET.is_multiple_of(4) && HEAD_OFFSET + 4 <= MEMORY_HEADER_SIZE) };
        // SAFETY: the assertion above is what `word` asks for.
        unsafe { self.word(HEAD_OFFSET) }
    }

    #[inline]
    pub(super) fn tail(&self) -> &AtomicU32 {
        const { assert!(TAIL_OFFSET.is_multiple_of(4) && TAIL_OFFSET + 4 <= MEMORY_HEADER_SIZE) };
        // SAFETY: the assertion above is what `word` asks for.
        unsafe { self.word(TAIL_OFFSET) }
    }

    #[inline]
    pub(super) fn read_to(&self) -> &AtomicU32 {
        const { assert!(READ_TO_OFFSET.is_multiple_of(4) && READ_TO_OFFSET + 4 <= MEMORY_HEADER_SIZE) };
        // SAFETY: the assertion above is what `word` asks for.
        unsafe { self.word(READ_TO_OFFSET) }
    }

    #[inline]
    pub(super) fn need_serviced(&self) -> &AtomicU8 {
        const { assert!(NEED_SERVICED_OFFSET < MEMORY_HEADER_SIZE) };
        // SAFETY: the assertion above is what `flag` asks for.
        unsafe { self.flag(NEED_SERVICED_OFFSET) }
    }

    #[inline]
    pub(super) fn room_wanted(&self) -> &AtomicU8 {
        const { assert!(ROOM_WANTED_OFFSET < MEMORY_HEADER_SIZE) };
        // SAFETY: the assertion above is what `flag` asks for.
        unsafe { self.flag(ROOM_WANTED_OFFSET) }
    }

    #[inline]
    pub(super) fn consumer_awake(&self) -> &AtomicU8 {
        const { assert!(CONSUMER_AWAKE_OFFSET < MEMORY_HEADER_SIZE) };
        // SAFETY: the assertion above is what `flag` asks for.
        unsafe { self.flag(CONSUMER_AWAKE_OFFSET) }
    }

    #[inline]
    pub(super) fn producer_awake(&self) -> &AtomicU8 {
        const { assert!(PRODUCER_AWAKE_OFFSET < MEMORY_HEADER_SIZE) };
        // SAFETY: the assertion above is what `flag` asks for.
        unsafe { self.flag(PRODUCER_AWAKE_OFFSET) }
    }

    /// The size field at an offset of the ring. Panics for an offset that is not a place for one.
    #[inline]
    pub(super) fn size_at(&self, at: u32) -> &AtomicU32 {
        let inside = at <= self.capacity && self.capacity - at >= ENTRY_HEADER_SIZE;
        assert!(inside && at.is_multiple_of(ALIGNMENT), "no entry can start at {at}");
        // SAFETY: the assertion above, and the header is a multiple of four bytes long.
        unsafe { self.word(MEMORY_HEADER_SIZE + at as usize) }
    }

    /// Copies bytes into the ring. Panics when the range is not inside it.
    #[inline]
    pub(super) fn write(&self, at: u32, data: &[u8]) {
        let target = self.bytes(at, data.len());
        // SAFETY: `bytes` checked the range; the seals keep it mapped as long as `memory` lives.
        unsafe { copy_in(target, data) }
    }

    /// Copies bytes out of the ring. Panics when the range is not inside it.
    #[inline]
    pub(super) fn read(&self, at: u32, data: &mut [u8]) {
        let source = self.bytes(at, data.len());
        // SAFETY: as in `write`.
        unsafe { copy_out(source, data) }
    }

    /// The address of `len` bytes at an offset of the ring. Panics when they are not inside it.
    #[inline]
    fn bytes(&self, at: u32, len: usize) -> NonNull<u8> {
        let inside = at <= self.capacity && (self.capacity - at) as usize >= len;
        assert!(inside, "{len} bytes at {at} are not inside a ring of {} bytes", self.capacity);
        // SAFETY: the assertion above keeps it inside the mapping.
        unsafe { self.base.add(MEMORY_HEADER_SIZE + at as usize) }
    }

    /// Has the processor fetch `count` bytes from offset `at` of the ring on, to be written soon.
    /// Any offset will do.
    #[inline]
    pub(super) fn will_write(&self, at: u32, count: u32) {
        let start = self.base.as_ptr().wrapping_add(MEMORY_HEADER_SIZE + at as usize);
        let lines = (0..count as usize).step_by(prefetch::LINE);
        lines.for_each(|line| prefetch::to_write(start.wrapping_add(line)));
    }

    /// Has the processor fetch the beginning of an entry at offset `at` of the ring, to be read now,
    /// with nothing beyond the `count` bytes that are there. Any offset and count will do.
    ///
    /// An entry has a size and so mostly lies on two lines, and how far a copy goes is known only when
    /// the first has come: this asks the other processor for both at once. Not before the entry is
    /// there, which would take the lines from the producer that is about to write them.
    #[inline]
    pub(super) fn will_read(&self, at: u32, count: u32) {
        let start = self.base.as_ptr().wrapping_add(MEMORY_HEADER_SIZE + at as usize);
        for offset in [0, prefetch::LINE.min(count.saturating_sub(1) as usize)] {
            prefetch::to_read(start.wrapping_add(offset));
        }
    }

    /// As [`will_read`](Self::will_read), of as many entries as `count` bytes have, the first ones
    /// first: they come from the other processor side by side instead of one after the other.
    #[inline]
    pub(super) fn will_read_all(&self, at: u32, count: u32) {
        let start = self.base.as_ptr().wrapping_add(MEMORY_HEADER_SIZE + at as usize);
        let count = (count as usize).min(MOST_FETCHED);
        let lines = (0..count).step_by(prefetch::LINE);
        lines.for_each(|line| prefetch::to_read(start.wrapping_add(line)));
    }

    /// # Safety
    ///
    /// `offset` is inside the header.
    #[inline]
    unsafe fn flag(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: the caller promises an offset inside the mapping.
        let byte = unsafe { self.base.add(offset) };
        // SAFETY: mapped as long as `self` lives, and nobody on this side uses anything but this
        // atomic for it. A byte needs no alignment.
        unsafe { AtomicU8::from_ptr(byte.as_ptr()) }
    }

    /// # Safety
    ///
    /// `offset` is a multiple of four, and four bytes from it are inside the memory.
    #[inline]
    unsafe fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: the caller promises an offset inside the mapping.
        let word = unsafe { self.base.add(offset) }.cast::<u32>();
        // SAFETY:
        // 1. Aligned: the mapping starts on a page, and the caller promises a multiple of four.
        // 2. Valid for reads and writes as long as `self` lives, which holds `memory`.
        // 3. Nobody on this side accesses it otherwise at the same time: see the type.
        unsafe { AtomicU32::from_ptr(word.as_ptr()) }
    }
}
