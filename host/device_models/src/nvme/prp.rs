//! Physical region pages (section 4.3): where a command's data is.

use super::command::Status;
use crate::model::Bus;

/// Runs of the host's memory, in order: address and bytes.
pub(super) type Runs = Vec<(u64, usize)>;

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

fn take(runs: &mut Runs, left: &mut u64, address: u64, most: u64) {
    let count = most.min(*left);
    *left -= count;
    match runs.last_mut() {
        Some((start, len)) if *start + *len as u64 == address => *len += count as usize,
        _ => runs.push((address, count as usize)),
    }
}

/// Copies the host's bytes.
pub(super) fn read(bus: &mut Bus<'_>, runs: &Runs) -> Vec<u8> {
    let mut data = vec![0; runs.iter().map(|(_, len)| len).sum()];
    let mut at = 0;
    for (address, len) in runs {
        bus.dma_read(*address, &mut data[at..at + len]);
        at += len;
    }
    data
}

/// Copies bytes to the host.
pub(super) fn write(bus: &mut Bus<'_>, runs: &Runs, data: &[u8]) {
    let mut at = 0;
    for (address, len) in runs {
        bus.dma_write(*address, &data[at..at + len]);
        at += len;
    }
}
