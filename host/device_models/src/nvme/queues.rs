//! Queues (section 4.1): rings in the host's memory.

use std::collections::VecDeque;

use super::command::Completion;
use crate::model::Bus;

/// A ring of commands that the controller takes.
#[derive(Debug)]
pub(super) struct SubmissionQueue {
    base: u64,
    size: u32,
    head: u32,
    tail: u32,
    pub(super) completion_queue: u16,
}

impl SubmissionQueue {
    pub(super) fn new(base: u64, size: u32, completion_queue: u16) -> Self {
        Self { base, size, head: 0, tail: 0, completion_queue }
    }

    /// Whether the tail can be there.
    pub(super) fn set_tail(&mut self, tail: u32) -> bool {
        let fits = tail < self.size;
        if fits {
            self.tail = tail;
        }
        fits
    }

    pub(super) fn head(&self) -> u32 {
        self.head
    }

    /// Where the next command is.
    pub(super) fn next(&mut self) -> Option<u64> {
        if self.head == self.tail {
            return None;
        }
        let address = self.base + u64::from(self.head) * 64;
        self.head = (self.head + 1) % self.size;
        Some(address)
    }
}

/// A ring of completions that the host takes.
#[derive(Debug)]
pub(super) struct CompletionQueue {
    base: u64,
    size: u32,
    head: u32,
    tail: u32,
    phase: bool,
    vector: Option<u16>,
    /// What finds no room.
    waiting: VecDeque<Posting>,
}

/// What is written into a completion queue.
#[derive(Debug)]
pub(super) enum Posting {
    Completion(Completion),
    /// By a controller that is not itself.
    Garbage([u8; 16]),
}

impl CompletionQueue {
    /// With a vector, it interrupts.
    pub(super) fn new(base: u64, size: u32, vector: Option<u16>) -> Self {
        Self { base, size, head: 0, tail: 0, phase: true, vector, waiting: VecDeque::new() }
    }

    /// Whether the head can be there: among what was posted.
    pub(super) fn set_head(&mut self, head: u32) -> bool {
        let unread = (self.tail + self.size - self.head) % self.size;
        let taken = (head.wrapping_add(self.size).wrapping_sub(self.head)) % self.size;
        let fits = head < self.size && taken <= unread;
        if fits {
            self.head = head;
        }
        fits
    }

    pub(super) fn vector(&self) -> Option<u16> {
        self.vector
    }

    pub(super) fn has_unread(&self) -> bool {
        self.head != self.tail
    }

    /// Whether a completion would have to wait.
    pub(super) fn is_congested(&self) -> bool {
        (self.tail + 1) % self.size == self.head
    }

    pub(super) fn wait(&mut self, posting: Posting) {
        self.waiting.push_back(posting);
    }

    /// Writes what waits, as far as there is room. Whether anything was written.
    pub(super) fn post(&mut self, bus: &mut Bus<'_>) -> bool {
        let mut posted = false;
        while !self.is_congested()
            && let Some(posting) = self.waiting.pop_front()
        {
            let address = self.base + u64::from(self.tail) * 16;
            let entry = match posting {
                Posting::Completion(completion) => completion.to_bytes(self.phase),
                Posting::Garbage(entry) => entry,
            };
            bus.dma_write(address, &entry);
            self.tail = (self.tail + 1) % self.size;
            self.phase ^= self.tail == 0;
            posted = true;
        }
        posted
    }
}
