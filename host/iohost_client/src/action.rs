//! A client's own actions.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use iohost_event::Signal;
use iohost_interface::{Action, ActionTarget, Arguments, Completion, IOReturn, Results};

/// The most invocations that wait to be taken. A driver host stops far below, so this many come
/// only from this process itself or from a peer that is none.
const MOST_WAITING: usize = 64 * 1024;

/// An action of a client's: what a driver that was given its [`handle`](Self::handle) invokes it
/// with can be taken from it, in the order of sending. `IOUserClient`'s `AsyncCompletion` arrives
/// here, as often as the driver completes.
///
/// No thread runs code of yours: take invocations with [`next`](Self::next) where you are willing
/// to wait, with [`poll`](Self::poll) where not, and put the descriptor into your own event loop
/// ([`AsFd`]): it is readable while `poll` has something to say. What is not taken holds the
/// driver's further invocations back, and in the end makes them fail with `BUSY` there.
///
/// When every holder has dropped its handles, what was sent before can still be taken, then comes
/// `ABORTED`. A driver that stopped, a process that died and a session that was closed have
/// dropped theirs. Dropping this end tells nobody; later invocations are dropped.
pub struct OSAction<A: Results> {
    inbox: Arc<Inbox>,
    arguments: PhantomData<fn() -> A>,
}

struct Inbox {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// Raised while there is something to say.
    readable: Signal,
}

struct Waiting {
    invocations: VecDeque<(Arguments, Completion)>,
    others: Weak<Handle>,
    others_gone: bool,
    owner_gone: bool,
    /// Tasks that wait for something to say.
    tasks: Vec<Waker>,
}

/// What all handles share.
struct Handle {
    inbox: Arc<Inbox>,
}

impl<A: Results> OSAction<A> {
    /// Makes an action. Errors: no descriptor left for its eventfd.
    pub fn create() -> io::Result<Self> {
        let waiting = Waiting {
            invocations: VecDeque::new(),
            others: Weak::new(),
            others_gone: false,
            owner_gone: false,
            tasks: Vec::new(),
        };
        let readable = Signal::new()?;
        let inbox = Inbox { waiting: Mutex::new(waiting), changed: Condvar::new(), readable };
        Ok(Self { inbox: Arc::new(inbox), arguments: PhantomData })
    }

    /// A handle, to pass to a driver.
    pub fn handle(&self) -> Action<A> {
        let mut waiting = self.inbox.waiting();
        let shared = waiting.others.upgrade().unwrap_or_else(|| {
            let shared = Arc::new(Handle { inbox: self.inbox.clone() });
            waiting.others = Arc::downgrade(&shared);
            waiting.others_gone = false;
            shared
        });
        self.inbox.show(&waiting);
        drop(waiting);
        Action::new(shared)
    }

    /// Takes the next invocation, if one is there; never blocks.
    ///
    /// Errors: `ABORTED` when there is none and nobody is left to send one; `BAD_ARGUMENT` for an
    /// invocation with other arguments than `A`, which is taken all the same.
    pub fn poll(&self) -> Option<Result<A, IOReturn>> {
        let mut waiting = self.inbox.waiting();
        let next = waiting.next()?;
        self.inbox.show(&waiting);
        drop(waiting);
        Some(next.and_then(|(arguments, completion)| {
            // Not under the lock: it tells the driver host.
            drop(completion);
            A::from_arguments(arguments)
        }))
    }

    /// Takes the next invocation, and waits for one as long as it takes. Errors: as
    /// [`poll`](Self::poll).
    pub fn next(&self) -> Result<A, IOReturn> {
        self.next_until(None)
    }

    /// As [`next`](Self::next), but `TIMEOUT` when none came in time.
    pub fn next_within(&self, timeout: Duration) -> Result<A, IOReturn> {
        // A time that no clock reaches is as long as it takes.
        self.next_until(Instant::now().checked_add(timeout))
    }

