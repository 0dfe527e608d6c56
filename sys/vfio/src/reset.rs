//! Bringing a device back to its state at power-on.

use std::mem::offset_of;

use log::debug;
use vfio_bindings::bindings::vfio as uapi;

use crate::device::Attachment;
use crate::ioctl::{DeviceCall, Message};
use crate::locked::once_unlocked;
use crate::region::CONFIG_REGION;
use crate::{VfioDevice, VfioError};

/// The command register, and its bit that lets the device start transfers.
///
/// Source: PCI Local Bus Specification 3.0, 6.2.2.
const COMMAND: u64 = 0x04;
const BUS_MASTER: u16 = 0x0004;

/// How a device was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetKind {
    /// This function alone, by whatever the kernel has for that: FLR, power management, its bus
    /// where it is alone there, ...
    Function,
    /// Everything on its bus, all of it in our group.
    Bus,
}

impl VfioDevice {
    /// The ways in which the device can be reset, the gentlest first; none where the kernel knows
    /// none.
    pub fn resets(&self) -> Vec<Reset> {
        let mut resets = Vec::new();
        if self.resets_alone {
            let methods = self.reset_methods.clone();
            resets.push(Reset { kind: ResetKind::Function, methods, affected: Vec::new() });
        }
        if let Ok(affected) = self.affected_by_bus_reset() {
            let affected = affected.into_iter().map(|device| AffectedDevice {
                is_ours: self.owns(&device),
                address: device.address,
            });
            let methods = vec!["hot".to_owned()];
            resets.push(Reset { kind: ResetKind::Bus, methods, affected: affected.collect() });
        }
        resets
    }

    /// Stops interrupts and transfers, then resets the function; where it cannot be reset alone,
    /// its whole bus, provided that everything on it belongs to our group.
    ///
    /// Errors: as [`reset_by`](Self::reset_by).
    pub fn reset(&self) -> Result<ResetKind, VfioError> {
        let kind = if self.resets_alone { ResetKind::Function } else { ResetKind::Bus };
        self.reset_by(kind)?;
        Ok(kind)
    }

    /// Stops interrupts and transfers, then resets the device in this way; its whole bus only if
    /// everything on it belongs to us.
    ///
    /// Configuration space is as before afterwards, but for bus mastering, which is off. Mappings
    /// of regions and of memory stay. Takes up to a second or so, and two more where the kernel works
    /// on the device itself.
    ///
    /// Errors: `NoReset`; `ResetShared` with the devices that are not ours; `Device` and `Access` with what
    /// the kernel said. The device is quiet, unless it was the quieting that failed.
    pub fn reset_by(&self, kind: ResetKind) -> Result<(), VfioError> {
        let mut enabled = self.enabled();
        self.disable(&mut enabled)?;
        self.clear_bus_master()?;
        match kind {
            ResetKind::Function if !self.resets_alone => Err(VfioError::NoReset),
            ResetKind::Function => once_unlocked(|| self.device.reset()).map_err(|source| {
                VfioError::Device { operation: "resetting the function".to_owned(), source }
            }),
            ResetKind::Bus => self.reset_bus(),
        }
    }

    fn clear_bus_master(&self) -> Result<(), VfioError> {
        let mut command = [0; 2];
        self.read(CONFIG_REGION, COMMAND, &mut command)?;
        let quiet = u16::from_le_bytes(command) & !BUS_MASTER;
        self.write(CONFIG_REGION, COMMAND, &quiet.to_le_bytes())
    }

    fn reset_bus(&self) -> Result<(), VfioError> {
        let affected = self.affected_by_bus_reset()?;
        let others: Vec<String> = affected
            .iter()
            .filter(|device| !self.owns(device))
            .map(|device| device.address.clone())
            .collect();
        if !others.is_empty() {
            return Err(VfioError::ResetShared { others });
        }
        debug!(devices:? = affected; "resetting the bus");
        let fixed = size_of::<uapi::vfio_pci_hot_reset>();
        let mut message = Message::with_len(fixed + 4);
        match &self.attachment {
            Attachment::Type1 { group, .. } | Attachment::NoIommu { group, .. } => message
                .set(offset_of!(uapi::vfio_pci_hot_reset, count), 1)
                .set(fixed, group.as_raw_fd() as u32),
            // No descriptor at all: the iommufd that the device is bound to is the proof.
            Attachment::Iommufd { .. } => &mut message,
        };
        let reset = || self.device.call(DeviceCall::HotReset, &mut message);
        once_unlocked(reset).map_err(|source| {
            // Nothing was reset: one of them is in our group and not vfio-pci's (Linux,
            // `vfio_pci_dev_set_hot_reset`), so somebody else may use it.
            if source.raw_os_error() == Some(libc::EINVAL) {
                let own = self.sysfs.file_name().unwrap_or_default();
                let others = affected.iter().map(|device| device.address.clone());
                let others = others.filter(|address| own != address.as_str()).collect();
                return VfioError::ResetShared { others };
            }
            VfioError::Device { operation: "resetting the bus".to_owned(), source }
        })
    }

