//! Timers of the dispatch table.

use iohost_dispatch::TimerSource;
use iohost_driver_abi::{Handler, HostQueue, HostTimer, Work};
use iohost_interface::IOReturn;

use super::dispatch::{QueueObject, clock};
use super::foreign::{ForeignHandler, ForeignWork};
use super::object::{give, object, released, written};

pub(super) unsafe extern "C" fn timer_create(
    queue: *mut HostQueue,
    handler: Handler,
    timer: *mut *mut HostTimer,
) -> i32 {
    let mut handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    let made = TimerSource::create(&queue.queue, move |time| handler.call(time, 0));
    // SAFETY: contract 4.
    unsafe { written(timer, Ok(give(made))) }
}

pub(super) unsafe extern "C" fn timer_set_handler(timer: *mut HostTimer, handler: Handler) -> i32 {
    let mut handler = ForeignHandler(handler);
    // SAFETY: contract 2.
    let timer = unsafe { object::<TimerSource>(timer) };
    timer.set_handler(Some(move |time| handler.call(time, 0)));
    0
}

pub(super) unsafe extern "C" fn timer_wake_at(
    timer: *mut HostTimer,
    number: u64,
    deadline: u64,
    leeway: u64,
) -> i32 {
    // SAFETY: contract 2.
    let timer = unsafe { object::<TimerSource>(timer) };
    let armed = clock(number).and_then(|clock| timer.wake_at(clock, deadline, leeway));
    IOReturn::code(&armed)
}

pub(super) unsafe extern "C" fn timer_set_enable(
    timer: *mut HostTimer,
    enable: i32,
    done: Work,
) -> i32 {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    let timer = unsafe { object::<TimerSource>(timer) };
    IOReturn::code(&timer.set_enable(enable != 0, done))
}

pub(super) unsafe extern "C" fn timer_check(timer: *mut HostTimer, wait: i32) -> i32 {
    // SAFETY: contract 2.
    let timer = unsafe { object::<TimerSource>(timer) };
    IOReturn::code(&if wait == 0 { timer.check_for_work() } else { timer.wait_for_work() })
}

pub(super) unsafe extern "C" fn timer_cancel(timer: *mut HostTimer, done: Work) {
    let done = ForeignWork::block(done);
    // SAFETY: contract 2.
    unsafe { object::<TimerSource>(timer) }.cancel(done);
}

pub(super) unsafe extern "C" fn timer_release(timer: *mut HostTimer) {
    // SAFETY: contract 2.
    unsafe { released::<TimerSource>(timer) }
}
