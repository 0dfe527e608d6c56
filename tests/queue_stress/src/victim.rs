//! The two ends of a queue, and what they promise whatever is written under them.

use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use iohost_memory::SharedMemory;
use iohost_memory::ring::{
    Consumer, Corruption, Entry, HEAD_OFFSET, KEPT, Notify, Producer, QueueError, READ_TO_OFFSET,
    Ring, TAIL_OFFSET, Wait, WaitError, Wake,
};

use crate::program::{Step, Write};

/// Kinds of step; what is more in a byte starts over.
const KINDS: u8 = 36;

/// Both ends of one ring, and the attacker's own mapping of it.
pub struct Victim {
    ring: Ring,
    enemy: Enemy,
    producer: Option<Producer<Quiet>>,
    consumer: Option<Consumer<Quiet>>,
    /// What each end said when it ended; it has to say the same for ever.
    over: [Option<QueueError>; 2],
    /// Where the consumer is and the tail it has seen, as far as that is certain: it never goes
    /// past that tail. Never certain while another thread writes.
    way: Option<(u32, u32)>,
    /// Nobody else writes.
    is_alone: bool,
    entry: Vec<u8>,
}

/// How a step ended, as a small number; what is new in a run shows which programs are worth keeping.
pub type Outcome = u8;

/// The attacker, as the ends meet it.
struct Enemy {
    memory: SharedMemory,
    capacity: u32,
    /// What it writes in the middle of the next callback or sleep.
    ambush: Cell<Option<Write>>,
    /// What it does to the next ones that sleep.
    wakes: Cell<u8>,
}

/// Notifications that go nowhere; it is the peer's own loss.
struct Quiet;

impl Notify for Quiet {
    fn notify(&self) {}
}

impl Enemy {
    fn write(&self, write: &Write) {
        self.memory.write_at(write.offset, write.data());
    }

    fn pounce(&self) {
        if let Some(write) = self.ambush.take() {
            self.write(&write);
        }
    }

    /// Where the shared memory says that the consumer is; anything.
    fn head(&self) -> u32 {
        self.word(HEAD_OFFSET)
    }

    fn word(&self, offset: usize) -> u32 {
        let mut word = [0; 4];
        self.memory.read_at(offset, &mut word);
        u32::from_ne_bytes(word)
    }
}

/// A sleep under attack: woken a few times for nothing, then at the end of its time, or by a death.
impl Wait for Enemy {
    fn wait(&self, deadline: Option<Instant>) -> io::Result<Wake> {
        assert!(deadline.is_some(), "a sleep without an end");
        self.pounce();
        let wakes = self.wakes.get();
        if wakes == 1 {
            return Ok(Wake::HungUp);
        }
        self.wakes.set(wakes.saturating_sub(8));
        Ok(if wakes >= 8 { Wake::Rung } else { Wake::TimedOut })
    }
}

impl Victim {
    pub fn new(capacity: u32) -> Result<Self, Box<dyn std::error::Error>> {
        let ring = Ring::create(c"attacked", capacity.into())?;
        let file = ring.memory().as_fd().try_clone_to_owned()?;
        let memory = SharedMemory::attach(file, ring.memory().len())?;
        let (ambush, wakes) = (Cell::new(None), Cell::new(0));
        let enemy = Enemy { memory, capacity, ambush, wakes };
        let over = [None; 2];
        Ok(Self {
            ring,
            enemy,
            producer: None,
            consumer: None,
            over,
            way: None,
            is_alone: true,
            entry: Vec::new(),
        })
    }

    /// The attacker's mapping once more, for a thread of its own.
    pub fn second_mapping(&self) -> Result<SharedMemory, Box<dyn std::error::Error>> {
        let file = self.ring.memory().as_fd().try_clone_to_owned()?;
        Ok(SharedMemory::attach(file, self.ring.memory().len())?)
    }

    /// An empty ring with two new ends, that nobody writes into but in the steps, or somebody does.
    pub fn reset(&mut self, is_alone: bool) {
        self.is_alone = is_alone;
        self.enemy.memory.write_at(0, &vec![0; self.ring.memory().len()]);
        self.enemy.ambush.set(None);
        self.enemy.wakes.set(0);
        self.take_producer();
        self.take_consumer();
    }

