//! `iohost-driver-host`: started by the daemon, with its end of their conversation as standard
//! input. Not for use by hand.

#![forbid(unsafe_code)]

use clap::Parser;

/// Runs one driver for one device. Started by `iohost daemon`, not by hand.
#[derive(Parser)]
#[command(name = "iohost-driver-host", version)]
struct Options {
    /// The device's name, for the process list and the log.
    #[arg(long)]
    device: String,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    iohost_control::log_lines::start(log::LevelFilter::Info, Some(&options.device));
    iohost_driver_host::process::run(iohost_driver_host::process::inherited()?)
}
