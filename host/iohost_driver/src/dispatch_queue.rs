//! Serial queues that own their state.

use std::fmt;
use std::sync::Arc;

use iohost_interface::IOReturn;
use spin::mutex::{SpinMutex, SpinMutexGuard};

use crate::{IOTimerClock, Result, abi};

/// `IODispatchQueue`: runs work in order, one item at a time, and owns the state it works on.
///
/// Work gets `&mut S`, so nothing else can be running on the state. A driver's default queue owns
/// the driver; other queues are made with [`create`](Self::create). A value of this type is a
/// handle; clones are the same queue.
///
/// Priorities do not exist: DriverKit's `priority` argument has to be 0 there and is left out here.
pub struct IODispatchQueue<S: 'static = ()> {
    queue: abi::KeepingQueue<QueueState<S>>,
    name: Arc<str>,
}

/// The name of a driver's default queue. `kIOServiceDefaultQueueName`.
const DEFAULT_NAME: &str = "Default";

/// The state of a queue; `None` before a driver's `start` returned and after it was stopped.
///
/// The lock is never waited for: the queue is serial. So it is the cheapest there is. It turns the
/// promise "one thread at a time" and the rule "not twice on that thread" into something the compiler believes.
pub(crate) struct QueueState<S>(SpinMutex<Option<S>>);

impl<S: Send + 'static> IODispatchQueue<S> {
    /// Makes a queue beside another one, on the same engine, with its own state. Serial, FIFO.
    ///
    /// Errors: `BAD_ARGUMENT` for a name of more than 255 bytes.
    pub fn create<T: Send>(beside: &IODispatchQueue<T>, name: &str, state: S) -> Result<Self> {
        Ok(Self::with(abi::Queue::create(beside.raw(), name, 0, 0)?, name, Some(state)))
    }

    /// A driver's default queue, whose state is set later.
    pub(crate) fn without_state(raw: abi::Queue) -> Self {
        Self::with(raw, DEFAULT_NAME, None)
    }

    fn with(raw: abi::Queue, name: &str, state: Option<S>) -> Self {
        let queue = abi::KeepingQueue::new(raw, QueueState(SpinMutex::new(state)));
        Self { queue, name: name.into() }
    }

    /// The name it was made with; a driver's default queue is called `Default`. `GetName`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the calling thread is running work of this queue, also further out.
    pub fn on_queue(&self) -> bool {
        self.raw().on_queue()
    }

    /// Appends work and returns; it never runs inside this call. `DispatchAsync`.
    ///
    /// Callable from any thread. After [`cancel`](Self::cancel), or when the state is gone, the
    /// work is dropped unrun.
    pub fn dispatch_async(&self, block: impl FnOnce(&mut S) + Send + 'static) {
        self.queue.dispatch_async(move |state| {
            let _ = state.enter(block);
        });
    }

    /// Runs work in its turn, on the calling thread, and returns what it returns. `DispatchSync`
    /// and `RunAction`.
    ///
    /// Errors: `CANNOT_LOCK` when the calling thread is already running work of this queue (it
    /// has the state), `ABORTED` when the queue is cancelled first, `NOT_READY` when the state is
    /// not there.
    pub fn dispatch_sync<R>(&self, block: impl FnOnce(&mut S) -> R) -> Result<R> {
        let state = self.state();
        Ok(self.raw().dispatch_sync(|| state.enter(block))??)
    }

    /// Stops the queue: no further work starts; `done` runs after the work in progress, last.
    ///
    /// Callable from any thread, including this queue. Cancelling twice runs the second `done`
    /// too. After `done`, no handler of any source aimed at this queue runs again.
    pub fn cancel(&self, done: impl FnOnce(&mut S) + Send + 'static) {
        let state = self.state().clone();
        self.raw().cancel(move || {
            let _ = state.enter(done);
        });
    }

    /// Says that the work in progress on this queue is getting on. Any thread, any time.
    ///
    /// A driver whose handler runs longer than the daemon's limit (2 s unless it is configured
    /// otherwise) counts as hung and is started anew. Work that takes longer on purpose calls this
    /// now and then; the daemon has a cap for all of it (60 s), which nothing extends. No call of
    /// DriverKit's; costs a few nanoseconds.
    pub fn report_progress(&self) {
        self.raw().report_progress();
    }

    /// The time on a clock as this queue's timers see it, in the clock's unit (all are
    /// nanoseconds here); a test's virtual time in a test.
    pub fn now(&self, clock: IOTimerClock) -> u64 {
        self.raw().now(clock as u64).expect("the host knows every clock of the enum")
    }

    pub(crate) fn raw(&self) -> &abi::Queue {
        self.queue.queue()
    }

    fn state(&self) -> &Arc<QueueState<S>> {
        self.queue.value()
    }

    /// An event handler that enters the state.
    pub(crate) fn handler<A, B>(
        &self,
        mut handler: impl FnMut(&mut S, A, B) + Send + 'static,
    ) -> impl FnMut(A, B) + Send + 'static {
        let state = self.state().clone();
        move |first, second| {
            let _ = state.enter(|state| handler(state, first, second));
        }
    }

    /// A completion that enters the state.
    pub(crate) fn completion(
        &self,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) -> impl FnOnce() + Send + 'static {
        let state = self.state().clone();
        move || {
            let _ = state.enter(done);
        }
    }

    /// Puts the state in place, or takes it away. On the queue, outside of any work with it.
    pub(crate) fn replace_state(&self, state: Option<S>) -> Option<S> {
        let mut place = self.state().lock().ok()?;
        std::mem::replace(&mut *place, state)
    }

    /// Runs code with the state, on the queue.
    pub(crate) fn enter<R>(&self, code: impl FnOnce(&mut S) -> R) -> Result<R, IOReturn> {
        self.state().enter(code)
    }
}

impl<S> QueueState<S> {
    fn enter<R>(&self, code: impl FnOnce(&mut S) -> R) -> Result<R, IOReturn> {
        let mut state = self.lock()?;
        Ok(code(state.as_mut().ok_or(IOReturn::NOT_READY)?))
    }

    /// A handler that panicked halfway leaves the state as it was then: `stop` still has to run.
    fn lock(&self) -> Result<SpinMutexGuard<'_, Option<S>>, IOReturn> {
        self.0.try_lock().ok_or(IOReturn::CANNOT_LOCK)
    }
}

impl<S> Clone for IODispatchQueue<S> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), name: self.name.clone() }
    }
}

impl<S> fmt::Debug for IODispatchQueue<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IODispatchQueue").field(&self.name).finish()
    }
}
