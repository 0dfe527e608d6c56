//! The table of sessions, and arguments of calls.

use std::os::fd::IntoRawFd;
use std::slice;

use iohost_driver_abi::{CallArguments, HostReply, OfferedMemory, SessionTable};
use iohost_interface::{Arguments, IOReturn, PassedAction, ReplySink};

use super::object::written;

/// What a `HostReply` is: owned by the plugin alone, until it is consumed.
pub(super) struct ReplyObject {
    pub(super) sink: Box<dyn ReplySink>,
    /// Actions of the call that the driver has not taken.
    pub(super) passed: Vec<PassedAction>,
    /// Actions of the driver's that go with the results.
    pub(super) given: Vec<PassedAction>,
}

pub(super) static SESSION_TABLE: SessionTable =
    SessionTable { size: size_of::<SessionTable>() as u32, reply, client_memory };

unsafe extern "C" fn client_memory(
    reply: *const HostReply,
    memory: u64,
    offered: *mut OfferedMemory,
) -> i32 {
    // SAFETY: contract 2: made by `Instance::call`, not consumed; contract 5: nobody writes it.
    let reply = unsafe { &*reply.cast::<ReplyObject>() };
    let found = reply.sink.client_memory(memory).map(|found| OfferedMemory {
        len: found.len,
        options: found.read_only.into(),
        fd: found.file.into_raw_fd(),
    });
    // SAFETY: contract 4.
    unsafe { written(offered, found) }
}

unsafe extern "C" fn reply(reply: *mut HostReply, status: i32, results: *const CallArguments) {
    // SAFETY: contract 2: made by `Instance::call`, given back once.
    let reply = unsafe { Box::from_raw(reply.cast::<ReplyObject>()) };
    let ReplyObject { sink, given, .. } = *reply;
    let answer = IOReturn(status).result().and_then(|()| {
        // SAFETY: contract 4.
        let mut results = unsafe { copied(results) }?;
        if given.iter().any(|action| action.scalar >= results.scalars.len()) {
            return Err(IOReturn::BAD_ARGUMENT);
        }
        results.actions = given;
        Ok(results)
    });
    sink.deliver(answer);
}

/// Arguments for the length of a call, without their actions.
pub(super) fn lent(arguments: &Arguments) -> CallArguments {
    CallArguments {
        scalars: arguments.scalars.as_ptr(),
        scalar_count: arguments.scalars.len(),
        structure: arguments.structure.as_ptr(),
        structure_len: arguments.structure.len(),
    }
}

/// # Safety
///
/// Contract 4 holds for `results`.
pub(super) unsafe fn copied(results: *const CallArguments) -> Result<Arguments, IOReturn> {
    // SAFETY: the caller's promise.
    let results = unsafe { results.read() };
    if results.scalar_count > Arguments::MOST_SCALARS {
        return Err(IOReturn::BAD_ARGUMENT);
    }
    if results.structure_len > Arguments::LONGEST_STRUCTURE {
        return Err(IOReturn::MESSAGE_TOO_LARGE);
    }
    let mut arguments = Arguments::default();
    if results.scalar_count > 0 {
        // SAFETY: the caller's promise, and not empty, so the pointer is one.
        let scalars = unsafe { slice::from_raw_parts(results.scalars, results.scalar_count) };
        arguments.scalars = scalars.to_vec();
    }
    if results.structure_len > 0 {
        // SAFETY: the caller's promise, and not empty, so the pointer is one.
        let bytes = unsafe { slice::from_raw_parts(results.structure, results.structure_len) };
        arguments.structure = bytes.to_vec();
    }
    Ok(arguments)
}
