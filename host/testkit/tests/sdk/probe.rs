//! A driver without a will of its own: the test gets its handles and uses the SDK with them.

use std::cell::RefCell;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iohost_device_backend::{DeviceBackend, InterruptKind};
use iohost_device_models::Bus;
use iohost_dispatch::Engine;
use iohost_driver::prelude::*;
use iohost_driver::{Exported, export_driver};
use iohost_driver_host::{Device, Driver, Plugin, StartError};
use iohost_interface::{Caller, InterfaceClient};
use iohost_testkit::{FakeDevice, Rig};

use crate::board::Board;

/// All the ways to interrupt.
pub(crate) const ANY: &[InterruptKind] =
    &[InterruptKind::IntX, InterruptKind::Msi, InterruptKind::MsiX];

pub(crate) mod api {
    iohost_interface::interface! {
        /// What a client of the probe can ask for.
        pub interface probe;

        methods {
            /// The bytes again.
            0 => fn echo(data: Vec<u8>) -> Vec<u8>;
            /// The sum.
            1 => fn add(a: u32, b: u32) -> u32;
            /// As many zeros.
            2 => fn zeros(len: u32) -> Vec<u8>;
            /// Never answered by the driver.
            3 => fn wait() -> u32;
            /// How many bytes came.
            4 => fn len(data: Vec<u8>) -> u64;
            /// Panics.
            5 => fn panic() -> u32;
        }

        queues {
            /// From the client.
            0 => UPLOAD: ToDriver;
            /// To the client.
            1 => DOWNLOAD: ToClient;
        }
    }
}

/// The driver. What its handlers have to say is in `seen`.
pub(crate) struct Probe {
    queue: IODispatchQueue<Self>,
    seen: Seen,
    waiting: Vec<Reply<u32>>,
    /// The session opened last, as the driver got it.
    pub(crate) session: Option<Session>,
    /// A place for what has to live as long as the driver.
    pub(crate) interrupt: Option<IOInterruptDispatchSource>,
    pub(crate) timer: Option<IOTimerDispatchSource>,
    pub(crate) buffer: Option<PreparedDma>,
}

/// What happened, in order.
#[derive(Clone, Default)]
pub(crate) struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    pub(crate) fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

type Start = Box<dyn FnOnce(IOPCIDevice, &IODispatchQueue<Probe>) -> Result<Probe>>;

thread_local! {
    /// What the next probe does in its `start`, which runs on the thread that starts it.
    static START: RefCell<Option<Start>> = const { RefCell::new(None) };
}

impl Probe {
    pub(crate) fn new(queue: &IODispatchQueue<Self>, seen: &Seen) -> Self {
        Self {
            queue: queue.clone(),
            seen: seen.clone(),
            waiting: Vec::new(),
            session: None,
            interrupt: None,
            timer: None,
            buffer: None,
        }
    }

    pub(crate) fn note(&mut self, what: impl Into<String>) {
        self.seen.note(what);
    }
}

impl IOService for Probe {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x0b0a)];

    fn start(device: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self> {
        let start = START.take().expect("set by the bench");
        start(device, queue)
    }

    fn stop(&mut self) {
        self.note(format!("stop, on the queue: {}", self.queue.on_queue()));
    }

    fn session_opened(&mut self, session: Session) -> Result<()> {
        ensure!(self.session.is_none(), IOReturn::BUSY, "one session at a time");
        self.session = Some(session);
        Ok(())
    }

    fn session_closed(&mut self, session: SessionId) {
        self.note(format!("session {session} closed"));
    }
}

impl api::Server for Probe {
    fn echo(&mut self, data: Vec<u8>, reply: Reply<Vec<u8>>) {
        reply.complete(data);
    }

    fn add(&mut self, a: u32, b: u32, reply: Reply<u32>) {
        reply.complete(a.wrapping_add(b));
    }

    fn zeros(&mut self, len: u32, reply: Reply<Vec<u8>>) {
        reply.complete(vec![0; len as usize]);
    }

    fn wait(&mut self, reply: Reply<u32>) {
        self.waiting.push(reply);
    }

    fn len(&mut self, data: Vec<u8>, reply: Reply<u64>) {
        reply.complete(data.len() as u64);
    }

    fn panic(&mut self, _reply: Reply<u32>) {
        panic!("asked to");
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.seen.note("dropped");
    }
}

export_driver!(Probe, serves api);

/// Runs a test whose failure would be to wait for ever.
pub(crate) fn watched(test: impl FnOnce() + Send + 'static) {
    let (ended, end) = std::sync::mpsc::channel();
    let test = std::thread::spawn(move || {
        test();
        ended.send(()).unwrap();
    });
    match end.recv_timeout(Duration::from_secs(30)) {
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("the test hangs"),
        _ => test.join().unwrap(),
    }
}

