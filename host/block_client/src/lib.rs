//! Disks for programs, whatever their driver.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use iohost_block::BlockDevice;
//! use iohost_client::Daemon;
//!
//! let mut daemon = Daemon::connect(iohost_client::DEFAULT_SOCKET)?;
//! let mut disk = BlockDevice::open(daemon.open("nvme0")?, 1)?;
//!
//! let mut block = vec![0; disk.info().block as usize];
//! disk.read(0, &mut block)?;
//! disk.write(4096, &block)?;
//! disk.flush()?;
//! # Ok(())
//! # }
//! ```
//!
//! [`BlockDevice`] reads and writes slices, in as many requests at a time as is good for speed; what
//! blocks has a form for tasks beside it. [`Pipeline`] has many operations under way at a time. Below
//! both is [`Requests`]: single requests, with their bytes
//! in memory that the device reaches in place, for who wants no copy or an order of its own. [`nbd`]
//! and [`ublk`] serve a disk to programs that know nothing of us.

#![forbid(unsafe_code)]

mod device;
pub mod nbd;
mod pipeline;
mod requests;
pub mod ublk;

pub use block_api::{Completion, Disk, Failure, Health, Operation, Request, Status};
pub use device::BlockDevice;
pub use pipeline::{Ended, Pipeline, Work};
pub use requests::Requests;

use iohost_client::{ClientError, NoAccess, WaitError};
use iohost_interface::IOReturn;
use iohost_ublk::UblkError;
use nix::errno::Errno;

/// Why a disk did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The disk, or its driver, says no.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// There is no disk of that number.
    #[error("there is no disk {disk}")]
    NoSuchDisk {
        /// The number.
        disk: u32,
    },
    /// A call was not answered as it should.
    #[error("asking for {what}: {status}")]
    Call {
        /// What was asked for.
        what: &'static str,
        /// What the driver said; `OFFLINE` when it has ended.
        status: IOReturn,
    },
    /// The session cannot be used so.
    #[error(transparent)]
    Session(#[from] ClientError),
    /// A data queue has ended, as its driver has.
    #[error("the driver's queue: {0}")]
    Queue(#[from] WaitError),
    /// The memory does not allow it.
    #[error("the session's memory: {0}")]
    Memory(#[from] NoAccess),
    /// The kernel does not want it as a block device.
    #[error(transparent)]
    Ublk(#[from] UblkError),
    /// The driver put something into its queue that is no completion, or one of a request that was
    /// not sent.
    #[error("the driver's queue has something that is no completion of ours")]
    Malformed,
}

impl BlockError {
    /// The number that a program is told which knows Linux's errors only.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            BlockError::Failed(failure) => match failure.status {
                Status::ReadOnly => Errno::EPERM,
                Status::OutOfRange => Errno::ENOSPC,
                Status::NotAligned | Status::Malformed => Errno::EINVAL,
                Status::Unsupported => Errno::EOPNOTSUPP,
                Status::Gone => Errno::ESHUTDOWN,
                _ => Errno::EIO,
            },
            BlockError::Queue(_) => Errno::ESHUTDOWN,
            _ => Errno::EIO,
        }
    }
}

/// Refuses what the driver would refuse in part.
fn check(disk: &Disk, offset: u64, length: u64) -> Result<(), Failure> {
    let (block, bytes) = (u64::from(disk.block), disk.bytes());
    if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
        let words = format!("{length} bytes at {offset} of a disk of blocks of {block} bytes");
        return Err(Failure::new(Status::NotAligned, words));
    }
    if offset.checked_add(length).is_none_or(|end| end > bytes) {
        let words = format!("{length} bytes at {offset} of {bytes} bytes");
        return Err(Failure::new(Status::OutOfRange, words));
    }
    Ok(())
}
