//! The table of what a driver says of itself, and of the services it makes.

use std::ffi::c_void;
use std::sync::Arc;

use iohost_driver_abi::{HostAcknowledgement, HostQueue, ServiceTable};
use iohost_interface::IOReturn;

use super::dispatch::QueueObject;
use super::object::{give, object, text_of, written};
use crate::power::{Acknowledgement, PowerState};

type Sink = unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize);

pub(super) static SERVICE_TABLE: ServiceTable = ServiceTable {
    size: size_of::<ServiceTable>() as u32,
    own,
    provider,
    register,
    create,
    terminate,
    set_name,
    copy_name,
    copy_properties,
    set_properties,
    remove_property,
    search_property,
    adjust_busy,
    busy_state,
    change_power_state,
    acknowledge,
    set_dispatch_queue,
    copy_dispatch_queue,
};

/// Gives an acknowledgement to the plugin, which gives it back with `acknowledge`.
pub(super) fn owed(acknowledgement: Acknowledgement) -> *mut HostAcknowledgement {
    Box::into_raw(Box::new(acknowledgement)).cast()
}

unsafe extern "C" fn acknowledge(owed: *mut HostAcknowledgement) {
    // SAFETY: contract 2: made by `owed`, given back once.
    drop(unsafe { Box::from_raw(owed.cast::<Acknowledgement>()) });
}

/// Gives a text to the plugin, or the status why there is none.
///
/// # Safety
///
/// Contract 4 holds for `sink` and `context`.
unsafe fn told(text: Result<String, IOReturn>, sink: Sink, context: *mut c_void) -> i32 {
    match text {
        Ok(text) => {
            // SAFETY: the caller's promise; the text lives for the call.
            unsafe { sink(context, text.as_ptr(), text.len()) };
            0
        }
        Err(status) => status.0,
    }
}

unsafe extern "C" fn own(queue: *mut HostQueue) -> u64 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    queue.services.registry().own()
}

unsafe extern "C" fn provider(queue: *mut HostQueue, entry: u64, provider: *mut u64) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    unsafe { written(provider, queue.services.registry().provider(entry)) }
}

unsafe extern "C" fn register(queue: *mut HostQueue, entry: u64) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    IOReturn::code(&queue.services.registry().register(entry))
}

unsafe extern "C" fn create(
    queue: *mut HostQueue,
    provider: u64,
    key: *const u8,
    key_len: usize,
    entry: *mut u64,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    let key = unsafe { text_of(key, key_len) };
    // SAFETY: contract 4.
    unsafe { written(entry, queue.services.registry().create(provider, &key)) }
}

unsafe extern "C" fn terminate(queue: *mut HostQueue, entry: u64, options: u32) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    IOReturn::code(&queue.services.registry().terminate(entry, options))
}

unsafe extern "C" fn set_name(
    queue: *mut HostQueue,
    entry: u64,
    name: *const u8,
    name_len: usize,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    let name = unsafe { text_of(name, name_len) };
    IOReturn::code(&queue.services.registry().set_name(entry, &name))
}

unsafe extern "C" fn copy_name(
    queue: *mut HostQueue,
    entry: u64,
    sink: Sink,
    context: *mut c_void,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    unsafe { told(queue.services.registry().name(entry), sink, context) }
}

unsafe extern "C" fn copy_properties(
    queue: *mut HostQueue,
    entry: u64,
    whose: u32,
    sink: Sink,
    context: *mut c_void,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let registry = queue.services.registry();
    let text = match whose {
        0 => registry.properties(entry).map(|own| serde_json::Value::Object(own).to_string()),
        1 => registry.provider_properties(entry).map(|all| {
            serde_json::Value::Array(all.into_iter().map(Into::into).collect()).to_string()
        }),
        _ => Err(IOReturn::BAD_ARGUMENT),
    };
    // SAFETY: contract 4.
    unsafe { told(text, sink, context) }
}

unsafe extern "C" fn set_properties(
    queue: *mut HostQueue,
    entry: u64,
    dictionary: *const u8,
    dictionary_len: usize,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    let dictionary = unsafe { text_of(dictionary, dictionary_len) };
    IOReturn::code(&queue.services.registry().set_properties(entry, &dictionary))
}

unsafe extern "C" fn remove_property(
    queue: *mut HostQueue,
    entry: u64,
    name: *const u8,
    name_len: usize,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    let name = unsafe { text_of(name, name_len) };
    IOReturn::code(&queue.services.registry().remove_property(entry, &name))
}

unsafe extern "C" fn search_property(
    queue: *mut HostQueue,
    entry: u64,
    name: *const u8,
    name_len: usize,
    options: u64,
    sink: Sink,
    context: *mut c_void,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    let name = unsafe { text_of(name, name_len) };
    let found = queue.services.registry().search_property(entry, &name, options);
    // SAFETY: contract 4.
    unsafe { told(found.map(|value| value.to_string()), sink, context) }
}

unsafe extern "C" fn adjust_busy(queue: *mut HostQueue, entry: u64, delta: i32) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    IOReturn::code(&queue.services.registry().adjust_busy(entry, delta))
}

unsafe extern "C" fn busy_state(queue: *mut HostQueue, entry: u64, count: *mut u32) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    unsafe { written(count, queue.services.registry().busy_state(entry)) }
}

unsafe extern "C" fn change_power_state(queue: *mut HostQueue, state: u32) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let state = PowerState::from_flags(state);
    IOReturn::code(&state.map(|state| queue.services.power().change(state, &queue.queue)))
}

unsafe extern "C" fn set_dispatch_queue(
    queue: *mut HostQueue,
    name: *const u8,
    name_len: usize,
    named: *mut HostQueue,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 2.
    let named = unsafe { object::<QueueObject>(named) };
    // SAFETY: contract 4.
    let name = unsafe { text_of(name, name_len) };
    IOReturn::code(&queue.services.registry().set_dispatch_queue(&name, named.queue.clone()))
}

unsafe extern "C" fn copy_dispatch_queue(
    queue: *mut HostQueue,
    name: *const u8,
    name_len: usize,
    named: *mut *mut HostQueue,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    let name = unsafe { text_of(name, name_len) };
    let found = queue.services.registry().copy_dispatch_queue(&name);
    let found = found.map(|found| {
        let services = Arc::clone(&queue.services);
        give(QueueObject { queue: found, services })
    });
    // SAFETY: contract 4.
    unsafe { written(named, found) }
}
