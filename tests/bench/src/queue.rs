//! Messages of 64 bytes between two processes that may sleep.
//!
//! Ours is a data queue in each direction; the peer is a Unix `SOCK_SEQPACKET` socket. Messages are
//! copied in and copied out, so that the receiver has touched every byte, and their number is
//! checked. A stream ends with one message back, which says that all have arrived.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use iohost_event::Packets;
use iohost_memory::ring::{Bell, Consumer, Doorway, Peer, Producer, QueueError, Ring};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::machine::Cores;
use crate::rounds::{self, Better, Case, Effort, Metric, Side, percentile, this_program};

pub const CASES: &[Case] = &[
    Case {
        bench: "queue",
        name: STREAM,
        metrics: &[Metric { name: "messages_per_s", better: Better::Higher }],
        ours: |effort| stream(Side::Ours, effort),
        peers: &[rounds::Peer {
            name: "Unix seqpacket socket",
            run: |effort| stream(Side::Peer(0), effort),
        }],
    },
    Case {
        bench: "queue",
        name: ROUND_TRIP,
        metrics: &[
            Metric { name: "round_trip_p50_ns", better: Better::Lower },
            Metric { name: "round_trip_p99_ns", better: Better::Lower },
        ],
        ours: |effort| round_trip(Side::Ours, effort),
        peers: &[rounds::Peer {
            name: "Unix seqpacket socket",
            run: |effort| round_trip(Side::Peer(0), effort),
        }],
    },
];

const STREAM: &str = "queue-stream";
const ROUND_TRIP: &str = "queue-round-trip";

/// Bytes per message.
const SIZE: usize = 64;

/// Bytes of each ring: about 960 messages.
const QUEUE_BYTE_COUNT: u64 = 1 << 16;

fn stream(side: Side, effort: Effort) -> Result<Vec<f64>> {
    let mut session = Session::open(STREAM, side, effort)?;
    let mut rate = 0.0;
    for count in stream_counts(side, effort) {
        let start = Instant::now();
        for number in 0..count {
            session.line.send(number)?;
        }
        session.line.receive(count)?;
        rate = count as f64 / start.elapsed().as_secs_f64();
    }
    session.close()?;
    Ok(vec![rate])
}

fn round_trip(side: Side, effort: Effort) -> Result<Vec<f64>> {
    let mut session = Session::open(ROUND_TRIP, side, effort)?;
    let mut samples = Vec::new();
    for number in 0..round_trips(effort) {
        let start = Instant::now();
        session.line.send(number)?;
        session.line.receive(number)?;
        samples.push(start.elapsed().as_nanos() as f64);
    }
    session.close()?;
    let samples = samples.split_off(samples.len() / 10); // the rest was for warming up
    Ok(vec![percentile(samples.clone(), 50), percentile(samples, 99)])
}

/// The process at the other end; its socket is its standard input.
pub fn other_end(case: &str, side: Side, effort: Effort) -> Result<()> {
    Cores::choose()?.pin_consumer()?;
    let socket = Packets::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut line: Box<dyn Line> = match side {
        Side::Ours => Box::new(Queues::join(socket)?),
        Side::Peer(_) => Box::new(Socket(socket.into())),
    };
    if case == ROUND_TRIP {
        for number in 0..round_trips(effort) {
            line.receive(number)?;
            line.send(number)?;
        }
        return Ok(());
    }
    for count in stream_counts(side, effort) {
        for number in 0..count {
            line.receive(number)?;
        }
        line.send(count)?;
    }
    Ok(())
}

/// Messages to warm up with, and messages to measure.
fn stream_counts(side: Side, effort: Effort) -> [u64; 2] {
    // For each about as long as for the other one.
    let full = if side == Side::Ours { 2_000_000 } else { 200_000 };
    let count = effort.of(full, 5_000);
    [count / 10, count]
}

fn round_trips(effort: Effort) -> u64 {
    effort.of(11_000, 110)
}

/// This process's end of both directions.
trait Line {
    /// Copies message `number` in; sleeps while there is no room.
    fn send(&mut self, number: u64) -> Result<()>;

    /// Copies a message out and checks that it is this one; sleeps until it comes.
    fn receive(&mut self, number: u64) -> Result<()>;
}

/// A line with a process at its other end.
struct Session {
    line: Box<dyn Line>,
    process: Child,
}

impl Session {
    fn open(case: &str, side: Side, effort: Effort) -> Result<Self> {
        let (ours, theirs) = Packets::pair()?;
        let mut command = this_program("--other-end", case, side, effort)?;
        // Started before this thread is pinned, because it would inherit that.
        let process = command.stdin(Stdio::from(OwnedFd::from(theirs))).spawn()?;
        // The command keeps the other end of the socket open.
        drop(command);
        Cores::choose()?.pin_producer()?;
        let line: Box<dyn Line> = match side {
            Side::Ours => Box::new(Queues::make(ours)?),
            Side::Peer(_) => Box::new(Socket(ours.into())),
        };
        Ok(Self { line, process })
    }

