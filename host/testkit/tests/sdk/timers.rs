//! `IOTimerDispatchSource` and the five clocks.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, SystemTime};

use iohost_dispatch::Clock;
use iohost_driver::prelude::*;

use crate::probe::{Bench, Host, Probe, Seen};

const SECOND: u64 = 1_000_000_000;
/// Where a rig's time starts.
const START: u64 = SECOND;

const CLOCKS: [IOTimerClock; 5] = [
    IOTimerClock::RealTime,
    IOTimerClock::MonotonicRaw,
    IOTimerClock::UptimeRaw,
    IOTimerClock::MachContinuousTime,
    IOTimerClock::MachAbsoluteTime,
];

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
}

#[test]
fn a_timer_fires_on_the_queue_given_to_create() {
    let bench = Bench::new();
    let side = IODispatchQueue::create(&bench.queue, "side", bench.seen.clone()).unwrap();
    let (own, default) = (side.clone(), bench.queue.clone());
    let timer = IOTimerDispatchSource::create(&side, move |seen: &mut Seen, _| {
        seen.note(format!("side {}, default {}", own.on_queue(), default.on_queue()));
    });
    timer.as_ref().unwrap().wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
    assert_eq!(bench.settled(), ["side true, default false"]);
}

#[test]
fn a_timer_that_was_only_made_never_fires() {
    let bench = Bench::new();
    let _timer = bench.timer();
    assert!(bench.after(1_000_000 * SECOND).is_empty());
}

#[test]
fn a_timer_dropped_while_armed_does_not_fire_and_frees_its_handler() {
    let bench = Bench::new();
    let owned = Arc::new(());
    let held = owned.clone();
    let timer = IOTimerDispatchSource::create(&bench.queue, move |probe: &mut Probe, _| {
        drop(held.clone());
        probe.note("fired");
    });
    let timer = timer.unwrap();
    timer.wake_at_time(IOTimerClock::UptimeRaw, 2 * SECOND, 0).unwrap();
    drop(timer);
    assert_eq!(Arc::strong_count(&owned), 1);
    assert!(bench.after(2 * SECOND).is_empty());
}

#[test]
fn the_handler_put_in_place_of_another_is_the_one_called() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at_time(IOTimerClock::UptimeRaw, 2 * SECOND, 0).unwrap();
    timer.set_handler(&bench.queue, |probe, _| probe.note("the other")).unwrap();
    assert_eq!(bench.after(SECOND), ["the other"]);
}

#[test]
fn a_timer_fires_once_per_arming_at_its_deadline_and_not_before() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at_time(IOTimerClock::UptimeRaw, START + 100, 0).unwrap();
    assert!(bench.after(99).is_empty());
    assert_eq!(bench.after(1), [format!("fired at {}", START + 100)]);
    assert!(bench.after(SECOND).is_empty());
}

#[test]
fn arming_again_replaces_the_deadline_that_was_there() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at_time(IOTimerClock::UptimeRaw, START + 100, 0).unwrap();
    timer.wake_at_time(IOTimerClock::MonotonicRaw, START + 300, 0).unwrap();
    assert!(bench.after(299).is_empty());
    assert_eq!(bench.after(1).len(), 1);
}

#[test]
fn arming_again_on_the_queue_takes_back_a_deadline_that_has_expired_already() {
    let bench = Bench::new();
    let timer = Arc::new(bench.timer());
    timer.wake_at_time(IOTimerClock::UptimeRaw, START, 0).unwrap();
    let again = timer.clone();
    // Queued before the expiration is, and runs when the deadline has long passed.
    bench.queue.dispatch_async(move |_| {
        again.wake_at_time(IOTimerClock::UptimeRaw, START + 100, 0).unwrap();
    });
    assert!(bench.settled().is_empty());
    assert_eq!(bench.after(100), [format!("fired at {}", START + 100)]);
}

#[test]
fn arming_in_the_handler_makes_a_period_that_does_not_drift() {
    let bench = Bench::new();
    let timer = IOTimerDispatchSource::create(&bench.queue, {
        let mut next = START + 100;
        move |probe: &mut Probe, time| {
            probe.note(format!("{}", time - START));
            next += 100;
            let timer = probe.timer.as_ref().unwrap();
            timer.wake_at_time(IOTimerClock::UptimeRaw, next, 0).unwrap();
        }
    });
    let timer = timer.unwrap();
    timer.wake_at_time(IOTimerClock::UptimeRaw, START + 100, 0).unwrap();
    bench.queue.dispatch_sync(|probe| probe.timer = Some(timer)).unwrap();
    assert_eq!(bench.after(130), ["130"]);
    assert_eq!(bench.after(70), ["200"]);
    assert_eq!(bench.after(100), ["300"]);
}

