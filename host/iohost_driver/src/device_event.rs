//! What happens to a device, told to its driver.

use std::fmt;

use crate::{
    EventfdInterrupt, IODispatchQueue, IODispatchSource, IOInterruptDispatchSource, IOPCIDevice,
    Result,
};

/// What happens to a device that its driver did not cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// An error that the device did not correct itself (AER), or an access to one of its BARs that
    /// nobody answered. The host does what its configuration says: nothing, or it stops this
    /// driver.
    Error,
    /// Somebody wants the device back. The host stops this driver next, and kills it when it has
    /// not stopped within a second.
    RemovalRequested,
    /// The device does not answer any more: registers read as all ones. The host stops this driver
    /// next.
    Gone,
}

/// Has a handler run on a queue for what happens to a device. Starts enabled.
///
/// DriverKit tells a driver by `Stop` alone; a source of its own gives a driver the time to fail
/// what it has under way with the right word. Dropping the source ends it.
pub struct DeviceEventSource {
    source: IOInterruptDispatchSource,
}

impl DeviceEventSource {
    /// Makes the source. The handler is called once for each kind of event that came since the
    /// last time; an event from before is not told, but for `Gone`.
    ///
    /// Errors: `NO_RESOURCES` when there are no more descriptors.
    pub fn create<S: Send + 'static>(
        device: &IOPCIDevice,
        queue: &IODispatchQueue<S>,
        mut handler: impl FnMut(&mut S, DeviceEvent) + Send + 'static,
    ) -> Result<Self> {
        let signal = EventfdInterrupt::edge(device.raw().event_signal()?);
        let told = move |state: &mut S, event: crate::InterruptEvent| {
            for event in events(event.count) {
                handler(state, event);
            }
        };
        let source = IOInterruptDispatchSource::create_from_eventfd(signal, 0, queue, told)?;
        source.set_enable(true)?;
        Ok(Self { source })
    }
}

/// The kinds in a count: errors in the low 16 bits, requests above, and from 2^32 on that the
/// device is gone.
fn events(count: u64) -> impl Iterator<Item = DeviceEvent> {
    let kinds = [
        (count & 0xffff, DeviceEvent::Error),
        (count >> 16 & 0xffff, DeviceEvent::RemovalRequested),
        (count >> 32, DeviceEvent::Gone),
    ];
    kinds.into_iter().filter(|(count, _)| *count > 0).map(|(_, event)| event)
}

impl fmt::Debug for DeviceEventSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeviceEventSource").field(&self.source).finish()
    }
}
