//! The timer of a device object, once per second.

use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;

use iohost_driver::prelude::*;
use iohost_driver::wdm::{DeviceObject, Dpc, Error as WdmError, IoTimer};

use crate::bench::{Bench, Held, Setup, after_ms, give_others_a_chance};

// ---- IoInitializeTimer ----

#[test]
fn a_device_object_has_one_io_timer_and_a_second_initialize_is_refused() {
    let setup = Setup::new();
    let first = setup.io_timer();

    let second = IoTimer::initialize(&setup.device, |bench, _| bench.note("second"));
    assert_eq!(second.unwrap_err(), WdmError::AlreadyInitialized);
    first.start().unwrap();
    setup.advance_ms(1000);
    assert_eq!(setup.seen(), ["tick"], "the first registration stays");

    let clone = IoTimer::initialize(&setup.device.clone(), Bench::tick);
    assert_eq!(clone.unwrap_err().nt_status(), 0xC000_0010, "STATUS_INVALID_DEVICE_REQUEST");
    let other = DeviceObject::create_beside(&setup.device, &setup.queue).unwrap();
    assert_ne!(other, setup.device);
    IoTimer::initialize(&other, Bench::tick).unwrap();
}

#[test]
fn a_device_object_whose_io_timer_was_dropped_can_have_another() {
    let setup = Setup::new();
    drop(setup.io_timer());
    let second = setup.io_timer();
    second.start().unwrap();
    assert_eq!(setup.seen_after_ms(1000), 1);
}

#[test]
fn an_io_timer_dropped_while_a_tick_waits_for_its_queue_makes_room_at_once() {
    let setup = Setup::new();
    let first = setup.io_timer();
    first.start().unwrap();
    let busy = Held::hold(&setup.queue);
    setup.advance_ms(1000);
    drop(first);
    let second = setup.io_timer();
    second.start().unwrap();
    busy.release();
    assert!(setup.seen().is_empty(), "the tick was the first one's");
    assert_eq!(setup.seen_after_ms(1000), 1);
}

#[test]
fn an_io_timer_starts_stopped() {
    let setup = Setup::new();
    let _timer = setup.io_timer();
    assert_eq!(setup.seen_after_ms(1000), 0);
    assert_eq!(setup.seen_after_ms(1000), 0);
}

#[test]
fn an_io_timer_that_is_made_and_started_in_the_drivers_start_ticks_once_there_is_a_driver() {
    let setup = Setup::starting(|queue| {
        let device = DeviceObject::create(queue).unwrap();
        let timer = IoTimer::initialize(&device, Bench::tick).unwrap();
        timer.start().unwrap();
        Bench { io_timer: Some(timer), ..Bench::default() }
    });
    assert_eq!(setup.seen_after_ms(1000), 1);
}

// ---- IoStartTimer ----

#[test]
fn the_first_tick_comes_at_the_systems_second_however_late_the_start() {
    let setup = Setup::new();
    let timer = setup.io_timer();
    setup.advance_ms(300);
    timer.start().unwrap();
    assert_eq!(setup.seen_after_ms(699), 0);
    assert_eq!(setup.seen_after_ms(1), 1, "700 ms after the start");

    timer.stop().unwrap();
    setup.advance_ms(999);
    timer.start().unwrap();
    assert_eq!(setup.seen_after_ms(1), 1, "1 ms after the start");
}

#[test]
fn a_started_io_timer_ticks_once_per_second() {
    let setup = Setup::new();
    let timer = setup.io_timer();
    timer.start().unwrap();
    let ticks: Vec<_> = (0..50).map(|_| setup.seen_after_ms(100)).collect();
    assert_eq!(ticks.iter().sum::<usize>(), 5);
    assert!(ticks.iter().skip(9).step_by(10).all(|ticks| *ticks == 1), "{ticks:?}");
}

#[test]
fn starting_a_started_io_timer_changes_nothing() {
    let setup = Setup::new();
    let timer = setup.io_timer();
    timer.start().unwrap();
    setup.advance_ms(500);
    timer.start().unwrap();
    assert_eq!(setup.seen_after_ms(500), 1);
    timer.stop().unwrap();
    assert_eq!(setup.seen_after_ms(1000), 0, "one stop is enough");
}

