//! Which memory the server may use, and its requests to read or write it by message.
//!
//! Servers that map the descriptors we pass never send such requests; others do, while a call of
//! ours is being answered. Memory is reached through its descriptor with `pread` and `pwrite`, so
//! a mapping costs one descriptor and no address space.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use iohost_memory::SharedMemory;

use crate::error::VfioUserError;
use crate::wire::{Command, HEADER, Header, u64_at};

/// The most data in one request of the server. It is the protocol's default, so that servers
/// which ignore our announcement stay below it too.
pub(crate) const MOST_DATA: u32 = 1 << 20;

/// Bytes of address and count before the data of a request or reply.
pub(crate) const ACCESS: usize = 16;

/// The memory the server may use, by I/O virtual address. Ranges never overlap.
#[derive(Debug, Default)]
pub(crate) struct DmaTable {
    mappings: BTreeMap<u64, Mapping>,
}

#[derive(Debug)]
struct Mapping {
    len: u64,
    memory: File,
    /// Where the mapping starts in it.
    offset: u64,
}

impl DmaTable {
    /// `part` is inside `memory`.
    pub(crate) fn insert(
        &mut self,
        iova: u64,
        memory: &SharedMemory,
        part: &Range<u64>,
    ) -> Result<(), VfioUserError> {
        let len = part.end - part.start;
        let overlap = || VfioUserError::Overlap { iova, len };
        let end = iova.checked_add(len).ok_or_else(overlap)?;
        if let Some((below, mapping)) = self.mappings.range(..end).next_back()
            && below + mapping.len > iova
        {
            return Err(overlap());
        }
        let memory = memory
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| VfioUserError::Duplicate { iova, source })?;
        self.mappings.insert(iova, Mapping { len, memory: memory.into(), offset: part.start });
        Ok(())
    }

    pub(crate) fn contains(&self, iova: u64, len: u64) -> bool {
        self.mappings.get(&iova).is_some_and(|mapping| mapping.len == len)
    }

    pub(crate) fn remove(&mut self, iova: u64) {
        self.mappings.remove(&iova);
    }

    /// Does what a request of the server asks, and leaves the whole reply in `reply`.
    ///
    /// `payload` is what came after the header, at most [`ACCESS`] + [`MOST_DATA`] bytes of it.
    pub(crate) fn answer(&self, request: &Header, payload: &[u8], reply: &mut Vec<u8>) {
        reply.clear();
        match self.perform(request, payload, reply) {
            Ok(()) => {
                let header = Header::reply_to(request, reply.len() - HEADER);
                reply[..HEADER].copy_from_slice(&header.encode());
            }
            Err(errno) => {
                let (command, id) = (request.command, request.id);
                log::debug!(command, id, errno; "refused a request of the device server");
                reply.clear();
                reply.extend_from_slice(&Header::error_reply_to(request, errno).encode());
            }
        }
    }

    fn perform(&self, request: &Header, payload: &[u8], reply: &mut Vec<u8>) -> Result<(), i32> {
        let reads = request.command == Command::DmaRead as u16;
        if !reads && request.command != Command::DmaWrite as u16 {
            return Err(libc::ENOTSUP);
        }
        if payload.len() < ACCESS {
            return Err(libc::EINVAL);
        }
        let (iova, count) = (u64_at(payload, 0), u64_at(payload, 8));
        let data = &payload[ACCESS..];
        if count > u64::from(MOST_DATA) || data.len() as u64 != if reads { 0 } else { count } {
            return Err(libc::EINVAL);
        }
        let (memory, offset) = self.find(iova, count).ok_or(libc::EFAULT)?;

        reply.resize(HEADER, 0);
        reply.extend_from_slice(&payload[..ACCESS]);
        if reads {
            // Bounded by the check of `count` above.
            reply.resize(HEADER + ACCESS + count as usize, 0);
            memory.read_exact_at(&mut reply[HEADER + ACCESS..], offset).map_err(|_| libc::EIO)
        } else {
            memory.write_all_at(data, offset).map_err(|_| libc::EIO)
        }
    }

    /// The memory behind `count` bytes at `iova`, all in one mapping, and the offset in it.
    fn find(&self, iova: u64, count: u64) -> Option<(&File, u64)> {
        let (start, mapping) = self.mappings.range(..=iova).next_back()?;
        let offset = iova - start;
        let end = offset.checked_add(count)?;
        (end <= mapping.len).then_some((&mapping.memory, mapping.offset + offset))
    }
}