#[test]
fn a_past_deadline_fires_at_once_but_not_inside_the_call() {
    let bench = Bench::new();
    let timer = bench.timer();
    for clock in CLOCKS {
        for deadline in [0, START - 1, START] {
            timer.wake_at_time(clock, deadline, 0).unwrap();
            assert!(bench.seen.take().is_empty(), "{clock:?}");
            assert_eq!(bench.settled().len(), 1, "{clock:?}");
        }
    }
}

#[test]
fn a_thousand_timers_with_leeway_all_fire_and_none_early() {
    let host = Host::with_threads();
    let (fired, firings) = channel();
    let now = host.queue.now(IOTimerClock::UptimeRaw);
    let timers: Vec<_> = (0..1_000)
        .map(|number| {
            let deadline = now + (number * 7_919 % 1_000) * 50_000;
            let (fired, queue) = (fired.clone(), host.queue.clone());
            let handler = move |_: &mut Probe, _| {
                let now = queue.now(IOTimerClock::UptimeRaw);
                fired.send((number, now >= deadline)).unwrap();
            };
            let timer = IOTimerDispatchSource::create(&host.queue, handler).unwrap();
            timer.wake_at_time(IOTimerClock::UptimeRaw, deadline, number * 1_000).unwrap();
            timer
        })
        .collect();
    drop(fired);
    let mut numbers: Vec<_> = (0..1_000).map(|_| firings.recv().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..1_000).map(|number| (number, true)).collect::<Vec<_>>());
    drop(timers);
}

#[test]
fn a_timer_alone_fires_at_the_end_of_its_leeway_and_no_later() {
    for clock in CLOCKS {
        let bench = Bench::new();
        let timer = bench.timer();
        timer.wake_at_time(clock, START + 100, 50).unwrap();
        assert!(bench.after(149).is_empty(), "{clock:?}");
        assert_eq!(bench.after(1), [format!("fired at {}", START + 150)], "{clock:?}");
    }
}

#[test]
fn timers_whose_leeways_overlap_share_a_wake_up_that_is_late_for_none() {
    let bench = Bench::new();
    let armed = |deadline, leeway| {
        let timer = bench.timer();
        timer.wake_at_time(IOTimerClock::UptimeRaw, START + deadline, leeway).unwrap();
        timer
    };
    let _timers = [armed(10, 100), armed(50, 20), armed(69, 500), armed(70, 500), armed(71, 1)];
    let wake_ups: Vec<usize> = (0..1_000).map(|_| bench.after(1).len()).collect();
    let at = |time: usize| wake_ups[time - 1];
    // One at 70 for the first four, of which the second could not wait; one at 72 for the last.
    assert_eq!([at(70), at(72)], [4, 1]);
    assert_eq!(wake_ups.iter().sum::<usize>(), 5);
}

#[test]
fn a_leeway_up_to_the_end_of_time_is_taken() {
    let bench = Bench::new();
    let (patient, other) = (bench.timer(), bench.timer());
    patient.wake_at_time(IOTimerClock::UptimeRaw, START + 5, u64::MAX).unwrap();
    assert!(bench.after(1_000_000 * SECOND).is_empty());
    other.wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
    assert_eq!(bench.settled().len(), 2);
}

#[test]
fn ticks_and_nanoseconds_of_a_clock_are_the_same_and_equal_deadlines_fire_together() {
    let pairs = [
        (IOTimerClock::MachAbsoluteTime, IOTimerClock::UptimeRaw),
        (IOTimerClock::MachContinuousTime, IOTimerClock::MonotonicRaw),
    ];
    for (ticks, ns) in pairs {
        let bench = Bench::new();
        let (first, second) = (bench.timer(), bench.timer());
        first.wake_at_time(ticks, START + 7, 0).unwrap();
        second.wake_at_time(ns, START + 7, 0).unwrap();
        assert!(bench.after(6).is_empty());
        assert_eq!(bench.after(1).len(), 2, "{ticks:?} {ns:?}");
    }
}

