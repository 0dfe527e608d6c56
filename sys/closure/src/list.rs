//! Closures in a line, each run where it lies.

use std::cell::Cell;
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr;

use crate::Closure;

/// Closures of one thread, in the order in which they came. They run in their place, while others
/// are added behind: moving a closure costs as much as a short one takes.
///
/// Invariants: the chunks from `first` on are linked and end with `last`; both are null or neither
/// is. The slots that hold a closure are those from `taken` on in `first` to before `added` in
/// `last`. A chunk is given up by `advance` and `drop` only, and neither while a closure runs.
pub struct ClosureList {
    first: Cell<*mut Chunk>,
    taken: Cell<usize>,
    last: Cell<*mut Chunk>,
    added: Cell<usize>,
    running: Cell<bool>,
}

/// Slots of a chunk.
const SLOTS: usize = 63;

struct Chunk {
    next: *mut Chunk,
    slots: [MaybeUninit<Closure>; SLOTS],
}

impl ClosureList {
    /// An empty list; it allocates with the first closure.
    pub const fn new() -> Self {
        Self {
            first: Cell::new(ptr::null_mut()),
            taken: Cell::new(0),
            last: Cell::new(ptr::null_mut()),
            added: Cell::new(SLOTS),
            running: Cell::new(false),
        }
    }

    /// Appends a closure.
    #[inline]
    pub fn push(&self, closure: impl FnOnce() + Send + 'static) {
        if self.added.get() == SLOTS {
            self.add_chunk();
        }
        let at = self.added.get();
        // SAFETY: the invariant: `last` is a chunk of ours, and `at` is below `SLOTS`.
        let slot = unsafe { &raw mut (*self.last.get()).slots[at] };
        // SAFETY: the invariant: the slot holds nothing, and nobody refers to it.
        unsafe { slot.cast::<Closure>().write(Closure::new(closure)) };
        self.added.set(at + 1);
    }

    /// Runs the first closure, which may append others. `false` when there is none, or while one
    /// runs. A closure that panics is gone.
    #[inline]
    pub fn run_first(&self) -> bool {
        if self.running.get() {
            return false;
        }
        let Some(slot) = self.take_slot() else { return false };
        let _running = Running::on(&self.running);
        // SAFETY: `take_slot`: a closure that nobody else gets. Its chunk stays while it runs, and
        // it is not used afterwards; it owns nothing then.
        unsafe { (*slot).run_in_place() };
        true
    }

    /// Takes the first closure out. `None` when there is none, or while one runs.
    pub fn pop(&self) -> Option<Closure> {
        if self.running.get() {
            return None;
        }
        // SAFETY: `take_slot`: a closure that nobody else gets; reading moves it out.
        self.take_slot().map(|slot| unsafe { slot.read() })
    }

    /// Whether no closure waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.first.get() == self.last.get() && self.taken.get() == self.added.get()
            || self.first.get().is_null()
    }

    /// The slot of the first closure, which is the caller's from here on. Not while one runs.
    #[inline]
    fn take_slot(&self) -> Option<*mut Closure> {
        if self.taken.get() == SLOTS {
            self.advance();
        }
        if self.is_empty() {
            return None;
        }
        let (first, at) = (self.first.get(), self.taken.get());
        self.taken.set(at + 1);
        // SAFETY: the invariant: `first` is a chunk of ours, and `at` is below `SLOTS`.
        Some(unsafe { &raw mut (*first).slots[at] }.cast())
    }

    /// Leaves the first chunk, whose closures were all taken, for the next one, if there is one.
    #[cold]
    fn advance(&self) {
        let done = self.first.get();
        if done == self.last.get() {
            // The only one: its slots are used again from the start.
            self.taken.set(0);
            self.added.set(0);
            return;
        }
        // SAFETY: the invariant: a chunk of ours, and not the last one.
        let next = unsafe { (*done).next };
        self.first.set(next);
        self.taken.set(0);
        // SAFETY: made by `Box::into_raw`, and linked from nowhere any more.
        drop(unsafe { Box::from_raw(done) });
    }

    #[cold]
    fn add_chunk(&self) {
        let slots = [const { MaybeUninit::uninit() }; SLOTS];
        let chunk = Box::into_raw(Box::new(Chunk { next: ptr::null_mut(), slots }));
        let last = self.last.replace(chunk);
        self.added.set(0);
        if last.is_null() {
            self.first.set(chunk);
            self.taken.set(0);
        } else {
            // SAFETY: the invariant: a chunk of ours.
            unsafe { (*last).next = chunk };
        }
    }
}

