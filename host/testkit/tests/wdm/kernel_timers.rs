//! Timers with a due time, a period, and waiters.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use iohost_driver::wdm::{
    Dpc, DueTime, Error as WdmError, KernelTimer, Result as WdmResult, TimerType,
};

use crate::bench::{Bench, Held, Setup, WATCHDOG, after_ms, time_of_day_ms};

// ---- KeInitializeTimer, KeInitializeTimerEx ----

fn wait_now(timer: &KernelTimer) -> WdmResult<()> {
    timer.wait(Duration::ZERO)
}

const NOT_NOW: WdmResult<()> = Err(WdmError::Timeout { waited: Duration::ZERO });

#[test]
fn a_new_kernel_timer_is_neither_set_nor_signalled() {
    let setup = Setup::new();
    let timer = setup.timer();
    assert!(!timer.read_state());
    assert_eq!(wait_now(&timer), NOT_NOW);
    assert!(!timer.cancel());
}

#[test]
fn a_notification_timer_lets_all_through_until_it_is_set_again() {
    let setup = Setup::new();
    let timer = setup.timer();
    timer.set(after_ms(10), None);
    assert_eq!(wait_now(&timer), NOT_NOW);
    setup.advance_ms(10);
    assert_eq!([wait_now(&timer), wait_now(&timer)], [Ok(()), Ok(())]);
    timer.set(after_ms(10), None);
    assert_eq!(wait_now(&timer), NOT_NOW);
}

#[test]
fn a_synchronization_timer_lets_one_through_per_expiry() {
    let setup = Setup::new();
    let timer = KernelTimer::initialize(&setup.device, TimerType::Synchronization).unwrap();
    timer.set_ex(after_ms(10), 10, None);
    setup.advance_ms(10);
    assert_eq!([wait_now(&timer), wait_now(&timer)], [Ok(()), NOT_NOW]);
    setup.advance_ms(10);
    assert_eq!([wait_now(&timer), wait_now(&timer)], [Ok(()), NOT_NOW]);
}

#[test]
fn threads_that_wait_for_a_notification_timer_all_pass_when_it_expires() {
    let setup = Setup::new();
    let timer = setup.timer();
    timer.set(after_ms(10), None);
    thread::scope(|scope| {
        let waiters = [(); 3].map(|()| scope.spawn(|| timer.wait(WATCHDOG)));
        setup.advance_ms(10);
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), Ok(()));
        }
    });
}

#[test]
fn threads_that_wait_for_a_synchronization_timer_pass_one_per_expiry() {
    let setup = Setup::new();
    let timer = KernelTimer::initialize(&setup.device, TimerType::Synchronization).unwrap();
    thread::scope(|scope| {
        let (passed, passes) = mpsc::channel();
        for _ in 0..3 {
            let (passed, timer) = (passed.clone(), &timer);
            scope.spawn(move || passed.send(timer.wait(WATCHDOG)).unwrap());
        }
        for _ in 0..3 {
            timer.set(after_ms(10), None);
            setup.advance_ms(10);
            assert_eq!(passes.recv().unwrap(), Ok(()));
            assert!(!timer.read_state(), "the one that passed took it");
        }
    });
}

#[test]
fn a_wait_that_is_too_short_says_how_long_it_was() {
    let setup = Setup::new();
    let timer = setup.timer();
    timer.set(after_ms(10), None);
    let waited = Duration::from_millis(1);
    let err = timer.wait(waited).unwrap_err();
    assert_eq!(err, WdmError::Timeout { waited });
    assert_eq!(err.nt_status(), 0x102, "STATUS_TIMEOUT");
}

