//! The seam between drivers and devices.
//!
//! [`DeviceBackend`] is all that the rest of iohost knows of a device. VFIO, UIO and vfio-user
//! implement it here, the fake of the testkit implements it beside its tests; a driver cannot
//! tell them apart, and neither can the driver host.

#![forbid(unsafe_code)]

mod access;
pub mod config_space;
pub mod conformance;
pub mod quiesce;
mod registers;
mod uio;
mod vfio;
mod vfio_user;

use std::fmt;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use iohost_interface::IOReturn;
use iohost_memory::SharedMemory;
use iohost_registers::MappedRegion;

pub use iohost_memory::iova::{IovaError, IovaSpace};
pub use iohost_pci::PciAddress;
pub use iohost_uio::UioError;
pub use iohost_vfio::{Access, VfioError};
pub use uio::UioBackend;
pub use vfio::VfioBackend;
pub use vfio_user::VfioUserBackend;

/// One PCI function, however it is reached.
///
/// All methods can be called from any thread; those that talk to the device can block for as
/// long as the device's transport does (microseconds for VFIO, a bounded wait for vfio-user).
pub trait DeviceBackend: Send + Sync + fmt::Debug {
    /// How the device is reached: one of [`conformance::BACKENDS`].
    fn kind(&self) -> &'static str;

    /// Whether the device reaches no memory but what [`dma_map`](Self::dma_map) gave it. Where it
    /// does not, nothing but the driver keeps it from the machine's memory.
    fn is_isolated(&self) -> bool;

    /// Where the device is, `None` for one that is on no bus.
    fn location(&self) -> Option<PciAddress> {
        None
    }

    /// Reads configuration space, 1, 2 or 4 bytes at their natural alignment.
    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), DeviceError>;

    /// Writes configuration space, 1, 2 or 4 bytes at their natural alignment.
    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), DeviceError>;

    /// Size and kind of a base address register, `None` where the device has no such BAR.
    /// 0–5 are the BARs, 6 is the expansion ROM.
    fn bar(&self, index: u8) -> Option<&BarInfo>;

    /// Reads a BAR, 1, 2, 4 or 8 bytes at their natural alignment, as one access.
    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) -> Result<(), DeviceError>;

    /// Writes a BAR, 1, 2, 4 or 8 bytes at their natural alignment, as one access.
    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError>;

    /// Maps part of one of the ranges that [`BarInfo::mappable`] names, from a page on.
    fn map_bar(&self, index: u8, range: Range<u64>) -> Result<MappedRegion, DeviceError>;

    /// How many vectors of this kind the device has; 0 where it has none.
    fn interrupt_count(&self, kind: InterruptKind) -> u32;

    /// Lets vector *n* signal `triggers[n]`, an eventfd. Replaces what was enabled before.
    ///
    /// An INTx line is masked by the host at each interrupt and stays so until
    /// [`unmask_intx`](Self::unmask_intx).
    fn enable_interrupts(
        &self,
        kind: InterruptKind,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError>;

    /// Has vectors `first..` of the kind that is enabled signal `triggers` instead of what they
    /// signalled, without disturbing the other vectors. The range was enabled before.
    fn change_triggers(
        &self,
        kind: InterruptKind,
        first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError>;

    /// Stops all interrupts of this kind. Nothing is signalled after it returns.
    fn disable_interrupts(&self, kind: InterruptKind) -> Result<(), DeviceError>;

    /// Lets the INTx line interrupt again.
    fn unmask_intx(&self) -> Result<(), DeviceError>;

    /// The I/O virtual addresses that may be mapped, in increasing order; none where the backend
    /// maps no memory at all.
    fn iova_ranges(&self) -> &[RangeInclusive<u64>];

    /// Lets the device reach all of `memory` at `iova`, which is page-aligned.
    fn dma_map(&self, iova: u64, memory: &SharedMemory) -> Result<(), DeviceError> {
        self.dma_map_part(iova, memory, 0..memory.len() as u64)
    }

    /// Lets the device reach a part of `memory`, bytes that begin on a page and are inside, at
    /// `iova`, which is page-aligned. An IOMMU gives it the rest of the last page too.
    fn dma_map_part(
        &self,
        iova: u64,
        memory: &SharedMemory,
        part: Range<u64>,
    ) -> Result<(), DeviceError>;

    /// Takes back a mapping made by [`dma_map`](Self::dma_map) or
    /// [`dma_map_part`](Self::dma_map_part), whole: `len` is its length.
    fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), DeviceError>;

    /// Stops interrupts and transfers and brings the device back to its state at power-on, as
    /// far as its own reset does that. Interrupts and bus mastering are off afterwards; memory
    /// that is mapped stays mapped.
    ///
    /// This is the first of [`resets`](Self::resets), without looking whether it worked;
    /// [`quiesce`](mod@quiesce) looks.
    fn reset(&self) -> Result<(), DeviceError>;

    /// The ways in which the device can be reset, the gentlest first; none where it cannot.
    fn resets(&self) -> Vec<Reset>;

    /// As [`reset`](Self::reset), in one of the ways of [`resets`](Self::resets). Never touches a
    /// device that is not ours.
    fn reset_by(&self, level: ResetLevel) -> Result<(), DeviceError>;

    /// How long a write that the device has posted may be on its way to memory once the device
    /// was forbidden to make more.
    fn posted_writes_take(&self) -> Duration {
        Duration::ZERO
    }

    /// Has an event of the device signal `trigger`, an eventfd, in place of what it signalled
    /// before; `false` where the backend never hears of it.
    fn watch(&self, event: DeviceEvent, trigger: BorrowedFd<'_>) -> Result<bool, DeviceError> {
        let _ = (event, trigger);
        Ok(false)
    }
}

