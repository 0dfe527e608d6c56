//! The connection to the daemon.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use iohost_control::host::{PowerState, Statistics};
use iohost_control::socket::{GuardedSocket, Limits};
use iohost_control::varlink::{
    BindOptions, Bound, Daemon as _, Description, Device, Error, Powered, Properties, Reloaded,
    Status, Unbound,
};
use smol::{Timer, block_on, future};
use zlink::Connection;

use crate::watch::{AsyncServiceWatch, ServiceWatch};
use crate::{ClientError, ServiceMatch, Session};

/// The control socket of a daemon that was started without flags.
pub const DEFAULT_SOCKET: &str = "/run/iohost/io.iohost";

/// How long the daemon is given for an answer. It gives a driver host 10 s to start and 5 s to
/// stop, so this says that the daemon itself is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to the daemon. Every method blocks until it is answered, 60 s at the most.
#[derive(Debug)]
pub struct Daemon(AsyncDaemon);

/// A connection to the daemon, for any executor: what it waits for, a thread of `async-io` watches.
/// A method whose future is dropped before it is ready leaves the connection unusable, since its
/// answer would be taken for the next one's; connect again.
#[derive(Debug)]
pub struct AsyncDaemon {
    socket: PathBuf,
    connection: Connection<GuardedSocket>,
}

impl Daemon {
    /// Connects to the control socket.
    ///
    /// Errors: `NotRunning`, `NoPermission`, `Connect`.
    pub fn connect(socket: impl AsRef<Path>) -> Result<Self, ClientError> {
        block_on(AsyncDaemon::connect(socket)).map(Self)
    }

    /// The devices the daemon can see.
    pub fn devices(&mut self) -> Result<Vec<Device>, ClientError> {
        block_on(self.0.devices())
    }

    /// The daemon and its services.
    pub fn status(&mut self) -> Result<Status, ClientError> {
        block_on(self.0.status())
    }

    /// Takes a device, by its address or its service's name, and waits until its driver runs.
    pub fn bind(&mut self, device: &str) -> Result<Bound, ClientError> {
        block_on(self.0.bind(device))
    }

    /// As [`bind`](Self::bind), with more to say: the whole IOMMU group, by force, or persistently.
    ///
    /// Errors: `Refused`, among others with `in-use` for what the machine uses, unless by force.
    pub fn bind_with(&mut self, device: &str, options: BindOptions) -> Result<Bound, ClientError> {
        block_on(self.0.bind_with(device, options))
    }

    /// Stops a device's driver and gives the device back.
    pub fn unbind(&mut self, device: &str) -> Result<Unbound, ClientError> {
        block_on(self.0.unbind(device))
    }

    /// Has the daemon read its configuration and its plugins again.
    ///
    /// Errors: `Refused` with the code `config` and the line of a mistake; then nothing changes.
    pub fn reload(&mut self) -> Result<Reloaded, ClientError> {
        block_on(self.0.reload())
    }

    /// What a service's driver host counts: its sessions and its dispatch queues.
    pub fn statistics(&mut self, service: &str) -> Result<Statistics, ClientError> {
        block_on(self.0.statistics(service))
    }

    /// The interface that a service serves.
    pub fn describe(&mut self, service: &str) -> Result<Description, ClientError> {
        block_on(self.0.describe(service))
    }

    /// The names of the services that run and agree with `wanted`, in the order of the
    /// configuration.
    pub fn find(&mut self, wanted: &ServiceMatch) -> Result<Vec<String>, ClientError> {
        block_on(self.0.find(wanted))
    }

    /// Opens a session with queues of the daemon's default size. `service` is the service's name,
    /// its device's address, or its driver's name if only one service runs that driver.
    ///
    /// Errors: `Refused`, with the daemon's code: `no-such-service`, `ambiguous`, `not-running`,
    /// `too-many-sessions`, `session-refused` by the driver, and others.
    pub fn open(&mut self, service: &str) -> Result<Session, ClientError> {
        block_on(self.0.open(service))
    }

