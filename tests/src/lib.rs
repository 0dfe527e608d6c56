//! Whole-system tests. Nothing depends on them.
//!
//! What each file under `tests/` holds: `architecture` the shape of the tree, `processes` the
//! daemon with its driver hosts and clients as separate processes.

#![forbid(unsafe_code)]
