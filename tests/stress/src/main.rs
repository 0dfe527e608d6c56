//! Random work on the dispatch engine from several threads, and a check of every promise it makes.
//!
//! ```sh
//! cargo run --release -p iohost_stress -- --seconds 7200
//! ```
//!
//! The run is a sequence of rounds. A round makes an engine, queues and sources ([`world`]), has
//! threads and the engine's own handlers do random things to them ([`actor`]), and ends in one of
//! three ways: it waits until all is done, it cancels every queue, or it drops the engine in the
//! middle. Then everything is counted ([`round`]). What is checked stands in [`subject`] (a queue,
//! its blocks and its sleepers) and in [`sources`].
//!
//! The seed decides what is done, by whom and to what, but not when: that is the scheduler's. A
//! broken promise is told with the seed and the round, and `--round` begins with that round, so
//! that the same work meets other schedules until it fails again.

#![forbid(unsafe_code)]

mod actor;
mod round;
mod sources;
mod subject;
mod tally;
mod watchdog;
mod witness;
mod world;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

use tally::Tally;
use witness::Witness;

/// Does random things to the dispatch engine and checks what it promises.
#[derive(Parser)]
#[command(name = "stress")]
struct Options {
    /// How long to go on; the round that is under way then is finished
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What all choices follow from [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    /// The round to begin with
    #[arg(long, default_value_t = 0)]
    round: u64,
    /// Do that round again and again
    #[arg(long)]
    repeat: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("stress: seed {seed}, {} s", options.seconds);
    witness::silence_meant_panics();
    watchdog::start();

    let tally = Tally::default();
    let started = Instant::now();
    let mut number = options.round;
    let mut rounds = 0;
    loop {
        Witness::begin_round(seed, number);
        round::run(seed, number, &tally);
        rounds += 1;
        number += u64::from(!options.repeat);
        if started.elapsed() >= Duration::from_secs(options.seconds) {
            break;
        }
    }
    println!("{tally}");
    println!("stress: {rounds} rounds in {:.0?}, every promise kept", started.elapsed());
    // A run that did nothing proves nothing.
    match tally.never_happened() {
        missing if missing.is_empty() || options.repeat || options.seconds < 10 => {
            ExitCode::SUCCESS
        }
        missing => {
            eprintln!("stress: FAILED: in the whole run these never happened: {missing:?}");
            ExitCode::FAILURE
        }
    }
}
