//! Registers of the `edu` device. Source: QEMU, `docs/specs/edu.rst`.

use iohost_driver::{register_bits, register_map};

register_map! {
    /// BAR 0, 1 MiB. Below 0x80 the device answers 4-byte accesses only.
    pub struct Edu[0x10_0000] {
        0x00 Ro ID:          Id,
        0x08 Rw FACTORIAL:   u32,
        0x20 Rw STATUS:      Status,
        0x24 Ro IRQ_STATUS:  Cause,
        0x64 Wo IRQ_ACK:     Cause,
        0x80 Rw DMA_SOURCE:  u64,
        0x88 Rw DMA_TARGET:  u64,
        0x90 Rw DMA_COUNT:   u64,
        0x98 Rw DMA_COMMAND: DmaCommand,
    }
}

register_bits! {
    /// `0xMMmm00ed`: major and minor version, then the signature.
    pub struct Id: u32 {
        fn major = 24..=31;
        fn minor = 16..=23;
        fn signature = 0..=15;
    }
}

register_bits! {
    pub struct Status: u32 {
        const COMPUTING = 0x01;
        const INTERRUPT_WHEN_DONE = 0x80;
    }
}

register_bits! {
    /// Why the device interrupted. The factorial bit is `FACT_IRQ` in `hw/misc/edu.c`.
    pub struct Cause: u32 {
        const FACTORIAL = 0x001;
        const DMA = 0x100;
    }
}

register_bits! {
    pub struct DmaCommand: u64 {
        const START = 0x1;
        /// From the device's buffer to memory; without it, the other way.
        const TO_MEMORY = 0x2;
        const INTERRUPT_WHEN_DONE = 0x4;
    }
}

/// Where the device's own buffer of 4096 bytes is, as its DMA engine sees it.
pub const ONBOARD: u64 = 0x4_0000;

/// Address lines of the DMA engine (the default of QEMU's `dma_mask`).
pub const ADDRESS_BITS: u32 = 28;
