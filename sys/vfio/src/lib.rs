//! Real PCI devices through the kernel's VFIO.
//!
//! A [`VfioDevice`] is one PCI function, opened in one of three ways ([`Access`]): its regions,
//! its interrupts, the memory it may reach, its reset. Dropping it closes the device, then what it
//! was attached to; the kernel disarms interrupts and unmaps memory.
//!
//! The container of type 1 and its DMA mapping are those of `vfio-ioctls`. Group, device and
//! iommufd are our own calls: that crate keeps the group's descriptor to itself, which a hot reset needs; it drops the error
//! of `SET_IRQS`, `SET_CONTAINER`, reset and region access; it numbers regions anew when one
//! cannot be read; and dropping its device panics once the device has left sysfs, which is what a
//! removal looks like.
//!
//! Source: Linux, `include/uapi/linux/vfio.h`, `include/uapi/linux/iommufd.h` and
//! `Documentation/driver-api/vfio.rst`.

mod access;
mod capability;
mod cdev;
mod device;
mod dma;
mod error;
mod group;
mod interrupt;
mod ioctl;
mod locked;
mod region;
mod reset;

pub use access::{Access, Nodes};
pub use device::VfioDevice;
pub use error::VfioError;
pub use interrupt::{Event, Interrupt};
pub use region::{CONFIG_REGION, ROM_REGION, Region};
pub use reset::{AffectedDevice, Reset, ResetKind};
