//! A device that does what a test says, and other ways to reach one.

use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use iohost_device_backend::{
    BarInfo, DeviceBackend, DeviceError, DeviceEvent, InterruptKind, PciAddress, Reset, ResetLevel,
};
use iohost_device_models::{BarSpec, Bus, DeviceModel, Function, Identity};
use iohost_memory::SharedMemory;
use iohost_registers::MappedRegion;
use iohost_testkit::FakeDevice;

pub(crate) const VENDOR: u16 = 0x1234;
pub(crate) const DEVICE: u16 = 0x0b0a;
pub(crate) const BAR_SIZE: u32 = 0x100;

/// A device with one BAR of plain memory, an interrupt line and MSI vectors, which writes down
/// how its BAR is reached.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) intx: bool,
    pub(crate) msi_vectors: u8,
    pub(crate) memory: [u8; BAR_SIZE as usize],
    pub(crate) accesses: Vec<String>,
    pub(crate) resets: u32,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            intx: true,
            msi_vectors: 4,
            memory: [0; BAR_SIZE as usize],
            accesses: Vec::new(),
            resets: 0,
        }
    }
}

impl DeviceModel for Board {
    fn identity(&self) -> Identity {
        Identity {
            vendor: VENDOR,
            device: DEVICE,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            class: 0x00_ff00,
            revision: 3,
            bars: [Some(BarSpec { size: BAR_SIZE }), None, None, None, None, None],
            intx: self.intx,
            msi_vectors: self.msi_vectors,
            msi_x: None,
        }
    }

    fn bar_read(&mut self, _bus: &mut Bus<'_>, bar: u8, offset: u64, data: &mut [u8]) {
        self.accesses.push(format!("read {} bytes at {offset:#x} of BAR {bar}", data.len()));
        let at = offset as usize;
        data.copy_from_slice(&self.memory[at..at + data.len()]);
    }

    fn bar_write(&mut self, _bus: &mut Bus<'_>, bar: u8, offset: u64, data: &[u8]) {
        self.accesses.push(format!("write {} bytes at {offset:#x} of BAR {bar}", data.len()));
        let at = offset as usize;
        self.memory[at..at + data.len()].copy_from_slice(data);
    }

    fn time_has_come(&mut self, _bus: &mut Bus<'_>, _what: u32) {}

    fn reset(&mut self, _bus: &mut Bus<'_>) {
        self.resets += 1;
        self.memory.fill(0);
    }
}

/// A board reached in a way that a [`FakeDevice`] does not have.
#[derive(Debug)]
pub(crate) struct Unusual {
    board: FakeDevice<Board>,
    /// What `bar` says instead.
    pub(crate) bars: Vec<Option<BarInfo>>,
    /// The device has no reset.
    pub(crate) no_reset: bool,
    /// Where memory can be mapped.
    pub(crate) iova: Vec<RangeInclusive<u64>>,
    /// The device has gone and answers nothing.
    pub(crate) gone: AtomicBool,
    /// It is a PCI Express device, and says so many times that transactions are pending.
    pub(crate) pending: Option<AtomicU32>,
    /// The memory that BAR 0 is instead.
    pub(crate) memory: Option<SharedMemory>,
    /// What configuration space says instead; all of it can be written but for `read_only`.
    pub(crate) config: Option<Mutex<Vec<u8>>>,
    /// Where it is on a bus.
    pub(crate) location: Option<PciAddress>,
    /// Bytes of `config` that stay.
    pub(crate) read_only: Vec<u16>,
    /// How often memory was mapped for the device.
    pub(crate) maps: AtomicU32,
}

/// Where such a device has its capability of PCI Express, and the list of capabilities.
const EXPRESS: u16 = 0xa0;
const CAPABILITIES: u16 = 0x34;
const DEVICE_STATUS: u16 = EXPRESS + 0x0a;
const TRANSACTIONS_PENDING: u8 = 1 << 5;

impl Unusual {
    pub(crate) fn new(board: Board) -> Self {
        let board = FakeDevice::new(Arc::new(Function::new(board)));
        let bars = (0..7).map(|index| board.bar(index).cloned()).collect();
        let iova = vec![0..=u64::MAX];
        Self {
            board,
            bars,
            no_reset: false,
            iova,
            gone: AtomicBool::new(false),
            pending: None,
            memory: None,
            config: None,
            location: None,
            read_only: Vec::new(),
            maps: AtomicU32::new(0),
        }
    }

