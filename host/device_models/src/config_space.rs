//! The first 256 bytes of a function: type 0 header, the MSI and the MSI-X capability.
//!
//! Source: PCI Local Bus Specification 3.0, section 6.1 (header), 6.2.5 (BARs), 6.8.1 (MSI), 6.8.2
//! (MSI-X).

use crate::model::Identity;

/// Bytes of configuration space.
pub(crate) const CONFIG_SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
/// Where QEMU puts the first capability: right after the header.
const MSI: usize = 0x40;
const MSI_CONTROL: usize = MSI + 2;
const MSI_ADDRESS: usize = MSI + 4;
const MSI_DATA: usize = MSI + 12;
const MSI_X: usize = 0x50;
const MSI_X_CONTROL: usize = MSI_X + 2;
const MSI_X_TABLE: usize = MSI_X + 4;
const MSI_X_PENDING: usize = MSI_X + 8;

const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// I/O, memory, bus master, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0507;
const STATUS_INTERRUPT: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const MSI_CONTROL_ENABLE: u16 = 1;
const MSI_CONTROL_64BIT: u16 = 1 << 7;
const MSI_X_CONTROL_ENABLE: u16 = 1 << 15;

/// Bytes of configuration space and which of their bits software can change.
#[derive(Debug)]
pub(crate) struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    at_power_on: [u8; CONFIG_SIZE],
    has_msi: bool,
    has_msi_x: bool,
    /// Whether a message has somewhere to go; see [`ConfigSpace::write`].
    msi_usable: bool,
}

impl ConfigSpace {
    pub(crate) fn new(identity: &Identity) -> Self {
        let mut image = Image { bytes: [0; CONFIG_SIZE], writable: [0; CONFIG_SIZE] };
        image.fixed(0x00, &identity.vendor.to_le_bytes());
        image.fixed(0x02, &identity.device.to_le_bytes());
        image.fixed(0x08, &[identity.revision]);
        image.fixed(0x09, &identity.class.to_le_bytes()[..3]);
        image.fixed(0x2c, &identity.subsystem_vendor.to_le_bytes());
        image.fixed(0x2e, &identity.subsystem.to_le_bytes());
        image.changeable(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        image.changeable(INTERRUPT_LINE, &[0xff]);
        image.fixed(INTERRUPT_PIN, &[u8::from(identity.intx)]);
        for (index, bar) in identity.bars.iter().enumerate() {
            if let Some(bar) = bar {
                // The low bits of a BAR are fixed: writing ones tells its size.
                image.changeable(BAR0 + 4 * index, &(!(bar.size - 1)).to_le_bytes());
            }
        }
        let has_msi = identity.msi_vectors > 0;
        if has_msi {
            let vectors = u16::from(identity.msi_vectors).trailing_zeros() as u16;
            let control = MSI_CONTROL_64BIT | vectors << 1;
            image.capability(MSI, 0x05);
            image.fixed(MSI_CONTROL, &control.to_le_bytes());
            image.changeable(MSI_CONTROL, &(MSI_CONTROL_ENABLE | 7 << 4).to_le_bytes());
            image.changeable(MSI_ADDRESS, &[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
            image.changeable(MSI_DATA, &[0xff, 0xff]);
        }
        if let Some(msi_x) = identity.msi_x {
            // All of it is read-only: the enable bit follows the eventfds, as behind VFIO.
            image.capability(MSI_X, 0x11);
            image.fixed(MSI_X_CONTROL, &(msi_x.vectors - 1).to_le_bytes());
            image.fixed(MSI_X_TABLE, &(msi_x.table | u32::from(msi_x.bar)).to_le_bytes());
            image.fixed(MSI_X_PENDING, &(msi_x.pending | u32::from(msi_x.bar)).to_le_bytes());
        }
        let has_msi_x = identity.msi_x.is_some();
        let Image { bytes, writable } = image;
        Self { bytes, writable, at_power_on: bytes, has_msi, has_msi_x, msi_usable: false }
    }

    pub(crate) fn reset(&mut self) {
        self.bytes = self.at_power_on;
        self.msi_usable = false;
    }

    /// Reads bytes that the caller has checked to be inside.
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        data.copy_from_slice(&self.bytes[offset..offset + data.len()]);
    }

    /// Writes bytes that the caller has checked to be inside; read-only bits stay.
    ///
    /// As in the kernel's VFIO (`vfio_msi_config_write`), the MSI enable bit can be set only
    /// while eventfds take the messages.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, value) in (offset..).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
        if !self.msi_usable {
            self.set_msi_enable(false);
        }
    }

    /// Follows the eventfds: VFIO enables MSI in the device when they are set, and disables it
    /// when they are taken away.
    pub(crate) fn set_msi_usable(&mut self, usable: bool) {
        self.msi_usable = usable;
        self.set_msi_enable(usable);
    }

    fn set_msi_enable(&mut self, enable: bool) {
        if self.has_msi {
            self.set_bits(MSI_CONTROL, MSI_CONTROL_ENABLE, enable);
        }
    }

    pub(crate) fn msi_enabled(&self) -> bool {
        self.has_msi && self.u16(MSI_CONTROL) & MSI_CONTROL_ENABLE != 0
    }

    /// Follows the eventfds.
    pub(crate) fn set_msi_x_enable(&mut self, enable: bool) {
        if self.has_msi_x {
            self.set_bits(MSI_X_CONTROL, MSI_X_CONTROL_ENABLE, enable);
        }
    }

    pub(crate) fn msi_x_enabled(&self) -> bool {
        self.has_msi_x && self.u16(MSI_X_CONTROL) & MSI_X_CONTROL_ENABLE != 0
    }

    pub(crate) fn is_bus_master(&self) -> bool {
        self.u16(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// The interrupt status bit: the device wants attention, whether the line shows it or not.
    pub(crate) fn set_intx_pending(&mut self, pending: bool) {
        self.set_bits(STATUS, STATUS_INTERRUPT, pending);
    }

    /// Whether the line is driven: pending, not disabled, and not replaced by messages.
    pub(crate) fn drives_intx(&self) -> bool {
        let pending = self.u16(STATUS) & STATUS_INTERRUPT != 0;
        let disabled = self.u16(COMMAND) & COMMAND_INTX_DISABLE != 0;
        pending && !disabled && !self.msi_enabled() && !self.msi_x_enabled()
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set_bits(&mut self, at: usize, bits: u16, set: bool) {
        let value = if set { self.u16(at) | bits } else { self.u16(at) & !bits };
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
}

/// Configuration space being laid out.
struct Image {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
}

impl Image {
    fn fixed(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// Puts a capability in front of those that are there.
    fn capability(&mut self, at: usize, id: u8) {
        self.fixed(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.fixed(at, &[id, self.bytes[CAPABILITIES]]);
        self.fixed(CAPABILITIES, &[at as u8]);
    }

    fn changeable(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}
