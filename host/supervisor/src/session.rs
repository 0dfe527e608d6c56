//! A session's memory, made and held by the daemon.
//!
//! The rings and their bells are the daemon's, so that they can outlive a driver host. The
//! session's socket is not: each of its ends belongs to one side alone, so that either learns at
//! once when the other is gone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use iohost_control::host::{Failure, QueueSize};
use iohost_event::Packets;
use iohost_memory::ring::{Bell, Ring, RingError};

/// What a session's two sides share.
#[derive(Debug)]
pub(crate) struct SessionMemory {
    queues: Vec<QueueMemory>,
}

#[derive(Debug)]
struct QueueMemory {
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
    /// Makes empty queues of these sizes.
    pub(crate) fn create(sizes: &[QueueSize]) -> Result<Self, SessionError> {
        let queue = |size: &QueueSize| {
            Ok(QueueMemory {
                ring: Ring::create(c"iohost-queue", u64::from(size.bytes))
                    .map_err(|source| SessionError::Queue { bytes: size.bytes, source })?,
                data_available: Bell::new()?,
                data_serviced: Bell::new()?,
            })
        };
        Ok(Self { queues: sizes.iter().map(queue).collect::<Result<_, SessionError>>()? })
    }

    /// The descriptors behind a socket, in the order in which both sides expect them.
    pub(crate) fn beside<'a>(&'a self, socket: &'a Packets) -> Vec<BorrowedFd<'a>> {
        let mut fds = vec![socket.as_fd()];
        for queue in &self.queues {
            fds.push(queue.ring.memory().as_ref().as_fd());
            fds.push(queue.data_available.as_fd());
            fds.push(queue.data_serviced.as_fd());
        }
        fds
    }

    /// The same as duplicates, with the socket itself.
    pub(crate) fn duplicates(&self, socket: Packets) -> io::Result<Vec<OwnedFd>> {
        let mut fds: Vec<OwnedFd> = self.beside(&socket)[1..]
            .iter()
            .map(BorrowedFd::try_clone_to_owned)
            .collect::<io::Result<_>>()?;
        fds.insert(0, socket.into());
        Ok(fds)
    }
}
