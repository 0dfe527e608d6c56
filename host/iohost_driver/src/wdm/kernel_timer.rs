//! Timers with a due time, a period, and waiters.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use super::dpc::DpcObject;
use super::error::resources;
use super::signal::Signal;
use super::system::{ARMS, System};
use super::{DeviceObject, Dpc, DueTime, Error, NO_PANIC, Result, TimerType, irql};
use crate::{IODispatchSource, IOTimerClock, IOTimerDispatchSource, abi};

const NS_PER_MS: u64 = 1_000_000;

/// A kernel timer (`KTIMER`): expires at a due time, once or with a period; then it is signalled
/// and its [`Dpc`] is queued.
///
/// At an expiry, in this order: the timer leaves the set state, it is signalled, a periodic one is
/// set again, the DPC is queued. It never expires early, which Windows allows by a clock tick.
///
/// A period counts from the first due time on, not from when an expiry was processed, so it does
/// not drift; periods that were missed altogether make one expiry. After an absolute due time it
/// counts from the first expiry, on a clock that a change of the time of day does not touch.
/// (Windows leaves all of this open; these are the host's rules.)
///
/// One timer should serve either waiters or a DPC. All methods but [`wait`](Self::wait) can be
/// called from any thread and at any level. Dropping the timer cancels it; its own DPC may do so.
#[doc(alias("KTIMER", "PKTIMER"))]
pub struct KernelTimer {
    core: Arc<TimerCore>,
}

struct TimerCore {
    id: u64,
    system: Arc<System>,
    /// The queue of its device object, whose work may not wait.
    queue: abi::Queue,
    source: IOTimerDispatchSource,
    signal: Signal,
    /// What it is set to.
    set: Mutex<Option<Set>>,
}

/// What a timer is set to. Times are in nanoseconds.
struct Set {
    clock: IOTimerClock,
    deadline: u64,
    period: u64,
    tolerance: u64,
    /// Not kept alive: it may own this timer.
    dpc: Weak<DpcObject>,
}

impl KernelTimer {
    /// Makes a timer, neither set nor signalled. `KeInitializeTimerEx`; `KeInitializeTimer` makes
    /// a [`TimerType::Notification`] one.
    ///
    /// Errors: [`Error::Resources`].
    #[doc(alias("KeInitializeTimer", "KeInitializeTimerEx"))]
    pub fn initialize<S: Send + 'static>(
        device: &DeviceObject<S>,
        kind: TimerType,
    ) -> Result<Self> {
        let system = device.system().clone();
        let source = IOTimerDispatchSource::create(system.queue(), |_, _| {}).map_err(resources)?;
        let core = Arc::new(TimerCore {
            id: system.next_id(),
            system,
            queue: device.queue().raw().clone(),
            source,
            signal: Signal::new(kind),
            set: Mutex::new(None),
        });
        let weak = Arc::downgrade(&core);
        let handler = move |_: &mut (), _| {
            if let Some(core) = weak.upgrade() {
                core.fired();
            }
        };
        core.source.set_handler(core.system.queue(), handler).map_err(resources)?;
        Ok(Self { core })
    }

    /// Sets the timer to expire once. `KeSetTimer`. As [`set_ex`](Self::set_ex) without a period.
    #[doc(alias = "KeSetTimer")]
    pub fn set(&self, due: DueTime, dpc: Option<&Dpc>) -> bool {
        self.set_ex(due, 0, dpc)
    }

    /// Sets the timer to expire at `due`, and every `period_ms` milliseconds from then on unless
    /// that is 0. `KeSetTimerEx`. As [`set_coalescable`](Self::set_coalescable) without tolerance.
    #[doc(alias = "KeSetTimerEx")]
    pub fn set_ex(&self, due: DueTime, period_ms: u32, dpc: Option<&Dpc>) -> bool {
        self.set_coalescable(due, period_ms, 0, dpc)
    }

    /// Sets the timer to expire between `due` and `tolerance_ms` milliseconds later, and every
    /// `period_ms` from then on unless that is 0, with the same tolerance: so that its wake-up
    /// can be one with those of other timers. `KeSetCoalescableTimer`.
    ///
    /// Returns whether the timer was set already; then that due time and its DPC call are
    /// cancelled. A DPC call that an earlier expiry has queued stays. Clears the signalled state.
    /// A due time that has passed expires at once, but not inside this call. Does not keep `dpc`
    /// alive: an expiry after the drop of the DPC makes no call.
    ///
    /// Errors: none.
    #[doc(alias = "KeSetCoalescableTimer")]
    pub fn set_coalescable(
        &self,
        due: DueTime,
        period_ms: u32,
        tolerance_ms: u32,
        dpc: Option<&Dpc>,
    ) -> bool {
        let core = &self.core;
        let mut set = core.set.lock().expect(NO_PANIC);
        let uptime = core.system.queue().now(IOTimerClock::UptimeRaw);
        let new = Set::new(due, period_ms, tolerance_ms, dpc, uptime);
        core.signal.clear();
        core.arm(&new);
        core.source.set_enable(true).expect(ARMS);
        set.replace(new).is_some()
    }

    /// Cancels the timer. Returns whether it was set: a one-shot timer is until it expires, a
    /// periodic one until it is cancelled. The signalled state stays as it is. `KeCancelTimer`.
    ///
    /// `true`: no DPC call starts any more on account of this timer, also not one that an expiry
    /// has queued (the host's rule; Windows promises it for one-shot timers only). `false`: the
    /// DPC call of a timer that has expired is queued, runs, or has run. This does not wait for a
    /// call that runs; [`DeviceObject::flush_queued_dpcs`] does.
    #[doc(alias = "KeCancelTimer")]
    pub fn cancel(&self) -> bool {
        let mut set = self.core.set.lock().expect(NO_PANIC);
        let Some(cancelled) = set.take() else { return false };
        self.core.source.set_enable(false).expect(ARMS);
        let dpc = cancelled.dpc.upgrade();
        if let Some(dpc) = &dpc {
            dpc.take_back(self.core.id);
        }
        drop(set);
        drop(dpc); // See `DpcObject::queue_for`.
        true
    }

    /// Whether the timer is signalled. `KeReadStateTimer`.
    ///
    /// Not synchronised with anything: it may have changed when this returns. A
    /// [`TimerType::Synchronization`] timer is not signalled any more once a waiter took it.
    #[doc(alias = "KeReadStateTimer")]
    pub fn read_state(&self) -> bool {
        self.core.signal.is_signalled()
    }

    /// Waits until the timer is signalled, or an expiry lets this waiter through.
    /// `KeWaitForSingleObject`.
    ///
    /// For threads of the driver's own. `timeout` is real time, also where a test's timers are on
    /// virtual time; zero asks without waiting, and [`Duration::MAX`] waits for ever.
    ///
    /// Errors: [`Error::Timeout`]. With a timeout other than zero, [`Error::RaisedIrql`] in a DPC
    /// or I/O timer routine, and [`Error::OnQueue`] on the device object's queue, all of whose
    /// work would be held up.
    #[doc(alias = "KeWaitForSingleObject")]
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        const CALL: &str = "KeWaitForSingleObject";
        if !timeout.is_zero() {
            irql::passive_only(CALL)?;
            if self.core.queue.on_queue() {
                return Err(Error::OnQueue { call: CALL });
            }
        }
        if self.core.signal.wait(timeout) {
            Ok(())
        } else {
            Err(Error::Timeout { waited: timeout })
        }
    }
}

