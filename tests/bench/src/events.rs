//! From a write to an eventfd, on one core, to the handler, on another one, that sleeps.
//!
//! The peers are the least one can write by hand, a thread in `epoll_wait` that reads the count,
//! and the same with a library. System calls are counted from one event to the next, without the
//! write.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread;

use anyhow::Result;
use iohost_dispatch::{Engine, InterruptLine, InterruptSource, Queue};
use iohost_event::Signal;
use mio::unix::SourceFd;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::driver;
use crate::latency::{CLOCK, Handled, one_sample, one_way};
use crate::machine::start_apart;
use crate::rounds::{Better, Case, Effort, Metric, Peer, Side, this_program};
use crate::system_calls;

const LATENCY: &[Metric] = &[
    Metric { name: "handler_p50_ns", better: Better::Lower },
    Metric { name: "handler_p99_ns", better: Better::Lower },
];
const DRIVER_LATENCY: &[Metric] = &[
    Metric { name: "driver_handler_p50_ns", better: Better::Lower },
    Metric { name: "driver_handler_p99_ns", better: Better::Lower },
];
const LATENCY_PEERS: &[Peer] = &[
    Peer { name: "epoll_wait + read", run: |effort| latency(effort, epoll_thread) },
    Peer { name: "mio + read", run: |effort| latency(effort, mio_thread) },
];
const SYSTEM_CALLS: &str = "events-system-calls";
const DRIVER_SYSTEM_CALLS: &str = "events-system-calls-driver";

pub const CASES: &[Case] = &[
    Case {
        bench: "events",
        name: "events",
        metrics: LATENCY,
        ours: |effort| latency(effort, on_the_engine),
        peers: LATENCY_PEERS,
    },
    Case {
        bench: "events",
        name: "events-driver",
        metrics: DRIVER_LATENCY,
        ours: |effort| latency(effort, in_a_driver),
        peers: LATENCY_PEERS,
    },
    Case {
        bench: "events",
        name: SYSTEM_CALLS,
        metrics: &[Metric { name: "system_calls_per_event", better: Better::Lower }],
        ours: |effort| calls_per_event(SYSTEM_CALLS, Side::Ours, effort),
        peers: &[Peer {
            name: "epoll_wait + read",
            run: |effort| calls_per_event(SYSTEM_CALLS, Side::Peer(0), effort),
        }],
    },
    Case {
        bench: "events",
        name: DRIVER_SYSTEM_CALLS,
        metrics: &[Metric { name: "driver_system_calls_per_event", better: Better::Lower }],
        ours: |effort| calls_per_event(DRIVER_SYSTEM_CALLS, Side::Ours, effort),
        peers: &[Peer {
            name: "epoll_wait + read",
            run: |effort| calls_per_event(DRIVER_SYSTEM_CALLS, Side::Peer(0), effort),
        }],
    },
];

/// Something that handles events, and ends with the process.
struct Handling {
    /// Makes an event. Returns when, in time of [`CLOCK`].
    raise: Box<dyn Fn() -> u64>,
    handled: &'static Handled,
}

type Start = fn() -> Result<Handling>;

fn latency(effort: Effort, start: Start) -> Result<Vec<f64>> {
    let Handling { raise, handled } = start_apart(start)?;
    let latency = one_way(effort, handled, raise);
    Ok(vec![latency.p50, latency.p99])
}

/// The difference of two runs, so that starting and ending are not in it.
fn calls_per_event(case: &str, side: Side, effort: Effort) -> Result<Vec<f64>> {
    let (few, many) = (effort.of(100, 20), effort.of(600, 120));
    let calls = |events: u64| {
        let program = this_program("--other-end", case, side, effort)?;
        system_calls::count(program, &events.to_string())
    };
    let difference = calls(many)? as f64 - calls(few)? as f64;
    const WRITE: f64 = 1.0;
    Ok(vec![difference / (many - few) as f64 - WRITE])
}

/// The process whose system calls are counted.
pub fn other_end(case: &str, side: Side) -> Result<()> {
    let events: u64 = system_calls::wait_to_be_counted()?.parse()?;
    let start: Start = match (case, side) {
        (SYSTEM_CALLS, Side::Ours) => on_the_engine,
        (DRIVER_SYSTEM_CALLS, Side::Ours) => in_a_driver,
        _ => epoll_thread,
    };
    let Handling { raise, handled } = start_apart(start)?;
    for _ in 0..events {
        one_sample(handled, &raise);
    }
    Ok(())
}

/// An `InterruptSource` on an engine as the driver host starts it.
fn on_the_engine() -> Result<Handling> {
    let engine = Box::leak(Box::new(Engine::start()?));
    let queue = Queue::create(engine, "bench", Default::default())?;
    let (signal, handled) = (Arc::new(Signal::new()?), not_yet());
    let handler = move |_| handled.now();
    let source =
        InterruptSource::create(&queue, signal.clone(), InterruptLine::Edge, CLOCK, handler)?;
    source.set_enable(true, None)?;
    Box::leak(Box::new(source));
    Ok(Handling { raise: raise(signal), handled })
}

/// An `IOInterruptDispatchSource`, through the plugin ABI.
fn in_a_driver() -> Result<Handling> {
    let function = driver::lend()?.function;
    let raise = move || {
        function.with_model(|_, bus| {
            let now = CLOCK.now();
            bus.send_msi(0);
            now
        })
    };
    Ok(Handling { raise: Box::new(raise), handled: &driver::HANDLED })
}

fn epoll_thread() -> Result<Handling> {
    let (signal, handled) = (Arc::new(Signal::new()?), not_yet());
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&signal, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let waited_for = signal.clone();
    thread::spawn(move || {
        let mut events = [EpollEvent::empty(); 16];
        loop {
            let woken = epoll.wait(&mut events, EpollTimeout::NONE);
            if woken.is_ok() && waited_for.take() > 0 {
                handled.now();
            }
        }
    });
    Ok(Handling { raise: raise(signal), handled })
}

fn mio_thread() -> Result<Handling> {
    let (signal, handled) = (Arc::new(Signal::new()?), not_yet());
    let mut poll = mio::Poll::new()?;
    let descriptor = signal.as_fd().as_raw_fd();
    let readable = mio::Interest::READABLE;
    poll.registry().register(&mut SourceFd(&descriptor), mio::Token(0), readable)?;
    let waited_for = signal.clone();
    thread::spawn(move || {
        let mut events = mio::Events::with_capacity(16);
        loop {
            let woken = poll.poll(&mut events, None);
            if woken.is_ok() && waited_for.take() > 0 {
                handled.now();
            }
        }
    });
    Ok(Handling { raise: raise(signal), handled })
}

fn not_yet() -> &'static Handled {
    Box::leak(Box::new(Handled::not_yet()))
}

fn raise(signal: Arc<Signal>) -> Box<dyn Fn() -> u64> {
    Box::new(move || {
        let now = CLOCK.now();
        signal.raise();
        now
    })
}
