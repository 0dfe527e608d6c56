//! The table of other services.

use std::sync::Arc;

use iohost_control::host::RunningService;
use iohost_driver_abi::{HostQueue, HostWatch, ServiceHandler, ServiceText, ServicesTable};

use super::dispatch::QueueObject;
use super::object::{object, released, written};
use crate::services::Watcher;

/// What a `HostWatch` is: code of the plugin that hears of services.
pub(super) struct ForeignWatcher(ServiceHandler);

// SAFETY: contract 5, which holds for this handler too.
unsafe impl Send for ForeignWatcher {}
// SAFETY: the same.
unsafe impl Sync for ForeignWatcher {}

impl ForeignWatcher {
    fn tell(&self, began: u32, service: &RunningService) {
        let RunningService { name, driver, interface, .. } = service;
        let text = ServiceText {
            name: name.as_ptr(),
            name_len: name.len(),
            driver: driver.as_ptr(),
            driver_len: driver.len(),
            interface: interface.as_ptr(),
            interface_len: interface.len(),
        };
        // SAFETY: contract 5; the texts live for the call.
        unsafe { (self.0.call)(self.0.context, began, &raw const text) }
    }
}

impl Watcher for ForeignWatcher {
    fn began(&self, service: &RunningService) {
        self.tell(1, service);
    }

    fn ended(&self, service: &RunningService) {
        self.tell(0, service);
    }
}

impl Drop for ForeignWatcher {
    fn drop(&mut self) {
        // SAFETY: contract 5; once, and after the last call, which borrowed `self`.
        unsafe { (self.0.drop)(self.0.context) }
    }
}

pub(super) static SERVICES_TABLE: ServicesTable = ServicesTable {
    size: size_of::<ServicesTable>() as u32,
    watch: services_watch,
    watch_release: services_watch_release,
};

unsafe extern "C" fn services_watch(
    queue: *mut HostQueue,
    handler: ServiceHandler,
    watch: *mut *mut HostWatch,
) -> i32 {
    let watcher = Arc::new(ForeignWatcher(handler));
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    queue.services.watch(watcher.clone());
    // SAFETY: contract 4.
    unsafe { written(watch, Ok(Arc::into_raw(watcher).cast_mut().cast())) }
}

unsafe extern "C" fn services_watch_release(watch: *mut HostWatch) {
    // SAFETY: contract 2.
    unsafe { released::<ForeignWatcher>(watch) }
}
