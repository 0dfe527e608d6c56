//! Checks that the engine's timers follow a time of day that is stepped. Run in the guest, as root,
//! by `steps-the-clock.sh`: it sets the machine's clock.
//!
//! Every line that starts with `ok` is a check that passed; the exit status says whether all did.

#![forbid(unsafe_code)]

use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use iohost_dispatch::{Clock, Engine, Queue, TimerSource};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

const SECOND: u64 = 1_000_000_000;
const HOUR: u64 = 3600 * SECOND;

/// How long a timer that has to fire may take on a slow machine.
const WATCHDOG: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let engine = Engine::start()?;
    let queue = Queue::create(&engine, "clock-check", Default::default())?;

    let (_wall, fired) = timer(&queue, Clock::Wall, HOUR, 0)?;
    let (_patient, patient_fired) = timer(&queue, Clock::Wall, HOUR, HOUR)?;
    let (_uptime, uptime_fired) = timer(&queue, Clock::Uptime, HOUR, 0)?;
    let (_continuous, continuous_fired) = timer(&queue, Clock::Continuous, HOUR, 0)?;
    ensure!(is_waiting(&fired), "it fired an hour early");
    step(2 * HOUR as i64)?;
    fires(&fired)?;
    fires(&patient_fired)?;
    println!("ok a step forward over a deadline fires it, with leeway or without");
    ensure!(is_waiting(&uptime_fired) && is_waiting(&continuous_fired));
    println!("ok and leaves the other clocks alone");

    let (_wall, fired) = timer(&queue, Clock::Wall, 2 * SECOND, 0)?;
    // Due well after the other one would have been.
    let (_fence, fence) = timer(&queue, Clock::Uptime, 4 * SECOND, 0)?;
    step(-(HOUR as i64))?;
    fires(&fence)?;
    ensure!(is_waiting(&fired), "it fired at the moment it had before the step");
    println!("ok a step back puts a deadline off");
    step(HOUR as i64)?;
    fires(&fired)?;
    println!("ok until the clock has come to it again");
    Ok(())
}

/// A timer that is due `after` nanoseconds on its clock, and what it fires into.
fn timer(
    queue: &Queue,
    clock: Clock,
    after: u64,
    leeway: u64,
) -> Result<(TimerSource, Receiver<u64>)> {
    let (firing, fired) = channel();
    let timer = TimerSource::create(queue, move |_| {
        let _ = firing.send(clock.now());
    });
    timer.wake_at(clock, clock.now() + after, leeway)?;
    Ok((timer, fired))
}

fn fires(fired: &Receiver<u64>) -> Result<u64> {
    match fired.recv_timeout(WATCHDOG) {
        Ok(time) => Ok(time),
        Err(RecvTimeoutError::Timeout) => bail!("it did not fire within {WATCHDOG:?}"),
        Err(RecvTimeoutError::Disconnected) => bail!("its handler is gone"),
    }
}

fn is_waiting(fired: &Receiver<u64>) -> bool {
    fired.try_recv() == Err(TryRecvError::Empty)
}

/// Sets the machine's time of day forward or back.
fn step(by_ns: i64) -> Result<()> {
    let to = Clock::Wall.now().checked_add_signed(by_ns).unwrap_or_default();
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(Duration::from_nanos(to)))?;
    Ok(())
}
