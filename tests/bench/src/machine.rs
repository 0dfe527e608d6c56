//! The machine underneath: which cores we use, how far apart they are, who else uses them.

use std::fs::{self, File};
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Release};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::{Pid, gettid};

use crate::rounds::median;

/// Where the two sides of a contender run. One and the same core if there is no second one.
#[derive(Clone, Copy)]
pub struct Cores {
    /// Of the thread that sends and measures.
    pub producer: usize,
    /// Of the thread or process that is sent to.
    pub consumer: usize,
    /// Of a thread that sends too: one more, or the consumer's.
    second_producer: usize,
}

impl Cores {
    /// The first core this thread may use, and the first one that shares no execution units with
    /// it. To be asked before pinning.
    pub fn choose() -> Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let mut cores = (0..CpuSet::count()).filter(|&core| allowed.is_set(core) == Ok(true));
        let producer = cores.next().context("a thread may run somewhere")?;
        let others: Vec<usize> = cores.collect();
        let apart = others.iter().find(|&&other| siblings(other) != siblings(producer));
        let consumer = *apart.or(others.first()).unwrap_or(&producer);
        let third = others.iter().find(|&&other| other != consumer);
        Ok(Self { producer, consumer, second_producer: *third.unwrap_or(&consumer) })
    }

    pub fn pin_producer(self) -> Result<()> {
        pin(self.producer)
    }

    pub fn pin_second_producer(self) -> Result<()> {
        pin(self.second_producer)
    }

    pub fn pin_consumer(self) -> Result<()> {
        pin(self.consumer)
    }
}

/// Hardware threads of one core, as the kernel writes them; unknown where it does not.
fn siblings(core: usize) -> Option<String> {
    let path = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
    fs::read_to_string(path).ok()
}

/// Starts something, whose threads run on the consumer's core from then on; the calling one goes on
/// on the producer's. While it starts it sees all cores, as in a program that is not measured.
pub fn start_apart<T>(start: impl FnOnce() -> Result<T>) -> Result<T> {
    let cores = Cores::choose()?;
    let started = start()?;
    for thread in fs::read_dir("/proc/self/task")? {
        let name = thread?.file_name();
        let thread = name.to_str().context("a thread's number")?.parse()?;
        if Pid::from_raw(thread) != gettid() {
            pin_thread(Pid::from_raw(thread), cores.consumer)?;
        }
    }
    cores.pin_producer()?;
    Ok(started)
}

/// Has the calling thread, and every thread and process it starts from here on, run on one core.
fn pin(core: usize) -> Result<()> {
    pin_thread(Pid::from_raw(0), core)
}

fn pin_thread(thread: Pid, core: usize) -> Result<()> {
    let mut only = CpuSet::new();
    only.set(core)?;
    Ok(sched_setaffinity(thread, &only)?)
}

/// Asks the kernel to let no core sleep deeply as long as the file is open: a wake-up out of a
/// deep sleep is the machine's figure, not ours.
pub fn keep_awake() -> Option<File> {
    let path = "/dev/cpu_dma_latency";
    let open = File::options().write(true).open(path);
    let held = open.and_then(|mut file| file.write_all(&0_i32.to_ne_bytes()).map(|()| file));
    match held {
        Ok(file) => {
            eprintln!("{path} is held at 0{}", if heeds_latency() { "" } else { NOT_HEEDED });
            Some(file)
        }
        Err(err) => {
            eprintln!("{path}: {err}; the wake-up of a sleeping core is part of the figures");
            None
        }
    }
}

const NOT_HEEDED: &str =
    ", to no effect: no cpuidle driver; the wake-up of a halted core is part of the figures";

/// Whether there is anybody to heed the file: without a cpuidle driver, as in many virtual
/// machines, an idle core halts whatever it says.
fn heeds_latency() -> bool {
    let driver = fs::read_to_string("/sys/devices/system/cpu/cpuidle/current_driver");
    driver.is_ok_and(|driver| driver.trim() != "none")
}

/// The watchdog of a contender: a wake-up that got lost ends it. Five minutes, because a contender
/// whose instructions are counted takes one on a busy machine.
pub fn die_after_five_minutes() {
    nix::unistd::alarm::set(300);
}

