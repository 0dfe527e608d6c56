//! The end that writes entries.

#[cfg(not(loom))]
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

#[cfg(loom)]
use loom::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

#[cfg(not(loom))]
use super::Consumer;
use super::handling::{ASLEEP, AWAKE};
use super::layout::{self, ALIGNMENT, KEPT, Place};
#[cfg(not(loom))]
use super::ledger::{Ledger, Line};
use super::spin::Spin;
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
/// Invariant: `tail` and `head` are aligned and inside the ring; `tail` is where the next entry goes,
/// and what was last published but for an open batch; `head` was the consumer's index at some time,
/// and everything from there to `tail` may be unread.
#[derive(Debug)]
pub struct Producer<N = Bell> {
    ring: Ring,
    tail: u32,
    head: u32,
    /// `head` comes from `readTo`, which is ahead of the head that was published. Entries may since
    /// have been written beyond that, so that it can mean a place of one round before.
    head_is_ahead: bool,
    /// The consumer was told that this end looks again by itself.
    awake: bool,
    life: Life,
    /// Where an exchange into this queue is noted.
    #[cfg(not(loom))]
    line: Option<Line>,
    data_available: N,
}

impl<N: Notify> Producer<N> {
    /// Takes the producing end, and carries on where a previous owner of it stopped.
    ///
    /// Errors: `Corrupt` if the memory has indices that no ring has.
    pub fn new(ring: Ring, data_available: N) -> Result<Self, QueueError> {
        let tail = ring.check_index(Index::Tail, ring.cells.tail().load(Relaxed))?;
        let published = ring.check_index(Index::Head, ring.cells.head().load(Acquire))?; // [room]
        let head = read_to(&ring)?.unwrap_or(published);
        let head_is_ahead = head != published;
        // A previous owner may have been awake, and is not any more.
        ring.cells.producer_awake().store(ASLEEP, Relaxed);
        Ok(Self {
            ring,
            tail,
            head,
            head_is_ahead,
            awake: false,
            life: Life::Working,
            #[cfg(not(loom))]
            line: None,
            data_available,
        })
    }

    /// Copies `data` into the ring as one entry, publishes it, and sends DataAvailable if the
    /// consumer had read everything before it.
    ///
    /// Errors:
    /// - `Overrun`: no room now. DataAvailable has been sent and a DataServiced asked for: try
    ///   again when that comes.
    /// - `MessageTooLarge`: never any room; nothing was sent or asked.
    /// - `Corrupt`, `Offline`: this queue is over.
    #[inline(always)]
    pub fn enqueue(&mut self, data: &[u8]) -> Result<(), QueueError> {
        self.enqueue_with(data.len(), |slot| slot.ring.cells.write(slot.payload, data))
    }

