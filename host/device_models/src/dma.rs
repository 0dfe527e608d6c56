//! The memory a device may reach, and what it tried beyond that.
//!
//! Memory is a descriptor and is reached by `pread` and `pwrite`: any file a client passes works,
//! sealed or not, at any offset, and one that shrinks under our hands is an error, not a signal.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use iohost_memory::SharedMemory;
use log::warn;

/// Part of a file that a device can be given.
#[derive(Debug)]
pub struct DmaMemory {
    file: File,
    offset: u64,
    len: u64,
}

impl DmaMemory {
    /// `len` bytes of `file` from `offset`.
    pub fn new(file: File, offset: u64, len: u64) -> Self {
        Self { file, offset, len }
    }
}

impl TryFrom<&SharedMemory> for DmaMemory {
    type Error = std::io::Error;

    /// All of `memory`, through a descriptor of its own.
    fn try_from(memory: &SharedMemory) -> Result<Self, Self::Error> {
        let file = memory.as_fd().try_clone_to_owned()?.into();
        Ok(Self { file, offset: 0, len: memory.len() as u64 })
    }
}

/// Why memory cannot be mapped or unmapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DmaError {
    /// Part of the range is mapped already.
    #[error("{len:#x} bytes at iova {iova:#x} overlap {other_len:#x} bytes at {other:#x}")]
    Overlap {
        /// Where it was to be.
        iova: u64,
        /// Bytes.
        len: u64,
        /// The mapping that is there.
        other: u64,
        /// Its bytes.
        other_len: u64,
    },
    /// No bytes, or past the last address.
    #[error("{len:#x} bytes at iova {iova:#x} are no range of addresses")]
    Range {
        /// Where it was to be.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// Nothing is mapped exactly there.
    #[error("no mapping of {len:#x} bytes at iova {iova:#x}")]
    NotMapped {
        /// Where it should be.
        iova: u64,
        /// Bytes.
        len: u64,
    },
}

/// What an IOMMU knows about one device.
#[derive(Debug, Default)]
pub(crate) struct DmaTable {
    mappings: BTreeMap<u64, DmaMemory>,
    blocked: u64,
}

impl DmaTable {
    pub(crate) fn map(&mut self, iova: u64, memory: DmaMemory) -> Result<(), DmaError> {
        let len = memory.len;
        let end = iova.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or(DmaError::Range { iova, len })?;
        if let Some((&other, mapping)) = self.mappings.range(..end).next_back()
            && other + mapping.len > iova
        {
            return Err(DmaError::Overlap { iova, len, other, other_len: mapping.len });
        }
        self.mappings.insert(iova, memory);
        Ok(())
    }

    pub(crate) fn unmap(&mut self, iova: u64, len: u64) -> Result<(), DmaError> {
        match self.mappings.get(&iova) {
            Some(mapping) if mapping.len == len => {
                self.mappings.remove(&iova);
                Ok(())
            }
            _ => Err(DmaError::NotMapped { iova, len }),
        }
    }

    pub(crate) fn unmap_all(&mut self) {
        self.mappings.clear();
    }

    /// Transfers that were stopped, wholly or in part, since the function was made.
    pub(crate) fn blocked(&self) -> u64 {
        self.blocked
    }

    pub(crate) fn read(&mut self, iova: u64, data: &mut [u8]) {
        let len = data.len();
        let mut whole = true;
        self.pieces(iova, len, |memory, range| {
            let done = memory.map(|(file, at)| file.read_exact_at(&mut data[range.clone()], at));
            if !matches!(done, Some(Ok(()))) {
                data[range].fill(0);
                whole = false;
            }
        });
        if !whole {
            self.block(iova, len, "not mapped for reading");
        }
    }

    pub(crate) fn write(&mut self, iova: u64, data: &[u8]) {
        let mut whole = true;
        self.pieces(iova, data.len(), |memory, range| {
            let done = memory.map(|(file, at)| file.write_all_at(&data[range], at));
            whole &= matches!(done, Some(Ok(())));
        });
        if !whole {
            self.block(iova, data.len(), "not mapped for writing");
        }
    }

    /// Counts a transfer that was stopped. The kernel's word for it is an IOMMU fault, which the
    /// device never hears of.
    pub(crate) fn block(&mut self, iova: u64, len: usize, why: &str) {
        self.blocked += 1;
        // A driver can make these as fast as it likes: the log gets the 1st, 2nd, 4th, 8th …
        if self.blocked.is_power_of_two() {
            warn!(iova, len, why, blocked = self.blocked; "a dma transfer was blocked");
        }
    }

    /// Walks a transfer in pieces, each with the file it lies in and the offset there, or with
    /// `None` where nothing is mapped.
    fn pieces(
        &self,
        iova: u64,
        len: usize,
        mut each: impl FnMut(Option<(&File, u64)>, std::ops::Range<usize>),
    ) {
        let mut done = 0;
        while done < len {
            let Some(at) = iova.checked_add(done as u64) else {
                return each(None, done..len);
            };
            let left = (len - done) as u64;
            let below = self.mappings.range(..=at).next_back();
            let hit = below.filter(|(start, mapping)| at - **start < mapping.len);
            let (memory, count) = match hit {
                Some((start, mapping)) => {
                    let offset = at - start;
                    let place = mapping.offset.saturating_add(offset);
                    (Some((&mapping.file, place)), left.min(mapping.len - offset))
                }
                None => {
                    let next = self.mappings.range(at..).next().map(|(start, _)| start - at);
                    (None, next.unwrap_or(left).min(left))
                }
            };
            // `count` is at least 1 and at most what is left of a slice, so it fits.
            each(memory, done..done + count as usize);
            done += count as usize;
        }
    }
}
