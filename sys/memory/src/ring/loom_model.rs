//! Every interleaving, and every reordering that the memory model allows, of two ends that sleep.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p iohost_memory --release loom`. The code under test
//! is [`Producer`] and [`Consumer`] themselves; the ring's memory and the bells are loom's. A lost
//! wakeup shows as a deadlock, an index published too early as a payload that is not there.
//!
//! Each test named `without_…` leaves out one step and expects to be caught, so that we know that
//! the model can see what it is there to see.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use loom::sync::{Condvar, Mutex};
use loom::thread;

use super::cells::Cells;
use super::{Consumer, HangUp, Notify, Producer, QueueError, Ring, Step, Wait, Wake};

const ENDLESS: Duration = Duration::MAX;

/// An eventfd, as far as the ring can tell: holds at most one notification.
#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Notify for Bell {
    fn notify(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_one();
    }
}

impl Wait for Bell {
    fn wait(&self, _deadline: Option<Instant>) -> io::Result<Wake> {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.changed.wait(rung).unwrap();
        }
        *rung = false;
        Ok(Wake::Rung)
    }
}

/// What a thread does with its end, given the bell that rings for it.
type Produce = fn(Producer<Arc<Bell>>, &Bell, u32);
type Consume = fn(Consumer<Arc<Bell>>, &Bell, u32);

/// Lets `count` entries of 4 bytes pass through a ring of `capacity` bytes, in every possible way.
fn explore(left_out: Option<Step>, capacity: u32, count: u32, produce: Produce, consume: Consume) {
    // Bounded to keep the run short. Every mutant below is found within this bound.
    explore_within(3, left_out, capacity, count, produce, consume);
}

/// As [`explore`], with at most `bound` preemptions.
fn explore_within(
    bound: usize,
    left_out: Option<Step>,
    capacity: u32,
    count: u32,
    produce: Produce,
    consume: Consume,
) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(bound);
    builder.check(move || {
        let hang_up = HangUp::default();
        let ring = Ring { cells: Cells::new(capacity), capacity, hang_up, left_out };
        let (available, serviced) = (Arc::new(Bell::default()), Arc::new(Bell::default()));
        let producer = Producer::new(ring.clone(), available.clone()).unwrap();
        let consumer = Consumer::new(ring, serviced.clone()).unwrap();

        let producing = thread::spawn(move || produce(producer, &serviced, count));
        consume(consumer, &available, count);
        producing.join().unwrap();
    });
}

/// Enqueues, and sleeps when refused.
fn one_by_one(mut producer: Producer<Arc<Bell>>, serviced: &Bell, count: u32) {
    for value in 1..=count {
        while let Err(err) = producer.enqueue(&value.to_ne_bytes()) {
            assert_eq!(err, QueueError::Overrun { size: 4 });
            producer.wait_for_room(4, serviced, ENDLESS).unwrap();
        }
    }
}

/// Enqueues all with one notification at the end, or when refused.
fn in_a_batch(mut producer: Producer<Arc<Bell>>, serviced: &Bell, count: u32) {
    let mut send = false;
    for value in 1..=count {
        let fill = |slot: &mut super::Slot<'_>| slot.write_at(0, &value.to_ne_bytes()).unwrap();
        while producer.enqueue_with_coalesce(4, &mut send, fill).is_err() {
            producer.send_data_available();
            send = false;
            producer.wait_for_room(4, serviced, ENDLESS).unwrap();
        }
    }
    if send {
        producer.send_data_available();
    }
}

/// As a handler that is called again only by a notification: drains, then sleeps on the bell alone.
fn by_handler(mut producer: Producer<Arc<Bell>>, serviced: &Bell, count: u32) {
    for value in 1..=count {
        while producer.enqueue(&value.to_ne_bytes()).is_err() {
            serviced.wait(None).unwrap();
        }
    }
}

/// Sleeps before every entry; what `wait` does is all that keeps it from sleeping for ever.
fn wait_for_each(mut consumer: Consumer<Arc<Bell>>, available: &Bell, count: u32) {
    for value in 1..=count {
        consumer.wait(available, ENDLESS).unwrap();
        let taken = consumer.dequeue_with(|entry| entry.to_vec()).unwrap();
        assert_eq!(taken, value.to_ne_bytes(), "payload of entry {value}");
    }
}

/// As a handler that is called again only by a notification: drains, then sleeps on the bell alone.
fn drain_by_handler(mut consumer: Consumer<Arc<Bell>>, available: &Bell, count: u32) {
    let mut value = 0;
    while value < count {
        available.wait(None).unwrap();
        while let Ok(taken) = consumer.dequeue_with(|entry| entry.to_vec()) {
            value += 1;
            assert_eq!(taken, value.to_ne_bytes(), "payload of entry {value}");
        }
    }
}

