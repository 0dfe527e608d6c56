//! `iohost-edu-device`: QEMU's `edu` device for vfio-user clients, without QEMU.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use iohost_device_models::edu::{Edu, Timing};
use iohost_device_models::program;

/// Emulates QEMU's edu device (PCI 1234:11e8) at a vfio-user socket.
///
/// Serves one client after another: when one leaves or dies, the device is reset and waits for
/// the next. Ends on SIGTERM or SIGINT and removes its socket. RUST_LOG sets what is logged.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where to make the socket; one that a dead server left behind is replaced.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// How long a DMA transfer takes, in milliseconds; QEMU takes 100.
    #[arg(long, value_name = "N", default_value_t = 100)]
    dma_latency_ms: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let dma = Duration::from_millis(arguments.dma_latency_ms);
    program::run("iohost-edu-device", &arguments.socket, || Ok(Edu::new(Timing::Real { dma })))
}
