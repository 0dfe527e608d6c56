//! An interrupt that should come, and does not.

use std::fmt;
use std::time::Duration;

use crate::{
    Error, IODispatchQueue, IODispatchSource, IOReturn, IOTimerClock, IOTimerDispatchSource, Result,
};

/// Watches for an interrupt that a driver has reason to expect, and has a handler run on its queue
/// when it does not come: a line that is wired to nothing, a message that was lost, a device that
/// hangs. The handler can look at the device itself, and go on by polling.
///
/// ```ignore
/// let late = ExpectedInterrupt::create(queue, |edu: &mut Edu| edu.poll())?;
/// // Where the device is told to start:
/// self.late.expect_within(Duration::from_millis(100))?;
/// // First thing in the handler of the interrupt:
/// self.late.arrived()?;
/// ```
///
/// An interrupt that came in the last moment can wait for its turn on the queue while the handler
/// here runs: [`last_interrupt`](crate::IOInterruptDispatchSource::last_interrupt) has it counted
/// then.
///
/// Costs a timer that is armed and disarmed; nothing while nothing is expected. Dropping it ends it.
pub struct ExpectedInterrupt {
    timer: IOTimerDispatchSource,
    /// The queue's time.
    now: Box<dyn Fn() -> u64 + Send + Sync>,
}

impl ExpectedInterrupt {
    /// Makes one that expects nothing yet. `handler` is called once for each expectation that was
    /// not met.
    ///
    /// Errors: as those of a timer.
    pub fn create<S: Send + 'static>(
        queue: &IODispatchQueue<S>,
        mut handler: impl FnMut(&mut S) + Send + 'static,
    ) -> Result<Self> {
        let timer = IOTimerDispatchSource::create(queue, move |state: &mut S, _| handler(state))?;
        let queue = queue.clone();
        Ok(Self { timer, now: Box::new(move || queue.now(CLOCK)) })
    }

    /// An interrupt has to come within this time from now. Replaces an expectation from before.
    ///
    /// Errors: `OVERRUN` for a time that no clock reaches.
    pub fn expect_within(&self, time: Duration) -> Result<()> {
        let time = u64::try_from(time.as_nanos()).ok();
        let deadline = time.and_then(|time| (self.now)().checked_add(time));
        let deadline = deadline.ok_or_else(|| {
            Error::new(IOReturn::OVERRUN, "an interrupt that is expected in more than 584 years")
        })?;
        self.timer.wake_at_time(CLOCK, deadline, 0)?;
        self.timer.set_enable(true)
    }

    /// It came: nothing is expected any more.
    pub fn arrived(&self) -> Result<()> {
        self.timer.set_enable(false)
    }
}

/// What a device has to do does not go on while the machine sleeps.
const CLOCK: IOTimerClock = IOTimerClock::UptimeRaw;

impl fmt::Debug for ExpectedInterrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ExpectedInterrupt").field(&self.timer).finish()
    }
}
