//! Queues: order, exclusion, turns, the end.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use iohost_dispatch::{Clock, Engine, EngineClock, Owner, Queue, QueueOptions};
use iohost_interface::IOReturn;

fn engine() -> Engine {
    Engine::with_workers(3).unwrap()
}

#[test]
fn ten_thousand_blocks_run_in_order_and_never_two_at_once() {
    let engine = engine();
    let queue = Queue::create(&engine, "order", QueueOptions::default()).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let inside = Arc::new(AtomicUsize::new(0));
    for number in 0..10_000 {
        let (seen, inside) = (seen.clone(), inside.clone());
        queue.dispatch_async(move || {
            assert_eq!(inside.fetch_add(1, SeqCst), 0, "two blocks at once");
            seen.lock().unwrap().push(number);
            inside.fetch_sub(1, SeqCst);
        });
    }
    queue.dispatch_sync(|| ()).unwrap();
    assert_eq!(*seen.lock().unwrap(), (0..10_000).collect::<Vec<_>>());
    assert_eq!(queue.numbers().executed, 10_001);
}

#[test]
fn blocks_of_two_queues_can_wait_for_each_other() {
    let engine = engine();
    let (one, two) = (
        Queue::create(&engine, "one", QueueOptions::default()).unwrap(),
        Queue::create(&engine, "two", QueueOptions::default()).unwrap(),
    );
    let (send, receive) = channel();
    let (done_send, done) = channel();
    one.dispatch_async(move || done_send.send(receive.recv().unwrap()).unwrap());
    two.dispatch_async(move || send.send(7).unwrap());
    assert_eq!(done.recv(), Ok(7));
}

#[test]
fn a_sync_call_runs_after_what_the_same_thread_sent_before_and_sees_its_writes() {
    let engine = engine();
    let queue = Queue::create(&engine, "sync", QueueOptions::default()).unwrap();
    let value = Arc::new(AtomicUsize::new(0));
    for round in 1..1_000 {
        let writer = value.clone();
        queue.dispatch_async(move || writer.store(round, SeqCst));
        let seen = queue.dispatch_sync(|| value.load(SeqCst));
        assert_eq!(seen, Ok(round));
    }
}

#[test]
fn a_sync_call_on_an_idle_queue_does_not_change_threads() {
    let engine = engine();
    let queue = Queue::create(&engine, "idle", QueueOptions::default()).unwrap();
    let thread = queue.dispatch_sync(|| std::thread::current().id());
    assert_eq!(thread, Ok(std::thread::current().id()));
}

#[test]
fn a_sync_call_on_a_held_queue_runs_at_once_also_through_another_queue() {
    let engine = engine();
    let (a, b) = (
        Queue::create(&engine, "a", QueueOptions::default()).unwrap(),
        Queue::create(&engine, "b", QueueOptions::default()).unwrap(),
    );
    let depth = a
        .dispatch_sync(|| b.dispatch_sync(|| a.dispatch_sync(|| (a.on_queue(), b.on_queue()))))
        .unwrap()
        .unwrap();
    assert_eq!(depth, Ok((true, true)));
    assert!(!a.on_queue() && !b.on_queue());
}

#[test]
fn a_sync_call_from_many_threads_excludes_and_loses_nothing() {
    let engine = engine();
    let queue = Queue::create(&engine, "shared", QueueOptions::default()).unwrap();
    let inside = AtomicUsize::new(0);
    let mut total = 0_u32;
    let total_cell = Mutex::new(&mut total);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2_000 {
                    queue
                        .dispatch_sync(|| {
                            assert_eq!(inside.fetch_add(1, SeqCst), 0, "two at once");
                            **total_cell.lock().unwrap() += 1;
                            inside.fetch_sub(1, SeqCst);
                        })
                        .unwrap();
                    queue.dispatch_async(|| ());
                }
            });
        }
    });
    assert_eq!(total, 8_000);
}

