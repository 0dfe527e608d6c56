//! The regions of a device: its BARs, its expansion ROM, its configuration space.

use std::io;
use std::iter;
use std::mem::offset_of;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use iohost_registers::MappedRegion;
use vfio_bindings::bindings::vfio as uapi;

use crate::capability;
use crate::ioctl::{DeviceCall, DeviceFile, Message};
use crate::{VfioDevice, VfioError};

/// The index of the expansion ROM; the BARs are 0–5.
pub const ROM_REGION: u32 = uapi::VFIO_PCI_ROM_REGION_INDEX;

/// The index of configuration space.
pub const CONFIG_REGION: u32 = uapi::VFIO_PCI_CONFIG_REGION_INDEX;

/// Region 8 is the VGA window, which iohost has no use for.
const REGIONS: u32 = CONFIG_REGION + 1;

/// Bytes of the unit of mapping.
const PAGE: u64 = 4096;

/// One region of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 where the device has no such region.
    pub size: u64,
    /// Whether it can be read by a call.
    pub readable: bool,
    /// Whether it can be written by a call.
    pub writable: bool,
    /// The byte ranges that can be mapped.
    pub mappable: Vec<Range<u64>>,
    /// Where it starts in the device's file.
    offset: u64,
    /// Whether the kernel lets the MSI-X table be mapped with the rest, because interrupts are
    /// remapped and a table entry can do no harm.
    msix_mappable: bool,
}

impl VfioDevice {
    /// The region of this index; `None` where the device has none.
    pub fn region(&self, index: u32) -> Option<&Region> {
        self.regions.get(index as usize).filter(|region| region.size > 0)
    }

    /// Reads a region by a call to the kernel, which accesses the device once for 1, 2 and 4
    /// aligned bytes. Linux before 6.10 makes two accesses of 8 bytes.
    ///
    /// Errors: `NoSuchRegion`; `OutOfRange`; `Access` with what the kernel says, which is `EIO`
    /// while memory decoding is off.
    pub fn read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<(), VfioError> {
        let region = self.checked(index, offset, data.len())?;
        let done = self.device.file().read_at(data, region.offset + offset);
        access_done(done, index, offset, data.len())
    }

    /// Writes a region by a call to the kernel; see [`read`](Self::read).
    pub fn write(&self, index: u32, offset: u64, data: &[u8]) -> Result<(), VfioError> {
        let region = self.checked(index, offset, data.len())?;
        let done = self.device.file().write_at(data, region.offset + offset);
        access_done(done, index, offset, data.len())
    }

    /// Maps part of a region. `range` lies in one of its mappable ranges and starts on a page.
    ///
    /// An access to the mapping while memory decoding is off raises SIGBUS.
    pub fn map(&self, index: u32, range: Range<u64>) -> Result<MappedRegion, VfioError> {
        let region = self.region(index).ok_or(VfioError::NoSuchRegion { index })?;
        let inside = |area: &Range<u64>| area.start <= range.start && range.end <= area.end;
        let not_mappable = || VfioError::NotMappable { index, start: range.start, end: range.end };
        let len = usize::try_from(range.end.saturating_sub(range.start)).ok();
        let len = len.filter(|len| *len > 0).ok_or_else(not_mappable)?;
        if !region.mappable.iter().any(inside) || !range.start.is_multiple_of(PAGE) {
            return Err(not_mappable());
        }
        MappedRegion::map(self.device.file(), region.offset + range.start, len).map_err(|source| {
            VfioError::MapRegion { index, start: range.start, end: range.end, source }
        })
    }

    fn checked(&self, index: u32, offset: u64, len: usize) -> Result<&Region, VfioError> {
        let region = self.region(index).ok_or(VfioError::NoSuchRegion { index })?;
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > region.size) {
            return Err(VfioError::OutOfRange { index, offset, len, size: region.size });
        }
        Ok(region)
    }
}

