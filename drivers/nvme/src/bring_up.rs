//! From a controller in any state to one that works (NVM Express 1.4, section 7.6.1).
//!
//! ```text
//! begin_reset ─▶ Quieting ─RDY=0─▶ Enabling ─RDY=1─▶ Identifying ─▶ Running
//!                   └───────── too late ───┴──▶ Failed ◀── too many resets
//! ```
//!
//! The registers are looked at by a timer, and each admin command's completion issues the next one:
//! identify controller, number of queues, each queue, shadow doorbells, events, namespaces.

use std::collections::BTreeMap;

use block_api::{Failure, Status};
use iohost_driver::Bar;
use iohost_driver::prelude::*;

use crate::admin::Asked;
use crate::command::{Command, admin};
use crate::identify::{self, Controller, Namespace};
use crate::io_queue::{self, IoQueue, NO_VECTOR};
use crate::memory::{PAGE, Shared};
use crate::regs::{self, AdminSizes, Capabilities, Configuration};
use crate::rings::{Doorbells, Shadow};
use crate::status::CommandError;
use crate::{MOST_QUEUES, Nvme};

/// Where the controller is on its way.
pub enum State {
    /// It was disabled, and is to become not ready.
    Quieting {
        deadline: u64,
    },
    /// It was enabled, and is to become ready.
    Enabling {
        deadline: u64,
    },
    /// Admin commands find out what it is and make its queues.
    Identifying,
    Running,
    /// It was given up, for this reason.
    Failed(Failure),
}

/// What the registers say for good.
pub struct Limits {
    /// Entries of a queue that is made for I/O.
    pub entries: u16,
    /// `CAP.DSTRD`.
    pub doorbell_stride: u32,
    /// How long it may take to become ready or not, in nanoseconds.
    patience: u64,
}

/// Namespaces that were found so far, and those that are to be looked at.
#[derive(Default)]
pub struct Scan {
    found: BTreeMap<u32, Namespace>,
    listed: Vec<u32>,
    /// The largest number that was listed, and whether the list goes on after it.
    last: u32,
    has_more: bool,
    /// They have changed meanwhile.
    is_stale: bool,
}

/// The most namespaces that are looked at.
const MOST_NAMESPACES: usize = 1024;

/// Between two looks at the registers, in nanoseconds.
const LOOK: u64 = 1_000_000;

impl Limits {
    /// Reads and checks what the controller says of itself.
    pub(crate) fn of(bar: &Bar<regs::Controller>) -> Result<Self> {
        let (capabilities, version) = (bar.read(regs::CAP), bar.read(regs::VS));
        ensure!(
            capabilities.bits() != u64::MAX && version.bits() != regs::NOBODY,
            IOReturn::NO_DEVICE,
            "the controller does not answer: its registers read as all ones"
        );
        ensure!(
            (version.major(), version.minor()) >= (1, 1),
            IOReturn::UNSUPPORTED,
            "version {}.{} of NVM Express, 1.1 and later are supported",
            version.major(),
            version.minor()
        );
        ensure!(
            capabilities.contains(Capabilities::NVM_COMMANDS),
            IOReturn::UNSUPPORTED,
            "the controller has no NVM command set: {capabilities:x?}"
        );
        ensure!(
            capabilities.smallest_page() == 0,
            IOReturn::UNSUPPORTED,
            "its smallest page has 2^{} bytes, ours have {PAGE}",
            capabilities.smallest_page() + 12
        );
        let most_entries = capabilities.most_entries() + 1;
        ensure!(
            most_entries >= 2,
            IOReturn::DEVICE_ERROR,
            "queues of {most_entries} entry, the least is 2"
        );
        let stride = capabilities.doorbell_stride() as u32;
        ensure!(
            Doorbells::most_pairs(stride) >= 2,
            IOReturn::UNSUPPORTED,
            "its doorbells are {} bytes apart",
            4_u64 << stride
        );
        // At least one unit, as some say zero.
        let patience = capabilities.timeout().max(1) * 500_000_000;
        let entries = most_entries.min(io_queue::ENTRIES.into()) as u16;
        Ok(Self { entries, doorbell_stride: stride, patience })
    }
}

