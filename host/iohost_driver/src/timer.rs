//! Deadlines on a queue.

use std::fmt;

use crate::dispatch_source::HostSource;
use crate::{IODispatchQueue, IODispatchSource, Result, abi};

/// `IOTimerDispatchSource`: has a handler run on a queue once a deadline has passed.
///
/// One-shot: the handler arms it again, computing the next deadline from the previous one, not
/// from now, so that a period does not drift. Starts enabled and not armed. While it is disabled its
/// deadline is kept, and fires when it is enabled if it has passed then; but an expiration whose
/// handler has not started is taken back by disabling. Dropping the timer ends it.
///
/// What it has in common with other sources is in [`IODispatchSource`].
pub struct IOTimerDispatchSource {
    source: abi::Timer,
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
        let source = abi::Timer::create(queue.raw(), handler)?;
        Ok(Self { source })
    }

    /// Replaces the handler from the next expiration on. `queue` is the one given to `create`.
    pub fn set_handler<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        mut handler: impl FnMut(&mut S, u64) + Send + 'static,
    ) -> Result<()> {
        let handler = queue.handler(move |state, time, _: u64| handler(state, time));
        Ok(self.source.set_handler(handler)?)
    }

    /// Fires between `deadline` and `deadline + leeway` nanoseconds on `clock`; a deadline that
    /// has passed fires at once, but not inside this call. Replaces an earlier deadline, which
    /// does not fire any more if this is called on the queue. While disabled the deadline is kept.
    ///
    /// Errors: `UNSUPPORTED` after cancel.
    pub fn wake_at_time(&self, clock: IOTimerClock, deadline: u64, leeway: u64) -> Result<()> {
        Ok(self.source.wake_at(clock as u64, deadline, leeway)?)
    }
}

impl IODispatchSource for IOTimerDispatchSource {}

impl HostSource for IOTimerDispatchSource {
    type Source = abi::Timer;

    fn source(&self) -> &abi::Timer {
        &self.source
    }
}

impl fmt::Debug for IOTimerDispatchSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IOTimerDispatchSource").field(&self.source).finish()
    }
}
