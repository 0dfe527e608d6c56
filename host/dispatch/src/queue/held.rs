//! The queues that the calling thread holds, by the address of their core.
//!
//! A core lives for as long as it is held: its holder has a reference. Nearly always a thread holds
//! one queue or none, so that one stands in a place of its own.

use std::cell::{Cell, RefCell};

use crate::sync::thread_local;

thread_local! {
    /// 0: none.
    static INNERMOST: Cell<usize> = const { Cell::new(0) };
    /// How many stand in `OUTER`, which is looked at only if there are some.
    static OUTER_COUNT: Cell<usize> = const { Cell::new(0) };
    /// The others, outermost first.
    static OUTER: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// Marks a queue whose holder is a concurrent block. Addresses of cores are even.
const BESIDE: usize = 1;

/// This thread holds a queue from now on.
#[inline]
pub(super) fn pick_up(address: usize) {
    push(address);
}

/// This thread runs a concurrent block of a queue from now on.
pub(super) fn pick_up_beside(address: usize) {
    push(address | BESIDE);
}

/// This thread does not hold a queue any more, as far as its innermost hold goes. `false` when it
/// did not hold it.
#[inline]
pub(super) fn lay_down(address: usize) -> bool {
    if OUTER_COUNT.get() > 0 {
        return lay_down_of_many(address);
    }
    let held = INNERMOST.get() & !BESIDE == address;
    if held {
        INNERMOST.set(0);
    }
    held
}

#[cold]
fn lay_down_of_many(address: usize) -> bool {
    OUTER.with_borrow_mut(|outer| {
        let innermost = INNERMOST.get() & !BESIDE == address;
        if innermost {
            INNERMOST.set(outer.pop().unwrap_or(0));
        }
        let further_out = || outer.iter().rposition(|mark| mark & !BESIDE == address);
        let held = innermost || further_out().map(|at| outer.remove(at)).is_some();
        OUTER_COUNT.set(outer.len());
        held
    })
}

/// Whether this thread runs work of a queue, also further out.
#[inline]
pub(super) fn holds(address: usize) -> bool {
    INNERMOST.get() & !BESIDE == address || OUTER_COUNT.get() > 0 && holds_further_out(address)
}

#[cold]
fn holds_further_out(address: usize) -> bool {
    OUTER.with_borrow(|outer| outer.iter().any(|mark| mark & !BESIDE == address))
}

/// Whether this thread holds a queue, once, and not in a concurrent block.
pub(super) fn holds_once_and_alone(address: usize) -> bool {
    let marks = marks();
    let mut own = marks.iter().filter(|mark| **mark & !BESIDE == address);
    own.next() == Some(&address) && own.next().is_none()
}

/// Whether this thread holds no queue at all.
pub(crate) fn holds_nothing() -> bool {
    INNERMOST.get() == 0
}

/// The addresses of all that this thread holds, outermost first.
pub(super) fn addresses() -> Vec<usize> {
    marks().into_iter().map(|mark| mark & !BESIDE).collect()
}

fn marks() -> Vec<usize> {
    let mut marks = OUTER.with_borrow(Vec::clone);
    marks.extend(Some(INNERMOST.get()).filter(|mark| *mark != 0));
    marks
}

#[inline]
fn push(mark: usize) {
    let previous = INNERMOST.replace(mark);
    if previous != 0 {
        push_further_out(previous);
    }
}

#[cold]
fn push_further_out(mark: usize) {
    OUTER.with_borrow_mut(|outer| {
        outer.push(mark);
        OUTER_COUNT.set(outer.len());
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_nests_and_ends_in_any_order() {
        assert!(holds_nothing() && !holds(2) && !lay_down(2));
        pick_up(2);
        pick_up(4);
        pick_up_beside(6);
        assert_eq!(addresses(), [2, 4, 6]);
        assert!([2, 4, 6].into_iter().all(holds) && !holds(8));
        assert!(holds_once_and_alone(2) && !holds_once_and_alone(6));
        pick_up(2);
        assert!(!holds_once_and_alone(2));
        assert!(lay_down(4) && !lay_down(4) && !lay_down(8));
        assert!(lay_down(2) && holds_once_and_alone(2), "the innermost hold ends first");
        assert!(lay_down(6) && lay_down(2) && holds_nothing());
    }
}
