//! What a disk can do for a client, whatever its driver.
//!
//! A client reads and writes by putting a [`Request`] into one data queue and taking its
//! [`Completion`] from the other. The bytes are in memory that both have: the client maps it
//! (`Session::map_memory` with [`memory_type`]), and the driver has it mapped for its device, once.
//! So nothing is copied between the client's memory and the disk.
//!
//! # Order, and what a flush means
//!
//! Requests under way at the same time are done in any order, also those of one client. Who needs
//! one before another waits for its completion. After a flush has completed, everything that had
//! completed before the flush was sent is on the medium, and outlasts a loss of power.
//!
//! # When the driver is started again
//!
//! The session goes on, under the next generation, and what is in the data queues stays there. What
//! the dead driver had taken and not answered is lost, and nobody knows whether it was done. All
//! operations have the same effect done once or twice, as long as nobody else writes there, so the
//! client sends again what it has no completion of, in this order:
//!
//! 1. It takes all completions that are there: those of the dead driver.
//! 2. It maps its memory again, which is another one, and puts the bytes of its writes there.
//! 3. It sends what is left under the new generation. The next driver refuses everything of the old
//!    one as [`Status::Stale`], so that nothing is done late and twice.
//!
//! What had completed stays so: a driver that starts again takes no power away from the disk, so
//! flushes keep their meaning across it. `iohost_block` does all of this.

#![forbid(unsafe_code)]

mod disk;
mod request;

pub use disk::{Disk, Health};
pub use request::{
    Completion, Failure, LONGEST_COMPLETION, Malformed, Operation, REQUEST_LENGTH, Request, Status,
};

iohost_interface::interface! {
    /// Disks: runs of blocks that can be read and written.
    pub interface block;

    methods {
        /// The numbers of the disks there are, in ascending order, 4 bytes each, little endian.
        ///
        /// Fails with `NOT_RESPONDING` when the device does not work.
        0 => fn disks() -> Vec<u8> [idempotent];

        /// A disk: a [`Disk`] in its encoding. Fails with `NOT_FOUND` when there is none of that
        /// number.
        1 => fn describe(disk: u32) -> Vec<u8> [idempotent];

        /// How the device is: a [`Health`] in its encoding. Fails with `UNSUPPORTED` when it
        /// cannot tell.
        2 => fn health() -> Vec<u8> [idempotent];
    }

    queues {
        /// A [`Request`] each.
        0 => REQUESTS: ToDriver;

        /// A [`Completion`] each, in the order in which requests were done.
        1 => COMPLETIONS: ToClient;
    }
}

/// Which memory a client maps: the session's number `memory`, of `bytes` bytes. Each number leads
/// to one memory, whose size is that of the first time. A request names it by the number alone.
///
/// A driver refuses sizes that are no multiple of 4096, numbers from [`MOST_MEMORIES`] on, and what
/// is more than [`MOST_MEMORY`] for all memories of a session together.
pub fn memory_type(memory: u16, bytes: u64) -> u64 {
    u64::from(memory) << 48 | bytes & ((1 << 48) - 1)
}

/// The number and the size that [`memory_type`] put together.
pub fn memory_of_type(memory_type: u64) -> (u16, u64) {
    ((memory_type >> 48) as u16, memory_type & ((1 << 48) - 1))
}

/// Memory of as many bytes, or a multiple, begins at a multiple for the device: where the kernel has
/// huge pages behind it (`shmem_enabled`; Linux, `Documentation/admin-guide/mm/transhuge.rst`), an
/// IOMMU needs one entry for each instead of 512.
pub const HUGE_PAGE: u64 = 2 << 20;

/// The most bytes of a session's memories, taken together.
pub const MOST_MEMORY: u64 = 256 << 20;

/// The most memories of a session: their numbers are below this.
pub const MOST_MEMORIES: u16 = 64;
