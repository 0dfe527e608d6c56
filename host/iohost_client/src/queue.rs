//! A client's ends of a session's data queues, with waits that end when the driver does.

use std::time::Duration;

use iohost_memory::ring::{Consumer, Doorway, Entry, Producer, QueueError, WaitError};

/// The end into which a client puts entries for the driver.
#[derive(Debug)]
pub struct QueueProducer {
    pub(crate) ring: Producer,
    pub(crate) line: Doorway,
}

/// The end from which a client takes the driver's entries.
#[derive(Debug)]
pub struct QueueConsumer {
    pub(crate) ring: Consumer,
    pub(crate) line: Doorway,
}

impl QueueProducer {
    /// Puts one entry in, and waits for room as long as it takes.
    ///
    /// Errors: `Offline` when the driver's process has ended; `MessageTooLarge` for an entry that
    /// never fits; `Corrupt`.
    pub fn send(&mut self, data: &[u8]) -> Result<(), WaitError> {
        self.send_within(data, Duration::MAX)
    }

    /// As [`send`](Self::send), but `TimedOut` when there was no room within `timeout`.
    pub fn send_within(&mut self, data: &[u8], timeout: Duration) -> Result<(), WaitError> {
        loop {
            match self.ring.enqueue(data) {
                Err(QueueError::Overrun { size }) => {
                    self.ring.wait_for_room(size, &self.line, timeout)?;
                }
                other => return Ok(other?),
            }
        }
    }

    /// The ring's own operations, which never wait: batches, writing in place, asking for room.
    pub fn ring(&mut self) -> &mut Producer {
        &mut self.ring
    }
}

impl QueueConsumer {
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
        loop {
            match self.ring.dequeue_with(|found: &Entry<'_>| found.copy_to(entry)) {
                Err(QueueError::Underrun) => self.ring.wait(&self.line, timeout)?,
                other => return Ok(other?),
            }
        }
    }

    /// The ring's own operations, which never wait: batches, looking without taking.
    pub fn ring(&mut self) -> &mut Consumer {
        &mut self.ring
    }
}
