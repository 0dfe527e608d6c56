//! What a driver and its clients share: status codes, call arguments, method declarations.
//!
//! This crate has no system call and no `unsafe`; both ends of a session depend on it and on
//! nothing of each other.

#![forbid(unsafe_code)]

mod io_return;

pub use io_return::IOReturn;
