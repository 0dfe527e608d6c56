//! Actions: a method of a queue's state, as something that can be handed to others.
//!
//! # The parties
//!
//! ```text
//!   owner: OSAction ──┐                       ┌── queue's state (the target)
//!                     ├──▶ Core ──▶ method ───┤
//!   others: Action ───┘      ▲                └── reference memory
//!        (or a process       │
//!         that has one)      └── one waiter: ActionWait
//! ```
//!
//! `cancel`, or the end of the owner, cuts the arrow to the method; the end of the last `Action`
//! runs the aborted handler. Nothing else holds the target, so a target may own its action.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError, Weak};
use std::time::Duration;

use iohost_interface::{Action, ActionTarget, Arguments, Completion, IOReturn, Results};

use crate::{Error, IODispatchQueue, IOTimerClock, Result, abi};

/// `OSAction`: a method with its target queue, to be run whenever somebody invokes it.
///
/// A value of this type is the owner's end. What others get is [`handle`](Self::handle), an
/// [`Action`], which can be sent to another queue, given to a client in a reply, and invoked from
/// any thread. `A` is what an invocation carries:
///
/// ```
/// # use iohost_driver::prelude::*;
/// fn make(queue: &IODispatchQueue<u64>) -> Result<OSAction<(u32,)>> {
///     OSAction::create(queue, (), |state, _reference, (number,): (u32,)| *state += 1)
/// }
/// ```
///
/// A method of another form does not compile:
///
/// ```compile_fail
/// # use iohost_driver::prelude::*;
/// fn make(queue: &IODispatchQueue<u64>) -> Result<OSAction<(u32,)>> {
///     OSAction::create(queue, (), |state, _reference, text: String| *state += 1)
/// }
/// ```
///
/// - Invocations of one sender run in the order in which it sent them; two actions on one serial
///   queue never overlap.
/// - `R` is the owner's reference memory (`GetReference`): given at creation, lent to the method
///   and to the owner, dropped with the action. Nobody else can reach it.
/// - The action holds its target from [`create`](Self::create) until it is cancelled or its owner
///   is dropped. A target that owns its action and is held by nobody else is therefore kept alive
///   until somebody cancels; a driver's own state ends with the driver, and its actions with it.
/// - Dropping the owner ends the action, as `cancel` does without a handler; doing so inside the
///   action's own method is safe.
pub struct OSAction<A: Results, R: Send + 'static = ()> {
    core: Arc<Core<A>>,
    reference: Arc<Mutex<R>>,
}

/// Somebody's turn to wait for an action, from [`OSAction::will_wait`]. Dropping it is
/// [`end_wait`](Self::end_wait).
pub struct ActionWait<A: Results> {
    core: Arc<Core<A>>,
}

type Method<A> = Box<dyn FnMut(A) + Send>;

struct Core<A: Results> {
    state: Mutex<State<A>>,
    /// An invocation has ended, or none will.
    changed: Condvar,
}

/// Invariant: `queue` and `method` go together, at the cancel; while the method runs it is not
/// in its place.
struct State<A: Results> {
    queue: Option<abi::Queue>,
    method: Option<Method<A>>,
    /// Invocations that were not run.
    dropped: u64,
    /// What all others share; dead when none is left.
    others: Weak<Handle<A>>,
    others_gone: bool,
    /// The aborted handler has run; it does so once, whatever handles are made later.
    told: bool,
    aborted_handler: Option<Box<dyn FnOnce() + Send>>,
    waiter: Option<Waiter>,
}

/// What happened since `will_wait` that no `wait` has reported yet.
#[derive(Default)]
struct Waiter {
    completed: u64,
    /// An invocation was dropped with its queue: there will be no more.
    unreachable: bool,
}

/// Why the lock of the state is never poisoned.
const NO_PANIC: &str = "no code of the driver runs under an action's lock";

/// The longest sleep of a waiter before it looks at its clock again, which may have been stepped,
/// or may be the virtual one of a test.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