impl Drop for KernelTimer {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl fmt::Debug for KernelTimer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelTimer")
            .field("set", &self.core.set.lock().expect(NO_PANIC).is_some())
            .field("signalled", &self.read_state())
            .finish_non_exhaustive()
    }
}

impl TimerCore {
    fn arm(&self, set: &Set) {
        self.source.wake_at_time(set.clock, set.deadline, set.tolerance).expect(ARMS);
    }

    /// The source fired. On the hidden queue.
    fn fired(&self) {
        let mut set = self.set.lock().expect(NO_PANIC);
        let Some(now_set) = &mut *set else { return };
        let now = |clock| self.system.queue().now(clock);
        if now(now_set.clock) < now_set.deadline {
            // Either the timer was set anew while this was on its way, and then stands armed as it
            // is armed here; or the time of day was put back.
            self.arm(now_set);
            return;
        }
        self.signal.signal();
        let dpc = now_set.dpc.upgrade();
        if now_set.period == 0 {
            *set = None;
        } else {
            now_set.begin_next_period(now(IOTimerClock::UptimeRaw));
            self.arm(now_set);
        }
        // Under the lock, so that a `cancel` that comes later finds the call on its queue.
        if let Some(dpc) = &dpc {
            dpc.queue_for(self.id);
        }
        drop(set);
        drop(dpc);
    }
}

impl Set {
    fn new(
        due: DueTime,
        period_ms: u32,
        tolerance_ms: u32,
        dpc: Option<&Dpc>,
        uptime: u64,
    ) -> Self {
        let (clock, deadline) = due.deadline(uptime);
        Self {
            clock,
            deadline,
            period: u64::from(period_ms) * NS_PER_MS,
            tolerance: u64::from(tolerance_ms) * NS_PER_MS,
            dpc: dpc.map_or_else(Weak::new, |dpc| Arc::downgrade(dpc.object())),
        }
    }

    fn begin_next_period(&mut self, uptime: u64) {
        if self.clock != IOTimerClock::UptimeRaw {
            self.clock = IOTimerClock::UptimeRaw;
            self.deadline = uptime;
        }
        let over = uptime - self.deadline;
        self.deadline += (over / self.period + 1) * self.period;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(clock: IOTimerClock, deadline: u64, period: u64) -> Set {
        Set { clock, deadline, period, tolerance: 0, dpc: Weak::new() }
    }

    #[test]
    fn period_and_tolerance_are_milliseconds() {
        let longest = u32::MAX;
        let timer = Set::new(DueTime::from_100ns(-1), 50, 32, None, 0);
        assert_eq!((timer.period, timer.tolerance), (50_000_000, 32_000_000));
        let timer = Set::new(DueTime::from_100ns(-1), longest, longest, None, 0);
        assert_eq!(timer.period, 4_294_967_295_000_000);
        assert_eq!(timer.tolerance, timer.period);
    }

    #[test]
    fn the_next_period_is_counted_from_the_schedule_and_never_lies_in_the_past() {
        let mut timer = set(IOTimerClock::UptimeRaw, 1000, 50);
        for (now, next) in [(1000, 1050), (1099, 1100), (1100, 1150), (1275, 1300)] {
            timer.begin_next_period(now);
            assert_eq!(timer.deadline, next, "at {now}");
        }
    }

    #[test]
    fn after_an_absolute_due_time_the_period_is_on_the_uptime_clock() {
        let mut timer = set(IOTimerClock::RealTime, 1_700_000_000_000_000_000, 50);
        timer.begin_next_period(1000);
        assert_eq!((timer.clock, timer.deadline), (IOTimerClock::UptimeRaw, 1050));
    }
}
