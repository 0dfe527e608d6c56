//! The way of requests through a controller's queue and nothing else: no clients, no admin queue, no
//! interrupts, no time. For a benchmark of that way.

use block_api::Operation;
use iohost_driver::prelude::*;

use crate::identify::Namespace;
use crate::io_queue::{ENTRIES, IoQueue, Request};
use crate::regs;
use crate::rings::Doorbells;
use crate::transfer::Transfers;

/// The first queue pair of a controller with one disk of blocks of 4096 bytes, numbered 1.
pub struct Alone(Transfers);

impl Alone {
    /// Memory for the pair. Has the controller know nothing of it.
    pub fn make(device: &IOPCIDevice, blocks: u64) -> Result<Self> {
        let bar = device.map_bar::<regs::Controller>(0)?;
        let doorbells = Doorbells { bar, stride: 0, shadow: None, uses_shadow: false };
        let mut transfers = Transfers::new(doorbells);
        transfers.queues.push(IoQueue::make(device, 1, ENTRIES)?);
        transfers.count = 1;
        transfers.namespaces.insert(1, Namespace { shift: 12, blocks, is_read_only: false });
        Ok(Self(transfers))
    }

    /// Where the controller finds submission and completion queue, and their entries.
    pub fn rings(&self) -> (u64, u64, u16) {
        let rings = &self.0.queues[0].rings;
        let (submission, completion) = rings.addresses();
        (submission, completion, rings.entries())
    }

    /// Begins to read a block into memory that the controller finds at `address`.
    #[inline]
    pub fn read(&mut self, tag: u64, block: u64, address: u64) {
        self.0.begin(Request {
            client: 0,
            turn: 0,
            tag,
            operation: Operation::Read,
            is_polled: true,
            disk: 1,
            offset: block << 12,
            address,
            left: 1 << 12,
            failure: None,
        });
    }

    /// Tells the controller of what was begun, looks what it has done, and names that.
    ///
    /// Panics when the controller did something that cannot be, or failed.
    #[inline]
    pub fn turn(&mut self, mut done: impl FnMut(u64)) {
        self.0.commit();
        self.0.look_at(0).expect("a controller without faults");
        for request in self.0.ended().drain(..) {
            assert!(request.failure.is_none(), "{:?}", request.failure);
            done(request.tag);
        }
    }
}
