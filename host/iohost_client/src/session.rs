//! A session with one driver.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use iohost_control::varlink::Opened;
use iohost_interface::{
    Arguments, Caller, Description, Direction, InterfaceClient, PendingAnswer, ToClient, ToDriver,
};
use iohost_memory::ring::{Bell, Consumer, Doorway, Peer, Producer, Ring};

use crate::calls::Calls;
use crate::{ClientError, QueueConsumer, QueueProducer};

/// A conversation with one driver. Dropped, it ends: calls under way and ends of queues that were
/// taken from it become `OFFLINE`.
#[derive(Debug)]
pub struct Session {
    number: u64,
    service: String,
    description: Description,
    calls: Arc<Calls>,
    /// By place; `None` once taken.
    queues: Mutex<Vec<Option<QueueParts>>>,
}

/// A queue whose end nobody has taken yet.
#[derive(Debug)]
struct QueueParts {
    bytes: u32,
    memory: OwnedFd,
    data_available: Bell,
    data_serviced: Bell,
}

impl Session {
    /// Makes a session of what the daemon sent. Nothing of it is believed.
    pub(crate) fn new(opened: Opened, fds: Vec<OwnedFd>) -> Result<Self, ClientError> {
        let expected = 1 + 3 * opened.queues.len();
        if fds.len() != expected {
            let words = format!("{} descriptors came with a session of {expected}", fds.len());
            return Err(ClientError::Broken(words));
        }
        let description = Description::parse(&opened.interface)
            .map_err(|err| ClientError::Broken(err.to_string()))?;
        if description.queues.len() != opened.queues.len() {
            return Err(ClientError::Broken("a session without some of its queues".into()));
        }
        let mut fds = fds.into_iter();
        let mut next = || fds.next().expect("counted above");
        let calls = Calls::start(next())?;
        let queues = opened.queues.iter().map(|queue| {
            Some(QueueParts {
                bytes: queue.bytes,
                memory: next(),
                data_available: next().into(),
                data_serviced: next().into(),
            })
        });
        let queues = Mutex::new(queues.collect());
        Ok(Self { number: opened.session, service: opened.service, description, calls, queues })
    }

    /// The session's number, as the daemon's log shows it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The service's name.
    pub fn service(&self) -> &str {
        &self.service
    }

    /// The interface the driver serves.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The typed client of the driver's interface, as its api crate declares it. Callable from any
    /// thread, as often as needed.
    ///
    /// Errors: `WrongInterface`.
    pub fn client<C: InterfaceClient>(&self) -> Result<C, ClientError> {
        if self.description.name != C::NAME {
            return Err(ClientError::WrongInterface {
                service: self.service.clone(),
                found: self.description.name.clone(),
                expected: C::NAME,
            });
        }
        Ok(C::new(self.calls.clone()))
    }

    /// Calls a method by its number, for programs that learn an interface at run time.
    pub fn call(&self, selector: u64, arguments: Arguments) -> Box<dyn PendingAnswer> {
        self.calls.call(selector, arguments)
    }

    /// Takes a client's end of a queue to the driver.
    ///
    /// Errors: `NoSuchQueue`, `QueueInUse`; `Ring`, `Queue` and `Resources` for what came from the
    /// daemon and is not usable.
    pub fn producer(&self, queue: ToDriver) -> Result<QueueProducer, ClientError> {
        let (ring, parts) = self.take(queue.0, Direction::ToDriver)?;
        let ring = Producer::new(ring, parts.data_available)
            .map_err(|source| ClientError::Queue { place: queue.0, source })?;
        Ok(QueueProducer { ring, line: self.line(parts.data_serviced)? })
    }

    /// Takes a client's end of a queue from the driver.
    ///
    /// Errors: as [`producer`](Self::producer).
    pub fn consumer(&self, queue: ToClient) -> Result<QueueConsumer, ClientError> {
        let (ring, parts) = self.take(queue.0, Direction::ToClient)?;
        let ring = Consumer::new(ring, parts.data_serviced)
            .map_err(|source| ClientError::Queue { place: queue.0, source })?;
        Ok(QueueConsumer { ring, line: self.line(parts.data_available)? })
    }

    fn take(&self, place: usize, direction: Direction) -> Result<(Ring, Bells), ClientError> {
        let declared = self.description.queues.get(place);
        if declared.is_none_or(|queue| queue.direction != direction) {
            return Err(ClientError::NoSuchQueue { service: self.service.clone(), place });
        }
        let mut queues = self.queues.lock().expect("no code that can panic runs under this lock");
        let parts = queues[place].take().ok_or(ClientError::QueueInUse { place })?;
        let ring = Ring::attach(parts.memory, u64::from(parts.bytes))
            .map_err(|source| ClientError::Ring { place, source })?;
        let QueueParts { data_available, data_serviced, .. } = parts;
        Ok((ring, Bells { data_available, data_serviced }))
    }

    fn line(&self, bell: Bell) -> Result<Doorway, ClientError> {
        // The driver host has the other end of the session's socket, and the daemon keeps none:
        // its end is the driver host's end.
        Ok(Doorway { bell, peer: Some(Peer::Connection(self.calls.duplicate()?)) })
    }
}

struct Bells {
    data_available: Bell,
    data_serviced: Bell,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.calls.close();
    }
}
