//! One-way latency: from a thread on one core to a thread on another one, that sleeps.
//!
//! Both sides take the time on one clock, the sender before it sends, the handler first.

use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Release};

use iohost_event::Clock;

use crate::rounds::{Effort, percentile};

pub const CLOCK: Clock = Clock::Uptime;

/// Long enough for the handler's thread to sleep again.
const GAP_NS: u64 = 50_000;

/// Percentiles in nanoseconds.
pub struct OneWay {
    pub p50: f64,
    pub p99: f64,
}

/// When the handler ran, in time of [`CLOCK`].
///
/// The sender looks at it until it is there, so it has a pair of cache lines for itself: what else
/// the handler's side writes must not be fetched away from it.
#[repr(align(128))]
pub struct Handled(AtomicU64);

impl Handled {
    pub const fn not_yet() -> Self {
        Self(AtomicU64::new(0))
    }

    /// To be called first by the handler.
    pub fn now(&self) {
        self.0.store(CLOCK.now(), Release);
    }
}

/// `send` returns when it sent.
pub fn one_way(effort: Effort, handled: &Handled, send: impl Fn() -> u64) -> OneWay {
    let (warm, count) = (effort.of(200, 5), effort.of(2_000, 50));
    let mut samples = Vec::new();
    for _ in 0..warm + count {
        samples.push(one_sample(handled, &send) as f64);
    }
    let samples = samples.split_off(warm as usize);
    OneWay { p50: percentile(samples.clone(), 50), p99: percentile(samples, 99) }
}

/// One of them, after a pause.
pub fn one_sample(handled: &Handled, send: impl Fn() -> u64) -> u64 {
    spin_until(|| CLOCK.now(), CLOCK.now() + GAP_NS);
    handled.0.store(0, Release);
    let sent = send();
    spin_until(|| handled.0.load(Acquire), 1).saturating_sub(sent)
}

/// Spins, so that this core is awake and its caches are warm, until `value` is at least `least`.
fn spin_until(value: impl Fn() -> u64, least: u64) -> u64 {
    loop {
        let value = value();
        if value >= least {
            return value;
        }
        std::hint::spin_loop();
    }
}
