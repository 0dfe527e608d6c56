//! The daemon: configuration, matching, binding, supervision, the control interface.
//!
//! The thread that called [`run`] is the actor: it owns every service, driver host and session,
//! sleeps in one epoll wait, and waits for nothing else without a deadline. Another one serves the
//! control socket and asks the actor; and each device that is being taken or given back has one
//! while that lasts, because a kernel driver lets go when it likes. Between them are channels.
//!
//! Invariant: what the daemon does is decided on the actor's thread alone, one event at a time.
//!
//! Neighbours: `iohost_control` (the messages), `iohost_pci` (sysfs), the driver host (a process
//! that this one starts and never trusts: whatever it does, only its own device is affected).

#![forbid(unsafe_code)]

mod access;
mod actor;
mod bindings;
mod config;
mod control_server;
mod crashes;
mod driver_process;
mod hang;
mod hooks;
mod host_records;
mod memory_events;
mod needs;
mod plugins;
mod request;
mod restart;
mod runtime_directory;
mod service;
mod session;
mod upgrade;
mod watchers;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, thread};

use iohost_control::host::Failure;
use iohost_pci::Sysfs;
use log::info;
use smol::channel;

pub use access::Allowed;
pub use config::{
    Config, ConfigError, DEFAULT_CONFIG, DEFAULT_DRIVER_DIRECTORY, DEFAULT_RUNTIME_DIRECTORY,
    DEFAULT_STATE_DIRECTORY, DeviceConfig, ErrorPolicy, Limits, Location, SandboxMode,
};
pub use plugins::Inspect;
pub use restart::{Decision, RestartChoices, RestartPolicy};

use crate::actor::Actor;
use crate::config::MatchRule;
use crate::host_records::HostRecords;
use crate::plugins::Plugins;
use crate::runtime_directory::RuntimeDirectory;

/// How the daemon is to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file; `None` for the default place, where it may be missing.
    pub config: Option<PathBuf>,
    /// Instead of the configuration's.
    pub runtime_directory: Option<PathBuf>,
    /// Instead of the configuration's.
    pub driver_directory: Option<PathBuf>,
    /// The program to start for each device.
    pub driver_host: PathBuf,
    /// How a plugin file is read.
    pub inspect: Inspect,
    /// The PCI functions of the machine.
    pub sysfs: Sysfs,
    /// When driver hosts that died are started again.
    pub restart: RestartPolicy,
    /// How long driver hosts may take.
    pub patience: Patience,
}

/// How long a driver host may take for what it is asked.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From its start until the driver runs.
    pub start: Duration,
    /// Until the driver has stopped and the device is reset; then it is killed.
    pub stop: Duration,
    /// Until it has closed a device that somebody wants back; then it is killed.
    pub removal: Duration,
    /// Until the driver knows a session.
    pub session: Duration,
    /// For calls that are under way when the driver is upgraded; then it is not.
    pub drain: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            start: Duration::from_secs(10),
            stop: Duration::from_secs(5),
            removal: Duration::from_secs(1),
            session: Duration::from_secs(5),
            drain: Duration::from_secs(2),
        }
    }
}

/// Why the daemon did not run, or did not end well.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The configuration has a mistake; nothing was touched.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Anything else, for a person.
    #[error("{}", .0.message)]
    Failed(Failure),
}

impl DaemonError {
    /// The error as it is shown: code, sentence, next step.
    pub fn failure(&self) -> Failure {
        match self {
            DaemonError::Config(err) => Failure::new("config", err.to_string(), &err.next),
            DaemonError::Failed(failure) => failure.clone(),
        }
    }
}

impl From<Failure> for DaemonError {
    fn from(failure: Failure) -> Self {
        DaemonError::Failed(failure)
    }
}

