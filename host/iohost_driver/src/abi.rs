//! The plugin's end of the C ABI: everything that crosses, and nothing else. This file has the
//! host's tables; what is behind them, a file for each kind of object.
//!
//! # The contract this module and those in it rest on
//!
//! The host promises, in `iohost_driver_abi`:
//!
//! 1. Every table it hands out is complete for its version, stays where it is for the life of
//!    the process, and its functions can be called from any thread.
//! 2. An object is alive while we own a reference; `retain` adds one, `release` takes one.
//! 3. A `Work` is called or dropped once; a `Handler` is called by one thread at a time, and
//!    dropped exactly once, last; what a queue was given to keep is dropped once, after the last
//!    call of its work.
//! 4. `start`, `stop`, `call`, `session_opened`, `session_closed`, `copy_client_memory` and the
//!    functions of `LifeCycleEntry` but for `describe_type` run on the default queue, one at a time; `instance` is what our `start` wrote; `release` comes last and once.
//! 5. A pointer and a length given to us are valid for the call; descriptors given to us are
//!    ours.
//! 6. A reply is ours until we answer it. A `DriverAction` that we gave is dropped once, after
//!    the last `invoke`, a `ServiceHandler` after the last `call`; the invocation that came with one is ours until we say that it ended.
//!
//! The wrappers below keep our side: each owns exactly one reference, all are made from what a
//! table returned with status 0, and no reference to foreign memory is kept.

#![expect(unsafe_code)]
// UNSAFETY: the other side of every call here is foreign code.

mod action;
mod callback;
mod device;
mod entry;
mod memory;
mod queue;
mod service;
mod services;
mod session;
mod source;

use std::ffi::CStr;
use std::ptr::NonNull;
use std::slice;
use std::sync::OnceLock;

pub use iohost_driver_abi::DriverDescriptor;
use iohost_driver_abi::{
    ABI_VERSION, ACTION, ActionTable, DEVICE, DISPATCH, DeviceTable, DispatchTable, HostTable,
    SERVICE, SERVICES, SESSION, ServiceTable, ServicesTable, SessionTable,
};
pub(crate) use iohost_driver_abi::{ClientMemory, Personality};
use iohost_interface::IOReturn;

use crate::{logger, panic_place};

pub use self::device::Device;
pub use self::entry::descriptor;
pub use self::memory::Memory;
pub(crate) use self::queue::KeepingQueue;
pub use self::queue::Queue;
pub use self::service::Acknowledgement;
pub(crate) use self::service::Entry;
pub use self::services::Watch;
pub use self::source::{Descriptor, Interrupt, Source, Timer};

/// The host's tables; the same ones for every driver in a process.
struct Tables {
    host: &'static HostTable,
    dispatch: &'static DispatchTable,
    device: &'static DeviceTable,
    session: &'static SessionTable,
    action: &'static ActionTable,
    services: &'static ServicesTable,
    service: &'static ServiceTable,
}

static TABLES: OnceLock<Tables> = OnceLock::new();

impl Tables {
    /// # Safety
    ///
    /// `host` is the table of a host that keeps contract 1.
    unsafe fn set(host: *const HostTable) -> Result<(), IOReturn> {
        // SAFETY: the caller's promise; the table lives for ever.
        let host = unsafe { &*host };
        if host.abi_version != ABI_VERSION {
            return Err(IOReturn::UNSUPPORTED);
        }
        let table = |name: &CStr| {
            // SAFETY: contract 1; the name is a C string that lives for the call.
            NonNull::new(unsafe { (host.extension)(name.as_ptr()) }.cast_mut())
                .ok_or(IOReturn::UNSUPPORTED)
        };
        let (dispatch, device, session) = (table(DISPATCH)?, table(DEVICE)?, table(SESSION)?);
        let (action, services, service) = (table(ACTION)?, table(SERVICES)?, table(SERVICE)?);
        // SAFETY: contract 1: a table of this name is of this type and lives for ever.
        let dispatch = unsafe { dispatch.cast::<DispatchTable>().as_ref() };
        // SAFETY: the same.
        let device = unsafe { device.cast::<DeviceTable>().as_ref() };
        // SAFETY: the same.
        let session = unsafe { session.cast::<SessionTable>().as_ref() };
        // SAFETY: the same.
        let action = unsafe { action.cast::<ActionTable>().as_ref() };
        // SAFETY: the same.
        let services = unsafe { services.cast::<ServicesTable>().as_ref() };
        // SAFETY: the same.
        let service = unsafe { service.cast::<ServiceTable>().as_ref() };
        let _ = TABLES.set(Self { host, dispatch, device, session, action, services, service });
        panic_place::note_from_now_on();
        if host.log.is_some() {
            logger::install();
        }
        Ok(())
    }
}

fn tables() -> &'static Tables {
    TABLES.get().expect("there is no object of the host before `start`")
}

/// Calls a function of a table. Every argument is a value, an object that a wrapper owns, or a
/// pointer to something that lives for the call.
macro_rules! host {
    ($table:ident.$function:ident($($argument:expr),* $(,)?)) => {{
        let function = $crate::abi::tables().$table.$function;
        // SAFETY: contract 1 for the function, contract 2 for the objects (their wrappers own a
        // reference), and the rule above for all other arguments.
        unsafe { function($($argument),*) }
    }};
}
use host;

/// `Ok` for status 0.
fn check(status: i32) -> Result<(), IOReturn> {
    IOReturn(status).result()
}

/// Takes over what a function of the host wrote, if it wrote something.
fn adopt<T>(status: i32, object: *mut T) -> Result<NonNull<T>, IOReturn> {
    check(status)?;
    NonNull::new(object).ok_or(IOReturn::INTERNAL_ERROR)
}

/// Sends a log line to the host.
pub(crate) fn log(level: u32, text: &str) {
    if let Some(log) = tables().host.log {
        // SAFETY: contract 1; the text lives for the call.
        unsafe { log(level, text.as_ptr(), text.len()) }
    }
}

/// One reference to an object of the host. `pub` as the sealed half of `IODispatchSource` names
/// some of them; nobody outside of the crate can.
macro_rules! owned {
    ($(#[$doc:meta])* $name:ident($object:ty) released by $table:ident.$release:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name(pub(super) std::ptr::NonNull<$object>);

        // SAFETY: contract 1: the host takes its objects from any thread.
        unsafe impl Send for $name {}
        // SAFETY: the same.
        unsafe impl Sync for $name {}

        impl Drop for $name {
            fn drop(&mut self) {
                host!($table.$release(self.0.as_ptr()));
            }
        }
    };
}
use owned;

/// # Safety
///
/// Contract 5 holds for `text` and `len`.
unsafe fn text_of(text: *const u8, len: usize) -> String {
    if len == 0 {
        return String::new();
    }
    // SAFETY: the caller's promise, and not empty, so the pointer is one.
    let bytes = unsafe { slice::from_raw_parts(text, len) };
    String::from_utf8_lossy(bytes).into_owned()
}
