//! The plugin's end of the C ABI: everything that crosses, and nothing else.
//!
//! # The contract this module rests on
//!
//! The host promises, in `iohost_driver_abi`:
//!
//! 1. Every table it hands out is complete for its version, stays where it is for the life of
//!    the process, and its functions can be called from any thread.
//! 2. An object is alive while we own a reference; `retain` adds one, `release` takes one.
//! 3. A `Work` is called or dropped once; a `Handler` is called by one thread at a time, and
//!    dropped exactly once, last; what a queue was given to keep is dropped once, after the last
//!    call of its work.
//! 4. `start`, `stop`, `call`, `session_opened`, `session_closed` and `copy_client_memory` run on
//!    the default queue, one at a time; `instance` is what our `start` wrote; `release` comes last and once.
//! 5. A pointer and a length given to us are valid for the call; descriptors given to us are
//!    ours.
//! 6. A reply is ours until we answer it. A `DriverAction` that we gave is dropped once, after
//!    the last `invoke`, a `ServiceHandler` after the last `call`; the invocation that came with one is ours until we say that it ended.
//!
//! The wrappers below keep our side: each owns exactly one reference, all are made from what a
//! table returned with status 0, and no reference to foreign memory is kept.

#![expect(unsafe_code)]
// UNSAFETY: the other side of every call here is foreign code.

