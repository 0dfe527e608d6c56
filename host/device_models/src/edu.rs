//! QEMU's `edu` teaching device (PCI 1234:11e8).
//!
//! Sources: QEMU, `docs/specs/edu.rst` for what the registers mean, `hw/misc/edu.c` for what the
//! document leaves open; both as of 2025. BAR 0 is 1 MiB of memory:
//!
//! | Offset | | Register |
//! | --- | --- | --- |
//! | 0x00 | RO | identification, 0x010000ed |
//! | 0x04 | RW | liveness: reads back inverted |
//! | 0x08 | RW | factorial: the operand in, `n!` modulo 2^32 out |
//! | 0x20 | RW | status: bit 0 computing (RO), bit 7 interrupt when done |
//! | 0x24 | RO | interrupt status: why it interrupted |
//! | 0x60 | WO | raise: ORed into the interrupt status |
//! | 0x64 | WO | acknowledge: cleared from the interrupt status |
//! | 0x80 | RW | DMA source |
//! | 0x88 | RW | DMA destination |
//! | 0x90 | RW | DMA count in bytes |
//! | 0x98 | RW | DMA command: bit 0 start, bit 1 to memory, bit 2 interrupt 0x100 when done |
//!
//! DMA goes between memory and a buffer of 4096 bytes, which DMA addresses as 0x40000.
//!
//! What `edu.c` does and `edu.rst` does not say, and what is kept here, because drivers meet it:
//! - A reset leaves every register of BAR 0 as it was, a computation or transfer under way
//!   included; only configuration space is reset, which drops the INTx line. So a driver can
//!   find causes of its predecessor.
//! - An acknowledged interrupt lets the INTx line go only when no cause is left. By MSI, each
//!   raise sends one message, also for a cause that is set already.
//! - A DMA address has its bits above the 28th cut off; nobody is told.
//! - A command without its start bit is ignored, and so is every write to a DMA register while a
//!   transfer runs.
//! - A transfer that the IOMMU stops completes and interrupts as any other.
//! - A 4-byte write to a DMA register clears its upper half.
//! - Accesses of a wrong width: 1 or 2 bytes, or not aligned, read as zeros; 8 bytes below 0x80
//!   read as ones; no such write does anything. A read where no register is gives ones.
//!
//! # Known differences
//!
//! Each has a test of its number in `tests/edu_differences.rs`.
//!
//! 1. A transfer that leaves the buffer moves nothing, completes as usual, and is counted
//!    ([`Edu::rejected_transfers`]). QEMU up to 9 aborts, newer ones log it and move the bytes
//!    regardless of what lies behind the buffer.
//! 2. A transfer of the whole buffer (4096 bytes) works, as in newer QEMU; QEMU 7.2 aborts on it,
//!    being off by one. A driver for both keeps to less than 4096 bytes.
//! 3. The factorial takes at most 34 multiplications, as every larger one is 0 modulo 2^32; QEMU
//!    counts all the way down, four billion times for 0xffffffff.
//! 4. With [`Timing::Immediate`], and for DMA with [`Timing::Real`] of no time at all, the answer
//!    and its interrupt are there before the write that asked for them returns. On QEMU the
//!    writer can always see the device busy, a DMA lasts 100 ms of virtual time.
//! 5. The DMA mask is fixed at 28 bits; QEMU can be told another (`dma_mask=`).
//! 6. A transfer between accesses sees memory as it is at its end. QEMU does too; hardware reads
//!    it at any time in between.
//! 7. Differences of the function around it: see [`Function`](crate::Function).

use std::time::Duration;

use log::{debug, warn};

use crate::model::{BarSpec, Bus, DeviceModel, Identity};

const ID: u32 = 0x0100_00ed;
const BAR_SIZE: u32 = 0x10_0000;

const STATUS_COMPUTING: u32 = 0x01;
const STATUS_INTERRUPT_WHEN_DONE: u32 = 0x80;

const CAUSE_FACTORIAL: u32 = 0x001;
const CAUSE_DMA: u32 = 0x100;

const DMA_RUN: u64 = 0x1;
const DMA_TO_MEMORY: u64 = 0x2;
const DMA_INTERRUPT: u64 = 0x4;

const BUFFER: u64 = 0x40000;
const BUFFER_SIZE: usize = 4096;
const DMA_MASK: u64 = (1 << 28) - 1;

/// What [`Bus::call_after`] is asked for.
const FACTORIAL_DONE: u32 = 0;
const DMA_DONE: u32 = 1;

