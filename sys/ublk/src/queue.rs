//! What is asked of a device, and the answers.

#![expect(unsafe_code)]
// UNSAFETY: the kernel describes what it asks in memory that it shares with this process.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::device::SECTOR;

/// Bytes of `struct ublksrv_io_desc`, and of `struct ublksrv_io_cmd`.
const DESCRIPTOR_LENGTH: usize = 24;
const COMMAND_LENGTH: usize = 16;

/// All that is asked of one device, for the thread that has taken it.
///
/// The kernel asks at most as much at a time as there are tags, and a tag comes again after it was
/// [`answered`](Self::answer). What was answered reaches the kernel by [`submit`](Self::submit). A
/// queue that is dropped leaves its device stopped.
///
/// Readable, for `poll(2)` and its kin, when something is asked. The kernel deals with the thread
/// that opened it, so it stays there.
pub struct Queue {
    /// First, so that its commands end before the file they are for.
    ring: IoUring,
    descriptors: Descriptors,
    file: File,
    /// Tags that the kernel will not ask with any more.
    ended: u16,
}

/// Something that is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Which of the requests under way it is: below [`Queue::TAGS`].
    pub tag: u16,
    /// What is to be done.
    pub order: Order,
    /// The first byte on the disk.
    pub offset: u64,
    /// Bytes; none for a flush.
    pub length: u64,
    /// A write is to be on the medium when it is answered.
    pub is_through: bool,
}

/// What is to be done. The kernel asks for what the device's properties have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The bytes are written to [`Queue::file`].
    Read,
    /// The bytes are read from [`Queue::file`].
    Write,
    /// What was answered before is to be on the medium.
    Flush,
    /// The bytes are not needed any more.
    Discard,
    /// The bytes are to be zeroes.
    WriteZeroes,
    /// Something that is not known here, by its number.
    Other(u8),
}

impl Queue {
    /// How many requests are under way at most.
    pub const TAGS: u16 = 64;

    pub(crate) fn open(path: &str) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let descriptors = Descriptors::map(&file)?;
        let ring = IoUring::new(Self::TAGS.into())?;
        let mut queue = Self { ring, descriptors, file, ended: 0 };
        for tag in 0..Self::TAGS {
            const FETCH: u32 = nix::request_code_readwrite!(b'u', 0x20, COMMAND_LENGTH) as u32;
            queue.command(FETCH, tag, 0);
        }
        queue.submit()?;
        Ok(queue)
    }

    /// The next thing that is asked, if there is one. After [`submit`](Self::submit).
    pub fn take(&mut self) -> Option<Asked> {
        loop {
            let completion = self.ring.completion().next()?;
            // Everything but 0 means that the tag does not come again: the device is stopped, or
            // the kernel found something wrong with an answer, which it fails by itself then.
            if completion.result() == 0 {
                let tag = completion.user_data() as u16;
                return Some(self.descriptors.read(tag));
            }
            self.ended += 1;
        }
    }

    /// Whether everything is answered and nothing will be asked any more, as far as
    /// [`take`](Self::take) has seen.
    pub fn is_over(&self) -> bool {
        self.ended == Self::TAGS
    }

    /// Answers what was asked: with the bytes that were read or written, or zero for the other
    /// orders, or with an error.
    ///
    /// Panics on a tag that there is not.
    pub fn answer(&mut self, tag: u16, outcome: Result<u32, Errno>) {
        const COMMIT_AND_FETCH: u32 =
            nix::request_code_readwrite!(b'u', 0x21, COMMAND_LENGTH) as u32;
        assert!(tag < Self::TAGS, "tag {tag} of {}", Self::TAGS);
        let result = match outcome {
            Ok(bytes) => bytes.cast_signed(),
            Err(errno) => -(errno as i32),
        };
        self.command(COMMIT_AND_FETCH, tag, result);
    }

    /// Gives the kernel all answers, and lets it ask. Does not wait.
    pub fn submit(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Err(err) if err.kind() == ErrorKind::Interrupted => {}
                outcome => return outcome.map(drop),
            }
        }
    }

    /// Where the bytes of what was asked are written for a read, and read for a write, from
    /// [`position`](Self::position) on.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where in the file the bytes of a tag are, until it is answered.
    pub fn position(tag: u16) -> u64 {
        // UBLKSRV_IO_BUF_OFFSET and UBLK_TAG_OFF; the number of the queue is zero.
        const BYTES: u64 = 0x8000_0000;
        const TAG: u32 = 25;
        BYTES + (u64::from(tag) << TAG)
    }

    fn command(&mut self, operation: u32, tag: u16, result: i32) {
        // struct ublksrv_io_cmd: queue, tag, result, and an address, which there is none of.
        let mut bytes = [0; COMMAND_LENGTH];
        bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&result.to_ne_bytes());
        let file = types::Fd(self.file.as_raw_fd());
        let entry = opcode::UringCmd16::new(file, operation).cmd(bytes).build();
        // SAFETY: the command names no memory of ours, and the file is open as long as the ring.
        unsafe { self.ring.submission().push(&entry.user_data(tag.into())) }
            .expect("there is room for as many as there are tags");
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Queue({:?}, {} tags ended)", self.file, self.ended)
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// What the kernel asks, a descriptor for each tag: mapped for reading, for as long as this lives.
#[derive(Debug)]
struct Descriptors {
    base: NonNull<u8>,
    len: NonZeroUsize,
}