use std::any::Any;
use std::ffi::{CStr, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::{Arc, OnceLock};

pub use iohost_driver_abi::DriverDescriptor;
use iohost_driver_abi::{
    ABI_VERSION, ACTION, ActionTable, CallArguments, DEVICE, DISPATCH, DescriptorHeader, DeviceBar,
    DeviceTable, DispatchTable, DriverAction, DriverEntry, Handler, HostAction, HostDescriptor,
    HostDevice, HostInterrupt, HostInvocation, HostMemory, HostPanic, HostQueue, HostReply,
    HostTable, HostTimer, HostWatch, MAGIC, MOST_PERSONALITIES, NAME_BYTES, SERVICES, SESSION,
    ServiceHandler, ServiceText, ServicesTable, SessionInfo, SessionTable, Work, WorkFunctions,
    WorkSpace,
};
pub(crate) use iohost_driver_abi::{ClientMemory, Personality};
use iohost_interface::{ActionTarget, Arguments, Completion, IOReturn, PassedAction, ReplySink};
use iohost_registers::RegisterWindow;

use crate::ServiceInfo;
use crate::logger;
use crate::service::{Exported, Instance, SessionEnds};

/// The descriptor of a driver, for `export_driver!`.
pub const fn descriptor<D: Exported>(
    name: &'static str,
    built_with: &'static str,
) -> DriverDescriptor {
    let mut personalities = [NO_DEVICE; MOST_PERSONALITIES];
    let count = D::PERSONALITIES.len();
    assert!(count > 0, "a driver without a personality matches no device");
    assert!(count <= MOST_PERSONALITIES, "too many personalities");
    let mut index = 0;
    while index < count {
        personalities[index] = D::PERSONALITIES[index].for_abi();
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
            reserved: 0,
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
    }
}

const NO_DEVICE: Personality = Personality {
    primary: 0,
    primary_mask: 0,
    subsystem: 0,
    subsystem_mask: 0,
    class: 0,
    class_mask: 0,
};

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

// ---- The functions the host calls ----

unsafe extern "C" fn start<D: Exported>(
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

unsafe extern "C" fn stop<D: Exported>(instance: *mut c_void) {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    instance.guarded(|| instance.stop());
}

unsafe extern "C" fn release<D: Exported>(instance: *mut c_void) {
    // SAFETY: contract 4: made by `start` with `Box::into_raw`, and given back once.
    let instance = unsafe { Box::from_raw(instance.cast::<Instance<D>>()) };
    // A destructor of the driver may panic, and there is no driver left to be failed by it.
    let _ = guarded(move || drop(instance));
}

unsafe extern "C" fn describe<D: Exported>(
    sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
    context: *mut c_void,
) {
    if let Ok(Some(text)) = guarded(D::description) {
        // SAFETY: the text lives for the call, and the sink is the host's with its context.
        unsafe { sink(context, text.as_ptr(), text.len()) };
    }
}

unsafe extern "C" fn call<D: Exported>(
    instance: *mut c_void,
    session: u64,
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
    instance.guarded(|| instance.call(session, selector, arguments, sink));
}

unsafe extern "C" fn session_opened<D: Exported>(
    instance: *mut c_void,
    session: *const SessionInfo,
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
    let ends = ends.map(Some).collect();
    let mut status = IOReturn::INTERNAL_ERROR.0;
    instance.guarded(|| status = instance.session_opened(session.session, ends));
    status
}

unsafe extern "C" fn session_closed<D: Exported>(instance: *mut c_void, session: u64) {
    // SAFETY: contract 4.
    let instance = unsafe { Instance::<D>::of(instance) };
    instance.guarded(|| instance.session_closed(session));
}

unsafe extern "C" fn copy_client_memory<D: Exported>(
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

/// Runs code of the driver. A panic becomes its message.
fn guarded<R>(code: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(code)).map_err(|panic: Box<dyn Any + Send>| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        // A payload can be anything, also something that panics when dropped.
        std::mem::forget(panic);
        format!("panicked: {}", text.as_deref().unwrap_or("no message"))
    })
}

/// # Safety
///
/// Contract 5 holds for `arguments`.
unsafe fn copied(arguments: *const CallArguments) -> Arguments {
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

// ---- The functions of the host ----

/// The host's tables; the same ones for every driver in a process.
struct Tables {
    host: &'static HostTable,
    dispatch: &'static DispatchTable,
    device: &'static DeviceTable,
    session: &'static SessionTable,
    action: &'static ActionTable,
    services: &'static ServicesTable,
}

static TABLES: OnceLock<Tables> = OnceLock::new();

impl Tables {
    /// # Safety
    ///
    /// `host` is the table of a host that keeps contract 1.
    unsafe fn set(host: *const HostTable) -> Result<(), IOReturn> {
        // SAFETY: the caller's promise; the table lives for ever.
        let host = unsafe { &*host };
        if host.abi_version != ABI_VERSION {
            return Err(IOReturn::UNSUPPORTED);
        }
        let table = |name: &CStr| {
            // SAFETY: contract 1; the name is a C string that lives for the call.
            NonNull::new(unsafe { (host.extension)(name.as_ptr()) }.cast_mut())
                .ok_or(IOReturn::UNSUPPORTED)
        };
        let (dispatch, device, session) = (table(DISPATCH)?, table(DEVICE)?, table(SESSION)?);
        let (action, services) = (table(ACTION)?, table(SERVICES)?);
        // SAFETY: contract 1: a table of this name is of this type and lives for ever.
        let dispatch = unsafe { dispatch.cast::<DispatchTable>().as_ref() };
        // SAFETY: the same.
        let device = unsafe { device.cast::<DeviceTable>().as_ref() };
        // SAFETY: the same.
        let session = unsafe { session.cast::<SessionTable>().as_ref() };
        // SAFETY: the same.
        let action = unsafe { action.cast::<ActionTable>().as_ref() };
        // SAFETY: the same.
        let services = unsafe { services.cast::<ServicesTable>().as_ref() };
        let _ = TABLES.set(Self { host, dispatch, device, session, action, services });
        if host.log.is_some() {
            logger::install();
        }
        Ok(())
    }
}

fn tables() -> &'static Tables {
    TABLES.get().expect("there is no object of the host before `start`")
}

/// Calls a function of a table. Every argument is a value, an object that a wrapper owns, or a
/// pointer to something that lives for the call.
macro_rules! host {
    ($table:ident.$function:ident($($argument:expr),* $(,)?)) => {{
        let function = tables().$table.$function;
        // SAFETY: contract 1 for the function, contract 2 for the objects (their wrappers own a
        // reference), and the rule above for all other arguments.
        unsafe { function($($argument),*) }
    }};
}

/// `Ok` for status 0.
fn check(status: i32) -> Result<(), IOReturn> {
    IOReturn(status).result()
}

/// Takes over what a function of the host wrote, if it wrote something.
fn adopt<T>(status: i32, object: *mut T) -> Result<NonNull<T>, IOReturn> {
    check(status)?;
    NonNull::new(object).ok_or(IOReturn::INTERNAL_ERROR)
}

/// Sends a log line to the host.
pub(crate) fn log(level: u32, text: &str) {
    if let Some(log) = tables().host.log {
        // SAFETY: contract 1; the text lives for the call.
        unsafe { log(level, text.as_ptr(), text.len()) }
    }
}

/// One reference to an object of the host. `pub` as the sealed half of `IODispatchSource` names
/// some of them; nobody outside of the crate can.
macro_rules! owned {
    ($(#[$doc:meta])* $name:ident($object:ty) released by $table:ident.$release:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name(NonNull<$object>);

        // SAFETY: contract 1: the host takes its objects from any thread.
        unsafe impl Send for $name {}
        // SAFETY: the same.
        unsafe impl Sync for $name {}

        impl Drop for $name {
            fn drop(&mut self) {
                host!($table.$release(self.0.as_ptr()));
            }
        }
    };
}

owned! {
    /// A dispatch queue.
    Queue(HostQueue) released by dispatch.queue_release
}
owned! {
    /// An interrupt source.
    Interrupt(HostInterrupt) released by dispatch.interrupt_release
}
owned! {
    /// A timer.
    Timer(HostTimer) released by dispatch.timer_release
}
owned! {
    /// A watched descriptor.
    Descriptor(HostDescriptor) released by dispatch.descriptor_release
}
owned! {
    /// A device.
    Device(HostDevice) released by device.release
}
owned! {
    /// A client's action.
    ClientAction(HostAction) released by action.release
}
owned! {
    /// An invocation of one of our actions, which has ended when this is dropped.
    Invocation(HostInvocation) released by action.ended
}
owned! {
    /// A source of news of services.
    Watch(HostWatch) released by services.watch_release
}
owned! {
    /// Memory for a device.
    Memory(HostMemory) released by device.memory_release
}

impl Queue {
    /// # Safety
    ///
    /// `queue` is alive for the call.
    unsafe fn borrowed(queue: *mut HostQueue) -> Self {
        host!(dispatch.queue_retain(queue));
        Self(NonNull::new(queue).expect("the host passes a queue"))
    }

    pub(crate) fn create(
        sibling: &Self,
        name: &str,
        options: u64,
        priority: u64,
    ) -> Result<Self, IOReturn> {
        let mut queue = ptr::null_mut();
        let status = host!(dispatch.queue_create(
            sibling.0.as_ptr(),
            name.as_ptr(),
            name.len(),
            options,
            priority,
            &raw mut queue
        ));
        Ok(Self(adopt(status, queue)?))
    }

    pub(crate) fn dispatch_concurrent(
        &self,
        block: impl FnOnce() + Send + 'static,
    ) -> Result<(), IOReturn> {
        check(host!(dispatch.queue_concurrent(self.0.as_ptr(), work_of(block))))
    }

    /// `clock` 0: no deadline.
    pub(crate) fn sleep(&self, event: usize, clock: u64, deadline: u64) -> Result<(), IOReturn> {
        check(host!(dispatch.queue_sleep(self.0.as_ptr(), event, clock, deadline)))
    }

    pub(crate) fn wakeup(&self, event: usize, options: u64) -> Result<(), IOReturn> {
        check(host!(dispatch.queue_wakeup(self.0.as_ptr(), event, options)))
    }

    /// The names of the queues the calling thread holds, outermost first.
    pub(crate) fn held(&self) -> Vec<String> {
        unsafe extern "C" fn sink(context: *mut c_void, text: *const u8, len: usize) {
            // SAFETY: the context is the list below, which waits for this call.
            let names = unsafe { &mut *context.cast::<Vec<String>>() };
            // SAFETY: contract 5; a name is never empty, or its pointer is still not null.
            let name = unsafe { slice::from_raw_parts(text, len) };
            names.push(String::from_utf8_lossy(name).into_owned());
        }
        let mut names = Vec::<String>::new();
        host!(dispatch.queue_held(self.0.as_ptr(), sink, (&raw mut names).cast()));
        names
    }

    pub(crate) fn on_queue(&self) -> bool {
        host!(dispatch.queue_on_queue(self.0.as_ptr())) != 0
    }

    pub(crate) fn dispatch_async(&self, block: impl FnOnce() + Send + 'static) {
        let work = work_of(block);
        host!(dispatch.queue_async(self.0.as_ptr(), &raw const work));
    }

    pub(crate) fn dispatch_sync<R>(&self, block: impl FnOnce() -> R) -> Result<R, IOReturn> {
        let queue = self.0.as_ptr();
        on_this_thread(block, |run, context| check(host!(dispatch.queue_sync(queue, run, context))))
    }

    /// Runs code that waits for something that other work of the driver does.
    pub(crate) fn blocking<R>(&self, code: impl FnOnce() -> R) -> Result<R, IOReturn> {
        let queue = self.0.as_ptr();
        on_this_thread(code, |run, context| {
            host!(dispatch.queue_blocking(queue, run, context));
            Ok(())
        })
    }

    pub(crate) fn cancel(&self, done: impl FnOnce() + Send + 'static) {
        host!(dispatch.queue_cancel(self.0.as_ptr(), work_of(done)));
    }

    pub(crate) fn now(&self, clock: u64) -> Result<u64, IOReturn> {
        let mut time = 0;
        check(host!(dispatch.clock_now(self.0.as_ptr(), clock, &raw mut time)))?;
        Ok(time)
    }

    /// Tells the host that the driver has failed.
    pub(crate) fn failed(&self, message: &str) {
        host!(host.failed(self.0.as_ptr(), message.as_ptr(), message.len()));
    }
}

impl Clone for Queue {
    fn clone(&self) -> Self {
        host!(dispatch.queue_retain(self.0.as_ptr()));
        Self(self.0)
    }
}

/// Has the host run code at once, on this thread, and returns what it returned.
fn on_this_thread<F: FnOnce() -> R, R>(
    code: F,
    host: impl FnOnce(unsafe extern "C" fn(*mut c_void), *mut c_void) -> Result<(), IOReturn>,
) -> Result<R, IOReturn> {
    /// The code before, its result after.
    struct Turn<F, R> {
        code: Option<F>,
        result: Option<std::thread::Result<R>>,
    }
    unsafe extern "C" fn run<F: FnOnce() -> R, R>(context: *mut c_void) {
        // SAFETY: the context is the `turn` below, which waits for this call on its stack and is
        // not touched meanwhile.
        let turn = unsafe { &mut *context.cast::<Turn<F, R>>() };
        let code = turn.code.take();
        turn.result = code.map(|code| catch_unwind(AssertUnwindSafe(code)));
    }
    let mut turn = Turn { code: Some(code), result: None };
    host(run::<F, R>, (&raw mut turn).cast())?;
    match turn.result {
        Some(Ok(result)) => Ok(result),
        // The caller's own code panicked, on the caller's own thread.
        Some(Err(panic)) => std::panic::resume_unwind(panic),
        None => Err(IOReturn::INTERNAL_ERROR),
    }
}

/// Wraps code that runs once.
fn work_of<F: FnOnce() + Send + 'static>(code: F) -> Work {
    /// The code itself, if it fits; else a box with it.
    fn wrap<F: FnOnce() + Send + 'static>(code: F) -> Work {
        assert!(size_of::<F>() <= size_of::<WorkSpace>());
        assert!(align_of::<F>() <= align_of::<WorkSpace>());
        let mut space = WorkSpace::uninit();
        // SAFETY: the assertions above: the space is large and aligned enough, and ours alone.
        unsafe { space.as_mut_ptr().cast::<F>().write(code) };
        Work { functions: &WorkOf::<F>::FUNCTIONS, space }
    }
    if size_of::<F>() <= size_of::<WorkSpace>() && align_of::<F>() <= align_of::<WorkSpace>() {
        wrap(code)
    } else {
        let boxed: Box<dyn FnOnce() + Send> = Box::new(code);
        wrap(boxed)
    }
}

