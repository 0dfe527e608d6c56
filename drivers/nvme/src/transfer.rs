//! The way of a request through the controller's queues: cut into commands, issued, completed.
//!
//! Nothing here knows of clients. A request that is sound comes in by [`Transfers::begin`] and goes
//! out by [`Transfers::ended`]; `serve.rs` has what is before and behind that.

use std::collections::{BTreeMap, VecDeque};

use block_api::{Failure, Operation, Status};
use iohost_driver::prelude::*;

use crate::command::{Command, Completion, data_block, io};
use crate::identify::Namespace;
use crate::io_queue::{Ended, IoQueue, Part, Request, Requests};
use crate::memory::Shared;
use crate::prp::{self, LIST};
use crate::rings::Doorbells;
use crate::status::CommandError;

/// How often a command is tried, counting the first time.
pub const MOST_ATTEMPTS: u8 = 3;

/// The most blocks of a range that is discarded by one command.
const MOST_DISCARDED: u64 = 1 << 30;

/// The I/O queues of a controller, and the requests in them.
pub struct Transfers {
    pub doorbells: Doorbells,
    pub queues: Vec<IoQueue>,
    /// How many of `queues` the controller has.
    pub count: usize,
    pub namespaces: BTreeMap<u32, Namespace>,
    /// The most bytes of one command.
    pub most_bytes: u64,
    /// One descriptor says where data is, however long: no list is written.
    pub uses_sgls: bool,
    /// Half seconds in which something was under way.
    pub ticks: u32,
    /// A command has worked since this was looked at.
    pub has_worked: bool,
    requests: Requests,
    /// Parts of requests that have to find a queue again, after a reset.
    homeless: VecDeque<Part>,
    /// Requests that are done or have failed, and were not taken.
    ended: Vec<Ended>,
}

impl Transfers {
    /// Without a queue or a disk yet.
    pub fn new(doorbells: Doorbells) -> Self {
        Self {
            doorbells,
            queues: Vec::new(),
            count: 0,
            namespaces: BTreeMap::new(),
            most_bytes: prp::MOST_BYTES,
            uses_sgls: false,
            ticks: 0,
            has_worked: false,
            requests: Requests::default(),
            homeless: VecDeque::new(),
            ended: Vec::new(),
        }
    }

    /// Takes a request, and issues it if its queue has room. There is a queue.
    #[inline]
    pub fn begin(&mut self, request: Request) {
        let queue = self.queue_for(request.turn, request.is_polled);
        let length = request.left;
        let request = self.requests.insert(request);
        let part = Part { request, start: 0, length, attempts: 0 };
        if self.queues[queue].room() == 0 {
            return self.queues[queue].backlog.push_back(part);
        }
        self.issue_part(queue, part);
        self.issue(queue);
    }

    /// The requests that have ended, in the order in which they did. Whoever takes them leaves it
    /// empty.
    #[inline]
    pub fn ended(&mut self) -> &mut Vec<Ended> {
        &mut self.ended
    }

    /// How many requests of a turn, of whatever kind, can be issued at once.
    #[inline]
    pub fn room(&self, turn: usize) -> usize {
        let room = |is_polled| self.queues[self.queue_for(turn, is_polled)].room();
        room(false).min(room(true))
    }

    /// The queue whose completions are looked for, if there is one: the last.
    #[inline]
    pub fn polled(&self) -> Option<usize> {
        self.count.checked_sub(1).filter(|last| self.queues[*last].is_polled)
    }

    /// The queue that has the commands of a turn, by which those who send are spread.
    #[inline]
    fn queue_for(&self, turn: usize, is_polled: bool) -> usize {
        match self.polled() {
            Some(last) if is_polled => last,
            polled => turn % (self.count - usize::from(polled.is_some())).max(1),
        }
    }

    /// Writes commands for what waits for a queue, as far as it has room.
    pub fn issue(&mut self, place: usize) {
        while self.queues[place].has_slot()
            && let Some(part) = self.queues[place].backlog.pop_front()
        {
            self.issue_part(place, part);
        }
    }

    /// Writes a command for as much of a part as one can do. There is a slot.
    #[inline]
    fn issue_part(&mut self, place: usize, part: Part) {
        let request = self.requests.get_mut(part.request);
        let namespace = self.namespaces.get(&request.disk).copied();
        // Namespaces can vanish, and the rest of a request that has failed is not done.
        let namespace = namespace.filter(|_| request.failure.is_none());
        let Some(namespace) = namespace else {
            let disk = request.disk;
            request.failure.get_or_insert_with(|| no_disk(disk));
            return self.end_part(part.request, part.length);
        };
        let most = match request.operation {
            Operation::Discard => MOST_DISCARDED << namespace.shift,
            _ => self.most_bytes,
        };
        let queue = &mut self.queues[place];
        let length = part.length.min(most);
        if length < part.length {
            let (start, length) = (part.start + length, part.length - length);
            queue.backlog.push_front(Part { start, length, ..part });
        }
        let part = Part { length, attempts: part.attempts + 1, ..part };
        let Some(id) = queue.take_slot(part, self.ticks) else { return };
        let at = usize::from(id) * LIST;
        let command = command_for(request, &namespace, part, self.uses_sgls, &queue.lists, at);
        queue.rings.push(id, command);
    }

    /// Tells the controller of the commands that it was not told of: once for each queue.
    #[inline]
    pub fn commit(&mut self) {
        for queue in &mut self.queues[..self.count] {
            queue.rings.commit(&self.doorbells);
        }
    }