#[test]
fn each_clock_is_the_kernels_and_its_timers_fire_after_their_deadline_on_it() {
    let host = Host::with_threads();
    let kernel = |clock| match clock {
        IOTimerClock::RealTime => Clock::Wall,
        IOTimerClock::MonotonicRaw | IOTimerClock::MachContinuousTime => Clock::Continuous,
        IOTimerClock::UptimeRaw | IOTimerClock::MachAbsoluteTime => Clock::Uptime,
    };
    for clock in CLOCKS {
        let before = kernel(clock).now();
        let now = host.queue.now(clock);
        assert!((before..=kernel(clock).now()).contains(&now), "{clock:?}");
        let (fired, firing) = channel();
        let timer = IOTimerDispatchSource::create(&host.queue, move |_: &mut Probe, _| {
            fired.send(kernel(clock).now()).unwrap();
        });
        timer.as_ref().unwrap().wake_at_time(clock, now + 1_000_000, 0).unwrap();
        assert!(firing.recv().unwrap() >= now + 1_000_000, "{clock:?}");
    }
}

#[test]
fn uptime_stands_still_across_a_suspend_and_its_deadlines_wait() {
    for clock in [IOTimerClock::UptimeRaw, IOTimerClock::MachAbsoluteTime] {
        let bench = Bench::new();
        let timer = bench.timer();
        timer.wake_at_time(clock, START + 100, 0).unwrap();
        bench.after(60);
        bench.rig.suspend(Duration::from_secs(3600));
        assert_eq!(bench.queue.now(clock), START + 60, "{clock:?}");
        assert!(bench.settled().is_empty(), "{clock:?}");
        assert!(bench.after(39).is_empty(), "{clock:?}");
        assert_eq!(bench.after(1), [format!("fired at {}", START + 100)], "{clock:?}");
    }
}

#[test]
fn continuous_time_goes_on_across_a_suspend_and_its_deadlines_pass() {
    for clock in [IOTimerClock::MonotonicRaw, IOTimerClock::MachContinuousTime] {
        let bench = Bench::new();
        let (during, after) = (bench.timer(), bench.timer());
        during.wake_at_time(clock, START + 1800 * SECOND, 0).unwrap();
        after.wake_at_time(clock, START + 3600 * SECOND + 10, 0).unwrap();
        bench.rig.suspend(Duration::from_secs(3600));
        assert_eq!(bench.queue.now(clock), START + 3600 * SECOND, "{clock:?}");
        // The time that handlers get is uptime, whatever the clock.
        assert_eq!(bench.settled(), [format!("fired at {START}")], "{clock:?}");
        assert!(bench.after(9).is_empty(), "{clock:?}");
        assert_eq!(bench.after(1), [format!("fired at {}", START + 10)], "{clock:?}");
    }
}

#[test]
fn the_time_of_day_goes_on_across_a_suspend() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at_time(IOTimerClock::RealTime, START + SECOND, 0).unwrap();
    bench.rig.suspend(Duration::from_secs(1));
    assert_eq!(bench.settled().len(), 1);
}

#[test]
fn a_time_of_day_that_is_stepped_past_a_deadline_fires_it_and_leaves_other_clocks_alone() {
    let bench = Bench::new();
    let timers = CLOCKS.map(|clock| {
        let timer = bench.timer();
        timer.wake_at_time(clock, START + 100 * SECOND, 0).unwrap();
        timer
    });
    bench.rig.set_wall_clock(Duration::from_nanos(START + 100 * SECOND - 1));
    assert!(bench.settled().is_empty());
    bench.rig.set_wall_clock(Duration::from_nanos(START + 100 * SECOND));
    assert_eq!(bench.settled(), [format!("fired at {START}")]);
    assert!(bench.after(100 * SECOND - 1).is_empty());
    assert_eq!(bench.after(1).len(), timers.len() - 1);
}

#[test]
fn a_time_of_day_that_is_stepped_back_puts_its_deadlines_off() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at_time(IOTimerClock::RealTime, START + 100, 0).unwrap();
    bench.after(60);
    bench.rig.set_wall_clock(Duration::ZERO);
    assert!(bench.after(40).is_empty(), "its old moment");
    assert!(bench.after(START + 59).is_empty());
    assert_eq!(bench.after(1).len(), 1);
}

