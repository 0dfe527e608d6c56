//! A driver without a will of its own: the test gets its queue and uses the SDK with it.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use iohost_device_backend::InterruptKind;
use iohost_device_models::Function;
use iohost_device_models::edu::{Edu, Timing};
use iohost_dispatch::{Engine, EngineClock};
use iohost_driver::prelude::*;
use iohost_driver::wdm::{DeviceObject, Dpc, DueTime, IoTimer, KernelTimer, TimerType};
use iohost_driver::{Exported, export_driver};
use iohost_driver_host::{Device, Driver, Plugin};
use iohost_testkit::{FakeDevice, Rig};

/// How long a test waits for what must come before it says that it did not.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(60);

/// The driver.
#[derive(Default)]
pub(crate) struct Bench {
    /// What happened, in order.
    pub(crate) seen: Vec<String>,
    /// Places for what its own routine reaches.
    pub(crate) io_timer: Option<IoTimer>,
    pub(crate) kernel_timer: Option<KernelTimer>,
    pub(crate) dpc: Option<Dpc>,
}

type Start = fn(&IODispatchQueue<Bench>) -> Bench;

thread_local! {
    /// From the test to `start` and back, which both run on one thread.
    static START: RefCell<Option<Start>> = const { RefCell::new(None) };
    static QUEUE: RefCell<Option<IODispatchQueue<Bench>>> = const { RefCell::new(None) };
}

impl IOService for Bench {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];

    fn start(_: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self> {
        QUEUE.set(Some(queue.clone()));
        Ok(START.take().map_or_else(Self::default, |start| start(queue)))
    }
}

export_driver!(Bench);

impl Bench {
    pub(crate) fn note(&mut self, what: impl Into<String>) {
        self.seen.push(what.into());
    }

    pub(crate) fn tick(&mut self, _: &DeviceObject<Self>) {
        self.note("tick");
    }

    pub(crate) fn call(&mut self) {
        self.note("call");
    }

    /// The queue of the driver that was started last on this thread.
    pub(crate) fn queue() -> IODispatchQueue<Self> {
        QUEUE.take().expect("`start` left it")
    }
}

/// A started driver with one device object, on virtual time.
pub(crate) struct Setup {
    pub(crate) rig: Rig<Bench, Edu>,
    pub(crate) queue: IODispatchQueue<Bench>,
    pub(crate) device: DeviceObject<Bench>,
}

impl Setup {
    pub(crate) fn new() -> Self {
        let rig = Rig::start(Edu::new(Timing::Manual)).unwrap();
        let queue = Bench::queue();
        let device = DeviceObject::create(&queue).unwrap();
        Self { rig, queue, device }
    }

    /// With a driver that does something while it starts.
    pub(crate) fn starting(start: Start) -> Self {
        START.set(Some(start));
        Self::new()
    }

    /// The device object's timer, which notes `tick`.
    pub(crate) fn io_timer(&self) -> IoTimer {
        IoTimer::initialize(&self.device, Bench::tick).unwrap()
    }

    pub(crate) fn timer(&self) -> KernelTimer {
        KernelTimer::initialize(&self.device, TimerType::Notification).unwrap()
    }

    /// A DPC that notes `call`.
    pub(crate) fn dpc(&self) -> Dpc {
        Dpc::initialize(&self.device, Bench::call)
    }

    pub(crate) fn advance_ms(&self, ms: u64) {
        self.rig.advance(Duration::from_millis(ms));
    }

    /// What the driver noted since the last call.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.rig.settle();
        self.queue.dispatch_sync(|bench| std::mem::take(&mut bench.seen)).unwrap()
    }

    /// Moves time, then looks how much was noted.
    pub(crate) fn seen_after_ms(&self, ms: u64) -> usize {
        self.advance_ms(ms);
        self.seen().len()
    }
}

/// A started driver with an engine of the test's choice.
pub(crate) struct Service {
    pub(crate) queue: IODispatchQueue<Bench>,
    _driver: Driver,
    pub(crate) engine: Engine,
}

impl Service {
    pub(crate) fn on(engine: Engine) -> Self {
        let function = Arc::new(Function::new(Edu::new(Timing::Manual)));
        let backend = Arc::new(FakeDevice::new(function));
        let (device, _) = Device::take_over(backend, vec![InterruptKind::Msi]).unwrap();
        let plugin = Plugin::linked(Bench::descriptor());
        let driver = Driver::start(&engine, plugin, device, Arc::default()).unwrap();
        Self { queue: Bench::queue(), _driver: driver, engine }
    }

    /// Without threads, on virtual time: a rig that several threads can turn.
    pub(crate) fn on_virtual_time() -> Self {
        Self::on(Engine::manual(EngineClock::Virtual).unwrap())
    }

    pub(crate) fn advance_ms(&self, ms: u64) {
        self.engine.advance(Duration::from_millis(ms));
        self.engine.settle();
    }
}

/// Another thread that is in the middle of work of a queue.
pub(crate) struct Held {
    release: Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Held {
    pub(crate) fn hold<S: Send>(queue: &IODispatchQueue<S>) -> Self {
        let (release, released) = mpsc::channel();
        let (entered, has_entered) = mpsc::channel();
        let queue = queue.clone();
        let thread = thread::spawn(move || {
            let work = |_: &mut S| {
                entered.send(()).unwrap();
                // An error is the end of a test that failed.
                let _ = released.recv();
            };
            queue.dispatch_sync(work).unwrap();
        });
        has_entered.recv().unwrap();
        Self { release, thread }
    }

    /// Has the work end.
    pub(crate) fn release(self) {
        self.release.send(()).unwrap();
        self.thread.join().unwrap();
    }
}

/// As much of a chance as something wrong needs to be over first.
pub(crate) fn give_others_a_chance() {
    (0..10_000).for_each(|_| thread::yield_now());
}

/// The moment `ms` milliseconds after the start of a rig's virtual time, which is one second after
/// 1970, as Windows counts it.
pub(crate) fn time_of_day_ms(ms: i64) -> DueTime {
    DueTime::from_100ns(116_444_736_000_000_000 + (1000 + ms) * 10_000)
}

pub(crate) fn after_ms(ms: u64) -> DueTime {
    DueTime::after(Duration::from_millis(ms))
}
