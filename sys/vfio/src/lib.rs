//! Real PCI devices through the kernel's VFIO.
