//! The data queue at work for long: between two processes, and against a peer that writes anything.
//!
//! ```sh
//! cargo run --release -p iohost_queue_stress -- stream --entries 100000000
//! cargo run --release -p iohost_queue_stress -- attack --steps 100000000
//! ```
//!
//! [`stream`] shows that nothing is lost, reordered or left asleep; [`attack`] that no peer can make
//! an end panic, hang, leave its memory, or come back from an error. Both end with status 1 and the
//! reason if something is wrong.

#![forbid(unsafe_code)]

mod attack;
mod peer;
mod program;
mod stream;
mod victim;

use std::path::PathBuf;
use std::process::{ExitCode, exit};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

/// Works the data queue hard and checks what it promises.
#[derive(Parser)]
#[command(name = "queue-stress")]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Two processes send each other entries, and do nothing but handle notifications
    Stream(StreamOptions),
    /// The other process of `stream`
    #[command(hide = true)]
    Peer(StreamOptions),
    /// Someone writes into the shared memory what they like, while both ends are used
    Attack(AttackOptions),
}

#[derive(Args, Clone)]
struct StreamOptions {
    /// Entries in each direction
    #[arg(long, default_value_t = 1_000_000)]
    entries: u64,
    /// Bytes of each of the two queues; a small one is full, or empty, more often
    #[arg(long, default_value_t = 4096)]
    queue_bytes: u32,
}

#[derive(Args)]
struct AttackOptions {
    /// Operations of the two ends and writes of the attacker, together
    #[arg(long, default_value_t = 5_000_000)]
    steps: u64,
    /// What all choices follow from [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    /// Runs one program of the corpus, or one that a failure left behind, and nothing else
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Replaces the corpus by as few programs as lead to all that came about in this run
    #[arg(long)]
    grow: bool,
}

/// So long without any progress is a hang.
const PATIENCE: Duration = Duration::from_secs(30);

/// Counts up as long as something is done.
static PROGRESS: AtomicU64 = AtomicU64::new(0);

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match &options.what {
        What::Stream(options) => stream::run(options),
        What::Peer(options) => stream::run_peer(options),
        What::Attack(options) => attack::run(options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("queue-stress: FAILED: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// Ends the process when nothing is done any more; `state` says where it stands.
fn watch_for_hangs(state: impl Fn() -> String + Send + 'static) {
    thread::spawn(move || {
        let mut seen = PROGRESS.load(Relaxed);
        loop {
            thread::sleep(PATIENCE);
            let now = PROGRESS.load(Relaxed);
            if now == seen {
                eprintln!("queue-stress: FAILED: nothing done for {PATIENCE:?}: {}", state());
                exit(1);
            }
            seen = now;
        }
    });
}
