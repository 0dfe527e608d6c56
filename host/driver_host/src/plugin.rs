//! The host's end of the C ABI: plugins, the objects they hold, the tables they call.
//!
//! # The contract this module rests on
//!
//! A plugin is trusted not to break its process, as any code in it must be; it is loaded into a
//! process that has one device and nothing else. What it promises, in `iohost_driver_abi`:
//!
//! 1. Its descriptor is a `DriverDescriptor` of our ABI version (read from the file before it is
//!    loaded), and stays where it is while the library is loaded.
//! 2. An object it passes is one that we gave it and that it has not released.
//! 3. `Work` and `Handler` hold functions that take their space or context, from any thread; so
//!    does what a queue is given to keep. A work's functions stay for ever, as the plugin does.
//! 4. Pointers it passes are valid for the call; out-parameters can be written.
//! 5. It uses a reply on one thread at a time. `DriverAction` holds functions that take their
//!    context from any thread, `invoke` also several at a time, `drop` last; so does
//!    `ServiceHandler`.
//! 6. A descriptor that it gives away is open, and ours from there on.
//!
//! Our side: objects are `Arc`s turned into pointers, so each release is matched; a context is
//! dropped exactly once because a Rust value with a `Drop` owns it; a panic in a function of a
//! table ends the process, since `extern "C"` lets none through.

#![expect(unsafe_code)]
// UNSAFETY: the other side of every call here is foreign code.

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::panic::resume_unwind;
use std::path::Path;
use std::ptr;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::AcqRel};

use iohost_control::host::RunningService;
use iohost_device_backend::InterruptKind;
use iohost_dispatch::{
    BellSource, Block, Clock, InterruptEvent, InterruptLine, InterruptSource, Queue, QueueOptions,
    Signal, TimerSource,
};
use iohost_driver_abi::{
    ABI_VERSION, ACTION, ActionTable, CallArguments, ClientMemory, DEVICE, DISPATCH, DeviceBar,
    DeviceTable, DispatchTable, DriverAction, DriverDescriptor, DriverEntry, Handler, HostAction,
    HostDescriptor, HostDevice, HostInterrupt, HostInvocation, HostMemory, HostPanic, HostQueue,
    HostReply, HostTable, HostTimer, HostWatch, SERVICES, SESSION, SYMBOL, ServiceHandler,
    ServiceText, ServicesTable, SessionInfo, SessionTable, Work,
};
use iohost_interface::{ActionTarget, Arguments, Completion, IOReturn, PassedAction, ReplySink};
use iohost_memory::SharedMemory;
use log::{Level, error};

use crate::Device;
use crate::device::refused;
use crate::services::{Services, Watcher};

/// `kIODispatchQueueReentrant` and `kIODispatchQueueMethodsNotSynchronized`, which Apple does not
/// document: by its name, calls on such a queue are not serialised, so it is a reentrant queue here.
const REENTRANT: u64 = 0x1;
const METHODS_NOT_SYNCHRONIZED: u64 = 0x2;

/// `kIODispatchQueueWakeupAll`.
const WAKEUP_ALL: u64 = 0x1;

/// The bits of an interrupt source's index that are the index, and the flag above them that asks
/// for continuous time (`kIOInterruptSourceContinuousTime`).
const INDEX_MASK: u32 = 0xffff;
const CONTINUOUS_TIME: u32 = 0x1_0000;

/// A driver's code: a loaded file, or a driver that is linked in.
#[derive(Clone)]
pub struct Plugin {
    descriptor: &'static DriverDescriptor,
    host: &'static HostTable,
}

/// A plugin file in memory. It is never unloaded: a driver's code must stay as long as any thread
/// may run it, and that is known to end with the process only.
#[derive(Debug)]
pub struct LoadedPlugin;

impl LoadedPlugin {
    /// Loads a file that [`plugin_file::inspect`](crate::plugin_file::inspect) has accepted. Its
    /// initialisers run here, with the rights this process has left.
    pub fn load(path: &Path) -> Result<Plugin, libloading::Error> {
        // SAFETY: contract: the file is a plugin, trusted with this process.
        let library = unsafe { libloading::Library::new(path) }?;
        // SAFETY: contract 1: the symbol is data of this type.
        let descriptor = unsafe { library.get::<*const DriverDescriptor>(SYMBOL) }?;
        // The symbol's address is the descriptor's; see `Symbol`'s deref.
        let descriptor = (*descriptor).cast::<DriverDescriptor>();
        std::mem::forget(library);
        // SAFETY: contract 1, and the library was just kept for ever.
        let descriptor = unsafe { &*descriptor };
        Ok(Plugin { descriptor, host: &HOST_FOR_FILES })
    }
}

impl Plugin {
    /// A driver that is part of this program, as a test has it.
    pub fn linked(descriptor: &'static DriverDescriptor) -> Self {
        Self { descriptor, host: &HOST_FOR_LINKED }
    }

    pub(crate) fn name(&self) -> String {
        let name = &self.descriptor.header.name;
        let len = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        String::from_utf8_lossy(&name[..len]).into_owned()
    }

    /// The interface's description; empty without one.
    pub(crate) fn describe(&self) -> String {
        unsafe extern "C" fn sink(context: *mut c_void, text: *const u8, len: usize) {
            // SAFETY: the context is the string below, which waits for this call.
            let into = unsafe { &mut *context.cast::<String>() };
            // SAFETY: contract 4.
            *into = unsafe { text_of(text, len) };
        }
        let mut text = String::new();
        // SAFETY: contract 1; the sink gets the context it takes.
        unsafe { (self.descriptor.entry.describe)(sink, (&raw mut text).cast()) };
        text
    }

