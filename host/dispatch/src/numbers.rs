//! What queues count about themselves, always.
//!
//! Time is counted in ticks, the cheapest clock, and turned into nanoseconds when it is read. Even
//! that one costs as much as a short item in a virtual machine, so short ones are timed in groups.
//!
//! One thread writes at a time, the one that runs the queue, so a load and a store are enough;
//! any thread reads.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

use iohost_event::TickRate;

/// Sub-divisions of each doubling of time: a bucket is at most a quarter wide.
const STEPS: usize = 4;
/// Buckets up to 2^40 ticks, some minutes; longer times fall into the last one.
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
    /// Items that the running thread put on its own queue without the inbox.
    own: AtomicU64,
    /// Items that stood on the queue and have run.
    taken: AtomicU64,
    /// What found the queue idle and ran at once: blocks of `dispatch_sync`, deliveries.
    at_once_started: AtomicU64,
    at_once_ended: AtomicU64,
    longest: AtomicU64,
    wait: Histogram,
    run: Histogram,
}

impl Numbers {
    pub(crate) fn note_wait(&self, ticks: u64) {
        self.wait.note(ticks, 1);
    }

    /// The running thread put an item on its own queue.
    pub(crate) fn count_own_push(&self) {
        count_one(&self.own);
    }

    /// An item that stood on the queue has run.
    pub(crate) fn count_run(&self) {
        count_one(&self.taken);
    }

    /// How long one item ran.
    pub(crate) fn note_time(&self, ticks: u64) {
        self.run.note(ticks, 1);
        if ticks > self.longest.load(Relaxed) {
            self.longest.store(ticks, Relaxed);
        }
    }

    /// Something runs on the thread that brought it, until what is returned is dropped. `stood`: it
    /// waited on the queue for its turn.
    #[inline]
    pub(crate) fn count_synchronous(&self, stood: bool) -> Synchronous<'_> {
        if !stood {
            count_one(&self.at_once_started);
        }
        Synchronous { ended: if stood { &self.taken } else { &self.at_once_ended } }
    }

    /// Items waiting or running, of those that were put into the inbox.
    pub(crate) fn depth(&self, put: u64, dropped: u64) -> u64 {
        let ended = self.taken.load(Relaxed) + self.at_once_ended.load(Relaxed) + dropped;
        let put = put + self.own.load(Relaxed) + self.at_once_started.load(Relaxed);
        put.saturating_sub(ended)
    }

    /// The numbers, with ticks turned into nanoseconds.
    pub(crate) fn read(
        &self,
        name: &str,
        depth: u64,
        dropped: u64,
        rate: TickRate,
    ) -> QueueNumbers {
        QueueNumbers {
            name: name.to_owned(),
            depth,
            executed: self.taken.load(Relaxed) + self.at_once_ended.load(Relaxed),
            dropped,
            longest_ns: rate.ns(self.longest.load(Relaxed)),
            wait: self.wait.percentiles(|ticks| rate.ns(ticks)),
            run: self.run.percentiles(|ticks| rate.ns(ticks)),
        }
    }
}

/// Times the items that one thread runs one after the other.
///
/// An item that took long has the next one timed alone. After a short one up to [`GROUP`] share one
/// reading: they count as equally long, and if they took longer than as many short ones can, all
/// that is over as one item's.
pub(crate) struct Stopwatch<'a> {
    numbers: &'a Numbers,
    since: u64,
    items: u32,
    group: u32,
}

/// Items that share one reading of the clock.
const GROUP: u32 = 16;

/// Ticks up to which an item is short: some hundred nanoseconds.
const SHORT: u64 = 1_000;

impl<'a> Stopwatch<'a> {
    pub(crate) fn start(numbers: &'a Numbers, now: u64) -> Self {
        Self { numbers, since: now, items: 0, group: 1 }
    }

    /// An item has run. `now` reads the clock.
    pub(crate) fn item_ran(&mut self, now: impl FnOnce() -> u64) {
        self.numbers.count_run();
        self.items += 1;
        if self.items == self.group {
            self.read(now());
        }
    }

    /// Notes the items since the last reading, if there are some.
    pub(crate) fn read_rest(&mut self, now: impl FnOnce() -> u64) {
        if self.items > 0 {
            self.read(now());
        }
    }

    /// What was until now is no item's. After [`read_rest`](Self::read_rest).
    pub(crate) fn skip_to(&mut self, now: u64) {
        self.since = now;
    }

    /// Notes the items since the last reading.
    fn read(&mut self, now: u64) {
        let ticks = now.saturating_sub(self.since);
        let (others, all_short) = (self.items.saturating_sub(1), u64::from(self.items) * SHORT);
        if ticks > all_short {
            // At least one was long; the others cannot have been told apart.
            self.numbers.run.note(SHORT / 2, others);
            self.numbers.note_time(ticks - u64::from(others) * (SHORT / 2));
            self.group = 1;
        } else {
            self.numbers.run.note(ticks / u64::from(self.items), others);
            self.numbers.note_time(ticks / u64::from(self.items));
            self.group = GROUP;
        }
        (self.since, self.items) = (now, 0);
    }
}

/// Something runs on the thread that brought it; counted at its end, also by a panic.
pub(crate) struct Synchronous<'a> {
    ended: &'a AtomicU64,
}

impl Drop for Synchronous<'_> {
    #[inline]
    fn drop(&mut self) {
        count_one(self.ended);
    }
}

impl Histogram {
    fn note(&self, ticks: u64, times: u32) {
        let bucket = &self.buckets[bucket(ticks)];
        bucket.store(bucket.load(Relaxed).saturating_add(times), Relaxed);
    }

    fn percentiles(&self, ns: impl Fn(u64) -> u64) -> Latency {
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
            reached.map_or(0, |bucket| ns(bucket_end(bucket)))
        };
        Latency { p50_ns: at(500), p99_ns: at(990), p999_ns: at(999) }
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { AtomicU32::new(0) }; BUCKETS] }
    }
}

#[inline]
fn count_one(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed) + 1, Relaxed);
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
    fn a_long_item_among_short_ones_is_seen_and_all_are_counted() {
        let (numbers, now) = (Numbers::default(), std::cell::Cell::new(0));
        let mut watch = Stopwatch::start(&numbers, 0);
        let mut run = |ticks| {
            now.set(now.get() + ticks);
            watch.item_ran(|| now.get());
        };
        (0..40).for_each(|_| run(100));
        run(50_000);
        (0..40).for_each(|_| run(100));
        watch.read_rest(|| now.get());
        let counted: u32 = numbers.run.buckets.iter().map(|count| count.load(Relaxed)).sum();
        assert_eq!((counted, numbers.taken.load(Relaxed)), (81, 81));
        let longest = numbers.longest.load(Relaxed);
        assert!((40_000..=51_600).contains(&longest), "{longest}");
        assert!(numbers.run.percentiles(|ticks| ticks).p50_ns <= 125);
    }

    #[test]
    fn percentiles_are_those_of_what_was_noted() {
        let histogram = Histogram::default();
        (0..990).for_each(|_| histogram.note(100, 1));
        histogram.note(5_000, 10);
        let Latency { p50_ns, p99_ns, p999_ns } = histogram.percentiles(|ticks| ticks);
        assert!((100..=125).contains(&p50_ns) && (100..=125).contains(&p99_ns));
        assert!((5_000..=6_250).contains(&p999_ns));
    }
}
