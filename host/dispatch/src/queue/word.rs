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
//! 1. [`announce`](Word::announce), [`schedule`](Word::schedule): there is something to run; the
//!    queue joins the engine's ready list.
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

use crate::step::{Step, order, takes};
use crate::sync::atomic::AtomicU32;
use crate::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

const STAGE: u32 = 0b11;
const IDLE: u32 = 0;
const SCHEDULED: u32 = 1;
const RUNNING: u32 = 2;
const PENDING: u32 = 1 << 2;
const CANCELLED: u32 = 1 << 3;
const SHARED: u32 = 1 << 4;

#[derive(Debug, Default)]
pub(super) struct Word(AtomicU32);

fn is_free(word: u32) -> bool {
    word & STAGE == IDLE || !takes(Step::ScheduleOnlyIdle)
}

fn scheduled(word: u32) -> u32 {
    (word & !STAGE) | SCHEDULED
}

impl Word {
    /// Sets `PENDING`, and goes from `IDLE` to `SCHEDULED`. `true`: the caller puts the queue on the
    /// ready list. When `PENDING` was set, whoever did that sees to it. Under the inbox's lock, so
    /// that it is not cleared meanwhile.
    #[inline]
    pub fn announce(&self) -> bool {
        if !takes(Step::Announce) {
            return false;
        }
        let pending = |word| if is_free(word) { scheduled(word) } else { word } | PENDING;
        let announced = |word| (word & PENDING == 0).then(|| pending(word));
        self.0.fetch_update(AcqRel, Relaxed, announced).is_ok_and(is_free)
    }

    /// From `IDLE` to `SCHEDULED`. `true`: the caller puts the queue on the ready list.
    pub fn schedule(&self) -> bool {
        let next = |word| is_free(word).then(|| scheduled(word));
        self.0.fetch_update(AcqRel, Acquire, next).is_ok()
    }

    /// From `IDLE` without any flag to `RUNNING`.
    #[inline]
    pub fn take_if_idle(&self) -> bool {
        self.0.compare_exchange(IDLE, RUNNING, order(Step::AcquireIdle, Acquire), Relaxed).is_ok()
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
        self.0.compare_exchange(RUNNING, IDLE, order(Step::ReleaseIdle, AcqRel), Relaxed).is_ok()
    }

    /// From `RUNNING` to `IDLE`, or to `SCHEDULED` when something is pending. `true`: the caller
    /// puts the queue on the ready list.
    pub fn end(&self) -> bool {
        let goes_on = |word| word & PENDING != 0 && takes(Step::LookBeforeIdle);
        let next = |word| (word & !STAGE) | if goes_on(word) { SCHEDULED } else { IDLE };
        self.0.fetch_update(AcqRel, Acquire, |word| Some(next(word))).is_ok_and(goes_on)
    }

    /// From `SCHEDULED` to `IDLE` with nothing pending, for a queue whose engine is gone.
    pub fn abandon(&self) {
        self.0.fetch_and(!(PENDING | STAGE), AcqRel);
    }

    /// Nothing is pending, and the queue is not cancelled.
    #[inline]
    pub fn is_quiet(&self) -> bool {
        self.0.load(Relaxed) & (PENDING | CANCELLED) == 0 || !takes(Step::LookBeforeOwnPush)
    }

    #[inline]
    pub fn is_pending(&self) -> bool {
        self.0.load(Relaxed) & PENDING != 0
    }

    /// The running thread leaves something over.
    pub fn set_pending(&self) {
        self.0.fetch_or(PENDING, AcqRel);
    }

    /// The running thread takes all there is, unless the queue is cancelled: `false` then, and
    /// what is pending stays so. Under the inbox's lock.
    pub fn take_pending(&self) -> bool {
        let taken = !self.is_cancelled() || !takes(Step::LookForCancel);
        if taken {
            self.clear_pending();
        }
        taken
    }

    /// Nothing is left in the inbox. By the running thread, under the inbox's lock.
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

    /// Concurrent blocks run: an idle queue is not free while they do.
    pub fn start_shared(&self) {
        if takes(Step::MarkShared) {
            self.0.fetch_or(SHARED, AcqRel);
        }
    }

    /// No concurrent block runs any more. `more`: something is left, and pending. In one step, or
    /// a sync call would overtake it.
    pub fn end_shared(&self, more: bool) {
        let pending = if more && takes(Step::AnnounceLeft) { PENDING } else { 0 };
        let ended = |word| Some((word & !SHARED) | pending);
        // Never an error: it ends in any state.
        let _ = self.0.fetch_update(AcqRel, Acquire, ended);
    }
}
