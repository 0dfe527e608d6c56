//! Queues: order, exclusion, turns, the end.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iohost_dispatch::{Engine, EngineClock, Queue};
use iohost_interface::IOReturn;

fn engine() -> Engine {
    Engine::with_workers(3).unwrap()
}

#[test]
fn ten_thousand_blocks_run_in_order_and_never_two_at_once() {
    let engine = engine();
    let queue = Queue::create(&engine, "order").unwrap();
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
    let (one, two) =
        (Queue::create(&engine, "one").unwrap(), Queue::create(&engine, "two").unwrap());
    let (send, receive) = channel();
    let (done_send, done) = channel();
    one.dispatch_async(move || done_send.send(receive.recv().unwrap()).unwrap());
    two.dispatch_async(move || send.send(7).unwrap());
    assert_eq!(done.recv(), Ok(7));
}

#[test]
fn a_sync_call_runs_after_what_the_same_thread_sent_before_and_sees_its_writes() {
    let engine = engine();
    let queue = Queue::create(&engine, "sync").unwrap();
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
    let queue = Queue::create(&engine, "idle").unwrap();
    let thread = queue.dispatch_sync(|| std::thread::current().id());
    assert_eq!(thread, Ok(std::thread::current().id()));
}

#[test]
fn a_sync_call_on_a_held_queue_runs_at_once_also_through_another_queue() {
    let engine = engine();
    let (a, b) = (Queue::create(&engine, "a").unwrap(), Queue::create(&engine, "b").unwrap());
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
    let queue = Queue::create(&engine, "shared").unwrap();
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
    let queue = Queue::create(&engine, "cancel").unwrap();
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
    let queue = Queue::create(&engine, "cancelled").unwrap();
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
    Queue::create(&engine, "short").unwrap().dispatch_async(move || send.send(1).unwrap());
    engine.settle();
    assert_eq!(receive.try_recv(), Ok(1));
}

#[test]
fn a_panic_in_a_block_is_reported_and_the_queue_lives_on() {
    let engine = Engine::manual(EngineClock::Virtual).unwrap();
    let queue = Queue::create(&engine, "panic").unwrap();
    let reported = Arc::new(Mutex::new(Vec::new()));
    let reports = reported.clone();
    engine.on_panic(move |queue, message| {
        reports.lock().unwrap().push(format!("{queue}: {message}"));
    });
    queue.dispatch_async(|| panic!("on purpose"));
    engine.settle();
    assert_eq!(*reported.lock().unwrap(), ["panic: on purpose"]);
    assert_eq!(queue.dispatch_sync(|| 3), Ok(3));
}

#[test]
fn a_name_of_255_bytes_is_taken_and_one_of_256_refused() {
    let engine = Engine::manual(EngineClock::Virtual).unwrap();
    let longest = "n".repeat(255);
    assert_eq!(Queue::create(&engine, &longest).unwrap().name(), longest);
    assert_eq!(Queue::create(&engine, &"n".repeat(256)).map(|_| ()), Err(IOReturn::BAD_ARGUMENT));
}

#[test]
fn a_sync_caller_whose_engine_ends_is_told_so_and_waiting_work_is_dropped() {
    let engine = Engine::manual(EngineClock::Virtual).unwrap();
    let queue = Queue::create(&engine, "waits").unwrap();
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