    /// Calls the driver's `start`. Runs on `queue`.
    pub(crate) fn start(
        &self,
        queue: &Queue,
        services: &Arc<Services>,
        device: Arc<Device>,
    ) -> Result<Instance, IOReturn> {
        let queue = QueueObject { queue: queue.clone(), services: services.clone() };
        let queue = Arc::new(queue);
        let (queue, device) = (Lent::of(queue), Lent::of(device));
        let mut instance = ptr::null_mut();
        // SAFETY: contract 1; both objects are lent for the call, the table is for ever.
        let status = unsafe {
            (self.descriptor.entry.start)(
                self.host,
                device.pointer.cast_mut().cast(),
                queue.pointer.cast_mut().cast(),
                &raw mut instance,
            )
        };
        IOReturn(status).result()?;
        Ok(Instance { entry: self.descriptor.entry, instance })
    }
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Plugin").field(&self.name()).finish()
    }
}

/// What a driver's `start` made. All but the drop runs on the driver's default queue.
pub(crate) struct Instance {
    entry: DriverEntry,
    instance: *mut c_void,
}

// SAFETY: the ABI ties the instance's functions to the default queue, not to a thread, and
// `release` to none.
unsafe impl Send for Instance {}

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

impl Instance {
    pub(crate) fn stop(&self) {
        // SAFETY: contract 1, with the instance that `start` made and that is not released.
        unsafe { (self.entry.stop)(self.instance) }
    }

    pub(crate) fn call(
        &self,
        session: u64,
        selector: u64,
        arguments: &Arguments,
        sink: Box<dyn ReplySink>,
    ) {
        let passed = arguments.actions.clone();
        let arguments = lent(arguments);
        let reply = Box::into_raw(Box::new(ReplyObject { sink, passed, given: Vec::new() }));
        // SAFETY: as in `stop`; the arguments live for the call, the reply is given away.
        unsafe {
            (self.entry.call)(self.instance, session, selector, &raw const arguments, reply.cast());
        }
    }

