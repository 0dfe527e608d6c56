//! What an `edu` device can do for a client.

#![forbid(unsafe_code)]

iohost_interface::interface! {
    /// A device that computes factorials and copies memory.
    pub interface edu;

    methods {
        /// Computes `n!` on the device, modulo 2^32.
        0 => fn factorial(n: u32) -> u32 [idempotent];

        /// Sends 1 to [`LONGEST_ENTRY`] bytes through the device's own memory, by DMA both ways.
        1 => fn dma_round_trip(data: Vec<u8>) -> Vec<u8> [idempotent];

        /// Ticks of the driver's 10 ms timer since it started.
        2 => fn ticks() -> u64 [idempotent];
    }

    queues {
        /// Entries of 1 to [`LONGEST_ENTRY`] bytes, each sent through the device. One of any other
        /// length comes back empty.
        0 => UPLOAD: ToDriver;

        /// The same entries, in the same order, on their way back: each exactly once, also when the
        /// driver dies and is started again meanwhile.
        1 => DOWNLOAD: ToClient;
    }
}

/// The longest entry in bytes: QEMU's device ends its process at a transfer of its whole 4096
/// bytes (an off-by-one in its bounds check, seen in version 7.2), so half of them are used.
pub const LONGEST_ENTRY: usize = 2048;
