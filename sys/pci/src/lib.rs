//! PCI functions as sysfs shows them, and binding them to a kernel driver.
//!
//! [`Sysfs`] reads what is there and moves a function to `vfio-pci` and back; [`Former`] is what
//! was there before, so that whoever bound a device can undo it. Every operation that changes
//! something reads back what the kernel did.
//!
//! Source: Linux, `Documentation/ABI/testing/sysfs-bus-pci` and `Documentation/driver-api/vfio.rst`.

mod address;
mod bind;
mod error;
mod hotplug;
mod sysfs;
#[cfg(test)]
mod tree;

pub use address::{AddressError, PciAddress};
pub use bind::{Binding, Former, UIO_PCI_GENERIC, VFIO_PCI};
pub use error::PciError;
pub use hotplug::{Hotplug, HotplugSocket};
pub use sysfs::{GroupMember, IommuGroup, PciFunction, Sysfs};
