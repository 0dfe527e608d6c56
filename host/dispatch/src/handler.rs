//! The handler of a source: called by one thread at a time, replaced or removed by any.

use std::sync::Mutex;

use crate::NO_PANIC;

/// A handler for events of type `E`.
pub(crate) type Handler<E> = Box<dyn FnMut(E) + Send>;

/// Where a source keeps its handler.
pub(crate) struct HandlerSlot<E> {
    slot: Mutex<Slot<E>>,
}

/// A handler that runs is taken out, so that it may replace or drop itself.
struct Slot<E> {
    handler: Option<Handler<E>>,
    running: bool,
    /// While it ran another one was put in its place, or none.
    replaced: bool,
    /// While it ran another call was due.
    missed: bool,
}

/// Why a handler cannot be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotNow {
    /// There is none.
    Absent,
    /// It gave its queue up in a sleep and has not returned.
    Running,
}

impl<E> HandlerSlot<E> {
    pub(crate) fn new(handler: Option<Handler<E>>) -> Self {
        Self { slot: Mutex::new(Slot { handler, running: false, replaced: false, missed: false }) }
    }

    /// Whether a handler is there, or runs.
    pub(crate) fn is_set(&self) -> bool {
        let slot = self.slot.lock().expect(NO_PANIC);
        slot.handler.is_some() || (slot.running && !slot.replaced)
    }

    /// Puts another handler in place, or none. The old one is dropped, after it returned if it
    /// runs now.
    pub(crate) fn replace(&self, handler: Option<Handler<E>>) {
        // Not under the lock: a handler can own anything, also its own source.
        drop(self.swap(handler));
    }

    /// Puts another handler in place, or none, and hands out the old one unless it runs now: then
    /// it is dropped when it returns.
    #[must_use = "to be dropped where no lock is held"]
    pub(crate) fn swap(&self, handler: Option<Handler<E>>) -> Option<Handler<E>> {
        let mut slot = self.slot.lock().expect(NO_PANIC);
        slot.replaced = slot.running;
        std::mem::replace(&mut slot.handler, handler)
    }

    /// Takes the handler for a call. `again` is called after it, also after a panic, if another
    /// one found it running meanwhile.
    pub(crate) fn start<A: FnOnce()>(&self, again: A) -> Result<Running<'_, E, A>, NotNow> {
        let mut slot = self.slot.lock().expect(NO_PANIC);
        if slot.running {
            slot.missed = true;
            return Err(NotNow::Running);
        }
        let handler = slot.handler.take().ok_or(NotNow::Absent)?;
        (slot.running, slot.replaced) = (true, false);
        drop(slot);
        Ok(Running { slot: self, handler: Some(handler), again: Some(again) })
    }
}

/// A handler that was taken for a call. Put back on drop.
pub(crate) struct Running<'a, E, A: FnOnce()> {
    slot: &'a HandlerSlot<E>,
    handler: Option<Handler<E>>,
    again: Option<A>,
}

impl<E, A: FnOnce()> Running<'_, E, A> {
    pub(crate) fn call(mut self, event: E) {
        if let Some(handler) = &mut self.handler {
            handler(event);
        }
    }
}

impl<E, A: FnOnce()> Drop for Running<'_, E, A> {
    fn drop(&mut self) {
        let mut slot = self.slot.slot.lock().expect(NO_PANIC);
        slot.running = false;
        if !slot.replaced {
            slot.handler = self.handler.take();
        }
        let missed = std::mem::take(&mut slot.missed);
        drop(slot);
        // A handler that was replaced meanwhile goes here, not under the lock.
        self.handler = None;
        if let Some(again) = self.again.take().filter(|_| missed) {
            again();
        }
    }
}
