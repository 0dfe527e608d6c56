//! Why something about a device did not work.

use std::io;
use std::path::PathBuf;

/// Why something about a device did not work, with the values that made it fail.
///
/// [`next_step`](Self::next_step) says what a person can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UblkError {
    /// The kernel has no ublk, or it is not loaded.
    #[error("{} is not there: this kernel has no ublk, or has not loaded it", node.display())]
    Missing {
        /// The node.
        node: PathBuf,
    },
    /// This process may not use ublk.
    #[error("no permission on {}", node.display())]
    Permission {
        /// The node.
        node: PathBuf,
    },
    /// The kernel's ublk cannot read and write the bytes of requests by its file.
    #[error("this kernel's ublk has no user copy, which came with Linux 6.4")]
    TooOld,
    /// There is no device of that number.
    #[error("there is no ublk device {number}")]
    NoSuchDevice {
        /// The number.
        number: u32,
    },
    /// The block device is mounted, or somebody else has it for himself.
    #[error("{} is in use: mounted, or taken by another program", node.display())]
    InUse {
        /// Its node.
        node: PathBuf,
    },
    /// The kernel refused.
    #[error("{operation}: {source}")]
    Kernel {
        /// What was asked, with its values.
        operation: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl UblkError {
    /// What a person can do about it, as one sentence.
    pub fn next_step(&self) -> &'static str {
        match self {
            UblkError::Missing { .. } => {
                "load it (modprobe ublk_drv), or export the disk over NBD: iohost block export"
            }
            UblkError::Permission { .. } => "run this as root",
            UblkError::TooOld => "use a later kernel, or NBD: iohost block export",
            UblkError::NoSuchDevice { .. } => "see which there are: ls /dev/ublkc*",
            UblkError::InUse { .. } => "unmount it, and see who has it: fuser -vm",
            UblkError::Kernel { .. } => "read the kernel log (dmesg) for why the kernel refused",
        }
    }
}
