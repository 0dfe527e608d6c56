//! What the programs that offer a device have in common.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use log::info;
use nix::sys::signal::{SigSet, Signal};

use crate::{DeviceModel, DeviceServer, Function};

/// Offers what `make` makes at a socket until SIGTERM or SIGINT; an error is said on standard
/// error. To be called first: all threads have to inherit the signals that are blocked here.
///
/// RUST_LOG sets what is logged.
pub fn run<M: DeviceModel>(
    name: &str,
    socket: &Path,
    make: impl FnOnce() -> anyhow::Result<M>,
) -> ExitCode {
    // The protocol crate reports each handshake at `info`; ours is one line per client.
    let logged = env_logger::Env::default().default_filter_or("info,vfio_user=warn");
    env_logger::Builder::from_env(logged).init();
    match offer(socket, make) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("{name}: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn offer<M: DeviceModel>(
    socket: &Path,
    make: impl FnOnce() -> anyhow::Result<M>,
) -> anyhow::Result<()> {
    // Before the first thread, so that all of them inherit it and only `wait` sees the signals.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().context("blocking signals")?;

    let function = Function::new(make()?);
    let server = DeviceServer::bind(socket)?;
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
    info!(socket = socket.display().to_string().as_str(); "listening");
    Ok(server.run(&function)?)
}
