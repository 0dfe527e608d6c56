//! Actions: a method and its target, as a handle that can be given to somebody else.
//!
//! [`Action`] is a handle. Whoever made the action has the other end: `OSAction` of the SDK in a
//! driver, `OSAction` of the client library in a program. Handles travel as arguments of a call or
//! as its results; an invocation then crosses the session's socket, in the order of sending.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::{Argument, Arguments, IOReturn, Results, Taken};

/// A handle to an action that takes arguments `A`: nothing, one value, or a tuple of them.
///
/// Clones are the same holder's; when the last one of every holder is dropped, the action's owner
/// hears of it (`SetAbortedHandler`). A process that dies drops its handles.
pub struct Action<A> {
    target: Arc<dyn ActionTarget>,
    arguments: PhantomData<fn(A)>,
}

/// What stands behind a handle: a method on a queue in this process, or a way to another process.
/// Dropped when the last handle is.
pub trait ActionTarget: Send + Sync {
    /// Sends one invocation on its way; never runs the method itself. Errors: see
    /// [`Action::invoke`].
    fn invoke(&self, arguments: Arguments, completion: Completion) -> Result<(), IOReturn>;
}

/// Runs its code when it is dropped: when an invocation has ended, or will not start.
#[derive(Default)]
#[must_use = "dropping it says that the invocation has ended"]
pub struct Completion(Option<Box<dyn FnOnce() + Send>>);

/// An action among arguments: which scalar stands for it, and what it is.
#[derive(Clone)]
pub struct PassedAction {
    /// The place of its scalar.
    pub scalar: usize,
    /// What it is; `None` for one that came from another process and was not looked up yet: its
    /// scalar is the number that the sender knows it by.
    pub target: Option<Arc<dyn ActionTarget>>,
}

impl<A: Results> Action<A> {
    /// A handle to `target`.
    pub fn new(target: Arc<dyn ActionTarget>) -> Self {
        Self { target, arguments: PhantomData }
    }

    /// Has the method run on its target's queue, later. Callable from any thread; invocations of
    /// one sender run in the order in which it sent them.
    ///
    /// Errors: `ABORTED` when the action was cancelled (the invocation is dropped and counted),
    /// `OFFLINE` when its owner's process or session is gone, `BUSY` when too many invocations
    /// wait for a process that does not take them, `BAD_ARGUMENT` or `MESSAGE_TOO_LARGE` for
    /// arguments beyond the limits of [`Arguments`]. All of them can be ignored: the owner does
    /// not want to be called, or cannot be.
    pub fn invoke(&self, arguments: A) -> Result<(), IOReturn> {
        let arguments = arguments.into_arguments();
        arguments.check()?;
        self.target.invoke(arguments, Completion::default())
    }
}

impl<A> Clone for Action<A> {
    fn clone(&self) -> Self {
        Self { target: self.target.clone(), arguments: PhantomData }
    }
}

impl<A> fmt::Debug for Action<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Action")
    }
}

/// An action is a scalar, marked as one: an integer cannot be taken for it, nor it for an integer.
impl<A: Results> Argument for Action<A> {
    const TYPE: &'static str = "action";

    fn put(self, arguments: &mut Arguments) {
        let scalar = arguments.scalars.len();
        arguments.actions.push(PassedAction { scalar, target: Some(self.target) });
        arguments.scalars.push(0);
    }

    fn take(from: &mut Taken) -> Result<Self, IOReturn> {
        from.action().map(Self::new)
    }
}

impl Completion {
    /// Has `code` run at the end of the invocation.
    pub fn new(code: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(code)))
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if let Some(code) = self.0.take() {
            code();
        }
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Completion")
    }
}

impl PartialEq for PassedAction {
    fn eq(&self, other: &Self) -> bool {
        let same = match (&self.target, &other.target) {
            (Some(this), Some(that)) => Arc::ptr_eq(this, that),
            (None, None) => true,
            _ => false,
        };
        same && self.scalar == other.scalar
    }
}

impl Eq for PassedAction {}

impl fmt::Debug for PassedAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PassedAction").field("scalar", &self.scalar).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;

    impl ActionTarget for Nobody {
        fn invoke(&self, _: Arguments, _: Completion) -> Result<(), IOReturn> {
            Err(IOReturn::OFFLINE)
        }
    }

    #[test]
    fn an_action_is_taken_where_it_was_put_and_nowhere_else() {
        let action = || Action::<u32>::new(Arc::new(Nobody));
        let sent = (7_u32, action(), vec![1, 2]).into_arguments();
        let (number, _, bytes) =
            <(u32, Action<u32>, Vec<u8>)>::from_arguments(sent.clone()).unwrap();
        assert_eq!((number, bytes), (7, vec![1, 2]));

        let integers = <(u32, u32, Vec<u8>)>::from_arguments(sent);
        assert_eq!(integers, Err(IOReturn::BAD_ARGUMENT), "an action is no integer");
        let number = 7_u64.into_arguments();
        let refused = <Action<u32>>::from_arguments(number).map(drop);
        assert_eq!(refused, Err(IOReturn::BAD_ARGUMENT), "an integer is no action");
        let left_over = (action(), 0_u32).into_arguments();
        assert!(<Action<u32>>::from_arguments(left_over).is_err());
    }
}
