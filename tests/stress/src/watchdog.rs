//! Notices that nothing happens any more.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, Weak};
use std::thread;
use std::time::Duration;

use crate::witness::broken;
use crate::world::World;

/// Counts of one kind or another go up many times per second; so long without any is a hang.
const PATIENCE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(500);

static EVENTS: AtomicU64 = AtomicU64::new(0);
static WORLD: Mutex<Weak<World>> = Mutex::new(Weak::new());
static STEP: Mutex<&str> = Mutex::new("preparation");

/// Something happened.
pub fn alive() {
    EVENTS.fetch_add(1, Relaxed);
}

/// What a hang will be told of.
pub fn watch(world: Weak<World>) {
    *WORLD.lock().unwrap() = world;
}

/// What the main thread is at.
pub fn at(step: &'static str) {
    *STEP.lock().unwrap() = step;
    alive();
}

/// Watches until the process ends.
pub fn start() {
    let watch = || {
        let (mut seen, mut still) = (0, Duration::ZERO);
        loop {
            thread::sleep(LOOK);
            let events = EVENTS.load(Relaxed);
            still = if events == seen { still + LOOK } else { Duration::ZERO };
            seen = events;
            if still >= PATIENCE {
                dump();
                broken(format_args!("nothing hangs: nothing happened for {PATIENCE:?}"));
            }
        }
    };
    thread::Builder::new().name("watchdog".to_owned()).spawn(watch).expect("a thread");
}

fn dump() {
    eprintln!("stress: HANG; the main thread is at: {}", STEP.lock().unwrap());
    match WORLD.lock().unwrap().upgrade() {
        Some(world) => world.dump(),
        None => eprintln!("  the queues and sources are gone"),
    }
    for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        eprintln!("  thread {:<16} {}", read("comm").trim(), read("wchan").trim());
    }
}
