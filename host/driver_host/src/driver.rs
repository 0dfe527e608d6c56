//! A driver that runs: its instance, its default queue, its device.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, OnceLock};

use iohost_dispatch::{Engine, Owner, Queue, QueueOptions};
use iohost_interface::{Arguments, ClientFile, IOReturn, ReplySink};
use iohost_memory::flight_recorder::{CallSlot, Kind};

use crate::plugin::{Instance, NewSession, Plugin};
use crate::power::{Acknowledgement, PowerState};
use crate::{Device, Properties, Services};

/// A started driver. Dropping it stops the driver first.
///
/// Everything the driver does runs on its default queue; the methods here wait for their turn
/// there, so none of them may be called from it.
pub struct Driver {
    plugin: Plugin,
    instance: Arc<Mutex<Option<Instance>>>,
    stopping: Arc<Stopping>,
    /// The kinds of clients of sessions, where it is not the first one.
    client_types: Mutex<HashMap<u64, u64>>,
    queue: Queue,
    failure: Arc<FirstFailure>,
    services: Arc<Services>,
}

/// A driver that was told to stop.
#[derive(Default)]
struct Stopping {
    state: Mutex<StopState>,
    ended: Condvar,
}

#[derive(Default)]
struct StopState {
    /// Until it has acknowledged.
    instance: Option<Instance>,
    /// Nothing of it is left.
    is_over: bool,
}

impl Stopping {
    /// The driver has acknowledged: frees it. Once; on its queue, unless it has cancelled that.
    fn finish(&self) {
        let Some(instance) = self.state.lock().expect(NO_PANIC).instance.take() else { return };
        instance.stop();
        drop(instance);
        self.end();
    }

    fn end(&self) {
        self.state.lock().expect(NO_PANIC).is_over = true;
        self.ended.notify_all();
    }
}

/// Ends a stop when it is run, or dropped because its queue runs nothing any more.
struct Finish(Arc<Stopping>);

