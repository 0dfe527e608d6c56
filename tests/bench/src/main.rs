//! Benchmarks, each figure beside a peer's.
//!
//! `scripts/bench [AREA]... [--json]`. An area is a module with a list of [`Case`]s. A case has
//! contenders, ours and one or more peers, that do the same work and measure it the same way; each
//! runs in a process of its own, which is this program with `--contender`. [`rounds`] has them take
//! turns.

#![forbid(unsafe_code)]

mod device;
mod dispatch;
mod driver;
mod events;
mod instructions;
mod latency;
mod machine;
mod nvme;
mod queue;
mod report;
mod restart;
mod rounds;
mod system_calls;
mod timers;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use rounds::{Case, Effort, Side};

/// What a usage error exits with, as `clap` has it.
const USAGE: u8 = 2;

/// Runs iohost's benchmarks, each beside a peer. A ratio over 1 is in our favour.
#[derive(Parser)]
#[command(name = "bench")]
struct Options {
    /// device, dispatch, events, nvme, queue, recorder, restart, timers; all of them when none is named
    areas: Vec<String>,
    /// One JSON object per figure and line, in place of the table
    #[arg(long)]
    json: bool,
    /// Rounds that each figure is the median of [default: 9]
    #[arg(long)]
    rounds: Option<usize>,
    /// Does next to no work, in one round: shows that it runs, and measures nothing
    #[arg(long)]
    quick: bool,
    /// This process is one contender: measures, prints its figures, ends
    #[arg(long, hide = true, value_names = ["CASE", "SIDE"], num_args = 2)]
    contender: Option<Vec<String>>,
    /// This process is a contender's other one: it is sent to, or its system calls are counted
    #[arg(long, hide = true, value_names = ["CASE", "SIDE"], num_args = 2)]
    other_end: Option<Vec<String>>,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let effort = if options.quick { Effort::Quick } else { Effort::Full };
    if let Some(of) = &options.contender {
        machine::die_after_five_minutes();
        let (case, side) = contender(of)?;
        let figures = case.contender(side)(effort)?;
        println!("{}", serde_json::to_string(&figures)?);
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(of) = &options.other_end {
        machine::die_after_five_minutes();
        let (case, side) = contender(of)?;
        match case.bench {
            "device" => device::other_end(case.name, side, effort)?,
            "events" => events::other_end(case.name, side)?,
            "nvme" => nvme::other_end(case.name, side, effort)?,
            "restart" => restart::other_end()?,
            _ => queue::other_end(case.name, side, effort)?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    for area in &options.areas {
        if let Some(complaint) = complaint_about(area) {
            eprintln!("bench: {complaint}");
            return Ok(ExitCode::from(USAGE));
        }
    }
    let rounds = options.rounds.unwrap_or(match effort {
        Effort::Full => 9,
        Effort::Quick => 1,
    });
    run(&options, rounds.max(1), effort)?;
    Ok(ExitCode::SUCCESS)
}

fn run(options: &Options, rounds: usize, effort: Effort) -> Result<()> {
    // Held open until the end.
    let _awake = machine::keep_awake();
    let mut report = report::Report::new(options.json);
    let chosen = |case: &&Case| {
        options.areas.is_empty() || options.areas.iter().any(|area| area == case.bench)
    };
    if cases().filter(chosen).any(|case| case.bench == "restart") {
        // What its contenders start has to be there before their minute begins.
        iohost_tests::built_files();
    }
    for case in cases().filter(chosen) {
        let figures = rounds::run(case, rounds, effort);
        report.add(&figures.with_context(|| format!("benchmark {}", case.name))?)?;
    }
    report.finish();
    Ok(())
}

fn cases() -> impl Iterator<Item = &'static Case> {
    let areas = [
        device::CASES,
        dispatch::CASES,
        events::CASES,
        nvme::CASES,
        queue::CASES,
        dispatch::RECORDER_CASES,
        restart::CASES,
        timers::CASES,
    ];
    areas.into_iter().flatten()
}

/// What is wrong with the name of an area, if anything.
fn complaint_about(area: &str) -> Option<String> {
    let mut areas: Vec<&str> = cases().map(|case| case.bench).collect();
    areas.dedup();
    let there_are = format!("there are: {}", areas.join(", "));
    if areas.contains(&area) { None } else { Some(format!("no such area `{area}`; {there_are}")) }
}

/// Reads the names with which [`rounds`], [`events`] and [`queue`] start this program.
fn contender(of: &[String]) -> Result<(&'static Case, Side)> {
    let [name, side] = of else { anyhow::bail!("a case and a side, not {of:?}") };
    let case = cases().find(|case| case.name == name);
    let case = case.with_context(|| format!("no case {name}"))?;
    Ok((case, case.side(side)?))
}
