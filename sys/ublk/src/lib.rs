//! Block devices of the kernel's that a process serves: ublk.
//!
//! A [`UblkDevice`] is `/dev/ublkbN`, for whatever uses a disk. Its life:
//!
//! 1. [`UblkDevice::add`] makes it, without a block device yet.
//! 2. The thread that will serve takes its [`Queue`].
//! 3. Another thread calls [`start`](UblkDevice::start) and has the block device when that
//!    returns: meanwhile the kernel looks for partitions, and what it reads has to be served.
//! 4. [`stop`](UblkDevice::stop) takes the block device away, after what is under way has ended.
//!    The queue is over then; when it is dropped, [`remove`](UblkDevice::remove) undoes `add`.
//!
//! A process that dies leaves a device that is stopped and not removed, for
//! [`UblkDevice::find`] and `remove`.
//!
//! Bytes go by reading and writing the queue's file ([`Queue::file`], `UBLK_F_USER_COPY`), so that
//! the kernel never has an address in this process.
//!
//! Source: Linux, `Documentation/block/ublk.rst` and `include/uapi/linux/ublk_cmd.h`. Needs
//! Linux 6.4.

mod control;
mod device;
mod error;
mod queue;

pub use device::{Properties, UblkDevice};
pub use error::UblkError;
pub use queue::{Asked, Order, Queue};