impl<A: Results, R: Send + 'static> OSAction<A, R> {
    /// Makes an action that runs `method` on `queue`. `CreateAction...`.
    ///
    /// `method` gets the queue's state, the reference memory and the invocation's arguments.
    pub fn create<S: Send + 'static>(
        queue: &IODispatchQueue<S>,
        reference: R,
        mut method: impl FnMut(&mut S, &mut R, A) + Send + 'static,
    ) -> Result<Self> {
        let reference = Arc::new(Mutex::new(reference));
        let lent = reference.clone();
        let mut run = queue.handler(move |state, arguments, ()| {
            method(state, &mut lent.lock().unwrap_or_else(|poison| poison.into_inner()), arguments);
        });
        let core = Core {
            state: Mutex::new(State {
                queue: Some(queue.raw().clone()),
                method: Some(Box::new(move |arguments| run(arguments, ()))),
                dropped: 0,
                others: Weak::new(),
                others_gone: false,
                told: false,
                aborted_handler: None,
                waiter: None,
            }),
            changed: Condvar::new(),
        };
        Ok(Self { core: Arc::new(core), reference })
    }

    /// A handle for somebody else. Callable as often as needed.
    pub fn handle(&self) -> Action<A> {
        let mut state = self.core.state();
        let shared = state.others.upgrade().unwrap_or_else(|| {
            let shared = Arc::new(Handle { core: self.core.clone() });
            state.others = Arc::downgrade(&shared);
            state.others_gone = false;
            shared
        });
        drop(state);
        Action::new(shared)
    }

    /// Invokes the action, as its handles do: the method runs later, on the target's queue.
    ///
    /// Errors: `ABORTED` after cancel; the invocation is dropped and counted.
    pub fn invoke(&self, arguments: A) -> Result<()> {
        Ok(self.core.invoke(arguments, Completion::default())?)
    }

    /// Lends the reference memory. `GetReference`.
    ///
    /// On the target's queue, outside of the method, this never fails. Errors: `CANNOT_LOCK`
    /// while the method has it, or another thread.
    pub fn with_reference<T>(&self, look: impl FnOnce(&mut R) -> T) -> Result<T> {
        match self.reference.try_lock() {
            Ok(mut reference) => Ok(look(&mut reference)),
            Err(TryLockError::Poisoned(poison)) => Ok(look(&mut poison.into_inner())),
            Err(TryLockError::WouldBlock) => {
                Err(Error::new(IOReturn::CANNOT_LOCK, "the reference memory is in use"))
            }
        }
    }

    /// Ends the action: no further invocation starts, those that wait are dropped and counted, a
    /// waiter gets `ABORTED`, and the target is released. `done` runs on `queue` after an
    /// invocation in progress has returned.
    ///
    /// Callable from any thread, also inside the method. A second cancel only runs its `done`.
    pub fn cancel<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) {
        // When the target is released already, nothing of it runs that could be waited for.
        let target = self.core.end().unwrap_or_else(|| queue.raw().clone());
        let done = on(queue, done);
        target.dispatch_async(done);
    }

    /// Has `handler` run on `queue`, once, when every other holder has dropped its handle; a
    /// process that ends drops its handles. Invocations sent before have run by then.
    /// `SetAbortedHandler`.
    ///
    /// The latest handler stays. Set when they are gone already, it runs too, but not inside this
    /// call. It never runs after cancel, nor when no handle was ever made.
    pub fn set_aborted_handler<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        handler: impl FnOnce(&mut S) + Send + 'static,
    ) {
        let mut state = self.core.state();
        let old = state.aborted_handler.replace(Box::new(on(queue, handler)));
        let late = if state.others_gone { state.queue.clone() } else { None };
        drop(state);
        drop(old);
        if let Some(target) = late {
            let core = self.core.clone();
            target.dispatch_async(move || core.others_gone());
        }
    }

    /// Announces a wait, before the invocation that is to be waited for can happen. `WillWait`.
    ///
    /// Errors: `BUSY` while somebody else has the turn: there is one waiter at a time.
    pub fn will_wait(&self) -> Result<ActionWait<A>> {
        let mut state = self.core.state();
        if state.waiter.is_some() {
            return Err(Error::new(IOReturn::BUSY, "the action has a waiter already"));
        }
        state.waiter = Some(Waiter::default());
        Ok(ActionWait { core: self.core.clone() })
    }

    /// Invocations that were dropped: sent or still waiting when the action or its queue was
    /// cancelled.
    pub fn dropped(&self) -> u64 {
        self.core.state().dropped
    }
}

