//! A device object's timer, once per second.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use super::irql::{self, Level};
use super::system::{System, Walk};
use super::{DeviceObject, Error, NO_PANIC, Result};

/// The I/O timer of a device object: calls a routine about once per second while started.
///
/// The seconds belong to the system and not to the timer: all I/O timers of a driver tick
/// together, at whole seconds of `CLOCK_MONOTONIC`, one after the other in the order of their
/// initialisation, never two at a time, each on its device object's queue. One that waits for its
/// queue holds up those after it. A tick that comes before the routines of an earlier one have
/// all returned is merged into that one; ticks are never made up for.
///
/// Dropping it ends the timer, which waits for a routine that runs on another thread; inside the
/// routine it ends after the call. Its device object can then have another one.
pub struct IoTimer {
    switch: Arc<Switch>,
}

impl IoTimer {
    /// Gives a device object its I/O timer, stopped. `IoInitializeTimer`.
    ///
    /// `routine` (`IO_TIMER_ROUTINE`) runs on the device object's queue and gets its state and
    /// the device object, so that one function can serve several. Windows' context is that state,
    /// and whatever the closure captures. The routine counts as dispatch level: it should be
    /// short and must not wait.
    ///
    /// Errors: [`Error::AlreadyInitialized`] when the device object has one; that one stays
    /// (Windows leaves this undefined). [`Error::DeviceDeleted`] after
    /// [`DeviceObject::delete`]. [`Error::RaisedIrql`] in an I/O timer routine or a DPC.
    #[doc(alias("IoInitializeTimer", "IO_TIMER_ROUTINE", "PIO_TIMER_ROUTINE"))]
    pub fn initialize<S: Send + 'static>(
        device: &DeviceObject<S>,
        routine: impl FnMut(&mut S, &DeviceObject<S>) + Send + 'static,
    ) -> Result<Self> {
        irql::passive_only("IoInitializeTimer")?;
        let (target, routine) = (device.clone(), Arc::new(Mutex::new(routine)));
        let send = move |switch: Arc<Switch>, walk: Walk| {
            let (device, routine) = (target.clone(), routine.clone());
            target.queue().dispatch_async(move |state| {
                switch.call(|| {
                    // The queue is serial, so this never waits; a panic is the queue's to report.
                    let mut routine = routine.lock().unwrap_or_else(PoisonError::into_inner);
                    routine(state, &device);
                });
                // Dropped here also when the work is dropped unrun.
                drop(walk);
            });
        };
        let switch = Arc::new(Switch {
            id: device.system().next_id(),
            system: device.system().clone(),
            state: Mutex::default(),
            returned: Condvar::new(),
            send: Box::new(send),
        });
        device.take_place(&switch)?;
        switch.system.add_timer(switch.id, Arc::downgrade(&switch));
        Ok(Self { switch })
    }

    /// Starts the ticks; the first comes at once or within a second. `IoStartTimer`.
    ///
    /// On a timer that is started this changes nothing, and on that of a deleted device object it
    /// has no effect. That a timer is started before it is initialised cannot be written here.
    /// Callable from any thread and in a DPC.
    ///
    /// Errors: [`Error::InsideRoutine`] in any I/O timer routine, its own or another's: Windows
    /// does not forbid that in words, and would deadlock.
    #[doc(alias = "IoStartTimer")]
    pub fn start(&self) -> Result<()> {
        outside_of_routines("IoStartTimer")?;
        self.switch.start();
        Ok(())
    }

    /// Stops the ticks: after the return no routine of this timer runs or starts, until
    /// [`start`](Self::start). `IoStopTimer`.
    ///
    /// Callable from any thread and in a DPC, also when stopped. Waits for a routine that runs on
    /// another thread, so the caller must not hold what that needs; on the timer's own queue it
    /// never waits.
    ///
    /// Errors: [`Error::InsideRoutine`] in any I/O timer routine, its own or another's, where
    /// Windows forbids it. A routine that wants to be its last sends the stop to its queue with
    /// [`dispatch_async`](crate::IODispatchQueue::dispatch_async).
    #[doc(alias = "IoStopTimer")]
    pub fn stop(&self) -> Result<()> {
        outside_of_routines("IoStopTimer")?;
        self.switch.stop();
        Ok(())
    }
}

fn outside_of_routines(call: &'static str) -> Result<()> {
    if irql::level() == Level::IoTimerRoutine { Err(Error::InsideRoutine { call }) } else { Ok(()) }
}

impl Drop for IoTimer {
    fn drop(&mut self) {
        self.switch.end();
    }
}

impl fmt::Debug for IoTimer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoTimer")
            .field("started", &self.switch.is_started())
            .finish_non_exhaustive()
    }
}

/// A timer without the type of its state.
pub(super) struct Switch {
    id: u64,
    system: Arc<System>,
    state: Mutex<State>,
    /// The routine returned.
    returned: Condvar,
    /// Sends the routine to its queue, with the walk that goes on after it.
    send: Box<dyn Fn(Arc<Switch>, Walk) + Send + Sync>,
}

#[derive(Default)]
struct State {
    started: bool,
    ended: bool,
    /// Where the routine runs now.
    running: Option<ThreadId>,
}

impl Switch {
    pub(super) fn is_started(&self) -> bool {
        self.state.lock().expect(NO_PANIC).started
    }

    pub(super) fn has_ended(&self) -> bool {
        self.state.lock().expect(NO_PANIC).ended
    }

    pub(super) fn send(self: Arc<Self>, walk: Walk) {
        (self.send)(self.clone(), walk);
    }

    fn start(&self) {
        let mut state = self.state.lock().expect(NO_PANIC);
        if !state.started && !state.ended {
            state.started = true;
            self.system.timer_started();
        }
    }

    fn stop(&self) {
        let mut state = self.state.lock().expect(NO_PANIC);
        if state.started {
            state.started = false;
            self.system.timer_stopped();
        }
        let here = thread::current().id();
        let elsewhere = |state: &mut State| state.running.is_some_and(|thread| thread != here);
        drop(self.returned.wait_while(state, elsewhere).expect(NO_PANIC));
    }

    /// Ends the timer for good. Inside its own routine it does not wait for that.
    pub(super) fn end(&self) {
        self.state.lock().expect(NO_PANIC).ended = true;
        self.stop();
        self.system.remove_timer(self.id);
    }

    /// Calls the routine, on its queue, unless the timer was stopped since it was sent there.
    fn call(&self, routine: impl FnOnce()) {
        struct Running<'a>(&'a Switch);
        impl Drop for Running<'_> {
            fn drop(&mut self) {
                self.0.state.lock().expect(NO_PANIC).running = None;
                self.0.returned.notify_all();
            }
        }
        let mut state = self.state.lock().expect(NO_PANIC);
        if !state.started {
            return;
        }
        state.running = Some(thread::current().id());
        drop(state);
        let _running = Running(self);
        irql::run_at(Level::IoTimerRoutine, routine);
    }
}
