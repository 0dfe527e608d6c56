//! An `edu` in this process, and how its registers are called.

#![allow(dead_code, reason = "each test file uses its part of it")]

use std::os::fd::AsFd;

use iohost_device_models::edu::{Edu, Timing};
use iohost_device_models::{DmaMemory, Function, InterruptKind};
use iohost_memory::SharedMemory;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

pub(crate) const ID: u64 = 0x00;
pub(crate) const LIVENESS: u64 = 0x04;
pub(crate) const FACTORIAL: u64 = 0x08;
pub(crate) const STATUS: u64 = 0x20;
pub(crate) const CAUSES: u64 = 0x24;
pub(crate) const RAISE: u64 = 0x60;
pub(crate) const ACKNOWLEDGE: u64 = 0x64;
pub(crate) const DMA_SOURCE: u64 = 0x80;
pub(crate) const DMA_DESTINATION: u64 = 0x88;
pub(crate) const DMA_COUNT: u64 = 0x90;
pub(crate) const DMA_COMMAND: u64 = 0x98;
pub(crate) const BUFFER: u64 = 0x40000;

pub(crate) const COMMAND: u16 = 0x04;
pub(crate) const BUS_MASTER: u16 = 0x4;
pub(crate) const INTX_DISABLE: u16 = 0x400;
pub(crate) const CONFIG_STATUS: u16 = 0x06;
pub(crate) const MSI_CONTROL: u16 = 0x42;

pub(crate) const TO_DEVICE: u64 = 0b001;
pub(crate) const TO_MEMORY: u64 = 0b011;
pub(crate) const INTERRUPT: u64 = 0b100;

/// Where the rig maps memory.
pub(crate) const IOVA: u64 = 0x10_0000;

pub(crate) struct Rig {
    pub(crate) function: Function<Edu>,
    pub(crate) memory: SharedMemory,
}

/// An `edu` that is bus master, with two pages of memory at [`IOVA`].
pub(crate) fn rig(timing: Timing) -> Rig {
    let function = Function::new(Edu::new(timing));
    let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
    function.dma_map(IOVA, DmaMemory::try_from(&memory).unwrap()).unwrap();
    let rig = Rig { function, memory };
    rig.set_command(BUS_MASTER);
    rig
}

impl Rig {
    pub(crate) fn set_command(&self, bits: u16) {
        self.function.config_write(COMMAND, &bits.to_le_bytes()).unwrap();
    }

    pub(crate) fn config(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.function.config_read(offset, &mut data).unwrap();
        u16::from_le_bytes(data)
    }

    pub(crate) fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.function.bar_read(0, offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    pub(crate) fn read_long(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.function.bar_read(0, offset, &mut data).unwrap();
        u64::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: u64, value: u32) {
        self.function.bar_write(0, offset, &value.to_le_bytes()).unwrap();
    }

    pub(crate) fn write_long(&self, offset: u64, value: u64) {
        self.function.bar_write(0, offset, &value.to_le_bytes()).unwrap();
    }

    pub(crate) fn dma(&self, source: u64, destination: u64, count: u64, command: u64) {
        self.write_long(DMA_SOURCE, source);
        self.write_long(DMA_DESTINATION, destination);
        self.write_long(DMA_COUNT, count);
        self.write_long(DMA_COMMAND, command);
    }

    pub(crate) fn finish(&self) {
        self.function.with_model(|edu, bus| edu.finish(bus));
    }

    pub(crate) fn enable(&self, kind: InterruptKind) -> EventFd {
        let event = event();
        self.function.set_irqs(kind, &[event.as_fd()]).unwrap();
        event
    }

    pub(crate) fn memory_at(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_at(offset, &mut data);
        data
    }
}

pub(crate) fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}

/// How often an event was signalled since the last look.
pub(crate) fn count(event: &EventFd) -> u64 {
    match event.read() {
        Ok(count) => count,
        Err(Errno::EAGAIN) => 0,
        Err(errno) => panic!("reading an eventfd: {errno}"),
    }
}

/// Waits for an event; the limit is a watchdog.
pub(crate) fn wait(event: &EventFd) -> u64 {
    let mut events = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut events, PollTimeout::from(30_000u16)), Ok(1), "no interrupt came");
    count(event)
}
