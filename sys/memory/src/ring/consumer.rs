//! The end that reads entries.

#[cfg(not(loom))]
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

#[cfg(loom)]
use loom::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::layout::{self, Found, Impossible};
use super::producer::check_range;
use super::{
    Bell, Corruption, Index, Life, Notify, OutsidePayload, QueueError, Ring, Step, Wait, WaitError,
    Wake,
};

/// Reads entries from a ring, in the order they were written. One at a time per ring; a second one
/// does no harm to this process, but entries get read twice.
///
/// `N` sends DataServiced to the producer.
///
/// Callable from: any thread that has it. Nothing here blocks but [`Consumer::wait`], and nothing
/// but that and a notification makes a system call.
///
/// Invariant: `head` and `tail` are aligned and inside the ring; `head` is what was last published;
/// `tail` was the producer's index at some time, and everything from `head` to there is to be read.
#[derive(Debug)]
pub struct Consumer<N = Bell> {
    ring: Ring,
    head: u32,
    tail: u32,
    life: Life,
    data_serviced: N,
}

impl<N: Notify> Consumer<N> {
    /// Takes the consuming end, and carries on where a previous owner of it stopped.
    ///
    /// Errors: `Corrupt` if the memory has indices that no ring has.
    pub fn new(ring: Ring, data_serviced: N) -> Result<Self, QueueError> {
        let head = ring.check_index(Index::Head, ring.cells.head().load(Relaxed))?;
        let tail = ring.check_index(Index::Tail, ring.cells.tail().load(Acquire))?; // [entry]
        Ok(Self { ring, head, tail, life: Life::Working, data_serviced })
    }

    /// Moves the next entry into `entry`, replacing what it held but reusing its memory, and sends
    /// DataServiced if the producer has asked.
    ///
    /// This is the safest form against a peer that changes payload while it is read: everything is
    /// copied once, then looked at.
    ///
    /// Errors, all leaving `entry` alone:
    /// - `Underrun`: nothing to read now. DataServiced has been sent here too if asked for.
    ///   DataAvailable will come with the next entry.
    /// - `Corrupt`, `Offline`: this queue is over.
    #[inline]
    pub fn dequeue(&mut self, entry: &mut Vec<u8>) -> Result<(), QueueError> {
        self.dequeue_with(|found| found.copy_to(entry))
    }

