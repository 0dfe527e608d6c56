//! The data queue: entries of any length, from one producer to one consumer, in memory that both
//! can write, and two notifications.
//!
//! This is the ring of DriverKit's `IODataQueueDispatchSource`, bit for bit (xnu,
//! `IODataQueueDispatchSourceShared.h`), with the checks that a peer we do not trust makes
//! necessary. [`Producer`] and [`Consumer`] are its two ends; either may be ours, and the other may
//! be any program that has the memory. [`Bell`] carries a notification between processes,
//! [`Doorway`] lets a thread without a dispatch engine sleep until one comes.
//!
//! ```
//! use iohost_memory::ring::{Bell, Consumer, Producer, Ring};
//!
//! let ring = Ring::create(c"example", 4096)?;
//! let (data_available, data_serviced) = (Bell::new()?, Bell::new()?);
//! let mut producer = Producer::new(ring.clone(), data_available.try_clone()?)?;
//! let mut consumer = Consumer::new(ring, data_serviced)?;
//!
//! producer.enqueue(b"hello")?; // rings `data_available`
//! let mut entry = Vec::new();
//! consumer.dequeue(&mut entry)?;
//! assert_eq!(entry, b"hello");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Memory
//!
//! | Offset | Size | Field | Written by |
//! | --- | --- | --- | --- |
//! | 0 | u32 | head: offset of the next entry to read, as of the last time that none was left | consumer |
//! | 4 | u32 | tail: offset where the next entry goes | producer |
//! | 8 | u8 | needServicedCallback | producer sets, consumer clears |
//! | 9 | u8 | consumerAwake: 1, it looks again by itself; 2, its handler runs; 3, and a DataAvailable was left out | consumer, 3 producer |
//! | 10 | u8 | producerAwake: the same, of the producer and DataServiced | producer, 3 consumer |
//! | 11 | 53 | zero | nobody |
//! | 64 | u32 | readTo: offset of the next entry to read, and 1; or 0 | consumer |
//! | 68 | u8 | roomWanted: needServicedCallback once more | producer sets, consumer clears |
//! | 69 | 59 | zero | nobody |
//! | 128 | queue byte count | the entries | producer |
//!
//! `layout` (private) has the arithmetic. The queue byte count travels beside the memory, never in
//! it, and a memory of another length is refused.
//!
//! DriverKit's own fields are the first three; the rest it leaves zero, and a peer that does so too
//! is served all the same. They are there for speed: a processor takes memory from another one in
//! lines of 64 bytes. The producer writes the first line with each entry, so the consumer touches
//! it only when it has read all that it knows of, and keeps count of each entry in the second line,
//! which the producer touches only when it runs out of room. So `head` may lag behind; a producer
//! that knows no `readTo` gets its room later, but in time: `head` is exact whenever nothing is
//! left to read.
//!
//! # Notifications
//!
//! DataAvailable goes to the consumer, DataServiced to the producer. They carry nothing, may be
//! spurious, and several may arrive as one; none is ever lost. In return the consumer owes: after a
//! DataAvailable, dequeue until [`QueueError::Underrun`]. And the producer: after a DataServiced,
//! try again.
//!
//! ```text
//!  consumer:  DRAINING ──1──▶ IDLE          producer:  FILLING ──4──▶ REFUSED
//!                 ▲            │ │                         ▲             │
//!                 └─────2──────┘ │                         └──────5──────┘
//!                 └─────3────────┘
//! ```
//!
//! 1. `Consumer::dequeue…`: nothing left. It has published its head, fenced, and then looked at
//!    the tail once more.
//! 2. `Producer::enqueue…`: has published its tail, fenced, and then seen that the head had reached
//!    the old tail: DataAvailable. Of two fences one comes second (`[bell]`), so either 1 sees the
//!    new tail or 2 sees the head.
//! 3. `Producer::enqueue…`, refused: DataAvailable though nothing was added. The consumer may have
//!    gone idle before it could see that the producer waits.
//! 4. The same refusal: sets needServicedCallback before it sends (`[full]`).
//! 5. `Consumer::dequeue…`, on an entry or on an empty ring, sees needServicedCallback: clears
//!    it, then sends DataServiced. In this order, or it would erase a request that nobody answers.
//!
//! An operation with `_coalesce` in its name does not send but sets the caller's `send`, and never
//! clears it. The caller starts a batch with `false` and sends once at its end if it became `true`,
//! also if the batch ended with an error.
//!
//! What is due is not sent while the other end is awake: it is inside [`Consumer::wait`] or
//! [`Producer::wait_for_room`], or was there and has not been told `Underrun` or `Overrun` since, so
//! that it has to look again before it may sleep. It takes the flag back before it does: the
//! consumer with the fence of 1 behind it (`[awake]`), the producer with the request of 4, which
//! the consumer must have seen to answer it (`[sleep]`).
//!
//! Nor is it sent while the other end's handler runs, if whoever calls that says so by a
//! [`Handling`]. Then word is left in the flag, and found when the flag is taken back, both by an
//! atomic exchange (`[handling]`): the handler is called once more. That is what the notification
//! would have led to, so a handler gets all the calls that the rules say and no other ones.
//!
//! Each end keeps what it last saw of the other's index and looks again only where the answer
//! could change something. Handlers cannot tell: an older head never changes where an entry goes,
//! a consumer reports an empty ring only after a look, and a producer leaves out the look of 2 only
//! if it is certain to send anyway.
//!
//! # An end that dies
//!
//! The next owner of an end carries on from the indices: [`Producer::new`] and [`Consumer::new`] also
//! take back what the flag of the dead one promised. What it owed and had not sent is not known, so
//! whoever hands the end on rings the other end's bell once. An entry that was taken but not dealt
//! with is lost with its taker; [`Producer::exchange`] takes it when its result is there, not before.
//!
//! # A hostile peer
//!
//! The other end may write any byte at any time. What we hold against it:
//!
//! - Our own index is private. The shared one is written, never read (but once, at the start, to
//!   carry on where a previous owner stopped).
//! - The peer's index is read once per look; it must be a multiple of four, in the ring, and ahead
//!   of where it was.
//! - A size is read once; its entry must lie in the ring and end at or before the tail.
//! - Anything else is [`QueueError::Corrupt`], then and for ever: nothing that follows could be
//!   trusted. No operation loops, so none can be kept busy.
//! - Payload can still change while it is read in place. [`Entry`] copies out of it and lends
//!   nothing, so what was copied stays what it is; whoever copies the same byte twice may see two
//!   values. [`Consumer::dequeue`] copies once, before anyone looks.
//! - It can ask for DataServiced as often as it likes, which costs one notification per dequeue
//!   of ours; an eventfd holds at most one that is outstanding.

