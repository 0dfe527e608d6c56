//! The status codes of DriverKit, with their numeric values.

use std::fmt;

/// The outcome of an operation that failed, as a number both sides of every boundary know.
///
/// Success is `0` and, in Rust, `Ok`; a value of this type inside an `Err` is never `SUCCESS`.
/// The numbers are those of `IOReturn.h`: `0xE0000000 | code`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct IOReturn(pub i32);

macro_rules! codes {
    ($($(#[doc = $doc:literal])* $name:ident = $code:literal, $text:literal;)*) => {
        impl IOReturn {
            $(#[doc = $text] pub const $name: IOReturn = IOReturn($code as u32 as i32);)*

            /// The code in words, or `None` for a number that is not a code of this list.
            pub fn text(self) -> Option<&'static str> {
                match self.0 as u32 { $($code => Some($text),)* _ => None }
            }

            /// The constant's name, or `None` for a number that is not a code of this list.
            pub fn name(self) -> Option<&'static str> {
                match self.0 as u32 { $($code => Some(stringify!($name)),)* _ => None }
            }
        }
    };
}

codes! {
    SUCCESS = 0x0000_0000, "success";
    ERROR = 0xE000_02BC, "general error";
    NO_MEMORY = 0xE000_02BD, "no memory";
    NO_RESOURCES = 0xE000_02BE, "no resources";
    IPC_ERROR = 0xE000_02BF, "the other process sent something wrong";
    NO_DEVICE = 0xE000_02C0, "no such device";
    NOT_PRIVILEGED = 0xE000_02C1, "not privileged";
    BAD_ARGUMENT = 0xE000_02C2, "bad argument";
    LOCKED_READ = 0xE000_02C3, "locked for reading";
    LOCKED_WRITE = 0xE000_02C4, "locked for writing";
    EXCLUSIVE_ACCESS = 0xE000_02C5, "in exclusive use by someone else";
    BAD_MESSAGE_ID = 0xE000_02C6, "no such method";
    UNSUPPORTED = 0xE000_02C7, "unsupported";
    VM_ERROR = 0xE000_02C8, "virtual memory error";
    INTERNAL_ERROR = 0xE000_02C9, "internal error";
    IO_ERROR = 0xE000_02CA, "input/output error";
    CANNOT_LOCK = 0xE000_02CC, "cannot lock";
    NOT_OPEN = 0xE000_02CD, "not open";
    NOT_READABLE = 0xE000_02CE, "not readable";
    NOT_WRITABLE = 0xE000_02CF, "not writable";
    NOT_ALIGNED = 0xE000_02D0, "not aligned";
    STILL_OPEN = 0xE000_02D2, "still open";
    DMA_ERROR = 0xE000_02D4, "DMA error";
    BUSY = 0xE000_02D5, "busy";
    TIMEOUT = 0xE000_02D6, "timed out";
    OFFLINE = 0xE000_02D7, "offline: the other side is gone";
    NOT_READY = 0xE000_02D8, "not ready";
    NOT_ATTACHED = 0xE000_02D9, "not attached";
    NO_SPACE = 0xE000_02DB, "no space";
    NO_INTERRUPT = 0xE000_02DF, "no such interrupt";
    MESSAGE_TOO_LARGE = 0xE000_02E1, "message too large";
    NOT_PERMITTED = 0xE000_02E2, "not permitted";
    NO_POWER = 0xE000_02E3, "no power";
    UNSUPPORTED_MODE = 0xE000_02E6, "unsupported mode";
    UNDERRUN = 0xE000_02E7, "underrun: nothing to take";
    OVERRUN = 0xE000_02E8, "overrun: no room";
    DEVICE_ERROR = 0xE000_02E9, "device error";
    NO_COMPLETION = 0xE000_02EA, "no completion: begun, and nobody knows whether it was done";
    ABORTED = 0xE000_02EB, "aborted";
    NO_BANDWIDTH = 0xE000_02EC, "no bandwidth";
    NOT_RESPONDING = 0xE000_02ED, "not responding";
    ISO_TOO_OLD = 0xE000_02EE, "isochronous request too old";
    ISO_TOO_NEW = 0xE000_02EF, "isochronous request too new";
    NOT_FOUND = 0xE000_02F0, "not found";
}

impl IOReturn {
    /// `Ok` for success, `Err(self)` for anything else.
    pub fn result(self) -> Result<(), IOReturn> {
        if self == IOReturn::SUCCESS { Ok(()) } else { Err(self) }
    }

    /// The number that crosses a boundary: `0` for `Ok`, the code for `Err`.
    pub fn code<T>(result: &Result<T, IOReturn>) -> i32 {
        result.as_ref().err().map_or(0, |err| err.0)
    }
}

impl fmt::Debug for IOReturn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({:#010x})", self.0),
            None => write!(f, "{:#010x}", self.0),
        }
    }
}

impl fmt::Display for IOReturn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text() {
            Some(text) => write!(f, "{text} ({:#010x})", self.0),
            None => write!(f, "unknown status {:#010x}", self.0),
        }
    }
}

impl std::error::Error for IOReturn {}

#[cfg(test)]
mod tests {
    use super::IOReturn;

    #[test]
    fn codes_keep_their_numbers_and_speak() {
        assert_eq!(IOReturn::BUSY.0 as u32, 0xE000_02D5);
        assert_eq!(IOReturn::BUSY.to_string(), "busy (0xe00002d5)");
        assert_eq!(IOReturn(7).to_string(), "unknown status 0x00000007");
    }
}