/// A probe in a rig, and the handles it was started with.
pub(crate) struct Bench {
    pub(crate) device: IOPCIDevice,
    pub(crate) queue: IODispatchQueue<Probe>,
    pub(crate) seen: Seen,
    pub(crate) rig: Rig<Probe, Board>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::on(Board::default())
    }

    pub(crate) fn on(board: Board) -> Self {
        let (seen, handles) = prepared();
        let rig = Rig::start_with(board, ANY).unwrap();
        let (device, queue) = handles.take().unwrap();
        Self { device, queue, seen, rig }
    }

    /// A rig whose driver does this in its `start`.
    pub(crate) fn rig(
        start: impl FnOnce(IOPCIDevice, &IODispatchQueue<Probe>) -> Result<Probe> + 'static,
    ) -> Result<Rig<Probe, Board>, StartError> {
        START.set(Some(Box::new(start)));
        Rig::start_with(Board::default(), ANY)
    }

    /// What happened since the last call, after everything has settled.
    pub(crate) fn settled(&self) -> Vec<String> {
        self.rig.settle();
        self.seen.take()
    }

    /// The same, after virtual time has passed.
    pub(crate) fn after(&self, ns: u64) -> Vec<String> {
        self.rig.advance(Duration::from_nanos(ns));
        self.seen.take()
    }

    pub(crate) fn bus<R>(&self, act: impl FnOnce(&mut Bus<'_>) -> R) -> R {
        self.rig.model(|_, bus| act(bus))
    }

    pub(crate) fn message(&self, vector: u8) {
        self.bus(|bus| bus.send_msi(vector));
    }

    /// A source whose handler notes the count; not enabled.
    pub(crate) fn interrupt(&self, index: u32) -> Result<IOInterruptDispatchSource> {
        IOInterruptDispatchSource::create(&self.device, index, &self.queue, |probe, event| {
            probe.note(format!("count {}", event.count));
        })
    }

    /// A source for the first of the board's four MSI vectors.
    pub(crate) fn message_source(&self) -> IOInterruptDispatchSource {
        self.device.configure_interrupts(InterruptType::Messaged, 4, 4).unwrap();
        self.interrupt(0).unwrap()
    }

    /// A timer whose handler notes the time.
    pub(crate) fn timer(&self) -> IOTimerDispatchSource {
        let handler = |probe: &mut Probe, time| probe.note(format!("fired at {time}"));
        IOTimerDispatchSource::create(&self.queue, handler).unwrap()
    }

    /// A client that is not bound to the declaration.
    pub(crate) fn caller(&self) -> Arc<dyn Caller> {
        self.rig.client::<Untyped>().0
    }
}

struct Untyped(Arc<dyn Caller>);

impl InterfaceClient for Untyped {
    const NAME: &'static str = "probe";

    fn description() -> String {
        "interface probe\n".to_owned()
    }

    fn new(caller: Arc<dyn Caller>) -> Self {
        Self(caller)
    }
}

/// A probe on an engine with threads and the kernel's clocks, or on an unusual device.
pub(crate) struct Host {
    pub(crate) device: IOPCIDevice,
    pub(crate) queue: IODispatchQueue<Probe>,
    /// Ends before its engine.
    _driver: Driver,
    pub(crate) engine: Engine,
}

impl Host {
    /// Three workers, an ordinary board.
    pub(crate) fn with_threads() -> Self {
        let function = Arc::new(iohost_device_models::Function::new(Board::default()));
        Self::start(Engine::with_workers(3).unwrap(), Arc::new(FakeDevice::new(function)))
    }

    pub(crate) fn start(engine: Engine, backend: Arc<dyn DeviceBackend>) -> Self {
        let (device, _) = Device::take_over(backend, ANY.to_vec()).unwrap();
        Self::on_device(engine, device)
    }

    pub(crate) fn on_device(engine: Engine, device: Arc<Device>) -> Self {
        let (_, handles) = prepared();
        let driver =
            Driver::start(&engine, Plugin::linked(Probe::descriptor()), device, Arc::default())
                .unwrap();
        let (device, queue) = handles.take().unwrap();
        Self { device, queue, _driver: driver, engine }
    }
}

/// Where a probe's `start` leaves its handles.
type Handles = std::rc::Rc<RefCell<Option<(IOPCIDevice, IODispatchQueue<Probe>)>>>;

/// Has the next `start` make a plain probe.
fn prepared() -> (Seen, Handles) {
    let (seen, handles) = (Seen::default(), Handles::default());
    let (noting, giving) = (seen.clone(), handles.clone());
    START.set(Some(Box::new(move |device, queue| {
        *giving.borrow_mut() = Some((device, queue.clone()));
        Ok(Probe::new(queue, &noting))
    })));
    (seen, handles)
}