    /// As [`next`](Self::next), for any executor. A future that is dropped before it is ready has
    /// taken nothing.
    pub async fn next_async(&self) -> Result<A, IOReturn> {
        std::future::poll_fn(|context| {
            // In this order: what comes after the look wakes the task.
            self.inbox.register(context.waker().clone());
            self.poll().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    fn next_until(&self, deadline: Option<Instant>) -> Result<A, IOReturn> {
        loop {
            if let Some(next) = self.poll() {
                return next;
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(IOReturn::TIMEOUT);
            }
            let waiting = self.inbox.waiting();
            if waiting.has_news() {
                continue;
            }
            // A wake-up for nothing leads to another look.
            let changed = &self.inbox.changed;
            match left {
                None => drop(changed.wait(waiting).expect(NO_PANIC)),
                Some(left) => drop(changed.wait_timeout(waiting, left).expect(NO_PANIC)),
            }
        }
    }
}

/// Why the lock of an inbox is never poisoned.
const NO_PANIC: &str = "no code that can panic runs under this lock";

impl Inbox {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect(NO_PANIC)
    }

    fn register(&self, task: Waker) {
        let mut waiting = self.waiting();
        if !waiting.tasks.iter().any(|other| other.will_wake(&task)) {
            waiting.tasks.push(task);
        }
    }

    /// Wakes whoever waits, after a change.
    fn announce(&self, mut waiting: MutexGuard<'_, Waiting>) {
        self.show(&waiting);
        let tasks = std::mem::take(&mut waiting.tasks);
        drop(waiting);
        self.changed.notify_all();
        tasks.into_iter().for_each(Waker::wake);
    }

    /// Brings the descriptor in line with what there is.
    fn show(&self, waiting: &Waiting) {
        self.readable.take();
        if waiting.has_news() {
            self.readable.raise();
        }
    }
}

impl Waiting {
    fn has_news(&self) -> bool {
        !self.invocations.is_empty() || self.others_gone
    }

    fn next(&mut self) -> Option<Result<(Arguments, Completion), IOReturn>> {
        match self.invocations.pop_front() {
            Some(next) => Some(Ok(next)),
            None => self.others_gone.then_some(Err(IOReturn::ABORTED)),
        }
    }
}

impl ActionTarget for Handle {
    fn invoke(&self, arguments: Arguments, completion: Completion) -> Result<(), IOReturn> {
        let mut waiting = self.inbox.waiting();
        if waiting.owner_gone {
            return Err(IOReturn::ABORTED);
        }
        if waiting.invocations.len() >= MOST_WAITING {
            return Err(IOReturn::BUSY);
        }
        waiting.invocations.push_back((arguments, completion));
        self.inbox.announce(waiting);
        Ok(())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut waiting = self.inbox.waiting();
        // The owner may have made another one meanwhile.
        waiting.others_gone = waiting.others.strong_count() == 0;
        self.inbox.announce(waiting);
    }
}

impl<A: Results> Drop for OSAction<A> {
    fn drop(&mut self) {
        let mut waiting = self.inbox.waiting();
        waiting.owner_gone = true;
        let untaken = std::mem::take(&mut waiting.invocations);
        drop(waiting);
        drop(untaken);
    }
}

impl<A: Results> AsFd for OSAction<A> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inbox.readable.as_fd()
    }
}

impl<A: Results> fmt::Debug for OSAction<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting = self.inbox.waiting().invocations.len();
        f.debug_struct("OSAction").field("waiting", &waiting).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use iohost_event::{Poller, Ready};

    use super::*;

    #[test]
    fn invocations_are_taken_in_order_and_then_comes_the_end_of_the_last_holder() {
        let action = OSAction::<(u32, String)>::create().unwrap();
        let handle = action.handle();
        assert_eq!(action.poll(), None);
        for number in 0..3 {
            handle.invoke((number, "text".to_owned())).unwrap();
        }
        drop(handle);
        for number in 0..3 {
            assert_eq!(action.next(), Ok((number, "text".to_owned())));
        }
        assert_eq!(action.next(), Err(IOReturn::ABORTED));
        assert_eq!(action.poll(), Some(Err(IOReturn::ABORTED)));
    }

    #[test]
    fn a_wait_without_an_invocation_times_out_and_one_with_ends() {
        let action = OSAction::<u32>::create().unwrap();
        let handle = action.handle();
        assert_eq!(action.next_within(Duration::from_millis(1)), Err(IOReturn::TIMEOUT));
        let sender = std::thread::spawn(move || handle.invoke(5));
        assert_eq!(action.next_within(Duration::from_secs(60)), Ok(5));
        sender.join().unwrap().unwrap();
    }

    #[test]
    fn the_descriptor_is_readable_while_there_is_something_to_say() {
        let action = OSAction::<u32>::create().unwrap();
        let handle = action.handle();
        let poller = Poller::new().unwrap();
        let readable = || {
            // Watched anew, so that a report is about now and not about a change.
            let mut ready = Ready::new(1);
            poller.watch(&action, 1).unwrap();
            poller.wait(&mut ready, Some(Duration::ZERO)).unwrap();
            poller.forget(&action).unwrap();
            ready.tokens().count() == 1
        };
        assert!(!readable());
        handle.invoke(1).unwrap();
        handle.invoke(2).unwrap();
        assert!(readable());
        assert_eq!(action.poll(), Some(Ok(1)));
        assert!(readable(), "one is left");
        assert_eq!(action.poll(), Some(Ok(2)));
        assert!(!readable());
        drop(handle);
        assert!(readable(), "the end is something to say");
        let _another = action.handle();
        assert!(!readable(), "no end any more");
    }

    #[test]
    fn an_invocation_with_other_arguments_is_an_error_of_its_own() {
        let action = OSAction::<u8>::create().unwrap();
        let handle = Handle { inbox: action.inbox.clone() };
        handle.invoke(256_u32.into_arguments(), Completion::default()).unwrap();
        handle.invoke(7_u32.into_arguments(), Completion::default()).unwrap();
        assert_eq!(action.next(), Err(IOReturn::BAD_ARGUMENT));
        assert_eq!(action.next(), Ok(7));
    }
}
