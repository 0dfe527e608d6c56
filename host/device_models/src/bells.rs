//! A device that interrupts when it is told to, in all three ways: for tests of interrupts.
//!
//! It exists nowhere else. BAR 0 is 4096 bytes of memory:
//!
//! | Offset | | Register |
//! | --- | --- | --- |
//! | 0x00 | WO | message: sends the message of this vector, by MSI-X or MSI, whichever is enabled |
//! | 0x04 | RW | line: 1 asserts the INTx line, 0 lets go of it |
//! | 0x800 | | the MSI-X table |
//! | 0xc00 | | the MSI-X pending bits |
//!
//! Accesses are 4 bytes; others read as ones and do nothing.

use crate::model::{BarSpec, Bus, DeviceModel, Identity, MsiXSpec};

/// The register that sends a message.
pub const MESSAGE: u64 = 0x00;
/// The register of the line.
pub const LINE: u64 = 0x04;

/// The vendor id.
pub const VENDOR: u16 = 0x1234;
/// The device id.
pub const DEVICE: u16 = 0x0be1;

/// How many vectors MSI and MSI-X have, each.
pub const VECTORS: u8 = 4;

/// The device.
#[derive(Debug, Default)]
pub struct Bells {
    line: u32,
}

impl DeviceModel for Bells {
    fn identity(&self) -> Identity {
        let msi_x = MsiXSpec { vectors: VECTORS.into(), bar: 0, table: 0x800, pending: 0xc00 };
        Identity {
            vendor: VENDOR,
            device: DEVICE,
            subsystem_vendor: 0,
            subsystem: 0,
            class: 0x00_ff00,
            revision: 0,
            bars: [Some(BarSpec { size: 0x1000 }), None, None, None, None, None],
            intx: true,
            msi_vectors: VECTORS,
            msi_x: Some(msi_x),
        }
    }

    fn bar_read(&mut self, _bus: &mut Bus<'_>, _bar: u8, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (LINE, 4) => data.copy_from_slice(&self.line.to_le_bytes()),
            _ => data.fill(0xff),
        }
    }

    fn bar_write(&mut self, bus: &mut Bus<'_>, _bar: u8, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            MESSAGE if bus.msi_x_enabled() => bus.send_msi_x(value as u16),
            MESSAGE => bus.send_msi(value as u8),
            LINE => {
                self.line = value & 1;
                match self.line {
                    0 => bus.deassert_intx(),
                    _ => bus.assert_intx(),
                }
            }
            _ => {}
        }
    }

    fn time_has_come(&mut self, _bus: &mut Bus<'_>, _what: u32) {}

    fn reset(&mut self, _bus: &mut Bus<'_>) {
        self.line = 0;
    }
}
