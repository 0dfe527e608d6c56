//! On the kernel's clocks, with worker threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use iohost_dispatch::Engine;
use iohost_driver::prelude::*;
use iohost_driver::wdm::{DeviceObject, Dpc, DueTime, IoTimer, KernelTimer, TimerType};

use crate::bench::{Bench, Service, WATCHDOG};

fn start() -> Service {
    Service::on(Engine::with_workers(4).unwrap())
}

#[test]
fn an_io_timer_ticks_at_whole_seconds_of_the_uptime_clock() {
    let service = start();
    let device = DeviceObject::create(&service.queue).unwrap();
    let (ticked, ticks) = mpsc::channel();
    let clock = service.queue.clone();
    let timer = IoTimer::initialize(&device, move |_, _| {
        ticked.send(clock.now(IOTimerClock::UptimeRaw)).unwrap();
    })
    .unwrap();
    let started = service.queue.now(IOTimerClock::UptimeRaw);
    timer.start().unwrap();
    let first = ticks.recv_timeout(WATCHDOG).unwrap();
    let whole_second = (started / 1_000_000_000 + 1) * 1_000_000_000;
    assert!(first >= whole_second, "{first} is before {whole_second}");

    timer.stop().unwrap();
    drop(timer);
    assert_eq!(ticks.recv_timeout(WATCHDOG), Err(RecvTimeoutError::Disconnected), "freed");
}

#[test]
fn no_timer_of_three_threads_is_early_on_either_clock() {
    let service = start();
    let device = DeviceObject::create(&service.queue).unwrap();
    let shoot = &|thread: u64| {
        let timer = KernelTimer::initialize(&device, TimerType::Synchronization).unwrap();
        let now = |clock| service.queue.now(clock);
        for shot in 0..300 {
            let delay = Duration::from_micros((shot * 7 + thread * 3) % 1000);
            let due = now(IOTimerClock::UptimeRaw) + delay.as_nanos() as u64;
            timer.set(DueTime::after(delay), None);
            timer.wait(WATCHDOG).unwrap();
            assert!(now(IOTimerClock::UptimeRaw) >= due, "relative, {delay:?}");

            let due = std::time::SystemTime::now() + delay;
            timer.set(DueTime::at(due), None);
            timer.wait(WATCHDOG).unwrap();
            assert!(std::time::SystemTime::now() >= due, "absolute, {delay:?}");
        }
    };
    thread::scope(|scope| {
        for number in 0..3 {
            scope.spawn(move || shoot(number));
        }
    });
}

#[test]
fn an_expiry_on_its_way_does_not_count_for_a_timer_that_was_set_anew() {
    let service = start();
    let device = DeviceObject::create(&service.queue).unwrap();
    let timer = KernelTimer::initialize(&device, TimerType::Notification).unwrap();
    for round in 0..20_000 {
        timer.set(DueTime::after(Duration::ZERO), None);
        (0..round % 64).for_each(|_| std::hint::spin_loop());
        timer.set(DueTime::after(Duration::from_secs(3600)), None);
        (0..round % 16).for_each(|_| thread::yield_now());
        assert!(!timer.read_state(), "round {round}");
        assert!(timer.cancel(), "round {round}");
    }
}

#[test]
fn after_a_true_cancel_and_a_flush_no_dpc_runs_and_no_expiry_is_lost() {
    let service = start();
    let device = DeviceObject::create(&service.queue).unwrap();
    let hammer = &|seed: u64| {
        let calls = Arc::new(AtomicU64::new(0));
        let (called, calling) = mpsc::channel();
        let counted = calls.clone();
        let dpc = Dpc::initialize(&device, move |_: &mut Bench| {
            counted.fetch_add(1, SeqCst);
            called.send(()).unwrap();
        });
        let timer = KernelTimer::initialize(&device, TimerType::Notification).unwrap();
        for round in 0..2000 {
            let delay = Duration::from_micros((round * 13 + seed) % 40);
            timer.set_ex(DueTime::after(delay), (round % 3) as u32, Some(&dpc));
            (0..round % 50).for_each(|_| thread::yield_now());
            if timer.cancel() {
                let after_cancel = calls.load(SeqCst);
                device.flush_queued_dpcs().unwrap();
                let after_flush = calls.load(SeqCst);
                // One that ran during the cancel may have counted itself after it.
                assert!(after_flush <= after_cancel + 1, "seed {seed}, round {round}");
                thread::yield_now();
                assert_eq!(calls.load(SeqCst), after_flush, "seed {seed}, round {round}");
            }
            device.flush_queued_dpcs().unwrap();
            calling.try_iter().for_each(drop);
            timer.set(DueTime::after(delay), Some(&dpc));
            calling.recv_timeout(WATCHDOG).expect("the expiry of a timer that stays set");
        }
    };
    thread::scope(|scope| {
        for seed in 0..3 {
            scope.spawn(move || hammer(seed));
        }
    });
}

#[test]
fn the_tick_reaches_a_steady_io_timer_while_others_come_and_go() {
    let service = start();
    let device = DeviceObject::create(&service.queue).unwrap();
    let over = AtomicBool::new(false);
    let come_and_go = &|| {
        let other = DeviceObject::create_beside(&device, &service.queue).unwrap();
        while !over.load(SeqCst) {
            let timer = IoTimer::initialize(&other, Bench::tick).unwrap();
            timer.start().unwrap();
            thread::yield_now();
            timer.stop().unwrap();
        }
    };
    thread::scope(|scope| {
        (0..2).for_each(|_| drop(scope.spawn(come_and_go)));
        let (ticked, ticks) = mpsc::channel();
        let routine = move |_: &mut Bench, _: &DeviceObject<_>| ticked.send(()).unwrap();
        let steady = IoTimer::initialize(&device, routine).unwrap();
        steady.start().unwrap();
        let came = [(); 2].map(|()| ticks.recv_timeout(WATCHDOG));
        over.store(true, SeqCst);
        assert_eq!(came, [Ok(()), Ok(())]);
    });
}
