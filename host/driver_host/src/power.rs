//! The power state of a driver, and how long it may take to change.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use iohost_dispatch::{Clock, Queue, QueueOptions, TimerSource};
use iohost_interface::IOReturn;
use log::warn;

/// How long a driver has to acknowledge a state before that is said to be late.
pub const ACKNOWLEDGEMENT_TIME: Duration = Duration::from_secs(20);

/// Why the locks here are never poisoned.
const NO_PANIC: &str = "no foreign code runs under this lock";

/// A power state, with DriverKit's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerState {
    /// `kIOServicePowerCapabilityOff`.
    Off,
    /// `kIOServicePowerCapabilityLow`.
    Low,
    /// `kIOServicePowerCapabilityOn`.
    On,
}

impl PowerState {
    /// The flags.
    pub fn flags(self) -> u32 {
        match self {
            PowerState::Off => 0,
            PowerState::Low => 0x10000,
            PowerState::On => 2,
        }
    }

    /// The state that flags mean. Errors: `BAD_ARGUMENT`.
    pub fn from_flags(flags: u32) -> Result<Self, IOReturn> {
        let all = [PowerState::Off, PowerState::Low, PowerState::On];
        all.into_iter().find(|state| state.flags() == flags).ok_or(IOReturn::BAD_ARGUMENT)
    }
}

/// What becomes of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerNews {
    /// The driver has acknowledged a state.
    Reached(PowerState),
    /// It has not, within [`ACKNOWLEDGEMENT_TIME`]; `Reached` may still come.
    Late(PowerState),
}

type Tell = Box<dyn Fn(PowerNews) + Send + Sync>;
type Deliver = Box<dyn Fn(PowerState, Acknowledgement) + Send + Sync>;

/// The power state of one driver.
pub(crate) struct Power {
    state: Mutex<State>,
    tell: Tell,
}

struct State {
    now: PowerState,
    /// What the driver was told and has not acknowledged.
    pending: Option<PowerState>,
    /// What was asked for meanwhile; the last one counts.
    wanted: Option<PowerState>,
    /// How the driver is told; `None` before it has started and when it has stopped.
    deliver: Option<Arc<Deliver>>,
    /// Counts the changes, so that the time of one that is over is not that of the next.
    change: u64,
    timer: Option<Arc<TimerSource>>,
}

/// What a driver owes; dropped, it has done it.
pub(crate) struct Acknowledgement(Option<Box<dyn FnOnce() + Send>>);

impl Acknowledgement {
    pub(crate) fn new(done: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(done)))
    }
}

impl Drop for Acknowledgement {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done();
        }
    }
}

impl Power {
    /// On, as every driver begins.
    pub(crate) fn new(tell: impl Fn(PowerNews) + Send + Sync + 'static) -> Self {
        let state = State {
            now: PowerState::On,
            pending: None,
            wanted: None,
            deliver: None,
            change: 0,
            timer: None,
        };
        Self { state: Mutex::new(state), tell: Box::new(tell) }
    }

    /// The driver has started: `deliver` tells it of changes, later, on its queue. The time is
    /// counted on a queue beside it, since a driver that is late may be one that hangs.
    pub(crate) fn started(
        self: &Arc<Self>,
        beside: &Queue,
        deliver: impl Fn(PowerState, Acknowledgement) + Send + Sync + 'static,
    ) -> Result<(), IOReturn> {
        let queue = beside.create_beside("power", QueueOptions::default())?;
        let power = Arc::downgrade(self);
        let timer = TimerSource::create(&queue, move |_| {
            if let Some(power) = power.upgrade() {
                power.is_late();
            }
        });
        let mut state = self.state();
        state.deliver = Some(Arc::new(Box::new(deliver)));
        state.timer = Some(Arc::new(timer));
        drop(state);
        self.go_on(beside);
        Ok(())
    }

    /// The driver has stopped.
    pub(crate) fn stopped(&self) {
        let mut state = self.state();
        let gone = (state.deliver.take(), state.timer.take());
        drop(state);
        drop(gone);
    }

    /// Asks for a state. Before the driver has started, it is told when it has.
    pub(crate) fn change(self: &Arc<Self>, to: PowerState, queue: &Queue) {
        self.state().wanted = Some(to);
        self.go_on(queue);
    }

    /// The state that was acknowledged last.
    pub(crate) fn now(&self) -> PowerState {
        self.state().now
    }

    /// Tells the driver of what is wanted, if nothing is under way.
    fn go_on(self: &Arc<Self>, queue: &Queue) {
        let mut state = self.state();
        let (Some(deliver), None) = (state.deliver.clone(), state.pending) else { return };
        let Some(wanted) = state.wanted.take() else { return };
        state.change += 1;
        state.pending = Some(wanted);
        let (change, timer) = (state.change, state.timer.clone());
        drop(state);
        if let Some(timer) = timer {
            let time = queue.now(Clock::Uptime) + ACKNOWLEDGEMENT_TIME.as_nanos() as u64;
            // It was not cancelled, and has a handler.
            let _ = timer.wake_at(Clock::Uptime, time, 0);
        }
        let (power, queue) = (self.clone(), queue.clone());
        let done = Acknowledgement::new(move || power.acknowledged(change, &queue));
        deliver(wanted, done);
    }

    fn acknowledged(self: &Arc<Self>, change: u64, queue: &Queue) {
        let mut state = self.state();
        if state.change != change || state.deliver.is_none() {
            return;
        }
        let Some(reached) = state.pending.take() else { return };
        state.now = reached;
        drop(state);
        (self.tell)(PowerNews::Reached(reached));
        self.go_on(queue);
    }

    fn is_late(&self) {
        let pending = self.state().pending;
        if let Some(pending) = pending {
            warn!(state:? = pending; "the driver has not acknowledged its power state in 20 s");
            (self.tell)(PowerNews::Late(pending));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(NO_PANIC)
    }
}

impl fmt::Debug for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Power").finish_non_exhaustive()
    }
}
