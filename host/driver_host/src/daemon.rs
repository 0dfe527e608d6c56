//! The daemon as a driver host sees it: the one that started it, or a later one.
//!
//! A daemon can end without its driver hosts: killed, or replaced by a new version. A driver host
//! whose daemon is gone goes on serving its device and its sessions, and waits on a socket that it was
//! given at its start until the next daemon connects. It is then asked for everything it was given, of
//! which it keeps duplicates; so nothing has to be kept anywhere else.
//!
//! Inside its sandbox it neither makes sockets nor connects any: it accepts, and dup3(2) makes the next
//! daemon the one that hears of refused system calls.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use iohost_control::host::{DeviceEvent, FromHost, LONGEST_MESSAGE, MOST_DESCRIPTORS, ToHost};
use iohost_event::{PacketError, PacketListener, Packets};
use log::{debug, info, warn};

/// Whichever daemon there is; what is said while there is none is not heard.
#[derive(Debug)]
pub(crate) struct Daemon {
    /// Replaced by the next daemon's. Held while something is sent, so that what a new daemon is told
    /// first is told first.
    connection: Mutex<Arc<Packets>>,
    /// What has happened to the device. Whoever acts on it ends this driver host, so that a later
    /// daemon has to hear it, too.
    device_events: Mutex<Vec<DeviceEvent>>,
}

/// A message from the daemon, with its descriptors.
pub(crate) type Said = (ToHost, Vec<OwnedFd>);

/// Why the locks here are never poisoned.
const NO_PANIC: &str = "nothing here panics";

impl Daemon {
    pub(crate) fn new(connection: Packets) -> Self {
        Self { connection: Mutex::new(Arc::new(connection)), device_events: Mutex::default() }
    }

    /// The connection to the daemon that there is now.
    pub(crate) fn connection(&self) -> Arc<Packets> {
        self.connection.lock().expect(NO_PANIC).clone()
    }

    pub(crate) fn send(&self, message: &FromHost) -> Result<()> {
        send(&self.connection.lock().expect(NO_PANIC), message, &[])
    }

    pub(crate) fn tell_of_device(&self, event: DeviceEvent) {
        let connection = self.connection.lock().expect(NO_PANIC);
        let mut events = self.device_events.lock().expect(NO_PANIC);
        if !events.contains(&event) {
            events.push(event);
        }
        // Else the next daemon hears it.
        let _ = send(&connection, &FromHost::DeviceEvent(event), &[]);
    }

    /// The next message; `None` once the daemon is gone.
    pub(crate) fn receive(&self) -> Result<Option<Said>> {
        receive(&self.connection())
    }

    /// Waits for the next daemon, and for what it says first.
    pub(crate) fn await_next(&self, listener: &PacketListener) -> Result<Said> {
        info!("the daemon is gone; the driver goes on, and waits for the next one");
        loop {
            let next = listener.accept().context("waiting for the next daemon")?;
            match receive(&next) {
                Ok(Some(said)) => {
                    // A driver goes on without that, too.
                    if let Err(err) = iohost_sandbox::report_to(next.as_fd()) {
                        warn!(err:%; "this daemon will not hear of refused system calls");
                    }
                    *self.connection.lock().expect(NO_PANIC) = Arc::new(next);
                    return Ok(said);
                }
                // It was killed, too.
                Ok(None) => {}
                Err(err) => warn!("no daemon: {err:#}"),
            }
        }
    }

    /// Tells a new daemon everything; `tell` sends what the driver host has. What happens meanwhile is
    /// told afterwards.
    pub(crate) fn hand_over(&self, tell: impl FnOnce(Teller<'_>) -> Result<()>) -> Result<()> {
        let connection = self.connection.lock().expect(NO_PANIC);
        tell(&|message, fds| send(&connection, message, fds))?;
        for event in &*self.device_events.lock().expect(NO_PANIC) {
            send(&connection, &FromHost::DeviceEvent(*event), &[])?;
        }
        Ok(())
    }
}

/// Sends one message with its descriptors.
pub(crate) type Teller<'a> = &'a dyn Fn(&FromHost, &[BorrowedFd<'_>]) -> Result<()>;

fn send(daemon: &Packets, message: &FromHost, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let text = serde_json::to_vec(message).context("a message has a text form")?;
    match daemon.send(&text, fds) {
        // Noticed, and acted on, by the next receive.
        Ok(()) | Err(PacketError::Closed) => Ok(()),
        Err(err) => Err(err).context("writing to the daemon"),
    }
}

fn receive(daemon: &Packets) -> Result<Option<Said>> {
    let mut buffer = vec![0; LONGEST_MESSAGE];
    let packet = match daemon.receive(&mut buffer, MOST_DESCRIPTORS) {
        Ok(packet) => packet,
        Err(PacketError::Closed) => return Ok(None),
        Err(err) => return Err(err).context("reading from the daemon"),
    };
    if packet.lost_fds {
        warn!("the driver has used up all descriptors: what the daemon sent is lost");
    }
    let message =
        serde_json::from_slice(&buffer[..packet.len]).context("understanding the daemon")?;
    debug!("the daemon says {message:?}");
    Ok(Some((message, packet.fds)))
}
