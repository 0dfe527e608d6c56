//! One-shot deadlines on a queue.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use iohost_event::Clock;
use iohost_interface::IOReturn;
use iohost_memory::flight_recorder::Kind;

use crate::deadlines::{Answer, Armed, Deadline, Expire, NoteOf};
use crate::handler::{Handler, HandlerSlot, NotNow};
use crate::queue::{Deliver, Item};
use crate::waiter::Waiter;
use crate::{Block, NO_PANIC, Queue};

/// Has a handler run on a queue once a deadline has passed. Starts enabled and not armed.
///
/// One call per arming at the most: arming again, disabling and cancelling take back an
/// expiration whose handler has not started.
pub struct TimerSource {
    core: Arc<TimerCore>,
}

struct TimerCore {
    queue: Queue,
    state: Mutex<State>,
    handler: HandlerSlot<u64>,
    waiter: Waiter,
    this: Weak<TimerCore>,
}

/// All that arming, moving and taking back reads and writes. With a hundred thousand timers each
/// line that comes from memory counts, so it is no larger than one.
struct State {
    enabled: bool,
    cancelled: bool,
    /// What was asked for and has not been delivered.
    wanted: Option<Deadline>,
    /// Where it stands among the engine's deadlines, if it stands there: also with nothing wanted
    /// any more, until the engine asks.
    armed: Option<Armed>,
    /// Goes up with each arming: an expiration of an earlier one is stale. Nobody holds a number
    /// as long as it takes to come round.
    generation: u32,
    /// It fired, in this generation, and was not delivered.
    expired: bool,
    /// Changed together with the handler.
    has_handler: bool,
}

const _: () = assert!(size_of::<Mutex<State>>() <= 64);

impl TimerSource {
    /// Makes a timer; it does nothing until [`wake_at`](Self::wake_at). The handler gets the
    /// time at which the timer fired, in nanoseconds of [`Clock::Uptime`], whatever clock the
    /// deadline was on.
    pub fn create(queue: &Queue, handler: impl FnMut(u64) + Send + 'static) -> Self {
        let core = Arc::new_cyclic(|this| TimerCore {
            queue: queue.clone(),
            state: Mutex::new(State {
                enabled: true,
                cancelled: false,
                wanted: None,
                armed: None,
                generation: 0,
                expired: false,
                has_handler: true,
            }),
            handler: HandlerSlot::new(Some(Box::new(handler))),
            waiter: Waiter::default(),
            this: this.clone(),
        });
        Self { core }
    }

    /// Replaces the handler from the next expiration on.
    pub fn set_handler(&self, handler: Option<impl FnMut(u64) + Send + 'static>) {
        let handler = handler.map(|handler| Box::new(handler) as Handler<_>);
        let mut state = self.core.state();
        state.has_handler = handler.is_some();
        let old = self.core.handler.swap(handler);
        drop(state);
        drop(old);
    }

    /// Fires between `deadline` and `deadline + leeway`, in nanoseconds of `clock`; a deadline
    /// that has passed fires at once, but never inside this call. Replaces an earlier deadline;
    /// call it on the timer's queue to be sure that the earlier one does not fire any more.
    /// While disabled the deadline is kept for later.
    ///
    /// Errors: `UNSUPPORTED` after cancel, `NO_RESOURCES` without a handler.
    #[inline]
    pub fn wake_at(&self, clock: Clock, deadline: u64, leeway: u64) -> Result<(), IOReturn> {
        let mut state = self.core.state();
        if state.cancelled {
            return Err(IOReturn::UNSUPPORTED);
        }
        if !state.has_handler {
            return Err(IOReturn::NO_RESOURCES);
        }
        state.generation = state.generation.wrapping_add(1);
        state.expired = false;
        let deadline = Deadline { clock, at: deadline, leeway };
        state.wanted = Some(deadline);
        if state.enabled {
            self.core.arm(&mut state, deadline);
        }
        Ok(())
    }

    /// Enables or disables firing. A deadline that passes while disabled fires when enabled
    /// again. `done` is called once, on the timer's queue, after a handler in flight returned;
    /// also when nothing changed.
    ///
    /// Errors: `UNSUPPORTED` for a change after cancel.
    pub fn set_enable(&self, enable: bool, done: Option<Block>) -> Result<(), IOReturn> {
        let mut state = self.core.state();
        if state.enabled != enable {
            if state.cancelled {
                return Err(IOReturn::UNSUPPORTED);
            }
            state.enabled = enable;
            if let Some(deadline) = state.wanted.filter(|_| enable) {
                self.core.arm(&mut state, deadline);
            }
            // An expiration whose handler has not started is taken back by disabling, not kept.
            if !enable && std::mem::take(&mut state.expired) {
                state.wanted = None;
            }
        }
        drop(state);
        if let Some(done) = done {
            self.core.queue.dispatch_async(done);
        }
        Ok(())
    }

