//! An NVMe controller with its namespaces, in memory or in files.
//!
//! Source: NVM Express Base Specification, revision 1.4 ("1.4" below; sections are of it). The
//! PCI ids are those of QEMU's `nvme` (`docs/specs/pci-ids.rst`), the class is 01 08 02.
//!
//! BAR 0 has the registers of section 3.1, the doorbells from 0x1000 on, the MSI-X table at 0xc000
//! and its pending bits at 0xd000. One admin queue pair, as many I/O queue pairs as
//! [`Options::io_queues`] says; round robin between submission queues, in the order of their
//! doorbells.
//!
//! What it has: all admin and I/O commands that 1.4 makes mandatory for an I/O controller (figures
//! 139 and 346), write zeroes, dataset management (deallocate), shadow doorbells (section 5.7),
//! asynchronous events for namespaces that come and go, SGLs of data blocks and segments. What it has
//! not: metadata, fused commands, reservations, firmware, format, namespace management.
//!
//! A command is executed within the doorbell write that brings it, unless commands are
//! [held](Nvme::hold_io). What can go wrong on purpose is in [`Faults`].
//!
//! # Known differences
//!
//! 1. A write cache is never lost: `Flush` writes what the files have to disk, and all that was
//!    written before can be read, also by the next client.
//! 2. A controller level reset takes no time; [`Faults::never_ready`] is the only slow one.
//! 3. Differences of the function around it: see [`Function`](crate::Function).

mod admin;
mod command;
mod data;
mod identify;
mod io;
mod logs;
mod namespace;
mod options;
mod prp;
mod queues;
mod registers;
mod sgl;

use std::collections::{BTreeMap, VecDeque};

use crate::model::{BarSpec, Bus, DeviceModel, Identity, MsiXSpec};

pub use namespace::{Namespace, NamespaceError};
pub use options::{Faults, Lie, Options};

use command::{Command, Completion, Status};
use logs::{ErrorEntry, Statistics};
use queues::{CompletionQueue, Posting, SubmissionQueue};
use registers::{Registers, Wanted};

/// The PCI ids, QEMU's.
pub const VENDOR: u16 = 0x1b36;
/// The PCI ids, QEMU's.
pub const DEVICE: u16 = 0x0010;

const BAR_SIZE: u32 = 0x1_0000;
const DOORBELLS: u64 = 0x1000;
const MSI_X_TABLE: u32 = 0xc000;
const MSI_X_PENDING: u32 = 0xd000;

/// Asynchronous event requests that can be outstanding (`AERL` + 1, figure 247).
const EVENT_REQUESTS: usize = 4;

/// The controller.
#[derive(Debug)]
pub struct Nvme {
    options: Options,
    faults: Faults,
    registers: Registers,
    namespaces: BTreeMap<u32, Namespace>,
    submission: BTreeMap<u16, SubmissionQueue>,
    completion: BTreeMap<u16, CompletionQueue>,
    /// What `Set Features` set; by feature and namespace.
    features: BTreeMap<(u8, u32), u32>,
    /// Where the host keeps its shadow doorbells and looks for event indices.
    shadow: Option<Shadow>,
    /// Asynchronous event requests, by command id.
    event_requests: VecDeque<u16>,
    /// Namespaces that have changed since the host asked last, and whether it was told.
    changed_namespaces: Vec<u32>,
    event_is_masked: bool,
    /// I/O commands that were fetched and not executed, by queue.
    held: VecDeque<(u16, Command)>,
    is_holding: bool,
    statistics: Statistics,
    errors: VecDeque<ErrorEntry>,
}

#[derive(Clone, Copy, Debug)]
struct Shadow {
    doorbells: u64,
    event_indices: u64,
}

impl Shadow {
    /// Takes a doorbell's value, and writes the event index that `take` wants, until the value that
    /// is there was there after the index was: a host that does not see the index is seen. One that
    /// changes it all the time is left alone.
    fn follow(self, bus: &mut Bus<'_>, mut take: impl FnMut(u32) -> Option<u32>) {
        const LOOKS: u32 = 64;
        let mut seen = None;
        for _ in 0..LOOKS {
            let mut value = [0; 4];
            bus.dma_read(self.doorbells, &mut value);
            let value = u32::from_le_bytes(value);
            if seen == Some(value) {
                return;
            }
            seen = Some(value);
            let Some(index) = take(value) else { return };
            bus.dma_write(self.event_indices, &index.to_le_bytes());
        }
    }
}

