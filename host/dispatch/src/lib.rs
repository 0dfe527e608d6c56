//! The dispatch engine: serial queues and the sources that feed them.
//!
//! An [`Engine`] is a few worker threads that wait on one epoll set. A [`Queue`] is a list of
//! work that is run by at most one thread at a time; a source turns events of the kernel into
//! work on its queue: [`DescriptorSource`] a descriptor that became readable, [`InterruptSource`]
//! a counted event with a time, [`BellSource`] a notification of another process, [`TimerSource`] a
//! deadline. Queues and sources are values, not
//! threads: ten thousand idle ones cost memory and nothing else.
//!
//! The rules are those of DriverKit's IODispatchQueue and IODispatchSource; the SDK gives them
//! their names. This crate knows nothing of devices, plugins or sessions.
//!
//! # Who runs what
//!
//! Two workers wait in `epoll_wait` on one set, edge-triggered, so the kernel wakes one worker per
//! event and that worker runs the handler itself: an interrupt reaches its handler in two system
//! calls, the wait and the read of the count. The other workers are parked, and are woken for work
//! that comes from a thread; when none is parked, an eventfd of the same set wakes one that waits.

#![forbid(unsafe_code)]

mod baton;
mod bell;
mod clocks;
mod deadlines;
mod engine;
mod handler;
mod interrupt;
#[cfg(all(test, loom))]
mod loom_model;
mod numbers;
mod queue;
mod sleepers;
mod source;
mod step;
mod sync;
mod timer;
mod waiter;
mod watchlist;

pub use bell::BellSource;
pub use engine::{Engine, EngineClock};
pub use interrupt::{InterruptEvent, InterruptLine, InterruptSource};
pub use iohost_event::{Clock, Signal};
pub use numbers::{Latency, QueueNumbers};
pub use queue::{Owner, Queue, QueueOptions};
pub use source::DescriptorSource;
pub use timer::TimerSource;

/// A completion: runs once, on a source's queue.
pub type Block = Box<dyn FnOnce() + Send>;

/// Why the engine's locks are never poisoned.
const NO_PANIC: &str = "no foreign code runs under an engine lock";
