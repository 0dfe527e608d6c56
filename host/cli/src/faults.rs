//! `iohost faults`: what a driver and its supervision make of faults.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use indicatif::{ProgressBar, ProgressStyle};
use iohost_control::host::Failure;
use iohost_faults::{Campaign, CampaignError, PROBE};
use iohost_interface::with_sources;
use iohost_supervisor::DEFAULT_DRIVER_DIRECTORY;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::CommandError;
use crate::options::FaultsOptions;
use crate::output::Output;

pub(crate) fn run(output: Output, options: &FaultsOptions) -> Result<(), CommandError> {
    let iohost = std::env::current_exe().map_err(|err| failed(format!("this program: {err}")))?;
    let beside = iohost.parent().map(PathBuf::from).unwrap_or_default();
    let missing = |directory: &PathBuf| {
        let names = [options.against.as_str(), PROBE];
        let files = names.map(|name| format!("lib{name}.so"));
        files.into_iter().find(|file| !directory.join(file).exists())
    };
    let driver_directory = match &options.driver_dir {
        Some(directory) => directory.clone(),
        None if missing(&beside).is_none() => beside,
        None => PathBuf::from(DEFAULT_DRIVER_DIRECTORY),
    };
    if let Some(file) = missing(&driver_directory) {
        return Err(CommandError::usage(Failure::new(
            "no-driver",
            format!("no plugin {file} in {}", driver_directory.display()),
            "name the folder that has it with --driver-dir; libprobe.so, the driver that fails when it \
             is asked to, is built with the others",
        )));
    }
    let campaign = Campaign {
        seed: options.seed.unwrap_or_else(|| fastrand::u64(..)),
        count: options.count,
        devices: options.devices as usize,
        iohost,
        driver_directory,
        driver: options.against.clone(),
    };
    let bar = progress_bar(output, options.count);
    let is_stopped = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register(signal, is_stopped.clone())
            .map_err(|err| failed(format!("no handler for signal {signal}: {err}")))?;
    }
    let progress = |done| {
        bar.set_position(done);
        if is_stopped.load(Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let score = campaign.run(progress).map_err(refused)?;
    bar.finish_and_clear();
    output.result(&score, &score);
    let again = format!("make the same faults again: --seed {}", campaign.seed);
    if !score.is_clean() {
        Err(Failure::new("faults-found", "not everything held", again).into())
    } else if is_stopped.load(Relaxed) {
        let message =
            format!("ended by a signal after {} faults; so far everything held", score.faults);
        Err(Failure::new("faults-stopped", message, again).into())
    } else {
        Ok(())
    }
}

fn progress_bar(output: Output, count: u64) -> ProgressBar {
    if output.is_json() || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "faults            {bar:40} {pos}/{len} {per_sec}";
    ProgressBar::new(count)
        .with_style(ProgressStyle::with_template(style).expect("the template is a constant"))
}

fn refused(err: CampaignError) -> CommandError {
    failed(with_sources(&err))
}

fn failed(message: String) -> CommandError {
    let next = "correct what it names; nothing but a temporary folder was touched";
    Failure::new("faults-campaign", message, next).into()
}
