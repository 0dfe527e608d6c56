//! A device as its driver sees it: interrupts by index, memory by address.

mod config_state;
mod dma;

use std::collections::HashSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::AcqRel, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Mutex};

use iohost_device_backend::config_space::{self, BUS_MASTER, MEMORY_SPACE, change_command};
use iohost_device_backend::quiesce::{Outcome, Quiesced, SavedBars, answers, quiesce};
use iohost_device_backend::{
    DeviceBackend, DeviceError, DeviceEvent, InterruptKind, IovaSpace, ResetLevel,
};
use iohost_dispatch::{InterruptLine, Signal};
use iohost_interface::{IOReturn, with_sources};
use iohost_registers::MappedRegion;
use log::warn;

use self::config_state::ConfigState;
use self::dma::Dma;
pub(crate) use self::dma::{Limits, Piece, Segment};
use crate::device_events::Events;
use crate::registry::Properties;

/// Why the device's locks are never poisoned.
const NO_PANIC: &str = "no foreign code runs under a device lock";

/// The snapshot that lasts until the device is closed.
const PERMANENT: usize = 1;

/// One device and everything its driver has of it. What is left when the driver is gone is taken
/// back on drop: interrupts, mappings, bus mastering.
#[derive(Debug)]
pub struct Device {
    backend: Arc<dyn DeviceBackend>,
    allowed: Vec<InterruptKind>,
    /// What it is to be brought back to.
    saved: SavedBars,
    events: Events,
    interrupts: Mutex<Interrupts>,
    dma: Mutex<Dma>,
    /// What is mapped, by BAR and start, for as long as the device is open: a driver may hold
    /// addresses.
    mapped: Mutex<BTreeMap<(u8, u64), MappedRegion>>,
    /// Its driver has closed it.
    closed: AtomicBool,
    /// What the driver had kept: the last snapshot, and the permanent one.
    kept: Mutex<[Option<ConfigState>; 2]>,
}

#[derive(Debug, Default)]
struct Interrupts {
    /// What the driver chose, with the number of vectors.
    chosen: Option<(InterruptKind, u32)>,
    /// The driver looked before it chose: what there is by default stays.
    resolved: bool,
    /// One eventfd per vector of the kind that is enabled.
    signals: Vec<Arc<Signal>>,
    enabled: Option<InterruptKind>,
    /// Vectors that have a source.
    taken: HashSet<u32>,
    /// The vectors from here on are disabled: what they signal goes to `late`, of which each has its
    /// own, since the kernel grumbles about an eventfd that two interrupts have.
    active: u32,
    late: Vec<Signal>,
    /// Interrupts that came to nobody: of disabled vectors, or before a vector had its source.
    dropped: u64,
}

impl Interrupts {
    /// Throws away what a vector has signalled, and counts it.
    fn drop_undelivered(&mut self, vectors: std::ops::Range<u32>) {
        let vectors = vectors.start as usize..vectors.end as usize;
        let signals = self.signals.get(vectors).unwrap_or_default();
        self.dropped += signals.iter().map(|signal| signal.take()).sum::<u64>();
    }
}

/// An interrupt that has been taken for a source.
pub(crate) struct TakenInterrupt {
    pub(crate) signal: Arc<Signal>,
    pub(crate) line: InterruptLine,
    pub(crate) vector: u32,
}

impl Device {
    /// Takes a device over from whoever had it last: makes it safe, resets it. Returns with it what
    /// became of that.
    ///
    /// Errors: `Quarantined` for a device that is not fit to be used.
    pub fn take_over(
        backend: Arc<dyn DeviceBackend>,
        allowed: Vec<InterruptKind>,
    ) -> Result<(Arc<Self>, Quiesced), DeviceError> {
        let saved = SavedBars::of(&*backend)?;
        let quiesced = quiesce(&*backend, &saved);
        if quiesced.outcome == Outcome::Quarantined {
            return Err(DeviceError::Quarantined(Box::new(quiesced)));
        }
        change_command(&*backend, MEMORY_SPACE, BUS_MASTER)?;
        let events = Events::arm(&*backend).map_err(|source| DeviceError::Refused {
            operation: "watching for the device's events".to_owned(),
            source,
        })?;
        let space = IovaSpace::new(backend.iova_ranges());
        let device = Self {
            allowed,
            saved,
            events,
            interrupts: Mutex::default(),
            dma: Mutex::new(Dma::new(space)),
            mapped: Mutex::default(),
            closed: AtomicBool::new(false),
            kept: Mutex::default(),
            backend,
        };
        Ok((Arc::new(device), quiesced))
    }

