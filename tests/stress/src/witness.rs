//! Who did what, and what is said when a promise is broken.

use std::fmt;
use std::panic;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

static SEED: AtomicU64 = AtomicU64::new(0);
static ROUND: AtomicU64 = AtomicU64::new(0);
static BROKEN: AtomicBool = AtomicBool::new(false);

/// What a panicking block says.
pub const MEANT: &str = "meant by the stress";

/// An operation: which lane sent it, its number there, and what it was.
#[derive(Clone, Copy, Debug)]
pub struct Witness {
    pub lane: u32,
    pub operation: u64,
    pub what: &'static str,
}

impl Witness {
    pub fn begin_round(seed: u64, round: u64) {
        SEED.store(seed, SeqCst);
        ROUND.store(round, SeqCst);
    }

    /// Ends the run: a promise is broken.
    pub fn broken(&self, promise: impl fmt::Display) -> ! {
        broken(format_args!("{promise}\n  by {self}"))
    }

    /// Ends the run unless the promise was kept.
    pub fn check(&self, kept: bool, promise: impl FnOnce() -> String) {
        if !kept {
            self.broken(promise());
        }
    }
}

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thread = thread::current();
        let name = thread.name().unwrap_or("?");
        write!(f, "lane {}, operation {} ({})", self.lane, self.operation, self.what)?;
        write!(f, ", seen on thread {name}")
    }
}

/// Ends the run with what is needed to see it again.
pub fn broken(promise: impl fmt::Display) -> ! {
    if BROKEN.swap(true, SeqCst) {
        // The first one speaks; the process ends under this thread.
        loop {
            thread::park();
        }
    }
    let (seed, round) = (SEED.load(SeqCst), ROUND.load(SeqCst));
    eprintln!("stress: BROKEN in round {round} of seed {seed}: {promise}");
    eprintln!(
        "  again: cargo run --release -p iohost_stress -- --seed {seed} --round {round} --repeat"
    );
    std::process::exit(1);
}

/// Panics that blocks make on purpose say nothing; any other is a fault of the stress itself and
/// ends the run.
pub fn silence_meant_panics() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if info.payload_as_str() != Some(MEANT) {
            usual(info);
            broken("a panic nobody meant");
        }
    }));
}
