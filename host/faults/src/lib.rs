//! Campaigns of faults: a daemon, its driver hosts, emulated devices and clients on one side, and on
//! the other everything that can go wrong with each of them, by the ten thousands and from a seed.
//!
//! What is on trial is supervision: whatever happens to a device, a driver, a client or the daemon, which
//! is killed now and then and started again, no process of ours dies that was not killed, no entry is
//! lost or comes twice, every device is safe before its next driver, and nothing is left behind. A
//! [`Score`] says how far that held.
//!
//! ```text
//!  Campaign::run ──▶ Machine   a folder, the daemon, one device per worker, in this process
//!                └─▶ Worker    per device: chooses faults, makes them, and keeps a Stream going,
//!                              which knows what has to come back
//! ```
//!
//! A driver that people use cannot be told to panic. So beside the devices with the driver on trial there
//! are two with the probe, which fails from within: it panics, hangs, leaks, writes over what it shares.
//!
//! The choice of faults depends on the seed alone. What runs at the same time does not, so a second
//! run makes the same faults at slightly other moments.

#![forbid(unsafe_code)]

mod fault;
mod machine;
mod offence;
mod score;
mod stream;
mod worker;

use std::cell::Cell;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use iohost_client::ClientError;

pub use machine::PROBE;
pub use score::{RestartTimes, Score};

use machine::{Gone, Machine};
use worker::Worker;

/// What is to be tried.
#[derive(Clone, Debug)]
pub struct Campaign {
    /// Where the choice of faults starts.
    pub seed: u64,
    /// How many faults.
    pub count: u64,
    /// How many devices, each with a driver and a client of its own. Two more have the driver
    /// [`PROBE`], which is in the same folder.
    pub devices: usize,
    /// The `iohost` program.
    pub iohost: PathBuf,
    /// Where the plugins of the drivers are.
    pub driver_directory: PathBuf,
    /// The driver's name. It serves the interface `edu` on QEMU's `edu` device.
    pub driver: String,
}

/// Why a campaign could not be made, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum CampaignError {
    /// No folder, device or daemon.
    #[error("{what}")]
    Setup {
        /// What could not be had.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The daemon refused what it should do.
    #[error("the daemon refused, {when}")]
    Daemon {
        /// What was asked of it.
        when: String,
        /// What it said.
        source: Box<ClientError>,
    },
    /// Something did not come to pass in a long time.
    #[error("waited {PATIENCE:?} for {what}; the daemon's log is {}", log.display())]
    Silence {
        /// What was waited for.
        what: String,
        /// Kept for whoever looks for the reason.
        log: PathBuf,
    },
}

/// How long anything may take before a campaign gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tenths of a second for what was closed to be gone.
const SETTLING: usize = 50;

impl Campaign {
    /// Runs it. `progress` hears now and then how many faults there were, and says whether to go on;
    /// a campaign that is ended early has a score like any other.
    ///
    /// Blocks until it is over. What went wrong is in the score; an error means that there is none.
    pub fn run(
        &self,
        mut progress: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Score, CampaignError> {
        let machine = Machine::start(self)?;
        let mut workers = (0..machine.devices().len())
            .map(|number| Worker::start(&machine, number, self))
            .collect::<Result<Vec<_>, _>>()?;
        let before = machine.belongings()?;
        let share = self.count.div_ceil(self.devices.max(1) as u64);
        let (done, is_over) = (&AtomicU64::new(0), &AtomicBool::new(false));
        let mut score = thread::scope(|scope| {
            let (on_trial, probes): (Vec<_>, Vec<_>) =
                workers.iter_mut().partition(|worker| worker.is_on_trial());
            let judged = on_trial.into_iter().map(|worker| {
                let told = Cell::new(0);
                scope.spawn(move || {
                    worker.work(|faults| {
                        done.fetch_add(faults - told.replace(faults), Relaxed);
                        faults < share && !is_over.load(Relaxed)
                    })
                })
            });
            let mut running: Vec<_> = judged.collect();
            // They go on as long as the others do, and make one round of their faults at least.
            let probing = probes.into_iter().map(|worker| {
                scope.spawn(|| worker.work(|faults| faults == 0 || !is_over.load(Relaxed)))
            });
            let probing: Vec<_> = probing.collect();
            while !running.iter().all(thread::ScopedJoinHandle::is_finished) {
                thread::sleep(Duration::from_millis(50));
                if progress(done.load(Relaxed)).is_break() {
                    is_over.store(true, Relaxed);
                }
            }
            is_over.store(true, Relaxed);
            running.extend(probing);
            let scores =
                running.into_iter().map(|worker| worker.join().expect("workers do not panic"));
            scores.collect::<Result<Vec<Score>, CampaignError>>()
        })
        .map(|scores| Score::sum(self.seed, scores))?;
        // What is closed is not gone at once: a connection, a session whose client left.
        for _ in 0..SETTLING {
            if before.covers(&machine.belongings()?) {
                break;
            }
            thread::sleep(Duration::from_millis(100));
        }
        score.take_stock(&before, &machine.belongings()?);
        drop(workers);
        match machine.stop() {
            Ok(()) => {}
            Err(Gone) => score.host_deaths += 1,
        }
        Ok(score)
    }
}
