//! What time it is for an engine's timers: the kernel's clocks, or virtual ones that a test moves.

use std::sync::Mutex;
use std::time::Duration;

use iohost_event::Clock;

use crate::{Engine, EngineClock, NO_PANIC};

/// The clocks of one engine.
pub(crate) enum Clocks {
    Real,
    Virtual(Mutex<VirtualTime>),
}

/// Nanoseconds.
#[derive(Clone, Copy)]
pub(crate) struct VirtualTime {
    uptime: u64,
    continuous: u64,
    wall: u64,
}

/// Where each virtual clock starts.
const START: u64 = 1_000_000_000;

impl Clocks {
    pub(crate) fn new(clock: EngineClock) -> Self {
        match clock {
            EngineClock::Real => Self::Real,
            EngineClock::Virtual => {
                let start = VirtualTime { uptime: START, continuous: START, wall: START };
                Self::Virtual(Mutex::new(start))
            }
        }
    }

    pub(crate) fn are_real(&self) -> bool {
        matches!(self, Self::Real)
    }

    pub(crate) fn now(&self, clock: Clock) -> u64 {
        let Self::Virtual(time) = self else { return clock.now() };
        let time = time.lock().expect(NO_PANIC);
        match clock {
            Clock::Uptime => time.uptime,
            Clock::Continuous => time.continuous,
            Clock::Wall => time.wall,
        }
    }

    fn change(&self, change: impl FnOnce(&mut VirtualTime)) {
        let Self::Virtual(time) = self else {
            panic!("the kernel's clocks are not an engine's to move")
        };
        change(&mut time.lock().expect(NO_PANIC));
    }
}

/// Virtual time. What comes due by a change fires at the next [`settle`](Self::settle), as the
/// kernel would have it: a timer with leeway at the end of its leeway, or when the engine wakes up
/// for another timer on the same clock after its deadline.
///
/// Each of these panics on an engine with real clocks.
impl Engine {
    /// Moves all clocks forward.
    pub fn advance(&self, by: Duration) {
        let by = by.as_nanos() as u64;
        self.shared().deadlines.clocks().change(|time| {
            time.uptime += by;
            time.continuous += by;
            time.wall += by;
        });
    }

    /// Has the machine sleep: [`Clock::Continuous`] and [`Clock::Wall`] go on, [`Clock::Uptime`]
    /// stands still.
    pub fn suspend(&self, by: Duration) {
        let by = by.as_nanos() as u64;
        self.shared().deadlines.clocks().change(|time| {
            time.continuous += by;
            time.wall += by;
        });
    }

    /// Steps [`Clock::Wall`], forward or back, to a time since 1970, as `clock_settime(2)` does.
    pub fn set_wall_clock(&self, since_1970: Duration) {
        let to = since_1970.as_nanos() as u64;
        self.shared().deadlines.clocks().change(|time| time.wall = to);
    }
}
