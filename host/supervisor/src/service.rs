//! One device that the daemon runs a driver for: what it is doing, and what it may do next.

use std::collections::BTreeMap;
use std::mem;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use iohost_control::crash::CrashReport;
use iohost_control::host::{Failure, PowerState, Quiesced, Ready, RunningService, Statistics};
use iohost_control::varlink::{
    BindOptions, Bound, Opened, Powered, Properties, State as Shown, Unbound,
};
use iohost_event::{Packets, Peer};
use iohost_interface::Description;
use iohost_memory::flight_recorder::Recorder;
use iohost_pci::Order;
use iohost_sandbox::call_name;

use crate::actor::Evidence;
use crate::config::{DeviceConfig, Location};
use crate::driver_process::DriverProcess;
use crate::hang::HangWatch;
use crate::request::Answer;
use crate::restart::Deaths;
use crate::session::SessionMemory;
use crate::upgrade::Upgrade;

/// A device and everything the daemon holds for it.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) device: DeviceConfig,
    /// Whether it was asked for by `bind` and is forgotten when it is given back.
    pub(crate) on_request: bool,
    /// Whether a `[[match]]` brought it.
    pub(crate) by_rule: bool,
    /// What a new configuration makes of it once its device is given back.
    pub(crate) next: Option<Next>,
    pub(crate) state: State,
    /// The plugin that was chosen for the last start.
    pub(crate) driver: Option<String>,
    /// Why that one, for a person.
    pub(crate) choice: Option<String>,
    /// Drivers that did not start since somebody asked for the service, with the reasons.
    pub(crate) failed: Vec<(String, Failure)>,
    /// The reset that the last driver host reported.
    pub(crate) reset: Option<String>,
    /// What became of making the device safe, the last time.
    pub(crate) quiesced: Option<Quiesced>,
    /// The sandbox of the last driver host that became ready, in words.
    pub(crate) sandbox: Option<String>,
    /// The user of the last driver host, where it was given one.
    pub(crate) driver_user: Option<u32>,
    /// The system calls that the sandbox refused the last driver host, by number.
    pub(crate) refused_calls: Vec<u32>,
    /// A driver host without a driver makes the device safe, or was to.
    pub(crate) quiescing: bool,
    /// The device was taken away, and is waited for.
    pub(crate) is_removed: bool,
    /// The device that was taken away is there again, and the driver host that had it has not ended.
    pub(crate) is_back: bool,
    pub(crate) incarnation: u64,
    /// Whether its driver host was started by an earlier daemon.
    pub(crate) was_taken_over: bool,
    pub(crate) deaths: Deaths,
    /// While another version of the driver is put in.
    pub(crate) upgrade: Option<Upgrade>,
    /// Why the last driver host died, if one has.
    pub(crate) last_death: Option<Failure>,
    /// What is left of the driver host that ended last, until that is reported.
    pub(crate) evidence: Option<Evidence>,
    /// A report that lacks what became of the device.
    pub(crate) unfinished_report: Option<CrashReport>,
    /// Whether the whole IOMMU group is taken with it.
    pub(crate) group: bool,
    /// Whether the next daemon takes it again.
    pub(crate) persists: bool,
    /// Whether its driver host cannot be got rid of, so that the device is not to be touched.
    pub(crate) is_lost: bool,
    /// What is wanted of the binding that comes next.
    asked: BindOptions,
    pub(crate) binds: Vec<Answer<Bound>>,
    pub(crate) unbinds: Vec<Answer<Unbound>>,
    /// By number. They outlive driver hosts, as long as another one is to come.
    pub(crate) sessions: BTreeMap<u64, Session>,
    /// The interface that the sessions were opened with.
    pub(crate) served: Option<Vec<Description>>,
    /// Who opens a session while the service restarts.
    pub(crate) visitors: Vec<Visitor>,
}

