//! PCI functions as sysfs shows them, and binding them to a kernel driver.
//!
//! [`Sysfs`] reads what is there and moves a function to `vfio-pci` and back; [`Former`] is what
//! was there before, so that whoever bound a device can undo it. [`Binder`] does the same with a
//! note on disk, so that whoever comes after a crash can. [`Use`] is what the machine needs a
//! function for, which is a reason not to take it. Every operation that changes something reads
//! back what the kernel did.
//!
//! Source: Linux, `Documentation/ABI/testing/sysfs-bus-pci` and `Documentation/driver-api/vfio.rst`.

mod address;
mod bind;
mod binder;
mod error;
mod hotplug;
mod in_use;
mod inspect;
mod journal;
mod sysfs;
#[cfg(test)]
mod tree;

pub use address::{AddressError, PciAddress};
pub use bind::{Binding, Former, UIO_PCI_GENERIC, VFIO_PCI};
pub use binder::{Binder, Left, Order};
pub use error::PciError;
pub use hotplug::{Hotplug, HotplugSocket};
pub use in_use::Use;
pub use inspect::{BarMapping, Configuration, PciBar};
pub use journal::Persist;
pub use sysfs::{GroupMember, IommuGroup, PciFunction, Sysfs};
