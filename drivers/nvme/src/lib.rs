//! Driver for NVMe controllers (NVM Express 1.4), which offers their namespaces as disks.
//!
//! From the outside in: [`Nvme`] below is the service, with its start and stop and the calls of its
//! clients. `client.rs` has their data queues and memory, `serve.rs` takes and answers their
//! requests, `transfer.rs` has the way of a request through the controller, and `alone.rs` that way
//! without the rest, for its benchmark. `bring_up.rs` takes the controller from any state to one that
//! works, `recovery.rs` does what is to be done when it does not. `admin.rs` and `io_queue.rs` are
//! its queues as we use them, `rings.rs` as the controller sees them. `command.rs`, `prp.rs`,
//! `identify.rs`, `health.rs`, `status.rs` and `regs.rs` are formats.
//!
//! Everything runs on one serial queue. A call to a client or to the controller never waits.
//!
//! Nothing the controller says is believed: a completion that cannot be is answered by a reset of
//! the controller, after which what was under way is done again, and after `MOST_RESETS` of them
//! without a command in between that worked, it is left alone and everybody is told so.

#![forbid(unsafe_code)]

mod admin;
#[doc(hidden)]
pub mod alone;
mod bring_up;
mod client;
mod command;
mod health;
mod identify;
mod io_queue;
mod memory;
mod prp;
mod recovery;
mod regs;
mod rings;
mod serve;
mod status;
mod transfer;

use block_api::{Disk, Failure, Status};
use iohost_driver::ClientMemory;
use iohost_driver::prelude::*;

use admin::AdminQueue;
use bring_up::{Limits, State};
use client::Clients;
use identify::Namespace;
use rings::Doorbells;
use transfer::Transfers;

/// I/O queue pairs with interrupts that are made, if the controller has as many.
const MOST_QUEUES: u16 = 4;

/// Resets in a row, with no command that worked in between, after which the controller is given up.
const MOST_RESETS: u32 = 3;

/// One controller. Owned by its queue from `start` until after `stop`.
pub struct Nvme {
    device: IOPCIDevice,
    queue: IODispatchQueue<Self>,
    /// One per vector. The admin queue has vector 0.
    interrupts: Vec<IOInterruptDispatchSource>,
    limits: Limits,
    state: State,
    controller: identify::Controller,
    /// Namespaces that are being looked at.
    scan: bring_up::Scan,
    admin: AdminQueue,
    transfers: Transfers,
    clients: Clients,
    /// Calls that wait until the controller works.
    waiting: Vec<Waiting>,
    health_calls: Vec<Reply<Vec<u8>>>,
    timer: IOTimerDispatchSource,
    timer_is_set: bool,
    resets: u32,
    /// [`Nvme::poll`] is on its way.
    is_polling: bool,
    /// Looks of it in a row that found nothing.
    idle_turns: u32,
    /// For requests on their way from a client's queue.
    entries: Vec<client::Entry>,
}

/// A call that waits.
enum Waiting {
    Disks(Reply<Vec<u8>>),
    Describe(u32, Reply<Vec<u8>>),
    Health(Reply<Vec<u8>>),
}

impl IOService for Nvme {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci_class(0x01_0802)];
    const NEEDS: Needs = Needs::NOTHING.dma(4 << 20);

    /// Checks the controller and begins to bring it up; clients wait meanwhile.
    fn start(device: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self> {
        let bar = device.map_bar::<regs::Controller>(0)?;
        let limits = Limits::of(&bar)?;
        device.set_bus_master(true);

        let interrupts = make_interrupts(&device, queue)?;
        let timer = IOTimerDispatchSource::create(queue, |nvme, _| nvme.time_has_come())?;
        let doorbells =
            Doorbells { bar, stride: limits.doorbell_stride, shadow: None, uses_shadow: false };
        let mut nvme = Self {
            admin: AdminQueue::make(&device, limits.entries)?,
            device,
            queue: queue.clone(),
            interrupts,
            limits,
            state: State::Identifying,
            controller: identify::Controller::default(),
            scan: bring_up::Scan::default(),
            transfers: Transfers::new(doorbells),
            clients: Clients::default(),
            waiting: Vec::new(),
            health_calls: Vec::new(),
            timer,
            timer_is_set: false,
            resets: 0,
            is_polling: false,
            idle_turns: serve::LINGER,
            entries: Vec::new(),
        };
        nvme.begin_reset();
        if let State::Failed(failure) = &nvme.state {
            return Err(Error::new(IOReturn::NOT_RESPONDING, failure.to_string()));
        }
        Ok(nvme)
    }

    /// Tells the controller to write what it has cached, and quiets it.
    fn stop(&mut self) {
        self.shut_down();
    }

    fn session_opened(&mut self, session: Session) -> Result<()> {
        self.clients.open(session, &self.queue)
    }

    fn copy_client_memory_for_type(
        &mut self,
        session: SessionId,
        memory_type: u64,
    ) -> Result<ClientMemory> {
        self.clients.memory(session, memory_type, &self.device)
    }

    fn session_closed(&mut self, session: SessionId) {
        self.clients.close(session);
    }
}

