//! The conversation between the daemon and one driver host.
//!
//! One `SOCK_SEQPACKET` pair, made by the daemon; the driver host's end is its standard input,
//! so that nothing but `std::process::Command` is needed to hand it over. Each packet is one
//! message in JSON, with descriptors beside it where a message says so. The daemon speaks first,
//! with `Start`. A driver host that sees its end close goes on, and waits on the socket that came
//! with `Start` for the next daemon, which connects and says `HandOver`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use zlink::introspect;

/// The longest message in bytes; a longer one is a protocol error.
pub const LONGEST_MESSAGE: usize = 64 * 1024;

/// The most descriptors beside one message.
pub const MOST_DESCRIPTORS: usize = 64;

/// From the daemon to a driver host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ToHost {
    /// Open the device, reset it, load the driver, start it. Answered by `Ready` or `Failed`.
    /// Descriptors: [`StartDescriptors`].
    Start(Start),
    /// A new daemon takes the driver host over. Answered by `HandedOver`, a `HandedSession` for each
    /// session, `Ready`, and what has happened to the device.
    HandOver,
    /// A client opened a session, or has one that survived the driver host before this one.
    /// Descriptors: the session's socket, its ledger, then for each queue its memory, its
    /// data-available eventfd and its data-serviced eventfd.
    /// Answered by `SessionOpened` or `SessionClosed`.
    OpenSession(OpenSession),
    /// Forget a session, if it is still there.
    CloseSession {
        /// The session's number.
        session: u64,
    },
    /// Report numbers. Answered by `Statistics`.
    Query,
    /// Report what the driver says of itself. Answered by `Properties`.
    QueryProperties,
    /// Have the driver go into a power state. Answered by `Power`, also unasked, when the driver
    /// asked for it.
    SetPower {
        /// Which.
        state: PowerState,
    },
    /// A service runs now; sent after `WatchServices`, first for those that run already.
    ServiceBegan(RunningService),
    /// A service that was told of runs no more.
    ServiceEnded {
        /// Its name.
        name: String,
    },
    /// Another version of the driver is to follow: take no more calls, have those answered that are
    /// under way, save what the driver has to say, stop as by `Stop`. Answered by `Saved`, if there is
    /// something, and then as `Stop`; or by `NotDrained`, and then all is as before.
    Drain {
        /// How long calls that are under way may take, in milliseconds.
        limit_ms: u64,
    },
    /// Stop the driver, reset the device, exit. Answered by `Stopped`.
    Stop,
    /// The device goes away or is gone: stop the driver, close the device as it is, exit. Answered
    /// by `Stopped`.
    LetGo,
}

/// What a driver host is to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// The device.
    pub device: DeviceLocation,
    /// Kinds of interrupt the driver may use, where the configuration restricts them
    /// (`intx`, `msi`, `msix`); empty means all that the device has.
    pub interrupts: Vec<InterruptChoice>,
    /// What to give up before the plugin is loaded; `None` for nothing.
    pub confinement: Option<Confinement>,
    /// The plugin file; `None` opens and resets the device, runs no driver, and stops.
    pub plugin: Option<String>,
    /// 1 for the first driver host of this device, one more for each that follows.
    pub incarnation: u64,
    /// The numbers of its registry's entries are higher than this, and those of the next driver
    /// host's are higher still.
    #[serde(default)]
    pub registry: u64,
    /// What the version of the driver before this one saved.
    pub state: Option<StateSize>,
}

/// What is beside a [`Start`]. This order is the only one there is.
#[derive(Debug)]
pub struct StartDescriptors<Descriptor> {
    /// A listening socket, on which the next daemon can be waited for.
    pub listener: Descriptor,
    /// The memory of a flight recorder (`iohost_memory`).
    pub memory: Descriptor,
    /// Its bell.
    pub bell: Descriptor,
    /// The file of the `state`, if there is one.
    pub state: Option<Descriptor>,
}

impl<Descriptor> StartDescriptors<Descriptor> {
    /// As they are sent.
    pub fn in_order(self) -> Vec<Descriptor> {
        [self.listener, self.memory, self.bell].into_iter().chain(self.state).collect()
    }

    /// From what was received; `None` when it is not as many as there are.
    pub fn from_order(fds: Vec<Descriptor>) -> Option<Self> {
        let mut fds = fds.into_iter();
        let (listener, memory, bell) = (fds.next()?, fds.next()?, fds.next()?);
        let state = fds.next();
        fds.next().is_none().then_some(Self { listener, memory, bell, state })
    }
}

