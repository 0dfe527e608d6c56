//! Runs a driver in its own test, with a device that is a Rust value.