#[test]
fn waiting_on_the_queue_or_in_a_dpc_is_refused_and_asking_is_not() {
    let setup = Setup::new();
    let timer = Arc::new(setup.timer());
    let attempt = {
        let timer = timer.clone();
        move |bench: &mut Bench| {
            bench.note(format!("{:?}", timer.wait(Duration::MAX)));
            bench.note(format!("{:?}", wait_now(&timer)));
        }
    };
    setup.queue.dispatch_async(attempt.clone());
    let on_queue = WdmError::OnQueue { call: "KeWaitForSingleObject" };
    assert_eq!(setup.seen(), [format!("Err({on_queue:?})"), format!("{NOT_NOW:?}")]);

    let dpc = Dpc::initialize(&setup.device, attempt);
    timer.set(after_ms(1), Some(&dpc));
    setup.advance_ms(1);
    let in_dpc = WdmError::RaisedIrql { call: "KeWaitForSingleObject" };
    assert_eq!(setup.seen(), [format!("Err({in_dpc:?})"), "Ok(())".to_owned()]);
}

// ---- KeSetTimer ----

#[test]
fn minus_ten_million_units_expire_after_one_second_and_not_before() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    assert!(!timer.set(DueTime::from_100ns(-10_000_000), Some(&dpc)), "it was not set");
    setup.rig.advance(Duration::from_nanos(999_999_999));
    assert!(setup.seen().is_empty());
    setup.rig.advance(Duration::from_nanos(1));
    assert_eq!(setup.seen(), ["call"]);
    assert_eq!(setup.seen_after_ms(10_000), 0, "once");
}

#[test]
fn setting_a_set_timer_says_so_and_replaces_due_time_and_dpc() {
    let setup = Setup::new();
    let (timer, old, new) = (setup.timer(), setup.dpc(), setup.dpc());
    let new_call = Dpc::initialize(&setup.device, |bench: &mut Bench| bench.note("new call"));
    timer.set(after_ms(10), Some(&old));
    assert!(timer.set(after_ms(20), Some(&new_call)));
    assert_eq!(setup.seen_after_ms(19), 0, "the old due time has passed");
    setup.advance_ms(1);
    assert_eq!(setup.seen(), ["new call"]);
    assert!(!timer.set(after_ms(1), Some(&new)), "it had expired");
}

#[test]
fn an_absolute_due_time_expires_at_that_time_of_day() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set(time_of_day_ms(250), Some(&dpc));
    assert_eq!(setup.seen_after_ms(249), 0);
    assert_eq!(setup.seen_after_ms(1), 1);
}

/// Steps the time of day to `ms` milliseconds from the start of the rig's time.
fn step_to_ms(setup: &Setup, ms: u64) {
    setup.rig.set_wall_clock(Duration::from_millis(1000 + ms));
}

#[test]
fn an_absolute_due_time_follows_a_time_of_day_that_is_stepped() {
    let setup = Setup::new();
    let (absolute, relative) = (setup.timer(), setup.timer());
    let [on_time_of_day, on_uptime] = ["absolute", "relative"]
        .map(|name| Dpc::initialize(&setup.device, move |bench: &mut Bench| bench.note(name)));
    let set = || {
        absolute.set(time_of_day_ms(100), Some(&on_time_of_day));
        relative.set(after_ms(100), Some(&on_uptime));
    };
    set();
    step_to_ms(&setup, 99);
    assert!(setup.seen().is_empty());
    step_to_ms(&setup, 100);
    assert_eq!(setup.seen(), ["absolute"], "forward");
    setup.advance_ms(100);
    assert_eq!(setup.seen(), ["relative"]);

    step_to_ms(&setup, 50);
    set();
    step_to_ms(&setup, 0);
    assert_eq!(setup.seen_after_ms(99), 0, "back");
    setup.advance_ms(1);
    assert_eq!(setup.seen().len(), 2);
}

#[test]
fn the_period_after_an_absolute_due_time_does_not_follow_steps() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set_ex(time_of_day_ms(20), 50, Some(&dpc));
    step_to_ms(&setup, 20);
    assert_eq!(setup.seen(), ["call"]);
    step_to_ms(&setup, 1_000_000);
    assert!(setup.seen().is_empty());
    step_to_ms(&setup, 0);
    assert_eq!([setup.seen_after_ms(49), setup.seen_after_ms(1)], [0, 1]);
}