/// What a service is doing.
///
/// ```text
///           1           8            2
///   Down ──────▶ Taking ──▶ Starting ──────▶ Running
///    ▲ ▲ 3          │          │ │ 4            │ 4
///    │ └────────────┴──────────┘ └──▶ Restarting ◀┘ ──5──▶ Taking
///    │ 10                                 │ 4
///    │          7, 9                      ▼
///   GivingBack ◀──── Stopping ◀──6── any  Quarantined ──1──▶ Taking
/// ```
/// 1 `Actor::start`, which leaves `Taking` out for what need not be taken, 2 `Actor::became_ready`,
/// 3 a device that cannot be taken, or a driver host that says it cannot and never could
/// (`Actor::go_down`, by way of `GivingBack` for what was bound on request), 4 any other death
/// (`Actor::died`), 5 `Actor::start` when the pause is over, 6 `Actor::stop`, which leaves
/// `Stopping` out without a driver host, or `Actor::end` for what happened to the device,
/// 7 `Actor::stopped`, or `Actor::ended`, which may as well lead to Restarting or Quarantined,
/// 8 `Actor::start_taken`, 9 `Actor::put_away`, 10 `Actor::given_back`. A device that could not be
/// made safe is Quarantined whatever else is true (`Actor::is_unfit`). From Starting a service goes to
/// Starting again where the next best driver is tried (`Actor::try_next`), and from GivingBack to 1
/// where the configuration says something new of it (`Service::next`).
#[derive(Debug)]
pub(crate) enum State {
    Down(Failure),
    /// Unwanted if it was asked to stop meanwhile.
    Taking {
        cause: Cause,
        is_unwanted: bool,
    },
    Starting(Host),
    Running {
        host: Host,
        ready: Ready,
        /// By the kind of client; there is always a first.
        interfaces: Vec<Description>,
    },
    Restarting {
        at: Instant,
        why: Failure,
    },
    Stopping(Host),
    GivingBack {
        then: Then,
    },
    Quarantined(Failure),
}

/// Why a driver host is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The daemon starts, or somebody asked.
    Asked,
    /// The one before it died.
    Death,
}

/// What comes when a device is given back.
#[derive(Debug)]
pub(crate) enum Then {
    /// Nothing: it was asked to stop.
    Stop,
    /// Nothing: it cannot run.
    GoDown(Failure),
    /// It is started: what was given back was an earlier daemon's.
    Start,
}

/// What follows when a device is given back because the configuration is another one.
#[derive(Clone, Debug)]
pub(crate) enum Next {
    /// It is started, as that says.
    Replace(Box<DeviceConfig>),
    /// It is no service any more.
    Remove,
}

/// The end of the time that a driver host was given, and how much that was, to say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Deadline {
    pub(crate) at: Instant,
    pub(crate) patience: Duration,
}

/// A driver host and what is expected of it.
#[derive(Debug)]
pub(crate) struct Host {
    /// Numbers what the actor watches; never used again.
    pub(crate) number: u64,
    pub(crate) process: DriverProcess,
    /// What its queues do, where there was memory for that.
    pub(crate) recorder: Option<Recorder>,
    /// Looks for hangs, once its driver runs.
    pub(crate) watch: Option<HangWatch>,
    /// What became of making the device safe, at its start and at its end.
    pub(crate) device_before: Option<Quiesced>,
    pub(crate) device_after: Option<Quiesced>,
    /// When it is killed unless it has done what it was asked.
    pub(crate) deadline: Option<Deadline>,
    /// What it said, or what we found, that explains its end.
    pub(crate) last_words: Option<LastWords>,
    /// Whether its driver runs or ran.
    pub(crate) was_ready: bool,
    /// Whether it was started because the one before it died, not because somebody asked.
    pub(crate) is_retry: bool,
    /// Whether it was killed, so that nothing is left but to wait for its end.
    pub(crate) killed: bool,
    /// What happened to its device, for which it was told to end.
    pub(crate) ending: Option<Ending>,
    /// Whether an earlier daemon started it, and it has not handed over yet.
    pub(crate) is_taken_over: bool,
    /// The services it was told to run, with their incarnations; `None` while it has not asked.
    pub(crate) told: Option<BTreeMap<String, u64>>,
    /// Who waits for its numbers. Dropped with it, which tells them.
    pub(crate) asked: Vec<Answer<Statistics>>,
    /// Who waits for what the driver says of itself.
    pub(crate) asked_properties: Vec<Answer<Properties>>,
    /// Who waits for a power state.
    pub(crate) asked_power: Vec<(PowerState, Answer<Powered>)>,
    /// The state that the driver has acknowledged last.
    pub(crate) power: PowerState,
    /// Whether the driver says that it is busy.
    pub(crate) is_busy: bool,
    /// Whether it wanted to be visible before it was said to run.
    pub(crate) is_registered: bool,
}

