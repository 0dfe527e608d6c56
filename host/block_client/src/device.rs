//! A disk, by slices.

use std::ops::Range;

use block_api::{Disk, Failure, Health, Operation, Request};
use iohost_client::Session;

use crate::{BlockError, Requests, check};

/// Bytes of one request.
const CHUNK: usize = 256 << 10;

/// Requests under way at a time.
const DEPTH: usize = 16;

/// One disk of a driver, for one program at a time.
///
/// Offsets and lengths are in bytes, and have to be multiples of the disk's block size. Every
/// operation is cut into requests of which several are under way; one that fails ends the
/// operation, which may have been done in part then.
///
/// Callable from any thread that has it. What blocks has a form for tasks beside it, for any
/// executor; a future that is dropped halfway leaves its operation done in part, and the next one
/// waits for what is under way.
#[derive(Debug)]
pub struct BlockDevice {
    requests: Requests,
    disk: Disk,
    /// The chunk of the memory that each request under way has.
    chunks: [Option<Part>; DEPTH],
}

/// A request under way: which bytes of the slice, and where on the disk.
#[derive(Clone, Debug)]
struct Part {
    bytes: Range<usize>,
}

/// What goes between a slice and the memory.
enum Data<'a> {
    /// From the disk.
    Into(&'a mut [u8]),
    /// To the disk.
    From(&'a [u8]),
}

impl BlockDevice {
    /// Opens a disk of a driver.
    ///
    /// Errors: `NoSuchDisk`, `Call`, `Session`.
    pub fn open(session: Session, disk: u32) -> Result<Self, BlockError> {
        let requests = Requests::new(session, CHUNK * DEPTH)?;
        let disk = requests.describe(disk)?;
        Ok(Self { requests, disk, chunks: [const { None }; DEPTH] })
    }

    /// What the disk is.
    pub fn info(&self) -> &Disk {
        &self.disk
    }

    /// How the device is. Blocks.
    pub fn health(&self) -> Result<Health, BlockError> {
        self.requests.health()
    }

    /// Reads bytes. Blocks.
    ///
    /// Errors: `Failed` with what the disk says, or with `NotAligned` or `OutOfRange` before it is
    /// asked; `Queue` when the driver has ended.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<(), BlockError> {
        smol::block_on(self.read_async(offset, data))
    }

    /// As [`read`](Self::read), for a task.
    pub async fn read_async(&mut self, offset: u64, data: &mut [u8]) -> Result<(), BlockError> {
        self.transfer(offset, Data::Into(data)).await
    }

    /// Writes bytes, which are on the medium after a [`flush`](Self::flush). Blocks.
    ///
    /// Errors: as [`read`](Self::read); `Failed` with `ReadOnly`.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        smol::block_on(self.write_async(offset, data))
    }

    /// As [`write`](Self::write), for a task.
    pub async fn write_async(&mut self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.transfer(offset, Data::From(data)).await
    }

    /// Has everything that was written be on the medium. Blocks.
    pub fn flush(&mut self) -> Result<(), BlockError> {
        smol::block_on(self.flush_async())
    }

    /// As [`flush`](Self::flush), for a task.
    pub async fn flush_async(&mut self) -> Result<(), BlockError> {
        self.one(Operation::Flush, 0, 0).await
    }

    /// Says that bytes are not needed any more. Blocks. Errors: as [`write`](Self::write);
    /// `Failed` with `Unsupported`.
    pub fn discard(&mut self, offset: u64, length: u64) -> Result<(), BlockError> {
        smol::block_on(self.one(Operation::Discard, offset, length))
    }

    /// Has bytes read as zeros. Blocks. Errors: as [`discard`](Self::discard).
    pub fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), BlockError> {
        smol::block_on(self.one(Operation::WriteZeroes, offset, length))
    }

    /// An operation without data.
    async fn one(
        &mut self,
        operation: Operation,
        offset: u64,
        length: u64,
    ) -> Result<(), BlockError> {
        self.finish_what_was_left().await?;
        if operation != Operation::Flush {
            check(&self.disk, offset, length)?;
        }
        let request = self.request(operation, 0, offset, length);
        self.requests.send_async(&request).await?;
        self.chunks[0] = Some(Part { bytes: 0..0 });
        let (_, _, outcome) = self.next().await?;
        Ok(outcome?)
    }

    async fn transfer(&mut self, offset: u64, mut data: Data<'_>) -> Result<(), BlockError> {
        self.finish_what_was_left().await?;
        let length = data.len();
        if length == 0 {
            return Ok(());
        }
        check(&self.disk, offset, length as u64)?;
        let operation = match data {
            Data::Into(_) => Operation::Read,
            Data::From(_) => Operation::Write,
        };
        let mut sent = 0;
        let mut failure = None;
        loop {
            // A failure ends it, once nothing is under way any more.
            while failure.is_none()
                && sent < length
                && let Some(chunk) = self.chunks.iter().position(Option::is_none)
            {
                let bytes = sent..length.min(sent + CHUNK);
                if let Data::From(data) = &data {
                    self.requests.memory().write_at(chunk * CHUNK, &data[bytes.clone()])?;
                }
                let at = offset + sent as u64;
                let request = self.request(operation, chunk, at, bytes.len() as u64);
                sent = bytes.end;
                // In this order: a future that is dropped while it waits for room has sent nothing.
                self.requests.send_async(&request).await?;
                self.chunks[chunk] = Some(Part { bytes });
            }
            if self.chunks.iter().all(Option::is_none) {
                return failure.map_or(Ok(()), |failure: Failure| Err(failure.into()));
            }
            let (chunk, part, outcome) = self.next().await?;
            match (outcome, &mut data) {
                (Err(err), _) => drop(failure.get_or_insert(err)),
                (Ok(()), Data::Into(data)) => {
                    self.requests.memory().read_at(chunk * CHUNK, &mut data[part.bytes])?;
                }
                (Ok(()), Data::From(_)) => {}
            }
        }
    }

    /// Waits for requests of a future that was dropped: their chunks are the device's until then.
    async fn finish_what_was_left(&mut self) -> Result<(), BlockError> {
        while self.chunks.iter().any(Option::is_some) {
            let _ = self.next().await?;
        }
        Ok(())
    }

    /// The next request that has ended: its chunk, its part, and how it ended.
    async fn next(&mut self) -> Result<(usize, Part, Result<(), Failure>), BlockError> {
        let completion = self.requests.completion_async().await?;
        let chunk = completion.tag as usize;
        let part = self.chunks.get_mut(chunk).and_then(Option::take);
        Ok((chunk, part.ok_or(BlockError::Malformed)?, completion.outcome))
    }

    fn request(&self, operation: Operation, chunk: usize, offset: u64, length: u64) -> Request {
        Request {
            tag: chunk as u64,
            operation,
            is_polled: false,
            memory: 0,
            disk: self.disk.number,
            offset,
            length,
            at: (chunk * CHUNK) as u64,
            generation: 0,
        }
    }
}

impl Data<'_> {
    fn len(&self) -> usize {
        match self {
            Data::Into(data) => data.len(),
            Data::From(data) => data.len(),
        }
    }
}
