//! What a controller is like, and what it does wrong.

use std::collections::VecDeque;

/// What a controller is like. The default is that of a small, sound one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// I/O queue pairs it can have: 1 to 1024.
    pub io_queues: u16,
    /// The most entries of a queue (`CAP.MQES` + 1): 2 to 65535.
    pub queue_entries: u16,
    /// The longest transfer is `2^mdts` pages of 4096 bytes; 0 for no limit (`MDTS`).
    pub mdts: u8,
    /// Vectors of MSI-X: 0 to 256.
    pub msi_x_vectors: u16,
    /// Vectors of MSI: 0, or a power of two up to 32.
    pub msi_vectors: u8,
    /// Doorbells are `4 << doorbell_stride` bytes apart (`CAP.DSTRD`).
    pub doorbell_stride: u8,
    /// How long the host is to wait for the controller, in units of 500 ms (`CAP.TO`).
    pub ready_timeout: u8,
    /// Whether it takes `Doorbell Buffer Config`.
    pub shadow_doorbells: bool,
    /// Whether I/O commands can have SGLs.
    pub sgls: bool,
    /// Whether it takes write zeroes and dataset management.
    pub optional_commands: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            io_queues: 8,
            queue_entries: 1024,
            mdts: 7,
            msi_x_vectors: 9,
            msi_vectors: 0,
            doorbell_stride: 0,
            ready_timeout: 2,
            shadow_doorbells: false,
            sgls: false,
            optional_commands: true,
        }
    }
}

impl Options {
    /// Panics for what no controller can have.
    pub(super) fn check(&self) {
        assert!((1..=1024).contains(&self.io_queues), "{} I/O queue pairs", self.io_queues);
        assert!(self.queue_entries >= 2, "queues of {} entries", self.queue_entries);
        assert!(self.msi_x_vectors <= 256, "{} vectors of MSI-X", self.msi_x_vectors);
        let doorbells = (u64::from(self.io_queues) + 1) * 2 * (4 << self.doorbell_stride);
        let room = super::DOORBELLS_END - super::DOORBELLS;
        assert!(doorbells <= room, "{doorbells} bytes of doorbells, there is room for {room}");
    }
}

/// What a controller does wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// It was pulled out: reads give all ones, writes are lost.
    pub gone: bool,
    /// `CSTS.RDY` never becomes 1.
    pub never_ready: bool,
    /// `CSTS.RDY` never becomes 0.
    pub never_quiet: bool,
    /// A shutdown never comes to its end.
    pub never_shut_down: bool,
    /// What `CAP` reads instead of the truth.
    pub capabilities: Option<u64>,
    /// What `VS` reads instead of the truth.
    pub version: Option<u32>,
    /// Bytes of the identify controller structure, by offset.
    pub controller_bytes: Vec<(usize, Vec<u8>)>,
    /// Bytes of every identify namespace structure, by offset.
    pub namespace_bytes: Vec<(usize, Vec<u8>)>,
    /// The active namespace list instead of the truth.
    pub active_list: Option<Vec<u32>>,
    /// What set features, number of queues, answers instead of the truth.
    pub granted_queues: Option<u32>,
    /// The next so many admin commands are never completed.
    pub swallow_admin: u32,
    /// The next so many I/O commands are never completed.
    pub swallow_io: u32,
    /// What is [held](super::Nvme::hold_io) is completed while the controller is being disabled.
    pub completes_when_disabled: bool,
    /// `Abort` says that it did not abort.
    pub ignores_abort: bool,
    /// Admin commands with these opcodes fail with this status: code type and code.
    pub admin_status: Vec<(u8, u16)>,
    /// What is wrong with the next completions of I/O commands.
    pub lies: VecDeque<Lie>,
}

/// What is wrong with a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// It is for this command.
    CommandId(u16),
    /// It has this status: code in bits 7:0, code type in bits 10:8, do not retry in bit 14.
    Status(u16),
    /// The head of the submission queue is this.
    Head(u16),
    /// It comes from this submission queue.
    Queue(u16),
    /// It comes twice.
    Twice,
    /// These bytes come instead, whatever phase they have.
    Garbage([u8; 16]),
}
