//! What the status of a completion means: NVM Express 1.4, section 4.6.1.

use std::fmt;

use block_api::Status;

/// The status field of a completion that says anything but success, without its phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandError(pub u16);

impl CommandError {
    fn code_type(self) -> u8 {
        (self.0 >> 8 & 7) as u8
    }

    fn code(self) -> u8 {
        self.0 as u8
    }

    /// Whether the same command could succeed later. The controller says that in a bit, which is
    /// heeded for what it may have been itself; an error of the medium stays one.
    pub fn may_pass(self) -> bool {
        const DO_NOT_RETRY: u16 = 1 << 14;
        let passes = match (self.code_type(), self.code()) {
            (0, 0x00..=0x7f) | (0, 0x82..=0x83) => true, // generic; namespace not ready
            (3, _) => true,                              // the path to the namespace
            _ => false,
        };
        passes && self.0 & DO_NOT_RETRY == 0
    }

    /// The kind of failure that a client is told.
    pub fn kind(self) -> Status {
        match (self.code_type(), self.code()) {
            (0, 0x0b) => Status::NoSuchDisk,
            (0, 0x01) => Status::Unsupported,
            (0, 0x20) | (1, 0x82) => Status::ReadOnly,
            (0, 0x80) => Status::OutOfRange,
            (0, 0x07) => Status::NotResponding, // aborted: by us, as it took too long
            (2, _) => Status::Medium,
            _ => Status::Device,
        }
    }

    fn words(self) -> &'static str {
        match (self.code_type(), self.code()) {
            (0, 0x01) => "invalid command opcode",
            (0, 0x02) => "invalid field in command",
            (0, 0x03) => "command id conflict",
            (0, 0x04) => "data transfer error",
            (0, 0x05) => "aborted due to power loss",
            (0, 0x06) => "internal error",
            (0, 0x07) => "command abort requested",
            (0, 0x08) => "aborted due to submission queue deletion",
            (0, 0x0b) => "invalid namespace or format",
            (0, 0x0c) => "command sequence error",
            (0, 0x13) => "PRP offset invalid",
            (0, 0x20) => "namespace is write protected",
            (0, 0x80) => "LBA out of range",
            (0, 0x81) => "capacity exceeded",
            (0, 0x82) => "namespace not ready",
            (0, 0x84) => "format in progress",
            (1, 0x00) => "completion queue invalid",
            (1, 0x01) => "invalid queue identifier",
            (1, 0x02) => "invalid queue size",
            (1, 0x03) => "abort command limit exceeded",
            (1, 0x05) => "asynchronous event request limit exceeded",
            (1, 0x08) => "invalid interrupt vector",
            (1, 0x09) => "invalid log page",
            (1, 0x80) => "conflicting attributes",
            (1, 0x82) => "attempted write to read only range",
            (2, 0x80) => "write fault",
            (2, 0x81) => "unrecovered read error",
            (2, 0x82) => "end-to-end guard check error",
            (2, 0x85) => "compare failure",
            (2, 0x86) => "access denied",
            (2, 0x87) => "deallocated or unwritten block",
            (3, _) => "path related error",
            (7, _) => "vendor specific error",
            _ => "a status that the specification does not have",
        }
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (status {:x}h/{:02x}h)", self.words(), self.code_type(), self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_sorted_by_what_a_client_can_do_about_it() {
        for (status, kind, may_pass) in [
            (0x00b, Status::NoSuchDisk, true),
            (0x400b, Status::NoSuchDisk, false),
            (0x006, Status::Device, true),
            (0x080, Status::OutOfRange, false),
            (0x281, Status::Medium, false),
            (0x120, Status::Device, false),
            (0x5ff, Status::Device, false),
        ] {
            let error = CommandError(status);
            assert_eq!((error.kind(), error.may_pass()), (kind, may_pass), "{error}");
        }
        assert_eq!(CommandError(0x281).to_string(), "unrecovered read error (status 2h/81h)");
        assert!(CommandError(0x4ff).to_string().starts_with("a status that the specification"));
    }
}
