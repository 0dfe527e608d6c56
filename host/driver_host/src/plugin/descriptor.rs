//! Watched descriptors of the dispatch table.

use std::os::fd::BorrowedFd;

use iohost_dispatch::BellSource;
use iohost_driver_abi::{Handler, HostDescriptor, HostQueue, Work};
use iohost_interface::IOReturn;
use log::error;

use super::dispatch::QueueObject;
use super::foreign::{ForeignHandler, ForeignWork};
use super::object::{give, object, released, written};

pub(super) unsafe extern "C" fn descriptor_create(
    queue: *mut HostQueue,
    fd: i32,
    handler: Handler,
    source: *mut *mut HostDescriptor,
) -> i32 {
    let mut handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4: open for the call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let made = fd
        .try_clone_to_owned()
        .and_then(|fd| BellSource::create(&queue.queue, fd, move || handler.call(0, 0)));
    let made = made.map_err(|err| {
        error!(err:err; "watching a descriptor");
        IOReturn::NO_RESOURCES
    });
    // SAFETY: contract 4.
    unsafe { written(source, made.map(give)) }
}

pub(super) unsafe extern "C" fn descriptor_nudge(source: *mut HostDescriptor) {
    // SAFETY: contract 2.
    unsafe { object::<BellSource>(source) }.nudge();
}

pub(super) unsafe extern "C" fn descriptor_set_handler(
    source: *mut HostDescriptor,
    handler: *const Handler,
) -> i32 {
    // SAFETY: contract 4: null, or a handler for the call, which we take.
    let handler = unsafe { handler.as_ref() }.map(|&handler| ForeignHandler(handler));
    // SAFETY: contract 2.
    let source = unsafe { object::<BellSource>(source) };
    let handler = handler.map(|mut handler| move || handler.call(0, 0));
    i32::from(source.set_handler(handler))
}

pub(super) unsafe extern "C" fn descriptor_set_enable(
    source: *mut HostDescriptor,
    enable: i32,
    done: Work,
) -> i32 {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    let source = unsafe { object::<BellSource>(source) };
    IOReturn::code(&source.set_enable(enable != 0, done))
}

pub(super) unsafe extern "C" fn descriptor_cancel(source: *mut HostDescriptor, done: Work) {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    unsafe { object::<BellSource>(source) }.cancel(done);
}

pub(super) unsafe extern "C" fn descriptor_check(source: *mut HostDescriptor, wait: i32) -> i32 {
    // SAFETY: contract 2.
    let source = unsafe { object::<BellSource>(source) };
    IOReturn::code(&if wait == 0 { source.check_for_work() } else { source.wait_for_work() })
}

pub(super) unsafe extern "C" fn descriptor_release(source: *mut HostDescriptor) {
    // SAFETY: contract 2.
    unsafe { released::<BellSource>(source) }
}
