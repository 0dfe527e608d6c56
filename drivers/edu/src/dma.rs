//! Round trips through the device's own buffer: out by one DMA, back by another.
//!
//! The device is not believed more than can be helped: a copy has ended when its register says so as
//! well as its interrupt, and one whose interrupt does not come is made again.

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
    data: Vec<u8>,
    way: Way,
    job: Job,
    /// Ticks of the driver's timer since the copy was started.
    age: u32,
}

enum Way {
    Out,
    Back,
}

/// Ticks after which the interrupt of a copy that has ended is taken for lost.
const LOST_AFTER: u32 = 2;

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
        let trip = copies(bar).then_some(Trip::new(Vec::new(), Job::Predecessor));
        device.set_bus_master(true);
        Ok(Self { buffer: command.prepare_for_dma(buffer)?, trip })
    }

    pub fn is_idle(&self) -> bool {
        self.trip.is_none()
    }

    /// Starts a round trip with data that [`fits`]. The engine is idle.
    pub fn send(&mut self, bar: &Bar<regs::Edu>, data: Vec<u8>, job: Job) {
        self.start(bar, Trip::new(data, job));
    }

    /// The device says that it has finished a copy: starts the way back, or gives what came back.
    pub fn advance(&mut self, bar: &Bar<regs::Edu>) -> Option<(Vec<u8>, Job)> {
        // Of an interrupt that came twice, or of the copy before.
        if copies(bar) {
            return None;
        }
        let Trip { mut data, way, job, .. } = self.trip.take()?;
        match (way, job) {
            (_, job @ Job::Predecessor) => Some((data, job)),
            (Way::Out, job) => {
                // Cleared, so that what is read at the end is what the device has written.
                self.write(&vec![0; data.len()]);
                let target = self.buffer.address();
                self.copy(bar, regs::ONBOARD, target, data.len(), DmaCommand::TO_MEMORY);
                self.trip = Some(Trip { data, way: Way::Back, job, age: 0 });
                None
            }
            (Way::Back, job) => {
                self.buffer.read_at(0, &mut data).expect("as long as what was sent");
                Some((data, job))
            }
        }
    }

    /// Called with each tick of the driver's timer: makes a trip again, from its beginning, if the
    /// device has nothing to do and said nothing. A trip of nobody's is over then.
    pub fn look(&mut self, bar: &Bar<regs::Edu>) {
        let Some(trip) = &mut self.trip else { return };
        trip.age += 1;
        if trip.age > LOST_AFTER && !copies(bar) {
            let lost = self.trip.take().expect("it is there");
            if !matches!(lost.job, Job::Predecessor) {
                self.start(bar, Trip::new(lost.data, lost.job));
            }
        }
    }

    fn start(&mut self, bar: &Bar<regs::Edu>, trip: Trip) {
        self.write(&trip.data);
        let source = self.buffer.address();
        self.copy(bar, source, regs::ONBOARD, trip.data.len(), DmaCommand::empty());
        self.trip = Some(trip);
    }

    fn write(&mut self, data: &[u8]) {
        self.buffer.write_at(0, data).expect("data that fits the device fits its buffer");
    }

    fn copy(&self, bar: &Bar<regs::Edu>, from: u64, to: u64, len: usize, direction: DmaCommand) {
        bar.write(regs::DMA_SOURCE, from);
        bar.write(regs::DMA_TARGET, to);
        bar.write(regs::DMA_COUNT, len as u64);
        let start = DmaCommand::START | DmaCommand::INTERRUPT_WHEN_DONE;
        bar.write(regs::DMA_COMMAND, start | direction);
    }
}

impl Trip {
    fn new(data: Vec<u8>, job: Job) -> Self {
        Self { data, way: Way::Out, job, age: 0 }
    }
}

/// Whether a copy is under way.
fn copies(bar: &Bar<regs::Edu>) -> bool {
    bar.read(regs::DMA_COMMAND).contains(DmaCommand::START)
}
