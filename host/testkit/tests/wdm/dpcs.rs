//! Deferred procedure calls.

use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use iohost_driver::prelude::*;
use iohost_driver::wdm::{DeviceObject, Dpc, Error as WdmError, IoTimer, KernelTimer, TimerType};

use crate::bench::{Bench, Held, Service, Setup, after_ms, give_others_a_chance};

// ---- KeInitializeDpc, CustomTimerDpc ----

#[test]
fn a_dpc_gets_the_state_of_its_device_object_and_its_own_context() {
    let setup = Setup::new();
    let mut context = 0;
    let dpc = Dpc::initialize(&setup.device, move |bench: &mut Bench| {
        context += 1;
        bench.note(format!("call {context}"));
    });
    let timer = setup.timer();
    timer.set_ex(after_ms(10), 10, Some(&dpc));
    setup.advance_ms(10);
    setup.advance_ms(10);
    assert_eq!(setup.seen(), ["call 1", "call 2"]);
}

#[test]
fn a_dpc_stands_on_its_queue_once_however_many_expiries_want_it() {
    let setup = Setup::new();
    let (dpc, periodic, other) = (setup.dpc(), setup.timer(), setup.timer());
    periodic.set_ex(after_ms(10), 10, Some(&dpc));
    other.set(after_ms(15), Some(&dpc));
    let busy = Held::hold(&setup.queue);
    (0..5).for_each(|_| setup.advance_ms(10));
    busy.release();
    assert_eq!(setup.seen(), ["call"], "six expiries, merged");
    setup.advance_ms(10);
    assert_eq!(setup.seen(), ["call"], "and the next one has its own");
}

#[test]
fn an_expiry_while_the_dpc_runs_leads_to_one_more_call_after_it() {
    let service = Service::on_virtual_time();
    let (running, is_running) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    let device = DeviceObject::create(&service.queue).unwrap();
    let dpc = Dpc::initialize(&device, move |bench: &mut Bench| {
        bench.note("begin");
        running.send(()).unwrap();
        may_go_on.recv().unwrap();
        bench.note("end");
    });
    let timer = KernelTimer::initialize(&device, TimerType::Notification).unwrap();
    timer.set_ex(after_ms(10), 10, Some(&dpc));

    thread::scope(|scope| {
        scope.spawn(|| service.advance_ms(10));
        is_running.recv().unwrap();
        service.advance_ms(10);
        service.advance_ms(10);
        assert!(is_running.try_recv().is_err(), "not twice at a time");
        go_on.send(()).unwrap();
        go_on.send(()).unwrap();
    });
    service.engine.settle();
    let seen = service.queue.dispatch_sync(|bench| bench.seen.clone()).unwrap();
    assert_eq!(seen, ["begin", "end", "begin", "end"]);
}

#[test]
fn a_dpc_that_was_dropped_makes_no_call() {
    let setup = Setup::new();
    let timer = setup.timer();
    let (queued, later) = (setup.dpc(), setup.dpc());
    timer.set_ex(after_ms(10), 10, Some(&queued));
    let busy = Held::hold(&setup.queue);
    setup.advance_ms(10);
    drop(queued);
    setup.advance_ms(10);
    busy.release();
    assert!(setup.seen().is_empty(), "taken back from the queue, and not put there again");

    timer.set(after_ms(10), Some(&later));
    drop(later);
    setup.advance_ms(10);
    assert!(setup.seen().is_empty());
    assert!(timer.read_state(), "the timer expired all the same");
}

