//! A driver, an emulated device, and a test that moves both.

use std::fmt;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use iohost_control::host::RunningService;
use iohost_device_backend::{DeviceEvent, InterruptKind};
use iohost_device_models::{Bus, DeviceModel, Function};
use iohost_dispatch::{Engine, EngineClock};
use iohost_driver::{Exported, IOReturn, ToClient, ToDriver};
use iohost_driver_host::{
    Device, Driver, NewSession, Plugin, PowerNews, PowerState, Registry, Services, SessionQueue,
    StartError,
};
use iohost_interface::{
    Arguments, Caller, Description, InterfaceClient, PendingAnswer, answer_pair,
};
use iohost_memory::SharedMemory;
use iohost_memory::ring::{Bell, Consumer, Producer, Ring};

use crate::FakeDevice;

/// Driver `D` on a device that model `M` emulates.
///
/// Dropping it stops the driver, as the end of its process would.
pub struct Rig<D: Exported, M: DeviceModel> {
    engine: Arc<Engine>,
    function: Arc<Function<M>>,
    backend: Arc<FakeDevice<M>>,
    device: Arc<Device>,
    driver: Option<Arc<Driver>>,
    next_session: u64,
    power: Arc<Mutex<Vec<PowerNews>>>,
    /// Other services that began.
    incarnations: AtomicU64,
    kind: PhantomData<fn() -> D>,
}

impl<D: Exported, M: DeviceModel> Rig<D, M> {
    /// Starts the driver on a device that may use all its kinds of interrupt.
    pub fn start(model: M) -> Result<Self, StartError> {
        Self::start_with(model, &[InterruptKind::IntX, InterruptKind::Msi, InterruptKind::MsiX])
    }

    /// Starts the driver on a device that may interrupt in these ways only.
    pub fn start_with(model: M, interrupts: &[InterruptKind]) -> Result<Self, StartError> {
        Self::start_on(Arc::new(Function::new(model)), interrupts)
    }

    /// Starts the driver on a device with a past, as a restarted driver finds it.
    pub fn start_on(
        function: Arc<Function<M>>,
        interrupts: &[InterruptKind],
    ) -> Result<Self, StartError> {
        let engine = Engine::manual(EngineClock::Virtual).expect("the machine has eventfds");
        let backend = Arc::new(FakeDevice::new(function.clone()));
        let (device, _) = Device::take_over(backend.clone(), interrupts.to_vec())
            .expect("an emulated function can be reset");
        let plugin = Plugin::linked(D::descriptor());
        let power = Arc::new(Mutex::default());
        let news: Arc<Mutex<Vec<PowerNews>>> = power.clone();
        let services = Services::default()
            .telling_power(move |told| news.lock().expect("nobody panics with it").push(told));
        let driver = Driver::start(&engine, plugin, device.clone(), Arc::new(services))?;
        let driver = Some(Arc::new(driver));
        Ok(Self {
            engine: Arc::new(engine),
            function,
            backend,
            device,
            driver,
            next_session: 1,
            power,
            incarnations: AtomicU64::new(0),
            kind: PhantomData,
        })
    }

    /// Runs everything that can run now: handlers of interrupts that came, of timers that are
    /// due, work they sent, until nothing is left.
    pub fn settle(&self) {
        self.engine.settle();
    }

    /// Moves virtual time, the same on all clocks, then [`settle`](Self::settle)s. A timer with
    /// leeway fires as late as it may, unless another one on its clock fires after its deadline.
    pub fn advance(&self, by: Duration) {
        self.engine.advance(by);
        self.settle();
    }

    /// Has the machine sleep: continuous time and the time of day go on, uptime stands still.
    /// Then [`settle`](Self::settle)s.
    pub fn suspend(&self, by: Duration) {
        self.engine.suspend(by);
        self.settle();
    }

    /// Steps the time of day, forward or back; it starts at one second after 1970. Then
    /// [`settle`](Self::settle)s.
    pub fn set_wall_clock(&self, since_1970: Duration) {
        self.engine.set_wall_clock(since_1970);
        self.settle();
    }

