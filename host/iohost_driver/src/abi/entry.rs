//! A driver's descriptor, and the functions in it that the host calls.

use std::ffi::c_void;
use std::os::fd::{FromRawFd, OwnedFd};
use std::slice;

use iohost_driver_abi::{
    ABI_VERSION, CallArguments, ClientMemory, DescriptorHeader, DriverDescriptor, DriverEntry,
    HostAcknowledgement, HostDevice, HostQueue, HostReply, HostTable, LifeCycleEntry, MAGIC,
    MOST_PERSONALITIES, Matching, NAME_BYTES, REGISTERS_ITSELF, SessionInfo,
};
use iohost_interface::IOReturn;

use super::Tables;
use super::callback::guarded;
use super::device::Device;
use super::queue::Queue;
use super::service::Acknowledgement;
use super::session::{HostSink, copied};
use crate::service::{ANY_DEVICE, Exported, Instance, OfferedSession, SavedState, SessionEnds};

/// The descriptor of a driver, for `export_driver!`.
pub const fn descriptor<D: Exported>(
    name: &'static str,
    built_with: &'static str,
) -> DriverDescriptor {
    let mut personalities = [ANY_DEVICE; MOST_PERSONALITIES];
    let mut scores = [0; MOST_PERSONALITIES];
    let count = D::PERSONALITIES.len();
    assert!(count > 0, "a driver without a personality matches no device");
    assert!(count <= MOST_PERSONALITIES, "too many personalities");
    let mut index = 0;
    while index < count {
        (personalities[index], scores[index]) = D::PERSONALITIES[index].for_abi();
        index += 1;
    }
    DriverDescriptor {
        header: DescriptorHeader {
            magic: MAGIC,
            abi_version: ABI_VERSION,
            size: size_of::<DriverDescriptor>() as u32,
            name: padded(name),
            built_with: padded(built_with),
            personality_count: count as u32,
            needs_messages: D::NEEDS.messages as u32,
            dma_bytes: D::NEEDS.dma_bytes,
            personalities,
        },
        entry: DriverEntry {
            start: start::<D>,
            stop: stop::<D>,
            release: release::<D>,
            describe: describe::<D>,
            call: call::<D>,
            session_opened: session_opened::<D>,
            session_closed: session_closed::<D>,
            copy_client_memory: copy_client_memory::<D>,
        },
        matching: Matching {
            category: padded(D::MATCH_CATEGORY),
            scores,
            flags: if D::REGISTERS_ITSELF { REGISTERS_ITSELF } else { 0 },
        },
        life_cycle: LifeCycleEntry {
            begin_stop: begin_stop::<D>,
            session_opened_as: session_opened_as::<D>,
            call_as: call_as::<D>,
            describe_type: describe_type::<D>,
            client_crashed: client_crashed::<D>,
            set_power_state: set_power_state::<D>,
            save: save::<D>,
            restore: restore::<D>,
        },
    }
}

const fn padded(text: &str) -> [u8; NAME_BYTES] {
    assert!(text.len() < NAME_BYTES, "a name of at most 63 bytes");
    let mut padded = [0; NAME_BYTES];
    let mut index = 0;
    while index < text.len() {
        padded[index] = text.as_bytes()[index];
        index += 1;
    }
    padded
}

pub(super) unsafe extern "C" fn start<D: Exported>(
    host: *const HostTable,
    device: *mut HostDevice,
    queue: *mut HostQueue,
    instance: *mut *mut c_void,
) -> i32 {
    // SAFETY: contract 1.
    if let Err(status) = unsafe { Tables::set(host) } {
        return status.0;
    }
    // SAFETY: contract 2; both are borrowed for the call, and the wrappers take references.
    let queue = unsafe { Queue::borrowed(queue) };
    // SAFETY: the same.
    let device = unsafe { Device::borrowed(device) };
    let failing = queue.clone();
    match guarded(|| Instance::<D>::start(device, queue)) {
        Ok(Ok(started)) => {
            let started = Box::into_raw(Box::new(started));
            // SAFETY: the host's out-parameter, valid for the call.
            unsafe { instance.write(started.cast()) };
            0
        }
        Ok(Err(err)) => {
            failing.failed(&err.to_string());
            err.code().0
        }
        Err(panic) => {
            failing.failed(&panic);
            IOReturn::INTERNAL_ERROR.0
        }
    }
}

pub(super) unsafe extern "C" fn stop<D: Exported>(instance: *mut c_void) {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    instance.guarded(|| instance.stop());
}

pub(super) unsafe extern "C" fn release<D: Exported>(instance: *mut c_void) {
    // SAFETY: contract 4: made by `start` with `Box::into_raw`, and given back once.
    let instance = unsafe { Box::from_raw(instance.cast::<Instance<D>>()) };
    // A destructor of the driver may panic, and there is no driver left to be failed by it.
    let _ = guarded(move || drop(instance));
}

unsafe extern "C" fn begin_stop<D: Exported>(
    instance: *mut c_void,
    owed: *mut HostAcknowledgement,
) {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    // SAFETY: contract 5: it is ours from here on.
    let owed = unsafe { Acknowledgement::of(owed) };
    instance.guarded(|| instance.begin_stop(owed));
}

unsafe extern "C" fn set_power_state<D: Exported>(
    instance: *mut c_void,
    state: u32,
    owed: *mut HostAcknowledgement,
) {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    // SAFETY: contract 5: it is ours from here on.
    let owed = unsafe { Acknowledgement::of(owed) };
    instance.guarded(|| instance.set_power_state(state, owed));
}

unsafe extern "C" fn client_crashed<D: Exported>(instance: *mut c_void, session: u64) {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    instance.guarded(|| instance.client_crashed(session));
}

