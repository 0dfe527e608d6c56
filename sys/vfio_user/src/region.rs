//! What a server says about a region: size, rights, and which parts of it can be mapped.

use std::ops::Range;
use std::os::fd::OwnedFd;

use nix::sys::stat::{SFlag, fstat};

use iohost_registers::MappedRegion;

use crate::error::VfioUserError;
use crate::wire::{Command, u16_at, u32_at, u64_at};

/// The region of the expansion ROM; 0–5 are the BARs (`VFIO_PCI_ROM_REGION_INDEX`).
pub const ROM_REGION: u32 = 6;

/// The region of configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`).
pub const CONFIG_REGION: u32 = 7;

/// Bytes of `struct vfio_region_info`.
pub(crate) const REGION_INFO: usize = 32;

/// The longest region description we take, capabilities included. 255 areas fit into it.
pub(crate) const LONGEST_REGION_INFO: u32 = 4096;

const FLAG_MMAP: u32 = 1 << 2;
const FLAG_CAPS: u32 = 1 << 3;
const CAPABILITY_HEADER: usize = 8;
const CAPABILITY_SPARSE_MMAP: u16 = 1;
const AREA: usize = 16;
const PAGE: u64 = 4096;

/// One region of the device: a BAR, the ROM or configuration space.
#[derive(Debug)]
pub struct Region {
    index: u32,
    /// Bytes; 0 where the device has no such region.
    size: u64,
    /// Where the region starts in the server's file.
    file_offset: u64,
    file: Option<OwnedFd>,
    mappable: Vec<Range<u64>>,
}

impl Region {
    pub(crate) fn absent(index: u32) -> Self {
        Self { index, size: 0, file_offset: 0, file: None, mappable: Vec::new() }
    }

    /// Takes a region from the payload of a reply, which has at least [`REGION_INFO`] bytes.
    pub(crate) fn decode(
        index: u32,
        payload: &[u8],
        file: Option<OwnedFd>,
    ) -> Result<Self, VfioUserError> {
        let actual = u32_at(payload, 8);
        if actual != index {
            return Err(VfioUserError::WrongContent {
                command: Command::RegionInfo,
                field: "index",
                actual: actual.into(),
                expected: index.into(),
            });
        }
        let flags = u32_at(payload, 4);
        let cap_offset = if flags & FLAG_CAPS == 0 { 0 } else { u32_at(payload, 12) };
        let size = u64_at(payload, 16);
        let areas = sparse_areas(index, size, cap_offset, payload)?;

        // The descriptor may come without the flag; only both together are an offer.
        let offered = flags & FLAG_MMAP != 0 && file.is_some() && size > 0;
        let mut mappable = match areas {
            _ if !offered => Vec::new(),
            Some(areas) => areas,
            None => std::iter::once(0..size).collect(),
        };
        mappable.retain(|area| {
            let whole = area.start.is_multiple_of(PAGE)
                && area.end.is_multiple_of(PAGE)
                && !area.is_empty();
            if !whole {
                let (start, end) = (area.start, area.end);
                log::debug!(region = index, start, end; "an area is no whole pages, not mapped");
            }
            whole
        });
        Ok(Self { index, size, file_offset: u64_at(payload, 24), file, mappable })
    }

    /// Bytes; 0 where the device has no such region.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The byte ranges that can be mapped, each of whole pages; empty where every access has to
    /// be a message.
    pub fn mappable(&self) -> &[Range<u64>] {
        &self.mappable
    }

    /// Maps `range`, which lies inside one of [`mappable`](Self::mappable) and starts on a page.
    pub(crate) fn map(&self, range: Range<u64>) -> Result<MappedRegion, VfioUserError> {
        let Range { start, end } = range;
        let index = self.index;
        let not_mappable = || VfioUserError::NotMappable { index, start, end };
        let offered = self.mappable.iter().any(|area| area.start <= start && end <= area.end);
        let file =
            self.file.as_ref().filter(|_| offered && start < end && start.is_multiple_of(PAGE));
        let file = file.ok_or_else(not_mappable)?;
        let offset = self.file_offset.checked_add(start).ok_or_else(not_mappable)?;
        let file_end = self.file_offset.checked_add(end).ok_or_else(not_mappable)?;

        let failed = |source| VfioUserError::Map { index, start, end, source };
        let stat = fstat(file).map_err(|errno| failed(errno.into()))?;
        // Only a regular file has a size; the memory of a device passed on has none to compare.
        let regular = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        if regular && file_end > len {
            return Err(VfioUserError::ShortFile { index, end: file_end, len });
        }
        let bytes = usize::try_from(end - start).map_err(|_| not_mappable())?;
        MappedRegion::map(file, offset, bytes).map_err(failed)
    }
}

/// The areas of the sparse-mmap capability, if there is one. Offsets in the list count from the
/// start of the payload and have to grow, so the walk ends.
fn sparse_areas(
    region: u32,
    size: u64,
    first: u32,
    payload: &[u8],
) -> Result<Option<Vec<Range<u64>>>, VfioUserError> {
    let mut offset = first as usize;
    let mut least = REGION_INFO;
    while offset != 0 {
        let malformed =
            |reason| VfioUserError::RegionCapability { region, offset: offset as u64, reason };
        if offset < least {
            return Err(malformed("goes back"));
        }
        let capability = payload.get(offset..).filter(|rest| rest.len() >= CAPABILITY_HEADER);
        let capability = capability.ok_or_else(|| malformed("is outside the reply"))?;
        if u16_at(capability, 0) == CAPABILITY_SPARSE_MMAP {
            return read_areas(size, capability).map(Some).map_err(malformed);
        }
        least = offset + CAPABILITY_HEADER;
        offset = u32_at(capability, 4) as usize;
    }
    Ok(None)
}

fn read_areas(size: u64, capability: &[u8]) -> Result<Vec<Range<u64>>, &'static str> {
    let list = capability.get(CAPABILITY_HEADER..).filter(|rest| rest.len() >= 8);
    let list = list.ok_or("ends before its count")?;
    let count = u32_at(list, 0) as usize;
    let areas = &list[8..];
    // The count is compared before anything is allocated for it.
    if count > areas.len() / AREA {
        return Err("counts more areas than it holds");
    }
    let areas = areas.chunks_exact(AREA).take(count);
    areas
        .map(|area| {
            let (start, len) = (u64_at(area, 0), u64_at(area, 8));
            let end = start.checked_add(len).filter(|end| *end <= size);
            end.map(|end| start..end).ok_or("has an area outside its region")
        })
        .collect()
}