/// What happens to a device that its driver did not cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceEvent {
    /// An error that the device did not correct itself: an uncorrectable error of PCI Express.
    Error,
    /// Somebody wants the device back, and waits until it is closed.
    RemovalRequested,
    /// It does not answer any more: it was pulled out, or its server has left.
    Gone,
}

/// A way to reset a device, and whom else it resets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reset {
    /// What is reset.
    pub level: ResetLevel,
    /// How, in the words of whoever does it (`flr`, `pm`, `bus`, `hot`), in the order in which it
    /// tries them; empty where it does not say.
    pub methods: Vec<String>,
    /// Every device that is reset, with whether it is ours; empty for the function alone.
    pub affected: Vec<(String, bool)>,
}

impl Reset {
    /// Of the function alone, by whatever means the other side has.
    pub fn of_function() -> Self {
        Self { level: ResetLevel::Function, methods: Vec::new(), affected: Vec::new() }
    }
}

/// What a reset resets. From the gentlest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResetLevel {
    /// The function alone.
    Function,
    /// Everything on its bus.
    Bus,
}

impl fmt::Display for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.level {
            ResetLevel::Function => "function reset",
            ResetLevel::Bus => "bus reset",
        })?;
        if !self.methods.is_empty() {
            write!(f, " ({})", self.methods.join(", "))?;
        }
        for (place, (address, is_ours)) in self.affected.iter().enumerate() {
            let before = if place == 0 { " with" } else { "," };
            let whose = if *is_ours { "" } else { " (not ours)" };
            write!(f, "{before} {address}{whose}")?;
        }
        Ok(())
    }
}

/// What a base address register covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BarInfo {
    /// Bytes.
    pub size: u64,
    /// The register's low bits, which name its type as `GetBARInfo` does: 0x00 memory 32 bit,
    /// 0x01 I/O ports, 0x04 memory 64 bit, 0x08 prefetchable.
    pub kind: u8,
    /// The byte ranges that can be mapped; empty where every access has to be a call.
    pub mappable: Vec<Range<u64>>,
}

/// The three ways in which a PCI function can interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InterruptKind {
    /// A level-triggered line, shared, masked after each interrupt.
    IntX,
    /// Message signalled.
    Msi,
    /// Message signalled with a table of vectors.
    MsiX,
}

