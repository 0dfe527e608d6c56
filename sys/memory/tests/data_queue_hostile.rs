//! A peer that writes anything anywhere at any time. Whatever it does, an operation of ours ends,
//! stays inside the memory (an inaccessible page stands behind it), and answers with an entry or an
//! error.
#![cfg(not(loom))]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use iohost_memory::SharedMemory;
use iohost_memory::ring::{
    Bell, Consumer, Corruption, MEMORY_HEADER_SIZE, Producer, QueueError, Ring,
};

/// Header and ring fill one page, so that the guard page begins where the ring ends.
const QUEUE_BYTE_COUNT: u32 = 4096 - MEMORY_HEADER_SIZE as u32;
/// Change it to try another attack; a failure names it.
const SEED: u64 = 0x10_05_7a_11;

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A word that is likely to matter: mostly a plausible index or size, sometimes anything.
    fn word(&mut self) -> u32 {
        let plausible = self.below(u64::from(QUEUE_BYTE_COUNT) + 8) as u32;
        match self.below(8) {
            0 => self.next() as u32,
            1 => u32::MAX - self.below(16) as u32,
            2 => plausible,
            3 => QUEUE_BYTE_COUNT - 4 * self.below(4) as u32,
            4 => 4 * self.below(16) as u32,
            _ => plausible & !3,
        }
    }
}

/// One write of the attacker: an index, the flag, a size somewhere, or any byte.
fn attack(memory: &SharedMemory, random: &mut Random) {
    let word = random.word().to_ne_bytes();
    match random.below(10) {
        0 | 1 => memory.write_at(0, &word),
        2 | 3 => memory.write_at(4, &word),
        4 => memory.write_at(8, &word[..3]),
        // An index that is kept entry by entry, or one that is not, or nonsense.
        8 => memory.write_at(64, &(random.word() & !3 | 1).to_ne_bytes()),
        9 => memory.write_at(64, &[0, 0, 0, 0, word[0]]),
        5 | 6 => {
            let at = random.below(u64::from(QUEUE_BYTE_COUNT) / 4) as usize * 4;
            memory.write_at(MEMORY_HEADER_SIZE + at, &word);
        }
        _ => memory.write_at(random.below(memory.len() as u64) as usize, &word[..1]),
    }
}

/// The attacker's mapping of a queue's memory.
fn second_mapping(ring: &Ring) -> SharedMemory {
    let descriptor = ring.memory().as_fd().try_clone_to_owned().unwrap();
    SharedMemory::attach(descriptor, ring.memory().len()).unwrap()
}

/// What the two ends met, to show that the attack did not just end everything at once.
#[derive(Debug, Default)]
struct Met {
    entries: u64,
    corrupt: u64,
}

/// One operation of either end. An end that is over is taken anew, as by a new session.
fn operate(
    ring: &Ring,
    producer: &mut Option<Producer<Option<Bell>>>,
    consumer: &mut Option<Consumer<Option<Bell>>>,
    random: &mut Random,
    met: &mut Met,
) {
    let size = random.below(300) as usize;
    let result = match (random.below(8), producer.as_mut(), consumer.as_mut()) {
        (0 | 1, Some(producer), _) => producer.enqueue(&[0x5A; 300][..size]),
        (2, Some(producer), _) => producer.enqueue_with(size, |slot| {
            slot.write_at(0, &[1; 300][..slot.size()]).unwrap();
        }),
        (3, Some(producer), _) => producer.can_enqueue_many(size, 3),
        (4, _, Some(consumer)) => consumer.peek(|entry| {
            assert!(entry.to_vec().len() <= QUEUE_BYTE_COUNT as usize);
        }),
        (_, _, Some(consumer)) => consumer
            .dequeue_with(|entry| {
                let mut data = Vec::new();
                entry.copy_to(&mut data);
                assert_eq!(data.len(), entry.size());
                assert!(data.len() <= QUEUE_BYTE_COUNT as usize - 4);
                entry.read_at(entry.size(), &mut [0]).unwrap_err();
            })
            .map(|()| met.entries += 1),
        _ => Ok(()),
    };
    if let Err(QueueError::Corrupt(_)) = result {
        met.corrupt += 1;
    }
    // Taking an end over shared indices that are out of range fails too, until the attacker
    // happens to write better ones.
    if random.below(16) == 0 {
        *producer = Producer::new(ring.clone(), None).ok();
        *consumer = Consumer::new(ring.clone(), None).ok();
    }
}