    /// As [`enqueue`](Self::enqueue), with a payload of `size` bytes that `fill` writes in place.
    ///
    /// `fill` runs once, on this thread, before the entry is published; not if there is no room.
    /// What it leaves unwritten keeps the bytes of older entries. If it panics, nothing is
    /// published. It cannot enter the queue again, which is lent to this call:
    ///
    /// ```compile_fail,E0499
    /// # fn nested(producer: &mut iohost_memory::ring::Producer) {
    /// producer.enqueue_with(4, |_| producer.enqueue(b"inner"));
    /// # }
    /// ```
    #[inline(always)]
    pub fn enqueue_with<R>(
        &mut self,
        size: usize,
        fill: impl FnOnce(&mut Slot<'_>) -> R,
    ) -> Result<R, QueueError> {
        // With nobody to tell, no look is needed at whether to tell.
        let mut send = !self.data_available.is_installed();
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
    #[inline(always)]
    pub fn enqueue_with_coalesce<R>(
        &mut self,
        size: usize,
        send: &mut bool,
        fill: impl FnOnce(&mut Slot<'_>) -> R,
    ) -> Result<R, QueueError> {
        let old_tail = self.tail;
        let result = self.write(size, send, fill)?;
        self.publish(old_tail, send)?;
        Ok(result)
    }

    /// The same end, as the queue of this place in a session, so that an [`exchange`](Self::exchange)
    /// survives this process. `ledger` is the session's, and recovered.
    #[cfg(not(loom))]
    pub fn noted_in(self, ledger: &Ledger, place: usize) -> Self {
        Self { line: ledger.line(place), ..self }
    }

    /// Puts `data` into this queue as one entry and takes the next entry of `from`, which has been
    /// looked at ([`Consumer::peek`]), both or neither. Sends DataAvailable here and DataServiced
    /// there where they are due.
    ///
    /// Both or neither also when this process is killed in the middle, at any instruction, if both ends
    /// are of one session (a driver's are). So a driver that makes results of entries loses none and
    /// makes none twice, as far as its clients can see: it looks at an entry, works, exchanges.
    ///
    /// Errors, with nothing put and nothing taken:
    /// - `Underrun`: there is no entry in `from`.
    /// - `Overrun`: no room here now; as of [`enqueue`](Self::enqueue).
    /// - `MessageTooLarge`, `Corrupt`, `Offline`.
    #[cfg(not(loom))]
    pub fn exchange<M: Notify>(
        &mut self,
        from: &mut Consumer<M>,
        data: &[u8],
    ) -> Result<(), QueueError> {
        self.exchange_until(from, data, |_| false)
    }

    /// An exchange that stops behind the stage at which it `dies`, as if killed there.
    #[cfg(not(loom))]
    #[inline]
    pub(super) fn exchange_until<M: Notify>(
        &mut self,
        from: &mut Consumer<M>,
        data: &[u8],
        dies: impl Fn(Stage) -> bool,
    ) -> Result<(), QueueError> {
        let retired = from.next_head()?;
        let old_tail = self.tail;
        let mut send = !self.data_available.is_installed();
        let written = self.write(data.len(), &mut send, |slot| {
            slot.ring.cells.write(slot.payload, data);
        });
        if let Err(err) = written {
            if send {
                self.send_data_available();
            }
            return Err(err);
        }
        if dies(Stage::Written) {
            return Ok(());
        }
        let line = match (&self.line, from.line()) {
            (Some(line), Some(other)) if line.is_beside(other) => {
                line.write(self.tail, retired, other);
                self.line.clone()
            }
            _ => None,
        };
        if dies(Stage::Linked) {
            return Ok(());
        }
        let published = self.publish(old_tail, &mut send);
        if dies(Stage::Published) {
            return Ok(());
        }
        from.retire(retired);
        if dies(Stage::Retired) {
            return Ok(());
        }
        if let Some(line) = line {
            line.erase();
        }
        if dies(Stage::Erased) {
            return Ok(());
        }
        if send {
            self.send_data_available();
        }
        from.serve();
        published
    }

    /// Writes as many entries as `fill` hands to the [`Batch`], publishes them together, and sends
    /// DataAvailable at most once.
    ///
    /// `fill` runs once, on this thread. What it wrote is published whatever it returns; if it
    /// panics, nothing is.
    ///
    /// Errors: `Corrupt`, `Offline`. Those of single entries are the [`Batch`]'s.
    #[inline]
    pub fn enqueue_batch<R>(
        &mut self,
        fill: impl FnOnce(&mut Batch<'_, N>) -> R,
    ) -> Result<R, QueueError> {
        self.life.check()?;
        let mut batch =
            Batch { old_tail: self.tail, send: false, is_published: false, producer: self };
        let result = fill(&mut batch);
        let (old_tail, mut send) = (batch.old_tail, batch.send);
        batch.is_published = true;
        drop(batch);
        let published =
            if self.tail == old_tail { Ok(()) } else { self.publish(old_tail, &mut send) };
        if send {
            self.send_data_available();
        }
        published.map(|()| result)
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
        self.look_at_read_to()?;
        match layout::surely_fit(self.ring.capacity, self.head, self.tail, footprint, count) {
            true => Ok(()),
            false => Err(QueueError::Overrun { size }),
        }
    }

    /// Sends DataAvailable, as owed after a coalesced batch. No effect if nothing is installed, or
    /// while the consumer is in or after a [`Consumer::wait`](super::Consumer::wait), as it looks
    /// again by itself, or while its handler runs, which is called once more then.
    pub fn send_data_available(&self) {
        if !self.data_available.is_installed() {
            return;
        }
        // [awake] pairs with `Consumer::stop_being_awake`: one of us must see the other.
        self.ring.fence_before_look(Step::FenceBeforeConsumerAwake);
        if self.ring.must_send(self.ring.cells.consumer_awake()) {
            self.data_available.notify();
        }
    }

    /// Waits until an entry of `size` bytes fits, the peer is gone, or `timeout` is over: looks for
    /// a few microseconds, then sleeps. DataServiced arrives through `line`.
    ///
    /// From here to the next `Overrun` no DataServiced is sent to this end, because it looks by
    /// itself. Who calls this before each entry causes none at all while there is room in time.
    ///
    /// Errors: `TimedOut`; `MessageTooLarge` for an entry that would not fit even if the consumer
    /// read everything there is, because an empty ring refuses it where its indices stand
    /// ([`layout::footprint`](super::footprint) says how to avoid that); `Offline`, also from then
    /// on; `Corrupt`.
    #[inline]
    pub fn wait_for_room(
        &mut self,
        size: usize,
        line: &impl Wait,
        timeout: Duration,
    ) -> Result<(), WaitError> {
        self.life.check()?;
        let (_, footprint) = self.ring.footprint(size)?;
        match self.place(footprint) {
            Some(_) => Ok(()),
            None => self.wait_for_footprint(size, footprint, line, timeout),
        }
    }

    #[cold]
    fn wait_for_footprint(
        &mut self,
        size: usize,
        footprint: u32,
        line: &impl Wait,
        timeout: Duration,
    ) -> Result<(), WaitError> {
        let deadline = Instant::now().checked_add(timeout);
        self.be_awake();
        let mut spin = Spin::until(deadline);
        while !self.has_room(size, footprint)? {
            if !spin.again() {
                return self.sleep_for_room(size, footprint, line, timeout, deadline);
            }
        }
        Ok(())
    }

    fn sleep_for_room(
        &mut self,
        size: usize,
        footprint: u32,
        line: &impl Wait,
        timeout: Duration,
        deadline: Option<Instant>,
    ) -> Result<(), WaitError> {
        loop {
            // Nothing to look at again after this: the consumer is woken in any case, and answers.
            self.stop_being_awake();
            self.ask_for_service();
            if self.ring.takes(Step::WakeWhenRefused) {
                self.send_data_available();
            }
            let wake = line.wait(deadline).map_err(WaitError::Wait)?;
            if self.has_room(size, footprint)? {
                self.be_awake();
                return Ok(());
            }
            match wake {
                Wake::Rung => {}
                Wake::TimedOut => return Err(WaitError::TimedOut { timeout }),
                Wake::HungUp => return Err(self.life.end(QueueError::Offline).into()),
            }
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

    /// Writes one entry at the tail, and moves the tail without publishing it.
    #[inline(always)]
    fn write<R>(
        &mut self,
        size: usize,
        send: &mut bool,
        fill: impl FnOnce(&mut Slot<'_>) -> R,
    ) -> Result<R, QueueError> {
        self.life.check()?;
        let (length, footprint) = self.ring.footprint(size)?;
        let Some(place) = self.find_room(footprint)? else {
            return Err(self.refuse(size, send));
        };
        // The lines behind this entry, which the consumer has had since it read them last.
        if footprint <= FETCHED_AHEAD {
            self.ring.cells.will_write(place.next.wrapping_add(FETCHED_AHEAD), footprint);
        }

        let payload = place.at + layout::ENTRY_HEADER_SIZE;
        let result = fill(&mut Slot { ring: &self.ring, payload, size });
        self.ring.cells.size_at(place.at).store(length, Relaxed);
        if let Some(marker) = place.marker {
            let padded = footprint - layout::ENTRY_HEADER_SIZE;
            self.ring.cells.size_at(marker).store(padded, Relaxed);
        }
        self.tail = place.next;
        Ok(result)
    }

    #[cold]
    fn refuse(&mut self, size: usize, send: &mut bool) -> QueueError {
        if self.ring.hang_up.is_set() {
            return self.life.end(QueueError::Offline);
        }
        self.stop_being_awake();
        self.ask_for_service();
        *send |= self.ring.takes(Step::WakeWhenRefused);
        QueueError::Overrun { size }
    }

    /// Looks at the consumer only if what is known of it is not enough: first at the head it has
    /// published, which does not disturb it, then at the one that it keeps up to date.
    #[inline]
    fn find_room(&mut self, footprint: u32) -> Result<Option<Place>, QueueError> {
        let place = self.place(footprint);
        if place.is_some() { Ok(place) } else { self.look_for_room(footprint) }
    }

    #[cold]
    fn look_for_room(&mut self, footprint: u32) -> Result<Option<Place>, QueueError> {
        if !self.head_is_ahead {
            self.look_at_head()?;
            if let Some(place) = self.place(footprint) {
                return Ok(Some(place));
            }
        }
        self.look_at_read_to()?;
        Ok(self.place(footprint))
    }

    #[inline(always)]
    fn place(&self, footprint: u32) -> Option<Place> {
        layout::place(self.ring.capacity, self.head, self.tail, footprint)
    }

    /// Whether there is room for an entry, also one that an empty ring refuses where it stands.
    fn has_room(&mut self, size: usize, footprint: u32) -> Result<bool, QueueError> {
        if self.find_room(footprint)?.is_some() {
            return Ok(true);
        }
        if self.head == self.tail {
            let queue_byte_count = self.ring.capacity;
            return Err(QueueError::MessageTooLarge { size, queue_byte_count });
        }
        Ok(false)
    }

    /// Makes everything from `old_tail` up to the tail the consumer's, and finds out whether it
    /// must be told.
    #[inline(always)]
    fn publish(&mut self, old_tail: u32, send: &mut bool) -> Result<(), QueueError> {
        let order = if self.ring.takes(Step::ReleaseTail) { Release } else { Relaxed };
        self.ring.cells.tail().store(self.tail, order); // [entry] pairs with `Consumer::look_at_tail`

        // No need to look if the answer is known: the batch will send anyway, or the consumer was
        // seen at the old tail, which it could not leave before now.
        *send |= self.head == old_tail;
        if *send {
            return Ok(());
        }
        // [bell] pairs with `Consumer::find_after_look`: one of us must see the other.
        self.ring.fence_before_look(Step::FenceAfterTail);
        if self.ring.takes(Step::LookAfterTail) {
            *send |= self.look_whether_read(old_tail)?;
        }
        Ok(())
    }

    /// Whether the consumer had read everything before `old_tail`.
    #[inline(always)]
    fn look_whether_read(&mut self, old_tail: u32) -> Result<bool, QueueError> {
        if !self.head_is_ahead {
            self.look_at_head()?;
        } else if self.ring.cells.head().load(Acquire) == old_tail {
            // Either it is there, or it was there one round before. [room] pairs with
            // `Consumer::publish`, so `readTo` is no older than this.
            self.look_at_read_to()?;
        }
        Ok(self.head == old_tail)
    }

    /// Reads the head that the consumer has published: once, then judged. The consumer can write
    /// anything there.
    ///
    /// Expects that no entry was written beyond what this index allows.
    #[inline]
    fn look_at_head(&mut self) -> Result<(), QueueError> {
        debug_assert!(!self.head_is_ahead);
        let head = self.ring.cells.head().load(Acquire); // [room] pairs with `Consumer::publish`
        if head == self.head {
            return Ok(());
        }
        self.head = self.check_head(head)?;
        Ok(())
    }

    /// Reads how far the consumer has read exactly.
    #[cold]
    fn look_at_read_to(&mut self) -> Result<(), QueueError> {
        // In this order, or the consumer could come round to the place of the first in between, and
        // equal would not be the same.
        let read_to = read_to(&self.ring).map_err(|corruption| self.life.end(corruption.into()))?;
        let published = self.ring.cells.head().load(Acquire); // [room] pairs with `Consumer::publish`
        let head = read_to.unwrap_or(published);
        if self.head_is_ahead {
            let judged = self.ring.check_index(Index::Head, published);
            judged.map_err(|corruption| self.life.end(corruption.into()))?;
        } else {
            self.check_head(published)?;
        }
        self.head = self.check_head(head)?;
        self.head_is_ahead = head != published;
        Ok(())
    }

    #[inline]
    fn check_head(&mut self, head: u32) -> Result<u32, QueueError> {
        let judged = self.ring.check_index(Index::Head, head).and_then(|to| {
            let (from, tail) = (self.head, self.tail);
            let on_its_way = layout::can_advance(from, to, tail);
            if on_its_way { Ok(to) } else { Err(Corruption::HeadAstray { from, to, tail }) }
        });
        judged.map_err(|corruption| self.life.end(corruption.into()))
    }

    /// Leaves word that a DataServiced is wanted. The consumer has to be woken after this.
    fn ask_for_service(&self) {
        self.ring.cells.need_serviced().store(1, Relaxed);
        // [full] pairs with `Consumer::is_service_wanted`. An exchange, as on the other side, so that
        // of two one comes second.
        self.ring.cells.room_wanted().swap(1, AcqRel);
    }

    /// Tells the consumer that this end looks again before it sleeps.
    #[inline]
    fn be_awake(&mut self) {
        if !self.awake {
            self.awake = true;
            self.ring.cells.producer_awake().store(AWAKE, Relaxed);
        }
    }

    /// Takes that back. To be followed by a request for a DataServiced, which brings it along.
    #[inline]
    fn stop_being_awake(&mut self) {
        if self.awake && self.ring.takes(Step::ProducerSaysItSleeps) {
            self.awake = false;
            // [sleep] published by `ask_for_service`, and read by `Consumer::send_data_serviced`
            self.ring.cells.producer_awake().store(ASLEEP, Relaxed);
        }
    }
}

/// What an exchange has come to.
#[cfg(not(loom))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Written,
    Linked,
    Published,
    Retired,
    Erased,
}

/// How many bytes ahead of an entry memory is fetched for those that follow. Not with an entry that is
/// longer: of such ones the processor fetches the lines by itself when it has written some, and what
/// is fetched besides costs more than it gains.
const FETCHED_AHEAD: u32 = 768;

/// How far a consumer that keeps count of it entry by entry has read.
pub(super) fn read_to(ring: &Ring) -> Result<Option<u32>, Corruption> {
    let word = ring.cells.read_to().load(Acquire); // [room] pairs with `Consumer::publish`
    if word == 0 {
        return Ok(None);
    }
    let index = if word % ALIGNMENT == KEPT { word - KEPT } else { word };
    if index == word {
        let queue_byte_count = ring.capacity;
        return Err(Corruption::Index { index: Index::Head, value: word, queue_byte_count });
    }
    ring.check_index(Index::Head, index).map(Some)
}

/// Entries that are published together, by [`Producer::enqueue_batch`].
#[derive(Debug)]
pub struct Batch<'a, N: Notify = Bell> {
    producer: &'a mut Producer<N>,
    old_tail: u32,
    send: bool,
    is_published: bool,
}

impl<N: Notify> Batch<'_, N> {
    /// As [`Producer::enqueue`], but the consumer sees the entry when the batch ends.
    ///
    /// Errors: as there. After an `Overrun`, end the batch and try again at the next DataServiced.
    #[inline]
    pub fn enqueue(&mut self, data: &[u8]) -> Result<(), QueueError> {
        self.enqueue_with(data.len(), |slot| slot.ring.cells.write(slot.payload, data))
    }

    /// As [`Producer::enqueue_with`], but the consumer sees the entry when the batch ends.
    ///
    /// Errors: as [`enqueue`](Self::enqueue).
    #[inline]
    pub fn enqueue_with<R>(
        &mut self,
        size: usize,
        fill: impl FnOnce(&mut Slot<'_>) -> R,
    ) -> Result<R, QueueError> {
        self.producer.write(size, &mut self.send, fill)
    }
}

impl<N: Notify> Drop for Batch<'_, N> {
    /// Takes back what was not published, after a panic.
    fn drop(&mut self) {
        if !self.is_published {
            self.producer.tail = self.old_tail;
        }
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
