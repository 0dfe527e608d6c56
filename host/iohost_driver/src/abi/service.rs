//! What the driver says of itself.

use std::ffi::c_void;
use std::ptr::{self, NonNull};

use iohost_driver_abi::HostAcknowledgement;
use iohost_interface::IOReturn;

use super::queue::Queue;
use super::{adopt, check, host, owned, text_of};

owned! {
    /// Something that the host waits for; dropped, it is done.
    Acknowledgement(HostAcknowledgement) released by service.acknowledge
}

impl Acknowledgement {
    /// # Safety
    ///
    /// `owed` is the host's, and nobody else acknowledges it.
    pub(super) unsafe fn of(owed: *mut HostAcknowledgement) -> Self {
        Self(NonNull::new(owed).expect("the host passes what is owed"))
    }
}

/// Takes a text that the host gives to a sink.
fn text(give: impl FnOnce(Sink, *mut c_void) -> i32) -> Result<String, IOReturn> {
    unsafe extern "C" fn sink(context: *mut c_void, text: *const u8, len: usize) {
        // SAFETY: the context is the text below, which waits for this call.
        let into = unsafe { &mut *context.cast::<String>() };
        // SAFETY: contract 5.
        *into = unsafe { text_of(text, len) };
    }
    let mut text = String::new();
    check(give(sink, (&raw mut text).cast()))?;
    Ok(text)
}

type Sink = unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize);

/// An entry of the registry, by its number.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    queue: Queue,
    pub(crate) id: u64,
}

impl Entry {
    /// The driver's own.
    pub(crate) fn own(queue: &Queue) -> Self {
        Self { id: host!(service.own(queue.0.as_ptr())), queue: queue.clone() }
    }

    pub(crate) fn provider(&self) -> Result<Self, IOReturn> {
        let (queue, mut id) = (self.queue.0.as_ptr(), 0);
        check(host!(service.provider(queue, self.id, &raw mut id)))?;
        Ok(Self { queue: self.queue.clone(), id })
    }

    pub(crate) fn register(&self) -> Result<(), IOReturn> {
        check(host!(service.register(self.queue.0.as_ptr(), self.id)))
    }

    pub(crate) fn create(&self, provider: u64, key: &str) -> Result<Self, IOReturn> {
        let (queue, mut id) = (self.queue.0.as_ptr(), 0);
        check(host!(service.create(queue, provider, key.as_ptr(), key.len(), &raw mut id)))?;
        Ok(Self { queue: self.queue.clone(), id })
    }

    pub(crate) fn terminate(&self, options: u32) -> Result<(), IOReturn> {
        check(host!(service.terminate(self.queue.0.as_ptr(), self.id, options)))
    }

    pub(crate) fn set_name(&self, name: &str) -> Result<(), IOReturn> {
        let queue = self.queue.0.as_ptr();
        check(host!(service.set_name(queue, self.id, name.as_ptr(), name.len())))
    }

    pub(crate) fn name(&self) -> Result<String, IOReturn> {
        let queue = self.queue.0.as_ptr();
        text(|sink, context| host!(service.copy_name(queue, self.id, sink, context)))
    }

    pub(crate) fn properties(&self, whose: u32) -> Result<String, IOReturn> {
        let queue = self.queue.0.as_ptr();
        text(|sink, context| host!(service.copy_properties(queue, self.id, whose, sink, context)))
    }

    pub(crate) fn set_properties(&self, dictionary: &str) -> Result<(), IOReturn> {
        let (queue, text, len) = (self.queue.0.as_ptr(), dictionary.as_ptr(), dictionary.len());
        check(host!(service.set_properties(queue, self.id, text, len)))
    }

    pub(crate) fn remove_property(&self, name: &str) -> Result<(), IOReturn> {
        let queue = self.queue.0.as_ptr();
        check(host!(service.remove_property(queue, self.id, name.as_ptr(), name.len())))
    }

    pub(crate) fn search_property(&self, name: &str, options: u64) -> Result<String, IOReturn> {
        let (queue, key, len) = (self.queue.0.as_ptr(), name.as_ptr(), name.len());
        text(|sink, context| {
            host!(service.search_property(queue, self.id, key, len, options, sink, context))
        })
    }

    pub(crate) fn adjust_busy(&self, delta: i32) -> Result<(), IOReturn> {
        check(host!(service.adjust_busy(self.queue.0.as_ptr(), self.id, delta)))
    }

    pub(crate) fn busy_state(&self) -> Result<u32, IOReturn> {
        let mut count = 0;
        check(host!(service.busy_state(self.queue.0.as_ptr(), self.id, &raw mut count)))?;
        Ok(count)
    }

    pub(crate) fn change_power_state(&self, state: u32) -> Result<(), IOReturn> {
        check(host!(service.change_power_state(self.queue.0.as_ptr(), state)))
    }

    pub(crate) fn set_dispatch_queue(&self, name: &str, named: &Queue) -> Result<(), IOReturn> {
        let (queue, named) = (self.queue.0.as_ptr(), named.0.as_ptr());
        check(host!(service.set_dispatch_queue(queue, name.as_ptr(), name.len(), named)))
    }

    pub(crate) fn copy_dispatch_queue(&self, name: &str) -> Result<Queue, IOReturn> {
        let (queue, mut named) = (self.queue.0.as_ptr(), ptr::null_mut());
        let status =
            host!(service.copy_dispatch_queue(queue, name.as_ptr(), name.len(), &raw mut named));
        Ok(Queue(adopt(status, named)?))
    }
}
