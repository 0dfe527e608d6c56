//! Requests of clients: taken and checked, and answered when they have ended.

use block_api::{Failure, Operation, Request as Asked, Status};
use iohost_driver::prelude::*;

use crate::Nvme;
use crate::bring_up::State;
use crate::client::{Client, Entry};
use crate::io_queue::Request;
use crate::transfer::no_disk;

impl Nvme {
    /// A client has put requests into its queue, or has taken completions out of its other one.
    pub(crate) fn serve(&mut self, session: SessionId) {
        if let Some(place) = self.clients.place(session) {
            if let Some(client) = self.clients.get(place) {
                // The end of this call takes back that we look by ourselves.
                client.end_polling();
            }
            self.take_requests(place);
            self.settle();
        }
    }

    /// Takes a client's requests, as long as there is room for their commands.
    pub(crate) fn take_requests(&mut self, place: usize) {
        // Kept for the next time, as its memory is.
        let mut entries = std::mem::take(&mut self.entries);
        while self.take_some_requests(place, &mut entries) {}
        self.entries = entries;
    }

    /// Takes some of a client's requests. Whether there can be more, and room for them.
    fn take_some_requests(&mut self, place: usize, entries: &mut Vec<Entry>) -> bool {
        let Some(client) = self.clients.get(place) else { return false };
        let room = match &self.state {
            State::Running => self.transfers.room(client.turn),
            // They are refused one by one.
            State::Failed(_) => usize::MAX,
            _ => 0,
        };
        if room == 0 {
            client.has_more = true;
            return false;
        }
        let may_have_more = client.take(room, entries);
        client.under_way += entries.len();
        for entry in entries.drain(..) {
            if let Err((tag, failure)) = self.accept(place, &entry)
                && let Some(client) = self.clients.get(place)
            {
                client.refuse(tag, failure);
            }
        }
        may_have_more
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
        let Client { generation, turn, .. } = *self.client(place);
        if asked.generation != generation {
            let words = format!("it is of generation {}, not {generation}", asked.generation);
            return Err((tag, Failure::new(Status::Stale, words)));
        }
        let address = self.check(place, &asked).map_err(|failure| (tag, failure))?;
        // A flush has no bytes, and ends as one of one byte would.
        let length = if asked.operation == Operation::Flush { 1 } else { asked.length };
        self.transfers.begin(Request {
            client: place,
            turn,
            tag,
            operation: asked.operation,
            is_polled: asked.is_polled,
            disk: asked.disk,
            offset: asked.offset,
            address,
            left: length,
            failure: None,
        });
        Ok(())
    }

    /// Whether a request can be done; then, where the controller finds its bytes.
    #[inline]
    fn check(&mut self, place: usize, asked: &Asked) -> Result<u64, Failure> {
        let Asked { operation, disk, offset, length, at, .. } = *asked;
        let namespace = self.transfers.namespaces.get(&disk).ok_or_else(|| no_disk(disk))?;
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

    /// Takes the completions of a queue.
    pub(crate) fn look_at(&mut self, place: usize) {
        let looked = self.transfers.look_at(place);
        if std::mem::take(&mut self.transfers.has_worked) {
            self.resets = 0;
        }
        if let Err(words) = looked {
            self.trouble(&words);
        }
    }

    /// Answers the requests that have ended, and notifies their clients, once each.
    pub(crate) fn answer_what_has_ended(&mut self) {
        let mut ended = std::mem::take(self.transfers.ended());
        for of_one in ended.chunk_by(|one, other| one.client == other.client) {
            let place = of_one[0].client;
            if let Some(client) = self.clients.get(place) {
                client.answer_all(of_one);
                self.clients.forget_if_done(place);
            }
        }
        ended.clear();
        // Its memory is for the next ones.
        *self.transfers.ended() = ended;
        self.clients.notify();
    }

    /// After anything was done: more requests are taken if there is room, doorbells are rung once,
    /// and clients are notified once.
    pub(crate) fn settle(&mut self) {
        for place in 0..self.clients.count() {
            if self.clients.get(place).is_some_and(|client| client.has_more) {
                self.take_requests(place);
            }
        }
        self.transfers.commit();
        self.answer_what_has_ended();
        self.watch();
        self.poll_later();
    }

    /// Polls as work of our queue like any other, as long as the polled queue has commands and for
    /// a moment longer.
    fn poll_later(&mut self) {
        let Some(polled) = self.transfers.polled() else { return };
        if !self.transfers.queues[polled].is_idle() {
            self.idle_turns = 0;
        }
        if self.idle_turns < LINGER && !self.is_polling {
            self.is_polling = true;
            self.queue.dispatch_async(Self::poll);
        }
    }

    /// Looks for requests and for completions of the polled queue, over and over. Without pauses: a
    /// processor's instruction for one stops an emulated guest, and gains nothing elsewhere.
    fn poll(&mut self) {
        self.is_polling = false;
        self.clients.iter_mut().for_each(Client::begin_polling);
        for _ in 0..TURNS {
            let Some(polled) = self.transfers.polled() else { break };
            for place in 0..self.clients.count() {
                if self.clients.get(place).is_some_and(|client| client.has_requests()) {
                    self.take_requests(place);
                }
            }
            self.transfers.commit();
            self.look_at(polled);
            if !self.transfers.ended().is_empty() {
                self.idle_turns = 0;
                self.answer_what_has_ended();
            } else {
                self.idle_turns = self.idle_turns.saturating_add(1);
            }
        }
        // Without a polled queue, as after a reset, nobody would come back to look.
        if self.idle_turns >= LINGER || self.transfers.polled().is_none() {
            self.clients.iter_mut().for_each(Client::end_polling);
        }
        self.settle();
    }
}

/// Looks for requests and completions in one go, before other work of our queue has its turn.
const TURNS: u32 = 64;

/// Looks that find nothing before the polling ends, some tens of microseconds: less than it takes a
/// client to wake us, so that one who sends again at once need not.
pub const LINGER: u32 = 1000;
