//! The steps on which it hangs that nothing is lost and nobody is beside anybody.
//!
//! All are always taken, but for the mutants of the loom models, each of which leaves one out and
//! must fail.

use crate::sync::atomic::Ordering;

/// What a mutant leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// `Word::announce`: say that there is something to run.
    Announce,
    /// `Word::announce`, `Word::schedule`: only an idle queue.
    ScheduleOnlyIdle,
    /// `Word::take_if_idle`: see what the thread before wrote.
    AcquireIdle,
    /// `Word::end_if_quiet`: let the next thread see what this one wrote.
    ReleaseIdle,
    /// `Word::end`: back to the list when something is pending.
    LookBeforeIdle,
    /// `Word::is_quiet`: what came before waits in the inbox.
    LookBeforeOwnPush,
    /// `Word::take_pending`: leave the rest to the cancel that came meanwhile.
    LookForCancel,
    /// `QueueCore::next_baton`: the same.
    LookForCancelAtEnd,
    /// `Word::start_shared`: an idle queue is not free beside its concurrent blocks.
    MarkShared,
    /// `Word::end_shared`: what is left comes before who finds the queue free.
    AnnounceLeft,
    /// `QueueCore::end_concurrent`: the cancel's handlers waited for it.
    ResumeCancel,
    /// `Sleepers::add`: a cancel came before the sleep was registered.
    LookForAbort,
    /// `QueueCore::put_down`: others run the rest of the turn.
    LeaveTurn,
    /// `QueueCore::next_baton`: somebody has to run what stands behind it.
    KeepPending,
    /// `Holding::pass_on`: the queue is not released, another thread runs it.
    PassOn,
    /// `Baton::end`: the waiter sees what the ender wrote.
    ReleaseTurn,
    /// `Baton::end`: wake the waiter.
    Unpark,
    /// `Baton::wait`: a wake-up can be one of an earlier wait.
    LookAfterPark,
    /// `Feed::deliver`: see the events that found a delivery scheduled.
    AcquireEvents,
}

/// Whether a step is taken.
#[inline(always)]
#[cfg(not(loom))]
pub(crate) const fn takes(_step: Step) -> bool {
    true
}

#[cfg(loom)]
pub(crate) fn takes(step: Step) -> bool {
    LEFT_OUT.get() != Some(step)
}

/// An ordering that is a step.
#[inline(always)]
pub(crate) fn order(step: Step, order: Ordering) -> Ordering {
    if takes(step) { order } else { Ordering::Relaxed }
}

/// Whether a sender wakes a worker before it puts something in. Models of other things do it the
/// other way round: there is twice as much to run, in a hundred times as many orders.
#[inline(always)]
#[cfg(not(loom))]
pub(crate) const fn wakes_first() -> bool {
    true
}

#[cfg(loom)]
pub(crate) fn wakes_first() -> bool {
    WAKES_FIRST.get()
}

// A model runs its threads in turns on the one thread that explores it.
#[cfg(loom)]
std::thread_local! {
    pub(crate) static LEFT_OUT: std::cell::Cell<Option<Step>> = const { std::cell::Cell::new(None) };
    pub(crate) static WAKES_FIRST: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}