unsafe extern "C" fn describe<D: Exported>(
    sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
    context: *mut c_void,
) {
    // SAFETY: the sink is the host's with its context.
    let _ = unsafe { describe_type::<D>(0, sink, context) };
}

unsafe extern "C" fn describe_type<D: Exported>(
    client_type: u64,
    sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
    context: *mut c_void,
) -> i32 {
    match guarded(|| D::description(client_type)) {
        Ok(Some(text)) => {
            // SAFETY: the text lives for the call, and the sink is the host's with its context.
            unsafe { sink(context, text.as_ptr(), text.len()) };
            0
        }
        Ok(None) => IOReturn::UNSUPPORTED.0,
        Err(_) => IOReturn::INTERNAL_ERROR.0,
    }
}

pub(super) unsafe extern "C" fn call<D: Exported>(
    instance: *mut c_void,
    session: u64,
    selector: u64,
    arguments: *const CallArguments,
    reply: *mut HostReply,
) {
    // SAFETY: the same promises.
    unsafe { call_as::<D>(instance, session, 0, selector, arguments, reply) }
}

unsafe extern "C" fn call_as<D: Exported>(
    instance: *mut c_void,
    _session: u64,
    client_type: u64,
    selector: u64,
    arguments: *const CallArguments,
    reply: *mut HostReply,
) {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    // SAFETY: contract 5.
    let mut arguments = unsafe { copied(arguments) };
    // Made first: whatever happens, its drop answers the caller.
    let sink = Box::new(HostSink { reply });
    arguments.actions = sink.passed();
    instance.guarded(|| instance.call(client_type, selector, arguments, sink));
}

pub(super) unsafe extern "C" fn session_opened<D: Exported>(
    instance: *mut c_void,
    session: *const SessionInfo,
) -> i32 {
    // SAFETY: the same promises.
    unsafe { session_opened_as::<D>(instance, session, 0) }
}

unsafe extern "C" fn session_opened_as<D: Exported>(
    instance: *mut c_void,
    session: *const SessionInfo,
    client_type: u64,
) -> i32 {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    // SAFETY: contract 5: valid for the call.
    let session = unsafe { session.read() };
    let queues = match session.queue_count {
        0 => &[][..],
        // SAFETY: contract 5, and not empty, so the pointer is one.
        count => unsafe { slice::from_raw_parts(session.queues, count) },
    };
    // First of all own what was given, so that every way out closes it.
    let owned = |fd| {
        // SAFETY: contract 5: an open descriptor that is ours.
        unsafe { OwnedFd::from_raw_fd(fd) }
    };
    let ends = queues.iter().map(|queue| SessionEnds {
        bytes: queue.bytes,
        memory: owned(queue.memory),
        available: owned(queue.available),
        serviced: owned(queue.serviced),
    });
    let offered = OfferedSession {
        id: session.session,
        client_type,
        generation: session.generation,
        ends: ends.map(Some).collect(),
        ledger: (session.ledger >= 0).then(|| owned(session.ledger)),
    };
    let mut status = IOReturn::INTERNAL_ERROR.0;
    instance.guarded(|| status = instance.session_opened(offered));
    status
}

pub(super) unsafe extern "C" fn session_closed<D: Exported>(instance: *mut c_void, session: u64) {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    instance.guarded(|| instance.session_closed(session));
}

pub(super) unsafe extern "C" fn copy_client_memory<D: Exported>(
    instance: *mut c_void,
    session: u64,
    memory_type: u64,
    memory: *mut ClientMemory,
) -> i32 {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    let mut copied = Err(IOReturn::INTERNAL_ERROR);
    instance.guarded(|| copied = instance.copy_client_memory(session, memory_type));
    match copied {
        Ok(copied) => {
            // SAFETY: the host's out-parameter, valid for the call.
            unsafe { memory.write(copied) };
            0
        }
        Err(status) => status.0,
    }
}

pub(super) unsafe extern "C" fn save<D: Exported>(
    instance: *mut c_void,
    version: *mut u32,
    sink: unsafe extern "C" fn(context: *mut c_void, data: *const u8, len: usize),
    context: *mut c_void,
) -> i32 {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    let mut saved = None;
    instance.guarded(|| saved = instance.save());
    let Some(state) = saved else { return IOReturn::NOT_FOUND.0 };
    // SAFETY: the host's out-parameter, valid for the call.
    unsafe { version.write(state.version) };
    // SAFETY: the data lives for the call, and the sink is the host's with its context.
    unsafe { sink(context, state.data.as_ptr(), state.data.len()) };
    0
}

pub(super) unsafe extern "C" fn restore<D: Exported>(
    instance: *mut c_void,
    version: u32,
    data: *const u8,
    len: usize,
) -> i32 {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    let data = match len {
        0 => Vec::new(),
        // SAFETY: contract 5: bytes of the host's, valid for the call; not empty, so the pointer is one.
        len => unsafe { slice::from_raw_parts(data, len) }.to_vec(),
    };
    let mut status = IOReturn::INTERNAL_ERROR.0;
    instance.guarded(|| status = instance.restore(SavedState { version, data }));
    status
}

impl<D: Exported> Instance<D> {
    /// # Safety
    ///
    /// Contract 4 holds for `instance`, and it is used for the call only.
    unsafe fn of<'a>(instance: *mut c_void) -> &'a Self {
        // SAFETY: made by `start` from a `Box<Instance<D>>` and not yet released; shared
        // references only are ever made from it.
        unsafe { &*instance.cast::<Self>() }
    }

    fn guarded(&self, code: impl FnOnce()) {
        if let Err(panic) = guarded(code) {
            self.queue().failed(&panic);
        }
    }
}
