//! The interface `io.iohost`: what a client can ask of the daemon.
//!
//! The daemon listens on `io.iohost` in its runtime directory (`/run/iohost` unless a flag says
//! otherwise). Any Varlink client can use it; `varlinkctl introspect /run/iohost/io.iohost` shows
//! the types below. [`Daemon`] is the Rust client of it; the service is in `iohost_supervisor`.
//!
//! A *service* is a device that the daemon runs a driver for. It has a name: the one that the
//! configuration gives it, or the device's address. Where a method takes a service, the name of
//! its driver does as well if only one service runs that driver.
//!
//! Every refusal is the one error `io.iohost.Refused`: a stable code for programs, a sentence,
//! and what to do next.
//!
//! ## Descriptors
//!
//! The reply to `Open` carries descriptors beside it: the session's socket (`SOCK_SEQPACKET`),
//! then for each queue, in the order of the reply, its memory (a sealed memfd), its data-available
//! bell and its data-serviced bell. The bell that the client rings, data-available of a queue to the
//! driver and data-serviced of one to the client, is an eventfd. The one that it hears is an epoll set,
//! which reports each ring once: nothing that a client does to it can hold the driver up.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use zlink::connection::Socket;
use zlink::{Call, Connection, introspect};

use crate::host::{Failure, PowerState, Quiesced, Statistics};

/// The interface's name, and the name of the socket in the runtime directory.
pub const INTERFACE: &str = "io.iohost";

/// Bytes of a queue's memory file before its ring.
pub const QUEUE_HEADER: usize = 128;

/// The reply to `Devices`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::Type)]
pub struct DeviceList {
    /// The PCI functions of the machine by address, then the devices behind sockets.
    pub devices: Vec<Device>,
}

/// A device that the daemon can see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::CustomType)]
pub struct Device {
    /// `dddd:bb:dd.f` of a PCI function, or the path of a device's socket.
    pub location: String,
    /// The backend: `vfio` (the best way that VFIO has), `vfio-user`, or what the configuration
    /// forces.
    pub kind: String,
    /// Whether that backend is UNSAFE: nothing but the driver keeps the device from the machine's
    /// memory.
    pub is_unsafe: bool,
    /// The vendor's number; absent for a device behind a socket.
    pub vendor: Option<u16>,
    /// The device's number; absent for a device behind a socket.
    pub device: Option<u16>,
    /// The class code, 24 bits; absent for a device behind a socket.
    pub class: Option<u32>,
    /// The kernel driver that has the function now.
    pub kernel_driver: Option<String>,
    /// The function's IOMMU group; absent where no IOMMU covers it.
    pub iommu_group: Option<u32>,
    /// The service that the daemon runs on it.
    pub service: Option<String>,
    /// The plugin that is for it.
    pub plugin: Option<String>,
}

/// The reply to `Status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::Type)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// The daemon's process.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// Its services, in the order of the configuration.
    pub services: Vec<Service>,
}

/// A device that the daemon runs a driver for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::CustomType)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// `dddd:bb:dd.f` of a PCI function, or the path of a device's socket.
    pub location: String,
    /// The driver that runs, or would.
    pub driver: Option<String>,
    /// Why it is that one: who else would have, and who did not start.
    pub choice: Option<String>,
    /// What it is doing.
    pub state: State,
    /// Why it is in that state, where that needs saying.
    pub reason: Option<Reason>,
    /// The driver host's process.
    pub pid: Option<u32>,
    /// How many driver hosts the device has had.
    pub incarnation: u64,
    /// Whether an earlier daemon started the driver host that runs, and this one took it over.
    pub taken_over: bool,
    /// How the device is reached (`vfio-cdev`, `vfio-user`, ...); once it is running.
    pub backend: Option<String>,
    /// Whether it is configured to be reached in an UNSAFE way: nothing but the driver keeps the
    /// device from the machine's memory.
    pub is_unsafe: bool,
    /// What the reset before the last start did.
    pub reset: Option<String>,
    /// What became of the device when it was made safe the last time: before its driver's start, or
    /// after its end.
    pub quiesced: Option<Quiesced>,
    /// What its driver host has given up, in words; `off`; absent before it ran.
    pub sandbox: Option<String>,
    /// The system calls that this refused its driver host.
    pub refused_calls: Vec<String>,
    /// Sessions open now.
    pub sessions: u64,
    /// Whether clients and other drivers can see it.
    pub is_registered: bool,
    /// Whether its driver says that it is busy.
    pub is_busy: bool,
    /// The power state that its driver has acknowledged; while it runs.
    pub power: Option<PowerState>,
}