impl Nvme {
    /// A controller at power-on. Namespaces are numbered from 1 on.
    ///
    /// Panics for options that no controller can have: see [`Options`].
    pub fn new(options: Options, namespaces: Vec<Namespace>) -> Self {
        options.check();
        Self {
            registers: Registers::new(&options),
            namespaces: (1..).zip(namespaces).collect(),
            submission: BTreeMap::new(),
            completion: BTreeMap::new(),
            features: BTreeMap::new(),
            shadow: None,
            event_requests: VecDeque::new(),
            changed_namespaces: Vec::new(),
            event_is_masked: false,
            held: VecDeque::new(),
            is_holding: false,
            statistics: Statistics::default(),
            errors: VecDeque::new(),
            faults: Faults::default(),
            options,
        }
    }

    /// What goes wrong from now on.
    pub fn faults(&mut self) -> &mut Faults {
        &mut self.faults
    }

    /// Fetches I/O commands from now on without executing them.
    pub fn hold_io(&mut self) {
        self.is_holding = true;
    }

    /// How many commands are held.
    pub fn held_commands(&self) -> usize {
        self.held.len()
    }

    /// Executes what is held, and holds no more. A controller that has broken down forgets it.
    pub fn release_io(&mut self, bus: &mut Bus<'_>) {
        if !self.registers.is_running() {
            self.held.clear();
        }
        self.execute_what_is_held(bus);
    }

    fn execute_what_is_held(&mut self, bus: &mut Bus<'_>) {
        self.is_holding = false;
        while let Some((queue, command)) = self.held.pop_front() {
            self.execute_io(bus, queue, command);
        }
    }

    /// Fatal status: the controller does nothing any more until it is reset (section 9.5).
    pub fn break_down(&mut self) {
        self.registers.set_fatal();
    }

    /// Takes a namespace away, and tells the host if it asked to be told. Whether it was there.
    pub fn remove_namespace(&mut self, bus: &mut Bus<'_>, nsid: u32) -> bool {
        let was_there = self.namespaces.remove(&nsid).is_some();
        if was_there {
            self.namespace_changed(bus, nsid);
        }
        was_there
    }

    /// Adds a namespace, or replaces it, likewise.
    pub fn add_namespace(&mut self, bus: &mut Bus<'_>, nsid: u32, namespace: Namespace) {
        self.namespaces.insert(nsid, namespace);
        self.namespace_changed(bus, nsid);
    }

    /// A namespace.
    pub fn namespace(&mut self, nsid: u32) -> Option<&mut Namespace> {
        self.namespaces.get_mut(&nsid)
    }

    /// I/O queue pairs that the host has made.
    pub fn io_queue_count(&self) -> usize {
        self.submission.keys().filter(|id| **id > 0).count()
    }

    /// Whether the host uses shadow doorbells.
    pub fn has_shadow_doorbells(&self) -> bool {
        self.shadow.is_some()
    }

    /// Doorbell writes that reached the controller.
    pub fn doorbell_writes(&self) -> u64 {
        self.statistics.doorbells
    }

    /// How often the host disabled the controller.
    pub fn disablings(&self) -> u64 {
        self.statistics.disablings
    }

    /// I/O commands that were executed.
    pub fn io_commands(&self) -> u64 {
        self.statistics.read_commands + self.statistics.write_commands
    }

    /// A doorbell was written (section 3.1.24 and 3.1.25).
    fn ring(&mut self, bus: &mut Bus<'_>, offset: u64, value: u32) {
        self.statistics.doorbells += 1;
        let stride = 4 << self.options.doorbell_stride;
        let place = offset - DOORBELLS;
        if !self.registers.is_running() || !place.is_multiple_of(stride) {
            return;
        }
        let (queue, is_head) = ((place / stride / 2) as u16, place / stride % 2 == 1);
        match is_head {
            false => {
                let Some(submission) = self.submission.get_mut(&queue) else { return };
                if !submission.set_tail(value) {
                    // "Invalid Doorbell Write Value", which a host hears of by an event (5.2).
                    return self.note_error(0, u16::MAX, Status::INVALID_FIELD, 0);
                }
                self.process(bus, queue);
            }
            true => {
                let Some(completion) = self.completion.get_mut(&queue) else { return };
                if !completion.set_head(value) {
                    return self.note_error(0, u16::MAX, Status::INVALID_FIELD, 0);
                }
                self.post_what_waits(bus, queue);
                self.process_all(bus);
            }
        }
    }

