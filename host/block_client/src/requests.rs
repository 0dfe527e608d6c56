//! Requests and completions of one session, and its memory.

use std::time::Duration;

use block_api::{COMPLETIONS, Completion, Disk, Health, REQUESTS, Request};
use iohost_client::{ClientMemory, QueueConsumer, QueueProducer, Session};

use crate::BlockError;

/// The way to all disks of one session. Nothing is remembered of what was sent.
///
/// Callable from any thread that has it. Dropping it ends the session; requests under way are done
/// or not.
#[derive(Debug)]
pub struct Requests {
    calls: block_api::Client,
    requests: QueueProducer,
    completions: QueueConsumer,
    memory: ClientMemory,
    entry: Vec<u8>,
    /// Last, so that the queues are not the ones to find out that it has ended.
    session: Session,
}

impl Requests {
    /// Takes the queues of a session, and maps `memory` bytes, a multiple of 4096, as its memory 0.
    ///
    /// Errors: `Session`, also for a driver that serves another interface.
    pub fn new(session: Session, memory: usize) -> Result<Self, BlockError> {
        let memory_type = block_api::memory_type(0, memory as u64);
        Ok(Self {
            calls: session.client()?,
            requests: session.producer(REQUESTS)?,
            completions: session.consumer(COMPLETIONS)?,
            memory: session.map_memory(memory_type, Some(memory))?,
            entry: Vec::new(),
            session,
        })
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The numbers of the disks there are. Blocks.
    pub fn disks(&self) -> Result<Vec<u32>, BlockError> {
        disks(&self.calls)
    }

    /// A disk. Blocks. Errors: `NoSuchDisk`, `Call`.
    pub fn describe(&self, disk: u32) -> Result<Disk, BlockError> {
        describe(&self.calls, disk)
    }

    /// How the device is. Blocks. Errors: `Call`.
    pub fn health(&self) -> Result<Health, BlockError> {
        health(&self.calls)
    }

    /// The memory that requests name as 0: the device reads and writes it in place.
    pub fn memory(&self) -> &ClientMemory {
        &self.memory
    }

    /// Sends a request, and waits for room if the queue is full.
    pub fn send(&mut self, request: &Request) -> Result<(), BlockError> {
        Ok(self.requests.send(&request.to_bytes())?)
    }

    /// As [`send`](Self::send), for a task.
    pub async fn send_async(&mut self, request: &Request) -> Result<(), BlockError> {
        Ok(self.requests.send_async(&request.to_bytes()).await?)
    }

    /// The next completion, whatever it is of; waits for it. Errors: `Queue`, `Malformed`.
    pub fn completion(&mut self) -> Result<Completion, BlockError> {
        self.completion_within(Duration::MAX)
    }

    /// As [`completion`](Self::completion), with `Queue` after so much time.
    pub fn completion_within(&mut self, timeout: Duration) -> Result<Completion, BlockError> {
        self.completions.receive_within(&mut self.entry, timeout)?;
        Completion::from_bytes(&self.entry).map_err(|_| BlockError::Malformed)
    }

    /// As [`completion`](Self::completion), for a task.
    pub async fn completion_async(&mut self) -> Result<Completion, BlockError> {
        self.completions.receive_async(&mut self.entry).await?;
        Completion::from_bytes(&self.entry).map_err(|_| BlockError::Malformed)
    }

    /// The next completion if it is there; never waits, and asks for no notification.
    pub fn completion_now(&mut self) -> Result<Option<Completion>, BlockError> {
        if !self.completions.ring().is_data_available() {
            return Ok(None);
        }
        self.completion().map(Some)
    }
}

/// The numbers of the disks of a driver.
fn disks(calls: &block_api::Client) -> Result<Vec<u32>, BlockError> {
    let what = "its disks";
    let bytes = calls.disks().wait().map_err(|status| BlockError::Call { what, status })?;
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
    Ok(bytes.chunks_exact(4).map(number).collect())
}

fn describe(calls: &block_api::Client, disk: u32) -> Result<Disk, BlockError> {
    let what = "a disk";
    let failed = |status| match status {
        iohost_interface::IOReturn::NOT_FOUND => BlockError::NoSuchDisk { disk },
        status => BlockError::Call { what, status },
    };
    let bytes = calls.describe(disk).wait().map_err(failed)?;
    Disk::from_bytes(&bytes).map_err(failed)
}

fn health(calls: &block_api::Client) -> Result<Health, BlockError> {
    let failed = |status| BlockError::Call { what: "its health", status };
    Health::from_bytes(&calls.health().wait().map_err(failed)?).map_err(failed)
}
