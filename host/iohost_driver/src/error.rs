//! Why a driver operation failed: a code for programs, and words for people.

use std::borrow::Cow;
use std::fmt;

use iohost_interface::IOReturn;

/// A status with a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    code: IOReturn,
    message: Cow<'static, str>,
}

/// The result of a driver operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with a status and what happened, in words.
    pub fn new(code: IOReturn, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, message: message.into() }
    }

    /// The status, as a client or the host sees it.
    pub fn code(&self) -> IOReturn {
        self.code
    }

    /// What happened, in words; empty when there is nothing to add to the status.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<IOReturn> for Error {
    fn from(code: IOReturn) -> Self {
        Self { code, message: Cow::Borrowed("") }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.message {
            "" => write!(f, "{}", self.code),
            message => write!(f, "{message}: {}", self.code),
        }
    }
}

impl std::error::Error for Error {}

/// Returns an [`Error`] with a status and a formatted sentence unless a condition holds.
///
/// ```
/// use iohost_driver::{IOReturn, Result, ensure};
///
/// fn check(signature: u16) -> Result<()> {
///     ensure!(signature == 0xed, IOReturn::UNSUPPORTED, "not an edu device: {signature:#x}");
///     Ok(())
/// }
/// let err = check(1).unwrap_err();
/// assert_eq!(err.to_string(), "not an edu device: 0x1: unsupported (0xe00002c7)");
/// ```
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $code:expr, $($message:tt)+) => {
        if !$condition {
            return ::std::result::Result::Err(
                $crate::Error::new($code, ::std::format!($($message)+)),
            );
        }
    };
}