    /// A board whose BAR 0 is memory that can be mapped, all but the first page.
    pub(crate) fn with_memory(pages: u64) -> Self {
        let size = pages * 4096;
        let memory = SharedMemory::create(c"bar", size as usize).unwrap();
        let file = memory.as_fd().try_clone_to_owned().unwrap();
        let ours = SharedMemory::attach(file, size as usize).unwrap();
        let mut unusual = Self::new(Board::default());
        unusual.board = unusual.board.with_memory(0, memory);
        unusual.memory = Some(ours);
        let mappable = std::iter::once(4096..size).collect();
        unusual.bars[0] = Some(BarInfo { size, kind: 0x0c, mappable });
        unusual
    }

    fn there(&self) -> Result<(), DeviceError> {
        match self.gone.load(SeqCst) {
            true => Err(DeviceError::Gone("pulled out".to_owned())),
            false => Ok(()),
        }
    }
}

impl DeviceBackend for Unusual {
    fn kind(&self) -> &'static str {
        "unusual"
    }

    fn is_isolated(&self) -> bool {
        true
    }

    fn location(&self) -> Option<PciAddress> {
        self.location
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), DeviceError> {
        self.there()?;
        if let Some(config) = &self.config {
            let config = config.lock().unwrap();
            let at = usize::from(offset);
            let bytes = config.get(at..at + data.len()).ok_or_else(|| DeviceError::Range {
                region: "configuration space".to_owned(),
                offset: offset.into(),
                len: data.len(),
                size: config.len() as u64,
            })?;
            data.copy_from_slice(bytes);
            return Ok(());
        }
        self.board.config_read(offset, data)?;
        let Some(pending) = &self.pending else { return Ok(()) };
        match offset {
            CAPABILITIES => data[0] = EXPRESS as u8,
            EXPRESS => data.copy_from_slice(&[0x10, 0, 0, 0][..data.len()]),
            DEVICE_STATUS => {
                let still = pending.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
                data[0] = if still.is_ok() { TRANSACTIONS_PENDING } else { 0 };
            }
            _ => {}
        }
        Ok(())
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), DeviceError> {
        self.there()?;
        let Some(config) = &self.config else { return self.board.config_write(offset, data) };
        for (at, value) in (offset..).zip(data) {
            if !self.read_only.contains(&at) {
                config.lock().unwrap()[usize::from(at)] = *value;
            }
        }
        Ok(())
    }

    fn bar(&self, index: u8) -> Option<&BarInfo> {
        self.bars.get(usize::from(index))?.as_ref()
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        self.there()?;
        self.board.bar_read(index, offset, data)
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.there()?;
        self.board.bar_write(index, offset, data)
    }

    fn map_bar(&self, index: u8, range: Range<u64>) -> Result<MappedRegion, DeviceError> {
        self.board.map_bar(index, range)
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        self.board.interrupt_count(kind)
    }

    fn enable_interrupts(
        &self,
        kind: InterruptKind,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        self.board.enable_interrupts(kind, triggers)
    }

    fn change_triggers(
        &self,
        kind: InterruptKind,
        first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        self.board.change_triggers(kind, first, triggers)
    }

    fn disable_interrupts(&self, kind: InterruptKind) -> Result<(), DeviceError> {
        self.enable_interrupts(kind, &[])
    }

    fn unmask_intx(&self) -> Result<(), DeviceError> {
        self.board.unmask_intx()
    }

    fn iova_ranges(&self) -> &[RangeInclusive<u64>] {
        &self.iova
    }

    fn dma_map_part(
        &self,
        iova: u64,
        memory: &SharedMemory,
        part: Range<u64>,
    ) -> Result<(), DeviceError> {
        self.maps.fetch_add(1, SeqCst);
        self.board.dma_map_part(iova, memory, part)
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), DeviceError> {
        self.board.dma_unmap(iova, len)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        match self.no_reset {
            true => Err(DeviceError::NoReset { reason: "it has none".to_owned() }),
            false => self.board.reset(),
        }
    }

    fn resets(&self) -> Vec<Reset> {
        if self.no_reset { Vec::new() } else { self.board.resets() }
    }

    fn reset_by(&self, level: ResetLevel) -> Result<(), DeviceError> {
        self.there()?;
        self.board.reset_by(level)
    }

    fn watch(&self, event: DeviceEvent, trigger: BorrowedFd<'_>) -> Result<bool, DeviceError> {
        self.board.watch(event, trigger)
    }
}