/// A closure of a list runs, until this is dropped.
struct Running<'a>(&'a Cell<bool>);

impl<'a> Running<'a> {
    #[inline]
    fn on(running: &'a Cell<bool>) -> Self {
        running.set(true);
        Self(running)
    }
}

impl Drop for Running<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.set(false);
    }
}

impl Default for ClosureList {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for ClosureList {
    fn drop(&mut self) {
        while let Some(closure) = self.pop() {
            drop(closure);
        }
        // While one of its closures runs, its chunks stay for good.
        if !self.running.get() && !self.first.get().is_null() {
            // SAFETY: made by `Box::into_raw`; empty, so it is the first and the last.
            drop(unsafe { Box::from_raw(self.first.get()) });
        }
    }
}

impl fmt::Debug for ClosureList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClosureList")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::{Arc, Mutex};

    use super::*;

    thread_local! {
        static LIST: ClosureList = const { ClosureList::new() };
    }

    type Seen = Arc<Mutex<Vec<usize>>>;

    fn noting(seen: &Seen, number: usize) -> impl FnOnce() + Send + 'static {
        let seen = seen.clone();
        move || seen.lock().unwrap().push(number)
    }

    /// Any mix of pushes, runs and pops, over several chunks, beside a plain list.
    #[test]
    fn closures_run_in_the_order_they_came_however_many_wait() {
        let (list, seen) = (ClosureList::new(), Seen::default());
        let (mut model, mut expected, mut state) = (VecDeque::new(), Vec::new(), 1_u32);
        for number in 0..20_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Longer and longer lines, then shorter and shorter ones.
            if state >> 24 < if number % 2_000 < 1_000 { 160 } else { 96 } {
                list.push(noting(&seen, number));
                model.push_back(number);
            } else {
                assert_eq!(list.is_empty(), model.is_empty());
                let first = model.pop_front();
                if state & 0x1_0000 == 0 {
                    assert_eq!(list.run_first(), first.is_some());
                } else {
                    assert_eq!(list.pop().map(Closure::run).is_some(), first.is_some());
                }
                expected.extend(first);
            }
        }
        assert_eq!(*seen.lock().unwrap(), expected);
        drop(list);
        assert_eq!(Arc::strong_count(&seen), 1, "what waited was dropped");
    }

    #[test]
    fn a_closure_that_runs_can_append_hundreds_and_run_or_take_none() {
        let seen = Seen::default();
        let all = seen.clone();
        LIST.with(|list| {
            list.push(move || {
                LIST.with(|list| {
                    (0..300).for_each(|number| list.push(noting(&all, number)));
                    assert!(!list.run_first() && list.pop().is_none());
                });
                all.lock().unwrap().push(1_000);
            });
            while list.run_first() {}
        });
        let expected: Vec<_> = [1_000].into_iter().chain(0..300).collect();
        assert_eq!(*seen.lock().unwrap(), expected);
    }

    #[test]
    fn a_closure_that_panics_is_gone_and_the_next_one_runs() {
        let (list, seen) = (ClosureList::new(), Seen::default());
        list.push(|| panic!("on purpose"));
        list.push(noting(&seen, 1));
        assert!(catch_unwind(AssertUnwindSafe(|| list.run_first())).is_err());
        assert!(list.run_first() && !list.run_first());
        assert_eq!(*seen.lock().unwrap(), [1]);
    }
}