    /// As [`open`](Self::open), with the bytes of each queue's ring in the order of the interface.
    ///
    /// Errors: as `open`, and `Refused` with `queue-count` when there is not one size for each
    /// queue, `queue-size` for one that is zero, no multiple of 4, or over the daemon's limit.
    pub fn open_with_queues(
        &mut self,
        service: &str,
        queue_bytes: &[u32],
    ) -> Result<Session, ClientError> {
        block_on(self.0.open_with_queues(service, queue_bytes))
    }

    /// As [`open`](Self::open), as another kind of client than the first, which has another
    /// interface.
    ///
    /// Errors: as `open`, and `Refused` with `client-type` when the driver has no such kind.
    pub fn open_as(&mut self, service: &str, client_type: u64) -> Result<Session, ClientError> {
        block_on(self.0.open_as(service, client_type))
    }

    /// What a service's driver says of itself.
    pub fn properties(&mut self, service: &str) -> Result<Properties, ClientError> {
        block_on(self.0.properties(service))
    }

    /// Has a service's driver go into a power state, and waits until it has.
    ///
    /// Errors: `Refused` with `power-late` when it has not acknowledged it within 20 s; it may later.
    pub fn set_power_state(
        &mut self,
        service: &str,
        state: PowerState,
    ) -> Result<Powered, ClientError> {
        block_on(self.0.set_power_state(service, state))
    }

    /// Opens a session with the one service that agrees with `wanted`.
    ///
    /// Errors: `NoMatch`, `Ambiguous`, and as [`open`](Self::open).
    pub fn open_matching(&mut self, wanted: &ServiceMatch) -> Result<Session, ClientError> {
        block_on(self.0.open_matching(wanted))
    }

    /// Hears of services that begin and end, on a connection of its own.
    ///
    /// Errors: as [`connect`](Self::connect).
    pub fn watch(&self) -> Result<ServiceWatch, ClientError> {
        block_on(self.0.watch()).map(ServiceWatch::from)
    }
}

impl AsyncDaemon {
    /// As [`Daemon::connect`].
    pub async fn connect(socket: impl AsRef<Path>) -> Result<Self, ClientError> {
        let socket = socket.as_ref().to_owned();
        match GuardedSocket::connect(&socket, Limits::CLIENT).await {
            Ok(guarded) => Ok(Self { socket, connection: Connection::new(guarded) }),
            Err(zlink::Error::Io(source)) => Err(explain(socket, source)),
            Err(err) => Err(ClientError::Broken(err.to_string())),
        }
    }

    /// As [`Daemon::devices`].
    pub async fn devices(&mut self) -> Result<Vec<Device>, ClientError> {
        Ok(answer(self.connection.devices()).await?.devices)
    }

    /// As [`Daemon::status`].
    pub async fn status(&mut self) -> Result<Status, ClientError> {
        answer(self.connection.status()).await
    }

    /// As [`Daemon::bind`].
    pub async fn bind(&mut self, device: &str) -> Result<Bound, ClientError> {
        self.bind_with(device, BindOptions::default()).await
    }

    /// As [`Daemon::bind_with`].
    pub async fn bind_with(
        &mut self,
        device: &str,
        options: BindOptions,
    ) -> Result<Bound, ClientError> {
        let BindOptions { group, force, persist } = options;
        let [group, force, persist] = [group, force, persist].map(|is_set| is_set.then_some(true));
        answer(self.connection.bind(device, group, force, persist)).await
    }

    /// As [`Daemon::unbind`].
    pub async fn unbind(&mut self, device: &str) -> Result<Unbound, ClientError> {
        answer(self.connection.unbind(device)).await
    }

    /// As [`Daemon::reload`].
    pub async fn reload(&mut self) -> Result<Reloaded, ClientError> {
        answer(self.connection.reload()).await
    }

