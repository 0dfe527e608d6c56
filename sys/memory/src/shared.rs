//! Sealed memory files and their mapping.

#![expect(unsafe_code)]
// UNSAFETY: the bytes belong to whoever has the descriptor, so they are reached through raw
// pointers only.

use std::ffi::{CStr, c_void};
use std::io::{self, ErrorKind};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
#[cfg(not(loom))]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::{Ordering, compiler_fence};

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{SysconfVar, sysconf};

/// The seals without which a peer could pull pages away from under a mapping.
const SEALS: SealFlag =
    SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// A memory file that can neither grow nor shrink, mapped read/write for as long as this lives.
///
/// Invariant: `map` covers `len` bytes of a file whose size is sealed, so every access in
/// bounds is an access to mapped memory, whatever a peer does. An inaccessible page stands behind
/// the last page of the mapping: a mistake of ours that runs past the end stops there instead of
/// reaching someone else's bytes.
///
/// # Copies that race with the peer
///
/// Rust's memory model speaks of the threads of one program. The bytes here can be written by
/// another program at any moment, like the registers of a device, and so they are treated alike:
///
/// 1. They lie outside every Rust object, and no reference to them exists. (The atomics that
///    `ring` makes for single words are the exception that the language provides.)
/// 2. They are copied through raw pointers, to and from private memory, as bytes. Every pattern is
///    a valid `u8`, so the worst that a racing writer achieves is a torn copy, which is its own data.
/// 3. A compiler fence stands behind each copy out. A private copy is therefore what later code
///    looks at; the compiler cannot forward a look at the copy to a second look at the original.
/// 4. What is decided upon (an index, a size) is never fetched this way but by one atomic load.
///
/// Two ends inside one process that keep the rules of the ring do not race at all: the indices
/// order their copies.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    map: Mapping,
    is_writable: bool,
}

/// Why a descriptor from a peer is not usable as shared memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The file could change its size, and an access past its end would be fatal.
    #[error("memory file lacks the shrink and grow seals, has {seals:#x}")]
    NotSealed {
        /// The seals it has, as `F_GET_SEALS` reports them.
        seals: i32,
    },
    /// The file is not as long as the peer said.
    #[error("memory file has {actual} bytes, {expected} were announced")]
    WrongLength {
        /// Bytes announced.
        expected: usize,
        /// Bytes the file has.
        actual: usize,
    },
    /// The kernel refused.
    #[error("mapping the memory file")]
    Map(#[from] io::Error),
}