#[test]
fn starting_the_io_timer_of_a_deleted_device_object_has_no_effect() {
    let setup = Setup::new();
    let timer = setup.io_timer();
    timer.start().unwrap();
    setup.device.delete();
    assert_eq!(setup.seen_after_ms(1000), 0, "deleting stops");

    timer.start().unwrap();
    assert_eq!(setup.seen_after_ms(1000), 0);
    timer.stop().unwrap();
    drop(timer);
    let new = IoTimer::initialize(&setup.device, Bench::tick);
    assert_eq!(new.unwrap_err(), WdmError::DeviceDeleted);
}

#[test]
fn seconds_that_were_missed_make_one_tick() {
    let setup = Setup::new();
    let timer = setup.io_timer();
    timer.start().unwrap();
    assert_eq!(setup.seen_after_ms(5300), 1);
    assert_eq!(setup.seen_after_ms(699), 0);
    assert_eq!(setup.seen_after_ms(1), 1, "the phase is kept");
}

#[test]
fn ticks_that_come_while_the_queue_is_busy_are_merged_into_one_call() {
    let setup = Setup::new();
    let timer = setup.io_timer();
    timer.start().unwrap();
    let busy = Held::hold(&setup.queue);
    (0..3).for_each(|_| setup.advance_ms(1000));
    busy.release();
    assert_eq!(setup.seen(), ["tick"]);
    assert_eq!(setup.seen_after_ms(1000), 1);
}

// ---- IoStopTimer ----

#[test]
fn no_routine_runs_after_stop_and_a_start_works_again() {
    let setup = Setup::new();
    let timer = setup.io_timer();
    timer.stop().unwrap();
    timer.start().unwrap();
    assert_eq!(setup.seen_after_ms(1000), 1);
    timer.stop().unwrap();
    assert_eq!(setup.seen_after_ms(1000), 0);
    timer.start().unwrap();
    assert_eq!(setup.seen_after_ms(1000), 1);
}

#[test]
fn a_tick_that_waits_for_the_queue_is_taken_back_by_stop() {
    let setup = Setup::new();
    let timer = setup.io_timer();
    timer.start().unwrap();
    let busy = Held::hold(&setup.queue);
    setup.advance_ms(1000);
    timer.stop().unwrap();
    busy.release();
    assert!(setup.seen().is_empty());
}

/// Has a routine run, and calls `end` on another thread meanwhile; which of the two was over first.
fn over_first(end: impl FnOnce(IoTimer, DeviceObject<Bench>) -> Option<IoTimer> + Send) -> String {
    let setup = Setup::new();
    let order = Arc::new(Mutex::new(Vec::new()));
    let (running, is_running) = mpsc::channel();
    let (ending, is_ending) = mpsc::channel::<()>();
    let in_routine = order.clone();
    let timer = IoTimer::initialize(&setup.device, move |_, _| {
        running.send(()).unwrap();
        is_ending.recv().unwrap();
        give_others_a_chance();
        in_routine.lock().unwrap().push("routine");
    })
    .unwrap();
    timer.start().unwrap();

    let (after_end, device) = (order.clone(), setup.device.clone());
    thread::scope(|scope| {
        scope.spawn(move || {
            is_running.recv().unwrap();
            ending.send(()).unwrap();
            let timer = end(timer, device);
            after_end.lock().unwrap().push("end");
            drop(timer);
        });
        setup.advance_ms(1000);
    });
    order.lock().unwrap().join(", ")
}

#[test]
fn stop_returns_after_a_routine_that_runs_on_another_thread() {
    let order = over_first(|timer, _| {
        timer.stop().unwrap();
        Some(timer)
    });
    assert_eq!(order, "routine, end");
}

#[test]
fn dropping_an_io_timer_waits_for_a_routine_that_runs_on_another_thread() {
    let order = over_first(|timer, _| {
        drop(timer);
        None
    });
    assert_eq!(order, "routine, end");
}

#[test]
fn deleting_a_device_object_waits_for_a_routine_that_runs_on_another_thread() {
    let order = over_first(|timer, device| {
        device.delete();
        Some(timer)
    });
    assert_eq!(order, "routine, end");
}

