//! An NVMe controller that costs next to nothing: a command is complete when its doorbell has been
//! written, and moves no data.
//!
//! Everything but the I/O queues is the emulated controller's, whose work is not measured. It learns
//! of the queues from the admin commands that make them.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use iohost_device_backend::{
    BarInfo, DeviceBackend, DeviceError, DeviceEvent, InterruptKind, Reset, ResetLevel,
};
use iohost_device_models::Function;
use iohost_device_models::nvme::{Namespace, Nvme, Options};
use iohost_memory::SharedMemory;
use iohost_registers::MappedRegion;
use iohost_testkit::FakeDevice;

#[derive(Debug)]
pub struct Controller {
    emulated: FakeDevice<Nvme>,
    queues: Mutex<Queues>,
}

#[derive(Debug, Default)]
struct Queues {
    /// What the driver gave the controller, by address: the memory, and where in it.
    memory: BTreeMap<u64, (Arc<SharedMemory>, Range<u64>)>,
    /// The admin submission queue, and how far it was looked through.
    admin: u64,
    admin_head: u16,
    /// Completion queues that were made, by number.
    completion: BTreeMap<u16, Place>,
    /// I/O queue pairs, by number.
    pairs: BTreeMap<u16, Pair>,
}

/// Bytes of the driver's memory.
#[derive(Clone, Debug)]
struct Place(Arc<SharedMemory>, usize);

#[derive(Debug)]
struct Pair {
    submission: Place,
    completion: Place,
    entries: u16,
    /// Of both queues: every command is complete.
    head: u16,
    phase: u16,
}

/// Register offsets and opcodes: NVM Express 1.4, figures 78 and 139.
const ASQ: u64 = 0x28;
const DOORBELLS: u64 = 0x1000;
const DOORBELLS_END: u64 = 0x2000;
const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
const CREATE_COMPLETION_QUEUE: u8 = 0x05;
/// Entries of the driver's admin queue.
const ADMIN_ENTRIES: u16 = 32;

/// Why a lock is never poisoned.
const NO_PANIC: &str = "nobody panics with it";

impl Controller {
    /// With one disk of so many blocks of 4096 bytes.
    pub fn new(blocks: u64) -> Self {
        let disk = Namespace::in_memory(4096, blocks).expect("the machine has memory for it");
        // The message is for the driver that lends the device.
        let options = Options { msi_vectors: 1, ..Options::default() };
        let function = Arc::new(Function::new(Nvme::new(options, vec![disk])));
        Self { emulated: FakeDevice::new(function), queues: Mutex::default() }
    }

    /// As the admin commands that make a pair would.
    pub fn make_pair(&self, id: u16, (submission, completion, entries): (u64, u64, u16)) {
        let mut queues = self.queues();
        let (submission, completion) = (queues.place(submission), queues.place(completion));
        queues.pairs.insert(id, Pair { submission, completion, entries, head: 0, phase: 1 });
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().expect(NO_PANIC)
    }
}

impl Queues {
    fn place(&self, address: u64) -> Place {
        let (start, (memory, part)) = self.memory.range(..=address).next_back().expect("mapped");
        Place(memory.clone(), (part.start + address - start) as usize)
    }

    /// Looks which queues the driver makes.
    fn look_at_admin(&mut self, tail: u16) {
        let place = self.place(self.admin);
        while self.admin_head != tail {
            let mut command = [0; 64];
            place.read(usize::from(self.admin_head) * 64, &mut command);
            let u16_at = |at| u16::from_le_bytes([command[at], command[at + 1]]);
            let address = u64::from_le_bytes(command[24..32].try_into().expect("eight bytes"));
            let id = u16_at(40);
            match command[0] {
                CREATE_COMPLETION_QUEUE => {
                    drop(self.completion.insert(id, self.place(address)));
                }
                CREATE_SUBMISSION_QUEUE => {
                    let completion = self.completion[&u16_at(46)].clone();
                    let (submission, entries) = (self.place(address), u16_at(42) + 1);
                    let pair = Pair { submission, completion, entries, head: 0, phase: 1 };
                    self.pairs.insert(id, pair);
                }
                _ => {}
            }
            self.admin_head = (self.admin_head + 1) % ADMIN_ENTRIES;
        }
    }
}

impl Place {
    #[inline]
    fn read(&self, at: usize, data: &mut [u8]) {
        self.0.read_at(self.1 + at, data);
    }

