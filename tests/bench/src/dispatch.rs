//! Work handed to a serial queue by one producer.
//!
//! Operations are numbered, and each checks that it is the next one. The time is that from the first
//! one handed over to the last one run. The peer is what one would write without a dispatch engine:
//! a thread that runs boxed closures out of a channel.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use iohost_device_models::{Function, edu};
use iohost_dispatch::{Block, Engine, Queue};
use iohost_driver::{Exported, IODispatchQueue, IOPCIDevice, IOService, Personality};
use iohost_driver_host::{Device, Driver, Plugin};
use iohost_testkit::FakeDevice;

use crate::machine::Cores;
use crate::rounds::{Better, Case, Effort, Metric, Peer};

pub const CASES: &[Case] = &[
    Case {
        bench: "dispatch",
        name: "dispatch-engine",
        metrics: &[Metric { name: "async_ops_per_s", better: Better::Higher }],
        ours: on_the_engine,
        peers: &[Peer { name: "crossbeam-channel", run: through_a_channel }],
    },
    Case {
        bench: "dispatch",
        name: "dispatch-driver",
        metrics: &[Metric { name: "driver_async_ops_per_s", better: Better::Higher }],
        ours: in_a_driver,
        peers: &[Peer { name: "crossbeam-channel", run: through_a_channel }],
    },
];

/// `Queue::dispatch_async`, on an engine as the driver host starts it.
fn on_the_engine(effort: Effort) -> Result<Vec<f64>> {
    let cores = Cores::choose()?;
    cores.pin_consumer()?;
    let engine = Engine::start()?;
    cores.pin_producer()?;
    let queue = Queue::create(&engine, "bench", Default::default())?;
    rate(
        effort,
        |number| queue.dispatch_async(move || run_operation(number)),
        |done| queue.dispatch_async(move || drop(done)),
    )
}

/// `IODispatchQueue::dispatch_async`, through the plugin ABI, with the driver's state.
fn in_a_driver(effort: Effort) -> Result<Vec<f64>> {
    let cores = Cores::choose()?;
    cores.pin_consumer()?;
    let engine = Engine::start()?;
    cores.pin_producer()?;
    let function = Arc::new(Function::new(edu::Edu::new(edu::Timing::Immediate)));
    let (device, _) = Device::take_over(Arc::new(FakeDevice::new(function)), Vec::new())?;
    let driver =
        Driver::start(&engine, Plugin::linked(Counting::descriptor()), device, Arc::default())?;
    let queue = DEFAULT_QUEUE.get().context("the driver started")?;
    let result = rate(
        effort,
        |number| queue.dispatch_async(move |_: &mut Counting| run_operation(number)),
        |done| queue.dispatch_async(move |_: &mut Counting| drop(done)),
    );
    driver.stop();
    result
}

fn through_a_channel(effort: Effort) -> Result<Vec<f64>> {
    let cores = Cores::choose()?;
    cores.pin_consumer()?;
    let (blocks, waiting) = crossbeam_channel::unbounded::<Block>();
    let worker = thread::spawn(move || waiting.into_iter().for_each(|block| block()));
    cores.pin_producer()?;
    let send = |block| blocks.send(block).expect("the worker takes all there is");
    let result = rate(
        effort,
        |number| send(Box::new(move || run_operation(number))),
        |done| send(Box::new(move || drop(done))),
    );
    drop(blocks);
    worker.join().expect("no operation panicked");
    result
}

/// Operations per second. `dispatch` hands over one operation, `end` drops the value behind all of
/// them.
fn rate(
    effort: Effort,
    dispatch: impl Fn(u64),
    end: impl Fn(mpsc::Sender<()>),
) -> Result<Vec<f64>> {
    let run = |numbers: std::ops::Range<u64>| {
        let (done, finished) = mpsc::channel();
        let count = numbers.end - numbers.start;
        let start = Instant::now();
        numbers.for_each(&dispatch);
        end(done);
        // Comes back when `done` is dropped.
        let _ = finished.recv();
        count as f64 / start.elapsed().as_secs_f64()
    };
    let (warm, all) = (effort.of(50_000, 100), effort.of(550_000, 1_100));
    run(0..warm);
    let rate = run(warm..all);
    let ran = NEXT.load(Relaxed);
    anyhow::ensure!(ran == all, "{ran} operations ran in order, of {all}");
    Ok(vec![rate])
}

/// The number of the next operation; written only by operations, which run one at a time.
static NEXT: AtomicU64 = AtomicU64::new(0);

fn run_operation(number: u64) {
    if NEXT.load(Relaxed) == number {
        NEXT.store(number + 1, Relaxed);
    }
}

/// A driver that lends its queue to the benchmark.
struct Counting;

static DEFAULT_QUEUE: OnceLock<IODispatchQueue<Counting>> = OnceLock::new();

impl IOService for Counting {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];

    fn start(_: IOPCIDevice, queue: &IODispatchQueue<Self>) -> iohost_driver::Result<Self> {
        let _ = DEFAULT_QUEUE.set(queue.clone());
        Ok(Self)
    }
}

iohost_driver::export_driver!(Counting);
