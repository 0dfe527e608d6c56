//! The items that the calling thread took from a plain queue and runs now.
//!
//! They belong to the thread, so no lock is needed, also not for blocks that an item adds to its
//! own queue. They run where they lie: moving an item costs as much as a short one takes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::mem::offset_of;
use std::ptr;

use iohost_closure::ClosureList;
use iohost_memory::prefetch;

use super::{Item, QueueCore};
use crate::sync::thread_local;

thread_local! {
    /// The address of the core of the queue that this thread runs and adds to by `ADDED`; 0: none.
    static QUEUE: Cell<usize> = const { Cell::new(0) };
    /// Blocks that the items of that queue added to it, behind the batch.
    static ADDED: ClosureList = const { ClosureList::new() };
    /// A list for the next batch, so that not every turn allocates one.
    static SPARE: RefCell<VecDeque<Item>> = const { RefCell::new(VecDeque::new()) };
    /// Where the queue is that this thread took a batch from last, and where that queue's next item
    /// will be if no other thread takes one.
    static LIKELY: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// Items in the hands of the thread that runs a plain queue. Those before `next` have run.
pub(super) struct Batch {
    items: VecDeque<Item>,
    next: usize,
    queue: usize,
    /// `ADDED` is this batch's. It is not where a thread of a manual engine runs a queue inside of
    /// the work of another one.
    adds: bool,
}

impl Batch {
    /// This thread runs a queue, until the batch is dropped; what is left goes back before.
    pub(super) fn of(queue: usize) -> Self {
        let adds = QUEUE.get() == 0;
        if adds {
            QUEUE.set(queue);
        }
        Self { items: SPARE.take(), next: 0, queue, adds }
    }

    /// The next item, to be run in its place.
    #[inline]
    pub(super) fn next(&mut self) -> Option<&mut Item> {
        let item = self.items.get_mut(self.next)?;
        self.next += 1;
        Some(item)
    }

    /// Whether blocks wait that were added.
    #[inline]
    pub(super) fn has_added(&self) -> bool {
        self.adds && ADDED.with(|added| !added.is_empty())
    }

    /// Runs the first of them. Once there is no next item.
    #[inline]
    pub(super) fn run_added(&self) {
        ADDED.with(|added| added.run_first());
    }

    /// Takes all of a list. The batch has run out.
    pub(super) fn take_all(&mut self, items: &mut VecDeque<Item>) {
        self.items.clear();
        self.next = 0;
        LIKELY.set((self.queue, self.items.as_slices().0.as_ptr().addr()));
        std::mem::swap(&mut self.items, items);
    }

    /// Puts what has not run in front of a list.
    pub(super) fn put_before(&mut self, items: &mut VecDeque<Item>) {
        self.items.drain(..self.next);
        self.next = 0;
        if self.adds {
            ADDED.with(|added| {
                self.items.extend(std::iter::from_fn(|| added.pop()).map(Item::Block));
            });
        }
        self.items.append(items);
        std::mem::swap(&mut self.items, items);
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.items.clear();
        SPARE.set(std::mem::take(&mut self.items));
        if self.adds {
            QUEUE.set(0);
        }
    }
}

/// Has the lines come that this thread touches next if it is to run the queue that it ran last. For a
/// thread that was just woken, by another processor.
pub(crate) fn fetch_likely() {
    let (queue, item) = LIKELY.get();
    prefetch::to_write(ptr::without_provenance::<u8>(queue + offset_of!(QueueCore, intake)));
    // It can lie on two lines.
    prefetch::to_read(ptr::without_provenance::<u8>(item));
    prefetch::to_read(ptr::without_provenance::<u8>(item + size_of::<Item>() - 1));
}

/// Whether this thread runs the queue and can add to it.
#[inline]
pub(super) fn is_of(queue: usize) -> bool {
    QUEUE.get() == queue
}

/// Appends a block to the queue that this thread runs.
#[inline]
pub(super) fn add(block: impl FnOnce() + Send + 'static) {
    ADDED.with(|added| added.push(block));
}
