//! The table of queues and sources; the functions for queues are here.

use std::ffi::c_void;
use std::sync::Arc;

use iohost_dispatch::{Clock, Queue, QueueOptions};
use iohost_driver_abi::{DispatchTable, HostQueue, Work};
use iohost_interface::IOReturn;

use super::descriptor::{
    descriptor_cancel, descriptor_check, descriptor_create, descriptor_nudge, descriptor_release,
    descriptor_set_enable, descriptor_set_handler,
};
use super::foreign::{ForeignContext, ForeignWork};
use super::interrupt::{
    interrupt_cancel, interrupt_check, interrupt_create, interrupt_create_from_eventfd,
    interrupt_last, interrupt_release, interrupt_set_enable, interrupt_set_handler,
};
use super::object::{give, object, released, shared, text_of, written};
use super::timer::{
    timer_cancel, timer_check, timer_create, timer_release, timer_set_enable, timer_set_handler,
    timer_wake_at,
};
use crate::services::Services;

/// `kIODispatchQueueReentrant` and `kIODispatchQueueMethodsNotSynchronized`, which Apple does not
/// document: by its name, calls on such a queue are not serialised, so it is a reentrant queue here.
const REENTRANT: u64 = 0x1;
const METHODS_NOT_SYNCHRONIZED: u64 = 0x2;

/// `kIODispatchQueueWakeupAll`.
const WAKEUP_ALL: u64 = 0x1;

/// What a `HostQueue` is.
pub(super) struct QueueObject {
    pub(super) queue: Queue,
    pub(super) services: Arc<Services>,
}

/// The clock of one of `IOTimerClock`'s numbers.
pub(super) fn clock(number: u64) -> Result<Clock, IOReturn> {
    match number {
        0x80 => Ok(Clock::Wall),
        0x84 | 0xC4 => Ok(Clock::Continuous),
        0x88 | 0xC8 => Ok(Clock::Uptime),
        _ => Err(IOReturn::BAD_ARGUMENT),
    }
}

pub(super) static DISPATCH_TABLE: DispatchTable = DispatchTable {
    size: size_of::<DispatchTable>() as u32,
    queue_create,
    queue_retain,
    queue_release,
    queue_on_queue,
    queue_async,
    queue_sync,
    queue_keep,
    queue_cancel,
    interrupt_create,
    interrupt_set_handler,
    interrupt_set_enable,
    interrupt_cancel,
    interrupt_last,
    interrupt_release,
    timer_create,
    timer_set_handler,
    timer_wake_at,
    timer_set_enable,
    timer_cancel,
    timer_release,
    clock_now,
    descriptor_create,
    descriptor_nudge,
    descriptor_release,
    queue_concurrent,
    queue_sleep,
    queue_wakeup,
    queue_blocking,
    queue_held,
    interrupt_create_from_eventfd,
    interrupt_check,
    timer_check,
    descriptor_set_handler,
    descriptor_set_enable,
    descriptor_cancel,
    descriptor_check,
    queue_progress,
};

unsafe extern "C" fn queue_create(
    sibling: *mut HostQueue,
    name: *const u8,
    name_len: usize,
    options: u64,
    priority: u64,
    queue: *mut *mut HostQueue,
) -> i32 {
    // SAFETY: contract 2.
    let sibling = unsafe { object::<QueueObject>(sibling) };
    // SAFETY: contract 4.
    let name = unsafe { text_of(name, name_len) };
    let known = options & !(REENTRANT | METHODS_NOT_SYNCHRONIZED) == 0 && priority == 0;
    let made = if known {
        sibling.queue.create_beside(&name, QueueOptions { reentrant: options != 0 })
    } else {
        Err(IOReturn::BAD_ARGUMENT)
    };
    let services = sibling.services.clone();
    // SAFETY: contract 4.
    unsafe { written(queue, made.map(|queue| give(QueueObject { queue, services }))) }
}

