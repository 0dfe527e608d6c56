//! Messages between two processes that may sleep.
//!
//! Ours is a data queue in each direction, waited for as its documentation advises. The peers are
//! shmem-ipc (a ring of fixed-size items in shared memory that does not trust its peer either), a
//! pipe, and a Unix `SOCK_SEQPACKET` socket. shmem-ipc is driven item by item: with its safe batch form
//! (`recv_foreach`) streams of ours did not end, and its raw form takes `unsafe`. bbqueue takes `unsafe`
//! to be in a shared mapping, so its ends are two threads, which never sleep. iceoryx2 would bring a
//! hundred crates and is not measured. Messages are copied in and copied out, so that the
//! receiver has touched every byte, and their number is checked. A stream ends with one message
//! back, which says that all have arrived.

mod data_queues;
mod peers;
mod threads;

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use iohost_event::Packets;

use crate::machine::{Cores, cache_line_round_trip_ns, two_cache_lines_round_trip_ns};
use crate::rounds::{self, Better, Case, Effort, Metric, Side, percentile, this_program};
pub use data_queues::{Parts, Queues};
use data_queues::{Polled, Sleepers};
use peers::{Eventfds, Pipes, PolledSharedRings, SharedRings, Socket, WatchedEventfds};

/// A case of messages of one size, against all peers.
macro_rules! case {
    (stream::<$size:literal>, $name:literal, $metric:literal) => {
        case!(
            $name,
            stream::<$size>,
            $metric is better Higher,
            beside "bbqueue" threads::bbqueue::<$size>
        )
    };
    (
        $name:literal, $run:ident::<$size:literal>, $($metric:literal is better $better:ident),+
        $(, beside $peer:literal $other:path)*
    ) => {
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
                $(rounds::Peer { name: $peer, run: $other },)*
            ],
        }
    };
}

pub const CASES: &[Case] = &[
    case!(stream::<8>, "queue-stream-8", "stream_8_messages_per_s"),
    case!(stream::<64>, "queue-stream-64", "stream_64_messages_per_s"),
    case!(stream::<512>, "queue-stream-512", "stream_512_messages_per_s"),
    case!(stream::<4096>, "queue-stream-4096", "stream_4096_messages_per_s"),
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
        peers: &[rounds::Peer { name: "plain copy between two cores", run: threads::plain_copy }],
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