fn access_done(
    done: io::Result<usize>,
    index: u32,
    offset: u64,
    len: usize,
) -> Result<(), VfioError> {
    let source = match done {
        Ok(bytes) if bytes == len => return Ok(()),
        Ok(bytes) => io::Error::other(format!("only {bytes} bytes went over the bus")),
        Err(err) => err,
    };
    Err(VfioError::Access { index, offset, len, source })
}

/// What the kernel says about every region up to configuration space.
pub(crate) fn regions(device: &DeviceFile) -> Result<Vec<Region>, VfioError> {
    let mut regions = Vec::new();
    for index in 0..REGIONS {
        regions.push(region(device, index)?);
    }
    let mut header = [0; 256];
    let read = device.file().read_at(&mut header, regions[CONFIG_REGION as usize].offset);
    access_done(read, CONFIG_REGION, 0, header.len())?;
    keep_off_msix_table(&header, &mut regions);
    Ok(regions)
}

fn region(device: &DeviceFile, index: u32) -> Result<Region, VfioError> {
    let mut info = Message::of::<uapi::vfio_region_info>();
    info.set(offset_of!(uapi::vfio_region_info, index), index);
    device.call_with_room(DeviceCall::GetRegionInfo, &mut info).map_err(|source| {
        VfioError::Device { operation: format!("reading what region {index} is"), source }
    })?;
    Ok(describe(&info))
}

fn describe(info: &Message) -> Region {
    let flags = info.u32(offset_of!(uapi::vfio_region_info, flags));
    let size = info.u64(offset_of!(uapi::vfio_region_info, size));
    let has = |flag| flags & flag != 0;
    let first = match has(uapi::VFIO_REGION_INFO_FLAG_CAPS) {
        true => info.u32(offset_of!(uapi::vfio_region_info, cap_offset)),
        false => 0,
    };
    let mappable = match has(uapi::VFIO_REGION_INFO_FLAG_MMAP) {
        true => {
            capability::sparse_areas(info, first).unwrap_or_else(|| iter::once(0..size).collect())
        }
        false => Vec::new(),
    };
    Region {
        size,
        readable: has(uapi::VFIO_REGION_INFO_FLAG_READ),
        writable: has(uapi::VFIO_REGION_INFO_FLAG_WRITE),
        mappable,
        offset: info.u64(offset_of!(uapi::vfio_region_info, offset)),
        msix_mappable: capability::has_msix_mappable(info, first),
    }
}

/// Takes the pages of the MSI-X table out of what can be mapped, unless the kernel says that the
/// table may be mapped too. Linux before 4.16 refuses a mapping that touches it.
fn keep_off_msix_table(header: &[u8; 256], regions: &mut [Region]) {
    if let Some((bar, table)) = msix_table(header)
        && let Some(region) = regions.get_mut(bar)
        && !region.msix_mappable
    {
        region.mappable = without(&region.mappable, &table);
    }
}

/// The BAR of the MSI-X table and the bytes of it that the table takes.
///
/// Source: PCI Local Bus Specification 3.0, 6.7 and 6.8.2.
fn msix_table(header: &[u8; 256]) -> Option<(usize, Range<u64>)> {
    const STATUS: usize = 0x06;
    const STATUS_CAPABILITIES: u8 = 0x10;
    const FIRST_CAPABILITY: usize = 0x34;
    const MSIX: u8 = 0x11;
    if header[STATUS] & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut at = usize::from(header[FIRST_CAPABILITY] & !3);
    // The space has room for no more than this; a longer chain is a loop.
    for _ in 0..48 {
        if at < 0x40 || at + 12 > header.len() {
            return None;
        }
        if header[at] == MSIX {
            let control = u16::from_le_bytes([header[at + 2], header[at + 3]]);
            let entries = u64::from(control & 0x7ff) + 1;
            let place = u32::from_le_bytes([
                header[at + 4],
                header[at + 5],
                header[at + 6],
                header[at + 7],
            ]);
            let start = u64::from(place & !7);
            return Some(((place & 7) as usize, start..start + 16 * entries));
        }
        at = usize::from(header[at + 1] & !3);
    }
    None
}

