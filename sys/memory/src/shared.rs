//! Sealed memory files and their mapping.

#![expect(unsafe_code)]
// UNSAFETY: the bytes belong to whoever has the descriptor, so they are reached through raw
// pointers only.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// The seals without which a peer could pull pages away from under a mapping.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// A memory file that can neither grow nor shrink, mapped read/write for as long as this lives.
///
/// Invariant: `map` covers `len` bytes of a file whose size is sealed, so every access in
/// bounds is an access to mapped memory, whatever a peer does.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    map: MmapRaw,
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
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "shared memory of no bytes"));
        }
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&fd, len.try_into().map_err(io::Error::other)?)?;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SEALS))?;
        let map = MmapOptions::new().len(len).map_raw(&fd)?;
        Ok(Self { fd, map })
    }

    /// Maps a memory file that a peer made, after checking that it is sealed and has `len` bytes.
    pub fn attach(fd: OwnedFd, len: usize) -> Result<Self, AttachError> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(io::Error::from)?;
        let needed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        if !SealFlag::from_bits_truncate(seals).contains(needed) {
            return Err(AttachError::NotSealed { seals });
        }
        let size = nix::sys::stat::fstat(&fd).map_err(io::Error::from)?.st_size;
        if len == 0 || size as u64 != len as u64 {
            return Err(AttachError::WrongLength { expected: len, actual: size as usize });
        }
        let map = MmapOptions::new().len(len).map_raw(&fd)?;
        Ok(Self { fd, map })
    }

    /// Bytes in the file; never zero.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Where the mapping starts in this process, for a kernel that is to pin it or for code in
    /// this crate. Page-aligned.
    pub fn address(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Copies bytes out. A peer that writes meanwhile can tear what is read; nothing else.
    ///
    /// Panics when the range is not inside the memory: offsets are ours, never a peer's.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) {
        self.check(offset, data.len());
        // SAFETY: `check` showed that `offset` is inside the mapping.
        let source = unsafe { self.map.as_ptr().add(offset) };
        // SAFETY:
        // 1. `check` showed that `data.len()` bytes from `source` are mapped, and the seals keep
        //    them so.
        // 2. `data` is private to us and cannot overlap a mapping that is never lent.
        unsafe { std::ptr::copy_nonoverlapping(source, data.as_mut_ptr(), data.len()) }
    }

    /// Copies bytes in. Panics when the range is not inside the memory.
    pub fn write_at(&self, offset: usize, data: &[u8]) {
        self.check(offset, data.len());
        // SAFETY: `check` showed that `offset` is inside the mapping.
        let target = unsafe { self.map.as_mut_ptr().add(offset) };
        // SAFETY: as in `read_at`, with the roles exchanged.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), target, data.len()) }
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len()),
            "{len} bytes at {offset} are not inside {} bytes of shared memory",
            self.len()
        );
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

#[cfg(test)]
mod tests {
    use super::*;

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
    #[should_panic(expected = "not inside 100 bytes")]
    fn an_access_past_the_end_panics_instead_of_reading() {
        SharedMemory::create(c"test", 100).unwrap().read_at(98, &mut [0; 3]);
    }
}
