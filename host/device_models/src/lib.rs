//! Emulated devices: in this process, or for others over vfio-user.
//!
//! - A [`DeviceModel`] is what makes a device itself: registers and what they do. [`edu::Edu`] is
//!   one, [`nvme::Nvme`] and [`bells::Bells`] are others.
//! - A [`Function`] is a model in a PCI function: configuration space, the DMA mappings and
//!   interrupts its user set up, timers. A fake backend calls its methods directly.
//! - A [`DeviceServer`] offers a function at a socket, to one client after another.
//!
//! Invariant: a model reaches memory and interrupts through its [`Bus`] alone, and the bus lets
//! through only what was mapped, enabled, and switched on in configuration space. So a driver
//! that forgets to become bus master, or to map its memory, fails here as it fails on hardware.

#![forbid(unsafe_code)]

pub mod bells;
mod config_space;
mod dma;
pub mod edu;
mod faults;
mod function;
mod interrupt;
mod model;
pub mod nvme;
pub mod program;
mod server;

pub use dma::{DmaError, DmaMemory};
pub use faults::Fault;
pub use function::{Function, FunctionError};
pub use interrupt::InterruptKind;
pub use model::{BarSpec, Bus, DeviceModel, Identity, MsiXSpec};
pub use server::{DeviceServer, ServeError, Stopper, serve};