impl Drop for Finish {
    fn drop(&mut self) {
        self.0.finish();
    }
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
        let driver_properties = Properties::from_iter([
            ("IOClass".to_owned(), plugin.name().into()),
            ("IOProviderClass".to_owned(), "IOPCIDevice".into()),
        ]);
        services.registry().describe(device.properties(), driver_properties, &queue);
        let started = queue.dispatch_sync(|| {
            queue.recorded(Kind::Start, 0, 0, || plugin.start(&queue, &services, device))
        });
        let instance = started.flatten().map_err(|status| {
            services.registry().stopped();
            failed(status, failure.get())
        })?;
        let instance = Arc::new(Mutex::new(Some(instance)));
        services.registry().started(plugin.registers_itself());
        let (told, on) = (instance.clone(), queue.clone());
        let power = services.power().started(&queue, move |state, done| {
            let told = told.clone();
            on.dispatch_async(move || {
                if let Some(instance) = &*told.lock().expect(NO_PANIC) {
                    instance.set_power_state(state, done);
                }
            });
        });
        let stopping = Arc::default();
        let client_types = Mutex::default();
        let driver = Self { plugin, instance, stopping, client_types, queue, failure, services };
        power.map_err(|status| failed(status, None))?;
        Ok(driver)
    }

    /// What the next version of the driver has to know.
    pub fn save(&self) -> Option<(u32, Vec<u8>)> {
        let saved = self.queue.dispatch_sync(|| {
            let instance = self.instance.lock().expect(NO_PANIC);
            instance.as_ref().and_then(Instance::save)
        });
        saved.ok().flatten()
    }

    /// Gives the driver what the version before it has saved.
    pub fn restore(&self, version: u32, data: &[u8]) -> Result<(), StartError> {
        let restored = self.queue.dispatch_sync(|| {
            let instance = self.instance.lock().expect(NO_PANIC);
            let instance = instance.as_ref().ok_or(IOReturn::NOT_READY)?;
            instance.restore(version, data)
        });
        let failed = |status| StartError { status, message: self.failure.get() };
        restored.flatten().map_err(failed)
    }

    /// The plugin's name.
    pub fn name(&self) -> String {
        self.plugin.name()
    }

    /// The interface's description; empty when the driver serves none.
    pub fn description(&self) -> String {
        self.plugin.describe()
    }

    /// The description for a kind of client; `None` when the driver has no such kind.
    pub fn description_for(&self, client_type: u64) -> Option<String> {
        self.plugin.describe_type(client_type)
    }

    /// Asks the driver for a power state. What becomes of it is told as [`Services`] says.
    pub fn set_power_state(&self, state: PowerState) {
        self.services.power().change(state, &self.queue);
    }

    /// The power state that the driver has acknowledged last.
    pub fn power_state(&self) -> PowerState {
        self.services.power().now()
    }

    /// What the driver may know of other services, and says of itself.
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
                let client_type = driver.client_type(session);
                slot.iter().for_each(|slot| slot.running());
                driver.queue.recorded(Kind::Call, session, selector, || {
                    instance.call(session, client_type, selector, &arguments, sink);
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

    /// Says what kind of client a session will be for, before it is opened. Without this: the
    /// first kind.
    pub fn expect_client_type(&self, session: u64, client_type: u64) {
        if client_type != 0 {
            self.client_types.lock().expect(NO_PANIC).insert(session, client_type);
        }
    }

    /// What kind of client a session is for.
    pub(crate) fn client_type(&self, session: u64) -> u64 {
        self.client_types.lock().expect(NO_PANIC).get(&session).copied().unwrap_or(0)
    }

    /// Tells the driver of a session. Its answer, `UNSUPPORTED` when it has no such kind of client,
    /// or `NOT_READY` once it has stopped.
    pub fn session_opened(&self, session: NewSession) -> Result<(), IOReturn> {
        let number = session.number;
        let client_type = self.client_type(number);
        let opened = self.queue.dispatch_sync(|| {
            let instance = self.instance.lock().expect(NO_PANIC);
            let instance = instance.as_ref().ok_or(IOReturn::NOT_READY)?;
            if client_type != 0 && self.plugin.describe_type(client_type).is_none() {
                return Err(IOReturn::UNSUPPORTED);
            }
            self.queue.recorded(Kind::SessionOpened, number, 0, || {
                instance.session_opened(session, client_type)
            })
        });
        let opened = opened.flatten();
        if opened.is_err() {
            self.client_types.lock().expect(NO_PANIC).remove(&number);
        }
        opened
    }

    /// Tells the driver, later, on its queue, that the process of a session's client has died.
    pub fn client_crashed(self: &Arc<Self>, session: u64) {
        let driver = self.clone();
        self.queue.dispatch_async(move || {
            if let Some(instance) = &*driver.instance.lock().expect(NO_PANIC) {
                instance.client_crashed(session);
            }
        });
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
            driver.client_types.lock().expect(NO_PANIC).remove(&session);
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

    /// Stops the driver, waits until it has stopped, and frees it. A second call only waits.
    pub fn stop(&self) {
        self.begin_stop();
        let state = self.stopping.state.lock().expect(NO_PANIC);
        drop(self.stopping.ended.wait_while(state, |state| !state.is_over).expect(NO_PANIC));
    }

    /// Tells the driver to stop. It gets no calls any more; it has stopped, and is freed, once it
    /// acknowledges that, which most do at once. A second call does nothing.
    pub fn begin_stop(&self) {
        self.services.power().stopped();
        let begun = self.queue.dispatch_sync(|| {
            let Some(instance) = self.instance.lock().expect(NO_PANIC).take() else { return };
            let acknowledged = self.queue.recorded(Kind::Stop, 0, 0, || self.await_stop(instance));
            if acknowledged {
                self.stopping.finish();
            }
        });
        if begun.is_err() {
            // The driver cancelled its own queue, so nothing can be called there. Its release
            // can, from any thread, and quiets it too.
            if let Some(instance) = self.instance.lock().expect(NO_PANIC).take() {
                drop(instance);
                self.stopping.end();
            }
        }
        self.services.registry().stopped();
    }

    /// Has the driver begin to stop. Whether it has acknowledged that already; else it is finished
    /// when it does.
    fn await_stop(&self, instance: Instance) -> bool {
        let entered = Arc::new(Mutex::new(Entered { is_inside: true, is_done: false }));
        let (stopping, queue, inside) =
            (self.stopping.clone(), self.queue.clone(), entered.clone());
        let done = Acknowledgement::new(move || {
            let mut entered = inside.lock().expect(NO_PANIC);
            entered.is_done = true;
            if !entered.is_inside {
                drop(entered);
                let finish = Finish(stopping);
                queue.dispatch_async(move || drop(finish));
            }
        });
        // Called while it is still here, so that its functions have it; nothing but the
        // acknowledgement leads to it from where it is then.
        instance.begin_stop(done);
        let mut state = self.stopping.state.lock().expect(NO_PANIC);
        state.instance = Some(instance);
        drop(state);
        let mut entered = entered.lock().expect(NO_PANIC);
        entered.is_inside = false;
        entered.is_done
    }

    /// Whether the driver has stopped and is freed.
    pub fn has_stopped(&self) -> bool {
        self.stopping.state.lock().expect(NO_PANIC).is_over
    }
}

/// A stop that begins: the driver may acknowledge inside the call, or on another thread.
struct Entered {
    is_inside: bool,
    is_done: bool,
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
    /// Stops a driver that was not, and does not wait until it has acknowledged that.
    fn drop(&mut self) {
        self.begin_stop();
        if self.queue.dispatch_sync(|| self.stopping.finish()).is_err() {
            self.stopping.finish();
        }
    }
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("name", &self.name()).finish_non_exhaustive()
    }
}
