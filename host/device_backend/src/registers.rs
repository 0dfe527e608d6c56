//! What a device's registers say it is up to, in words, for reports.
//!
//! Source: PCI Local Bus Specification 3.0, sections 6.2.2 and 6.2.3 (command, status), 6.8.1.3 and
//! 6.8.2.3 (message control); PCI Bus Power Management Interface Specification 1.2, section 3.2.4;
//! PCI Express Base Specification 4.0, section 7.5.3.5 (device status).

use std::fmt::Write as _;

use iohost_interface::with_sources;

use crate::config_space::{self, COMMAND, EXPRESS};
use crate::{DeviceBackend, DeviceError};

/// The command register's bits that have a word.
const COMMAND_BITS: [(u32, &str); 5] = [
    (0x001, "I/O"),
    (0x002, "memory"),
    (0x004, "bus master"),
    (0x040, "parity"),
    (0x400, "no INTx"),
];
/// Those of the status register. "Capabilities" and what a bus can do is not news of a device.
const STATUS_BITS: [(u32, &str); 7] = [
    (0x0008, "interrupt pending"),
    (0x0100, "master parity error"),
    (0x0800, "signalled target abort"),
    (0x1000, "received target abort"),
    (0x2000, "received master abort"),
    (0x4000, "system error"),
    (0x8000, "parity error"),
];
/// Those of the device status of PCI Express.
const EXPRESS_STATUS_BITS: [(u32, &str); 5] = [
    (0x01, "correctable error"),
    (0x02, "non-fatal error"),
    (0x04, "fatal error"),
    (0x08, "unsupported request"),
    (0x20, "transactions pending"),
];

const POWER_MANAGEMENT: u8 = 0x01;
const MSI: u8 = 0x05;
const MSI_X: u8 = 0x11;

/// Command, status, interrupts, power and errors as they are now.
///
/// ```text
/// command 0x0406 (memory, bus master, no INTx), status 0x0010, D0, MSI-X on
/// ```
pub fn in_words(device: &dyn DeviceBackend) -> String {
    describe(device).unwrap_or_else(|err| format!("cannot be read: {}", with_sources(&err)))
}

fn describe(device: &dyn DeviceBackend) -> Result<String, DeviceError> {
    let first = config_space::read(device, COMMAND, 4)?;
    if first == u32::MAX {
        return Ok("all ones: it does not answer".to_owned());
    }
    let mut text = register("command", first & 0xffff, &COMMAND_BITS);
    text += ", ";
    text += &register("status", first >> 16, &STATUS_BITS);
    for (id, at) in config_space::capabilities(device)? {
        match id {
            POWER_MANAGEMENT => {
                let _ = write!(text, ", D{}", config_space::read(device, at + 4, 2)? & 3);
            }
            MSI if config_space::read(device, at + 2, 2)? & 1 != 0 => text += ", MSI on",
            MSI_X if config_space::read(device, at + 2, 2)? & 0x8000 != 0 => text += ", MSI-X on",
            EXPRESS => {
                let status = config_space::read(device, at + 0x0a, 2)?;
                text += ", ";
                text += &register("express status", status, &EXPRESS_STATUS_BITS);
            }
            _ => {}
        }
    }
    Ok(text)
}

fn register(name: &str, value: u32, bits: &[(u32, &str)]) -> String {
    let set: Vec<&str> =
        bits.iter().filter(|(bit, _)| value & bit != 0).map(|(_, word)| *word).collect();
    match set.is_empty() {
        true => format!("{name} {value:#06x}"),
        false => format!("{name} {value:#06x} ({})", set.join(", ")),
    }
}