    pub(crate) fn session_opened(
        &self,
        session: u64,
        queues: Vec<SessionQueue>,
    ) -> Result<(), IOReturn> {
        let queues: Vec<_> = queues
            .into_iter()
            .map(|queue| iohost_driver_abi::SessionQueue {
                bytes: queue.bytes,
                memory: queue.memory.into_raw_fd(),
                available: queue.available.into_raw_fd(),
                serviced: queue.serviced.into_raw_fd(),
            })
            .collect();
        let info = SessionInfo { session, queues: queues.as_ptr(), queue_count: queues.len() };
        // SAFETY: as in `stop`; the info lives for the call, its descriptors are given away.
        let status = unsafe { (self.entry.session_opened)(self.instance, &raw const info) };
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

/// Arguments for the length of a call, without their actions.
fn lent(arguments: &Arguments) -> CallArguments {
    CallArguments {
        scalars: arguments.scalars.as_ptr(),
        scalar_count: arguments.scalars.len(),
        structure: arguments.structure.as_ptr(),
        structure_len: arguments.structure.len(),
    }
}

// ---- Objects ----

/// What a `HostReply` is: owned by the plugin alone, until it is consumed.
struct ReplyObject {
    sink: Box<dyn ReplySink>,
    /// Actions of the call that the driver has not taken.
    passed: Vec<PassedAction>,
    /// Actions of the driver's that go with the results.
    given: Vec<PassedAction>,
}

/// What a `HostAction` is.
struct ActionObject {
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

/// What a `HostQueue` is.
struct QueueObject {
    queue: Queue,
    services: Arc<Services>,
}

/// What a `HostWatch` is: code of the plugin that hears of services.
struct ForeignWatcher(ServiceHandler);

// SAFETY: contract 5, which holds for this handler too.
unsafe impl Send for ForeignWatcher {}
// SAFETY: the same.
unsafe impl Sync for ForeignWatcher {}

impl ForeignWatcher {
    fn tell(&self, began: u32, service: &RunningService) {
        let RunningService { name, driver, interface, .. } = service;
        let text = ServiceText {
            name: name.as_ptr(),
            name_len: name.len(),
            driver: driver.as_ptr(),
            driver_len: driver.len(),
            interface: interface.as_ptr(),
            interface_len: interface.len(),
        };
        // SAFETY: contract 5; the texts live for the call.
        unsafe { (self.0.call)(self.0.context, began, &raw const text) }
    }
}

impl Watcher for ForeignWatcher {
    fn began(&self, service: &RunningService) {
        self.tell(1, service);
    }

    fn ended(&self, service: &RunningService) {
        self.tell(0, service);
    }
}

impl Drop for ForeignWatcher {
    fn drop(&mut self) {
        // SAFETY: contract 5; once, and after the last call, which borrowed `self`.
        unsafe { (self.0.drop)(self.0.context) }
    }
}

/// What a `HostInterrupt` is.
struct InterruptObject {
    source: InterruptSource,
    /// Where it comes from; `None` for an eventfd of the plugin's.
    vector: Option<TakenVector>,
}

/// A vector of a device, which is given back once.
struct TakenVector {
    device: Arc<Device>,
    vector: u32,
    given_back: AtomicBool,
}

impl TakenVector {
    fn give_back(&self) {
        if !self.given_back.swap(true, AcqRel) {
            self.device.give_back_interrupt(self.vector);
        }
    }
}

impl Drop for TakenVector {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl Drop for InterruptObject {
    fn drop(&mut self) {
        self.source.cancel(None);
    }
}

/// Which Rust type stands behind an opaque one.
trait Object {
    type Opaque;
}

macro_rules! objects {
    ($($object:ty => $opaque:ty;)*) => { $(impl Object for $object { type Opaque = $opaque; })* };
}
objects! {
    QueueObject => HostQueue;
    ActionObject => HostAction;
    ForeignWatcher => HostWatch;
    InterruptObject => HostInterrupt;
    TimerSource => HostTimer;
    BellSource => HostDescriptor;
    Device => HostDevice;
    SharedMemory => HostMemory;
}

/// An object that a plugin may use during one call.
struct Lent<T> {
    pointer: *const T,
}

impl<T> Lent<T> {
    fn of(object: Arc<T>) -> Self {
        Self { pointer: Arc::into_raw(object) }
    }
}

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        // SAFETY: made by `of` from an `Arc`, whose reference this takes back.
        drop(unsafe { Arc::from_raw(self.pointer) });
    }
}

/// Gives a reference to the plugin.
fn give<T: Object>(object: T) -> *mut T::Opaque {
    Arc::into_raw(Arc::new(object)).cast_mut().cast()
}

/// The object behind a pointer, for the length of a call.
///
/// # Safety
///
/// Contract 2 holds for `pointer`.
unsafe fn object<'a, T: Object>(pointer: *mut T::Opaque) -> &'a T {
    // SAFETY: made by `give` or `Lent::of` from an `Arc<T>`, of which the plugin has a reference.
    unsafe { &*pointer.cast::<T>() }
}

/// One reference more, for us.
///
/// # Safety
///
/// Contract 2 holds for `pointer`.
unsafe fn shared<T: Object>(pointer: *mut T::Opaque) -> Arc<T> {
    // SAFETY: as in `object`; the count goes up before anything can go wrong.
    unsafe { Arc::increment_strong_count(pointer.cast::<T>()) };
    // SAFETY: the reference that was just added.
    unsafe { Arc::from_raw(pointer.cast::<T>()) }
}

/// One reference less, of the plugin's.
///
/// # Safety
///
/// Contract 2 holds for `pointer`, which the plugin does not use any more.
unsafe fn released<T: Object>(pointer: *mut T::Opaque) {
    // SAFETY: as in `object`; this takes back the reference that was given.
    drop(unsafe { Arc::from_raw(pointer.cast::<T>()) });
}

/// Writes an out-parameter.
///
/// # Safety
///
/// Contract 4 holds for `place`.
unsafe fn written<T>(place: *mut T, value: Result<T, IOReturn>) -> i32 {
    match value {
        Ok(value) => {
            // SAFETY: the caller's promise.
            unsafe { place.write(value) };
            0
        }
        Err(status) => status.0,
    }
}

/// # Safety
///
/// Contract 4 holds for `text` and `len`.
unsafe fn text_of(text: *const u8, len: usize) -> String {
    if len == 0 {
        return String::new();
    }
    // SAFETY: the caller's promise, and not empty, so the pointer is one.
    let bytes = unsafe { slice::from_raw_parts(text, len) };
    String::from_utf8_lossy(bytes).into_owned()
}

/// Code of the plugin that runs at most once.
struct ForeignWork(Work);

// SAFETY: contract 3.
unsafe impl Send for ForeignWork {}

impl ForeignWork {
    /// `None` where the plugin gave no work.
    fn block(work: Work) -> Option<Block> {
        let foreign = Self(work);
        (!foreign.0.functions.is_null()).then(|| Box::new(move || foreign.run()) as Block)
    }

    fn run(self) {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: contract 3.
        let Some(functions) = (unsafe { this.0.functions.as_ref() }) else { return };
        // SAFETY: contract 3; consumed once, since `self` is and is not dropped.
        raising(|panic| unsafe { (functions.call)(&raw mut this.0.space, panic) });
    }
}

impl Drop for ForeignWork {
    fn drop(&mut self) {
        // SAFETY: contract 3.
        if let Some(functions) = unsafe { self.0.functions.as_ref() } {
            // SAFETY: contract 3; it was not run, or this would not be reached.
            unsafe { (functions.drop)(&raw mut self.0.space) }
        }
    }
}

/// Something of the plugin's that a queue keeps.
struct ForeignContext {
    context: *mut c_void,
    drop: unsafe extern "C" fn(context: *mut c_void),
}

// SAFETY: contract 3.
unsafe impl Send for ForeignContext {}
// SAFETY: nothing can be done with a shared reference to it.
unsafe impl Sync for ForeignContext {}

impl Drop for ForeignContext {
    fn drop(&mut self) {
        // SAFETY: contract 3; once.
        unsafe { (self.drop)(self.context) }
    }
}

/// Code of the plugin that runs for each event.
struct ForeignHandler(Handler);

// SAFETY: contract 3.
unsafe impl Send for ForeignHandler {}

impl ForeignHandler {
    fn call(&mut self, first: u64, second: u64) {
        // SAFETY: contract 3; `&mut self` is one thread at a time.
        raising(|panic| unsafe { (self.0.call)(self.0.context, first, second, panic) });
    }
}

/// Runs code of the plugin. A panic that it tells of goes on as ours: the queue that runs it
/// catches it and tells its owner.
fn raising(code: impl FnOnce(*mut HostPanic)) {
    let mut panic = None::<String>;
    code((&raw mut panic).cast());
    if let Some(reason) = panic {
        resume_unwind(Box::new(reason));
    }
}

impl Drop for ForeignHandler {
    fn drop(&mut self) {
        // SAFETY: contract 3; once, and after the last call, which borrowed `self`.
        unsafe { (self.0.drop)(self.0.context) }
    }
}

/// The clock of one of `IOTimerClock`'s numbers.
fn clock(number: u64) -> Result<Clock, IOReturn> {
    match number {
        0x80 => Ok(Clock::Wall),
        0x84 | 0xC4 => Ok(Clock::Continuous),
        0x88 | 0xC8 => Ok(Clock::Uptime),
        _ => Err(IOReturn::BAD_ARGUMENT),
    }
}

// ---- Tables ----

static HOST_FOR_FILES: HostTable = HostTable {
    abi_version: ABI_VERSION,
    size: size_of::<HostTable>() as u32,
    extension,
    log: Some(log_line),
    failed,
    panicked,
};

/// A driver that is linked in shares our logger; a line sent here would come back.
static HOST_FOR_LINKED: HostTable = HostTable {
    abi_version: ABI_VERSION,
    size: size_of::<HostTable>() as u32,
    extension,
    log: None,
    failed,
    panicked,
};

unsafe extern "C" fn extension(name: *const c_char) -> *const c_void {
    // SAFETY: contract 4: a C string.
    let name = unsafe { CStr::from_ptr(name) };
    if name == DISPATCH {
        (&raw const DISPATCH_TABLE).cast()
    } else if name == DEVICE {
        (&raw const DEVICE_TABLE).cast()
    } else if name == SESSION {
        (&raw const SESSION_TABLE).cast()
    } else if name == ACTION {
        (&raw const ACTION_TABLE).cast()
    } else if name == SERVICES {
        (&raw const SERVICES_TABLE).cast()
    } else {
        ptr::null()
    }
}

unsafe extern "C" fn log_line(level: u32, text: *const u8, len: usize) {
    // SAFETY: contract 4.
    let text = unsafe { text_of(text, len) };
    let levels = [Level::Error, Level::Warn, Level::Info, Level::Debug, Level::Trace];
    let level = levels[(level as usize).clamp(1, levels.len()) - 1];
    log::log!(target: "driver", level, "{text}");
}

unsafe extern "C" fn failed(queue: *mut HostQueue, text: *const u8, len: usize) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    let text = unsafe { text_of(text, len) };
    queue.queue.report_failure(&text);
}

unsafe extern "C" fn panicked(panic: *mut HostPanic, text: *const u8, len: usize) {
    // SAFETY: made by `raising`, which waits for the call that got it.
    let panic = unsafe { &mut *panic.cast::<Option<String>>() };
    // SAFETY: contract 4.
    *panic = Some(unsafe { text_of(text, len) });
}

static DISPATCH_TABLE: DispatchTable = DispatchTable {
    size: size_of::<DispatchTable>() as u32,
    queue_create,
    queue_retain,
    queue_release,
    queue_on_queue,
    queue_async,
    queue_sync,
    queue_keep,
    queue_cancel,
    interrupt_create,
    interrupt_set_handler,
    interrupt_set_enable,
    interrupt_cancel,
    interrupt_last,
    interrupt_release,
    timer_create,
    timer_set_handler,
    timer_wake_at,
    timer_set_enable,
    timer_cancel,
    timer_release,
    clock_now,
    descriptor_create,
    descriptor_nudge,
    descriptor_release,
    queue_concurrent,
    queue_sleep,
    queue_wakeup,
    queue_blocking,
    queue_held,
    interrupt_create_from_eventfd,
    interrupt_check,
    timer_check,
    descriptor_set_handler,
    descriptor_set_enable,
    descriptor_cancel,
    descriptor_check,
};

unsafe extern "C" fn queue_create(
    sibling: *mut HostQueue,
    name: *const u8,
    name_len: usize,
    options: u64,
    priority: u64,
    queue: *mut *mut HostQueue,
) -> i32 {
    // SAFETY: contract 2.
    let sibling = unsafe { object::<QueueObject>(sibling) };
    // SAFETY: contract 4.
    let name = unsafe { text_of(name, name_len) };
    let known = options & !(REENTRANT | METHODS_NOT_SYNCHRONIZED) == 0 && priority == 0;
    let made = if known {
        sibling.queue.create_beside(&name, QueueOptions { reentrant: options != 0 })
    } else {
        Err(IOReturn::BAD_ARGUMENT)
    };
    let services = sibling.services.clone();
    // SAFETY: contract 4.
    unsafe { written(queue, made.map(|queue| give(QueueObject { queue, services }))) }
}

unsafe extern "C" fn queue_concurrent(queue: *mut HostQueue, work: Work) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let work = ForeignWork(work);
    IOReturn::code(&queue.queue.dispatch_concurrent(move || work.run()))
}