impl Descriptors {
    fn map(file: &File) -> io::Result<Self> {
        // UBLKSRV_CMD_BUF_OFFSET; the number of the queue is zero.
        const AT: i64 = 0;
        let len = usize::from(Queue::TAGS) * DESCRIPTOR_LENGTH;
        let len = NonZeroUsize::new(len).expect("there are tags");
        // SAFETY: a mapping at a place that the kernel chooses takes no memory from anybody.
        let base =
            unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, AT) }?;
        Ok(Self { base: base.cast(), len })
    }

    /// What is asked with a tag, after the kernel has said so.
    fn read(&self, tag: u16) -> Asked {
        assert!(tag < Queue::TAGS, "the kernel has asked with tag {tag}");
        // SAFETY: the mapping has a descriptor for each tag.
        let at = unsafe { self.base.add(usize::from(tag) * DESCRIPTOR_LENGTH) };
        // SAFETY: as above, and bytes need no alignment. The kernel changes it when the tag was
        // answered, and not before.
        let bytes = unsafe { at.cast::<[u8; DESCRIPTOR_LENGTH]>().read_volatile() };
        Asked::from_bytes(tag, &bytes)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and nothing points into it.
        let unmapped = unsafe { munmap(self.base.cast(), self.len.get()) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Asked {
    /// `struct ublksrv_io_desc`: the order and its flags, sectors, the first sector.
    fn from_bytes(tag: u16, bytes: &[u8; DESCRIPTOR_LENGTH]) -> Self {
        const FORCE_UNIT_ACCESS: u32 = 1 << 13;
        let word =
            |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let flags = word(0);
        let first = u64::from(word(8)) | u64::from(word(12)) << 32;
        let order = match flags as u8 {
            0 => Order::Read,
            1 => Order::Write,
            2 => Order::Flush,
            3 => Order::Discard,
            5 => Order::WriteZeroes,
            other => Order::Other(other),
        };
        Self {
            tag,
            order,
            offset: first * SECTOR,
            length: if order == Order::Flush { 0 } else { u64::from(word(4)) * SECTOR },
            is_through: flags & FORCE_UNIT_ACCESS != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_says_what_is_asked() {
        let asked = |flags: u32, sectors: u32, first: u64| {
            let mut bytes = [0; DESCRIPTOR_LENGTH];
            bytes[0..4].copy_from_slice(&flags.to_ne_bytes());
            bytes[4..8].copy_from_slice(&sectors.to_ne_bytes());
            bytes[8..16].copy_from_slice(&first.to_ne_bytes());
            Asked::from_bytes(7, &bytes)
        };
        let write = asked(1 | 1 << 13, 8, 1 << 33);
        let expected =
            Asked { tag: 7, order: Order::Write, offset: 1 << 42, length: 4096, is_through: true };
        assert_eq!(write, expected);
        assert_eq!(asked(1, 8, 0), Asked { offset: 0, is_through: false, ..expected });
        let orders = [0, 2, 3, 5, 18].map(|order| asked(order, 1, 0).order);
        use Order::{Discard, Flush, Other, Read, WriteZeroes};
        assert_eq!(orders, [Read, Flush, Discard, WriteZeroes, Other(18)]);
        assert_eq!(asked(2, u32::MAX, 0).length, 0, "a flush is for no bytes");
    }

    #[test]
    fn the_bytes_of_each_tag_are_apart() {
        let positions: Vec<u64> = (0..Queue::TAGS).map(Queue::position).collect();
        assert_eq!(positions[0], 0x8000_0000);
        assert!(positions.windows(2).all(|pair| pair[1] - pair[0] == 32 << 20));
    }
}