/// `areas` without the pages that `hole` touches.
fn without(areas: &[Range<u64>], hole: &Range<u64>) -> Vec<Range<u64>> {
    let hole = hole.start / PAGE * PAGE..hole.end.next_multiple_of(PAGE);
    let pieces = areas.iter().flat_map(|area| {
        [area.start..area.end.min(hole.start), area.start.max(hole.end)..area.end]
    });
    pieces.filter(|piece| !piece.is_empty()).collect()
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of one range are meant")]
mod tests {
    use super::*;

    fn info(flags: u32, size: u32) -> Message {
        let mut info = Message::of::<uapi::vfio_region_info>();
        info.set(offset_of!(uapi::vfio_region_info, flags), flags);
        info.set(offset_of!(uapi::vfio_region_info, size), size);
        info
    }

    #[test]
    fn a_region_that_the_kernel_maps_can_be_mapped_whole() {
        let flags = uapi::VFIO_REGION_INFO_FLAG_READ | uapi::VFIO_REGION_INFO_FLAG_MMAP;
        let region = describe(&info(flags, 0x10_0000));
        assert_eq!(region.mappable, [0..0x10_0000]);
        assert!(region.readable && !region.writable);
    }

    #[test]
    fn a_region_without_the_flag_cannot_be_mapped() {
        let region = describe(&info(uapi::VFIO_REGION_INFO_FLAG_READ, 0x100));
        assert!(region.mappable.is_empty());
    }

    /// 65 vectors, their table in BAR 4 from 0x2000, behind an MSI capability.
    fn header_with_msix() -> [u8; 256] {
        let mut header = [0; 256];
        header[0x06] = 0x10;
        header[0x34] = 0x40;
        header[0x40..0x42].copy_from_slice(&[0x05, 0x60]); // MSI
        header[0x60..0x68].copy_from_slice(&[0x11, 0, 0x40, 0, 0x04, 0x20, 0, 0]);
        header
    }

    #[test]
    fn the_msix_table_is_found_behind_other_capabilities() {
        assert_eq!(msix_table(&header_with_msix()), Some((4, 0x2000..0x2000 + 65 * 16)));
    }

    #[test]
    fn the_msix_table_is_mapped_only_where_the_kernel_says_so() {
        let mut region = describe(&info(uapi::VFIO_REGION_INFO_FLAG_MMAP, 0x4000));
        let mut regions = vec![region.clone(); 5];
        keep_off_msix_table(&header_with_msix(), &mut regions);
        assert_eq!(regions[4].mappable, [0..0x2000, 0x3000..0x4000]);
        assert_eq!(regions[3], region);

        region.msix_mappable = true;
        let mut regions = vec![region.clone(); 5];
        keep_off_msix_table(&header_with_msix(), &mut regions);
        assert_eq!(regions[4], region);
    }

    #[test]
    fn a_chain_of_capabilities_that_runs_in_circles_has_no_msix_table() {
        let mut header = [0; 256];
        header[0x06] = 0x10;
        header[0x34] = 0x40;
        header[0x40..0x42].copy_from_slice(&[0x05, 0x40]);
        assert_eq!(msix_table(&header), None);
    }

    #[test]
    fn every_page_that_the_hole_touches_is_left_out() {
        let hole = 0x2000..0x2410;
        assert_eq!(without(&[0..0x4000], &hole), [0..0x2000, 0x3000..0x4000]);
        assert_eq!(without(&[0x2000..0x3000], &hole), []);
        assert_eq!(without(&[0..0x1000, 0x8000..0x9000], &hole), [0..0x1000, 0x8000..0x9000]);
    }
}
