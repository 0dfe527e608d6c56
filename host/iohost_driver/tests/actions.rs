//! Actions, through the SDK, on a driver in a rig: the rows of the reference's section 6.

use std::cell::RefCell;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use iohost_device_models::edu::{Edu as EduModel, Timing};
use iohost_driver::prelude::*;
use iohost_testkit::Rig;

/// A driver whose state is what its actions did.
struct Probe {
    log: Vec<u32>,
}

thread_local! {
    /// The default queue of the probe that this thread started last.
    static QUEUE: RefCell<Option<IODispatchQueue<Probe>>> = const { RefCell::new(None) };
}

impl IOService for Probe {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];

    fn start(_device: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self> {
        QUEUE.set(Some(queue.clone()));
        Ok(Self { log: Vec::new() })
    }
}

iohost_driver::export_driver!(Probe);

fn probe() -> (Rig<Probe, EduModel>, IODispatchQueue<Probe>) {
    let rig = Rig::start(EduModel::new(Timing::Manual)).unwrap();
    let queue = QUEUE.take().unwrap();
    (rig, queue)
}

fn log(queue: &IODispatchQueue<Probe>) -> Vec<u32> {
    queue.dispatch_sync(|probe| probe.log.clone()).unwrap()
}

/// An action that notes what it is invoked with.
fn noting(queue: &IODispatchQueue<Probe>) -> OSAction<u32> {
    OSAction::create(queue, (), |probe, _, number| probe.log.push(number)).unwrap()
}

/// The code's result, from a thread of its own; panics when it takes for ever.
fn on_a_thread<T: Send + 'static>(code: impl FnOnce() -> T + Send + 'static) -> impl FnOnce() -> T {
    let (sender, result) = mpsc::channel();
    thread::spawn(move || sender.send(code()));
    move || result.recv_timeout(Duration::from_secs(60)).expect("the thread is not stuck")
}

#[test]
fn an_invocation_runs_the_method_on_its_queue_later_with_its_arguments() {
    let (rig, queue) = probe();
    let seen = queue.clone();
    let action = OSAction::create(&queue, (), move |probe: &mut Probe, _, (number, text)| {
        assert!(seen.on_queue());
        let _: &String = &text;
        probe.log.extend([number, text.len() as u32]);
    })
    .unwrap();

    action.handle().invoke((7, "four".to_owned())).unwrap();
    assert_eq!(log(&queue), [7, 4], "in its turn, before the work that was sent after it");
    action.invoke((8, String::new())).unwrap();
    rig.settle();
    assert_eq!(log(&queue), [7, 4, 8, 0]);
}

#[test]
fn an_invocation_never_runs_inside_the_call_that_sends_it() {
    let (rig, queue) = probe();
    let action = noting(&queue);
    let handle = action.handle();
    queue.dispatch_async(move |probe| {
        handle.invoke(1).unwrap();
        probe.log.push(0);
    });
    rig.settle();
    assert_eq!(log(&queue), [0, 1]);
}

#[test]
fn invocations_of_one_sender_run_in_the_order_of_sending() {
    let (rig, queue) = probe();
    let action = noting(&queue);
    let handle = action.handle();
    on_a_thread(move || (0..1000).for_each(|number| handle.invoke(number).unwrap()))();
    rig.settle();
    assert_eq!(log(&queue), (0..1000).collect::<Vec<_>>());
}

#[test]
fn the_reference_memory_is_the_same_for_the_method_and_the_owner_and_for_nobody_else() {
    let (rig, queue) = probe();
    let action = OSAction::create(&queue, 0_u64, |_: &mut Probe, sum, more: u64| *sum += more);
    let action = action.unwrap();
    assert_eq!(action.with_reference(|sum| *sum).unwrap(), 0, "as it was given");
    action.invoke(5).unwrap();
    rig.settle();
    action.with_reference(|sum| *sum *= 2).unwrap();
    action.invoke(1).unwrap();
    rig.settle();
    assert_eq!(action.with_reference(|sum| *sum).unwrap(), 11);
}

