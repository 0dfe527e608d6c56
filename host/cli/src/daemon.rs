//! `iohost daemon`.

use std::path::PathBuf;

use iohost_control::host::Failure;
use iohost_control::log_lines;
use iohost_driver_host::plugin_file;
use iohost_pci::Sysfs;
use iohost_supervisor::{DaemonError, Patience, RestartPolicy};
use log::LevelFilter;

use crate::CommandError;
use crate::options::{DaemonOptions, Options};

pub(crate) fn run(options: &Options, daemon: &DaemonOptions) -> Result<(), CommandError> {
    log_lines::start(LevelFilter::Info, None);
    let driver_host = match &daemon.driver_host {
        Some(file) => file.clone(),
        None => beside_us()?,
    };
    let options = iohost_supervisor::Options {
        config: daemon.config.clone(),
        runtime_directory: options.runtime_dir.clone(),
        driver_directory: daemon.driver_dir.clone(),
        driver_host,
        inspect: plugin_file::inspect,
        sysfs: Sysfs::default(),
        restart: RestartPolicy::default(),
        patience: Patience::default(),
    };
    iohost_supervisor::run(&options).map_err(|err| match err {
        DaemonError::Config(_) => CommandError::usage(err.failure()),
        _ => err.failure().into(),
    })
}

fn beside_us() -> Result<PathBuf, Failure> {
    let unknown =
        |why: String| Failure::new("driver-host", why, "name the program with --driver-host");
    let here = std::env::current_exe()
        .map_err(|err| unknown(format!("the place of this program is unknown: {err}")))?;
    let file = here.with_file_name("iohost-driver-host");
    match file.exists() {
        true => Ok(file),
        false => Err(unknown(format!("there is no {}", file.display()))),
    }
}