/// What follows the end of a driver host that was told to end for more than a request, or that only
/// makes the device safe after another one did not.
#[derive(Clone, Debug)]
pub(crate) enum Ending {
    /// What follows a stop on request.
    Stopped,
    /// The device is taken away: it starts again when it comes back.
    Removed(Failure),
    /// Another driver host is started at once.
    Replaced,
    /// As if the driver host had died of it.
    Died(Failure),
    /// Nothing but a request starts it again.
    Isolated(Failure),
    /// The driver wanted to end: its device is given back.
    Terminated(Failure),
}

impl Ending {
    pub(crate) fn why(&self) -> Option<&Failure> {
        match self {
            Ending::Stopped | Ending::Replaced => None,
            Ending::Removed(why)
            | Ending::Died(why)
            | Ending::Isolated(why)
            | Ending::Terminated(why) => Some(why),
        }
    }
}

/// Why a driver host ends.
#[derive(Clone, Debug)]
pub(crate) enum LastWords {
    /// It said so itself, in order.
    Said(Failure),
    /// We killed it for this.
    Found(Failure),
    /// It was asked to stop, and has.
    Stopped,
}

/// A session of a service.
#[derive(Debug)]
pub(crate) struct Session {
    /// Who opened it, for the limits of one client; `None` once it was taken over. An earlier daemon
    /// made its socket, so that the kernel does not say, and the driver host would not be believed.
    pub(crate) client: Option<Peer>,
    pub(crate) memory: SessionMemory,
    /// The driver's end.
    pub(crate) socket: Packets,
    /// What the actor knows the end of its client by.
    pub(crate) token: u64,
    /// Which driver host has it, or had it last; from 1.
    pub(crate) generation: u64,
    pub(crate) stage: Stage,
    /// Nobody is at the other end of the socket, or nobody that reads.
    pub(crate) client_is_gone: bool,
    /// Until the driver knows the session.
    pub(crate) opening: Option<Opening>,
}

/// Who knows where a session is.
///
/// ```text
///   Known ──died──▶ Orphaned ──client told──▶ Waiting ──next driver host told──▶ Known
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The driver host was told of it.
    Known,
    /// That one died.
    Orphaned,
    /// Its client knows, and the next driver host is to be told.
    Waiting,
}

/// Somebody who opens a session of a service that restarts.
#[derive(Debug)]
pub(crate) struct Visitor {
    pub(crate) deadline: Instant,
    pub(crate) wanted: (Option<Vec<u32>>, u64),
    pub(crate) client: Peer,
    pub(crate) answer: Answer<(Opened, Vec<OwnedFd>)>,
}

/// A session that the driver does not know yet.
#[derive(Debug)]
pub(crate) struct Opening {
    pub(crate) deadline: Instant,
    pub(crate) opened: Opened,
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) answer: Answer<(Opened, Vec<OwnedFd>)>,
}

impl Deadline {
    fn after(patience: Duration) -> Self {
        Self { at: Instant::now() + patience, patience }
    }
}

