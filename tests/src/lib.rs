//! Whole-system tests. Nothing depends on them.
//!
//! What each file under `tests/` holds: `architecture` the shape of the tree, `processes` the
//! daemon with its driver hosts and clients as separate processes, `hostile_clients` what a
//! client may do wrong, `refusals` what an operator may. [`System`] is what the latter three
//! stand on.

#![forbid(unsafe_code)]

mod system;

pub use system::{Edu, Ended, System, eventually};
