//! Actions, both ways.

use std::ffi::c_void;

use crate::{CallArguments, HostAction, HostInvocation, HostReply};

/// Actions, both ways: the table `iohost.action.1`.
///
/// An action passed with a call or its results stands for one of the scalars. No action is passed
/// with an invocation.
#[repr(C)]
#[derive(Debug)]
pub struct ActionTable {
    /// Bytes of this table.
    pub size: u32,
    /// Which scalars of the call are actions that were not taken yet, a bit for each. Before the
    /// reply is consumed, as `take` and `give`; those three on one thread at a time.
    pub passed: unsafe extern "C" fn(reply: *const HostReply) -> u64,
    /// Takes one of them. `NOT_FOUND` when the scalar is none, or no more.
    pub take: unsafe extern "C" fn(
        reply: *mut HostReply,
        scalar: u32,
        action: *mut *mut HostAction,
    ) -> i32,
    /// Makes a scalar of the results an action of the driver's. The host owns it from here on.
    pub give: unsafe extern "C" fn(reply: *mut HostReply, scalar: u32, action: DriverAction) -> i32,
    /// Invokes a client's action.
    pub invoke:
        unsafe extern "C" fn(action: *mut HostAction, arguments: *const CallArguments) -> i32,
    /// Gives the reference back: nobody in the driver holds the action any more.
    pub release: unsafe extern "C" fn(action: *mut HostAction),
    /// Says that an invocation has ended, or was dropped, and consumes it.
    pub ended: unsafe extern "C" fn(invocation: *mut HostInvocation),
}

/// The name of [`ActionTable`].
pub const ACTION: &std::ffi::CStr = c"iohost.action.1";

/// A handle to an action of the driver's, for the host.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DriverAction {
    /// Has the method run on its queue, later. `invocation` is the driver's, also on failure.
    /// Any thread, several at a time. `BAD_ARGUMENT` when the arguments do not fit.
    pub invoke: unsafe extern "C" fn(
        context: *const c_void,
        arguments: *const CallArguments,
        invocation: *mut HostInvocation,
    ) -> i32,
    /// The last holder outside of the driver is gone; frees the context.
    pub drop: unsafe extern "C" fn(context: *mut c_void),
    /// The plugin's.
    pub context: *mut c_void,
}