#[test]
fn start_and_stop_inside_a_routine_are_refused_and_do_not_hang() {
    let setup = Setup::new();
    let timer = IoTimer::initialize(&setup.device, |bench, _| {
        let timer = bench.io_timer.as_ref().unwrap();
        let results = format!("{:?} {:?}", timer.stop(), timer.start());
        bench.note(results);
    })
    .unwrap();
    timer.start().unwrap();
    setup.queue.dispatch_sync(|bench| bench.io_timer = Some(timer)).unwrap();

    setup.advance_ms(1000);
    let stop = WdmError::InsideRoutine { call: "IoStopTimer" };
    let start = WdmError::InsideRoutine { call: "IoStartTimer" };
    let refused = format!("Err({stop:?}) Err({start:?})");
    assert_eq!(setup.seen(), [refused.as_str()]);
    setup.advance_ms(1000);
    assert_eq!(setup.seen(), [refused], "the stop had no effect");
    assert_eq!(stop.nt_status(), 0xC000_0194, "STATUS_POSSIBLE_DEADLOCK");
}

#[test]
fn stopping_another_devices_io_timer_inside_a_routine_is_refused_too() {
    let setup = Setup::new();
    let other = DeviceObject::create_beside(&setup.device, &setup.queue).unwrap();
    let other = IoTimer::initialize(&other, Bench::tick).unwrap();
    let timer = IoTimer::initialize(&setup.device, move |bench, _| {
        bench.note(format!("{}", other.stop().is_err()));
    })
    .unwrap();
    timer.start().unwrap();
    setup.advance_ms(1000);
    assert_eq!(setup.seen(), ["true"]);
}

#[test]
fn an_io_timer_can_be_stopped_in_a_dpc_and_by_the_queue_it_runs_on() {
    let setup = Setup::new();
    let timer = setup.io_timer();
    timer.start().unwrap();
    setup.queue.dispatch_sync(|_| timer.stop()).unwrap().unwrap();
    assert_eq!(setup.seen_after_ms(1000), 0);

    timer.start().unwrap();
    let dpc = Dpc::initialize(&setup.device, move |bench: &mut Bench| {
        bench.note(format!("{:?}", timer.stop()));
    });
    let kernel_timer = setup.timer();
    kernel_timer.set(after_ms(1), Some(&dpc));
    setup.advance_ms(1);
    assert_eq!(setup.seen(), ["Ok(())"]);
    assert_eq!(setup.seen_after_ms(1000), 0);
}

#[test]
fn an_io_timer_dropped_in_its_own_routine_ends_after_the_call() {
    let setup = Setup::new();
    let timer = IoTimer::initialize(&setup.device, |bench, _| {
        bench.io_timer = None;
        bench.note("last");
    })
    .unwrap();
    timer.start().unwrap();
    setup.queue.dispatch_sync(|bench| bench.io_timer = Some(timer)).unwrap();
    setup.advance_ms(1000);
    assert_eq!(setup.seen(), ["last"]);
    assert_eq!(setup.seen_after_ms(1000), 0);
}

#[test]
fn a_stopped_driver_gets_no_ticks_and_its_timers_are_dropped_without_waiting() {
    let mut setup = Setup::new();
    let (dropped, is_dropped) = mpsc::channel::<()>();
    let timer = IoTimer::initialize(&setup.device, move |_, _| dropped.send(()).unwrap()).unwrap();
    timer.start().unwrap();
    setup.queue.dispatch_sync(|bench| bench.io_timer = Some(timer)).unwrap();
    setup.rig.stop();
    setup.advance_ms(1000);
    let expected = Err(mpsc::TryRecvError::Disconnected);
    assert_eq!(is_dropped.try_recv(), expected, "not called, and freed");
}

// ---- IO_TIMER_ROUTINE ----