    /// Looks whether the deadline has passed, which the engine may not have heard of, and has the
    /// handler called, on the queue and never inside this call.
    ///
    /// Errors: `NOT_READY` when nothing has fired.
    pub fn check_for_work(&self) -> Result<(), IOReturn> {
        let mut state = self.core.state();
        if state.expired {
            return Ok(());
        }
        let deadlines = &self.core.queue.engine().deadlines;
        let wanted = state.wanted.filter(|_| state.enabled);
        if wanted.is_none_or(|deadline| deadlines.now(deadline.clock) < deadline.at) {
            return Err(IOReturn::NOT_READY);
        }
        self.core.disarm(&mut state);
        self.core.expire(state);
        Ok(())
    }

    /// Waits until the timer has fired once more; returns when its handler has.
    ///
    /// Errors: `ABORTED` once the timer or its queue is cancelled, or when a manual engine has
    /// nothing left to run; `NOT_PERMITTED` on the timer's queue; `BUSY` while another thread
    /// waits.
    pub fn wait_for_work(&self) -> Result<(), IOReturn> {
        self.core.waiter.wait(&self.core.queue, || !self.core.state().cancelled)
    }

    /// Ends the timer: no handler starts after `done`, which runs on the timer's queue. Who waits
    /// in [`wait_for_work`](Self::wait_for_work) is told `ABORTED`.
    pub fn cancel(&self, done: Option<Block>) {
        self.core.end();
        if let Some(done) = done {
            self.core.queue.dispatch_async(done);
        }
    }
}

impl Drop for TimerSource {
    fn drop(&mut self) {
        self.core.end();
    }
}

impl TimerCore {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(NO_PANIC)
    }

    #[inline]
    fn arm(&self, state: &mut State, deadline: Deadline) {
        if !state.armed.as_ref().is_some_and(|armed| armed.is_asked_in_time_for(deadline)) {
            self.arm_anew(state, deadline);
        }
    }

    fn arm_anew(&self, state: &mut State, deadline: Deadline) {
        let deadlines = &self.queue.engine().deadlines;
        if let Some(armed) = state.armed {
            state.armed = deadlines.rearm(armed, deadline);
        }
        if state.armed.is_none() {
            state.armed = Some(deadlines.arm(deadline, self.this.clone()));
        }
    }

    fn disarm(&self, state: &mut State) {
        state.expired = false;
        if let Some(armed) = state.armed.take() {
            self.queue.engine().deadlines.disarm(armed);
        }
    }

    fn end(&self) {
        let mut state = self.state();
        state.cancelled = true;
        state.enabled = false;
        state.wanted = None;
        self.disarm(&mut state);
        drop(state);
        self.waiter.cancel();
        self.handler.replace(None);
    }

    /// Has the handler called for the present arming, which is among the deadlines no more.
    fn expire(&self, mut state: MutexGuard<'_, State>) {
        state.expired = true;
        drop(state);
        self.schedule();
    }

    fn schedule(&self) {
        if let Some(this) = self.this.upgrade() {
            self.queue.core().push(Item::Delivery(this));
        }
    }
}

impl Expire for TimerCore {
    fn ask(&self, note: NoteOf, now: u64) -> Answer {
        let state = &mut *self.state();
        let Some(armed) = state.armed.as_mut().filter(|armed| armed.has(note)) else {
            return Answer::Nothing;
        };
        let answer = match state.wanted {
            Some(deadline) if state.enabled => deadline.answer(armed, note, state.generation, now),
            _ => Answer::Nothing,
        };
        if !matches!(answer, Answer::Later(_)) {
            state.armed = None;
        }
        answer
    }

    fn expired(&self, generation: u32) {
        let state = self.state();
        // Armed anew, disabled, taken back or cancelled since it was asked.
        let stale = state.generation != generation || state.armed.is_some();
        if stale || !state.enabled || state.wanted.is_none() {
            return;
        }
        self.expire(state);
    }
}

impl Deliver for TimerCore {
    fn deliver(&self) {
        let handler = self.handler.start(|| self.schedule());
        if handler.as_ref().err() == Some(&NotNow::Running) {
            // It sleeps on its queue; the expiration stays for when it returned.
            return;
        }
        let mut state = self.state();
        if !std::mem::take(&mut state.expired) || !state.enabled {
            return;
        }
        state.wanted = None;
        drop(state);
        if let Ok(handler) = handler {
            let _told = self.waiter.delivering();
            let now = self.queue.engine().deadlines.now(Clock::Uptime);
            self.queue.recorded(Kind::Timer, now, 0, || handler.call(now));
        }
    }
}

impl fmt::Debug for TimerSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimerSource").field("queue", &self.core.queue).finish_non_exhaustive()
    }
}
