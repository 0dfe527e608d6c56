//! An emulated function behind the product's own seam.

use std::fmt;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use iohost_device_backend::{
    BarInfo, DeviceBackend, DeviceError, DeviceEvent, InterruptKind, Reset, ResetLevel,
};
use iohost_device_models::{DeviceModel, DmaError, DmaMemory, Function, FunctionError};
use iohost_memory::SharedMemory;
use iohost_registers::MappedRegion;

/// A [`DeviceBackend`] over a [`Function`] in this process. No BAR of it can be mapped, unless it
/// is [made memory](Self::with_memory): every access is a call, which the model sees.
pub struct FakeDevice<M: DeviceModel> {
    function: Arc<Function<M>>,
    bars: Vec<Option<BarInfo>>,
    /// A BAR that is memory instead.
    memory: Option<(u8, SharedMemory)>,
    /// The kind of interrupt that is enabled: a function has one at a time.
    enabled: Mutex<Option<InterruptKind>>,
    misfortunes: Mutex<Misfortunes>,
}

/// What can go wrong with a device.
#[derive(Debug)]
struct Misfortunes {
    /// It is not there: reads give all ones, writes are lost.
    lost: bool,
    /// What its resets do, the gentlest first.
    resets: Vec<(Reset, ResetEffect)>,
    /// Who hears of its events.
    watchers: Vec<(DeviceEvent, OwnedFd)>,
}

/// What a reset of a [`FakeDevice`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetEffect {
    /// What it should; a device that did not answer answers again.
    Works,
    /// It fails and says so; the device stays as it was.
    Fails,
    /// It says that it worked, and the device does not answer any more.
    Kills,
}

impl<M: DeviceModel> FakeDevice<M> {
    /// The device that `function` is.
    pub fn new(function: Arc<Function<M>>) -> Self {
        let info = |size| BarInfo { size: u64::from(size), kind: 0, mappable: Vec::new() };
        let bars = function.identity().bars.iter().map(|bar| bar.map(|bar| info(bar.size)));
        let misfortunes = Misfortunes {
            lost: false,
            resets: vec![(Reset::of_function(), ResetEffect::Works)],
            watchers: Vec::new(),
        };
        Self {
            bars: bars.collect(),
            memory: None,
            function,
            enabled: Mutex::new(None),
            misfortunes: Mutex::new(misfortunes),
        }
    }

    /// Takes the device out of its slot (`true`), or puts it back: meanwhile reads give all ones
    /// and writes are lost.
    pub fn set_lost(&self, lost: bool) {
        self.misfortunes().lost = lost;
    }

    /// Sets the ways in which the device can be reset, and what each of them does.
    pub fn set_resets(&self, resets: Vec<(Reset, ResetEffect)>) {
        self.misfortunes().resets = resets;
    }

    /// Has an event happen. Whether anybody heard.
    pub fn happen(&self, event: DeviceEvent) -> bool {
        let misfortunes = self.misfortunes();
        let watchers = misfortunes.watchers.iter().filter(|(watched, _)| *watched == event);
        let told = watchers.map(|(_, trigger)| nix::unistd::write(trigger, &1_u64.to_ne_bytes()));
        told.filter(Result::is_ok).count() > 0
    }

