//! What a driver says of itself, and other services.

use std::ffi::c_void;

use crate::{HostAcknowledgement, HostQueue, HostWatch};

/// What a driver says of itself, and the services it makes: the table `iohost.service.1`.
///
/// An entry is a service in the registry of the driver's process, by its number; `queue` is any of
/// the driver's queues. Dictionaries and their values are JSON. `NOT_FOUND` for an entry that is
/// not there, or no more.
#[repr(C)]
#[derive(Debug)]
pub struct ServiceTable {
    /// Bytes of this table.
    pub size: u32,
    /// The driver's own entry.
    pub own: unsafe extern "C" fn(queue: *mut HostQueue) -> u64,
    /// The entry that provides for one; the device's is the last. `NOT_FOUND`.
    pub provider:
        unsafe extern "C" fn(queue: *mut HostQueue, entry: u64, provider: *mut u64) -> i32,
    /// Makes an entry visible to clients and other drivers; before the driver has started, once
    /// it has.
    pub register: unsafe extern "C" fn(queue: *mut HostQueue, entry: u64) -> i32,
    /// Makes an entry of the dictionary that `provider` has as the property `key`.
    pub create: unsafe extern "C" fn(
        queue: *mut HostQueue,
        provider: u64,
        key: *const u8,
        key_len: usize,
        entry: *mut u64,
    ) -> i32,
    /// Ends an entry, later. The driver's own: the driver is stopped. `options` is 0.
    pub terminate: unsafe extern "C" fn(queue: *mut HostQueue, entry: u64, options: u32) -> i32,
    /// Gives an entry a name of at most 127 bytes.
    pub set_name: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        name: *const u8,
        name_len: usize,
    ) -> i32,
    /// Gives an entry's name to `sink`. `ERROR` when it has none.
    pub copy_name: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
        context: *mut c_void,
    ) -> i32,
    /// Gives all properties of an entry to `sink`, as a dictionary; with 1 as `whose` an array of
    /// its own and those of its providers, up to the root.
    pub copy_properties: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        whose: u32,
        sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
        context: *mut c_void,
    ) -> i32,
    /// Merges a dictionary into the properties that the driver has set.
    pub set_properties: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        dictionary: *const u8,
        dictionary_len: usize,
    ) -> i32,
    /// Takes back a property that the driver has set.
    pub remove_property: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        name: *const u8,
        name_len: usize,
    ) -> i32,
    /// Gives a property's value to `sink`; option 1: the nearest provider's that has it, else.
    pub search_property: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        name: *const u8,
        name_len: usize,
        options: u64,
        sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
        context: *mut c_void,
    ) -> i32,
    /// Adds to an entry's busy count.
    pub adjust_busy: unsafe extern "C" fn(queue: *mut HostQueue, entry: u64, delta: i32) -> i32,
    /// An entry's busy count: its own and one for each busy entry that it provides for.
    pub busy_state: unsafe extern "C" fn(queue: *mut HostQueue, entry: u64, count: *mut u32) -> i32,
    /// Asks for a power state, as `set_power_state` of [`LifeCycleEntry`](crate::LifeCycleEntry) is then told.
    pub change_power_state: unsafe extern "C" fn(queue: *mut HostQueue, state: u32) -> i32,
    /// Says that what was owed is done, and consumes it. Any thread.
    pub acknowledge: unsafe extern "C" fn(owed: *mut HostAcknowledgement),
    /// Gives a queue a name by which `copy_dispatch_queue` finds it. `BAD_ARGUMENT` for an empty
    /// one, or "Default", whose queue runs the driver already.
    pub set_dispatch_queue: unsafe extern "C" fn(
        queue: *mut HostQueue,
        name: *const u8,
        name_len: usize,
        named: *mut HostQueue,
    ) -> i32,
    /// The queue of that name, "Default" for the one that runs the driver. `NOT_FOUND`; `ERROR`
    /// when the driver has stopped.
    pub copy_dispatch_queue: unsafe extern "C" fn(
        queue: *mut HostQueue,
        name: *const u8,
        name_len: usize,
        named: *mut *mut HostQueue,
    ) -> i32,
}

/// The name of [`ServiceTable`].
pub const SERVICE: &std::ffi::CStr = c"iohost.service.1";

/// Other services: the table `iohost.services.1`.
#[repr(C)]
#[derive(Debug)]
pub struct ServicesTable {
    /// Bytes of this table.
    pub size: u32,
    /// Watches the services of the daemon that runs the driver of `queue`: first those that run
    /// already, then every change. Takes the handler, also on failure.
    pub watch: unsafe extern "C" fn(
        queue: *mut HostQueue,
        handler: ServiceHandler,
        watch: *mut *mut HostWatch,
    ) -> i32,
    /// Gives the reference back, which ends it; a call in progress may still be.
    pub watch_release: unsafe extern "C" fn(watch: *mut HostWatch),
}

/// The name of [`ServicesTable`].
pub const SERVICES: &std::ffi::CStr = c"iohost.services.1";

/// Code of the plugin that hears of services. Called on any thread, one call at a time; it calls
/// no function of [`ServicesTable`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ServiceHandler {
    /// A service began (1) or ended (0).
    pub call: unsafe extern "C" fn(context: *const c_void, began: u32, service: *const ServiceText),
    /// Frees the context.
    pub drop: unsafe extern "C" fn(context: *mut c_void),
    /// The plugin's.
    pub context: *mut c_void,
}

/// A service, for the length of a call. The texts are UTF-8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ServiceText {
    /// Its name.
    pub name: *const u8,
    /// Bytes of it.
    pub name_len: usize,
    /// Its driver's name.
    pub driver: *const u8,
    /// Bytes of it.
    pub driver_len: usize,
    /// The name of its interface; empty for none.
    pub interface: *const u8,
    /// Bytes of it.
    pub interface_len: usize,
}