impl fmt::Display for InterruptKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InterruptKind::IntX => "INTx",
            InterruptKind::Msi => "MSI",
            InterruptKind::MsiX => "MSI-X",
        })
    }
}

/// Why a device operation failed, with the values that made it fail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device has no such BAR, or it cannot be used that way.
    #[error("BAR {index} is not there")]
    NoSuchBar {
        /// The BAR asked for.
        index: u8,
    },
    /// An access that does not fit into its region, or has no natural alignment.
    #[error("{len} bytes at {offset:#x} of {region}, which has {size:#x} bytes")]
    Range {
        /// `configuration space` or `BAR n`.
        region: String,
        /// First byte of the access.
        offset: u64,
        /// Bytes of the access.
        len: usize,
        /// Bytes of the region.
        size: u64,
    },
    /// A range that the device does not offer for mapping.
    #[error("BAR {index} cannot be mapped at {start:#x}..{end:#x}")]
    NotMappable {
        /// The BAR asked for.
        index: u8,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// More vectors than the device has, or none of the kind.
    #[error("{asked} {kind} vectors of a device that has {available}")]
    NoSuchInterrupt {
        /// The kind asked for.
        kind: InterruptKind,
        /// Vectors asked for.
        asked: u32,
        /// Vectors the device has.
        available: u32,
    },
    /// A mapping for the device would lock more memory than this process may.
    #[error(
        "mapping {len:#x} bytes for the device needs {need} bytes of locked memory, \
         the limit is {have}"
    )]
    LockedMemory {
        /// Bytes of the mapping.
        len: u64,
        /// Bytes that would be locked then.
        need: u64,
        /// Bytes that may be locked.
        have: u64,
    },
    /// The backend maps no memory for the device.
    #[error("{backend} has no DMA: it maps no memory for the device, as no IOMMU is behind it")]
    NoDma {
        /// How the device is reached.
        backend: &'static str,
    },
    /// Unmapping what was not mapped like that.
    #[error("no mapping of {len:#x} bytes starts at iova {iova:#x}")]
    NotMapped {
        /// The address given.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// The device cannot be reset.
    #[error("the device cannot be reset: {reason}")]
    NoReset {
        /// Why not.
        reason: String,
    },
    /// The kernel or the device server refused.
    #[error("{operation}")]
    Refused {
        /// What was asked, with its values.
        operation: String,
        /// What came back.
        source: io::Error,
    },
    /// The device, its server or its slot is gone.
    #[error("the device is gone: {0}")]
    Gone(String),
    /// The device could not be brought into a state in which it can do no harm.
    #[error("the device is not fit to be used: {}", .0.how)]
    Quarantined(Box<quiesce::Quiesced>),
}

impl DeviceError {
    /// The status a driver sees.
    pub fn code(&self) -> IOReturn {
        match self {
            DeviceError::NoSuchBar { .. } => IOReturn::NOT_FOUND,
            DeviceError::Range { .. } => IOReturn::OVERRUN,
            DeviceError::NotMappable { .. } => IOReturn::UNSUPPORTED,
            DeviceError::NoSuchInterrupt { .. } => IOReturn::NO_INTERRUPT,
            DeviceError::LockedMemory { .. } => IOReturn::CANNOT_LOCK,
            DeviceError::NoDma { .. } => IOReturn::UNSUPPORTED,
            DeviceError::NotMapped { .. } => IOReturn::NOT_FOUND,
            DeviceError::NoReset { .. } => IOReturn::UNSUPPORTED,
            DeviceError::Refused { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => IOReturn::NOT_PERMITTED,
                io::ErrorKind::OutOfMemory => IOReturn::NO_MEMORY,
                io::ErrorKind::ResourceBusy => IOReturn::BUSY,
                io::ErrorKind::InvalidInput => IOReturn::BAD_ARGUMENT,
                _ => IOReturn::IO_ERROR,
            },
            DeviceError::Gone(_) | DeviceError::Quarantined(_) => IOReturn::OFFLINE,
        }
    }
}
