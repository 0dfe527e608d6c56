//! A thread that waits until another one ends its wait.

use crate::step::{Step, order, takes};
use crate::sync::atomic::AtomicU8;
use crate::sync::atomic::Ordering::{AcqRel, Acquire};
use crate::sync::hint;
use crate::sync::parking::{self, Thread};

/// The wait of the thread that made it.
pub(crate) struct Baton {
    turn: AtomicU8,
    thread: Thread,
}

/// How a wait stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Turn {
    Waiting,
    Granted,
    TimedOut,
    Cancelled,
}

impl Baton {
    pub(crate) fn for_this_thread() -> Self {
        Self { turn: AtomicU8::new(Turn::Waiting as u8), thread: parking::current() }
    }

    /// Ends the wait. `false` when it had ended: the first end counts.
    pub(crate) fn end(&self, turn: Turn) -> bool {
        let waiting = Turn::Waiting as u8;
        // [turn] pairs with `turn`: what the ender wrote before is seen by the waiter.
        let ended = self
            .turn
            .compare_exchange(waiting, turn as u8, order(Step::ReleaseTurn, AcqRel), Acquire)
            .is_ok();
        if ended && takes(Step::Unpark) {
            self.thread.unpark();
        }
        ended
    }

    pub(crate) fn turn(&self) -> Turn {
        match self.turn.load(Acquire) {
            // [turn]
            0 => Turn::Waiting,
            1 => Turn::Granted,
            2 => Turn::TimedOut,
            _ => Turn::Cancelled,
        }
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.turn() == Turn::Waiting
    }

    /// Looks so many times whether the wait has ended, then sleeps until it has. On the thread that
    /// made it.
    pub(crate) fn wait(&self, looks: u32) {
        for _ in 0..looks {
            if !self.is_waiting() {
                return;
            }
            hint::spin_loop();
        }
        // An unpark before the park makes it return at once; one that was meant for an earlier
        // wait makes it return early, hence the loop.
        while self.is_waiting() {
            parking::park();
            if !takes(Step::LookAfterPark) {
                return;
            }
        }
    }
}