    /// Reaches the device's model, between accesses of the driver.
    pub fn model<R>(&self, look: impl FnOnce(&mut M, &mut Bus<'_>) -> R) -> R {
        self.function.with_model(look)
    }

    /// Has something happen to the device, and tells the driver at once if it listens. What the
    /// daemon would do about it does not happen.
    pub fn device_happens(&self, event: DeviceEvent) {
        self.backend.happen(event);
        self.device.check_events();
        self.settle();
    }

    /// The device as the host reaches it, with what can go wrong with it.
    pub fn backend(&self) -> &FakeDevice<M> {
        &self.backend
    }

    /// The device, to start another driver on later.
    pub fn function(&self) -> Arc<Function<M>> {
        self.function.clone()
    }

    /// A client's calls to the driver; answers are there after [`settle`](Self::settle).
    pub fn client<C: InterfaceClient>(&self) -> C {
        C::new(Arc::new(DirectCalls { driver: self.driver().clone(), session: 0 }))
    }

    /// The calls of the client that has a session, which may be of another kind than the first.
    pub fn client_of<C: InterfaceClient>(&self, session: &RigSession) -> C {
        C::new(Arc::new(DirectCalls { driver: self.driver().clone(), session: session.number }))
    }

    /// Calls a method by its number, with arguments that no typed client would send.
    pub fn call(&self, selector: u64, arguments: Arguments) -> Box<dyn PendingAnswer> {
        DirectCalls { driver: self.driver().clone(), session: 0 }.call(selector, arguments)
    }

    /// Opens a session whose data queues have `queue_byte_count` bytes each.
    pub fn open_session(&mut self, queue_byte_count: u32) -> Result<RigSession, IOReturn> {
        self.open_session_as(0, queue_byte_count)
    }

    /// The same for a client of another kind than the first.
    pub fn open_session_as(
        &mut self,
        client_type: u64,
        queue_byte_count: u32,
    ) -> Result<RigSession, IOReturn> {
        let description = D::description(client_type).unwrap_or_default();
        let queues = match &*description {
            "" => Vec::new(),
            text => Description::parse(text).expect("made by `interface!`").queues,
        };
        let parts: Vec<_> = queues.iter().map(|_| QueueParts::new(queue_byte_count)).collect();
        let number = self.next_session;
        self.next_session += 1;
        let queues = parts.iter().map(QueueParts::for_driver).collect();
        // Without a ledger: whoever could survive is in this process too.
        let session = NewSession { number, generation: 1, queues, ledger: None };
        self.driver().expect_client_type(number, client_type);
        self.driver().session_opened(session)?;
        Ok(RigSession { number, queues: parts.into_iter().map(Some).collect() })
    }

    /// Maps memory that the driver offers to a session's client, by its type.
    ///
    /// Errors: what the driver says.
    pub fn map_memory(
        &self,
        session: &RigSession,
        memory_type: u64,
    ) -> Result<SharedMemory, IOReturn> {
        let (sender, answer) = mpsc::channel();
        let given = move |answer| drop(sender.send(answer));
        self.driver().copy_client_memory(session.number, memory_type, given);
        self.settle();
        // A driver that has stopped drops the sender.
        let (file, is_read_only) = answer.try_recv().unwrap_or(Err(IOReturn::NOT_READY))?;
        let (file, len) = iohost_memory::offer(file, is_read_only).expect(RESOURCES);
        let mapped = match is_read_only {
            true => SharedMemory::attach_read_only(file, len),
            false => SharedMemory::attach(file, len),
        };
        Ok(mapped.expect(RESOURCES))
    }

    /// Tells the driver that a session is over; it hears of it at [`settle`](Self::settle).
    pub fn close_session(&self, session: RigSession) {
        self.driver().session_closed(session.number);
    }

    /// Has another service run, for a driver that watches services. Its driver has its name.
    pub fn service_began(&self, name: &str, interface: &str) {
        let incarnation = self.incarnations.fetch_add(1, Relaxed) + 1;
        self.driver().services().began(RunningService {
            name: name.to_owned(),
            driver: name.to_owned(),
            interface: interface.to_owned(),
            incarnation,
        });
    }

    /// Has another service end.
    pub fn service_ended(&self, name: &str) {
        self.driver().services().ended(name);
    }

    /// Tells the driver that the process of a session's client has died; it hears of it at
    /// [`settle`](Self::settle).
    pub fn client_crashed(&self, session: &RigSession) {
        self.driver().client_crashed(session.number);
    }

    /// What the driver says of itself.
    pub fn registry(&self) -> &Registry {
        self.driver().services().registry()
    }

    /// Has the driver go into a power state; it hears of it at [`settle`](Self::settle).
    pub fn set_power_state(&self, state: PowerState) {
        self.driver().set_power_state(state);
    }

    /// What became of power states since the last call.
    pub fn power_news(&self) -> Vec<PowerNews> {
        std::mem::take(&mut *self.power.lock().expect("nobody panics with it"))
    }

    /// Tells the driver to stop, which most have done when this returns. What they owed their
    /// callers they have been told.
    pub fn stop(&mut self) {
        if let Some(driver) = &self.driver {
            driver.begin_stop();
        }
    }

    /// Whether the driver has stopped and is dropped.
    pub fn has_stopped(&self) -> bool {
        self.driver().has_stopped()
    }

    /// What the driver failed of: the first panic in one of its handlers.
    pub fn failure(&self) -> Option<String> {
        self.driver().failure()
    }

    fn driver(&self) -> &Arc<Driver> {
        self.driver.as_ref().expect("taken by the drop only")
    }
}

impl<D: Exported, M: DeviceModel> Drop for Rig<D, M> {
    fn drop(&mut self) {
        self.stop();
        // The engine is needed for the end of the driver, and this order says so.
        self.driver = None;
    }
}

impl<D: Exported, M: DeviceModel> fmt::Debug for Rig<D, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rig").field("driver", &self.driver).finish_non_exhaustive()
    }
}

