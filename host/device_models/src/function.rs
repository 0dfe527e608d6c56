//! A device model in a PCI function.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use crate::config_space::{CONFIG_SIZE, ConfigSpace};
use crate::dma::{DmaError, DmaMemory, DmaTable};
use crate::faults::{Fault, Faults};
use crate::interrupt::{InterruptKind, Interrupts};
use crate::model::{BarSpec, Bus, DeviceModel, Identity};

/// One emulated PCI function, and what its user set up around it.
///
/// - Thread: every method can be called from any thread and returns without waiting for the
///   device; accesses are serialised.
/// - At power-on: bus mastering off, interrupts disabled, nothing mapped.
/// - Drop: a timer under way is forgotten.
///
/// Known differences from a function behind the kernel's VFIO:
/// 1. A BAR answers while memory decoding is off in the command register, and wherever the BAR
///    register points: over vfio-user, BARs are regions and not addresses. VFIO refuses with EIO.
/// 2. [`reset`](Self::reset) leaves the command register and the BARs at their power-on values;
///    VFIO restores what was there before the reset.
/// 3. DMA is checked to the byte; an IOMMU checks pages.
#[derive(Debug)]
pub struct Function<M: DeviceModel> {
    identity: Identity,
    shared: Arc<Shared<M>>,
    timer_thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared<M> {
    state: Mutex<State<M>>,
    /// A timer was set, or the function is being dropped.
    changed: Condvar,
}

#[derive(Debug)]
struct State<M> {
    model: M,
    config: ConfigSpace,
    dma: DmaTable,
    interrupts: Interrupts,
    faults: Faults,
    timers: Vec<(Instant, u32)>,
    stopping: bool,
}

/// Why a function did not take an access or a setting.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FunctionError {
    /// There is no such BAR.
    #[error("BAR {index} is not there")]
    NoSuchBar {
        /// The BAR asked for.
        index: u8,
    },
    /// The access is not inside.
    #[error("{len} bytes at {offset:#x} of {region}, which has {size:#x} bytes")]
    Range {
        /// `configuration space` or `BAR n`.
        region: String,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: usize,
        /// Bytes of the region.
        size: u64,
    },
    /// More vectors than the function has.
    #[error("{kind} vectors {start}..{end} of a function that has {available}")]
    NoSuchInterrupt {
        /// The kind.
        kind: InterruptKind,
        /// First vector.
        start: u32,
        /// One past the last vector.
        end: u32,
        /// Vectors the function has.
        available: u32,
    },
    /// Memory cannot be mapped or unmapped.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// A descriptor could not be duplicated.
    #[error("duplicating a descriptor")]
    Duplicate(#[from] std::io::Error),
    /// It was to: [`Fault::RefusesSetUp`].
    #[error("refused, as a fault on purpose")]
    OnPurpose,
}

impl<M: DeviceModel> Function<M> {
    /// A function at power-on.
    pub fn new(model: M) -> Self {
        let identity = model.identity();
        let state = State {
            config: ConfigSpace::new(&identity),
            dma: DmaTable::default(),
            interrupts: Interrupts::default(),
            faults: Faults::default(),
            timers: Vec::new(),
            stopping: false,
            model,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        Self { identity, shared, timer_thread: Mutex::new(None) }
    }

    /// What the device is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Bytes of configuration space.
    pub const fn config_size(&self) -> u16 {
        CONFIG_SIZE as u16
    }

    /// How many vectors of a kind the function has.
    pub fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        match kind {
            InterruptKind::IntX => self.identity.intx.into(),
            InterruptKind::Msi => self.identity.msi_vectors.into(),
            InterruptKind::MsiX => self.identity.msi_x.map_or(0, |msi_x| msi_x.vectors.into()),
        }
    }

    /// Reads configuration space.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        check_config(offset, data.len())?;
        self.lock().config.read(offset.into(), data);
        Ok(())
    }