    /// As [`dequeue`](Self::dequeue), with the entry shown to `read` in place.
    ///
    /// `read` runs once, on this thread, before the entry is given back to the producer; not if
    /// there is none. If it panics, the entry stays.
    #[inline]
    pub fn dequeue_with<R>(&mut self, read: impl FnOnce(&Entry<'_>) -> R) -> Result<R, QueueError> {
        let mut send = false;
        let result = self.dequeue_with_coalesce(&mut send, read);
        if send {
            self.send_data_serviced();
        }
        result
    }

    /// As [`dequeue_with`](Self::dequeue_with), but sets `send` instead of sending, also on
    /// `Underrun`. After a batch that made it `true`, call
    /// [`send_data_serviced`](Self::send_data_serviced) once.
    #[inline]
    pub fn dequeue_with_coalesce<R>(
        &mut self,
        send: &mut bool,
        read: impl FnOnce(&Entry<'_>) -> R,
    ) -> Result<R, QueueError> {
        let found = match self.find() {
            Ok(found) => found,
            Err(QueueError::Underrun) => {
                *send |= self.ring.takes(Step::AnswerWhenEmpty) && self.is_service_wanted();
                return Err(QueueError::Underrun);
            }
            Err(err) => return Err(err),
        };
        let result = read(&Entry::new(&self.ring, found));
        self.publish(found.next);
        *send |= self.is_service_wanted();
        Ok(result)
    }

    /// Shows the next entry to `read`, in place, and leaves it there. Sends nothing.
    ///
    /// Errors: as `dequeue`. An entry seen here can look different when it is dequeued, if the
    /// producer is hostile.
    pub fn peek<R>(&mut self, read: impl FnOnce(&Entry<'_>) -> R) -> Result<R, QueueError> {
        let found = self.find()?;
        Ok(read(&Entry::new(&self.ring, found)))
    }

    /// Whether there seems to be something to dequeue: a hint, with no promise of an entry, and
    /// without the look that comes before an `Underrun`.
    #[inline]
    pub fn is_data_available(&self) -> bool {
        self.ring.cells.tail().load(Relaxed) != self.head
    }

    /// Sends DataServiced, as owed after a coalesced batch, and takes the producer's request for
    /// it back. No effect if nothing is installed; the request then stays.
    pub fn send_data_serviced(&self) {
        if !self.data_serviced.is_installed() {
            return;
        }
        // First clear, then send: a producer that asks again in between is answered by this very
        // notification, one that asks later by the next.
        let request = self.ring.cells.need_serviced();
        if self.ring.takes(Step::ClearBeforeAnswer) {
            request.store(0, Release);
            self.data_serviced.notify();
        } else {
            self.data_serviced.notify();
            request.store(0, Release);
        }
    }

    /// Sleeps until there is an entry, the peer is gone, or `timeout` is over. DataAvailable
    /// arrives through `line`.
    ///
    /// Entries that a producer published before it went are still found. A producer that waits for
    /// room is told if the ring is empty, as by a `dequeue`.
    ///
    /// Errors: `TimedOut`; `Offline` when the peer is gone and nothing is left, also from then on;
    /// `Corrupt`.
    pub fn wait(&mut self, line: &impl Wait, timeout: Duration) -> Result<(), WaitError> {
        let deadline = Instant::now().checked_add(timeout);
        self.life.check()?;
        let mut wake = Wake::Rung;
        loop {
            // The announcement is our head itself, published and fenced by the dequeue that took
            // the last entry. A producer that did not see it has published before this look.
            if self.head == self.tail && self.ring.takes(Step::LookBeforeSleep) {
                self.look_at_tail()?;
            }
            if self.head != self.tail {
                return Ok(());
            }
            match wake {
                Wake::Rung => {}
                Wake::TimedOut => return Err(WaitError::TimedOut { timeout }),
                Wake::HungUp => return Err(self.life.end(QueueError::Offline).into()),
            }
            if self.ring.takes(Step::AnswerWhenEmpty) && self.is_service_wanted() {
                self.send_data_serviced();
            }
            wake = line.wait(deadline).map_err(WaitError::Wait)?;
        }
    }

    /// Ends this end: the peer is known to be gone. Every later operation says `Offline`, also if
    /// entries are left.
    pub fn set_offline(&mut self) {
        self.life.end(QueueError::Offline);
    }

    /// The ring this end belongs to.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// What sends DataServiced, to replace it.
    pub fn data_serviced_mut(&mut self) -> &mut N {
        &mut self.data_serviced
    }

    /// The next entry. Looks at the tail only if everything that is known of was read.
    #[inline]
    fn find(&mut self) -> Result<Found, QueueError> {
        self.life.check()?;
        if self.head == self.tail {
            self.look_at_tail()?;
            if self.head == self.tail {
                return Err(QueueError::Underrun);
            }
        }
        let (head, tail) = (self.head, self.tail);
        // Relaxed: what lies before the tail was ordered by reading the tail.
        let size_at = |at| self.ring.cells.size_at(at).load(Relaxed);
        match layout::find(self.ring.capacity, head, tail, size_at) {
            Ok(found) => Ok(found),
            Err(Impossible { at, size }) => {
                Err(self.life.end(Corruption::Entry { at, size, head, tail }.into()))
            }
        }
    }

    /// Gives everything up to `next` back to the producer.
    #[inline]
    fn publish(&mut self, next: u32) {
        self.ring.cells.head().store(next, Release); // [room] pairs with `Producer::look_at_head`
        self.head = next;
        if next == self.tail {
            // [bell] pairs with `Producer::publish`: whatever looks at the tail next comes after
            // this, so one of us must see the other.
            self.ring.fence_before_look(Step::FenceAfterHead);
        }
    }

    /// Reads the producer's index: once, then judged. The producer can write anything there.
    ///
    /// Called only when everything that is known of was read, so that any place in the ring is a
    /// place to which the tail can have gone.
    #[inline]
    fn look_at_tail(&mut self) -> Result<(), QueueError> {
        debug_assert_eq!(self.head, self.tail);
        let tail = self.ring.cells.tail().load(Acquire); // [entry] pairs with `Producer::publish`
        match self.ring.check_index(Index::Tail, tail) {
            Ok(tail) => {
                self.tail = tail;
                Ok(())
            }
            Err(corruption) => Err(self.life.end(corruption.into())),
        }
    }

    /// Whether the producer was refused and waits for a DataServiced.
    #[inline]
    fn is_service_wanted(&self) -> bool {
        self.ring.cells.need_serviced().load(Acquire) != 0 // [full] pairs with `Producer::ask_for_service`
    }
}

/// The payload of an entry that is being read. It lends no memory, because the peer can write
/// there; it is read by copying. Bytes copied twice may differ if the peer is hostile.
#[derive(Debug)]
pub struct Entry<'a> {
    ring: &'a Ring,
    /// Offset of the payload in the ring; `size` bytes from here are inside it.
    payload: u32,
    size: u32,
}

impl<'a> Entry<'a> {
    fn new(ring: &'a Ring, found: Found) -> Self {
        Self { ring, payload: found.payload, size: found.size }
    }

    /// Bytes of payload, without padding.
    pub fn size(&self) -> usize {
        self.size as usize
    }

    /// Copies the bytes at `offset` of the payload into `data`.
    ///
    /// Errors: [`OutsidePayload`], with `data` unchanged. Check the size first: it is the peer's.
    #[inline]
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<(), OutsidePayload> {
        check_range(offset, data.len(), self.size())?;
        self.ring.cells.read(self.payload + offset as u32, data);
        Ok(())
    }

    /// Replaces the contents of `data` by the payload, reusing its memory.
    #[inline]
    pub fn copy_to(&self, data: &mut Vec<u8>) {
        // Shortened or lengthened, not cleared: only bytes that are new to `data` get zeroed.
        data.resize(self.size(), 0);
        self.ring.cells.read(self.payload, data);
    }

    /// The payload, copied.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut data = Vec::new();
        self.copy_to(&mut data);
        data
    }
}
