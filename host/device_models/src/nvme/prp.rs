//! Physical region pages (section 4.3).

use super::command::Status;
use super::data::{Runs, take};
use crate::model::Bus;

/// Where `len` bytes are that a command describes by two entries, or an entry and a list.
pub(super) fn resolve(
    bus: &mut Bus<'_>,
    page: u64,
    prp1: u64,
    prp2: u64,
    len: u64,
) -> Result<Runs, Status> {
    let mut runs = Runs::new();
    let mut left = len;
    if left == 0 {
        return Ok(runs);
    }
    if prp1 & 3 != 0 {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    take(&mut runs, &mut left, prp1, page - prp1 % page);
    if left == 0 {
        return Ok(runs);
    }
    if left <= page {
        take_page(&mut runs, &mut left, prp2, page)?;
        return Ok(runs);
    }
    // A list. The last entry of a page of it points to the rest, if there is a rest.
    let mut list = prp2;
    if list & 7 != 0 {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    // A list that only points on would never end.
    let mut hops = 0..len.div_ceil(page) + 1;
    while left > 0 {
        hops.next().ok_or(Status::PRP_OFFSET_INVALID)?;
        let room = (page - list % page) / 8;
        let needed = left.div_ceil(page);
        let count = room.min(needed);
        let mut entries = vec![0; count as usize * 8];
        bus.dma_read(list, &mut entries);
        let mut entries = entries
            .chunks_exact(8)
            .map(|entry| u64::from_le_bytes(entry.try_into().expect("eight bytes")))
            .collect::<Vec<_>>();
        let next = (needed > room).then(|| entries.pop()).flatten();
        for entry in entries {
            take_page(&mut runs, &mut left, entry, page)?;
        }
        if let Some(next) = next {
            if next & 7 != 0 {
                return Err(Status::PRP_OFFSET_INVALID);
            }
            list = next;
        }
    }
    Ok(runs)
}

/// An entry that is not the first begins on a page.
fn take_page(runs: &mut Runs, left: &mut u64, entry: u64, page: u64) -> Result<(), Status> {
    if !entry.is_multiple_of(page) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    take(runs, left, entry, page);
    Ok(())
}
