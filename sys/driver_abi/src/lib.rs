//! The C ABI between the driver host and a plugin.
//!
//! A plugin is a shared object that exports one data symbol, [`SYMBOL`], a [`DriverDescriptor`].
//! Its first part is plain bytes: the host reads it from the file before it loads anything.
//! Its second part is the functions the host calls. The host in turn hands the plugin one
//! [`HostTable`] and, through it, named and versioned tables of functions.
//!
//! Rules that hold for every function here:
//!
//! - No panic and no exception crosses the boundary, in either direction.
//! - Strings and slices are a pointer and a length, borrowed for the call.
//! - An object is an opaque pointer. Who gets one owns one reference and gives it back with the
//!   `release` function of its table, once.
//! - A status is an `IOReturn` as `i32`; 0 is success. Out-parameters are written on success only.
//! - A [`Work`] or [`Handler`] given to the host is owned by the host, whatever the status:
//!   `drop` is called exactly once, after the last `call`.
//! - Functions of the host can be called from any thread. Functions of the driver are called on
//!   the driver's default queue, except `describe` and `release`.
//!
//! Versions: [`ABI_VERSION`] changes when something is taken away or changes its meaning. New
//! functions are appended to a table, whose `size` then says whether they are there; new tables
//! get new names.

#![forbid(unsafe_code)]

use std::ffi::{c_char, c_void};
use std::mem::MaybeUninit;

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

/// Memory for a client. The descriptor is given away with it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ClientMemory {
    /// The sealed memory file, whole.
    pub fd: i32,
    /// 1: the client may read only (`kIOUserClientMemoryReadOnly`); 0: it may write too.
    pub options: u32,
}

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

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug)]
        pub struct $name {
            _opaque: [u8; 0],
            _not_send: std::marker::PhantomData<*mut ()>,
        }
    )*};
}

opaque! {
    /// A device of the host.
    HostDevice;
    /// A dispatch queue of the host.
    HostQueue;
    /// An interrupt source.
    HostInterrupt;
    /// A timer source.
    HostTimer;
    /// A source for a descriptor that the plugin owns.
    HostDescriptor;
    /// Memory that a device can be given.
    HostMemory;
    /// An answer that is owed.
    HostReply;
    /// An action of a client's.
    HostAction;
    /// A source of news of services.
    HostWatch;
    /// An acknowledgement that the driver owes.
    HostAcknowledgement;
    /// An invocation of one of the driver's actions.
    HostInvocation;
    /// Where a panic is told, for one call.
    HostPanic;
}

/// Words of a [`Work`] that are the plugin's.
pub const WORK_WORDS: usize = 5;

/// Where a [`Work`] keeps what it needs; the host moves it as bytes.
pub type WorkSpace = MaybeUninit<[usize; WORK_WORDS]>;

/// Code of the plugin that runs at most once, on any thread.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// What can be done with it. A null pointer: there is no work.
    pub functions: *const WorkFunctions,
    /// The plugin's.
    pub space: WorkSpace,
}

/// The functions of a kind of [`Work`]. Each consumes the space. They stay where they are for the
/// life of the process.
#[repr(C)]
#[derive(Debug)]
pub struct WorkFunctions {
    /// Runs it. When it panicked, `panic` has been told.
    pub call: unsafe extern "C" fn(space: *mut WorkSpace, panic: *mut HostPanic),
    /// Drops it unrun.
    pub drop: unsafe extern "C" fn(space: *mut WorkSpace),
}

/// Code of the plugin that runs for each event, never twice at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Handler {
    /// Runs it. What the two numbers are, the function that takes the handler says. When it
    /// panicked, `panic` has been told.
    pub call:
        unsafe extern "C" fn(context: *mut c_void, first: u64, second: u64, panic: *mut HostPanic),
    /// Frees the context.
    pub drop: unsafe extern "C" fn(context: *mut c_void),
    /// The plugin's.
    pub context: *mut c_void,
}

