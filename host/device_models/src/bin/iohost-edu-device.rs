//! `iohost-edu-device`: QEMU's `edu` device for vfio-user clients, without QEMU.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use iohost_device_models::edu::{Edu, Timing};
use iohost_device_models::{DeviceServer, Function};
use log::info;
use nix::sys::signal::{SigSet, Signal};

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
    // The protocol crate reports each handshake at `info`; ours is one line per client.
    let logged = env_logger::Env::default().default_filter_or("info,vfio_user=warn");
    env_logger::Builder::from_env(logged).init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("iohost-edu-device: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    // Before the first thread, so that all of them inherit it and only `wait` sees the signals.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().context("blocking signals")?;

    let server = DeviceServer::bind(&arguments.socket)?;
    let stopper = server.stopper();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let signal = signals.wait();
            info!(signal = signal.map_or("none", Signal::as_str); "stopping");
            stopper.stop();
            // A client may still be connected; it sees its device leave, as it should.
            std::process::exit(0);
        })
        .context("starting a thread")?;

    let dma = Duration::from_millis(arguments.dma_latency_ms);
    let function = Function::new(Edu::new(Timing::Real { dma }));
    let socket = arguments.socket.display().to_string();
    info!(socket = socket.as_str(), dma_latency_ms = arguments.dma_latency_ms; "listening");
    Ok(server.run(&function)?)
}
