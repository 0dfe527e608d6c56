//! Why the daemon or a driver did not do what a client asked.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::OfferError;
use iohost_control::host::Failure;
use iohost_interface::IOReturn;
use iohost_memory::AttachError;
use iohost_memory::ring::{QueueError, RingError};

/// Why something could not be done, with the values that matter.
///
/// [`failure`](Self::failure) has the same as code, sentence and next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens on the control socket.
    #[error("no daemon listens on {}", socket.display())]
    NotRunning {
        /// The control socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// This user may not use the control socket.
    #[error("no permission to use {}", socket.display())]
    NoPermission {
        /// The control socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The control socket cannot be connected to.
    #[error("connecting to {}", socket.display())]
    Connect {
        /// The control socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The daemon said no.
    #[error("{}", .0.message)]
    Refused(Failure),
    /// The daemon went away, or said something that makes no sense; ask again over a new
    /// connection.
    #[error("the conversation with the daemon broke off: {0}")]
    Broken(String),
    /// The daemon did not answer.
    #[error("no answer from the daemon within {waited:?}")]
    Silent {
        /// How long it was given.
        waited: Duration,
    },
    /// The driver serves another interface than the client speaks.
    #[error("service {service:?} serves the interface {found:?}, not {expected:?}")]
    WrongInterface {
        /// The service.
        service: String,
        /// What it serves.
        found: String,
        /// What the client speaks.
        expected: &'static str,
    },
    /// The driver serves the interface, but an older or a changed one.
    #[error("service {service:?} does not offer what this program was built for: {missing}")]
    OtherVersion {
        /// The service.
        service: String,
        /// The first method or queue that is missing or different.
        missing: String,
    },
    /// No service that runs is of that kind.
    #[error("no service runs that has {wanted}")]
    NoMatch {
        /// What was asked for.
        wanted: String,
    },
    /// Several services that run are of that kind.
    #[error("{} services have {wanted}", services.len())]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// Their names.
        services: Vec<String>,
    },
    /// The interface has no such queue, or it goes the other way.
    #[error("service {service:?} has no queue {place} in that direction")]
    NoSuchQueue {
        /// The service.
        service: String,
        /// The queue's place.
        place: usize,
    },
    /// The queue's end was taken before; a ring has one at a time.
    #[error("queue {place} is in use already")]
    QueueInUse {
        /// The queue's place.
        place: usize,
    },
    /// The memory that came for a queue is not usable.
    #[error("attaching queue {place}")]
    Ring {
        /// The queue's place.
        place: usize,
        /// What is wrong with it.
        source: RingError,
    },
    /// The memory that came for a queue has impossible contents.
    #[error("attaching queue {place}")]
    Queue {
        /// The queue's place.
        place: usize,
        /// What is wrong with it.
        source: QueueError,
    },
    /// The driver gave no memory.
    #[error("no memory of type {memory}: {status}")]
    NoMemory {
        /// The type asked for.
        memory: u64,
        /// What the driver said, or `OFFLINE`.
        status: IOReturn,
    },
    /// The driver's memory has another size than this program was built for.
    #[error("memory of type {memory} has {found} bytes, not {expected}")]
    WrongSize {
        /// The type asked for.
        memory: u64,
        /// The bytes asked for.
        expected: usize,
        /// The bytes there are.
        found: usize,
    },
    /// The memory that came is not usable.
    #[error("mapping memory of type {memory}")]
    Mapping {
        /// The type asked for.
        memory: u64,
        /// What is wrong with it.
        source: AttachError,
    },
    /// Memory was not offered to the driver.
    #[error("offering {bytes} bytes of memory to the driver")]
    Offer {
        /// Its bytes.
        bytes: usize,
        /// Why not.
        source: OfferError,
    },
    /// This process lacks descriptors or threads.
    #[error("setting up a session")]
    Resources(#[from] io::Error),
}

impl ClientError {
    /// Code, sentence and next step.
    pub fn failure(&self) -> Failure {
        let (code, next) = match self {
            ClientError::Refused(failure) => return failure.clone(),
            ClientError::NotRunning { .. } => (
                "not-running",
                "start the daemon: iohost daemon; or name its socket: --socket PATH".to_owned(),
            ),
            ClientError::NoPermission { socket, .. } => (
                "socket-permission",
                format!("run as root, or join the group that owns {}", socket.display()),
            ),
            ClientError::Connect { .. } => {
                ("connect", "check the path; --socket names another".to_owned())
            }
            ClientError::Broken(_) => {
                ("broken", "check with `iohost status` that the daemon runs, and try again".into())
            }
            ClientError::Silent { .. } => ("silent", "read the daemon's log".to_owned()),
            ClientError::WrongInterface { .. } => {
                ("wrong-interface", "name a service of that interface: iohost status".to_owned())
            }
            ClientError::OtherVersion { .. } => {
                ("other-version", "install driver and program of the same version".to_owned())
            }
            ClientError::NoMatch { .. } => {
                ("no-match", "see what runs with `iohost status`, or bind a device".to_owned())
            }
            ClientError::Ambiguous { services, .. } => {
                ("ambiguous", format!("name one of them: {}", services.join(", ")))
            }
            ClientError::NoSuchQueue { service, .. } => {
                ("no-such-queue", format!("see its queues with `iohost call {service}`"))
            }
            ClientError::QueueInUse { .. } => {
                ("queue-in-use", "use that end, or open another session".to_owned())
            }
            ClientError::Ring { .. } | ClientError::Queue { .. } => {
                ("bad-queue", "install iohost and this program of the same version".to_owned())
            }
            ClientError::NoMemory { .. } => {
                ("no-memory", "see the driver's documentation for the memory it offers".to_owned())
            }
            ClientError::WrongSize { .. } => {
                ("wrong-size", "install driver and program of the same version".to_owned())
            }
            ClientError::Mapping { .. } => {
                ("bad-memory", "install iohost and this program of the same version".to_owned())
            }
            ClientError::Offer { source: OfferError::Driver(_), .. } => (
                "offer-not-sent",
                "open the session anew, or wait for the calls under way".to_owned(),
            ),
            ClientError::Offer { .. } => {
                ("no-memory", "offer fewer bytes, and at least one".to_owned())
            }
            ClientError::Resources(_) => {
                ("no-resources", "raise this process's limit of open files".to_owned())
            }
        };
        let source = std::error::Error::source(self).map(|source| format!(": {source}"));
        Failure::new(code, format!("{self}{}", source.unwrap_or_default()), next)
    }
}

impl From<Failure> for ClientError {
    fn from(failure: Failure) -> Self {
        ClientError::Refused(failure)
    }
}
