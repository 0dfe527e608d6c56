//! One device, from its making to its end.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process;

use crate::control::{Command, command};
use crate::{Queue, UblkError};

/// `UBLK_F_USER_COPY`.
const USER_COPY: u64 = 1 << 7;

/// Bytes of a sector, which is what the kernel counts in, whatever the blocks are.
pub(crate) const SECTOR: u64 = 512;

/// A block device that a process serves. The crate's documentation has the order of its calls.
///
/// Callable from any thread. It names the device only: its clones are the same one, and dropping
/// them does nothing to it.
#[derive(Clone, Debug)]
pub struct UblkDevice {
    number: u32,
}

/// What a block device is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Bytes of a block: a power of two, from 512 to 4096.
    pub block: u32,
    /// Bytes of all blocks.
    pub bytes: u64,
    /// The most bytes of a read or write: a multiple of 4096.
    pub most_at_once: u32,
    /// Nobody can write.
    pub is_read_only: bool,
    /// Writes can be lost with the power until there was a flush. Without it, nobody flushes.
    pub has_write_cache: bool,
    /// Whether [`Order::Discard`](crate::Order::Discard) is asked.
    pub can_discard: bool,
    /// Whether [`Order::WriteZeroes`](crate::Order::WriteZeroes) is asked; the kernel writes zeroes
    /// otherwise.
    pub can_write_zeroes: bool,
}

impl UblkDevice {
    /// Makes a device with the lowest number that is free, and nothing to see of it yet but
    /// `/dev/ublkcN`.
    ///
    /// Errors: `Missing`, `Permission`, `TooOld`; `Kernel`, also for properties that it refuses.
    pub fn add(properties: &Properties) -> Result<Self, UblkError> {
        let mut info = Info::new(properties.most_at_once);
        command(Command::Add, u32::MAX, 0, &mut info.0)?;
        let device = Self { number: info.number() };
        // A kernel leaves out the flags that it does not know.
        let outcome = match info.flags() & USER_COPY {
            0 => Err(UblkError::TooOld),
            _ => command(Command::SetParameters, device.number, 0, &mut properties.to_bytes()),
        };
        match outcome {
            Ok(()) => Ok(device),
            Err(err) => {
                // What went wrong first is what is worth saying.
                let _ = device.remove();
                Err(err)
            }
        }
    }

    /// A device that some process has added. Errors: `NoSuchDevice`, and those of
    /// [`add`](Self::add).
    pub fn find(number: u32) -> Result<Self, UblkError> {
        command(Command::GetInfo, number, 0, &mut Info::new(0).0)?;
        Ok(Self { number })
    }

    /// The block device, which is there from start to stop.
    pub fn node(&self) -> PathBuf {
        format!("/dev/ublkb{}", self.number).into()
    }

    /// What is asked of the device, for the thread that will serve it, and no other thread.
    ///
    /// Errors: `Kernel`, also when it was taken before.
    pub fn queue(&self) -> Result<Queue, UblkError> {
        let path = format!("/dev/ublkc{}", self.number);
        Queue::open(&path).map_err(|source| UblkError::Kernel { operation: path, source })
    }

    /// Makes the block device. Blocks until its queue was taken, and the kernel has read what it
    /// takes for partitions.
    pub fn start(&self) -> Result<(), UblkError> {
        command(Command::Start, self.number, process::id().into(), &mut [])
    }

    /// Takes the block device away from whoever has it, and ends the queue. Blocks until what was
    /// asked before is answered; what is asked later fails.
    pub fn stop(&self) -> Result<(), UblkError> {
        command(Command::Stop, self.number, 0, &mut [])
    }

    /// As [`stop`](Self::stop), unless the block device is mounted, or somebody has it for himself.
    /// Who merely has it open is not known.
    ///
    /// Errors: `InUse`, with nothing done, and those of `stop`.
    pub fn stop_unless_in_use(&self) -> Result<(), UblkError> {
        let node = self.node();
        // Linux, open(2): with O_EXCL, and without O_CREAT, a block device that is in use by the
        // system is refused as EBUSY. It is nobody else's until this is closed.
        let claimed = OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL).open(&node);
        match claimed {
            Err(err) if err.kind() == ErrorKind::ResourceBusy => Err(UblkError::InUse { node }),
            // It has not started, or has ended: there is nobody to ask.
            _ => self.stop(),
        }
    }

    /// Undoes [`add`](Self::add), also after its process has died, and stops the device if it is
    /// not. Blocks until its queue is dropped.
    pub fn remove(&self) -> Result<(), UblkError> {
        command(Command::Remove, self.number, 0, &mut [])
    }
}

/// `struct ublksrv_ctrl_dev_info`.
struct Info([u8; 64]);

impl Info {
    fn new(most_at_once: u32) -> Self {
        const QUEUES: u16 = 1;
        let mut bytes = [0; 64];
        bytes[0..2].copy_from_slice(&QUEUES.to_ne_bytes());
        bytes[2..4].copy_from_slice(&Queue::TAGS.to_ne_bytes());
        bytes[8..12].copy_from_slice(&most_at_once.to_ne_bytes());
        bytes[12..16].copy_from_slice(&u32::MAX.to_ne_bytes());
        bytes[24..32].copy_from_slice(&USER_COPY.to_ne_bytes());
        Self(bytes)
    }

    fn number(&self) -> u32 {
        u32::from_ne_bytes(self.0[12..16].try_into().expect("four bytes"))
    }

    fn flags(&self) -> u64 {
        u64::from_ne_bytes(self.0[24..32].try_into().expect("eight bytes"))
    }
}

impl Properties {
    /// `struct ublk_params`, as far as the parameters of discarding.
    fn to_bytes(&self) -> [u8; 60] {
        const BASIC: u32 = 1;
        const DISCARD: u32 = 1 << 1;
        const READ_ONLY: u32 = 1;
        const VOLATILE_CACHE: u32 = 1 << 2;
        const FORCE_UNIT_ACCESS: u32 = 1 << 3;
        /// Of one order: a power of two, so that it is a multiple of every block.
        const MOST_CLEARED: u32 = (1 << 30) / SECTOR as u32;
        let mut attributes = 0;
        for (attribute, is_so) in [
            (READ_ONLY, self.is_read_only),
            (VOLATILE_CACHE | FORCE_UNIT_ACCESS, self.has_write_cache),
        ] {
            attributes |= if is_so { attribute } else { 0 };
        }
        let most = |is_so| if is_so { MOST_CLEARED } else { 0 };
        let clears = self.can_discard || self.can_write_zeroes;
        let block = self.block.ilog2() as u8;
        let best = self.most_at_once.ilog2() as u8;

        let mut bytes = [0; 60];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &60_u32.to_ne_bytes());
        put(4, &(BASIC | if clears { DISCARD } else { 0 }).to_ne_bytes());
        put(8, &attributes.to_ne_bytes());
        // Shifts: the logical and the physical block, the best and the least bytes of a request.
        put(12, &[block, block, best, block]);
        put(16, &(self.most_at_once / SECTOR as u32).to_ne_bytes());
        put(24, &(self.bytes / SECTOR).to_ne_bytes());
        if clears {
            put(44, &self.block.to_ne_bytes());
            put(48, &most(self.can_discard).to_ne_bytes());
            put(52, &most(self.can_write_zeroes).to_ne_bytes());
            // Places at once; the kernel takes no other number.
            put(56, &1_u16.to_ne_bytes());
        }
        bytes
    }
}