/// What a driver has saved for its next version. The file is beside the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateSize {
    /// Of its form, as the driver counts them.
    pub version: u32,
    /// How much of the file it is.
    pub bytes: u64,
}

/// What a driver host gives up, beside what every one does (`iohost_sandbox`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confinement {
    /// The user and the group to become, where the process may; `None` to stay the daemon's.
    pub identity: Option<(u32, u32)>,
    /// Nobody else is of that user.
    pub is_alone: bool,
    /// The most bytes of private memory, and of each memory file.
    pub memory: u64,
    /// The most descriptors.
    pub descriptors: u64,
    /// Whether a refused system call is the process's end.
    pub kills: bool,
    /// Whether not to start where a part of the sandbox cannot be had.
    pub required: bool,
}

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DeviceLocation {
    /// A PCI function of this machine, bound to the kernel driver that its backend needs.
    Pci {
        /// `dddd:bb:dd.f`.
        address: String,
        /// How it is reached; `None` for the best way that VFIO has.
        backend: Option<PciBackend>,
    },
    /// A vfio-user server.
    VfioUser {
        /// Path of its socket.
        socket: String,
    },
}

/// How a PCI function is reached, as the configuration spells it. See `docs/backends.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PciBackend {
    /// VFIO, by the device's own node.
    VfioCdev,
    /// VFIO, by the device's IOMMU group.
    VfioGroup,
    /// VFIO without an IOMMU.
    VfioNoIommu,
    /// UIO.
    Uio,
}

impl PciBackend {
    /// The name, as the configuration spells it.
    pub fn name(self) -> &'static str {
        match self {
            PciBackend::VfioCdev => "vfio-cdev",
            PciBackend::VfioGroup => "vfio-group",
            PciBackend::VfioNoIommu => "vfio-no-iommu",
            PciBackend::Uio => "uio",
        }
    }

    /// Whether nothing but the driver keeps the device from the machine's memory.
    pub fn is_unsafe(self) -> bool {
        matches!(self, PciBackend::VfioNoIommu | PciBackend::Uio)
    }
}

/// A kind of interrupt, as the configuration spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InterruptChoice {
    /// The legacy line.
    IntX,
    /// Message signalled.
    Msi,
    /// Message signalled, with a table.
    MsiX,
}

/// A session for one client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenSession {
    /// Its number, never used again.
    pub session: u64,
    /// 1 for a new one, one more for each driver host that died and left it.
    pub generation: u64,
    /// The kind of client; 0 for the first.
    #[serde(default)]
    pub client_type: u64,
    /// Its data queues, in the order in which the driver's interface declares them.
    pub queues: Vec<QueueSize>,
}

/// One data queue of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSize {
    /// Bytes of the ring, without the header.
    pub bytes: u32,
}

/// From a driver host to the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FromHost {
    /// The device was opened and reset and the driver's `start` returned.
    Ready(Ready),
    /// The driver host cannot run; it exits after this.
    Failed(Failure),
    /// What the driver leaves to its next version. Descriptor: its file.
    Saved(StateSize),
    /// Calls are under way that were not answered in time; the driver goes on.
    NotDrained {
        /// How many.
        waiting: u64,
    },
    /// The first answer to `HandOver`. Descriptors: the memory and the bell of the flight recorder.
    HandedOver(HandedOver),
    /// A session that the driver has. The descriptors are those of `OpenSession`.
    HandedSession(OpenSession),
    /// The driver knows the session; calls on its socket are answered from now on.
    SessionOpened {
        /// The session's number.
        session: u64,
    },
    /// The session is over: refused, closed by its client, or ended for what it did.
    SessionClosed {
        /// The session's number.
        session: u64,
        /// Why, in words; empty when the client just left.
        reason: String,
    },
    /// The numbers asked for.
    Statistics(Statistics),
    /// The driver wants to hear which services run, from now on.
    WatchServices,
    /// What became of making the device safe; before `Ready`, and before `Failed` and `Stopped`
    /// where it came to that.
    Quiesced(Quiesced),
    /// Something happened to the device.
    DeviceEvent(DeviceEvent),
    /// The driver, which runs, is to be visible from now on.
    Registered,
    /// The driver became busy, or idle.
    Busy {
        /// Which of the two.
        is_busy: bool,
    },
    /// The driver wants to end.
    Terminate,
    /// What became of a power state.
    Power {
        /// The state.
        state: PowerState,
        /// The driver has not acknowledged it in its time; else it has.
        is_late: bool,
    },
    /// What the driver says of itself, as JSON.
    Properties {
        /// An array of entries.
        text: String,
    },
    /// The sandbox refused a system call of this number, for the first time. Written by a signal
    /// handler, so it can come between any two others.
    CallRefused {
        /// The number, on this machine.
        number: u32,
    },
    /// The driver has stopped and the device is closed; the process exits after this.
    Stopped,
}

