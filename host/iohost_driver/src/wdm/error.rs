//! Why a call was refused.

use std::fmt;
use std::time::Duration;

use iohost_interface::IOReturn;

/// Why a call was refused. What Windows leaves undefined, or lets hang, is an error here.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The device object has an I/O timer already; that one stays as it is.
    AlreadyInitialized,
    /// The device object was deleted.
    DeviceDeleted,
    /// A call that is for passive level came from an I/O timer routine or a DPC.
    RaisedIrql {
        /// The call, by its Windows name.
        call: &'static str,
    },
    /// A call that would wait for the running I/O timer routine came from inside one.
    InsideRoutine {
        /// The call, by its Windows name.
        call: &'static str,
    },
    /// A call that waits came from a queue that it would wait for, or hold up.
    OnQueue {
        /// The call, by its Windows name.
        call: &'static str,
    },
    /// The timer was not signalled in time.
    Timeout {
        /// How long the call waited.
        waited: Duration,
    },
    /// The host did not make the queue or timer.
    Resources {
        /// What it said.
        source: crate::Error,
    },
}

impl Error {
    /// The error as an `NTSTATUS`, for code that was ported with its own error handling.
    pub fn nt_status(&self) -> u32 {
        match self {
            Self::AlreadyInitialized => 0xC000_0010, // STATUS_INVALID_DEVICE_REQUEST
            Self::DeviceDeleted => 0xC000_0056,      // STATUS_DELETE_PENDING
            Self::RaisedIrql { .. } => 0xC000_0184,  // STATUS_INVALID_DEVICE_STATE
            Self::InsideRoutine { .. } | Self::OnQueue { .. } => 0xC000_0194, // STATUS_POSSIBLE_DEADLOCK
            Self::Timeout { .. } => 0x0000_0102,                              // STATUS_TIMEOUT
            Self::Resources { .. } => 0xC000_009A, // STATUS_INSUFFICIENT_RESOURCES
        }
    }

    /// The error as DriverKit's status.
    pub fn code(&self) -> IOReturn {
        match self {
            Self::AlreadyInitialized => IOReturn::EXCLUSIVE_ACCESS,
            Self::DeviceDeleted => IOReturn::NO_DEVICE,
            Self::RaisedIrql { .. } => IOReturn::NOT_PERMITTED,
            Self::InsideRoutine { .. } | Self::OnQueue { .. } => IOReturn::CANNOT_LOCK,
            Self::Timeout { .. } => IOReturn::TIMEOUT,
            Self::Resources { source } => source.code(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlreadyInitialized => f.write_str("the device object has an I/O timer already"),
            Self::DeviceDeleted => f.write_str("the device object was deleted"),
            Self::RaisedIrql { call } => {
                write!(f, "{call} called from an I/O timer routine or a DPC")
            }
            Self::InsideRoutine { call } => {
                write!(f, "{call} called inside an I/O timer routine, where it would wait for it")
            }
            Self::OnQueue { call } => write!(f, "{call} called on a queue it would wait for"),
            Self::Timeout { waited } => write!(f, "not signalled within {waited:?}"),
            Self::Resources { .. } => f.write_str("no queue or timer for it"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Resources { source } => Some(source),
            _ => None,
        }
    }
}

impl From<Error> for crate::Error {
    fn from(err: Error) -> Self {
        match err {
            Error::Resources { source } => source,
            other => Self::new(other.code(), other.to_string()),
        }
    }
}

/// For `map_err`, where the host refuses to make something.
pub(super) fn resources(source: crate::Error) -> Error {
    Error::Resources { source }
}