mod bell;
#[cfg(not(loom))]
mod cells;
#[cfg(loom)]
#[path = "ring/modelled_cells.rs"]
mod cells;
mod consumer;
mod handling;
mod layout;
#[cfg(not(loom))]
mod ledger;
#[cfg(all(test, loom))]
mod loom_model;
#[cfg(not(loom))]
mod making;
mod producer;
mod spin;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
#[cfg(not(loom))]
use std::sync::atomic::{Ordering, fence};

#[cfg(loom)]
use loom::sync::atomic::{Ordering, fence};

pub use bell::{Bell, Doorway, Notify, Peer, Wait, WaitError, Wake};
use cells::Cells;
pub use consumer::{Consumer, Entry};
pub use handling::Handling;
pub use layout::{
    ALIGNMENT, CONSUMER_AWAKE_OFFSET, ENTRY_HEADER_SIZE, HEAD_OFFSET, KEPT, MAX_QUEUE_BYTE_COUNT,
    MEMORY_HEADER_SIZE, NEED_SERVICED_OFFSET, PRODUCER_AWAKE_OFFSET, READ_TO_OFFSET,
    ROOM_WANTED_OFFSET, TAIL_OFFSET, footprint,
};
#[cfg(not(loom))]
pub use ledger::Ledger;
#[cfg(not(loom))]
pub use making::RingError;
pub use producer::{Batch, Producer, Slot};

/// The memory of one data queue and its agreed size. Clones share the memory.
#[derive(Debug, Clone)]
pub struct Ring {
    cells: Cells,
    capacity: u32,
    hang_up: HangUp,
    /// What the loom model leaves out to see that it is missed.
    #[cfg(loom)]
    left_out: Option<Step>,
}

/// Whether the process at the other end is known to be gone. Clones are the same fact.
#[derive(Debug, Clone, Default)]
pub struct HangUp(Arc<AtomicBool>);

impl HangUp {
    /// It is gone: ends that know of this say [`QueueError::Offline`] where they would have said
    /// `Overrun` or `Underrun`, and for ever from then on. What it published before is still read.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Why an operation on a queue did nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// No room now. The consumer has been asked for a DataServiced where the operation says so.
    #[error("no room for an entry of {size} bytes")]
    Overrun {
        /// Bytes of payload.
        size: usize,
    },
    /// Nothing to read now.
    #[error("queue is empty")]
    Underrun,
    /// No waiting will help: such an entry never fits.
    #[error("entry of {size} bytes can never fit a queue of {queue_byte_count} bytes")]
    MessageTooLarge {
        /// Bytes of payload.
        size: usize,
        /// Bytes of ring.
        queue_byte_count: u32,
    },
    /// The peer broke the rules of the ring. Every later operation of this end says the same.
    #[error("queue is corrupt")]
    Corrupt(#[from] Corruption),
    /// The peer is gone. Every later operation of this end says the same.
    #[error("peer of the queue is gone")]
    Offline,
}

/// What a peer wrote that no producer or consumer of ours would.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Corruption {
    /// An index that points nowhere.
    #[error("{index} {value} is not a multiple of {ALIGNMENT} up to {queue_byte_count}")]
    Index {
        /// Whose index.
        index: Index,
        /// What it says.
        value: u32,
        /// The largest it may be.
        queue_byte_count: u32,
    },
    /// A head that went back, or past what was produced.
    #[error("head moved from {from} to {to}, which is not on its way to tail {tail}")]
    HeadAstray {
        /// The head when last seen.
        from: u32,
        /// What it says now.
        to: u32,
        /// Our tail.
        tail: u32,
    },
    /// An entry that does not lie between head and tail.
    #[error(
        "entry at {at} claims {size} bytes, which do not fit between head {head} and tail {tail}"
    )]
    Entry {
        /// Offset of its size field.
        at: u32,
        /// What the size field says.
        size: u32,
        /// Our head.
        head: u32,
        /// The producer's tail.
        tail: u32,
    },
}

