//! A closure of any type, without an allocation for the small ones.
//!
//! A dispatch queue is fed by one thread and emptied by another, so a boxed closure would be
//! allocated on one and freed on the other, which is the slowest thing an allocator does. Most
//! closures are a few words; those travel inside the queue.

#![expect(unsafe_code)]
// UNSAFETY: the closure's type is forgotten, and its bytes are kept where no type says so.

mod list;

use std::fmt;
use std::mem::MaybeUninit;

pub use list::ClosureList;

/// Words that a closure may have to travel without an allocation.
pub const INLINE_WORDS: usize = 6;

/// A closure that runs at most once, on any thread.
///
/// Invariant: `space` holds a valid `F` of the type that `table` was made for: the closure itself,
/// a box with it, or nothing once it ran.
pub struct Closure {
    space: Space,
    table: &'static Table,
}

type Space = MaybeUninit<[usize; INLINE_WORDS]>;

/// What can be done with a closure whose type is forgotten. Both consume it.
struct Table {
    run: unsafe fn(*mut Space),
    drop: unsafe fn(*mut Space),
}

// SAFETY: `new` takes `Send` closures only.
unsafe impl Send for Closure {}

impl Closure {
    /// Keeps a closure, in a box if it has more than [`INLINE_WORDS`] words or needs a larger
    /// alignment than a word's.
    #[inline]
    pub fn new<F: FnOnce() + Send + 'static>(closure: F) -> Self {
        if size_of::<F>() <= size_of::<Space>() && align_of::<F>() <= align_of::<Space>() {
            Self::inline(closure)
        } else {
            let boxed: Box<dyn FnOnce() + Send> = Box::new(closure);
            Self::inline(boxed)
        }
    }

    /// Runs it.
    pub fn run(mut self) {
        self.run_in_place();
    }

    /// Runs it where it lies, which spares moving it. A second call does nothing.
    #[inline]
    pub fn run_in_place(&mut self) {
        let table = std::mem::replace(&mut self.table, &RAN);
        // SAFETY: the invariant; the space holds nothing from here on, as the table says, so the
        // closure is consumed once, also by a panic.
        unsafe { (table.run)(&raw mut self.space) }
    }

    /// `F` fits into the space.
    #[inline]
    fn inline<F: FnOnce() + Send + 'static>(closure: F) -> Self {
        assert!(size_of::<F>() <= size_of::<Space>() && align_of::<F>() <= align_of::<Space>());
        let mut space = Space::uninit();
        // SAFETY: the assertion above: the space is large enough and aligned enough for an `F`,
        // and it is ours alone.
        unsafe { space.as_mut_ptr().cast::<F>().write(closure) };
        Self { space, table: &Of::<F>::TABLE }
    }
}

impl Drop for Closure {
    fn drop(&mut self) {
        let drop = self.table.drop;
        // SAFETY: the invariant; nothing uses the space after its owner's drop.
        unsafe { drop(&raw mut self.space) }
    }
}

impl fmt::Debug for Closure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closure")
    }
}

/// The table of a closure that ran: nothing is left in its space.
static RAN: Table = Table { run: |_| {}, drop: |_| {} };

/// The table of a type.
struct Of<F>(F);

impl<F: FnOnce() + Send + 'static> Of<F> {
    const TABLE: Table = Table { run: Self::run, drop: Self::drop };

    /// # Safety
    ///
    /// `space` holds an `F`, which is not used again.
    unsafe fn run(space: *mut Space) {
        // SAFETY: the caller's promise; reading moves the closure out.
        let closure = unsafe { space.cast::<F>().read() };
        closure();
    }

    /// # Safety
    ///
    /// `space` holds an `F`, which is not used again.
    unsafe fn drop(space: *mut Space) {
        // SAFETY: the caller's promise.
        unsafe { space.cast::<F>().drop_in_place() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    /// Counts its drops.
    struct Guard(Arc<AtomicUsize>);

    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    /// Closures of every size around the limit, run or dropped: the captured guard goes once.
    #[test]
    fn what_a_closure_owns_is_dropped_once_whether_it_runs_or_not() {
        fn check<const BYTES: usize>() {
            let (dropped, ran) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let make = || {
                let (guard, ran) = (Guard(dropped.clone()), ran.clone());
                let bytes = [7_u8; BYTES];
                Closure::new(move || {
                    ran.fetch_add(bytes.iter().map(|byte| usize::from(*byte)).sum(), Relaxed);
                    drop(guard);
                })
            };
            make().run();
            assert_eq!((ran.load(Relaxed), dropped.load(Relaxed)), (7 * BYTES, 1));
            drop(make());
            assert_eq!((ran.load(Relaxed), dropped.load(Relaxed)), (7 * BYTES, 2));
            let mut twice = make();
            twice.run_in_place();
            twice.run_in_place();
            drop(twice);
            assert_eq!((ran.load(Relaxed), dropped.load(Relaxed)), (14 * BYTES, 3));
        }
        check::<0>();
        check::<31>();
        check::<32>();
        check::<33>();
        check::<500>();
    }

    #[test]
    fn a_closure_that_panics_drops_what_it_owns() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let guard = Guard(dropped.clone());
        let closure = Closure::new(move || {
            let _guard = &guard;
            panic!("on purpose");
        });
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| closure.run()));
        assert!(run.is_err());
        assert_eq!(dropped.load(Relaxed), 1);
    }

    #[test]
    fn a_larger_alignment_is_kept() {
        #[repr(align(64))]
        struct Aligned(u8);
        let aligned = Aligned(1);
        Closure::new(move || {
            // All of it, not the byte alone, is what the closure takes.
            let whole = aligned;
            assert!((&raw const whole.0).addr().is_multiple_of(64));
        })
        .run();
    }
}
