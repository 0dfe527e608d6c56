//! The ring against an independent model of its rules, step by random step.
//!
//! The model knows entries as a list with their places; it has no memory, no markers and no cached
//! index. After every step the status, the notifications and the published bytes must agree.
#![cfg(not(loom))]

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use iohost_memory::ring::{Consumer, Notify, Producer, QueueError, Ring};
use proptest::prelude::*;

/// What a program does with a queue. The last two are a restart of the process that has the end.
#[derive(Debug, Clone)]
enum Step {
    Enqueue(usize),
    EnqueueCoalesced(usize),
    EnqueueBatch(Vec<usize>),
    Dequeue,
    DequeueCoalesced,
    DequeueBatch(usize),
    Peek,
    CanEnqueue(usize, u32),
    SendAvailable,
    SendServiced,
    NewProducer,
    NewConsumer,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..=200_usize).prop_map(Step::Enqueue),
        6 => (0..=40_usize).prop_map(Step::Enqueue),
        3 => (0..=60_usize).prop_map(Step::EnqueueCoalesced),
        2 => prop::collection::vec(0..=60_usize, 0..6).prop_map(Step::EnqueueBatch),
        2 => (1..6_usize).prop_map(Step::DequeueBatch),
        9 => Just(Step::Dequeue),
        3 => Just(Step::DequeueCoalesced),
        2 => Just(Step::Peek),
        3 => (0..=60_usize, 0..=6_u32).prop_map(|(size, count)| Step::CanEnqueue(size, count)),
        1 => Just(Step::SendAvailable),
        1 => Just(Step::SendServiced),
        1 => Just(Step::NewProducer),
        1 => Just(Step::NewConsumer),
    ]
}

/// The rules, in 64 bits and without a ring.
struct Model {
    capacity: u64,
    head: u64,
    tail: u64,
    need_serviced: bool,
    /// Where each unread entry ends, and what is in it.
    entries: VecDeque<(u64, Vec<u8>)>,
}

impl Model {
    fn footprint(size: usize) -> u64 {
        4 + (size as u64).div_ceil(4) * 4
    }

    /// Status, and whether DataAvailable is due.
    fn enqueue(&mut self, data: Vec<u8>) -> (Result<(), QueueError>, bool) {
        let size = data.len();
        let taken = Self::footprint(size);
        if taken > self.capacity {
            let queue_byte_count = self.capacity as u32;
            return (Err(QueueError::MessageTooLarge { size, queue_byte_count }), false);
        }
        let was_empty = self.head == self.tail;
        let next = if self.tail >= self.head {
            if self.tail + taken <= self.capacity {
                Some(self.tail + taken)
            } else if self.head > taken {
                Some(taken)
            } else {
                None
            }
        } else if self.head - self.tail > taken {
            Some(self.tail + taken)
        } else {
            None
        };
        let Some(next) = next else {
            self.need_serviced = true;
            return (Err(QueueError::Overrun { size }), true);
        };
        self.tail = next;
        self.entries.push_back((next, data));
        (Ok(()), was_empty)
    }

    /// Status, and whether DataServiced is due.
    fn dequeue(&mut self) -> (Result<Vec<u8>, QueueError>, bool) {
        let status = match self.entries.pop_front() {
            Some((end, data)) => {
                self.head = end;
                Ok(data)
            }
            None => Err(QueueError::Underrun),
        };
        (status, self.need_serviced)
    }

    fn can_enqueue(&self, size: usize, count: u32) -> Result<(), QueueError> {
        let taken = Self::footprint(size);
        let count = u64::from(count);
        if taken > self.capacity {
            let queue_byte_count = self.capacity as u32;
            return Err(QueueError::MessageTooLarge { size, queue_byte_count });
        }
        let no = if self.tail >= self.head {
            let end = (self.capacity - self.tail) / taken;
            end < count && end + self.head / taken <= count
        } else {
            (self.head - self.tail - 1) / taken < count
        };
        if no { Err(QueueError::Overrun { size }) } else { Ok(()) }
    }
}

#[derive(Debug, Clone, Default)]
struct Counter(Rc<Cell<u32>>);

impl Notify for Counter {
    fn notify(&self) {
        self.0.set(self.0.get() + 1);
    }
}