/// One of the two indices of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Index {
    /// The consumer's.
    Head,
    /// The producer's.
    Tail,
}

impl std::fmt::Display for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Head => "head",
            Self::Tail => "tail",
        })
    }
}

/// A range that is not inside the payload it was meant for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {offset} are not inside a payload of {size} bytes")]
pub struct OutsidePayload {
    /// First byte meant.
    pub offset: usize,
    /// Bytes meant.
    pub len: usize,
    /// Bytes of payload there are.
    pub size: usize,
}

impl Ring {
    /// The same ring, whose ends in this process end with `hang_up`.
    pub fn until(self, hang_up: HangUp) -> Self {
        Self { hang_up, ..self }
    }

    /// Bytes for entries, as both sides agreed.
    pub fn queue_byte_count(&self) -> u32 {
        self.capacity
    }

    /// Footprint of an entry, unless it is larger than the ring.
    #[inline]
    fn footprint(&self, size: usize) -> Result<(u32, u32), QueueError> {
        let too_large = QueueError::MessageTooLarge { size, queue_byte_count: self.capacity };
        let size = u32::try_from(size).map_err(|_| too_large)?;
        let footprint = footprint(size).filter(|&footprint| footprint <= self.capacity);
        Ok((size, footprint.ok_or(too_large)?))
    }

    /// Judges an index that was just read from shared memory.
    #[inline]
    fn check_index(&self, index: Index, value: u32) -> Result<u32, Corruption> {
        if value > self.capacity || !value.is_multiple_of(ALIGNMENT) {
            return Err(Corruption::Index { index, value, queue_byte_count: self.capacity });
        }
        Ok(value)
    }

    /// The fence between publishing one's own index and looking at the other's.
    #[inline]
    fn fence_before_look(&self, step: Step) {
        if self.takes(step) {
            fence(Ordering::SeqCst);
        }
    }

    #[inline(always)]
    #[cfg(not(loom))]
    const fn takes(&self, _step: Step) -> bool {
        true
    }

    #[cfg(loom)]
    fn takes(&self, step: Step) -> bool {
        self.left_out != Some(step)
    }
}

/// The steps on which it hangs that no wakeup and no byte is lost. All are always taken, but for
/// the mutants of the loom model, each of which leaves one out and must fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Producer: fence between publishing the tail and looking at the head.
    FenceAfterTail,
    /// Producer: look at the head again after publishing.
    LookAfterTail,
    /// Producer: publish with release ordering.
    ReleaseTail,
    /// Producer, refused: wake the consumer.
    WakeWhenRefused,
    /// Consumer: fence between publishing the head, or that it sleeps, and looking at the tail.
    FenceAfterHead,
    /// Consumer: look at the tail again before sleeping.
    LookBeforeSleep,
    /// Producer: fence between publishing and looking whether the consumer is awake.
    FenceBeforeConsumerAwake,
    /// Consumer: take back that it is awake before sleeping.
    ConsumerSaysItSleeps,
    /// Producer: take back that it is awake before sleeping.
    ProducerSaysItSleeps,
    /// Either: tell an end whose handler runs that a notification was left out.
    SayLeftOut,
    /// Consumer: publish the head when everything that is known of was read.
    PublishHead,
    /// Consumer, on an empty ring: answer a producer that was refused.
    AnswerWhenEmpty,
    /// Consumer: clear the producer's request before answering it, not after.
    ClearBeforeAnswer,
}

/// Whether an end still works.
#[derive(Debug, Clone, Copy)]
enum Life {
    Working,
    Over(QueueError),
}

impl Life {
    #[inline]
    fn check(&self) -> Result<(), QueueError> {
        match *self {
            Self::Working => Ok(()),
            Self::Over(err) => Err(err),
        }
    }

    /// Ends it, unless it has ended: the first reason stays, and is what everybody is told.
    #[cold]
    fn end(&mut self, err: QueueError) -> QueueError {
        match *self {
            Self::Working => {
                *self = Self::Over(err);
                err
            }
            Self::Over(first) => first,
        }
    }
}
