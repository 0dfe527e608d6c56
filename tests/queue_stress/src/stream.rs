//! Two processes that send each other numbered entries, each direction full speed, in handlers.
//!
//! Each process has an engine with two sources, as a driver has. DataServiced puts entries in until
//! there is no room; DataAvailable takes entries out until there is none, and checks each one. No
//! one looks at a queue without having been notified, but for the very first entries. A notification
//! that is lost therefore stops the stream for ever, and the watchdog says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use iohost_dispatch::{DescriptorSource, Engine, Queue, QueueOptions};
use iohost_memory::ring::{Consumer, Producer, QueueError};

use crate::peer::{self, Ends};
use crate::{PROGRESS, StreamOptions, watch_for_hangs};

/// What went through one process.
#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
    serviced_calls: AtomicU64,
    available_calls: AtomicU64,
}

/// One half of a process's work is done, or went wrong.
type Outcome = Result<(), String>;

pub fn run(options: &StreamOptions) -> Result<(), String> {
    let arguments = ["peer", "--entries", "", "--queue-bytes", ""].map(str::to_owned);
    let mut arguments = arguments;
    arguments[2] = options.entries.to_string();
    arguments[4] = options.queue_bytes.to_string();
    let (mut child, ends) =
        peer::start(&arguments, options.queue_bytes).map_err(|err| err.to_string())?;
    let started = Instant::now();
    let worked = work(ends, options.entries);
    if worked.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|err| err.to_string())?;
    let counts = worked?;
    if !status.success() {
        return Err(format!("the other process: {status}"));
    }
    let elapsed = started.elapsed();
    println!(
        "stream: {} entries out and {} in, in order, in {elapsed:.1?}: {:.1} million per second; \
         {} DataServiced and {} DataAvailable handled in one of the two processes",
        counts.sent.load(Relaxed),
        counts.received.load(Relaxed),
        2.0 * options.entries as f64 / elapsed.as_secs_f64() / 1e6,
        counts.serviced_calls.load(Relaxed),
        counts.available_calls.load(Relaxed),
    );
    Ok(())
}

pub fn run_peer(options: &StreamOptions) -> Result<(), String> {
    let ends = peer::accept(options.queue_bytes).map_err(|err| err.to_string())?;
    work(ends, options.entries).map(drop)
}

fn work(ends: Ends, entries: u64) -> Result<Arc<Counts>, String> {
    let counts = Arc::new(Counts::default());
    let seen = counts.clone();
    watch_for_hangs(move || {
        let (sent, received) = (seen.sent.load(Relaxed), seen.received.load(Relaxed));
        format!("{sent} of {entries} sent, {received} received; a notification was lost")
    });
    let engine = Engine::with_workers(2).map_err(|err| err.to_string())?;
    let queue = |name| Queue::create(&engine, name, QueueOptions::default());
    let (sending, receiving) = (
        queue("send").map_err(|err| err.to_string())?,
        queue("receive").map_err(|err| err.to_string())?,
    );
    let (done, outcomes) = channel();

    let Ends { producer, serviced, consumer, available } = ends;
    let receive = receiver(consumer, entries, counts.clone(), done.clone());
    let receiving = DescriptorSource::create(&receiving, available, receive);
    let send = sender(producer, entries, counts.clone(), done);
    let sending = DescriptorSource::create(&sending, serviced, send);
    let (_receiving, sending) =
        (receiving.map_err(|err| err.to_string())?, sending.map_err(|err| err.to_string())?);
    sending.nudge();
    for _ in 0..2 {
        outcomes.recv().map_err(|_| "a handler is gone".to_owned())??;
    }
    Ok(counts)
}

/// The handler of DataServiced.
fn sender(
    mut producer: Producer,
    entries: u64,
    counts: Arc<Counts>,
    done: Sender<Outcome>,
) -> impl FnMut() {
    let (mut number, mut is_done, mut data) = (0, false, Vec::new());
    move || {
        counts.serviced_calls.fetch_add(1, Relaxed);
        let outcome = loop {
            if number == entries {
                break Ok(());
            }
            entry(number, &mut data);
            match producer.enqueue(&data) {
                Ok(()) => {
                    number += 1;
                    counts.sent.store(number, Relaxed);
                    PROGRESS.fetch_add(1, Relaxed);
                }
                Err(QueueError::Overrun { .. }) => return,
                Err(err) => break Err(format!("sending entry {number}: {err}")),
            }
        };
        if !is_done {
            is_done = true;
            let _ = done.send(outcome);
        }
    }
}

/// The handler of DataAvailable.
fn receiver(
    mut consumer: Consumer,
    entries: u64,
    counts: Arc<Counts>,
    done: Sender<Outcome>,
) -> impl FnMut() {
    let (mut number, mut is_done) = (0, false);
    let (mut data, mut expected) = (Vec::new(), Vec::new());
    move || {
        counts.available_calls.fetch_add(1, Relaxed);
        let outcome = loop {
            match consumer.dequeue(&mut data) {
                Ok(()) => {
                    entry(number, &mut expected);
                    if number == entries || data != expected {
                        break Err(format!("entry {number} of {entries} is {data:?}"));
                    }
                    number += 1;
                    counts.received.store(number, Relaxed);
                    PROGRESS.fetch_add(1, Relaxed);
                }
                Err(QueueError::Underrun) if number == entries => break Ok(()),
                Err(QueueError::Underrun) => return,
                Err(err) => break Err(format!("receiving entry {number}: {err}")),
            }
        };
        if !is_done {
            is_done = true;
            let _ = done.send(outcome);
        }
    }
}

/// Entry number `number`: 8 to 71 bytes that name it.
fn entry(number: u64, data: &mut Vec<u8>) {
    data.clear();
    data.extend(number.to_ne_bytes());
    data.resize(8 + (number * 7 % 64) as usize, number as u8);
}
