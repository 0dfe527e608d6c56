//! Dispatch sources.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use iohost_driver_abi::{HostDescriptor, HostInterrupt, HostTimer};
use iohost_interface::IOReturn;

use super::callback::{completion_of, handler_of, work_of};
use super::device::Device;
use super::queue::Queue;
use super::{adopt, check, host, owned};

owned! {
    /// An interrupt source.
    Interrupt(HostInterrupt) released by dispatch.interrupt_release
}
owned! {
    /// A timer.
    Timer(HostTimer) released by dispatch.timer_release
}
owned! {
    /// A watched descriptor.
    Descriptor(HostDescriptor) released by dispatch.descriptor_release
}

/// What all sources can do.
pub trait Source {
    /// `done` is called once, also when nothing changed.
    fn set_enable(
        &self,
        enable: bool,
        done: Option<impl FnOnce() + Send + 'static>,
    ) -> Result<(), IOReturn>;

    fn cancel(&self, done: impl FnOnce() + Send + 'static);

    fn check_for_work(&self) -> Result<(), IOReturn>;

    fn wait_for_work(&self) -> Result<(), IOReturn>;
}

macro_rules! source {
    ($name:ident: $set_enable:ident, $cancel:ident, $check:ident) => {
        impl Source for $name {
            fn set_enable(
                &self,
                enable: bool,
                done: Option<impl FnOnce() + Send + 'static>,
            ) -> Result<(), IOReturn> {
                let (enable, done) = (i32::from(enable), completion_of(done));
                check(host!(dispatch.$set_enable(self.0.as_ptr(), enable, done)))
            }

            fn cancel(&self, done: impl FnOnce() + Send + 'static) {
                host!(dispatch.$cancel(self.0.as_ptr(), work_of(done)));
            }

            fn check_for_work(&self) -> Result<(), IOReturn> {
                check(host!(dispatch.$check(self.0.as_ptr(), 0)))
            }

            fn wait_for_work(&self) -> Result<(), IOReturn> {
                check(host!(dispatch.$check(self.0.as_ptr(), 1)))
            }
        }
    };
}

source! { Interrupt: interrupt_set_enable, interrupt_cancel, interrupt_check }
source! { Timer: timer_set_enable, timer_cancel, timer_check }
source! { Descriptor: descriptor_set_enable, descriptor_cancel, descriptor_check }

impl Interrupt {
    pub(crate) fn create(
        device: &Device,
        index: u32,
        queue: &Queue,
        handler: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<Self, IOReturn> {
        let mut source = ptr::null_mut();
        let status = host!(dispatch.interrupt_create(
            device.0.as_ptr(),
            index,
            queue.0.as_ptr(),
            handler_of(handler),
            &raw mut source,
        ));
        Ok(Self(adopt(status, source)?))
    }

    pub(crate) fn set_handler(
        &self,
        handler: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<(), IOReturn> {
        let handler = handler_of(handler);
        check(host!(dispatch.interrupt_set_handler(self.0.as_ptr(), handler)))
    }

    pub(crate) fn create_from_eventfd(
        trigger: BorrowedFd<'_>,
        unmask: Option<BorrowedFd<'_>>,
        flags: u32,
        queue: &Queue,
        handler: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<Self, IOReturn> {
        let mut source = ptr::null_mut();
        let status = host!(dispatch.interrupt_create_from_eventfd(
            trigger.as_raw_fd(),
            unmask.map_or(-1, |unmask| unmask.as_raw_fd()),
            flags,
            queue.0.as_ptr(),
            handler_of(handler),
            &raw mut source,
        ));
        Ok(Self(adopt(status, source)?))
    }

    pub(crate) fn last(&self) -> (u64, u64) {
        let (mut count, mut time) = (0, 0);
        host!(dispatch.interrupt_last(self.0.as_ptr(), &raw mut count, &raw mut time));
        (count, time)
    }
}

impl Timer {
    pub(crate) fn create(
        queue: &Queue,
        handler: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<Self, IOReturn> {
        let mut timer = ptr::null_mut();
        let handler = handler_of(handler);
        let status = host!(dispatch.timer_create(queue.0.as_ptr(), handler, &raw mut timer));
        Ok(Self(adopt(status, timer)?))
    }

    pub(crate) fn set_handler(
        &self,
        handler: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<(), IOReturn> {
        check(host!(dispatch.timer_set_handler(self.0.as_ptr(), handler_of(handler))))
    }

    pub(crate) fn wake_at(&self, clock: u64, deadline: u64, leeway: u64) -> Result<(), IOReturn> {
        check(host!(dispatch.timer_wake_at(self.0.as_ptr(), clock, deadline, leeway)))
    }
}

impl Descriptor {
    pub(crate) fn create(
        queue: &Queue,
        fd: BorrowedFd<'_>,
        mut handler: impl FnMut() + Send + 'static,
    ) -> Result<Self, IOReturn> {
        let mut source = ptr::null_mut();
        let handler = handler_of(move |_, _| handler());
        let fd = fd.as_raw_fd();
        let status =
            host!(dispatch.descriptor_create(queue.0.as_ptr(), fd, handler, &raw mut source));
        Ok(Self(adopt(status, source)?))
    }

    /// Whether there were events that nobody could be called for.
    pub(crate) fn set_handler(&self, handler: Option<impl FnMut() + Send + 'static>) -> bool {
        let handler = handler.map(|mut handler| handler_of(move |_, _| handler()));
        let handler = handler.as_ref().map_or(ptr::null(), ptr::from_ref);
        host!(dispatch.descriptor_set_handler(self.0.as_ptr(), handler)) != 0
    }

    pub(crate) fn nudge(&self) {
        host!(dispatch.descriptor_nudge(self.0.as_ptr()));
    }
}
