//! The library for programs that use a driver.
//!
//! ```no_run
//! # iohost_interface::interface! {
//! #     pub interface adder;
//! #     methods { 0 => fn add(a: u32, b: u32) -> u32; }
//! #     queues { 0 => UPLOAD: ToDriver; }
//! # }
//! # mod adder_api { pub use super::{Client, UPLOAD}; }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use iohost_client::{DEFAULT_SOCKET, Daemon};
//!
//! let mut daemon = Daemon::connect(DEFAULT_SOCKET)?;
//! let session = daemon.open("adder")?;
//!
//! let adder = session.client::<adder_api::Client>()?;
//! assert_eq!(adder.add(1, 2).wait()?, 3);
//!
//! let mut upload = session.producer(adder_api::UPLOAD)?;
//! upload.send(b"an entry")?;
//! # Ok(())
//! # }
//! ```
//!
//! Nothing here needs a runtime. What blocks has a form for tasks beside it: [`AsyncDaemon`],
//! [`Session::map_memory_async`], [`QueueProducer::send_async`], [`QueueConsumer::receive_async`],
//! [`OSAction::next_async`]; the answer to a call can be awaited. Any executor runs them. For a
//! loop of your own, [`queue`] says how to wait on a descriptor.
//!
//! [`OSAction`] is for what a driver has to say unasked: pass its handle with a call, take what the
//! driver invokes it with.
//!
//! [`Daemon`] is a connection to the daemon; every method of it blocks until it is answered.
//! [`Session`] is a conversation with one driver: typed calls over a socket, entries through rings
//! in shared memory. The daemon is not in between. When the driver dies, the session waits for the
//! next one; what becomes of what was under way is said at [`Session`]. When the service is over,
//! every call that waits and every wait on a ring ends with `OFFLINE`, and the wait for an action that
//! only this driver held with `ABORTED`. [`Daemon::watch`] tells why, and when it runs again.

#![forbid(unsafe_code)]

mod action;
mod calls;
mod daemon;
mod error;
mod matching;
mod memory;
pub mod queue;
mod session;
mod watch;

pub use action::OSAction;
pub use daemon::{AsyncDaemon, DEFAULT_SOCKET, Daemon};
pub use error::ClientError;
pub use iohost_control::host::Failure;
pub use iohost_control::varlink;
pub use iohost_control::varlink::{BindOptions, EventKind, ServiceEvent};
pub use iohost_interface::Action;
pub use iohost_memory::ring::{Entry, QueueError, WaitError};
pub use matching::ServiceMatch;
pub use memory::{ClientMemory, NoAccess, OfferError, OfferedMemory};
pub use queue::{QueueConsumer, QueueProducer};
pub use session::{Session, WhenAway};
pub use watch::{AsyncServiceWatch, ServiceWatch};
