//! The items that the calling thread took from a plain queue and runs now.
//!
//! They belong to the thread, so no lock is needed, also not for what an item adds to its own
//! queue. They run where they lie: moving an item costs as much as a short one takes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use super::Item;

thread_local! {
    /// The address of the core of the queue that this thread runs; 0: it runs no plain queue.
    static QUEUE: Cell<usize> = const { Cell::new(0) };
    /// What the items of that queue added to it, behind the batch.
    static ADDED: RefCell<VecDeque<Item>> = const { RefCell::new(VecDeque::new()) };
    /// A list for the next batch, so that not every turn allocates one.
    static SPARE: RefCell<VecDeque<Item>> = const { RefCell::new(VecDeque::new()) };
}

/// Items in the hands of the thread that runs a plain queue. Those before `next` have run.
pub(super) struct Batch {
    items: VecDeque<Item>,
    next: usize,
    /// The last one that was added, when the others had run.
    added: Item,
    /// The queue further out, in whose work a thread of a manual engine runs this one, and what
    /// was added to it.
    outer: (usize, VecDeque<Item>),
}

impl Batch {
    /// This thread runs a queue, until the batch is dropped; what is left goes back before.
    pub(super) fn of(queue: usize) -> Self {
        let outer = match QUEUE.replace(queue) {
            0 => (0, VecDeque::new()),
            outer => (outer, ADDED.take()),
        };
        Self { items: SPARE.take(), next: 0, added: Item::Ran, outer }
    }

    /// The next item, to be run in its place.
    #[inline]
    pub(super) fn next(&mut self) -> Option<&mut Item> {
        if let Some(item) = self.items.get_mut(self.next) {
            self.next += 1;
            return Some(item);
        }
        let added = &mut self.added;
        ADDED.with_borrow_mut(|items| items.pop_front().map(|item| *added = item))?;
        Some(added)
    }

    /// Takes all of a list. The batch has run out.
    pub(super) fn take_all(&mut self, items: &mut VecDeque<Item>) {
        self.items.clear();
        self.next = 0;
        std::mem::swap(&mut self.items, items);
    }

    /// Puts what has not run in front of a list.
    pub(super) fn put_before(&mut self, items: &mut VecDeque<Item>) {
        self.items.drain(..self.next);
        self.next = 0;
        ADDED.with_borrow_mut(|added| self.items.append(added));
        self.items.append(items);
        std::mem::swap(&mut self.items, items);
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.items.clear();
        SPARE.set(std::mem::take(&mut self.items));
        let (outer, added) = std::mem::take(&mut self.outer);
        QUEUE.set(outer);
        if outer != 0 {
            ADDED.set(added);
        }
    }
}

/// Whether this thread runs the queue, in the innermost batch.
#[inline]
pub(super) fn is_of(queue: usize) -> bool {
    QUEUE.get() == queue
}

/// Appends an item to the queue that this thread runs.
#[inline]
pub(super) fn push(item: Item) {
    // By reference: the closure would take a copy with it, and an item is large.
    let mut item = Some(item);
    ADDED.with_borrow_mut(|added| added.extend(item.take()));
}
