//! Real PCI devices through the kernel's UIO, by `uio_pci_generic` and sysfs.
//!
//! A [`UioDevice`] is one PCI function: configuration space and BARs are files of its folder in
//! sysfs, its interrupt line is `/dev/uioN`. There is no more: no message-signalled interrupts,
//! no memory mapped for the device, and nothing that keeps a device that is told to from reading
//! and writing the machine's memory. It is for machines and devices that VFIO does not serve.
//!
//! Source: Linux, `drivers/uio/uio_pci_generic.c`, `Documentation/driver-api/uio-howto.rst` and
//! `Documentation/PCI/sysfs-pci.rst`.

#![forbid(unsafe_code)]

mod bar;
mod config;
mod device;
mod error;
mod line;

pub use bar::Bar;
pub use device::UioDevice;
pub use error::UioError;
