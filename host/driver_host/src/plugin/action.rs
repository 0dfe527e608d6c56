//! The table of actions.

use std::sync::Arc;

use iohost_driver_abi::{
    ActionTable, CallArguments, DriverAction, HostAction, HostInvocation, HostReply,
};
use iohost_interface::{ActionTarget, Arguments, Completion, IOReturn, PassedAction};

use super::object::{give, object, released, written};
use super::session::{ReplyObject, copied, lent};

/// What a `HostAction` is.
pub(super) struct ActionObject {
    target: Arc<dyn ActionTarget>,
}

/// A handle to an action of the driver's.
struct DriverTarget(DriverAction);

// SAFETY: contract 5.
unsafe impl Send for DriverTarget {}
// SAFETY: contract 5.
unsafe impl Sync for DriverTarget {}

impl ActionTarget for DriverTarget {
    fn invoke(&self, arguments: Arguments, completion: Completion) -> Result<(), IOReturn> {
        if !arguments.actions.is_empty() {
            return Err(IOReturn::UNSUPPORTED);
        }
        let arguments = lent(&arguments);
        let invocation = Box::into_raw(Box::new(completion)).cast();
        // SAFETY: contract 5; the arguments live for the call, the invocation is given away.
        let status = unsafe { (self.0.invoke)(self.0.context, &raw const arguments, invocation) };
        IOReturn(status).result()
    }
}

impl Drop for DriverTarget {
    fn drop(&mut self) {
        // SAFETY: contract 5; once, and nobody can invoke it any more.
        unsafe { (self.0.drop)(self.0.context) }
    }
}

pub(super) static ACTION_TABLE: ActionTable = ActionTable {
    size: size_of::<ActionTable>() as u32,
    passed: action_passed,
    take: action_take,
    give: action_give,
    invoke: action_invoke,
    release: action_release,
    ended: action_ended,
};

unsafe extern "C" fn action_passed(reply: *const HostReply) -> u64 {
    // SAFETY: contract 2: made by `Instance::call`, not consumed; contract 5: nobody writes it.
    let reply = unsafe { &*reply.cast::<ReplyObject>() };
    reply.passed.iter().fold(0, |bits, action| bits | 1 << action.scalar)
}

unsafe extern "C" fn action_take(
    reply: *mut HostReply,
    scalar: u32,
    action: *mut *mut HostAction,
) -> i32 {
    // SAFETY: contract 2: made by `Instance::call`, not consumed; contract 5: used by us alone.
    let reply = unsafe { &mut *reply.cast::<ReplyObject>() };
    let place = reply.passed.iter().position(|passed| passed.scalar == scalar as usize);
    let target = place.and_then(|place| reply.passed.remove(place).target);
    let taken = target.ok_or(IOReturn::NOT_FOUND);
    // SAFETY: contract 4.
    unsafe { written(action, taken.map(|target| give(ActionObject { target }))) }
}

unsafe extern "C" fn action_give(reply: *mut HostReply, scalar: u32, action: DriverAction) -> i32 {
    let target: Arc<dyn ActionTarget> = Arc::new(DriverTarget(action));
    // SAFETY: contract 2: made by `Instance::call`, not consumed; contract 5: used by us alone.
    let reply = unsafe { &mut *reply.cast::<ReplyObject>() };
    let scalar = scalar as usize;
    let taken = reply.given.iter().any(|given| given.scalar == scalar);
    if taken || scalar >= Arguments::MOST_SCALARS {
        return IOReturn::BAD_ARGUMENT.0;
    }
    reply.given.push(PassedAction { scalar, target: Some(target) });
    0
}

unsafe extern "C" fn action_invoke(
    action: *mut HostAction,
    arguments: *const CallArguments,
) -> i32 {
    // SAFETY: contract 2.
    let action = unsafe { object::<ActionObject>(action) };
    // SAFETY: contract 4.
    let arguments = unsafe { copied(arguments) };
    let invoked =
        arguments.and_then(|arguments| action.target.invoke(arguments, Completion::default()));
    IOReturn::code(&invoked)
}

unsafe extern "C" fn action_release(action: *mut HostAction) {
    // SAFETY: contract 2.
    unsafe { released::<ActionObject>(action) }
}

unsafe extern "C" fn action_ended(invocation: *mut HostInvocation) {
    // SAFETY: contract 2: made by `DriverTarget::invoke`, given back once.
    drop(unsafe { Box::from_raw(invocation.cast::<Completion>()) });
}
