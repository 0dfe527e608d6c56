//! What can be learnt of a function without opening it and without changing it: its BARs, its
//! interrupts, its power state, how it resets.
//!
//! Source: Linux, `Documentation/ABI/testing/sysfs-bus-pci`, and the PCI Local Bus Specification
//! 3.0, chapter 6.

use std::fs;
use std::io::ErrorKind;

use serde::Serialize;

use crate::{PciAddress, PciError, Sysfs};

/// Bits of a resource's flags. Source: Linux, `include/linux/ioport.h`.
const IO_PORTS: u64 = 0x100;
const MEMORY: u64 = 0x200;
const UNSET: u64 = 0x2000_0000;

/// The BARs of a function; what follows them in `resource` is its ROM and what is behind a bridge.
const BARS: usize = 6;

/// Bytes of the unit of mapping.
const PAGE: u64 = 4096;

/// One BAR, as the kernel has placed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PciBar {
    /// Its number, 0 to 5.
    pub index: u8,
    /// Bytes.
    pub size: u64,
    /// Whether and how a program can map it.
    pub mapping: BarMapping,
}

/// Whether a BAR can be mapped into a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BarMapping {
    /// All of it.
    Whole,
    /// It is smaller than a page, or starts inside of one: only where nothing else is in that page.
    IfAloneInItsPage,
    /// I/O ports are never mapped; they are read and written by calls.
    Ports,
    /// The kernel found no room for it: it cannot be used at all.
    Unassigned,
}

/// What configuration space says, as far as this process may read it.
///
/// A process without `CAP_SYS_ADMIN` is shown the first 64 bytes only, which have no capabilities:
/// what is in them is `None` then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Configuration {
    /// Whether the function answers at all: one that is off the bus reads as all ones.
    pub answers: bool,
    /// Whether it has an interrupt line.
    pub has_line: bool,
    /// Vectors of MSI; 0 for none.
    pub msi: Option<u32>,
    /// Vectors of MSI-X; 0 for none.
    pub msi_x: Option<u32>,
    /// The state that its power management capability says it is in: 0 for D0, 3 for D3hot.
    /// `None` where it has none, too: it is always in D0 then.
    pub power_state: Option<u8>,
}

impl Sysfs {
    /// The function's BARs, those that it has.
    ///
    /// Errors: `Read`, and `Malformed` with the line that is wrong.
    pub fn bars(&self, address: PciAddress) -> Result<Vec<PciBar>, PciError> {
        let path = self.directory(address).join("resource");
        let text = fs::read_to_string(&path)
            .map_err(|source| PciError::Read { path: path.clone(), source })?;
        let mut bars = Vec::new();
        for (index, line) in text.lines().take(BARS).enumerate() {
            let malformed = || PciError::Malformed {
                path: path.clone(),
                text: line.to_owned(),
                expected: "first address, last address and flags",
            };
            bars.extend(bar(index as u8, line).ok_or_else(malformed)?);
        }
        Ok(bars)
    }

    /// The ways in which the kernel would reset the function alone, best first: `flr`, `pm`, `bus`,
    /// and others. `None`: it knows none. An empty list: somebody has taken them from it.
    ///
    /// Errors: `Read`.
    pub fn reset_methods(&self, address: PciAddress) -> Result<Option<Vec<String>>, PciError> {
        let directory = self.directory(address);
        let path = directory.join("reset_method");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.split_whitespace().map(str::to_owned).collect())),
            // Before Linux 5.15 there is no list, but the file that resets is there or not.
            Err(err) if err.kind() == ErrorKind::NotFound => {
                Ok(directory.join("reset").exists().then(|| vec!["unnamed".to_owned()]))
            }
            Err(source) => Err(PciError::Read { path, source }),
        }
    }

    /// The power state that the kernel has put the function into: `D0`, `D3hot`, `D3cold`,
    /// `unknown`. `None` before Linux 5.12, which does not say.
    pub fn kernel_power_state(&self, address: PciAddress) -> Option<String> {
        let text = fs::read_to_string(self.directory(address).join("power_state")).ok()?;
        Some(text.trim_end().to_owned())
    }

    /// What the function's configuration space says.
    ///
    /// Errors: `Read`.
    pub fn configuration(&self, address: PciAddress) -> Result<Configuration, PciError> {
        let path = self.directory(address).join("config");
        let bytes = fs::read(&path).map_err(|source| PciError::Read { path, source })?;
        Ok(configuration(&bytes))
    }
}

