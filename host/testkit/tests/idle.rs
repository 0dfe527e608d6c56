//! What ten thousand queues with nothing to do cost: memory, and nothing else. A file of its own,
//! because it looks at all that its process does.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use iohost_device_models::Function;
use iohost_device_models::edu::{Edu, Timing};
use iohost_dispatch::Engine;
use iohost_driver::prelude::*;
use iohost_driver::{Exported, export_driver};
use iohost_driver_host::{Device, Driver, Plugin};
use iohost_testkit::FakeDevice;

const QUEUES: u64 = 10_000;
const HOUR: u64 = 3_600_000_000_000;

/// A driver that lends its queue to the test.
struct Lending;

thread_local! {
    static QUEUE: RefCell<Option<IODispatchQueue<Lending>>> = const { RefCell::new(None) };
}

impl IOService for Lending {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];

    fn start(_: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self> {
        QUEUE.set(Some(queue.clone()));
        Ok(Self)
    }
}

export_driver!(Lending);

#[test]
fn ten_thousand_idle_queues_have_no_threads_never_wake_up_and_take_less_than_64_mib() {
    let engine = Engine::start().unwrap();
    let function = Arc::new(Function::new(Edu::new(Timing::Manual)));
    let (device, _) = Device::take_over(Arc::new(FakeDevice::new(function)), vec![]).unwrap();
    let plugin = Plugin::linked(Lending::descriptor());
    let _driver = Driver::start(&engine, plugin, device, Arc::default()).unwrap();
    let default_queue = QUEUE.take().unwrap();
    let threads = runs().len();

    let (fired, firings) = channel();
    let queues: Vec<_> = (0..QUEUES)
        .map(|number| {
            let name = format!("queue {number}");
            let queue = IODispatchQueue::create(&default_queue, &name, number).unwrap();
            let fired = fired.clone();
            let timer = IOTimerDispatchSource::create(&queue, move |number: &mut u64, _| {
                fired.send(*number).unwrap();
            });
            let timer = timer.unwrap();
            timer.wake_at_time(IOTimerClock::UptimeRaw, 0, 0).unwrap();
            (queue, timer)
        })
        .collect();
    // Each queue has run a handler: what that needs is there.
    let sum: u64 = (0..QUEUES).map(|_| firings.recv().unwrap()).sum();
    assert_eq!(sum, QUEUES * (QUEUES - 1) / 2);
    // To wait for something is not work either.
    for (queue, timer) in queues.iter().step_by(2) {
        let deadline = queue.now(IOTimerClock::UptimeRaw) + HOUR;
        timer.wake_at_time(IOTimerClock::UptimeRaw, deadline, 0).unwrap();
    }

    assert_eq!(runs().len(), threads, "threads");
    await_rest();
    assert_eq!(runs_within(Duration::from_secs(3)), [], "(thread, times it ran)");
    let kib = resident_kib();
    println!("{QUEUES} queues: {threads} threads, no wake-up in 3 s, {kib} KiB of memory");
    assert!(kib < 64 * 1024, "{kib} KiB of memory");
}

/// Until every thread is at rest: those that had work have to put it down first.
fn await_rest() {
    let quiet = || runs_within(Duration::from_millis(500)).is_empty();
    assert!((0..60).any(|_| quiet()), "some thread ran in each half second of half a minute");
}

/// The other threads that ran within a time, and how often. There is no event to wait for where
/// nothing may happen.
fn runs_within(time: Duration) -> Vec<(String, u64)> {
    let before = runs();
    thread::sleep(time);
    let own = fs::read_link("/proc/thread-self").unwrap();
    let own = own.file_name().unwrap().to_str().unwrap();
    let ran = runs().into_iter().filter(|(thread, _)| thread != own);
    let ran = ran.map(|(thread, runs)| (runs - before.get(&thread).unwrap_or(&0), thread));
    ran.filter(|(runs, _)| *runs > 0).map(|(runs, thread)| (thread, runs)).collect()
}

/// How often each thread of this process has run, by its number: it has left its processor as
/// often (`proc_pid_status(5)`).
fn runs() -> BTreeMap<String, u64> {
    let threads = fs::read_dir("/proc/self/task").unwrap().map(|entry| entry.unwrap());
    threads
        .filter_map(|thread| {
            // None for a thread that ended meanwhile.
            let status = fs::read_to_string(thread.path().join("status")).ok()?;
            let runs = field(&status, "voluntary_ctxt_switches:")
                + field(&status, "nonvoluntary_ctxt_switches:");
            Some((thread.file_name().into_string().ok()?, runs))
        })
        .collect()
}

fn resident_kib() -> u64 {
    field(&fs::read_to_string("/proc/self/status").unwrap(), "VmRSS:")
}

fn field(status: &str, name: &str) -> u64 {
    let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    value.trim().trim_end_matches(" kB").parse().unwrap()
}
