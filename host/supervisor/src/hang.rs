//! When a driver that runs counts as hung.
//!
//! The daemon looks at the lanes of a driver host's flight recorder, a few times within the time
//! after which a driver hangs, and only while there is work: see [`iohost_memory::flight_recorder`].
//! A queue that is at work, and has neither ended a piece of work nor reported progress from one look
//! to the next for all of that time, hangs; and so does one that has only reported progress for as
//! long as the cap. So does a process that was stopped by a signal.
//!
//! Time is counted in looks, which the daemon makes no oftener than it means to. Where the machine
//! is so busy that the daemon itself comes late, drivers are given that time too.

use std::time::{Duration, Instant};

use iohost_memory::flight_recorder::Pulse;

/// Looks within the time after which a driver hangs.
const LOOKS: u32 = 4;

/// What the daemon knows of the lanes of one driver host.
#[derive(Debug)]
pub(crate) struct HangWatch {
    period: Duration,
    /// Looks without any sign of life, and without an end of a piece of work.
    most_quiet: u32,
    most_stuck: u32,
    /// When the next look is due; `None` while there is nothing to look at.
    next: Option<Instant>,
    lanes: Vec<Option<Seen>>,
    /// Looks at a process that was stopped.
    stopped: u32,
    /// Looks that found nothing to do.
    idle: u32,
}

/// A lane at the last look.
#[derive(Clone, Copy, Debug)]
struct Seen {
    pulse: Pulse,
    quiet: u32,
    stuck: u32,
}

/// What comes of a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// There is work: the next look is due in a while.
    Work,
    /// There is none: whoever has some is to ring, and one more look is due.
    Resting,
    /// There is still none: no look is due.
    AtRest,
    /// It hangs.
    Hung(Hang),
}

/// How a driver hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hang {
    /// A lane gave no sign of life for this long.
    Quiet(usize, Duration),
    /// A lane has only reported progress for this long.
    Stuck(usize, Duration),
    /// The process was stopped, this long ago.
    Stopped(Duration),
}

impl HangWatch {
    /// A watch that looks at `now`; `None` where a driver may take as long as it likes.
    pub(crate) fn new(hang: Duration, cap: Duration, now: Instant) -> Option<Self> {
        let period = hang / LOOKS;
        if period.is_zero() {
            return None;
        }
        let most_stuck = cap.as_nanos().div_ceil(period.as_nanos());
        Some(Self {
            period,
            most_quiet: LOOKS,
            most_stuck: u32::try_from(most_stuck).unwrap_or(u32::MAX).max(LOOKS),
            next: Some(now),
            lanes: Vec::new(),
            stopped: 0,
            idle: 0,
        })
    }