impl Host {
    /// One of which nothing is known yet, with this much time to do what it is asked.
    pub(crate) fn new(number: u64, process: DriverProcess, patience: Duration) -> Self {
        Self {
            number,
            process,
            recorder: None,
            watch: None,
            device_before: None,
            device_after: None,
            deadline: Some(Deadline::after(patience)),
            last_words: None,
            was_ready: false,
            is_retry: false,
            killed: false,
            ending: None,
            is_taken_over: false,
            told: None,
            asked: Vec::new(),
            asked_properties: Vec::new(),
            asked_power: Vec::new(),
            power: PowerState::On,
            is_busy: false,
            is_registered: false,
        }
    }

    /// It has this long from now on, and is killed then.
    pub(crate) fn has_time(&mut self, patience: Duration) {
        self.deadline = Some(Deadline::after(patience));
    }

    /// As [`has_time`](Self::has_time), but no longer than it had before.
    pub(crate) fn has_time_at_most(&mut self, patience: Duration) {
        let limit = Deadline::after(patience);
        self.deadline = Some(self.deadline.map_or(limit, |deadline| deadline.min(limit)));
    }

    /// No other driver host follows this one after all.
    pub(crate) fn is_not_replaced(&mut self) {
        self.ending.take_if(|ending| matches!(ending, Ending::Replaced));
    }
}

impl Service {
    pub(crate) fn new(device: DeviceConfig, on_request: bool) -> Self {
        let not_yet = Failure::new("not-started", "the device was not started yet", "wait");
        Self {
            device,
            on_request,
            by_rule: false,
            next: None,
            state: State::Down(not_yet),
            driver: None,
            choice: None,
            failed: Vec::new(),
            reset: None,
            quiesced: None,
            sandbox: None,
            driver_user: None,
            refused_calls: Vec::new(),
            quiescing: false,
            is_removed: false,
            is_back: false,
            incarnation: 0,
            was_taken_over: false,
            deaths: Deaths::default(),
            upgrade: None,
            last_death: None,
            evidence: None,
            unfinished_report: None,
            group: false,
            persists: false,
            is_lost: false,
            asked: BindOptions::default(),
            binds: Vec::new(),
            unbinds: Vec::new(),
            sessions: BTreeMap::new(),
            served: None,
            visitors: Vec::new(),
        }
    }

    /// Whether somebody means this service by that word.
    pub(crate) fn is_called(&self, word: &str) -> bool {
        self.device.name == word || self.device.location.to_string() == word
    }

    /// Whether its device is just being taken or given back.
    pub(crate) fn is_between(&self) -> bool {
        matches!(self.state, State::Taking { .. } | State::GivingBack { .. })
    }

    /// What is wanted of the next binding. A group stays wanted until the device is given back.
    pub(crate) fn wants(&mut self, options: BindOptions) {
        self.group |= options.group;
        self.asked = options;
    }

    /// The binding that the service needs next, of a PCI function. What was wanted of it is so
    /// once.
    pub(crate) fn next_order(&mut self) -> Option<Order> {
        let Location::Pci(address) = self.device.location else { return None };
        let BindOptions { force, persist, .. } = mem::take(&mut self.asked);
        let (binding, group) = (self.device.binding(), self.group);
        Some(Order { address, binding, group, force, persist })
    }

    /// Tells those who wait for it to run that it will not.
    pub(crate) fn refuse_binds(&mut self, why: &Failure) {
        for answer in self.binds.drain(..) {
            answer.give(Err(why.clone()));
        }
    }

    pub(crate) fn host(&self) -> Option<&Host> {
        match &self.state {
            State::Starting(host) | State::Running { host, .. } | State::Stopping(host) => {
                Some(host)
            }
            State::Down(_)
            | State::Taking { .. }
            | State::Restarting { .. }
            | State::GivingBack { .. }
            | State::Quarantined(_) => None,
        }
    }

    pub(crate) fn host_mut(&mut self) -> Option<&mut Host> {
        match &mut self.state {
            State::Starting(host) | State::Running { host, .. } | State::Stopping(host) => {
                Some(host)
            }
            State::Down(_)
            | State::Taking { .. }
            | State::Restarting { .. }
            | State::GivingBack { .. }
            | State::Quarantined(_) => None,
        }
    }

