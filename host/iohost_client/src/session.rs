//! A session with one driver.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use iohost_control::varlink::Opened;
use iohost_interface::{
    Arguments, Caller, Description, Direction, IOReturn, InterfaceClient, PendingAnswer, ToClient,
    ToDriver,
};
use iohost_memory::ring::{Bell, Consumer, Doorway, Peer, Producer, Ring};

use crate::calls::Calls;
use crate::queue::Line;
use crate::{ClientError, ClientMemory, OfferedMemory, QueueConsumer, QueueProducer};

/// A conversation with the driver of one service. Dropped, it ends: calls under way and ends of queues
/// that were taken from it become `OFFLINE`.
///
/// It outlives the driver. When that dies and the daemon starts it again, nothing has to be opened
/// anew, and the [`generation`](Self::generation) is one more:
///
/// - Data queues stay as they are. What was sent into one waits there.
/// - A call that the driver had not begun waits for the next one ([`WhenAway`] can change that), and
///   so does one of a method that is `[idempotent]` in its interface. Any other that it had begun
///   fails with `NO_COMPLETION`: nobody knows whether it was done.
/// - Memory that was offered is offered to the next driver.
/// - Actions of the driver's become `OFFLINE`, and what the driver held of this program's actions is
///   released ([`OSAction`](crate::OSAction) says `ABORTED`), unless it goes with a call that waits.
///
/// Only when the service is over (stopped, given back, quarantined, removed), or the next driver does
/// not take the session, everything becomes `OFFLINE`.
#[derive(Debug)]
pub struct Session {
    number: u64,
    service: String,
    description: Description,
    calls: Arc<Calls>,
    /// By place; `None` once taken.
    queues: Mutex<Vec<Option<QueueParts>>>,
}

/// What becomes of calls while the driver is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenAway {
    /// They wait for the next driver.
    #[default]
    Hold,
    /// They fail at once with `NOT_READY`, as do those that wait for an answer and were not begun.
    /// What was begun fails with `NO_COMPLETION`, also if it could be done twice.
    Fail,
}

