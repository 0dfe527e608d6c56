//! The handler of a source: called by one thread at a time, replaced or removed by any.

use std::sync::Mutex;

use crate::NO_PANIC;

/// A handler for events of type `E`.
pub(crate) type Handler<E> = Box<dyn FnMut(E) + Send>;

/// Where a source keeps its handler.
pub(crate) struct HandlerSlot<E> {
    slot: Mutex<Slot<E>>,
}

enum Slot<E> {
    Empty,
    Present(Handler<E>),
    /// On its queue, taken out so that it may replace or drop itself. What is put in meanwhile
    /// stays; the one that runs is dropped when it returns.
    Running,
}

impl<E> HandlerSlot<E> {
    pub(crate) fn new(handler: Option<Handler<E>>) -> Self {
        Self { slot: Mutex::new(handler.map_or(Slot::Empty, Slot::Present)) }
    }

    /// Whether a handler is there, or runs.
    pub(crate) fn is_set(&self) -> bool {
        !matches!(*self.slot.lock().expect(NO_PANIC), Slot::Empty)
    }

    /// Puts another handler in place, or none. The old one is dropped, after it returned if it
    /// runs now.
    pub(crate) fn replace(&self, handler: Option<Handler<E>>) {
        let new = handler.map_or(Slot::Empty, Slot::Present);
        let old = std::mem::replace(&mut *self.slot.lock().expect(NO_PANIC), new);
        // Not under the lock: a handler can own anything, also its own source.
        drop(old);
    }

    /// Calls the handler; `false` when there is none. Called on the source's queue only, so no
    /// two calls meet.
    pub(crate) fn call(&self, event: E) -> bool {
        let taken = {
            let mut slot = self.slot.lock().expect(NO_PANIC);
            match std::mem::replace(&mut *slot, Slot::Running) {
                Slot::Present(handler) => handler,
                other => {
                    *slot = other;
                    return false;
                }
            }
        };
        let mut running = Running { slot: self, handler: Some(taken) };
        if let Some(handler) = &mut running.handler {
            handler(event);
        }
        true
    }
}

/// Puts a handler back when it returns or panics.
struct Running<'a, E> {
    slot: &'a HandlerSlot<E>,
    handler: Option<Handler<E>>,
}

impl<E> Drop for Running<'_, E> {
    fn drop(&mut self) {
        let mut slot = self.slot.slot.lock().expect(NO_PANIC);
        if matches!(*slot, Slot::Running)
            && let Some(handler) = self.handler.take()
        {
            *slot = Slot::Present(handler);
        }
        // A handler that was replaced meanwhile goes with `self`, after the lock.
    }
}
