//! The connection to the daemon.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use iohost_control::host::Statistics;
use iohost_control::socket::{GuardedSocket, Limits};
use iohost_control::varlink::{Bound, Daemon as _, Description, Device, Error, Status, Unbound};
use smol::{Timer, block_on, future};
use zlink::Connection;

use crate::{ClientError, Session};

/// The control socket of a daemon that was started without flags.
pub const DEFAULT_SOCKET: &str = "/run/iohost/io.iohost";

/// How long the daemon is given for an answer. It gives a driver host 10 s to start and 5 s to
/// stop, so this says that the daemon itself is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to the daemon. Every method blocks until it is answered, 60 s at the most.
#[derive(Debug)]
pub struct Daemon {
    connection: Connection<GuardedSocket>,
}

impl Daemon {
    /// Connects to the control socket.
    ///
    /// Errors: `NotRunning`, `NoPermission`, `Connect`.
    pub fn connect(socket: impl AsRef<Path>) -> Result<Self, ClientError> {
        let socket = socket.as_ref();
        match block_on(GuardedSocket::connect(socket, Limits::CLIENT)) {
            Ok(guarded) => Ok(Self { connection: Connection::new(guarded) }),
            Err(zlink::Error::Io(source)) => Err(explain(socket.to_owned(), source)),
            Err(err) => Err(ClientError::Broken(err.to_string())),
        }
    }

    /// The devices the daemon can see.
    pub fn devices(&mut self) -> Result<Vec<Device>, ClientError> {
        Ok(answer(self.connection.devices())?.devices)
    }

    /// The daemon and its services.
    pub fn status(&mut self) -> Result<Status, ClientError> {
        answer(self.connection.status())
    }

    /// Takes a device, by its address or its service's name, and waits until its driver runs.
    pub fn bind(&mut self, device: &str) -> Result<Bound, ClientError> {
        answer(self.connection.bind(device))
    }

    /// Stops a device's driver and gives the device back.
    pub fn unbind(&mut self, device: &str) -> Result<Unbound, ClientError> {
        answer(self.connection.unbind(device))
    }

    /// What a service's driver host counts: its sessions and its dispatch queues.
    pub fn statistics(&mut self, service: &str) -> Result<Statistics, ClientError> {
        answer(self.connection.statistics(service))
    }

    /// The interface that a service serves.
    pub fn describe(&mut self, service: &str) -> Result<Description, ClientError> {
        answer(self.connection.describe(service))
    }

    /// Opens a session with queues of the daemon's default size. `service` is the service's name,
    /// its device's address, or its driver's name if only one service runs that driver.
    pub fn open(&mut self, service: &str) -> Result<Session, ClientError> {
        self.open_sized(service, None)
    }

    /// As [`open`](Self::open), with the bytes of each queue's ring in the order of the interface.
    pub fn open_with_queues(
        &mut self,
        service: &str,
        queue_bytes: &[u32],
    ) -> Result<Session, ClientError> {
        self.open_sized(service, Some(queue_bytes.to_vec()))
    }

    fn open_sized(
        &mut self,
        service: &str,
        queue_bytes: Option<Vec<u32>>,
    ) -> Result<Session, ClientError> {
        let call = self.connection.open(service, queue_bytes);
        let (opened, fds) = block_on(in_time(call))?;
        Session::new(opened.map_err(refused)?, fds)
    }
}

fn answer<T>(
    call: impl Future<Output = zlink::Result<Result<T, Error>>>,
) -> Result<T, ClientError> {
    block_on(in_time(call))?.map_err(refused)
}

async fn in_time<T>(call: impl Future<Output = zlink::Result<T>>) -> Result<T, ClientError> {
    let answered = async { call.await.map_err(|err| ClientError::Broken(err.to_string())) };
    future::or(answered, async {
        Timer::after(PATIENCE).await;
        Err(ClientError::Silent { waited: PATIENCE })
    })
    .await
}

fn refused(err: Error) -> ClientError {
    ClientError::Refused(err.into())
}

fn explain(socket: PathBuf, source: io::Error) -> ClientError {
    match source.kind() {
        // A socket that a dead daemon left refuses; one that was removed is not found.
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ClientError::NotRunning { socket, source }
        }
        io::ErrorKind::PermissionDenied => ClientError::NoPermission { socket, source },
        _ => ClientError::Connect { socket, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_does_not_run_is_told_from_one_that_may_not_be_used() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("io.iohost");

        let missing = Daemon::connect(&socket).unwrap_err();
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let left_over = Daemon::connect(&socket).unwrap_err();

        assert!(matches!(missing, ClientError::NotRunning { .. }), "{missing}");
        assert!(matches!(left_over, ClientError::NotRunning { .. }), "{left_over}");
        assert!(missing.failure().next.starts_with("start the daemon: iohost daemon"));
        let denied = explain(socket, io::ErrorKind::PermissionDenied.into());
        assert!(matches!(denied, ClientError::NoPermission { .. }));
    }
}
