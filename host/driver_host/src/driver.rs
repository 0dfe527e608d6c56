//! A driver that runs: its instance, its default queue, its device.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use iohost_dispatch::{Engine, Owner, Queue, QueueOptions};
use iohost_interface::{Arguments, IOReturn, ReplySink};

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
struct FirstFailure(Mutex<Option<String>>);

impl FirstFailure {
    fn get(&self) -> Option<String> {
        self.0.lock().expect(NO_PANIC).clone()
    }
}

impl Owner for FirstFailure {
    fn failed(&self, _: &str, reason: &str) {
        self.0.lock().expect(NO_PANIC).get_or_insert_with(|| reason.to_owned());
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
        let started = queue.dispatch_sync(|| plugin.start(&queue, &services, device));
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
        let mut owed = Owed(Some(sink));
        self.queue.dispatch_async(move || {
            if let Some(instance) = &*driver.instance.lock().expect(NO_PANIC)
                && let Some(sink) = owed.0.take()
            {
                begin();
                instance.call(session, selector, &arguments, sink);
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
            instance.session_opened(session)
        });
        opened.flatten()
    }

    /// Tells the driver, later, on its queue, that a session it accepted is over.
    pub fn session_closed(self: &Arc<Self>, session: u64) {
        let driver = self.clone();
        self.queue.dispatch_async(move || {
            if let Some(instance) = &*driver.instance.lock().expect(NO_PANIC) {
                instance.session_closed(session);
            }
        });
    }

    /// What the driver failed of, if it failed: the first panic in one of its handlers.
    pub fn failure(&self) -> Option<String> {
        self.failure.get()
    }

    /// Stops the driver and frees it. A second call does nothing.
    pub fn stop(&self) {
        let stopped = self.queue.dispatch_sync(|| {
            let instance = self.instance.lock().expect(NO_PANIC).take();
            if let Some(instance) = &instance {
                instance.stop();
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