/// When the device is done with what it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timing {
    /// At once, within the write that asks.
    Immediate,
    /// When a test calls [`Edu::finish`].
    Manual,
    /// The factorial on a thread of its own, DMA after this time; QEMU takes 100 ms. DMA of no
    /// time is done within the write that asks.
    Real {
        /// How long a transfer takes.
        dma: Duration,
    },
}

/// The device.
#[derive(Debug)]
pub struct Edu {
    timing: Timing,
    liveness: u32,
    /// The operand while computing, else the result.
    factorial: u32,
    status: u32,
    causes: u32,
    dma_source: u64,
    dma_destination: u64,
    dma_count: u64,
    dma_command: u64,
    buffer: [u8; BUFFER_SIZE],
    rejected_transfers: u64,
}

impl Edu {
    /// An `edu` at power-on.
    pub fn new(timing: Timing) -> Self {
        Self {
            timing,
            liveness: 0,
            factorial: 0,
            status: 0,
            causes: 0,
            dma_source: 0,
            dma_destination: 0,
            dma_count: 0,
            dma_command: 0,
            buffer: [0; BUFFER_SIZE],
            rejected_transfers: 0,
        }
    }

    /// Completes what is under way: the factorial first, then the transfer.
    pub fn finish(&mut self, bus: &mut Bus<'_>) {
        self.finish_factorial(bus);
        self.finish_dma(bus);
    }

    /// Transfers that would have left the buffer, and moved nothing.
    pub fn rejected_transfers(&self) -> u64 {
        self.rejected_transfers
    }

    fn read(&self, offset: u64) -> u64 {
        match offset {
            0x00 => ID.into(),
            0x04 => self.liveness.into(),
            0x08 => self.factorial.into(),
            0x20 => self.status.into(),
            0x24 => self.causes.into(),
            0x80 => self.dma_source,
            0x88 => self.dma_destination,
            0x90 => self.dma_count,
            0x98 => self.dma_command,
            _ => u64::MAX,
        }
    }

    fn write(&mut self, bus: &mut Bus<'_>, offset: u64, value: u64) {
        let word = value as u32;
        let dma_runs = self.dma_command & DMA_RUN != 0;
        match offset {
            0x04 => self.liveness = !word,
            0x08 if self.status & STATUS_COMPUTING == 0 => self.start_factorial(bus, word),
            0x20 => {
                let kept = self.status & !STATUS_INTERRUPT_WHEN_DONE;
                self.status = kept | word & STATUS_INTERRUPT_WHEN_DONE;
            }
            0x60 => self.raise(bus, word),
            0x64 => self.acknowledge(bus, word),
            0x80 if !dma_runs => self.dma_source = value,
            0x88 if !dma_runs => self.dma_destination = value,
            0x90 if !dma_runs => self.dma_count = value,
            0x98 if !dma_runs && value & DMA_RUN != 0 => self.start_dma(bus, value),
            _ => {}
        }
    }

    fn start_factorial(&mut self, bus: &mut Bus<'_>, operand: u32) {
        self.factorial = operand;
        self.status |= STATUS_COMPUTING;
        match self.timing {
            Timing::Immediate => self.finish_factorial(bus),
            Timing::Manual => {}
            Timing::Real { .. } => bus.call_after(Duration::ZERO, FACTORIAL_DONE),
        }
    }

    fn finish_factorial(&mut self, bus: &mut Bus<'_>) {
        if self.status & STATUS_COMPUTING == 0 {
            return;
        }
        self.factorial = factorial(self.factorial);
        self.status &= !STATUS_COMPUTING;
        if self.status & STATUS_INTERRUPT_WHEN_DONE != 0 {
            self.raise(bus, CAUSE_FACTORIAL);
        }
    }

    fn start_dma(&mut self, bus: &mut Bus<'_>, command: u64) {
        self.dma_command = command;
        match self.timing {
            Timing::Immediate => self.finish_dma(bus),
            Timing::Manual => {}
            Timing::Real { dma } if dma.is_zero() => self.finish_dma(bus),
            Timing::Real { dma } => bus.call_after(dma, DMA_DONE),
        }
    }

    fn finish_dma(&mut self, bus: &mut Bus<'_>) {
        if self.dma_command & DMA_RUN == 0 {
            return;
        }
        match self.dma_command & DMA_TO_MEMORY {
            0 => self.transfer_from_memory(bus),
            _ => self.transfer_to_memory(bus),
        }
        self.dma_command &= !DMA_RUN;
        if self.dma_command & DMA_INTERRUPT != 0 {
            self.raise(bus, CAUSE_DMA);
        }
    }