/// Runs the daemon until SIGTERM or SIGINT, on the calling thread. Driver hosts of an earlier daemon
/// that was killed are taken over first.
///
/// Returns `Ok` when every driver stopped, its device was reset, and everything that was bound
/// was given back. A second signal meanwhile kills what has not stopped yet. SIGUSR2 ends the daemon
/// alone: drivers and their clients go on, and the next daemon takes them over.
pub fn run(options: &Options) -> Result<(), DaemonError> {
    let (config, file) = read_config(options)?;
    let plugins = check_plugins(options, &config, &file)?;
    check_hooks(&config, &file)?;
    let directory = RuntimeDirectory::hold(&config.runtime_directory)?;
    let records = HostRecords::open(&config.runtime_directory)?;
    let listener = directory.listen()?;

    let (asker, inbox) = request::pair().map_err(no_resources)?;
    let limits = config.limits;
    let mut actor = Actor::new(options, config, plugins, inbox, records).map_err(no_resources)?;
    let (stop, stopped) = channel::bounded::<()>(1);
    let control = thread::Builder::new()
        .name("control".into())
        .spawn(move || control_server::serve(listener, asker, limits, stopped))
        .map_err(no_resources)?;

    info!(socket:% = directory.socket().display(), pid = std::process::id(); "daemon started");
    let result = actor.run();
    drop(actor);
    drop(stop);
    // It ends because its channel closed, and it holds nothing that a crash of its could spoil.
    let _ = control.join();
    info!("daemon stopped");
    Ok(result?)
}

fn read_config(options: &Options) -> Result<(Config, PathBuf), ConfigError> {
    let (mut config, file) = match &options.config {
        Some(file) => (Config::read(file)?, file.clone()),
        None if Path::new(DEFAULT_CONFIG).exists() => {
            (Config::read(Path::new(DEFAULT_CONFIG))?, DEFAULT_CONFIG.into())
        }
        None => (Config::empty(), PathBuf::new()),
    };
    if let Some(directory) = &options.runtime_directory {
        config.runtime_directory.clone_from(directory);
    }
    if let Some(directory) = &options.driver_directory {
        config.driver_directory.clone_from(directory);
    }
    Ok((config, file))
}

/// A plugin that the configuration names has to be there, before anything is touched.
fn check_plugins(options: &Options, config: &Config, file: &Path) -> Result<Plugins, ConfigError> {
    let in_config = |failure: Failure, line| ConfigError {
        file: file.to_owned(),
        line,
        message: failure.message,
        next: failure.next,
    };
    let plugins = Plugins::scan(&config.driver_directory, options.inspect)
        .map_err(|failure| in_config(failure, None))?;
    for device in &config.devices {
        if let Some(name) = &device.driver {
            plugins.named(name).map_err(|failure| {
                let message = format!("device {:?}: {}", device.name, failure.message);
                in_config(Failure { message, ..failure }, Some(device.line))
            })?;
        }
    }
    for (name, line) in config.matches.iter().filter_map(MatchRule::driver) {
        plugins.named(name).map_err(|failure| in_config(failure, Some(line)))?;
    }
    Ok(plugins)
}

/// A hook that is not there would be missed only when it matters.
fn check_hooks(config: &Config, file: &Path) -> Result<(), ConfigError> {
    let choices = config.devices.iter().map(|device| &device.restart).chain([&config.restart]);
    for hook in choices.filter_map(|choices| choices.hook.as_ref()) {
        let is_program = |found: &fs::Metadata| found.is_file() && found.mode() & 0o111 != 0;
        let problem = match fs::metadata(hook) {
            Ok(found) if is_program(&found) => continue,
            Ok(_) => "it is no program".to_owned(),
            Err(err) => err.to_string(),
        };
        return Err(ConfigError {
            file: file.to_owned(),
            line: None,
            message: format!("key `hook`: {} cannot be run: {problem}", hook.display()),
            next: "name a program that is there, or leave the key out".to_owned(),
        });
    }
    Ok(())
}

fn no_resources(err: std::io::Error) -> Failure {
    Failure::new(
        "no-resources",
        format!("the daemon cannot be set up: {err}"),
        "raise its limits of open files and threads",
    )
}
