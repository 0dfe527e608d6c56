//! What Windows' timers belong to.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use super::io_timer::Switch;
use super::system::System;
use super::{Error, NO_PANIC, Result, irql};
use crate::IODispatchQueue;

/// A device object: a queue, whose state stands for the device extension, and at most one
/// [`IoTimer`](super::IoTimer). Routines of its timers run on its queue and get its state.
///
/// A driver makes the first one with [`create`](Self::create), on its default queue as a rule,
/// and others, if it needs them, with [`create_beside`](Self::create_beside). A value of this type
/// is a handle; clones are the same device object, and handles are equal if they are.
#[doc(alias = "DEVICE_OBJECT")]
pub struct DeviceObject<S: 'static> {
    core: Arc<DeviceCore<S>>,
}

struct DeviceCore<S: 'static> {
    system: Arc<System>,
    queue: IODispatchQueue<S>,
    slot: Mutex<Slot>,
}

/// The `Timer` field of a device object.
#[derive(Default)]
struct Slot {
    timer: Weak<Switch>,
    deleted: bool,
}

impl<S: Send + 'static> DeviceObject<S> {
    /// Makes a driver's first device object. `IoCreateDevice`.
    ///
    /// It comes with the driver's own tick and timer queue. Device objects that should share them
    /// are made with [`create_beside`](Self::create_beside).
    ///
    /// Callable from any thread, also in [`IOService::start`](crate::IOService::start).
    /// Errors: [`Error::Resources`].
    #[doc(alias = "IoCreateDevice")]
    pub fn create(queue: &IODispatchQueue<S>) -> Result<Self> {
        Ok(Self::of(System::create(queue)?, queue))
    }

    /// Makes one more device object of a driver. Its timer ticks together with those of the
    /// others. `IoCreateDevice`.
    ///
    /// It may be on the same queue or on another. On a queue of their own, DPCs run also while
    /// the driver is busy on its default queue, as they would in Windows.
    pub fn create_beside<T: Send>(
        other: &DeviceObject<T>,
        queue: &IODispatchQueue<S>,
    ) -> Result<Self> {
        Ok(Self::of(other.core.system.clone(), queue))
    }

    fn of(system: Arc<System>, queue: &IODispatchQueue<S>) -> Self {
        let slot = Mutex::default();
        Self { core: Arc::new(DeviceCore { system, queue: queue.clone(), slot }) }
    }

    /// The queue its routines run on.
    pub fn queue(&self) -> &IODispatchQueue<S> {
        &self.core.queue
    }

    /// Deletes the device object: ends its I/O timer as dropping the timer does, so that a
    /// routine that runs on another thread has returned. `IoDeleteDevice`.
    ///
    /// Starting the timer has no effect afterwards, and there can be no new one. Kernel timers
    /// and DPCs go on until they are cancelled or dropped. A second call does nothing.
    #[doc(alias = "IoDeleteDevice")]
    pub fn delete(&self) {
        let mut slot = self.core.slot.lock().expect(NO_PANIC);
        slot.deleted = true;
        let timer = slot.timer.upgrade();
        drop(slot);
        if let Some(timer) = timer {
            timer.end();
        }
    }

    /// Returns when every DPC of this driver that was queued before the call, or runs, has
    /// returned. `KeFlushQueuedDpcs`.
    ///
    /// Follows [`KernelTimer::cancel`](super::KernelTimer::cancel) where a driver frees what a DPC
    /// uses and the DPC does not own. A DPC may be queued again before this returns, by a timer
    /// that is still set.
    ///
    /// Errors: [`Error::RaisedIrql`] in a DPC or I/O timer routine; [`Error::OnQueue`] on the
    /// queue of any DPC of this driver, whether queued or not: none of them can run there before
    /// the caller has returned.
    #[doc(alias = "KeFlushQueuedDpcs")]
    pub fn flush_queued_dpcs(&self) -> Result<()> {
        const CALL: &str = "KeFlushQueuedDpcs";
        irql::passive_only(CALL)?;
        let dpcs = self.core.system.dpcs();
        if dpcs.iter().any(|dpc| dpc.on_queue()) {
            return Err(Error::OnQueue { call: CALL });
        }
        dpcs.iter().for_each(|dpc| dpc.flush());
        Ok(())
    }

    pub(super) fn system(&self) -> &Arc<System> {
        &self.core.system
    }

    /// Puts a timer in its place.
    pub(super) fn take_place(&self, timer: &Arc<Switch>) -> Result<()> {
        let mut slot = self.core.slot.lock().expect(NO_PANIC);
        if slot.deleted {
            return Err(Error::DeviceDeleted);
        }
        if slot.timer.upgrade().is_some_and(|first| !first.has_ended()) {
            return Err(Error::AlreadyInitialized);
        }
        slot.timer = Arc::downgrade(timer);
        Ok(())
    }
}

impl<S> Clone for DeviceObject<S> {
    fn clone(&self) -> Self {
        Self { core: self.core.clone() }
    }
}

impl<S> PartialEq for DeviceObject<S> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.core, &other.core)
    }
}

impl<S> Eq for DeviceObject<S> {}

impl<S> fmt::Debug for DeviceObject<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeviceObject").field(&self.core.queue).finish()
    }
}