    /// Fetches and executes what a submission queue has.
    fn process(&mut self, bus: &mut Bus<'_>, queue: u16) {
        loop {
            self.look_at_shadow_tail(bus, queue);
            let Some(submission) = self.submission.get(&queue) else { return };
            let target = submission.completion_queue;
            self.look_at_shadow_head(bus, target);
            // A full completion queue holds its submission queues back (section 4.1).
            let is_held_back =
                self.completion.get(&target).is_none_or(|completion| completion.is_congested());
            if is_held_back || !self.registers.is_running() {
                return;
            }
            let Some(submission) = self.submission.get_mut(&queue) else { return };
            let Some(address) = submission.next() else {
                return;
            };
            let mut entry = [0; 64];
            bus.dma_read(address, &mut entry);
            let command = Command::from_bytes(&entry);
            match queue {
                0 => self.execute_admin(bus, command),
                _ if self.faults.swallow_io > 0 => self.faults.swallow_io -= 1,
                _ if self.is_holding => self.held.push_back((queue, command)),
                _ => self.execute_io(bus, queue, command),
            }
        }
    }

    fn process_all(&mut self, bus: &mut Bus<'_>) {
        let queues: Vec<_> = self.submission.keys().copied().collect();
        for queue in queues {
            self.process(bus, queue);
        }
    }

    /// Takes the tail from the host's shadow doorbell, and asks to be rung for the next one
    /// (section 7.13).
    fn look_at_shadow_tail(&mut self, bus: &mut Bus<'_>, queue: u16) {
        let Some(shadow) = self.shadow_doorbell(u64::from(queue) * 2) else { return };
        let Some(submission) = self.submission.get_mut(&queue) else { return };
        shadow.follow(bus, |tail| submission.set_tail(tail).then_some(tail));
    }

    /// Takes the head of a completion queue from the host's shadow doorbell.
    fn look_at_shadow_head(&mut self, bus: &mut Bus<'_>, queue: u16) {
        let Some(shadow) = self.shadow_doorbell(u64::from(queue) * 2 + 1) else { return };
        let Some(completion) = self.completion.get_mut(&queue) else { return };
        let by_line = !bus.msi_enabled() && !bus.msi_x_enabled();
        shadow.follow(bus, |head| {
            let is_sound = completion.set_head(head);
            // A line is let go of at the doorbell, and who is held back goes on. Otherwise nobody
            // waits for the head, and the index is one that the host does not pass soon.
            let is_awaited = by_line || completion.is_congested();
            is_sound.then(|| if is_awaited { head } else { head.wrapping_sub(1) & 0xffff })
        });
    }

    /// Where a doorbell is in the host's memory, and its event index. The admin queue has none.
    fn shadow_doorbell(&self, place: u64) -> Option<Shadow> {
        let Shadow { doorbells, event_indices } = self.shadow.filter(|_| place >= 2)?;
        let offset = place * (4 << self.options.doorbell_stride);
        Some(Shadow { doorbells: doorbells + offset, event_indices: event_indices + offset })
    }

    /// Completes a command of a submission queue (section 4.6).
    fn complete(&mut self, bus: &mut Bus<'_>, queue: u16, id: u16, result: Result<u32, Status>) {
        let Some(submission) = self.submission.get(&queue) else { return };
        let status = result.err().unwrap_or(Status::SUCCESS);
        let mut completion = Completion {
            result: result.unwrap_or(0),
            head: submission.head() as u16,
            queue,
            id,
            status,
        };
        let target = submission.completion_queue;
        if status != Status::SUCCESS {
            self.note_error(queue, id, status, 0);
        }
        let (mut twice, mut garbage) = (false, None);
        if queue > 0
            && let Some(lie) = self.faults.lies.pop_front()
        {
            match lie {
                Lie::CommandId(id) => completion.id = id,
                Lie::Status(status) => completion.status = Status::from_bits(status),
                Lie::Head(head) => completion.head = head,
                Lie::Queue(queue) => completion.queue = queue,
                Lie::Twice => twice = true,
                Lie::Garbage(entry) => garbage = Some(entry),
            }
        }
        if let Some(target) = self.completion.get_mut(&target) {
            if twice {
                target.wait(Posting::Completion(completion));
            }
            target.wait(garbage.map_or(Posting::Completion(completion), Posting::Garbage));
        }
        self.post_what_waits(bus, target);
    }