unsafe extern "C" fn queue_concurrent(queue: *mut HostQueue, work: Work) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let work = ForeignWork(work);
    IOReturn::code(&queue.queue.dispatch_concurrent(move || work.run()))
}

unsafe extern "C" fn queue_sleep(
    queue: *mut HostQueue,
    event: usize,
    number: u64,
    deadline: u64,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let deadline = match number {
        0 => Ok(None),
        number => clock(number).map(|clock| Some((clock, deadline))),
    };
    IOReturn::code(&deadline.and_then(|deadline| queue.queue.sleep(event, deadline)))
}

unsafe extern "C" fn queue_wakeup(queue: *mut HostQueue, event: usize, options: u64) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let woken = match options {
        0 => queue.queue.wakeup(event).map(|_| ()),
        WAKEUP_ALL => queue.queue.wakeup_all(event).map(|_| ()),
        _ => Err(IOReturn::BAD_ARGUMENT),
    };
    IOReturn::code(&woken)
}

unsafe extern "C" fn queue_blocking(
    queue: *mut HostQueue,
    call: unsafe extern "C" fn(context: *mut c_void),
    context: *mut c_void,
) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 3, on the plugin's own thread and before it goes on.
    queue.queue.blocking(|| unsafe { call(context) });
}

unsafe extern "C" fn queue_held(
    queue: *mut HostQueue,
    sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
    context: *mut c_void,
) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    for name in queue.queue.held() {
        // SAFETY: contract 3: the plugin's function with its context; the name lives for the call.
        unsafe { sink(context, name.as_ptr(), name.len()) };
    }
}

unsafe extern "C" fn queue_retain(queue: *mut HostQueue) {
    // SAFETY: contract 2.
    std::mem::forget(unsafe { shared::<QueueObject>(queue) });
}

unsafe extern "C" fn queue_release(queue: *mut HostQueue) {
    // SAFETY: contract 2.
    unsafe { released::<QueueObject>(queue) }
}

unsafe extern "C" fn queue_on_queue(queue: *mut HostQueue) -> i32 {
    // SAFETY: contract 2.
    i32::from(unsafe { object::<QueueObject>(queue) }.queue.on_queue())
}

unsafe extern "C" fn queue_async(queue: *mut HostQueue, work: *const Work) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    let work = ForeignWork(unsafe { work.read() });
    queue.queue.dispatch_async(move || work.run());
}

unsafe extern "C" fn queue_sync(
    queue: *mut HostQueue,
    call: unsafe extern "C" fn(context: *mut c_void),
    context: *mut c_void,
) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 3, on the plugin's own thread and before it goes on.
    IOReturn::code(&queue.queue.dispatch_sync(|| unsafe { call(context) }))
}

unsafe extern "C" fn queue_keep(
    queue: *mut HostQueue,
    context: *mut c_void,
    drop: unsafe extern "C" fn(context: *mut c_void),
) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    queue.queue.keep(ForeignContext { context, drop });
}

unsafe extern "C" fn queue_cancel(queue: *mut HostQueue, done: Work) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let done = ForeignWork(done);
    queue.queue.cancel(move || done.run());
}

unsafe extern "C" fn queue_progress(queue: *mut HostQueue) {
    // SAFETY: contract 2.
    unsafe { object::<QueueObject>(queue) }.queue.report_progress();
}

unsafe extern "C" fn clock_now(queue: *mut HostQueue, number: u64, time: *mut u64) -> i32 {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    unsafe { written(time, clock(number).map(|clock| queue.queue.now(clock))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_no_clock_is_a_bad_argument() {
        let known = [0x80, 0x84, 0x88, 0xC4, 0xC8];
        let others = (0..0x1000).chain([0x1_0000_0088, u64::MAX]);
        for number in others.filter(|number| !known.contains(number)) {
            assert_eq!(clock(number), Err(IOReturn::BAD_ARGUMENT), "{number:#x}");
        }
        assert!(known.into_iter().all(|number| clock(number).is_ok()));
    }
}