#[test]
fn a_relative_due_time_does_not_count_the_time_asleep_and_an_absolute_one_does() {
    let setup = Setup::new();
    let (absolute, relative, dpc) = (setup.timer(), setup.timer(), setup.dpc());
    absolute.set(time_of_day_ms(100), Some(&dpc));
    relative.set(after_ms(100), Some(&dpc));
    setup.rig.suspend(Duration::from_millis(100));
    assert_eq!([absolute.read_state(), relative.read_state()], [true, false]);
    setup.advance_ms(100);
    assert!(relative.read_state());
}

#[test]
fn a_due_time_that_has_passed_expires_at_once_but_not_inside_the_call() {
    let setup = Setup::new();
    let dpc = setup.dpc();
    for due in [DueTime::from_100ns(0), time_of_day_ms(0), time_of_day_ms(-900)] {
        let timer = setup.timer();
        timer.set(due, Some(&dpc));
        assert!(!timer.read_state(), "not inside the call");
        assert_eq!(setup.seen(), ["call"]);
        assert!(timer.read_state());
    }
}

#[test]
fn a_dpc_that_an_expiry_has_queued_still_runs_when_the_timer_is_set_again() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set(after_ms(10), Some(&dpc));
    let busy = Held::hold(&setup.queue);
    setup.advance_ms(10);
    assert!(!timer.set(after_ms(10), Some(&dpc)));
    busy.release();
    assert_eq!(setup.seen(), ["call"]);
    assert_eq!(setup.seen_after_ms(10), 1);
}

#[test]
fn timers_that_are_due_together_queue_their_dpcs_in_the_order_of_their_due_times() {
    let setup = Setup::new();
    let dpc = |name: &'static str| {
        Dpc::initialize(&setup.device, move |bench: &mut Bench| bench.note(name))
    };
    let (late, early) = (dpc("late"), dpc("early"));
    let timers = [setup.timer(), setup.timer()];
    timers[0].set(after_ms(20), Some(&late));
    timers[1].set(after_ms(10), Some(&early));
    setup.advance_ms(30);
    assert_eq!(setup.seen(), ["early", "late"]);
}

// ---- KeSetTimerEx ----

#[test]
fn a_period_of_50_ms_makes_20_calls_per_second() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set_ex(after_ms(50), 50, Some(&dpc));
    let calls: usize = (0..1000).map(|_| setup.seen_after_ms(1)).sum();
    assert_eq!(calls, 20);
}

#[test]
fn the_first_expiry_of_a_periodic_timer_is_at_its_due_time() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set_ex(after_ms(7), 50, Some(&dpc));
    assert_eq!([setup.seen_after_ms(6), setup.seen_after_ms(1)], [0, 1]);
    assert_eq!([setup.seen_after_ms(49), setup.seen_after_ms(1)], [0, 1]);
}

#[test]
fn periods_that_were_missed_make_one_expiry_and_the_schedule_stays() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set_ex(after_ms(50), 50, Some(&dpc));
    assert_eq!(setup.seen_after_ms(175), 1, "at 175 for 50, 100 and 150");
    assert_eq!([setup.seen_after_ms(24), setup.seen_after_ms(1)], [0, 1], "at 200");
}

#[test]
fn a_period_goes_on_after_an_absolute_due_time() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set_ex(time_of_day_ms(20), 50, Some(&dpc));
    assert_eq!([setup.seen_after_ms(19), setup.seen_after_ms(1)], [0, 1]);
    assert_eq!([setup.seen_after_ms(49), setup.seen_after_ms(1)], [0, 1]);
}

// ---- KeSetCoalescableTimer ----

#[test]
fn a_coalescable_timer_without_tolerance_expires_as_one_set_with_set_ex() {
    let setup = Setup::new();
    let expiries = |set: &dyn Fn(&KernelTimer, &Dpc) -> bool| -> Vec<usize> {
        let (timer, dpc) = (setup.timer(), setup.dpc());
        assert!(!set(&timer, &dpc));
        let expiries = (0..200).map(|_| setup.seen_after_ms(1)).collect();
        assert!(set(&timer, &dpc));
        expiries
    };
    let ex = expiries(&|timer, dpc| timer.set_ex(after_ms(30), 40, Some(dpc)));
    let coalescable = expiries(&|timer, dpc| timer.set_coalescable(after_ms(30), 40, 0, Some(dpc)));
    assert_eq!(ex, coalescable);
    assert_eq!(ex.iter().sum::<usize>(), 5);
}