    fn misfortunes(&self) -> MutexGuard<'_, Misfortunes> {
        self.misfortunes.lock().expect("no panic happens under this lock")
    }

    /// Whether an access of `data` finds nobody; it has read all ones then.
    fn reads_ones(&self, data: &mut [u8]) -> bool {
        let lost = self.misfortunes().lost;
        if lost {
            data.fill(0xff);
        }
        lost
    }

    fn reset_as(&self, effect: ResetEffect) -> Result<(), DeviceError> {
        match effect {
            ResetEffect::Works => {
                self.set_lost(false);
                let mut enabled = self.enabled();
                self.function.reset();
                *enabled = None;
            }
            ResetEffect::Fails => {
                let operation = "resetting the device".to_owned();
                return Err(DeviceError::Refused {
                    operation,
                    source: io::ErrorKind::TimedOut.into(),
                });
            }
            ResetEffect::Kills => self.set_lost(true),
        }
        Ok(())
    }

    /// Has a BAR be memory, of which the model sees nothing, and which can be mapped: as registers
    /// can that a driver reaches without a call.
    #[must_use]
    pub fn with_memory(mut self, bar: u8, memory: SharedMemory) -> Self {
        let size = memory.len() as u64;
        let mappable = std::iter::once(0..size).collect();
        self.bars.resize(self.bars.len().max(usize::from(bar) + 1), None);
        self.bars[usize::from(bar)] = Some(BarInfo { size, kind: 0, mappable });
        self.memory = Some((bar, memory));
        self
    }

    /// The memory that a BAR is, if it is.
    fn memory(&self, index: u8) -> Option<&SharedMemory> {
        self.memory.as_ref().filter(|(bar, _)| *bar == index).map(|(_, memory)| memory)
    }

    /// Refuses an access past the end of such memory.
    fn check_memory(
        index: u8,
        memory: &SharedMemory,
        offset: u64,
        len: usize,
    ) -> Result<usize, DeviceError> {
        let size = memory.len() as u64;
        let fits = offset.checked_add(len as u64).is_some_and(|end| end <= size);
        let region = format!("BAR {index}");
        fits.then_some(offset as usize).ok_or(DeviceError::Range { region, offset, len, size })
    }

    /// Refuses what the other backends refuse: an access off its natural alignment, or too wide.
    fn check(
        &self,
        region: &str,
        offset: u64,
        len: usize,
        widest: usize,
        size: u64,
    ) -> Result<(), DeviceError> {
        match len.is_power_of_two() && len <= widest && offset.is_multiple_of(len as u64) {
            true => Ok(()),
            false => Err(DeviceError::Range { region: region.to_owned(), offset, len, size }),
        }
    }

    fn check_config(&self, offset: u16, len: usize) -> Result<(), DeviceError> {
        let size = self.function.config_size().into();
        self.check("configuration space", offset.into(), len, 4, size)
    }

    fn check_bar(&self, index: u8, offset: u64, len: usize) -> Result<(), DeviceError> {
        let bar = self.bar(index).ok_or(DeviceError::NoSuchBar { index })?;
        self.check(&format!("BAR {index}"), offset, len, 8, bar.size)
    }

    fn enabled(&self) -> MutexGuard<'_, Option<InterruptKind>> {
        self.enabled.lock().expect("no panic happens under this lock")
    }

    fn disable(&self, enabled: &mut Option<InterruptKind>) -> Result<(), DeviceError> {
        match enabled.take() {
            Some(kind) => self.function.set_irqs(model_kind(kind), &[]).map_err(refusal),
            None => Ok(()),
        }
    }
}

