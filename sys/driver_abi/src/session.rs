//! Clients: their sessions, calls and memory.

use crate::HostReply;

/// Clients: the table `iohost.session.1`.
#[repr(C)]
#[derive(Debug)]
pub struct SessionTable {
    /// Bytes of this table.
    pub size: u32,
    /// Answers a call, and consumes the reply.
    pub reply:
        unsafe extern "C" fn(reply: *mut HostReply, status: i32, results: *const CallArguments),
    /// Memory that the caller has offered, by the number that it gave it, before the reply is
    /// consumed. `NOT_FOUND`; `NOT_READY` when the caller is gone.
    pub client_memory: unsafe extern "C" fn(
        reply: *const HostReply,
        memory: u64,
        offered: *mut OfferedMemory,
    ) -> i32,
}

/// Memory of a client's, for the driver, which gets the descriptor with it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct OfferedMemory {
    /// The memory file, sealed against changes of its length.
    pub fd: i32,
    /// 1: the driver may read only; 0: it may write too.
    pub options: u32,
    /// Bytes of the file.
    pub len: u64,
}

/// The name of [`SessionTable`].
pub const SESSION: &std::ffi::CStr = c"iohost.session.1";

/// The arguments or results of a call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CallArguments {
    /// The integers.
    pub scalars: *const u64,
    /// How many; at most 16.
    pub scalar_count: usize,
    /// The bytes.
    pub structure: *const u8,
    /// How many; at most 4096.
    pub structure_len: usize,
}

/// A client's session.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SessionInfo {
    /// Its number.
    pub session: u64,
    /// Its data queues, by place.
    pub queues: *const SessionQueue,
    /// How many.
    pub queue_count: usize,
    /// Which driver host this is for the session: 1 for the first, more after each one that died.
    pub generation: u64,
    /// The page that notes exchanges between the queues, given away with it; -1 for none.
    pub ledger: i32,
}

/// A data queue of a session. The descriptors are given away with it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SessionQueue {
    /// Bytes of the ring; the memory has 128 more.
    pub bytes: u32,
    /// The sealed memory file.
    pub memory: i32,
    /// The eventfd that says "data available".
    pub available: i32,
    /// The eventfd that says "data serviced".
    pub serviced: i32,
}

/// Memory for a client. The descriptor is given away with it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ClientMemory {
    /// The sealed memory file, whole.
    pub fd: i32,
    /// 1: the client may read only (`kIOUserClientMemoryReadOnly`); 0: it may write too.
    pub options: u32,
}
