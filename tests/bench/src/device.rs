//! What reaching a device costs: its registers, and giving it memory.
//!
//! Registers are counted in instructions, one by one with `ptrace(2)`, which needs no rights and no
//! tool. The peer is a load or store of an atomic word, relaxed: the instruction that a volatile
//! access is too, without anything of ours around it.
//!
//! Memory of an arena is prepared and completed without a system call. What it is to be compared
//! with is a pair of VFIO's map and unmap calls, for which there has to be a device behind an
//! IOMMU; `scripts/vm dma-cost` does that. Here the peer is what no such pair can be cheaper than:
//! two system calls that do nothing.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Instant;

use anyhow::{Context, Result};
use iohost_driver::{
    Bar, DmaArena, DmaArenaOptions, IODMACommand, IOPCIDevice, MapWindow, MemoryDirection,
    register_map,
};
use iohost_memory::SharedMemory;
use nix::unistd::getppid;

use crate::driver;
use crate::instructions::{self, counted};
use crate::rounds::{Better, Case, Effort, Metric, Peer, Side};

const MAPPED: &str = "device-registers";
const BAR: &str = "device-registers-of-a-bar";

pub const CASES: &[Case] = &[
    Case {
        bench: "device",
        name: MAPPED,
        metrics: &[
            Metric { name: "instructions_per_register_read", better: Better::Lower },
            Metric { name: "instructions_per_register_write", better: Better::Lower },
        ],
        ours: |effort| instructions(MAPPED, Side::Ours, effort),
        peers: &[Peer {
            name: "atomic word",
            run: |effort| instructions(MAPPED, Side::Peer(0), effort),
        }],
    },
    Case {
        bench: "device",
        name: BAR,
        metrics: &[
            Metric { name: "instructions_per_bar_read", better: Better::Lower },
            Metric { name: "instructions_per_bar_write", better: Better::Lower },
        ],
        ours: |effort| instructions(BAR, Side::Ours, effort),
        peers: &[Peer {
            name: "atomic word",
            run: |effort| instructions(BAR, Side::Peer(0), effort),
        }],
    },
    Case {
        bench: "device",
        name: "device-dma",
        metrics: &[Metric { name: "prepare_and_complete_ns", better: Better::Lower }],
        ours: prepare_and_complete,
        peers: &[Peer { name: "2 empty system calls", run: two_system_calls }],
    },
];

register_map! {
    /// A BAR of one page.
    struct Page[0x1000] {
        0x10 Rw WORD: u32,
    }
}

/// A device whose BAR is memory, as its driver has it; to be asked for once.
fn device() -> Result<&'static IOPCIDevice> {
    driver::lend_device(SharedMemory::create(c"bar", 0x1000)?)
}

// ---- Registers ----

/// Instructions of a read and of a write: those of twice as many, less those of as many.
fn instructions(case: &str, side: Side, effort: Effort) -> Result<Vec<f64>> {
    let times = effort.of(2000, 10);
    let [read_once, read_twice, write_once, write_twice] = counted(case, side, effort)?;
    let each = |once: u64, twice: u64| (twice - once) as f64 / times as f64;
    Ok(vec![each(read_once, read_twice), each(write_once, write_twice)])
}

/// Reads as often as is asked for, then twice as often, between marks; then writes.
pub fn other_end(case: &str, side: Side, effort: Effort) -> Result<()> {
    let times = effort.of(2000, 10);
    let word = AtomicU32::new(0);
    let bar = device()?.map_bar::<Page>(0)?;
    let mapped = bar.mapped().context("the BAR is memory")?;
    instructions::begin()?;
    for part in [times, 2 * times] {
        match (side, case) {
            (Side::Peer(_), _) => read_word(black_box(&word), part),
            (Side::Ours, MAPPED) => read_mapped(black_box(mapped), part),
            (Side::Ours, _) => read_bar(black_box(&bar), part),
        }
        instructions::mark()?;
    }
    for part in [times, 2 * times] {
        match (side, case) {
            (Side::Peer(_), _) => write_word(black_box(&word), part),
            (Side::Ours, MAPPED) => write_mapped(black_box(mapped), part),
            (Side::Ours, _) => write_bar(black_box(&bar), part),
        }
        instructions::mark()?;
    }
    Ok(())
}

#[inline(never)]
fn read_word(word: &AtomicU32, times: u64) {
    for _ in 0..times {
        black_box(word.load(Relaxed));
    }
}

#[inline(never)]
fn read_mapped(registers: &MapWindow<Page>, times: u64) {
    for _ in 0..times {
        black_box(registers.read(WORD));
    }
}

#[inline(never)]
fn read_bar(bar: &Bar<Page>, times: u64) {
    for _ in 0..times {
        black_box(bar.read(WORD));
    }
}

#[inline(never)]
fn write_word(word: &AtomicU32, times: u64) {
    for value in 0..times {
        word.store(black_box(value as u32), Relaxed);
    }
}

#[inline(never)]
fn write_mapped(registers: &MapWindow<Page>, times: u64) {
    for value in 0..times {
        registers.write(WORD, black_box(value as u32));
    }
}

#[inline(never)]
fn write_bar(bar: &Bar<Page>, times: u64) {
    for value in 0..times {
        bar.write(WORD, black_box(value as u32));
    }
}

// ---- Memory ----

/// A buffer of an arena, prepared and completed.
fn prepare_and_complete(effort: Effort) -> Result<Vec<f64>> {
    let device = device()?;
    let options = DmaArenaOptions { length: 1 << 20, max_address_bits: 32, huge_pages: false };
    let arena = DmaArena::create(device, options)?;
    let command = IODMACommand::create(device, 32)?;
    let mut buffer = arena.allocate(MemoryDirection::InOut, 4096, 1)?;
    let pairs = effort.of(5_000_000, 100);
    let start = Instant::now();
    for _ in 0..pairs {
        let prepared = command.prepare_for_dma(buffer)?;
        black_box(prepared.address());
        buffer = prepared.complete_dma()?;
    }
    Ok(vec![start.elapsed().as_nanos() as f64 / pairs as f64])
}

fn two_system_calls(effort: Effort) -> Result<Vec<f64>> {
    let pairs = effort.of(2_000_000, 100);
    let start = Instant::now();
    for _ in 0..pairs {
        black_box(getppid());
        black_box(getppid());
    }
    Ok(vec![start.elapsed().as_nanos() as f64 / pairs as f64])
}
