//! Data queues on a queue.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use iohost_interface::IOReturn;
use iohost_memory::SharedMemory;
use iohost_memory::ring::{Bell, Consumer, Handling, Producer, Ring};

use crate::dispatch_source::HostSource;
use crate::service::QueueEnd;
use crate::{Error, IODispatchQueue, IODispatchSource, Result, abi};

/// `IODataQueueDispatchSource`: one end of a data queue, and a handler that runs on a queue when
/// the other end has done something.
///
/// With a [`Consumer`], the handler is DriverKit's `DataAvailable`: take entries until
/// [`QueueError::Underrun`](crate::QueueError::Underrun), or the rest stays unannounced. With a
/// [`Producer`] it is `DataServiced`: after an `Overrun` there is room again, perhaps not enough.
/// Notifications carry no count and can be spurious.
///
/// The end's own methods are there through deref. They work whether or not the source is enabled
/// or cancelled: those concern the handler alone. Dropping the source ends it; the client sees no
/// more entries.
///
/// What it has in common with other sources is in [`IODispatchSource`]. It starts enabled. What the
/// other end announces while it is disabled is kept, and leads to one call once it is enabled.
/// [`check_for_work`](IODispatchSource::check_for_work) has the handler of a consumer called if there
/// are entries; a producer has nothing that could be looked at, so it says `NOT_READY`.
pub struct IODataQueueDispatchSource<End> {
    end: End,
    bell: Arc<abi::Descriptor>,
    has_handler: AtomicBool,
    doorbell: OwnedFd,
}

impl<End: RingEnd> IODataQueueDispatchSource<End> {
    /// Watches the other end from now on. A queue to take from that holds entries already leads
    /// to a call.
    ///
    /// Errors: `NO_RESOURCES` when no descriptor is left.
    pub fn create<S: Send + 'static>(
        end: QueueEnd<End>,
        queue: &IODispatchQueue<S>,
        handler: impl FnMut(&mut S) + Send + 'static,
    ) -> Result<Self> {
        let QueueEnd { end, doorbell } = end;
        // The handler needs the source that it belongs to, so it comes second. Nothing is missed: no
        // DataServiced can be asked for before there is a source, and entries are looked for.
        let bell = Arc::new(abi::Descriptor::create(queue.raw(), doorbell.as_fd(), || ())?);
        let source = Self { end, bell, has_handler: AtomicBool::new(false), doorbell };
        source.set_handler(queue, handler);
        Ok(source)
    }

    /// Replaces the handler from the next call on. `queue` is the one given to `create`.
    /// `SetDataAvailableHandler` and `SetDataServicedHandler`.
    ///
    /// A consumer's is called once if there are entries now. A producer's is not, unless a
    /// DataServiced came while there was no handler; that one it gets.
    pub fn set_handler<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        mut handler: impl FnMut(&mut S) + Send + 'static,
    ) {
        let mut handler = queue.handler(move |state, (), ()| handler(state));
        let (handling, bell) = (self.end.handling(), Arc::downgrade(&self.bell));
        let came = self.bell.set_handler(Some(move || {
            handling.begin();
            let call = Call { handling: &handling, bell: &bell };
            handler((), ());
            drop(call);
        }));
        self.has_handler.store(true, Relaxed);
        // Looked at after the handler is there, so an entry is seen by one of the two.
        if self.end.is_due(came) {
            self.bell.nudge();
        }
    }

    /// Removes the handler: nobody is called until there is another one. One that runs now goes when
    /// it has returned. `Set…Handler` without an action.
    pub fn remove_handler(&self) {
        self.has_handler.store(false, Relaxed);
        self.bell.set_handler(None::<fn()>);
    }

    /// Something that can be rung to have the handler called, as the other end does; in this process
    /// or, as a descriptor, in another one. `CopyDataAvailableHandler` and `CopyDataServicedHandler`.
    ///
    /// It is the client's bell, too: a hostile one can have [`Bell::ring`] block.
    ///
    /// Errors: `NOT_READY` while there is no handler, `NO_RESOURCES` when no descriptor is left.
    pub fn copy_handler(&self) -> Result<Bell> {
        if !self.has_handler.load(Relaxed) {
            return Err(Error::new(IOReturn::NOT_READY, "the data queue has no handler to copy"));
        }
        let doorbell = self.doorbell.try_clone();
        Ok(doorbell.map_err(|err| Error::new(IOReturn::NO_RESOURCES, err.to_string()))?.into())
    }

    /// One more reference to the memory of the queue, which lives as long as the last one.
    /// `CopyMemory`.
    pub fn copy_memory(&self) -> Arc<SharedMemory> {
        self.end.ring_of().memory().clone()
    }
}