/// A queue whose end nobody has taken yet.
#[derive(Debug)]
struct QueueParts {
    bytes: u32,
    memory: OwnedFd,
    /// One of the two is a bell to ring, the other a listener: by the queue's direction.
    data_available: OwnedFd,
    data_serviced: OwnedFd,
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
        let calls = Calls::start(next(), &description)?;
        let queues = opened.queues.iter().map(|queue| {
            Some(QueueParts {
                bytes: queue.bytes,
                memory: next(),
                data_available: next(),
                data_serviced: next(),
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

    /// Which driver this is for the session: 1 until the first one has died and another one is there,
    /// then 2. It changes before anything of the next driver can be noticed here.
    pub fn generation(&self) -> u64 {
        self.calls.generation()
    }

    /// Waits until there is a driver of a generation after `known`, and says which. Each one is to be
    /// heard of, unless several have come and gone meanwhile.
    ///
    /// Errors: `TIMEOUT`; `OFFLINE` when the session is over.
    pub fn wait_for_generation(&self, known: u64, timeout: Duration) -> Result<u64, IOReturn> {
        // A time that no clock reaches is as long as it takes.
        self.calls.wait_for_generation(known, Instant::now().checked_add(timeout))
    }

    /// What becomes of calls that are made from now on, if the driver is away or dies under them.
    pub fn set_when_away(&self, policy: WhenAway) {
        self.calls.set_fails_when_away(policy == WhenAway::Fail);
    }

    /// The typed client of the driver's interface, as its api crate declares it. Callable from any
    /// thread, as often as needed.
    ///
    /// Errors: `WrongInterface`, `OtherVersion`.
    pub fn client<C: InterfaceClient>(&self) -> Result<C, ClientError> {
        let service = || self.service.clone();
        if self.description.name != C::NAME {
            let found = self.description.name.clone();
            return Err(ClientError::WrongInterface {
                service: service(),
                found,
                expected: C::NAME,
            });
        }
        let wanted = Description::parse(&C::description());
        let wanted = wanted.map_err(|err| ClientError::Broken(err.to_string()))?;
        let offered = self.description.offers(&wanted);
        offered.map_err(|missing| ClientError::OtherVersion { service: service(), missing })?;
        Ok(C::new(self.calls.clone()))
    }

    /// Calls a method by its number, for programs that learn an interface at run time.
    pub fn call(&self, selector: u64, arguments: Arguments) -> Box<dyn PendingAnswer> {
        self.calls.call(selector, arguments)
    }

    /// Maps memory that the driver offers, all of it. `memory` is the type, a number that the
    /// driver's interface documents; the same one leads to the same memory each time. The client's
    /// side of `CopyClientMemoryForType`. Blocks until the driver has answered.
    ///
    /// `bytes` is how many the program was built for, or `None` to take what there is.
    ///
    /// Errors: `NoMemory` with what the driver said (`BAD_ARGUMENT`: it offers none of that type),
    /// or with `OFFLINE`; `WrongSize`; `Mapping` for a file that cannot be trusted or mapped.
    pub fn map_memory(
        &self,
        memory: u64,
        bytes: Option<usize>,
    ) -> Result<ClientMemory, ClientError> {
        smol::block_on(self.map_memory_async(memory, bytes))
    }

    /// As [`map_memory`](Self::map_memory), for any executor.
    pub async fn map_memory_async(
        &self,
        memory: u64,
        bytes: Option<usize>,
    ) -> Result<ClientMemory, ClientError> {
        let offer = self.calls.ask_for_memory(memory).await;
        let (file, len, read_only) =
            offer.map_err(|status| ClientError::NoMemory { memory, status })?;
        let found = usize::try_from(len).unwrap_or(usize::MAX);
        if let Some(expected) = bytes.filter(|bytes| *bytes != found) {
            return Err(ClientError::WrongSize { memory, expected, found });
        }
        ClientMemory::map(file, found, read_only)
            .map_err(|source| ClientError::Mapping { memory, source })
    }

    /// Makes `bytes` zeroed bytes that the driver of this session can use: read, with `read_only`,
    /// or write too. A session can have 64 of them at a time. The client's side of
    /// `CreateMemoryDescriptorFromClient`.
    ///
    /// Errors: `Offer`.
    pub fn offer_memory(
        &self,
        bytes: usize,
        read_only: bool,
    ) -> Result<OfferedMemory, ClientError> {
        OfferedMemory::offer(Arc::downgrade(&self.calls), bytes, read_only)
            .map_err(|source| ClientError::Offer { bytes, source })
    }

    /// Takes a client's end of a queue to the driver.
    ///
    /// Errors: `NoSuchQueue`, `QueueInUse`; `Ring`, `Queue` and `Resources` for what came from the
    /// daemon and is not usable.
    pub fn producer(&self, queue: ToDriver) -> Result<QueueProducer, ClientError> {
        let (ring, rings, hears) = self.take(queue.0, Direction::ToDriver)?;
        let ring = Producer::new(ring, rings)
            .map_err(|source| ClientError::Queue { place: queue.0, source })?;
        Ok(QueueProducer::new(ring, self.line(hears)?))
    }

    /// Takes a client's end of a queue from the driver.
    ///
    /// Errors: as [`producer`](Self::producer).
    pub fn consumer(&self, queue: ToClient) -> Result<QueueConsumer, ClientError> {
        let (ring, rings, hears) = self.take(queue.0, Direction::ToClient)?;
        let ring = Consumer::new(ring, rings)
            .map_err(|source| ClientError::Queue { place: queue.0, source })?;
        Ok(QueueConsumer::new(ring, self.line(hears)?))
    }

    /// The ring, the bell that this end rings, and the listener of the one that it hears.
    fn take(
        &self,
        place: usize,
        direction: Direction,
    ) -> Result<(Ring, Bell, OwnedFd), ClientError> {
        let declared = self.description.queues.get(place);
        if declared.is_none_or(|queue| queue.direction != direction) {
            return Err(ClientError::NoSuchQueue { service: self.service.clone(), place });
        }
        let mut queues = self.queues.lock().expect("no code that can panic runs under this lock");
        let parts = queues[place].take().ok_or(ClientError::QueueInUse { place })?;
        let ring = Ring::attach(parts.memory, u64::from(parts.bytes))
            .map_err(|source| ClientError::Ring { place, source })?;
        let (rings, hears) = direction.bells(parts.data_available, parts.data_serviced);
        Ok((ring, Bell::from(rings), hears))
    }

    fn line(&self, listener: OwnedFd) -> Result<Line, ClientError> {
        // The other end of the session's socket is the driver host's and, while another driver host is
        // to come, the daemon's. So its end is the end of the session.
        let peer = Some(Peer::Connection(self.calls.duplicate()?));
        Ok(Line::new(Doorway::at(listener, peer)?))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.calls.close();
    }
}
