//! Work handed to a serial queue.
//!
//! The peers are what one would write without a dispatch engine: a thread that runs boxed closures
//! out of a channel, or a mutex. All run the same closures, which check that they run in order or
//! one at a time. Each case is there twice: for the engine's queue, and for the driver's view of
//! it, which is behind the plugin ABI and brings the driver's state.

mod contenders;

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Barrier, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use iohost_dispatch::{Block, Queue};
use iohost_driver::IODispatchQueue;

use crate::driver::Lender;
use crate::latency::{CLOCK, Handled, one_way};
use crate::machine::{Cores, start_apart};
use crate::rounds::{Better, Case, Effort, Metric, Peer};
use contenders::{Contender, HandOver, RecordedQueue, Serial, Synchronous};

type DriverQueue = IODispatchQueue<Lender>;
type Mpsc = mpsc::Sender<Block>;
type Crossbeam = crossbeam_channel::Sender<Block>;
type Kanal = kanal::Sender<Block>;
type Flume = flume::Sender<Block>;
type LockAndCall = Mutex<()>;

/// Two cases for each line: the engine's queue and the driver's, against the same peers.
macro_rules! cases {
    ($($name:literal, $metric:literal, $better:ident, $measure:ident: $($peer:ty),+;)+) => {
        &[$(
            Case {
                bench: "dispatch",
                name: concat!("dispatch-", $name),
                metrics: &[Metric { name: $metric, better: Better::$better }],
                ours: $measure::<Queue>,
                peers: &[$(Peer { name: <$peer>::NAME, run: $measure::<$peer> }),+],
            },
            Case {
                bench: "dispatch",
                name: concat!("dispatch-", $name, "-driver"),
                metrics: &[Metric { name: concat!("driver_", $metric), better: Better::$better }],
                ours: $measure::<DriverQueue>,
                peers: &[$(Peer { name: <$peer>::NAME, run: $measure::<$peer> }),+],
            },
        )+]
    };
}

pub const CASES: &[Case] = cases! {
    "async", "async_ops_per_s", Higher, one_producer: Crossbeam, Kanal, Flume, Mpsc;
    "async-2", "async_2_producers_ops_per_s", Higher, two_producers: Crossbeam, Kanal, Flume, Mpsc;
    "chain", "async_from_own_item_ns", Lower, chain: Crossbeam, Kanal, Flume, Mpsc;
    "idle", "async_to_idle_p50_ns", Lower, async_to_idle: HandOver, Crossbeam, Mpsc;
    "sync", "sync_idle_ns", Lower, sync_idle: LockAndCall;
    "sync-2", "sync_2_callers_ops_per_s", Higher, two_callers: Crossbeam, Mpsc;
};

/// The engine with its flight recorder against itself without: what being recorded costs.
macro_rules! recorder_cases {
    ($($name:literal, $metric:literal, $better:ident, $measure:ident;)+) => {
        &[$(Case {
            bench: "recorder",
            name: concat!("recorder-", $name),
            metrics: &[Metric { name: concat!("recorded_", $metric), better: Better::$better }],
            ours: $measure::<RecordedQueue>,
            peers: &[Peer { name: <Queue>::NAME, run: $measure::<Queue> }],
        },)+]
    };
}

pub const RECORDER_CASES: &[Case] = recorder_cases! {
    "async", "async_ops_per_s", Higher, one_producer;
    "async-2", "async_2_producers_ops_per_s", Higher, two_producers;
    "chain", "async_from_own_item_ns", Lower, chain;
    "idle", "async_to_idle_p50_ns", Lower, async_to_idle;
    "sync", "sync_idle_ns", Lower, sync_idle;
    "sync-2", "sync_2_callers_ops_per_s", Higher, two_callers;
};

fn one_producer<S: Serial>(effort: Effort) -> Result<Vec<f64>> {
    let serial = start_apart(S::start)?;
    let run = |operations| produce(serial, 0, operations);
    let (warm, count) = (effort.of(50_000, 100), effort.of(500_000, 1_000));
    run(0..warm);
    let start = Instant::now();
    run(warm..warm + count);
    let elapsed = start.elapsed();
    check_order(0, warm + count)?;
    Ok(vec![count as f64 / elapsed.as_secs_f64()])
}

/// Each on a core of its own, as far as there are so many.
fn two_producers<S: Serial>(effort: Effort) -> Result<Vec<f64>> {
    let cores = Cores::choose()?;
    let serial = start_apart(S::start)?;
    let (warm, count) = (effort.of(50_000, 100), effort.of(250_000, 1_000));
    let together = Barrier::new(2);
    let run = |producer| {
        produce(serial, producer, 0..warm);
        together.wait();
        let start = Instant::now();
        produce(serial, producer, warm..warm + count);
        together.wait();
        start.elapsed()
    };
    let elapsed = thread::scope(|threads| {
        let other = threads.spawn(|| {
            // Takes part in any case: somebody waits at the barrier.
            let pinned = cores.pin_second_producer();
            run(1);
            pinned
        });
        let elapsed = run(0);
        other.join().expect("the thread does not panic").map(|()| elapsed)
    })?;
    check_order(0, warm + count)?;
    check_order(1, warm + count)?;
    Ok(vec![2.0 * count as f64 / elapsed.as_secs_f64()])
}

