//! A driver that runs: its instance, its default queue, its device.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};

use iohost_dispatch::{Engine, Owner, Queue, QueueOptions};
use iohost_interface::{Arguments, ClientFile, IOReturn, ReplySink};
use iohost_memory::flight_recorder::{CallSlot, Kind};

use crate::plugin::{Instance, NewSession, Plugin};
use crate::{Device, Services};

/// A started driver. Dropping it stops the driver first.
///
/// Everything the driver does runs on its default queue; the methods here wait for their turn
/// there, so none of them may be called from it.
pub struct Driver {
    plugin: Plugin,
    instance: Mutex<Option<Instance>>,
    queue: Queue,
    failure: Arc<FirstFailure>,
    services: Arc<Services>,
}

/// Owns the driver's queues: keeps what failed there first.
#[derive(Default)]
struct FirstFailure {
    first: Mutex<Option<String>>,
    /// Told of each one.
    report: OnceLock<Report>,
}

type Report = Box<dyn Fn(&str) + Send + Sync>;

impl FirstFailure {
    fn get(&self) -> Option<String> {
        self.first.lock().expect(NO_PANIC).clone()
    }
}

impl Owner for FirstFailure {
    fn failed(&self, _: &str, reason: &str) {
        self.first.lock().expect(NO_PANIC).get_or_insert_with(|| reason.to_owned());
        if let Some(report) = self.report.get() {
            report(reason);
        }
    }
}

/// Why a driver did not start.
#[derive(Debug, thiserror::Error)]
#[error("{}", match message { Some(message) => message.clone(), None => status.to_string() })]
pub struct StartError {
    /// What `start` returned.
    pub status: IOReturn,
    /// What the driver said, if it said something.
    pub message: Option<String>,
}

impl Driver {
    /// Starts a driver on a device, on a new queue of `engine`.
    pub fn start(
        engine: &Engine,
        plugin: Plugin,
        device: Arc<Device>,
        services: Arc<Services>,
    ) -> Result<Self, StartError> {
        let failed = |status, message| StartError { status, message };
        let failure = Arc::new(FirstFailure::default());
        let owner = failure.clone();
        let queue = Queue::create_for(owner, engine, "Default", QueueOptions::default())
            .map_err(|status| failed(status, None))?;
        let started = queue.dispatch_sync(|| {
            queue.recorded(Kind::Start, 0, 0, || plugin.start(&queue, &services, device))
        });
        match started.flatten() {
            Ok(instance) => {
                let instance = Mutex::new(Some(instance));
                Ok(Self { plugin, instance, queue, failure, services })
            }
            Err(status) => Err(failed(status, failure.get())),
        }
    }

    /// The plugin's name.
    pub fn name(&self) -> String {
        self.plugin.name()
    }

    /// The interface's description; empty when the driver serves none.
    pub fn description(&self) -> String {
        self.plugin.describe()
    }

    /// What the driver may know of other services.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// The driver's default queue.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Hands a call to the driver, later, on its queue, right behind `begin`. Once the driver has
    /// stopped, the sink gets `NOT_READY` and nothing is begun.
    pub fn call(
        self: &Arc<Self>,
        session: u64,
        selector: u64,
        arguments: Arguments,
        sink: Box<dyn ReplySink>,
        begin: impl FnOnce() + Send + 'static,
    ) {
        let driver = self.clone();
        let slot = self.queue.recorder().and_then(|recorder| recorder.call(session, selector));
        let slot = slot.map(Arc::new);
        let queue = self.queue.clone();
        let sink = Recorded { sink, slot: slot.clone(), queue, session, selector };
        let mut owed = Owed(Some(Box::new(sink)));
        self.queue.dispatch_async(move || {
            if let Some(instance) = &*driver.instance.lock().expect(NO_PANIC)
                && let Some(sink) = owed.0.take()
            {
                begin();
                slot.iter().for_each(|slot| slot.running());
                driver.queue.recorded(Kind::Call, session, selector, || {
                    instance.call(session, selector, &arguments, sink);
                });
                slot.iter().for_each(|slot| slot.taken());
            }
        });
    }

