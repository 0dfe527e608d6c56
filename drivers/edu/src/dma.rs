//! Round trips through the device's own buffer: out by one DMA, back by another.

use iohost_driver::prelude::*;

use crate::regs::{self, DmaCommand};

/// Whom a round trip is for.
pub enum Job {
    Call(Reply<Vec<u8>>),
    Stream(SessionId),
    /// A driver that died. Nobody takes what comes of it.
    Predecessor,
}

/// The device's DMA engine, with the memory it works on. One round trip at a time.
pub struct Engine {
    buffer: PreparedDma,
    trip: Option<Trip>,
}

struct Trip {
    len: usize,
    way: Way,
    job: Job,
}

enum Way {
    Out,
    Back,
}

/// Whether the device can take so much, and anything at all.
pub fn fits(data: &[u8]) -> bool {
    (1..=edu_api::LONGEST_ENTRY).contains(&data.len())
}

impl Engine {
    /// The interrupt is enabled already: a copy that a driver before this one started, and that no
    /// reset has ended, is waited for, or its end would be taken for that of the next one.
    pub fn new(device: &IOPCIDevice, bar: &Bar<regs::Edu>) -> Result<Self> {
        let command = IODMACommand::create(device, regs::ADDRESS_BITS)?;
        let buffer = IOBufferMemoryDescriptor::create(edu_api::LONGEST_ENTRY)?;
        let copies = bar.read(regs::DMA_COMMAND).contains(DmaCommand::START);
        let trip = copies.then_some(Trip { len: 0, way: Way::Back, job: Job::Predecessor });
        device.set_bus_master(true);
        Ok(Self { buffer: command.prepare_for_dma(buffer)?, trip })
    }

    pub fn is_idle(&self) -> bool {
        self.trip.is_none()
    }

    /// Starts a round trip with data that [`fits`]. The engine is idle.
    pub fn send(&mut self, bar: &Bar<regs::Edu>, data: &[u8], job: Job) {
        self.buffer.write_at(0, data).expect("data that fits the device fits its buffer");
        self.trip = Some(Trip { len: data.len(), way: Way::Out, job });
        self.copy(bar, self.buffer.address(), regs::ONBOARD, data.len(), DmaCommand::empty());
    }

    /// The device has finished a copy: starts the way back, or gives what came back.
    pub fn advance(&mut self, bar: &Bar<regs::Edu>) -> Option<(Vec<u8>, Job)> {
        let Trip { len, way, job } = self.trip.take()?;
        let mut data = vec![0; len];
        match way {
            Way::Out => {
                // Cleared, so that what is read at the end is what the device has written.
                self.buffer.write_at(0, &data).expect("as long as what was sent");
                self.trip = Some(Trip { len, way: Way::Back, job });
                let target = self.buffer.address();
                self.copy(bar, regs::ONBOARD, target, len, DmaCommand::TO_MEMORY);
                None
            }
            Way::Back => {
                self.buffer.read_at(0, &mut data).expect("as long as what was sent");
                Some((data, job))
            }
        }
    }

    fn copy(&self, bar: &Bar<regs::Edu>, from: u64, to: u64, len: usize, direction: DmaCommand) {
        bar.write(regs::DMA_SOURCE, from);
        bar.write(regs::DMA_TARGET, to);
        bar.write(regs::DMA_COUNT, len as u64);
        let start = DmaCommand::START | DmaCommand::INTERRUPT_WHEN_DONE;
        bar.write(regs::DMA_COMMAND, start | direction);
    }
}
