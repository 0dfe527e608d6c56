//! What the device objects of one driver share: the second's tick, and the list of DPCs.
//!
//! # The walk
//!
//! At each tick the started I/O timers get their turn, in the order in which they were
//! initialised: the first one's routine is sent to its queue, and when it has returned, or turned
//! out not to run, it sends the second one's, and so on. No thread waits while a queue is busy,
//! and no two routines overlap. A tick that comes while the walk is under way is merged into it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};

use super::dpc::DpcObject;
use super::error::resources;
use super::io_timer::Switch;
use super::{NO_PANIC, Result};
use crate::{IODispatchQueue, IOTimerClock, IOTimerDispatchSource};

const NS_PER_SECOND: u64 = 1_000_000_000;

/// Why the timers here can always be armed.
pub(super) const ARMS: &str = "a timer that has a handler and was not cancelled can be armed";

pub(super) struct System {
    /// The hidden queue. Nothing but this module's own code runs on it.
    queue: IODispatchQueue,
    tick: IOTimerDispatchSource,
    ticks: Mutex<Ticks>,
    dpcs: Mutex<Vec<Weak<DpcObject>>>,
    next_id: AtomicU64,
}

/// Taken after a [`Switch`]'s lock, never before it.
#[derive(Default)]
struct Ticks {
    /// All I/O timers, by number: in the order of their initialisation.
    timers: BTreeMap<u64, Weak<Switch>>,
    started: usize,
    /// The tick is armed. It is while a timer is started, and once more after the last stopped.
    armed: bool,
    walking: bool,
}

impl System {
    pub(super) fn create<S: Send>(beside: &IODispatchQueue<S>) -> Result<Arc<Self>> {
        let queue = IODispatchQueue::create(beside, "wdm", ()).map_err(resources)?;
        let tick = IOTimerDispatchSource::create(&queue, |_, _| {}).map_err(resources)?;
        let system = Arc::new(Self {
            queue,
            tick,
            ticks: Mutex::default(),
            dpcs: Mutex::default(),
            next_id: AtomicU64::new(0),
        });
        let weak = Arc::downgrade(&system);
        let handler = move |_: &mut (), _| {
            if let Some(system) = weak.upgrade() {
                system.ticked();
            }
        };
        system.tick.set_handler(&system.queue, handler).map_err(resources)?;
        Ok(system)
    }

    pub(super) fn queue(&self) -> &IODispatchQueue {
        &self.queue
    }

    /// A number that nothing else of this system has; later ones are higher.
    pub(super) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Relaxed)
    }

    pub(super) fn add_timer(&self, id: u64, timer: Weak<Switch>) {
        self.ticks.lock().expect(NO_PANIC).timers.insert(id, timer);
    }

    pub(super) fn remove_timer(&self, id: u64) {
        self.ticks.lock().expect(NO_PANIC).timers.remove(&id);
    }

    pub(super) fn timer_started(&self) {
        let mut ticks = self.ticks.lock().expect(NO_PANIC);
        ticks.started += 1;
        if !ticks.armed {
            self.arm(&mut ticks);
        }
    }

    pub(super) fn timer_stopped(&self) {
        self.ticks.lock().expect(NO_PANIC).started -= 1;
    }

    pub(super) fn add_dpc(&self, dpc: &Arc<DpcObject>) {
        let mut dpcs = self.dpcs.lock().expect(NO_PANIC);
        dpcs.retain(|dpc| dpc.strong_count() > 0);
        dpcs.push(Arc::downgrade(dpc));
    }

    pub(super) fn dpcs(&self) -> Vec<Arc<DpcObject>> {
        self.dpcs.lock().expect(NO_PANIC).iter().filter_map(Weak::upgrade).collect()
    }

    /// Sets the tick to the next whole second of the clock: the phase is nobody's own, and that
    /// of all processes of the machine.
    fn arm(&self, ticks: &mut Ticks) {
        let now = self.queue.now(IOTimerClock::UptimeRaw);
        let next = (now / NS_PER_SECOND + 1) * NS_PER_SECOND;
        self.tick.wake_at_time(IOTimerClock::UptimeRaw, next, 0).expect(ARMS);
        ticks.armed = true;
    }

    fn ticked(self: &Arc<Self>) {
        let mut ticks = self.ticks.lock().expect(NO_PANIC);
        ticks.armed = false;
        if ticks.started == 0 {
            return;
        }
        self.arm(&mut ticks);
        if ticks.walking {
            return;
        }
        ticks.walking = true;
        let left = ticks.timers.values().cloned().collect();
        drop(ticks);
        // Its drop is its step.
        drop(Walk { system: self.clone(), left });
    }
}

/// The rest of a walk. Whoever has it drops it when the walk may go on: after a routine returned
/// or panicked, and also when a queue dropped the work that would have called it.
pub(super) struct Walk {
    system: Arc<System>,
    left: VecDeque<Weak<Switch>>,
}

impl Drop for Walk {
    fn drop(&mut self) {
        while let Some(timer) = self.left.pop_front() {
            if let Some(timer) = timer.upgrade()
                && timer.is_started()
            {
                let left = std::mem::take(&mut self.left);
                timer.send(Self { system: self.system.clone(), left });
                return;
            }
        }
        self.system.ticks.lock().expect(NO_PANIC).walking = false;
    }
}
