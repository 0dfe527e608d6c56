//! Scatter gather lists (section 4.4): data blocks, in segments if there are several.

use super::command::Status;
use super::data::{Runs, take};
use crate::model::Bus;

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;

/// The most bytes of a segment, and segments of a list: more than any host makes.
const MOST_SEGMENT: u32 = 1 << 16;
const MOST_SEGMENTS: usize = 256;

/// Types, with the subtype "address".
const DATA_BLOCK: u8 = 0x00;
const SEGMENT: u8 = 0x20;
const LAST_SEGMENT: u8 = 0x30;

/// Some bytes of the host's memory: data, or further descriptors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    address: u64,
    length: u32,
    /// Type and subtype.
    kind: u8,
}

impl Descriptor {
    pub(super) fn of(first: u64, second: u64) -> Self {
        Self { address: first, length: second as u32, kind: (second >> 56) as u8 }
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let word =
            |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        Self::of(word(0), word(8))
    }
}

/// Where `len` bytes are that a command describes by this descriptor.
pub(super) fn resolve(bus: &mut Bus<'_>, first: Descriptor, len: u64) -> Result<Runs, Status> {
    let mut runs = Runs::new();
    let mut left = len;
    let mut next = Some(first);
    if first.kind == DATA_BLOCK {
        take_block(&mut runs, &mut left, first)?;
        next = None;
    }
    // A list that only points on would never end.
    let mut hops = 0..MOST_SEGMENTS;
    while let Some(segment) = next {
        hops.next().ok_or(Status::SGL_COUNT_INVALID)?;
        let mut blocks = read_segment(bus, segment)?;
        next = if segment.kind == SEGMENT { blocks.pop() } else { None };
        for block in blocks {
            take_block(&mut runs, &mut left, block)?;
        }
    }
    if left == 0 { Ok(runs) } else { Err(Status::SGL_LENGTH_INVALID) }
}

fn read_segment(bus: &mut Bus<'_>, segment: Descriptor) -> Result<Vec<Descriptor>, Status> {
    if segment.kind != SEGMENT && segment.kind != LAST_SEGMENT {
        return Err(Status::SGL_TYPE_INVALID);
    }
    let length = segment.length as usize;
    if length == 0 || !length.is_multiple_of(DESCRIPTOR) {
        return Err(Status::SGL_SEGMENT_INVALID);
    }
    if segment.length > MOST_SEGMENT {
        return Err(Status::SGL_COUNT_INVALID);
    }
    let mut bytes = vec![0; length];
    bus.dma_read(segment.address, &mut bytes);
    Ok(bytes.chunks_exact(DESCRIPTOR).map(Descriptor::from_bytes).collect())
}

/// A list has to describe as many bytes as the command has, no more.
fn take_block(runs: &mut Runs, left: &mut u64, block: Descriptor) -> Result<(), Status> {
    if block.kind != DATA_BLOCK {
        return Err(Status::SGL_TYPE_INVALID);
    }
    if u64::from(block.length) > *left {
        return Err(Status::SGL_LENGTH_INVALID);
    }
    take(runs, left, block.address, block.length.into());
    Ok(())
}
