//! The locks and the threads of the engine: those of std, or of loom, whose models then run every
//! order of what the threads do.

#[cfg(not(loom))]
pub(crate) use std::{
    hint,
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread, thread_local,
};

#[cfg(loom)]
pub(crate) use loom::{
    hint,
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};

/// Whether a model has failed. loom takes no further step then, so a destructor must not ask for one.
#[inline]
pub(crate) fn has_failed() -> bool {
    cfg!(loom) && std::thread::panicking()
}

/// How a thread sleeps until another one wakes it.
#[cfg(not(loom))]
pub(crate) mod parking {
    pub(crate) use std::thread::{Thread, current, park};
}

/// As above. Not loom's own: that wakes a thread also while it waits for a lock, and has it see
/// what the waker wrote though it never parked.
#[cfg(loom)]
pub(crate) mod parking {
    use std::cell::RefCell;
    use std::sync::Arc;

    use super::{Condvar, Mutex, thread_local};

    thread_local! {
        static CURRENT: RefCell<Thread> = const { RefCell::new(Thread::default()) };
    }

    #[derive(Clone, Default)]
    pub(crate) struct Thread(Arc<Place>);

    #[derive(Default)]
    struct Place {
        woken: Mutex<bool>,
        changed: Condvar,
    }

    impl Thread {
        pub(crate) fn unpark(&self) {
            *self.0.woken.lock().unwrap() = true;
            self.0.changed.notify_one();
        }
    }

    pub(crate) fn current() -> Thread {
        CURRENT.with_borrow(Thread::clone)
    }

    pub(crate) fn park() {
        let Thread(place) = current();
        let mut woken = place.woken.lock().unwrap();
        while !*woken {
            woken = place.changed.wait(woken).unwrap();
        }
        *woken = false;
    }
}

#[cfg(loom)]
pub(crate) use local::{Local, thread_local};

/// loom's thread-locals, with the methods of std's.
#[cfg(loom)]
mod local {
    use std::cell::{Cell, RefCell};

    use loom::thread::LocalKey;

    macro_rules! modelled {
        ($($(#[$doc:meta])* static $name:ident: $type:ty = const $init:block;)+) => {
            $(
                $(#[$doc])*
                static $name: $crate::sync::Local<$type> = {
                    loom::thread_local! { static KEY: $type = $init; }
                    $crate::sync::Local(&KEY)
                };
            )+
        };
    }
    pub(crate) use modelled as thread_local;

    pub(crate) struct Local<T: 'static>(pub &'static LocalKey<T>);

    impl<T> Local<T> {
        pub(crate) fn with<R>(&self, code: impl FnOnce(&T) -> R) -> R {
            self.0.with(code)
        }
    }

    impl<T> Local<Cell<T>> {
        pub(crate) fn get(&self) -> T
        where
            T: Copy,
        {
            self.0.with(Cell::get)
        }

        pub(crate) fn set(&self, value: T) {
            self.0.with(|cell| cell.set(value));
        }

        pub(crate) fn replace(&self, value: T) -> T {
            self.0.with(|cell| cell.replace(value))
        }
    }

    impl<T> Local<RefCell<T>> {
        pub(crate) fn with_borrow<R>(&self, code: impl FnOnce(&T) -> R) -> R {
            self.0.with(|cell| code(&cell.borrow()))
        }

        pub(crate) fn with_borrow_mut<R>(&self, code: impl FnOnce(&mut T) -> R) -> R {
            self.0.with(|cell| code(&mut cell.borrow_mut()))
        }

        pub(crate) fn set(&self, value: T) {
            self.0.with(|cell| cell.replace(value));
        }

        pub(crate) fn take(&self) -> T
        where
            T: Default,
        {
            self.0.with(RefCell::take)
        }
    }
}