#[test]
fn a_leeway_on_the_time_of_day_is_stepped_with_it() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at_time(IOTimerClock::RealTime, START + 100, 50).unwrap();
    bench.rig.set_wall_clock(Duration::from_nanos(START + 149));
    assert!(bench.settled().is_empty());
    bench.rig.set_wall_clock(Duration::from_nanos(START));
    assert!(bench.after(149).is_empty());
    assert_eq!(bench.after(1).len(), 1);
}

#[test]
fn ten_thousand_timers_on_each_clock_fire_once_each_and_none_early() {
    const SHOTS: u64 = 10_000;
    for clock in CLOCKS {
        let host = Host::with_threads();
        let (fired, firings) = channel();
        let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
        let timers: Vec<_> = (0..SHOTS)
            .map(|shot| {
                // Marsaglia's xorshift, 2003.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let deadline = host.queue.now(clock) + random % (SECOND / 2);
                let leeway = [0, random % (SECOND / 50)][(shot % 2) as usize];
                let (fired, queue) = (fired.clone(), host.queue.clone());
                let handler = move |_: &mut Probe, _| {
                    fired.send((shot, queue.now(clock).checked_sub(deadline))).unwrap();
                };
                let timer = IOTimerDispatchSource::create(&host.queue, handler).unwrap();
                timer.wake_at_time(clock, deadline, leeway).unwrap();
                timer
            })
            .collect();
        drop(fired);
        let mut seen = vec![false; SHOTS as usize];
        for _ in 0..SHOTS {
            let (shot, late) = firings.recv().unwrap();
            assert!(late.is_some(), "{clock:?}: shot {shot} was early");
            assert!(!std::mem::replace(&mut seen[shot as usize], true), "{clock:?}: {shot} twice");
        }
        // Each handler owns a sender, and goes with its timer after it has returned.
        drop(timers);
        assert_eq!(firings.recv().ok(), None, "{clock:?}: one fired again");
    }
}

#[test]
fn real_time_counts_from_1970() {
    let host = Host::with_threads();
    let since_1970 = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let before = since_1970();
    let now = Duration::from_nanos(host.queue.now(IOTimerClock::RealTime));
    assert!((before..=since_1970()).contains(&now));
}

#[test]
fn the_clocks_have_driverkits_numbers() {
    let numbers = CLOCKS.map(|clock| clock as u64);
    assert_eq!(numbers, [0x80, 0x84, 0x88, 0xC4, 0xC8]);
}

#[test]
fn a_disabled_timer_keeps_its_deadline_and_a_past_one_fires_when_enabled() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at_time(IOTimerClock::UptimeRaw, START + 100, 0).unwrap();
    timer.set_enable(false).unwrap();
    assert!(bench.after(200).is_empty());
    timer.set_enable(true).unwrap();
    assert_eq!(bench.settled().len(), 1);
    assert!(bench.after(SECOND).is_empty());
}

#[test]
fn a_deadline_set_while_disabled_is_armed_when_enabled() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.set_enable(false).unwrap();
    assert_eq!(timer.wake_at_time(IOTimerClock::UptimeRaw, START + 100, 0), Ok(()));
    assert!(bench.after(50).is_empty());
    timer.set_enable(true).unwrap();
    assert!(bench.after(49).is_empty());
    assert_eq!(bench.after(1).len(), 1);
    timer.set_enable(false).unwrap();
    timer.wake_at_time(IOTimerClock::UptimeRaw, START + 150, 0).unwrap();
    assert!(bench.after(100).is_empty());
    timer.set_enable(true).unwrap();
    assert_eq!(bench.settled().len(), 1, "it passed while disabled");
}

#[test]
fn an_expiration_whose_handler_has_not_started_is_taken_back_by_disabling() {
    let bench = Bench::new();
    let timer = Arc::new(bench.timer());
    timer.wake_at_time(IOTimerClock::UptimeRaw, START, 0).unwrap();
    let disabled = timer.clone();
    bench.queue.dispatch_async(move |_| disabled.set_enable(false).unwrap());
    assert!(bench.settled().is_empty());
    timer.set_enable(true).unwrap();
    assert!(bench.settled().is_empty(), "and it is not delivered later");
    timer.wake_at_time(IOTimerClock::UptimeRaw, START, 0).unwrap();
    let toggled = timer.clone();
    bench.queue.dispatch_async(move |_| {
        toggled.set_enable(false).unwrap();
        toggled.set_enable(true).unwrap();
    });
    assert!(bench.settled().is_empty(), "nor when it is enabled at once");
}

