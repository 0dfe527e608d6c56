//! The capability chains behind VFIO structures.

use std::ops::{Range, RangeInclusive};

use vfio_bindings::bindings::vfio as uapi;

use crate::ioctl::Message;

/// Id, version, offset of the next capability: 8 bytes, then what the id says.
const HEADER: usize = size_of::<uapi::vfio_info_cap_header>();

/// A chain longer than this is a loop.
const MOST_CAPABILITIES: usize = 64;

/// The offset of the content of the first capability with this id, in a chain that starts at
/// `first` bytes; 0 ends a chain.
fn find(message: &Message, first: u32, id: u32) -> Option<usize> {
    let mut offset = first as usize;
    for _ in 0..MOST_CAPABILITIES {
        if offset == 0 || offset + HEADER > message.len() {
            return None;
        }
        // Id and version share the first word, the id at the lower address.
        let found = message.u32(offset).to_ne_bytes();
        if u32::from(u16::from_ne_bytes([found[0], found[1]])) == id {
            return Some(offset + HEADER);
        }
        offset = message.u32(offset + 4) as usize;
    }
    None
}

/// Whether a region's chain has a capability that is nothing but its id.
pub(crate) fn has_msix_mappable(message: &Message, first: u32) -> bool {
    find(message, first, uapi::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE).is_some()
}

/// The parts of a region that can be mapped; `None` when the chain does not restrict it.
pub(crate) fn sparse_areas(message: &Message, first: u32) -> Option<Vec<Range<u64>>> {
    let content = find(message, first, uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP)?;
    // Count, reserved word, then offset and size of each area.
    let areas = list(message, content).map(|at| {
        let start = message.u64(at);
        start..start.saturating_add(message.u64(at + 8))
    });
    Some(areas.filter(|area| !area.is_empty()).collect())
}

/// The I/O virtual addresses that can be mapped; `None` from a kernel older than 5.4.
pub(crate) fn iova_ranges(message: &Message, first: u32) -> Option<Vec<RangeInclusive<u64>>> {
    let content = find(message, first, uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)?;
    // Count, reserved word, then first and last address of each range.
    let mut ranges: Vec<_> =
        list(message, content).map(|at| message.u64(at)..=message.u64(at + 8)).collect();
    ranges.sort_by_key(|range| *range.start());
    Some(ranges)
}

/// The offsets of the 16-byte entries of a list: a count, a reserved word, the entries.
fn list(message: &Message, content: usize) -> impl Iterator<Item = usize> {
    let room = message.len().saturating_sub(content + 8) / 16;
    let count = (message.u32(content) as usize).min(room);
    (0..count).map(move |index| content + 8 + 16 * index)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message with a chain at 32: an unknown capability, then one with `id` and a list.
    fn message(id: u32, count: u32, entries: &[(u64, u64)]) -> Message {
        let mut message = Message::with_len(56 + 16 * entries.len());
        message.set(32, 0xffff).set(36, 40).set(40, 1 << 16 | id).set(44, 0).set(48, count);
        for (index, (a, b)) in entries.iter().enumerate() {
            let at = 56 + 16 * index;
            message.set(at, *a as u32).set(at + 4, (a >> 32) as u32);
            message.set(at + 8, *b as u32).set(at + 12, (b >> 32) as u32);
        }
        message
    }

    #[test]
    fn ranges_are_found_behind_another_capability_and_put_in_order() {
        let entries = [(0xfef0_0000, 0x7f_ffff_ffff), (0, 0xfedf_ffff)];
        let message = message(uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 2, &entries);
        let ranges = iova_ranges(&message, 32).unwrap();
        assert_eq!(ranges, [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff]);
    }

    #[test]
    fn areas_are_offset_and_size_and_empty_ones_are_left_out() {
        let entries = [(0, 0x1000), (0x1000, 0), (0x3000, 0x2000)];
        let message = message(uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP, 3, &entries);
        let areas = sparse_areas(&message, 32).unwrap();
        assert_eq!(areas, [0..0x1000, 0x3000..0x5000]);
    }

    #[test]
    fn a_count_beyond_the_message_ends_with_the_message() {
        let message = message(uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 3, &[(0, 1)]);
        assert_eq!(iova_ranges(&message, 32).unwrap(), [0..=1]);
    }

    #[test]
    fn a_chain_without_the_capability_has_none() {
        let message = message(uapi::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, 0, &[]);
        assert!(has_msix_mappable(&message, 32));
        assert_eq!(sparse_areas(&message, 32), None);
        assert_eq!(sparse_areas(&message, 0), None);
    }

    #[test]
    fn a_chain_that_runs_in_circles_or_out_of_the_message_ends() {
        let mut looped = message(1, 0, &[]);
        looped.set(44, 32);
        assert_eq!(sparse_areas(&looped, 4096), None);
        assert_eq!(find(&looped, 32, 9), None);
    }
}
