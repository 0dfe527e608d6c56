//! The device as its client sees it.

use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;

use iohost_memory::SharedMemory;
use iohost_registers::MappedRegion;

use crate::connection::{Connection, Expect};
use crate::dma::MOST_DATA;
use crate::error::VfioUserError;
use crate::region::{CONFIG_REGION, LONGEST_REGION_INFO, REGION_INFO, Region};
use crate::wire::{Command, Request, u16_at, u32_at, u64_at};

/// A device that another process emulates.
///
/// - Thread: every method can be called from any thread; calls are serialised.
/// - Time: a call that sends a message waits at most [`Options::deadline`] for the answer.
/// - After an error for which [`VfioUserError::ends_connection`] holds the socket is closed, and
///   every later call is [`VfioUserError::Gone`].
/// - The server's own requests to read or write memory are answered while a call of ours waits.
///   One that arrives between calls is answered during the next.
/// - Drop: closes the socket, upon which the server forgets all mappings and interrupts
///   (specification, "Client Disconnection").
#[derive(Debug)]
pub struct Client {
    link: Mutex<Link>,
    regions: Vec<Region>,
    irqs: [Irq; 3],
    resettable: bool,
    most_descriptors: usize,
}

/// How a client treats its server.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long one exchange of request and reply may take; at least a millisecond.
    pub deadline: Duration,
}

impl Default for Options {
    /// Five seconds.
    fn default() -> Self {
        Self { deadline: Duration::from_secs(5) }
    }
}

/// The kinds of interrupt, with the numbers that VFIO gives them (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqKind {
    /// The level-triggered line.
    IntX = 0,
    /// Message signalled.
    Msi = 1,
    /// Message signalled with a table.
    MsiX = 2,
}

impl fmt::Display for IrqKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IrqKind::IntX => "INTx",
            IrqKind::Msi => "MSI",
            IrqKind::MsiX => "MSI-X",
        })
    }
}

/// What a server says about one kind of interrupt (`struct vfio_irq_info`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Irq {
    /// Vectors; 0 where the device has none.
    pub count: u32,
    flags: u32,
}

impl Irq {
    /// Whether eventfds can be signalled (`VFIO_IRQ_INFO_EVENTFD`).
    pub fn signals_eventfds(&self) -> bool {
        self.flags & 1 != 0
    }

    /// Whether it masks itself at each interrupt (`VFIO_IRQ_INFO_AUTOMASKED`).
    pub fn masks_itself(&self) -> bool {
        self.flags & 4 != 0
    }
}

#[derive(Debug)]
enum Link {
    Live {
        connection: Box<Connection>,
        /// Vectors enabled now, by kind.
        enabled: [u32; 3],
    },
    Dead {
        reason: String,
    },
}

const INTERFACE_MAJOR: u16 = 0;
const INTERFACE_MINOR: u16 = 1;
const DEVICE_FLAG_RESET: u32 = 1;
const DEVICE_FLAG_PCI: u32 = 2;
const DMA_READ_WRITE: u32 = 3;
const IRQ_DATA_NONE: u32 = 1;
const IRQ_DATA_EVENTFD: u32 = 1 << 2;
const IRQ_ACTION_UNMASK: u32 = 1 << 4;
const IRQ_ACTION_TRIGGER: u32 = 1 << 5;
/// Bytes of offset, region and count before the data of a region access.
const REGION_ACCESS: usize = 16;
/// The widest register access.
const WIDEST: usize = 8;
/// The longest version message we take.
const LONGEST_VERSION: usize = 4096;
/// What libvfio-user passes in one message at most; more would be the kernel's limit.
const MOST_DESCRIPTORS: u64 = 64;

impl Client {
    /// Connects with the default [`Options`].
    ///
    /// Errors: as [`connect_with`](Self::connect_with).
    pub fn connect(path: &Path) -> Result<Self, VfioUserError> {
        Self::connect_with(path, &Options::default())
    }

