//! Physical region pages: how a command says where its data is (NVM Express 1.4, section 4.3).

use crate::memory::{PAGE, Shared};

/// The most bytes of a command's data: as many pages as a list of ours has entries.
pub const MOST_BYTES: u64 = (LIST_ENTRIES * PAGE) as u64;

/// Entries of a list. With data that begins inside of a page, the first page is not in the list, so
/// that one more than this would be needed at most.
const LIST_ENTRIES: usize = 256;

/// Bytes of a list. Two of them fill a page, so none crosses one.
pub const LIST: usize = LIST_ENTRIES * 8;

/// The two entries of a command for `length` bytes, 1 to [`MOST_BYTES`], that the controller finds
/// at `address`, a multiple of 4. Where more than two pages are touched, they are written to the
/// list at `at` of `lists`.
#[inline]
pub fn describe(address: u64, length: u64, lists: &Shared, at: usize) -> (u64, u64) {
    let page = PAGE as u64;
    let second = (address / page + 1) * page;
    let end = address + length;
    if end <= second {
        return (address, 0);
    }
    if end <= second + page {
        return (address, second);
    }
    let mut list = [0; LIST];
    let mut used = 0;
    for entry in (second..end).step_by(PAGE) {
        list[used..used + 8].copy_from_slice(&entry.to_le_bytes());
        used += 8;
    }
    lists.write(at, &list[..used]);
    (address, lists.address() + at as u64)
}
