//! What an end tells the other one of its handler, for as long as that runs.

#[cfg(not(loom))]
use std::sync::atomic::{
    AtomicU8,
    Ordering::{AcqRel, Relaxed},
};

#[cfg(loom)]
use loom::sync::atomic::{
    AtomicU8,
    Ordering::{AcqRel, Relaxed},
};

use super::cells::Cells;
use super::{Consumer, Notify, Producer, Ring, Step};

/// The flags `consumerAwake` and `producerAwake`. Any other value reads as this one.
pub(super) const ASLEEP: u8 = 0;
/// The end is in a wait, or will look again before it sleeps there.
pub(super) const AWAKE: u8 = 1;
/// The end's handler runs.
const HANDLES: u8 = 2;
/// The same, and a notification was left out since it began.
const LEFT_OUT: u8 = 3;

/// For whoever calls the handler of an end: spares the other end the sending of notifications that
/// come while it runs, and which would only lead to one more call.
///
/// Between [`begin`](Self::begin) and [`end`](Self::end) the other end leaves word in the ring
/// instead of sending. `end` says whether it did: then the handler is to be called once more, so
/// that it sees exactly what it would have seen of the notification.
///
/// On one thread at a time, and not beside a wait of the same end on another one.
#[derive(Debug, Clone)]
pub struct Handling {
    ring: Ring,
    flag: fn(&Cells) -> &AtomicU8,
}

impl<N: Notify> Consumer<N> {
    /// For the calls of a handler of DataAvailable.
    pub fn handling(&self) -> Handling {
        Handling { ring: self.ring().clone(), flag: Cells::consumer_awake }
    }
}

impl<N: Notify> Producer<N> {
    /// For the calls of a handler of DataServiced.
    pub fn handling(&self) -> Handling {
        Handling { ring: self.ring().clone(), flag: Cells::producer_awake }
    }
}

impl Handling {
    /// The handler is about to be called.
    pub fn begin(&self) {
        (self.flag)(&self.ring.cells).store(HANDLES, Relaxed);
    }

    /// The handler has returned. Whether a notification was left out meanwhile.
    #[must_use = "true: the handler is owed one more call"]
    pub fn end(&self) -> bool {
        // [handling] pairs with `Ring::must_send`: of two exchanges one comes second.
        let flag = (self.flag)(&self.ring.cells).swap(ASLEEP, AcqRel);
        // AWAKE: the handler has waited, which leaves open whether something is left to look at.
        flag != HANDLES && flag != ASLEEP
    }
}

impl Ring {
    /// Whether a notification that is due has to be sent, by the other end's flag. If not, that end
    /// looks again by itself, or is told at the end of its handler.
    pub(super) fn must_send(&self, flag: &AtomicU8) -> bool {
        match flag.load(Relaxed) {
            AWAKE => false,
            // [handling] An exchange, because the flag may have been taken back since it was read.
            seen @ (HANDLES | LEFT_OUT) if self.takes(Step::SayLeftOut) => {
                flag.compare_exchange(seen, LEFT_OUT, AcqRel, Relaxed).is_err()
            }
            HANDLES | LEFT_OUT => false,
            _ => true,
        }
    }
}