/// The functions of work whose space holds an `F`.
struct WorkOf<F>(F);

impl<F: FnOnce()> WorkOf<F> {
    const FUNCTIONS: WorkFunctions = WorkFunctions { call: Self::call, drop: Self::drop };

    unsafe extern "C" fn call(space: *mut WorkSpace, panic: *mut HostPanic) {
        // SAFETY: contract 3: written by `wrap`, and consumed once; reading moves it out.
        let code = unsafe { space.cast::<F>().read() };
        telling(panic, code);
    }

    unsafe extern "C" fn drop(space: *mut WorkSpace) {
        // SAFETY: as in `call`, of which this is the alternative.
        let code = unsafe { space.cast::<F>().read() };
        let _ = guarded(|| drop(code));
    }
}

/// A completion, or none.
fn completion_of(done: Option<impl FnOnce() + Send + 'static>) -> Work {
    match done {
        Some(done) => work_of(done),
        None => Work { functions: ptr::null(), space: WorkSpace::uninit() },
    }
}

/// Wraps code that runs for each event.
fn handler_of<F: FnMut(u64, u64) + Send + 'static>(code: F) -> Handler {
    unsafe extern "C" fn call<F: FnMut(u64, u64)>(
        context: *mut c_void,
        first: u64,
        second: u64,
        panic: *mut HostPanic,
    ) {
        // SAFETY: contract 3: made below with `Box::into_raw`, not dropped yet, and used by one
        // thread at a time.
        let code = unsafe { &mut *context.cast::<F>() };
        telling(panic, || code(first, second));
    }
    unsafe extern "C" fn drop<F>(context: *mut c_void) {
        // SAFETY: contract 3: dropped once, after the last call.
        let code = unsafe { Box::from_raw(context.cast::<F>()) };
        let _ = guarded(|| std::mem::drop(code));
    }
    let context = Box::into_raw(Box::new(code)).cast();
    Handler { call: call::<F>, drop: drop::<F>, context }
}