    fn transfer_from_memory(&mut self, bus: &mut Bus<'_>) {
        if let Some(range) = self.in_buffer(self.dma_destination) {
            bus.dma_read(clamp(self.dma_source), &mut self.buffer[range]);
        }
    }

    fn transfer_to_memory(&mut self, bus: &mut Bus<'_>) {
        if let Some(range) = self.in_buffer(self.dma_source) {
            bus.dma_write(clamp(self.dma_destination), &self.buffer[range]);
        }
    }

    /// Which bytes of the buffer a transfer at `address` means, if it stays inside.
    fn in_buffer(&mut self, address: u64) -> Option<std::ops::Range<usize>> {
        let count = self.dma_count;
        let start = address.checked_sub(BUFFER);
        let end = start.and_then(|start| start.checked_add(count));
        match (start, end) {
            (Some(start), Some(end)) if end <= BUFFER_SIZE as u64 => {
                Some(start as usize..end as usize)
            }
            _ => {
                self.rejected_transfers += 1;
                if self.rejected_transfers.is_power_of_two() {
                    let rejected = self.rejected_transfers;
                    warn!(address, count, rejected; "an edu transfer leaves the buffer");
                }
                None
            }
        }
    }

    fn raise(&mut self, bus: &mut Bus<'_>, causes: u32) {
        self.causes |= causes;
        if self.causes == 0 {
            return;
        }
        match bus.msi_enabled() {
            true => bus.send_msi(0),
            false => bus.assert_intx(),
        }
    }

    fn acknowledge(&mut self, bus: &mut Bus<'_>, causes: u32) {
        self.causes &= !causes;
        if self.causes == 0 && !bus.msi_enabled() {
            bus.deassert_intx();
        }
    }
}

impl DeviceModel for Edu {
    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x1234,
            device: 0x11e8,
            // What QEMU gives every device that has no subsystem of its own.
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            class: 0x00_ff00,
            revision: 0x10,
            bars: [Some(BarSpec { size: BAR_SIZE }), None, None, None, None, None],
            intx: true,
            msi_vectors: 1,
            msi_x: None,
        }
    }

    fn bar_read(&mut self, _bus: &mut Bus<'_>, _bar: u8, offset: u64, data: &mut [u8]) {
        match Access::of(offset, data.len()) {
            Access::Whole => {
                let value = self.read(offset).to_le_bytes();
                data.copy_from_slice(&value[..data.len()]);
            }
            Access::TooWide => data.fill(0xff),
            Access::Malformed => data.fill(0),
        }
    }

    fn bar_write(&mut self, bus: &mut Bus<'_>, _bar: u8, offset: u64, data: &[u8]) {
        if Access::of(offset, data.len()) == Access::Whole {
            let mut value = [0; 8];
            value[..data.len()].copy_from_slice(data);
            self.write(bus, offset, u64::from_le_bytes(value));
        }
    }

    fn time_has_come(&mut self, bus: &mut Bus<'_>, what: u32) {
        match what {
            FACTORIAL_DONE => self.finish_factorial(bus),
            _ => self.finish_dma(bus),
        }
    }

    /// Nothing: QEMU's device has no reset of its own.
    fn reset(&mut self, _bus: &mut Bus<'_>) {}
}

/// What the device makes of the width and place of an access.
#[derive(PartialEq)]
enum Access {
    Whole,
    /// 8 bytes where it takes 4.
    TooWide,
    /// Never reaches the device: QEMU's memory core sorts these out.
    Malformed,
}

impl Access {
    fn of(offset: u64, len: usize) -> Self {
        match len {
            4 | 8 if !offset.is_multiple_of(len as u64) => Access::Malformed,
            8 if offset < 0x80 => Access::TooWide,
            4 | 8 => Access::Whole,
            _ => Access::Malformed,
        }
    }
}

fn factorial(operand: u32) -> u32 {
    let mut product = 1u32;
    for factor in 1..=operand {
        product = product.wrapping_mul(factor);
        if product == 0 {
            break; // and stays so
        }
    }
    product
}

fn clamp(address: u64) -> u64 {
    let clamped = address & DMA_MASK;
    if clamped != address {
        debug!(address, clamped; "an edu dma address was cut to 28 bits");
    }
    clamped
}
