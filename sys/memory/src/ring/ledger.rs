//! What of a session has to outlive the process that serves it.
//!
//! # The exchange
//!
//! A driver that takes an entry from one queue and puts its result into another one may die in
//! between. [`Producer::exchange`](super::Producer::exchange) makes both one step. The two indices
//! are in two memories and cannot change together, so one of them decides: the exchange has happened
//! once the tail of the result's queue has moved. What the head of the other one has to become then
//! stands in the ledger before:
//!
//! 1. the result is written behind the tail, where nobody looks yet;
//! 2. the link is written: the tail to be, the head to be, in one word;
//! 3. the tail is published;
//! 4. the head is published;
//! 5. the link is erased.
//!
//! Whoever serves the session next calls [`Ledger::recover`]. A link whose tail is the tail there is
//! was left between 3 and 5, so 4 is done, perhaps once more. Any other one was left between 2 and 3
//! and is forgotten. The two cannot be mixed up: no entry moves the tail to where it stood.
//!
//! That a process dies between any two instructions leaves behind what it stored up to there, in the
//! order of the program, since the kernel stops it between two instructions; orderings keep the
//! compiler from another order. So this needs no fences, and an exchange costs two stores more than
//! its parts.
//!
//! # Trust
//!
//! The ledger belongs to the daemon and the driver host; a client never has it. But the indices that
//! a link is compared with are in memory that the client can write, so a link leads a head to a place
//! that it may go to, or nowhere.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::layout::{self, KEPT};
use super::producer::read_to;
use super::{Index, Ring};
use crate::{AttachError, SharedMemory};

/// The ledger of one session, a page of shared memory: which call was begun last, and the exchange
/// that is under way into each queue. Clones share the memory.
///
/// | Offset | Size | Field |
/// | --- | --- | --- |
/// | 0 | u64 | the highest number of a call that was begun |
/// | 64 n + 64 | u64 | into queue n: the link of an exchange; or 0 |
/// | 64 n + 72 | u64 | the number of the queue whose entry it retires |
///
/// A link is the tail in its upper and the head in its lower half.
#[derive(Debug, Clone)]
pub struct Ledger {
    memory: Arc<SharedMemory>,
}

/// A queue's place in a ledger.
#[derive(Debug, Clone)]
pub(super) struct Line {
    ledger: Ledger,
    place: usize,
}

const PAGE: usize = 4096;
const LINE: usize = 64;
const BEGUN: usize = 0;
const RETIRES: usize = 8;

impl Ledger {
    /// The most queues that one has room for.
    pub const MOST_QUEUES: usize = PAGE / LINE - 1;

    /// An empty one. Errors: what the kernel says of making memory.
    pub fn create() -> io::Result<Self> {
        Ok(Self { memory: Arc::new(SharedMemory::create(c"iohost-ledger", PAGE)?) })
    }

    /// One that another process made. Errors: for a descriptor that is no sealed memory file of its
    /// size.
    pub fn attach(memory: OwnedFd) -> Result<Self, AttachError> {
        Ok(Self { memory: Arc::new(SharedMemory::attach(memory, PAGE)?) })
    }

    /// The highest number of a call that was begun; 0 for none.
    pub fn begun(&self) -> u64 {
        self.memory.word_at(BEGUN).load(Acquire)
    }

    /// A call is about to be begun.
    pub fn begin(&self, call: u64) {
        // The driver's queue begins one at a time.
        if call > self.begun() {
            self.memory.word_at(BEGUN).store(call, Release);
        }
    }

    /// Finishes the exchanges that an earlier owner had decided when it died, and forgets the others.
    /// `rings` are the session's, by place; before any end of them is taken.
    ///
    /// What a client has done to its indices meanwhile is not found out here, and leads to no index
    /// that it could not have written itself.
    pub fn recover(&self, rings: &[Ring]) {
        for (place, result) in rings.iter().enumerate().take(Self::MOST_QUEUES) {
            let line = Line { ledger: self.clone(), place };
            let Some((tail, head)) = line.link() else { continue };
            let retires = usize::try_from(line.retires().load(Relaxed)).unwrap_or(usize::MAX);
            if let Some(retired) = rings.get(retires)
                && result.cells.tail().load(Acquire) == tail
            {
                finish(retired, head);
            }
            line.erase();
        }
    }

