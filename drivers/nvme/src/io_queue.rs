//! An I/O queue pair, what is under way in it, and what waits for it.

use std::collections::VecDeque;

use block_api::{Failure, Operation};
use iohost_driver::prelude::*;

use crate::memory::Shared;
use crate::prp::LIST;
use crate::rings::Rings;

/// Entries of a queue, if the controller allows as many.
pub const ENTRIES: u16 = 256;

/// A queue pair for commands of clients.
pub struct IoQueue {
    pub rings: Rings,
    /// A list for each command: PRP entries, or the ranges of a dataset management command.
    pub lists: Shared,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// What finds no room, and what has to be done again.
    pub backlog: VecDeque<Part>,
    /// Its interrupt; none for a queue whose completions are looked for.
    pub vector: usize,
    pub is_polled: bool,
}

/// A vector that no interrupt has.
pub const NO_VECTOR: usize = usize::MAX;

/// A command that may be under way.
#[derive(Clone, Copy, Default)]
pub struct Slot {
    part: Option<Part>,
    /// When it was issued, in ticks.
    pub issued: u32,
    pub is_being_aborted: bool,
}

/// Bytes of a request that are done by one command, or by several later.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub request: u32,
    /// Counted from the request's first byte.
    pub start: u64,
    pub length: u64,
    /// How often it was tried.
    pub attempts: u8,
}

impl IoQueue {
    pub fn make(device: &IOPCIDevice, id: u16, entries: u16) -> Result<Self> {
        let [submission, completion] = Rings::sizes(entries);
        // As one entry of a ring stays free.
        let count = entries - 1;
        let lists = usize::from(count) * LIST;
        let [submission, completion, lists] =
            Shared::make(device, [submission, completion, lists])?;
        Ok(Self {
            rings: Rings::new(id, entries, submission, completion),
            lists,
            slots: vec![Slot::default(); count.into()],
            free: (0..count).rev().collect(),
            backlog: VecDeque::new(),
            vector: NO_VECTOR,
            is_polled: false,
        })
    }

    /// How many commands can be issued now.
    #[inline]
    pub fn room(&self) -> usize {
        if self.backlog.is_empty() { self.free.len() } else { 0 }
    }

    #[inline]
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// The identifier for the next command.
    #[inline]
    pub fn take_slot(&mut self, part: Part, now: u32) -> Option<u16> {
        let id = self.free.pop()?;
        self.slots[usize::from(id)] =
            Slot { part: Some(part), issued: now, is_being_aborted: false };
        Some(id)
    }

    /// Whether a command could be issued.
    #[inline]
    pub fn has_slot(&self) -> bool {
        !self.free.is_empty()
    }

    /// What the command was for; nothing for an identifier that no command has.
    #[inline]
    pub fn give_back(&mut self, id: u16) -> Option<Part> {
        let part = self.slots.get_mut(usize::from(id))?.part.take()?;
        self.free.push(id);
        Some(part)
    }

    /// Commands under way, by identifier.
    pub fn under_way(&mut self) -> impl Iterator<Item = (u16, &mut Slot)> {
        let slots = (0_u16..).zip(&mut self.slots);
        slots.filter(|(_, slot)| slot.part.is_some())
    }

    /// Takes out what is under way, which a controller that is reset forgets.
    pub fn take_all(&mut self) -> Vec<Part> {
        let ids: Vec<u16> = self.under_way().map(|(id, _)| id).collect();
        ids.into_iter().filter_map(|id| self.give_back(id)).collect()
    }
}

/// A request that was taken and is sound.
#[derive(Debug)]
pub struct Request {
    /// Whose it is: a place among the clients.
    pub client: usize,
    /// Which of the queues has its commands.
    pub turn: usize,
    pub tag: u64,
    pub operation: Operation,
    pub is_polled: bool,
    pub disk: u32,
    /// Its first byte on the disk.
    pub offset: u64,
    /// Where the controller finds its first byte in memory.
    pub address: u64,
    /// Bytes that are neither done nor given up.
    pub left: u64,
    pub failure: Option<Failure>,
}

/// What became of a request.
#[derive(Debug)]
pub struct Ended {
    pub client: usize,
    pub tag: u64,
    pub failure: Option<Failure>,
}

/// The requests under way, by numbers that are used again.
#[derive(Default)]
pub struct Requests {
    requests: Vec<Option<Request>>,
    free: Vec<u32>,
}

impl Requests {
    #[inline]
    pub fn insert(&mut self, request: Request) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self.requests[number as usize] = Some(request);
                number
            }
            None => {
                self.requests.push(Some(request));
                self.requests.len() as u32 - 1
            }
        }
    }

    #[inline]
    pub fn get_mut(&mut self, number: u32) -> &mut Request {
        self.requests[number as usize].as_mut().expect(PART_OF)
    }

    /// Ends some bytes of a request. The request, if those were its last.
    #[inline]
    pub fn end(&mut self, number: u32, bytes: u64) -> Option<Request> {
        let request = self.get_mut(number);
        request.left -= bytes;
        if request.left > 0 {
            return None;
        }
        self.free.push(number);
        self.requests[number as usize].take()
    }
}

/// Why a request is there.
const PART_OF: &str = "a request stays until the last of its parts has ended";