    /// Connects to the server at `path`, agrees on the protocol, and asks for the description of
    /// the device: 13 exchanges for a PCI function, each with its own deadline.
    ///
    /// Errors: `Connect` when nobody listens there; `Timeout` for `version` when the server is
    /// busy with another client; whatever a server can do wrong.
    pub fn connect_with(path: &Path, options: &Options) -> Result<Self, VfioUserError> {
        // A zero would mean "for ever" to the kernel.
        let deadline = options.deadline.max(Duration::from_millis(1));
        let mut connection = Connection::open(path, deadline)
            .map_err(|source| VfioUserError::Connect { path: path.to_owned(), source })?;

        let most_descriptors = negotiate(&mut connection)?;
        let device = device_info(&mut connection)?;
        if device.flags & DEVICE_FLAG_PCI == 0 {
            return Err(VfioUserError::NotPci { flags: device.flags });
        }
        // Servers report 9 or 10 regions; those after configuration space are not used.
        let regions = (0..=CONFIG_REGION)
            .map(|index| match index < device.regions {
                true => region_info(&mut connection, index),
                false => Ok(Region::absent(index)),
            })
            .collect::<Result<_, _>>()?;
        let mut irqs = [Irq::default(); 3];
        for (index, irq) in (0..).zip(&mut irqs) {
            if index < device.irqs {
                *irq = irq_info(&mut connection, index)?;
            }
        }
        Ok(Self {
            link: Mutex::new(Link::Live { connection: Box::new(connection), enabled: [0; 3] }),
            regions,
            irqs,
            resettable: device.flags & DEVICE_FLAG_RESET != 0,
            most_descriptors,
        })
    }

    /// A region: 0–5 the BARs, [`ROM_REGION`](crate::ROM_REGION), [`CONFIG_REGION`]. `None` where
    /// the device has none.
    pub fn region(&self, index: u32) -> Option<&Region> {
        self.regions.get(index as usize).filter(|region| region.size() > 0)
    }

    /// What the device has of one kind of interrupt.
    pub fn irq(&self, kind: IrqKind) -> Irq {
        self.irqs[kind as usize]
    }

    /// Whether [`reset`](Self::reset) can be asked for.
    pub fn resettable(&self) -> bool {
        self.resettable
    }

