//! What queues count about themselves, always.
//!
//! One thread writes at a time, the one that runs the queue, so a load and a store are enough;
//! any thread reads.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Sub-divisions of each doubling of time: a bucket is at most a quarter wide.
const STEPS: usize = 4;
/// Buckets up to 2^40 ns, about 18 minutes; longer times fall into the last one.
const BUCKETS: usize = 40 * STEPS;

/// How often something took how long.
pub(crate) struct Histogram {
    buckets: [AtomicU32; BUCKETS],
}

/// How long something took, as percentiles in nanoseconds, rounded up to the end of a bucket
/// that is at most a quarter wide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// Half took no longer.
    pub p50_ns: u64,
    /// 99 of 100 took no longer.
    pub p99_ns: u64,
    /// 999 of 1000 took no longer.
    pub p999_ns: u64,
}

/// The numbers of a queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueNumbers {
    /// The queue's name.
    pub name: String,
    /// Items waiting now, or running.
    pub depth: u64,
    /// Items run.
    pub executed: u64,
    /// Items dropped because the queue was cancelled.
    pub dropped: u64,
    /// The longest single item, in nanoseconds.
    pub longest_ns: u64,
    /// From the moment an idle queue got work to the moment it ran.
    pub wait: Latency,
    /// From the start of an item to its end. Work run by `dispatch_sync` without a thread change
    /// is not timed.
    pub run: Latency,
}

#[derive(Default)]
pub(crate) struct Numbers {
    executed: AtomicU64,
    longest_ns: AtomicU64,
    wait: Histogram,
    run: Histogram,
}

impl Numbers {
    pub(crate) fn note_wait(&self, ns: u64) {
        self.wait.note(ns);
    }

    pub(crate) fn note_run(&self, ns: u64) {
        self.count_one();
        self.run.note(ns);
        if ns > self.longest_ns.load(Relaxed) {
            self.longest_ns.store(ns, Relaxed);
        }
    }

    pub(crate) fn count_one(&self) {
        self.executed.store(self.executed.load(Relaxed) + 1, Relaxed);
    }

    /// `synchronous` items are in `executed` and not in `pushed` when they ran without waiting.
    pub(crate) fn read(&self, name: &str, waiting: u64, dropped: u64) -> QueueNumbers {
        QueueNumbers {
            name: name.to_owned(),
            depth: waiting,
            executed: self.executed.load(Relaxed),
            dropped,
            longest_ns: self.longest_ns.load(Relaxed),
            wait: self.wait.percentiles(),
            run: self.run.percentiles(),
        }
    }
}

impl Histogram {
    fn note(&self, ns: u64) {
        let bucket = &self.buckets[bucket(ns)];
        bucket.store(bucket.load(Relaxed).saturating_add(1), Relaxed);
    }

    fn percentiles(&self) -> Latency {
        let counts: Vec<u64> =
            self.buckets.iter().map(|count| u64::from(count.load(Relaxed))).collect();
        let total: u64 = counts.iter().sum();
        let at = |per_mille: u64| {
            let rank = (total * per_mille).div_ceil(1000).max(1);
            let mut seen = 0;
            let reached = counts.iter().position(|count| {
                seen += count;
                seen >= rank
            });
            reached.map_or(0, bucket_end)
        };
        Latency { p50_ns: at(500), p99_ns: at(990), p999_ns: at(999) }
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { AtomicU32::new(0) }; BUCKETS] }
    }
}

/// The bucket of a time: exact below `STEPS`, then `STEPS` per doubling.
fn bucket(ns: u64) -> usize {
    if ns < STEPS as u64 {
        return ns as usize;
    }
    let doubling = ns.ilog2() as usize;
    let step = (ns >> (doubling - STEPS.ilog2() as usize)) as usize & (STEPS - 1);
    let bucket = (doubling - STEPS.ilog2() as usize + 1) * STEPS + step;
    bucket.min(BUCKETS - 1)
}

/// The largest time that falls into a bucket.
fn bucket_end(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let (doubling, step) = (bucket / STEPS - 1, bucket % STEPS);
    (((STEPS + step + 1) as u64) << doubling) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_lies_in_its_bucket_which_is_at_most_a_quarter_wide() {
        for ns in (0..100_000).chain([1 << 20, (1 << 30) + 12345, 1 << 39]) {
            let end = bucket_end(bucket(ns));
            assert!(end >= ns && end <= ns + ns / 4, "{ns} ends at {end}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_those_of_what_was_noted() {
        let histogram = Histogram::default();
        (0..990).for_each(|_| histogram.note(100));
        (0..10).for_each(|_| histogram.note(5_000));
        let Latency { p50_ns, p99_ns, p999_ns } = histogram.percentiles();
        assert!((100..=125).contains(&p50_ns) && (100..=125).contains(&p99_ns));
        assert!((5_000..=6_250).contains(&p999_ns));
    }
}
