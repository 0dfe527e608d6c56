//! Actions, both ways.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use iohost_driver_abi::{CallArguments, DriverAction, HostAction, HostInvocation};
use iohost_interface::{ActionTarget, Arguments, Completion, IOReturn};

use super::callback::guarded;
use super::session::{copied, lent};
use super::{check, host, owned};

owned! {
    /// A client's action.
    ClientAction(HostAction) released by action.release
}
owned! {
    /// An invocation of one of our actions, which has ended when this is dropped.
    Invocation(HostInvocation) released by action.ended
}

impl ActionTarget for ClientAction {
    fn invoke(&self, arguments: Arguments, _: Completion) -> Result<(), IOReturn> {
        if !arguments.actions.is_empty() {
            return Err(IOReturn::UNSUPPORTED);
        }
        let arguments = lent(&arguments);
        check(host!(action.invoke(self.0.as_ptr(), &raw const arguments)))
    }
}

/// A handle to an action, for the host.
pub(super) fn driver_action(target: Arc<dyn ActionTarget>) -> DriverAction {
    unsafe extern "C" fn invoke(
        context: *const c_void,
        arguments: *const CallArguments,
        invocation: *mut HostInvocation,
    ) -> i32 {
        // SAFETY: contract 6: made below with `Box::into_raw`, not dropped yet; shared
        // references only are ever made from it.
        let target = unsafe { &*context.cast::<Arc<dyn ActionTarget>>() };
        let invocation = NonNull::new(invocation).map(Invocation);
        let completion = Completion::new(move || drop(invocation));
        // SAFETY: contract 5.
        let arguments = unsafe { copied(arguments) };
        match guarded(|| target.invoke(arguments, completion)) {
            Ok(invoked) => IOReturn::code(&invoked),
            Err(_) => IOReturn::INTERNAL_ERROR.0,
        }
    }
    unsafe extern "C" fn drop_context(context: *mut c_void) {
        // SAFETY: contract 6: made below with `Box::into_raw`, and dropped once.
        let target = unsafe { Box::from_raw(context.cast::<Arc<dyn ActionTarget>>()) };
        // The end of the last handle may run the driver's code that something it owned has.
        let _ = guarded(move || drop(target));
    }
    let context = Box::into_raw(Box::new(target)).cast();
    DriverAction { invoke, drop: drop_context, context }
}