/// What a service is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::CustomType)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It cannot run, and nothing but a request tries again.
    Down,
    /// A driver host is opening the device and starting the driver.
    Starting,
    /// Sessions can be opened.
    Running,
    /// The driver host died; the next one starts after a pause.
    Restarting,
    /// The driver is being stopped.
    Stopping,
    /// It died too often; nothing but a request starts it again.
    Quarantined,
}

/// Why something is as it is, for a person and for a program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::CustomType)]
pub struct Reason {
    /// A stable word for programs.
    pub code: String,
    /// One sentence.
    pub message: String,
    /// What to do about it.
    pub next: String,
}

/// How a device is to be taken. [`Default`] is no to each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BindOptions {
    /// With every function of its IOMMU group that VFIO can take, all of them or none.
    pub group: bool,
    /// Also when the machine uses it: a disk that is mounted, a network interface that is up.
    pub force: bool,
    /// The next daemon takes it again, also after the machine was started anew, until it is
    /// unbound.
    pub persist: bool,
}

/// The reply to `Bind`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::Type)]
pub struct Bound {
    /// The service that runs on the device now.
    pub service: String,
    /// Its driver.
    pub driver: String,
}

/// The reply to `Unbind`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::Type)]
pub struct Unbound {
    /// The kernel driver that has the device again; absent for none.
    pub kernel_driver: Option<String>,
}

/// The reply to `Reload`: what the new configuration changes, by the names of services. It has
/// begun when this comes; `Status` tells how it goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, introspect::Type)]
pub struct Reloaded {
    /// Services that were not there.
    pub started: Vec<String>,
    /// Services whose device the configuration does not have any more.
    pub stopped: Vec<String>,
    /// Services of which it says something else.
    pub restarted: Vec<String>,
    /// Services that were left as they are.
    pub kept: Vec<String>,
}

/// The reply to `Properties`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::Type)]
pub struct Properties {
    /// JSON: an array of what is in the driver's registry (its device, itself, services it made),
    /// each with `id`, `provider`, `name`, `registered`, `busy` and `properties`.
    pub entries: String,
}

/// The reply to `Power`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::Type)]
pub struct Powered {
    /// The state that the driver has acknowledged.
    pub state: PowerState,
}

/// The reply to `Upgrade`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::Type)]
pub struct Upgraded {
    /// The service.
    pub service: String,
    /// Its driver.
    pub driver: String,
    /// Where the plugin is installed.
    pub plugin: String,
    /// How many driver hosts the device has had, the new one included.
    pub incarnation: u64,
}

/// The reply to `Describe`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::Type)]
pub struct Description {
    /// The service's full name.
    pub service: String,
    /// Its driver.
    pub driver: String,
    /// The methods and queues it serves, in the words of `iohost_interface`; empty for none.
    pub interface: String,
}

/// The reply to `Open`; its descriptors are beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::Type)]
pub struct Opened {
    /// The session's number.
    pub session: u64,
    /// The service's full name.
    pub service: String,
    /// As in `Description`.
    pub interface: String,
    /// The session's queues, in the order of the interface.
    pub queues: Vec<Queue>,
}

/// A data queue of a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::CustomType)]
pub struct Queue {
    /// Its name in the interface.
    pub name: String,
    /// Bytes of its ring; its memory is longer by a header of 128 bytes.
    pub bytes: u32,
}

/// A reply to `Watch`: a service began to run, or ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::Type)]
pub struct ServiceEvent {
    /// Which of the two.
    pub kind: EventKind,
    /// The service's name.
    pub service: String,
    /// Its driver.
    pub driver: String,
    /// The name of the interface it serves; empty for none.
    pub interface: String,
    /// How many driver hosts the device has had, this one included.
    pub incarnation: u64,
    /// Why it ended.
    pub reason: Option<Reason>,
}

/// What happened to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::CustomType)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// It runs: sessions can be opened.
    Began,
    /// It runs no more: its sessions are over. One that restarts will have `began` again.
    Ended,
}

/// The error of every method.
#[derive(Clone, Debug, PartialEq, zlink::ReplyError, introspect::ReplyError)]
#[zlink(interface = "io.iohost")]
pub enum Error {
    /// What was asked for cannot be.
    Refused {
        /// A stable word for programs, such as `no-such-service`.
        code: String,
        /// One sentence with the values that matter.
        message: String,
        /// What to do about it.
        next: String,
    },
}