    /// Does one step, of the attacker or of an end, and checks what the end promises. Panics when
    /// it breaks its word. The kind and the outcome.
    pub fn step(&mut self, [what, how @ ..]: Step) -> (u8, Outcome) {
        let kind = what % KINDS;
        if kind < Write::KINDS {
            self.enemy.write(&Write::new(kind, how, self.enemy.capacity, self.enemy.head()));
            return (kind, 0);
        }
        (kind, self.operate(kind, how))
    }

    /// Does a step that is no write of the attacker's.
    pub fn operate(&mut self, kind: u8, how: [u8; 3]) -> Outcome {
        let [a, b, c] = how;
        let capacity = self.enemy.capacity;
        let value = u16::from_ne_bytes([b, c]);
        let size = usize::from(value) % (capacity as usize + 8);
        let small = size % 24;
        match kind {
            12..=14 => {
                let write = Write::new(a % Write::KINDS, [c, b, a], capacity, self.enemy.head());
                self.enemy.ambush.set(Some(write));
                0
            }
            15 => {
                self.enemy.wakes.set(b);
                0
            }
            16 | 17 => self.produce(|producer, _| producer.enqueue(&[0x5a; 8192][..small])),
            18 => self.produce(|producer, _| producer.enqueue(&[0xa5; 8192][..size])),
            19 | 20 => self.produce(|producer, enemy| {
                producer.enqueue_with(small, |slot| {
                    enemy.pounce();
                    assert_eq!(slot.size(), small);
                    slot.write_at(0, &[1; 24][..small]).expect("inside");
                    slot.write_at(small, &[1]).expect_err("outside");
                })
            }),
            21 => self.produce(|producer, enemy| {
                producer.enqueue_batch(|batch| {
                    for at in 0..a % 8 {
                        let _ = batch.enqueue(&[a; 24][..small]);
                        if at == 2 {
                            enemy.pounce();
                        }
                    }
                })
            }),
            22 => self.produce(|producer, _| {
                let mut send = false;
                producer.enqueue_with_coalesce(small, &mut send, |_| ())
            }),
            23 => self.produce(|producer, _| producer.can_enqueue_many(small, a.into())),
            24 => self.produce(|producer, enemy| {
                sleepless(producer.wait_for_room(size, enemy, Duration::ZERO))
            }),
            25 | 26 => {
                let mut entry = std::mem::take(&mut self.entry);
                let outcome = self.consume_one(true, |consumer, _| consumer.dequeue(&mut entry));
                assert!(entry.len() <= capacity as usize - 4, "an entry longer than the ring");
                self.entry = entry;
                outcome
            }
            27 | 28 => self.consume_one(true, |consumer, enemy| {
                consumer.dequeue_with(|entry| {
                    enemy.pounce();
                    check(entry, capacity);
                })
            }),
            29 => {
                self.way = None;
                self.consume(|consumer, enemy| {
                    let most = 1 + usize::from(a % 16);
                    let mut count = 0;
                    let batch = consumer.dequeue_batch(most, |entry| {
                        count += 1;
                        if count == 2 {
                            enemy.pounce();
                        }
                        check(entry, capacity);
                    });
                    if let Ok(told) = batch {
                        assert!(
                            told == count && (1..=most).contains(&told),
                            "{told} of {most}, {count} shown"
                        );
                    }
                    batch.map(drop)
                })
            }
            30 => {
                self.consume_one(false, |consumer, _| consumer.peek(|entry| check(entry, capacity)))
            }
            31 => {
                self.way = None;
                self.consume(|consumer, enemy| sleepless(consumer.wait(enemy, Duration::ZERO)))
            }
            32 => {
                if let (Some(producer), Some(consumer)) = (&self.producer, &self.consumer) {
                    producer.send_data_available();
                    consumer.send_data_serviced();
                    return 1 + u8::from(consumer.is_data_available());
                }
                0
            }
            33 => self.take_producer(),
            34 => self.take_consumer(),
            _ => {
                self.take_producer();
                self.take_consumer()
            }
        }
    }

    fn take_producer(&mut self) -> Outcome {
        self.over[0] = None;
        let taken = Producer::new(self.ring.clone(), Quiet);
        let outcome = number(&taken);
        self.producer = taken.ok();
        outcome
    }

