//! Calls of clients, and their answers.

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::{ptr, slice};

use iohost_driver_abi::{CallArguments, HostReply, OfferedMemory};
use iohost_interface::{Arguments, ClientFile, IOReturn, PassedAction, ReplySink};

use super::action::{ClientAction, driver_action};
use super::{adopt, check, host};

/// # Safety
///
/// Contract 5 holds for `arguments`.
pub(super) unsafe fn copied(arguments: *const CallArguments) -> Arguments {
    // SAFETY: the caller's promise.
    let arguments = unsafe { arguments.read() };
    let scalars = match arguments.scalar_count {
        0 => &[][..],
        // SAFETY: the caller's promise, and not empty, so the pointer is one.
        count => unsafe { slice::from_raw_parts(arguments.scalars, count) },
    };
    let structure = match arguments.structure_len {
        0 => &[][..],
        // SAFETY: as above.
        len => unsafe { slice::from_raw_parts(arguments.structure, len) },
    };
    Arguments { scalars: scalars.to_vec(), structure: structure.to_vec(), actions: Vec::new() }
}

/// The answer to a call, on its way to the host.
pub(super) struct HostSink {
    pub(super) reply: *mut HostReply,
}

// SAFETY: contract 1: the host takes a reply from any thread.
unsafe impl Send for HostSink {}

impl HostSink {
    fn send(&mut self, answer: Result<Arguments, IOReturn>) {
        let reply = std::mem::replace(&mut self.reply, ptr::null_mut());
        if reply.is_null() {
            return;
        }
        let (status, arguments) = match answer {
            Ok(arguments) => (0, arguments),
            Err(status) => (status.0, Arguments::default()),
        };
        for PassedAction { scalar, target } in &arguments.actions {
            let Some(target) = target else { continue };
            // Refused only for a scalar that does not exist; then the host says so to the caller.
            host!(action.give(reply, *scalar as u32, driver_action(target.clone())));
        }
        let results = lent(&arguments);
        host!(session.reply(reply, status, &raw const results));
    }

    /// Takes the actions of the call that this answers.
    pub(super) fn passed(&self) -> Vec<PassedAction> {
        let bits = host!(action.passed(self.reply));
        let scalars = (0..Arguments::MOST_SCALARS).filter(|scalar| bits >> scalar & 1 == 1);
        scalars.filter_map(|scalar| self.take(scalar)).collect()
    }

    fn take(&self, scalar: usize) -> Option<PassedAction> {
        let mut action = ptr::null_mut();
        let status = host!(action.take(self.reply, scalar as u32, &raw mut action));
        let target = Arc::new(ClientAction(adopt(status, action).ok()?));
        Some(PassedAction { scalar, target: Some(target) })
    }
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

impl ReplySink for HostSink {
    fn deliver(mut self: Box<Self>, answer: Result<Arguments, IOReturn>) {
        self.send(answer);
    }

    fn client_memory(&self, memory: u64) -> Result<ClientFile, IOReturn> {
        let mut offered = OfferedMemory { fd: -1, options: 0, len: 0 };
        check(host!(session.client_memory(self.reply, memory, &raw mut offered)))?;
        // SAFETY: contract of `client_memory`: on success an open descriptor that is ours.
        let file = unsafe { OwnedFd::from_raw_fd(offered.fd) };
        Ok(ClientFile { file, len: offered.len, read_only: offered.options & 1 != 0 })
    }
}

impl Drop for HostSink {
    fn drop(&mut self) {
        self.send(Err(IOReturn::ABORTED));
    }
}