    /// Writes completions as far as there is room, and interrupts.
    fn post_what_waits(&mut self, bus: &mut Bus<'_>, queue: u16) {
        self.look_at_shadow_head(bus, queue);
        let Some(completion) = self.completion.get_mut(&queue) else { return };
        let posted = completion.post(bus);
        let (vector, is_pending) = (completion.vector(), completion.has_unread());
        if let Some(vector) = vector {
            if posted {
                self.registers.send_interrupt(bus, vector);
            }
            self.registers.set_line_cause(queue, is_pending);
        }
        self.registers.update_line(bus);
    }

    /// The reset of section 7.3.2: queues and features are gone, admin registers stay.
    fn reset_controller(&mut self, bus: &mut Bus<'_>) {
        self.submission.clear();
        self.completion.clear();
        self.features.clear();
        self.shadow = None;
        self.event_requests.clear();
        self.event_is_masked = false;
        self.held.clear();
        self.registers.clear_line(bus);
    }

    fn enable(&mut self, bus: &mut Bus<'_>) {
        self.reset_controller(bus);
        let admin = self.registers.admin_queues();
        self.submission.insert(0, SubmissionQueue::new(admin.submission, admin.submission_size, 0));
        let completion = CompletionQueue::new(admin.completion, admin.completion_size, Some(0));
        self.completion.insert(0, completion);
        if !self.faults.never_ready {
            self.registers.set_ready();
        }
    }
}

impl DeviceModel for Nvme {
    fn identity(&self) -> Identity {
        let msi_x = MsiXSpec {
            vectors: self.options.msi_x_vectors,
            bar: 0,
            table: MSI_X_TABLE,
            pending: MSI_X_PENDING,
        };
        Identity {
            vendor: VENDOR,
            device: DEVICE,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            class: 0x01_0802,
            revision: 0x02,
            bars: [Some(BarSpec { size: BAR_SIZE }), None, None, None, None, None],
            intx: true,
            msi_vectors: self.options.msi_vectors,
            msi_x: (msi_x.vectors > 0).then_some(msi_x),
        }
    }

    fn bar_read(&mut self, _bus: &mut Bus<'_>, _bar: u8, offset: u64, data: &mut [u8]) {
        if self.faults.gone {
            return data.fill(0xff);
        }
        self.registers.read(&self.faults, offset, data);
    }

    fn bar_write(&mut self, bus: &mut Bus<'_>, _bar: u8, offset: u64, data: &[u8]) {
        if self.faults.gone {
            return;
        }
        if offset >= DOORBELLS {
            // A doorbell is written whole (section 3.1.24); anything else has no meaning.
            if let (Ok(value), ..DOORBELLS_END) = (data.try_into().map(u32::from_le_bytes), offset)
            {
                self.ring(bus, offset, value);
            }
            return;
        }
        match self.registers.write(bus, &self.faults, offset, data) {
            Wanted::Nothing => {}
            Wanted::Enable => self.enable(bus),
            Wanted::Reset => {
                self.statistics.disablings += 1;
                if self.faults.completes_when_disabled {
                    self.execute_what_is_held(bus);
                }
                self.reset_controller(bus);
            }
            Wanted::Shutdown => {
                for namespace in self.namespaces.values_mut() {
                    namespace.flush();
                }
                self.registers.set_shut_down();
            }
        }
    }

    fn time_has_come(&mut self, _bus: &mut Bus<'_>, _what: u32) {}

    fn reset(&mut self, bus: &mut Bus<'_>) {
        self.reset_controller(bus);
        self.registers = Registers::new(&self.options);
    }
}

const DOORBELLS_END: u64 = MSI_X_TABLE as u64;
