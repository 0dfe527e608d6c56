//! A call in flight: the side that answers holds a [`Reply`], the side that asked an [`Answer`].

use std::fmt;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::{Arguments, IOReturn, Results};

/// The answer a driver owes to one caller.
///
/// Answered at most once, by [`complete`](Self::complete) or [`fail`](Self::fail), from any
/// thread; dropped without either, the caller is told `ABORTED`. So a caller is always answered.
#[must_use = "dropping a reply tells the caller ABORTED"]
pub struct Reply<T> {
    sink: Option<Box<dyn ReplySink>>,
    results: PhantomData<fn(T)>,
}

/// Where an answer goes: a session's socket, or a waiting test.
pub trait ReplySink: Send {
    /// Delivers the answer. Called once.
    fn deliver(self: Box<Self>, answer: Result<Arguments, IOReturn>);

    /// Memory that the caller has offered. See [`Reply::client_memory`].
    fn client_memory(&self, _memory: u64) -> Result<ClientFile, IOReturn> {
        Err(IOReturn::UNSUPPORTED)
    }
}

/// Memory of a client's: a file that is sealed against changes of its length.
#[derive(Debug)]
pub struct ClientFile {
    /// The file.
    pub file: OwnedFd,
    /// Its bytes.
    pub len: u64,
    /// Whether it is for reading only.
    pub read_only: bool,
}

impl<T: Results> Reply<T> {
    /// A reply whose answer goes to `sink`.
    pub fn new(sink: Box<dyn ReplySink>) -> Self {
        Self { sink: Some(sink), results: PhantomData }
    }

    /// Answers with results.
    pub fn complete(self, results: T) {
        self.answer(Ok(results.into_arguments()));
    }

    /// Answers with a status. `SUCCESS` is no failure and becomes `INTERNAL_ERROR`.
    pub fn fail(self, status: IOReturn) {
        let failed = if status == IOReturn::SUCCESS { IOReturn::INTERNAL_ERROR } else { status };
        self.answer(Err(failed));
    }

    /// Answers with whichever it is.
    pub fn finish(self, result: Result<T, IOReturn>) {
        match result {
            Ok(results) => self.complete(results),
            Err(status) => self.fail(status),
        }
    }

    /// Memory that the caller has offered in its session, by the number that it gave it.
    ///
    /// Errors: `NOT_FOUND` for a number without memory; `NOT_READY` when the caller is gone;
    /// `NO_RESOURCES` when no descriptor is left; `UNSUPPORTED` for a caller without a session.
    pub fn client_memory(&self, memory: u64) -> Result<ClientFile, IOReturn> {
        let sink = self.sink.as_ref().expect("taken by what consumes the reply");
        sink.client_memory(memory)
    }

    fn answer(mut self, answer: Result<Arguments, IOReturn>) {
        if let Some(sink) = self.sink.take() {
            sink.deliver(answer.and_then(|arguments| arguments.check().map(|()| arguments)));
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let Some(sink) = self.sink.take() {
            sink.deliver(Err(IOReturn::ABORTED));
        }
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("owed", &self.sink.is_some()).finish()
    }
}

/// Where calls go: a session with a driver host, or a driver in the same process.
pub trait Caller: Send + Sync {
    /// Sends a call; the answer is had from what comes back, in any order with other calls.
    fn call(&self, selector: u64, arguments: Arguments) -> Box<dyn PendingAnswer>;
}

/// The answer to one call, as the transport sees it.
pub trait PendingAnswer: Send {
    /// The answer, if it is there. After the first answer: `NOT_READY` for ever.
    fn poll(&mut self) -> Option<Result<Arguments, IOReturn>>;

    /// As [`poll`](Self::poll), for a task: if there is no answer yet, `context` is woken when it
    /// comes. Only the latest task is.
    fn poll_task(&mut self, context: &mut Context<'_>) -> Poll<Result<Arguments, IOReturn>>;

    /// Waits for the answer; `TIMEOUT` after `timeout`, with the call still under way.
    fn wait(&mut self, timeout: Option<Duration>) -> Result<Arguments, IOReturn>;
}

/// The answer to a call that a client made.
///
/// A task can await it, on any executor: whoever delivers the answer wakes the task. The call is
/// under way in any case.
pub struct Answer<T> {
    pending: Box<dyn PendingAnswer>,
    results: PhantomData<fn() -> T>,
}

impl<T: Results> Answer<T> {
    /// An answer that comes from `pending`.
    pub fn new(pending: Box<dyn PendingAnswer>) -> Self {
        Self { pending, results: PhantomData }
    }

    /// The answer, if it is there; never blocks.
    pub fn poll(&mut self) -> Option<Result<T, IOReturn>> {
        let answer = self.pending.poll()?;
        Some(answer.and_then(T::from_arguments))
    }

    /// Waits for the answer for as long as it takes. `OFFLINE` when the driver is gone.
    pub fn wait(mut self) -> Result<T, IOReturn> {
        self.pending.wait(None).and_then(T::from_arguments)
    }

