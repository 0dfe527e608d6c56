//! `iohost faults`: what a driver and its supervision make of faults.

use std::io::IsTerminal;
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use iohost_control::host::Failure;
use iohost_faults::{Campaign, CampaignError};
use iohost_supervisor::DEFAULT_DRIVER_DIRECTORY;

use crate::CommandError;
use crate::options::FaultsOptions;
use crate::output::Output;

pub(crate) fn run(output: Output, options: &FaultsOptions) -> Result<(), CommandError> {
    let iohost = std::env::current_exe().map_err(|err| failed(format!("this program: {err}")))?;
    let beside = iohost.parent().map(PathBuf::from).unwrap_or_default();
    let has_driver =
        |directory: &PathBuf| directory.join(format!("lib{}.so", options.against)).exists();
    let driver_directory = match &options.driver_dir {
        Some(directory) => directory.clone(),
        None if has_driver(&beside) => beside,
        None => PathBuf::from(DEFAULT_DRIVER_DIRECTORY),
    };
    if !has_driver(&driver_directory) {
        return Err(CommandError::usage(Failure::new(
            "no-driver",
            format!("no plugin lib{}.so in {}", options.against, driver_directory.display()),
            "name the folder with --driver-dir",
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
    let score = campaign.run(|done| bar.set_position(done)).map_err(refused)?;
    bar.finish_and_clear();
    output.result(&score, &score);
    match score.is_clean() {
        true => Ok(()),
        false => Err(Failure::new(
            "faults-found",
            "not everything held",
            format!("make the same faults again: --seed {}", campaign.seed),
        )
        .into()),
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
    let mut message = err.to_string();
    let mut source = std::error::Error::source(&err);
    while let Some(cause) = source {
        message += &format!(": {cause}");
        source = cause.source();
    }
    failed(message)
}

fn failed(message: String) -> CommandError {
    let next = "correct what it names; nothing but a temporary folder was touched";
    Failure::new("faults-campaign", message, next).into()
}
