//! Many operations on one disk under way at a time, which end in whatever order.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use block_api::{Disk, Failure, Operation, Request};
use iohost_client::Session;

use crate::{BlockError, Requests, check};

/// Bytes of one request of the disk.
const CHUNK: usize = 64 << 10;

/// Requests under way at a time.
const DEPTH: usize = 64;

/// One disk of a driver, for a program that does not wait for one operation before the next.
///
/// An operation is cut into requests, and operations take turns in sending theirs, so that a short
/// one is not held up by a long one. Which one ends first is the disk's affair; who needs an order
/// waits.
///
/// Callable from any thread that has it.
#[derive(Debug)]
pub struct Pipeline {
    requests: Requests,
    disk: Disk,
    /// What was begun and has not ended, by tag.
    under_way: HashMap<u64, UnderWay>,
    /// The operations with requests to send, the next one first.
    to_send: VecDeque<u64>,
    /// Which part has which chunk of the memory.
    chunks: Vec<Option<Part>>,
}

/// Something to be done to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// What to do.
    pub operation: Operation,
    /// The first byte on the disk.
    pub offset: u64,
    /// Bytes; none for a flush.
    pub length: u64,
    /// What to write: `length` bytes. Nothing for other operations.
    pub data: Vec<u8>,
}

/// What became of an operation.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// The number that it was begun with.
    pub tag: u64,
    /// What was read.
    pub data: Vec<u8>,
    /// One that failed may have been done in part.
    pub outcome: Result<(), Failure>,
}

#[derive(Debug)]
struct UnderWay {
    work: Work,
    /// Bytes that were sent, or given up.
    sent: u64,
    /// Requests that have not ended.
    requests: usize,
    failure: Option<Failure>,
}

/// A request under way: whose it is, and which of its bytes it is for.
#[derive(Debug)]
struct Part {
    tag: u64,
    bytes: Range<usize>,
}

impl Pipeline {
    /// Opens a disk of a driver. Blocks.
    ///
    /// Errors: `NoSuchDisk`, `Call`, `Session`.
    pub fn open(session: Session, disk: u32) -> Result<Self, BlockError> {
        let requests = Requests::new(session, CHUNK * DEPTH)?;
        let disk = requests.describe(disk)?;
        let (under_way, to_send) = (HashMap::new(), VecDeque::new());
        Ok(Self { requests, disk, under_way, to_send, chunks: (0..DEPTH).map(|_| None).collect() })
    }

    /// What the disk is.
    pub fn info(&self) -> &Disk {
        &self.disk
    }

    /// Begins an operation. `tag` is a number of the caller's, not that of another one under way.
    ///
    /// Errors, with nothing begun: `Failed` with `NotAligned` or `OutOfRange`; `Queue`, which is
    /// the end of everything that is under way.
    pub fn begin(&mut self, tag: u64, mut work: Work) -> Result<(), BlockError> {
        match work.operation {
            Operation::Flush => work.length = 0,
            _ => check(&self.disk, work.offset, work.length)?,
        }
        if work.operation == Operation::Read {
            work.data = vec![0; work.length as usize];
        }
        self.under_way.insert(tag, UnderWay { work, sent: 0, requests: 0, failure: None });
        self.to_send.push_back(tag);
        self.send().inspect_err(|_| self.forget())
    }

    /// Waits for an operation to end; for ever, if none is under way. A future that is dropped
    /// before it is ready has taken nothing.
    ///
    /// Errors: `Queue`, `Malformed`, which are the end of everything that is under way.
    pub async fn ended(&mut self) -> Result<Ended, BlockError> {
        loop {
            let completion = self.requests.completion_async().await;
            let taken = completion.and_then(|completion| {
                let ended = self.take(completion.tag, completion.outcome)?;
                self.send()?;
                Ok(ended)
            });
            if let Some(ended) = taken.inspect_err(|_| self.forget())? {
                return Ok(ended);
            }
        }
    }

    /// Sends requests, one of each operation in turn, as long as there is a chunk for them.
    fn send(&mut self) -> Result<(), BlockError> {
        while let Some(chunk) = self.chunks.iter().position(Option::is_none)
            && let Some(tag) = self.to_send.pop_front()
        {
            let Some(it) = self.under_way.get_mut(&tag) else { continue };
            let Work { operation, offset, length, ref data } = it.work;
            let most = if operation.has_data() { CHUNK as u64 } else { length };
            let start = it.sent;
            let part = most.min(length - start);
            let bytes = start as usize..(start + part) as usize;
            if matches!(operation, Operation::Write | Operation::WriteThrough) {
                self.requests.memory().write_at(chunk * CHUNK, &data[bytes.clone()])?;
            }
            it.sent += part;
            it.requests += 1;
            if it.sent < length {
                self.to_send.push_back(tag);
            }
            self.chunks[chunk] = Some(Part { tag, bytes });
            // There is room in the queue for as many requests as there are chunks.
            self.requests.send(&Request {
                tag: chunk as u64,
                operation,
                is_polled: false,
                memory: 0,
                disk: self.disk.number,
                offset: offset + start,
                length: part,
                at: (chunk * CHUNK) as u64,
                generation: 0,
            })?;
        }
        Ok(())
    }

    /// A request has ended. Its operation, if that was the last of it.
    fn take(
        &mut self,
        chunk: u64,
        outcome: Result<(), Failure>,
    ) -> Result<Option<Ended>, BlockError> {
        let place = chunk as usize;
        let part = self.chunks.get_mut(place).and_then(Option::take);
        let Part { tag, bytes } = part.ok_or(BlockError::Malformed)?;
        let it = self.under_way.get_mut(&tag).ok_or(BlockError::Malformed)?;
        it.requests -= 1;
        match outcome {
            Ok(()) if it.work.operation == Operation::Read => {
                self.requests.memory().read_at(place * CHUNK, &mut it.work.data[bytes])?;
            }
            Ok(()) => {}
            Err(failure) => {
                it.failure.get_or_insert(failure);
                // The rest is not sent.
                it.sent = it.work.length;
                self.to_send.retain(|other| *other != tag);
            }
        }
        if it.requests > 0 || it.sent < it.work.length {
            return Ok(None);
        }
        let UnderWay { work, failure, .. } = self.under_way.remove(&tag).expect("found above");
        let data = if work.operation == Operation::Read { work.data } else { Vec::new() };
        Ok(Some(Ended { tag, data, outcome: failure.map_or(Ok(()), Err) }))
    }

    /// After the end of the queues: nothing that was begun will end.
    fn forget(&mut self) {
        self.under_way.clear();
        self.to_send.clear();
        self.chunks.fill_with(|| None);
    }
}