/// As an engine that says while its handler runs, and calls it again if it is told that a
/// notification was left out. The handler drains.
fn handle(mut consumer: Consumer<Arc<Bell>>, available: &Bell, count: u32) {
    let handling = consumer.handling();
    let mut value = 0;
    let mut is_owed = false;
    while value < count {
        if !is_owed {
            available.wait(None).unwrap();
        }
        handling.begin();
        while let Ok(taken) = consumer.dequeue_with(|entry| entry.to_vec()) {
            value += 1;
            assert_eq!(taken, value.to_ne_bytes(), "payload of entry {value}");
        }
        is_owed = handling.end();
    }
}

/// The same for a producer: the handler fills the ring.
fn fill_by_handler(mut producer: Producer<Arc<Bell>>, serviced: &Bell, count: u32) {
    let handling = producer.handling();
    let mut value = 1;
    loop {
        handling.begin();
        while value <= count && producer.enqueue(&value.to_ne_bytes()).is_ok() {
            value += 1;
        }
        let is_owed = handling.end();
        if value > count {
            return;
        }
        if !is_owed {
            serviced.wait(None).unwrap();
        }
    }
}

#[test]
fn loom_every_entry_reaches_a_handler_that_says_when_it_runs() {
    explore(None, 64, 3, by_handler, handle);
}

#[test]
fn loom_a_full_ring_keeps_two_handlers_going_that_say_when_they_run() {
    explore_within(2, None, 16, 3, fill_by_handler, handle);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_saying_that_a_notification_was_left_out_a_handler_is_not_called() {
    explore(Some(Step::SayLeftOut), 64, 3, by_handler, handle);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_saying_that_a_notification_was_left_out_a_producers_handler_is_not_called() {
    explore_within(2, Some(Step::SayLeftOut), 16, 3, fill_by_handler, drain_by_handler);
}

#[test]
fn loom_every_entry_wakes_a_consumer_that_sleeps() {
    explore(None, 64, 3, one_by_one, wait_for_each);
}

#[test]
fn loom_every_entry_reaches_a_handler_that_is_only_notified() {
    explore(None, 64, 3, by_handler, drain_by_handler);
}

#[test]
fn loom_a_batch_reaches_a_handler_that_is_only_notified() {
    explore(None, 64, 3, in_a_batch, drain_by_handler);
}

#[test]
fn loom_a_full_ring_wakes_both_ends_in_turn() {
    // Both ends wait, which takes many steps; the mutants of this are found with two as well.
    explore_within(2, None, 16, 3, one_by_one, wait_for_each);
}

#[test]
fn loom_a_full_ring_keeps_two_handlers_going() {
    explore(None, 16, 4, by_handler, drain_by_handler);
}

#[test]
fn loom_a_batch_larger_than_the_ring_goes_through() {
    explore(None, 16, 3, in_a_batch, drain_by_handler);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_the_producers_fence_a_wakeup_is_lost() {
    explore(Some(Step::FenceAfterTail), 64, 3, one_by_one, wait_for_each);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_the_producers_second_look_a_wakeup_is_lost() {
    explore(Some(Step::LookAfterTail), 64, 3, one_by_one, wait_for_each);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_the_consumers_fence_a_wakeup_is_lost() {
    explore(Some(Step::FenceAfterHead), 64, 3, one_by_one, wait_for_each);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_the_consumers_look_before_sleeping_a_wakeup_is_lost() {
    explore(Some(Step::LookBeforeSleep), 64, 3, one_by_one, wait_for_each);
}

#[test]
#[should_panic(expected = "payload of entry")]
fn loom_without_release_ordering_a_payload_is_read_too_early() {
    explore(Some(Step::ReleaseTail), 64, 2, one_by_one, wait_for_each);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_waking_the_consumer_a_refused_producer_sleeps_for_ever() {
    explore_within(2, Some(Step::WakeWhenRefused), 16, 3, one_by_one, wait_for_each);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_an_answer_on_empty_a_refused_producer_sleeps_for_ever() {
    explore(Some(Step::AnswerWhenEmpty), 16, 4, by_handler, drain_by_handler);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_clearing_before_the_answer_a_request_is_lost() {
    explore(Some(Step::ClearBeforeAnswer), 16, 4, by_handler, drain_by_handler);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_publishing_the_head_a_wakeup_is_lost() {
    explore(Some(Step::PublishHead), 64, 2, by_handler, drain_by_handler);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_the_fence_before_looking_whether_the_consumer_is_awake_a_wakeup_is_lost() {
    explore(Some(Step::FenceBeforeConsumerAwake), 64, 2, one_by_one, wait_for_each);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_saying_that_it_sleeps_a_consumer_is_not_woken() {
    explore(Some(Step::ConsumerSaysItSleeps), 64, 2, one_by_one, wait_for_each);
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_without_saying_that_it_sleeps_a_producer_is_not_woken() {
    explore_within(2, Some(Step::ProducerSaysItSleeps), 16, 3, one_by_one, wait_for_each);
}