/// Code that runs on `queue`, from wherever it is called.
fn on<S: Send + 'static>(
    queue: &IODispatchQueue<S>,
    code: impl FnOnce(&mut S) + Send + 'static,
) -> impl FnOnce() + Send + 'static {
    let (raw, code) = (queue.raw().clone(), queue.completion(code));
    move || {
        if raw.on_queue() {
            code();
        } else {
            raw.dispatch_async(code);
        }
    }
}

impl<A: Results> ActionWait<A> {
    /// Waits until an invocation has ended that no earlier `wait` has reported; without a
    /// deadline, for as long as it takes.
    ///
    /// Blocks the calling thread: a thread of the driver's own, or that of another queue, which runs
    /// nothing else meanwhile; the host takes another thread for its other queues, up to 64 in all.
    /// In a rig, whose handlers all run on the test's thread, it is for another thread of the test.
    ///
    /// Errors: `ABORTED` when the action is cancelled, when every other holder is gone, or when
    /// its queue was cancelled; `TIMEOUT` at the deadline, a time on a clock in nanoseconds;
    /// `CANNOT_LOCK` on the action's own target queue, where the invocation could never run.
    pub fn wait(&self, deadline: Option<(IOTimerClock, u64)>) -> Result<()> {
        let target = self.core.state().queue.clone();
        let target = target.ok_or(IOReturn::ABORTED)?;
        if target.on_queue() {
            let why = "waiting for an action on its own queue would never end";
            return Err(Error::new(IOReturn::CANNOT_LOCK, why));
        }
        target.blocking(|| self.block(&target, deadline))?
    }

    fn block(&self, target: &abi::Queue, deadline: Option<(IOTimerClock, u64)>) -> Result<()> {
        let mut state = self.core.state();
        loop {
            if let Some(ended) = state.take_ended() {
                return Ok(ended?);
            }
            let nap = match deadline {
                None => None,
                Some((clock, at)) => {
                    let left = at.saturating_sub(target.now(clock as u64)?);
                    if left == 0 {
                        return Err(IOReturn::TIMEOUT.into());
                    }
                    Some(Duration::from_nanos(left).min(LOOK_AGAIN))
                }
            };
            state = match nap {
                None => self.core.changed.wait(state).expect(NO_PANIC),
                Some(nap) => self.core.changed.wait_timeout(state, nap).expect(NO_PANIC).0,
            };
        }
    }

    /// Gives the turn back. `EndWait`.
    ///
    /// Errors: `ABORTED` as [`wait`](Self::wait) would say it; the turn is given back all the
    /// same.
    pub fn end_wait(self) -> Result<()> {
        let aborted = self.core.state().is_aborted();
        if aborted { Err(IOReturn::ABORTED.into()) } else { Ok(()) }
    }
}

impl<A: Results> Drop for ActionWait<A> {
    fn drop(&mut self) {
        self.core.state().waiter = None;
    }
}

impl<A: Results> State<A> {
    fn is_aborted(&self) -> bool {
        let unreachable = self.waiter.as_ref().is_some_and(|waiter| waiter.unreachable);
        self.queue.is_none() || self.others_gone || unreachable
    }

    /// What a waiter is to be told, if it is to be told something. What was completed comes first.
    fn take_ended(&mut self) -> Option<Result<(), IOReturn>> {
        let is_aborted = self.is_aborted();
        let waiter = self.waiter.as_mut().expect("there while its token is");
        if waiter.completed > 0 {
            waiter.completed -= 1;
            return Some(Ok(()));
        }
        is_aborted.then_some(Err(IOReturn::ABORTED))
    }
}

