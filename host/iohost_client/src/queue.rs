//! A client's ends of a session's data queues, with waits that end when the driver does.
//!
//! # In an event loop
//!
//! Both ends have a descriptor ([`AsFd`]) for the program's own epoll, mio or tokio loop. It only
//! ever becomes readable, for the producer too, and it is not to be read. It is readable when the
//! driver has sent a notification that was not taken, and from the end of the driver on.
//!
//! When it is readable: call [`try_receive`](QueueConsumer::try_receive) or
//! [`try_send`](QueueProducer::try_send) until it says `false`, or fails. That has taken the
//! notification and has told the driver that the next one is wanted, so the loop may sleep again.
//! Call it once before the first sleep as well: what was there before is announced by nothing.
//! This holds for level-triggered and for edge-triggered watching alike.
//!
//! Watch a producer only while there is something to send: it is readable until a `try_send` has
//! said `false`, which a level-triggered loop would be told again and again.
//!
//! A loop that stops earlier, after some number of entries, has to come back by itself: with what
//! is left in the queue there need not be another notification.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use iohost_memory::ring::{Consumer, Doorway, Producer, QueueError, WaitError};
use smol::Async;

/// The end into which a client puts entries for the driver.
///
/// Callable from any thread that has it. Dropping it loses nothing of what was sent, but another
/// one is had from another session only.
#[derive(Debug)]
pub struct QueueProducer {
    ring: Producer,
    line: Line,
}

/// The end from which a client takes the driver's entries.
///
/// Callable from any thread that has it.
#[derive(Debug)]
pub struct QueueConsumer {
    ring: Consumer,
    line: Line,
}

/// Where an end hears from the driver.
#[derive(Debug)]
pub(crate) struct Line {
    doorway: Doorway,
    /// Its descriptor for a task, once one has waited.
    task: Option<Async<OwnedFd>>,
}

impl Line {
    pub(crate) fn new(doorway: Doorway) -> Self {
        Self { doorway, task: None }
    }

    /// Has a task wait until the descriptor is readable.
    async fn readable(&mut self) -> Result<(), WaitError> {
        if self.task.is_none() {
            let descriptor = self.doorway.as_fd().try_clone_to_owned();
            let watched = descriptor.and_then(Async::new_nonblocking);
            self.task = Some(watched.map_err(WaitError::Wait)?);
        }
        let task = self.task.as_ref().expect("made above");
        task.readable().await.map_err(WaitError::Wait)
    }

    /// Takes the notification, so that the descriptor is readable for a later one only.
    fn quiet(&self) -> Result<(), WaitError> {
        self.doorway.take().map(drop).map_err(WaitError::Wait)
    }
}

impl QueueProducer {
    pub(crate) fn new(ring: Producer, line: Line) -> Self {
        Self { ring, line }
    }

    /// Puts one entry in, and waits for room as long as it takes.
    ///
    /// Errors: `Offline` when the driver's process has ended; `MessageTooLarge` for an entry that
    /// never fits; `Corrupt`.
    pub fn send(&mut self, data: &[u8]) -> Result<(), WaitError> {
        self.send_within(data, Duration::MAX)
    }

    /// As [`send`](Self::send), but `TimedOut` when there was no room within `timeout`.
    pub fn send_within(&mut self, data: &[u8], timeout: Duration) -> Result<(), WaitError> {
        // Waited for first: an entry that is refused would take back that this end is awake.
        self.ring.wait_for_room(data.len(), &self.line.doorway, timeout)?;
        Ok(self.ring.enqueue(data)?)
    }

    /// Puts one entry in if there is room, and never waits. After `false` the descriptor becomes
    /// readable when it is worth another try.
    ///
    /// Errors: as [`send`](Self::send).
    pub fn try_send(&mut self, data: &[u8]) -> Result<bool, WaitError> {
        if self.enqueue(data)? {
            return Ok(true);
        }
        self.line.quiet()?;
        // Finds out whether the driver is there, and whether it will ever fit.
        match self.ring.wait_for_room(data.len(), &self.line.doorway, Duration::ZERO) {
            Ok(()) | Err(WaitError::TimedOut { .. }) => {}
            Err(err) => return Err(err),
        }
        // Last, because a refusal asks the driver for the next notification.
        self.enqueue(data)
    }