    /// Waits for the answer; `TIMEOUT` when none came in time. The answer can still be had later.
    pub fn wait_for(&mut self, timeout: Duration) -> Result<T, IOReturn> {
        self.pending.wait(Some(timeout)).and_then(T::from_arguments)
    }
}

impl<T: Results> IntoFuture for Answer<T> {
    type Output = Result<T, IOReturn>;
    type IntoFuture = AnswerFuture<T>;

    fn into_future(self) -> AnswerFuture<T> {
        AnswerFuture(self)
    }
}

/// An [`Answer`] that a task awaits. Dropping it does not take the call back.
#[derive(Debug)]
pub struct AnswerFuture<T>(Answer<T>);

impl<T: Results> Future for AnswerFuture<T> {
    type Output = Result<T, IOReturn>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = self.0.pending.poll_task(context);
        answer.map(|answer| answer.and_then(T::from_arguments))
    }
}

impl<T> fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answer")
    }
}

/// A client type that `interface!` made.
pub trait InterfaceClient {
    /// The interface's name.
    const NAME: &'static str;

    /// The interface in the text form of [`Description`](crate::Description).
    fn description() -> String;

    /// The client that sends its calls to `caller`.
    fn new(caller: Arc<dyn Caller>) -> Self;
}

/// A sink and the pending answer it fills, for two ends in one process.
pub fn answer_pair() -> (Box<dyn ReplySink>, Box<dyn PendingAnswer>) {
    let slot = Arc::new(Slot { content: Mutex::default(), filled: Condvar::new() });
    (Box::new(SlotSink(slot.clone())), Box::new(SlotAnswer(slot)))
}

struct Slot {
    content: Mutex<SlotContent>,
    filled: Condvar,
}

#[derive(Default)]
struct SlotContent {
    answer: Option<Result<Arguments, IOReturn>>,
    /// The task that waits for it.
    task: Option<Waker>,
}

struct SlotSink(Arc<Slot>);

impl ReplySink for SlotSink {
    fn deliver(self: Box<Self>, answer: Result<Arguments, IOReturn>) {
        let mut content = self.0.content.lock().expect(NO_PANIC);
        content.answer = Some(answer);
        let task = content.task.take();
        drop(content);
        self.0.filled.notify_all();
        if let Some(task) = task {
            task.wake();
        }
    }
}

struct SlotAnswer(Arc<Slot>);

/// Why the slot's lock is never poisoned.
const NO_PANIC: &str = "no code that can panic runs under this lock";

impl PendingAnswer for SlotAnswer {
    fn poll(&mut self) -> Option<Result<Arguments, IOReturn>> {
        self.0.content.lock().expect(NO_PANIC).answer.take()
    }

    fn poll_task(&mut self, context: &mut Context<'_>) -> Poll<Result<Arguments, IOReturn>> {
        // Made first: cloning a waker is the executor's code, which does not run under the lock.
        let task = context.waker().clone();
        let mut content = self.0.content.lock().expect(NO_PANIC);
        let (answer, unused) = match content.answer.take() {
            Some(answer) => (Poll::Ready(answer), Some(task)),
            None => (Poll::Pending, content.task.replace(task)),
        };
        drop(content);
        drop(unused);
        answer
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<Arguments, IOReturn> {
        // A time that no clock reaches is as long as it takes.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut content = self.0.content.lock().expect(NO_PANIC);
        loop {
            if let Some(answer) = content.answer.take() {
                return answer;
            }
            content = match deadline {
                None => self.0.filled.wait(content).expect(NO_PANIC),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(IOReturn::TIMEOUT);
                    }
                    self.0.filled.wait_timeout(content, left).expect(NO_PANIC).0
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::task::Wake;

    use super::*;

    #[test]
    fn a_reply_that_is_dropped_tells_its_caller() {
        let (sink, pending) = answer_pair();
        drop(Reply::<u32>::new(sink));
        assert_eq!(Answer::<u32>::new(pending).poll(), Some(Err(IOReturn::ABORTED)));
    }

    #[test]
    fn an_answer_can_be_awaited_and_its_delivery_wakes_the_task() {
        struct Count(AtomicUsize);
        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Relaxed);
            }
        }
        let woken = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(woken.clone());
        let mut context = Context::from_waker(&waker);

        let (sink, pending) = answer_pair();
        let mut answer = pin!(Answer::<u32>::new(pending).into_future());
        assert_eq!(answer.as_mut().poll(&mut context), Poll::Pending);
        assert_eq!(answer.as_mut().poll(&mut context), Poll::Pending);
        assert_eq!(woken.0.load(Relaxed), 0);
        Reply::<u32>::new(sink).complete(7);
        assert_eq!(woken.0.load(Relaxed), 1, "once, for the latest poll");
        assert_eq!(answer.as_mut().poll(&mut context), Poll::Ready(Ok(7)));
    }

    #[test]
    fn a_result_that_is_too_long_becomes_an_error_for_the_caller() {
        let (sink, pending) = answer_pair();
        Reply::<Vec<u8>>::new(sink).complete(vec![0; Arguments::LONGEST_STRUCTURE + 1]);
        assert_eq!(Answer::<Vec<u8>>::new(pending).wait(), Err(IOReturn::MESSAGE_TOO_LARGE));
    }
}