#[test]
fn cancel_lets_the_running_block_finish_and_runs_nothing_but_its_handlers_afterwards() {
    let engine = Engine::manual(EngineClock::Virtual).unwrap();
    let queue = Queue::create(&engine, "cancel", QueueOptions::default()).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let note = |what: &'static str| {
        let seen = seen.clone();
        move || seen.lock().unwrap().push(what)
    };
    let (cancelled, first, second) = (queue.clone(), note("first"), note("second"));
    let inner = note("running");
    queue.dispatch_async(move || {
        cancelled.cancel(first);
        cancelled.cancel(second);
        inner();
    });
    queue.dispatch_async(note("never"));
    engine.settle();
    queue.dispatch_async(note("too late"));
    engine.settle();
    assert_eq!(*seen.lock().unwrap(), ["running", "first", "second"]);
    assert_eq!(queue.numbers().dropped, 2);
    assert_eq!(queue.dispatch_sync(|| ()), Err(IOReturn::ABORTED));
}

#[test]
fn a_sync_caller_whose_queue_is_cancelled_is_told_so_and_does_not_hang() {
    let engine = engine();
    let queue = Queue::create(&engine, "cancelled", QueueOptions::default()).unwrap();
    let (started_send, started) = channel();
    let (go_send, go) = channel::<()>();
    queue.dispatch_async(move || {
        started_send.send(()).unwrap();
        go.recv().unwrap();
    });
    started.recv().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.dispatch_sync(|| ()));
        while queue.numbers().depth < 2 {
            std::thread::yield_now();
        }
        queue.cancel(|| ());
        go_send.send(()).unwrap();
        assert_eq!(waiting.join().unwrap(), Err(IOReturn::ABORTED));
    });
}

#[test]
fn a_queue_with_a_pending_block_survives_its_last_handle() {
    let engine = Engine::manual(EngineClock::Virtual).unwrap();
    let (send, receive) = channel();
    Queue::create(&engine, "short", QueueOptions::default())
        .unwrap()
        .dispatch_async(move || send.send(1).unwrap());
    engine.settle();
    assert_eq!(receive.try_recv(), Ok(1));
}

#[test]
fn a_panic_in_a_block_is_reported_and_the_queue_lives_on() {
    struct Reports(Mutex<Vec<String>>);
    impl Owner for Reports {
        fn failed(&self, queue: &str, reason: &str) {
            self.0.lock().unwrap().push(format!("{queue}: {reason}"));
        }
    }
    let engine = Engine::manual(EngineClock::Virtual).unwrap();
    let reports = Arc::new(Reports(Mutex::default()));
    let owner = reports.clone();
    let queue = Queue::create_for(owner, &engine, "panic", QueueOptions::default()).unwrap();
    let beside = queue.create_beside("beside", QueueOptions::default()).unwrap();
    queue.dispatch_async(|| panic!("on purpose"));
    beside.dispatch_async(|| panic!("there too"));
    engine.settle();
    assert_eq!(*reports.0.lock().unwrap(), ["panic: on purpose", "beside: there too"]);
    assert_eq!(queue.dispatch_sync(|| 3), Ok(3));
}

#[test]
fn what_a_queue_keeps_outlives_its_last_handle_and_all_that_waits() {
    let engine = Engine::manual(EngineClock::Virtual).unwrap();
    let queue = Queue::create(&engine, "keeps", QueueOptions::default()).unwrap();
    let kept = Arc::new(());
    queue.keep(kept.clone());
    let (holders, seen) = (Arc::downgrade(&kept), Arc::new(Mutex::new(Vec::new())));
    drop(kept);
    for _ in 0..2 {
        let (holders, seen) = (holders.clone(), seen.clone());
        queue.dispatch_async(move || seen.lock().unwrap().push(holders.strong_count()));
    }
    drop(queue);
    engine.settle();
    assert_eq!(*seen.lock().unwrap(), [1, 1], "kept while the work ran");
    assert_eq!(holders.strong_count(), 0, "and no longer");
}