impl<M: DeviceModel> DeviceBackend for FakeDevice<M> {
    fn kind(&self) -> &'static str {
        "fake"
    }

    fn is_isolated(&self) -> bool {
        true
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), DeviceError> {
        self.check_config(offset, data.len())?;
        if self.reads_ones(data) {
            return Ok(());
        }
        self.function.config_read(offset, data).map_err(refusal)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), DeviceError> {
        self.check_config(offset, data.len())?;
        if self.misfortunes().lost {
            return Ok(());
        }
        self.function.config_write(offset, data).map_err(refusal)
    }

    fn bar(&self, index: u8) -> Option<&BarInfo> {
        self.bars.get(usize::from(index))?.as_ref()
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        self.check_bar(index, offset, data.len())?;
        if self.reads_ones(data) {
            return Ok(());
        }
        if let Some(memory) = self.memory(index) {
            let at = Self::check_memory(index, memory, offset, data.len())?;
            memory.read_at(at, data);
            return Ok(());
        }
        self.function.bar_read(index, offset, data).map_err(refusal)
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.check_bar(index, offset, data.len())?;
        if self.misfortunes().lost {
            return Ok(());
        }
        if let Some(memory) = self.memory(index) {
            let at = Self::check_memory(index, memory, offset, data.len())?;
            memory.write_at(at, data);
            return Ok(());
        }
        self.function.bar_write(index, offset, data).map_err(refusal)
    }

    fn map_bar(&self, index: u8, range: Range<u64>) -> Result<MappedRegion, DeviceError> {
        let bar = self.bar(index).ok_or(DeviceError::NoSuchBar { index })?;
        let Range { start, end } = range;
        let offered = |whole: &Range<u64>| {
            whole.start <= start && start < end && end <= whole.end && start.is_multiple_of(4096)
        };
        match self.memory(index).filter(|_| bar.mappable.iter().any(offered)) {
            Some(memory) => {
                MappedRegion::map(memory, start, (end - start) as usize).map_err(|source| {
                    DeviceError::Refused { operation: "mapping memory".to_owned(), source }
                })
            }
            None => Err(DeviceError::NotMappable { index, start, end }),
        }
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        self.function.interrupt_count(model_kind(kind))
    }

    fn enable_interrupts(
        &self,
        kind: InterruptKind,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        let available = self.interrupt_count(kind);
        let asked = triggers.len() as u32;
        if !(1..=available).contains(&asked) {
            return Err(DeviceError::NoSuchInterrupt { kind, asked, available });
        }
        let mut enabled = self.enabled();
        self.disable(&mut enabled)?;
        self.function.set_irqs(model_kind(kind), triggers).map_err(refusal)?;
        *enabled = Some(kind);
        Ok(())
    }

    fn change_triggers(
        &self,
        kind: InterruptKind,
        first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        let available = self.interrupt_count(kind);
        let asked = first + triggers.len() as u32;
        if *self.enabled() != Some(kind) || asked > available {
            return Err(DeviceError::NoSuchInterrupt { kind, asked, available });
        }
        self.function.change_irqs(model_kind(kind), first, triggers).map_err(refusal)
    }

    fn disable_interrupts(&self, kind: InterruptKind) -> Result<(), DeviceError> {
        let mut enabled = self.enabled();
        if *enabled == Some(kind) { self.disable(&mut enabled) } else { Ok(()) }
    }

    fn unmask_intx(&self) -> Result<(), DeviceError> {
        self.function.unmask_intx();
        Ok(())
    }

    fn iova_ranges(&self) -> &[RangeInclusive<u64>] {
        &[0..=u64::MAX]
    }

    fn dma_map_part(
        &self,
        iova: u64,
        memory: &SharedMemory,
        part: Range<u64>,
    ) -> Result<(), DeviceError> {
        let file = memory.as_fd().try_clone_to_owned().map_err(|source| DeviceError::Refused {
            operation: "sharing memory with the model".to_owned(),
            source,
        })?;
        let memory = DmaMemory::new(file.into(), part.start, part.end - part.start);
        self.function.dma_map(iova, memory).map_err(refusal)
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), DeviceError> {
        self.function.dma_unmap(iova, len).map_err(refusal)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.reset_by(ResetLevel::Function)
    }

    fn resets(&self) -> Vec<Reset> {
        self.misfortunes().resets.iter().map(|(reset, _)| reset.clone()).collect()
    }

    fn reset_by(&self, level: ResetLevel) -> Result<(), DeviceError> {
        let found = {
            let misfortunes = self.misfortunes();
            misfortunes.resets.iter().find(|(reset, _)| reset.level == level).cloned()
        };
        match found {
            Some((reset, _)) if reset.affected.iter().any(|(_, is_ours)| !is_ours) => {
                panic!("{reset} was asked for, which is not for us to make")
            }
            Some((_, effect)) => self.reset_as(effect),
            None => Err(DeviceError::NoReset { reason: "it has none".to_owned() }),
        }
    }

    fn watch(&self, event: DeviceEvent, trigger: BorrowedFd<'_>) -> Result<bool, DeviceError> {
        let copy = trigger.try_clone_to_owned().map_err(|source| DeviceError::Refused {
            operation: "keeping a descriptor".to_owned(),
            source,
        })?;
        let watchers = &mut self.misfortunes().watchers;
        watchers.retain(|(watched, _)| *watched != event);
        watchers.push((event, copy));
        Ok(true)
    }
}

fn model_kind(kind: InterruptKind) -> iohost_device_models::InterruptKind {
    match kind {
        InterruptKind::IntX => iohost_device_models::InterruptKind::IntX,
        InterruptKind::Msi => iohost_device_models::InterruptKind::Msi,
        InterruptKind::MsiX => iohost_device_models::InterruptKind::MsiX,
    }
}

fn refusal(err: FunctionError) -> DeviceError {
    match err {
        FunctionError::NoSuchBar { index } => DeviceError::NoSuchBar { index },
        FunctionError::Range { region, offset, len, size } => {
            DeviceError::Range { region, offset, len, size }
        }
        FunctionError::Dma(DmaError::NotMapped { iova, len }) => {
            DeviceError::NotMapped { iova, len }
        }
        other => DeviceError::Refused {
            operation: "the emulated function".to_owned(),
            source: io::Error::other(other),
        },
    }
}

impl<M: DeviceModel> fmt::Debug for FakeDevice<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FakeDevice").field(self.function.identity()).finish()
    }
}
