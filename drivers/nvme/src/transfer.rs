//! The way of a request: taken, checked, cut into commands, issued, completed, answered.

use block_api::{Failure, Operation, Request as Asked, Status};
use iohost_driver::prelude::*;

use crate::Nvme;
use crate::bring_up::State;
use crate::client::{Client, Entry};
use crate::command::{Command, Completion, io};
use crate::identify::Namespace;
use crate::io_queue::{Part, Request};
use crate::prp::{self, LIST};
use crate::status::CommandError;

/// How often a command is tried, counting the first time.
pub const MOST_ATTEMPTS: u8 = 3;

/// The most blocks of a range that is discarded by one command.
const MOST_DISCARDED: u64 = 1 << 30;

impl Nvme {
    /// A client has put requests into its queue, or has taken completions out of its other one.
    pub(crate) fn serve(&mut self, session: SessionId) {
        if let Some(place) = self.clients.place(session) {
            self.take_requests(place);
            self.settle();
        }
    }

    /// Takes a client's requests, as long as there is room for their commands.
    pub(crate) fn take_requests(&mut self, place: usize) {
        let mut entries = Vec::new();
        loop {
            let queues = [false, true].map(|is_polled| self.queue_for(place, is_polled));
            let room = match &self.state {
                State::Running => queues.map(|queue| self.io[queue].room()).into_iter().min(),
                // They are refused one by one.
                State::Failed(_) => Some(usize::MAX),
                _ => None,
            };
            let room = room.unwrap_or(0);
            let Some(client) = self.clients.get(place) else { return };
            if room == 0 {
                client.has_more = true;
                return;
            }
            let may_have_more = client.take(room, &mut entries);
            client.under_way += entries.len();
            for entry in entries.drain(..) {
                if let Err((tag, failure)) = self.accept(place, &entry)
                    && let Some(client) = self.clients.get(place)
                {
                    client.answer(tag, Err(&failure));
                }
            }
            if !may_have_more {
                return;
            }
        }
    }

    /// Begins a request, or says why not.
    #[inline]
    fn accept(&mut self, place: usize, entry: &Entry) -> Result<(), (u64, Failure)> {
        let malformed = |tag| (tag, Failure::new(Status::Malformed, "no request that we know"));
        let asked = Asked::from_bytes(&entry.bytes).map_err(|err| malformed(err.tag))?;
        let tag = asked.tag;
        if !entry.is_whole {
            return Err(malformed(tag));
        }
        if let State::Failed(failure) = &self.state {
            return Err((tag, failure.clone()));
        }
        let generation = self.client(place).generation;
        if asked.generation != generation {
            let words = format!("it is of generation {}, not {generation}", asked.generation);
            return Err((tag, Failure::new(Status::Stale, words)));
        }
        let address = self.check(place, &asked).map_err(|failure| (tag, failure))?;
        // A flush has no bytes, and ends as one of one byte would.
        let length = if asked.operation == Operation::Flush { 1 } else { asked.length };
        let request = self.requests.insert(Request {
            client: place,
            tag,
            operation: asked.operation,
            is_polled: asked.is_polled,
            disk: asked.disk,
            offset: asked.offset,
            address,
            left: length,
            failure: None,
        });
        let queue = self.queue_for(place, asked.is_polled);
        self.io[queue].backlog.push_back(Part { request, start: 0, length, attempts: 0 });
        self.issue(queue);
        Ok(())
    }

