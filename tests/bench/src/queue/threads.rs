//! What data queues are compared with, between two threads, which have the same memory and the same
//! cores as two processes would. Nobody sleeps.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::Ordering::{Acquire, Release};
use std::thread;
use std::time::Instant;

use anyhow::Result;
use bbqueue::nicknames::Churrasco;
use iohost_memory::SharedMemory;

use super::{BATCH, QUEUE_BYTE_COUNT, batched_counts, check, message, stream_counts};
use crate::machine::{Cores, Word};
use crate::rounds::{Effort, Side};

/// What a batch costs at least: the copies, and one word per batch that says how far. Nothing is
/// checked but the messages.
pub fn plain_copy(effort: Effort) -> Result<Vec<f64>> {
    const BATCH_BYTES: u64 = (BATCH * 64) as u64;
    let cores = Cores::choose()?;
    let memory = SharedMemory::create(c"plain-copy", QUEUE_BYTE_COUNT as usize)?;
    let place = |number: u64| (number * 64 % QUEUE_BYTE_COUNT) as usize;
    let (written, read) = (Word::default(), Word::default());
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
                    wait_until(&written, number + BATCH as u64);
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
                    wait_until(&read, oldest);
                    known = read.0.load(Acquire);
                }
                for _ in 0..BATCH {
                    memory.write_at(place(number), &message::<64>(number));
                    number += 1;
                }
                written.0.store(number, Release);
            }
            wait_until(&read, end);
            rate = count as f64 / start.elapsed().as_secs_f64();
        }
        reader.join().expect("the thread does not panic")
    })?;
    Ok(vec![rate])
}

/// A stream of messages of one size, each an entry with its length.
pub fn bbqueue<const SIZE: usize>(effort: Effort) -> Result<Vec<f64>> {
    let cores = Cores::choose()?;
    let queue = Box::new(Churrasco::<{ QUEUE_BYTE_COUNT as usize }>::new());
    let counts = stream_counts::<SIZE>(Side::Ours, effort);
    let streams_read = Word::default();
    let mut rate = 0.0;
    thread::scope(|threads| {
        let reader = threads.spawn(|| {
            let pinned = cores.pin_consumer();
            let consumer = queue.framed_consumer();
            let mut checked = Ok(());
            let mut message = [0; SIZE];
            for count in counts {
                for number in 0..count {
                    let entry = loop {
                        match consumer.read() {
                            Ok(entry) => break entry,
                            Err(_) => spin_loop(),
                        }
                    };
                    message.copy_from_slice(&entry);
                    entry.release();
                    if checked.is_ok() {
                        checked = check::<SIZE>(&message, number);
                    }
                }
                streams_read.0.fetch_add(1, Release);
            }
            pinned.and(checked)
        });
        cores.pin_producer()?;
        let producer = queue.framed_producer();
        for (stream, count) in (1..).zip(counts) {
            let start = Instant::now();
            for number in 0..count {
                let mut entry = loop {
                    match producer.grant(SIZE as u16) {
                        Ok(entry) => break entry,
                        Err(_) => spin_loop(),
                    }
                };
                // Or the compiler makes the message in the queue.
                entry.copy_from_slice(black_box(&message::<SIZE>(number)));
                entry.commit(SIZE as u16);
            }
            wait_until(&streams_read, stream);
            rate = count as f64 / start.elapsed().as_secs_f64();
        }
        reader.join().expect("the thread does not panic")
    })?;
    Ok(vec![rate])
}

fn wait_until(word: &Word, least: u64) {
    while word.0.load(Acquire) < least {
        spin_loop();
    }
}