    /// Whether an exchange was under way when its owner died.
    pub fn has_links(&self) -> bool {
        (0..Self::MOST_QUEUES).any(|place| Line { ledger: self.clone(), place }.link().is_some())
    }

    /// The page, for the next process.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        (*self.memory).as_fd()
    }

    pub(super) fn line(&self, place: usize) -> Option<Line> {
        (place < Self::MOST_QUEUES).then(|| Line { ledger: self.clone(), place })
    }
}

/// Publishes a head that a dead consumer had decided on.
fn finish(ring: &Ring, head: u32) {
    let judged = || {
        let published = ring.check_index(Index::Head, ring.cells.head().load(Acquire))?;
        let from = read_to(ring)?.unwrap_or(published);
        let tail = ring.check_index(Index::Tail, ring.cells.tail().load(Acquire))?;
        let to = ring.check_index(Index::Head, head)?;
        Ok::<bool, super::Corruption>(layout::can_advance(from, to, tail))
    };
    // Else the client has broken its ring, and whoever takes an end of it is told.
    if judged() == Ok(true) {
        ring.cells.read_to().store(head + KEPT, Release);
    }
}

impl Line {
    /// The exchange under way: the tail and the head to be.
    fn link(&self) -> Option<(u32, u32)> {
        // A tail is never 0 behind an entry, so neither is a link.
        let link = self.word(0).load(Acquire);
        (link != 0).then_some(((link >> 32) as u32, link as u32))
    }

    /// Step 2, `retires` being the other queue.
    #[inline]
    pub(super) fn write(&self, tail: u32, head: u32, retires: &Self) {
        self.retires().store(retires.place as u64, Relaxed);
        self.word(0).store(u64::from(tail) << 32 | u64::from(head), Release);
    }

    /// Step 5.
    #[inline]
    pub(super) fn erase(&self) {
        self.word(0).store(0, Release);
    }

    fn retires(&self) -> &std::sync::atomic::AtomicU64 {
        self.word(RETIRES)
    }

    #[inline]
    fn word(&self, offset: usize) -> &std::sync::atomic::AtomicU64 {
        self.ledger.memory.word_at(LINE * (self.place + 1) + offset)
    }

    /// Whether both belong to one session.
    #[inline]
    pub(super) fn is_beside(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.ledger.memory, &other.ledger.memory)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::producer::Stage;
    use super::super::{Consumer, Notify, Producer, QueueError};
    use super::*;

    const STAGES: [Option<Stage>; 6] = [
        None,
        Some(Stage::Written),
        Some(Stage::Linked),
        Some(Stage::Published),
        Some(Stage::Retired),
        Some(Stage::Erased),
    ];

    /// Nobody to tell: what is tried here is what stays in the memory.
    #[derive(Debug)]
    struct Mute;

    impl Notify for Mute {
        fn notify(&self) {}
    }

    /// A client, and a driver that is killed.
    struct Session {
        ledger: Ledger,
        rings: [Ring; 2],
        upload: Producer<Mute>,
        download: Consumer<Mute>,
        sent: u32,
        received: u32,
    }

    impl Session {
        fn new(capacity: u64) -> Self {
            let rings = [(); 2].map(|()| Ring::create(c"test", capacity).unwrap());
            let upload = Producer::new(rings[0].clone(), Mute).unwrap();
            let download = Consumer::new(rings[1].clone(), Mute).unwrap();
            let ledger = Ledger::create().unwrap();
            Self { ledger, rings, upload, download, sent: 0, received: 0 }
        }

        /// The next driver's ends.
        fn driver(&self) -> (Consumer<Mute>, Producer<Mute>) {
            self.ledger.recover(&self.rings);
            assert!(!self.ledger.has_links());
            let upload = Consumer::new(self.rings[0].clone(), Mute).unwrap();
            let download = Producer::new(self.rings[1].clone(), Mute).unwrap();
            (upload.noted_in(&self.ledger, 0), download.noted_in(&self.ledger, 1))
        }

        fn send(&mut self) -> bool {
            // Of changing length, so that they lie everywhere.
            let entry = self.sent.to_ne_bytes().repeat(1 + self.sent as usize % 2);
            let sent = self.upload.enqueue(&entry).is_ok();
            self.sent += u32::from(sent);
            sent
        }

