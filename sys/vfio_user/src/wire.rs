//! Numbers and layouts of the protocol. All values are in the byte order of the machine: client
//! and server share it (specification, "Protocol Specification").

use std::fmt;

/// What a message asks for (specification, "Commands").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Agreement on version and limits, always first.
    Version = 1,
    /// The server may use memory at an address.
    DmaMap = 2,
    /// The server may no longer use it.
    DmaUnmap = 3,
    /// Kind of device, number of regions and interrupt kinds.
    DeviceInfo = 4,
    /// Size, rights and mappable areas of one region.
    RegionInfo = 5,
    /// Number and kind of the vectors of one interrupt index.
    IrqInfo = 7,
    /// Enables, disables, unmasks.
    SetIrqs = 8,
    /// Reads device registers or configuration space.
    RegionRead = 9,
    /// Writes them.
    RegionWrite = 10,
    /// From the server: read the client's memory.
    DmaRead = 11,
    /// From the server: write the client's memory.
    DmaWrite = 12,
    /// Reset.
    DeviceReset = 13,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Command::Version => "version",
            Command::DmaMap => "dma map",
            Command::DmaUnmap => "dma unmap",
            Command::DeviceInfo => "device info",
            Command::RegionInfo => "region info",
            Command::IrqInfo => "interrupt info",
            Command::SetIrqs => "set interrupts",
            Command::RegionRead => "region read",
            Command::RegionWrite => "region write",
            Command::DmaRead => "dma read",
            Command::DmaWrite => "dma write",
            Command::DeviceReset => "device reset",
        })
    }
}

/// Bytes of the header before every message.
pub(crate) const HEADER: usize = 16;

const TYPE_MASK: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// The header before every message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) id: u16,
    pub(crate) command: u16,
    /// Bytes of the whole message, header included.
    pub(crate) size: u32,
    pub(crate) flags: u32,
    pub(crate) errno: u32,
}

impl Header {
    pub(crate) fn request(id: u16, command: Command, payload: usize) -> Self {
        let size = (HEADER + payload) as u32;
        Self { id, command: command as u16, size, flags: TYPE_COMMAND, errno: 0 }
    }

    pub(crate) fn reply_to(request: &Header, payload: usize) -> Self {
        let size = (HEADER + payload) as u32;
        Self { size, flags: TYPE_REPLY, errno: 0, ..*request }
    }

    pub(crate) fn error_reply_to(request: &Header, errno: i32) -> Self {
        let flags = TYPE_REPLY | ERROR;
        Self { size: HEADER as u32, flags, errno: errno as u32, ..*request }
    }

    pub(crate) fn is_command(&self) -> bool {
        self.flags & TYPE_MASK == TYPE_COMMAND
    }

    pub(crate) fn is_reply(&self) -> bool {
        self.flags & TYPE_MASK == TYPE_REPLY
    }

    pub(crate) fn is_error(&self) -> bool {
        self.flags & ERROR != 0
    }

    pub(crate) fn wants_no_reply(&self) -> bool {
        self.flags & NO_REPLY != 0
    }

    pub(crate) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..2].copy_from_slice(&self.id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.command.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.size.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.errno.to_ne_bytes());
        bytes
    }

    /// Takes the header from the start of `bytes`, which has at least [`HEADER`] of them.
    pub(crate) fn decode(bytes: &[u8]) -> Self {
        Self {
            id: u16_at(bytes, 0),
            command: u16_at(bytes, 2),
            size: u32_at(bytes, 4),
            flags: u32_at(bytes, 8),
            errno: u32_at(bytes, 12),
        }
    }
}

/// The longest request we send, header included: the version message, with room to spare.
const LONGEST_REQUEST: usize = 192;

/// A request under construction, on the stack: a register access allocates nothing.
pub(crate) struct Request {
    bytes: [u8; LONGEST_REQUEST],
    len: usize,
    pub(crate) command: Command,
}

impl Request {
    pub(crate) fn new(command: Command) -> Self {
        Self { bytes: [0; LONGEST_REQUEST], len: HEADER, command }
    }

    pub(crate) fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends bytes. Panics past [`LONGEST_REQUEST`]: the lengths are ours, never a peer's.
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }

    /// The whole message, with its header filled in.
    pub(crate) fn finish(&mut self, id: u16) -> &[u8] {
        let header = Header::request(id, self.command, self.len - HEADER);
        self.bytes[..HEADER].copy_from_slice(&header.encode());
        &self.bytes[..self.len]
    }
}

/// Reads a field of a message whose length was checked before.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let mut field = [0; 2];
    field.copy_from_slice(&bytes[at..at + 2]);
    u16::from_ne_bytes(field)
}

/// As [`u16_at`].
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(field)
}

/// As [`u16_at`].
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(field)
}
