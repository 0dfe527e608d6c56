//! The connection to the daemon.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use iohost_control::host::{PowerState, Statistics};
use iohost_control::socket::{GuardedSocket, Limits};
use iohost_control::varlink::{
    BindOptions, Bound, Daemon as _, Description, Device, Error, Powered, Properties, Reloaded,
    Status, Unbound, Upgraded,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use smol::{Async, Timer, block_on, future};
use zlink::Connection;

use crate::watch::{AsyncServiceWatch, ServiceWatch};
use crate::{ClientError, ServiceMatch, Session};

/// The control socket of a daemon that was started without flags.
pub const DEFAULT_SOCKET: &str = "/run/iohost/io.iohost";

/// How long the daemon is given for an answer. It gives a driver host 10 s to start and 5 s to
/// stop, so this says that the daemon itself is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to the daemon. Every method blocks until it is answered, 60 s at the most.
///
/// A daemon that was started anew is connected to again by the next method that is called. One that
/// ends while it is asked something is `Broken`: whether that was done, `status` shows. Sessions do not
/// notice either.
#[derive(Debug)]
pub struct Daemon(AsyncDaemon);

/// A connection to the daemon, for any executor: what it waits for, a thread of `async-io` watches.
/// A method whose future is dropped before it is ready leaves the connection unusable, since its
/// answer would be taken for the next one's; connect again.
#[derive(Debug)]
pub struct AsyncDaemon {
    socket: PathBuf,
    line: Line,
}

/// A connection, and the same socket once more: to see whether the daemon has left.
#[derive(Debug)]
struct Line {
    connection: Connection<GuardedSocket>,
    end: UnixStream,
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

    /// Puts another version of its driver into a service that runs, from a plugin file that the daemon
    /// can read, and waits until it runs. Sessions go on, after a pause.
    ///
    /// Errors: `Refused`, and the version before it runs on, or again: `upgrade-failed` with why the new
    /// one did not start, `upgrade-mismatch` for another driver's plugin, `driver-busy` when calls were
    /// under way for too long, and those of a plugin file that is not usable.
    pub fn upgrade(
        &mut self,
        service: &str,
        plugin: impl AsRef<Path>,
    ) -> Result<Upgraded, ClientError> {
        block_on(self.0.upgrade(service, plugin))
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
        let line = Line::to(&socket).await?;
        Ok(Self { socket, line })
    }

    /// The connection, to the daemon that there is now.
    async fn line(&mut self) -> Result<&mut Connection<GuardedSocket>, ClientError> {
        if self.line.has_ended() {
            self.line = Line::to(&self.socket).await?;
        }
        Ok(&mut self.line.connection)
    }

    /// As [`Daemon::devices`].
    pub async fn devices(&mut self) -> Result<Vec<Device>, ClientError> {
        Ok(answer(self.line().await?.devices()).await?.devices)
    }

    /// As [`Daemon::status`].
    pub async fn status(&mut self) -> Result<Status, ClientError> {
        answer(self.line().await?.status()).await
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
        answer(self.line().await?.bind(device, group, force, persist)).await
    }

    /// As [`Daemon::unbind`].
    pub async fn unbind(&mut self, device: &str) -> Result<Unbound, ClientError> {
        answer(self.line().await?.unbind(device)).await
    }

    /// As [`Daemon::upgrade`].
    pub async fn upgrade(
        &mut self,
        service: &str,
        plugin: impl AsRef<Path>,
    ) -> Result<Upgraded, ClientError> {
        let plugin = std::path::absolute(plugin.as_ref())
            .map_err(|err| ClientError::Broken(format!("the plugin's path: {err}")))?;
        let plugin = plugin.to_string_lossy().into_owned();
        answer(self.line().await?.upgrade(service, &plugin)).await
    }

    /// As [`Daemon::reload`].
    pub async fn reload(&mut self) -> Result<Reloaded, ClientError> {
        answer(self.line().await?.reload()).await
    }

    /// As [`Daemon::statistics`].
    pub async fn statistics(&mut self, service: &str) -> Result<Statistics, ClientError> {
        answer(self.line().await?.statistics(service)).await
    }

    /// As [`Daemon::describe`].
    pub async fn describe(&mut self, service: &str) -> Result<Description, ClientError> {
        answer(self.line().await?.describe(service)).await
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
        answer(self.line().await?.properties(service)).await
    }

    /// As [`Daemon::set_power_state`].
    pub async fn set_power_state(
        &mut self,
        service: &str,
        state: PowerState,
    ) -> Result<Powered, ClientError> {
        answer(self.line().await?.power(service, state)).await
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
        AsyncServiceWatch::begin(other.line.connection, self.socket.clone()).await
    }

    async fn open_sized(
        &mut self,
        service: &str,
        queue_bytes: Option<Vec<u32>>,
        client_type: Option<u64>,
    ) -> Result<Session, ClientError> {
        let open = self.line().await?.open(service, queue_bytes, client_type);
        let (opened, fds) = in_time(open).await?;
        Session::new(opened.map_err(refused)?, fds)
    }
}

impl Line {
    async fn to(socket: &Path) -> Result<Self, ClientError> {
        let explained = |source| explain(socket.to_owned(), source);
        let stream = Async::<UnixStream>::connect(socket).await.map_err(explained)?;
        let stream = stream.into_inner().map_err(explained)?;
        let end = stream.try_clone().map_err(explained)?;
        let guarded = GuardedSocket::new(stream, Limits::CLIENT).map_err(broken)?;
        Ok(Self { connection: Connection::new(guarded), end })
    }

    fn has_ended(&self) -> bool {
        let mut polled = [PollFd::new(self.end.as_fd(), PollFlags::empty())];
        // A descriptor of ours, polled without a wait: there is nothing to fail.
        matches!(poll(&mut polled, PollTimeout::ZERO), Ok(1..))
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