    /// As [`send`](Self::send), for any executor. A future that is dropped before it is ready has
    /// sent nothing.
    pub async fn send_async(&mut self, data: &[u8]) -> Result<(), WaitError> {
        while !self.try_send(data)? {
            self.line.readable().await?;
        }
        Ok(())
    }

    fn enqueue(&mut self, data: &[u8]) -> Result<bool, WaitError> {
        match self.ring.enqueue(data) {
            Err(QueueError::Overrun { .. }) => Ok(false),
            other => Ok(other.map(|()| true)?),
        }
    }

    /// The ring's own operations, which never wait: batches, writing in place, asking for room.
    pub fn ring(&mut self) -> &mut Producer {
        &mut self.ring
    }
}

impl QueueConsumer {
    pub(crate) fn new(ring: Consumer, line: Line) -> Self {
        Self { ring, line }
    }

    /// Takes the next entry into `entry`, and waits for one as long as it takes.
    ///
    /// Errors: `Offline` when the driver's process has ended and no entry is left; `Corrupt`.
    pub fn receive(&mut self, entry: &mut Vec<u8>) -> Result<(), WaitError> {
        self.receive_within(entry, Duration::MAX)
    }

    /// As [`receive`](Self::receive), but `TimedOut` when no entry came within `timeout`.
    pub fn receive_within(
        &mut self,
        entry: &mut Vec<u8>,
        timeout: Duration,
    ) -> Result<(), WaitError> {
        // Waited for first: finding nothing would take back that this end is awake.
        self.ring.wait(&self.line.doorway, timeout)?;
        Ok(self.ring.dequeue(entry)?)
    }

    /// Takes the next entry into `entry` if there is one, and never waits. After `false`, with
    /// `entry` as it was, the descriptor becomes readable when there is more.
    ///
    /// Errors: as [`receive`](Self::receive).
    pub fn try_receive(&mut self, entry: &mut Vec<u8>) -> Result<bool, WaitError> {
        if self.dequeue(entry)? {
            return Ok(true);
        }
        self.line.quiet()?;
        // Finds out whether the driver is there.
        match self.ring.wait(&self.line.doorway, Duration::ZERO) {
            Ok(()) | Err(WaitError::TimedOut { .. }) => {}
            Err(err) => return Err(err),
        }
        // Last, because finding nothing is what makes the driver send the next notification.
        self.dequeue(entry)
    }

    /// As [`receive`](Self::receive), for any executor. A future that is dropped before it is ready
    /// has taken nothing.
    pub async fn receive_async(&mut self, entry: &mut Vec<u8>) -> Result<(), WaitError> {
        while !self.try_receive(entry)? {
            self.line.readable().await?;
        }
        Ok(())
    }

    /// Waits until there is an entry to take, and takes none. Errors: as
    /// [`receive_within`](Self::receive_within).
    pub fn wait(&mut self, timeout: Duration) -> Result<(), WaitError> {
        self.ring.wait(&self.line.doorway, timeout)
    }

    fn dequeue(&mut self, entry: &mut Vec<u8>) -> Result<bool, WaitError> {
        match self.ring.dequeue(entry) {
            Err(QueueError::Underrun) => Ok(false),
            other => Ok(other.map(|()| true)?),
        }
    }

    /// The ring's own operations, which never wait: batches, looking without taking.
    pub fn ring(&mut self) -> &mut Consumer {
        &mut self.ring
    }
}

impl AsFd for QueueProducer {
    /// Readable when [`try_send`](Self::try_send) is worth another try, see [the module](self).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.doorway.as_fd()
    }
}

impl AsFd for QueueConsumer {
    /// Readable when [`try_receive`](Self::try_receive) is worth another try, see
    /// [the module](self).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.doorway.as_fd()
    }
}

/// The same descriptor; tokio's `AsyncFd` and mio's `SourceFd` ask for it in this form.
impl AsRawFd for QueueProducer {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// The same descriptor; tokio's `AsyncFd` and mio's `SourceFd` ask for it in this form.
impl AsRawFd for QueueConsumer {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