impl SharedMemory {
    /// Makes `len` zeroed bytes. `name` shows in `/proc/*/maps`.
    ///
    /// Errors: `InvalidInput` for a length of zero; whatever `memfd_create` and `mmap` say.
    pub fn create(name: &CStr, len: usize) -> io::Result<Self> {
        if len == 0 {
            return Err(io::Error::new(ErrorKind::InvalidInput, "shared memory of no bytes"));
        }
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&fd, len.try_into().map_err(io::Error::other)?)?;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SEALS))?;
        let map = Mapping::new(fd.as_fd(), len, READ_WRITE)?;
        Ok(Self { fd, map, is_writable: true })
    }

    /// As [`create`](Self::create), of huge pages, so that an IOMMU needs one entry per page of
    /// [`HUGE_PAGE`] bytes. The machine has as many as its administrator set aside
    /// (`vm.nr_hugepages`; Linux, `Documentation/admin-guide/mm/hugetlbpage.rst`).
    ///
    /// Errors: `InvalidInput` for a length that is no multiple of [`HUGE_PAGE`], or zero;
    /// `OutOfMemory` when fewer are free.
    pub fn create_huge(name: &CStr, len: usize) -> io::Result<Self> {
        if len == 0 || !len.is_multiple_of(HUGE_PAGE) {
            let reason = format!("{len:#x} bytes are no whole number of huge pages");
            return Err(io::Error::new(ErrorKind::InvalidInput, reason));
        }
        let flags = MFdFlags::MFD_CLOEXEC
            | MFdFlags::MFD_ALLOW_SEALING
            | MFdFlags::MFD_HUGETLB
            | MFdFlags::MFD_HUGE_2MB;
        let fd = memfd_create(name, flags)?;
        nix::unistd::ftruncate(&fd, len.try_into().map_err(io::Error::other)?)?;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SEALS))?;
        // The kernel sets the pages aside for the mapping here, or refuses.
        let map = Mapping::of_pages(fd.as_fd(), len, READ_WRITE, HUGE_PAGE)?;
        Ok(Self { fd, map, is_writable: true })
    }

    /// Maps a memory file that a peer made, after checking that it is sealed and has `len` bytes.
    pub fn attach(fd: OwnedFd, len: usize) -> Result<Self, AttachError> {
        check_file(&fd, len)?;
        let map = Mapping::new(fd.as_fd(), len, READ_WRITE)?;
        Ok(Self { fd, map, is_writable: true })
    }

    /// As [`attach`](Self::attach), for reading only, as a descriptor for reading only allows.
    pub fn attach_read_only(fd: OwnedFd, len: usize) -> Result<Self, AttachError> {
        check_file(&fd, len)?;
        let map = Mapping::new(fd.as_fd(), len, ProtFlags::PROT_READ)?;
        Ok(Self { fd, map, is_writable: false })
    }

    /// Bytes in the file; never zero.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.map.len
    }

    /// Whether it is mapped for writing too.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Where the mapping starts in this process, for a kernel that is to pin it or for code in
    /// another language. Page-aligned. A write faults unless it
    /// [`is_writable`](Self::is_writable).
    pub fn address(&self) -> *mut u8 {
        self.map.base.as_ptr()
    }

    /// Copies bytes out. A peer that writes meanwhile can tear what is read; nothing else.
    ///
    /// Panics when the range is not inside the memory: offsets are ours, never a peer's.
    #[inline]
    pub fn read_at(&self, offset: usize, data: &mut [u8]) {
        self.check(offset, data.len());
        // SAFETY: `check` showed that `offset` is inside the mapping.
        let source = unsafe { self.map.base.add(offset) };
        // SAFETY: `check` showed that `data.len()` bytes from `source` are mapped, and the seals
        // keep them so.
        unsafe { copy_out(source, data) }
    }

    /// Copies bytes in. Panics when the range is not inside the memory, or the memory is mapped
    /// for reading only.
    #[inline]
    pub fn write_at(&self, offset: usize, data: &[u8]) {
        self.check(offset, data.len());
        assert!(self.is_writable, "writing to memory that is mapped for reading only");
        // SAFETY: `check` showed that `offset` is inside the mapping.
        let target = unsafe { self.map.base.add(offset) };
        // SAFETY: `check` showed that `data.len()` bytes from `target` are mapped for writing, and
        // the seals keep them so.
        unsafe { copy_in(target, data) }
    }

    /// Reads bytes of a file into the memory, without a copy in between.
    ///
    /// Errors: `UnexpectedEof` for a file that has fewer, and what `pread(2)` says; a part may have
    /// been read. Panics as [`write_at`](Self::write_at).
    pub fn read_from(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        position: u64,
    ) -> io::Result<()> {
        assert!(self.is_writable, "writing to memory that is mapped for reading only");
        self.transfer(offset, len, position, ErrorKind::UnexpectedEof, |target, len, at| {
            // SAFETY: `transfer` names mapped bytes of ours, which the assertion showed to be
            // writable, and the seals keep them so. No reference points to them.
            unsafe { libc::pread64(file.as_raw_fd(), target.as_ptr().cast(), len, at) }
        })
    }

    /// Writes bytes of the memory to a file, without a copy in between.
    ///
    /// Errors: `WriteZero` for a file that takes no more, and what `pwrite(2)` says; a part may have
    /// been written. Panics as [`read_at`](Self::read_at).
    pub fn write_to(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        position: u64,
    ) -> io::Result<()> {
        self.transfer(offset, len, position, ErrorKind::WriteZero, |source, len, at| {
            // SAFETY: `transfer` names mapped bytes of ours, and the seals keep them so. A peer that
            // writes them meanwhile: see "Copies that race with the peer".
            unsafe { libc::pwrite64(file.as_raw_fd(), source.as_ptr().cast(), len, at) }
        })
    }

    /// Has a system call read or write bytes, in as many parts as it takes: it is told where they
    /// start, how many there are, and where they are in the file. None done is the failure `at_end`.
    fn transfer(
        &self,
        offset: usize,
        len: usize,
        position: u64,
        at_end: ErrorKind,
        call: impl Fn(NonNull<u8>, usize, libc::off64_t) -> isize,
    ) -> io::Result<()> {
        self.check(offset, len);
        let mut done = 0;
        while done < len {
            let at = libc::off64_t::try_from(position + done as u64).map_err(io::Error::other)?;
            // SAFETY: `check` showed that `offset + len` is inside the mapping, and `done < len`.
            let start = unsafe { self.map.base.add(offset + done) };
            match nix::errno::Errno::result(call(start, len - done, at)) {
                Ok(0) => return Err(at_end.into()),
                Ok(part) => done += part as usize,
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// A word that both sides read and write whole.
    ///
    /// Panics when it is not inside the memory or not at a multiple of eight, or the memory is mapped
    /// for reading only.
    #[inline]
    #[cfg(not(loom))]
    pub(crate) fn word_at(&self, offset: usize) -> &AtomicU64 {
        self.check(offset, size_of::<u64>());
        assert!(self.is_writable && offset.is_multiple_of(align_of::<AtomicU64>()));
        // SAFETY: `check` showed that `offset` is inside the mapping.
        let word = unsafe { self.map.base.add(offset) }.cast::<u64>();
        // SAFETY:
        // 1. Aligned: the mapping starts on a page, and the assertion above.
        // 2. Valid for reads and writes as long as `self` lives: `check`, and the assertion above.
        // 3. Whoever keeps words in a memory uses nothing but this for them.
        unsafe { AtomicU64::from_ptr(word.as_ptr()) }
    }

    #[inline]
    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len()),
            "{len} bytes at {offset} are not inside {} bytes of shared memory",
            self.len()
        );
    }
}

