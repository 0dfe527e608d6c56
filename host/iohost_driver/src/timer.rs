//! Deadlines on a queue.

use std::fmt;

use crate::{IODispatchQueue, Result, abi};

/// `IOTimerDispatchSource`: has a handler run on a queue once a deadline has passed.
///
/// One-shot: the handler arms it again, computing the next deadline from the previous one, not
/// from now, so that a period does not drift. Starts enabled and not armed. Dropping it ends it.
pub struct IOTimerDispatchSource {
    timer: abi::Timer,
}

/// `kIOTimerClock…`: the clock a deadline is on. All count nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum IOTimerClock {
    /// The time of day, since 1970; a step of the clock moves the moment of firing.
    /// `CLOCK_REALTIME`. Also called `WallTime`.
    RealTime = 0x80,
    /// Runs through system sleep. `CLOCK_BOOTTIME`.
    MonotonicRaw = 0x84,
    /// Stops in system sleep. `CLOCK_MONOTONIC`.
    UptimeRaw = 0x88,
    /// `MonotonicRaw` in ticks; a tick is a nanosecond here.
    MachContinuousTime = 0xC4,
    /// `UptimeRaw` in ticks; a tick is a nanosecond here.
    MachAbsoluteTime = 0xC8,
}

impl IOTimerDispatchSource {
    /// Makes a timer; it does nothing until [`wake_at_time`](Self::wake_at_time). The handler
    /// gets the time at which the timer fired on `UptimeRaw`, whatever clock the deadline was on.
    pub fn create<S: Send + 'static>(
        queue: &IODispatchQueue<S>,
        mut handler: impl FnMut(&mut S, u64) + Send + 'static,
    ) -> Result<Self> {
        let handler = queue.handler(move |state, time, _: u64| handler(state, time));
        let timer = abi::Timer::create(queue.raw(), handler)?;
        Ok(Self { timer })
    }

    /// Replaces the handler from the next expiration on. `queue` is the one given to `create`.
    pub fn set_handler<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        mut handler: impl FnMut(&mut S, u64) + Send + 'static,
    ) -> Result<()> {
        let handler = queue.handler(move |state, time, _: u64| handler(state, time));
        Ok(self.timer.set_handler(handler)?)
    }

    /// Fires between `deadline` and `deadline + leeway` nanoseconds on `clock`; a deadline that
    /// has passed fires at once, but not inside this call. Replaces an earlier deadline, which
    /// does not fire any more if this is called on the queue. While disabled the deadline is kept.
    ///
    /// Errors: `UNSUPPORTED` after cancel.
    pub fn wake_at_time(&self, clock: IOTimerClock, deadline: u64, leeway: u64) -> Result<()> {
        Ok(self.timer.wake_at(clock as u64, deadline, leeway)?)
    }

    /// Enables or disables firing. A deadline that passes while disabled fires when enabled.
    ///
    /// Errors: `UNSUPPORTED` for a change after cancel.
    pub fn set_enable(&self, enable: bool) -> Result<()> {
        Ok(self.timer.set_enable(enable, None::<fn()>)?)
    }

    /// As [`set_enable`](Self::set_enable), and `done` runs once on the queue after a handler in
    /// flight has returned; also when nothing changed.
    pub fn set_enable_with_completion<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        enable: bool,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) -> Result<()> {
        Ok(self.timer.set_enable(enable, queue.completion(done))?)
    }

    /// Ends the timer. `done` runs on the queue once no handler runs or will run.
    pub fn cancel<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) {
        self.timer.cancel(queue.completion(done));
    }
}

impl fmt::Debug for IOTimerDispatchSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IOTimerDispatchSource").field(&self.timer).finish()
    }
}
