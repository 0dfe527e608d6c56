//! The end that writes entries.

#[cfg(not(loom))]
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

#[cfg(loom)]
use loom::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::layout::{self, Place};
use super::{
    Bell, Corruption, Index, Life, Notify, OutsidePayload, QueueError, Ring, Step, Wait, WaitError,
    Wake,
};

/// Writes entries into a ring. One at a time per ring; a second one does no harm to this process,
/// but entries get lost.
///
/// `N` sends DataAvailable to the consumer.
///
/// Callable from: any thread that has it. Nothing here blocks but [`Producer::wait_for_room`], and
/// nothing but that and a notification makes a system call.
///
/// Invariant: `tail` and `head` are aligned and inside the ring; `tail` is what was last published;
/// `head` was the consumer's index at some time, and everything from there to `tail` may be unread.
#[derive(Debug)]
pub struct Producer<N = Bell> {
    ring: Ring,
    tail: u32,
    head: u32,
    life: Life,
    data_available: N,
}

impl<N: Notify> Producer<N> {
    /// Takes the producing end, and carries on where a previous owner of it stopped.
    ///
    /// Errors: `Corrupt` if the memory has indices that no ring has.
    pub fn new(ring: Ring, data_available: N) -> Result<Self, QueueError> {
        let tail = ring.check_index(Index::Tail, ring.cells.tail().load(Relaxed))?;
        let head = ring.check_index(Index::Head, ring.cells.head().load(Acquire))?; // [room]
        Ok(Self { ring, tail, head, life: Life::Working, data_available })
    }

    /// Copies `data` into the ring as one entry, publishes it, and sends DataAvailable if the
    /// consumer had read everything before it.
    ///
    /// Errors:
    /// - `Overrun`: no room now. DataAvailable has been sent and a DataServiced asked for: try
    ///   again when that comes.
    /// - `MessageTooLarge`: never any room; nothing was sent or asked.
    /// - `Corrupt`, `Offline`: this queue is over.
    #[inline]
    pub fn enqueue(&mut self, data: &[u8]) -> Result<(), QueueError> {
        self.enqueue_with(data.len(), |slot| slot.ring.cells.write(slot.payload, data))
    }

