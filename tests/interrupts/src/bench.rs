//! A driver without a will of its own, on a device that interrupts when it is told to.

use std::cell::RefCell;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use iohost_device_backend::InterruptKind;
use iohost_dispatch::{Engine, EngineClock};
use iohost_driver::prelude::*;
use iohost_driver::{Exported, export_driver};
use iohost_driver_host::{Device, Driver, Plugin};

use crate::Ringing;
use crate::ringing::PATIENCE;

/// What a rule is tried on.
#[derive(Clone)]
pub struct Setup {
    /// The device.
    pub device: Arc<Ringing>,
    /// How it shall interrupt.
    pub kind: InterruptKind,
}

/// What happened, in order.
#[derive(Clone, Default)]
pub(crate) struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    pub(crate) fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }
}

/// The driver.
pub(crate) struct Probe {
    seen: Seen,
    /// A place for a source that its own handler uses.
    pub(crate) source: Option<Arc<IOInterruptDispatchSource>>,
}

impl Probe {
    pub(crate) fn note(&mut self, what: impl Into<String>) {
        self.seen.note(what);
    }

    pub(crate) fn source(&self) -> &IOInterruptDispatchSource {
        self.source.as_ref().expect("put there by the rule")
    }
}

thread_local! {
    /// Where a probe's `start`, which runs on the thread that starts it, leaves its handles.
    static HANDLES: RefCell<Option<(Seen, IOPCIDevice, IODispatchQueue<Probe>)>> =
        const { RefCell::new(None) };
}

impl IOService for Probe {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x0be1)];

    fn start(device: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self> {
        let seen = Seen::default();
        HANDLES.set(Some((seen.clone(), device, queue.clone())));
        Ok(Self { seen, source: None })
    }
}

export_driver!(Probe);

/// The driver, started, and everything a rule does with it.
pub(crate) struct Bench {
    pub(crate) device: IOPCIDevice,
    pub(crate) queue: IODispatchQueue<Probe>,
    pub(crate) seen: Seen,
    pub(crate) ringing: Arc<Ringing>,
    kind: InterruptType,
    /// Ends before its engine.
    _driver: Driver,
    engine: Engine,
}

impl Bench {
    /// On an engine that this thread turns, where time stands still.
    pub(crate) fn new(on: &Setup) -> Self {
        Self::on_engine(on, Engine::manual(EngineClock::Virtual).unwrap())
    }

    pub(crate) fn on_engine(on: &Setup, engine: Engine) -> Self {
        let every = [InterruptKind::IntX, InterruptKind::Msi, InterruptKind::MsiX];
        let (device, _) = Device::take_over(on.device.clone(), every.to_vec()).unwrap();
        let plugin = Plugin::linked(Probe::descriptor());
        let driver = Driver::start(&engine, plugin, device, Arc::default()).unwrap();
        let (seen, device, queue) = HANDLES.take().unwrap();
        let kind = match on.kind {
            InterruptKind::IntX => InterruptType::Level,
            InterruptKind::Msi => InterruptType::Messaged,
            InterruptKind::MsiX => InterruptType::MessagedX,
        };
        let ringing = on.device.clone();
        Self { device, queue, seen, ringing, kind, _driver: driver, engine }
    }

    /// Chooses the kind of interrupt, with so many vectors.
    pub(crate) fn configure(&self, vectors: u32) {
        self.device.configure_interrupts(self.kind, vectors, vectors).unwrap();
    }

    /// A source whose handler notes the count; not enabled.
    pub(crate) fn interrupt(&self, index: u32) -> Result<IOInterruptDispatchSource> {
        self.source(index, |probe, event| probe.note(format!("count {}", event.count)))
    }

    /// The only vector's source, with that handler.
    pub(crate) fn the_source(&self) -> Arc<IOInterruptDispatchSource> {
        self.configure(1);
        Arc::new(self.interrupt(0).unwrap())
    }

    pub(crate) fn source(
        &self,
        index: u32,
        handler: impl FnMut(&mut Probe, InterruptEvent) + Send + 'static,
    ) -> Result<IOInterruptDispatchSource> {
        IOInterruptDispatchSource::create(&self.device, index, &self.queue, handler)
    }

    /// Gives the driver a source, for its handler to find.
    pub(crate) fn keep(&self, source: &Arc<IOInterruptDispatchSource>) {
        let source = source.clone();
        self.queue.dispatch_sync(|probe| probe.source = Some(source)).unwrap();
    }

    pub(crate) fn send(&self, vector: u32) {
        self.ringing.send(vector);
    }

    /// Runs whatever can run.
    pub(crate) fn settle(&self) {
        self.engine.settle();
    }

    /// The same, until something is so.
    pub(crate) fn settle_until(&self, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
            self.engine.settle();
            std::thread::yield_now();
        }
    }

    /// Nothing happens any more, and nothing has since the last look.
    pub(crate) fn expect_nothing(&self) {
        self.expect([""; 0]);
    }

    /// What has happened since the last look, once that much has, and nothing after it.
    pub(crate) fn expect<T: AsRef<str>>(&self, expected: impl IntoIterator<Item = T>) {
        let expected: Vec<String> =
            expected.into_iter().map(|what| what.as_ref().to_owned()).collect();
        // A device that is no model takes its time, but only for what is to come.
        let start = Instant::now();
        self.engine.settle();
        while self.seen.0.lock().unwrap().len() < expected.len() && start.elapsed() < PATIENCE {
            std::thread::yield_now();
            self.engine.settle();
        }
        assert_eq!(std::mem::take(&mut *self.seen.0.lock().unwrap()), expected);
    }

    /// A queue beside the driver's. A thread that waits on this engine runs it meanwhile.
    pub(crate) fn side(&self) -> IODispatchQueue<Seen> {
        IODispatchQueue::create(&self.queue, "side", self.seen.clone()).unwrap()
    }
}