/// A handler that runs. Its end, also by a panic, is the end of what the other end is told.
struct Call<'a> {
    handling: &'a Handling,
    bell: &'a Weak<abi::Descriptor>,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if self.handling.end()
            && let Some(bell) = self.bell.upgrade()
        {
            bell.nudge();
        }
    }
}

impl<End: RingEnd> IODispatchSource for IODataQueueDispatchSource<End> {}

impl<End: RingEnd> HostSource for IODataQueueDispatchSource<End> {
    type Source = Self;

    fn source(&self) -> &Self {
        self
    }
}

impl<End: RingEnd> abi::Source for IODataQueueDispatchSource<End> {
    fn set_enable(
        &self,
        enable: bool,
        done: Option<impl FnOnce() + Send + 'static>,
    ) -> Result<(), IOReturn> {
        self.bell.set_enable(enable, done)
    }

    fn cancel(&self, done: impl FnOnce() + Send + 'static) {
        self.has_handler.store(false, Relaxed);
        self.bell.cancel(done);
    }

    fn check_for_work(&self) -> Result<(), IOReturn> {
        if self.end.is_due(false) { self.bell.check_for_work() } else { Err(IOReturn::NOT_READY) }
    }

    fn wait_for_work(&self) -> Result<(), IOReturn> {
        self.bell.wait_for_work()
    }
}

impl IODataQueueDispatchSource<Consumer> {
    /// The other end sends no notifications from here on, which would cost it a system call each:
    /// the driver looks for entries by itself, as often as it can.
    ///
    /// Until [`end_polling`](Self::end_polling), or the next call of the handler, whose end takes it
    /// back too. On the source's queue.
    pub fn begin_polling(&self) {
        self.end.handling().begin();
    }

    /// The other end sends notifications again. Take entries until
    /// [`QueueError::Underrun`](crate::QueueError::Underrun) after this: what came before was not
    /// announced.
    pub fn end_polling(&self) {
        // Whether a notification was left out does not matter, as the caller looks in any case.
        let _ = self.end.handling().end();
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

/// What the two ends have in common. Nobody outside of the crate can name it.
pub trait RingEnd: Sized {
    fn of(ring: Ring, bell: Bell) -> Result<Self, crate::QueueError>;

    fn ring_of(&self) -> &Ring;

    fn handling(&self) -> Handling;

    /// Whether a handler that is new has to be called. `came`: a notification came while there was
    /// none.
    fn is_due(&self, came: bool) -> bool;
}

impl RingEnd for Consumer {
    fn of(ring: Ring, bell: Bell) -> Result<Self, crate::QueueError> {
        Consumer::new(ring, bell)
    }

    fn ring_of(&self) -> &Ring {
        self.ring()
    }

    fn handling(&self) -> Handling {
        Consumer::handling(self)
    }

    /// Entries are all that a notification could announce.
    fn is_due(&self, _came: bool) -> bool {
        self.is_data_available()
    }
}

impl RingEnd for Producer {
    fn of(ring: Ring, bell: Bell) -> Result<Self, crate::QueueError> {
        Producer::new(ring, bell)
    }

    fn ring_of(&self) -> &Ring {
        self.ring()
    }

    fn handling(&self) -> Handling {
        Producer::handling(self)
    }

    fn is_due(&self, came: bool) -> bool {
        came
    }
}
