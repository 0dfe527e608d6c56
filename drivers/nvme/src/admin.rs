//! The admin queue pair, and which command in it asked for what.

use iohost_driver::prelude::*;

use crate::Nvme;
use crate::bring_up::State;
use crate::command::{Command, admin};
use crate::memory::{PAGE, Shared};
use crate::rings::Rings;
use crate::status::CommandError;

/// Entries: far more than we have under way.
const ENTRIES: u16 = 32;

/// The queue pair, and pages for the answers.
pub struct AdminQueue {
    pub rings: Rings,
    /// What the controller tells when it is asked to identify something: one at a time.
    pub identified: Shared,
    /// The log of the health.
    pub health: Shared,
    /// Logs that have to be read so that the controller goes on to report.
    pub unread: Shared,
    slots: Vec<Option<UnderWay>>,
}

/// A command under way.
#[derive(Clone, Copy)]
struct UnderWay {
    asked: Asked,
    /// In ticks.
    issued: u32,
}

/// What a command was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Controller,
    QueueCount,
    /// Of the I/O queue at this place.
    CompletionQueue(usize),
    SubmissionQueue(usize),
    Shadow,
    EventsWanted,
    ActiveList,
    Namespace(u32),
    /// Is answered when something happens.
    Event,
    ChangedNamespaces,
    /// A log that has to be read, and whose contents nobody needs.
    EventLog,
    Abort,
    Health,
}

impl AdminQueue {
    pub(crate) fn make(device: &IOPCIDevice, most_entries: u16) -> Result<Self> {
        let entries = ENTRIES.min(most_entries);
        let [submission, completion] = Rings::sizes(entries);
        let [submission, completion, identified, health, unread] =
            Shared::make(device, [submission, completion, PAGE, PAGE, PAGE])?;
        Ok(Self {
            rings: Rings::new(0, entries, submission, completion),
            identified,
            health,
            unread,
            slots: vec![None; usize::from(entries) - 1],
        })
    }

    /// Forgets what is under way, as does a controller that is reset.
    pub(crate) fn forget_all(&mut self) {
        self.slots.fill(None);
    }

    /// Whether there is a command that the controller has to answer soon.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.slots.iter().flatten().any(|command| command.asked != Asked::Event)
    }

    /// What is under way longer than so many ticks.
    pub(crate) fn overdue(&self, now: u32, ticks: u32) -> Option<Asked> {
        let commands = self.slots.iter().flatten().filter(|it| it.asked != Asked::Event);
        let mut overdue = commands.filter(|it| now.wrapping_sub(it.issued) >= ticks);
        overdue.next().map(|it| it.asked)
    }

    pub(crate) fn under_way(&self, asked: Asked) -> usize {
        self.slots.iter().flatten().filter(|command| command.asked == asked).count()
    }
}

impl Nvme {
    /// Issues a command; its end comes to [`Nvme::admin_done`].
    pub(crate) fn ask(&mut self, asked: Asked, command: Command) {
        let place = self.admin.slots.iter().position(Option::is_none);
        let Some(place) = place else {
            // All of them are bounded, so that a controller that answers none is overdue first.
            warn!(asked:?; "no admin command is free");
            return;
        };
        self.admin.slots[place] = Some(UnderWay { asked, issued: self.transfers.ticks });
        self.admin.rings.push(place as u16, command);
        self.admin.rings.commit(&self.transfers.doorbells);
        self.watch();
    }

    /// `Identify`, into the page for it.
    pub(crate) fn ask_to_identify(&mut self, asked: Asked, structure: u32, namespace: u32) {
        let command = Command {
            opcode: admin::IDENTIFY,
            namespace,
            data: (self.admin.identified.address(), 0),
            dwords: [structure, 0, 0, 0],
            ..Command::default()
        };
        self.ask(asked, command);
    }

    /// `Get Log Page`, its first bytes: a multiple of 4, a page at most.
    pub(crate) fn ask_for_log(&mut self, asked: Asked, page: u32, address: u64, bytes: u32) {
        let command = Command {
            opcode: admin::GET_LOG_PAGE,
            namespace: u32::MAX,
            data: (address, 0),
            dwords: [page | (bytes / 4 - 1) << 16, 0, 0, 0],
            ..Command::default()
        };
        self.ask(asked, command);
    }

    /// Takes the completions of the admin queue.
    pub(crate) fn look_at_admin(&mut self) {
        if !matches!(self.state, State::Identifying | State::Running) {
            // What a controller writes while it is being disabled is for nobody.
            return;
        }
        while let Some(completion) = self.admin.rings.next() {
            let slot = self.admin.slots.get_mut(usize::from(completion.id));
            let Some(UnderWay { asked, .. }) = slot.and_then(Option::take) else {
                let words = format!(
                    "a completion for admin command {}, which is not under way",
                    completion.id
                );
                return self.trouble(&words);
            };
            self.admin.rings.acknowledge(&self.transfers.doorbells);
            let result = match completion.status & 0x7ff {
                0 => Ok(completion.result),
                _ => Err(CommandError(completion.status)),
            };
            if let Err(words) = self.admin_done(asked, result) {
                return self.trouble(&words);
            }
        }
    }
}