        /// Takes what is there, each exactly as it was sent and in order.
        fn receive(&mut self) {
            let mut entry = Vec::new();
            while self.download.dequeue(&mut entry).is_ok() {
                let expected = self.received.to_ne_bytes().repeat(1 + self.received as usize % 2);
                assert_eq!(entry, expected, "entry {}", self.received);
                self.received += 1;
            }
        }
    }

    /// One driver after the other exchanges one entry, and is killed at a stage or ends.
    fn survives(capacity: u64, deaths: impl IntoIterator<Item = Option<Stage>>, slow: bool) {
        let mut session = Session::new(capacity);
        for death in deaths {
            session.send();
            let (mut upload, mut download) = session.driver();
            let mut entry = Vec::new();
            if upload.peek(|found| found.copy_to(&mut entry)).is_err() {
                session.receive();
                continue;
            }
            let done = download.exchange_until(&mut upload, &entry, |stage| Some(stage) == death);
            assert!(matches!(done, Ok(()) | Err(QueueError::Overrun { .. })), "{done:?}");
            if !slow || done.is_err() {
                session.receive();
            }
        }
        let (mut upload, mut download) = session.driver();
        let mut entry = Vec::new();
        while upload.peek(|found| found.copy_to(&mut entry)).is_ok() {
            session.receive();
            download.exchange(&mut upload, &entry).unwrap();
        }
        session.receive();
        assert_eq!(session.received, session.sent, "none is lost");
    }

    #[test]
    fn an_exchange_killed_behind_any_store_loses_nothing_and_does_nothing_twice() {
        // Four in a row, each killed everywhere, in rings in which they lie everywhere.
        for (capacity, slow) in [(24, false), (32, true), (40, false), (64, true)] {
            for number in 0..6_usize.pow(4) {
                let deaths = (0..4).map(|turn| STAGES[number / 6_usize.pow(turn) % 6]);
                survives(capacity, deaths, slow);
            }
        }
    }

    proptest! {
        #[test]
        fn long_rows_of_deaths_lose_nothing_either(
            capacity in (6..40_u64).prop_map(|words| 4 * words),
            deaths in prop::collection::vec(prop::sample::select(&STAGES[..]), 0..200),
            slow: bool,
        ) {
            survives(capacity, deaths, slow);
        }

        #[test]
        fn a_link_leads_no_head_astray_whatever_the_client_wrote(
            words in prop::collection::vec(any::<u32>(), 4),
            retires in 0..3_u64,
        ) {
            let session = Session::new(64);
            let line = session.ledger.line(1).unwrap();
            line.word(0).store(u64::from(words[0] % 80) << 32 | u64::from(words[1]), Release);
            line.retires().store(retires, Relaxed);
            session.rings[1].cells.tail().store(words[0] % 80, Release);
            session.rings[0].cells.tail().store(words[2] % 80, Release);
            session.rings[0].cells.read_to().store(words[3] % 80, Release);
            let before = Consumer::new(session.rings[0].clone(), Mute).is_ok();
            session.ledger.recover(&session.rings);
            assert!(!session.ledger.has_links());
            // A ring that made sense makes sense.
            let after = Consumer::new(session.rings[0].clone(), Mute);
            assert_eq!(after.is_ok(), before);
        }
    }

    #[test]
    fn calls_are_begun_in_the_ledger_once_and_a_client_that_counts_back_changes_nothing() {
        let ledger = Ledger::create().unwrap();
        ledger.begin(3);
        ledger.begin(2);
        let copy = Ledger::attach(ledger.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(copy.begun(), 3);
        assert!(Ledger::attach(std::fs::File::open("/dev/null").unwrap().into()).is_err());
    }

    #[test]
    fn ends_of_two_sessions_exchange_too() {
        let (one, other) = (Session::new(64), Session::new(64));
        let (mut upload, _) = one.driver();
        let (_, mut download) = other.driver();
        let empty = download.exchange(&mut upload, b"none");
        assert_eq!(empty, Err(QueueError::Underrun));
        let mut one = one;
        assert!(one.send());
        download.exchange(&mut upload, b"some").unwrap();
        assert_eq!(upload.peek(|_| ()), Err(QueueError::Underrun));
        assert!(!one.ledger.has_links() && !other.ledger.has_links());
    }
}
