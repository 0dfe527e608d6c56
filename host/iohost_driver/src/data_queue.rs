//! Data queues on a queue.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;

use iohost_memory::ring::{Bell, Consumer, Producer};

use crate::service::QueueEnd;
use crate::{IODispatchQueue, Result, abi};

/// `IODataQueueDispatchSource`: one end of a data queue, and a handler that runs on a queue when
/// the other end has done something.
///
/// With a [`Consumer`], the handler is DriverKit's `DataAvailable`: take entries until
/// [`QueueError::Underrun`](crate::QueueError::Underrun), or the rest stays unannounced. With a
/// [`Producer`] it is `DataServiced`: after an `Overrun` there is room again, perhaps not enough.
/// Notifications carry no count and can be spurious.
///
/// The end's own methods are there through deref. Dropping the source ends it; the client sees
/// no more entries.
pub struct IODataQueueDispatchSource<End> {
    end: End,
    bell: abi::Descriptor,
    /// Open for as long as it is watched.
    _doorbell: OwnedFd,
}

impl<End> IODataQueueDispatchSource<End> {
    /// Watches the other end from now on. A queue to take from that holds entries already leads
    /// to a call.
    pub fn create<S: Send + 'static>(
        end: QueueEnd<End>,
        queue: &IODispatchQueue<S>,
        mut handler: impl FnMut(&mut S) + Send + 'static,
    ) -> Result<Self> {
        use std::os::fd::AsFd;
        let QueueEnd { end, doorbell, holds_entries } = end;
        let mut handler = queue.handler(move |state, (), ()| handler(state));
        // Watching is edge-triggered, so the doorbell is never read: one write, one call.
        let bell = abi::Descriptor::create(queue.raw(), doorbell.as_fd(), move || handler((), ()))?;
        // Looked at after the watching began, so an entry is seen by one of the two.
        if holds_entries(&end) {
            bell.nudge();
        }
        Ok(Self { end, bell, _doorbell: doorbell })
    }

    /// Has the handler called once more, as if the other end had done something. For a handler
    /// that stopped before the end of its work.
    pub fn check_for_work(&self) {
        self.bell.nudge();
    }
}

impl<End> Deref for IODataQueueDispatchSource<End> {
    type Target = End;

    fn deref(&self) -> &End {
        &self.end
    }
}

impl<End> DerefMut for IODataQueueDispatchSource<End> {
    fn deref_mut(&mut self) -> &mut End {
        &mut self.end
    }
}

impl<End> fmt::Debug for IODataQueueDispatchSource<End> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IODataQueueDispatchSource").field(&self.bell).finish()
    }
}

/// How an end is made from what a session has.
pub(crate) trait RingEnd: Sized {
    fn of(ring: iohost_memory::ring::Ring, bell: Bell) -> Result<Self, crate::QueueError>;

    /// Whether there is something to take.
    fn holds_entries(&self) -> bool;
}

impl RingEnd for Consumer {
    fn of(ring: iohost_memory::ring::Ring, bell: Bell) -> Result<Self, crate::QueueError> {
        Consumer::new(ring, bell)
    }

    fn holds_entries(&self) -> bool {
        self.is_data_available()
    }
}

impl RingEnd for Producer {
    fn of(ring: iohost_memory::ring::Ring, bell: Bell) -> Result<Self, crate::QueueError> {
        Producer::new(ring, bell)
    }

    fn holds_entries(&self) -> bool {
        false
    }
}
