//! Driver for QEMU's `edu` teaching device (PCI 1234:11e8).

#![forbid(unsafe_code)]