    /// Writes configuration space; read-only bits stay as they are.
    pub fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        check_config(offset, data.len())?;
        self.run(|_, bus| {
            bus.config.write(offset.into(), data);
            settle_interrupts(bus);
        });
        Ok(())
    }

    /// Reads a BAR as one access of the device. What the device makes of its width is its own
    /// affair.
    pub fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) -> Result<(), FunctionError> {
        self.check_bar(index, offset, data.len())?;
        self.run(|model, bus| {
            model.bar_read(bus, index, offset, data);
            bus.faults.change_read(data);
        });
        Ok(())
    }

    /// Writes a BAR as one access of the device.
    pub fn bar_write(&self, index: u8, offset: u64, data: &[u8]) -> Result<(), FunctionError> {
        self.check_bar(index, offset, data.len())?;
        self.run(|model, bus| {
            if !bus.faults.loses_write() {
                model.bar_write(bus, index, offset, data);
            }
        });
        Ok(())
    }

    /// Lets the device reach `memory` at `iova`.
    pub fn dma_map(&self, iova: u64, memory: DmaMemory) -> Result<(), FunctionError> {
        let mut state = self.lock();
        if state.faults.refuses_set_up() {
            return Err(FunctionError::OnPurpose);
        }
        Ok(state.dma.map(iova, memory)?)
    }

    /// Takes a whole mapping back. The device reaches none of it once this has returned.
    pub fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), FunctionError> {
        Ok(self.lock().dma.unmap(iova, len)?)
    }

    /// Takes all mappings back.
    pub fn dma_unmap_all(&self) {
        self.lock().dma.unmap_all();
    }

    /// How many transfers were stopped, wholly or in part: outside all mappings, or while the
    /// function was not bus master. Counts from the start, through resets.
    pub fn blocked_dma(&self) -> u64 {
        self.lock().dma.blocked()
    }

    /// Lets vector *n* of a kind signal `triggers[n]`, an eventfd; replaces what was enabled.
    /// An empty list disables the kind.
    ///
    /// Enabling messages sets the enable bit of their capability, as VFIO does. A line that is asserted
    /// already interrupts at once.
    pub fn set_irqs(
        &self,
        kind: InterruptKind,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), FunctionError> {
        let mut owned = Vec::with_capacity(triggers.len());
        for trigger in triggers {
            owned.push(Some(File::from(trigger.try_clone_to_owned()?)));
        }
        self.check_vectors(kind, 0, triggers.len() as u32)?;
        if !triggers.is_empty() && self.lock().faults.refuses_set_up() {
            return Err(FunctionError::OnPurpose);
        }
        self.run(|_, bus| {
            bus.interrupts.disable(kind);
            bus.interrupts.set(kind, 0, owned);
            follow_triggers(bus, kind);
        });
        Ok(())
    }

    /// Lets vectors `first..` of a kind signal `triggers` instead of what they signalled; the
    /// others stay.
    pub fn change_irqs(
        &self,
        kind: InterruptKind,
        first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), FunctionError> {
        let mut owned = Vec::with_capacity(triggers.len());
        for trigger in triggers {
            owned.push(Some(File::from(trigger.try_clone_to_owned()?)));
        }
        self.set_some_irqs(kind, first, owned)
    }

    /// Sets some triggers and leaves the others, as a vfio-user message does.
    pub(crate) fn set_some_irqs(
        &self,
        kind: InterruptKind,
        start: u32,
        triggers: Vec<Option<File>>,
    ) -> Result<(), FunctionError> {
        self.check_vectors(kind, start, triggers.len() as u32)?;
        let sets_some = triggers.iter().any(Option::is_some);
        if sets_some && self.lock().faults.refuses_set_up() {
            return Err(FunctionError::OnPurpose);
        }
        self.run(|_, bus| {
            bus.interrupts.set(kind, start as usize, triggers);
            follow_triggers(bus, kind);
        });
        Ok(())
    }

    /// Holds the INTx line back, as the function itself does after each interrupt.
    pub fn mask_intx(&self) {
        self.lock().interrupts.mask_line();
    }

    /// Lets the INTx line through again; if it is asserted it interrupts at once.
    pub fn unmask_intx(&self) {
        self.lock().interrupts.unmask_line();
    }

    /// Brings configuration space back to power-on, disables all interrupts and resets the
    /// model. Mappings stay.
    pub fn reset(&self) {
        self.run(|model, bus| {
            bus.interrupts.disable(InterruptKind::IntX);
            bus.interrupts.disable(InterruptKind::Msi);
            bus.interrupts.disable(InterruptKind::MsiX);
            bus.config.reset();
            bus.update_intx();
            model.reset(bus);
        });
    }

    /// Forgets everything the present user set up, and resets.
    pub fn disconnect(&self) {
        self.dma_unmap_all();
        self.reset();
    }

    /// Has the device do something wrong the next `times` times that it could. Replaces what it
    /// was to do wrong in the same place: reads, writes, interrupts, transfers, settings. A reset heals
    /// nothing.
    pub fn fail_next(&self, fault: Fault, times: u32) {
        self.lock().faults.plan(fault, times);
    }

    /// From now on nothing goes wrong.
    pub fn heal(&self) {
        self.lock().faults.forget();
    }

    /// How many faults have happened since the function was made.
    pub fn faults(&self) -> u64 {
        self.lock().faults.happened()
    }

    /// Interrupts without a cause: by the message of a vector, or by the line for a moment,
    /// whichever its user has enabled.
    pub fn interrupt_without_cause(&self, vector: u16) {
        self.run(|_, bus| {
            bus.send_msi_x(vector);
            bus.send_msi(vector as u8);
            if !bus.msi_enabled() && !bus.msi_x_enabled() {
                bus.assert_intx();
                bus.deassert_intx();
            }
        });
    }

    /// Reaches the model itself, between accesses.
    pub fn with_model<R>(&self, look: impl FnOnce(&mut M, &mut Bus<'_>) -> R) -> R {
        self.run(look)
    }

    fn run<R>(&self, act: impl FnOnce(&mut M, &mut Bus<'_>) -> R) -> R {
        let mut state = self.lock();
        let timers = state.timers.len();
        let result = state.run(act);
        if state.timers.len() > timers {
            drop(state);
            self.wake_timer_thread();
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, State<M>> {
        self.shared.state.lock().expect("a device model does not panic")
    }

    /// A device that never waits for anything needs no thread, so the first timer starts it.
    fn wake_timer_thread(&self) {
        let mut thread = self.timer_thread.lock().expect("spawning does not panic");
        if thread.is_none() {
            let shared = self.shared.clone();
            let name = "device-timer".to_owned();
            let spawned = Builder::new().name(name).spawn(move || shared.keep_time());
            *thread = Some(spawned.expect("a process that emulates a device can have a thread"));
        }
        self.shared.changed.notify_one();
    }

    fn check_bar(&self, index: u8, offset: u64, len: usize) -> Result<(), FunctionError> {
        let bar = self.identity.bars.get(usize::from(index)).copied().flatten();
        let BarSpec { size } = bar.ok_or(FunctionError::NoSuchBar { index })?;
        check_range(offset, len, size.into(), || format!("BAR {index}"))
    }

    fn check_vectors(
        &self,
        kind: InterruptKind,
        start: u32,
        count: u32,
    ) -> Result<(), FunctionError> {
        let available = self.interrupt_count(kind);
        let end = start.saturating_add(count);
        match end <= available {
            true => Ok(()),
            false => Err(FunctionError::NoSuchInterrupt { kind, start, end, available }),
        }
    }
}

impl<M: DeviceModel> Drop for Function<M> {
    fn drop(&mut self) {
        if let Ok(Some(thread)) = self.timer_thread.get_mut().map(Option::take) {
            if let Ok(mut state) = self.shared.state.lock() {
                state.stopping = true;
            }
            self.shared.changed.notify_one();
            // It only fails by a panic of the model, which was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl<M: DeviceModel> State<M> {
    fn run<R>(&mut self, act: impl FnOnce(&mut M, &mut Bus<'_>) -> R) -> R {
        let mut bus = Bus {
            config: &mut self.config,
            dma: &mut self.dma,
            interrupts: &mut self.interrupts,
            faults: &mut self.faults,
            timers: &mut self.timers,
        };
        act(&mut self.model, &mut bus)
    }

    /// The next timer: its place and its time.
    fn next_timer(&self) -> Option<(usize, Instant)> {
        let due = self.timers.iter().map(|(due, _)| *due).enumerate();
        due.min_by_key(|(_, due)| *due)
    }
}

impl<M: DeviceModel> Shared<M> {
    /// The timer thread: sleeps until the next time has come or something changed.
    fn keep_time(&self) {
        let mut state = self.state.lock().expect("a device model does not panic");
        while !state.stopping {
            let now = Instant::now();
            state = match state.next_timer() {
                None => self.changed.wait(state).expect("a device model does not panic"),
                Some((_, due)) if due > now => {
                    let waited = self.changed.wait_timeout(state, due - now);
                    waited.expect("a device model does not panic").0
                }
                Some((place, _)) => {
                    let (_, what) = state.timers.swap_remove(place);
                    state.run(|model, bus| model.time_has_come(bus, what));
                    state
                }
            };
        }
    }
}

/// After the triggers of a kind changed: messages follow them, and take the line's place.
fn follow_triggers(bus: &mut Bus<'_>, kind: InterruptKind) {
    let enabled = bus.interrupts.enabled(kind);
    match kind {
        InterruptKind::IntX => {}
        InterruptKind::Msi => bus.config.set_msi_usable(enabled),
        InterruptKind::MsiX => bus.config.set_msi_x_enable(enabled),
    }
    settle_interrupts(bus);
}

/// After a switch in configuration space changed: enabling MSI or MSI-X lets go of the line for
/// good (QEMU, `msi_write_config` and `msix_write_config`), disabling INTx only hides it.
fn settle_interrupts(bus: &mut Bus<'_>) {
    if bus.config.msi_enabled() || bus.config.msi_x_enabled() {
        bus.config.set_intx_pending(false);
    }
    bus.update_intx();
}

fn check_config(offset: u16, len: usize) -> Result<(), FunctionError> {
    check_range(offset.into(), len, CONFIG_SIZE as u64, || "configuration space".to_owned())
}

fn check_range(
    offset: u64,
    len: usize,
    size: u64,
    region: impl FnOnce() -> String,
) -> Result<(), FunctionError> {
    match offset.checked_add(len as u64).is_some_and(|end| end <= size) {
        true => Ok(()),
        false => Err(FunctionError::Range { region: region(), offset, len, size }),
    }
}
