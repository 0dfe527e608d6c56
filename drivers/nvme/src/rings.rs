//! A queue pair: the two rings and their doorbells (NVM Express 1.4, section 4.1).
//!
//! Commands are written with [`Rings::push`] and the controller hears of them at
//! [`Rings::commit`], so that many cost one doorbell. Completions are found by their phase, which
//! the controller turns over with each round; nothing else of them is believed here or later
//! without a look.

use std::sync::atomic::{Ordering, fence};

use iohost_driver::Bar;

use crate::command::{COMMAND, COMPLETION, Command, Completion};
use crate::memory::Shared;
use crate::regs;

/// The way to the doorbells of all queues.
pub struct Doorbells {
    pub bar: Bar<regs::Controller>,
    /// As `CAP.DSTRD` has it.
    pub stride: u32,
    /// What makes most doorbell writes unnecessary, once it was made.
    pub shadow: Option<Shadow>,
    /// The controller was told of it, and takes it.
    pub uses_shadow: bool,
}

/// Doorbells in memory, which the controller looks at, and how far it has looked (section 7.13).
pub struct Shadow {
    pub doorbells: Shared,
    pub event_indices: Shared,
}

/// One pair.
pub struct Rings {
    id: u16,
    entries: u16,
    submission: Shared,
    completion: Shared,
    tail: u16,
    /// The tail the controller was told last.
    told_tail: u16,
    head: u16,
    told_head: u16,
    phase: bool,
}

impl Rings {
    /// Bytes of both rings.
    pub fn sizes(entries: u16) -> [usize; 2] {
        [usize::from(entries) * COMMAND, usize::from(entries) * COMPLETION]
    }

    /// Rings in memory of these [`sizes`](Self::sizes).
    pub fn new(id: u16, entries: u16, submission: Shared, completion: Shared) -> Self {
        let mut rings = Self {
            id,
            entries,
            submission,
            completion,
            tail: 0,
            told_tail: 0,
            head: 0,
            told_head: 0,
            phase: true,
        };
        rings.reset();
        rings
    }

    /// Begins anew, with a controller that was disabled and is not ready any more: until then it
    /// still writes completions.
    pub fn reset(&mut self) {
        // A completion of before must not look like one of the first round.
        self.completion.clear();
        (self.tail, self.told_tail, self.head, self.told_head) = (0, 0, 0, 0);
        self.phase = true;
    }

    pub fn id(&self) -> u16 {
        self.id
    }

    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Where the controller finds the rings.
    pub fn addresses(&self) -> (u64, u64) {
        (self.submission.address(), self.completion.address())
    }

    /// Writes a command behind the others. There is room, as no more are under way than the ring
    /// has entries, less one.
    ///
    /// Always inlined: a command that is handed over in memory costs a twentieth of a read.
    #[inline(always)]
    pub fn push(&mut self, id: u16, command: Command) {
        self.submission.write(usize::from(self.tail) * COMMAND, &command.to_bytes(id));
        self.tail = self.after(self.tail);
    }

    /// Tells the controller of commands that it was not told of.
    #[inline]
    pub fn commit(&mut self, doorbells: &Doorbells) {
        if self.tail != self.told_tail {
            let place = 2 * u32::from(self.id);
            doorbells.ring(place, self.told_tail, self.tail);
            self.told_tail = self.tail;
        }
    }

    /// The next completion, if it is there.
    #[inline]
    pub fn next(&mut self) -> Option<Completion> {
        let at = usize::from(self.head) * COMPLETION;
        // The half with the phase is read first, and the other one when it is known to be there.
        let [_, _, _, _, id0, id1, status0, status1] = self.completion.read::<8>(at + 8);
        let status = u16::from_le_bytes([status0, status1]);
        if (status & 1 == 1) != self.phase {
            return None;
        }
        fence(Ordering::Acquire);
        let result = u32::from_le_bytes(self.completion.read(at));
        self.head = self.after(self.head);
        self.phase ^= self.head == 0;
        Some(Completion { result, id: u16::from_le_bytes([id0, id1]), status: status >> 1 })
    }

    /// Tells the controller of completions that were taken, which lets go of the line.
    #[inline]
    pub fn acknowledge(&mut self, doorbells: &Doorbells) {
        if self.head != self.told_head {
            let place = 2 * u32::from(self.id) + 1;
            doorbells.ring(place, self.told_head, self.head);
            self.told_head = self.head;
        }
    }

    fn after(&self, place: u16) -> u16 {
        if place + 1 == self.entries { 0 } else { place + 1 }
    }
}

impl Doorbells {
    /// The most queue pairs, the admin queues included, whose doorbells the map has.
    pub fn most_pairs(stride: u32) -> u64 {
        regs::DOORBELL_COUNT >> stride >> 1
    }

    #[inline]
    fn ring(&self, place: u32, before: u16, now: u16) {
        // What was written before has to be there before the controller looks.
        fence(Ordering::Release);
        let is_shadowed = self.uses_shadow && place >= 2;
        match self.shadow.as_ref().filter(|_| is_shadowed) {
            Some(shadow) if !shadow.is_due(place << self.stride, before, now) => {}
            _ => {
                let doorbell = regs::DOORBELLS.at(u64::from(place) << self.stride);
                self.bar.write(doorbell, now.into());
            }
        }
    }
}

impl Shadow {
    /// Writes a doorbell in memory. Whether the controller wants to be rung for it as well: when
    /// its event index is passed.
    #[inline]
    fn is_due(&self, place: u32, before: u16, now: u16) -> bool {
        let at = place as usize * 4;
        self.doorbells.write(at, &u32::from(now).to_le_bytes());
        // It writes its index and looks at the doorbell; we write the doorbell and look at the
        // index. One of the two has to see the other.
        fence(Ordering::SeqCst);
        let index = u32::from_le_bytes(self.event_indices.read(at)) as u16;
        now.wrapping_sub(index).wrapping_sub(1) < now.wrapping_sub(before)
    }

    pub fn clear(&self) {
        self.doorbells.clear();
        self.event_indices.clear();
    }
}
