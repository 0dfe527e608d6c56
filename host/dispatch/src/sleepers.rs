//! Threads that gave a queue up and wait for an event on it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use iohost_event::Clock;

use crate::NO_PANIC;
use crate::baton::{Baton, Turn};
use crate::deadlines::{Answer, Armed, Deadline, Deadlines, Expire, NoteOf};
use crate::step::{Step, takes};
use crate::sync::Mutex;

/// The sleepers of one queue.
#[derive(Default)]
pub(crate) struct Sleepers {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Longest first.
    list: Vec<Arc<Sleeper>>,
    /// The queue was cancelled: nobody sleeps on it any more.
    aborted: bool,
}

/// One thread that sleeps.
pub(crate) struct Sleeper {
    /// What can wake it; without one only its owner, a deadline and the queue's end can.
    event: Option<usize>,
    baton: Baton,
    /// Written before the engine is told.
    deadline: AtomicU64,
    this: Weak<Sleeper>,
}

impl Sleepers {
    /// Registers the calling thread. On a queue that was cancelled its sleep has ended already.
    pub(crate) fn add(&self, event: impl Into<Option<usize>>) -> Arc<Sleeper> {
        let (event, baton) = (event.into(), Baton::for_this_thread());
        let deadline = AtomicU64::new(0);
        let sleeper =
            Arc::new_cyclic(|this| Sleeper { event, baton, deadline, this: this.clone() });
        let mut state = self.state.lock().expect(NO_PANIC);
        state.list.push(sleeper.clone());
        if state.aborted && takes(Step::LookForAbort) {
            sleeper.baton.end(Turn::Cancelled);
        }
        sleeper
    }

    pub(crate) fn remove(&self, sleeper: &Arc<Sleeper>) {
        let mut state = self.state.lock().expect(NO_PANIC);
        state.list.retain(|other| !Arc::ptr_eq(other, sleeper));
    }

    /// Wakes at most `most` of those that sleep on an event, and returns how many.
    pub(crate) fn wake(&self, event: usize, most: usize) -> usize {
        let state = self.state.lock().expect(NO_PANIC);
        let asleep = state.list.iter().filter(|sleeper| sleeper.event == Some(event));
        // One whose deadline has just passed does not count: its wait is over.
        asleep.filter(|sleeper| sleeper.baton.end(Turn::Granted)).take(most).count()
    }

    /// Ends all sleep, for good.
    pub(crate) fn abort(&self) {
        let mut state = self.state.lock().expect(NO_PANIC);
        state.aborted = true;
        for sleeper in &state.list {
            sleeper.baton.end(Turn::Cancelled);
        }
    }
}

impl Sleeper {
    pub(crate) fn baton(&self) -> &Baton {
        &self.baton
    }

    /// Ends the sleep at a time on a clock, unless what is returned is disarmed first.
    pub(crate) fn end_at(&self, deadlines: &Deadlines, clock: Clock, at: u64) -> Armed {
        let this: Weak<dyn Expire> = self.this.clone();
        self.deadline.store(at, Relaxed);
        deadlines.arm(Deadline { clock, at, leeway: 0 }, this)
    }
}

impl Expire for Sleeper {
    fn ask(&self, _: NoteOf, now: u64) -> Answer {
        // The table's lock, which was taken in between, makes the write seen.
        let deadline = self.deadline.load(Relaxed);
        if deadline <= now {
            Answer::Due { deadline, generation: 0 }
        } else {
            Answer::Later(deadline)
        }
    }

    fn expired(&self, _generation: u32) {
        self.baton.end(Turn::TimedOut);
    }
}