unsafe extern "C" fn queue_sleep(
    queue: *mut HostQueue,
    event: usize,
    number: u64,
    deadline: u64,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let deadline = match number {
        0 => Ok(None),
        number => clock(number).map(|clock| Some((clock, deadline))),
    };
    IOReturn::code(&deadline.and_then(|deadline| queue.queue.sleep(event, deadline)))
}

unsafe extern "C" fn queue_wakeup(queue: *mut HostQueue, event: usize, options: u64) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let woken = match options {
        0 => queue.queue.wakeup(event).map(|_| ()),
        WAKEUP_ALL => queue.queue.wakeup_all(event).map(|_| ()),
        _ => Err(IOReturn::BAD_ARGUMENT),
    };
    IOReturn::code(&woken)
}

unsafe extern "C" fn queue_blocking(
    queue: *mut HostQueue,
    call: unsafe extern "C" fn(context: *mut c_void),
    context: *mut c_void,
) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 3, on the plugin's own thread and before it goes on.
    queue.queue.blocking(|| unsafe { call(context) });
}

unsafe extern "C" fn queue_held(
    queue: *mut HostQueue,
    sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
    context: *mut c_void,
) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    for name in queue.queue.held() {
        // SAFETY: contract 3: the plugin's function with its context; the name lives for the call.
        unsafe { sink(context, name.as_ptr(), name.len()) };
    }
}

