//! Runs a driver in its own test, with a device that is a Rust value.
//!
//! A [`Rig`] is a driver started on an emulated device, in the test's own process: through the
//! same plugin ABI, the same driver host code and the same dispatch engine as in service, but
//! with no threads and with virtual time. Nothing happens until the test says
//! [`settle`](Rig::settle); then everything happens that can.

#![forbid(unsafe_code)]

mod fake_device;
mod rig;

pub use fake_device::{FakeDevice, ResetEffect};
pub use iohost_interface as interface;
pub use rig::{Rig, RigSession};
