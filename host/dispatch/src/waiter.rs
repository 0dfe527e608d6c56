//! A thread that waits until a source has delivered something.

use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Mutex};

use iohost_interface::IOReturn;

use crate::baton::Turn;
use crate::sleepers::Sleeper;
use crate::{NO_PANIC, Queue};

/// The place of a source's waiter: one thread at a time.
#[derive(Default)]
pub(crate) struct Waiter {
    waiting: Mutex<Option<Arc<Sleeper>>>,
    /// Somebody waits. A delivery with nobody to tell, as most are, does without the lock.
    is_there: AtomicBool,
}

impl Waiter {
    /// Waits for a delivery that begins from now on, until its handler has returned. `look` runs
    /// once the wait has begun, and `false` of it ends the wait.
    ///
    /// Errors: `NOT_PERMITTED` on the source's queue, which the handler needs; `BUSY` while
    /// another thread waits; `ABORTED` when `look` says so, when the source or its queue is
    /// cancelled, or when a manual engine has nothing left to run.
    pub(crate) fn wait(&self, queue: &Queue, look: impl FnOnce() -> bool) -> Result<(), IOReturn> {
        if queue.on_queue() {
            return Err(IOReturn::NOT_PERMITTED);
        }
        let sleepers = &queue.core().sleepers;
        let mut waiting = self.waiting.lock().expect(NO_PANIC);
        if waiting.is_some() {
            return Err(IOReturn::BUSY);
        }
        // One of the queue's sleepers, so that the queue's end ends this too.
        let sleeper = sleepers.add(None);
        *waiting = Some(sleeper.clone());
        self.is_there.store(true, Release);
        drop(waiting);
        if look() {
            queue.engine().wait_for(sleeper.baton());
        }
        let mut waiting = self.waiting.lock().expect(NO_PANIC);
        *waiting = None;
        self.is_there.store(false, Release);
        drop(waiting);
        sleepers.remove(&sleeper);
        match sleeper.baton().turn() {
            Turn::Granted => Ok(()),
            Turn::Waiting | Turn::TimedOut | Turn::Cancelled => Err(IOReturn::ABORTED),
        }
    }

    /// A handler is about to be called; the waiter is told when what this returns is dropped, so
    /// also when the handler panics.
    pub(crate) fn delivering(&self) -> Delivering {
        if !self.is_there.load(Acquire) {
            return Delivering(None);
        }
        Delivering(self.waiting.lock().expect(NO_PANIC).clone())
    }

    /// The source has ended.
    pub(crate) fn cancel(&self) {
        if let Some(sleeper) = &*self.waiting.lock().expect(NO_PANIC) {
            sleeper.baton().end(Turn::Cancelled);
        }
    }
}

/// Tells whoever waited when the delivery began.
pub(crate) struct Delivering(Option<Arc<Sleeper>>);

impl Drop for Delivering {
    fn drop(&mut self) {
        if let Some(sleeper) = &self.0 {
            sleeper.baton().end(Turn::Granted);
        }
    }
}