impl Nvme {
    /// Disables the controller, to bring it up anew. What was under way is kept to be done again.
    pub(crate) fn begin_reset(&mut self) {
        self.keep_what_is_under_way();
        self.transfers.doorbells.uses_shadow = false;
        self.admin.forget_all();
        self.transfers.doorbells.bar.write(regs::CC, Configuration::empty());
        self.state = State::Quieting { deadline: self.deadline() };
        self.look_at_state();
    }

    /// Goes on as far as the registers allow, and looks again later.
    pub(crate) fn look_at_state(&mut self) {
        loop {
            let status = self.transfers.doorbells.bar.read(regs::CSTS);
            if status.bits() == regs::NOBODY {
                return self.fail(Failure::new(Status::Gone, "its registers read as all ones"));
            }
            let is_ready = status.contains(regs::Status::READY);
            let (deadline, wanted) = match self.state {
                State::Quieting { .. } if !is_ready => {
                    self.enable();
                    continue;
                }
                State::Enabling { .. } if status.contains(regs::Status::FATAL) => {
                    return self.trouble("fatal status while it was being enabled");
                }
                State::Enabling { .. } if is_ready => {
                    self.state = State::Identifying;
                    return self.ask_to_identify(Asked::Controller, 1, 0);
                }
                State::Quieting { deadline } => (deadline, "quiet"),
                State::Enabling { deadline } => (deadline, "ready"),
                _ => return,
            };
            let now = self.queue.now(IOTimerClock::UptimeRaw);
            if now >= deadline {
                let patience = self.limits.patience / 1_000_000;
                let words =
                    format!("it did not become {wanted} within {patience} ms ({status:x?})");
                return self.fail(Failure::new(Status::NotResponding, words));
            }
            return self.wake_at(now + LOOK, 0);
        }
    }

    fn enable(&mut self) {
        self.admin.rings.reset();
        let bar = &self.transfers.doorbells.bar;
        let (submission, completion) = self.admin.rings.addresses();
        let last = u32::from(self.admin.rings.entries() - 1);
        bar.write(regs::AQA, AdminSizes::empty().with_submission(last).with_completion(last));
        bar.write(regs::ASQ, submission);
        bar.write(regs::ACQ, completion);
        bar.write(regs::CC, Configuration::ENTRY_SIZES | Configuration::ENABLE);
        self.state = State::Enabling { deadline: self.deadline() };
    }

    fn deadline(&self) -> u64 {
        self.queue.now(IOTimerClock::UptimeRaw) + self.limits.patience
    }

    /// An admin command has ended. An error is what is wrong with the controller.
    pub(crate) fn admin_done(
        &mut self,
        asked: Asked,
        result: Result<u32, CommandError>,
    ) -> Result<(), String> {
        let needed = || result.map_err(|err| format!("{asked:?}: {err}"));
        match asked {
            Asked::Controller => {
                needed()?;
                let data = self.admin.identified.to_vec();
                self.controller = Controller::parse(&data).map_err(|err| err.to_string())?;
                self.transfers.most_bytes = self.controller.most_bytes;
                self.transfers.uses_sgls = self.controller.takes_sgls;
                self.ask_for_queues();
            }
            Asked::QueueCount => {
                let granted = needed()?;
                self.make_queues((granted & 0xffff).min(granted >> 16) + 1)?;
                self.make_completion_queue(0);
            }
            Asked::CompletionQueue(place) => {
                needed()?;
                self.make_submission_queue(place);
            }
            Asked::SubmissionQueue(place) => {
                needed()?;
                match place + 1 < self.transfers.count {
                    true => self.make_completion_queue(place + 1),
                    false => self.offer_shadow()?,
                }
            }
            Asked::Shadow => {
                self.transfers.doorbells.uses_shadow = result.is_ok();
                if let Err(err) = result {
                    warn!(reason:% = err; "no shadow doorbells");
                }
                self.ask_for_events();
            }
            Asked::EventsWanted => {
                if let Err(err) = result {
                    warn!(reason:% = err; "namespaces that change will not be noticed");
                    self.controller.tells_of_namespaces = false;
                }
                self.begin_scan();
            }
            Asked::ActiveList => {
                needed()?;
                self.take_list()?;
            }
            Asked::Namespace(number) => self.take_namespace(number, result),
            Asked::Event => self.event_occurred(result),
            Asked::ChangedNamespaces => {
                if result.is_ok() {
                    self.begin_scan();
                }
                self.ask_for_event();
            }
            Asked::EventLog => {}
            Asked::Abort => {
                if let Err(err) = result {
                    debug!(reason:% = err; "an abort was refused");
                }
            }
            Asked::Health => self.health_has_come(result),
        }
        Ok(())
    }