#[test]
fn a_one_shot_timer_and_its_dpc_can_be_dropped_in_that_dpc() {
    let setup = Setup::new();
    let dpc = Dpc::initialize(&setup.device, |bench: &mut Bench| {
        bench.kernel_timer = None;
        bench.dpc = None;
        bench.note("freed");
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
    setup.advance_ms(10);
    assert_eq!(setup.seen(), ["freed"]);
}

#[test]
fn a_dpc_that_panics_fails_the_driver_and_is_called_again() {
    let setup = Setup::new();
    let mut first = true;
    let dpc = Dpc::initialize(&setup.device, move |bench: &mut Bench| {
        assert!(!std::mem::take(&mut first), "out of order");
        bench.note("again");
    });
    let timer = setup.timer();
    timer.set_ex(after_ms(10), 10, Some(&dpc));
    setup.advance_ms(10);
    assert!(setup.rig.failure().unwrap().contains("out of order"));
    setup.advance_ms(10);
    assert_eq!(setup.seen(), ["again"]);
    setup.device.flush_queued_dpcs().expect("this thread is in no DPC any more");
}

// ---- KeReadStateTimer, KeFlushQueuedDpcs ----

#[test]
fn the_state_of_a_timer_flips_at_its_expiry_and_back_when_it_is_set() {
    let setup = Setup::new();
    let timer = setup.timer();
    timer.set(after_ms(10), None);
    setup.advance_ms(9);
    assert!(!timer.read_state());
    setup.advance_ms(1);
    assert!(timer.read_state());
    timer.set(after_ms(10), None);
    assert!(!timer.read_state());
}

#[test]
fn a_timer_is_signalled_before_its_dpc_runs() {
    let setup = Setup::new();
    let dpc = Dpc::initialize(&setup.device, |bench: &mut Bench| {
        let signalled = bench.kernel_timer.as_ref().unwrap().read_state();
        bench.note(format!("{signalled}"));
    });
    let timer = setup.timer();
    timer.set(after_ms(10), Some(&dpc));
    setup.queue.dispatch_sync(|bench| bench.kernel_timer = Some(timer)).unwrap();
    setup.advance_ms(10);
    assert_eq!(setup.seen(), ["true"]);
}

#[test]
fn a_flush_returns_after_a_dpc_that_runs_on_another_thread_and_one_that_is_queued() {
    let setup = Setup::new();
    let order = Arc::new(Mutex::new(Vec::new()));
    let (running, is_running) = mpsc::channel();
    let (flushing, is_flushing) = mpsc::channel::<()>();
    let (in_dpc, in_second) = (order.clone(), order.clone());
    let dpc = Dpc::initialize(&setup.device, move |_: &mut Bench| {
        running.send(()).unwrap();
        is_flushing.recv().unwrap();
        give_others_a_chance();
        in_dpc.lock().unwrap().push("running");
    });
    let second = Dpc::initialize(&setup.device, move |_: &mut Bench| {
        in_second.lock().unwrap().push("queued");
    });
    let timers = [setup.timer(), setup.timer()];
    timers[0].set(after_ms(1), Some(&dpc));
    timers[1].set(after_ms(2), Some(&second));

    let (after_flush, device) = (order.clone(), setup.device.clone());
    thread::scope(|scope| {
        scope.spawn(move || {
            is_running.recv().unwrap();
            flushing.send(()).unwrap();
            device.flush_queued_dpcs().unwrap();
            after_flush.lock().unwrap().push("flush");
        });
        setup.advance_ms(2);
    });
    assert_eq!(*order.lock().unwrap(), ["running", "queued", "flush"]);
}

#[test]
fn a_flush_without_queued_dpcs_waits_for_nothing() {
    let setup = Setup::new();
    let (timer, dpc) = (setup.timer(), setup.dpc());
    timer.set(after_ms(10), Some(&dpc));
    let busy = Held::hold(&setup.queue);
    setup.device.flush_queued_dpcs().unwrap();
    busy.release();
}

#[test]
fn a_flush_waits_for_the_dpc_that_runs_on_a_cancelled_queue() {
    let setup = Setup::new();
    let (running, is_running) = mpsc::channel();
    let (done, is_done) = mpsc::channel();
    let (flushing, is_flushing) = mpsc::channel::<()>();
    let dpc = Dpc::initialize(&setup.device, move |_: &mut Bench| {
        running.send(()).unwrap();
        is_flushing.recv().unwrap();
        give_others_a_chance();
        done.send(()).unwrap();
    });
    let timer = setup.timer();
    timer.set(after_ms(1), Some(&dpc));
    thread::scope(|scope| {
        let (queue, device) = (setup.queue.clone(), setup.device.clone());
        scope.spawn(move || {
            is_running.recv().unwrap();
            queue.cancel(|_| {});
            flushing.send(()).unwrap();
            device.flush_queued_dpcs().unwrap();
            assert_eq!(is_done.try_recv(), Ok(()), "the DPC returned before");
        });
        setup.advance_ms(1);
    });
}

#[test]
fn a_flush_is_refused_in_a_dpc_in_a_routine_and_on_the_queue_of_a_dpc() {
    let setup = Setup::new();
    let device = setup.device.clone();
    let attempt = move |bench: &mut Bench| {
        bench.note(format!("{:?}", device.flush_queued_dpcs().unwrap_err()));
    };
    let dpc = Dpc::initialize(&setup.device, attempt.clone());
    let in_routine = attempt.clone();
    let io_timer = IoTimer::initialize(&setup.device, move |bench, _| in_routine(bench)).unwrap();
    let timer = setup.timer();

    setup.queue.dispatch_async(attempt);
    let call = "KeFlushQueuedDpcs";
    assert_eq!(setup.seen(), [format!("{:?}", WdmError::OnQueue { call })]);
    timer.set(after_ms(1), Some(&dpc));
    setup.advance_ms(1);
    let raised = format!("{:?}", WdmError::RaisedIrql { call });
    assert_eq!(setup.seen(), [raised.as_str()], "in a DPC");
    io_timer.start().unwrap();
    setup.advance_ms(1000);
    assert_eq!(setup.seen(), [raised], "in a routine");
}

#[test]
fn a_flush_on_a_queue_without_dpcs_waits_for_those_elsewhere() {
    let setup = Setup::new();
    let dpc_queue = IODispatchQueue::create(&setup.queue, "dpcs", ()).unwrap();
    let dpc_device = DeviceObject::create_beside(&setup.device, &dpc_queue).unwrap();
    let (called, calls) = mpsc::channel();
    let dpc = Dpc::initialize(&dpc_device, move |()| called.send(()).unwrap());
    let timer = setup.timer();
    timer.set(after_ms(1), Some(&dpc));
    let busy = Held::hold(&dpc_queue);
    setup.advance_ms(1);
    busy.release();
    assert!(calls.try_recv().is_err(), "queued, and nobody has turned the engine since");
    let device = setup.device.clone();
    let flushed = setup.queue.dispatch_sync(move |_| device.flush_queued_dpcs()).unwrap();
    assert_eq!(flushed, Ok(()));
    assert_eq!(calls.try_recv(), Ok(()));
}