impl From<Failure> for Error {
    fn from(Failure { code, message, next }: Failure) -> Self {
        Error::Refused { code, message, next }
    }
}

impl From<Error> for Failure {
    fn from(Error::Refused { code, message, next }: Error) -> Self {
        Failure { code, message, next }
    }
}

impl From<Failure> for Reason {
    fn from(Failure { code, message, next }: Failure) -> Self {
        Reason { code, message, next }
    }
}

/// The daemon, as a client sees it. Implemented by `zlink::Connection`.
#[zlink::proxy("io.iohost")]
pub trait Daemon {
    /// The devices the daemon can see.
    async fn devices(&mut self) -> zlink::Result<Result<DeviceList, Error>>;

    /// The daemon and its services.
    async fn status(&mut self) -> zlink::Result<Result<Status, Error>>;

    /// Takes a device and starts its driver. `address` is that of a PCI function, or the name of
    /// a service that is down or quarantined. Answered once the driver runs. The rest is what
    /// [`BindOptions`] has, absent for no.
    async fn bind(
        &mut self,
        address: &str,
        group: Option<bool>,
        force: Option<bool>,
        persist: Option<bool>,
    ) -> zlink::Result<Result<Bound, Error>>;

    /// Stops a device's driver, resets the device, and gives it back to the kernel driver it came
    /// from. Answered once that is done.
    async fn unbind(&mut self, address: &str) -> zlink::Result<Result<Unbound, Error>>;

    /// Reads the configuration and the plugins again, and does what has changed. With a mistake in
    /// them nothing changes.
    async fn reload(&mut self) -> zlink::Result<Result<Reloaded, Error>>;

    /// Puts another version of its driver into a service that runs: the plugin in a file that the
    /// daemon can read. Sessions go on. Answered once the new version runs, and is installed in the
    /// place of the one before it; or refused, with that one running as before. For the daemon's own
    /// user and for root alone.
    async fn upgrade(
        &mut self,
        service: &str,
        plugin: &str,
    ) -> zlink::Result<Result<Upgraded, Error>>;

    /// What a service's driver host counts: its sessions and its dispatch queues.
    async fn statistics(&mut self, service: &str) -> zlink::Result<Result<Statistics, Error>>;

    /// What a service's driver says of itself.
    async fn properties(&mut self, service: &str) -> zlink::Result<Result<Properties, Error>>;

    /// Has a service's driver go into a power state. Answered once it has acknowledged that, or
    /// refused with `power-late` after 20 s.
    async fn power(
        &mut self,
        service: &str,
        state: PowerState,
    ) -> zlink::Result<Result<Powered, Error>>;

    /// The interface that a service serves.
    async fn describe(&mut self, service: &str) -> zlink::Result<Result<Description, Error>>;

    /// Opens a session. `queue_bytes` are the bytes of each queue's ring, in the order of the
    /// interface; absent for the daemon's default. `client_type` is the kind of client, absent for the
    /// first. The session ends when its socket closes.
    #[zlink(return_fds)]
    async fn open(
        &mut self,
        service: &str,
        queue_bytes: Option<Vec<u32>>,
        client_type: Option<u64>,
    ) -> zlink::Result<(Result<Opened, Error>, Vec<OwnedFd>)>;
}

/// Asks for the replies of `Watch` on a connection, which is good for nothing else from then on:
/// one for each service that runs already, then one for each change. Take them with
/// [`next_event`].
pub async fn begin_watch<S: Socket>(connection: &mut Connection<S>) -> zlink::Result<()> {
    #[derive(Debug, Serialize)]
    #[serde(tag = "method")]
    enum Method {
        #[serde(rename = "io.iohost.Watch")]
        Watch,
    }
    connection.send_call(&Call::new(Method::Watch).set_more(true), Vec::new()).await
}

/// The next reply of `Watch`. Dropped before it is ready, it has taken nothing.
pub async fn next_event<S: Socket>(
    connection: &mut Connection<S>,
) -> zlink::Result<Result<ServiceEvent, Error>> {
    let (reply, _) = connection.receive_reply::<ServiceEvent, Error>().await?;
    match reply {
        Ok(reply) => reply.into_parameters().map(Ok).ok_or(zlink::Error::UnexpectedEof),
        Err(error) => Ok(Err(error)),
    }
}
