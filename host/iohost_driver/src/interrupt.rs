//! Interrupts on a queue.

use std::fmt;

use crate::{IODispatchQueue, IOPCIDevice, Result, abi};

/// `IOInterruptDispatchSource`: has a handler run on a queue for a device's interrupts.
///
/// Interrupts that come while the handler runs, or while the source is disabled, are counted and
/// delivered in one call. A level line (INTx) stays masked until the handler has returned; the
/// handler has to clear the cause in the device, or it is called again at once.
///
/// Dropping the source ends it and frees the vector; a handler in progress ends on its own.
pub struct IOInterruptDispatchSource {
    source: abi::Interrupt,
}

/// What a handler is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptEvent {
    /// Interrupts since the previous delivery; at least 1.
    pub count: u64,
    /// When the latest of them was taken from the kernel, in nanoseconds of `CLOCK_MONOTONIC`:
    /// later than the interrupt itself by the time of the wake-up.
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
    /// Makes a source for one interrupt of a device. It starts disabled: interrupts are counted
    /// until [`set_enable`](Self::set_enable).
    ///
    /// `index` is the vector of the kind that [`IOPCIDevice::configure_interrupts`] chose. If it
    /// chose none, index 0 is the INTx line where the device has one and MSI vectors follow.
    /// Message interrupts also need the device to be bus master, which this sees to.
    ///
    /// Errors: `NO_INTERRUPT` for an index the device does not have, `NO_RESOURCES` when the
    /// interrupt has a source already.
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

    /// Replaces the handler from the next delivery on. `queue` is the one given to `create`.
    pub fn set_handler<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        handler: impl FnMut(&mut S, InterruptEvent) + Send + 'static,
    ) -> Result<()> {
        Ok(self.source.set_handler(queue.handler(event(handler)))?)
    }

    /// Enables or disables delivery. `SetEnable`.
    ///
    /// While disabled, interrupts are counted and a level line stays masked; enabling delivers
    /// what accumulated in one call.
    ///
    /// Errors: `UNSUPPORTED` for a change after cancel.
    pub fn set_enable(&self, enable: bool) -> Result<()> {
        Ok(self.source.set_enable(enable, None::<fn()>)?)
    }

    /// As [`set_enable`](Self::set_enable), and `done` runs once on the queue after a handler in
    /// flight has returned; also when nothing changed. `SetEnableWithCompletion`.
    pub fn set_enable_with_completion<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        enable: bool,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) -> Result<()> {
        Ok(self.source.set_enable(enable, queue.completion(done))?)
    }

    /// Ends the source. `done` runs on the queue once no handler runs or will run; what was
    /// counted and not delivered is lost. A second call runs its own `done`.
    pub fn cancel<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) {
        self.source.cancel(queue.completion(done));
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