#[test]
fn a_coalescable_timer_is_never_early_and_keeps_its_schedule() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set_coalescable(after_ms(100), 100, 50, Some(&dpc));
    assert_eq!(setup.seen_after_ms(99), 0);
    assert_eq!(setup.seen_after_ms(51), 1, "by the end of its tolerance");
    assert_eq!(setup.seen_after_ms(49), 0, "the period counts from the due time");
    assert_eq!(setup.seen_after_ms(51), 1);
}

// ---- KeCancelTimer ----

#[test]
fn cancelling_a_one_shot_timer_says_true_once_and_it_does_not_expire() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set(after_ms(10), Some(&dpc));
    assert_eq!([timer.cancel(), timer.cancel()], [true, false]);
    assert_eq!(setup.seen_after_ms(10), 0);
    assert!(!timer.read_state());
}

#[test]
fn cancelling_an_expired_one_shot_timer_says_false_and_leaves_it_signalled() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set(after_ms(10), Some(&dpc));
    let busy = Held::hold(&setup.queue);
    setup.advance_ms(10);
    assert!(!timer.cancel());
    busy.release();
    assert_eq!(setup.seen(), ["call"], "false: the call was queued");
    assert!(timer.read_state());
}

#[test]
fn cancelling_a_periodic_timer_says_true_however_often_it_expired() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set_ex(after_ms(10), 10, Some(&dpc));
    setup.advance_ms(10);
    setup.advance_ms(10);
    assert_eq!([timer.cancel(), timer.cancel()], [true, false]);
    assert_eq!(setup.seen().len(), 2);
    assert_eq!(setup.seen_after_ms(100), 0);
}

#[test]
fn no_dpc_call_starts_after_cancel_said_true_also_one_of_an_earlier_expiry() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set(after_ms(10), Some(&dpc));
    let busy = Held::hold(&setup.queue);
    setup.advance_ms(10);
    timer.set(after_ms(10), Some(&dpc));
    assert!(timer.cancel());
    busy.release();
    assert!(setup.seen().is_empty());

    timer.set(after_ms(10), Some(&dpc));
    setup.advance_ms(10);
    assert_eq!(setup.seen(), ["call"], "timer and DPC can be used again");
}

#[test]
fn cancelling_one_timer_leaves_a_shared_dpc_to_the_other() {
    let setup = Setup::new();
    let (periodic, other, dpc) = (setup.timer(), setup.timer(), setup.dpc());
    periodic.set_ex(after_ms(10), 10, Some(&dpc));
    other.set(after_ms(10), Some(&dpc));
    let busy = Held::hold(&setup.queue);
    setup.advance_ms(10);
    assert!(periodic.cancel());
    busy.release();
    assert_eq!(setup.seen(), ["call"]);
}

#[test]
fn a_timer_that_was_dropped_does_not_expire() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set_ex(after_ms(10), 10, Some(&dpc));
    drop(timer);
    assert_eq!(setup.seen_after_ms(10), 0);
}

#[test]
fn a_timer_can_be_set_again_in_its_own_dpc() {
    let setup = Setup::new();
    let dpc = Dpc::initialize(&setup.device, |bench: &mut Bench| {
        let was_set = bench.kernel_timer.as_ref().unwrap().set(after_ms(10), bench.dpc.as_ref());
        bench.note(format!("{was_set}"));
    });
    let timer = setup.timer();
    timer.set(after_ms(10), Some(&dpc));
    setup
        .queue
        .dispatch_sync(|bench| {
            bench.kernel_timer = Some(timer);
            bench.dpc = Some(dpc);
        })
        .unwrap();
    (0..3).for_each(|_| setup.advance_ms(10));
    assert_eq!(setup.seen(), ["false", "false", "false"]);
}