#[test]
fn a_name_of_255_bytes_is_taken_and_one_of_256_refused() {
    let engine = Engine::manual(EngineClock::Virtual).unwrap();
    let longest = "n".repeat(255);
    assert_eq!(Queue::create(&engine, &longest, QueueOptions::default()).unwrap().name(), longest);
    assert_eq!(
        Queue::create(&engine, &"n".repeat(256), QueueOptions::default()).map(|_| ()),
        Err(IOReturn::BAD_ARGUMENT)
    );
}

const REENTRANT: QueueOptions = QueueOptions { reentrant: true };

#[test]
fn two_concurrent_blocks_meet_and_a_plain_block_never_overlaps_them() {
    let engine = engine();
    let queue = Queue::create(&engine, "shared", REENTRANT).unwrap();
    let inside = Arc::new(AtomicUsize::new(0));
    for _ in 0..200 {
        let meeting = Arc::new(Barrier::new(2));
        for _ in 0..2 {
            let (meeting, inside) = (meeting.clone(), inside.clone());
            let block = move || {
                inside.fetch_add(1, SeqCst);
                // Ends only if the other one runs too.
                meeting.wait();
                inside.fetch_sub(1, SeqCst);
            };
            queue.dispatch_concurrent(block).unwrap();
        }
        let seen = inside.clone();
        queue.dispatch_async(move || assert_eq!(seen.load(SeqCst), 0, "beside a concurrent block"));
        let seen = inside.clone();
        queue.dispatch_sync(|| assert_eq!(seen.load(SeqCst), 0)).unwrap();
    }
    assert_eq!(queue.numbers().executed, 4 * 200);
}

#[test]
fn concurrent_work_is_refused_by_a_queue_that_is_not_reentrant() {
    let engine = engine();
    let queue = Queue::create(&engine, "plain", QueueOptions::default()).unwrap();
    assert_eq!(queue.dispatch_concurrent(|| ()), Err(IOReturn::UNSUPPORTED));
    assert_eq!(queue.dispatch_sync(|| queue.sleep(1, None)), Ok(Err(IOReturn::UNSUPPORTED)));
}

#[test]
fn cancel_waits_for_concurrent_blocks_under_way() {
    let engine = engine();
    let queue = Queue::create(&engine, "shared", REENTRANT).unwrap();
    let (started_send, started) = channel();
    let (go_send, go) = channel::<()>();
    let (done_send, done) = channel();
    let ended = Arc::new(AtomicUsize::new(0));
    let ending = ended.clone();
    queue
        .dispatch_concurrent(move || {
            started_send.send(()).unwrap();
            go.recv().unwrap();
            ending.store(1, SeqCst);
        })
        .unwrap();
    started.recv().unwrap();
    let seen = ended.clone();
    queue.cancel(move || done_send.send(seen.load(SeqCst)).unwrap());
    go_send.send(()).unwrap();
    assert_eq!(done.recv(), Ok(1));
}

#[test]
fn other_blocks_run_while_a_holder_sleeps_and_it_holds_the_queue_again_on_return() {
    let engine = engine();
    let queue = Queue::create(&engine, "sleep", REENTRANT).unwrap();
    let value = Arc::new(AtomicUsize::new(0));
    let (changed, waker) = (value.clone(), queue.clone());
    let result = queue.dispatch_sync(|| {
        queue.dispatch_async(move || {
            changed.store(7, SeqCst);
            assert_eq!(waker.wakeup(1), Ok(true));
        });
        assert_eq!(value.load(SeqCst), 0);
        let slept = queue.sleep(1, None);
        assert!(queue.on_queue());
        (slept, value.load(SeqCst))
    });
    assert_eq!(result, Ok((Ok(()), 7)));
}

