//! The NVMe driver, on a controller that costs next to nothing: reads of 4 KiB, 32 under way, their
//! completions looked for. So the figures are the driver's own.
//!
//! The core is what a request takes from the place where it is known to be sound to the place where
//! it has ended, and nothing else; driver and controller share one core of the machine. Its peer
//! does the controller's rings by hand, with one kind of command and no look at what comes back: the
//! least that any driver does.
//!
//! The client is another process, with the data queues between the two, each on a core of its own;
//! its peer is the core alone.

mod controller;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use block_api::{Completion, Operation, Request};
use iohost_device_backend::{DeviceBackend, InterruptKind};
use iohost_driver_host::{NewSession, SessionQueue};
use iohost_event::Packets;
use iohost_memory::SharedMemory;
use nix::sys::uio::pread;
use nvme::Nvme;
use nvme::alone::Alone;

use crate::instructions::{self, counted};
use crate::machine::Cores;
use crate::queue::{Parts, QUEUE_BYTE_COUNT, Queues, standard_input};
use crate::rounds::{Better, Case, Effort, Metric, Peer, Side, this_program};
use crate::{driver, system_calls};
use controller::Controller;

const INSTRUCTIONS: &str = "nvme-core-instructions";
const CLIENT: &str = "nvme-client";
const SYSTEM_CALLS: &str = "nvme-system-calls";

pub const CASES: &[Case] = &[
    Case {
        bench: "nvme",
        name: "nvme-core",
        metrics: &[Metric { name: "core_reads_per_s", better: Better::Higher }],
        ours: |effort| Ok(vec![rate_of(&mut core()?, core_reads(effort))?]),
        peers: &[Peer {
            name: "rings by hand",
            run: |effort| Ok(vec![rate_of(&mut ByHand::new()?, core_reads(effort))?]),
        }],
    },
    Case {
        bench: "nvme",
        name: INSTRUCTIONS,
        metrics: &[Metric { name: "instructions_per_core_read", better: Better::Lower }],
        ours: |effort| instructions_per_read(Side::Ours, effort),
        peers: &[Peer {
            name: "rings by hand",
            run: |effort| instructions_per_read(Side::Peer(0), effort),
        }],
    },
    Case {
        bench: "nvme",
        name: CLIENT,
        metrics: &[Metric { name: "client_reads_per_s", better: Better::Higher }],
        ours: |effort| Ok(vec![client(client_reads(effort), effort)?]),
        peers: &[Peer {
            name: "driver core alone",
            run: |effort| Ok(vec![rate_of(&mut core()?, core_reads(effort))?]),
        }],
    },
    Case {
        bench: "nvme",
        name: SYSTEM_CALLS,
        metrics: &[Metric { name: "system_calls_per_read", better: Better::Lower }],
        ours: |effort| system_calls_per_read(Side::Ours, effort),
        peers: &[Peer {
            name: "pread",
            run: |effort| system_calls_per_read(Side::Peer(0), effort),
        }],
    },
];

/// Requests under way.
const DEPTH: u64 = 32;

/// Completions after which a client sends again: so that neither side waits for the whole depth of
/// the other.
const TOGETHER: usize = 16;

/// How long a client looks before it sleeps.
const POLL: Duration = Duration::from_micros(100);

/// Blocks of the disk, and of the client's memory.
const BLOCKS: u64 = 1024;
const BLOCK: u64 = 4096;

fn core_reads(effort: Effort) -> u64 {
    effort.of(8_000_000, 3200)
}

fn client_reads(effort: Effort) -> u64 {
    effort.of(4_000_000, 3200)
}

/// A place of the disk for each read, not one after the other.
#[inline]
fn block_of(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54
}

/// Reads with a number each.
trait Reader {
    fn begin(&mut self, number: u64, tag: u64) -> Result<()>;
    /// Has the controller do what was begun; gives the tags of what has ended.
    fn turn(&mut self, done: impl FnMut(u64)) -> Result<()>;
}

