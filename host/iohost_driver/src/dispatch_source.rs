//! What interrupt, timer and data queue sources have in common.

use crate::abi::{self, Source as _};
use crate::{IODispatchQueue, Result};

/// `IODispatchSource`: something that has a handler run on a queue, from its creation until it is
/// cancelled or dropped.
///
/// Every method can be called from any thread. One contract holds for all sources, which is more
/// than DriverKit's promise: a completion runs exactly once, later, on the source's queue.
pub trait IODispatchSource: HostSource {
    /// Enables or disables delivery. What happens meanwhile is kept or lost as the source's own
    /// documentation says. `SetEnable`.
    ///
    /// Errors: `UNSUPPORTED` for a change after cancel.
    fn set_enable(&self, enable: bool) -> Result<()> {
        Ok(self.source().set_enable(enable, None::<fn()>)?)
    }

    /// As [`set_enable`](Self::set_enable), and `done` runs once on the queue after a handler in
    /// flight has returned; also when nothing changed. `queue` is the one given to `create`.
    /// `SetEnableWithCompletion`.
    fn set_enable_with_completion<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        enable: bool,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) -> Result<()> {
        Ok(self.source().set_enable(enable, Some(queue.completion(done)))?)
    }

    /// Ends the source. `done` runs on the queue once no handler runs or will run. What was not
    /// delivered is lost, and a thread in [`wait_for_work`](Self::wait_for_work) is told
    /// `ABORTED`. A second call runs its own `done`. `Cancel`.
    fn cancel<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) {
        self.source().cancel(queue.completion(done));
    }

    /// Looks now whether something has happened, and if so has the handler called: on the queue,
    /// never inside this call. `CheckForWork`.
    ///
    /// Errors: `NOT_READY` when there is nothing to deliver, or the source is disabled or
    /// cancelled.
    fn check_for_work(&self) -> Result<()> {
        Ok(self.source().check_for_work()?)
    }

    /// Waits for the next delivery, and so for an event if there is none; returns when its handler
    /// has. Nothing is delivered while the source is disabled, and this waits on. `CheckForWork`
    /// with `synchronous`.
    ///
    /// Errors: `ABORTED` once the source or its queue is cancelled; `NOT_PERMITTED` on the
    /// source's queue, which the handler needs; `BUSY` while another thread waits, as only one
    /// may.
    fn wait_for_work(&self) -> Result<()> {
        Ok(self.source().wait_for_work()?)
    }
}

/// The host's end of a source; nobody else makes any.
pub trait HostSource {
    type Source: abi::Source;

    fn source(&self) -> &Self::Source;
}
