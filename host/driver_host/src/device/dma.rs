//! What a device can reach of its driver's memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use iohost_device_backend::{DeviceBackend, DeviceError, IovaError, IovaSpace};
use iohost_interface::{IOReturn, with_sources};
use iohost_memory::SharedMemory;
use iohost_memory::iova::PAGE;
use log::warn;

use super::refused;

/// Why an address can be freed.
const ALLOCATED: &str = "allocated by `prepare`";

/// Memory that a driver had prepared, by address.
#[derive(Debug)]
pub(super) struct Dma {
    space: IovaSpace,
    /// By the address of the first segment.
    prepared: BTreeMap<u64, Vec<Group>>,
    /// Why the last mapping that was refused was refused.
    pub(super) last_refusal: Option<DeviceError>,
}

/// Bytes of memory.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) memory: Arc<SharedMemory>,
    pub(crate) bytes: Range<u64>,
}

/// Where the device finds memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) address: u64,
    pub(crate) len: u64,
}

/// Where memory may be put.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Below `2^bits`.
    pub(crate) bits: u8,
    /// A power of two, of which each segment's address is a multiple.
    pub(crate) alignment: u64,
}

/// Pieces that the device finds one after the other.
#[derive(Debug)]
struct Group {
    /// What was allocated.
    iova: u64,
    segment: Segment,
    mapped: Vec<Mapped>,
}

#[derive(Debug)]
struct Mapped {
    iova: u64,
    len: u64,
    /// Kept for as long as the device reaches it.
    _memory: Arc<SharedMemory>,
}

impl Dma {
    pub(super) fn new(space: IovaSpace) -> Self {
        Self { space, prepared: BTreeMap::new(), last_refusal: None }
    }

    /// Lets the device reach pieces of memory, in as few segments as there can be: one, unless
    /// the pieces meet inside a page.
    pub(super) fn prepare(
        &mut self,
        backend: &dyn DeviceBackend,
        pieces: Vec<Piece>,
        limits: Limits,
    ) -> Result<Vec<Segment>, IOReturn> {
        if backend.iova_ranges().is_empty() {
            return Err(self.refuse(DeviceError::NoDma { backend: backend.kind() }));
        }
        let inside = |piece: &Piece| {
            piece.bytes.start < piece.bytes.end && piece.bytes.end <= piece.memory.len() as u64
        };
        if pieces.is_empty() || !pieces.iter().all(inside) {
            return Err(IOReturn::OVERRUN);
        }
        let mut groups = Vec::new();
        for pieces in side_by_side(pieces) {
            match self.map(backend, &pieces, limits) {
                Ok(group) => groups.push(group),
                Err(status) => {
                    for group in groups {
                        self.unmap_or_lose(backend, group);
                    }
                    return Err(status);
                }
            }
        }
        let segments: Vec<_> = groups.iter().map(|group| group.segment).collect();
        self.prepared.insert(segments[0].address, groups);
        Ok(segments)
    }

    /// Takes memory back from the device, by the address of its first segment. On an error it
    /// stays where it is: the device may still reach it.
    pub(super) fn complete(
        &mut self,
        backend: &dyn DeviceBackend,
        address: u64,
    ) -> Result<(), IOReturn> {
        let mut groups = self.prepared.remove(&address).ok_or(IOReturn::NOT_READY)?;
        let done = groups.iter_mut().try_for_each(|group| group.unmap(backend));
        match done {
            Ok(()) => {
                for group in groups {
                    self.space.free(group.iova).expect(ALLOCATED);
                }
                Ok(())
            }
            Err(err) => {
                self.prepared.insert(address, groups);
                Err(refused(&err))
            }
        }
    }

    /// Takes back all memory.
    pub(super) fn complete_all(&mut self, backend: &dyn DeviceBackend) {
        for group in std::mem::take(&mut self.prepared).into_values().flatten() {
            self.unmap_or_lose(backend, group);
        }
    }

    /// Keeps all memory, which the device may still reach, from being used for something else.
    pub(super) fn keep_all(&mut self) {
        std::mem::take(&mut self.prepared).into_values().for_each(std::mem::forget);
    }

    fn map(
        &mut self,
        backend: &dyn DeviceBackend,
        pieces: &[Piece],
        limits: Limits,
    ) -> Result<Group, IOReturn> {
        // Where in its page the first byte is, in memory as for the device.
        let lead = pieces[0].bytes.start % PAGE;
        if !lead.is_multiple_of(limits.alignment) {
            return Err(IOReturn::NOT_ALIGNED);
        }
        let len = pieces
            .iter()
            .try_fold(0, |len: u64, piece| len.checked_add(piece.bytes.end - piece.bytes.start));
        let whole = len.and_then(|len| len.checked_add(lead)).ok_or(IOReturn::NO_SPACE)?;
        let iova = self
            .space
            .allocate(whole, limits.bits, limits.alignment)
            .map_err(|err| no_room(&err))?;
        let segment = Segment { address: iova + lead, len: whole - lead };
        let mut group = Group { iova, segment, mapped: Vec::new() };
        let mut at = iova;
        for Piece { memory, bytes } in pieces {
            let part = bytes.start / PAGE * PAGE..bytes.end;
            let len = part.end - part.start;
            if let Err(err) = backend.dma_map_part(at, memory, part) {
                self.unmap_or_lose(backend, group);
                return Err(self.refuse(err));
            }
            group.mapped.push(Mapped { iova: at, len, _memory: memory.clone() });
            at += len;
        }
        Ok(group)
    }

    /// Takes back memory that nobody will ask for.
    fn unmap_or_lose(&mut self, backend: &dyn DeviceBackend, mut group: Group) {
        match group.unmap(backend) {
            Ok(()) => drop(self.space.free(group.iova).expect(ALLOCATED)),
            Err(err) => {
                let address = group.iova;
                warn!(address, reason = with_sources(&err); "a DMA mapping stays");
                // The device may still reach it: better lost than used for something else.
                std::mem::forget(group);
            }
        }
    }

    fn refuse(&mut self, err: DeviceError) -> IOReturn {
        let status = refused(&err);
        self.last_refusal = Some(err);
        status
    }
}

impl Group {
    /// Takes back what is mapped, as far as it goes.
    fn unmap(&mut self, backend: &dyn DeviceBackend) -> Result<(), DeviceError> {
        while let Some(mapped) = self.mapped.last() {
            backend.dma_unmap(mapped.iova, mapped.len)?;
            self.mapped.pop();
        }
        Ok(())
    }
}

/// Puts pieces together that can have addresses one after the other: what follows in the same
/// memory is one piece, and what meets on a page is one group.
fn side_by_side(pieces: Vec<Piece>) -> Vec<Vec<Piece>> {
    let mut groups: Vec<Vec<Piece>> = Vec::new();
    for piece in pieces {
        let Some(group) = groups.last_mut() else {
            groups.push(vec![piece]);
            continue;
        };
        let before = group.last_mut().expect("no group is empty");
        let (end, start) = (before.bytes.end, piece.bytes.start);
        if end == start && Arc::ptr_eq(&before.memory, &piece.memory) {
            before.bytes.end = piece.bytes.end;
        } else if end.is_multiple_of(PAGE) && start.is_multiple_of(PAGE) {
            group.push(piece);
        } else {
            groups.push(vec![piece]);
        }
    }
    groups
}

fn no_room(err: &IovaError) -> IOReturn {
    warn!(reason = with_sources(err); "no DMA address");
    match err {
        IovaError::Request { .. } => IOReturn::BAD_ARGUMENT,
        _ => IOReturn::NO_SPACE,
    }
}
