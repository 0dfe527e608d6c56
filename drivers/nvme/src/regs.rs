//! Registers of a controller: NVM Express 1.4, section 3.1.

use iohost_driver::{register_bits, register_map};

/// How many doorbells the map has. Those beyond belong to queues that we do not make.
pub const DOORBELL_COUNT: u64 = 1024;

register_map! {
    /// The part of BAR 0 that is used; it has more where doorbells are far apart.
    pub struct Controller[0x2000] {
        0x0000 Ro CAP:  Capabilities,
        0x0008 Ro VS:   Version,
        0x0014 Rw CC:   Configuration,
        0x001c Ro CSTS: Status,
        0x0024 Rw AQA:  AdminSizes,
        0x0028 Rw ASQ:  u64,
        0x0030 Rw ACQ:  u64,
        0x1000 Wo DOORBELLS[DOORBELL_COUNT; 4]: u32,
    }
}

register_bits! {
    /// What the controller can do (section 3.1.1).
    pub struct Capabilities: u64 {
        /// The most entries of a queue, less one: `MQES`.
        fn most_entries = 0..=15;
        /// How long to wait for it, in units of 500 ms: `TO`.
        fn timeout = 24..=31;
        /// Doorbells are `4 << stride` bytes apart: `DSTRD`.
        fn doorbell_stride = 32..=35;
        /// It has the NVM command set: `CSS`, bit 0.
        const NVM_COMMANDS = 1 << 37;
        /// Its smallest page has `4096 << smallest_page` bytes: `MPSMIN`.
        fn smallest_page = 48..=51;
    }
}

register_bits! {
    /// The version of the specification it keeps to (section 3.1.2).
    pub struct Version: u32 {
        fn major = 16..=31;
        fn minor = 8..=15;
    }
}

register_bits! {
    /// What we set (section 3.1.5). Pages of 4096 bytes and the NVM command set are zeros.
    pub struct Configuration: u32 {
        const ENABLE = 0x1;
        /// Tells it that its power will go: `SHN`, normal.
        const SHUTDOWN = 1 << 14;
        /// Entries of 64 and of 16 bytes, as powers of two: `IOSQES`, `IOCQES`.
        const ENTRY_SIZES = 6 << 16 | 4 << 20;
    }
}

register_bits! {
    /// How it is (section 3.1.6).
    pub struct Status: u32 {
        const READY = 0x1;
        const FATAL = 0x2;
        /// 2 when a shutdown is complete: `SHST`.
        fn shutdown = 2..=3;
    }
}

register_bits! {
    /// Entries of the admin queues, less one each (section 3.1.8).
    pub struct AdminSizes: u32 {
        fn submission = 0..=11;
        fn completion = 16..=27;
    }
}

/// What a register of a device that is not there reads as.
pub const NOBODY: u32 = u32::MAX;
