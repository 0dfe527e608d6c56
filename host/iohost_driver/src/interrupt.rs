//! Interrupts on a queue.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use crate::dispatch_source::HostSource;
use crate::{IODispatchQueue, IODispatchSource, IOPCIDevice, Result, abi};

/// `IOInterruptDispatchSource`: has a handler run on a queue for interrupts: those of a device, or
/// of whatever adds to an eventfd.
///
/// Interrupts that come while the handler runs, or while the source is disabled, are counted and
/// delivered in one call. A level line (INTx) stays masked while the source is disabled, and until
/// the handler has returned; the handler has to clear the cause in the device, or it is called
/// again at once.
///
/// Dropping the source ends it and frees the vector; a handler in progress ends on its own. What
/// it has in common with other sources is in [`IODispatchSource`].
pub struct IOInterruptDispatchSource {
    source: abi::Interrupt,
}

/// An interrupt that is an eventfd: of a kernel driver, of another process, of a test.
///
/// The source takes it over, so that one eventfd has one source. It is made non-blocking, which
/// whoever shares it sees. Not for one made with `EFD_SEMAPHORE`, of which a read takes one event
/// and leaves the others unannounced.
#[derive(Debug)]
pub struct EventfdInterrupt {
    trigger: OwnedFd,
    unmask: Option<OwnedFd>,
}

impl EventfdInterrupt {
    /// Each write to `trigger` counts as many interrupts as it adds.
    pub fn edge(trigger: impl Into<OwnedFd>) -> Self {
        Self { trigger: trigger.into(), unmask: None }
    }

    /// A line that whoever writes to `trigger` has masked with that. After the handler has
    /// returned, and not while the source is disabled, 1 is added to `unmask`, another eventfd:
    /// the "resample" of KVM's `KVM_IRQFD`, the `VFIO_IRQ_SET_ACTION_UNMASK` of VFIO.
    pub fn level(trigger: impl Into<OwnedFd>, unmask: impl Into<OwnedFd>) -> Self {
        Self { trigger: trigger.into(), unmask: Some(unmask.into()) }
    }
}

/// What a handler is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptEvent {
    /// Interrupts since the previous delivery; at least 1.
    pub count: u64,
    /// When the latest of them was taken from the kernel, in nanoseconds of `CLOCK_MONOTONIC`, or
    /// of `CLOCK_BOOTTIME` if the source was made so: later than the interrupt itself by the time
    /// of the wake-up.
    pub time: u64,
}

/// A kind of interrupt, with the number that `GetInterruptType` reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum InterruptType {
    /// `kIOInterruptDispatchSourceTypeLevel`: the INTx line.
    Level = 1,
    /// `kIOInterruptTypePCIMessaged`: MSI.
    Messaged = 0x1_0000,
    /// MSI-X, which reports the bit of MSI too.
    MessagedX = 0x3_0000,
}

impl IOInterruptDispatchSource {
    /// `kIOInterruptSourceContinuousTime`: a flag for `create`, by which times are those of
    /// `CLOCK_BOOTTIME`, which goes on while the machine sleeps.
    pub const CONTINUOUS_TIME: u32 = 0x1_0000;

    /// Makes a source for one interrupt of a device. It starts disabled: interrupts are counted
    /// until [`set_enable`](IODispatchSource::set_enable), and delivered as one call then.
    ///
    /// `index` is, in its low 16 bits, the vector of the kind that [`IOPCIDevice::configure_interrupts`] chose. If it
    /// chose none, index 0 is the INTx line where the device has one and MSI vectors follow.
    /// Above it, [`CONTINUOUS_TIME`](Self::CONTINUOUS_TIME) can stand. Message interrupts also need the device to be bus master, which this sees to.
    ///
    /// Errors: `NO_INTERRUPT` for an index the device does not have, `NO_RESOURCES` when the
    /// interrupt has a source already, `BAD_ARGUMENT` for a flag that does not exist.
    pub fn create<S: Send + 'static>(
        device: &IOPCIDevice,
        index: u32,
        queue: &IODispatchQueue<S>,
        handler: impl FnMut(&mut S, InterruptEvent) + Send + 'static,
    ) -> Result<Self> {
        let handler = queue.handler(event(handler));
        let source = abi::Interrupt::create(device.raw(), index, queue.raw(), handler)?;
        Ok(Self { source })
    }

    /// Makes a source for an eventfd. It starts disabled, as any other.
    ///
    /// `flags` is 0 or [`CONTINUOUS_TIME`](Self::CONTINUOUS_TIME).
    ///
    /// Errors: `BAD_ARGUMENT` for another flag, or a descriptor that is no eventfd.
    pub fn create_from_eventfd<S: Send + 'static>(
        interrupt: EventfdInterrupt,
        flags: u32,
        queue: &IODispatchQueue<S>,
        handler: impl FnMut(&mut S, InterruptEvent) + Send + 'static,
    ) -> Result<Self> {
        let handler = queue.handler(event(handler));
        let (trigger, unmask) = (interrupt.trigger.as_fd(), interrupt.unmask.as_ref());
        let source = abi::Interrupt::create_from_eventfd(
            trigger,
            unmask.map(AsFd::as_fd),
            flags,
            queue.raw(),
            handler,
        )?;
        Ok(Self { source })
    }

    /// Replaces the handler from the next delivery on. `queue` is the one given to `create`.
    pub fn set_handler<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        handler: impl FnMut(&mut S, InterruptEvent) + Send + 'static,
    ) -> Result<()> {
        Ok(self.source.set_handler(queue.handler(event(handler)))?)
    }

    /// The count not delivered yet, and the time of the latest interrupt seen (0 before the
    /// first). Changes nothing. `GetLastInterrupt`.
    pub fn last_interrupt(&self) -> InterruptEvent {
        let (count, time) = self.source.last();
        InterruptEvent { count, time }
    }

    /// The kind of one interrupt of a device. `GetInterruptType`.
    ///
    /// Errors: `NO_INTERRUPT` past the last one.
    pub fn interrupt_type(device: &IOPCIDevice, index: u32) -> Result<InterruptType> {
        Ok(match device.raw().interrupt_type(index)? {
            bits if bits == InterruptType::MessagedX as u64 => InterruptType::MessagedX,
            bits if bits == InterruptType::Messaged as u64 => InterruptType::Messaged,
            _ => InterruptType::Level,
        })
    }
}

impl IODispatchSource for IOInterruptDispatchSource {}

impl HostSource for IOInterruptDispatchSource {
    type Source = abi::Interrupt;

    fn source(&self) -> &abi::Interrupt {
        &self.source
    }
}

fn event<S>(
    mut handler: impl FnMut(&mut S, InterruptEvent) + Send,
) -> impl FnMut(&mut S, u64, u64) + Send {
    move |state, count, time| handler(state, InterruptEvent { count, time })
}

impl fmt::Debug for IOInterruptDispatchSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IOInterruptDispatchSource").field(&self.source).finish()
    }
}