    /// Takes the completions of a queue, and issues what waited for them.
    ///
    /// Errors: what the controller did that cannot be.
    pub fn look_at(&mut self, place: usize) -> Result<(), String> {
        while let Some(completion) = self.queues[place].rings.next() {
            self.command_done(place, completion)?;
        }
        self.queues[place].rings.acknowledge(&self.doorbells);
        self.issue(place);
        Ok(())
    }

    #[inline]
    fn command_done(&mut self, place: usize, completion: Completion) -> Result<(), String> {
        let queue = &mut self.queues[place];
        let Some(part) = queue.give_back(completion.id) else {
            let Completion { id, status, .. } = completion;
            let queue = queue.rings.id();
            return Err(format!(
                "a completion (status {status:#x}) in queue {queue} for command {id}, which is not under way"
            ));
        };
        if completion.status & 0x7ff == 0 {
            self.has_worked = true;
            self.end_part(part.request, part.length);
            return Ok(());
        }
        let error = CommandError(completion.status);
        if error.may_pass() && part.attempts < MOST_ATTEMPTS {
            debug!(reason:% = error, attempt = part.attempts; "a command is tried again");
            queue.backlog.push_back(part);
            return Ok(());
        }
        let words = format!("{error}, at byte {} of the request", part.start);
        self.fail_part(part, Failure::new(error.kind(), words));
        Ok(())
    }

    /// A part is given up. The first failure of a request is the one that is told.
    fn fail_part(&mut self, part: Part, failure: Failure) {
        self.requests.get_mut(part.request).failure.get_or_insert(failure);
        self.end_part(part.request, part.length);
    }

    /// Some bytes of a request are done or given up. With the last of them it has ended.
    #[inline]
    fn end_part(&mut self, number: u32, bytes: u64) {
        if let Some(Request { client, tag, failure, .. }) = self.requests.end(number, bytes) {
            self.ended.push(Ended { client, tag, failure });
        }
    }

    /// Takes everything out of the queues, which the controller forgets, to be done again; but what
    /// was tried often enough.
    pub fn keep_what_is_under_way(&mut self) {
        for place in 0..self.count {
            let queue = &mut self.queues[place];
            let backlog = std::mem::take(&mut queue.backlog);
            for part in queue.take_all() {
                if part.attempts < MOST_ATTEMPTS {
                    self.homeless.push_back(part);
                    continue;
                }
                let words = format!("not done in {MOST_ATTEMPTS} attempts, with resets in between");
                self.fail_part(part, Failure::new(Status::NotResponding, words));
            }
            self.homeless.extend(backlog);
        }
        self.count = 0;
    }

    /// Puts what was kept into queues again, and issues it.
    pub fn house_what_was_kept(&mut self) {
        for part in std::mem::take(&mut self.homeless) {
            let request = self.requests.get_mut(part.request);
            let (turn, is_polled) = (request.turn, request.is_polled);
            let queue = self.queue_for(turn, is_polled);
            self.queues[queue].backlog.push_back(part);
        }
        for place in 0..self.count {
            self.issue(place);
        }
    }

    /// Gives up what was kept.
    pub fn fail_what_was_kept(&mut self, failure: &Failure) {
        for part in std::mem::take(&mut self.homeless) {
            self.fail_part(part, failure.clone());
        }
    }
}

/// The command for a part of a request (sections 6.7 to 6.16).
#[inline]
fn command_for(
    request: &Request,
    namespace: &Namespace,
    part: Part,
    uses_sgls: bool,
    lists: &Shared,
    at: usize,
) -> Command {
    let first = (request.offset + part.start) >> namespace.shift;
    let blocks = part.length >> namespace.shift;
    let mut command = Command { namespace: request.disk, ..Command::default() };
    match request.operation {
        Operation::Read | Operation::Write | Operation::WriteThrough => {
            /// "Force unit access".
            const THROUGH: u32 = 1 << 30;
            let through = request.operation == Operation::WriteThrough;
            let is_read = request.operation == Operation::Read;
            command.opcode = if is_read { io::READ } else { io::WRITE };
            let address = request.address + part.start;
            command.has_sgl = uses_sgls;
            command.data = match uses_sgls {
                true => data_block(address, part.length as u32),
                false => prp::describe(address, part.length, lists, at),
            };
            let flags = if through { THROUGH } else { 0 };
            command.dwords = [first as u32, (first >> 32) as u32, (blocks - 1) as u32 | flags, 0];
        }
        Operation::Flush => command.opcode = io::FLUSH,
        Operation::WriteZeroes => {
            command.opcode = io::WRITE_ZEROES;
            command.dwords = [first as u32, (first >> 32) as u32, (blocks - 1) as u32, 0];
        }
        Operation::Discard => {
            const DEALLOCATE: u32 = 1 << 2;
            let mut range = [0; 16];
            range[4..8].copy_from_slice(&(blocks as u32).to_le_bytes());
            range[8..16].copy_from_slice(&first.to_le_bytes());
            lists.write(at, &range);
            command.opcode = io::DATASET_MANAGEMENT;
            command.data = (lists.address() + at as u64, 0);
            command.dwords = [0, DEALLOCATE, 0, 0]; // one range
        }
    }
    command
}

pub fn no_disk(disk: u32) -> Failure {
    Failure::new(Status::NoSuchDisk, format!("there is no disk {disk}"))
}
