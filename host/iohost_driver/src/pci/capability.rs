//! Finding what a PCI function says it can do.
//!
//! Source: PCI Local Bus Specification 3.0, 6.7; PCI Express Base Specification 5.0, 7.6.3.

use std::ops::Range;

use iohost_interface::IOReturn;

use crate::{Error, IOPCIDevice, Result};

/// The number of a capability in configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Capability {
    /// One of the list in the first 256 bytes.
    Standard(u8),
    /// One of the list behind them, which PCI Express has. DriverKit passes its negative.
    Extended(u16),
}

impl Capability {
    /// Power management.
    pub const POWER_MANAGEMENT: Self = Self::Standard(0x01);
    /// Message signalled interrupts.
    pub const MSI: Self = Self::Standard(0x05);
    /// PCI Express.
    pub const EXPRESS: Self = Self::Standard(0x10);
    /// MSI-X.
    pub const MSI_X: Self = Self::Standard(0x11);
    /// Advanced error reporting.
    pub const ADVANCED_ERROR_REPORTING: Self = Self::Extended(0x0001);
}

const STATUS: u64 = 0x06;
const STATUS_CAPABILITIES: u16 = 0x10;
const CAPABILITIES: u64 = 0x34;
const EXTENDED: u64 = 0x100;

impl IOPCIDevice {
    /// Where a capability begins in configuration space: the first of its number, or the first
    /// after the one at `after`. `FindPCICapability`.
    ///
    /// Errors: `NOT_FOUND` also for a list that leads nowhere or round in a circle, and when
    /// nothing of the list is at `after`.
    pub fn find_capability(&self, capability: Capability, after: Option<u64>) -> Result<u64> {
        let found = match capability {
            Capability::Standard(id) => find(after, id.into(), self.standard()),
            Capability::Extended(id) => find(after, id, self.extended()),
        };
        found.ok_or_else(|| {
            let after = after.map_or(String::new(), |at| format!(" after {at:#x}"));
            Error::new(IOReturn::NOT_FOUND, format!("no capability {capability:x?}{after}"))
        })
    }

    /// The list in the first 256 bytes: place and number.
    fn standard(&self) -> impl Iterator<Item = (u64, u16)> {
        let has_list = self.configuration_read16(STATUS) & STATUS_CAPABILITIES != 0;
        let first = if has_list { self.configuration_read8(CAPABILITIES) } else { 0 };
        list(u64::from(first) & 0xfc, 0x40..EXTENDED, |at| {
            let header = self.configuration_read16(at);
            let is_there = header != u16::MAX;
            is_there.then_some((header & 0xff, u64::from(header >> 8) & 0xfc))
        })
    }

    /// The list behind the first 256 bytes. All zeros: there is none; all ones: there are no more
    /// than 256 bytes.
    fn extended(&self) -> impl Iterator<Item = (u64, u16)> {
        list(EXTENDED, EXTENDED..0x1000, |at| {
            let header = self.configuration_read32(at);
            let is_there = header != 0 && header != u32::MAX;
            is_there.then_some((header as u16, u64::from(header >> 20) & 0xffc))
        })
    }
}

/// Walks a list whose entries lie in `range`, 4 bytes apart at least: as many as there is room for.
fn list(
    first: u64,
    range: Range<u64>,
    entry: impl Fn(u64) -> Option<(u16, u64)>,
) -> impl Iterator<Item = (u64, u16)> {
    let most = (range.end - range.start) / 4;
    let mut at = first;
    (0..most).map_while(move |_| {
        let place = at;
        let (id, next) = range.contains(&place).then(|| entry(place)).flatten()?;
        at = next;
        Some((place, id))
    })
}

fn find(after: Option<u64>, id: u16, mut list: impl Iterator<Item = (u64, u16)>) -> Option<u64> {
    if let Some(after) = after {
        list.find(|(place, _)| *place == after)?;
    }
    // In a list that goes round, what is at `after` comes again; it is not after itself.
    let (place, _) = list.find(|(_, number)| *number == id)?;
    (after != Some(place)).then_some(place)
}
