//! Code of the plugin that the host runs: once, for each event, or when a queue ends.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::panic::resume_unwind;

use iohost_dispatch::Block;
use iohost_driver_abi::{Handler, HostPanic, Work};

/// Code of the plugin that runs at most once.
pub(super) struct ForeignWork(pub(super) Work);

// SAFETY: contract 3.
unsafe impl Send for ForeignWork {}

impl ForeignWork {
    /// `None` where the plugin gave no work.
    pub(super) fn block(work: Work) -> Option<Block> {
        let foreign = Self(work);
        (!foreign.0.functions.is_null()).then(|| Box::new(move || foreign.run()) as Block)
    }

    pub(super) fn run(self) {
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
pub(super) struct ForeignContext {
    pub(super) context: *mut c_void,
    pub(super) drop: unsafe extern "C" fn(context: *mut c_void),
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
pub(super) struct ForeignHandler(pub(super) Handler);

// SAFETY: contract 3.
unsafe impl Send for ForeignHandler {}

impl ForeignHandler {
    pub(super) fn call(&mut self, first: u64, second: u64) {
        // SAFETY: contract 3; `&mut self` is one thread at a time.
        raising(|panic| unsafe { (self.0.call)(self.0.context, first, second, panic) });
    }
}

/// Runs code of the plugin. A panic that it tells of goes on as ours: the queue that runs it
/// catches it and tells its owner.
pub(super) fn raising(code: impl FnOnce(*mut HostPanic)) {
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
