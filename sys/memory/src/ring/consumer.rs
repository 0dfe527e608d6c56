//! The end that reads entries.

#[cfg(not(loom))]
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

#[cfg(loom)]
use loom::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use super::handling::{ASLEEP, AWAKE};
use super::layout::{self, Found, Impossible, KEPT};
#[cfg(not(loom))]
use super::ledger::{Ledger, Line};
use super::producer::{check_range, read_to};
use super::spin::Spin;
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
/// Invariant: `head` and `tail` are aligned and inside the ring; `head` is where the next entry is,
/// and what `readTo` says but for an open batch; `tail` was the producer's index at some time, and
/// everything from `head` to there is to be read.
#[derive(Debug)]
pub struct Consumer<N = Bell> {
    ring: Ring,
    head: u32,
    tail: u32,
    /// The producer was told that this end looks again by itself.
    awake: bool,
    life: Life,
    /// By which an exchange names this queue.
    #[cfg(not(loom))]
    line: Option<Line>,
    data_serviced: N,
}

impl<N: Notify> Consumer<N> {
    /// Takes the consuming end, and carries on where a previous owner of it stopped.
    ///
    /// Errors: `Corrupt` if the memory has indices that no ring has.
    pub fn new(ring: Ring, data_serviced: N) -> Result<Self, QueueError> {
        let published = ring.check_index(Index::Head, ring.cells.head().load(Relaxed))?;
        let head = read_to(&ring)?.unwrap_or(published);
        // A previous owner may have been awake, and is not any more.
        ring.cells.consumer_awake().store(ASLEEP, Relaxed);
        ring.cells.read_to().store(head + KEPT, Release);
        ring.cells.head().store(head, Release);
        // [bell], [awake]: an entry is seen by the look, or announced.
        ring.fence_before_look(Step::FenceAfterHead);
        let tail = ring.check_index(Index::Tail, ring.cells.tail().load(Acquire))?; // [entry]
        Ok(Self {
            ring,
            head,
            tail,
            awake: false,
            life: Life::Working,
            #[cfg(not(loom))]
            line: None,
            data_serviced,
        })
    }

