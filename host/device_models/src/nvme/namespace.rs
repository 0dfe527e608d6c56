//! Namespaces: blocks in memory or in a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use log::warn;
use nix::fcntl::{FallocateFlags, fallocate};

/// Blocks that a host can read and write.
#[derive(Debug)]
pub struct Namespace {
    storage: Storage,
    block: u32,
    blocks: u64,
    is_read_only: bool,
    /// Blocks that can be neither read nor written.
    bad: Vec<Range<u64>>,
}

#[derive(Debug)]
enum Storage {
    Memory(Vec<u8>),
    File(File),
}

/// Why there is no such namespace.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NamespaceError {
    /// Blocks have 512 or 4096 bytes.
    #[error("blocks of {block} bytes, they can have 512 or 4096")]
    BlockSize {
        /// Bytes asked for.
        block: u32,
    },
    /// There has to be a whole number of blocks, at least one.
    #[error("{bytes} bytes are not a whole number of blocks of {block} bytes")]
    Length {
        /// Bytes there are.
        bytes: u64,
        /// Bytes of a block.
        block: u32,
    },
    /// The file cannot be used.
    #[error("opening {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A block that cannot be read or written.
#[derive(Debug)]
pub(super) struct Unreadable;

impl Namespace {
    /// `blocks` zeroed blocks in memory.
    ///
    /// Errors: `BlockSize`, `Length`.
    pub fn in_memory(block: u32, blocks: u64) -> Result<Self, NamespaceError> {
        let bytes = blocks * u64::from(block);
        Self::new(Storage::Memory(vec![0; bytes as usize]), block, bytes)
    }

    /// The blocks of a file, as many as it has.
    ///
    /// Errors: `File`, `BlockSize`, `Length`.
    pub fn in_file(path: &Path, block: u32) -> Result<Self, NamespaceError> {
        let failed = |source| NamespaceError::File { path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        Self::new(Storage::File(file), block, bytes)
    }

    fn new(storage: Storage, block: u32, bytes: u64) -> Result<Self, NamespaceError> {
        if !matches!(block, 512 | 4096) {
            return Err(NamespaceError::BlockSize { block });
        }
        let blocks = bytes / u64::from(block);
        if blocks == 0 || !bytes.is_multiple_of(u64::from(block)) {
            return Err(NamespaceError::Length { bytes, block });
        }
        Ok(Self { storage, block, blocks, is_read_only: false, bad: Vec::new() })
    }

    /// Writes are refused (section 8.19).
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.is_read_only = true;
        self
    }

    /// Blocks that can be neither read nor written from now on.
    pub fn break_blocks(&mut self, blocks: Range<u64>) {
        self.bad.push(blocks);
    }

    /// Copies bytes out, for a test; panics outside of the namespace.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.read_bytes(offset, &mut data).expect("bytes inside of the namespace");
        data
    }

    pub(super) fn block(&self) -> u64 {
        self.block.into()
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Whether these blocks are there.
    pub(super) fn has(&self, first: u64, count: u64) -> bool {
        first.checked_add(count).is_some_and(|end| end <= self.blocks)
    }

    /// Reads blocks that are there.
    pub(super) fn read(&self, first: u64, data: &mut [u8]) -> Result<(), Unreadable> {
        self.check_blocks(first, data.len() as u64)?;
        self.read_bytes(first * self.block(), data).map_err(|err| lost(&err))
    }

    /// Writes blocks that are there.
    pub(super) fn write(&mut self, first: u64, data: &[u8]) -> Result<(), Unreadable> {
        self.check_blocks(first, data.len() as u64)?;
        let offset = first * self.block();
        match &mut self.storage {
            Storage::Memory(bytes) => {
                bytes[offset as usize..][..data.len()].copy_from_slice(data);
                Ok(())
            }
            Storage::File(file) => file.write_all_at(data, offset).map_err(|err| lost(&err)),
        }
    }

    /// Has blocks that are there read as zeros.
    pub(super) fn clear(&mut self, first: u64, count: u64) -> Result<(), Unreadable> {
        self.check_blocks(first, count * self.block())?;
        let (offset, len) = (first * self.block(), count * self.block());
        if len == 0 {
            return Ok(());
        }
        match &mut self.storage {
            Storage::Memory(bytes) => {
                bytes[offset as usize..][..len as usize].fill(0);
                Ok(())
            }
            Storage::File(file) => {
                let hole =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&*file, hole, offset as i64, len as i64)
                    .map_err(|err| lost(&io::Error::from(err)))
            }
        }
    }

    /// Has everything that was written be on disk.
    pub(super) fn flush(&mut self) -> bool {
        match &self.storage {
            Storage::Memory(_) => true,
            Storage::File(file) => file.sync_data().map_err(|err| lost(&err)).is_ok(),
        }
    }

    fn read_bytes(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match &self.storage {
            Storage::Memory(bytes) => {
                data.copy_from_slice(&bytes[offset as usize..][..data.len()]);
                Ok(())
            }
            Storage::File(file) => file.read_exact_at(data, offset),
        }
    }

    fn check_blocks(&self, first: u64, bytes: u64) -> Result<(), Unreadable> {
        let end = first + bytes / self.block();
        let is_bad = self.bad.iter().any(|bad| bad.start < end && first < bad.end);
        if is_bad { Err(Unreadable) } else { Ok(()) }
    }
}

fn lost(err: &io::Error) -> Unreadable {
    warn!(err:%; "the file of a namespace fails");
    Unreadable
}
