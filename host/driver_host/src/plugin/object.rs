//! Objects behind opaque pointers, and what crosses with them.

use std::slice;
use std::sync::Arc;

use iohost_dispatch::{BellSource, TimerSource};
use iohost_driver_abi::{
    HostAction, HostDescriptor, HostDevice, HostInterrupt, HostMemory, HostQueue, HostTimer,
    HostWatch,
};
use iohost_interface::IOReturn;
use iohost_memory::SharedMemory;

use super::action::ActionObject;
use super::dispatch::QueueObject;
use super::interrupt::InterruptObject;
use super::services::ForeignWatcher;
use crate::Device;

/// Which Rust type stands behind an opaque one.
pub(super) trait Object {
    type Opaque;
}

macro_rules! objects {
    ($($object:ty => $opaque:ty;)*) => { $(impl Object for $object { type Opaque = $opaque; })* };
}
objects! {
    QueueObject => HostQueue;
    ActionObject => HostAction;
    ForeignWatcher => HostWatch;
    InterruptObject => HostInterrupt;
    TimerSource => HostTimer;
    BellSource => HostDescriptor;
    Device => HostDevice;
    SharedMemory => HostMemory;
}

/// An object that a plugin may use during one call.
pub(super) struct Lent<T> {
    pub(super) pointer: *const T,
}

impl<T> Lent<T> {
    pub(super) fn of(object: Arc<T>) -> Self {
        Self { pointer: Arc::into_raw(object) }
    }
}

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        // SAFETY: made by `of` from an `Arc`, whose reference this takes back.
        drop(unsafe { Arc::from_raw(self.pointer) });
    }
}

/// Gives a reference to the plugin.
pub(super) fn give<T: Object>(object: T) -> *mut T::Opaque {
    Arc::into_raw(Arc::new(object)).cast_mut().cast()
}

/// The object behind a pointer, for the length of a call.
///
/// # Safety
///
/// Contract 2 holds for `pointer`.
pub(super) unsafe fn object<'a, T: Object>(pointer: *mut T::Opaque) -> &'a T {
    // SAFETY: made by `give` or `Lent::of` from an `Arc<T>`, of which the plugin has a reference.
    unsafe { &*pointer.cast::<T>() }
}

/// One reference more, for us.
///
/// # Safety
///
/// Contract 2 holds for `pointer`.
pub(super) unsafe fn shared<T: Object>(pointer: *mut T::Opaque) -> Arc<T> {
    // SAFETY: as in `object`; the count goes up before anything can go wrong.
    unsafe { Arc::increment_strong_count(pointer.cast::<T>()) };
    // SAFETY: the reference that was just added.
    unsafe { Arc::from_raw(pointer.cast::<T>()) }
}

/// One reference less, of the plugin's.
///
/// # Safety
///
/// Contract 2 holds for `pointer`, which the plugin does not use any more.
pub(super) unsafe fn released<T: Object>(pointer: *mut T::Opaque) {
    // SAFETY: as in `object`; this takes back the reference that was given.
    drop(unsafe { Arc::from_raw(pointer.cast::<T>()) });
}

/// Writes an out-parameter.
///
/// # Safety
///
/// Contract 4 holds for `place`.
pub(super) unsafe fn written<T>(place: *mut T, value: Result<T, IOReturn>) -> i32 {
    match value {
        Ok(value) => {
            // SAFETY: the caller's promise.
            unsafe { place.write(value) };
            0
        }
        Err(status) => status.0,
    }
}

/// # Safety
///
/// Contract 4 holds for `text` and `len`.
pub(super) unsafe fn text_of(text: *const u8, len: usize) -> String {
    if len == 0 {
        return String::new();
    }
    // SAFETY: the caller's promise, and not empty, so the pointer is one.
    let bytes = unsafe { slice::from_raw_parts(text, len) };
    String::from_utf8_lossy(bytes).into_owned()
}
