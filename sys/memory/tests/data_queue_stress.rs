//! Two threads, each with its own mapping of the queue, that sleep on bells and never poll.
//!
//! A lost wakeup shows as a wait that runs into its watchdog.
#![cfg(not(loom))]

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use iohost_memory::ring::{
    Bell, Consumer, Doorway, Producer, QueueError, Ring, Wait, WaitError, Wake,
};

const WATCHDOG: Duration = Duration::from_secs(60);

/// One end in each of two "processes", which share nothing but descriptors.
fn ends(queue_byte_count: u64) -> (Producer, Doorway, Consumer, Doorway) {
    let ours = Ring::create(c"stress", queue_byte_count).unwrap();
    let descriptor = ours.memory().as_fd().try_clone_to_owned().unwrap();
    let theirs = Ring::attach(descriptor, queue_byte_count).unwrap();
    let (available, serviced) = (Bell::new().unwrap(), Bell::new().unwrap());
    let until_available = Doorway::new(available.try_clone().unwrap(), None).unwrap();
    let until_serviced = Doorway::new(serviced.try_clone().unwrap(), None).unwrap();
    let producer = Producer::new(ours, available).unwrap();
    let consumer = Consumer::new(theirs, serviced).unwrap();
    (producer, until_serviced, consumer, until_available)
}

/// Entry number `number`: between 4 and 67 bytes that name it.
fn entry(number: u32, data: &mut Vec<u8>) {
    data.clear();
    data.extend(number.to_ne_bytes());
    data.resize(4 + number as usize * 7 % 64, number as u8);
}

/// The producer as a handler of DataServiced: tries, and when refused does nothing until called.
fn produce_by_handler(mut producer: Producer, serviced: &Doorway, count: u32) {
    let mut data = Vec::new();
    for number in 0..count {
        entry(number, &mut data);
        while let Err(err) = producer.enqueue(&data) {
            assert_eq!(err, QueueError::Overrun { size: data.len() });
            let deadline = Instant::now() + WATCHDOG;
            assert_eq!(serviced.wait(Some(deadline)).unwrap(), Wake::Rung, "at {number}");
        }
    }
}

/// The consumer as a handler of DataAvailable: drains, then does nothing until called.
fn consume_by_handler(mut consumer: Consumer, available: &Doorway, count: u32) {
    let (mut data, mut expected) = (Vec::new(), Vec::new());
    let mut number = 0;
    while number < count {
        let deadline = Instant::now() + WATCHDOG;
        assert_eq!(available.wait(Some(deadline)).unwrap(), Wake::Rung, "at {number}");
        while consumer.dequeue(&mut data).is_ok() {
            entry(number, &mut expected);
            assert_eq!(data, expected);
            number += 1;
        }
    }
    assert_eq!(consumer.dequeue(&mut data), Err(QueueError::Underrun), "and nothing more");
}

#[test]
fn a_million_entries_pass_between_two_handlers_that_are_only_notified() {
    let (producer, serviced, consumer, available) = ends(4096);
    let producing = thread::spawn(move || produce_by_handler(producer, &serviced, 1_000_000));
    consume_by_handler(consumer, &available, 1_000_000);
    producing.join().unwrap();
}

#[test]
fn entries_pass_between_two_handlers_through_a_ring_that_is_nearly_always_full() {
    let (producer, serviced, consumer, available) = ends(2 * 72);
    let producing = thread::spawn(move || produce_by_handler(producer, &serviced, 100_000));
    consume_by_handler(consumer, &available, 100_000);
    producing.join().unwrap();
}

#[test]
fn entries_pass_between_two_threads_that_wait_for_each_other() {
    const COUNT: u32 = 100_000;
    let (mut producer, serviced, mut consumer, available) = ends(256);
    let producing = thread::spawn(move || {
        let mut data = Vec::new();
        for number in 0..COUNT {
            entry(number, &mut data);
            producer.wait_for_room(data.len(), &serviced, WATCHDOG).unwrap();
            producer.enqueue(&data).unwrap();
        }
    });
    let (mut data, mut expected) = (Vec::new(), Vec::new());
    for number in 0..COUNT {
        consumer.wait(&available, WATCHDOG).unwrap();
        consumer.dequeue(&mut data).unwrap();
        entry(number, &mut expected);
        assert_eq!(data, expected);
    }
    producing.join().unwrap();
    let err = consumer.wait(&available, Duration::ZERO).unwrap_err();
    assert!(matches!(err, WaitError::TimedOut { .. }), "and nothing more");
}
