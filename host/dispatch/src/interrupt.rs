//! Counted events with a time: interrupts.
//!
//! The count lives in the eventfd until it is delivered, so nothing is lost while the source is
//! disabled or its handler runs: what accumulated arrives as one call.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use iohost_event::{Clock, Signal};
use iohost_interface::IOReturn;
use iohost_memory::flight_recorder::Kind;

use crate::handler::{Handler, HandlerSlot};
use crate::source::{Receiver, Watch};
use crate::waiter::Waiter;
use crate::{Block, NO_PANIC, Queue};

/// What a handler is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptEvent {
    /// Interrupts since the last delivery; at least 1.
    pub count: u64,
    /// When the latest of them was taken from the kernel, in nanoseconds of the source's clock.
    /// That is later than the interrupt itself by the time the wake-up took.
    pub time: u64,
}

/// What has to happen on the device side.
pub enum InterruptLine {
    /// Messages: nothing is masked, nothing to undo.
    Edge,
    /// A level-triggered line that is masked at each interrupt; the call unmasks it.
    Level(Box<dyn Fn() + Send + Sync>),
}

/// Has a handler run on a queue for the counts of an eventfd. Starts disabled.
pub struct InterruptSource {
    core: Arc<InterruptCore>,
    watch: Mutex<Option<Watch<Arc<Signal>, Arc<InterruptCore>>>>,
}

struct InterruptCore {
    queue: Queue,
    signal: Arc<Signal>,
    line: InterruptLine,
    clock: Clock,
    state: Mutex<State>,
    handler: HandlerSlot<InterruptEvent>,
    waiter: Waiter,
}

struct State {
    enabled: bool,
    cancelled: bool,
    /// Taken from the eventfd by `last_interrupt`, not delivered yet.
    undelivered: u64,
    last_time: u64,
    /// An interrupt of a level line came and the line was not unmasked since.
    masked: bool,
}

impl InterruptSource {
    /// Makes a source for `signal`, disabled.
    ///
    /// `clock` is [`Clock::Uptime`] or [`Clock::Continuous`]. Errors: what `epoll_ctl` says.
    pub fn create(
        queue: &Queue,
        signal: Arc<Signal>,
        line: InterruptLine,
        clock: Clock,
        handler: impl FnMut(InterruptEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let core = Arc::new(InterruptCore {
            queue: queue.clone(),
            signal: signal.clone(),
            line,
            clock,
            state: Mutex::new(State {
                enabled: false,
                cancelled: false,
                undelivered: 0,
                last_time: 0,
                masked: false,
            }),
            handler: HandlerSlot::new(Some(Box::new(handler))),
            waiter: Waiter::default(),
        });
        let watch = Watch::create(queue, signal, core.clone())?;
        Ok(Self { core, watch: Mutex::new(Some(watch)) })
    }

    /// Replaces the handler from the next delivery on. Nothing is replayed. Without a handler
    /// interrupts stay counted until there is one.
    pub fn set_handler(&self, handler: Option<impl FnMut(InterruptEvent) + Send + 'static>) {
        self.core.handler.replace(handler.map(|handler| Box::new(handler) as Handler<_>));
        self.nudge();
    }

    /// Enables or disables delivery. `done` is called once, on the source's queue, after a
    /// handler in flight returned; also when nothing changed.
    ///
    /// While disabled, interrupts are counted and a level line stays masked; enabling delivers
    /// what accumulated in one call.
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
        drop(state);
        if enable {
            self.nudge();
        }
        if let Some(done) = done {
            self.core.queue.dispatch_async(done);
        }
        Ok(())
    }

    /// Ends the source: no handler starts after `done`, which runs on the source's queue. What
    /// was counted and not delivered is lost, and who waits in [`wait_for_work`](Self::wait_for_work)
    /// is told `ABORTED`. A second call runs its own `done`.
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

    /// The count not delivered yet, and the time of the latest interrupt that was seen (0 before
    /// the first).
    pub fn last_interrupt(&self) -> InterruptEvent {
        let mut state = self.core.state.lock().expect(NO_PANIC);
        let collected = self.core.collect(&mut state);
        let last = InterruptEvent { count: state.undelivered, time: state.last_time };
        drop(state);
        if collected {
            // The eventfd is empty now, so the engine might not hear of these interrupts.
            self.nudge();
        }
        last
    }

    /// Looks for interrupts now and has them delivered, on the queue and never inside this call.
    ///
    /// Errors: `NOT_READY` when there is nothing to deliver, or nobody to deliver it to: the
    /// source is disabled, cancelled or without a handler.
    pub fn check_for_work(&self) -> Result<(), IOReturn> {
        let mut state = self.core.state.lock().expect(NO_PANIC);
        if state.cancelled {
            return Err(IOReturn::NOT_READY);
        }
        self.core.collect(&mut state);
        let counted = state.undelivered > 0;
        let work = counted && state.enabled && self.core.handler.is_set();
        drop(state);
        if counted {
            self.nudge();
        }
        if work { Ok(()) } else { Err(IOReturn::NOT_READY) }
    }

    /// Waits for the next delivery, and so for an interrupt if there is none; returns when its
    /// handler has. While the source is disabled nothing is delivered, and this waits.
    ///
    /// Errors: `ABORTED` once the source or its queue is cancelled, or when a manual engine has
    /// nothing left to run; `NOT_PERMITTED` on the source's queue; `BUSY` while another thread
    /// waits.
    pub fn wait_for_work(&self) -> Result<(), IOReturn> {
        self.core
            .waiter
            .wait(&self.core.queue, || !self.core.state.lock().expect(NO_PANIC).cancelled)
    }

    fn nudge(&self) {
        if let Some(watch) = &*self.watch.lock().expect(NO_PANIC) {
            watch.nudge();
        }
    }
}

impl Receiver for Arc<InterruptCore> {
    /// One call for all that came.
    fn receive(&self, again: impl FnOnce()) {
        // Taken before the count is, so that it cannot go meanwhile and the count with it.
        let Ok(handler) = self.handler.start(again) else { return };
        let mut state = self.state.lock().expect(NO_PANIC);
        if !state.enabled {
            return;
        }
        self.collect(&mut state);
        let event = InterruptEvent { count: state.undelivered, time: state.last_time };
        state.undelivered = 0;
        drop(state);
        if event.count > 0 {
            let _told = self.waiter.delivering();
            self.queue.recorded(Kind::Interrupt, event.count, 0, || handler.call(event));
        }
        self.unmask();
    }

    fn end(&self) {
        self.handler.replace(None);
    }
}

impl InterruptCore {
    /// Moves the kernel's count into ours; `false` when there was none.
    fn collect(&self, state: &mut State) -> bool {
        let count = self.signal.take();
        if count > 0 {
            state.undelivered += count;
            state.last_time = self.queue.now(self.clock);
            state.masked = true;
        }
        count > 0
    }

    /// Lets a level line interrupt again once everything that came was handled.
    fn unmask(&self) {
        let InterruptLine::Level(unmask) = &self.line else { return };
        let mut state = self.state.lock().expect(NO_PANIC);
        if state.masked && state.enabled && state.undelivered == 0 {
            state.masked = false;
            drop(state);
            unmask();
        }
    }
}

impl fmt::Debug for InterruptSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterruptSource").field("queue", &self.core.queue).finish_non_exhaustive()
    }
}