/// Two device objects on queues of their own beside the default one, each with a started I/O
/// timer that says who was called; the second was initialised first.
struct TwoDevices {
    setup: Setup,
    queues: [IODispatchQueue<&'static str>; 2],
    devices: [DeviceObject<&'static str>; 2],
    _timers: [IoTimer; 2],
    calls: Receiver<String>,
}

impl TwoDevices {
    fn new() -> Self {
        let setup = Setup::new();
        let queue = |name| IODispatchQueue::create(&setup.queue, name, name).unwrap();
        let queues = [queue("one"), queue("two")];
        let devices = queues
            .each_ref()
            .map(|queue| DeviceObject::create_beside(&setup.device, queue).unwrap());
        let (called, calls) = mpsc::channel();
        let timer = |number: usize| {
            let (own, called) = (devices[number].clone(), called.clone());
            // The same routine for both: what differs are its arguments and its context.
            IoTimer::initialize(&devices[number], move |state, device| {
                called.send(format!("{state} {}", *device == own)).unwrap();
            })
            .unwrap()
        };
        let second = timer(1);
        let first = timer(0);
        first.start().unwrap();
        second.start().unwrap();
        Self { setup, queues, devices, _timers: [first, second], calls }
    }

    fn calls(&self) -> Vec<String> {
        self.calls.try_iter().collect()
    }
}

#[test]
fn routines_get_their_device_and_state_in_one_tick_in_the_order_of_initialisation() {
    let two = TwoDevices::new();
    two.setup.advance_ms(1000);
    assert_eq!(two.calls(), ["two true", "one true"]);
    two.setup.advance_ms(1000);
    assert_eq!(two.calls(), ["two true", "one true"]);
}

#[test]
fn a_routine_does_not_start_before_that_of_the_device_before_it_returned() {
    let two = TwoDevices::new();
    let busy = Held::hold(&two.queues[1]);
    two.setup.advance_ms(1000);
    assert!(two.calls().is_empty(), "it waits its turn although its own queue is free");
    two.setup.advance_ms(1000);
    assert!(two.calls().is_empty(), "also in the next tick");
    busy.release();
    two.setup.rig.settle();
    assert_eq!(two.calls(), ["two true", "one true"], "and the ticks are merged");
}

#[test]
fn a_device_on_a_cancelled_queue_does_not_keep_the_tick_from_the_others() {
    let two = TwoDevices::new();
    two.queues[1].cancel(|_| {});
    two.setup.advance_ms(1000);
    assert_eq!(two.calls(), ["one true"]);
}

#[test]
fn a_queue_cancelled_while_a_routine_waits_for_it_passes_the_tick_on() {
    let two = TwoDevices::new();
    let busy = Held::hold(&two.queues[1]);
    two.setup.advance_ms(1000);
    two.queues[1].cancel(|_| {});
    busy.release();
    two.setup.rig.settle();
    assert_eq!(two.calls(), ["one true"]);
}

#[test]
fn a_deleted_device_leaves_the_tick_to_the_others() {
    let two = TwoDevices::new();
    two.devices[1].delete();
    two.setup.advance_ms(1000);
    assert_eq!(two.calls(), ["one true"]);
}

#[test]
fn a_routine_that_panics_fails_the_driver_and_the_ticks_go_on() {
    let setup = Setup::new();
    let broken = DeviceObject::create_beside(&setup.device, &setup.queue).unwrap();
    let broken = IoTimer::initialize(&broken, |_, _| panic!("out of order")).unwrap();
    let timer = setup.io_timer();
    broken.start().unwrap();
    timer.start().unwrap();
    assert_eq!(setup.seen_after_ms(1000), 1, "the other device has its tick");
    assert!(setup.rig.failure().unwrap().contains("out of order"));
    assert_eq!(setup.seen_after_ms(1000), 1);
    broken.stop().expect("the thread is not in the routine any more");
}

// ---- IRQL rules ----

#[test]
fn initialising_an_io_timer_in_a_routine_or_a_dpc_is_refused() {
    let setup = Setup::new();
    let other = DeviceObject::create_beside(&setup.device, &setup.queue).unwrap();
    let attempt = move |bench: &mut Bench| {
        let made = IoTimer::initialize(&other, Bench::tick);
        bench.note(format!("{:?}", made.unwrap_err()));
    };
    let in_routine = attempt.clone();
    let timer = IoTimer::initialize(&setup.device, move |bench, _| in_routine(bench)).unwrap();
    timer.start().unwrap();
    let dpc = Dpc::initialize(&setup.device, attempt.clone());
    let kernel_timer = setup.timer();
    kernel_timer.set(after_ms(1500), Some(&dpc));

    let refused = format!("{:?}", WdmError::RaisedIrql { call: "IoInitializeTimer" });
    setup.advance_ms(1000);
    assert_eq!(setup.seen(), [refused.as_str()], "in the routine");
    setup.advance_ms(500);
    assert_eq!(setup.seen(), [refused], "in the DPC");
}

// ---- Errors of a driver ----

#[test]
fn a_refusal_becomes_a_driver_error_with_its_words() {
    let err = iohost_driver::Error::from(WdmError::AlreadyInitialized);
    assert_eq!(err.code(), IOReturn::EXCLUSIVE_ACCESS);
    assert!(err.to_string().contains("has an I/O timer already"), "{err}");
}
