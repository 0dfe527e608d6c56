//! A disk as a block device of this machine's kernel, by ublk.
//!
//! Each of the kernel's requests is one request of the disk's. Its tag is its place in the session's
//! memory, where the kernel's bytes go straight to and come from: nothing else is copied.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use block_api::{Completion, Disk, Operation, Request};
use iohost_client::Session;
use iohost_ublk::{Asked, Order, Properties, Queue};
pub use iohost_ublk::{UblkDevice, UblkError};
use nix::errno::Errno;
use smol::Async;
use smol::future::{or, poll_once};

use crate::{BlockError, Requests, check};

/// The most bytes of a read or write; the kernel cuts up what is longer.
const MOST_AT_ONCE: u64 = 256 << 10;

/// The least of them: a page, in which the kernel thinks.
const LEAST_AT_ONCE: u64 = 4096;

/// A disk that is `/dev/ublkbN`, from [`UblkDevice::start`] to [`UblkDevice::stop`], which any other
/// thread may call while this one [serves](Self::serve).
///
/// Dropping it fails what is under way, and removes the device.
#[derive(Debug)]
pub struct Attached {
    /// Before the device, which cannot be removed as long as there is a queue.
    server: Server,
    device: Removed,
}

/// Removed when it is dropped.
#[derive(Debug)]
struct Removed(UblkDevice);

#[derive(Debug)]
struct Server {
    queue: Queue,
    requests: Requests,
    disk: Disk,
    /// Bytes of the memory for each tag.
    most_at_once: u64,
    /// What has no answer, by tag.
    under_way: HashMap<u64, Request>,
    /// Why nothing goes to the disk any more.
    end: Option<Errno>,
}

impl Attached {
    /// Makes a device of a disk of a driver, which has to be served by this thread. Blocks.
    ///
    /// Errors: `NoSuchDisk`, `Call`, `Session`; `Ublk`.
    pub fn new(session: Session, disk: u32) -> Result<Self, BlockError> {
        let memory = usize::from(Queue::TAGS) * MOST_AT_ONCE as usize;
        let requests = Requests::new(session, memory)?;
        let disk = requests.describe(disk)?;
        let most_at_once = disk.most_at_once.clamp(LEAST_AT_ONCE, MOST_AT_ONCE);
        let most_at_once = most_at_once / LEAST_AT_ONCE * LEAST_AT_ONCE;
        let device = Removed(UblkDevice::add(&Properties {
            block: disk.block,
            bytes: disk.bytes(),
            most_at_once: most_at_once as u32,
            is_read_only: disk.is_read_only,
            has_write_cache: disk.has_write_cache,
            can_discard: disk.can_discard,
            can_write_zeroes: disk.can_write_zeroes,
        })?);
        let queue = device.0.queue()?;
        let (under_way, end) = (HashMap::new(), None);
        Ok(Self { server: Server { queue, requests, disk, most_at_once, under_way, end }, device })
    }

    /// The device, to start and to stop it.
    pub fn device(&self) -> &UblkDevice {
        &self.device.0
    }

    /// Does what the kernel asks, until the device is stopped. Blocks.
    ///
    /// What the disk refuses the kernel is told, and this goes on; also when the session is over,
    /// after which everything fails.
    ///
    /// Errors: those of the kernel.
    pub fn serve(mut self) -> Result<(), BlockError> {
        smol::block_on(self.server.serve())
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        // Somebody else may have done it.
        let _ = self.0.remove();
    }
}

impl Server {
    async fn serve(&mut self) -> Result<(), BlockError> {
        let ring = self.queue.as_fd().try_clone_to_owned().map_err(kernel)?;
        let ring: Async<OwnedFd> = Async::new_nonblocking(ring).map_err(kernel)?;
        while !self.queue.is_over() {
            let is_asked = async { ring.readable().await.map(|()| None).map_err(kernel) };
            let ended = match self.end {
                // Neither takes anything before it is ready, so one of them can be dropped.
                None => {
                    let ends = async { Ok(Some(self.requests.completion_async().await)) };
                    or(ends, is_asked).await?
                }
                Some(_) => is_asked.await?,
            };
            if let Some(completion) = ended {
                self.answer(completion);
                // Those that are there too, for one system call.
                while self.end.is_none()
                    && let Some(more) = poll_once(self.requests.completion_async()).await
                {
                    self.answer(more);
                }
            }
            while let Some(asked) = self.queue.take() {
                self.begin(asked);
            }
            self.queue.submit().map_err(kernel)?;
        }
        Ok(())
    }

    /// Sends a request of the kernel's to the disk, or says why not.
    fn begin(&mut self, asked: Asked) {
        match self.send(&asked) {
            Ok(request) => drop(self.under_way.insert(request.tag, request)),
            Err(errno) => self.queue.answer(asked.tag, Err(errno)),
        }
    }