    /// As [`enqueue`](Self::enqueue), with a payload of `size` bytes that `fill` writes in place.
    ///
    /// `fill` runs once, on this thread, before the entry is published; not if there is no room.
    /// What it leaves unwritten keeps the bytes of older entries. If it panics, nothing is
    /// published.
    #[inline]
    pub fn enqueue_with<R>(
        &mut self,
        size: usize,
        fill: impl FnOnce(&mut Slot<'_>) -> R,
    ) -> Result<R, QueueError> {
        let mut send = false;
        let result = self.enqueue_with_coalesce(size, &mut send, fill);
        if send {
            self.send_data_available();
        }
        result
    }

    /// As [`enqueue_with`](Self::enqueue_with), but sets `send` instead of sending. After a batch
    /// that made it `true`, also one that ended in an error, call
    /// [`send_data_available`](Self::send_data_available) once.
    ///
    /// A consumer that breaks the rules is found out when its index is looked at, which may be after
    /// this entry was published.
    #[inline]
    pub fn enqueue_with_coalesce<R>(
        &mut self,
        size: usize,
        send: &mut bool,
        fill: impl FnOnce(&mut Slot<'_>) -> R,
    ) -> Result<R, QueueError> {
        self.life.check()?;
        let (length, footprint) = self.ring.footprint(size)?;
        let place = match self.find_room(footprint)? {
            Some(place) => place,
            None => {
                self.ask_for_service();
                *send |= self.ring.takes(Step::WakeWhenRefused);
                return Err(QueueError::Overrun { size });
            }
        };

        let payload = place.at + layout::ENTRY_HEADER_SIZE;
        let result = fill(&mut Slot { ring: &self.ring, payload, size });
        self.ring.cells.size_at(place.at).store(length, Relaxed);
        if let Some(marker) = place.marker {
            let padded = footprint - layout::ENTRY_HEADER_SIZE;
            self.ring.cells.size_at(marker).store(padded, Relaxed);
        }
        self.publish(place.next, send)?;
        Ok(result)
    }

    /// Whether an entry of `size` bytes surely fits. Asks for no DataServiced, so a "no" is not
    /// followed by one.
    ///
    /// Errors: as `enqueue`. An `Overrun` can be wrong where the entry would have to wrap.
    pub fn can_enqueue(&mut self, size: usize) -> Result<(), QueueError> {
        self.can_enqueue_many(size, 1)
    }

    /// Whether `count` entries of `size` bytes each surely fit, one after the other.
    ///
    /// Errors: as [`can_enqueue`](Self::can_enqueue).
    pub fn can_enqueue_many(&mut self, size: usize, count: u32) -> Result<(), QueueError> {
        self.life.check()?;
        let (_, footprint) = self.ring.footprint(size)?;
        self.look_at_head()?;
        match layout::surely_fit(self.ring.capacity, self.head, self.tail, footprint, count) {
            true => Ok(()),
            false => Err(QueueError::Overrun { size }),
        }
    }

    /// Sends DataAvailable, as owed after a coalesced batch. No effect if nothing is installed.
    pub fn send_data_available(&self) {
        if self.data_available.is_installed() {
            self.data_available.notify();
        }
    }

    /// Sleeps until an entry of `size` bytes fits, the peer is gone, or `timeout` is over.
    /// DataServiced arrives through `line`.
    ///
    /// Errors: `TimedOut`; `MessageTooLarge` for an entry that would not fit even if the consumer
    /// read everything there is, because an empty ring refuses it where its indices stand
    /// ([`layout::footprint`](super::footprint) says how to avoid that); `Offline`, also from then
    /// on; `Corrupt`.
    pub fn wait_for_room(
        &mut self,
        size: usize,
        line: &impl Wait,
        timeout: Duration,
    ) -> Result<(), WaitError> {
        let deadline = Instant::now().checked_add(timeout);
        self.life.check()?;
        let (_, footprint) = self.ring.footprint(size)?;
        let mut wake = Wake::Rung;
        loop {
            self.look_at_head()?;
            if self.place(footprint).is_some() {
                return Ok(());
            }
            if self.head == self.tail {
                let queue_byte_count = self.ring.capacity;
                return Err(QueueError::MessageTooLarge { size, queue_byte_count }.into());
            }
            match wake {
                Wake::Rung => {}
                Wake::TimedOut => return Err(WaitError::TimedOut { timeout }),
                Wake::HungUp => return Err(self.life.end(QueueError::Offline).into()),
            }
            // Nothing to look at again after this: the consumer is woken in any case, and answers.
            self.ask_for_service();
            if self.ring.takes(Step::WakeWhenRefused) {
                self.send_data_available();
            }
            wake = line.wait(deadline).map_err(WaitError::Wait)?;
        }
    }

    /// Ends this end: the peer is known to be gone. Every later operation says `Offline`.
    pub fn set_offline(&mut self) {
        self.life.end(QueueError::Offline);
    }

    /// The ring this end belongs to.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// What sends DataAvailable, to replace it.
    pub fn data_available_mut(&mut self) -> &mut N {
        &mut self.data_available
    }

    /// Looks at the head only if what is known of it is not enough.
    #[inline]
    fn find_room(&mut self, footprint: u32) -> Result<Option<Place>, QueueError> {
        match self.place(footprint) {
            Some(place) => Ok(Some(place)),
            None => {
                self.look_at_head()?;
                Ok(self.place(footprint))
            }
        }
    }

    #[inline]
    fn place(&self, footprint: u32) -> Option<Place> {
        layout::place(self.ring.capacity, self.head, self.tail, footprint)
    }

    /// Makes everything up to `next` the consumer's, and finds out whether it must be told.
    #[inline]
    fn publish(&mut self, next: u32, send: &mut bool) -> Result<(), QueueError> {
        let order = if self.ring.takes(Step::ReleaseTail) { Release } else { Relaxed };
        self.ring.cells.tail().store(next, order); // [entry] pairs with `Consumer::look_at_tail`
        let old_tail = std::mem::replace(&mut self.tail, next);

        // No need to look if the answer is known: the batch will send anyway, or the consumer was
        // seen at the old tail, which it could not leave before now.
        *send |= self.head == old_tail;
        if *send {
            return Ok(());
        }
        // [bell] pairs with `Consumer::publish`: one of us must see the other.
        self.ring.fence_before_look(Step::FenceAfterTail);
        if self.ring.takes(Step::LookAfterTail) {
            self.look_at_head()?;
        }
        *send |= self.head == old_tail;
        Ok(())
    }

    /// Reads the consumer's index: once, then judged. The consumer can write anything there.
    #[inline]
    fn look_at_head(&mut self) -> Result<(), QueueError> {
        let head = self.ring.cells.head().load(Acquire); // [room] pairs with `Consumer::publish`
        match self.check_head(head) {
            Ok(()) => {
                self.head = head;
                Ok(())
            }
            Err(corruption) => Err(self.life.end(corruption.into())),
        }
    }

    #[inline]
    fn check_head(&self, head: u32) -> Result<(), Corruption> {
        let to = self.ring.check_index(Index::Head, head)?;
        let (from, tail) = (self.head, self.tail);
        if !layout::can_advance(from, to, tail) {
            return Err(Corruption::HeadAstray { from, to, tail });
        }
        Ok(())
    }

    /// Leaves word that a DataServiced is wanted. The consumer has to be woken after this.
    fn ask_for_service(&self) {
        // [full] pairs with `Consumer::is_service_wanted`
        self.ring.cells.need_serviced().store(1, Release);
    }
}

/// The payload of an entry that is being written. It lends no memory, because the peer can write
/// there too; it is written by copying.
#[derive(Debug)]
pub struct Slot<'a> {
    ring: &'a Ring,
    /// Offset of the payload in the ring; `size` bytes from here are inside it.
    payload: u32,
    size: usize,
}

impl Slot<'_> {
    /// Bytes of payload, without padding. The size that the entry was asked with.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Copies `data` to `offset` of the payload.
    ///
    /// Errors: [`OutsidePayload`], with nothing written.
    #[inline]
    pub fn write_at(&mut self, offset: usize, data: &[u8]) -> Result<(), OutsidePayload> {
        check_range(offset, data.len(), self.size)?;
        self.ring.cells.write(self.payload + offset as u32, data);
        Ok(())
    }
}

/// Whether `len` bytes at `offset` are inside `size` bytes.
#[inline]
pub(super) fn check_range(offset: usize, len: usize, size: usize) -> Result<(), OutsidePayload> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(OutsidePayload { offset, len, size }),
    }
}