/// The power state of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::CustomType)]
#[serde(rename_all = "lowercase")]
pub enum PowerState {
    /// Everything is quiet.
    Off,
    /// It works with less.
    Low,
    /// As it began.
    On,
}

/// What a new daemon has to know of a driver host besides its sessions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandedOver {
    /// What became of making the device safe before the start.
    pub quiesced: Option<Quiesced>,
    /// The services that the driver was told to run, with their incarnations; `None` if it has not
    /// asked.
    pub told: Option<BTreeMap<String, u64>>,
}

/// What happens to a device that its driver did not cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceEvent {
    /// An error that it did not correct itself, or an access to it that nobody answered.
    Error,
    /// Somebody wants it back, and waits until it is closed.
    RemovalRequested,
    /// It does not answer any more.
    Gone,
}

/// What became of a device between one driver and the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::CustomType)]
#[serde(deny_unknown_fields)]
pub struct Quiesced {
    /// What is left of it.
    pub outcome: Outcome,
    /// How it was reset, or why it was not, or what is wrong with it.
    pub how: String,
    /// What its registers said before, in words.
    pub found: String,
    /// And after.
    pub left: String,
}

/// What is left of a device once it was made safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::CustomType)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is quiet and answers, but has no reset.
    Clean,
    /// It is quiet, was reset, and answers.
    Reset,
    /// It may do harm or does not answer, and is left alone.
    Quarantined,
}

/// A service that runs, as other drivers see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunningService {
    /// Its name.
    pub name: String,
    /// Its driver's name.
    pub driver: String,
    /// The name of the interface it serves; empty for none.
    pub interface: String,
    /// Which driver host of its device runs it; another number is another life.
    pub incarnation: u64,
}

/// What a driver host found and started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ready {
    /// The driver's name, from its plugin.
    pub driver: String,
    /// How the device is reached, as `DeviceBackend::kind` says.
    pub backend: String,
    /// What the reset before the start did: `done`, or why there was none.
    pub reset: String,
    /// The interface the driver serves, as `iohost_interface` describes it; empty for none.
    pub interface: String,
    /// Those for the further kinds of clients, from 1 on.
    #[serde(default)]
    pub further_interfaces: Vec<String>,
    /// Whether clients and other drivers may see it already; else `Registered` says when.
    #[serde(default = "yes")]
    pub is_registered: bool,
    /// The sandbox in force, in words; `None` for none.
    pub sandbox: Option<String>,
}

fn yes() -> bool {
    true
}

/// Why something cannot be, for a person: what is wrong, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}\n  next: {next}")]
pub struct Failure {
    /// A stable word for programs, such as `plugin-abi`.
    pub code: String,
    /// One sentence with the values that matter.
    pub message: String,
    /// What to do about it.
    pub next: String,
}

impl Failure {
    /// A failure with its code, what is wrong, and what to do about it.
    pub fn new(
        code: impl Into<String>,
        message: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Self { code: code.into(), message: message.into(), next: next.into() }
    }
}

/// The numbers of a driver host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, introspect::Type)]
#[serde(deny_unknown_fields)]
pub struct Statistics {
    /// Sessions open now.
    pub sessions: u64,
    /// One entry per dispatch queue.
    pub queues: Vec<QueueStatistics>,
}

/// The numbers of one dispatch queue.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, introspect::CustomType)]
#[serde(deny_unknown_fields)]
pub struct QueueStatistics {
    /// The queue's name.
    pub name: String,
    /// Items waiting now.
    pub depth: u64,
    /// Items run since the start.
    pub executed: u64,
    /// Items dropped because the queue was cancelled.
    pub dropped: u64,
    /// The longest single handler, in nanoseconds.
    pub longest_ns: u64,
    /// From work for an idle queue to its start: half took no longer, in nanoseconds.
    pub wait_p50_ns: u64,
    /// The same for 99 of 100.
    pub wait_p99_ns: u64,
    /// From the start of an item to its end: half took no longer, in nanoseconds.
    pub run_p50_ns: u64,
    /// The same for 99 of 100.
    pub run_p99_ns: u64,
}
