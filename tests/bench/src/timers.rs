//! Timers: what they cost by how many there are, what moving one costs beside tokio's, and how late
//! they are beside a timer of the kernel's own.
//!
//! Costs are taken in blocks, since one operation is hardly longer than a look at the clock.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, OnceLock, mpsc};
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::Result;
use iohost_dispatch::{Engine, Queue, TimerSource};
use iohost_event::{Clock, Timer};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::time::{Sleep, sleep_until};

use crate::machine::{Cores, start_apart};
use crate::rounds::{Better, Case, Effort, Metric, Peer, median, percentile};

pub const CASES: &[Case] = &[
    Case {
        bench: "timers",
        name: "timers-many",
        metrics: &[
            Metric { name: "arm_of_100k_ns", better: Better::Lower },
            Metric { name: "rearm_of_100k_ns", better: Better::Lower },
            Metric { name: "put_off_of_100k_ns", better: Better::Lower },
            Metric { name: "cancel_of_100k_ns", better: Better::Lower },
        ],
        ours: |effort| costs(effort, 100_000),
        peers: &[Peer { name: "ours of 100", run: |effort| costs(effort, 100) }],
    },
    Case {
        bench: "timers",
        name: "timers-rearm-1",
        metrics: &[
            Metric { name: "put_off_of_1_ns", better: Better::Lower },
            Metric { name: "move_of_1_ns", better: Better::Lower },
        ],
        ours: |effort| rearm(effort, 1),
        peers: &[Peer { name: "tokio", run: |effort| rearm_in_tokio(effort, 1) }],
    },
    Case {
        bench: "timers",
        name: "timers-rearm-10k",
        metrics: &[
            Metric { name: "put_off_of_10k_ns", better: Better::Lower },
            Metric { name: "move_of_10k_ns", better: Better::Lower },
        ],
        ours: |effort| rearm(effort, 10_000),
        peers: &[Peer { name: "tokio", run: |effort| rearm_in_tokio(effort, 10_000) }],
    },
    Case {
        bench: "timers",
        name: "timers-lateness",
        metrics: &[Metric { name: "late_at_1khz_p50_ns", better: Better::Lower }],
        ours: lateness,
        peers: &[Peer { name: "timerfd + epoll_wait", run: lateness_of_a_timerfd }],
    },
];

const CLOCK: Clock = Clock::Uptime;

/// Operations between two looks at the clock.
const BLOCK: usize = 50;

/// An engine as the driver host starts it, and timers that are armed and never due.
struct Armed {
    timers: Vec<TimerSource>,
    base: u64,
    /// Earlier than all others, so that moving them leaves the kernel's timer alone.
    _earliest: TimerSource,
    _engine: Engine,
}

impl Armed {
    fn new(count: usize, random: &mut Random) -> Result<Self> {
        let engine = start_apart(|| Ok(Engine::start()?))?;
        let queue = Queue::create(&engine, "bench", Default::default())?;
        let create = |_| TimerSource::create(&queue, |_| unreachable!("hours ahead"));
        let timers = (0..count).map(create).collect();
        let (base, earliest) = (CLOCK.now(), create(count));
        earliest.wake_at(CLOCK, base + HOUR / 2, 0)?;
        let armed = Self { timers, base, _earliest: earliest, _engine: engine };
        (0..count).for_each(|timer| armed.arm(&(timer, random.time())));
        Ok(armed)
    }

    fn arm(&self, &(timer, at): &Move) {
        self.timers[timer].wake_at(CLOCK, self.base + at, 0).expect("it has a handler");
    }

    fn set_enable(&self, timer: usize, enable: bool) {
        self.timers[timer].set_enable(enable, None).expect("it was not ended");
    }
}

/// What `count` timers cost each: arming one that was taken back, moving it to an earlier time, of
/// which the engine has to hear, or to a later one, of which it has not, taking it back. Taken in the
/// order they were made in: a hundred fit into the first cache and a hundred thousand into none, and
/// this is as far as the processor can help.
fn costs(effort: Effort, count: usize) -> Result<Vec<f64>> {
    let mut random = Random::new();
    let armed = Armed::new(count, &mut random)?;
    let [mut arm, mut rearm, mut put_off, mut cancel] = [const { Vec::new() }; 4];
    // Each block works on other timers, a quarter of all apart.
    let quarter = count / BLOCK / 4;
    let block = |number: usize| (0..BLOCK).map(move |place| (number * BLOCK + place) % count);
    for number in 0..effort.of(8_000, 4) as usize {
        let earlier = HOUR - (number * BLOCK / count) as u64 * EARLIER;
        let moves: Vec<Move> =
            block(number).map(|timer| (timer, earlier - random.next() % EARLIER)).collect();
        rearm.push(ns_each(&moves, |to| armed.arm(to)));
        let moves: Vec<Move> =
            block(number + quarter).map(|timer| (timer, LATEST + random.time())).collect();
        put_off.push(ns_each(&moves, |to| armed.arm(to)));
        let timers: Vec<usize> = block(number + 2 * quarter).collect();
        cancel.push(ns_each(&timers, |&timer| armed.set_enable(timer, false)));
        arm.push(ns_each(&timers, |&timer| armed.set_enable(timer, true)));
    }
    Ok([arm, rearm, put_off, cancel].map(|costs| median(costs.into_iter())).to_vec())
}