    /// Reads configuration space: 1, 2 or 4 bytes at their natural alignment.
    ///
    /// Never more: a server in the field panics when asked for 64.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), VfioUserError> {
        self.check_width(CONFIG_REGION, offset.into(), data.len(), 4)?;
        self.region_read(CONFIG_REGION, offset.into(), data)
    }

    /// Writes configuration space: 1, 2 or 4 bytes at their natural alignment.
    pub fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), VfioUserError> {
        self.check_width(CONFIG_REGION, offset.into(), data.len(), 4)?;
        self.region_write(CONFIG_REGION, offset.into(), data)
    }

    /// Reads 1, 2, 4 or 8 bytes at their natural alignment, as one access of the device.
    ///
    /// Errors: `NoSuchRegion`, `Range`, `Refused`; the rest ends the connection.
    pub fn region_read(
        &self,
        index: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), VfioUserError> {
        self.check_width(index, offset, data.len(), WIDEST)?;
        let count = data.len() as u32;
        let request = Request::new(Command::RegionRead).u64(offset).u32(index).u32(count);
        self.with(|connection, _| {
            let expect = Expect::bytes(REGION_ACCESS + data.len());
            let reply = connection.call(request, &[], expect)?;
            check_access(Command::RegionRead, reply.payload, offset, index, count)?;
            data.copy_from_slice(&reply.payload[REGION_ACCESS..]);
            Ok(())
        })
    }

    /// Writes 1, 2, 4 or 8 bytes at their natural alignment, as one access of the device, and
    /// waits until the device has taken it.
    ///
    /// Errors: as [`region_read`](Self::region_read).
    pub fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<(), VfioUserError> {
        self.check_width(index, offset, data.len(), WIDEST)?;
        let count = data.len() as u32;
        let request = Request::new(Command::RegionWrite).u64(offset).u32(index).u32(count);
        self.with(|connection, _| {
            let expect = Expect::bytes(REGION_ACCESS);
            let reply = connection.call(request.bytes(data), &[], expect)?;
            check_access(Command::RegionWrite, reply.payload, offset, index, count)
        })
    }

    /// Maps a range that [`Region::mappable`] covers; it starts on a page.
    ///
    /// The memory is the server's. One that truncates its file afterwards turns accesses into
    /// SIGBUS, as a device does that leaves its slot.
    ///
    /// Errors: `NoSuchRegion`, `NotMappable`, `ShortFile`, `Map`.
    pub fn map_region(&self, index: u32, range: Range<u64>) -> Result<MappedRegion, VfioUserError> {
        self.region(index).ok_or(VfioUserError::NoSuchRegion { index })?.map(range)
    }

    /// Lets the server reach all of `memory` at `iova`, to read and to write.
    ///
    /// The server gets the descriptor, so it sees the same bytes for as long as it likes: unlike
    /// behind an IOMMU, [`dma_unmap`](Self::dma_unmap) is a request and not a wall.
    ///
    /// Errors: `Overlap`, `Duplicate`, `Refused`; the rest ends the connection.
    pub fn dma_map(&self, iova: u64, memory: &SharedMemory) -> Result<(), VfioUserError> {
        self.dma_map_part(iova, memory, 0..memory.len() as u64)
    }

    /// As [`dma_map`](Self::dma_map), of a part that begins on a page. The server is told the
    /// part; the descriptor it gets is that of the whole.
    ///
    /// Panics when the part is not inside the memory.
    pub fn dma_map_part(
        &self,
        iova: u64,
        memory: &SharedMemory,
        part: Range<u64>,
    ) -> Result<(), VfioUserError> {
        use std::os::fd::AsFd;
        let inside = part.start <= part.end && part.end <= memory.len() as u64;
        assert!(inside, "{part:x?} of {}", memory.len());
        let request = Request::new(Command::DmaMap)
            .u32(32)
            .u32(DMA_READ_WRITE)
            .u64(part.start)
            .u64(iova)
            .u64(part.end - part.start);
        self.with(|connection, _| {
            // Before the request: the server may use the memory before it has answered.
            connection.dma.insert(iova, memory, &part)?;
            let mapped = connection.call(request, &[memory.as_fd()], Expect::bytes(0)).map(drop);
            mapped.inspect_err(|_| connection.dma.remove(iova))
        })
    }

    /// Takes back a whole mapping. The server has let go of the memory when this returns.
    ///
    /// Errors: `NotMapped`, `Refused` (the mapping then stays); the rest ends the connection.
    pub fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), VfioUserError> {
        const UNMAP: usize = 24;
        let request = Request::new(Command::DmaUnmap).u32(UNMAP as u32).u32(0).u64(iova).u64(len);
        self.with(|connection, _| {
            if !connection.dma.contains(iova, len) {
                return Err(VfioUserError::NotMapped { iova, len });
            }
            // The reply repeats the request; older servers send the header alone.
            let reply =
                connection.call(request, &[], Expect { payload: 0..=UNMAP, descriptors: 0 })?;
            if reply.payload.len() == UNMAP {
                check(Command::DmaUnmap, "address", u64_at(reply.payload, 8), iova)?;
                check(Command::DmaUnmap, "size", u64_at(reply.payload, 16), len)?;
            } else {
                check(Command::DmaUnmap, "bytes", reply.payload.len() as u64, 0)?;
            }
            connection.dma.remove(iova);
            Ok(())
        })
    }

    /// Lets vector *n* signal `triggers[n]`. Replaces what was enabled of this kind before.
    ///
    /// A server that takes few descriptors at a time gets them in several messages; when one of
    /// them is refused, the kind ends up disabled.
    ///
    /// Errors: `NoSuchInterrupt`, also for no trigger at all; `Refused`; the rest ends the
    /// connection.
    pub fn enable_irqs(
        &self,
        kind: IrqKind,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), VfioUserError> {
        let asked = u32::try_from(triggers.len()).unwrap_or(u32::MAX);
        let irq = self.irq(kind);
        let available = if irq.signals_eventfds() { irq.count } else { 0 };
        if asked == 0 || asked > available {
            return Err(VfioUserError::NoSuchInterrupt { kind, asked, available });
        }
        self.with(|connection, enabled| {
            // The vectors that the new set lacks must not go on signalling the old eventfds.
            if enabled[kind as usize] != 0 && enabled[kind as usize] != asked {
                disable(connection, kind)?;
            }
            enabled[kind as usize] = 0;
            let flags = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER;
            for (start, part) in
                (0u32..).step_by(self.most_descriptors).zip(triggers.chunks(self.most_descriptors))
            {
                let request = irq_request(kind, flags, start, part.len() as u32);
                match connection.call(request, part, Expect::bytes(0)) {
                    Ok(_) => {}
                    Err(err) if err.ends_connection() => return Err(err),
                    Err(refused) => {
                        disable(connection, kind)?;
                        return Err(refused);
                    }
                }
            }
            enabled[kind as usize] = asked;
            Ok(())
        })
    }

    /// Lets vectors `first..` signal `triggers` instead of what they signalled, and leaves the
    /// others. They were enabled before.
    ///
    /// Errors: `NoSuchInterrupt` past the vectors that are enabled; `Refused`, with the vectors
    /// before the message that was refused changed; the rest ends the connection.
    pub fn change_irqs(
        &self,
        kind: IrqKind,
        first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), VfioUserError> {
        self.with(|connection, enabled| {
            let available = enabled[kind as usize];
            let end = u32::try_from(triggers.len()).ok().and_then(|len| first.checked_add(len));
            match end {
                Some(end) if end <= available => {}
                _ => {
                    let asked = end.unwrap_or(u32::MAX);
                    return Err(VfioUserError::NoSuchInterrupt { kind, asked, available });
                }
            }
            let flags = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER;
            let parts = triggers.chunks(self.most_descriptors);
            for (start, part) in (first..).step_by(self.most_descriptors).zip(parts) {
                let request = irq_request(kind, flags, start, part.len() as u32);
                connection.call(request, part, Expect::bytes(0))?;
            }
            Ok(())
        })
    }

    /// Stops all interrupts of this kind. The server signals nothing after its answer.
    ///
    /// Does nothing for a kind the device does not have.
    pub fn disable_irqs(&self, kind: IrqKind) -> Result<(), VfioUserError> {
        if self.irq(kind).count == 0 {
            return Ok(());
        }
        self.with(|connection, enabled| {
            disable(connection, kind)?;
            enabled[kind as usize] = 0;
            Ok(())
        })
    }

    /// Lets the INTx line interrupt again; if it is still asserted, it does so at once.
    ///
    /// Errors: `NoSuchInterrupt`, `Refused`; the rest ends the connection.
    pub fn unmask_intx(&self) -> Result<(), VfioUserError> {
        let kind = IrqKind::IntX;
        if self.irq(kind).count == 0 {
            return Err(VfioUserError::NoSuchInterrupt { kind, asked: 1, available: 0 });
        }
        let flags = IRQ_DATA_NONE | IRQ_ACTION_UNMASK;
        self.with(|connection, _| {
            connection.call(irq_request(kind, flags, 0, 1), &[], Expect::bytes(0)).map(drop)
        })
    }

    /// Resets the device. What becomes of enabled interrupts is the server's affair: enable them
    /// anew. DMA mappings stay.
    ///
    /// Errors: `NoReset`, `Refused`; the rest ends the connection.
    pub fn reset(&self) -> Result<(), VfioUserError> {
        if !self.resettable {
            return Err(VfioUserError::NoReset);
        }
        self.with(|connection, enabled| {
            connection.call(Request::new(Command::DeviceReset), &[], Expect::bytes(0))?;
            *enabled = [0; 3];
            Ok(())
        })
    }

    fn check_width(
        &self,
        index: u32,
        offset: u64,
        len: usize,
        widest: usize,
    ) -> Result<(), VfioUserError> {
        let size = self.region(index).ok_or(VfioUserError::NoSuchRegion { index })?.size();
        let natural = len.is_power_of_two() && len <= widest && offset.is_multiple_of(len as u64);
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= size);
        match natural && inside {
            true => Ok(()),
            false => Err(VfioUserError::Range { index, offset, len, size }),
        }
    }

    /// Runs one or more exchanges, and ends the connection if one of them broke it.
    fn with<R>(
        &self,
        exchanges: impl FnOnce(&mut Connection, &mut [u32; 3]) -> Result<R, VfioUserError>,
    ) -> Result<R, VfioUserError> {
        let mut link = self.lock();
        let result = match &mut *link {
            Link::Live { connection, enabled } => exchanges(connection, enabled),
            Link::Dead { reason } => Err(VfioUserError::Gone { reason: reason.clone() }),
        };
        if let (Link::Live { .. }, Err(err)) = (&*link, &result)
            && err.ends_connection()
        {
            let reason = err.to_string();
            log::warn!(reason = reason.as_str(); "the connection to the device server has ended");
            *link = Link::Dead { reason };
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, Link> {
        // A panic under the lock would be a bug of ours in the middle of an exchange; the message
        // numbers then no longer fit and the next call ends the connection.
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The version exchange. Returns how many descriptors the server takes in one message.
fn negotiate(connection: &mut Connection) -> Result<usize, VfioUserError> {
    // We take one descriptor beside a message: the file behind a region.
    let ours =
        format!("{{\"capabilities\":{{\"max_msg_fds\":1,\"max_data_xfer_size\":{MOST_DATA}}}}}\0");
    let request = Request::new(Command::Version)
        .u16(INTERFACE_MAJOR)
        .u16(INTERFACE_MINOR)
        .bytes(ours.as_bytes());
    let reply =
        connection.call(request, &[], Expect { payload: 4..=LONGEST_VERSION, descriptors: 0 })?;

    // Servers in the field answer 0.0 as well as 0.1.
    let (major, minor) = (u16_at(reply.payload, 0), u16_at(reply.payload, 2));
    if major != INTERFACE_MAJOR {
        return Err(VfioUserError::Version { major, minor });
    }
    let text = &reply.payload[4..];
    let text = text.strip_suffix(b"\0").unwrap_or(text);
    let theirs = match text {
        [] => Limits::default(),
        text => {
            serde_json::from_slice::<VersionData>(text)
                .map_err(|source| {
                    let text = String::from_utf8_lossy(text).into_owned();
                    VfioUserError::Capabilities { text, source }
                })?
                .capabilities
        }
    };
    at_least("max_msg_fds", theirs.max_msg_fds, 1)?;
    at_least("max_data_xfer_size", theirs.max_data_xfer_size, WIDEST as u64)?;
    Ok(theirs.max_msg_fds.min(MOST_DESCRIPTORS) as usize)
}

fn at_least(name: &'static str, value: u64, least: u64) -> Result<(), VfioUserError> {
    match value >= least {
        true => Ok(()),
        false => Err(VfioUserError::Limit { name, value, least }),
    }
}

/// The version data. Unknown capabilities are none of our business.
#[derive(Default, Deserialize)]
#[serde(default)]
struct VersionData {
    capabilities: Limits,
}

#[derive(Deserialize)]
#[serde(default)]
struct Limits {
    max_msg_fds: u64,
    max_data_xfer_size: u64,
}

impl Default for Limits {
    /// What the specification assumes of a peer that does not say.
    fn default() -> Self {
        Self { max_msg_fds: 1, max_data_xfer_size: 1 << 20 }
    }
}

struct DeviceInfo {
    flags: u32,
    regions: u32,
    irqs: u32,
}

fn device_info(connection: &mut Connection) -> Result<DeviceInfo, VfioUserError> {
    let request = Request::new(Command::DeviceInfo).u32(16).u32(0).u32(0).u32(0);
    let reply = connection.call(request, &[], Expect::bytes(16))?;
    Ok(DeviceInfo {
        flags: u32_at(reply.payload, 4),
        regions: u32_at(reply.payload, 8),
        irqs: u32_at(reply.payload, 12),
    })
}

fn region_info(connection: &mut Connection, index: u32) -> Result<Region, VfioUserError> {
    let request = Request::new(Command::RegionInfo)
        .u32(LONGEST_REGION_INFO)
        .u32(0)
        .u32(index)
        .u32(0)
        .u64(0)
        .u64(0);
    let payload = REGION_INFO..=LONGEST_REGION_INFO as usize;
    let mut reply = connection.call(request, &[], Expect { payload, descriptors: 1 })?;
    // A list that is longer than we allow is left out by the server, which then says how long.
    let needed = u32_at(reply.payload, 0);
    if needed > LONGEST_REGION_INFO {
        return Err(VfioUserError::WrongContent {
            command: Command::RegionInfo,
            field: "size of the capabilities",
            actual: needed.into(),
            expected: LONGEST_REGION_INFO.into(),
        });
    }
    Region::decode(index, reply.payload, reply.descriptors.pop())
}

fn irq_info(connection: &mut Connection, index: u32) -> Result<Irq, VfioUserError> {
    let request = Request::new(Command::IrqInfo).u32(16).u32(0).u32(index).u32(0);
    let reply = connection.call(request, &[], Expect::bytes(16))?;
    check(Command::IrqInfo, "index", u32_at(reply.payload, 8).into(), index.into())?;
    Ok(Irq { flags: u32_at(reply.payload, 4), count: u32_at(reply.payload, 12) })
}

/// `count` and `start` of 0 without data disable the kind (specification, "SET_IRQS").
fn disable(connection: &mut Connection, kind: IrqKind) -> Result<(), VfioUserError> {
    let request = irq_request(kind, IRQ_DATA_NONE | IRQ_ACTION_TRIGGER, 0, 0);
    connection.call(request, &[], Expect::bytes(0)).map(drop)
}

fn irq_request(kind: IrqKind, flags: u32, start: u32, count: u32) -> Request {
    Request::new(Command::SetIrqs).u32(20).u32(flags).u32(kind as u32).u32(start).u32(count)
}

fn check_access(
    command: Command,
    reply: &[u8],
    offset: u64,
    region: u32,
    count: u32,
) -> Result<(), VfioUserError> {
    check(command, "offset", u64_at(reply, 0), offset)?;
    check(command, "region", u32_at(reply, 8).into(), region.into())?;
    check(command, "count", u32_at(reply, 12).into(), count.into())
}

fn check(
    command: Command,
    field: &'static str,
    actual: u64,
    expected: u64,
) -> Result<(), VfioUserError> {
    match actual == expected {
        true => Ok(()),
        false => Err(VfioUserError::WrongContent { command, field, actual, expected }),
    }
}
