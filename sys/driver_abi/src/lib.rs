//! The C ABI between the driver host and a plugin.
//!
//! A plugin is a shared object that exports one data symbol, [`SYMBOL`], a [`DriverDescriptor`].
//! Its first part is plain bytes: the host reads it from the file before it loads anything.
//! Its second part is the functions the host calls. The host in turn hands the plugin one
//! [`HostTable`] and, through it, named and versioned tables of functions.
//!
//! Rules that hold for every function here:
//!
//! - No panic and no exception crosses the boundary, in either direction.
//! - Strings and slices are a pointer and a length, borrowed for the call.
//! - An object is an opaque pointer. Who gets one owns one reference and gives it back with the
//!   `release` function of its table, once.
//! - A status is an `IOReturn` as `i32`; 0 is success. Out-parameters are written on success only.
//! - A [`Work`] or [`Handler`] given to the host is owned by the host, whatever the status:
//!   `drop` is called exactly once, after the last `call`.
//! - Functions of the host can be called from any thread. Functions of the driver are called on
//!   the driver's default queue, except `describe` and `release`.
//!
//! Versions: [`ABI_VERSION`] changes when something is taken away or changes its meaning. New
//! functions are appended to a table, whose `size` then says whether they are there; new tables
//! get new names.

#![forbid(unsafe_code)]

mod action;
mod device;
mod dispatch;
mod plugin;
mod service;
mod session;
mod work;

use std::ffi::{c_char, c_void};

pub use action::*;
pub use device::*;
pub use dispatch::*;
pub use plugin::*;
pub use service::*;
pub use session::*;
pub use work::*;

/// What the host gives a plugin first.
#[repr(C)]
#[derive(Debug)]
pub struct HostTable {
    /// [`ABI_VERSION`] of the host.
    pub abi_version: u32,
    /// Bytes of this table.
    pub size: u32,
    /// A table by its name, a C string; null when the host has none of that name.
    pub extension: unsafe extern "C" fn(name: *const c_char) -> *const c_void,
    /// Takes a log line. `level` is 1 error to 5 trace. `None`: the plugin is linked into the
    /// host and shares its logger.
    pub log: Option<unsafe extern "C" fn(level: u32, text: *const u8, len: usize)>,
    /// The driver has failed, for a reason that no [`Work`] or [`Handler`] tells.
    pub failed: unsafe extern "C" fn(queue: *mut HostQueue, text: *const u8, len: usize),
    /// A panic was caught inside a [`Work`] or [`Handler`], which got `panic` for that.
    pub panicked: unsafe extern "C" fn(panic: *mut HostPanic, text: *const u8, len: usize),
}

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug)]
        pub struct $name {
            _opaque: [u8; 0],
            _not_send: std::marker::PhantomData<*mut ()>,
        }
    )*};
}

opaque! {
    /// A device of the host.
    HostDevice;
    /// A dispatch queue of the host.
    HostQueue;
    /// An interrupt source.
    HostInterrupt;
    /// A timer source.
    HostTimer;
    /// A source for a descriptor that the plugin owns.
    HostDescriptor;
    /// Memory that a device can be given.
    HostMemory;
    /// An answer that is owed.
    HostReply;
    /// An action of a client's.
    HostAction;
    /// A source of news of services.
    HostWatch;
    /// An acknowledgement that the driver owes.
    HostAcknowledgement;
    /// An invocation of one of the driver's actions.
    HostInvocation;
    /// Where a panic is told, for one call.
    HostPanic;
}
