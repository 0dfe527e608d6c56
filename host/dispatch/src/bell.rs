//! Notifications between processes that carry nothing: the bells of a data queue.
//!
//! The descriptor is watched edge-triggered and never read: one write, one call.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use iohost_interface::IOReturn;
use iohost_memory::flight_recorder::Kind;

use crate::handler::{Handler, HandlerSlot, NotNow};
use crate::source::{Receiver, Watch};
use crate::waiter::Waiter;
use crate::{Block, NO_PANIC, Queue};

/// Has a handler run on a queue for each write to an eventfd, or one call for several. Starts
/// enabled.
pub struct BellSource {
    core: Arc<BellCore>,
    watch: Mutex<Option<Watch<OwnedFd, Arc<BellCore>>>>,
}

struct BellCore {
    queue: Queue,
    state: Mutex<State>,
    handler: HandlerSlot<()>,
    waiter: Waiter,
}

struct State {
    enabled: bool,
    cancelled: bool,
    /// It rang while the source was disabled or had no handler.
    kept: bool,
}

impl BellSource {
    /// Watches `bell` from now on. One that has been rung already leads to a call.
    ///
    /// Errors: what `epoll_ctl` says.
    pub fn create(
        queue: &Queue,
        bell: OwnedFd,
        mut handler: impl FnMut() + Send + 'static,
    ) -> io::Result<Self> {
        let core = Arc::new(BellCore {
            queue: queue.clone(),
            state: Mutex::new(State { enabled: true, cancelled: false, kept: false }),
            handler: HandlerSlot::new(Some(Box::new(move |()| handler()))),
            waiter: Waiter::default(),
        });
        let watch = Watch::create(queue, bell, core.clone())?;
        Ok(Self { core, watch: Mutex::new(Some(watch)) })
    }

    /// Has the handler called once more, as if the bell had been rung.
    pub fn nudge(&self) {
        if let Some(watch) = &*self.watch.lock().expect(NO_PANIC) {
            watch.nudge();
        }
    }

    /// Replaces the handler from the next call on, or removes it. Whether there were rings that were
    /// kept: a new handler is not called for them, so the caller decides what they are worth.
    pub fn set_handler(&self, handler: Option<impl FnMut() + Send + 'static>) -> bool {
        let handler = handler.map(|mut handler| Box::new(move |()| handler()) as Handler<()>);
        let mut state = self.core.state.lock().expect(NO_PANIC);
        let handler = handler.filter(|_| !state.cancelled);
        let is_new = handler.is_some();
        let old = self.core.handler.swap(handler);
        let kept = state.kept;
        state.kept &= !is_new;
        drop(state);
        drop(old);
        kept
    }

    /// Enables or disables delivery. `done` is called once, on the source's queue, after a handler
    /// in flight returned; also when nothing changed.
    ///
    /// What rings while disabled is kept, and leads to one call when enabled.
    ///
    /// Errors: `UNSUPPORTED` for a change after `cancel`.
    pub fn set_enable(&self, enable: bool, done: Option<Block>) -> Result<(), IOReturn> {
        let mut state = self.core.state.lock().expect(NO_PANIC);
        if state.enabled != enable {
            if state.cancelled {
                return Err(IOReturn::UNSUPPORTED);
            }
            state.enabled = enable;
        }
        let is_due = enable && std::mem::take(&mut state.kept);
        drop(state);
        if is_due {
            self.nudge();
        }
        if let Some(done) = done {
            self.core.queue.dispatch_async(done);
        }
        Ok(())
    }

    /// Ends the source: no handler starts after `done`, which runs on the source's queue, and who
    /// waits in [`wait_for_work`](Self::wait_for_work) is told `ABORTED`. A second call runs its own
    /// `done`.
    pub fn cancel(&self, done: Option<Block>) {
        let mut state = self.core.state.lock().expect(NO_PANIC);
        state.cancelled = true;
        state.enabled = false;
        drop(state);
        self.core.waiter.cancel();
        let watch = self.watch.lock().expect(NO_PANIC).take();
        drop(watch);
        if let Some(done) = done {
            self.core.queue.dispatch_async(done);
        }
    }

    /// As [`nudge`](Self::nudge). Errors: `NOT_READY` when nobody can be called: the source is
    /// disabled, cancelled or without a handler.
    pub fn check_for_work(&self) -> Result<(), IOReturn> {
        let state = self.core.state.lock().expect(NO_PANIC);
        let can_deliver = state.enabled && self.core.handler.is_set();
        drop(state);
        if !can_deliver {
            return Err(IOReturn::NOT_READY);
        }
        self.nudge();
        Ok(())
    }

    /// Waits for the next call, and so for a ring if none is due; returns when the handler has.
    ///
    /// Errors: `ABORTED` once the source or its queue is cancelled, or when a manual engine has
    /// nothing left to run; `NOT_PERMITTED` on the source's queue; `BUSY` while another thread
    /// waits.
    pub fn wait_for_work(&self) -> Result<(), IOReturn> {
        self.core
            .waiter
            .wait(&self.core.queue, || !self.core.state.lock().expect(NO_PANIC).cancelled)
    }
}

impl Receiver for Arc<BellCore> {
    fn receive(&self, again: impl FnOnce()) {
        let mut state = self.state.lock().expect(NO_PANIC);
        if !state.enabled {
            state.kept = true;
            return;
        }
        // Under the lock, so that a handler that is set meanwhile learns what was kept.
        let handler = match self.handler.start(again) {
            Ok(handler) => handler,
            Err(not_now) => {
                state.kept |= not_now == NotNow::Absent;
                return;
            }
        };
        drop(state);
        let _told = self.waiter.delivering();
        self.queue.recorded(Kind::Bell, 0, 0, || handler.call(()));
    }

    fn end(&self) {
        self.handler.replace(None);
    }
}

impl fmt::Debug for BellSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BellSource").field("queue", &self.core.queue).finish_non_exhaustive()
    }
}