    /// How the device is reached.
    pub fn backend(&self) -> &dyn DeviceBackend {
        &*self.backend
    }

    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    /// Leaves the device safe for whoever has it next. Memory that it could reach is taken back
    /// last, and stays where the device may still reach it.
    pub fn give_back(&self) -> Quiesced {
        self.disable_interrupts();
        let quiesced = quiesce(&*self.backend, &self.saved);
        match quiesced.outcome {
            Outcome::Clean | Outcome::Reset => self.unmap_all(),
            // The kernel takes the mappings away when the device is closed.
            Outcome::Quarantined => self.keep_all(),
        }
        quiesced
    }

    /// Lets go of a device that is going away or is gone: no interrupts, no transfers, no reset,
    /// which would only take time.
    pub fn let_go(&self) {
        self.disable_interrupts();
        // One that is gone has nothing left to stop.
        let _ = change_command(&*self.backend, 0, BUS_MASTER);
        self.unmap_all();
    }

    /// What its configuration space says it is, as properties.
    pub(crate) fn properties(&self) -> Properties {
        let read = |offset, len: usize| {
            let mut bytes = [0; 4];
            let read = self.backend.config_read(offset, &mut bytes[..len]);
            read.map(|()| u32::from_le_bytes(bytes)).ok()
        };
        let class = read(0x08, 4);
        let properties = [
            ("vendor-id", read(0x00, 2)),
            ("device-id", read(0x02, 2)),
            ("revision-id", class.map(|class| class & 0xff)),
            ("class-code", class.map(|class| class >> 8)),
            ("subsystem-vendor-id", read(0x2c, 2)),
            ("subsystem-id", read(0x2e, 2)),
        ];
        let known = properties.into_iter().filter_map(|(name, value)| Some((name, value?)));
        let mut known: Properties =
            known.map(|(name, value)| (name.to_owned(), value.into())).collect();
        known.insert("IOClass".to_owned(), "IOPCIDevice".into());
        known
    }