    /// `Set Features`, number of queues (section 5.21.1.7), both less one.
    fn ask_for_queues(&mut self) {
        let most = Doorbells::most_pairs(self.limits.doorbell_stride) as u32 - 1;
        let wanted = (u32::from(MOST_QUEUES) + 1).min(most) - 1;
        self.ask(Asked::QueueCount, set_feature(0x07, wanted | wanted << 16));
    }

    /// Memory for as many pairs as were granted and wanted. With two or more, the last is one whose
    /// completions are looked for.
    fn make_queues(&mut self, granted: u32) -> Result<(), String> {
        let most = Doorbells::most_pairs(self.limits.doorbell_stride) as usize - 1;
        self.transfers.count = (granted as usize).min(usize::from(MOST_QUEUES) + 1).min(most);
        while self.transfers.queues.len() < self.transfers.count {
            let id = self.transfers.queues.len() as u16 + 1;
            let queue = IoQueue::make(&self.device, id, self.limits.entries);
            self.transfers
                .queues
                .push(queue.map_err(|err| format!("memory for queue {id}: {err}"))?);
        }
        for (place, queue) in self.transfers.queues[..self.transfers.count].iter_mut().enumerate() {
            queue.rings.reset();
            queue.is_polled = place > 0 && place + 1 == self.transfers.count;
            queue.vector = match queue.is_polled {
                true => NO_VECTOR,
                // With few vectors, some serve several queues.
                false => (place + 1) % self.interrupts.len(),
            };
        }
        Ok(())
    }

    /// Section 5.3.
    fn make_completion_queue(&mut self, place: usize) {
        let queue = &self.transfers.queues[place];
        let interrupt = match queue.vector {
            NO_VECTOR => 0,
            vector => 1 << 1 | (vector as u32) << 16,
        };
        let (_, address) = queue.rings.addresses();
        let command = Command {
            opcode: admin::CREATE_COMPLETION_QUEUE,
            data: (address, 0),
            dwords: [id_and_size(queue), CONTIGUOUS | interrupt, 0, 0],
            ..Command::default()
        };
        self.ask(Asked::CompletionQueue(place), command);
    }

    /// Section 5.4.
    fn make_submission_queue(&mut self, place: usize) {
        let queue = &self.transfers.queues[place];
        let (address, _) = queue.rings.addresses();
        let completion = u32::from(queue.rings.id()) << 16;
        let command = Command {
            opcode: admin::CREATE_SUBMISSION_QUEUE,
            data: (address, 0),
            dwords: [id_and_size(queue), CONTIGUOUS | completion, 0, 0],
            ..Command::default()
        };
        self.ask(Asked::SubmissionQueue(place), command);
    }

    /// Section 5.7.
    fn offer_shadow(&mut self) -> Result<(), String> {
        if !self.controller.has_shadow_doorbells {
            self.ask_for_events();
            return Ok(());
        }
        if self.transfers.doorbells.shadow.is_none() {
            let pages = Shared::make(&self.device, [PAGE, PAGE]);
            let [doorbells, event_indices] = pages.map_err(|err| err.to_string())?;
            self.transfers.doorbells.shadow = Some(Shadow { doorbells, event_indices });
        }
        let shadow = self.transfers.doorbells.shadow.as_ref().expect("made above");
        shadow.clear();
        let command = Command {
            opcode: admin::DOORBELL_BUFFER_CONFIG,
            data: (shadow.doorbells.address(), shadow.event_indices.address()),
            ..Command::default()
        };
        self.ask(Asked::Shadow, command);
        Ok(())
    }

    /// `Set Features`, asynchronous event configuration (section 5.21.1.11).
    fn ask_for_events(&mut self) {
        const NAMESPACES: u32 = 1 << 8;
        match self.controller.tells_of_namespaces {
            true => self.ask(Asked::EventsWanted, set_feature(0x0b, NAMESPACES)),
            false => self.begin_scan(),
        }
    }

    /// Section 5.2.
    fn ask_for_event(&mut self) {
        if self.controller.tells_of_namespaces {
            let opcode = admin::ASYNCHRONOUS_EVENT_REQUEST;
            self.ask(Asked::Event, Command { opcode, ..Command::default() });
        }
    }

