//! Two queues, one per direction, between this process and a second one that runs the same program.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command};

use iohost_event::Packets;
use iohost_memory::ring::{Bell, Consumer, Producer, Ring};

/// What one process has of the two queues.
pub struct Ends {
    pub producer: Producer,
    /// Rung when the other side has made room.
    pub serviced: Bell,
    pub consumer: Consumer,
    /// Rung when the other side has sent something.
    pub available: Bell,
}

/// The descriptors of one queue: its memory, and what rings for the consumer and the producer.
struct Queue {
    memory: OwnedFd,
    available: OwnedFd,
    serviced: OwnedFd,
}

impl Queue {
    fn create(bytes: u32) -> io::Result<Self> {
        let ring = Ring::create(c"stream", bytes.into()).map_err(io::Error::other)?;
        Ok(Self {
            memory: ring.memory().as_fd().try_clone_to_owned()?,
            available: Bell::new()?.into(),
            serviced: Bell::new()?.into(),
        })
    }

    fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.memory.as_fd(), self.available.as_fd(), self.serviced.as_fd()]
    }
}

/// Starts the second process with `arguments`, and gives it its ends.
pub fn start(arguments: &[String], bytes: u32) -> io::Result<(Child, Ends)> {
    let queues = [Queue::create(bytes)?, Queue::create(bytes)?];
    let (ours, theirs) = Packets::pair()?;
    let stdin = theirs.as_fd().try_clone_to_owned()?;
    let child = Command::new(std::env::current_exe()?).args(arguments).stdin(stdin).spawn()?;
    let [out, into] = &queues;
    // What we send, they receive.
    let descriptors = [into.descriptors(), out.descriptors()].concat();
    ours.send(&[0], &descriptors).map_err(io::Error::other)?;
    let [out, into] = queues;
    Ok((child, Ends::new(out, into, bytes)?))
}

/// The ends of the process that was started, from its standard input.
pub fn accept(bytes: u32) -> io::Result<Ends> {
    let socket = Packets::from(io::stdin().as_fd().try_clone_to_owned()?);
    let packet = socket.receive(&mut [0], 6).map_err(io::Error::other)?;
    let mut descriptors = packet.fds.into_iter();
    let mut next = || descriptors.next().ok_or(io::ErrorKind::UnexpectedEof);
    let mut queue = || -> io::Result<Queue> {
        Ok(Queue { memory: next()?, available: next()?, serviced: next()? })
    };
    let (out, into) = (queue()?, queue()?);
    Ends::new(out, into, bytes)
}

impl Ends {
    fn new(out: Queue, into: Queue, bytes: u32) -> io::Result<Self> {
        let attach = |memory| Ring::attach(memory, bytes.into()).map_err(io::Error::other);
        let producer = Producer::new(attach(out.memory)?, out.available.into());
        let consumer = Consumer::new(attach(into.memory)?, into.serviced.into());
        Ok(Self {
            producer: producer.map_err(io::Error::other)?,
            serviced: out.serviced.into(),
            consumer: consumer.map_err(io::Error::other)?,
            available: into.available.into(),
        })
    }
}