/// Runs code of the driver and tells the host of its panic.
fn telling(panic: *mut HostPanic, code: impl FnOnce()) {
    if let Err(text) = guarded(code) {
        host!(host.panicked(panic, text.as_ptr(), text.len()));
    }
}

/// A queue, and a value that it keeps for as long as any of its work can run.
pub(crate) struct KeepingQueue<T> {
    queue: Queue,
    value: Arc<T>,
}

impl<T: Send + Sync + 'static> KeepingQueue<T> {
    pub(crate) fn new(queue: Queue, value: T) -> Self {
        unsafe extern "C" fn drop<T>(context: *mut c_void) {
            // SAFETY: contract 3: the reference made below, given back once.
            let value = unsafe { Arc::from_raw(context.cast::<T>()) };
            let _ = guarded(|| std::mem::drop(value));
        }
        let value = Arc::new(value);
        let context = Arc::into_raw(value.clone()).cast_mut().cast();
        host!(dispatch.queue_keep(queue.0.as_ptr(), context, drop::<T>));
        Self { queue, value }
    }

    /// Appends work that gets the value. The work counts no reference: that would be a count
    /// which two processors pass to and fro, once per block.
    pub(crate) fn dispatch_async(&self, block: impl FnOnce(&T) + Send + 'static) {
        /// The value of the queue that runs this.
        struct Kept<T>(*const T);
        // SAFETY: used as `&T`, and `T` is `Sync`.
        unsafe impl<T: Sync> Send for Kept<T> {}
        impl<T> Kept<T> {
            /// # Safety
            ///
            /// The value lives for as long as the reference.
            unsafe fn get<'a>(&self) -> &'a T {
                // SAFETY: the caller's promise.
                unsafe { &*self.0 }
            }
        }
        let kept = Kept(Arc::as_ptr(&self.value));
        self.queue.dispatch_async(move || {
            // SAFETY: contract 3: `queue` keeps the value for as long as its work runs.
            block(unsafe { kept.get() });
        });
    }
}