/// A client's side of a session with a driver in a [`Rig`].
pub struct RigSession {
    number: u64,
    queues: Vec<Option<QueueParts>>,
}

impl RigSession {
    /// The session's number, as the driver knows it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The client's end of a queue to the driver. Once; panics when it was taken.
    pub fn producer(&mut self, queue: ToDriver) -> Producer {
        let parts = self.take(queue.0);
        Producer::new(parts.ring, parts.available).expect("the ring is new")
    }

    /// The client's end of a queue from the driver. Once; panics when it was taken.
    pub fn consumer(&mut self, queue: ToClient) -> Consumer {
        let parts = self.take(queue.0);
        Consumer::new(parts.ring, parts.serviced).expect("the ring is new")
    }

    fn take(&mut self, place: usize) -> QueueParts {
        let parts = self.queues.get_mut(place).and_then(Option::take);
        parts.expect("the interface has the queue, and its end was not taken yet")
    }
}

impl fmt::Debug for RigSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RigSession").field("number", &self.number).finish_non_exhaustive()
    }
}

struct QueueParts {
    ring: Ring,
    available: Bell,
    serviced: Bell,
}

/// Why making a queue for a test cannot fail.
const RESOURCES: &str = "the machine has memory and descriptors for a test";

impl QueueParts {
    fn new(queue_byte_count: u32) -> Self {
        Self {
            ring: Ring::create(c"rig-queue", u64::from(queue_byte_count)).expect(RESOURCES),
            available: Bell::new().expect(RESOURCES),
            serviced: Bell::new().expect(RESOURCES),
        }
    }

    fn for_driver(&self) -> SessionQueue {
        use std::os::fd::AsFd;
        let copy = |fd: &dyn AsFd| -> OwnedFd { fd.as_fd().try_clone_to_owned().expect(RESOURCES) };
        SessionQueue {
            bytes: self.ring.queue_byte_count(),
            memory: copy(&**self.ring.memory()),
            available: copy(&self.available),
            serviced: copy(&self.serviced),
        }
    }
}

/// Calls that go straight to the driver's queue.
struct DirectCalls {
    driver: Arc<Driver>,
    /// 0: none.
    session: u64,
}

impl Caller for DirectCalls {
    fn call(&self, selector: u64, arguments: Arguments) -> Box<dyn PendingAnswer> {
        let (sink, pending) = answer_pair();
        match arguments.check() {
            Ok(()) => self.driver.call(self.session, selector, arguments, sink, || ()),
            // A session's transport carries no more.
            Err(status) => sink.deliver(Err(status)),
        }
        pending
    }
}