    /// Reads configuration space for the driver.
    pub(crate) fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), DeviceError> {
        let read = self.backend.config_read(offset, data);
        // The vendor id of nobody.
        if offset < 2 && data.iter().all(|byte| *byte == 0xff) {
            self.events.tell(DeviceEvent::Gone);
        }
        self.noticed(read)
    }

    /// Writes configuration space for the driver.
    pub(crate) fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), DeviceError> {
        self.noticed(self.backend.config_write(offset, data))
    }

    /// Reads a BAR for the driver.
    pub(crate) fn bar_read(
        &self,
        bar: u8,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), DeviceError> {
        let read = self.backend.bar_read(bar, offset, data);
        // Ones can be what a register has; the vendor id tells.
        if read.is_ok() && data.iter().all(|byte| *byte == 0xff) && !answers(&*self.backend) {
            self.events.tell(DeviceEvent::Gone);
        }
        self.noticed(read)
    }

    /// Writes a BAR for the driver.
    pub(crate) fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.noticed(self.backend.bar_write(bar, offset, data))
    }

    /// An access that found nobody is news.
    fn noticed(&self, done: Result<(), DeviceError>) -> Result<(), DeviceError> {
        if let Err(DeviceError::Gone(_)) = &done {
            self.events.tell(DeviceEvent::Gone);
        }
        done
    }

    /// The device, unless its driver has closed it.
    pub(crate) fn opened(&self) -> Result<&dyn DeviceBackend, IOReturn> {
        if self.closed.load(Acquire) { Err(IOReturn::NOT_OPEN) } else { Ok(&*self.backend) }
    }

    /// Opens the device that its driver had closed.
    pub(crate) fn open(&self) -> Result<(), IOReturn> {
        if self.closed.compare_exchange(true, false, AcqRel, Acquire).is_err() {
            return Err(IOReturn::NOT_OPEN);
        }
        change_command(&*self.backend, MEMORY_SPACE, BUS_MASTER).map_err(|err| {
            self.closed.store(true, Release);
            refused(&err)
        })
    }

    /// Takes everything back that the driver has of the device. It holds no mapping of a BAR.
    pub(crate) fn close(&self) -> Result<(), IOReturn> {
        if self.closed.swap(true, AcqRel) {
            return Err(IOReturn::NOT_OPEN);
        }
        self.disable_interrupts();
        let quieted = change_command(&*self.backend, 0, MEMORY_SPACE | BUS_MASTER);
        self.unmap_all();
        self.mapped.lock().expect(NO_PANIC).clear();
        self.kept.lock().expect(NO_PANIC)[PERMANENT] = None;
        quieted.map_err(|err| refused(&err))
    }

    /// Keeps what configuration space says, in one of two places.
    pub(crate) fn save_state(&self, place: u32) -> Result<(), IOReturn> {
        let backend = self.opened()?;
        let mut kept = self.kept.lock().expect(NO_PANIC);
        let place = kept.get_mut(place as usize).ok_or(IOReturn::BAD_ARGUMENT)?;
        *place = Some(ConfigState::save(backend).map_err(|err| refused(&err))?);
        Ok(())
    }

    /// Writes back what was kept there.
    pub(crate) fn restore_state(&self, place: u32) -> Result<(), IOReturn> {
        let backend = self.opened()?;
        let kept = self.kept.lock().expect(NO_PANIC);
        let state = kept.get(place as usize).ok_or(IOReturn::BAD_ARGUMENT)?;
        state.as_ref().ok_or(IOReturn::NOT_READY)?.restore(backend).map_err(|err| {
            warn!(reason = with_sources(&err); "the device's state was not restored");
            err.code()
        })
    }

    /// Maps bytes of a BAR; `UNSUPPORTED` unless the backend offers them, `OVERRUN` past its end.
    pub(crate) fn map_bar(&self, bar: u8, offset: u64, len: u64) -> Result<*mut u8, IOReturn> {
        let backend = self.opened()?;
        let info = backend.bar(bar).ok_or(IOReturn::NOT_FOUND)?;
        let end = offset.checked_add(len).filter(|end| len > 0 && *end <= info.size);
        let end = end.ok_or(IOReturn::OVERRUN)?;
        let holds = |range: &&Range<u64>| range.start <= offset && end <= range.end;
        let range = info.mappable.iter().find(holds).ok_or(IOReturn::UNSUPPORTED)?.clone();
        let start = range.start;
        let mut mapped = self.mapped.lock().expect(NO_PANIC);
        let region = match mapped.entry((bar, start)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                entry.insert(backend.map_bar(bar, range).map_err(|err| refused(&err))?)
            }
        };
        Ok(region.address().wrapping_add((offset - start) as usize))
    }

    /// Chooses a kind of interrupt. See `IOPCIDevice::configure_interrupts` for the rules.
    pub(crate) fn configure_interrupts(
        &self,
        kind: InterruptKind,
        required: u32,
        requested: u32,
    ) -> Result<(), IOReturn> {
        if required == 0 || required > requested {
            return Err(IOReturn::BAD_ARGUMENT);
        }
        let mut interrupts = self.interrupts.lock().expect(NO_PANIC);
        if let Some((chosen, count)) = interrupts.chosen {
            let same = chosen == kind && count >= required;
            return if same { Ok(()) } else { Err(IOReturn::UNSUPPORTED) };
        }
        if interrupts.resolved {
            let enough = self.count_by_default(kind) >= required;
            return if enough { Ok(()) } else { Err(IOReturn::UNSUPPORTED) };
        }
        let available = self.count(kind);
        if available == 0 {
            return Err(self.lacking(kind));
        }
        if available < required {
            return Err(IOReturn::NO_SPACE);
        }
        let granted = match kind {
            // A device sends a power of two of different messages.
            InterruptKind::Msi => requested.min(available).next_power_of_two(),
            InterruptKind::IntX | InterruptKind::MsiX => requested,
        };
        interrupts.chosen = Some((kind, granted.min(available)));
        interrupts.active = granted.min(available);
        Ok(())
    }

    /// Changes how many vectors are enabled. See `IOPCIDevice::resize_interrupts` for the rules.
    pub(crate) fn resize_interrupts(&self, count: u32) -> Result<(), IOReturn> {
        let mut interrupts = self.interrupts.lock().expect(NO_PANIC);
        let Some((kind, _)) = interrupts.chosen else { return Err(IOReturn::NOT_READY) };
        if kind == InterruptKind::IntX {
            return Err(IOReturn::UNSUPPORTED);
        }
        if count > self.count(kind) {
            return Err(IOReturn::NO_SPACE);
        }
        let room = interrupts.signals.len() as u32;
        if interrupts.enabled.is_none() || count > room {
            let chosen = interrupts.chosen.map_or(count, |(_, chosen)| chosen.max(count));
            interrupts.chosen = Some((kind, chosen));
            interrupts.active = count;
            return match interrupts.enabled.take() {
                Some(kind) => self.enable(&mut interrupts, kind),
                None => Ok(()),
            };
        }
        let active = interrupts.active;
        let changed = if count < active { count..active } else { active..count };
        let triggers: Vec<_> = changed
            .clone()
            .map(|vector| match vector < count {
                true => interrupts.signals[vector as usize].as_fd(),
                false => interrupts.late[vector as usize].as_fd(),
            })
            .collect();
        if !triggers.is_empty() {
            let done = self.backend.change_triggers(kind, changed.start, &triggers);
            done.map_err(|err| refused(&err))?;
        }
        interrupts.active = count;
        if count < active {
            // The kernel has let go of these: what they still hold came too late.
            interrupts.drop_undelivered(changed);
        }
        Ok(())
    }

    /// Interrupts that came to nobody so far.
    pub(crate) fn dropped_interrupts(&self) -> u64 {
        let mut interrupts = self.interrupts.lock().expect(NO_PANIC);
        let late: u64 = interrupts.late.iter().map(Signal::take).sum();
        interrupts.dropped += late;
        interrupts.dropped
    }

    /// The answer to a driver that asks for a kind of interrupt that is not there: it may have
    /// mistaken one kind of message for the other.
    fn lacking(&self, kind: InterruptKind) -> IOReturn {
        let other = match kind {
            InterruptKind::IntX => 0,
            InterruptKind::Msi => self.count(InterruptKind::MsiX),
            InterruptKind::MsiX => self.count(InterruptKind::Msi),
        };
        if other > 0 { IOReturn::BAD_ARGUMENT } else { IOReturn::UNSUPPORTED }
    }

    /// The kind of the interrupt at `index`.
    pub(crate) fn interrupt_kind(&self, index: u32) -> Result<InterruptKind, IOReturn> {
        let mut interrupts = self.interrupts.lock().expect(NO_PANIC);
        self.resolve(&mut interrupts, index).map(|(kind, _)| kind)
    }

    /// Takes the interrupt at `index` for a source.
    pub(crate) fn take_interrupt(self: &Arc<Self>, index: u32) -> Result<TakenInterrupt, IOReturn> {
        let mut interrupts = self.interrupts.lock().expect(NO_PANIC);
        let (kind, vector) = self.resolve(&mut interrupts, index)?;
        if interrupts.enabled.is_some_and(|enabled| enabled != kind)
            || interrupts.taken.contains(&vector)
        {
            return Err(IOReturn::NO_RESOURCES);
        }
        match interrupts.enabled {
            None => self.enable(&mut interrupts, kind)?,
            // What came while the vector had no source is not for this one.
            Some(_) => interrupts.drop_undelivered(vector..vector + 1),
        }
        interrupts.taken.insert(vector);
        let device = Arc::downgrade(self);
        let line = match kind {
            InterruptKind::IntX => InterruptLine::Level(Box::new(move || {
                let Some(device) = device.upgrade() else { return };
                if let Err(err) = device.backend.unmask_intx() {
                    warn!(reason = with_sources(&err); "the interrupt line stays masked");
                }
            })),
            InterruptKind::Msi | InterruptKind::MsiX => InterruptLine::Edge,
        };
        Ok(TakenInterrupt { signal: interrupts.signals[vector as usize].clone(), line, vector })
    }

    /// Gives an interrupt back. With the last one, the device's interrupts are disabled.
    pub(crate) fn give_back_interrupt(&self, vector: u32) {
        let mut interrupts = self.interrupts.lock().expect(NO_PANIC);
        interrupts.taken.remove(&vector);
        // What came and was not delivered is not for the next source.
        interrupts.drop_undelivered(vector..vector + 1);
        if interrupts.taken.is_empty() {
            drop(interrupts);
            self.disable_interrupts();
        }
    }

    /// Resets the device for its driver, which has to set it up anew; interrupts that are in use
    /// work again afterwards. `None` is the gentlest way that there is.
    pub(crate) fn reset(&self, level: Option<ResetLevel>) -> Result<(), IOReturn> {
        let mut interrupts = self.interrupts.lock().expect(NO_PANIC);
        let kept = self.header().map_err(|err| refused(&err))?;
        let done = match level {
            None => self.backend.reset(),
            Some(level) => self.backend.reset_by(level),
        };
        done.map_err(|err| refused(&err))?;
        self.restore_header(&kept).map_err(|err| refused(&err))?;
        if let Some(kind) = interrupts.enabled.take() {
            self.enable(&mut interrupts, kind)?;
        }
        Ok(())
    }

    /// What a reset has to leave as it was, but for the command register: base addresses, cache
    /// line and latency, the interrupt line.
    fn header(&self) -> Result<Vec<(u16, u32)>, DeviceError> {
        let registers = std::iter::once(0x0c).chain((0x10..0x28).step_by(4)).chain([0x30, 0x3c]);
        registers
            .map(|register| Ok((register, config_space::read(&*self.backend, register, 4)?)))
            .collect()
    }

    /// Puts it back where it differs, and has the device decode memory again.
    fn restore_header(&self, kept: &[(u16, u32)]) -> Result<(), DeviceError> {
        if !answers(&*self.backend) {
            self.events.tell(DeviceEvent::Gone);
            return Err(DeviceError::Gone("it does not answer after its reset".to_owned()));
        }
        for &(register, value) in kept {
            if config_space::read(&*self.backend, register, 4)? != value {
                self.backend.config_write(register, &value.to_le_bytes())?;
            }
        }
        change_command(&*self.backend, MEMORY_SPACE, 0)
    }

    /// Lets the device reach pieces of memory; see [`Dma::prepare`].
    pub(crate) fn prepare(
        &self,
        pieces: Vec<Piece>,
        limits: Limits,
    ) -> Result<Vec<Segment>, IOReturn> {
        let mut dma = self.dma.lock().expect(NO_PANIC);
        // Asked under the lock, so that nothing is mapped after `close` has unmapped all.
        dma.prepare(self.opened()?, pieces, limits)
    }

    /// Takes memory back from the device; see [`Dma::complete`].
    pub(crate) fn complete(&self, address: u64) -> Result<(), IOReturn> {
        self.dma.lock().expect(NO_PANIC).complete(&*self.backend, address)
    }

    /// Why the backend refused the last mapping that it refused; told once.
    pub(crate) fn last_dma_refusal(&self) -> Option<DeviceError> {
        self.dma.lock().expect(NO_PANIC).last_refusal.take()
    }

    fn count(&self, kind: InterruptKind) -> u32 {
        if self.allowed.contains(&kind) { self.backend.interrupt_count(kind) } else { 0 }
    }

    /// How many of a kind there are for a driver that chose nothing.
    fn count_by_default(&self, kind: InterruptKind) -> u32 {
        match kind {
            InterruptKind::IntX | InterruptKind::Msi => self.count(kind).min(1),
            InterruptKind::MsiX => 0,
        }
    }

    /// Which vector of which kind an index means. From here on that stays so.
    fn resolve(
        &self,
        interrupts: &mut Interrupts,
        index: u32,
    ) -> Result<(InterruptKind, u32), IOReturn> {
        interrupts.resolved = true;
        let found = match interrupts.chosen {
            Some((kind, _)) => (index < interrupts.active).then_some((kind, index)),
            // Not configured: the line first, then one MSI vector.
            None => {
                let lines = self.count_by_default(InterruptKind::IntX);
                let messages = self.count_by_default(InterruptKind::Msi);
                if index < lines {
                    Some((InterruptKind::IntX, 0))
                } else {
                    (index - lines < messages).then_some((InterruptKind::Msi, index - lines))
                }
            }
        };
        found.ok_or(IOReturn::NO_INTERRUPT)
    }

    fn enable(&self, interrupts: &mut Interrupts, kind: InterruptKind) -> Result<(), IOReturn> {
        let count = match interrupts.chosen {
            Some((_, count)) => count,
            None => 1,
        };
        while interrupts.signals.len() < count as usize {
            let signal = || Signal::new().map_err(|_| IOReturn::NO_RESOURCES);
            let (signal, late) = (signal()?, signal()?);
            interrupts.signals.push(Arc::new(signal));
            interrupts.late.push(late);
        }
        if interrupts.chosen.is_none() {
            interrupts.active = count;
        }
        let active = interrupts.active as usize;
        let signals = interrupts.signals.iter().map(|signal| signal.as_fd());
        let triggers: Vec<_> = signals
            .zip(&interrupts.late)
            .enumerate()
            .map(|(vector, (signal, late))| if vector < active { signal } else { late.as_fd() })
            .collect();
        if kind != InterruptKind::IntX {
            // A message is a write of the device: it needs to be bus master for it.
            change_command(&*self.backend, BUS_MASTER, 0).map_err(|err| refused(&err))?;
        }
        self.backend.enable_interrupts(kind, &triggers).map_err(|err| refused(&err))?;
        interrupts.enabled = Some(kind);
        Ok(())
    }

    fn disable_interrupts(&self) {
        let mut interrupts = self.interrupts.lock().expect(NO_PANIC);
        if let Some(kind) = interrupts.enabled.take()
            && let Err(err) = self.backend.disable_interrupts(kind)
        {
            warn!(reason = with_sources(&err); "interrupts stay enabled");
        }
        let all = interrupts.signals.len() as u32;
        interrupts.drop_undelivered(0..all);
        interrupts.dropped += interrupts.late.iter().map(Signal::take).sum::<u64>();
        interrupts.signals.clear();
        interrupts.late.clear();
    }

    fn unmap_all(&self) {
        self.dma.lock().expect(NO_PANIC).complete_all(&*self.backend);
    }

    fn keep_all(&self) {
        self.dma.lock().expect(NO_PANIC).keep_all();
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.disable_interrupts();
        let _ = change_command(&*self.backend, 0, BUS_MASTER);
        self.unmap_all();
    }
}

/// A refusal of the backend, logged, as the status a driver sees.
pub(crate) fn refused(err: &DeviceError) -> IOReturn {
    warn!(reason = with_sources(err); "the device refused");
    err.code()
}
