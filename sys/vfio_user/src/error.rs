//! Everything that can go wrong with a device behind a socket.

use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use crate::client::IrqKind;
use crate::wire::Command;

/// Why a vfio-user operation failed, with the values that made it fail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VfioUserError {
    /// Nobody answers at the socket.
    #[error("connecting to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The socket broke.
    #[error("talking to the device server: {command}")]
    Socket {
        /// What was under way.
        command: Command,
        /// What the kernel said.
        source: io::Error,
    },
    /// The server did not answer in time.
    #[error("no answer to {command} within {waited:?}")]
    Timeout {
        /// What was asked.
        command: Command,
        /// The deadline that passed.
        waited: Duration,
    },
    /// The server closed the connection, or died.
    #[error("the device server closed the connection during {command}")]
    Closed {
        /// What was under way.
        command: Command,
    },
    /// A message that is neither a command nor a reply, or a reply to something else.
    #[error(
        "the server answered {command} (id {id}) with command {actual_command}, id {actual_id}, \
         flags {flags:#x}"
    )]
    NotTheReply {
        /// What was asked.
        command: Command,
        /// Its number.
        id: u16,
        /// The command in the message that came.
        actual_command: u16,
        /// The number in it.
        actual_id: u16,
        /// The flags in it.
        flags: u32,
    },
    /// A message whose size cannot be.
    #[error("the server sent a message of {actual} bytes during {command}, {expected:?} fit")]
    WrongSize {
        /// What was asked.
        command: Command,
        /// Bytes announced.
        actual: u32,
        /// Bytes that would have been right, header included.
        expected: RangeInclusive<u32>,
    },
    /// A reply whose content contradicts the question.
    #[error("the server answered {command} with {field} {actual:#x}, expected {expected:#x}")]
    WrongContent {
        /// What was asked.
        command: Command,
        /// The field in the reply.
        field: &'static str,
        /// What it holds.
        actual: u64,
        /// What it should hold.
        expected: u64,
    },
    /// More descriptors than the message can carry.
    #[error("the server sent {actual} descriptors with {command}, at most {most} belong there")]
    WrongDescriptors {
        /// What was asked.
        command: Command,
        /// Descriptors received.
        actual: usize,
        /// Descriptors that would have been right.
        most: usize,
    },
    /// A protocol version that is not ours.
    #[error("the server speaks vfio-user {major}.{minor}, this client 0.1")]
    Version {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
    /// Capabilities that are not the JSON they should be.
    #[error("the server's capabilities are malformed: {text:?}")]
    Capabilities {
        /// What came.
        text: String,
        /// Why it cannot be read.
        source: serde_json::Error,
    },
    /// A limit of the server under which this client cannot work.
    #[error("the server announces {name} {value}, at least {least} is needed")]
    Limit {
        /// The capability.
        name: &'static str,
        /// What it says.
        value: u64,
        /// What is needed.
        least: u64,
    },
    /// Not a PCI device.
    #[error("the server's device is not a PCI device, its flags are {flags:#x}")]
    NotPci {
        /// The device flags.
        flags: u32,
    },
    /// A capability list of a region that cannot be.
    #[error("the capabilities of region {region} are malformed at byte {offset}: {reason}")]
    RegionCapability {
        /// The region.
        region: u32,
        /// Where in the reply's payload.
        offset: u64,
        /// What is wrong there.
        reason: &'static str,
    },
    /// The server took the request and refused it. The connection goes on.
    #[error("the device server refused {command}")]
    Refused {
        /// What was asked.
        command: Command,
        /// The error number in the reply, if it had one.
        source: io::Error,
    },
    /// The device has no such region.
    #[error("region {index} is not there")]
    NoSuchRegion {
        /// The region asked for.
        index: u32,
    },
    /// An access that does not fit, or has no natural alignment.
    #[error("{len} bytes at {offset:#x} of region {index}, which has {size:#x} bytes")]
    Range {
        /// The region.
        index: u32,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: usize,
        /// Bytes of the region.
        size: u64,
    },
    /// A range that the server does not offer for mapping.
    #[error("region {index} cannot be mapped at {start:#x}..{end:#x}")]
    NotMappable {
        /// The region.
        index: u32,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// The server offers more for mapping than its file holds; touching it would be fatal.
    #[error("region {index} ends at {end:#x} of a file of {len:#x} bytes")]
    ShortFile {
        /// The region.
        index: u32,
        /// One past the last byte of the range, in the file.
        end: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// The kernel does not map the region.
    #[error("mapping {start:#x}..{end:#x} of region {index}")]
    Map {
        /// The region.
        index: u32,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// More vectors than the device has, or none of the kind.
    #[error("{asked} {kind} vectors of a device that has {available}")]
    NoSuchInterrupt {
        /// The kind asked for.
        kind: IrqKind,
        /// Vectors asked for.
        asked: u32,
        /// Vectors the device has.
        available: u32,
    },
    /// The device cannot be reset through its server.
    #[error("the device server does not offer a reset")]
    NoReset,
    /// A DMA mapping over another, or past the end of the address space.
    #[error("{len:#x} bytes at iova {iova:#x} overlap another mapping or the end of memory")]
    Overlap {
        /// Where it was to be.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// Unmapping what was not mapped like that.
    #[error("no mapping of {len:#x} bytes at iova {iova:#x}")]
    NotMapped {
        /// Where it was to be.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// A descriptor could not be duplicated.
    #[error("duplicating the descriptor of dma memory at iova {iova:#x}")]
    Duplicate {
        /// Where the memory was to be.
        iova: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// An earlier error ended the connection.
    #[error("the connection to the device server has ended: {reason}")]
    Gone {
        /// The error that ended it.
        reason: String,
    },
}

impl VfioUserError {
    /// Whether the connection is over: this call and every later one fails.
    pub fn ends_connection(&self) -> bool {
        match self {
            VfioUserError::Connect { .. }
            | VfioUserError::Socket { .. }
            | VfioUserError::Timeout { .. }
            | VfioUserError::Closed { .. }
            | VfioUserError::NotTheReply { .. }
            | VfioUserError::WrongSize { .. }
            | VfioUserError::WrongContent { .. }
            | VfioUserError::WrongDescriptors { .. }
            | VfioUserError::Version { .. }
            | VfioUserError::Capabilities { .. }
            | VfioUserError::Limit { .. }
            | VfioUserError::NotPci { .. }
            | VfioUserError::RegionCapability { .. }
            | VfioUserError::Gone { .. } => true,
            VfioUserError::Refused { .. }
            | VfioUserError::NoSuchRegion { .. }
            | VfioUserError::Range { .. }
            | VfioUserError::NotMappable { .. }
            | VfioUserError::ShortFile { .. }
            | VfioUserError::Map { .. }
            | VfioUserError::NoSuchInterrupt { .. }
            | VfioUserError::NoReset
            | VfioUserError::Overlap { .. }
            | VfioUserError::NotMapped { .. }
            | VfioUserError::Duplicate { .. } => false,
        }
    }
}
