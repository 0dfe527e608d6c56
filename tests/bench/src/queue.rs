//! Messages between two processes that may sleep.
//!
//! Ours is a data queue in each direction, waited for as its documentation advises. The peers are
//! shmem-ipc (a ring of fixed-size items in shared memory that does not trust its peer either), a
//! pipe, and a Unix `SOCK_SEQPACKET` socket. shmem-ipc is driven item by item: with its safe batch form
//! (`recv_foreach`) streams of ours did not end, and its raw form takes `unsafe`. bbqueue, which would
//! need `unsafe` for a shared mapping, and iceoryx2 are not measured. Messages are copied in and copied out, so that the
//! receiver has touched every byte, and their number is checked. A stream ends with one message
//! back, which says that all have arrived.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Release};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use iohost_event::Packets;
use iohost_memory::SharedMemory;
use iohost_memory::ring::{Bell, Consumer, Doorway, Peer, Producer, QueueError, Ring, Wait};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv, send};
use shmem_ipc::sharedring::{Receiver, Sender};

use crate::machine::{Cores, cache_line_round_trip_ns, two_cache_lines_round_trip_ns};
use crate::rounds::{self, Better, Case, Effort, Metric, Side, percentile, this_program};

/// A case of messages of one size, against all peers.
macro_rules! case {
    ($name:literal, $run:ident::<$size:literal>, $($metric:literal is better $better:ident),+) => {
        Case {
            bench: "queue",
            name: $name,
            metrics: &[$(Metric { name: $metric, better: Better::$better }),+],
            ours: |effort| $run::<$size, Queues>($name, Side::Ours, effort),
            peers: &[
                rounds::Peer {
                    name: "shmem-ipc",
                    run: |effort| $run::<$size, SharedRings<$size>>($name, Side::Peer(0), effort),
                },
                rounds::Peer {
                    name: "pipe",
                    run: |effort| $run::<$size, Pipes>($name, Side::Peer(1), effort),
                },
                rounds::Peer {
                    name: "Unix seqpacket socket",
                    run: |effort| $run::<$size, Socket>($name, Side::Peer(2), effort),
                },
            ],
        }
    };
}

pub const CASES: &[Case] = &[
    case!("queue-stream-8", stream::<8>, "stream_8_messages_per_s" is better Higher),
    case!("queue-stream-64", stream::<64>, "stream_64_messages_per_s" is better Higher),
    case!("queue-stream-512", stream::<512>, "stream_512_messages_per_s" is better Higher),
    case!("queue-stream-4096", stream::<4096>, "stream_4096_messages_per_s" is better Higher),
    case!(
        "queue-round-trip-64",
        round_trip::<64>,
        "round_trip_p50_ns" is better Lower,
        "round_trip_p99_ns" is better Lower
    ),
    case!("queue-system-calls-64", system_calls::<64>, "stream_64_system_calls" is better Lower),
    Case {
        bench: "queue",
        name: "queue-batches-64",
        metrics: &[Metric { name: "batched_64_messages_per_s", better: Better::Higher }],
        ours: |effort| batches("queue-batches-64", effort),
        peers: &[rounds::Peer { name: "plain copy between two cores", run: plain_copy }],
    },
    Case {
        bench: "queue",
        name: "queue-polled-64",
        metrics: &[Metric { name: "polled_round_trip_ns", better: Better::Lower }],
        ours: |effort| polled::<Polled>(Side::Ours, effort),
        peers: &[
            rounds::Peer {
                name: "cache line there and back",
                run: |_| Ok(vec![cache_line_round_trip_ns()?]),
            },
            rounds::Peer {
                name: "a cache line each way",
                run: |_| Ok(vec![two_cache_lines_round_trip_ns()?]),
            },
            rounds::Peer {
                name: "shmem-ipc",
                run: |effort| polled::<PolledSharedRings>(Side::Peer(2), effort),
            },
        ],
    },
    Case {
        bench: "queue",
        name: "queue-sleeping-64",
        metrics: &[
            Metric { name: "sleeping_round_trip_p50_ns", better: Better::Lower },
            Metric { name: "sleeping_round_trip_p99_ns", better: Better::Lower },
        ],
        ours: |effort| round_trip::<64, Sleepers>("queue-sleeping-64", Side::Ours, effort),
        peers: &[
            rounds::Peer {
                name: "eventfd ping-pong",
                run: |effort| {
                    round_trip::<64, Eventfds>("queue-sleeping-64", Side::Peer(0), effort)
                },
            },
            rounds::Peer {
                name: "eventfd + epoll_wait ping-pong",
                run: |effort| {
                    round_trip::<64, WatchedEventfds>("queue-sleeping-64", Side::Peer(1), effort)
                },
            },
        ],
    },
];

