//! Code of the driver that the host runs: wrapped, and its panics caught.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use iohost_driver_abi::{Handler, HostPanic, Work, WorkFunctions, WorkSpace};

use super::host;
use crate::panic_place;

/// Runs code of the driver. A panic becomes its message, with its place.
pub(super) fn guarded<R>(code: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(code)).map_err(|panic: Box<dyn Any + Send>| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        // A payload can be anything, also something that panics when dropped.
        std::mem::forget(panic);
        let text = text.as_deref().unwrap_or("no message");
        match panic_place::take() {
            Some(place) => format!("panicked: {text}, at {place}"),
            None => format!("panicked: {text}"),
        }
    })
}

/// Wraps code that runs once.
pub(super) fn work_of<F: FnOnce() + Send + 'static>(code: F) -> Work {
    /// The code itself, if it fits; else a box with it.
    fn wrap<F: FnOnce() + Send + 'static>(code: F) -> Work {
        assert!(size_of::<F>() <= size_of::<WorkSpace>());
        assert!(align_of::<F>() <= align_of::<WorkSpace>());
        let mut space = WorkSpace::uninit();
        // SAFETY: the assertions above: the space is large and aligned enough, and ours alone.
        unsafe { space.as_mut_ptr().cast::<F>().write(code) };
        Work { functions: &WorkOf::<F>::FUNCTIONS, space }
    }
    if size_of::<F>() <= size_of::<WorkSpace>() && align_of::<F>() <= align_of::<WorkSpace>() {
        wrap(code)
    } else {
        let boxed: Box<dyn FnOnce() + Send> = Box::new(code);
        wrap(boxed)
    }
}

/// The functions of work whose space holds an `F`.
struct WorkOf<F>(F);

impl<F: FnOnce()> WorkOf<F> {
    const FUNCTIONS: WorkFunctions = WorkFunctions { call: Self::call, drop: Self::drop };

    unsafe extern "C" fn call(space: *mut WorkSpace, panic: *mut HostPanic) {
        // SAFETY: contract 3: written by `wrap`, and consumed once; reading moves it out.
        let code = unsafe { space.cast::<F>().read() };
        telling(panic, code);
    }

    unsafe extern "C" fn drop(space: *mut WorkSpace) {
        // SAFETY: as in `call`, of which this is the alternative.
        let code = unsafe { space.cast::<F>().read() };
        let _ = guarded(|| drop(code));
    }
}

/// A completion, or none.
pub(super) fn completion_of(done: Option<impl FnOnce() + Send + 'static>) -> Work {
    match done {
        Some(done) => work_of(done),
        None => Work { functions: ptr::null(), space: WorkSpace::uninit() },
    }
}

/// Wraps code that runs for each event.
pub(super) fn handler_of<F: FnMut(u64, u64) + Send + 'static>(code: F) -> Handler {
    unsafe extern "C" fn call<F: FnMut(u64, u64)>(
        context: *mut c_void,
        first: u64,
        second: u64,
        panic: *mut HostPanic,
    ) {
        // SAFETY: contract 3: made below with `Box::into_raw`, not dropped yet, and used by one
        // thread at a time.
        let code = unsafe { &mut *context.cast::<F>() };
        telling(panic, || code(first, second));
    }
    unsafe extern "C" fn drop<F>(context: *mut c_void) {
        // SAFETY: contract 3: dropped once, after the last call.
        let code = unsafe { Box::from_raw(context.cast::<F>()) };
        let _ = guarded(|| std::mem::drop(code));
    }
    let context = Box::into_raw(Box::new(code)).cast();
    Handler { call: call::<F>, drop: drop::<F>, context }
}

/// Runs code of the driver and tells the host of its panic.
fn telling(panic: *mut HostPanic, code: impl FnOnce()) {
    if let Err(text) = guarded(code) {
        host!(host.panicked(panic, text.as_ptr(), text.len()));
    }
}
