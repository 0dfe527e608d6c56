//! Descriptors that feed a queue.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use crate::Queue;
use crate::handler::HandlerSlot;
use crate::queue::{Deliver, Item};
use crate::step::{Step, order};
use crate::sync::atomic::{AtomicBool, Ordering::AcqRel};

/// A source, seen from the engine.
pub(crate) trait Watched: Send + Sync {
    /// The descriptor became readable.
    fn became_ready(&self, then: Then);
}

/// What a source does with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Puts its delivery on its queue.
    Schedule,
    /// Delivers on this thread, if its queue is idle; else as above. That spares a worker, which
    /// has nothing else to do, the way over the queue's lists.
    RunHere,
}

/// What is called, on its queue, when a descriptor became readable.
pub(crate) trait Receiver: Send + Sync + 'static {
    /// Reads what there is. Called by one thread at a time, but for a handler that sleeps on its
    /// queue: what finds it running has `again` called after it returned.
    fn receive(&self, again: impl FnOnce());

    /// The source has ended: no handler starts after this.
    fn end(&self);
}

/// Watches a descriptor for a receiver, until it is dropped.
pub(crate) struct Watch<F: AsFd + Send + Sync + 'static, R: Receiver> {
    feed: Arc<Feed<F, R>>,
    token: u64,
}

/// What a watch shares with the engine and with its queue.
struct Feed<F, R> {
    fd: F,
    queue: Queue,
    /// A delivery waits on the queue; one is enough, however many events come.
    scheduled: AtomicBool,
    receiver: R,
    this: Weak<Feed<F, R>>,
}

impl<F: AsFd + Send + Sync + 'static, R: Receiver> Watch<F, R> {
    /// Watches `fd` from now on. A descriptor that is readable already leads to a call.
    ///
    /// Errors: what `epoll_ctl` says, such as `PermissionDenied` for a plain file.
    pub(crate) fn create(queue: &Queue, fd: F, receiver: R) -> io::Result<Self> {
        let feed = Arc::new_cyclic(|this| Feed {
            fd,
            queue: queue.clone(),
            scheduled: AtomicBool::new(false),
            receiver,
            this: this.clone(),
        });
        let watched: Arc<dyn Watched> = feed.clone();
        let token = queue.engine().watch(&feed.fd, Arc::downgrade(&watched))?;
        Ok(Self { feed, token })
    }

    /// Has the receiver called once more, event or not.
    pub(crate) fn nudge(&self) {
        self.feed.became_ready(Then::Schedule);
    }
}

impl<F: AsFd + Send + Sync + 'static, R: Receiver> Watched for Feed<F, R> {
    fn became_ready(&self, then: Then) {
        // A delivery that is scheduled meanwhile finds nothing left, or what has come since.
        if then == Then::RunHere && self.queue.core().run_if_idle(|| self.receive()) {
            return;
        }
        // [event]
        if self.scheduled.swap(true, AcqRel) {
            return;
        }
        if let Some(this) = self.this.upgrade() {
            self.queue.core().push(Item::Delivery(this));
        }
    }
}

impl<F: AsFd + Send + Sync + 'static, R: Receiver> Deliver for Feed<F, R> {
    fn deliver(&self) {
        // Cleared before the handler reads: an event during the handler leads to one more call.
        // [event] pairs with `became_ready`: an event that found the flag set came before this
        // exchange, which therefore sees it, and so does the handler. A plain store would not say.
        self.scheduled.swap(false, order(Step::AcquireEvents, AcqRel));
        self.receive();
    }
}

impl<F: AsFd + Send + Sync + 'static, R: Receiver> Feed<F, R> {
    fn receive(&self) {
        self.receiver.receive(|| self.became_ready(Then::Schedule));
    }
}

impl<F: AsFd + Send + Sync + 'static, R: Receiver> Drop for Watch<F, R> {
    fn drop(&mut self) {
        self.feed.queue.engine().forget(&self.feed.fd, self.token);
        self.feed.receiver.end();
    }
}

/// Has a handler run on a queue whenever a descriptor becomes readable.
///
/// The handler is called at least once after each event (a write to an eventfd, a packet that
/// arrived), never twice at a time, and reads until there is nothing left. Dropping the source
/// stops it: no handler starts afterwards, one in progress ends on its own.
pub struct DescriptorSource<F: AsFd + Send + Sync + 'static> {
    watch: Watch<F, HandlerSlot<()>>,
}

impl<F: AsFd + Send + Sync + 'static> DescriptorSource<F> {
    /// Watches `fd` from now on. A descriptor that is readable already leads to a call.
    ///
    /// Errors: what `epoll_ctl` says, such as `PermissionDenied` for a plain file.
    pub fn create(
        queue: &Queue,
        fd: F,
        mut handler: impl FnMut() + Send + 'static,
    ) -> io::Result<Self> {
        let handler = HandlerSlot::new(Some(Box::new(move |()| handler())));
        Ok(Self { watch: Watch::create(queue, fd, handler)? })
    }

    /// The descriptor.
    pub fn descriptor(&self) -> &F {
        &self.watch.feed.fd
    }

    /// The queue the handler runs on.
    pub fn queue(&self) -> &Queue {
        &self.watch.feed.queue
    }

    /// What the engine sees of it.
    #[cfg(all(test, loom))]
    pub(crate) fn watched(&self) -> Arc<dyn Watched> {
        self.watch.feed.clone()
    }

    /// Has the handler called once more, event or not.
    pub fn nudge(&self) {
        self.watch.nudge();
    }
}

impl Receiver for HandlerSlot<()> {
    fn receive(&self, again: impl FnOnce()) {
        if let Ok(handler) = self.start(again) {
            handler.call(());
        }
    }

    fn end(&self) {
        self.replace(None);
    }
}

impl<F: AsFd + Send + Sync + 'static> fmt::Debug for DescriptorSource<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DescriptorSource").field("queue", self.queue()).finish()
    }
}