/// Bytes of each ring: about 960 messages.
pub const QUEUE_BYTE_COUNT: u64 = 1 << 16;

fn stream<const SIZE: usize, L: Line<SIZE>>(
    case: &str,
    side: Side,
    effort: Effort,
) -> Result<Vec<f64>> {
    let mut session = Session::<L>::open::<SIZE>(case, side, effort)?;
    let mut rate = 0.0;
    for count in stream_counts::<SIZE>(side, effort) {
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

fn round_trip<const SIZE: usize, L: Line<SIZE>>(
    case: &str,
    side: Side,
    effort: Effort,
) -> Result<Vec<f64>> {
    let mut session = Session::<L>::open::<SIZE>(case, side, effort)?;
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

/// System calls per message of both processes together, counted by `ptrace(2)`.
fn system_calls<const SIZE: usize, L: Line<SIZE>>(
    case: &str,
    side: Side,
    effort: Effort,
) -> Result<Vec<f64>> {
    let counted = this_program("--other-end", case, side, effort)?;
    let calls = crate::system_calls::count(counted, "stream")?;
    let messages: u64 = stream_counts::<SIZE>(side, effort).iter().sum();
    Ok(vec![calls as f64 / messages as f64])
}

/// The counted one, which sends to a process of its own.
fn counted<const SIZE: usize, L: Line<SIZE>>(side: Side, effort: Effort) -> Result<()> {
    crate::system_calls::wait_to_be_counted()?;
    stream::<SIZE, L>("queue-stream-64", side, effort).map(drop)
}

/// Messages that become the consumer's together.
const BATCH: usize = 32;

/// As [`stream`], in batches at both ends.
fn batches(case: &str, effort: Effort) -> Result<Vec<f64>> {
    let mut session = Session::<Queues>::open::<64>(case, Side::Ours, effort)?;
    let mut rate = 0.0;
    for count in batched_counts(effort) {
        let start = Instant::now();
        let mut number = 0;
        while number < count {
            // Where this entry has room so does each of the batch, or the batch ends at it.
            let Queues { producer, serviced, .. } = &mut session.line;
            producer.wait_for_room(BATCH * 68, serviced, Duration::MAX)?;
            let end = count.min(number + BATCH as u64);
            producer.enqueue_batch(|batch| {
                while number < end && batch.enqueue(&message::<64>(number)).is_ok() {
                    number += 1;
                }
            })?;
        }
        Line::<64>::receive(&mut session.line, count)?;
        rate = count as f64 / start.elapsed().as_secs_f64();
    }
    session.close()?;
    Ok(vec![rate])
}

fn answer_batches(effort: Effort) -> Result<()> {
    Cores::choose()?.pin_consumer()?;
    let mut line = <Queues as Line<64>>::join(standard_input()?)?;
    for count in batched_counts(effort) {
        let mut number = 0;
        let mut message = [0; 64];
        let mut checked = Ok(());
        while number < count {
            line.consumer.wait(&line.available, Duration::MAX)?;
            line.consumer.dequeue_batch(BATCH, |entry| {
                let is_it = entry.size() == 64 && entry.read_at(0, &mut message).is_ok();
                if checked.is_ok() {
                    checked = check::<64>(if is_it { &message } else { &[] }, number);
                }
                number += 1;
            })?;
        }
        checked?;
        Line::<64>::send(&mut line, count)?;
    }
    Ok(())
}

/// Messages to warm up with, and messages to measure.
fn batched_counts(effort: Effort) -> [u64; 2] {
    let count = effort.of(8_000_000, 5_000);
    [count / 10, count]
}

/// What a batch costs at least: the copies, and one word per batch that says how far. Nothing is
/// checked but the messages, and nobody sleeps. Between two threads, which have the same memory and
/// the same cores.
fn plain_copy(effort: Effort) -> Result<Vec<f64>> {
    const BATCH_BYTES: u64 = (BATCH * 64) as u64;
    let cores = Cores::choose()?;
    let memory = SharedMemory::create(c"plain-copy", QUEUE_BYTE_COUNT as usize)?;
    let place = |number: u64| (number * 64 % QUEUE_BYTE_COUNT) as usize;
    let (written, read) = (Line64::default(), Line64::default());
    let wait_until = |word: &AtomicU64, least: u64| {
        while word.load(Acquire) < least {
            std::hint::spin_loop();
        }
    };
    let counts = batched_counts(effort).map(|count| count.next_multiple_of(BATCH as u64));
    let mut rate = 0.0;
    thread::scope(|threads| {
        let reader = threads.spawn(|| {
            let pinned = cores.pin_consumer();
            let mut checked = Ok(());
            let mut message = [0; 64];
            for number in 0..counts.iter().sum() {
                if number % BATCH as u64 == 0 {
                    read.0.store(number, Release);
                    wait_until(&written.0, number + BATCH as u64);
                }
                memory.read_at(place(number), &mut message);
                if checked.is_ok() {
                    checked = check::<64>(&message, number);
                }
            }
            read.0.store(counts.iter().sum(), Release);
            pinned.and(checked)
        });
        cores.pin_producer()?;
        let (mut number, mut known) = (0, 0);
        for count in counts {
            let start = Instant::now();
            let end = number + count;
            while number < end {
                let oldest = (number * 64 + BATCH_BYTES).saturating_sub(QUEUE_BYTE_COUNT) / 64;
                if known < oldest {
                    wait_until(&read.0, oldest);
                    known = read.0.load(Acquire);
                }
                for _ in 0..BATCH {
                    memory.write_at(place(number), &message::<64>(number));
                    number += 1;
                }
                written.0.store(number, Release);
            }
            wait_until(&read.0, end);
            rate = count as f64 / start.elapsed().as_secs_f64();
        }
        reader.join().expect("the thread does not panic")
    })?;
    Ok(vec![rate])
}

/// A word on a line of memory for itself.
#[derive(Default)]
#[repr(align(64))]
struct Line64(AtomicU64);

/// Round trips with neither end asleep, as mean of a block of them; the median of the blocks.
fn polled<L: Line<64>>(side: Side, effort: Effort) -> Result<Vec<f64>> {
    let mut session = Session::<L>::open::<64>("queue-polled-64", side, effort)?;
    let mut blocks = Vec::new();
    for block in 0..POLLED_BLOCKS {
        let start = Instant::now();
        for number in block * POLLED_BLOCK..(block + 1) * POLLED_BLOCK {
            session.line.send(number)?;
            session.line.receive(number)?;
        }
        blocks.push(start.elapsed().as_nanos() as f64 / POLLED_BLOCK as f64);
    }
    session.close()?;
    Ok(vec![percentile(blocks, 50)])
}

const POLLED_BLOCKS: u64 = 9;
const POLLED_BLOCK: u64 = 400;

/// The process at the other end; its socket is its standard input.
pub fn other_end(case: &str, side: Side, effort: Effort) -> Result<()> {
    match case {
        "queue-system-calls-64" => match side {
            Side::Ours => counted::<64, Queues>(side, effort),
            Side::Peer(0) => counted::<64, SharedRings<64>>(side, effort),
            Side::Peer(1) => counted::<64, Pipes>(side, effort),
            Side::Peer(_) => counted::<64, Socket>(side, effort),
        },
        "queue-batches-64" => answer_batches(effort),
        "queue-polled-64" => match side {
            Side::Ours => answer_round_trips::<Polled>(POLLED_BLOCKS * POLLED_BLOCK),
            Side::Peer(_) => answer_round_trips::<PolledSharedRings>(POLLED_BLOCKS * POLLED_BLOCK),
        },
        "queue-sleeping-64" => match side {
            Side::Ours => answer_round_trips::<Sleepers>(round_trips(effort)),
            Side::Peer(0) => answer_round_trips::<Eventfds>(round_trips(effort)),
            Side::Peer(_) => answer_round_trips::<WatchedEventfds>(round_trips(effort)),
        },
        "queue-stream-8" => answer::<8>(case, side, effort),
        "queue-stream-64" | "queue-round-trip-64" => answer::<64>(case, side, effort),
        "queue-stream-512" => answer::<512>(case, side, effort),
        "queue-stream-4096" => answer::<4096>(case, side, effort),
        _ => bail!("no other end of {case}"),
    }
}

fn answer<const SIZE: usize>(case: &str, side: Side, effort: Effort) -> Result<()>
where
    SharedRings<SIZE>: Line<SIZE>,
{
    match side {
        Side::Ours => answer_over::<SIZE, Queues>(case, side, effort),
        Side::Peer(0) => answer_over::<SIZE, SharedRings<SIZE>>(case, side, effort),
        Side::Peer(1) => answer_over::<SIZE, Pipes>(case, side, effort),
        Side::Peer(_) => answer_over::<SIZE, Socket>(case, side, effort),
    }
}

fn answer_over<const SIZE: usize, L: Line<SIZE>>(
    case: &str,
    side: Side,
    effort: Effort,
) -> Result<()> {
    Cores::choose()?.pin_consumer()?;
    let mut line = L::join(standard_input()?)?;
    if case.starts_with("queue-round-trip") {
        for number in 0..round_trips(effort) {
            line.receive(number)?;
            line.send(number)?;
        }
        return Ok(());
    }
    for count in stream_counts::<SIZE>(side, effort) {
        for number in 0..count {
            line.receive(number)?;
        }
        line.send(count)?;
    }
    Ok(())
}

fn answer_round_trips<L: Line<64>>(count: u64) -> Result<()> {
    Cores::choose()?.pin_consumer()?;
    let mut line = L::join(standard_input()?)?;
    for number in 0..count {
        line.receive(number)?;
        line.send(number)?;
    }
    Ok(())
}

/// The socket to the process that measures.
pub fn standard_input() -> Result<Packets> {
    Ok(Packets::from(std::io::stdin().as_fd().try_clone_to_owned()?))
}

/// Messages to warm up with, and messages to measure.
fn stream_counts<const SIZE: usize>(side: Side, effort: Effort) -> [u64; 2] {
    // For each about as long as for the other ones.
    let small = if let Side::Ours | Side::Peer(0) = side { 4_000_000 } else { 200_000 };
    let full = small / (SIZE as u64 / 128).max(1);
    let count = effort.of(full, 5_000);
    [count / 10, count]
}

fn round_trips(effort: Effort) -> u64 {
    effort.of(11_000, 110)
}

/// This process's end of both directions.
trait Line<const SIZE: usize>: Sized {
    /// Makes both directions and sends them to the other end, or uses the socket itself.
    fn make(socket: Packets) -> Result<Self>;

    /// Takes what `make` sent.
    fn join(socket: Packets) -> Result<Self>;

    /// Copies message `number` in; sleeps while there is no room.
    fn send(&mut self, number: u64) -> Result<()>;

    /// Copies a message out and checks that it is this one; sleeps until it comes.
    fn receive(&mut self, number: u64) -> Result<()>;
}

/// A line with a process at its other end.
struct Session<L> {
    line: L,
    process: Child,
}

impl<L> Session<L> {
    fn open<const SIZE: usize>(case: &str, side: Side, effort: Effort) -> Result<Self>
    where
        L: Line<SIZE>,
    {
        let (ours, theirs) = Packets::pair()?;
        let mut command = this_program("--other-end", case, side, effort)?;
        // Started before this thread is pinned, because it would inherit that.
        let process = command.stdin(Stdio::from(OwnedFd::from(theirs))).spawn()?;
        // The command keeps the other end of the socket open.
        drop(command);
        Cores::choose()?.pin_producer()?;
        Ok(Self { line: L::make(ours)?, process })
    }

    fn close(mut self) -> Result<()> {
        let status = self.process.wait()?;
        ensure!(status.success(), "the other end: {status}");
        Ok(())
    }
}

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
struct Polled {
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
struct Sleepers(Queues);

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

/// Two eventfds and no message: what a round trip with two sleeps costs at least. They block, so
/// that a sleep is one `read(2)`; nobody would see that the other end is gone.
struct Eventfds {
    to: Bell,
    from: Bell,
}

impl Line<64> for Eventfds {
    fn make(socket: Packets) -> Result<Self> {
        let blocking = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map(OwnedFd::from);
        let (to, from) = (Bell::from(blocking()?), Bell::from(blocking()?));
        socket.send(b"eventfds", &[to.as_fd(), from.as_fd()])?;
        Ok(Self { to, from })
    }

    fn join(socket: Packets) -> Result<Self> {
        let mut fds = socket.receive(&mut [0; 16], 2)?.fds.into_iter();
        let (from, to) = (fds.next().context("a bell")?, fds.next().context("another")?);
        Ok(Self { to: to.into(), from: from.into() })
    }

    fn send(&mut self, _: u64) -> Result<()> {
        Ok(self.to.ring()?)
    }

    fn receive(&mut self, _: u64) -> Result<()> {
        let mut count = [0; 8];
        nix::unistd::read(&self.from, &mut count)?;
        Ok(())
    }
}

/// Two eventfds that do not block, each watched by an epoll set: what it costs at least to sleep such
/// that something else, as the other end's death, can end the sleep too. An epoll set may report a
/// ring twice, so the messages' numbers stand in shared memory.
struct WatchedEventfds {
    to: Bell,
    from: Doorway,
    numbers: SharedMemory,
    /// Offsets of what this end wrote last, and the other one.
    written: usize,
    read: usize,
}

impl WatchedEventfds {
    const BYTES: usize = 4096;
    const PLACES: [usize; 2] = [0, 128];

    fn new(to: Bell, from: Bell, numbers: SharedMemory, places: [usize; 2]) -> Result<Self> {
        let [written, read] = places;
        Ok(Self { to, from: Doorway::new(from, None)?, numbers, written, read })
    }
}

impl Line<64> for WatchedEventfds {
    fn make(socket: Packets) -> Result<Self> {
        let (to, from) = (Bell::new()?, Bell::new()?);
        let numbers = SharedMemory::create(c"numbers", Self::BYTES)?;
        socket.send(b"eventfds", &[to.as_fd(), from.as_fd(), numbers.as_fd()])?;
        Self::new(to, from, numbers, Self::PLACES)
    }

    fn join(socket: Packets) -> Result<Self> {
        let fds = socket.receive(&mut [0; 16], 3)?.fds;
        let Ok([from, to, numbers]) = <[OwnedFd; 3]>::try_from(fds) else {
            bail!("two bells and a memory have three descriptors");
        };
        let numbers = SharedMemory::attach(numbers, Self::BYTES)?;
        let [theirs, ours] = Self::PLACES;
        Self::new(to.into(), from.into(), numbers, [ours, theirs])
    }

    fn send(&mut self, number: u64) -> Result<()> {
        self.numbers.write_at(self.written, &(number + 1).to_ne_bytes());
        Ok(self.to.ring()?)
    }

    fn receive(&mut self, number: u64) -> Result<()> {
        let mut last = [0; 8];
        while u64::from_ne_bytes(last) != number + 1 {
            self.from.wait(None)?;
            self.numbers.read_at(self.read, &mut last);
        }
        Ok(())
    }
}

/// A ring of shmem-ipc in each direction.
struct SharedRings<const SIZE: usize> {
    sender: Sender<[u8; SIZE]>,
    receiver: Receiver<[u8; SIZE]>,
}

/// As many bytes as our ring has.
const fn items<const SIZE: usize>() -> usize {
    QUEUE_BYTE_COUNT as usize / SIZE
}

macro_rules! shared_rings {
    ($($size:literal)+) => {$(
        impl Line<$size> for SharedRings<$size> {
            fn make(socket: Packets) -> Result<Self> {
                let (sender, receiver) = (Sender::new(items::<$size>())?, Receiver::new(items::<$size>())?);
                let fds = [
                    sender.memfd().as_file().as_fd(),
                    sender.empty_signal().as_fd(),
                    sender.full_signal().as_fd(),
                    receiver.memfd().as_file().as_fd(),
                    receiver.empty_signal().as_fd(),
                    receiver.full_signal().as_fd(),
                ];
                socket.send(b"rings", &fds)?;
                Ok(Self { sender, receiver })
            }

            fn join(socket: Packets) -> Result<Self> {
                let fds = socket.receive(&mut [0; 16], 6)?.fds;
                let files: Vec<File> = fds.into_iter().map(File::from).collect();
                let Ok([to_memory, to_empty, to_full, memory, empty, full]) =
                    <[File; 6]>::try_from(files)
                else {
                    bail!("two rings have six descriptors");
                };
                let receiver = Receiver::open(items::<$size>(), to_memory, to_empty, to_full)?;
                let sender = Sender::open(items::<$size>(), memory, empty, full)?;
                Ok(Self { sender, receiver })
            }

            #[inline]
            fn send(&mut self, number: u64) -> Result<()> {
                self.sender.block_until_writable()?;
                let message = message::<$size>(number);
                let status = self.sender.sender_mut().send_foreach(1, || message);
                if status.signal {
                    self.sender.empty_signal().write_all(&1_u64.to_ne_bytes())?;
                }
                Ok(())
            }

            #[inline]
            fn receive(&mut self, number: u64) -> Result<()> {
                self.receiver.block_until_readable()?;
                let mut taken = None;
                let status = self.receiver.receiver_mut().recv_foreach(1, |item| taken = Some(item));
                if status.signal {
                    self.receiver.full_signal().write_all(&1_u64.to_ne_bytes())?;
                }
                check::<$size>(&taken.context("a readable ring has an item")?, number)
            }
        }
    )+};
}

shared_rings!(8 64 512 4096);

/// Rings of shmem-ipc whose ends never sleep.
struct PolledSharedRings(SharedRings<64>);

impl Line<64> for PolledSharedRings {
    fn make(socket: Packets) -> Result<Self> {
        SharedRings::make(socket).map(Self)
    }

    fn join(socket: Packets) -> Result<Self> {
        SharedRings::join(socket).map(Self)
    }

    #[inline]
    fn send(&mut self, number: u64) -> Result<()> {
        let message = message::<64>(number);
        self.0.sender.sender_mut().send_foreach(1, || message);
        Ok(())
    }

    #[inline]
    fn receive(&mut self, number: u64) -> Result<()> {
        loop {
            let mut taken = None;
            self.0.receiver.receiver_mut().recv_foreach(1, |item| taken = Some(item));
            if let Some(taken) = taken {
                return check::<64>(&taken, number);
            }
            std::hint::spin_loop();
        }
    }
}

struct Pipes(PipeWriter, PipeReader);

impl<const SIZE: usize> Line<SIZE> for Pipes {
    fn make(socket: Packets) -> Result<Self> {
        let ((their_reader, writer), (reader, their_writer)) = (pipe()?, pipe()?);
        socket.send(b"pipes", &[their_writer.as_fd(), their_reader.as_fd()])?;
        Ok(Self(writer, reader))
    }

    fn join(socket: Packets) -> Result<Self> {
        let mut fds = socket.receive(&mut [0; 16], 2)?.fds.into_iter();
        let (writer, reader) = (fds.next().context("a pipe")?, fds.next().context("another")?);
        Ok(Self(writer.into(), reader.into()))
    }

    fn send(&mut self, number: u64) -> Result<()> {
        Ok(self.0.write_all(&message::<SIZE>(number))?)
    }

    fn receive(&mut self, number: u64) -> Result<()> {
        let mut entry = [0; SIZE];
        self.1.read_exact(&mut entry)?;
        check::<SIZE>(&entry, number)
    }
}

struct Socket(OwnedFd);

impl<const SIZE: usize> Line<SIZE> for Socket {
    fn make(socket: Packets) -> Result<Self> {
        Ok(Self(socket.into()))
    }

    fn join(socket: Packets) -> Result<Self> {
        Ok(Self(socket.into()))
    }

    fn send(&mut self, number: u64) -> Result<()> {
        let sent = send(self.0.as_raw_fd(), &message::<SIZE>(number), MsgFlags::MSG_NOSIGNAL)?;
        ensure!(sent == SIZE, "a packet of {SIZE} bytes was cut to {sent}");
        Ok(())
    }

    fn receive(&mut self, number: u64) -> Result<()> {
        let mut entry = [0; SIZE];
        let received = recv(self.0.as_raw_fd(), &mut entry, MsgFlags::empty())?;
        check::<SIZE>(&entry[..received], number)
    }
}

/// Eight bytes of number at both ends.
#[inline]
fn message<const SIZE: usize>(number: u64) -> [u8; SIZE] {
    let mut message = [0; SIZE];
    message[..8].copy_from_slice(&number.to_ne_bytes());
    message[SIZE - 8..].copy_from_slice(&number.to_ne_bytes());
    message
}

#[inline]
fn check<const SIZE: usize>(entry: &[u8], number: u64) -> Result<()> {
    let expected = number.to_ne_bytes();
    let is_it = entry.len() == SIZE && entry.starts_with(&expected) && entry.ends_with(&expected);
    ensure!(is_it, "message {number} was expected, not {entry:x?}");
    Ok(())
}
