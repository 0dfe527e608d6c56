//! Accesses that a PCI function can make, and what its BARs are.

use std::path::Path;

use crate::{DeviceError, PciAddress};

/// The widest access to configuration space and to a BAR, in bytes.
pub(crate) const WIDEST_CONFIG: usize = 4;
pub(crate) const WIDEST_BAR: usize = 8;

/// Refuses an access that is no power of two, too wide, off its natural alignment, or past the
/// end of its region.
pub(crate) fn check(
    region: u32,
    offset: u64,
    len: usize,
    size: u64,
    widest: usize,
) -> Result<(), DeviceError> {
    let natural = len.is_power_of_two() && len <= widest && offset.is_multiple_of(len as u64);
    let inside = offset.checked_add(len as u64).is_some_and(|end| end <= size);
    match natural && inside {
        true => Ok(()),
        false => Err(DeviceError::Range { region: region_name(region), offset, len, size }),
    }
}

/// What VFIO's region of this index is called.
pub(crate) fn region_name(index: u32) -> String {
    match index {
        iohost_vfio::CONFIG_REGION => "configuration space".to_owned(),
        iohost_vfio::ROM_REGION => "the expansion ROM".to_owned(),
        index => format!("BAR {index}"),
    }
}

/// What a BAR is, by its register in configuration space, which `read` reads at an offset. BAR 6,
/// the ROM, has none like it.
pub(crate) fn bar_kind<E>(
    index: u8,
    read: impl FnOnce(u16, &mut [u8]) -> Result<(), E>,
) -> Result<u8, E> {
    let mut register = [0; 4];
    if index < 6 {
        read(0x10 + 4 * u16::from(index), &mut register)?;
    }
    Ok(kind_of(u32::from_le_bytes(register)))
}

/// The low bits of a base address register, which say what the BAR is.
///
/// Source: PCI Local Bus Specification 3.0, 6.2.5.1.
fn kind_of(register: u32) -> u8 {
    const IO_PORTS: u32 = 0x1;
    match register & IO_PORTS {
        0 => (register & 0xf) as u8,
        _ => IO_PORTS as u8,
    }
}

/// The address that a function's folder in sysfs is named after.
pub(crate) fn location(sysfs: &Path) -> Option<PciAddress> {
    sysfs.file_name()?.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_natural_and_inside_or_refused() {
        assert!(check(0, 0xffc, 4, 0x1000, 8).is_ok());
        for (offset, len) in [(0x1000, 1), (0xffc, 8), (2, 4), (0, 3), (0, 0), (0, 16)] {
            let err = check(0, offset, len, 0x1000, 8).unwrap_err();
            assert!(matches!(err, DeviceError::Range { .. }), "{offset:#x} {len}: {err}");
        }
        assert!(check(0, u64::MAX - 7, 8, u64::MAX, 8).is_err());
    }

    #[test]
    fn a_refused_access_names_its_region_and_all_numbers() {
        let err = check(2, 0x1000, 4, 0x800, 8).unwrap_err();
        assert_eq!(err.to_string(), "4 bytes at 0x1000 of BAR 2, which has 0x800 bytes");
    }

    #[test]
    fn a_folder_in_sysfs_is_named_after_the_functions_address() {
        let address = location(Path::new("/sys/bus/pci/devices/0000:02:1f.7")).unwrap();
        assert_eq!((address.bus, address.device, address.function), (2, 0x1f, 7));
        assert_eq!(location(Path::new("/sys/bus/pci/devices")), None);
    }

    #[test]
    fn a_bar_is_what_its_low_bits_say_without_its_address() {
        assert_eq!(kind_of(0xfebf_0000), 0x00);
        assert_eq!(kind_of(0xfebf_000c), 0x0c);
        assert_eq!(kind_of(0x0000_c041), 0x01);
        assert_eq!(kind_of(0x0000_c00d), 0x01);
    }
}
