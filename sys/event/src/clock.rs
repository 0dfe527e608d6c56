//! The three clocks that timers can follow.

use nix::sys::timerfd::ClockId as TimerClock;
use nix::time::{ClockId, clock_gettime};

/// A clock of the kernel, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Clock {
    /// `CLOCK_MONOTONIC`: stops while the machine sleeps.
    Uptime,
    /// `CLOCK_BOOTTIME`: goes on while the machine sleeps.
    Continuous,
    /// `CLOCK_REALTIME`: the time of day; can be stepped.
    Wall,
}

impl Clock {
    /// Nanoseconds on this clock now.
    pub fn now(self) -> u64 {
        let id = match self {
            Clock::Uptime => ClockId::CLOCK_MONOTONIC,
            Clock::Continuous => ClockId::CLOCK_BOOTTIME,
            Clock::Wall => ClockId::CLOCK_REALTIME,
        };
        let now = clock_gettime(id).expect("every Linux has these clocks");
        // Neither part is negative: no clock of these starts before 1970, and no fraction does.
        now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
    }

    pub(crate) fn timer_clock(self) -> TimerClock {
        match self {
            Clock::Uptime => TimerClock::CLOCK_MONOTONIC,
            Clock::Continuous => TimerClock::CLOCK_BOOTTIME,
            Clock::Wall => TimerClock::CLOCK_REALTIME,
        }
    }
}