/// Reads that end per second, with always as many under way; half of them to warm up.
fn rate_of(reader: &mut impl Reader, count: u64) -> Result<f64> {
    Cores::choose()?.pin_consumer()?;
    run(reader, count / 2)?;
    let start = Instant::now();
    run(reader, count)?;
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

fn run(reader: &mut impl Reader, count: u64) -> Result<()> {
    let mut free: Vec<u64> = (0..DEPTH).collect();
    let (mut begun, mut ended) = (0, 0);
    while ended < count {
        while begun < count
            && let Some(tag) = free.pop()
        {
            reader.begin(begun, tag)?;
            begun += 1;
        }
        reader.turn(|tag| free.push(tag))?;
        ended = begun - (DEPTH - free.len() as u64);
    }
    Ok(())
}

// ---- The core ----

fn core() -> Result<Alone> {
    let controller = Arc::new(Controller::new(BLOCKS));
    let device = driver::lend_to(controller.clone())?;
    let alone = Alone::make(device, BLOCKS)?;
    controller.make_pair(1, alone.rings());
    Ok(alone)
}

impl Reader for Alone {
    #[inline]
    fn begin(&mut self, number: u64, tag: u64) -> Result<()> {
        self.read(tag, block_of(number), MEMORY + tag * BLOCK);
        Ok(())
    }

    #[inline]
    fn turn(&mut self, done: impl FnMut(u64)) -> Result<()> {
        Alone::turn(self, done);
        Ok(())
    }
}

/// Where the controller would find the bytes; it moves none.
const MEMORY: u64 = 1 << 40;

/// The rings without a driver.
struct ByHand {
    controller: Controller,
    memory: SharedMemory,
    tail: u16,
    head: u16,
    phase: u8,
}

impl ByHand {
    const ENTRIES: u16 = 256;
    const COMPLETIONS: usize = Self::ENTRIES as usize * 64;

    fn new() -> Result<Self> {
        let controller = Controller::new(BLOCKS);
        let memory = SharedMemory::create(c"rings", Self::COMPLETIONS + 4096)?;
        controller.dma_map(0, &memory)?;
        controller.make_pair(1, (0, Self::COMPLETIONS as u64, Self::ENTRIES));
        Ok(Self { controller, memory, tail: 0, head: 0, phase: 1 })
    }
}

impl Reader for ByHand {
    #[inline]
    fn begin(&mut self, number: u64, tag: u64) -> Result<()> {
        let mut command = [0; 64];
        command[0] = 2;
        command[2..4].copy_from_slice(&(tag as u16).to_le_bytes());
        command[4] = 1;
        command[24..32].copy_from_slice(&(MEMORY + tag * BLOCK).to_le_bytes());
        command[40..48].copy_from_slice(&block_of(number).to_le_bytes());
        self.memory.write_at(usize::from(self.tail) * 64, &command);
        self.tail = (self.tail + 1) % Self::ENTRIES;
        Ok(())
    }

    #[inline]
    fn turn(&mut self, mut done: impl FnMut(u64)) -> Result<()> {
        self.controller.bar_write(0, 0x1008, &u32::from(self.tail).to_le_bytes())?;
        loop {
            let mut entry = [0; 16];
            self.memory.read_at(Self::COMPLETIONS + usize::from(self.head) * 16, &mut entry);
            if entry[14] & 1 != self.phase {
                break;
            }
            done(u64::from(entry[12]));
            self.head = (self.head + 1) % Self::ENTRIES;
            self.phase ^= u8::from(self.head == 0);
        }
        Ok(self.controller.bar_write(0, 0x100c, &u32::from(self.head).to_le_bytes())?)
    }
}

fn instructions_per_read(side: Side, effort: Effort) -> Result<Vec<f64>> {
    let [once, twice] = counted(INSTRUCTIONS, side, effort)?;
    Ok(vec![(twice - once) as f64 / counted_reads(effort) as f64])
}

fn counted_reads(effort: Effort) -> u64 {
    effort.of(64, 32)
}

fn run_counted(reader: &mut impl Reader, effort: Effort) -> Result<()> {
    run(reader, 64)?;
    instructions::begin()?;
    for times in [1, 2] {
        run(reader, times * counted_reads(effort))?;
        instructions::mark()?;
    }
    Ok(())
}

// ---- The client ----

/// Reads that a client sees end per second.
fn client(count: u64, effort: Effort) -> Result<f64> {
    let mut client = Client::start(effort)?;
    client.run(count / 2)?;
    let start = Instant::now();
    client.run(count)?;
    let elapsed = start.elapsed();
    client.close()?;
    Ok(count as f64 / elapsed.as_secs_f64())
}

struct Client {
    queues: Queues,
    driver: Child,
}

impl Client {
    fn start(effort: Effort) -> Result<Self> {
        let (ours, theirs) = Packets::pair()?;
        let mut command = this_program("--other-end", CLIENT, Side::Ours, effort)?;
        // Started before this thread is pinned, because it would inherit that.
        let driver = command.stdin(Stdio::from(OwnedFd::from(theirs))).spawn()?;
        // The command keeps the other end of the socket open.
        drop(command);
        Cores::choose()?.pin_producer()?;
        let [requests, completions] = [Parts::new()?, Parts::new()?];
        let parts = [&requests, &completions];
        let fds: Vec<BorrowedFd<'_>> = parts.into_iter().flat_map(Parts::fds).collect();
        ours.send(b"session", &fds)?;
        drop(fds);
        ours.receive(&mut [0; 16], 0).context("the driver's process")?;
        Ok(Self { queues: Queues::new(requests, completions, ours)?, driver })
    }

    fn run(&mut self, count: u64) -> Result<()> {
        let Queues { producer, consumer, available, .. } = &mut self.queues;
        let mut free: Vec<u64> = (0..DEPTH).collect();
        let (mut begun, mut ended) = (0, 0);
        loop {
            let sent = producer.enqueue_batch(|batch| {
                while begun < count
                    && let Some(tag) = free.pop()
                {
                    batch.enqueue(&read(begun, tag).to_bytes())?;
                    begun += 1;
                }
                Ok::<(), iohost_memory::ring::QueueError>(())
            });
            sent??;
            if ended == count {
                return Ok(());
            }
            if !consumer.look_for(POLL)? {
                consumer.wait(available, Duration::MAX)?;
            }
            let mut failure = Ok(());
            consumer.dequeue_batch(TOGETHER, |entry| {
                let mut bytes = [0; block_api::LONGEST_COMPLETION];
                let bytes = &mut bytes[..entry.size().min(block_api::LONGEST_COMPLETION)];
                let whole = entry.read_at(0, bytes);
                match Completion::from_bytes(bytes) {
                    Ok(Completion { tag, outcome: Ok(()) }) if whole.is_ok() => free.push(tag),
                    other => failure = Err(anyhow::anyhow!("{other:?}")),
                }
                ended += 1;
            })?;
            failure?;
        }
    }

    fn close(mut self) -> Result<()> {
        drop(self.queues);
        let status = self.driver.wait()?;
        ensure!(status.success(), "the driver's process: {status}");
        Ok(())
    }
}

#[inline]
fn read(number: u64, tag: u64) -> Request {
    Request {
        tag,
        operation: Operation::Read,
        is_polled: true,
        memory: 0,
        disk: 1,
        offset: block_of(number) * BLOCK,
        length: BLOCK,
        at: tag * BLOCK,
        generation: 1,
    }
}

/// The driver's process: one session, until its client leaves.
fn serve() -> Result<()> {
    let socket = standard_input()?;
    let fds = socket.receive(&mut [0; 16], 6)?.fds;
    Cores::choose()?.pin_consumer()?;
    let driver = driver::start_on::<Nvme>(Arc::new(Controller::new(BLOCKS)), InterruptKind::MsiX)?;
    let mut fds = fds.into_iter();
    let mut queue = || {
        let (memory, available, serviced) = (fds.next()?, fds.next()?, fds.next()?);
        Some(SessionQueue { bytes: QUEUE_BYTE_COUNT as u32, memory, available, serviced })
    };
    let queues = vec![queue().context("a queue")?, queue().context("another queue")?];
    let number = 1;
    driver.session_opened(NewSession { number, generation: 1, queues, ledger: None })?;
    let (sender, mapped) = mpsc::channel();
    let memory_type = block_api::memory_type(0, DEPTH * BLOCK);
    driver.copy_client_memory(number, memory_type, move |answer| drop(sender.send(answer)));
    mapped.recv()??;
    socket.send(b"ready", &[])?;
    // The client says no more.
    let _ = socket.receive(&mut [0; 16], 0);
    Ok(())
}

fn system_calls_per_read(side: Side, effort: Effort) -> Result<Vec<f64>> {
    let program = this_program("--other-end", SYSTEM_CALLS, side, effort)?;
    let calls = system_calls::count(program, "read")?;
    Ok(vec![calls as f64 / counted_calls(effort) as f64])
}

fn counted_calls(effort: Effort) -> u64 {
    effort.of(500_000, 3200)
}

/// One call each, of memory.
fn read_by_calls(count: u64) -> Result<()> {
    let file = SharedMemory::create(c"disk", (BLOCKS * BLOCK) as usize)?;
    let mut data = vec![0; BLOCK as usize];
    for number in 0..count {
        let at = block_of(number) * BLOCK;
        ensure!(pread(file.as_fd(), &mut data, at.try_into()?)? == data.len(), "a short read");
    }
    Ok(())
}

/// The process that is counted, or the driver's.
pub fn other_end(case: &str, side: Side, effort: Effort) -> Result<()> {
    match (case, side) {
        (CLIENT, _) => serve(),
        (INSTRUCTIONS, Side::Ours) => run_counted(&mut core()?, effort),
        (INSTRUCTIONS, _) => run_counted(&mut ByHand::new()?, effort),
        (SYSTEM_CALLS, side) => {
            system_calls::wait_to_be_counted()?;
            let count = counted_calls(effort);
            match side {
                Side::Ours => {
                    let mut client = Client::start(effort)?;
                    client.run(count)?;
                    client.close()
                }
                Side::Peer(_) => read_by_calls(count),
            }
        }
        _ => bail!("no other end of {case}"),
    }
}
