//! Entries of the data queues. All numbers are little endian.

use std::fmt;

/// Bytes of a request.
pub const REQUEST_LENGTH: usize = 48;

/// The most bytes of a completion: its words are cut to fit.
pub const LONGEST_COMPLETION: usize = 12 + 180;

/// What a client wants of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's own number, which the completion has too.
    pub tag: u64,
    /// What to do.
    pub operation: Operation,
    /// The driver looks for the end by itself instead of waiting for an interrupt, and whoever waits
    /// for it does: sooner, and at the price of a processor for each meanwhile. For a driver that
    /// cannot, it means nothing.
    pub is_polled: bool,
    /// The memory with the bytes; of no meaning without bytes.
    pub memory: u16,
    /// The disk.
    pub disk: u32,
    /// The first byte on the disk: a multiple of its block size.
    pub offset: u64,
    /// Bytes: a multiple of the disk's block size, not zero. Of no meaning for a flush.
    pub length: u64,
    /// Where in the memory the first byte is: a multiple of 4.
    pub at: u64,
    /// The session's generation, as the client knew it. A driver refuses a request of another one,
    /// which was meant for the driver before it: see the crate's documentation.
    pub generation: u64,
}

/// What can be done to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// From the disk into memory.
    Read = 0,
    /// From memory to the disk; on the medium after a flush.
    Write = 1,
    /// From memory to the disk, on the medium when it is complete.
    WriteThrough = 2,
    /// What has completed gets onto the medium.
    Flush = 3,
    /// The bytes are not needed any more. What they read as afterwards is not known.
    Discard = 4,
    /// The bytes read as zeros afterwards.
    WriteZeroes = 5,
}

/// Bytes that are no request or completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The tag, if there are bytes of one; else zero.
    pub tag: u64,
}

impl Request {
    /// Puts it into its encoding.
    #[inline]
    pub fn to_bytes(&self) -> [u8; REQUEST_LENGTH] {
        let mut bytes = [0; REQUEST_LENGTH];
        bytes[0..8].copy_from_slice(&self.tag.to_le_bytes());
        bytes[8] = self.operation as u8;
        bytes[9] = u8::from(self.is_polled);
        bytes[10..12].copy_from_slice(&self.memory.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.disk.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.length.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.at.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.generation.to_le_bytes());
        bytes
    }

    /// Takes it from its encoding, which anybody may have written.
    #[inline]
    pub fn from_bytes(bytes: &[u8; REQUEST_LENGTH]) -> Result<Self, Malformed> {
        let tag = u64_at(bytes, 0);
        let operation = match bytes[8] {
            0 => Operation::Read,
            1 => Operation::Write,
            2 => Operation::WriteThrough,
            3 => Operation::Flush,
            4 => Operation::Discard,
            5 => Operation::WriteZeroes,
            _ => return Err(Malformed { tag }),
        };
        let is_polled = match bytes[9] {
            0 => false,
            1 => true,
            _ => return Err(Malformed { tag }),
        };
        Ok(Self {
            tag,
            operation,
            is_polled,
            memory: u16::from_le_bytes([bytes[10], bytes[11]]),
            disk: u32_at(bytes, 12),
            offset: u64_at(bytes, 16),
            length: u64_at(bytes, 24),
            at: u64_at(bytes, 32),
            generation: u64_at(bytes, 40),
        })
    }
}

impl Operation {
    /// Whether bytes go between memory and disk.
    #[inline]
    pub fn has_data(self) -> bool {
        matches!(self, Operation::Read | Operation::Write | Operation::WriteThrough)
    }

    /// Whether a disk that is read only refuses it.
    #[inline]
    pub fn changes_the_disk(self) -> bool {
        !matches!(self, Operation::Read | Operation::Flush)
    }
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The request's.
    pub tag: u64,
    /// Whether it was done.
    pub outcome: Result<(), Failure>,
}

/// Why a request was not done, or not wholly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The kind, for programs.
    pub status: Status,
    /// What happened, for people.
    pub words: String,
}

/// What kind of thing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Status {
    /// The entry is no request.
    Malformed = 1,
    /// There is no disk of that number, or not any more.
    NoSuchDisk = 2,
    /// Some of the bytes are beyond the end of the disk.
    OutOfRange = 3,
    /// Offset or length is no whole number of blocks, or the place in memory no multiple of 4.
    NotAligned = 4,
    /// The disk can be read only.
    ReadOnly = 5,
    /// The session has no such memory, or the bytes are not inside of it.
    NoSuchMemory = 6,
    /// The disk cannot do that.
    Unsupported = 7,
    /// The medium has lost the bytes, or does not take them.
    Medium = 8,
    /// The device failed otherwise.
    Device = 9,
    /// The device did not do it in its time, nor after it was reset.
    NotResponding = 10,
    /// The device is not there any more.
    Gone = 11,
    /// It is of another generation of the session, and was not done.
    Stale = 12,
}

