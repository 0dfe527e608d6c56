//! Queues without state, for ports of drivers that share it themselves.

use std::time::Duration;

use crate::{IODispatchQueue, IOTimerClock, Result, abi};

/// `IODispatchQueue` in DriverKit's own form: it orders work and owns nothing.
///
/// What does not fit a queue that owns its state is here: concurrent blocks, and giving the queue
/// up in a sleep. State that the work shares has to be made safe to share by whoever writes it.
/// A value of this type is a handle; clones are the same queue.
#[derive(Clone, Debug)]
pub struct IORawDispatchQueue {
    raw: abi::Queue,
}

impl IORawDispatchQueue {
    /// `kIODispatchQueueReentrant`: the queue can be given up in a sleep, and runs concurrent
    /// blocks.
    pub const REENTRANT: u64 = 0x1;

    /// `kIODispatchQueueMethodsNotSynchronized`: undocumented by Apple; accepted, and the queue is
    /// reentrant.
    pub const METHODS_NOT_SYNCHRONIZED: u64 = 0x2;

    pub(crate) fn of(raw: abi::Queue) -> Self {
        Self { raw }
    }

    /// Makes a queue beside another one, on the same engine.
    ///
    /// Errors: `BAD_ARGUMENT` for an unknown option, a priority other than 0 (there are none), or
    /// a name of more than 255 bytes.
    pub fn create<S: Send>(
        beside: &IODispatchQueue<S>,
        name: &str,
        options: u64,
        priority: u64,
    ) -> Result<Self> {
        let raw = abi::Queue::create(beside.raw(), name, options, priority)?;
        Ok(Self { raw })
    }

    /// Whether the calling thread is running work of this queue, also further out.
    pub fn on_queue(&self) -> bool {
        self.raw.on_queue()
    }

    /// See [`IODispatchQueue::report_progress`].
    pub fn report_progress(&self) {
        self.raw.report_progress();
    }

    /// Appends work and returns. See [`IODispatchQueue::dispatch_async`].
    pub fn dispatch_async(&self, block: impl FnOnce() + Send + 'static) {
        self.raw.dispatch_async(block);
    }

    /// Runs work in its turn, on the calling thread; at once when the thread holds the queue
    /// already. `DispatchSync` and `RunAction`.
    ///
    /// Errors: `ABORTED` when the queue is cancelled first.
    pub fn dispatch_sync<R>(&self, block: impl FnOnce() -> R) -> Result<R> {
        Ok(self.raw.dispatch_sync(block)?)
    }

    /// Appends work that may run beside other concurrent work of the queue, never beside any
    /// other. `DispatchConcurrent`.
    ///
    /// Errors: `UNSUPPORTED` on a queue that is not reentrant; the work is dropped.
    pub fn dispatch_concurrent(&self, block: impl FnOnce() + Send + 'static) -> Result<()> {
        Ok(self.raw.dispatch_concurrent(block)?)
    }

    /// Gives the queue up until [`wakeup`](Self::wakeup) for the same event; holds it again before
    /// it returns. Other work runs meanwhile: look again at what was waited for, in a loop.
    ///
    /// `event` is compared and nothing else; an address is customary.
    ///
    /// Errors: `UNSUPPORTED` on a queue that is not reentrant; `NOT_PERMITTED` when the thread does
    /// not hold the queue, holds it twice, or in a concurrent block; `ABORTED` when the queue was
    /// cancelled (it is not held then).
    pub fn sleep(&self, event: usize) -> Result<()> {
        Ok(self.raw.sleep(event, 0, 0)?)
    }

    /// As [`sleep`](Self::sleep), until a deadline in nanoseconds on a clock at the latest.
    /// `SleepWithDeadline`; its option to reuse events is the rule here: events are not used up.
    ///
    /// Errors: `TIMEOUT` at the deadline, and those of `sleep`.
    pub fn sleep_with_deadline(
        &self,
        event: usize,
        clock: IOTimerClock,
        deadline: u64,
    ) -> Result<()> {
        Ok(self.raw.sleep(event, clock as u64, deadline)?)
    }

    /// As [`sleep_with_deadline`](Self::sleep_with_deadline), for a time from now on `UptimeRaw`.
    /// `SleepWithTimeout`, and `Sleep` with a timeout.
    pub fn sleep_with_timeout(&self, event: usize, timeout: Duration) -> Result<()> {
        let clock = IOTimerClock::UptimeRaw;
        let timeout = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        let deadline = self.raw.now(clock as u64)?.saturating_add(timeout);
        self.sleep_with_deadline(event, clock, deadline)
    }

    /// Wakes the thread that has slept longest on an event. Nobody there is no error, and is not
    /// remembered.
    ///
    /// Errors: `NOT_PERMITTED` when the thread does not hold the queue.
    pub fn wakeup(&self, event: usize) -> Result<()> {
        Ok(self.raw.wakeup(event, 0)?)
    }

    /// Wakes all threads that sleep on an event. `WakeupWithOptions` with `WakeupAll`.
    ///
    /// Errors: as [`wakeup`](Self::wakeup).
    pub fn wakeup_all(&self, event: usize) -> Result<()> {
        Ok(self.raw.wakeup(event, 1)?)
    }

    /// Logs a message with the names of the queues the calling thread holds, outermost first, and
    /// returns the names. `Log`.
    pub fn log(&self, message: &str) -> Vec<String> {
        let held = self.raw.held();
        log::info!(held:? = held; "{message}");
        held
    }

    /// Stops the queue: no further work starts; `done` runs after the work in progress, last.
    /// Sleepers are told `ABORTED`.
    pub fn cancel(&self, done: impl FnOnce() + Send + 'static) {
        self.raw.cancel(done);
    }
}
