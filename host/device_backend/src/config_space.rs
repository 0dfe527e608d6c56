//! What everybody who has a device does with its configuration space.
//!
//! Source: PCI Local Bus 3.0, 6.1 (layout), 6.2 (command and status), 6.7 (capabilities).

use crate::{DeviceBackend, DeviceError};

/// The command register.
pub const COMMAND: u16 = 0x04;
/// Of the command register: the device answers at its BARs.
pub const MEMORY_SPACE: u16 = 0x002;
/// Of the command register: the device may start transfers.
pub const BUS_MASTER: u16 = 0x004;
/// The capability of PCI Express.
pub const EXPRESS: u8 = 0x10;

const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u32 = 0x10;
const FIRST_CAPABILITY: u16 = 0x34;
/// The most capabilities that 256 bytes have room for.
const MOST_CAPABILITIES: usize = 48;

/// Reads 1, 2 or 4 bytes.
pub fn read(device: &dyn DeviceBackend, at: u16, width: usize) -> Result<u32, DeviceError> {
    let mut bytes = [0; 4];
    device.config_read(at, &mut bytes[..width])?;
    Ok(u32::from_le_bytes(bytes))
}

/// Sets and clears bits of the command register.
pub fn change_command(device: &dyn DeviceBackend, set: u16, clear: u16) -> Result<(), DeviceError> {
    let changed = (read(device, COMMAND, 2)? as u16 | set) & !clear;
    device.config_write(COMMAND, &changed.to_le_bytes())
}

/// The capabilities of the first 256 bytes: id and place. A list that goes round ends.
pub fn capabilities(device: &dyn DeviceBackend) -> Result<Vec<(u8, u16)>, DeviceError> {
    let mut found = Vec::new();
    if read(device, STATUS, 2)? & STATUS_CAPABILITIES == 0 {
        return Ok(found);
    }
    let mut at = read(device, FIRST_CAPABILITY, 1)? as u16 & 0xfc;
    while at >= 0x40 && found.len() < MOST_CAPABILITIES {
        let header = read(device, at, 2)? as u16;
        found.push((header as u8, at));
        at = header >> 8 & 0xfc;
    }
    Ok(found)
}