    #[inline]
    fn write(&self, at: usize, data: &[u8]) {
        self.0.write_at(self.1 + at, data);
    }
}

impl Pair {
    /// Completes every command up to the tail.
    #[inline]
    fn complete(&mut self, id: u16, tail: u16) {
        while self.head != tail {
            let mut command = [0; 4];
            self.submission.read(usize::from(self.head) * 64, &mut command);
            let at = usize::from(self.head) * 16;
            let next = if self.head + 1 == self.entries { 0 } else { self.head + 1 };
            let mut entry = [0; 16];
            entry[8..10].copy_from_slice(&next.to_le_bytes());
            entry[10..12].copy_from_slice(&id.to_le_bytes());
            entry[12..14].copy_from_slice(&command[2..4]);
            entry[14..16].copy_from_slice(&self.phase.to_le_bytes());
            self.completion.write(at, &entry);
            self.head = next;
            self.phase ^= u16::from(next == 0);
        }
    }
}

impl DeviceBackend for Controller {
    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let value = |data: &[u8]| data.try_into().map(u32::from_le_bytes).unwrap_or(0) as u16;
        match offset {
            ASQ if data.len() == 8 => {
                let mut queues = self.queues();
                queues.admin = u64::from_le_bytes(data.try_into().expect("eight bytes"));
                queues.admin_head = 0;
            }
            DOORBELLS => self.queues().look_at_admin(value(data)),
            DOORBELLS..DOORBELLS_END if offset >= DOORBELLS + 8 => {
                let place = (offset - DOORBELLS) / 4;
                let id = (place / 2) as u16;
                if place.is_multiple_of(2)
                    && let Some(pair) = self.queues().pairs.get_mut(&id)
                {
                    pair.complete(id, value(data));
                }
                return Ok(());
            }
            _ => {}
        }
        self.emulated.bar_write(index, offset, data)
    }

    fn dma_map_part(
        &self,
        iova: u64,
        memory: &SharedMemory,
        part: Range<u64>,
    ) -> Result<(), DeviceError> {
        let refused = |source| DeviceError::Refused { operation: "mapping memory".into(), source };
        let copy = memory.as_fd().try_clone_to_owned().map_err(refused)?;
        let copy = SharedMemory::attach(copy, memory.len())
            .map_err(|err| refused(std::io::Error::other(err)))?;
        self.queues().memory.insert(iova, (Arc::new(copy), part.clone()));
        self.emulated.dma_map_part(iova, memory, part)
    }

    fn kind(&self) -> &'static str {
        self.emulated.kind()
    }

    fn is_isolated(&self) -> bool {
        self.emulated.is_isolated()
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), DeviceError> {
        self.emulated.config_read(offset, data)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), DeviceError> {
        self.emulated.config_write(offset, data)
    }

    fn bar(&self, index: u8) -> Option<&BarInfo> {
        self.emulated.bar(index)
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        self.emulated.bar_read(index, offset, data)
    }

    fn map_bar(&self, index: u8, range: Range<u64>) -> Result<MappedRegion, DeviceError> {
        self.emulated.map_bar(index, range)
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        self.emulated.interrupt_count(kind)
    }

    fn enable_interrupts(
        &self,
        kind: InterruptKind,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        self.emulated.enable_interrupts(kind, triggers)
    }

    fn change_triggers(
        &self,
        kind: InterruptKind,
        first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        self.emulated.change_triggers(kind, first, triggers)
    }

    fn disable_interrupts(&self, kind: InterruptKind) -> Result<(), DeviceError> {
        self.emulated.disable_interrupts(kind)
    }

    fn unmask_intx(&self) -> Result<(), DeviceError> {
        self.emulated.unmask_intx()
    }

    fn iova_ranges(&self) -> &[RangeInclusive<u64>] {
        self.emulated.iova_ranges()
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), DeviceError> {
        self.queues().memory.remove(&iova);
        self.emulated.dma_unmap(iova, len)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.emulated.reset()
    }

    fn resets(&self) -> Vec<Reset> {
        self.emulated.resets()
    }

    fn reset_by(&self, level: ResetLevel) -> Result<(), DeviceError> {
        self.emulated.reset_by(level)
    }

    fn watch(&self, event: DeviceEvent, trigger: BorrowedFd<'_>) -> Result<bool, DeviceError> {
        self.emulated.watch(event, trigger)
    }
}
