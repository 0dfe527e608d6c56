//! Whether a timer is signalled, and who waits for that.

use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use super::NO_PANIC;

/// What an expiry of a [`KernelTimer`](super::KernelTimer) does to those who wait for it.
#[doc(alias = "TIMER_TYPE")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimerType {
    /// Lets all through, and whoever comes later, until the timer is set again.
    #[doc(alias = "NotificationTimer")]
    #[default]
    Notification,
    /// Lets one through: the one that has waited longest, or the next that comes.
    #[doc(alias = "SynchronizationTimer")]
    Synchronization,
}

/// The dispatcher object in a timer.
pub(super) struct Signal {
    kind: TimerType,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    signalled: bool,
    /// Those who wait, longest first.
    waiting: Vec<Waiter>,
    next_number: u64,
}

struct Waiter {
    number: u64,
    /// Let through by an expiry, whatever has become of `signalled` since.
    released: bool,
}

impl Signal {
    pub(super) fn new(kind: TimerType) -> Self {
        Self { kind, state: Mutex::default(), changed: Condvar::new() }
    }

    /// The timer expired.
    pub(super) fn signal(&self) {
        let mut state = self.state.lock().expect(NO_PANIC);
        match self.kind {
            TimerType::Notification => {
                state.signalled = true;
                state.waiting.iter_mut().for_each(|waiter| waiter.released = true);
            }
            TimerType::Synchronization => {
                let longest = state.waiting.iter_mut().find(|waiter| !waiter.released);
                match longest {
                    Some(waiter) => waiter.released = true,
                    None => state.signalled = true,
                }
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The timer was set. Who was let through before stays so.
    pub(super) fn clear(&self) {
        self.state.lock().expect(NO_PANIC).signalled = false;
    }

    pub(super) fn is_signalled(&self) -> bool {
        self.state.lock().expect(NO_PANIC).signalled
    }

    /// Waits to be let through. `false` when that did not happen in time.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        // `None`: further away than the clock goes, which is for ever.
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.state.lock().expect(NO_PANIC);
        if state.signalled {
            state.signalled = self.kind == TimerType::Notification;
            return true;
        }
        let number = state.next_number;
        state.next_number += 1;
        state.waiting.push(Waiter { number, released: false });
        loop {
            let place = state.waiting.iter().position(|waiter| waiter.number == number);
            let place = place.expect("each waiter takes itself off the list");
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if state.waiting[place].released || left == Some(Duration::ZERO) {
                return state.waiting.remove(place).released;
            }
            state = match left {
                Some(left) => self.changed.wait_timeout(state, left).expect(NO_PANIC).0,
                None => self.changed.wait(state).expect(NO_PANIC),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::thread;

    use super::*;

    /// Three threads that wait; `then` runs once all of them do.
    fn with_three_waiters(kind: TimerType, then: impl FnOnce(&Signal, &AtomicUsize)) {
        let (signal, through) = (Signal::new(kind), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    assert!(signal.wait(Duration::MAX));
                    through.fetch_add(1, SeqCst);
                });
            }
            wait_until(|| signal.state.lock().unwrap().waiting.len() == 3);
            then(&signal, &through);
        });
    }

    fn wait_until(condition: impl Fn() -> bool) {
        while !condition() {
            thread::yield_now();
        }
    }

    #[test]
    fn a_notification_timer_releases_all_waiters_even_when_set_again_at_once() {
        with_three_waiters(TimerType::Notification, |signal, through| {
            signal.signal();
            signal.clear();
            wait_until(|| through.load(SeqCst) == 3);
            assert!(!signal.is_signalled());
        });
    }

    #[test]
    fn a_synchronization_timer_releases_one_waiter_per_expiry() {
        with_three_waiters(TimerType::Synchronization, |signal, through| {
            for released in 1..=3 {
                signal.signal();
                assert!(!signal.is_signalled(), "the waiter took it");
                wait_until(|| through.load(SeqCst) == released);
                let left = signal.state.lock().unwrap().waiting.len();
                assert_eq!(left, 3 - released, "nobody else was let through");
            }
            signal.signal();
            assert!(signal.is_signalled(), "nobody waits any more");
        });
    }

    #[test]
    fn a_synchronization_timer_counts_no_expiries_that_nobody_waits_for() {
        let signal = Signal::new(TimerType::Synchronization);
        signal.signal();
        signal.signal();
        assert!(signal.wait(Duration::ZERO));
        assert!(!signal.wait(Duration::ZERO));
    }

    #[test]
    fn a_waiter_that_gave_up_takes_no_expiry_from_others() {
        let signal = Signal::new(TimerType::Synchronization);
        assert!(!signal.wait(Duration::from_millis(1)));
        signal.signal();
        assert!(signal.is_signalled());
    }
}
