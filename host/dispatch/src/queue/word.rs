//! What a queue is doing, in one atomic word: a stage, and three flags.
//!
//! ```text
//!            1                 2                3
//!   IDLE ────────▶ SCHEDULED ─────▶ RUNNING ──────▶ IDLE        nothing left
//!    │                 ▲              │  │
//!    │ 4               └──────5───────┘  │ 6
//!    └────────────────▶ RUNNING ◀────────┘
//! ```
//!
//! 1. [`schedule`](Word::schedule): work was announced; the queue joins the engine's ready list.
//! 2. [`start`](Word::start): a worker took it from the list.
//! 3. [`end_if_quiet`](Word::end_if_quiet), [`end`](Word::end): nothing is announced.
//! 4. [`take_if_idle`](Word::take_if_idle): the caller's own thread runs, without a hop, in one
//!    exchange.
//! 5. [`end`](Word::end): something is announced; back to the list, behind the other queues.
//! 6. The running thread met a baton, or found one at its end: a thread in `dispatch_sync` takes
//!    over as the running one. The word does not change.
//!
//! `PENDING`: there is something to run. Set under the inbox's lock by who puts something in, and
//! by the running thread for what it leaves over; cleared under the lock by the running thread
//! when it takes all there is. Whoever sets it on an idle queue schedules it. `CANCELLED`: set
//! once. `SHARED`: concurrent blocks are running.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

const STAGE: u32 = 0b11;
const IDLE: u32 = 0;
const SCHEDULED: u32 = 1;
const RUNNING: u32 = 2;
const PENDING: u32 = 1 << 2;
const CANCELLED: u32 = 1 << 3;
const SHARED: u32 = 1 << 4;

#[derive(Debug, Default)]
pub(super) struct Word(AtomicU32);

impl Word {
    /// Sets `PENDING`. `false` when it was set: whoever did that sees to it. Under the inbox's
    /// lock, so that it is not cleared meanwhile.
    #[inline]
    pub fn announce(&self) -> bool {
        !self.is_pending() && self.0.fetch_or(PENDING, AcqRel) & PENDING == 0
    }

    /// From `IDLE` to `SCHEDULED`. `true`: the caller puts the queue on the ready list.
    pub fn schedule(&self) -> bool {
        let scheduled = |word| (word & STAGE == IDLE).then_some(word | SCHEDULED);
        self.0.fetch_update(AcqRel, Acquire, scheduled).is_ok()
    }

    /// From `IDLE` without any flag to `RUNNING`.
    #[inline]
    pub fn take_if_idle(&self) -> bool {
        self.0.compare_exchange(IDLE, RUNNING, Acquire, Relaxed).is_ok()
    }

    /// `IDLE` without any flag: [`take_if_idle`](Self::take_if_idle) is worth trying.
    pub fn is_idle(&self) -> bool {
        self.0.load(Relaxed) == IDLE
    }

    /// From `SCHEDULED` to `RUNNING`.
    pub fn start(&self) {
        self.0.fetch_xor(SCHEDULED ^ RUNNING, AcqRel);
    }

    /// From `RUNNING` to `IDLE`, if there is no flag at all.
    #[inline]
    pub fn end_if_quiet(&self) -> bool {
        self.0.compare_exchange(RUNNING, IDLE, AcqRel, Relaxed).is_ok()
    }

    /// From `RUNNING` to `IDLE`, or to `SCHEDULED` when something is pending. `true`: the caller
    /// puts the queue on the ready list.
    pub fn end(&self) -> bool {
        let next = |word: u32| (word & !STAGE) | if word & PENDING == 0 { IDLE } else { SCHEDULED };
        let before = self.0.fetch_update(AcqRel, Acquire, |word| Some(next(word)));
        before.is_ok_and(|word| word & PENDING != 0)
    }

    /// From `SCHEDULED` to `IDLE` with nothing pending, for a queue whose engine is gone.
    pub fn abandon(&self) {
        self.0.fetch_and(!(PENDING | STAGE), AcqRel);
    }

    /// Nothing is pending, and the queue is not cancelled.
    #[inline]
    pub fn is_quiet(&self) -> bool {
        self.0.load(Relaxed) & (PENDING | CANCELLED) == 0
    }

    #[inline]
    pub fn is_pending(&self) -> bool {
        self.0.load(Relaxed) & PENDING != 0
    }

    /// The running thread leaves something over.
    pub fn set_pending(&self) {
        self.0.fetch_or(PENDING, AcqRel);
    }

    /// The running thread takes all there is. Under the inbox's lock.
    pub fn clear_pending(&self) {
        self.0.fetch_and(!PENDING, AcqRel);
    }

    #[inline]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Relaxed) & CANCELLED != 0
    }

    /// Cancelled from now on, and pending. Under the inbox's lock.
    pub fn cancel(&self) {
        self.0.fetch_or(CANCELLED | PENDING, AcqRel);
    }

    /// Concurrent blocks run, or none does any more: an idle queue is not free while they do.
    pub fn set_shared(&self, shared: bool) {
        if shared {
            self.0.fetch_or(SHARED, AcqRel);
        } else {
            self.0.fetch_and(!SHARED, AcqRel);
        }
    }
}