    /// Whether a device that a reset would reset is ours to reset.
    fn owns(&self, device: &Affected) -> bool {
        /// `VFIO_PCI_DEVID_NOT_OWNED`.
        const NOT_OWNED: u32 = u32::MAX;
        match self.attachment {
            Attachment::Type1 { .. } | Attachment::NoIommu { .. } => device.owner == self.group(),
            Attachment::Iommufd { .. } => device.owner != NOT_OWNED,
        }
    }

    fn affected_by_bus_reset(&self) -> Result<Vec<Affected>, VfioError> {
        let failed = |source| VfioError::Device {
            operation: "asking what a reset of the bus would reset".to_owned(),
            source,
        };
        let fixed = size_of::<uapi::vfio_pci_hot_reset_info>();
        let entry = size_of::<uapi::vfio_pci_dependent_device>();
        // A bus has at most 256 functions, so this is room for all.
        let mut message = Message::with_len(fixed + 256 * entry);
        self.device.call(DeviceCall::GetHotResetInfo, &mut message).map_err(
            |source| match source.raw_os_error() {
                Some(libc::ENODEV) => VfioError::NoReset,
                _ => failed(source),
            },
        )?;
        Ok(affected(&message))
    }
}

/// A way to reset a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reset {
    /// What is reset.
    pub kind: ResetKind,
    /// How, in the kernel's words (`flr`, `pm`, `bus`, ...), in the order in which it tries them.
    pub methods: Vec<String>,
    /// Every device that is reset by it, where that is more than the function.
    pub affected: Vec<AffectedDevice>,
}

/// A device that a reset of the bus resets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AffectedDevice {
    /// Its address.
    pub address: String,
    /// Whether this process has it, so that it may be reset.
    pub is_ours: bool,
}

/// A device that a reset of the bus would reset.
#[derive(Debug, PartialEq, Eq)]
struct Affected {
    /// Its group; with iommufd, its number there, or that it has none.
    owner: u32,
    address: String,
}

fn affected(message: &Message) -> Vec<Affected> {
    let fixed = size_of::<uapi::vfio_pci_hot_reset_info>();
    let entry = size_of::<uapi::vfio_pci_dependent_device>();
    let count = message.u32(offset_of!(uapi::vfio_pci_hot_reset_info, count)) as usize;
    let room = (message.len() - fixed) / entry;
    let entries = (0..count.min(room)).map(|index| {
        let at = fixed + entry * index;
        // Segment in the first two bytes, then bus, then device and function.
        let place = message.u32(at + 4).to_ne_bytes();
        let segment = u16::from_ne_bytes([place[0], place[1]]);
        let [bus, function] = [place[2], place[3]];
        Affected {
            owner: message.u32(at),
            address: format!("{segment:04x}:{bus:02x}:{:02x}.{:x}", function >> 3, function & 7),
        }
    });
    entries.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_devices_on_a_bus_are_named_with_their_owners() {
        let mut message = Message::with_len(12 + 16);
        message.set(8, 2);
        message.set(12, 5).set(16, u32::from_ne_bytes([0, 0, 0x01, 0x00]));
        message.set(20, 6).set(24, u32::from_ne_bytes([1, 0, 0x3a, 0x1f << 3 | 2]));
        let named = [
            Affected { owner: 5, address: "0000:01:00.0".to_owned() },
            Affected { owner: 6, address: "0001:3a:1f.2".to_owned() },
        ];
        assert_eq!(affected(&message), named);
    }

    #[test]
    fn a_count_beyond_the_message_ends_with_the_message() {
        let mut message = Message::with_len(12 + 8);
        message.set(8, 1000);
        assert_eq!(affected(&message).len(), 1);
    }
}
