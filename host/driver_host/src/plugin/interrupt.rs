//! Interrupt sources of the dispatch table.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::AcqRel;

use iohost_dispatch::{Clock, InterruptEvent, InterruptLine, InterruptSource, Queue, Signal};
use iohost_driver_abi::{Handler, HostDevice, HostInterrupt, HostQueue, Work};
use iohost_interface::IOReturn;
use log::error;

use super::dispatch::QueueObject;
use super::foreign::{ForeignHandler, ForeignWork};
use super::object::{give, object, released, shared, written};
use crate::Device;

/// The bits of an interrupt source's index that are the index, and the flag above them that asks
/// for continuous time (`kIOInterruptSourceContinuousTime`).
const INDEX_MASK: u32 = 0xffff;
const CONTINUOUS_TIME: u32 = 0x1_0000;

/// What a `HostInterrupt` is.
pub(super) struct InterruptObject {
    source: InterruptSource,
    /// Where it comes from; `None` for an eventfd of the plugin's.
    vector: Option<TakenVector>,
}

/// A vector of a device, which is given back once.
struct TakenVector {
    device: Arc<Device>,
    vector: u32,
    given_back: AtomicBool,
}

impl TakenVector {
    fn give_back(&self) {
        if !self.given_back.swap(true, AcqRel) {
            self.device.give_back_interrupt(self.vector);
        }
    }
}

impl Drop for TakenVector {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl Drop for InterruptObject {
    fn drop(&mut self) {
        self.source.cancel(None);
    }
}

pub(super) unsafe extern "C" fn interrupt_create(
    device: *mut HostDevice,
    index: u32,
    queue: *mut HostQueue,
    handler: Handler,
    source: *mut *mut HostInterrupt,
) -> i32 {
    let handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let device = unsafe { shared::<Device>(device) };
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let made = make_interrupt(device, index, &queue.queue, handler);
    // SAFETY: contract 4.
    unsafe { written(source, made.map(give)) }
}

fn make_interrupt(
    device: Arc<Device>,
    index: u32,
    queue: &Queue,
    handler: ForeignHandler,
) -> Result<InterruptObject, IOReturn> {
    let clock = interrupt_clock(index & !INDEX_MASK)?;
    device.opened()?;
    let taken = device.take_interrupt(index & INDEX_MASK)?;
    let given_back = AtomicBool::new(false);
    let vector = Some(TakenVector { device, vector: taken.vector, given_back });
    let source = watch_interrupt(queue, taken.signal, taken.line, clock, handler)?;
    Ok(InterruptObject { source, vector })
}

pub(super) unsafe extern "C" fn interrupt_create_from_eventfd(
    trigger: i32,
    unmask: i32,
    flags: u32,
    queue: *mut HostQueue,
    handler: Handler,
    source: *mut *mut HostInterrupt,
) -> i32 {
    let handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4: open for the call.
    let trigger = unsafe { BorrowedFd::borrow_raw(trigger) };
    // SAFETY: contract 4: likewise, unless it is -1.
    let unmask = (unmask != -1).then(|| unsafe { BorrowedFd::borrow_raw(unmask) });
    let made = make_eventfd_interrupt(trigger, unmask, flags, &queue.queue, handler);
    // SAFETY: contract 4.
    unsafe { written(source, made.map(give)) }
}

fn make_eventfd_interrupt(
    trigger: BorrowedFd<'_>,
    unmask: Option<BorrowedFd<'_>>,
    flags: u32,
    queue: &Queue,
    handler: ForeignHandler,
) -> Result<InterruptObject, IOReturn> {
    let clock = interrupt_clock(flags)?;
    let line = match unmask {
        None => InterruptLine::Edge,
        Some(unmask) => {
            let unmask = eventfd(unmask)?;
            InterruptLine::Level(Box::new(move || unmask.raise()))
        }
    };
    let source = watch_interrupt(queue, Arc::new(eventfd(trigger)?), line, clock, handler)?;
    Ok(InterruptObject { source, vector: None })
}

/// Another descriptor for an eventfd of the plugin's.
pub(super) fn eventfd(fd: BorrowedFd<'_>) -> Result<Signal, IOReturn> {
    let fd = fd.try_clone_to_owned().map_err(|_| IOReturn::NO_RESOURCES)?;
    Signal::try_from(fd).map_err(|err| {
        error!(err:err; "an interrupt from an eventfd");
        IOReturn::BAD_ARGUMENT
    })
}

/// The clock that the flags above an interrupt's index ask for.
fn interrupt_clock(flags: u32) -> Result<Clock, IOReturn> {
    match flags {
        0 => Ok(Clock::Uptime),
        CONTINUOUS_TIME => Ok(Clock::Continuous),
        _ => Err(IOReturn::BAD_ARGUMENT),
    }
}

fn watch_interrupt(
    queue: &Queue,
    signal: Arc<Signal>,
    line: InterruptLine,
    clock: Clock,
    mut handler: ForeignHandler,
) -> Result<InterruptSource, IOReturn> {
    let handler = move |event: InterruptEvent| handler.call(event.count, event.time);
    InterruptSource::create(queue, signal, line, clock, handler).map_err(|err| {
        error!(err:err; "watching an interrupt");
        IOReturn::NO_RESOURCES
    })
}

pub(super) unsafe extern "C" fn interrupt_check(source: *mut HostInterrupt, wait: i32) -> i32 {
    // SAFETY: contract 2.
    let source = &unsafe { object::<InterruptObject>(source) }.source;
    IOReturn::code(&if wait == 0 { source.check_for_work() } else { source.wait_for_work() })
}

pub(super) unsafe extern "C" fn interrupt_set_handler(
    source: *mut HostInterrupt,
    handler: Handler,
) -> i32 {
    let mut handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let source = unsafe { object::<InterruptObject>(source) };
    let handler = move |event: InterruptEvent| handler.call(event.count, event.time);
    source.source.set_handler(Some(handler));
    0
}

pub(super) unsafe extern "C" fn interrupt_set_enable(
    source: *mut HostInterrupt,
    enable: i32,
    done: Work,
) -> i32 {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    let source = unsafe { object::<InterruptObject>(source) };
    IOReturn::code(&source.source.set_enable(enable != 0, done))
}

pub(super) unsafe extern "C" fn interrupt_cancel(source: *mut HostInterrupt, done: Work) {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    let source = unsafe { object::<InterruptObject>(source) };
    // First the device, so that `done` finds the vector free.
    if let Some(vector) = &source.vector {
        vector.give_back();
    }
    source.source.cancel(done);
}

pub(super) unsafe extern "C" fn interrupt_last(
    source: *mut HostInterrupt,
    count: *mut u64,
    time: *mut u64,
) {
    // SAFETY: contract 2.
    let source = unsafe { object::<InterruptObject>(source) };
    let last = source.source.last_interrupt();
    // SAFETY: contract 4.
    unsafe { count.write(last.count) };
    // SAFETY: contract 4.
    unsafe { time.write(last.time) };
}

pub(super) unsafe extern "C" fn interrupt_release(source: *mut HostInterrupt) {
    // SAFETY: contract 2.
    unsafe { released::<InterruptObject>(source) }
}