fn agree(queue_byte_count: u32, steps: &[Step]) {
    let ring = Ring::create(c"test", queue_byte_count.into()).unwrap();
    let memory = ring.memory().clone();
    let (available, serviced) = (Counter::default(), Counter::default());
    let mut producer = Producer::new(ring.clone(), available.clone()).unwrap();
    let mut consumer = Consumer::new(ring.clone(), serviced.clone()).unwrap();
    let mut model = Model {
        capacity: queue_byte_count.into(),
        head: 0,
        tail: 0,
        need_serviced: false,
        entries: VecDeque::new(),
    };

    for (number, step) in steps.iter().enumerate() {
        let data = |size| (0..size).map(|at| (number * 7 + at) as u8).collect::<Vec<_>>();
        let (mut due_available, mut due_serviced) = (0, 0);
        match *step {
            Step::EnqueueBatch(ref sizes) => {
                let was_empty = model.entries.is_empty();
                let expected: Vec<_> =
                    sizes.iter().map(|&size| model.enqueue(data(size)).0).collect();
                let is = |wanted: fn(&Result<(), QueueError>) -> bool| expected.iter().any(wanted);
                let is_refused = is(|status| matches!(status, Err(QueueError::Overrun { .. })));
                due_available = (is_refused || was_empty && is(Result::is_ok)).into();
                let done = producer.enqueue_batch(|batch| {
                    sizes.iter().map(|&size| batch.enqueue(&data(size))).collect::<Vec<_>>()
                });
                assert_eq!(done, Ok(expected), "{number}: {step:?}");
            }
            Step::DequeueBatch(most) => {
                let mut expected = Vec::new();
                let taken = most.min(model.entries.len());
                for (end, data) in model.entries.drain(..taken) {
                    model.head = end;
                    expected.push(data);
                }
                due_serviced = model.need_serviced.into();
                model.need_serviced = false;
                let mut entries = Vec::new();
                let done = consumer.dequeue_batch(most, |entry| entries.push(entry.to_vec()));
                let count = expected.len();
                let status = if count == 0 { Err(QueueError::Underrun) } else { Ok(count) };
                assert_eq!((done, entries), (status, expected), "{number}: {step:?}");
            }
            Step::Enqueue(size) => {
                let (status, due) = model.enqueue(data(size));
                due_available = due.into();
                assert_eq!(producer.enqueue(&data(size)), status, "{number}: {step:?}");
            }
            Step::EnqueueCoalesced(size) => {
                let (status, due) = model.enqueue(data(size));
                let mut send = false;
                let data = data(size);
                let done = producer.enqueue_with_coalesce(size, &mut send, |slot| {
                    // In two parts, the second one first.
                    slot.write_at(size / 2, &data[size / 2..]).unwrap();
                    slot.write_at(0, &data[..size / 2]).unwrap();
                });
                assert_eq!((done, send), (status, due), "{number}: {step:?}");
            }
            Step::Dequeue => {
                let (status, due) = model.dequeue();
                due_serviced = due.into();
                model.need_serviced = false;
                let mut entry = vec![0xAA; 3];
                let done = consumer.dequeue(&mut entry).map(|()| entry);
                assert_eq!(done, status, "{number}: {step:?}");
            }
            Step::DequeueCoalesced => {
                let (status, due) = model.dequeue();
                let mut send = false;
                let done = consumer.dequeue_with_coalesce(&mut send, |entry| entry.to_vec());
                assert_eq!((done, send), (status, due), "{number}: {step:?}");
            }
            Step::Peek => {
                let next = model.entries.front().map(|(_, data)| data.clone());
                let seen = consumer.peek(|entry| entry.to_vec());
                assert_eq!(seen, next.ok_or(QueueError::Underrun), "{number}: {step:?}");
            }
            Step::CanEnqueue(size, count) => {
                let status = model.can_enqueue(size, count);
                let said = producer.can_enqueue_many(size, count);
                assert_eq!(said, status, "{number}: {step:?}");
            }
            Step::SendAvailable => {
                producer.send_data_available();
                due_available = 1;
            }
            Step::SendServiced => {
                consumer.send_data_serviced();
                model.need_serviced = false;
                due_serviced = 1;
            }
            Step::NewProducer => producer = Producer::new(ring.clone(), available.clone()).unwrap(),
            Step::NewConsumer => consumer = Consumer::new(ring.clone(), serviced.clone()).unwrap(),
        }

        let sent = (available.0.take(), serviced.0.take());
        assert_eq!(sent, (due_available, due_serviced), "notifications of {number}: {step:?}");
        assert_eq!(consumer.is_data_available(), !model.entries.is_empty());
        let word = |at| {
            let mut word = [0; 4];
            memory.read_at(at, &mut word);
            u32::from_ne_bytes(word)
        };
        let published = (word(64) - 1, word(4), word(8), word(68));
        let flag = u32::from_ne_bytes([model.need_serviced.into(), 0, 0, 0]);
        let expected = (model.head as u32, model.tail as u32, flag, flag);
        assert_eq!(published, expected, "memory after {number}: {step:?}");
        if model.entries.is_empty() {
            assert_eq!(word(0), model.head as u32, "head after {number}: {step:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_ring_and_an_independent_model_agree_on_everything(
        words in 4..=128_u32,
        steps in prop::collection::vec(step(), 0..800),
    ) {
        agree(words * 4, &steps);
    }
}

#[test]
fn the_ring_and_an_independent_model_agree_on_realistic_sizes() {
    // Coprime strides, so that every alignment of index and end comes up; no randomness needed.
    let steps: Vec<_> = (0..100_000_usize)
        .map(|at| match at % 5 {
            0 | 2 => Step::Enqueue(at * 37 % 1500),
            4 if at % 3 == 0 => Step::Enqueue(at * 11 % 9000),
            _ => Step::Dequeue,
        })
        .collect();
    agree(16 * 1024, &steps);
}
