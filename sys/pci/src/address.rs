//! Where a PCI function is.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Domain, bus, device and function, as sysfs spells them: `0000:00:1f.2`.
///
/// Parsing also takes the short form without the domain, which means domain 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PciAddress {
    /// The PCI segment. Wider than 16 bits behind a VMD controller.
    pub domain: u32,
    /// The bus in its domain.
    pub bus: u8,
    /// The device on its bus, below 32.
    pub device: u8,
    /// The function of its device, below 8.
    pub function: u8,
}

/// Why a text is not the address of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// The text has another shape.
    #[error("{text:?} is not a PCI address such as 0000:00:1f.2 or 00:1f.2")]
    Shape {
        /// What was given.
        text: String,
    },
    /// A part is not a hexadecimal number, or too large.
    #[error("{part} {value:?} of PCI address {text:?} is not a hexadecimal number up to {max:#x}")]
    Part {
        /// What was given.
        text: String,
        /// Which part of it.
        part: &'static str,
        /// The part's text.
        value: String,
        /// The largest number the part can be.
        max: u32,
    },
}

impl FromStr for PciAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let shape = || AddressError::Shape { text: text.to_owned() };
        let (bus_and_device, function) = text.rsplit_once('.').ok_or_else(shape)?;
        let (rest, device) = bus_and_device.rsplit_once(':').ok_or_else(shape)?;
        let (domain, bus) = rest.split_once(':').unwrap_or(("0", rest));
        if bus.contains(':') {
            return Err(shape());
        }
        let part = |part, value: &str, max: u32| {
            // `from_str_radix` takes a sign, sysfs does not.
            let digits = value.bytes().all(|byte| byte.is_ascii_hexdigit());
            let number = u32::from_str_radix(value, 16).ok();
            number.filter(|number| digits && *number <= max).ok_or_else(|| AddressError::Part {
                text: text.to_owned(),
                part,
                value: value.to_owned(),
                max,
            })
        };
        Ok(Self {
            domain: part("domain", domain, u32::MAX)?,
            bus: part("bus", bus, 0xff)? as u8,
            device: part("device", device, 0x1f)? as u8,
            function: part("function", function, 7)? as u8,
        })
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> String {
        address.to_string()
    }
}

impl TryFrom<String> for PciAddress {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_as_sysfs_spells_it() {
        let address = PciAddress { domain: 0, bus: 0, device: 0x1f, function: 2 };
        assert_eq!(address.to_string(), "0000:00:1f.2");
        assert_eq!("0000:00:1f.2".parse(), Ok(address));
    }

    #[test]
    fn the_short_form_means_domain_zero() {
        assert_eq!("3a:00.1".parse::<PciAddress>(), "0000:3a:00.1".parse());
    }

    #[test]
    fn a_domain_wider_than_sixteen_bits_is_kept() {
        let address: PciAddress = "10000:e1:00.0".parse().unwrap();
        assert_eq!((address.domain, address.to_string()), (0x10000, "10000:e1:00.0".to_owned()));
    }

    #[test]
    fn a_text_of_another_shape_is_refused() {
        for text in ["", "edu", "00:1f", "0000:00:1f", "1:0000:00:1f.2", "00.1f.2"] {
            let err = text.parse::<PciAddress>().unwrap_err();
            assert_eq!(err, AddressError::Shape { text: text.to_owned() });
        }
    }

    #[test]
    fn a_part_out_of_range_is_named_with_its_limit() {
        let err = "0000:00:20.0".parse::<PciAddress>().unwrap_err();
        assert_eq!(
            err.to_string(),
            "device \"20\" of PCI address \"0000:00:20.0\" is not a hexadecimal number up to 0x1f"
        );
        for text in ["00:1f.8", "100:00.0", "00:+1.0", "0g:00.0", ":00.0", "00:00."] {
            let err = text.parse::<PciAddress>().unwrap_err();
            assert!(matches!(err, AddressError::Part { .. }), "{text}: {err}");
        }
    }
}
