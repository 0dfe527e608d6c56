//! A started driver: what the host calls in it.

use std::ffi::c_void;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::slice;

use iohost_driver_abi::{ClientMemory, DriverEntry, LifeCycleEntry, SessionInfo};
use iohost_interface::{Arguments, IOReturn, ReplySink};

use super::service::owed;
use super::session::{ReplyObject, lent};
use crate::power::{Acknowledgement, PowerState};

/// What a driver's `start` made. All but the drop runs on the driver's default queue.
pub(crate) struct Instance {
    pub(super) entry: DriverEntry,
    pub(super) life_cycle: Option<LifeCycleEntry>,
    pub(super) instance: *mut c_void,
}

// SAFETY: the ABI ties the instance's functions to the default queue, not to a thread, and
// `release` to none.
unsafe impl Send for Instance {}

/// A session, to be given to the driver.
#[derive(Debug)]
pub struct NewSession {
    /// Its number.
    pub number: u64,
    /// Which driver host this is for it, from 1.
    pub generation: u64,
    /// Its data queues, by place.
    pub queues: Vec<SessionQueue>,
    /// Where exchanges between them are noted; without, none survives the process.
    pub ledger: Option<OwnedFd>,
}

/// A data queue of a session, to be given to the driver.
#[derive(Debug)]
pub struct SessionQueue {
    /// Bytes of the ring.
    pub bytes: u32,
    /// The memory file.
    pub memory: OwnedFd,
    /// The eventfd that says "data available".
    pub available: OwnedFd,
    /// The eventfd that says "data serviced".
    pub serviced: OwnedFd,
}

impl SessionQueue {
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            bytes: self.bytes,
            memory: self.memory.try_clone()?,
            available: self.available.try_clone()?,
            serviced: self.serviced.try_clone()?,
        })
    }
}

impl Instance {
    /// Has the driver stop; it has when it acknowledges, which may be before this returns. Then
    /// `stop` has to be called.
    pub(crate) fn begin_stop(&self, done: Acknowledgement) {
        if let Some(functions) = self.life_cycle {
            // SAFETY: as in `stop`; the acknowledgement is given away.
            unsafe { (functions.begin_stop)(self.instance, owed(done)) }
        }
    }

    /// Tells the driver of a power state; it acknowledges when it is so. A driver of before there
    /// were any has it at once.
    pub(crate) fn set_power_state(&self, state: PowerState, done: Acknowledgement) {
        if let Some(functions) = self.life_cycle {
            // SAFETY: as in `stop`; the acknowledgement is given away.
            unsafe { (functions.set_power_state)(self.instance, state.flags(), owed(done)) }
        }
    }

    /// The process of a session's client has died.
    pub(crate) fn client_crashed(&self, session: u64) {
        if let Some(functions) = self.life_cycle {
            // SAFETY: as in `stop`.
            unsafe { (functions.client_crashed)(self.instance, session) }
        }
    }

    pub(crate) fn stop(&self) {
        // SAFETY: contract 1, with the instance that `start` made and that is not released.
        unsafe { (self.entry.stop)(self.instance) }
    }

    /// What the next version has to know, with the version of its form.
    pub(crate) fn save(&self) -> Option<(u32, Vec<u8>)> {
        unsafe extern "C" fn sink(context: *mut c_void, data: *const u8, len: usize) {
            // SAFETY: the context is the vector below, which waits for this call.
            let into = unsafe { &mut *context.cast::<Vec<u8>>() };
            if len > 0 {
                // SAFETY: contract 4; not empty, so the pointer is one.
                into.extend_from_slice(unsafe { slice::from_raw_parts(data, len) });
            }
        }
        let functions = self.life_cycle?;
        let (mut version, mut data) = (0, Vec::<u8>::new());
        let context = (&raw mut data).cast();
        // SAFETY: as in `stop`; the place is ours for the call, the sink gets the context it takes.
        let status = unsafe { (functions.save)(self.instance, &raw mut version, sink, context) };
        IOReturn(status).result().ok().map(|()| (version, data))
    }

    /// Gives the driver what the version before it has saved.
    pub(crate) fn restore(&self, version: u32, data: &[u8]) -> Result<(), IOReturn> {
        // One of before there was a state can do without.
        let Some(functions) = self.life_cycle else { return Ok(()) };
        // SAFETY: as in `stop`; the data lives for the call.
        let status =
            unsafe { (functions.restore)(self.instance, version, data.as_ptr(), data.len()) };
        IOReturn(status).result()
    }

    pub(crate) fn call(
        &self,
        session: u64,
        client_type: u64,
        selector: u64,
        arguments: &Arguments,
        sink: Box<dyn ReplySink>,
    ) {
        let passed = arguments.actions.clone();
        let arguments = lent(arguments);
        let reply = Box::into_raw(Box::new(ReplyObject { sink, passed, given: Vec::new() }));
        let (instance, arguments) = (self.instance, &raw const arguments);
        match (client_type, self.life_cycle) {
            // SAFETY: as in `stop`; the arguments live for the call, the reply is given away.
            (1.., Some(functions)) => unsafe {
                let reply = reply.cast();
                (functions.call_as)(instance, session, client_type, selector, arguments, reply);
            },
            // SAFETY: the same.
            _ => unsafe {
                (self.entry.call)(instance, session, selector, arguments, reply.cast());
            },
        }
    }

    pub(crate) fn session_opened(
        &self,
        session: NewSession,
        client_type: u64,
    ) -> Result<(), IOReturn> {
        let queues: Vec<_> = session
            .queues
            .into_iter()
            .map(|queue| iohost_driver_abi::SessionQueue {
                bytes: queue.bytes,
                memory: queue.memory.into_raw_fd(),
                available: queue.available.into_raw_fd(),
                serviced: queue.serviced.into_raw_fd(),
            })
            .collect();
        let info = SessionInfo {
            session: session.number,
            queues: queues.as_ptr(),
            queue_count: queues.len(),
            generation: session.generation,
            ledger: session.ledger.map_or(-1, OwnedFd::into_raw_fd),
        };
        let info = &raw const info;
        let status = match self.life_cycle {
            Some(functions) => {
                // SAFETY: as in `stop`; the info lives for the call, its descriptors are given away.
                unsafe { (functions.session_opened_as)(self.instance, info, client_type) }
            }
            // SAFETY: the same.
            None => unsafe { (self.entry.session_opened)(self.instance, info) },
        };
        IOReturn(status).result()
    }

    pub(crate) fn session_closed(&self, session: u64) {
        // SAFETY: as in `stop`.
        unsafe { (self.entry.session_closed)(self.instance, session) }
    }

    /// A memory file for a client, and whether it may only read.
    pub(crate) fn copy_client_memory(
        &self,
        session: u64,
        memory_type: u64,
    ) -> Result<(OwnedFd, bool), IOReturn> {
        let mut memory = ClientMemory { fd: -1, options: 0 };
        // SAFETY: as in `stop`; the place is ours for the call.
        let status = unsafe {
            (self.entry.copy_client_memory)(self.instance, session, memory_type, &raw mut memory)
        };
        IOReturn(status).result()?;
        if memory.fd < 0 {
            return Err(IOReturn::INTERNAL_ERROR);
        }
        // SAFETY: contract 6.
        let file = unsafe { OwnedFd::from_raw_fd(memory.fd) };
        Ok((file, memory.options & 1 != 0))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: as in `stop`; this is the one release, after which the pointer is gone.
        unsafe { (self.entry.release)(self.instance) }
    }
}