#[test]
fn the_reference_memory_cannot_be_had_twice_at_a_time() {
    let (_rig, queue) = probe();
    let action: OSAction<u32, u32> = OSAction::create(&queue, 1, |_: &mut Probe, _, _| {}).unwrap();
    let inner = action.with_reference(|_| action.with_reference(|_| {}));
    assert_eq!(inner.unwrap().unwrap_err().code(), IOReturn::CANNOT_LOCK);
}

#[test]
fn the_reference_memory_and_the_target_go_when_the_owner_does() {
    let (rig, queue) = probe();
    let (reference, captured) = (Arc::new(()), Arc::new(()));
    let held = captured.clone();
    let method = move |_: &mut Probe, _: &mut Arc<()>, _: u32| drop(held.clone());
    let action = OSAction::create(&queue, reference.clone(), method).unwrap();
    let handle = action.handle();
    assert_eq!((Arc::strong_count(&reference), Arc::strong_count(&captured)), (2, 2));
    drop(action);
    assert_eq!((Arc::strong_count(&reference), Arc::strong_count(&captured)), (1, 1));
    assert_eq!(handle.invoke(1), Err(IOReturn::ABORTED), "a handle keeps nothing alive");
    drop(rig);
}

#[test]
fn the_cancel_handler_runs_after_the_invocation_in_progress_and_later_ones_are_dropped() {
    let (rig, queue) = probe();
    let action = Arc::new(noting(&queue));
    let (cancelled, target) = (action.clone(), queue.clone());
    let cancelling = OSAction::create(&queue, (), move |probe: &mut Probe, _, number: u32| {
        cancelled.cancel(&target, |probe| probe.log.push(100));
        probe.log.push(number);
    })
    .unwrap();
    action.invoke(1).unwrap();
    cancelling.invoke(2).unwrap();
    action.invoke(3).unwrap();
    rig.settle();
    assert_eq!(log(&queue), [1, 2, 100], "the third was sent before the cancel, not started");
    assert_eq!(action.invoke(4).unwrap_err().code(), IOReturn::ABORTED);
    rig.settle();
    assert_eq!(log(&queue), [1, 2, 100]);
    assert_eq!(action.dropped(), 2);
}

#[test]
fn a_second_cancel_runs_its_own_handler_and_nothing_else() {
    let (rig, queue) = probe();
    let action = noting(&queue);
    action.cancel(&queue, |probe| probe.log.push(1));
    action.cancel(&queue, |probe| probe.log.push(2));
    assert_eq!(log(&queue), [1, 2]);
    drop(rig);
}

#[test]
fn only_cancel_breaks_the_cycle_of_a_target_that_owns_its_action() {
    struct Target {
        action: Option<OSAction<u32>>,
        _token: Arc<()>,
    }
    let (rig, queue) = probe();
    for cancels in [false, true] {
        let token = Arc::new(());
        let target = Target { action: None, _token: token.clone() };
        let own = IODispatchQueue::create(&queue, "target", target).unwrap();
        let action = OSAction::create(&own, (), |_: &mut Target, _, _| {}).unwrap();
        own.dispatch_sync(|target| target.action = Some(action)).unwrap();
        if cancels {
            let target = own.clone();
            own.dispatch_sync(|state| {
                state.action.as_ref().unwrap().cancel(&target, |_| {});
            })
            .unwrap();
        }
        drop(own);
        rig.settle();
        let holders = Arc::strong_count(&token);
        assert_eq!(holders, if cancels { 1 } else { 2 }, "cancelled: {cancels}");
    }
}

#[test]
fn the_aborted_handler_runs_once_when_the_last_other_holder_is_gone() {
    let (rig, queue) = probe();
    let action = noting(&queue);
    action.set_aborted_handler(&queue, |probe| probe.log.push(90));
    action.set_aborted_handler(&queue, |probe| probe.log.push(91));
    let (first, second) = (action.handle(), action.handle());
    let third = second.clone();
    drop((first, second));
    rig.settle();
    assert!(log(&queue).is_empty(), "one is left");

    third.invoke(1).unwrap();
    drop(third);
    rig.settle();
    assert_eq!(log(&queue), [1, 91], "after what was sent before; the latest handler alone");

    drop(action.handle());
    action.set_aborted_handler(&queue, |probe| probe.log.push(92));
    rig.settle();
    assert_eq!(log(&queue), [1, 91], "once in the life of an action");
}