/// Hands over one producer's operations and waits until they have run.
fn produce<S: Serial>(serial: &S, producer: usize, operations: std::ops::Range<u64>) {
    let (done, finished) = mpsc::channel::<()>();
    for number in operations {
        serial.run_later(move || run_in_order(producer, number));
    }
    serial.run_later(move || drop(done));
    // Comes back when `done` is dropped.
    let _ = finished.recv();
}

/// The number of each producer's next operation; written only by operations, which run one at a
/// time.
static NEXT: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

fn run_in_order(producer: usize, number: u64) {
    if NEXT[producer].load(Relaxed) == number {
        NEXT[producer].store(number + 1, Relaxed);
    }
}

fn check_order(producer: usize, all: u64) -> Result<()> {
    let ran = NEXT[producer].load(Relaxed);
    ensure!(ran == all, "{ran} operations of producer {producer} ran in order, of {all}");
    Ok(())
}

/// An operation that hands over the next one, to the thread it runs on.
fn chain<S: Serial>(effort: Effort) -> Result<Vec<f64>> {
    let serial = start_apart(S::start)?;
    let (warm, count) = (effort.of(40_000, 100), effort.of(400_000, 1_000));
    let run = |count| {
        serial.run_later(move || link(serial, count));
        CHAIN_ENDS.wait();
    };
    run(warm);
    let start = Instant::now();
    run(count);
    Ok(vec![start.elapsed().as_nanos() as f64 / count as f64])
}

static CHAIN_ENDS: Barrier = Barrier::new(2);

fn link<S: Serial>(serial: &'static S, left: u64) {
    if left == 0 {
        CHAIN_ENDS.wait();
    } else {
        serial.run_later(move || link(serial, left - 1));
    }
}

/// From before the call to the closure, whose thread sleeps.
fn async_to_idle<S: Serial>(effort: Effort) -> Result<Vec<f64>> {
    let serial = start_apart(S::start)?;
    static HANDLED: Handled = Handled::not_yet();
    let samples = one_way(effort, &HANDLED, || {
        let sent = CLOCK.now();
        serial.run_later(|| HANDLED.now());
        sent
    });
    Ok(vec![samples.p50])
}

/// One caller, nothing else on the queue.
fn sync_idle<S: Synchronous>(effort: Effort) -> Result<Vec<f64>> {
    let caller = start_apart(S::start)?.caller();
    let (warm, count) = (effort.of(200_000, 100), effort.of(2_000_000, 1_000));
    let run = |count| (0..count).for_each(|_| S::run_now(&caller, count_one));
    run(warm);
    let start = Instant::now();
    run(count);
    let elapsed = start.elapsed();
    check_count(warm + count)?;
    Ok(vec![elapsed.as_nanos() as f64 / count as f64])
}

/// Two threads on two cores that do nothing else; a thread behind a channel runs where it likes.
fn two_callers<S: Synchronous>(effort: Effort) -> Result<Vec<f64>> {
    let cores = Cores::choose()?;
    let started = S::start()?;
    let length = Duration::from_millis(effort.of(100, 1));
    let (together, over) = (Barrier::new(2), AtomicBool::new(false));
    let call = |is_over: &dyn Fn(Instant) -> bool| {
        let caller = started.caller();
        together.wait();
        let (start, mut count) = (Instant::now(), 0);
        loop {
            for _ in 0..16 {
                S::run_now(&caller, count_one);
            }
            count += 16;
            if is_over(start) {
                return (start, count);
            }
        }
    };
    let (elapsed, all) = thread::scope(|threads| {
        let other = threads.spawn(|| {
            // Takes part in any case: somebody waits at the barrier.
            let pinned = cores.pin_consumer();
            let (_, count) = call(&|_| over.load(Relaxed));
            pinned.map(|()| count)
        });
        let pinned = cores.pin_producer();
        let (start, count) = call(&|start| start.elapsed() > length);
        over.store(true, Relaxed);
        let others = other.join().expect("the thread does not panic")?;
        pinned.map(|()| (start.elapsed(), count + others))
    })?;
    check_count(all)?;
    Ok(vec![all as f64 / elapsed.as_secs_f64()])
}

/// Written only by operations that run one at a time, so that none is lost.
static COUNT: AtomicU64 = AtomicU64::new(0);

fn count_one() {
    COUNT.store(COUNT.load(Relaxed) + 1, Relaxed);
}

fn check_count(all: u64) -> Result<()> {
    let ran = COUNT.load(Relaxed);
    ensure!(ran == all, "{ran} operations ran one at a time, of {all}");
    Ok(())
}
