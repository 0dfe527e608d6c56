//! Where a command's data is in the host's memory.

use super::command::{Command, Status};
use super::{prp, sgl};
use crate::model::Bus;

/// Runs of the host's memory, in order: address and bytes.
pub(super) type Runs = Vec<(u64, usize)>;

/// Where the `len` bytes of a command are, whichever way it says so.
pub(super) fn resolve(
    bus: &mut Bus<'_>,
    page: u64,
    command: &Command,
    len: u64,
) -> Result<Runs, Status> {
    let (first, second) = command.data;
    match command.has_sgl() {
        true => sgl::resolve(bus, sgl::Descriptor::of(first, second), len),
        false => prp::resolve(bus, page, first, second, len),
    }
}

/// Adds up to `most` of the bytes that are left.
pub(super) fn take(runs: &mut Runs, left: &mut u64, address: u64, most: u64) {
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
