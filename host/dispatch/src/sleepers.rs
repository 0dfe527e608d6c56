//! Threads that gave a queue up and wait for an event on it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};

use iohost_event::Clock;

use crate::NO_PANIC;
use crate::baton::{Baton, Turn};
use crate::deadlines::{Answer, Armed, Deadline, Deadlines, Expire, NoteOf};

/// The sleepers of one queue, longest first.
#[derive(Default)]
pub(crate) struct Sleepers {
    list: Mutex<Vec<Arc<Sleeper>>>,
}

/// One thread that sleeps.
pub(crate) struct Sleeper {
    event: usize,
    baton: Baton,
    /// Written before the engine is told.
    deadline: AtomicU64,
    this: Weak<Sleeper>,
}

impl Sleepers {
    /// Registers the calling thread.
    pub(crate) fn add(&self, event: usize) -> Arc<Sleeper> {
        let baton = Baton::for_this_thread();
        let deadline = AtomicU64::new(0);
        let sleeper =
            Arc::new_cyclic(|this| Sleeper { event, baton, deadline, this: this.clone() });
        self.list.lock().expect(NO_PANIC).push(sleeper.clone());
        sleeper
    }

    pub(crate) fn remove(&self, sleeper: &Arc<Sleeper>) {
        self.list.lock().expect(NO_PANIC).retain(|other| !Arc::ptr_eq(other, sleeper));
    }

    /// Wakes at most `most` of those that sleep on an event, and returns how many.
    pub(crate) fn wake(&self, event: usize, most: usize) -> usize {
        let list = self.list.lock().expect(NO_PANIC);
        let asleep = list.iter().filter(|sleeper| sleeper.event == event);
        // One whose deadline has just passed does not count: its wait is over.
        asleep.filter(|sleeper| sleeper.baton.end(Turn::Granted)).take(most).count()
    }

    /// Ends all sleep.
    pub(crate) fn abort(&self) {
        let list = self.list.lock().expect(NO_PANIC);
        for sleeper in list.iter() {
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