    /// Asks the driver, later, on its queue, for memory that a client wants to map: the file, and
    /// whether the client may only read. Once the driver has stopped, `answer` is dropped.
    pub fn copy_client_memory(
        self: &Arc<Self>,
        session: u64,
        memory_type: u64,
        answer: impl FnOnce(Result<(OwnedFd, bool), IOReturn>) + Send + 'static,
    ) {
        let driver = self.clone();
        self.queue.dispatch_async(move || {
            if let Some(instance) = &*driver.instance.lock().expect(NO_PANIC) {
                answer(instance.copy_client_memory(session, memory_type));
            }
        });
    }

    /// Tells the driver of a session. Its answer, or `NOT_READY` once it has stopped.
    pub fn session_opened(&self, session: NewSession) -> Result<(), IOReturn> {
        let opened = self.queue.dispatch_sync(|| {
            let instance = self.instance.lock().expect(NO_PANIC);
            let instance = instance.as_ref().ok_or(IOReturn::NOT_READY)?;
            let number = session.number;
            self.queue.recorded(Kind::SessionOpened, number, 0, || instance.session_opened(session))
        });
        opened.flatten()
    }

    /// Tells the driver, later, on its queue, that a session it accepted is over.
    pub fn session_closed(self: &Arc<Self>, session: u64) {
        let driver = self.clone();
        self.queue.dispatch_async(move || {
            if let Some(instance) = &*driver.instance.lock().expect(NO_PANIC) {
                driver.queue.recorded(Kind::SessionClosed, session, 0, || {
                    instance.session_closed(session);
                });
            }
        });
    }

    /// What the driver failed of, if it failed: the first panic in one of its handlers.
    pub fn failure(&self) -> Option<String> {
        self.failure.get()
    }

    /// Has `report` called for each failure, on the thread that failed; at once if there was one.
    pub(crate) fn on_failure(&self, report: impl Fn(&str) + Send + Sync + 'static) {
        let report = self.failure.report.get_or_init(|| Box::new(report));
        if let Some(reason) = self.failure.get() {
            report(&reason);
        }
    }

    /// Stops the driver and frees it. A second call does nothing.
    pub fn stop(&self) {
        let stopped = self.queue.dispatch_sync(|| {
            let instance = self.instance.lock().expect(NO_PANIC).take();
            if let Some(instance) = &instance {
                self.queue.recorded(Kind::Stop, 0, 0, || instance.stop());
            }
            instance
        });
        if stopped.is_err() {
            // The driver cancelled its own queue, so nothing can be called there. Its release
            // can, from any thread, and quiets it too.
            drop(self.instance.lock().expect(NO_PANIC).take());
        }
    }
}

/// A call on its way to the driver. One that does not get there is answered all the same: the
/// driver has stopped, or has cancelled its queue.
struct Owed(Option<Box<dyn ReplySink>>);

impl Drop for Owed {
    fn drop(&mut self) {
        if let Some(sink) = self.0.take() {
            sink.deliver(Err(IOReturn::NOT_READY));
        }
    }
}

/// Where the answer to a call goes, with what is recorded of it.
struct Recorded {
    sink: Box<dyn ReplySink>,
    slot: Option<Arc<CallSlot>>,
    queue: Queue,
    session: u64,
    selector: u64,
}

impl ReplySink for Recorded {
    fn deliver(self: Box<Self>, answer: Result<Arguments, IOReturn>) {
        self.slot.iter().for_each(|slot| slot.answered());
        self.queue.note(Kind::Answer, self.session, self.selector);
        self.sink.deliver(answer);
    }

    fn client_memory(&self, memory: u64) -> Result<ClientFile, IOReturn> {
        self.sink.client_memory(memory)
    }
}

/// Why the driver's locks are never poisoned.
const NO_PANIC: &str = "no panic crosses the plugin ABI";

impl Drop for Driver {
    fn drop(&mut self) {
        self.stop();
    }
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("name", &self.name()).finish_non_exhaustive()
    }
}
