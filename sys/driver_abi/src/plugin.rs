//! What a plugin exports: plain bytes that are read from its file, and the functions that the host calls.

use std::ffi::c_void;

use crate::{
    CallArguments, ClientMemory, HostAcknowledgement, HostDevice, HostQueue, HostReply, HostTable,
    SessionInfo,
};

/// The exported symbol.
pub const SYMBOL: &str = "iohost_driver";

/// The first eight bytes of a descriptor.
pub const MAGIC: [u8; 8] = *b"IOHOSTDR";

/// What host and plugin must agree on.
pub const ABI_VERSION: u32 = 1;

/// What a plugin exports.
#[repr(C)]
#[derive(Debug)]
pub struct DriverDescriptor {
    /// The part that is read from the file.
    pub header: DescriptorHeader,
    /// The part that is used once the plugin is loaded.
    pub entry: DriverEntry,
    /// More of what is read from the file. It and what follows are there if `header.size` says so.
    pub matching: Matching,
    /// More of what is used once the plugin is loaded.
    pub life_cycle: LifeCycleEntry,
}

/// Bytes of the descriptor of the first plugins, which end with their entry.
pub const FIRST_DESCRIPTOR: usize = std::mem::offset_of!(DriverDescriptor, matching);

/// Plain bytes: how a driver competes with others for a device. A plugin without it has all zeros.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Matching {
    /// Only drivers of one category compete; UTF-8, padded with zeros.
    pub category: [u8; NAME_BYTES],
    /// What each personality is worth beyond how closely it fits.
    pub scores: [i32; MOST_PERSONALITIES],
    /// [`REGISTERS_ITSELF`], or 0.
    pub flags: u64,
}

/// The driver is visible once it says so, and not as soon as it has started.
pub const REGISTERS_ITSELF: u64 = 1;

/// Plain bytes, without a pointer among them: readable without running anything.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DescriptorHeader {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`ABI_VERSION`] of the SDK the plugin was built with.
    pub abi_version: u32,
    /// Bytes of the whole [`DriverDescriptor`].
    pub size: u32,
    /// The driver's name, UTF-8, padded with zeros.
    pub name: [u8; NAME_BYTES],
    /// What built it, for people: SDK and compiler versions, padded with zeros.
    pub built_with: [u8; NAME_BYTES],
    /// Entries of `personalities` that are used.
    pub personality_count: u32,
    /// Not 0: the driver cannot do without interrupts by message, MSI or MSI-X.
    pub needs_messages: u32,
    /// The most memory, in bytes, that the driver has mapped for its device at a time; 0: none.
    pub dma_bytes: u64,
    /// The devices the driver is for; one match is enough.
    pub personalities: [Personality; MOST_PERSONALITIES],
}

/// Bytes of a name in the header.
pub const NAME_BYTES: usize = 64;

/// The most personalities of one driver.
pub const MOST_PERSONALITIES: usize = 16;

/// Devices a driver is for: each dword of configuration space, under its mask, has to be equal.
/// All zeros matches nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Personality {
    /// The dword at 0x00: device id in the upper half, vendor id in the lower.
    pub primary: u32,
    /// Bits of `primary` that count.
    pub primary_mask: u32,
    /// The dword at 0x2C: subsystem ids.
    pub subsystem: u32,
    /// Bits of `subsystem` that count.
    pub subsystem_mask: u32,
    /// The dword at 0x08: class code in the upper 24 bits, revision in the lower 8.
    pub class: u32,
    /// Bits of `class` that count.
    pub class_mask: u32,
}

/// What the host calls. `instance` is what `start` wrote.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DriverEntry {
    /// Starts the driver on a device. `device` and `queue` are borrowed for the call; `queue` is
    /// the default queue, which runs this call.
    pub start: unsafe extern "C" fn(
        host: *const HostTable,
        device: *mut HostDevice,
        queue: *mut HostQueue,
        instance: *mut *mut c_void,
    ) -> i32,
    /// Stops the driver: it quiets its device and cancels its sources.
    pub stop: unsafe extern "C" fn(instance: *mut c_void),
    /// Frees the instance; nothing else is called with it afterwards. Any thread.
    pub release: unsafe extern "C" fn(instance: *mut c_void),
    /// Gives the interface's description to `sink`, once, or not at all when there is none.
    /// Any thread, also before `start`.
    pub describe: unsafe extern "C" fn(
        sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
        context: *mut c_void,
    ),
    /// A client called a method. `reply` is the driver's from here on.
    pub call: unsafe extern "C" fn(
        instance: *mut c_void,
        session: u64,
        selector: u64,
        arguments: *const CallArguments,
        reply: *mut HostReply,
    ),
    /// A client opened a session. The descriptors in `session` are the driver's from here on,
    /// whatever it answers. An error refuses the session.
    pub session_opened:
        unsafe extern "C" fn(instance: *mut c_void, session: *const SessionInfo) -> i32,
    /// A session that the driver accepted is over.
    pub session_closed: unsafe extern "C" fn(instance: *mut c_void, session: u64),
    /// A client wants to map the driver's memory of this type. Writes the memory on success.
    pub copy_client_memory: unsafe extern "C" fn(
        instance: *mut c_void,
        session: u64,
        memory_type: u64,
        memory: *mut ClientMemory,
    ) -> i32,
}

/// What the host calls in the life of a driver beyond [`DriverEntry`], on the driver's default
/// queue, but for `describe_type`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LifeCycleEntry {
    /// The driver is to stop, and has stopped when it acknowledges; `stop` of [`DriverEntry`] is
    /// called after that. Nothing else is called meanwhile but handlers of its own sources.
    pub begin_stop: unsafe extern "C" fn(instance: *mut c_void, owed: *mut HostAcknowledgement),
    /// As `session_opened`, with the kind of client that is wanted.
    pub session_opened_as: unsafe extern "C" fn(
        instance: *mut c_void,
        session: *const SessionInfo,
        client_type: u64,
    ) -> i32,
    /// As `call`, of a session of that kind.
    pub call_as: unsafe extern "C" fn(
        instance: *mut c_void,
        session: u64,
        client_type: u64,
        selector: u64,
        arguments: *const CallArguments,
        reply: *mut HostReply,
    ),
    /// As `describe`, of the interface for clients of that kind. `UNSUPPORTED`: there is no such
    /// kind. Any thread, also before `start`.
    pub describe_type: unsafe extern "C" fn(
        client_type: u64,
        sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
        context: *mut c_void,
    ) -> i32,
    /// The process of a session's client has died with the session open. `session_closed` follows.
    pub client_crashed: unsafe extern "C" fn(instance: *mut c_void, session: u64),
    /// The power state is to be another one, and is when the driver acknowledges: 0 off, 0x10000
    /// low, 2 on.
    pub set_power_state:
        unsafe extern "C" fn(instance: *mut c_void, state: u32, owed: *mut HostAcknowledgement),
    /// The driver is about to be stopped and followed by another version of it: what that one has to
    /// know goes to `sink`, once, and its version is written. `NOT_FOUND` when there is nothing.
    pub save: unsafe extern "C" fn(
        instance: *mut c_void,
        version: *mut u32,
        sink: unsafe extern "C" fn(context: *mut c_void, data: *const u8, len: usize),
        context: *mut c_void,
    ) -> i32,
    /// What the driver before it saved; right after `start`, before the sessions. An error is one of
    /// the start.
    pub restore: unsafe extern "C" fn(
        instance: *mut c_void,
        version: u32,
        data: *const u8,
        len: usize,
    ) -> i32,
}
