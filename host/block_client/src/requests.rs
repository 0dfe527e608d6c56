//! Requests and completions of one session, and its memory.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use block_api::{COMPLETIONS, Completion, Disk, Health, REQUESTS, Request, Status};
use iohost_client::{ClientMemory, QueueConsumer, QueueProducer, Session, WaitError};

use crate::BlockError;

/// How often a wait looks whether there is another driver.
const LOOK: Duration = Duration::from_millis(100);

/// The way to all disks of one session.
///
/// It outlives the driver: what was not answered by one that died is sent to the next, so that each
/// request is answered once; its bytes have moved to another memory then, at the same places.
///
/// Callable from any thread that has it. Dropping it ends the session; requests under way are done
/// or not.
#[derive(Debug)]
pub struct Requests {
    calls: block_api::Client,
    requests: QueueProducer,
    completions: QueueConsumer,
    memory: ClientMemory,
    generation: u64,
    /// What is not answered, by tag.
    under_way: HashMap<u64, Request>,
    /// Completions that were taken and not given to anybody yet.
    taken: VecDeque<Completion>,
    entry: Vec<u8>,
    /// Last, so that the queues are not the ones to find out that it has ended.
    session: Session,
}

impl Requests {
    /// Takes the queues of a session, and maps `memory` bytes, a multiple of 4096, as its memory 0.
    ///
    /// Errors: `Session`, also for a driver that serves another interface.
    pub fn new(session: Session, memory: usize) -> Result<Self, BlockError> {
        let generation = session.generation();
        let memory_type = block_api::memory_type(0, memory as u64);
        Ok(Self {
            calls: session.client()?,
            requests: session.producer(REQUESTS)?,
            completions: session.consumer(COMPLETIONS)?,
            memory: session.map_memory(memory_type, Some(memory))?,
            // If it has changed meanwhile, that is found out as it always is.
            generation,
            under_way: HashMap::new(),
            taken: VecDeque::new(),
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

    /// Sends a request, and waits for room if the queue is full. Its tag is not that of another one
    /// under way; its generation is filled in here.
    pub fn send(&mut self, request: &Request) -> Result<(), BlockError> {
        let request = Request { generation: self.generation, ..*request };
        self.requests.send(&request.to_bytes())?;
        self.under_way.insert(request.tag, request);
        Ok(())
    }

    /// As [`send`](Self::send), for a task. A future that is dropped before it is ready has sent
    /// nothing.
    pub async fn send_async(&mut self, request: &Request) -> Result<(), BlockError> {
        let request = Request { generation: self.generation, ..*request };
        self.requests.send_async(&request.to_bytes()).await?;
        self.under_way.insert(request.tag, request);
        Ok(())
    }

    /// The next completion, whatever it is of; waits for it. Errors: `Queue` when the session is
    /// over, `Malformed`.
    pub fn completion(&mut self) -> Result<Completion, BlockError> {
        loop {
            if let Some(completion) = self.next_taken()? {
                return Ok(completion);
            }
            match self.completions.receive_within(&mut self.entry, LOOK) {
                Ok(()) => self.take()?,
                Err(WaitError::TimedOut { .. }) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }

    /// As [`completion`](Self::completion), for a task.
    pub async fn completion_async(&mut self) -> Result<Completion, BlockError> {
        loop {
            if let Some(completion) = self.next_taken()? {
                return Ok(completion);
            }
            let received =
                async { self.completions.receive_async(&mut self.entry).await.map(|()| true) };
            let looks = async {
                smol::Timer::after(LOOK).await;
                Ok(false)
            };
            if smol::future::or(received, looks).await? {
                self.take()?;
            }
        }
    }

    /// One that was taken, after a look whether there is another driver.
    fn next_taken(&mut self) -> Result<Option<Completion>, BlockError> {
        if self.session.generation() != self.generation {
            self.carry_on()?;
        }
        Ok(self.taken.pop_front())
    }

    /// Keeps the entry that was received, if it answers a request.
    fn take(&mut self) -> Result<(), BlockError> {
        let completion = Completion::from_bytes(&self.entry).map_err(|_| BlockError::Malformed)?;
        match &completion.outcome {
            // It was sent again, or will be.
            Err(failure) if failure.status == Status::Stale => {}
            _ if self.under_way.remove(&completion.tag).is_some() => {
                self.taken.push_back(completion);
            }
            _ => return Err(BlockError::Malformed),
        }
        Ok(())
    }

    /// Sends everything that is not answered to the driver that is there now. The order is that of
    /// [`block_api`]'s documentation.
    fn carry_on(&mut self) -> Result<(), BlockError> {
        let generation = self.session.generation();
        while self.completions.try_receive(&mut self.entry)? {
            self.take()?;
        }
        let bytes = self.memory.len();
        let memory_type = block_api::memory_type(0, bytes as u64);
        let memory = self.session.map_memory(memory_type, Some(bytes))?;
        let mut part = vec![0; bytes.min(1 << 20)];
        for at in (0..bytes).step_by(part.len()) {
            let len = part.len().min(bytes - at);
            self.memory.read_at(at, &mut part[..len])?;
            memory.write_at(at, &part[..len])?;
        }
        self.memory = memory;
        self.generation = generation;
        let left: Vec<Request> = self.under_way.values().copied().collect();
        for request in left {
            self.send(&request)?;
        }
        Ok(())
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