unsafe extern "C" fn queue_retain(queue: *mut HostQueue) {
    // SAFETY: contract 2.
    std::mem::forget(unsafe { shared::<QueueObject>(queue) });
}

unsafe extern "C" fn queue_release(queue: *mut HostQueue) {
    // SAFETY: contract 2.
    unsafe { released::<QueueObject>(queue) }
}

unsafe extern "C" fn queue_on_queue(queue: *mut HostQueue) -> i32 {
    // SAFETY: contract 2.
    i32::from(unsafe { object::<QueueObject>(queue) }.queue.on_queue())
}

unsafe extern "C" fn queue_async(queue: *mut HostQueue, work: *const Work) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    let work = ForeignWork(unsafe { work.read() });
    queue.queue.dispatch_async(move || work.run());
}

unsafe extern "C" fn queue_sync(
    queue: *mut HostQueue,
    call: unsafe extern "C" fn(context: *mut c_void),
    context: *mut c_void,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 3, on the plugin's own thread and before it goes on.
    IOReturn::code(&queue.queue.dispatch_sync(|| unsafe { call(context) }))
}

unsafe extern "C" fn queue_keep(
    queue: *mut HostQueue,
    context: *mut c_void,
    drop: unsafe extern "C" fn(context: *mut c_void),
) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    queue.queue.keep(ForeignContext { context, drop });
}

unsafe extern "C" fn queue_cancel(queue: *mut HostQueue, done: Work) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let done = ForeignWork(done);
    queue.queue.cancel(move || done.run());
}

unsafe extern "C" fn interrupt_create(
    device: *mut HostDevice,
    index: u32,
    queue: *mut HostQueue,
    handler: Handler,
    source: *mut *mut HostInterrupt,
) -> i32 {
    let handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let device = unsafe { shared::<Device>(device) };
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let made = make_interrupt(device, index, &queue.queue, handler);
    // SAFETY: contract 4.
    unsafe { written(source, made.map(give)) }
}

fn make_interrupt(
    device: Arc<Device>,
    index: u32,
    queue: &Queue,
    handler: ForeignHandler,
) -> Result<InterruptObject, IOReturn> {
    let clock = interrupt_clock(index & !INDEX_MASK)?;
    let taken = device.take_interrupt(index & INDEX_MASK)?;
    let given_back = AtomicBool::new(false);
    let vector = Some(TakenVector { device, vector: taken.vector, given_back });
    let source = watch_interrupt(queue, taken.signal, taken.line, clock, handler)?;
    Ok(InterruptObject { source, vector })
}

unsafe extern "C" fn interrupt_create_from_eventfd(
    trigger: i32,
    unmask: i32,
    flags: u32,
    queue: *mut HostQueue,
    handler: Handler,
    source: *mut *mut HostInterrupt,
) -> i32 {
    let handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4: open for the call.
    let trigger = unsafe { BorrowedFd::borrow_raw(trigger) };
    // SAFETY: contract 4: likewise, unless it is -1.
    let unmask = (unmask != -1).then(|| unsafe { BorrowedFd::borrow_raw(unmask) });
    let made = make_eventfd_interrupt(trigger, unmask, flags, &queue.queue, handler);
    // SAFETY: contract 4.
    unsafe { written(source, made.map(give)) }
}

fn make_eventfd_interrupt(
    trigger: BorrowedFd<'_>,
    unmask: Option<BorrowedFd<'_>>,
    flags: u32,
    queue: &Queue,
    handler: ForeignHandler,
) -> Result<InterruptObject, IOReturn> {
    let clock = interrupt_clock(flags)?;
    let line = match unmask {
        None => InterruptLine::Edge,
        Some(unmask) => {
            let unmask = eventfd(unmask)?;
            InterruptLine::Level(Box::new(move || unmask.raise()))
        }
    };
    let source = watch_interrupt(queue, Arc::new(eventfd(trigger)?), line, clock, handler)?;
    Ok(InterruptObject { source, vector: None })
}

/// Another descriptor for an eventfd of the plugin's.
fn eventfd(fd: BorrowedFd<'_>) -> Result<Signal, IOReturn> {
    let fd = fd.try_clone_to_owned().map_err(|_| IOReturn::NO_RESOURCES)?;
    Signal::try_from(fd).map_err(|err| {
        error!(err:err; "an interrupt from an eventfd");
        IOReturn::BAD_ARGUMENT
    })
}

/// The clock that the flags above an interrupt's index ask for.
fn interrupt_clock(flags: u32) -> Result<Clock, IOReturn> {
    match flags {
        0 => Ok(Clock::Uptime),
        CONTINUOUS_TIME => Ok(Clock::Continuous),
        _ => Err(IOReturn::BAD_ARGUMENT),
    }
}

