//! The iohost command.
//!
//! `main` parses, runs one command, and turns its error into words and an exit code: 0 done,
//! 1 refused or failed, 2 wrong usage or configuration. Every command has a module, which says
//! what it did to an [`Output`], for people or as JSON.

#![forbid(unsafe_code)]

mod block;
mod call;
mod crashes;
mod daemon;
mod demo;
mod devices;
mod doctor;
mod faults;
mod options;
mod output;
mod services;

use std::process::ExitCode;

use clap::Parser;
use iohost_control::host::Failure;

use crate::doctor::Verdict;
use crate::options::{Command, FaultsCommand, Options};
use crate::output::Output;

/// Why a command did not do what it should.
struct CommandError {
    failure: Failure,
    exit_code: u8,
}

impl From<Failure> for CommandError {
    fn from(failure: Failure) -> Self {
        Self { failure, exit_code: 1 }
    }
}

impl From<iohost_client::ClientError> for CommandError {
    fn from(err: iohost_client::ClientError) -> Self {
        err.failure().into()
    }
}

impl CommandError {
    /// A mistake in what was typed or configured.
    fn usage(failure: Failure) -> Self {
        Self { failure, exit_code: 2 }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let output = Output::new(options.json);
    let result = match &options.command {
        Command::Daemon(daemon) => daemon::run(&options, daemon),
        Command::Devices => devices::run(&options, output),
        Command::Doctor(doctor) => match doctor::run(&options, output, doctor) {
            // It has said why.
            Ok(Verdict::Blocked) => return ExitCode::FAILURE,
            Ok(Verdict::Clear) => Ok(()),
            Err(err) => Err(err),
        },
        Command::Explain { code } => doctor::explain(output, code.as_deref()),
        Command::Bind(binding) => services::bind(&options, output, binding),
        Command::Unbind { device } => services::unbind(&options, output, device),
        Command::Reload => services::reload(&options, output),
        Command::Upgrade { service, plugin } => {
            services::upgrade(&options, output, service, plugin)
        }
        Command::Status { service: None } => services::status(&options, output),
        Command::Status { service: Some(service) } => {
            services::statistics(&options, output, service)
        }
        Command::Properties { service } => services::properties(&options, output, service),
        Command::Power { service, state } => services::power(&options, output, service, *state),
        Command::Crashes(crashes) => crashes::run(output, crashes),
        Command::Call(call) => call::run(&options, output, call),
        Command::Block(block) => block::run(&options, output, block),
        Command::Faults(FaultsCommand::Run(campaign)) => faults::run(output, campaign),
        Command::Demo(demo) => demo::run(&options, output, demo),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            output.error(&err.failure);
            ExitCode::from(err.exit_code)
        }
    }
}