/// What the host gives a plugin first.
#[repr(C)]
#[derive(Debug)]
pub struct HostTable {
    /// [`ABI_VERSION`] of the host.
    pub abi_version: u32,
    /// Bytes of this table.
    pub size: u32,
    /// A table by its name, a C string; null when the host has none of that name.
    pub extension: unsafe extern "C" fn(name: *const c_char) -> *const c_void,
    /// Takes a log line. `level` is 1 error to 5 trace. `None`: the plugin is linked into the
    /// host and shares its logger.
    pub log: Option<unsafe extern "C" fn(level: u32, text: *const u8, len: usize)>,
    /// The driver has failed, for a reason that no [`Work`] or [`Handler`] tells.
    pub failed: unsafe extern "C" fn(queue: *mut HostQueue, text: *const u8, len: usize),
    /// A panic was caught inside a [`Work`] or [`Handler`], which got `panic` for that.
    pub panicked: unsafe extern "C" fn(panic: *mut HostPanic, text: *const u8, len: usize),
}

/// Queues and sources: the table `iohost.dispatch.1`.
#[repr(C)]
#[derive(Debug)]
pub struct DispatchTable {
    /// Bytes of this table.
    pub size: u32,
    /// Makes a queue on the engine that runs `sibling`, with `kIODispatchQueue…` options and a
    /// priority, which has to be 0.
    pub queue_create: unsafe extern "C" fn(
        sibling: *mut HostQueue,
        name: *const u8,
        name_len: usize,
        options: u64,
        priority: u64,
        queue: *mut *mut HostQueue,
    ) -> i32,
    /// One reference more.
    pub queue_retain: unsafe extern "C" fn(queue: *mut HostQueue),
    /// One reference less.
    pub queue_release: unsafe extern "C" fn(queue: *mut HostQueue),
    /// 1 when the calling thread runs the queue, else 0.
    pub queue_on_queue: unsafe extern "C" fn(queue: *mut HostQueue) -> i32,
    /// Appends work, which is moved out of where it is.
    pub queue_async: unsafe extern "C" fn(queue: *mut HostQueue, work: *const Work),
    /// Runs `call(context)` in its turn, on the calling thread, before it returns.
    pub queue_sync: unsafe extern "C" fn(
        queue: *mut HostQueue,
        call: unsafe extern "C" fn(context: *mut c_void),
        context: *mut c_void,
    ) -> i32,
    /// Has the queue keep a context for as long as any of its work can run; `drop` is called once,
    /// after that.
    pub queue_keep: unsafe extern "C" fn(
        queue: *mut HostQueue,
        context: *mut c_void,
        drop: unsafe extern "C" fn(context: *mut c_void),
    ),
    /// Stops the queue; `done` runs last.
    pub queue_cancel: unsafe extern "C" fn(queue: *mut HostQueue, done: Work),
    /// Makes an interrupt source; its handler gets the count and the time. `index` is the vector
    /// in the low 16 bits and flags above. Takes the handler, also on failure.
    pub interrupt_create: unsafe extern "C" fn(
        device: *mut HostDevice,
        index: u32,
        queue: *mut HostQueue,
        handler: Handler,
        source: *mut *mut HostInterrupt,
    ) -> i32,
    /// Replaces the handler.
    pub interrupt_set_handler:
        unsafe extern "C" fn(source: *mut HostInterrupt, handler: Handler) -> i32,
    /// Enables (1) or disables (0).
    pub interrupt_set_enable:
        unsafe extern "C" fn(source: *mut HostInterrupt, enable: i32, done: Work) -> i32,
    /// Ends the source.
    pub interrupt_cancel: unsafe extern "C" fn(source: *mut HostInterrupt, done: Work),
    /// The undelivered count and the latest time.
    pub interrupt_last:
        unsafe extern "C" fn(source: *mut HostInterrupt, count: *mut u64, time: *mut u64),
    /// Gives the reference back, which ends the source.
    pub interrupt_release: unsafe extern "C" fn(source: *mut HostInterrupt),
    /// Makes a timer; its handler gets the time at which it fired, and 0.
    pub timer_create: unsafe extern "C" fn(
        queue: *mut HostQueue,
        handler: Handler,
        timer: *mut *mut HostTimer,
    ) -> i32,
    /// Replaces the handler.
    pub timer_set_handler: unsafe extern "C" fn(timer: *mut HostTimer, handler: Handler) -> i32,
    /// Arms the timer. `clock` is one of `IOTimerClock`'s numbers.
    pub timer_wake_at:
        unsafe extern "C" fn(timer: *mut HostTimer, clock: u64, deadline: u64, leeway: u64) -> i32,
    /// Enables (1) or disables (0).
    pub timer_set_enable:
        unsafe extern "C" fn(timer: *mut HostTimer, enable: i32, done: Work) -> i32,
    /// Ends the timer.
    pub timer_cancel: unsafe extern "C" fn(timer: *mut HostTimer, done: Work),
    /// Gives the reference back, which ends the timer.
    pub timer_release: unsafe extern "C" fn(timer: *mut HostTimer),
    /// The time on a clock as the queue's timers see it.
    pub clock_now: unsafe extern "C" fn(queue: *mut HostQueue, clock: u64, time: *mut u64) -> i32,
    /// Watches a descriptor, which is duplicated; the handler gets two zeros, on the queue, at
    /// least once after each event.
    pub descriptor_create: unsafe extern "C" fn(
        queue: *mut HostQueue,
        fd: i32,
        handler: Handler,
        source: *mut *mut HostDescriptor,
    ) -> i32,
    /// Has the handler called once more, event or not.
    pub descriptor_nudge: unsafe extern "C" fn(source: *mut HostDescriptor),
    /// Gives the reference back, which ends the source.
    pub descriptor_release: unsafe extern "C" fn(source: *mut HostDescriptor),
    /// Appends work that may run beside other concurrent work.
    pub queue_concurrent: unsafe extern "C" fn(queue: *mut HostQueue, work: Work) -> i32,
    /// Gives the queue up until a wake-up for the event, or until the deadline on a clock (0: none).
    pub queue_sleep:
        unsafe extern "C" fn(queue: *mut HostQueue, event: usize, clock: u64, deadline: u64) -> i32,
    /// Wakes one sleeper of the event, or all (option 1).
    pub queue_wakeup:
        unsafe extern "C" fn(queue: *mut HostQueue, event: usize, options: u64) -> i32,
    /// Runs `call(context)`, which waits: if that keeps a thread of the host, another one takes its
    /// place meanwhile.
    pub queue_blocking: unsafe extern "C" fn(
        queue: *mut HostQueue,
        call: unsafe extern "C" fn(context: *mut c_void),
        context: *mut c_void,
    ),
    /// Gives the names of the queues the calling thread holds to `sink`, one by one, outermost
    /// first.
    pub queue_held: unsafe extern "C" fn(
        queue: *mut HostQueue,
        sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
        context: *mut c_void,
    ),
    /// Makes an interrupt source for an eventfd of the plugin's, which is duplicated and made
    /// non-blocking. `unmask` is another eventfd, raised after each delivery, or -1 for none.
    /// `flags` are those of `interrupt_create`'s index. Takes the handler, also on failure.
    pub interrupt_create_from_eventfd: unsafe extern "C" fn(
        trigger: i32,
        unmask: i32,
        flags: u32,
        queue: *mut HostQueue,
        handler: Handler,
        source: *mut *mut HostInterrupt,
    ) -> i32,
    /// Has what there is delivered; with `wait` 1, waits for a delivery to end instead.
    pub interrupt_check: unsafe extern "C" fn(source: *mut HostInterrupt, wait: i32) -> i32,
    /// The same for a timer.
    pub timer_check: unsafe extern "C" fn(timer: *mut HostTimer, wait: i32) -> i32,
    /// Replaces a descriptor's handler, or removes it (null). 1 if there were events that nobody
    /// could be called for, else 0; a new handler is not called for them.
    pub descriptor_set_handler:
        unsafe extern "C" fn(source: *mut HostDescriptor, handler: *const Handler) -> i32,
    /// Enables (1) or disables (0). A descriptor starts enabled; what comes meanwhile is kept.
    pub descriptor_set_enable:
        unsafe extern "C" fn(source: *mut HostDescriptor, enable: i32, done: Work) -> i32,
    /// Ends the source.
    pub descriptor_cancel: unsafe extern "C" fn(source: *mut HostDescriptor, done: Work),
    /// Has the handler called once more (0), or waits for its next call (1).
    pub descriptor_check: unsafe extern "C" fn(source: *mut HostDescriptor, wait: i32) -> i32,
    /// Says that the work in progress on a queue is getting on.
    pub queue_progress: unsafe extern "C" fn(queue: *mut HostQueue),
}