    fn event_occurred(&mut self, result: Result<u32, CommandError>) {
        /// A notice, that the attributes of namespaces have changed.
        const NAMESPACES: u32 = 0x0002;
        match result {
            Ok(event) if event & 0xffff == NAMESPACES => {
                // To be told of the next change, the log has to be read.
                let address = self.admin.unread.address();
                self.ask_for_log(Asked::ChangedNamespaces, 0x04, address, PAGE as u32);
            }
            Ok(event) => {
                warn!(event; "the controller reports something");
                // It reports this kind again when its log was read (section 5.2).
                let address = self.admin.unread.address();
                self.ask_for_log(Asked::EventLog, event >> 16 & 0xff, address, 512);
                self.ask_for_event();
            }
            Err(err) => warn!(reason:% = err; "no more events"),
        }
    }

    /// Looks at all namespaces, from the first on.
    fn begin_scan(&mut self) {
        if self.admin.under_way(Asked::ActiveList) > 0 || !self.scan.listed.is_empty() {
            // One page serves both, so it is done again when the one that is under way has ended.
            self.scan.is_stale = true;
            return;
        }
        self.scan = Scan::default();
        self.ask_to_identify(Asked::ActiveList, 2, 0);
    }

    fn take_list(&mut self) -> Result<(), String> {
        let data = self.admin.identified.to_vec();
        let list = identify::active_list(&data, self.scan.last, self.controller.most_namespaces);
        let (mut listed, has_more) = list.map_err(|err| err.to_string())?;
        let room = MOST_NAMESPACES - self.scan.found.len().min(MOST_NAMESPACES);
        if listed.len() > room {
            warn!(listed = listed.len(); "only the first {MOST_NAMESPACES} namespaces are used");
        }
        self.scan.has_more = has_more && listed.len() < room;
        self.scan.last = listed.last().copied().unwrap_or(self.scan.last);
        listed.truncate(room);
        listed.reverse();
        self.scan.listed = listed;
        self.look_at_next_namespace();
        Ok(())
    }

    fn look_at_next_namespace(&mut self) {
        match self.scan.listed.last() {
            Some(number) => {
                let number = *number;
                self.ask_to_identify(Asked::Namespace(number), 0, number);
            }
            None if self.scan.has_more => {
                self.scan.has_more = false;
                self.ask_to_identify(Asked::ActiveList, 2, self.scan.last);
            }
            None => self.scan_done(),
        }
    }

    fn take_namespace(&mut self, number: u32, result: Result<u32, CommandError>) {
        self.scan.listed.pop();
        let parsed = match result {
            Ok(_) => Namespace::parse(&self.admin.identified.to_vec()),
            Err(err) => Err(Error::new(IOReturn::DEVICE_ERROR, err.to_string())),
        };
        match parsed {
            Ok(Some(namespace)) => drop(self.scan.found.insert(number, namespace)),
            Ok(None) => {}
            Err(err) => warn!(number, reason:% = err; "a namespace cannot be used"),
        }
        self.look_at_next_namespace();
    }

    fn scan_done(&mut self) {
        let scan = std::mem::take(&mut self.scan);
        if scan.is_stale {
            return self.begin_scan();
        }
        self.transfers.namespaces = scan.found;
        if !matches!(self.state, State::Identifying) {
            info!(disks = self.transfers.namespaces.len(); "the namespaces have changed");
            return;
        }
        self.state = State::Running;
        info!(
            model = self.controller.model.as_str(),
            serial = self.controller.serial.as_str(),
            firmware = self.controller.firmware.as_str(),
            disks = self.transfers.namespaces.len(),
            queues = self.transfers.count,
            vectors = self.interrupts.len(),
            shadow = self.transfers.doorbells.uses_shadow;
            "the controller works"
        );
        self.ask_for_event();
        self.answer_all();
        self.house_what_was_kept();
    }
}

/// A queue's memory is in one piece.
const CONTIGUOUS: u32 = 1;

fn id_and_size(queue: &IoQueue) -> u32 {
    u32::from(queue.rings.id()) | u32::from(queue.rings.entries() - 1) << 16
}

fn set_feature(feature: u32, value: u32) -> Command {
    let dwords = [feature, value, 0, 0];
    Command { opcode: admin::SET_FEATURES, dwords, ..Command::default() }
}