impl<T> KeepingQueue<T> {
    pub(crate) fn queue(&self) -> &Queue {
        &self.queue
    }

    pub(crate) fn value(&self) -> &Arc<T> {
        &self.value
    }
}

impl<T> Clone for KeepingQueue<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), value: self.value.clone() }
    }
}

/// What all sources can do.
pub trait Source {
    /// `done` is called once, also when nothing changed.
    fn set_enable(
        &self,
        enable: bool,
        done: Option<impl FnOnce() + Send + 'static>,
    ) -> Result<(), IOReturn>;

    fn cancel(&self, done: impl FnOnce() + Send + 'static);

    fn check_for_work(&self) -> Result<(), IOReturn>;

    fn wait_for_work(&self) -> Result<(), IOReturn>;
}

macro_rules! source {
    ($name:ident: $set_enable:ident, $cancel:ident, $check:ident) => {
        impl Source for $name {
            fn set_enable(
                &self,
                enable: bool,
                done: Option<impl FnOnce() + Send + 'static>,
            ) -> Result<(), IOReturn> {
                let (enable, done) = (i32::from(enable), completion_of(done));
                check(host!(dispatch.$set_enable(self.0.as_ptr(), enable, done)))
            }

            fn cancel(&self, done: impl FnOnce() + Send + 'static) {
                host!(dispatch.$cancel(self.0.as_ptr(), work_of(done)));
            }

            fn check_for_work(&self) -> Result<(), IOReturn> {
                check(host!(dispatch.$check(self.0.as_ptr(), 0)))
            }

            fn wait_for_work(&self) -> Result<(), IOReturn> {
                check(host!(dispatch.$check(self.0.as_ptr(), 1)))
            }
        }
    };
}

source! { Interrupt: interrupt_set_enable, interrupt_cancel, interrupt_check }
source! { Timer: timer_set_enable, timer_cancel, timer_check }
source! { Descriptor: descriptor_set_enable, descriptor_cancel, descriptor_check }

impl Interrupt {
    pub(crate) fn create(
        device: &Device,
        index: u32,
        queue: &Queue,
        handler: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<Self, IOReturn> {
        let mut source = ptr::null_mut();
        let status = host!(dispatch.interrupt_create(
            device.0.as_ptr(),
            index,
            queue.0.as_ptr(),
            handler_of(handler),
            &raw mut source,
        ));
        Ok(Self(adopt(status, source)?))
    }

    pub(crate) fn set_handler(
        &self,
        handler: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<(), IOReturn> {
        let handler = handler_of(handler);
        check(host!(dispatch.interrupt_set_handler(self.0.as_ptr(), handler)))
    }

    pub(crate) fn create_from_eventfd(
        trigger: BorrowedFd<'_>,
        unmask: Option<BorrowedFd<'_>>,
        flags: u32,
        queue: &Queue,
        handler: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<Self, IOReturn> {
        let mut source = ptr::null_mut();
        let status = host!(dispatch.interrupt_create_from_eventfd(
            trigger.as_raw_fd(),
            unmask.map_or(-1, |unmask| unmask.as_raw_fd()),
            flags,
            queue.0.as_ptr(),
            handler_of(handler),
            &raw mut source,
        ));
        Ok(Self(adopt(status, source)?))
    }

    pub(crate) fn last(&self) -> (u64, u64) {
        let (mut count, mut time) = (0, 0);
        host!(dispatch.interrupt_last(self.0.as_ptr(), &raw mut count, &raw mut time));
        (count, time)
    }
}

impl Timer {
    pub(crate) fn create(
        queue: &Queue,
        handler: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<Self, IOReturn> {
        let mut timer = ptr::null_mut();
        let handler = handler_of(handler);
        let status = host!(dispatch.timer_create(queue.0.as_ptr(), handler, &raw mut timer));
        Ok(Self(adopt(status, timer)?))
    }

    pub(crate) fn set_handler(
        &self,
        handler: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<(), IOReturn> {
        check(host!(dispatch.timer_set_handler(self.0.as_ptr(), handler_of(handler))))
    }

    pub(crate) fn wake_at(&self, clock: u64, deadline: u64, leeway: u64) -> Result<(), IOReturn> {
        check(host!(dispatch.timer_wake_at(self.0.as_ptr(), clock, deadline, leeway)))
    }
}

impl Descriptor {
    pub(crate) fn create(
        queue: &Queue,
        fd: BorrowedFd<'_>,
        mut handler: impl FnMut() + Send + 'static,
    ) -> Result<Self, IOReturn> {
        let mut source = ptr::null_mut();
        let handler = handler_of(move |_, _| handler());
        let fd = fd.as_raw_fd();
        let status =
            host!(dispatch.descriptor_create(queue.0.as_ptr(), fd, handler, &raw mut source));
        Ok(Self(adopt(status, source)?))
    }

    /// Whether there were events that nobody could be called for.
    pub(crate) fn set_handler(&self, handler: Option<impl FnMut() + Send + 'static>) -> bool {
        let handler = handler.map(|mut handler| handler_of(move |_, _| handler()));
        let handler = handler.as_ref().map_or(ptr::null(), ptr::from_ref);
        host!(dispatch.descriptor_set_handler(self.0.as_ptr(), handler)) != 0
    }

    pub(crate) fn nudge(&self) {
        host!(dispatch.descriptor_nudge(self.0.as_ptr()));
    }
}

impl Watch {
    pub(crate) fn create<F: Fn(bool, ServiceInfo) + Send + Sync + 'static>(
        queue: &Queue,
        hear: F,
    ) -> Result<Self, IOReturn> {
        unsafe extern "C" fn call<F: Fn(bool, ServiceInfo)>(
            context: *const c_void,
            began: u32,
            service: *const ServiceText,
        ) {
            // SAFETY: contract 6: made below with `Box::into_raw`, not dropped yet; shared
            // references only are ever made from it.
            let hear = unsafe { &*context.cast::<F>() };
            // SAFETY: contract 5.
            let text = unsafe { service.read() };
            let service = ServiceInfo {
                // SAFETY: contract 5.
                name: unsafe { text_of(text.name, text.name_len) },
                // SAFETY: contract 5.
                driver: unsafe { text_of(text.driver, text.driver_len) },
                // SAFETY: contract 5.
                interface: unsafe { text_of(text.interface, text.interface_len) },
            };
            // It is our own code, which notes the news; it does not panic.
            let _ = guarded(|| hear(began != 0, service));
        }
        unsafe extern "C" fn drop_context<F>(context: *mut c_void) {
            // SAFETY: contract 6: made below with `Box::into_raw`, and dropped once.
            let hear = unsafe { Box::from_raw(context.cast::<F>()) };
            let _ = guarded(move || drop(hear));
        }
        let context = Box::into_raw(Box::new(hear)).cast();
        let handler = ServiceHandler { call: call::<F>, drop: drop_context::<F>, context };
        let mut watch = ptr::null_mut();
        let status = host!(services.watch(queue.0.as_ptr(), handler, &raw mut watch));
        Ok(Self(adopt(status, watch)?))
    }
}

/// # Safety
///
/// Contract 5 holds for `text` and `len`.
unsafe fn text_of(text: *const u8, len: usize) -> String {
    if len == 0 {
        return String::new();
    }
    // SAFETY: the caller's promise, and not empty, so the pointer is one.
    let bytes = unsafe { slice::from_raw_parts(text, len) };
    String::from_utf8_lossy(bytes).into_owned()
}

impl Device {
    /// # Safety
    ///
    /// `device` is alive for the call.
    unsafe fn borrowed(device: *mut HostDevice) -> Self {
        host!(device.retain(device));
        Self(NonNull::new(device).expect("the host passes a device"))
    }

    pub(crate) fn config_read(&self, offset: u64, width: u32) -> Result<u64, IOReturn> {
        let mut value = 0;
        check(host!(device.config_read(self.0.as_ptr(), offset, width, &raw mut value)))?;
        Ok(value)
    }

    pub(crate) fn config_write(&self, offset: u64, width: u32, value: u64) -> Result<(), IOReturn> {
        check(host!(device.config_write(self.0.as_ptr(), offset, width, value)))
    }

    pub(crate) fn bar_info(&self, bar: u8) -> Result<DeviceBar, IOReturn> {
        let mut info = DeviceBar::default();
        check(host!(device.bar_info(self.0.as_ptr(), u32::from(bar), &raw mut info)))?;
        Ok(info)
    }

    /// A view of the first `len` bytes of a BAR. The device must outlive the window.
    pub(crate) fn bar_map(&self, bar: u8, len: u64) -> Result<RegisterWindow, IOReturn> {
        let mut address = ptr::null_mut();
        check(host!(device.bar_map(self.0.as_ptr(), u32::from(bar), len, &raw mut address)))?;
        let address = NonNull::new(address).ok_or(IOReturn::INTERNAL_ERROR)?;
        // SAFETY: contract of `bar_map`: page-aligned, `len` bytes, mapped until the device's
        // last reference goes; `Bar` keeps a reference beside the window. Nobody refers to
        // device memory by reference.
        Ok(unsafe { RegisterWindow::from_raw(address, len as usize) })
    }

    pub(crate) fn bar_read(&self, bar: u8, offset: u64, width: u32) -> Result<u64, IOReturn> {
        let (bar, mut value) = (u32::from(bar), 0);
        check(host!(device.bar_read(self.0.as_ptr(), bar, offset, width, &raw mut value)))?;
        Ok(value)
    }

    pub(crate) fn bar_write(
        &self,
        bar: u8,
        offset: u64,
        width: u32,
        value: u64,
    ) -> Result<(), IOReturn> {
        check(host!(device.bar_write(self.0.as_ptr(), u32::from(bar), offset, width, value)))
    }

    pub(crate) fn configure_interrupts(
        &self,
        kind: u32,
        required: u32,
        requested: u32,
    ) -> Result<(), IOReturn> {
        check(host!(device.configure_interrupts(self.0.as_ptr(), kind, required, requested)))
    }

    pub(crate) fn interrupt_type(&self, index: u32) -> Result<u64, IOReturn> {
        let mut kind = 0;
        check(host!(device.interrupt_type(self.0.as_ptr(), index, &raw mut kind)))?;
        Ok(kind)
    }

    pub(crate) fn reset(&self) -> Result<(), IOReturn> {
        check(host!(device.reset(self.0.as_ptr())))
    }

    pub(crate) fn dma_prepare(&self, memory: &Memory, bits: u32) -> Result<u64, IOReturn> {
        let mut address = 0;
        let memory = memory.0.as_ptr();
        check(host!(device.dma_prepare(self.0.as_ptr(), memory, bits, &raw mut address)))?;
        Ok(address)
    }

    pub(crate) fn dma_complete(&self, address: u64) -> Result<(), IOReturn> {
        check(host!(device.dma_complete(self.0.as_ptr(), address)))
    }
}

impl Clone for Device {
    fn clone(&self) -> Self {
        host!(device.retain(self.0.as_ptr()));
        Self(self.0)
    }
}

impl Memory {
    pub(crate) fn create(len: u64) -> Result<(Self, OwnedFd), IOReturn> {
        let (mut memory, mut fd) = (ptr::null_mut(), -1);
        let status = host!(device.memory_create(len, &raw mut memory, &raw mut fd));
        let memory = Self(adopt(status, memory)?);
        // SAFETY: contract of `memory_create`: on success an open descriptor that is ours.
        Ok((memory, unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

/// The answer to a call, on its way to the host.
struct HostSink {
    reply: *mut HostReply,
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
    fn passed(&self) -> Vec<PassedAction> {
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
fn lent(arguments: &Arguments) -> CallArguments {
    CallArguments {
        scalars: arguments.scalars.as_ptr(),
        scalar_count: arguments.scalars.len(),
        structure: arguments.structure.as_ptr(),
        structure_len: arguments.structure.len(),
    }
}

impl ActionTarget for ClientAction {
    fn invoke(&self, arguments: Arguments, _: Completion) -> Result<(), IOReturn> {
        if !arguments.actions.is_empty() {
            return Err(IOReturn::UNSUPPORTED);
        }
        let arguments = lent(&arguments);
        check(host!(action.invoke(self.0.as_ptr(), &raw const arguments)))
    }
}

/// A handle to an action, for the host.
fn driver_action(target: Arc<dyn ActionTarget>) -> DriverAction {
    unsafe extern "C" fn invoke(
        context: *const c_void,
        arguments: *const CallArguments,
        invocation: *mut HostInvocation,
    ) -> i32 {
        // SAFETY: contract 6: made below with `Box::into_raw`, not dropped yet; shared
        // references only are ever made from it.
        let target = unsafe { &*context.cast::<Arc<dyn ActionTarget>>() };
        let invocation = NonNull::new(invocation).map(Invocation);
        let completion = Completion::new(move || drop(invocation));
        // SAFETY: contract 5.
        let arguments = unsafe { copied(arguments) };
        match guarded(|| target.invoke(arguments, completion)) {
            Ok(invoked) => IOReturn::code(&invoked),
            Err(_) => IOReturn::INTERNAL_ERROR.0,
        }
    }
    unsafe extern "C" fn drop_context(context: *mut c_void) {
        // SAFETY: contract 6: made below with `Box::into_raw`, and dropped once.
        let target = unsafe { Box::from_raw(context.cast::<Arc<dyn ActionTarget>>()) };
        // The end of the last handle may run the driver's code that something it owned has.
        let _ = guarded(move || drop(target));
    }
    let context = Box::into_raw(Box::new(target)).cast();
    DriverAction { invoke, drop: drop_context, context }
}

impl ReplySink for HostSink {
    fn deliver(mut self: Box<Self>, answer: Result<Arguments, IOReturn>) {
        self.send(answer);
    }
}

impl Drop for HostSink {
    fn drop(&mut self) {
        self.send(Err(IOReturn::ABORTED));
    }
}