    /// When to look next.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.next
    }

    /// A lane began to work while nobody looked, or the process was stopped.
    pub(crate) fn rung(&mut self, now: Instant) {
        self.idle = 0;
        self.next.get_or_insert(now);
    }

    /// Takes what a look at `now` found.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        pulses: &[Option<Pulse>],
        is_stopped: bool,
    ) -> Verdict {
        self.next = Some(now + self.period);
        self.lanes.resize(pulses.len(), None);
        self.stopped = if is_stopped { self.stopped + 1 } else { 0 };
        // The first of these looks found it as it was then.
        if self.stopped > self.most_quiet {
            return Verdict::Hung(Hang::Stopped(self.period * (self.stopped - 1)));
        }
        let mut is_idle = !is_stopped;
        for (number, (seen, pulse)) in self.lanes.iter_mut().zip(pulses).enumerate() {
            let Some(pulse) = *pulse else {
                *seen = None;
                continue;
            };
            let (quiet, stuck) = match *seen {
                Some(seen) if pulse.is_at_work && seen.pulse.is_at_work => {
                    let has_ended = pulse.done != seen.pulse.done;
                    let is_alive = has_ended || pulse.progress != seen.pulse.progress;
                    let quiet = if is_alive { 0 } else { seen.quiet + 1 };
                    (quiet, if has_ended { 0 } else { seen.stuck.saturating_add(1) })
                }
                _ => (0, 0),
            };
            is_idle &= !pulse.is_at_work && seen.is_some_and(|seen| seen.pulse.done == pulse.done);
            *seen = Some(Seen { pulse, quiet, stuck });
            if quiet >= self.most_quiet {
                return Verdict::Hung(Hang::Quiet(number, self.period * quiet));
            }
            if stuck >= self.most_stuck {
                return Verdict::Hung(Hang::Stuck(number, self.period * stuck));
            }
        }
        self.idle = if is_idle { self.idle + 1 } else { 0 };
        match self.idle {
            0 => Verdict::Work,
            1 => Verdict::Resting,
            _ => {
                self.next = None;
                Verdict::AtRest
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HANG: Duration = Duration::from_secs(2);
    const CAP: Duration = Duration::from_secs(60);

    /// A watch, and what time its last look was.
    struct Bench {
        watch: HangWatch,
        now: Instant,
    }

    impl Bench {
        fn new() -> Self {
            let now = Instant::now();
            Self { watch: HangWatch::new(HANG, CAP, now).unwrap(), now }
        }

        /// Looks when it is due: at work, done, progress of each lane.
        fn look(&mut self, lanes: &[(bool, u64, u64)]) -> Verdict {
            self.now = self.watch.next().expect("a look is due");
            self.watch.look(self.now, &pulses(lanes), false)
        }
    }

    fn pulses(lanes: &[(bool, u64, u64)]) -> Vec<Option<Pulse>> {
        let pulse = |(is_at_work, done, progress)| Some(Pulse { is_at_work, done, progress });
        lanes.iter().copied().map(pulse).collect()
    }

    #[test]
    fn work_without_a_sign_of_life_hangs_after_its_time_and_not_before() {
        let mut bench = Bench::new();
        let start = bench.now;
        let mut verdict = bench.look(&[(false, 0, 0), (true, 7, 0)]);
        while verdict == Verdict::Work {
            assert!(bench.now - start < HANG);
            verdict = bench.look(&[(false, 0, 0), (true, 7, 0)]);
        }
        assert_eq!(verdict, Verdict::Hung(Hang::Quiet(1, HANG)));
        assert_eq!(bench.now - start, HANG);
    }

    #[test]
    fn work_that_ends_piece_by_piece_never_hangs() {
        let mut bench = Bench::new();
        for done in 0..10_000 {
            assert_eq!(bench.look(&[(true, done, 0)]), Verdict::Work);
        }
        // Also when a piece takes nearly all of the time.
        for done in 10_000..10_100 {
            for _ in 0..LOOKS {
                assert_eq!(bench.look(&[(true, done, 0)]), Verdict::Work);
            }
        }
    }

    #[test]
    fn progress_puts_a_hang_off_up_to_the_cap() {
        let mut bench = Bench::new();
        let start = bench.now;
        let mut progress = 0;
        let verdict = loop {
            progress += 1;
            match bench.look(&[(true, 3, progress)]) {
                Verdict::Work => assert!(bench.now - start < CAP),
                verdict => break verdict,
            }
        };
        assert_eq!(verdict, Verdict::Hung(Hang::Stuck(0, CAP)));
        // The next piece of work has a cap of its own.
        let mut bench = Bench::new();
        for look in 0..10_000 {
            assert_eq!(bench.look(&[(true, look / 100, look)]), Verdict::Work);
        }
    }

    #[test]
    fn progress_that_stops_is_a_hang() {
        let mut bench = Bench::new();
        (0..50).for_each(|progress| assert_eq!(bench.look(&[(true, 3, progress)]), Verdict::Work));
        let verdicts: Vec<_> = (0..LOOKS).map(|_| bench.look(&[(true, 3, 49)])).collect();
        assert!(verdicts[..3].iter().all(|verdict| *verdict == Verdict::Work));
        assert_eq!(verdicts[3], Verdict::Hung(Hang::Quiet(0, HANG)));
    }

    #[test]
    fn the_busiest_queue_does_not_hide_one_that_hangs() {
        let mut bench = Bench::new();
        let hung = (0..100).map(|done| bench.look(&[(true, done, done), (true, 1, 0)]));
        let hung: Vec<_> = hung.take_while(|verdict| *verdict == Verdict::Work).collect();
        assert_eq!(hung.len(), LOOKS as usize);
    }

    #[test]
    fn no_look_is_due_once_two_have_found_nothing_and_a_ring_makes_one_due() {
        let mut bench = Bench::new();
        assert_eq!(bench.look(&[(true, 0, 0)]), Verdict::Work);
        assert_eq!(bench.look(&[(false, 1, 0)]), Verdict::Work, "it has done something since");
        assert_eq!(bench.look(&[(false, 1, 0)]), Verdict::Resting);
        assert_eq!(bench.look(&[(false, 1, 0)]), Verdict::AtRest);
        assert_eq!(bench.watch.next(), None);
        bench.watch.rung(bench.now);
        assert_eq!(bench.watch.next(), Some(bench.now));
        assert_eq!(bench.look(&[(true, 1, 0)]), Verdict::Work);
        // What began as the bell was made ready is seen by the look after it.
        assert_eq!(bench.look(&[(false, 2, 0)]), Verdict::Work);
        assert_eq!(bench.look(&[(false, 2, 0)]), Verdict::Resting);
        assert_eq!(bench.look(&[(true, 2, 0)]), Verdict::Work);
    }

    #[test]
    fn a_stopped_process_hangs_also_with_nothing_to_do_and_one_that_goes_on_does_not() {
        let mut bench = Bench::new();
        let idle = pulses(&[(false, 1, 0)]);
        let mut look = |is_stopped| {
            bench.now += HANG / LOOKS;
            bench.watch.look(bench.now, &idle, is_stopped)
        };
        for _ in 0..10 {
            for _ in 0..LOOKS {
                assert_eq!(look(true), Verdict::Work);
            }
            look(false);
        }
        for _ in 0..LOOKS {
            assert_eq!(look(true), Verdict::Work);
        }
        assert_eq!(look(true), Verdict::Hung(Hang::Stopped(HANG)));
    }

    #[test]
    fn a_daemon_that_comes_late_gives_that_time_to_the_driver() {
        let mut bench = Bench::new();
        let stuck = pulses(&[(true, 1, 0)]);
        for _ in 0..LOOKS {
            bench.now += Duration::from_secs(100);
            assert_eq!(bench.watch.look(bench.now, &stuck, false), Verdict::Work);
        }
    }

    #[test]
    fn a_lane_that_ends_and_one_that_scribbles_harm_nobody() {
        let mut bench = Bench::new();
        for look in 0..100 {
            let lanes =
                [None, Some(Pulse { is_at_work: true, done: u64::MAX - look, progress: 0 })];
            let lanes = &lanes[..(look as usize % 2) + 1];
            let verdict = bench.watch.look(bench.now, lanes, false);
            assert!(!matches!(verdict, Verdict::Hung(_)), "look {look}: {verdict:?}");
            bench.watch.rung(bench.now);
        }
        let all = [Some(Pulse { is_at_work: true, done: 0, progress: 0 }); 128];
        while bench.watch.look(bench.now, &all, false) == Verdict::Work {}
    }

    #[test]
    fn no_time_is_no_watch() {
        assert!(HangWatch::new(Duration::ZERO, CAP, Instant::now()).is_none());
    }
}
