//! A timerfd.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::Clock;

/// A one-shot timer of the kernel that follows one clock; readable once it has expired.
#[derive(Debug)]
pub struct Timer {
    fd: TimerFd,
}

impl Timer {
    /// Makes a timer that is not armed.
    pub fn new(clock: Clock) -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Self { fd: TimerFd::new(clock.timer_clock(), flags)? })
    }

    /// Expires at `deadline`, in nanoseconds on the timer's clock; a past deadline expires now.
    /// Replaces an earlier deadline.
    pub fn arm(&self, deadline: u64) -> io::Result<()> {
        // Zero would disarm; one nanosecond after the clock's origin is as past as zero.
        let at = TimeSpec::from_duration(Duration::from_nanos(deadline.max(1)));
        self.fd.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
        Ok(())
    }

    /// Forgets the deadline.
    pub fn disarm(&self) -> io::Result<()> {
        Ok(self.fd.unset()?)
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
