//! A call in flight: the side that answers holds a [`Reply`], the side that asked an [`Answer`].

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Condvar, Mutex};
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

    /// Waits for the answer; `TIMEOUT` after `timeout`, with the call still under way.
    fn wait(&mut self, timeout: Option<Duration>) -> Result<Arguments, IOReturn>;
}

/// The answer to a call that a client made.
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

impl<T> fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answer")
    }
}

/// A client type that `interface!` made.
pub trait InterfaceClient {
    /// The interface's name.
    const NAME: &'static str;

    /// The client that sends its calls to `caller`.
    fn new(caller: Arc<dyn Caller>) -> Self;
}

/// A sink and the pending answer it fills, for two ends in one process.
pub fn answer_pair() -> (Box<dyn ReplySink>, Box<dyn PendingAnswer>) {
    let slot = Arc::new(Slot { answer: Mutex::new(None), filled: Condvar::new() });
    (Box::new(SlotSink(slot.clone())), Box::new(SlotAnswer(slot)))
}

struct Slot {
    answer: Mutex<Option<Result<Arguments, IOReturn>>>,
    filled: Condvar,
}

struct SlotSink(Arc<Slot>);

impl ReplySink for SlotSink {
    fn deliver(self: Box<Self>, answer: Result<Arguments, IOReturn>) {
        *self.0.answer.lock().expect(NO_PANIC) = Some(answer);
        self.0.filled.notify_all();
    }
}

struct SlotAnswer(Arc<Slot>);

/// Why the slot's lock is never poisoned.
const NO_PANIC: &str = "no code that can panic runs under this lock";

impl PendingAnswer for SlotAnswer {
    fn poll(&mut self) -> Option<Result<Arguments, IOReturn>> {
        self.0.answer.lock().expect(NO_PANIC).take()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<Arguments, IOReturn> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut answer = self.0.answer.lock().expect(NO_PANIC);
        loop {
            if let Some(answer) = answer.take() {
                return answer;
            }
            answer = match deadline {
                None => self.0.filled.wait(answer).expect(NO_PANIC),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(IOReturn::TIMEOUT);
                    }
                    self.0.filled.wait_timeout(answer, left).expect(NO_PANIC).0
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_that_is_dropped_tells_its_caller() {
        let (sink, pending) = answer_pair();
        drop(Reply::<u32>::new(sink));
        assert_eq!(Answer::<u32>::new(pending).poll(), Some(Err(IOReturn::ABORTED)));
    }

    #[test]
    fn a_result_that_is_too_long_becomes_an_error_for_the_caller() {
        let (sink, pending) = answer_pair();
        Reply::<Vec<u8>>::new(sink).complete(vec![0; Arguments::LONGEST_STRUCTURE + 1]);
        assert_eq!(Answer::<Vec<u8>>::new(pending).wait(), Err(IOReturn::MESSAGE_TOO_LARGE));
    }
}
