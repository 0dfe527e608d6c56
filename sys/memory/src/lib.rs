//! Memory that a peer can write: sealed shared memory, and the data-queue ring in it.
//!
//! The peer is another process or a device. Nothing in this crate lends a reference to such
//! memory; every access goes through a method that copies or reads once. [`iova`] keeps account of
//! where a device finds such memory; [`flight_recorder`] is what a process leaves behind in it.

pub mod flight_recorder;
pub mod iova;
pub mod prefetch;
pub mod ring;
mod shared;
mod view;

pub use shared::{AttachError, HUGE_PAGE, SharedMemory, offer, sealed_len};
pub use view::{MemoryView, ViewError};