    /// Whether a request can be done; then, where the controller finds its bytes.
    #[inline]
    fn check(&mut self, place: usize, asked: &Asked) -> Result<u64, Failure> {
        let Asked { operation, disk, offset, length, at, .. } = *asked;
        let namespace = self.namespaces.get(&disk).ok_or_else(|| no_disk(disk))?;
        if operation == Operation::Flush {
            return Ok(0);
        }
        let block = 1 << namespace.shift;
        if length == 0 || !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            let words = format!("{length} bytes at {offset} of a disk of blocks of {block} bytes");
            return Err(Failure::new(Status::NotAligned, words));
        }
        let end = offset.checked_add(length);
        if end.is_none_or(|end| end > namespace.bytes()) {
            let words = format!("{length} bytes at {offset} of {} bytes", namespace.bytes());
            return Err(Failure::new(Status::OutOfRange, words));
        }
        if operation.changes_the_disk() && namespace.is_read_only {
            return Err(Failure::new(Status::ReadOnly, format!("disk {disk}")));
        }
        let is_there = match operation {
            Operation::Discard => self.controller.has_dataset_management,
            Operation::WriteZeroes => self.controller.has_write_zeroes,
            _ => true,
        };
        if !is_there {
            return Err(Failure::new(Status::Unsupported, format!("{operation:?}")));
        }
        if !operation.has_data() {
            return Ok(0);
        }
        if !at.is_multiple_of(4) {
            let words = format!("the bytes begin at {at} in memory, no multiple of 4");
            return Err(Failure::new(Status::NotAligned, words));
        }
        self.client(place).address(asked.memory, at, length)
    }

    fn client(&mut self, place: usize) -> &mut Client {
        self.clients.get(place).expect("a request comes from a client")
    }

    /// The queue that has a client's commands.
    #[inline]
    pub(crate) fn queue_for(&mut self, place: usize, is_polled: bool) -> usize {
        let polled = self.io_count.checked_sub(1).filter(|last| self.io[*last].is_polled);
        match polled {
            Some(last) if is_polled => last,
            _ => {
                let turn = self.clients.get(place).map_or(0, |client| client.turn);
                turn % (self.io_count - usize::from(polled.is_some())).max(1)
            }
        }
    }

    /// Writes commands for what waits for a queue, as far as it has room.
    pub(crate) fn issue(&mut self, place: usize) {
        let now = self.ticks;
        while self.io[place].has_slot()
            && let Some(part) = self.io[place].backlog.pop_front()
        {
            let request = self.requests.get_mut(part.request);
            let namespace = self.namespaces.get(&request.disk).copied();
            // Namespaces can vanish, and the rest of a request that has failed is not done.
            let namespace = namespace.filter(|_| request.failure.is_none());
            let Some(namespace) = namespace else {
                let disk = request.disk;
                request.failure.get_or_insert_with(|| no_disk(disk));
                self.end_part(part.request, part.length);
                continue;
            };
            let most = match request.operation {
                Operation::Discard => MOST_DISCARDED << namespace.shift,
                _ => self.controller.most_bytes,
            };
            let queue = &mut self.io[place];
            let length = part.length.min(most);
            if length < part.length {
                let (start, length) = (part.start + length, part.length - length);
                queue.backlog.push_front(Part { start, length, ..part });
            }
            let part = Part { length, attempts: part.attempts + 1, ..part };
            let Some(id) = queue.take_slot(part, now) else { return };
            let at = usize::from(id) * LIST;
            let command = command_for(request, &namespace, part, &queue.lists, at);
            queue.rings.push(id, command);
        }
    }

    /// Takes the completions of a queue.
    pub(crate) fn look_at(&mut self, place: usize) {
        while let Some(completion) = self.io[place].rings.next() {
            if let Err(words) = self.command_done(place, completion) {
                return self.trouble(&words);
            }
        }
        self.io[place].rings.acknowledge(&self.doorbells);
        self.issue(place);
    }

    #[inline]
    fn command_done(&mut self, place: usize, completion: Completion) -> Result<(), String> {
        let queue = &mut self.io[place];
        let Some(part) = queue.give_back(completion.id) else {
            let Completion { id, status, .. } = completion;
            let queue = queue.rings.id();
            return Err(format!(
                "a completion (status {status:#x}) in queue {queue} for command {id}, which is not under way"
            ));
        };
        if completion.status & 0x7ff == 0 {
            self.resets = 0;
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
        self.fail_request(part.request, Failure::new(error.kind(), words));
        self.end_part(part.request, part.length);
        Ok(())
    }

    /// The first failure of a request is the one that its client is told.
    pub(crate) fn fail_request(&mut self, number: u32, failure: Failure) {
        self.requests.get_mut(number).failure.get_or_insert(failure);
    }

    /// Some bytes of a request are done or given up. With the last of them it is answered.
    #[inline]
    pub(crate) fn end_part(&mut self, number: u32, bytes: u64) {
        let Some(request) = self.requests.end(number, bytes) else { return };
        let Some(client) = self.clients.get(request.client) else { return };
        match &request.failure {
            None => client.answer(request.tag, Ok(())),
            Some(failure) => {
                client.answer(request.tag, Err(failure));
            }
        }
        self.clients.forget_if_done(request.client);
    }

    /// After anything was done: more requests are taken if there is room, doorbells are rung once,
    /// and clients are notified once.
    pub(crate) fn settle(&mut self) {
        for place in 0..self.clients.count() {
            if self.clients.get(place).is_some_and(|client| client.has_more) {
                self.take_requests(place);
            }
        }
        for queue in &mut self.io[..self.io_count] {
            queue.rings.commit(&self.doorbells);
        }
        self.clients.notify();
        self.watch();
        self.poll_later();
    }

    /// Looks for the completions of a polled queue, over and over, as work of our queue like any
    /// other, as long as it has commands.
    fn poll_later(&mut self) {
        let polled = self.io_count.checked_sub(1).filter(|last| self.io[*last].is_polled);
        let is_needed = polled.is_some_and(|last| !self.io[last].is_idle());
        if is_needed && !self.is_polling {
            self.is_polling = true;
            self.queue.dispatch_async(move |nvme| {
                nvme.is_polling = false;
                let last = nvme.io_count.checked_sub(1).filter(|last| nvme.io[*last].is_polled);
                if let Some(last) = last {
                    nvme.look_at(last);
                }
                nvme.settle();
            });
        }
    }
}

/// The command for a part of a request (sections 6.7 to 6.16).
#[inline]
fn command_for(
    request: &Request,
    namespace: &Namespace,
    part: Part,
    lists: &crate::memory::Shared,
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
            command.data = prp::describe(request.address + part.start, part.length, lists, at);
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

fn no_disk(disk: u32) -> Failure {
    Failure::new(Status::NoSuchDisk, format!("there is no disk {disk}"))
}