fn watch_interrupt(
    queue: &Queue,
    signal: Arc<Signal>,
    line: InterruptLine,
    clock: Clock,
    mut handler: ForeignHandler,
) -> Result<InterruptSource, IOReturn> {
    let handler = move |event: InterruptEvent| handler.call(event.count, event.time);
    InterruptSource::create(queue, signal, line, clock, handler).map_err(|err| {
        error!(err:err; "watching an interrupt");
        IOReturn::NO_RESOURCES
    })
}

unsafe extern "C" fn interrupt_check(source: *mut HostInterrupt, wait: i32) -> i32 {
    // SAFETY: contract 2.
    let source = &unsafe { object::<InterruptObject>(source) }.source;
    IOReturn::code(&if wait == 0 { source.check_for_work() } else { source.wait_for_work() })
}

unsafe extern "C" fn interrupt_set_handler(source: *mut HostInterrupt, handler: Handler) -> i32 {
    let mut handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let source = unsafe { object::<InterruptObject>(source) };
    let handler = move |event: InterruptEvent| handler.call(event.count, event.time);
    source.source.set_handler(Some(handler));
    0
}

unsafe extern "C" fn interrupt_set_enable(
    source: *mut HostInterrupt,
    enable: i32,
    done: Work,
) -> i32 {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    let source = unsafe { object::<InterruptObject>(source) };
    IOReturn::code(&source.source.set_enable(enable != 0, done))
}

unsafe extern "C" fn interrupt_cancel(source: *mut HostInterrupt, done: Work) {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    let source = unsafe { object::<InterruptObject>(source) };
    // First the device, so that `done` finds the vector free.
    if let Some(vector) = &source.vector {
        vector.give_back();
    }
    source.source.cancel(done);
}

unsafe extern "C" fn interrupt_last(source: *mut HostInterrupt, count: *mut u64, time: *mut u64) {
    // SAFETY: contract 2.
    let source = unsafe { object::<InterruptObject>(source) };
    let last = source.source.last_interrupt();
    // SAFETY: contract 4.
    unsafe { count.write(last.count) };
    // SAFETY: contract 4.
    unsafe { time.write(last.time) };
}

unsafe extern "C" fn interrupt_release(source: *mut HostInterrupt) {
    // SAFETY: contract 2.
    unsafe { released::<InterruptObject>(source) }
}

unsafe extern "C" fn timer_create(
    queue: *mut HostQueue,
    handler: Handler,
    timer: *mut *mut HostTimer,
) -> i32 {
    let mut handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let made = TimerSource::create(&queue.queue, move |time| handler.call(time, 0));
    // SAFETY: contract 4.
    unsafe { written(timer, Ok(give(made))) }
}

unsafe extern "C" fn timer_set_handler(timer: *mut HostTimer, handler: Handler) -> i32 {
    let mut handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let timer = unsafe { object::<TimerSource>(timer) };
    timer.set_handler(Some(move |time| handler.call(time, 0)));
    0
}

unsafe extern "C" fn timer_wake_at(
    timer: *mut HostTimer,
    number: u64,
    deadline: u64,
    leeway: u64,
) -> i32 {
    // SAFETY: contract 2.
    let timer = unsafe { object::<TimerSource>(timer) };
    let armed = clock(number).and_then(|clock| timer.wake_at(clock, deadline, leeway));
    IOReturn::code(&armed)
}

unsafe extern "C" fn timer_set_enable(timer: *mut HostTimer, enable: i32, done: Work) -> i32 {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    let timer = unsafe { object::<TimerSource>(timer) };
    IOReturn::code(&timer.set_enable(enable != 0, done))
}

unsafe extern "C" fn timer_check(timer: *mut HostTimer, wait: i32) -> i32 {
    // SAFETY: contract 2.
    let timer = unsafe { object::<TimerSource>(timer) };
    IOReturn::code(&if wait == 0 { timer.check_for_work() } else { timer.wait_for_work() })
}

unsafe extern "C" fn timer_cancel(timer: *mut HostTimer, done: Work) {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    unsafe { object::<TimerSource>(timer) }.cancel(done);
}

unsafe extern "C" fn timer_release(timer: *mut HostTimer) {
    // SAFETY: contract 2.
    unsafe { released::<TimerSource>(timer) }
}

unsafe extern "C" fn clock_now(queue: *mut HostQueue, number: u64, time: *mut u64) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    unsafe { written(time, clock(number).map(|clock| queue.queue.now(clock))) }
}

unsafe extern "C" fn descriptor_create(
    queue: *mut HostQueue,
    fd: i32,
    handler: Handler,
    source: *mut *mut HostDescriptor,
) -> i32 {
    let mut handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4: open for the call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let made = fd
        .try_clone_to_owned()
        .and_then(|fd| BellSource::create(&queue.queue, fd, move || handler.call(0, 0)));
    let made = made.map_err(|err| {
        error!(err:err; "watching a descriptor");
        IOReturn::NO_RESOURCES
    });
    // SAFETY: contract 4.
    unsafe { written(source, made.map(give)) }
}

unsafe extern "C" fn descriptor_nudge(source: *mut HostDescriptor) {
    // SAFETY: contract 2.
    unsafe { object::<BellSource>(source) }.nudge();
}