    /// As [`Daemon::statistics`].
    pub async fn statistics(&mut self, service: &str) -> Result<Statistics, ClientError> {
        answer(self.connection.statistics(service)).await
    }

    /// As [`Daemon::describe`].
    pub async fn describe(&mut self, service: &str) -> Result<Description, ClientError> {
        answer(self.connection.describe(service)).await
    }

    /// As [`Daemon::find`].
    pub async fn find(&mut self, wanted: &ServiceMatch) -> Result<Vec<String>, ClientError> {
        let devices = if wanted.needs_devices() { self.devices().await? } else { Vec::new() };
        let mut found = Vec::new();
        for service in self.status().await?.services {
            if !wanted.agrees(&service, &devices) {
                continue;
            }
            if wanted.needs_interface() {
                match self.describe(&service.name).await {
                    Ok(described) if wanted.agrees_with_interface(&described.interface) => {}
                    // Also one that has ended since.
                    Ok(_) | Err(ClientError::Refused(_)) => continue,
                    Err(err) => return Err(err),
                }
            }
            found.push(service.name);
        }
        Ok(found)
    }

    /// As [`Daemon::open`].
    pub async fn open(&mut self, service: &str) -> Result<Session, ClientError> {
        self.open_sized(service, None, None).await
    }

    /// As [`Daemon::open_with_queues`].
    pub async fn open_with_queues(
        &mut self,
        service: &str,
        queue_bytes: &[u32],
    ) -> Result<Session, ClientError> {
        self.open_sized(service, Some(queue_bytes.to_vec()), None).await
    }

    /// As [`Daemon::open_as`].
    pub async fn open_as(
        &mut self,
        service: &str,
        client_type: u64,
    ) -> Result<Session, ClientError> {
        self.open_sized(service, None, Some(client_type)).await
    }

    /// As [`Daemon::properties`].
    pub async fn properties(&mut self, service: &str) -> Result<Properties, ClientError> {
        answer(self.connection.properties(service)).await
    }

    /// As [`Daemon::set_power_state`].
    pub async fn set_power_state(
        &mut self,
        service: &str,
        state: PowerState,
    ) -> Result<Powered, ClientError> {
        answer(self.connection.power(service, state)).await
    }

    /// As [`Daemon::open_matching`].
    pub async fn open_matching(&mut self, wanted: &ServiceMatch) -> Result<Session, ClientError> {
        let mut services = self.find(wanted).await?;
        let wanted = || wanted.to_string();
        match services.len() {
            0 => Err(ClientError::NoMatch { wanted: wanted() }),
            1 => self.open(&services.remove(0)).await,
            _ => Err(ClientError::Ambiguous { wanted: wanted(), services }),
        }
    }

    /// As [`Daemon::watch`].
    pub async fn watch(&self) -> Result<AsyncServiceWatch, ClientError> {
        let other = Self::connect(&self.socket).await?;
        AsyncServiceWatch::begin(other.connection).await
    }

    async fn open_sized(
        &mut self,
        service: &str,
        queue_bytes: Option<Vec<u32>>,
        client_type: Option<u64>,
    ) -> Result<Session, ClientError> {
        let open = self.connection.open(service, queue_bytes, client_type);
        let (opened, fds) = in_time(open).await?;
        Session::new(opened.map_err(refused)?, fds)
    }
}

async fn answer<T>(
    call: impl Future<Output = zlink::Result<Result<T, Error>>>,
) -> Result<T, ClientError> {
    in_time(call).await?.map_err(refused)
}

async fn in_time<T>(call: impl Future<Output = zlink::Result<T>>) -> Result<T, ClientError> {
    let answered = async { call.await.map_err(broken) };
    future::or(answered, async {
        Timer::after(PATIENCE).await;
        Err(ClientError::Silent { waited: PATIENCE })
    })
    .await
}

pub(crate) fn broken(err: zlink::Error) -> ClientError {
    ClientError::Broken(err.to_string())
}

pub(crate) fn refused(err: Error) -> ClientError {
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
