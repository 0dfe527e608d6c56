//! Memory that a peer can write: sealed shared memory, and the data-queue ring in it.
//!
//! The peer is another process or a device. Nothing in this crate lends a reference to such
//! memory; every access goes through a method that copies or reads once.

pub mod ring;
mod shared;

pub use shared::{AttachError, SharedMemory, offer};