/// `Some(None)` for a line that has no BAR; `None` for one that makes no sense.
fn bar(index: u8, line: &str) -> Option<Option<PciBar>> {
    let mut numbers =
        line.split_whitespace().map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let (start, end, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
    if flags & (IO_PORTS | MEMORY) == 0 {
        return Some(None);
    }
    let size = end.checked_sub(start)?.checked_add(1)?;
    let mapping = match flags {
        _ if flags & UNSET != 0 || start == 0 => BarMapping::Unassigned,
        _ if flags & MEMORY == 0 => BarMapping::Ports,
        _ if start.is_multiple_of(PAGE) && size >= PAGE => BarMapping::Whole,
        _ => BarMapping::IfAloneInItsPage,
    };
    Some(Some(PciBar { index, size, mapping }))
}

/// Source: PCI Local Bus Specification 3.0, 6.1, 6.2.3, 6.7, 6.8; PCI Bus Power Management
/// Interface Specification 1.2, 3.2.4.
fn configuration(bytes: &[u8]) -> Configuration {
    const STATUS: usize = 0x06;
    const HAS_CAPABILITIES: u16 = 0x0010;
    const FIRST_CAPABILITY: usize = 0x34;
    const INTERRUPT_PIN: usize = 0x3d;
    const STANDARD_HEADER: usize = 0x40;
    const POWER: u8 = 0x01;
    const MSI: u8 = 0x05;
    const MSI_X: u8 = 0x11;

    let byte = |at: usize| bytes.get(at).copied();
    let word = |at: usize| Some(u16::from_le_bytes([byte(at)?, byte(at + 1)?]));
    let answers = word(0).is_some_and(|vendor| vendor != 0xffff);
    let has_line = answers && byte(INTERRUPT_PIN).is_some_and(|pin| pin != 0);
    let mut found = Configuration { answers, has_line, ..Configuration::default() };
    if !answers || bytes.len() <= STANDARD_HEADER {
        return found;
    }
    (found.msi, found.msi_x) = (Some(0), Some(0));
    if word(STATUS).is_none_or(|status| status & HAS_CAPABILITIES == 0) {
        return found;
    }
    let mut at = usize::from(byte(FIRST_CAPABILITY).unwrap_or(0) & !3);
    // There is room for 48 of them; a list that goes on is a ring.
    for _ in 0..48 {
        if at < STANDARD_HEADER {
            break;
        }
        let (Some(id), Some(next), Some(control)) = (byte(at), byte(at + 1), word(at + 2)) else {
            break;
        };
        match id {
            POWER => found.power_state = word(at + 4).map(|status| (status & 3) as u8),
            MSI => found.msi = Some(1 << (control >> 1 & 7)),
            MSI_X => found.msi_x = Some(u32::from(control & 0x7ff) + 1),
            _ => {}
        }
        at = usize::from(next & !3);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;

    const EDU: &str = "0000:01:00.0";

    fn tree() -> (Tree, Sysfs, PciAddress) {
        let tree = Tree::new();
        tree.add(EDU, 0x1234, 0x11e8, 0x00ff00, Some(3));
        let sysfs = tree.sysfs();
        (tree, sysfs, EDU.parse().unwrap())
    }

    #[test]
    fn a_bar_is_told_with_its_size_and_whether_it_can_be_mapped() {
        let (tree, sysfs, edu) = tree();
        tree.set(
            EDU,
            "resource",
            "0x00000000fea00000 0x00000000feafffff 0x0000000000040200\n\
             0x000000000000c000 0x000000000000c01f 0x0000000000040101\n\
             0x00000000febf1000 0x00000000febf10ff 0x0000000000040200\n\
             0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x0000000000000000 0x00000000000fffff 0x0000000020140204\n\
             0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x00000000febc0000 0x00000000febdffff 0x0000000000046200\n",
        );
        let bars = sysfs.bars(edu).unwrap();
        let found: Vec<_> = bars.iter().map(|bar| (bar.index, bar.size, bar.mapping)).collect();
        assert_eq!(
            found,
            [
                (0, 0x10_0000, BarMapping::Whole),
                (1, 0x20, BarMapping::Ports),
                (2, 0x100, BarMapping::IfAloneInItsPage),
                (4, 0x10_0000, BarMapping::Unassigned),
            ]
        );
    }

    #[test]
    fn a_line_that_is_no_bar_is_named() {
        let (tree, sysfs, edu) = tree();
        for line in ["what", "0x10 0x0f 0x200", "0x1 0x2"] {
            tree.set(EDU, "resource", line);
            let err = sysfs.bars(edu).unwrap_err();
            assert!(matches!(&err, PciError::Malformed { text, .. } if text == line), "{err}");
        }
    }

    #[test]
    fn reset_methods_are_listed_and_none_differs_from_none_left() {
        let (tree, sysfs, edu) = tree();
        assert_eq!(sysfs.reset_methods(edu).unwrap(), None);
        tree.set(EDU, "reset", "");
        assert_eq!(sysfs.reset_methods(edu).unwrap(), Some(vec!["unnamed".to_owned()]));
        tree.set(EDU, "reset_method", "flr bus\n");
        let both = vec!["flr".to_owned(), "bus".to_owned()];
        assert_eq!(sysfs.reset_methods(edu).unwrap(), Some(both));
        tree.set(EDU, "reset_method", "\n");
        assert_eq!(sysfs.reset_methods(edu).unwrap(), Some(Vec::new()));
    }

    /// A function with a line, in D3hot, with 4 vectors of MSI and 65 of MSI-X.
    fn capable() -> Vec<u8> {
        let mut bytes = vec![0; 256];
        bytes[0..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
        bytes[0x06] = 0x10;
        bytes[0x34] = 0x40;
        bytes[0x3d] = 1;
        bytes[0x40..0x46].copy_from_slice(&[0x01, 0x50, 0, 0, 0x03, 0]);
        bytes[0x50..0x54].copy_from_slice(&[0x05, 0x60, 0x04, 0]);
        bytes[0x60..0x64].copy_from_slice(&[0x11, 0, 0x40, 0]);
        bytes
    }

    #[test]
    fn interrupts_and_power_state_are_read_from_the_capabilities() {
        let found = configuration(&capable());
        let expected = Configuration {
            answers: true,
            has_line: true,
            msi: Some(4),
            msi_x: Some(65),
            power_state: Some(3),
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn what_may_not_be_read_is_unknown_and_not_absent() {
        let found = configuration(&capable()[..64]);
        assert_eq!((found.has_line, found.msi, found.msi_x), (true, None, None));
        let mut without = capable();
        without[0x06] = 0;
        let found = configuration(&without);
        assert_eq!((found.msi, found.msi_x, found.power_state), (Some(0), Some(0), None));
    }

    #[test]
    fn a_list_of_capabilities_that_is_a_ring_ends() {
        let mut ring = capable();
        ring[0x61] = 0x40;
        assert_eq!(configuration(&ring).msi_x, Some(65));
        ring[0x61] = 0xfc; // and one that ends with the space
        assert_eq!(configuration(&ring).msi_x, Some(65));
    }

    #[test]
    fn a_function_off_the_bus_does_not_answer() {
        let found = configuration(&[0xff; 256]);
        assert_eq!(found, Configuration::default());
    }
}
