//! What is done to a queue, as bytes: four per step, so that changing some bytes changes some steps.

use iohost_memory::ring::{
    CONSUMER_AWAKE_OFFSET, HEAD_OFFSET, KEPT, MEMORY_HEADER_SIZE, NEED_SERVICED_OFFSET,
    PRODUCER_AWAKE_OFFSET, READ_TO_OFFSET, ROOM_WANTED_OFFSET, TAIL_OFFSET,
};

/// One step: what is done, and three bytes of how.
pub type Step = [u8; 4];

/// Steps of a program at the most; a short one is easier to understand.
const LONGEST: usize = 256;

/// The sizes of ring that a program can choose. Header and ring of the first fill a page, so that
/// the inaccessible page begins where the ring ends; in the small ones indices meet more often.
pub const CAPACITIES: [u32; 3] = [4096 - MEMORY_HEADER_SIZE as u32, 64, 260];

/// A sequence of steps on one size of ring.
#[derive(Clone, Debug)]
pub struct Program {
    bytes: Vec<u8>,
}

impl Program {
    /// Takes any bytes.
    pub fn from_bytes(mut bytes: Vec<u8>) -> Self {
        bytes.truncate(4 * (LONGEST + 1));
        Self { bytes }
    }

    pub fn random(random: &mut fastrand::Rng) -> Self {
        let len = 4 * random.usize(2..=LONGEST + 1);
        Self { bytes: (0..len).map(|_| random.u8(..)).collect() }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Which of [`CAPACITIES`] it runs on.
    pub fn capacity(&self) -> usize {
        self.bytes.first().map_or(0, |byte| *byte as usize % CAPACITIES.len())
    }

    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        self.bytes.as_chunks().0.iter().skip(1).copied()
    }

    /// A program like this one, with a part of `other`.
    pub fn mutated(&self, other: &Self, random: &mut fastrand::Rng) -> Self {
        let mut bytes = self.bytes.clone();
        for _ in 0..random.usize(1..=8) {
            if bytes.len() < 8 {
                return Self::random(random);
            }
            let at = random.usize(..bytes.len() / 4) * 4;
            match random.u8(..6) {
                0 => bytes[at + random.usize(..4)] = random.u8(..),
                1 => bytes[at + random.usize(..4)] ^= 1 << random.u8(..8),
                2 => drop(bytes.drain(at..at + 4)),
                3 => drop(bytes.splice(at..at, [0; 4].map(|_: u8| random.u8(..)))),
                4 => {
                    let end = random.usize(at / 4..bytes.len() / 4) * 4;
                    let again = bytes[at..end].to_vec();
                    bytes.splice(end..end, again);
                }
                _ => {
                    let start = random.usize(..=other.bytes.len() / 4) * 4;
                    let end = random.usize(start / 4..=other.bytes.len() / 4) * 4;
                    bytes.splice(at..at, other.bytes[start..end].iter().copied());
                }
            }
        }
        Self::from_bytes(bytes)
    }
}

/// Some bytes that the attacker writes.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub offset: usize,
    bytes: [u8; 8],
    len: usize,
}

impl Write {
    /// How many kinds of write there are.
    pub const KINDS: u8 = 12;

    /// `kind` is one of [`KINDS`](Self::KINDS); `head` is where the attacker believes the consumer.
    pub fn new(kind: u8, [a, b, c]: [u8; 3], capacity: u32, head: u32) -> Self {
        let value = u32::from(u16::from_ne_bytes([b, c]));
        let word = word(a, value, capacity);
        let memory = MEMORY_HEADER_SIZE + capacity as usize;
        let index = |offset, word: u32| Self::of(offset, &word.to_ne_bytes());
        let entry = |at: u32| MEMORY_HEADER_SIZE + (at.min(capacity - 4) & !3) as usize;
        match kind {
            0 => index(HEAD_OFFSET, word),
            1 => index(TAIL_OFFSET, word),
            2 => index(READ_TO_OFFSET, word & !3 | KEPT),
            3 => index(READ_TO_OFFSET, word),
            4 => Self::of(NEED_SERVICED_OFFSET, &[b & 1]),
            5 => Self::of([CONSUMER_AWAKE_OFFSET, PRODUCER_AWAKE_OFFSET][a as usize % 2], &[b]),
            6 => Self::of(ROOM_WANTED_OFFSET, &[b & 1]),
            // Sizes: anywhere, where the consumer reads next, and where it goes when it wraps.
            7 => index(entry(u32::from(a) * capacity / 256), word),
            8 => index(entry(head), word),
            9 => index(entry(0), word),
            10 => {
                let tail = word & !3;
                let both = [(value % (capacity + 4)) & !3, tail].map(u32::to_ne_bytes);
                Self::of(HEAD_OFFSET, both.as_flattened())
            }
            _ => Self::of(value as usize % memory, &[a]),
        }
    }

    fn of(offset: usize, data: &[u8]) -> Self {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        Self { offset, bytes, len: data.len() }
    }

    pub fn data(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// A word that is likely to matter: mostly a plausible index or size, sometimes anything.
fn word(choice: u8, value: u32, capacity: u32) -> u32 {
    let plausible = value % (capacity + 8);
    match choice >> 5 {
        0 => u32::MAX - value % 16,
        1 => value << 16 | value ^ u32::from(choice),
        2 => plausible,
        3 => capacity - 4 * (value % 4),
        4 => 4 * (value % 16),
        _ => plausible & !3,
    }
}