#[test]
fn a_sleep_ends_with_a_timeout_at_its_deadline_on_every_clock() {
    let engine = engine();
    let queue = Queue::create(&engine, "sleep", REENTRANT).unwrap();
    for clock in [Clock::Uptime, Clock::Continuous, Clock::Wall] {
        let deadline = clock.now() + 1_000_000;
        let slept = queue.dispatch_sync(|| (queue.sleep(1, Some((clock, deadline))), clock.now()));
        let (result, now) = slept.unwrap();
        assert_eq!(result, Err(IOReturn::TIMEOUT));
        assert!(now >= deadline, "{clock:?} woke early");
    }
}

/// Three threads asleep on event 1 of a queue; each sends how its sleep ended.
fn three_sleepers(queue: &Queue) -> (Receiver<Result<(), IOReturn>>, Vec<JoinHandle<()>>) {
    let (send, ended) = channel();
    let (asleep_send, asleep) = channel();
    let sleepers = (0..3).map(|_| {
        let (queue, send, asleep_send) = (queue.clone(), send.clone(), asleep_send.clone());
        std::thread::spawn(move || {
            let slept = queue.dispatch_sync(|| {
                asleep_send.send(()).unwrap();
                queue.sleep(1, None)
            });
            send.send(slept.unwrap()).unwrap();
        })
    });
    let sleepers = sleepers.collect();
    // A sleeper that said so gives the queue up only once it is registered.
    (0..3).for_each(|_| asleep.recv().unwrap());
    queue.dispatch_sync(|| ()).unwrap();
    (ended, sleepers)
}

#[test]
fn a_wakeup_wakes_exactly_one_of_three_sleepers_and_wakeup_all_the_others() {
    let engine = engine();
    let queue = Queue::create(&engine, "sleepers", REENTRANT).unwrap();
    let (ended, sleepers) = three_sleepers(&queue);
    assert_eq!(queue.dispatch_sync(|| queue.wakeup(2)), Ok(Ok(false)), "another event");
    assert_eq!(queue.dispatch_sync(|| queue.wakeup(1)), Ok(Ok(true)));
    assert_eq!(ended.recv(), Ok(Ok(())));
    assert_eq!(queue.dispatch_sync(|| queue.wakeup_all(1)), Ok(Ok(2)));
    assert_eq!(ended.iter().take(2).collect::<Vec<_>>(), [Ok(()), Ok(())]);
    sleepers.into_iter().for_each(|sleeper| sleeper.join().unwrap());
}

#[test]
fn sleepers_of_a_cancelled_queue_are_aborted() {
    let engine = engine();
    let queue = Queue::create(&engine, "sleepers", REENTRANT).unwrap();
    let (ended, sleepers) = three_sleepers(&queue);
    queue.cancel(|| ());
    assert!(ended.iter().take(3).all(|slept| slept == Err(IOReturn::ABORTED)));
    sleepers.into_iter().for_each(|sleeper| sleeper.join().unwrap());
}

#[test]
fn a_sleep_on_a_queue_that_its_holder_has_cancelled_is_aborted() {
    let engine = engine();
    let queue = Queue::create(&engine, "cancelled", REENTRANT).unwrap();
    let (send, slept) = channel();
    let inside = queue.clone();
    queue.dispatch_async(move || {
        inside.cancel(|| ());
        send.send(inside.sleep(1, None)).unwrap();
    });
    assert_eq!(slept.recv_timeout(std::time::Duration::from_secs(30)), Ok(Err(IOReturn::ABORTED)));
}

#[test]
fn sleep_and_wakeup_off_the_queue_or_in_a_concurrent_block_are_not_permitted() {
    let engine = engine();
    let queue = Queue::create(&engine, "sleep", REENTRANT).unwrap();
    assert_eq!(queue.sleep(1, None), Err(IOReturn::NOT_PERMITTED));
    assert_eq!(queue.wakeup(1), Err(IOReturn::NOT_PERMITTED));
    let (send, seen) = channel();
    let inside = queue.clone();
    queue.dispatch_concurrent(move || send.send(inside.sleep(1, None)).unwrap()).unwrap();
    assert_eq!(seen.recv(), Ok(Err(IOReturn::NOT_PERMITTED)));
}