/// Copies bytes out of a mapping.
///
/// # Safety
///
/// `data.len()` bytes from `source` are inside a mapping that no reference points into.
#[inline]
pub(crate) unsafe fn copy_out(source: NonNull<u8>, data: &mut [u8]) {
    // SAFETY:
    // 1. The caller promises the source. A writer on the other side: see "Copies that race with the
    //    peer".
    // 2. `data` is private to us and cannot overlap a mapping that is never lent.
    unsafe { copy(source.as_ptr(), data.as_mut_ptr(), data.len()) }
    compiler_fence(Ordering::SeqCst);
}

/// Copies bytes into a mapping.
///
/// # Safety
///
/// `data.len()` bytes from `target` are inside a writable mapping that no reference points into.
#[inline]
pub(crate) unsafe fn copy_in(target: NonNull<u8>, data: &[u8]) {
    // SAFETY: as in `copy_out`, with the roles exchanged.
    unsafe { copy(data.as_ptr(), target.as_ptr(), data.len()) }
}

/// The C library's copy, but for the short lengths at which calling it takes longer than copying:
/// there, the first and the last bytes, which may overlap.
///
/// # Safety
///
/// As `std::ptr::copy_nonoverlapping`.
#[inline(always)]
unsafe fn copy(source: *const u8, target: *mut u8, len: usize) {
    /// Copies the first and the last `N` of `len` bytes.
    ///
    /// # Safety
    ///
    /// As `copy`, and `N <= len`.
    #[inline(always)]
    unsafe fn ends<const N: usize>(source: *const u8, target: *mut u8, len: usize) {
        for at in [0, len - N] {
            // SAFETY: `at + N <= len`, so inside what the caller promises.
            let from = unsafe { source.add(at) }.cast::<[u8; N]>();
            // SAFETY: as above.
            let to = unsafe { target.add(at) }.cast::<[u8; N]>();
            // SAFETY: as above, so `N` bytes are readable. Bytes need no alignment.
            let bytes = unsafe { from.read() };
            // SAFETY: as above, so `N` bytes are writable.
            unsafe { to.write(bytes) };
        }
    }
    match len {
        // SAFETY: the caller's promise, and the arm.
        4..=7 => unsafe { ends::<4>(source, target, len) },
        // SAFETY: as above.
        8..=16 => unsafe { ends::<8>(source, target, len) },
        // SAFETY: as above.
        17..=32 => unsafe { ends::<16>(source, target, len) },
        // SAFETY: as above.
        33..=64 => unsafe { ends::<32>(source, target, len) },
        // SAFETY: as above.
        _ => unsafe { std::ptr::copy_nonoverlapping(source, target, len) },
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for SharedMemory {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

/// Bytes of a huge page.
pub const HUGE_PAGE: usize = 2 << 20;

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// The length of a sealed memory file, and a descriptor of it to give away: for reading only if
/// the receiver may not write.
///
/// Reading only holds against a receiver that is neither the file's owner nor root: those may open
/// the file anew.
///
/// Errors: `NotSealed`; `WrongLength` for an empty file; `Map` for what the kernel says.
pub fn offer(fd: OwnedFd, read_only: bool) -> Result<(OwnedFd, usize), AttachError> {
    let len = sealed_len(&fd)?;
    if !read_only {
        return Ok((fd, len));
    }
    // Memory files are made for everybody, and whoever has one may open it by its descriptor.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR).map_err(io::Error::from)?;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let reading = open(path.as_str(), flags, Mode::empty()).map_err(io::Error::from)?;
    Ok((reading, len))
}

/// The length of a memory file that a peer made, once it is sure that it stays so.
///
/// Errors: `NotSealed`; `WrongLength` for an empty file; `Map` for what the kernel says.
pub fn sealed_len(fd: &OwnedFd) -> Result<usize, AttachError> {
    let len = nix::sys::stat::fstat(fd).map_err(io::Error::from)?.st_size as usize;
    check_file(fd, len)?;
    Ok(len)
}

fn check_file(fd: &OwnedFd, len: usize) -> Result<(), AttachError> {
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(io::Error::from)?;
    let needed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    if !SealFlag::from_bits_truncate(seals).contains(needed) {
        return Err(AttachError::NotSealed { seals });
    }
    let size = nix::sys::stat::fstat(fd).map_err(io::Error::from)?.st_size;
    if len == 0 || size as u64 != len as u64 {
        return Err(AttachError::WrongLength { expected: len, actual: size as usize });
    }
    Ok(())
}

/// The whole pages of a file in our address space, and a page behind them that nobody may touch.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    /// Bytes of the file.
    len: usize,
    /// Where the address space starts that is ours: before `base` where that is aligned to more
    /// than a page.
    start: NonNull<u8>,
    /// Bytes of it: whole pages, the guard included.
    reserved: NonZeroUsize,
}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, len: usize, rights: ProtFlags) -> io::Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.expect("Linux has a page size") as usize;
        Self::of_pages(fd, len, rights, page)
    }

    /// Of a file whose pages have `page` bytes.
    fn of_pages(
        fd: BorrowedFd<'_>,
        len: usize,
        rights: ProtFlags,
        page: usize,
    ) -> io::Result<Self> {
        let too_long = || io::Error::from(nix::Error::ENOMEM);
        let pages = len.checked_next_multiple_of(page).and_then(NonZeroUsize::new);
        let pages = pages.ok_or_else(too_long)?;
        // One page for the guard, or for what is skipped to be aligned and the guard.
        let reserved = pages.checked_add(page).ok_or_else(too_long)?;

        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: without an address the kernel picks unused space, so nothing is replaced.
        let start = unsafe { mmap_anonymous(None, reserved, ProtFlags::PROT_NONE, flags) }?;
        // From here on the address space is released on every way out.
        let skipped = start.as_ptr().align_offset(page);
        // SAFETY: less than `page`, which is what was reserved beyond `pages`.
        let base = unsafe { start.cast::<u8>().add(skipped) };
        let mapping = Self { base, len, start: start.cast(), reserved };

        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        let at = NonZeroUsize::new(base.as_ptr().addr());
        // SAFETY:
        // 1. MAP_FIXED replaces `pages` bytes from `base`, inside of what was reserved above for
        //    this alone; nothing has been put there since.
        // 2. The kernel keeps its own reference to the file behind `fd`.
        unsafe { mmap(at, pages, rights, flags, fd, 0) }?;
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let start: NonNull<c_void> = self.start.cast();
        // SAFETY: the range was reserved by `new` and is ours alone; whoever copies through it
        // borrows or shares ownership of the `SharedMemory`, so nobody is left.
        let unmapped = unsafe { munmap(start, self.reserved.get()) };
        debug_assert!(unmapped.is_ok(), "unmapping whole pages of ours: {unmapped:?}");
    }
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: through `&Mapping` only the pointer and the lengths can be read. Copies through the
// pointer need no exclusive access: see "Copies that race with the peer".
unsafe impl Sync for Mapping {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_to_a_file_and_back_without_the_memorys_being_lent() {
        let memory = SharedMemory::create(c"test", 8192).unwrap();
        let file = memfd_create(c"file", MFdFlags::MFD_CLOEXEC).unwrap();
        memory.write_at(5000, b"hello");
        memory.write_to(5000, 5, file.as_fd(), 1 << 33).unwrap();
        memory.read_from(1, 5, file.as_fd(), 1 << 33).unwrap();
        let mut seen = [0; 5];
        memory.read_at(1, &mut seen);
        assert_eq!(&seen, b"hello");
        let err = memory.read_from(0, 6, file.as_fd(), 1 << 33).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::UnexpectedEof, "the file ends after five bytes");
        memory.write_to(0, 1, file.as_fd(), u64::MAX).unwrap_err();
        let outside = || memory.read_from(8190, 5, file.as_fd(), 1 << 33);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(outside)).is_err());
    }

    #[test]
    fn two_mappings_of_one_file_see_the_same_bytes() {
        let ours = SharedMemory::create(c"test", 100).unwrap();
        let theirs = SharedMemory::attach(ours.as_fd().try_clone_to_owned().unwrap(), 100).unwrap();
        ours.write_at(10, b"hello");
        let mut seen = [0; 5];
        theirs.read_at(10, &mut seen);
        assert_eq!(&seen, b"hello");
    }

    #[test]
    fn memory_of_huge_pages_is_aligned_to_them_or_refused_where_none_are_set_aside() {
        match SharedMemory::create_huge(c"huge", HUGE_PAGE) {
            Ok(memory) => {
                assert!(memory.address().addr().is_multiple_of(HUGE_PAGE));
                memory.write_at(HUGE_PAGE - 3, b"end");
                let mut seen = [0; 3];
                memory.read_at(HUGE_PAGE - 3, &mut seen);
                assert_eq!(&seen, b"end");
            }
            Err(err) => assert_eq!(err.kind(), ErrorKind::OutOfMemory, "{err}"),
        }
        for len in [0, 4096, HUGE_PAGE + 1] {
            let err = SharedMemory::create_huge(c"huge", len).unwrap_err();
            assert_eq!(err.kind(), ErrorKind::InvalidInput, "{len}: {err}");
        }
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let fd = memfd_create(c"loose", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, 100).unwrap();
        assert!(matches!(SharedMemory::attach(fd, 100), Err(AttachError::NotSealed { .. })));
    }

    #[test]
    fn a_wrong_length_is_refused_with_both_numbers() {
        let ours = SharedMemory::create(c"test", 100).unwrap();
        let fd = ours.as_fd().try_clone_to_owned().unwrap();
        let err = SharedMemory::attach(fd, 200).unwrap_err();
        assert_eq!(err.to_string(), "memory file has 100 bytes, 200 were announced");
    }

    #[test]
    fn memory_that_is_offered_for_reading_can_be_read_and_not_mapped_for_writing() {
        let ours = SharedMemory::create(c"offered", 100).unwrap();
        ours.write_at(0, b"hello");
        let file = || ours.as_fd().try_clone_to_owned().unwrap();
        let (reading, len) = offer(file(), true).unwrap();
        assert_eq!(len, 100);

        let again = reading.try_clone().unwrap();
        let refused = SharedMemory::attach(again, len).unwrap_err();
        let AttachError::Map(err) = refused else { panic!("{refused:?}") };
        assert_eq!(err.kind(), ErrorKind::PermissionDenied);
        let theirs = SharedMemory::attach_read_only(reading, len).unwrap();
        let mut seen = [0; 5];
        theirs.read_at(0, &mut seen);
        assert_eq!((&seen, theirs.is_writable()), (b"hello", false));

        let byte = theirs.address().cast::<c_void>();
        // SAFETY: the kernel checks the address itself and answers EFAULT for one that it may not
        // write.
        let read = unsafe { libc::getrandom(byte, 1, 0) };
        assert_eq!((read, nix::Error::last()), (-1, nix::Error::EFAULT), "the MMU says no");

        let (both, len) = offer(file(), false).unwrap();
        assert!(SharedMemory::attach(both, len).unwrap().is_writable());
    }

    #[test]
    fn what_is_no_sealed_memory_is_not_offered() {
        let fd = memfd_create(c"loose", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, 100).unwrap();
        assert!(matches!(offer(fd, false), Err(AttachError::NotSealed { .. })));
        let (read, _write) = nix::unistd::pipe().unwrap();
        assert!(matches!(offer(read, true), Err(AttachError::Map(_))));
    }

    #[test]
    fn the_page_behind_the_memory_cannot_be_touched() {
        let memory = SharedMemory::create(c"guarded", 8192).unwrap();
        let (_read, write) = nix::unistd::pipe().unwrap();
        let probe = |offset: usize| {
            let byte = memory.address().wrapping_add(offset).cast::<c_void>();
            // SAFETY: the kernel checks the address itself and answers EFAULT for a bad one.
            let written = unsafe { libc::write(write.as_raw_fd(), byte, 1) };
            if written == 1 { Ok(()) } else { Err(nix::Error::last()) }
        };
        assert_eq!(probe(8191), Ok(()), "the last byte is there");
        assert_eq!(probe(8192), Err(nix::Error::EFAULT), "the next one is not");
    }

    #[test]
    fn a_copy_of_any_length_moves_its_bytes_and_no_other() {
        let memory = SharedMemory::create(c"test", 300).unwrap();
        let data: Vec<u8> = (1..=200).collect();
        for len in 0..=200 {
            memory.write_at(0, &[0; 300]);
            memory.write_at(50, &data[..len]);
            let mut seen = [9; 300];
            memory.read_at(0, &mut seen);
            assert_eq!(seen[50..50 + len], data[..len]);
            assert!(seen[..50].iter().chain(&seen[50 + len..]).all(|&byte| byte == 0), "{len}");
            let mut back = vec![9; len + 2];
            memory.read_at(50, &mut back[1..=len]);
            assert_eq!((back[0], &back[1..=len], back[len + 1]), (9, &data[..len], 9));
        }
    }

    #[test]
    #[should_panic(expected = "not inside 100 bytes")]
    fn an_access_past_the_end_panics_instead_of_reading() {
        SharedMemory::create(c"test", 100).unwrap().read_at(98, &mut [0; 3]);
    }
}