#[test]
fn an_aborted_handler_that_is_set_too_late_runs_all_the_same() {
    let (rig, queue) = probe();
    let action = noting(&queue);
    drop(action.handle());
    rig.settle();
    action.set_aborted_handler(&queue, |probe| probe.log.push(90));
    rig.settle();
    assert_eq!(log(&queue), [90]);
}

#[test]
fn the_aborted_handler_does_not_run_after_cancel_or_without_a_handle() {
    let (rig, queue) = probe();
    let never_shared = noting(&queue);
    never_shared.set_aborted_handler(&queue, |probe| probe.log.push(90));
    let cancelled = noting(&queue);
    let handle = cancelled.handle();
    cancelled.set_aborted_handler(&queue, |probe| probe.log.push(91));
    cancelled.cancel(&queue, |_| {});
    drop((never_shared, handle));
    rig.settle();
    assert!(log(&queue).is_empty());
}

#[test]
fn a_wait_ends_with_the_invocation_it_was_announced_before() {
    let (rig, queue) = probe();
    let action = noting(&queue);
    let wait = action.will_wait().unwrap();
    // It may come before anybody waits: that is what the announcement is for.
    action.invoke(1).unwrap();
    rig.settle();
    let waited = on_a_thread(move || {
        let first = wait.wait(None);
        let now = wait.wait(Some((IOTimerClock::UptimeRaw, 0)));
        (first, now.unwrap_err().code(), wait.end_wait())
    });
    assert_eq!(waited(), (Ok(()), IOReturn::TIMEOUT, Ok(())), "one invocation ends one wait");
}

#[test]
fn a_wait_that_has_begun_ends_when_the_method_has_returned() {
    let (rig, queue) = probe();
    let done = Arc::new(Mutex::new(false));
    let doing = done.clone();
    let action = OSAction::create(&queue, (), move |_: &mut Probe, _, (): ()| {
        *doing.lock().unwrap() = true;
    })
    .unwrap();
    let wait = action.will_wait().unwrap();
    let seen = done.clone();
    let waited = on_a_thread(move || wait.wait(None).map(|()| *seen.lock().unwrap()));
    action.invoke(()).unwrap();
    rig.settle();
    assert_eq!(waited(), Ok(true));
}

#[test]
fn a_wait_times_out_at_its_deadline_and_not_before() {
    let (rig, queue) = probe();
    let action = noting(&queue);
    for clock in [IOTimerClock::UptimeRaw, IOTimerClock::MonotonicRaw, IOTimerClock::RealTime] {
        let wait = action.will_wait().unwrap();
        let deadline = queue.now(clock) + 10_000_000;
        let watch = queue.clone();
        let waited = on_a_thread(move || (wait.wait(Some((clock, deadline))), watch.now(clock)));
        rig.advance(Duration::from_millis(9));
        rig.advance(Duration::from_millis(1));
        let (waited, at) = waited();
        assert_eq!(waited.unwrap_err().code(), IOReturn::TIMEOUT);
        assert!(at >= deadline, "{clock:?}: {at} is before {deadline}");
    }
}

#[test]
fn a_wait_is_aborted_by_cancel_by_the_owners_end_and_by_the_end_of_all_other_holders() {
    let (rig, queue) = probe();
    for way in 0..3 {
        let action = noting(&queue);
        let handle = action.handle();
        let wait = action.will_wait().unwrap();
        let waited = on_a_thread(move || (wait.wait(None), wait.end_wait()));
        let kept = (way != 2).then_some(handle);
        match way {
            0 => action.cancel(&queue, |_| {}),
            1 => drop(action),
            _ => rig.settle(),
        }
        let (waited, ended) = waited();
        assert_eq!(waited.unwrap_err().code(), IOReturn::ABORTED, "way {way}");
        assert_eq!(ended.unwrap_err().code(), IOReturn::ABORTED, "way {way}");
        drop(kept);
    }
}

#[test]
fn what_the_last_holder_sent_ends_a_wait_before_its_own_end_does() {
    let (rig, queue) = probe();
    let action = noting(&queue);
    let handle = action.handle();
    let wait = action.will_wait().unwrap();
    handle.invoke(1).unwrap();
    drop(handle);
    let now = || wait.wait(Some((IOTimerClock::UptimeRaw, 0))).map_err(|err| err.code());
    assert_eq!(now(), Err(IOReturn::TIMEOUT), "neither has happened yet");
    rig.settle();
    assert_eq!((now(), now()), (Ok(()), Err(IOReturn::ABORTED)));
}

