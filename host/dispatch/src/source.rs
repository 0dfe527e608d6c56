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

/// Has a handler run on a queue whenever a descriptor becomes readable.
///
/// The handler is called at least once after each event (a write to an eventfd, a packet that
/// arrived), never twice at a time, and reads until there is nothing left. Dropping the source
/// stops it: no handler starts afterwards, one in progress ends on its own.
pub struct DescriptorSource<F: AsFd + Send + Sync + 'static> {
    feed: Arc<Feed<F>>,
    token: u64,
}

/// What a source shares with the engine and with its queue.
struct Feed<F> {
    fd: F,
    queue: Queue,
    /// A delivery waits on the queue; one is enough, however many events come.
    scheduled: AtomicBool,
    handler: HandlerSlot<()>,
    this: Weak<Feed<F>>,
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
        let feed = Arc::new_cyclic(|this| Feed {
            fd,
            queue: queue.clone(),
            scheduled: AtomicBool::new(false),
            handler: HandlerSlot::new(Some(Box::new(move |()| handler()))),
            this: this.clone(),
        });
        let watched: Arc<dyn Watched> = feed.clone();
        let token = queue.engine().watch(&feed.fd, Arc::downgrade(&watched))?;
        Ok(Self { feed, token })
    }

    /// The descriptor.
    pub fn descriptor(&self) -> &F {
        &self.feed.fd
    }

    /// The queue the handler runs on.
    pub fn queue(&self) -> &Queue {
        &self.feed.queue
    }

    /// What the engine sees of it.
    #[cfg(all(test, loom))]
    pub(crate) fn watched(&self) -> Arc<dyn Watched> {
        self.feed.clone()
    }

    /// Has the handler called once more, event or not.
    pub fn nudge(&self) {
        self.feed.became_ready(Then::Schedule);
    }
}

impl<F: AsFd + Send + Sync + 'static> Watched for Feed<F> {
    fn became_ready(&self, then: Then) {
        // [event]
        if self.scheduled.swap(true, AcqRel) {
            return;
        }
        if then == Then::RunHere && self.queue.core().run_if_idle(self) {
            return;
        }
        if let Some(this) = self.this.upgrade() {
            self.queue.core().push(Item::Delivery(this));
        }
    }
}

impl<F: AsFd + Send + Sync + 'static> Deliver for Feed<F> {
    fn deliver(&self) {
        // Cleared before the handler reads: an event during the handler leads to one more call.
        // [event] pairs with `became_ready`: an event that found the flag set came before this
        // exchange, which therefore sees it, and so does the handler. A plain store would not say.
        self.scheduled.swap(false, order(Step::AcquireEvents, AcqRel));
        // A handler that sleeps on its queue is called once more after it returned.
        if let Ok(handler) = self.handler.start(|| self.became_ready(Then::Schedule)) {
            handler.call(());
        }
    }
}

impl<F: AsFd + Send + Sync + 'static> Drop for DescriptorSource<F> {
    fn drop(&mut self) {
        self.feed.queue.engine().forget(&self.feed.fd, self.token);
        self.feed.handler.replace(None);
    }
}

impl<F: AsFd + Send + Sync + 'static> fmt::Debug for DescriptorSource<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DescriptorSource").field("queue", &self.feed.queue).finish()
    }
}