    /// The service as other drivers see it, if it runs.
    pub(crate) fn running(&self) -> Option<RunningService> {
        let State::Running { ready, interfaces, .. } = &self.state else { return None };
        if !ready.is_registered {
            return None;
        }
        Some(RunningService {
            name: self.device.name.clone(),
            driver: ready.driver.clone(),
            interface: interfaces[0].name.clone(),
            incarnation: self.incarnation,
        })
    }

    /// The next moment at which something is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let own = match &self.state {
            State::Restarting { at, .. } => Some(*at),
            _ => self.host().and_then(|host| host.deadline).map(|deadline| deadline.at),
        };
        let openings = self.sessions.values().filter_map(|session| session.opening.as_ref());
        let sessions = openings.map(|opening| opening.deadline);
        let visitors = self.visitors.iter().map(|visitor| visitor.deadline);
        let look = match &self.state {
            State::Running { host, .. } => host.watch.as_ref().and_then(HangWatch::next),
            _ => None,
        };
        own.into_iter().chain(sessions).chain(visitors).chain(look).min()
    }

    /// Whether another driver host is to come, so that its sessions wait for it.
    pub(crate) fn comes_back(&self) -> bool {
        match &self.state {
            State::Starting(_)
            | State::Restarting { .. }
            | State::Taking { is_unwanted: false, .. } => true,
            State::Stopping(host) => {
                matches!(host.ending, Some(Ending::Died(_) | Ending::Replaced))
            }
            State::Taking { is_unwanted: true, .. }
            | State::Down(_)
            | State::Running { .. }
            | State::GivingBack { .. }
            | State::Quarantined(_) => false,
        }
    }

    /// Whether it is likely to run again by then, after a death.
    pub(crate) fn runs_again_by(&self, limit: Instant) -> bool {
        match &self.state {
            State::Restarting { at, .. } => *at < limit,
            State::Starting(host) => host.is_retry || host.is_taken_over || self.upgrade.is_some(),
            State::Taking { cause: Cause::Death, is_unwanted: false } => true,
            _ => self.upgrade.is_some() && self.comes_back(),
        }
    }

    /// The service as the control interface shows it.
    pub(crate) fn shown(&self) -> iohost_control::varlink::Service {
        let (state, reason) = match &self.state {
            State::Down(why) => (Shown::Down, Some(why)),
            State::Taking { .. } | State::Starting(_) => (Shown::Starting, None),
            State::Running { .. } => (Shown::Running, None),
            State::Restarting { why, .. } => (Shown::Restarting, Some(why)),
            State::Stopping(_) | State::GivingBack { .. } => (Shown::Stopping, None),
            State::Quarantined(why) => (Shown::Quarantined, Some(why)),
        };
        let backend = match &self.state {
            State::Running { ready, .. } => Some(ready.backend.clone()),
            _ => None,
        };
        iohost_control::varlink::Service {
            name: self.device.name.clone(),
            location: self.device.location.to_string(),
            driver: self.driver.clone().or_else(|| self.device.driver.clone()),
            state,
            reason: reason.cloned().map(Into::into),
            pid: self.host().map(|host| host.process.pid()),
            choice: self.choice.clone(),
            incarnation: self.incarnation,
            taken_over: self.was_taken_over,
            backend,
            is_unsafe: self.device.is_unsafe(),
            reset: self.reset.clone(),
            quiesced: self.quiesced.clone(),
            sandbox: self.sandbox.clone(),
            refused_calls: self.refused_calls.iter().map(|call| call_name(*call)).collect(),
            sessions: self.sessions.len() as u64,
            is_registered: self.running().is_some(),
            is_busy: self.host().is_some_and(|host| host.is_busy),
            power: self.host().filter(|host| host.was_ready).map(|host| host.power),
        }
    }
}
