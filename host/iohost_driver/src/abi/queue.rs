//! Dispatch queues.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Arc;
use std::{ptr, slice};

use iohost_driver_abi::HostQueue;
use iohost_interface::IOReturn;

use super::callback::{guarded, work_of};
use super::{adopt, check, host, owned};

owned! {
    /// A dispatch queue.
    Queue(HostQueue) released by dispatch.queue_release
}

impl Queue {
    /// # Safety
    ///
    /// `queue` is alive for the call.
    pub(super) unsafe fn borrowed(queue: *mut HostQueue) -> Self {
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

    /// Tells the host that the work in progress is getting on.
    pub(crate) fn report_progress(&self) {
        host!(dispatch.queue_progress(self.0.as_ptr()));
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