impl<A: Results> Core<A> {
    fn invoke(self: &Arc<Self>, arguments: A, completion: Completion) -> Result<(), IOReturn> {
        let mut state = self.state();
        let Some(queue) = state.queue.clone() else {
            state.dropped += 1;
            return Err(IOReturn::ABORTED);
        };
        drop(state);
        let core = self.clone();
        let invocation = Invocation { core, arguments: Some(arguments), _completion: completion };
        queue.dispatch_async(move || invocation.run());
        Ok(())
    }
}

impl<A: Results> Core<A> {
    fn state(&self) -> MutexGuard<'_, State<A>> {
        self.state.lock().expect(NO_PANIC)
    }

    /// Lets go of the target. Its queue, if it was there.
    fn end(&self) -> Option<abi::Queue> {
        let mut state = self.state();
        let queue = state.queue.take();
        let gone = (state.method.take(), state.aborted_handler.take());
        drop(state);
        self.changed.notify_all();
        // Not under the lock: it can own anything, also other actions.
        drop(gone);
        queue
    }

    /// No handle is left, or none was when the handler was set. On the target's queue.
    fn others_gone(&self) {
        let mut state = self.state();
        if state.others.strong_count() > 0 {
            // The owner made another one meanwhile.
            return;
        }
        state.others_gone = true;
        let handler = if state.told { None } else { state.aborted_handler.take() };
        state.told |= handler.is_some();
        drop(state);
        self.changed.notify_all();
        if let Some(handler) = handler {
            handler();
        }
    }
}

/// One invocation on its way through the target's queue. Dropped before it ran, it counts.
struct Invocation<A: Results> {
    core: Arc<Core<A>>,
    arguments: Option<A>,
    /// The last field: whoever is told finds everything done.
    _completion: Completion,
}

impl<A: Results> Invocation<A> {
    fn run(mut self) {
        let Some(method) = self.core.state().method.take() else { return };
        let Some(arguments) = self.arguments.take() else { return };
        let mut running = Running { core: &self.core, method: Some(method) };
        if let Some(method) = &mut running.method {
            method(arguments);
        }
    }
}

impl<A: Results> Drop for Invocation<A> {
    fn drop(&mut self) {
        if self.arguments.is_some() {
            let mut state = self.core.state();
            state.dropped += 1;
            if let Some(waiter) = &mut state.waiter {
                waiter.unreachable = true;
            }
            drop(state);
            self.core.changed.notify_all();
        }
    }
}

/// Puts the method back when it has returned or panicked, unless the action ended meanwhile.
struct Running<'a, A: Results> {
    core: &'a Core<A>,
    method: Option<Method<A>>,
}

impl<A: Results> Drop for Running<'_, A> {
    fn drop(&mut self) {
        let mut state = self.core.state();
        if state.queue.is_some() {
            state.method = self.method.take();
        }
        if let Some(waiter) = &mut state.waiter {
            waiter.completed += 1;
        }
        drop(state);
        self.core.changed.notify_all();
        // A method that was cancelled goes with `self`, after the lock.
    }
}

/// What all handles of an action share.
struct Handle<A: Results> {
    core: Arc<Core<A>>,
}

impl<A: Results> ActionTarget for Handle<A> {
    fn invoke(&self, arguments: Arguments, completion: Completion) -> Result<(), IOReturn> {
        self.core.invoke(A::from_arguments(arguments)?, completion)
    }
}

impl<A: Results> Drop for Handle<A> {
    fn drop(&mut self) {
        let queue = self.core.state().queue.clone();
        if let Some(queue) = queue {
            // Behind the invocations that were sent before.
            let core = self.core.clone();
            queue.dispatch_async(move || core.others_gone());
        }
    }
}

impl<A: Results, R: Send + 'static> Drop for OSAction<A, R> {
    fn drop(&mut self) {
        self.core.end();
    }
}

impl<A: Results, R: Send + 'static> fmt::Debug for OSAction<A, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.core.state();
        f.debug_struct("OSAction")
            .field("queue", &state.queue)
            .field("dropped", &state.dropped)
            .finish_non_exhaustive()
    }
}

impl<A: Results> fmt::Debug for ActionWait<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ActionWait")
    }
}
