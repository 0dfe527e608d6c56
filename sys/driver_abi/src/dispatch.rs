//! Queues and sources.

use std::ffi::c_void;

use crate::{Handler, HostDescriptor, HostDevice, HostInterrupt, HostQueue, HostTimer, Work};

/// Queues and sources: the table `iohost.dispatch.1`.
#[repr(C)]
#[derive(Debug)]
pub struct DispatchTable {
    /// Bytes of this table.
    pub size: u32,
    /// Makes a queue on the engine that runs `sibling`, with `kIODispatchQueue…` options and a
    /// priority, which has to be 0.
    pub queue_create: unsafe extern "C" fn(
        sibling: *mut HostQueue,
        name: *const u8,
        name_len: usize,
        options: u64,
        priority: u64,
        queue: *mut *mut HostQueue,
    ) -> i32,
    /// One reference more.
    pub queue_retain: unsafe extern "C" fn(queue: *mut HostQueue),
    /// One reference less.
    pub queue_release: unsafe extern "C" fn(queue: *mut HostQueue),
    /// 1 when the calling thread runs the queue, else 0.
    pub queue_on_queue: unsafe extern "C" fn(queue: *mut HostQueue) -> i32,
    /// Appends work, which is moved out of where it is.
    pub queue_async: unsafe extern "C" fn(queue: *mut HostQueue, work: *const Work),
    /// Runs `call(context)` in its turn, on the calling thread, before it returns.
    pub queue_sync: unsafe extern "C" fn(
        queue: *mut HostQueue,
        call: unsafe extern "C" fn(context: *mut c_void),
        context: *mut c_void,
    ) -> i32,
    /// Has the queue keep a context for as long as any of its work can run; `drop` is called once,
    /// after that.
    pub queue_keep: unsafe extern "C" fn(
        queue: *mut HostQueue,
        context: *mut c_void,
        drop: unsafe extern "C" fn(context: *mut c_void),
    ),
    /// Stops the queue; `done` runs last.
    pub queue_cancel: unsafe extern "C" fn(queue: *mut HostQueue, done: Work),
    /// Makes an interrupt source; its handler gets the count and the time. `index` is the vector
    /// in the low 16 bits and flags above. Takes the handler, also on failure.
    pub interrupt_create: unsafe extern "C" fn(
        device: *mut HostDevice,
        index: u32,
        queue: *mut HostQueue,
        handler: Handler,
        source: *mut *mut HostInterrupt,
    ) -> i32,
    /// Replaces the handler.
    pub interrupt_set_handler:
        unsafe extern "C" fn(source: *mut HostInterrupt, handler: Handler) -> i32,
    /// Enables (1) or disables (0).
    pub interrupt_set_enable:
        unsafe extern "C" fn(source: *mut HostInterrupt, enable: i32, done: Work) -> i32,
    /// Ends the source.
    pub interrupt_cancel: unsafe extern "C" fn(source: *mut HostInterrupt, done: Work),
    /// The undelivered count and the latest time.
    pub interrupt_last:
        unsafe extern "C" fn(source: *mut HostInterrupt, count: *mut u64, time: *mut u64),
    /// Gives the reference back, which ends the source.
    pub interrupt_release: unsafe extern "C" fn(source: *mut HostInterrupt),
    /// Makes a timer; its handler gets the time at which it fired, and 0.
    pub timer_create: unsafe extern "C" fn(
        queue: *mut HostQueue,
        handler: Handler,
        timer: *mut *mut HostTimer,
    ) -> i32,
    /// Replaces the handler.
    pub timer_set_handler: unsafe extern "C" fn(timer: *mut HostTimer, handler: Handler) -> i32,
    /// Arms the timer. `clock` is one of `IOTimerClock`'s numbers.
    pub timer_wake_at:
        unsafe extern "C" fn(timer: *mut HostTimer, clock: u64, deadline: u64, leeway: u64) -> i32,
    /// Enables (1) or disables (0).
    pub timer_set_enable:
        unsafe extern "C" fn(timer: *mut HostTimer, enable: i32, done: Work) -> i32,
    /// Ends the timer.
    pub timer_cancel: unsafe extern "C" fn(timer: *mut HostTimer, done: Work),
    /// Gives the reference back, which ends the timer.
    pub timer_release: unsafe extern "C" fn(timer: *mut HostTimer),
    /// The time on a clock as the queue's timers see it.
    pub clock_now: unsafe extern "C" fn(queue: *mut HostQueue, clock: u64, time: *mut u64) -> i32,
    /// Watches a descriptor, which is duplicated; the handler gets two zeros, on the queue, at
    /// least once after each event.
    pub descriptor_create: unsafe extern "C" fn(
        queue: *mut HostQueue,
        fd: i32,
        handler: Handler,
        source: *mut *mut HostDescriptor,
    ) -> i32,
    /// Has the handler called once more, event or not.
    pub descriptor_nudge: unsafe extern "C" fn(source: *mut HostDescriptor),
    /// Gives the reference back, which ends the source.
    pub descriptor_release: unsafe extern "C" fn(source: *mut HostDescriptor),
    /// Appends work that may run beside other concurrent work.
    pub queue_concurrent: unsafe extern "C" fn(queue: *mut HostQueue, work: Work) -> i32,
    /// Gives the queue up until a wake-up for the event, or until the deadline on a clock (0: none).
    pub queue_sleep:
        unsafe extern "C" fn(queue: *mut HostQueue, event: usize, clock: u64, deadline: u64) -> i32,
    /// Wakes one sleeper of the event, or all (option 1).
    pub queue_wakeup:
        unsafe extern "C" fn(queue: *mut HostQueue, event: usize, options: u64) -> i32,
    /// Runs `call(context)`, which waits: if that keeps a thread of the host, another one takes its
    /// place meanwhile.
    pub queue_blocking: unsafe extern "C" fn(
        queue: *mut HostQueue,
        call: unsafe extern "C" fn(context: *mut c_void),
        context: *mut c_void,
    ),
    /// Gives the names of the queues the calling thread holds to `sink`, one by one, outermost
    /// first.
    pub queue_held: unsafe extern "C" fn(
        queue: *mut HostQueue,
        sink: unsafe extern "C" fn(context: *mut c_void, text: *const u8, len: usize),
        context: *mut c_void,
    ),
    /// Makes an interrupt source for an eventfd of the plugin's, which is duplicated and made
    /// non-blocking. `unmask` is another eventfd, raised after each delivery, or -1 for none.
    /// `flags` are those of `interrupt_create`'s index. Takes the handler, also on failure.
    pub interrupt_create_from_eventfd: unsafe extern "C" fn(
        trigger: i32,
        unmask: i32,
        flags: u32,
        queue: *mut HostQueue,
        handler: Handler,
        source: *mut *mut HostInterrupt,
    ) -> i32,
    /// Has what there is delivered; with `wait` 1, waits for a delivery to end instead.
    pub interrupt_check: unsafe extern "C" fn(source: *mut HostInterrupt, wait: i32) -> i32,
    /// The same for a timer.
    pub timer_check: unsafe extern "C" fn(timer: *mut HostTimer, wait: i32) -> i32,
    /// Replaces a descriptor's handler, or removes it (null). 1 if there were events that nobody
    /// could be called for, else 0; a new handler is not called for them.
    pub descriptor_set_handler:
        unsafe extern "C" fn(source: *mut HostDescriptor, handler: *const Handler) -> i32,
    /// Enables (1) or disables (0). A descriptor starts enabled; what comes meanwhile is kept.
    pub descriptor_set_enable:
        unsafe extern "C" fn(source: *mut HostDescriptor, enable: i32, done: Work) -> i32,
    /// Ends the source.
    pub descriptor_cancel: unsafe extern "C" fn(source: *mut HostDescriptor, done: Work),
    /// Has the handler called once more (0), or waits for its next call (1).
    pub descriptor_check: unsafe extern "C" fn(source: *mut HostDescriptor, wait: i32) -> i32,
    /// Says that the work in progress on a queue is getting on.
    pub queue_progress: unsafe extern "C" fn(queue: *mut HostQueue),
}

/// The name of [`DispatchTable`].
pub const DISPATCH: &std::ffi::CStr = c"iohost.dispatch.1";