#[test]
fn enabling_a_timer_again_does_not_bring_back_a_deadline_that_was_delivered() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
    assert_eq!(bench.settled().len(), 1);
    timer.set_enable(false).unwrap();
    timer.set_enable(true).unwrap();
    assert!(bench.settled().is_empty());
}

#[test]
fn a_timer_dropped_while_its_expiration_waits_on_the_queue_does_not_fire() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
    // Runs first: the expiration comes to the queue behind it.
    bench.queue.dispatch_async(move |_| drop(timer));
    assert!(bench.settled().is_empty());
}

#[test]
fn a_cancelled_timer_cannot_be_armed_and_a_second_cancel_runs_its_own_handler() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.cancel(&bench.queue, |probe| probe.note("cancelled"));
    timer.cancel(&bench.queue, |probe| probe.note("again"));
    let armed = timer.wake_at_time(IOTimerClock::UptimeRaw, 0, 0);
    assert_eq!(code(armed), Some(IOReturn::UNSUPPORTED));
    assert_eq!(bench.settled(), ["cancelled", "again"]);
}

#[test]
fn the_time_a_timer_reports_is_between_arming_and_now_on_uptime_whatever_its_clock() {
    let host = Host::with_threads();
    for clock in CLOCKS {
        let (fired, firing) = channel();
        let timer = IOTimerDispatchSource::create(&host.queue, move |_: &mut Probe, time| {
            fired.send(time).unwrap();
        });
        let armed = host.queue.now(IOTimerClock::MachAbsoluteTime);
        let deadline = host.queue.now(clock) + 100_000;
        timer.as_ref().unwrap().wake_at_time(clock, deadline, 0).unwrap();
        let time = firing.recv().unwrap();
        let now = host.queue.now(IOTimerClock::MachAbsoluteTime);
        assert!((armed..=now).contains(&time), "{clock:?}");
    }
}

#[test]
fn a_check_of_a_timer_that_has_not_fired_is_not_ready() {
    let bench = Bench::new();
    let timer = bench.timer();
    let not_ready = Some(IOReturn::NOT_READY);
    assert_eq!(code(timer.check_for_work()), not_ready, "not armed");
    timer.wake_at_time(IOTimerClock::UptimeRaw, START + 1, 0).unwrap();
    assert_eq!(code(timer.check_for_work()), not_ready, "not due");
    timer.set_enable(false).unwrap();
    timer.wake_at_time(IOTimerClock::UptimeRaw, START, 0).unwrap();
    assert_eq!(code(timer.check_for_work()), not_ready, "disabled");
    timer.cancel(&bench.queue, |_| ());
    assert_eq!(code(timer.check_for_work()), not_ready, "cancelled");
    assert!(bench.settled().is_empty());
}

#[test]
fn a_check_of_a_timer_that_is_due_has_it_fire_once_after_the_call() {
    let bench = Bench::new();
    let timer = bench.timer();
    timer.wake_at_time(IOTimerClock::UptimeRaw, START, SECOND).unwrap();
    // Due, and the leeway would let it wait.
    for _ in 0..2 {
        assert_eq!(timer.check_for_work(), Ok(()));
    }
    assert!(bench.seen.take().is_empty());
    assert_eq!(bench.settled(), [format!("fired at {START}")]);
    assert_eq!(code(timer.check_for_work()), Some(IOReturn::NOT_READY));
    assert!(bench.after(2 * SECOND).is_empty());
}

#[test]
fn a_synchronous_check_of_a_timer_waits_for_its_handler_or_its_end() {
    let bench = Bench::new();
    let timer = Arc::new(bench.timer());
    let side = IODispatchQueue::create(&bench.queue, "side", bench.seen.clone()).unwrap();
    // Nobody but this thread runs queues, so the side does its work while this one waits.
    let arming = timer.clone();
    side.dispatch_async(move |seen| {
        seen.note("armed");
        arming.wake_at_time(IOTimerClock::UptimeRaw, START, 0).unwrap();
    });
    assert_eq!(timer.wait_for_work(), Ok(()));
    bench.seen.note("returned");
    let fired = format!("fired at {START}");
    assert_eq!(bench.settled(), ["armed", &fired, "returned"]);
    let (cancelling, queue) = (timer.clone(), bench.queue.clone());
    side.dispatch_async(move |_| cancelling.cancel(&queue, |_| ()));
    assert_eq!(code(timer.wait_for_work()), Some(IOReturn::ABORTED));
}