    fn close(mut self) -> Result<()> {
        let status = self.process.wait()?;
        ensure!(status.success(), "the other end: {status}");
        Ok(())
    }
}

/// A data queue in each direction.
struct Queues {
    producer: Producer,
    serviced: Doorway,
    consumer: Consumer,
    available: Doorway,
    entry: Vec<u8>,
}

/// What a data queue consists of.
struct Parts {
    ring: Ring,
    available: Bell,
    serviced: Bell,
}

impl Queues {
    /// Makes the queues and sends them to the other end.
    fn make(socket: Packets) -> Result<Self> {
        let [to, from] = [Parts::new()?, Parts::new()?];
        let fds: Vec<BorrowedFd<'_>> = [&to, &from].into_iter().flat_map(Parts::fds).collect();
        socket.send(b"queues", &fds)?;
        drop(fds);
        Self::new(to, from, socket)
    }

    /// Takes the queues that `make` sent.
    fn join(socket: Packets) -> Result<Self> {
        let mut fds = socket.receive(&mut [0; 16], 6)?.fds.into_iter();
        let mut parts = || Parts::attach([fds.next()?, fds.next()?, fds.next()?]);
        let (from, to) = (parts().context("a queue")??, parts().context("another queue")??);
        Self::new(to, from, socket)
    }

    fn new(to: Parts, from: Parts, socket: Packets) -> Result<Self> {
        let socket = OwnedFd::from(socket);
        let doorway = |bell, socket| Doorway { bell, peer: Some(Peer::Connection(socket)) };
        Ok(Self {
            producer: Producer::new(to.ring, to.available)?,
            serviced: doorway(to.serviced, socket.try_clone()?),
            consumer: Consumer::new(from.ring, from.serviced)?,
            available: doorway(from.available, socket),
            entry: Vec::new(),
        })
    }
}

impl Parts {
    fn new() -> Result<Self> {
        let ring = Ring::create(c"bench", QUEUE_BYTE_COUNT)?;
        Ok(Self { ring, available: Bell::new()?, serviced: Bell::new()? })
    }

    fn attach([memory, available, serviced]: [OwnedFd; 3]) -> Option<Result<Self>> {
        let ring = Ring::attach(memory, QUEUE_BYTE_COUNT);
        let parts = |ring| Self { ring, available: available.into(), serviced: serviced.into() };
        Some(ring.map(parts).map_err(Into::into))
    }

    fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.ring.memory().as_fd(), self.available.as_fd(), self.serviced.as_fd()]
    }
}

// The waits are those of `iohost_client`: as long as it takes, or until the peer is gone.
impl Line for Queues {
    fn send(&mut self, number: u64) -> Result<()> {
        loop {
            match self.producer.enqueue(&message(number)) {
                Err(QueueError::Overrun { size }) => {
                    self.producer.wait_for_room(size, &self.serviced, Duration::MAX)?;
                }
                other => return Ok(other?),
            }
        }
    }

    fn receive(&mut self, number: u64) -> Result<()> {
        loop {
            match self.consumer.dequeue(&mut self.entry) {
                Err(QueueError::Underrun) => {
                    self.consumer.wait(&self.available, Duration::MAX)?;
                }
                other => {
                    other?;
                    return check(&self.entry, number);
                }
            }
        }
    }
}

struct Socket(OwnedFd);

impl Line for Socket {
    fn send(&mut self, number: u64) -> Result<()> {
        let sent = send(self.0.as_raw_fd(), &message(number), MsgFlags::MSG_NOSIGNAL)?;
        ensure!(sent == SIZE, "a packet of {SIZE} bytes was cut to {sent}");
        Ok(())
    }

    fn receive(&mut self, number: u64) -> Result<()> {
        let mut entry = [0; SIZE];
        let received = recv(self.0.as_raw_fd(), &mut entry, MsgFlags::empty())?;
        check(&entry[..received], number)
    }
}

/// Eight bytes of number at both ends.
fn message(number: u64) -> [u8; SIZE] {
    let mut message = [0; SIZE];
    message[..8].copy_from_slice(&number.to_ne_bytes());
    message[SIZE - 8..].copy_from_slice(&number.to_ne_bytes());
    message
}

fn check(entry: &[u8], number: u64) -> Result<()> {
    let expected = number.to_ne_bytes();
    let is_it = entry.len() == SIZE && entry.starts_with(&expected) && entry.ends_with(&expected);
    ensure!(is_it, "message {number} was expected, not {entry:x?}");
    Ok(())
}