unsafe extern "C" fn descriptor_set_handler(
    source: *mut HostDescriptor,
    handler: *const Handler,
) -> i32 {
    // SAFETY: contract 4: null, or a handler for the call, which we take.
    let handler = unsafe { handler.as_ref() }.map(|&handler| ForeignHandler(handler));
    // SAFETY: contract 2.
    let source = unsafe { object::<BellSource>(source) };
    let handler = handler.map(|mut handler| move || handler.call(0, 0));
    i32::from(source.set_handler(handler))
}

unsafe extern "C" fn descriptor_set_enable(
    source: *mut HostDescriptor,
    enable: i32,
    done: Work,
) -> i32 {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    let source = unsafe { object::<BellSource>(source) };
    IOReturn::code(&source.set_enable(enable != 0, done))
}

unsafe extern "C" fn descriptor_cancel(source: *mut HostDescriptor, done: Work) {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    unsafe { object::<BellSource>(source) }.cancel(done);
}

unsafe extern "C" fn descriptor_check(source: *mut HostDescriptor, wait: i32) -> i32 {
    // SAFETY: contract 2.
    let source = unsafe { object::<BellSource>(source) };
    IOReturn::code(&if wait == 0 { source.check_for_work() } else { source.wait_for_work() })
}

unsafe extern "C" fn descriptor_release(source: *mut HostDescriptor) {
    // SAFETY: contract 2.
    unsafe { released::<BellSource>(source) }
}

static DEVICE_TABLE: DeviceTable = DeviceTable {
    size: size_of::<DeviceTable>() as u32,
    retain: device_retain,
    release: device_release,
    config_read,
    config_write,
    bar_info,
    bar_map,
    bar_read,
    bar_write,
    configure_interrupts,
    interrupt_type,
    reset: device_reset,
    memory_create,
    memory_release,
    dma_prepare,
    dma_complete,
};

unsafe extern "C" fn device_retain(device: *mut HostDevice) {
    // SAFETY: contract 2.
    std::mem::forget(unsafe { shared::<Device>(device) });
}

unsafe extern "C" fn device_release(device: *mut HostDevice) {
    // SAFETY: contract 2.
    unsafe { released::<Device>(device) }
}

/// The part of an 8-byte buffer that an access of `width` bytes uses; `BAD_ARGUMENT` for a width
/// that no bus has.
fn part(buffer: &mut [u8; 8], width: u32) -> Result<&mut [u8], IOReturn> {
    match width {
        1 | 2 | 4 | 8 => Ok(&mut buffer[..width as usize]),
        _ => Err(IOReturn::BAD_ARGUMENT),
    }
}

/// One read of up to 8 bytes, little-endian as PCI is.
fn read(
    width: u32,
    access: impl FnOnce(&mut [u8]) -> Result<(), IOReturn>,
) -> Result<u64, IOReturn> {
    let mut buffer = [0; 8];
    access(part(&mut buffer, width)?)?;
    Ok(u64::from_le_bytes(buffer))
}

/// One write of up to 8 bytes.
fn write(
    width: u32,
    value: u64,
    access: impl FnOnce(&[u8]) -> Result<(), IOReturn>,
) -> Result<(), IOReturn> {
    access(part(&mut value.to_le_bytes(), width)?)
}

/// A configuration space offset; beyond the largest one there is nothing.
fn config_offset(offset: u64) -> Result<u16, IOReturn> {
    u16::try_from(offset).map_err(|_| IOReturn::OVERRUN)
}

/// A BAR's number: 0 to 6.
fn bar_number(bar: u32) -> Result<u8, IOReturn> {
    u8::try_from(bar).ok().filter(|bar| *bar <= 6).ok_or(IOReturn::BAD_ARGUMENT)
}

unsafe extern "C" fn config_read(
    device: *mut HostDevice,
    offset: u64,
    width: u32,
    value: *mut u64,
) -> i32 {
    // SAFETY: contract 2.
    let backend = unsafe { object::<Device>(device) }.backend();
    let read = config_offset(offset).and_then(|offset| {
        read(width, |data| backend.config_read(offset, data).map_err(|err| refused(&err)))
    });
    // SAFETY: contract 4.
    unsafe { written(value, read) }
}

unsafe extern "C" fn config_write(
    device: *mut HostDevice,
    offset: u64,
    width: u32,
    value: u64,
) -> i32 {
    // SAFETY: contract 2.
    let backend = unsafe { object::<Device>(device) }.backend();
    IOReturn::code(&config_offset(offset).and_then(|offset| {
        write(width, value, |data| backend.config_write(offset, data).map_err(|err| refused(&err)))
    }))
}

unsafe extern "C" fn bar_info(device: *mut HostDevice, bar: u32, info: *mut DeviceBar) -> i32 {
    // SAFETY: contract 2.
    let backend = unsafe { object::<Device>(device) }.backend();
    let found = bar_number(bar).and_then(|bar| {
        let found = backend.bar(bar).ok_or(IOReturn::NOT_FOUND)?;
        Ok(DeviceBar { size: found.size, kind: u32::from(found.kind), reserved: 0 })
    });
    // SAFETY: contract 4.
    unsafe { written(info, found) }
}

unsafe extern "C" fn bar_map(
    device: *mut HostDevice,
    bar: u32,
    len: u64,
    address: *mut *mut u8,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    let mapped = bar_number(bar).and_then(|bar| device.map_bar(bar, len));
    // SAFETY: contract 4.
    unsafe { written(address, mapped) }
}