/// The name of [`DispatchTable`].
pub const DISPATCH: &std::ffi::CStr = c"iohost.dispatch.1";

/// PCI devices and DMA: the table `iohost.device.1`.
#[repr(C)]
#[derive(Debug)]
pub struct DeviceTable {
    /// Bytes of this table.
    pub size: u32,
    /// One reference more.
    pub retain: unsafe extern "C" fn(device: *mut HostDevice),
    /// One reference less.
    pub release: unsafe extern "C" fn(device: *mut HostDevice),
    /// Reads 1, 2 or 4 bytes of configuration space.
    pub config_read: unsafe extern "C" fn(
        device: *mut HostDevice,
        offset: u64,
        width: u32,
        value: *mut u64,
    ) -> i32,
    /// Writes 1, 2 or 4 bytes of configuration space.
    pub config_write:
        unsafe extern "C" fn(device: *mut HostDevice, offset: u64, width: u32, value: u64) -> i32,
    /// Size and kind of a BAR.
    pub bar_info:
        unsafe extern "C" fn(device: *mut HostDevice, bar: u32, info: *mut DeviceBar) -> i32,
    /// Maps `len` bytes of a BAR from `offset`, until the device is closed or its last reference
    /// goes. The address is that of a page and the rest of `offset` in it. `UNSUPPORTED` when the
    /// bytes can only be reached by calls.
    pub bar_map: unsafe extern "C" fn(
        device: *mut HostDevice,
        bar: u32,
        offset: u64,
        len: u64,
        address: *mut *mut u8,
    ) -> i32,
    /// Reads 1, 2, 4 or 8 bytes of a BAR as one access.
    pub bar_read: unsafe extern "C" fn(
        device: *mut HostDevice,
        bar: u32,
        offset: u64,
        width: u32,
        value: *mut u64,
    ) -> i32,
    /// Writes 1, 2, 4 or 8 bytes of a BAR as one access.
    pub bar_write: unsafe extern "C" fn(
        device: *mut HostDevice,
        bar: u32,
        offset: u64,
        width: u32,
        value: u64,
    ) -> i32,
    /// Chooses the kind of interrupt: 1 level, 0x10000 MSI, 0x20000 MSI-X.
    pub configure_interrupts: unsafe extern "C" fn(
        device: *mut HostDevice,
        kind: u32,
        required: u32,
        requested: u32,
    ) -> i32,
    /// The kind of one interrupt: bit 0 level, 0x10000 MSI, 0x30000 MSI-X.
    pub interrupt_type:
        unsafe extern "C" fn(device: *mut HostDevice, index: u32, kind: *mut u64) -> i32,
    /// Resets the device.
    pub reset: unsafe extern "C" fn(device: *mut HostDevice) -> i32,
    /// Makes zeroed memory that a device can be given; option 1: of huge pages. `fd` is the memory
    /// file, which the plugin then owns and maps.
    pub memory_create: unsafe extern "C" fn(
        len: u64,
        options: u32,
        memory: *mut *mut HostMemory,
        fd: *mut i32,
    ) -> i32,
    /// Gives the reference back. Memory that is still prepared stays until it is completed.
    pub memory_release: unsafe extern "C" fn(memory: *mut HostMemory),
    /// Lets the device reach pieces of memory, below `2^address_bits` (0: any), each segment's
    /// address a multiple of `alignment`, a power of two. There is room for as many segments as
    /// there are pieces; `segment_count` is how many were written, at least 1.
    pub dma_prepare: unsafe extern "C" fn(
        device: *mut HostDevice,
        pieces: *const DmaPiece,
        piece_count: usize,
        address_bits: u32,
        alignment: u64,
        segments: *mut DmaSegment,
        segment_count: *mut usize,
    ) -> i32,
    /// Takes back from the device what it was given with the first segment at `address`.
    pub dma_complete: unsafe extern "C" fn(device: *mut HostDevice, address: u64) -> i32,
    /// Resets the device in one way: 0x01 everything on its bus, 0x10 the function alone. `options`
    /// is 0. `BAD_ARGUMENT` for anything else.
    pub reset_by: unsafe extern "C" fn(device: *mut HostDevice, kind: u32, options: u32) -> i32,
    /// Enables the first `count` vectors of the kind that was chosen, and disables the others.
    pub resize_interrupts: unsafe extern "C" fn(device: *mut HostDevice, count: u32) -> i32,
    /// How many interrupts came to nobody so far.
    pub dropped_interrupts: unsafe extern "C" fn(device: *mut HostDevice) -> u64,
    /// Makes an eventfd that the device's events add to, which the plugin then owns: 1 for each
    /// error, 2^16 for each request to give the device back, 2^32 when it is gone.
    pub event_signal: unsafe extern "C" fn(device: *mut HostDevice, fd: *mut i32) -> i32,
    /// Opens a device that was closed; a driver starts with one that is open. All functions but
    /// `retain`, `release` and this one say `NOT_OPEN` of one that is closed.
    pub open: unsafe extern "C" fn(device: *mut HostDevice) -> i32,
    /// Closes the device: interrupts are off, it reaches no memory and answers to nobody. The
    /// plugin uses nothing any more that was mapped of it.
    pub close: unsafe extern "C" fn(device: *mut HostDevice) -> i32,
    /// Where the device is. `NOT_FOUND` for one that is on no bus.
    pub location:
        unsafe extern "C" fn(device: *mut HostDevice, location: *mut DeviceLocation) -> i32,
    /// Keeps what configuration space says, in place of what was kept; option 1: apart from that,
    /// until the device is closed.
    pub save_state: unsafe extern "C" fn(device: *mut HostDevice, options: u32) -> i32,
    /// Writes back what was kept, with the same options, and checks that it is there. `NOT_READY`
    /// when nothing was kept.
    pub restore_state: unsafe extern "C" fn(device: *mut HostDevice, options: u32) -> i32,
    /// Makes memory that a device can be given of a sealed file of `len` bytes, which stays the
    /// plugin's; option 1: for reading only.
    pub memory_attach:
        unsafe extern "C" fn(fd: i32, len: u64, options: u32, memory: *mut *mut HostMemory) -> i32,
}

