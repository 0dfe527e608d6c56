//! The words and bytes of a ring, as loom sees them. Made by the tests of `loom_model` alone.
//!
//! Each word is one of loom's atomics, payload included. Payload is copied with relaxed accesses, so
//! that an index published without its ordering shows as a payload of yesterday.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

/// The stand-in for a ring's memory in a loom model.
#[derive(Debug, Clone)]
pub(super) struct Cells(Arc<Words>);

#[derive(Debug)]
struct Words {
    head: AtomicU32,
    tail: AtomicU32,
    read_to: AtomicU32,
    need_serviced: AtomicU8,
    room_wanted: AtomicU8,
    consumer_awake: AtomicU8,
    producer_awake: AtomicU8,
    ring: Vec<AtomicU32>,
}

impl Cells {
    #[cfg(test)]
    pub(super) fn new(capacity: u32) -> Self {
        Self(Arc::new(Words {
            head: AtomicU32::new(0),
            tail: AtomicU32::new(0),
            read_to: AtomicU32::new(0),
            need_serviced: AtomicU8::new(0),
            room_wanted: AtomicU8::new(0),
            consumer_awake: AtomicU8::new(0),
            producer_awake: AtomicU8::new(0),
            ring: (0..capacity / 4).map(|_| AtomicU32::new(0)).collect(),
        }))
    }

    pub(super) fn head(&self) -> &AtomicU32 {
        &self.0.head
    }

    pub(super) fn tail(&self) -> &AtomicU32 {
        &self.0.tail
    }

    pub(super) fn read_to(&self) -> &AtomicU32 {
        &self.0.read_to
    }

    pub(super) fn need_serviced(&self) -> &AtomicU8 {
        &self.0.need_serviced
    }

    pub(super) fn room_wanted(&self) -> &AtomicU8 {
        &self.0.room_wanted
    }

    pub(super) fn consumer_awake(&self) -> &AtomicU8 {
        &self.0.consumer_awake
    }

    pub(super) fn producer_awake(&self) -> &AtomicU8 {
        &self.0.producer_awake
    }

    pub(super) fn will_write(&self, _at: u32, _count: u32) {}

    pub(super) fn will_read(&self, _at: u32, _count: u32) {}

    pub(super) fn will_read_all(&self, _at: u32, _count: u32) {}

    pub(super) fn size_at(&self, at: u32) -> &AtomicU32 {
        &self.0.ring[at as usize / 4]
    }

    /// Whole words only.
    pub(super) fn write(&self, at: u32, data: &[u8]) {
        for (word, bytes) in self.0.ring[at as usize / 4..].iter().zip(data.chunks_exact(4)) {
            word.store(u32::from_ne_bytes(bytes.try_into().expect("four bytes")), Relaxed);
        }
    }

    /// Whole words only.
    pub(super) fn read(&self, at: u32, data: &mut [u8]) {
        for (word, bytes) in self.0.ring[at as usize / 4..].iter().zip(data.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
        }
    }
}