/// Moving one of `count` timers, on our engine.
fn rearm(effort: Effort, count: usize) -> Result<Vec<f64>> {
    let mut random = Random::new();
    let mut armed = Armed::new(count, &mut random)?;
    random.shuffle(&mut armed.timers);
    Ok(rearm_costs(effort, count, random, |block| ns_each(block, |to| armed.arm(to))))
}

/// Moving one of `count` timers, on a tokio runtime of one thread.
fn rearm_in_tokio(effort: Effort, count: usize) -> Result<Vec<f64>> {
    let mut random = Random::new();
    Cores::choose()?.pin_producer()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(async {
        let base = tokio::time::Instant::now();
        let moment = |at| base + Duration::from_nanos(at);
        let mut sleeps: Vec<Pin<Box<Sleep>>> =
            (0..count).map(|_| Box::pin(sleep_until(moment(random.time())))).collect();
        random.shuffle(&mut sleeps);
        for sleep in &mut sleeps {
            // It stands among the runtime's timers from the first poll on.
            let polled = poll_fn(|context| Poll::Ready(sleep.as_mut().poll(context))).await;
            assert!(polled.is_pending(), "hours ahead");
        }
        Ok(rearm_costs(effort, count, random, |block| {
            let block: Vec<_> = block.iter().map(|&(timer, at)| (timer, moment(at))).collect();
            ns_each(&block, |&(timer, at)| sleeps[timer].as_mut().reset(at))
        }))
    })
}

/// Has timers moved in blocks, one timer after the other: to any time; then always to a later time
/// than all before, which is what putting off a time-out is.
fn rearm_costs(
    effort: Effort,
    count: usize,
    mut random: Random,
    mut move_block: impl FnMut(&[Move]) -> f64,
) -> Vec<f64> {
    let mut cost = |time: &mut dyn FnMut(usize) -> u64| {
        let mut costs = Vec::new();
        for number in 0..effort.of(8_000, 4) as usize {
            let places = number * BLOCK..(number + 1) * BLOCK;
            let block: Vec<Move> = places.map(|place| (place % count, time(place))).collect();
            costs.push(move_block(&block));
        }
        median(costs.into_iter())
    };
    let any = cost(&mut |_| random.time());
    let later = cost(&mut |place| LATEST + place as u64 * 1_000_000);
    vec![later, any]
}

/// A timer by its number, and nanoseconds from some moment before.
type Move = (usize, u64);

/// The mean time of an operation, in nanoseconds.
fn ns_each<T>(block: &[T], operation: impl FnMut(&T)) -> f64 {
    let start = Instant::now();
    block.iter().for_each(operation);
    start.elapsed().as_nanos() as f64 / block.len() as f64
}

/// Random enough times lie between one and two hours ahead.
const HOUR: u64 = 3_600_000_000_000;
const LATEST: u64 = 2 * HOUR;

/// Times of one round of moves to earlier ones lie within this. Some thousand rounds are less than
/// half an hour.
const EARLIER: u64 = 100_000_000;

/// A generator that starts the same each time (xorshift; Marsaglia, 2003).
struct Random(u64);

impl Random {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn time(&mut self) -> u64 {
        HOUR + self.next() % HOUR
    }

    /// Fisher and Yates', 1938.
    fn shuffle<T>(&mut self, values: &mut [T]) {
        for place in (1..values.len()).rev() {
            values.swap(place, (self.next() % (place as u64 + 1)) as usize);
        }
    }
}

const PERIOD_NS: u64 = 1_000_000;

/// A `TimerSource` that arms itself for the next period, on an engine as the driver host starts it.
fn lateness(effort: Effort) -> Result<Vec<f64>> {
    Cores::choose()?.pin_consumer()?;
    let engine = Engine::start()?;
    let queue = Queue::create(&engine, "bench", Default::default())?;
    let timer = Arc::new(OnceLock::<TimerSource>::new());
    let (fired, latenesses) = mpsc::channel();
    let (again, mut deadline) = (timer.clone(), CLOCK.now() + PERIOD_NS);
    let source = TimerSource::create(&queue, move |_| {
        let late = CLOCK.now() - deadline;
        deadline += PERIOD_NS;
        let timer = again.get().expect("armed when it was there");
        timer.wake_at(CLOCK, deadline, 0).expect("it has a handler");
        let _ = fired.send(late as f64);
    });
    let timer = timer.get_or_init(|| source);
    timer.wake_at(CLOCK, deadline, 0)?;
    let (warm, count) = (effort.of(100, 2), effort.of(1_500, 10));
    let samples = latenesses.into_iter().skip(warm as usize).take(count as usize).collect();
    // It owns itself.
    timer.cancel(None);
    Ok(vec![percentile(samples, 50)])
}

/// The least one can write by hand.
fn lateness_of_a_timerfd(effort: Effort) -> Result<Vec<f64>> {
    Cores::choose()?.pin_consumer()?;
    let timer = Timer::new(CLOCK)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let (warm, count) = (effort.of(100, 2), effort.of(1_500, 10));
    let mut deadline = CLOCK.now();
    let mut events = [EpollEvent::empty(); 16];
    let mut samples = Vec::new();
    for _ in 0..warm + count {
        deadline += PERIOD_NS;
        // Setting it takes back that it has expired, so there is nothing to read.
        timer.arm(deadline)?;
        while epoll.wait(&mut events, EpollTimeout::NONE)? == 0 {}
        samples.push((CLOCK.now() - deadline) as f64);
    }
    Ok(vec![percentile(samples.split_off(warm as usize), 50)])
}
