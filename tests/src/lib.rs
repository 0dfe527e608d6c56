//! Whole-system tests. Nothing depends on them.
//!
//! What each file under `tests/` holds: `architecture` the shape of the tree, `processes` the
//! daemon with its driver hosts and clients as separate processes, `hostile_clients` what a
//! client may do wrong, `refusals` what an operator may, `clients`, `event_loops` and
//! `c_client` what a client library offers. [`System`] is what they stand on, but for the first.

#![forbid(unsafe_code)]

mod system;

pub use system::{Emulated, Ended, System, built_files, copy_program, eventually, program};
