//! What the timers cost the engine, read from the numbers of its queues.

use iohost_dispatch::QueueNumbers;
use iohost_driver::wdm::{DeviceObject, Dpc, IoTimer, KernelTimer, TimerType};

use crate::bench::{Bench, Held, Service, after_ms};

impl Service {
    fn numbers(&self, queue: &str) -> QueueNumbers {
        let mut numbers = self.engine.numbers().into_iter();
        numbers.find(|numbers| numbers.name == queue).unwrap()
    }

    /// How often the hidden queue ran in the next three seconds.
    fn ticks(&self) -> u64 {
        let before = self.numbers("wdm").executed;
        (0..3).for_each(|_| self.advance_ms(1000));
        self.numbers("wdm").executed - before
    }
}

#[test]
fn there_are_no_ticks_while_no_io_timer_is_started() {
    let service = Service::on_virtual_time();
    let device = DeviceObject::create(&service.queue).unwrap();
    assert_eq!(service.ticks(), 0);
    let timer = IoTimer::initialize(&device, Bench::tick).unwrap();
    assert_eq!(service.ticks(), 0);

    timer.start().unwrap();
    timer.start().unwrap();
    assert_eq!(service.ticks(), 3);
    timer.stop().unwrap();
    timer.stop().unwrap();
    assert_eq!(service.ticks(), 1, "the one that was under way");
    assert_eq!(service.ticks(), 0);

    device.delete();
    timer.start().unwrap();
    assert_eq!(service.ticks(), 0);
}

#[test]
fn a_cancelled_timer_wakes_nobody() {
    let service = Service::on_virtual_time();
    let device = DeviceObject::create(&service.queue).unwrap();
    let timer = KernelTimer::initialize(&device, TimerType::Notification).unwrap();
    timer.set_ex(after_ms(10), 10, None);
    timer.cancel();
    assert_eq!(service.ticks(), 0);
}

#[test]
fn a_dpc_takes_one_place_on_its_queue_however_many_expiries_want_it() {
    let service = Service::on_virtual_time();
    let device = DeviceObject::create(&service.queue).unwrap();
    let timer = KernelTimer::initialize(&device, TimerType::Notification).unwrap();
    let dpc = Dpc::initialize(&device, Bench::call);
    timer.set_ex(after_ms(10), 10, Some(&dpc));
    let name = service.engine.numbers().remove(0).name;
    let busy = Held::hold(&service.queue);
    (0..5).for_each(|_| service.advance_ms(10));
    assert_eq!(service.numbers(&name).depth, 2, "it, and the work that holds the queue");
    busy.release();
}