/// Where a device is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceLocation {
    /// The bus, 0 to 255.
    pub bus: u32,
    /// The device, 0 to 31.
    pub device: u32,
    /// The function, 0 to 7.
    pub function: u32,
}

/// Bytes of memory that a device is to reach.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DmaPiece {
    /// The memory.
    pub memory: *mut HostMemory,
    /// The first byte.
    pub offset: u64,
    /// How many; not 0.
    pub len: u64,
}

/// Where a device finds memory, in order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaSegment {
    /// The address of the first byte, as the device sees it.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// The name of [`DeviceTable`].
pub const DEVICE: &std::ffi::CStr = c"iohost.device.1";

/// A BAR, as `bar_info` reports it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceBar {
    /// Bytes.
    pub size: u64,
    /// The type bits of the register.
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
}

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

/// What a driver says of itself, and the services it makes: the table `iohost.service.1`.
///
/// An entry is a service in the registry of the driver's process, by its number; `queue` is any of
/// the driver's queues. Dictionaries and their values are JSON. `NOT_FOUND` for an entry that is
/// not there, or no more.
#[repr(C)]
#[derive(Debug)]
pub struct ServiceTable {
    /// Bytes of this table.
    pub size: u32,
    /// The driver's own entry.
    pub own: unsafe extern "C" fn(queue: *mut HostQueue) -> u64,
    /// The entry that provides for one; the device's is the last. `NOT_FOUND`.
    pub provider:
        unsafe extern "C" fn(queue: *mut HostQueue, entry: u64, provider: *mut u64) -> i32,
    /// Makes an entry visible to clients and other drivers; before the driver has started, once
    /// it has.
    pub register: unsafe extern "C" fn(queue: *mut HostQueue, entry: u64) -> i32,
    /// Makes an entry of the dictionary that `provider` has as the property `key`.
    pub create: unsafe extern "C" fn(
        queue: *mut HostQueue,
        provider: u64,
        key: *const u8,
        key_len: usize,
        entry: *mut u64,
    ) -> i32,
    /// Ends an entry, later. The driver's own: the driver is stopped. `options` is 0.
    pub terminate: unsafe extern "C" fn(queue: *mut HostQueue, entry: u64, options: u32) -> i32,
    /// Gives an entry a name of at most 127 bytes.
    pub set_name: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        name: *const u8,
        name_len: usize,
    ) -> i32,
    /// Gives an entry's name to `sink`. `ERROR` when it has none.
    pub copy_name: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
        context: *mut c_void,
    ) -> i32,
    /// Gives all properties of an entry to `sink`, as a dictionary; with 1 as `whose` an array of
    /// its own and those of its providers, up to the root.
    pub copy_properties: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        whose: u32,
        sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
        context: *mut c_void,
    ) -> i32,
    /// Merges a dictionary into the properties that the driver has set.
    pub set_properties: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        dictionary: *const u8,
        dictionary_len: usize,
    ) -> i32,
    /// Takes back a property that the driver has set.
    pub remove_property: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        name: *const u8,
        name_len: usize,
    ) -> i32,
    /// Gives a property's value to `sink`; option 1: the nearest provider's that has it, else.
    pub search_property: unsafe extern "C" fn(
        queue: *mut HostQueue,
        entry: u64,
        name: *const u8,
        name_len: usize,
        options: u64,
        sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
        context: *mut c_void,
    ) -> i32,
    /// Adds to an entry's busy count.
    pub adjust_busy: unsafe extern "C" fn(queue: *mut HostQueue, entry: u64, delta: i32) -> i32,
    /// An entry's busy count: its own and one for each busy entry that it provides for.
    pub busy_state: unsafe extern "C" fn(queue: *mut HostQueue, entry: u64, count: *mut u32) -> i32,
    /// Asks for a power state, as `set_power_state` of [`LifeCycleEntry`] is then told.
    pub change_power_state: unsafe extern "C" fn(queue: *mut HostQueue, state: u32) -> i32,
    /// Says that what was owed is done, and consumes it. Any thread.
    pub acknowledge: unsafe extern "C" fn(owed: *mut HostAcknowledgement),
    /// Gives a queue a name by which `copy_dispatch_queue` finds it. `BAD_ARGUMENT` for an empty
    /// one, or "Default", whose queue runs the driver already.
    pub set_dispatch_queue: unsafe extern "C" fn(
        queue: *mut HostQueue,
        name: *const u8,
        name_len: usize,
        named: *mut HostQueue,
    ) -> i32,
    /// The queue of that name, "Default" for the one that runs the driver. `NOT_FOUND`; `ERROR`
    /// when the driver has stopped.
    pub copy_dispatch_queue: unsafe extern "C" fn(
        queue: *mut HostQueue,
        name: *const u8,
        name_len: usize,
        named: *mut *mut HostQueue,
    ) -> i32,
}