#[test]
fn workers_that_sleep_are_replaced_so_that_the_rest_goes_on() {
    let engine = engine();
    let sleeping: Vec<_> = (0..8)
        .map(|_| {
            let queue = Queue::create(&engine, "sleeping", REENTRANT).unwrap();
            let inside = queue.clone();
            queue.dispatch_async(move || {
                let _ = inside.sleep(1, None);
            });
            queue
        })
        .collect();
    // Runs only if some worker is left, although there are more sleepers than workers.
    let (send, ran) = channel();
    for queue in &sleeping {
        let (waker, send) = (queue.clone(), send.clone());
        queue.dispatch_async(move || {
            waker.wakeup(1).unwrap();
            send.send(()).unwrap();
        });
    }
    assert_eq!(ran.iter().take(8).count(), 8);
}

#[test]
fn the_held_queues_are_named_outermost_first() {
    let engine = engine();
    let outer = Queue::create(&engine, "outer", QueueOptions::default()).unwrap();
    let inner = Queue::create(&engine, "inner", QueueOptions::default()).unwrap();
    let held = outer.dispatch_sync(|| inner.dispatch_sync(|| inner.held()));
    assert_eq!(held, Ok(Ok(vec!["outer".to_owned(), "inner".to_owned()])));
    assert!(outer.held().is_empty());
}

#[test]
fn an_engine_that_ends_waits_also_for_the_handlers_of_its_stand_ins() {
    let engine = Engine::with_workers(1).unwrap();
    let create = |name| Queue::create(&engine, name, QueueOptions::default()).unwrap();
    let (blocked, beside) = (create("blocked"), create("beside"));
    let (go_send, go) = channel::<()>();
    let waits = blocked.clone();
    blocked.dispatch_async(move || waits.blocking(|| go.recv().unwrap()));
    let (began_send, began) = channel();
    let ended = Arc::new(AtomicBool::new(false));
    let tells = ended.clone();
    beside.dispatch_async(move || {
        began_send.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        tells.store(true, SeqCst);
    });
    began.recv().unwrap();
    go_send.send(()).unwrap();
    drop(engine);
    assert!(ended.load(SeqCst), "no handler runs after its engine");
}

#[test]
fn a_sync_caller_whose_engine_ends_is_told_so_and_waiting_work_is_dropped() {
    let engine = Engine::manual(EngineClock::Virtual).unwrap();
    let queue = Queue::create(&engine, "waits", QueueOptions::default()).unwrap();
    let owned = Arc::new(());
    let (held, again) = (owned.clone(), queue.clone());
    let (inside_send, inside) = channel();
    let (go_send, go) = channel::<()>();
    let holder = queue.clone();
    let holding = std::thread::spawn(move || {
        let hold = || {
            inside_send.send(()).unwrap();
            go.recv().unwrap();
        };
        holder.dispatch_sync(hold).unwrap();
    });
    inside.recv().unwrap();
    queue.dispatch_async(move || drop((held, again)));
    let (told_send, told) = channel();
    let waiter = queue.clone();
    std::thread::spawn(move || told_send.send(waiter.dispatch_sync(|| ())).unwrap());
    while queue.numbers().depth < 3 {
        std::thread::yield_now();
    }
    drop(engine);
    go_send.send(()).unwrap();
    holding.join().unwrap();
    // A watchdog: it could wait for ever.
    assert_eq!(told.recv_timeout(Duration::from_secs(30)), Ok(Err(IOReturn::ABORTED)));
    assert_eq!(Arc::strong_count(&owned), 1);
    assert_eq!(queue.dispatch_sync(|| 3), Ok(3), "an idle queue needs no engine for that");
}
