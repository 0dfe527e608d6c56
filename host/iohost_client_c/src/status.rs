//! What went wrong, as a number and in words.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};

use iohost_client::{ClientError, QueueError, WaitError};
use iohost_interface::{IOReturn, with_sources};

/// Why a function of the library failed.
pub(crate) struct Problem {
    status: IOReturn,
    words: String,
}

impl Problem {
    pub(crate) fn new(status: IOReturn, words: impl Into<String>) -> Self {
        Self { status, words: words.into() }
    }
}

impl From<IOReturn> for Problem {
    fn from(status: IOReturn) -> Self {
        Self::new(status, status.to_string())
    }
}

impl From<WaitError> for Problem {
    fn from(err: WaitError) -> Self {
        let status = match &err {
            WaitError::TimedOut { .. } => IOReturn::TIMEOUT,
            WaitError::Queue(QueueError::Offline) => IOReturn::OFFLINE,
            WaitError::Queue(QueueError::MessageTooLarge { .. }) => IOReturn::MESSAGE_TOO_LARGE,
            WaitError::Queue(QueueError::Overrun { .. }) => IOReturn::OVERRUN,
            WaitError::Queue(QueueError::Underrun) => IOReturn::UNDERRUN,
            WaitError::Queue(_) => IOReturn::IPC_ERROR,
            _ => IOReturn::IO_ERROR,
        };
        Self::new(status, with_sources(&err))
    }
}

impl From<ClientError> for Problem {
    fn from(err: ClientError) -> Self {
        let status = match &err {
            ClientError::NotRunning { .. }
            | ClientError::Connect { .. }
            | ClientError::Broken(_)
            | ClientError::Silent { .. } => IOReturn::NOT_RESPONDING,
            ClientError::NoPermission { .. } => IOReturn::NOT_PERMITTED,
            ClientError::Refused(failure) => match failure.code.as_str() {
                "no-such-service" => IOReturn::NOT_FOUND,
                "not-running" => IOReturn::NOT_READY,
                "too-many-sessions" | "no-resources" => IOReturn::NO_RESOURCES,
                "queue-count" | "queue-size" | "ambiguous" => IOReturn::BAD_ARGUMENT,
                _ => IOReturn::ERROR,
            },
            ClientError::NoSuchQueue { .. } => IOReturn::NOT_FOUND,
            ClientError::QueueInUse { .. } => IOReturn::EXCLUSIVE_ACCESS,
            ClientError::NoMemory { status, .. } => *status,
            ClientError::WrongSize { .. } => IOReturn::BAD_ARGUMENT,
            ClientError::Ring { .. } | ClientError::Queue { .. } | ClientError::Mapping { .. } => {
                IOReturn::IPC_ERROR
            }
            ClientError::Resources(_) => IOReturn::NO_RESOURCES,
            _ => IOReturn::ERROR,
        };
        let failure = err.failure();
        Self::new(status, format!("{}; next: {}", failure.message, failure.next))
    }
}

thread_local! {
    /// Why the latest function failed that failed on this thread.
    static LATEST: RefCell<CString> = RefCell::default();
}

/// The status of a function, whose failure in words the thread then has.
pub(crate) fn finish(result: Result<(), Problem>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(Problem { status, words }) => {
            let words = CString::new(words.replace('\0', " ")).expect("no zero is left");
            // A thread that is ending has no place for it any more.
            let _ = LATEST.try_with(|latest| latest.replace(words));
            status.0
        }
    }
}

/// The words, until the next failure on this thread.
pub(crate) fn latest_words() -> *const c_char {
    LATEST.try_with(|latest| latest.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// A status in words, for ever.
pub(crate) fn words_of(status: i32) -> &'static CStr {
    macro_rules! words {
        ($($name:ident)*) => {
            match IOReturn(status) {
                $(IOReturn::$name => {
                    const { terminated(concat!(stringify!($name), "\0")) }
                })*
                _ => c"unknown status",
            }
        };
    }
    words! {
        SUCCESS ERROR NO_MEMORY NO_RESOURCES IPC_ERROR NO_DEVICE NOT_PRIVILEGED BAD_ARGUMENT
        LOCKED_READ LOCKED_WRITE EXCLUSIVE_ACCESS BAD_MESSAGE_ID UNSUPPORTED VM_ERROR
        INTERNAL_ERROR IO_ERROR CANNOT_LOCK NOT_OPEN NOT_READABLE NOT_WRITABLE NOT_ALIGNED
        STILL_OPEN DMA_ERROR BUSY TIMEOUT OFFLINE NOT_READY NOT_ATTACHED NO_SPACE NO_INTERRUPT
        MESSAGE_TOO_LARGE NOT_PERMITTED NO_POWER UNSUPPORTED_MODE UNDERRUN OVERRUN DEVICE_ERROR
        NO_COMPLETION ABORTED NO_BANDWIDTH NOT_RESPONDING ISO_TOO_OLD ISO_TOO_NEW NOT_FOUND
    }
}

const fn terminated(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("no zero at its end"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_that_has_a_name_has_it_here_too() {
        for code in (0x2bc..=0x2f0).map(|code: u32| (0xE000_0000 | code) as i32).chain([0]) {
            let name = IOReturn(code).name().unwrap_or("unknown status");
            assert_eq!(words_of(code).to_str(), Ok(name));
        }
    }

    #[test]
    fn a_thread_has_the_words_of_its_own_latest_failure() {
        assert_eq!(finish(Err(Problem::new(IOReturn::BUSY, "a\0b"))), IOReturn::BUSY.0);
        LATEST.with(|latest| assert_eq!(latest.borrow().to_str(), Ok("a b")));
        assert_eq!(finish(Ok(())), 0);
        LATEST
            .with(|latest| assert_eq!(latest.borrow().to_str(), Ok("a b"), "success says nothing"));
        std::thread::spawn(|| LATEST.with(|latest| assert!(latest.borrow().is_empty())))
            .join()
            .unwrap();
    }
}
