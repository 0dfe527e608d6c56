//! Entries of queues: commands (section 4.2), completions and their status (section 4.6).

/// A submission queue entry, as far as it is used.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command {
    pub(super) opcode: u8,
    /// Fused operation and PRP or SGL: bits 15:8.
    flags: u8,
    pub(super) id: u16,
    pub(super) nsid: u32,
    /// The data pointer: two PRP entries, or an SGL descriptor.
    pub(super) data: (u64, u64),
    /// Command dwords 10 to 15.
    pub(super) dwords: [u32; 6],
}

/// The data pointer is an SGL descriptor: bits 15:14 of dword 0.
const SGL: u8 = 0x40;

impl Command {
    pub(super) fn from_bytes(entry: &[u8; 64]) -> Self {
        let dword = |at: usize| {
            u32::from_le_bytes(entry[at * 4..at * 4 + 4].try_into().expect("four bytes"))
        };
        let qword = |at: usize| u64::from(dword(at)) | u64::from(dword(at + 1)) << 32;
        Self {
            opcode: entry[0],
            flags: entry[1],
            id: (dword(0) >> 16) as u16,
            nsid: dword(1),
            data: (qword(6), qword(8)),
            dwords: [10, 11, 12, 13, 14, 15].map(dword),
        }
    }

    /// Command dword 10 to 15.
    pub(super) fn dword(&self, number: usize) -> u32 {
        self.dwords[number - 10]
    }

    /// Refuses what the controller does not do: fused commands, and SGLs where it takes none.
    pub(super) fn check_flags(&self, takes_sgls: bool) -> Result<(), Status> {
        let known = if takes_sgls { SGL } else { 0 };
        if self.flags & 0xc3 & !known == 0 { Ok(()) } else { Err(Status::INVALID_FIELD) }
    }

    pub(super) fn has_sgl(&self) -> bool {
        self.flags & SGL != 0
    }
}

/// A completion queue entry, without its phase.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    /// Command specific: dword 0.
    pub(super) result: u32,
    /// The head of the submission queue.
    pub(super) head: u16,
    pub(super) queue: u16,
    pub(super) id: u16,
    pub(super) status: Status,
}

impl Completion {
    pub(super) fn to_bytes(self, phase: bool) -> [u8; 16] {
        let mut entry = [0; 16];
        entry[0..4].copy_from_slice(&self.result.to_le_bytes());
        entry[8..10].copy_from_slice(&self.head.to_le_bytes());
        entry[10..12].copy_from_slice(&self.queue.to_le_bytes());
        entry[12..14].copy_from_slice(&self.id.to_le_bytes());
        let status = self.status.0 << 1 | u16::from(phase);
        entry[14..16].copy_from_slice(&status.to_le_bytes());
        entry
    }
}

/// The status field without the phase: code in bits 7:0, code type in bits 10:8, "do not retry" in
/// bit 14 (section 4.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status(u16);

const DO_NOT_RETRY: u16 = 1 << 14;

impl Status {
    pub(super) const SUCCESS: Self = Self(0);
    pub(super) const INVALID_OPCODE: Self = Self(0x001 | DO_NOT_RETRY);
    pub(super) const INVALID_FIELD: Self = Self(0x002 | DO_NOT_RETRY);
    pub(super) const INTERNAL_ERROR: Self = Self(0x006);
    pub(super) const ABORT_REQUESTED: Self = Self(0x007);
    pub(super) const INVALID_NAMESPACE: Self = Self(0x00b | DO_NOT_RETRY);
    pub(super) const SGL_SEGMENT_INVALID: Self = Self(0x00d | DO_NOT_RETRY);
    pub(super) const SGL_COUNT_INVALID: Self = Self(0x00e | DO_NOT_RETRY);
    pub(super) const SGL_LENGTH_INVALID: Self = Self(0x00f | DO_NOT_RETRY);
    pub(super) const SGL_TYPE_INVALID: Self = Self(0x011 | DO_NOT_RETRY);
    pub(super) const PRP_OFFSET_INVALID: Self = Self(0x013 | DO_NOT_RETRY);
    pub(super) const WRITE_PROTECTED: Self = Self(0x020 | DO_NOT_RETRY);
    pub(super) const OUT_OF_RANGE: Self = Self(0x080 | DO_NOT_RETRY);
    pub(super) const COMPLETION_QUEUE_INVALID: Self = Self(0x100 | DO_NOT_RETRY);
    pub(super) const INVALID_QUEUE_ID: Self = Self(0x101 | DO_NOT_RETRY);
    pub(super) const INVALID_QUEUE_SIZE: Self = Self(0x102 | DO_NOT_RETRY);
    pub(super) const EVENT_REQUEST_LIMIT: Self = Self(0x105 | DO_NOT_RETRY);
    pub(super) const INVALID_VECTOR: Self = Self(0x108 | DO_NOT_RETRY);
    pub(super) const INVALID_LOG_PAGE: Self = Self(0x109 | DO_NOT_RETRY);
    pub(super) const INVALID_QUEUE_DELETION: Self = Self(0x10c | DO_NOT_RETRY);
    pub(super) const WRITE_FAULT: Self = Self(0x280);
    pub(super) const UNRECOVERED_READ: Self = Self(0x281);

    pub(super) fn from_bits(bits: u16) -> Self {
        Self(bits & 0x7fff)
    }

    pub(super) fn bits(self) -> u16 {
        self.0
    }
}
