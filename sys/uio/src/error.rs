//! Why a call on a device failed.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Why a call on a device failed, with the values that made it fail.
///
/// [`next_step`](Self::next_step) says what a person can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UioError {
    /// Sysfs has no such device.
    #[error("there is no device at {}", sysfs.display())]
    NoSuchDevice {
        /// The folder that should be the device's.
        sysfs: PathBuf,
    },
    /// UIO has not taken the device.
    #[error("the device at {} is not bound to uio_pci_generic", sysfs.display())]
    NotBound {
        /// The device's folder.
        sysfs: PathBuf,
    },
    /// The device's node is not there.
    #[error("{} is not there", node.display())]
    NodeMissing {
        /// The node.
        node: PathBuf,
    },
    /// This process may not open a file of the device.
    #[error("no permission on {}", path.display())]
    Permission {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process has the device.
    #[error("{} is in use by another process", node.display())]
    Busy {
        /// The device's node.
        node: PathBuf,
    },
    /// The kernel says something unexpected of the device.
    #[error("{} says {text:?}, which is no list of BARs", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line that is wrong.
        text: String,
    },
    /// The device has no such BAR.
    #[error("the device has no BAR {index}")]
    NoSuchBar {
        /// The BAR asked for.
        index: u8,
    },
    /// An access that does not fit into its BAR, or that its kind of BAR does not have.
    #[error("{len} bytes at {offset:#x} of BAR {index}, which has {size:#x} bytes")]
    OutOfRange {
        /// The BAR.
        index: u8,
        /// First byte of the access.
        offset: u64,
        /// Bytes of the access.
        len: usize,
        /// Bytes of the BAR.
        size: u64,
    },
    /// A range that cannot be mapped.
    #[error("BAR {index} cannot be mapped at {start:#x}..{end:#x}")]
    NotMappable {
        /// The BAR.
        index: u8,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// The device would not answer, and the program would read what nobody wrote.
    #[error("accessing BAR {index}: memory decoding is off in the command register")]
    DecodingOff {
        /// The BAR.
        index: u8,
    },
    /// A write to a register by which the kernel has placed the device.
    #[error("writing {len} bytes at {offset:#x} of configuration space would move the device")]
    Moves {
        /// First byte of the write.
        offset: u16,
        /// Bytes of the write.
        len: usize,
    },
    /// The device has no interrupt line.
    #[error("the device has no interrupt line")]
    NoInterrupt,
    /// The kernel knows no way to reset the device alone.
    #[error("the kernel knows no way to reset the device alone")]
    NoReset,
    /// The kernel refused.
    #[error("{operation}")]
    Device {
        /// What was asked, with its values.
        operation: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl UioError {
    /// What a person can do about it, as one sentence.
    pub fn next_step(&self) -> String {
        match self {
            UioError::NoSuchDevice { .. } => {
                "list the devices that are there with `iohost devices`".to_owned()
            }
            UioError::NotBound { .. } | UioError::NodeMissing { .. } => {
                "load UIO (modprobe uio_pci_generic) and bind the device to it with `iohost bind`"
                    .to_owned()
            }
            UioError::Permission { path, .. } => {
                format!("run the iohost daemon as root, or give it the file: {}", path.display())
            }
            UioError::Busy { node } => {
                format!("stop the other process: fuser -v {}", node.display())
            }
            UioError::Malformed { .. } => "check that sysfs is mounted at /sys".to_owned(),
            UioError::NoInterrupt => "poll the device, or use VFIO and MSI".to_owned(),
            UioError::NoReset => "do without a reset, or use VFIO and its bus reset".to_owned(),
            _ => "read the kernel log (dmesg) for why the kernel refused".to_owned(),
        }
    }

    pub(crate) fn open(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            ErrorKind::NotFound => UioError::NodeMissing { node: path.to_owned() },
            ErrorKind::PermissionDenied => UioError::Permission { path: path.to_owned(), source },
            _ => UioError::device(format!("opening {}", path.display()))(source),
        }
    }

    pub(crate) fn device(operation: String) -> impl FnOnce(io::Error) -> Self {
        move |source| UioError::Device { operation, source }
    }
}