unsafe extern "C" fn bar_read(
    device: *mut HostDevice,
    bar: u32,
    offset: u64,
    width: u32,
    value: *mut u64,
) -> i32 {
    // SAFETY: contract 2.
    let backend = unsafe { object::<Device>(device) }.backend();
    let read = bar_number(bar).and_then(|bar| {
        read(width, |data| backend.bar_read(bar, offset, data).map_err(|err| refused(&err)))
    });
    // SAFETY: contract 4.
    unsafe { written(value, read) }
}

unsafe extern "C" fn bar_write(
    device: *mut HostDevice,
    bar: u32,
    offset: u64,
    width: u32,
    value: u64,
) -> i32 {
    // SAFETY: contract 2.
    let backend = unsafe { object::<Device>(device) }.backend();
    IOReturn::code(&bar_number(bar).and_then(|bar| {
        write(width, value, |data| {
            backend.bar_write(bar, offset, data).map_err(|err| refused(&err))
        })
    }))
}

unsafe extern "C" fn configure_interrupts(
    device: *mut HostDevice,
    kind: u32,
    required: u32,
    requested: u32,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    let kind = match kind {
        1 => Ok(InterruptKind::IntX),
        0x1_0000 => Ok(InterruptKind::Msi),
        0x2_0000 => Ok(InterruptKind::MsiX),
        _ => Err(IOReturn::BAD_ARGUMENT),
    };
    let chosen = kind.and_then(|kind| device.configure_interrupts(kind, required, requested));
    IOReturn::code(&chosen)
}

unsafe extern "C" fn interrupt_type(device: *mut HostDevice, index: u32, kind: *mut u64) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    let found = device.interrupt_kind(index).map(|kind| match kind {
        InterruptKind::IntX => 1,
        InterruptKind::Msi => 0x1_0000,
        InterruptKind::MsiX => 0x3_0000,
    });
    // SAFETY: contract 4.
    unsafe { written(kind, found) }
}

unsafe extern "C" fn device_reset(device: *mut HostDevice) -> i32 {
    // SAFETY: contract 2.
    IOReturn::code(&unsafe { object::<Device>(device) }.reset())
}

unsafe extern "C" fn memory_create(len: u64, memory: *mut *mut HostMemory, fd: *mut i32) -> i32 {
    let made = usize::try_from(len).map_err(|_| IOReturn::NO_MEMORY).and_then(|len| {
        let memory = SharedMemory::create(c"iohost-dma", len).map_err(|_| IOReturn::NO_MEMORY)?;
        let fd = memory.as_fd().try_clone_to_owned().map_err(|_| IOReturn::NO_RESOURCES)?;
        Ok((memory, fd))
    });
    match made {
        Ok((made, file)) => {
            // SAFETY: contract 4.
            unsafe { fd.write(file.into_raw_fd()) };
            // SAFETY: contract 4.
            unsafe { written(memory, Ok(give(made))) }
        }
        Err(status) => status.0,
    }
}

unsafe extern "C" fn memory_release(memory: *mut HostMemory) {
    // SAFETY: contract 2.
    unsafe { released::<SharedMemory>(memory) }
}

unsafe extern "C" fn dma_prepare(
    device: *mut HostDevice,
    memory: *mut HostMemory,
    address_bits: u32,
    address: *mut u64,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    // SAFETY: contract 2.
    let memory = unsafe { shared::<SharedMemory>(memory) };
    let bits = u8::try_from(address_bits).ok().filter(|bits| *bits <= 64);
    let bits = bits.ok_or(IOReturn::BAD_ARGUMENT);
    // SAFETY: contract 4.
    unsafe { written(address, bits.and_then(|bits| device.prepare(memory, bits))) }
}

unsafe extern "C" fn dma_complete(device: *mut HostDevice, address: u64) -> i32 {
    // SAFETY: contract 2.
    IOReturn::code(&unsafe { object::<Device>(device) }.complete(address))
}

static SESSION_TABLE: SessionTable = SessionTable { size: size_of::<SessionTable>() as u32, reply };

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

static ACTION_TABLE: ActionTable = ActionTable {
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

/// # Safety
///
/// Contract 4 holds for `results`.
unsafe fn copied(results: *const CallArguments) -> Result<Arguments, IOReturn> {
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

static SERVICES_TABLE: ServicesTable = ServicesTable {
    size: size_of::<ServicesTable>() as u32,
    watch: services_watch,
    watch_release: services_watch_release,
};

unsafe extern "C" fn services_watch(
    queue: *mut HostQueue,
    handler: ServiceHandler,
    watch: *mut *mut HostWatch,
) -> i32 {
    let watcher = Arc::new(ForeignWatcher(handler));
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    queue.services.watch(watcher.clone());
    // SAFETY: contract 4.
    unsafe { written(watch, Ok(Arc::into_raw(watcher).cast_mut().cast())) }
}

unsafe extern "C" fn services_watch_release(watch: *mut HostWatch) {
    // SAFETY: contract 2.
    unsafe { released::<ForeignWatcher>(watch) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_no_clock_is_a_bad_argument() {
        let known = [0x80, 0x84, 0x88, 0xC4, 0xC8];
        let others = (0..0x1000).chain([0x1_0000_0088, u64::MAX]);
        for number in others.filter(|number| !known.contains(number)) {
            assert_eq!(clock(number), Err(IOReturn::BAD_ARGUMENT), "{number:#x}");
        }
        assert!(known.into_iter().all(|number| clock(number).is_ok()));
    }
}
