//! Commands and completions: NVM Express 1.4, sections 4.2 and 4.6.

/// Opcodes of the admin command set (figure 139).
pub mod admin {
    pub const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const CREATE_COMPLETION_QUEUE: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const ASYNCHRONOUS_EVENT_REQUEST: u8 = 0x0c;
    pub const DOORBELL_BUFFER_CONFIG: u8 = 0x7c;
}

/// Opcodes of the NVM command set (figure 346).
pub mod io {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// Bytes of a command.
pub const COMMAND: usize = 64;
/// Bytes of a completion.
pub const COMPLETION: usize = 16;

/// A command, but for its identifier, which its queue gives it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Command {
    pub opcode: u8,
    pub namespace: u32,
    /// The data pointer: two PRP entries, or an entry and the address of a list; or an SGL descriptor.
    pub data: (u64, u64),
    pub has_sgl: bool,
    /// Command dwords 10 to 13.
    pub dwords: [u32; 4],
}

impl Command {
    #[inline]
    pub fn to_bytes(self, id: u16) -> [u8; COMMAND] {
        let mut entry = [0; COMMAND];
        entry[0] = self.opcode;
        entry[1] = if self.has_sgl { 1 << 6 } else { 0 };
        entry[2..4].copy_from_slice(&id.to_le_bytes());
        entry[4..8].copy_from_slice(&self.namespace.to_le_bytes());
        entry[24..32].copy_from_slice(&self.data.0.to_le_bytes());
        entry[32..40].copy_from_slice(&self.data.1.to_le_bytes());
        let [a, b, c, d] = self.dwords;
        entry[40..44].copy_from_slice(&a.to_le_bytes());
        entry[44..48].copy_from_slice(&b.to_le_bytes());
        entry[48..52].copy_from_slice(&c.to_le_bytes());
        entry[52..56].copy_from_slice(&d.to_le_bytes());
        entry
    }
}

/// The SGL descriptor of bytes that the controller finds in one place: a data block (section 4.4.1).
#[inline]
pub fn data_block(address: u64, length: u32) -> (u64, u64) {
    // Its type, in the last byte, is 0.
    (address, length.into())
}

/// A completion, as it was found. None of it is believed yet.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// Dword 0, which each command gives its own meaning.
    pub result: u32,
    /// Which command it is for.
    pub id: u16,
    /// Code, code type, "do not retry": bits 15:1 of the last word, without the phase.
    pub status: u16,
}