impl block_api::Server for Nvme {
    fn disks(&mut self, reply: Reply<Vec<u8>>) {
        self.answer(Waiting::Disks(reply));
    }

    fn describe(&mut self, disk: u32, reply: Reply<Vec<u8>>) {
        self.answer(Waiting::Describe(disk, reply));
    }

    fn health(&mut self, reply: Reply<Vec<u8>>) {
        self.answer(Waiting::Health(reply));
    }
}

impl Nvme {
    /// Answers a call, or keeps it until the controller works or is given up.
    fn answer(&mut self, call: Waiting) {
        match &self.state {
            State::Running => match call {
                Waiting::Disks(reply) => {
                    let numbers =
                        self.transfers.namespaces.keys().flat_map(|number| number.to_le_bytes());
                    // As many as a call's answer holds.
                    reply.complete(numbers.take(4096).collect());
                }
                Waiting::Describe(disk, reply) => match self.transfers.namespaces.get(&disk) {
                    Some(namespace) => reply.complete(self.disk(disk, namespace).to_bytes()),
                    None => reply.fail(IOReturn::NOT_FOUND),
                },
                Waiting::Health(reply) => self.ask_for_health(reply),
            },
            State::Failed(failure) => {
                let code = code_of(failure);
                let (Waiting::Disks(reply) | Waiting::Describe(_, reply) | Waiting::Health(reply)) =
                    call;
                reply.fail(code);
            }
            _ => self.waiting.push(call),
        }
    }

    fn answer_all(&mut self) {
        for call in std::mem::take(&mut self.waiting) {
            self.answer(call);
        }
    }

    fn disk(&self, number: u32, namespace: &Namespace) -> Disk {
        let controller = &self.controller;
        Disk {
            number,
            block: 1 << namespace.shift,
            blocks: namespace.blocks,
            most_at_once: controller.most_bytes,
            is_read_only: namespace.is_read_only,
            has_write_cache: controller.has_write_cache,
            can_discard: controller.has_dataset_management,
            can_write_zeroes: controller.has_write_zeroes,
            model: controller.model.clone(),
            serial: controller.serial.clone(),
        }
    }

    /// An interrupt of a vector: whose queues have something?
    fn interrupt_occurred(&mut self, vector: usize) {
        if vector == 0 {
            self.look_at_admin();
        }
        for place in 0..self.transfers.count {
            if self.transfers.queues[place].vector == vector {
                self.look_at(place);
            }
        }
        self.settle();
    }
}

/// MSI-X, MSI or the line, whichever the device may use first, and a source for each vector.
fn make_interrupts(
    device: &IOPCIDevice,
    queue: &IODispatchQueue<Nvme>,
) -> Result<Vec<IOInterruptDispatchSource>> {
    let wanted = u32::from(MOST_QUEUES) + 1;
    device
        .configure_interrupts(InterruptType::MessagedX, 1, wanted)
        .or_else(|_| device.configure_interrupts(InterruptType::Messaged, 1, wanted))
        .or_else(|_| device.configure_interrupts(InterruptType::Level, 1, 1))?;
    let mut sources = Vec::new();
    for vector in 0..wanted {
        let handler = move |nvme: &mut Nvme, _| nvme.interrupt_occurred(vector as usize);
        let source = match IOInterruptDispatchSource::create(device, vector, queue, handler) {
            Ok(source) => source,
            Err(err) if err.code() == IOReturn::NO_INTERRUPT && vector > 0 => break,
            Err(err) => return Err(err),
        };
        source.set_enable(true)?;
        sources.push(source);
    }
    Ok(sources)
}

/// What a caller is told of a controller that was given up.
fn code_of(failure: &Failure) -> IOReturn {
    match failure.status {
        Status::Gone => IOReturn::NO_DEVICE,
        _ => IOReturn::NOT_RESPONDING,
    }
}

iohost_driver::export_driver!(Nvme, serves block_api);