impl Status {
    fn from_number(number: u32) -> Option<Self> {
        const ALL: [Status; 12] = [
            Status::Malformed,
            Status::NoSuchDisk,
            Status::OutOfRange,
            Status::NotAligned,
            Status::ReadOnly,
            Status::NoSuchMemory,
            Status::Unsupported,
            Status::Medium,
            Status::Device,
            Status::NotResponding,
            Status::Gone,
            Status::Stale,
        ];
        ALL.into_iter().find(|status| *status as u32 == number)
    }

    /// The kind in words.
    pub fn text(self) -> &'static str {
        match self {
            Status::Malformed => "no request",
            Status::NoSuchDisk => "no such disk",
            Status::OutOfRange => "beyond the end of the disk",
            Status::NotAligned => "not aligned",
            Status::ReadOnly => "the disk is read only",
            Status::NoSuchMemory => "no such memory",
            Status::Unsupported => "not supported",
            Status::Medium => "medium error",
            Status::Device => "device error",
            Status::NotResponding => "the device does not respond",
            Status::Gone => "the device is gone",
            Status::Stale => "meant for the driver before this one",
        }
    }
}

impl Failure {
    /// A failure with words.
    pub fn new(status: Status, words: impl Into<String>) -> Self {
        Self { status, words: words.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.words.as_str() {
            "" => f.write_str(self.status.text()),
            words => write!(f, "{}: {words}", self.status.text()),
        }
    }
}

impl std::error::Error for Failure {}

impl Completion {
    /// The encoding of one that is done.
    #[inline]
    pub fn done(tag: u64) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[0..8].copy_from_slice(&tag.to_le_bytes());
        bytes
    }

    /// The encoding of one that failed.
    pub fn failed(tag: u64, failure: &Failure) -> Vec<u8> {
        let mut bytes = Self::done(tag).to_vec();
        bytes[8..12].copy_from_slice(&(failure.status as u32).to_le_bytes());
        let words = &failure.words;
        let most = words.floor_char_boundary(LONGEST_COMPLETION - bytes.len());
        bytes.extend_from_slice(&words.as_bytes()[..most]);
        bytes
    }

    /// Takes it from its encoding, which anybody may have written.
    #[inline]
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.len() < 12 {
            return Err(Malformed { tag: 0 });
        }
        let tag = u64_at(bytes, 0);
        let outcome = match u32_at(bytes, 8) {
            0 => Ok(()),
            number => {
                let status = Status::from_number(number).ok_or(Malformed { tag })?;
                let words = String::from_utf8_lossy(&bytes[12..]).into_owned();
                Err(Failure { status, words })
            }
        };
        Ok(Self { tag, outcome })
    }
}

#[inline]
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[inline]
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_comes_back_as_it_went_and_no_other_bytes_are_one() {
        let request = Request {
            tag: u64::MAX - 1,
            operation: Operation::WriteZeroes,
            is_polled: true,
            memory: 7,
            disk: 0x0102_0304,
            offset: 1 << 60,
            length: 4096,
            at: 512,
            generation: 3,
        };
        let bytes = request.to_bytes();
        assert_eq!(Request::from_bytes(&bytes), Ok(request));
        for (at, value) in [(8, 6), (8, 255), (9, 2)] {
            let mut wrong = bytes;
            wrong[at] = value;
            assert_eq!(Request::from_bytes(&wrong), Err(Malformed { tag: u64::MAX - 1 }));
        }
    }

    #[test]
    fn a_completion_comes_back_as_it_went_with_its_words_cut_on_a_letter() {
        let done = Completion { tag: 5, outcome: Ok(()) };
        assert_eq!(Completion::from_bytes(&Completion::done(5)), Ok(done));
        let failure = Failure::new(Status::Medium, "é".repeat(200));
        let bytes = Completion::failed(6, &failure);
        assert!(bytes.len() <= LONGEST_COMPLETION);
        let outcome = Completion::from_bytes(&bytes).unwrap().outcome.unwrap_err();
        assert_eq!((outcome.status, outcome.words), (Status::Medium, "é".repeat(90)));
        assert_eq!(Completion::from_bytes(&[0; 11]), Err(Malformed { tag: 0 }));
        let mut unknown = Completion::done(9);
        unknown[8] = 99;
        assert_eq!(Completion::from_bytes(&unknown), Err(Malformed { tag: 9 }));
    }
}
