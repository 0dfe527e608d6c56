//! Ours: a data queue in each direction.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use iohost_event::Packets;
use iohost_memory::ring::{Bell, Consumer, Doorway, Peer, Producer, QueueError, Ring, Wait};

use super::{Line, QUEUE_BYTE_COUNT, check, message};

/// A data queue in each direction.
pub struct Queues {
    pub producer: Producer,
    pub serviced: Doorway,
    pub consumer: Consumer,
    pub available: Doorway,
    entry: Vec<u8>,
}

/// What a data queue consists of.
pub struct Parts {
    ring: Ring,
    available: Bell,
    serviced: Bell,
}

impl Queues {
    pub fn new(to: Parts, from: Parts, socket: Packets) -> Result<Self> {
        let socket = OwnedFd::from(socket);
        let doorway = |bell, socket| Doorway::new(bell, Some(Peer::Connection(socket)));
        Ok(Self {
            producer: Producer::new(to.ring, to.available)?,
            serviced: doorway(to.serviced, socket.try_clone()?)?,
            consumer: Consumer::new(from.ring, from.serviced)?,
            available: doorway(from.available, socket)?,
            entry: Vec::new(),
        })
    }
}

impl Parts {
    pub fn new() -> Result<Self> {
        let ring = Ring::create(c"bench", QUEUE_BYTE_COUNT)?;
        Ok(Self { ring, available: Bell::new()?, serviced: Bell::new()? })
    }

    fn attach([memory, available, serviced]: [OwnedFd; 3]) -> Option<Result<Self>> {
        let ring = Ring::attach(memory, QUEUE_BYTE_COUNT);
        let parts = |ring| Self { ring, available: available.into(), serviced: serviced.into() };
        Some(ring.map(parts).map_err(Into::into))
    }

    fn two(fds: Vec<OwnedFd>) -> Result<[Self; 2]> {
        let mut fds = fds.into_iter();
        let mut parts = || Self::attach([fds.next()?, fds.next()?, fds.next()?]);
        Ok([parts().context("a queue")??, parts().context("another queue")??])
    }

    pub fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.ring.memory().as_fd(), self.available.as_fd(), self.serviced.as_fd()]
    }
}

// The waits come before each operation, so that neither side is ever refused: "From here to the next
// `Underrun`…" in the ring's documentation.
impl<const SIZE: usize> Line<SIZE> for Queues {
    fn make(socket: Packets) -> Result<Self> {
        let [to, from] = [Parts::new()?, Parts::new()?];
        let fds: Vec<BorrowedFd<'_>> = [&to, &from].into_iter().flat_map(Parts::fds).collect();
        socket.send(b"queues", &fds)?;
        drop(fds);
        Self::new(to, from, socket)
    }

    fn join(socket: Packets) -> Result<Self> {
        let [from, to] = Parts::two(socket.receive(&mut [0; 16], 6)?.fds)?;
        Self::new(to, from, socket)
    }

    #[inline]
    fn send(&mut self, number: u64) -> Result<()> {
        self.producer.wait_for_room(SIZE, &self.serviced, Duration::MAX)?;
        Ok(self.producer.enqueue(&message::<SIZE>(number))?)
    }

    #[inline]
    fn receive(&mut self, number: u64) -> Result<()> {
        self.consumer.wait(&self.available, Duration::MAX)?;
        self.consumer.dequeue(&mut self.entry)?;
        check::<SIZE>(&self.entry, number)
    }
}

/// Data queues whose ends never sleep, so that nobody has to be told.
pub struct Polled {
    producer: Producer<Option<Bell>>,
    consumer: Consumer<Option<Bell>>,
    entry: Vec<u8>,
}

impl Line<64> for Polled {
    fn make(socket: Packets) -> Result<Self> {
        let [to, from] = [Parts::new()?, Parts::new()?];
        let fds: Vec<BorrowedFd<'_>> = [&to, &from].into_iter().flat_map(Parts::fds).collect();
        socket.send(b"queues", &fds)?;
        drop(fds);
        Ok(Self {
            producer: Producer::new(to.ring, None)?,
            consumer: Consumer::new(from.ring, None)?,
            entry: Vec::new(),
        })
    }

    fn join(socket: Packets) -> Result<Self> {
        let [from, to] = Parts::two(socket.receive(&mut [0; 16], 6)?.fds)?;
        Ok(Self {
            producer: Producer::new(to.ring, None)?,
            consumer: Consumer::new(from.ring, None)?,
            entry: Vec::new(),
        })
    }

    #[inline]
    fn send(&mut self, number: u64) -> Result<()> {
        Ok(self.producer.enqueue(&message::<64>(number))?)
    }

    #[inline]
    fn receive(&mut self, number: u64) -> Result<()> {
        while !self.consumer.is_data_available() {
            std::hint::spin_loop();
        }
        self.consumer.dequeue(&mut self.entry)?;
        check::<64>(&self.entry, number)
    }
}

/// Data queues whose ends sleep at once, as those do that are in an event loop.
pub struct Sleepers(Queues);

impl Line<64> for Sleepers {
    fn make(socket: Packets) -> Result<Self> {
        Line::<64>::make(socket).map(Self)
    }

    fn join(socket: Packets) -> Result<Self> {
        Line::<64>::join(socket).map(Self)
    }

    #[inline]
    fn send(&mut self, number: u64) -> Result<()> {
        Ok(self.0.producer.enqueue(&message::<64>(number))?)
    }

    #[inline]
    fn receive(&mut self, number: u64) -> Result<()> {
        while let Err(err) = self.0.consumer.dequeue(&mut self.0.entry) {
            ensure!(err == QueueError::Underrun, err);
            self.0.available.wait(None)?;
        }
        check::<64>(&self.0.entry, number)
    }
}