#[test]
fn a_wait_is_aborted_when_the_target_queue_is_cancelled() {
    let (rig, queue) = probe();
    let target = IODispatchQueue::create(&queue, "target", ()).unwrap();
    let action = OSAction::create(&target, (), |(), _, _: u32| {}).unwrap();
    let wait = action.will_wait().unwrap();
    target.cancel(|()| {});
    action.invoke(1).unwrap();
    rig.settle();
    assert_eq!(on_a_thread(move || wait.wait(None))().unwrap_err().code(), IOReturn::ABORTED);
    assert_eq!(action.dropped(), 1);
}

#[test]
fn a_second_waiter_is_refused_until_the_first_gave_its_turn_back() {
    let (_rig, queue) = probe();
    let action = noting(&queue);
    let first = action.will_wait().unwrap();
    assert_eq!(action.will_wait().unwrap_err().code(), IOReturn::BUSY);
    first.end_wait().unwrap();
    assert!(action.will_wait().is_ok());
}

#[test]
fn waiting_on_the_actions_own_queue_is_refused() {
    let (_rig, queue) = probe();
    let action = noting(&queue);
    let wait = action.will_wait().unwrap();
    // A deadline that has passed, so that a wait that is not refused ends too.
    let deadline = Some((IOTimerClock::UptimeRaw, 0));
    let refused = queue.dispatch_sync(|_| wait.wait(deadline)).unwrap().unwrap_err();
    assert_eq!(refused.code(), IOReturn::CANNOT_LOCK, "{refused}");
}

#[test]
fn every_invocation_is_run_or_counted_whenever_the_cancel_comes() {
    const SENDERS: u64 = 3;
    const EACH: u64 = 2000;
    let (rig, queue) = probe();
    for cancelled_after in [0, 1, 100, 3000] {
        let action = OSAction::create(&queue, 0_u64, |_: &mut Probe, run, (): ()| *run += 1);
        let action = action.unwrap();
        let senders: Vec<_> = (0..SENDERS)
            .map(|_| {
                let handle = action.handle();
                on_a_thread(move || (0..EACH).filter(|_| handle.invoke(()).is_ok()).count())
            })
            .collect();
        while action.with_reference(|run| *run).unwrap() < cancelled_after {
            rig.settle();
        }
        action.cancel(&queue, |_| {});
        let accepted: usize = senders.into_iter().map(|sender| sender()).sum();
        rig.settle();
        let run = action.with_reference(|run| *run).unwrap();
        assert_eq!(run + action.dropped(), SENDERS * EACH, "cancelled after {cancelled_after}");
        assert!(run <= accepted as u64, "what was refused did not run");
    }
}

#[test]
fn an_action_may_be_dropped_inside_its_own_method() {
    let (rig, queue) = probe();
    let slot: Arc<Mutex<Option<OSAction<u32>>>> = Arc::default();
    let own = slot.clone();
    let action = OSAction::create(&queue, (), move |probe: &mut Probe, _, number| {
        drop(own.lock().unwrap().take());
        probe.log.push(number);
    });
    let handle = slot.lock().unwrap().insert(action.unwrap()).handle();
    handle.invoke(1).unwrap();
    let _ = handle.invoke(2);
    rig.settle();
    assert_eq!(log(&queue), [1]);
    assert_eq!(Arc::strong_count(&slot), 1, "the method is gone, with what it captured");
}

#[test]
fn a_method_that_panics_fails_the_driver_and_ends_the_wait_for_it() {
    let (rig, queue) = probe();
    let action = OSAction::create(&queue, (), |_: &mut Probe, _, _: u32| panic!("on purpose"));
    let action = action.unwrap();
    let wait = action.will_wait().unwrap();
    action.invoke(1).unwrap();
    rig.settle();
    assert!(rig.failure().unwrap().contains("on purpose"));
    assert_eq!(on_a_thread(move || wait.wait(None))(), Ok(()));
}
