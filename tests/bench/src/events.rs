//! From a write to an eventfd, on one core, to the handler, on another one, that sleeps.
//!
//! The peer is the least one can write by hand: a thread in `epoll_wait` that reads the count. Both
//! sides take the time on `CLOCK_MONOTONIC`, the writer before the system call, the handler first.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Release};
use std::thread;

use anyhow::Result;
use iohost_dispatch::{Engine, InterruptLine, InterruptSource, Queue};
use iohost_event::{Clock, Signal};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::machine::Cores;
use crate::rounds::{Better, Case, Effort, Metric, Peer, percentile};

pub const CASES: &[Case] = &[Case {
    bench: "events",
    name: "events",
    metrics: &[
        Metric { name: "handler_p50_ns", better: Better::Lower },
        Metric { name: "handler_p99_ns", better: Better::Lower },
    ],
    ours: interrupt_source,
    peers: &[Peer { name: "epoll_wait + read", run: epoll_thread }],
}];

/// Long enough for the handler's thread to sleep again.
const GAP_NS: u64 = 50_000;

/// An `InterruptSource` on an engine as the driver host starts it.
fn interrupt_source(effort: Effort) -> Result<Vec<f64>> {
    let cores = Cores::choose()?;
    cores.pin_consumer()?;
    let engine = Engine::start()?;
    cores.pin_producer()?;
    let queue = Queue::create(&engine, "bench", Default::default())?;
    let (signal, handled) = (Arc::new(Signal::new()?), Arc::new(AtomicU64::new(0)));
    let source = InterruptSource::create(&queue, signal.clone(), InterruptLine::Edge, CLOCK, {
        let handled = handled.clone();
        move |_| handled.store(CLOCK.now(), Release)
    })?;
    source.set_enable(true, None)?;
    Ok(latencies(effort, &signal, &handled))
}

fn epoll_thread(effort: Effort) -> Result<Vec<f64>> {
    let cores = Cores::choose()?;
    let (signal, handled) = (Signal::new()?, AtomicU64::new(0));
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&signal, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let stopping = AtomicBool::new(false);
    thread::scope(|threads| {
        cores.pin_consumer()?;
        threads.spawn(|| {
            let mut events = [EpollEvent::empty(); 16];
            while !stopping.load(Acquire) {
                let woken = epoll.wait(&mut events, EpollTimeout::NONE);
                if woken.is_ok() && signal.take() > 0 {
                    handled.store(CLOCK.now(), Release);
                }
            }
        });
        cores.pin_producer()?;
        let latencies = latencies(effort, &signal, &handled);
        stopping.store(true, Release);
        signal.raise();
        Ok(latencies)
    })
}

const CLOCK: Clock = Clock::Uptime;

/// The median and the 99th percentile. The handler puts the time into `handled`.
fn latencies(effort: Effort, signal: &Signal, handled: &AtomicU64) -> Vec<f64> {
    let (warm, count) = (effort.of(200, 5), effort.of(2_000, 50));
    let mut samples = Vec::new();
    for _ in 0..warm + count {
        spin_until(|| CLOCK.now(), CLOCK.now() + GAP_NS);
        handled.store(0, Release);
        let sent = CLOCK.now();
        signal.raise();
        let at = spin_until(|| handled.load(Acquire), 1);
        samples.push(at.saturating_sub(sent) as f64);
    }
    let samples = samples.split_off(warm as usize);
    vec![percentile(samples.clone(), 50), percentile(samples, 99)]
}

/// Spins, so that this core is awake and its caches are warm, until `value` is at least `least`.
fn spin_until(value: impl Fn() -> u64, least: u64) -> u64 {
    loop {
        let value = value();
        if value >= least {
            return value;
        }
        std::hint::spin_loop();
    }
}
