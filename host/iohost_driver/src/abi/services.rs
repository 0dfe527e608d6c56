//! News of other services.

use std::ffi::c_void;
use std::ptr;

use iohost_driver_abi::{HostWatch, ServiceHandler, ServiceText};
use iohost_interface::IOReturn;

use super::callback::guarded;
use super::queue::Queue;
use super::{adopt, host, owned, text_of};
use crate::ServiceInfo;

owned! {
    /// A source of news of services.
    Watch(HostWatch) released by services.watch_release
}

impl Watch {
    pub(crate) fn create<F: Fn(bool, ServiceInfo) + Send + Sync + 'static>(
        queue: &Queue,
        hear: F,
    ) -> Result<Self, IOReturn> {
        unsafe extern "C" fn call<F: Fn(bool, ServiceInfo)>(
            context: *const c_void,
            began: u32,
            service: *const ServiceText,
        ) {
            // SAFETY: contract 6: made below with `Box::into_raw`, not dropped yet; shared
            // references only are ever made from it.
            let hear = unsafe { &*context.cast::<F>() };
            // SAFETY: contract 5.
            let text = unsafe { service.read() };
            let service = ServiceInfo {
                // SAFETY: contract 5.
                name: unsafe { text_of(text.name, text.name_len) },
                // SAFETY: contract 5.
                driver: unsafe { text_of(text.driver, text.driver_len) },
                // SAFETY: contract 5.
                interface: unsafe { text_of(text.interface, text.interface_len) },
            };
            // It is our own code, which notes the news; it does not panic.
            let _ = guarded(|| hear(began != 0, service));
        }
        unsafe extern "C" fn drop_context<F>(context: *mut c_void) {
            // SAFETY: contract 6: made below with `Box::into_raw`, and dropped once.
            let hear = unsafe { Box::from_raw(context.cast::<F>()) };
            let _ = guarded(move || drop(hear));
        }
        let context = Box::into_raw(Box::new(hear)).cast();
        let handler = ServiceHandler { call: call::<F>, drop: drop_context::<F>, context };
        let mut watch = ptr::null_mut();
        let status = host!(services.watch(queue.0.as_ptr(), handler, &raw mut watch));
        Ok(Self(adopt(status, watch)?))
    }
}
