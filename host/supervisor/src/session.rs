//! A session's memory, made and held by the daemon.
//!
//! The rings, their bells, the ledger and the driver's end of the socket are kept here as well, so
//! that a session outlives its driver host: nobody hangs up on the client, what it sends waits in the
//! socket, and the next driver host gets the same descriptors. The session is over for the client when
//! the daemon lets go of them, too.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use iohost_control::host::{Failure, OpenSession, QueueSize};
use iohost_event::Packets;
use iohost_interface::{self as interface, Description, Direction};
use iohost_memory::ring::{Bell, Ledger, Ring, RingError};

/// What a session's two sides share.
#[derive(Debug)]
pub(crate) struct SessionMemory {
    client_type: u64,
    ledger: Ledger,
    queues: Vec<QueueMemory>,
}

#[derive(Debug)]
struct QueueMemory {
    bytes: u32,
    ring: Ring,
    data_available: Bell,
    data_serviced: Bell,
}

/// Why a session cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("queue of {bytes} bytes")]
    Queue { bytes: u32, source: RingError },
    #[error("descriptors for a session")]
    Kernel(#[from] io::Error),
}

impl SessionError {
    pub(crate) fn into_failure(self) -> Failure {
        match self {
            SessionError::Queue { bytes, source } => Failure::new(
                "queue-size",
                format!("a queue of {bytes} bytes cannot be made: {source}"),
                "ask for another size, a multiple of 4",
            ),
            SessionError::Kernel(err) => Failure::new(
                "no-resources",
                format!("the daemon cannot make the descriptors of a session: {err}"),
                "close sessions, or raise the daemon's limit of open files",
            ),
        }
    }
}

impl SessionMemory {
    /// Makes empty queues of these sizes, for a kind of client.
    pub(crate) fn create(sizes: &[QueueSize], client_type: u64) -> Result<Self, SessionError> {
        let queue = |size: &QueueSize| {
            Ok(QueueMemory {
                bytes: size.bytes,
                ring: Ring::create(c"iohost-queue", u64::from(size.bytes))
                    .map_err(|source| SessionError::Queue { bytes: size.bytes, source })?,
                data_available: Bell::new()?,
                data_serviced: Bell::new()?,
            })
        };
        let queues = sizes.iter().map(queue).collect::<Result<_, SessionError>>()?;
        Ok(Self { client_type, ledger: Ledger::create()?, queues })
    }

    /// Bytes of the queues.
    pub(crate) fn bytes(&self) -> u64 {
        self.queues.iter().map(|queue| u64::from(queue.bytes)).sum()
    }

    /// Takes up what a driver host hands over. Nothing of it is believed: the kernel says what each
    /// descriptor is, but for the bells, which this process only passes on.
    pub(crate) fn take_up(
        sizes: &[QueueSize],
        client_type: u64,
        fds: Vec<OwnedFd>,
    ) -> Result<(Packets, Self), String> {
        if fds.len() != 2 + 3 * sizes.len() {
            return Err(format!("{} descriptors for {} queues", fds.len(), sizes.len()));
        }
        let mut fds = fds.into_iter();
        let mut next = || fds.next().expect("counted above");
        let socket = Packets::from(next());
        let ledger = Ledger::attach(next()).map_err(|err| format!("a ledger: {err}"))?;
        let queue = |size: &QueueSize| {
            let ring = Ring::attach(next(), u64::from(size.bytes));
            let ring = ring.map_err(|err| format!("a queue of {} bytes: {err}", size.bytes))?;
            let (data_available, data_serviced) = (next().into(), next().into());
            Ok(QueueMemory { bytes: size.bytes, ring, data_available, data_serviced })
        };
        let queues = sizes.iter().map(queue).collect::<Result<_, String>>()?;
        Ok((socket, Self { client_type, ledger, queues }))
    }

    /// Which of the driver's interfaces the session has: that for its kind of client.
    pub(crate) fn client_type(&self) -> usize {
        usize::try_from(self.client_type).unwrap_or(usize::MAX)
    }

    /// Whether its queues are those of the interface for its kind of client.
    pub(crate) fn fits(&self, interfaces: &[Description]) -> bool {
        let interface = interfaces.get(self.client_type());
        interface.is_some_and(|interface| interface.queues.len() == self.queues.len())
    }

    /// What a driver host is told of the session.
    pub(crate) fn for_host(&self, session: u64, generation: u64) -> OpenSession {
        let queues = self.queues.iter().map(|queue| QueueSize { bytes: queue.bytes });
        let client_type = self.client_type;
        OpenSession { session, generation, client_type, queues: queues.collect() }
    }

    /// The descriptors for a driver host, beside its end of the socket, in the order of
    /// `ToHost::OpenSession`.
    pub(crate) fn beside<'a>(&'a self, socket: &'a Packets) -> Vec<BorrowedFd<'a>> {
        [socket.as_fd(), self.ledger.as_fd()].into_iter().chain(self.of_queues()).collect()
    }

    /// The descriptors for the client, with its end of the socket; the ledger is not for it. `queues`
    /// are those of its interface. What the driver host rings for it, it hears only.
    pub(crate) fn for_client(
        &self,
        socket: Packets,
        queues: &[interface::Queue],
    ) -> io::Result<Vec<OwnedFd>> {
        let mut fds = vec![socket.into()];
        for (queue, declared) in self.queues.iter().zip(queues) {
            let QueueMemory { ring, data_available, data_serviced, .. } = queue;
            fds.push(ring.memory().as_ref().as_fd().try_clone_to_owned()?);
            fds.extend(match declared.direction {
                Direction::ToDriver => {
                    [data_available.try_clone()?.into(), data_serviced.listener()?]
                }
                Direction::ToClient => {
                    [data_available.listener()?, data_serviced.try_clone()?.into()]
                }
            });
        }
        Ok(fds)
    }

    /// The highest number of a call that was begun. A driver host wrote it, and it is for its client.
    pub(crate) fn begun(&self) -> u64 {
        self.ledger.begun()
    }

    fn of_queues(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.queues.iter().flat_map(|queue| {
            let memory = queue.ring.memory().as_ref().as_fd();
            [memory, queue.data_available.as_fd(), queue.data_serviced.as_fd()]
        })
    }
}
