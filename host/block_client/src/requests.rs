//! Requests and completions of one session, and its memory.

use std::collections::VecDeque;
use std::time::Duration;

use block_api::{COMPLETIONS, Completion, Disk, Health, REQUEST_LENGTH, REQUESTS, Request, Status};
use iohost_client::{ClientMemory, QueueConsumer, QueueError, QueueProducer, Session, WaitError};
use slab::Slab;

use crate::BlockError;

/// How often a wait looks whether there is another driver.
const LOOK: Duration = Duration::from_millis(100);

/// How long a wait for polled requests looks before it sleeps: about what a flash disk takes.
const POLL: Duration = Duration::from_micros(100);

/// Completions that are taken together.
const BATCH: usize = 32;

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
    under_way: UnderWay,
    entry: Vec<u8>,
    /// Last, so that the queues are not the ones to find out that it has ended.
    session: Session,
}

/// Requests that were sent, until somebody is given their completions.
#[derive(Debug, Default)]
struct UnderWay {
    /// What is not answered, by the tag that it has in the queue.
    requests: Slab<Request>,
    /// How many of them are polled.
    polled: usize,
    /// Completions that were taken out of the queue.
    taken: VecDeque<Completion>,
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
            under_way: UnderWay::default(),
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
        let tag = self.under_way.requests.vacant_key();
        self.requests.send(&as_sent(request, tag, self.generation))?;
        self.under_way.add(*request);
        Ok(())
    }

    /// Sends requests, as [`send`](Self::send) would one after the other, but has the driver see those
    /// for which there is room together.
    pub fn send_all(&mut self, requests: &[Request]) -> Result<(), BlockError> {
        let Self { under_way, generation, requests: queue, .. } = self;
        let mut left = requests;
        let put = queue.ring().enqueue_batch(|batch| {
            while let [request, others @ ..] = left {
                let tag = under_way.requests.vacant_key();
                batch.enqueue(&as_sent(request, tag, *generation))?;
                under_way.add(*request);
                left = others;
            }
            Ok(())
        });
        match put.and_then(|put| put) {
            Ok(()) => Ok(()),
            Err(QueueError::Overrun { .. }) => {
                left.iter().try_for_each(|request| self.send(request))
            }
            Err(err) => Err(WaitError::from(err).into()),
        }
    }

    /// As [`send`](Self::send), for a task. A future that is dropped before it is ready has sent
    /// nothing.
    pub async fn send_async(&mut self, request: &Request) -> Result<(), BlockError> {
        let tag = self.under_way.requests.vacant_key();
        self.requests.send_async(&as_sent(request, tag, self.generation)).await?;
        self.under_way.add(*request);
        Ok(())
    }

    /// The next completion, whatever it is of; waits for it, and looks for it by itself for a while if
    /// a polled request is under way. Errors: `Queue` when the session is over, `Malformed`.
    pub fn completion(&mut self) -> Result<Completion, BlockError> {
        loop {
            if let Some(completion) = self.next_taken()? {
                return Ok(completion);
            }
            if self.under_way.polled > 0
                && self.completions.ring().look_for(POLL).map_err(WaitError::from)?
            {
                self.take_all()?;
                continue;
            }
            match self.completions.wait(LOOK) {
                Ok(()) => self.take_all()?,
                Err(WaitError::TimedOut { .. }) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }

    /// How many completions [`completion`](Self::completion) has at hand, and gives without waiting.
    pub fn at_hand(&self) -> usize {
        self.under_way.taken.len()
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
                self.under_way.keep(&self.entry)?;
            }
        }
    }

    /// One that was taken, after a look whether there is another driver.
    fn next_taken(&mut self) -> Result<Option<Completion>, BlockError> {
        if self.session.generation() != self.generation {
            self.carry_on()?;
        }
        Ok(self.under_way.taken.pop_front())
    }

    /// Takes completions that are there, together.
    fn take_all(&mut self) -> Result<(), BlockError> {
        let Self { completions, under_way, entry, .. } = self;
        let mut kept = Ok(());
        let taken = completions.ring().dequeue_batch(BATCH, |found| {
            found.copy_to(entry);
            if kept.is_ok() {
                kept = under_way.keep(entry);
            }
        });
        match taken {
            Ok(_) | Err(QueueError::Underrun) => kept,
            Err(err) => Err(WaitError::from(err).into()),
        }
    }

    /// Sends everything that is not answered to the driver that is there now. The order is that of
    /// [`block_api`]'s documentation.
    fn carry_on(&mut self) -> Result<(), BlockError> {
        let generation = self.session.generation();
        while self.completions.try_receive(&mut self.entry)? {
            self.under_way.keep(&self.entry)?;
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
        for (tag, request) in &self.under_way.requests {
            self.requests.send(&as_sent(request, tag, generation))?;
        }
        Ok(())
    }
}

impl UnderWay {
    fn add(&mut self, request: Request) {
        self.polled += usize::from(request.is_polled);
        self.requests.insert(request);
    }

    /// Keeps a completion, if it answers a request.
    fn keep(&mut self, entry: &[u8]) -> Result<(), BlockError> {
        let Completion { tag, outcome } =
            Completion::from_bytes(entry).map_err(|_| BlockError::Malformed)?;
        if matches!(&outcome, Err(failure) if failure.status == Status::Stale) {
            // It was sent again, or will be.
            return Ok(());
        }
        let request = usize::try_from(tag).ok().and_then(|tag| self.requests.try_remove(tag));
        let Request { tag, is_polled, .. } = request.ok_or(BlockError::Malformed)?;
        self.polled -= usize::from(is_polled);
        self.taken.push_back(Completion { tag, outcome });
        Ok(())
    }
}

/// A request as it stands in the queue.
fn as_sent(request: &Request, tag: usize, generation: u64) -> [u8; REQUEST_LENGTH] {
    Request { tag: tag as u64, generation, ..*request }.to_bytes()
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
