//! The items that the calling thread took from a plain queue and runs now.
//!
//! They stand with the thread, not with the queue: nobody else may have them, so no lock is
//! needed, also not for what an item adds to its own queue.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use super::Item;

thread_local! {
    /// The address of the queue's core; 0: this thread runs no plain queue.
    static QUEUE: Cell<usize> = const { Cell::new(0) };
    static ITEMS: RefCell<VecDeque<Item>> = const { RefCell::new(VecDeque::new()) };
}

/// This thread runs a queue. Empty when it is dropped: what is left goes back before.
pub(super) struct Batch {
    /// The batch of the queue further out, in whose work a thread of a manual engine runs this one.
    outer: (usize, VecDeque<Item>),
}

impl Batch {
    pub(super) fn of(address: usize) -> Self {
        let outer = match QUEUE.replace(address) {
            0 => (0, VecDeque::new()),
            other => (other, ITEMS.take()),
        };
        Self { outer }
    }

    pub(super) fn pop(&self) -> Option<Item> {
        ITEMS.with_borrow_mut(VecDeque::pop_front)
    }

    /// Changes the items of this batch, which are empty or are to be emptied, for others.
    pub(super) fn swap(&self, items: &mut VecDeque<Item>) {
        ITEMS.with_borrow_mut(|own| std::mem::swap(own, items));
    }

    /// Puts the items of this batch in front of others.
    pub(super) fn put_before(&self, items: &mut VecDeque<Item>) {
        self.swap(items);
        ITEMS.with_borrow_mut(|behind| items.append(behind));
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        let (outer, items) = std::mem::take(&mut self.outer);
        QUEUE.set(outer);
        if outer != 0 {
            ITEMS.set(items);
        }
    }
}

/// Whether this thread runs the queue, in the innermost batch.
pub(super) fn is_of(address: usize) -> bool {
    QUEUE.get() == address
}

/// Appends an item to the batch.
pub(super) fn push(item: Item) {
    ITEMS.with_borrow_mut(|items| items.push_back(item));
}
