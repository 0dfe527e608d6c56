//! Deferred procedure calls.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::irql::{self, Level};
use super::{DeviceObject, NO_PANIC};
use crate::abi;

/// A deferred procedure call: what a [`KernelTimer`](super::KernelTimer) does when it expires.
///
/// It stands on its queue at most once: an expiry that comes before the call has started is
/// merged into it, so calls do not count expiries. One that comes while it runs leads to one more
/// call. It never runs twice at a time (on Windows the DPC of a periodic timer can).
///
/// Dropping it takes back a call that has not started; one that runs ends on its own. A timer set
/// with it then expires without a call.
#[doc(alias("KDPC", "PRKDPC"))]
pub struct Dpc {
    object: Arc<DpcObject>,
}

/// A DPC without the type of its state.
pub(super) struct DpcObject {
    pending: Mutex<Pending>,
    /// The routine returned.
    returned: Condvar,
    queue: abi::Queue,
    /// Sends the routine to its queue.
    send: Box<dyn Fn(Arc<DpcObject>) + Send + Sync>,
}

#[derive(Default)]
struct Pending {
    /// The timers that want the call which stands on the queue; none left: it is not made.
    wanted_by: BTreeSet<u64>,
    /// The call stands on the queue.
    queued: bool,
    running: bool,
    /// The handle was dropped.
    ended: bool,
}

impl Dpc {
    /// Makes a DPC. Any thread, any level. `KeInitializeDpc`.
    ///
    /// `routine` (`CustomTimerDpc`) runs on the device object's queue and gets its state. Windows'
    /// context is that state, and whatever the closure captures; its two system arguments mean
    /// nothing for a timer's DPC and are left out. The routine counts as dispatch level: it should
    /// be short and must not wait. It may set, cancel or drop any timer.
    #[doc(alias("KeInitializeDpc", "CustomTimerDpc", "KDEFERRED_ROUTINE"))]
    pub fn initialize<S: Send + 'static>(
        device: &DeviceObject<S>,
        routine: impl FnMut(&mut S) + Send + 'static,
    ) -> Self {
        let (queue, routine) = (device.queue().clone(), Arc::new(Mutex::new(routine)));
        let send = move |object: Arc<DpcObject>| {
            let routine = routine.clone();
            queue.dispatch_async(move |state| {
                object.call(|| {
                    // The queue is serial, so this never waits; a panic is the queue's to report.
                    let mut routine = routine.lock().unwrap_or_else(PoisonError::into_inner);
                    routine(state);
                });
            });
        };
        let object = Arc::new(DpcObject {
            pending: Mutex::default(),
            returned: Condvar::new(),
            queue: device.queue().raw().clone(),
            send: Box::new(send),
        });
        device.system().add_dpc(&object);
        Self { object }
    }

    pub(super) fn object(&self) -> &Arc<DpcObject> {
        &self.object
    }
}

impl Drop for Dpc {
    fn drop(&mut self) {
        let mut pending = self.object.pending.lock().expect(NO_PANIC);
        pending.ended = true;
        pending.wanted_by.clear();
    }
}

impl fmt::Debug for Dpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pending = self.object.pending.lock().expect(NO_PANIC);
        f.debug_struct("Dpc")
            .field("queued", &!pending.wanted_by.is_empty())
            .field("running", &pending.running)
            .finish_non_exhaustive()
    }
}

impl DpcObject {
    /// Queues the call for a timer. The caller keeps its reference until it holds no lock any
    /// more: with the last one goes the routine, and what that owns.
    pub(super) fn queue_for(self: &Arc<Self>, timer: u64) {
        let mut pending = self.pending.lock().expect(NO_PANIC);
        if pending.ended {
            return;
        }
        pending.wanted_by.insert(timer);
        if !pending.queued {
            pending.queued = true;
            (self.send)(self.clone());
        }
    }

    /// Takes back what a timer queued, if the call has not started.
    pub(super) fn take_back(&self, timer: u64) {
        self.pending.lock().expect(NO_PANIC).wanted_by.remove(&timer);
    }

    pub(super) fn on_queue(&self) -> bool {
        self.queue.on_queue()
    }

    /// Returns when a call that is queued or runs has returned. Not on the queue.
    pub(super) fn flush(&self) {
        let pending = self.pending.lock().expect(NO_PANIC);
        let busy = pending.queued || pending.running;
        drop(pending);
        // The queue is in order: a turn taken now comes after the call.
        if busy && self.queue.dispatch_sync(|| {}).is_err() {
            // The queue was cancelled and starts nothing any more; what runs is left.
            let pending = self.pending.lock().expect(NO_PANIC);
            drop(self.returned.wait_while(pending, |pending| pending.running).expect(NO_PANIC));
        }
    }

    /// Calls the routine, on its queue, unless nobody wants that any more.
    fn call(&self, routine: impl FnOnce()) {
        struct Running<'a>(&'a DpcObject);
        impl Drop for Running<'_> {
            fn drop(&mut self) {
                self.0.pending.lock().expect(NO_PANIC).running = false;
                self.0.returned.notify_all();
            }
        }
        let mut pending = self.pending.lock().expect(NO_PANIC);
        pending.queued = false;
        if std::mem::take(&mut pending.wanted_by).is_empty() {
            return;
        }
        pending.running = true;
        drop(pending);
        let _running = Running(self);
        irql::run_at(Level::Dpc, routine);
    }
}