#[test]
fn two_million_operations_between_random_writes_neither_panic_nor_leave_the_memory() {
    println!("seed {SEED:#x}");
    let ring = Ring::create(c"hostile", QUEUE_BYTE_COUNT.into()).unwrap();
    let attacker = second_mapping(&ring);
    let mut random = Random(SEED);
    let (mut producer, mut consumer) = (None, None);
    let mut met = Met::default();
    for _ in 0..2_000_000 {
        if random.below(4) == 0 {
            attack(&attacker, &mut random);
        }
        operate(&ring, &mut producer, &mut consumer, &mut random, &mut met);
    }
    assert!(met.entries > 10_000 && met.corrupt > 10_000, "a worthwhile attack: {met:?}");
}

#[test]
fn a_million_operations_while_another_thread_writes_neither_panic_nor_leave_the_memory() {
    println!("seed {SEED:#x}");
    let ring = Ring::create(c"hostile", QUEUE_BYTE_COUNT.into()).unwrap();
    let attacker = second_mapping(&ring);
    let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let attacking = {
        let (stop, writes) = (stop.clone(), writes.clone());
        thread::spawn(move || {
            let mut random = Random(SEED);
            while !stop.load(Ordering::Relaxed) {
                attack(&attacker, &mut random);
                writes.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    while writes.load(Ordering::Relaxed) == 0 {
        thread::yield_now();
    }
    let mut random = Random(!SEED);
    let (mut producer, mut consumer) = (None, None);
    let mut met = Met::default();
    let mut operations = 0;
    while operations < 1_000_000 || met.entries + met.corrupt == 0 {
        if producer.is_none() && consumer.is_none() {
            // Only the attacker can write indices that an end can be taken over with.
            thread::yield_now();
        }
        operate(&ring, &mut producer, &mut consumer, &mut random, &mut met);
        operations += 1;
    }
    stop.store(true, Ordering::Relaxed);
    attacking.join().unwrap();
}

#[test]
fn a_consumer_drains_at_most_one_ring_per_look_at_the_tail() {
    println!("seed {SEED:#x}");
    let ring = Ring::create(c"hostile", QUEUE_BYTE_COUNT.into()).unwrap();
    let attacker = second_mapping(&ring);
    let mut random = Random(SEED);
    for _ in 0..2_000 {
        for at in (0..QUEUE_BYTE_COUNT as usize).step_by(4) {
            let size = random.below(12) as u32;
            attacker.write_at(MEMORY_HEADER_SIZE + at, &size.to_ne_bytes());
        }
        for index in [0, 4] {
            let value = random.below(u64::from(QUEUE_BYTE_COUNT) / 4 + 1) as u32 * 4;
            attacker.write_at(index, &value.to_ne_bytes());
        }
        let mut consumer = Consumer::new(ring.clone(), None::<Bell>).unwrap();
        let mut entries = 0;
        while consumer.dequeue_with(|_| ()).is_ok() {
            entries += 1;
        }
        assert!(entries <= QUEUE_BYTE_COUNT / 4, "{entries} entries in one ring");
    }
}

#[test]
fn a_batch_that_meets_a_second_fault_reports_the_first_one_as_all_later_operations_do() {
    let ring = Ring::create(c"hostile", 64).unwrap();
    let attacker = second_mapping(&ring);
    let mut producer = Producer::new(ring, None::<Bell>).unwrap();
    (0..4).for_each(|_| producer.enqueue(&[1; 8]).unwrap());
    let batch = producer.enqueue_batch(|batch| {
        batch.enqueue(&[1; 8]).unwrap();
        attacker.write_at(0, &1_u32.to_ne_bytes());
        let first = batch.enqueue(&[1; 8]).unwrap_err();
        attacker.write_at(0, &2_u32.to_ne_bytes());
        first
    });
    let reported = batch.unwrap_err();
    let QueueError::Corrupt(Corruption::Index { value, .. }) = reported else {
        panic!("{reported:?}")
    };
    assert_eq!(value, 1);
    assert_eq!(producer.enqueue(&[1; 8]), Err(reported));
}