    fn take_consumer(&mut self) -> Outcome {
        self.over[1] = None;
        let taken = Consumer::new(self.ring.clone(), Quiet);
        let outcome = number(&taken);
        self.consumer = taken.ok();
        self.way = None;
        if self.is_alone && self.consumer.is_some() {
            self.way = Some((self.read_to(), self.enemy.word(TAIL_OFFSET)));
        }
        outcome
    }

    fn produce(
        &mut self,
        operation: impl FnOnce(&mut Producer<Quiet>, &Enemy) -> Result<(), QueueError>,
    ) -> Outcome {
        let Some(producer) = &mut self.producer else { return 0 };
        let result = operation(producer, &self.enemy);
        stays_over(&mut self.over[0], &result);
        number(&result)
    }

    fn consume(
        &mut self,
        operation: impl FnOnce(&mut Consumer<Quiet>, &Enemy) -> Result<(), QueueError>,
    ) -> Outcome {
        let Some(consumer) = &mut self.consumer else { return 0 };
        let result = operation(consumer, &self.enemy);
        stays_over(&mut self.over[1], &result);
        number(&result)
    }

    /// As [`consume`](Self::consume), for what takes or shows one entry: it lies on the way.
    fn consume_one(
        &mut self,
        is_taken: bool,
        operation: impl FnOnce(&mut Consumer<Quiet>, &Enemy) -> Result<(), QueueError>,
    ) -> Outcome {
        let way = self.way.take();
        // Only a consumer that has read all it knows of looks at the tail.
        let look = || self.enemy.word(TAIL_OFFSET);
        let way = way.map(|(head, tail)| (head, if head == tail { look() } else { tail }));
        let outcome = self.consume(operation);
        let (Some((head, tail)), true) = (way, self.consumer.is_some()) else { return outcome };
        let is_empty = outcome == EMPTY;
        if outcome == DONE && is_taken {
            let next = self.read_to();
            let is_on_its_way =
                if head < tail { head < next && next <= tail } else { next > head || next <= tail };
            assert!(is_on_its_way && head != tail, "from {head} to {next}, the tail at {tail}");
            self.way = Some((next, tail));
        } else if outcome == DONE || is_empty {
            assert_eq!(is_empty, head == tail, "head {head}, tail {tail}");
            self.way = Some((head, tail));
        }
        outcome
    }

    /// Where the consumer has just said that it is.
    fn read_to(&self) -> u32 {
        self.enemy.word(READ_TO_OFFSET) - KEPT
    }
}

const DONE: Outcome = 1;
const EMPTY: Outcome = 3;

/// An entry is inside the ring, and so is all that can be had of it.
fn check(entry: &Entry<'_>, capacity: u32) {
    let size = entry.size();
    assert!(size <= capacity as usize - 4, "an entry of {size} bytes in a ring of {capacity}");
    assert_eq!(entry.to_vec().len(), size);
    let mut last = [0; 4];
    entry.read_at(size.saturating_sub(4), &mut last[..size.min(4)]).expect("its own end");
    entry.read_at(size, &mut [0]).expect_err("what is behind it");
}

/// An end that is over says so every time, in the same words.
fn stays_over(over: &mut Option<QueueError>, result: &Result<(), QueueError>) {
    match (*over, result) {
        (Some(reason), result) => {
            assert_eq!(*result, Err(reason), "what an end says after it has ended");
        }
        (None, Err(err @ (QueueError::Corrupt(_) | QueueError::Offline))) => *over = Some(*err),
        (None, _) => {}
    }
}

fn sleepless(waited: Result<(), WaitError>) -> Result<(), QueueError> {
    match waited {
        Ok(()) | Err(WaitError::TimedOut { .. }) => Ok(()),
        Err(WaitError::Queue(err)) => Err(err),
        Err(err) => panic!("sleeping: {err}"),
    }
}

fn number<T>(result: &Result<T, QueueError>) -> Outcome {
    match result {
        Ok(_) => DONE,
        Err(QueueError::Overrun { .. }) => 2,
        Err(QueueError::Underrun) => EMPTY,
        Err(QueueError::MessageTooLarge { .. }) => 4,
        Err(QueueError::Corrupt(Corruption::Index { .. })) => 5,
        Err(QueueError::Corrupt(Corruption::HeadAstray { .. })) => 6,
        Err(QueueError::Corrupt(Corruption::Entry { .. })) => 7,
        Err(QueueError::Offline) => 8,
        Err(_) => 9,
    }
}