    /// The same end, as the queue of this place in a session, so that a
    /// [`Producer::exchange`](super::Producer::exchange) survives this process. `ledger` is the
    /// session's, and recovered.
    #[cfg(not(loom))]
    pub fn noted_in(self, ledger: &Ledger, place: usize) -> Self {
        Self { line: ledger.line(place), ..self }
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
    #[inline(always)]
    pub fn dequeue(&mut self, entry: &mut Vec<u8>) -> Result<(), QueueError> {
        self.dequeue_with(|found| found.copy_to(entry))
    }

    /// As [`dequeue`](Self::dequeue), with the entry shown to `read` in place.
    ///
    /// `read` runs once, on this thread, before the entry is given back to the producer; not if
    /// there is none. If it panics, the entry stays.
    #[inline(always)]
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
    #[inline(always)]
    pub fn dequeue_with_coalesce<R>(
        &mut self,
        send: &mut bool,
        read: impl FnOnce(&Entry<'_>) -> R,
    ) -> Result<R, QueueError> {
        let found = match self.find() {
            Ok(found) => found,
            Err(QueueError::Underrun) => {
                *send |= self.ring.takes(Step::AnswerWhenEmpty) && self.is_service_wanted(true);
                return Err(QueueError::Underrun);
            }
            Err(err) => return Err(err),
        };
        let result = read(&Entry::new(&self.ring, found));
        self.head = found.next;
        self.publish();
        *send |= self.is_service_wanted(false);
        Ok(result)
    }

    /// Shows up to `most` entries to `read`, in place and in order, gives them back to the producer
    /// together, and sends DataServiced at most once. Returns how many there were, at least one
    /// unless `most` is 0.
    ///
    /// `read` runs on this thread. An entry at which it panics stays, and so do those after it.
    ///
    /// Errors, before the first entry: as [`dequeue`](Self::dequeue). An entry that is corrupt ends
    /// the batch; the next operation says so.
    #[inline]
    pub fn dequeue_batch(
        &mut self,
        most: usize,
        mut read: impl FnMut(&Entry<'_>),
    ) -> Result<usize, QueueError> {
        let mut count = 0;
        let batch = PublishAtEnd(self);
        let over = loop {
            if count == most {
                break None;
            }
            match batch.0.find_known() {
                Ok(Some(found)) => {
                    read(&Entry::new(&batch.0.ring, found));
                    batch.0.head = found.next;
                    count += 1;
                }
                // With entries in hand there is no Underrun to report, so a plain look is enough.
                Ok(None) if count > 0 => match batch.0.look_at_tail() {
                    Ok(()) if batch.0.head == batch.0.tail => break None,
                    Ok(()) => batch.0.will_read_all(),
                    Err(err) => break Some(err),
                },
                Ok(None) => match batch.0.look_for_more() {
                    Ok(()) => batch.0.will_read_all(),
                    Err(err) => break Some(err),
                },
                Err(err) => break Some(err),
            }
        };
        drop(batch);
        let is_told = matches!(over, None | Some(QueueError::Underrun));
        if is_told && self.is_service_wanted(count == 0) {
            self.send_data_serviced();
        }
        match over {
            Some(err) if count == 0 => Err(err),
            _ => Ok(count),
        }
    }

    /// Shows the next entry to `read`, in place, and leaves it there. Sends nothing.
    ///
    /// Errors: as `dequeue`. An entry seen here can look different when it is dequeued, if the
    /// producer is hostile.
    pub fn peek<R>(&mut self, read: impl FnOnce(&Entry<'_>) -> R) -> Result<R, QueueError> {
        let found = self.find()?;
        Ok(read(&Entry::new(&self.ring, found)))
    }

    #[cfg(not(loom))]
    pub(super) fn line(&self) -> Option<&Line> {
        self.line.as_ref()
    }

    /// The head that gives the next entry back.
    #[cfg(not(loom))]
    pub(super) fn next_head(&mut self) -> Result<u32, QueueError> {
        Ok(self.find()?.next)
    }

    /// Gives the entry before `head` back, without telling the producer.
    #[cfg(not(loom))]
    pub(super) fn retire(&mut self, head: u32) {
        self.head = head;
        self.publish();
    }

    /// Tells the producer, if it waits.
    #[cfg(not(loom))]
    pub(super) fn serve(&self) {
        if self.is_service_wanted(false) {
            self.send_data_serviced();
        }
    }

    /// Whether there seems to be something to dequeue: a hint, with no promise of an entry, and
    /// without the look that comes before an `Underrun`.
    #[inline]
    pub fn is_data_available(&self) -> bool {
        let tail = self.ring.cells.tail().load(Relaxed);
        if tail != self.head {
            self.ring.cells.will_read(self.head, tail.wrapping_sub(self.head));
        }
        tail != self.head
    }

    /// Sends DataServiced, as owed after a coalesced batch, and takes the producer's request for
    /// it back. No effect if nothing is installed; the request then stays. Not sent while the
    /// producer is in or after a [`Producer::wait_for_room`](super::Producer::wait_for_room), as it
    /// looks again by itself, or while its handler runs, which is called once more then.
    pub fn send_data_serviced(&self) {
        if !self.data_serviced.is_installed() {
            return;
        }
        // First clear, then send: a producer that asks again in between is answered by this very
        // notification, one that asks later by the next.
        let clear_before = self.ring.takes(Step::ClearBeforeAnswer);
        if clear_before {
            self.clear_request();
        }
        // [sleep] A producer that sleeps had said so before it made the request that was cleared.
        if self.ring.must_send(self.ring.cells.producer_awake()) {
            self.data_serviced.notify();
        }
        if !clear_before {
            self.clear_request();
        }
    }

    fn clear_request(&self) {
        self.ring.cells.need_serviced().store(0, Relaxed);
        // Reads and clears in one, to have seen everything that came before what is cleared.
        self.ring.cells.room_wanted().swap(0, AcqRel);
    }

    /// Waits until there is an entry, the peer is gone, or `timeout` is over: looks for a few
    /// microseconds, then sleeps. DataAvailable arrives through `line`.
    ///
    /// Entries that a producer published before it went are still found. A producer that waits for
    /// room is told if the ring is empty, as by a `dequeue`.
    ///
    /// From here to the next `Underrun` no DataAvailable is sent to this end, because it looks by
    /// itself. Who calls this before each dequeue causes none at all while entries come in time;
    /// who sleeps otherwise than here has to dequeue until `Underrun` before.
    ///
    /// Errors: `TimedOut`; `Offline` when the peer is gone and nothing is left, also from then on;
    /// `Corrupt`.
    #[inline]
    pub fn wait(&mut self, line: &impl Wait, timeout: Duration) -> Result<(), WaitError> {
        self.life.check()?;
        if self.head != self.tail { Ok(()) } else { self.wait_for_more(line, timeout) }
    }

    /// Looks for an entry again and again, without a pause, for as long as `time`. Whether there is
    /// one. That is sooner than a sleep would end, at the price of a processor.
    ///
    /// No DataAvailable is sent to this end from here to the next `Underrun`. So after `false`, sleep
    /// in a [`wait`](Self::wait), which also says if the peer is gone.
    ///
    /// Errors: `Corrupt`; `Offline` once a `wait` has said so.
    #[inline]
    pub fn look_for(&mut self, time: Duration) -> Result<bool, QueueError> {
        self.life.check()?;
        if self.head != self.tail { Ok(true) } else { self.look_for_more_within(time) }
    }

    #[cold]
    fn look_for_more_within(&mut self, time: Duration) -> Result<bool, QueueError> {
        let end = Instant::now() + time;
        self.be_awake();
        loop {
            self.look_at_tail()?;
            if self.head != self.tail {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
        }
    }

    #[cold]
    fn wait_for_more(&mut self, line: &impl Wait, timeout: Duration) -> Result<(), WaitError> {
        let deadline = Instant::now().checked_add(timeout);
        self.be_awake();
        let mut spin = Spin::until(deadline);
        while spin.again() {
            self.look_at_tail()?;
            if self.head != self.tail {
                return Ok(());
            }
        }
        let mut wake = Wake::Rung;
        loop {
            match self.look_for_more() {
                Ok(()) => {
                    self.be_awake();
                    return Ok(());
                }
                Err(QueueError::Underrun) => {}
                Err(err) => return Err(err.into()),
            }
            match wake {
                Wake::Rung => {}
                Wake::TimedOut => return Err(WaitError::TimedOut { timeout }),
                Wake::HungUp => return Err(self.life.end(QueueError::Offline).into()),
            }
            if self.ring.takes(Step::AnswerWhenEmpty) && self.is_service_wanted(true) {
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
    #[inline(always)]
    fn find(&mut self) -> Result<Found, QueueError> {
        loop {
            match self.find_known()? {
                Some(found) => return Ok(found),
                None => self.look_for_more()?,
            }
        }
    }

    /// The next of the entries that are known of.
    #[inline(always)]
    fn find_known(&mut self) -> Result<Option<Found>, QueueError> {
        self.life.check()?;
        let (head, tail) = (self.head, self.tail);
        if head == tail {
            return Ok(None);
        }
        // Relaxed: what lies before the tail was ordered by reading the tail.
        let size_at = |at| self.ring.cells.size_at(at).load(Relaxed);
        match layout::find(self.ring.capacity, head, tail, size_at) {
            Ok(found) => Ok(Some(found)),
            Err(Impossible { at, size }) => {
                Err(self.life.end(Corruption::Entry { at, size, head, tail }.into()))
            }
        }
    }

    /// Looks at the tail, and says `Underrun` only if an entry that comes after that is announced.
    #[cold]
    fn look_for_more(&mut self) -> Result<(), QueueError> {
        self.look_at_tail()?;
        if self.head != self.tail {
            return Ok(());
        }
        self.stop_being_awake();
        // Before the last look: what the other end published before it went is to be read.
        let hung_up = self.ring.hang_up.is_set();
        // [bell], [awake]: this end has published that it is here, and that it is not awake. A
        // producer that does not see it has published before the look that follows.
        self.ring.fence_before_look(Step::FenceAfterHead);
        if self.ring.takes(Step::LookBeforeSleep) {
            self.look_at_tail()?;
        }
        match self.head == self.tail {
            true if hung_up => Err(self.life.end(QueueError::Offline)),
            true => Err(QueueError::Underrun),
            false => Ok(()),
        }
    }

    /// Has the processor fetch the entries that are known of, as far as the end of the ring.
    #[inline]
    fn will_read_all(&self) {
        let known = match self.head <= self.tail {
            true => self.tail - self.head,
            false => self.ring.capacity - self.head,
        };
        self.ring.cells.will_read_all(self.head, known);
    }

    /// Gives everything up to the head back to the producer.
    #[inline(always)]
    fn publish(&mut self) {
        // [room] pairs with `read_to`
        self.ring.cells.read_to().store(self.head + KEPT, Release);
        // The producer looks at the head after each entry. It is left to have its own line of
        // memory for itself until the answer could change something.
        if self.head == self.tail && self.ring.takes(Step::PublishHead) {
            self.ring.cells.head().store(self.head, Release); // [room] pairs with `Producer::look_at_head`
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
                if tail != self.head {
                    self.ring.cells.will_read(self.head, tail.wrapping_sub(self.head));
                }
                Ok(())
            }
            Err(corruption) => Err(self.life.end(corruption.into())),
        }
    }

    /// Whether the producer was refused and waits for a DataServiced. A producer that knows only
    /// the one flag is heard when the ring is empty.
    #[inline]
    fn is_service_wanted(&self, is_empty: bool) -> bool {
        // [full] pairs with `Producer::ask_for_service`
        self.ring.cells.room_wanted().load(Acquire) != 0
            || is_empty && self.ring.cells.need_serviced().load(Acquire) != 0
    }

    /// Tells the producer that this end looks again before it sleeps.
    #[inline]
    fn be_awake(&mut self) {
        if !self.awake {
            self.awake = true;
            self.ring.cells.consumer_awake().store(AWAKE, Relaxed);
        }
    }

    /// Takes that back. A fence and a look at the tail have to follow.
    #[inline]
    fn stop_being_awake(&mut self) {
        if self.awake && self.ring.takes(Step::ConsumerSaysItSleeps) {
            self.awake = false;
            self.ring.cells.consumer_awake().store(ASLEEP, Relaxed);
        }
    }
}

/// Gives the entries of a batch back, also those before one at which the reader panicked.
struct PublishAtEnd<'a, N: Notify>(&'a mut Consumer<N>);

impl<N: Notify> Drop for PublishAtEnd<'_, N> {
    fn drop(&mut self) {
        self.0.publish();
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
