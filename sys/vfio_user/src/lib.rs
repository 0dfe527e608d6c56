//! Client side of the vfio-user protocol: a PCI device that another process emulates.
//!
//! [`Client`] connects to a server's socket, learns the device's regions and interrupts, and then
//! does for it what VFIO does for a real device: configuration space, BARs, interrupts as
//! eventfds, DMA mappings, reset.
//!
//! The server is a peer, not a friend. It may lie about sizes, stop in the middle of a message,
//! stall or die; every one of these ends in a [`VfioUserError`] after a bounded wait and with a
//! bounded amount of memory, and after a breach of protocol the connection is closed for good
//! ([`VfioUserError::Gone`]), so that no later answer can be taken for the wrong question.
//!
//! Source for everything on the wire: "vfio-user Protocol Specification", `docs/vfio-user.rst` of
//! libvfio-user and `docs/interop/vfio-user.rst` of QEMU, which is the newer text. Where servers
//! are known to differ from it, the code says so.
//!
//! Not spoken: migration, dirty pages, twin sockets, I/O region descriptors, write-multiple.

mod client;
mod connection;
mod dma;
mod error;
mod region;
mod wire;

pub use client::{Client, Irq, IrqKind, Options};
pub use error::VfioUserError;
pub use region::{CONFIG_REGION, ROM_REGION, Region};
pub use wire::Command;