/// Nanoseconds that a cache line takes from the producer's core to the consumer's and back, without
/// anybody sleeping; 0 if there is one core only.
pub fn cache_line_round_trip_ns() -> Result<f64> {
    let ball = Word::default();
    round_trip_ns(&ball, &ball)
}

/// The same for two cache lines, each of which is written by one side only, as the two directions of
/// a connection are. A line that both write comes with the right to write it; these do not.
pub fn two_cache_lines_round_trip_ns() -> Result<f64> {
    round_trip_ns(&Word::default(), &Word::default())
}

/// A word on a pair of cache lines for itself.
#[derive(Default)]
#[repr(align(128))]
pub struct Word(pub AtomicU64);

fn round_trip_ns(there: &Word, back: &Word) -> Result<f64> {
    const BLOCKS: u64 = 9;
    const ROUND_TRIPS: u64 = 400;
    let cores = Cores::choose()?;
    if cores.producer == cores.consumer {
        return Ok(0.0);
    }
    let wait_for = |word: &Word, turn| {
        while word.0.load(Acquire) != turn {
            std::hint::spin_loop();
        }
    };
    thread::scope(|threads| {
        let answering = threads.spawn(|| {
            // Plays in any case: somebody waits for the ball.
            let pinned = cores.pin_consumer();
            for trip in 0..BLOCKS * ROUND_TRIPS {
                wait_for(there, 2 * trip + 1);
                back.0.store(2 * trip + 2, Release);
            }
            pinned
        });
        let asking = threads.spawn(|| {
            let pinned = cores.pin_producer();
            let mut blocks = Vec::new();
            for block in 0..BLOCKS {
                let start = Instant::now();
                for trip in block * ROUND_TRIPS..(block + 1) * ROUND_TRIPS {
                    there.0.store(2 * trip + 1, Release);
                    wait_for(back, 2 * trip + 2);
                }
                blocks.push(start.elapsed().as_nanos() as f64 / ROUND_TRIPS as f64);
            }
            pinned.map(|()| median(blocks.into_iter()))
        });
        answering.join().expect("the thread does not panic")?;
        asking.join().expect("the thread does not panic")
    })
}

/// Processor time used up to some moment, in seconds.
pub struct CpuTime {
    at: Instant,
    /// By this program and by its children that have ended.
    ours: f64,
    /// By everybody, the hypervisor's other guests included.
    everybody: f64,
    processors: usize,
}

impl CpuTime {
    pub fn now() -> Result<Self> {
        let mut ours = 0.0;
        for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
            let usage = getrusage(who)?;
            let time = usage.user_time() + usage.system_time();
            ours += time.num_microseconds() as f64 / 1e6;
        }
        let stat = fs::read_to_string("/proc/stat")?;
        let everybody = busy_ticks(&stat)? as f64 / TICKS;
        // One line is for all of them.
        let processors = stat.lines().filter(|line| line.starts_with("cpu")).count() - 1;
        Ok(Self { at: Instant::now(), ours, everybody, processors })
    }

    /// The part of all processors' time since `before` that others used, roughly: the kernel counts
    /// everybody's time in ticks.
    pub fn foreign_since(&self, before: &Self) -> f64 {
        let all = (self.at - before.at).as_secs_f64() * self.processors as f64;
        let foreign = (self.everybody - before.everybody) - (self.ours - before.ours);
        (foreign / all).clamp(0.0, 1.0)
    }
}

/// Ticks of `/proc/stat` per second (`USER_HZ`, which is 100 on every architecture we run on).
const TICKS: f64 = 100.0;

/// All columns of the first line (`proc_stat(5)`) but idle and iowait, and but the last two, which
/// are counted as user time already.
fn busy_ticks(stat: &str) -> Result<u64> {
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let columns: Vec<u64> =
        line.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    let busy = columns.iter().enumerate().filter(|(place, _)| matches!(place, 0..=2 | 5..=7));
    Ok(busy.map(|(_, ticks)| ticks).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_not_busy_and_a_guest_is_not_counted_twice() {
        let stat = "cpu  1 2 4 1000 1000 8 16 32 1000 1000\ncpu0 0 0 0 0 0 0 0 0 0 0\n";
        assert_eq!(busy_ticks(stat).unwrap(), 63);
    }
}