    fn send(&mut self, asked: &Asked) -> Result<Request, Errno> {
        if let Some(errno) = self.end {
            return Err(errno);
        }
        let request = request(asked, &self.disk, self.most_at_once)?;
        if asked.order == Order::Write {
            let (at, len) = (request.at as usize, request.length as usize);
            let position = Queue::position(asked.tag);
            let read = self.requests.memory().read_from(at, len, self.queue.file(), position);
            read.map_err(|_| Errno::EIO)?;
        }
        // There is room in the queue for as many requests as there are tags.
        self.requests.send(&request).map_err(|err| self.give_up(&err))?;
        Ok(request)
    }

    /// Answers a request of the kernel's with what became of the disk's.
    fn answer(&mut self, completion: Result<Completion, BlockError>) {
        let Completion { tag, outcome } = match completion {
            Ok(completion) => completion,
            Err(err) => {
                self.give_up(&err);
                return;
            }
        };
        let Some(request) = self.under_way.remove(&tag) else { return };
        let outcome = match outcome {
            Ok(()) => self.done(&request),
            Err(failure) => Err(BlockError::from(failure).errno()),
        };
        self.queue.answer(tag as u16, outcome);
    }

    /// What the kernel is told of something that was done, after it was given the bytes.
    fn done(&self, request: &Request) -> Result<u32, Errno> {
        if request.operation == Operation::Read {
            let (at, len) = (request.at as usize, request.length as usize);
            let position = Queue::position(request.tag as u16);
            let written = self.requests.memory().write_to(at, len, self.queue.file(), position);
            written.map_err(|_| Errno::EIO)?;
        }
        Ok(if request.operation.has_data() { request.length as u32 } else { 0 })
    }

    /// There will be no more completions: everything fails, what is under way and what is asked later.
    fn give_up(&mut self, err: &BlockError) -> Errno {
        let errno = err.errno();
        self.end = Some(errno);
        for (tag, _) in self.under_way.drain() {
            self.queue.answer(tag as u16, Err(errno));
        }
        errno
    }
}

/// The disk's request for one of the kernel's.
fn request(asked: &Asked, disk: &Disk, most_at_once: u64) -> Result<Request, Errno> {
    let &Asked { tag, order, offset, length, is_through } = asked;
    let operation = match order {
        Order::Read => Operation::Read,
        Order::Write if is_through => Operation::WriteThrough,
        Order::Write => Operation::Write,
        Order::Flush => Operation::Flush,
        Order::Discard => Operation::Discard,
        Order::WriteZeroes => Operation::WriteZeroes,
        Order::Other(_) => return Err(Errno::EOPNOTSUPP),
    };
    if operation.has_data() && length > most_at_once {
        return Err(Errno::EINVAL);
    }
    let offset = if operation == Operation::Flush { 0 } else { offset };
    check(disk, offset, length).map_err(|failure| BlockError::from(failure).errno())?;
    Ok(Request {
        tag: tag.into(),
        operation,
        is_polled: false,
        memory: 0,
        disk: disk.number,
        offset,
        length,
        at: u64::from(tag) * most_at_once,
        generation: 0,
    })
}

fn kernel(source: std::io::Error) -> BlockError {
    let operation = "waiting for what is asked".to_owned();
    UblkError::Kernel { operation, source }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_of_the_kernels_is_one_of_the_disks() {
        let disk = Disk { number: 3, block: 4096, blocks: 64, ..Disk::default() };
        let asked =
            Asked { tag: 5, order: Order::Write, offset: 8192, length: 4096, is_through: false };
        let with = |asked: Asked| request(&asked, &disk, 65536);
        let found = with(asked).unwrap();
        assert_eq!((found.tag, found.disk, found.offset, found.length), (5, 3, 8192, 4096));
        assert_eq!(found.at, 5 * 65536, "each tag has its place in the memory");
        let operations = [
            (Order::Read, false, Operation::Read),
            (Order::Write, false, Operation::Write),
            (Order::Write, true, Operation::WriteThrough),
            (Order::Discard, false, Operation::Discard),
            (Order::WriteZeroes, false, Operation::WriteZeroes),
        ];
        for (order, is_through, operation) in operations {
            assert_eq!(with(Asked { order, is_through, ..asked }).unwrap().operation, operation);
        }
        // The kernel says anything for the place of a flush.
        let flush = Asked { order: Order::Flush, offset: u64::MAX, length: 0, ..asked };
        assert_eq!(with(flush).unwrap().offset, 0);
    }

    #[test]
    fn what_the_disk_cannot_do_is_an_error_for_the_kernel() {
        let disk = Disk { number: 3, block: 4096, blocks: 64, ..Disk::default() };
        let with = |order, offset, length| {
            let asked = Asked { tag: 0, order, offset, length, is_through: false };
            request(&asked, &disk, 65536).unwrap_err()
        };
        assert_eq!(with(Order::Read, 0, 131_072), Errno::EINVAL, "more than there is memory for");
        assert_eq!(with(Order::Read, 512, 4096), Errno::EINVAL);
        assert_eq!(with(Order::Write, 63 * 4096, 8192), Errno::ENOSPC);
        assert_eq!(with(Order::Other(18), 0, 4096), Errno::EOPNOTSUPP);
    }
}
