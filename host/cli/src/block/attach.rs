//! `iohost block attach` and `detach`: a disk as a block device of the kernel's.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use iohost_block::BlockError;
use iohost_block::ublk::{Attached, UblkDevice, UblkError};
use iohost_control::host::Failure;
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use super::{failed, number_of};
use crate::CommandError;
use crate::options::{DiskOptions, Options};
use crate::output::Output;

/// This thread serves; another one starts the device, and stops it when a signal says so. What is in
/// use is not stopped.
pub(super) fn attach(
    options: &Options,
    output: Output,
    which: &DiskOptions,
) -> Result<(), CommandError> {
    let number = number_of(options, which)?;
    let signals = signals().map_err(|err| {
        let next = "see what the message says";
        Failure::new("block-failed", format!("no handler for signals: {err}"), next)
    })?;
    let session = options.connect()?.open(&which.service)?;
    let attached = Attached::new(session, number).map_err(refused)?;
    let device = attached.device().clone();
    let text = format!("disk {number} of {} is {}", which.service, device.node().display());
    let value = json!({ "disk": number, "device": device.node() });
    let (told, started) = mpsc::channel();
    thread::spawn(move || {
        let outcome = device.start();
        let is_started = outcome.is_ok();
        let _ = told.send(outcome);
        if is_started {
            output.result(&value, text);
            stop_at_a_signal(output, &device, signals);
        } else {
            // So that there is nothing more to serve.
            let _ = device.stop();
        }
    });
    attached.serve().map_err(refused)?;
    match started.try_recv() {
        Ok(Err(err)) => Err(failure(&err).into()),
        // It was stopped, by a signal or by somebody else.
        _ => Ok(()),
    }
}

/// Readable when there was a signal that asks this program to end.
fn signals() -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM] {
        pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read)
}

fn stop_at_a_signal(output: Output, device: &UblkDevice, mut signals: UnixStream) {
    while signals.read_exact(&mut [0]).is_ok() {
        match device.stop_unless_in_use() {
            Err(err @ UblkError::InUse { .. }) => output.error(&failure(&err)),
            // Stopped, or not there any more.
            _ => return,
        }
    }
}

pub(super) fn detach(output: Output, number: u32, force: bool) -> Result<(), CommandError> {
    let refused = |err: UblkError| CommandError::from(failure(&err));
    let device = UblkDevice::find(number).map_err(refused)?;
    match force {
        true => device.stop(),
        false => device.stop_unless_in_use(),
    }
    .map_err(refused)?;
    match device.remove() {
        // The process that served it removes it too.
        Ok(()) | Err(UblkError::NoSuchDevice { .. }) => {}
        Err(err) => return Err(refused(err)),
    }
    let node = device.node();
    output.result(&json!({ "device": node }), format!("{} is gone", node.display()));
    Ok(())
}

fn refused(err: BlockError) -> CommandError {
    match err {
        BlockError::Ublk(err) => failure(&err).into(),
        err => failed(err),
    }
}

fn failure(err: &UblkError) -> Failure {
    let code = match err {
        UblkError::Missing { .. } | UblkError::TooOld => "no-ublk",
        UblkError::Permission { .. } => "ublk-denied",
        UblkError::InUse { .. } => "block-in-use",
        UblkError::NoSuchDevice { .. } => "no-such-block-device",
        _ => "block-failed",
    };
    Failure::new(code, err.to_string(), err.next_step())
}