/// The name of [`ServiceTable`].
pub const SERVICE: &std::ffi::CStr = c"iohost.service.1";

/// Other services: the table `iohost.services.1`.
#[repr(C)]
#[derive(Debug)]
pub struct ServicesTable {
    /// Bytes of this table.
    pub size: u32,
    /// Watches the services of the daemon that runs the driver of `queue`: first those that run
    /// already, then every change. Takes the handler, also on failure.
    pub watch: unsafe extern "C" fn(
        queue: *mut HostQueue,
        handler: ServiceHandler,
        watch: *mut *mut HostWatch,
    ) -> i32,
    /// Gives the reference back, which ends it; a call in progress may still be.
    pub watch_release: unsafe extern "C" fn(watch: *mut HostWatch),
}

/// The name of [`ServicesTable`].
pub const SERVICES: &std::ffi::CStr = c"iohost.services.1";

/// Code of the plugin that hears of services. Called on any thread, one call at a time; it calls
/// no function of [`ServicesTable`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ServiceHandler {
    /// A service began (1) or ended (0).
    pub call: unsafe extern "C" fn(context: *const c_void, began: u32, service: *const ServiceText),
    /// Frees the context.
    pub drop: unsafe extern "C" fn(context: *mut c_void),
    /// The plugin's.
    pub context: *mut c_void,
}

/// A service, for the length of a call. The texts are UTF-8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ServiceText {
    /// Its name.
    pub name: *const u8,
    /// Bytes of it.
    pub name_len: usize,
    /// Its driver's name.
    pub driver: *const u8,
    /// Bytes of it.
    pub driver_len: usize,
    /// The name of its interface; empty for none.
    pub interface: *const u8,
    /// Bytes of it.
    pub interface_len: usize,
}
