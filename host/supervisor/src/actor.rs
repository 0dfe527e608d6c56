//! The daemon's one owner of state.
//!
//! It sleeps until a request, a signal, a message from a driver host, the end of one, or a
//! deadline, and deals with each as a whole before the next. Nothing here blocks: what waits for a
//! kernel driver to let go of its device has threads of its own (`Bindings`).

mod configured;
mod deaths;
mod device_events;
mod ending;
mod news;
mod requests;
mod sessions;
mod starting;
mod take_over;
mod upgrades;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::{self, Read};
use std::mem;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use iohost_control::host::Failure;
use iohost_control::plugin::PciIds;
use iohost_event::{Poller, Ready as Found, TickScale};
use iohost_memory::flight_recorder::Recorder;
use iohost_pci::{HotplugSocket, PciFunction};
use log::{info, warn};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use signal_hook::flag;
use signal_hook::low_level::pipe;

use crate::Options;
use crate::bindings::Bindings;
use crate::config::Config;
use crate::crashes::Crashes;
use crate::driver_process::DriverProcess;
use crate::hooks::Hooks;
use crate::host_records::HostRecords;
use crate::memory_events::MemoryEvents;
use crate::plugins::Plugins;
use crate::request::Inbox;
use crate::service::{Cause, LastWords, Service, State};
use crate::watchers::Watchers;

pub(crate) use deaths::Evidence;

const REQUESTS: u64 = 0;
const SIGNALS: u64 = 1;
const BINDINGS: u64 = 2;
const HOTPLUG: u64 = 3;
const RELOAD: u64 = 4;
const CHILDREN: u64 = 5;
/// Each driver host has tokens from here on: its messages, its end, work while nobody looks.
const HOSTS: u64 = 6;
const TOKENS_OF_A_HOST: u64 = 3;
/// Each session has one from here on: the end of its client.
const SESSIONS: u64 = 1 << 63;

/// When a driver host that was behind is told of services again.
const TELL_AGAIN: Duration = Duration::from_millis(100);

/// Everything the daemon knows and holds.
pub(crate) struct Actor {
    options: Options,
    config: Config,
    plugins: Plugins,
    services: Vec<Service>,
    inbox: Inbox,
    signals: UnixStream,
    /// SIGHUP.
    reload: UnixStream,
    /// Raised when a process of ours has ended or was stopped.
    children: UnixStream,
    poller: Poller,
    bindings: Bindings,
    records: HostRecords,
    /// Devices that come; `None` where the kernel does not say.
    hotplug: Option<HotplugSocket>,
    /// A driver host has not read what it was told of services, so that it has to be told later.
    is_behind: bool,
    /// Clients that want to hear of services.
    watchers: Watchers,
    /// Driver hosts that said more than fits into a turn.
    talkative: BTreeSet<u64>,
    crashes: Crashes,
    hooks: Hooks,
    memory_events: MemoryEvents,
    /// What the times in flight recorders are worth.
    ticks: TickScale,
    started: Instant,
    next_host: u64,
    next_session: u64,
    /// Numbers what of sessions the actor watches: their own numbers are, after a takeover, what
    /// driver hosts say.
    next_token: Cell<u64>,
    /// SIGUSR2 came: the daemon ends, and its driver hosts wait for the next one.
    leaves_drivers: Arc<AtomicBool>,
    /// The user of the next driver host.
    next_user: u32,
    /// Whether the daemon is on its way out, and what went wrong on that way.
    stopping: bool,
    /// Whether it goes without waiting for devices that are being given back.
    is_hasty: bool,
    trouble: Option<Failure>,
}

impl Actor {
    /// Sets everything up that can fail, and starts nothing yet.
    pub(crate) fn new(
        options: &Options,
        config: Config,
        plugins: Plugins,
        inbox: Inbox,
        records: HostRecords,
    ) -> io::Result<Self> {
        let (signals, raised) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        let leaves_drivers = Arc::new(AtomicBool::new(false));
        // In this order: the flag is set by the time the pipe says that there is a signal.
        flag::register(SIGUSR2, leaves_drivers.clone())?;
        for signal in [SIGTERM, SIGINT, SIGUSR2] {
            pipe::register(signal, raised.try_clone()?)?;
        }
        let (reload, hung_up) = UnixStream::pair()?;
        reload.set_nonblocking(true)?;
        pipe::register(SIGHUP, hung_up)?;
        let (children, ended) = UnixStream::pair()?;
        children.set_nonblocking(true)?;
        pipe::register(SIGCHLD, ended)?;
        let poller = Poller::new()?;
        poller.watch(&children, CHILDREN)?;
        poller.watch(&*inbox.wake, REQUESTS)?;
        poller.watch(&signals, SIGNALS)?;
        poller.watch(&reload, RELOAD)?;
        let bindings = Bindings::new(options.sysfs.clone(), &config.state_directory)?;
        poller.watch(bindings.wake(), BINDINGS)?;
        let hotplug = HotplugSocket::open(&options.sysfs)
            .inspect_err(|err| warn!(err:%; "a device that comes will not be noticed"))
            .ok();
        if let Some(hotplug) = &hotplug {
            poller.watch(hotplug, HOTPLUG)?;
        }
        let services =
            config.devices.iter().map(|device| Service::new(device.clone(), false)).collect();
        Ok(Self {
            crashes: Crashes::new(&config.state_directory),
            hooks: Hooks::default(),
            memory_events: MemoryEvents::of_this_process(),
            ticks: TickScale::start(),
            options: options.clone(),
            config,
            plugins,
            services,
            inbox,
            signals,
            reload,
            children,
            poller,
            bindings,
            records,
            hotplug,
            is_behind: false,
            watchers: Watchers::default(),
            talkative: BTreeSet::new(),
            started: Instant::now(),
            next_host: 0,
            next_session: 1,
            next_token: Cell::new(0),
            leaves_drivers,
            next_user: *starting::DRIVER_USERS.start(),
            stopping: false,
            is_hasty: false,
            trouble: None,
        })
    }

    /// Takes over what runs, starts every other service, then deals with events until all have stopped
    /// after a signal.
    pub(crate) fn run(&mut self) -> Result<(), Failure> {
        self.take_over_hosts();
        self.take_up_what_was_left();
        for at in 0..self.services.len() {
            if !self.services[at].is_between() && self.services[at].host().is_none() {
                self.start(at, Cause::Asked);
            }
        }
        self.look_for_devices();
        let mut found = Found::new(64);
        while !self.is_finished() {
            let waited = self.poller.wait(&mut found, self.until_next_deadline());
            waited.map_err(crate::no_resources)?;
            for number in mem::take(&mut self.talkative) {
                self.listen_to(number);
            }
            for token in found.tokens() {
                match token {
                    REQUESTS => self.answer_requests(),
                    SIGNALS => self.take_signals(),
                    RELOAD => self.take_reload_signal(),
                    BINDINGS => self.hear_of_bindings(),
                    HOTPLUG => self.hear_hotplug(),
                    SESSIONS.. => self.client_left(token),
                    CHILDREN => self.look_at_children(),
                    _ => {
                        let number = (token - HOSTS) / TOKENS_OF_A_HOST;
                        match (token - HOSTS) % TOKENS_OF_A_HOST {
                            0 => self.listen_to(number),
                            1 => self.bury(number),
                            _ => self.has_work(number),
                        }
                    }
                }
            }
            self.check_deadlines(Instant::now());
            self.tell_of_services();
            self.settle_upgrades();
            self.settle_sessions();
        }
        if self.leaves_drivers.load(Relaxed) {
            self.leave_hosts();
        }
        self.trouble.take().map_or(Ok(()), Err)
    }

    /// Watches a driver host's process.
    fn watch_host(&self, process: &DriverProcess, number: u64) -> io::Result<()> {
        let token = HOSTS + TOKENS_OF_A_HOST * number;
        self.poller.watch(process.messages(), token)?;
        self.poller.watch(process.end(), token + 1)
    }

    /// Watches what a driver host's queues do.
    fn watch_recorder(&self, recorder: &Recorder, number: u64) -> io::Result<()> {
        self.poller.watch(recorder.bell(), HOSTS + TOKENS_OF_A_HOST * number + 2)
    }

    fn is_finished(&self) -> bool {
        if self.leaves_drivers.load(Relaxed) {
            return true;
        }
        let hosts_are_gone = self.services.iter().all(|service| service.host().is_none());
        self.stopping && hosts_are_gone && (self.is_hasty || self.bindings.are_idle())
    }

    fn until_next_deadline(&self) -> Option<Duration> {
        if !self.talkative.is_empty() {
            return Some(Duration::ZERO);
        }
        let later = self.is_behind.then(|| Instant::now() + TELL_AGAIN);
        let next = self.services.iter().filter_map(Service::deadline).chain(later).min()?;
        // A nanosecond late rather than early: epoll rounds down, and early means a busy loop.
        Some(next.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    fn take_signals(&mut self) {
        let mut bytes = [0; 64];
        while matches!(self.signals.read(&mut bytes), Ok(1..)) {}
        if self.leaves_drivers.load(Relaxed) {
            return;
        }
        if self.stopping {
            let hosts_are_gone = self.services.iter().all(|service| service.host().is_none());
            if hosts_are_gone && !self.bindings.are_idle() {
                warn!("another signal: not waiting for kernel drivers; the next daemon goes on");
                self.is_hasty = true;
                self.trouble.get_or_insert_with(|| {
                    Failure::new(
                        "not-given-back",
                        "devices are still being taken or given back",
                        "read the kernel log (dmesg) for what its drivers do; the next daemon \
                         gives the devices back",
                    )
                });
                return;
            }
            warn!("second signal: killing the driver hosts that have not stopped");
            for at in 0..self.services.len() {
                self.condemn(at, Failure::new("killed", "a second signal came", "start again"));
            }
            return;
        }
        info!("stopping");
        self.stopping = true;
        for at in 0..self.services.len() {
            self.stop(at);
        }
    }
}

fn why(words: Option<LastWords>) -> Option<Failure> {
    match words {
        Some(LastWords::Said(failure) | LastWords::Found(failure)) => Some(failure),
        Some(LastWords::Stopped) | None => None,
    }
}

fn protocol(words: &str) -> Failure {
    Failure::new(
        "driver-protocol",
        format!("the driver host broke the protocol: {words}"),
        "install iohost and iohost-driver-host of the same version",
    )
}

fn given_back() -> Failure {
    Failure::new("stopped", "the device was given back", "bind it again")
}

fn not_running(service: &Service) -> Failure {
    let shown = service.shown();
    let why = match shown.reason {
        Some(reason) => format!(": {}", reason.message),
        None => String::new(),
    };
    let state = format!("{:?}", shown.state).to_lowercase();
    Failure::new(
        "not-running",
        format!("service {:?} is {state}{why}", shown.name),
        match &service.state {
            State::Down(reason) | State::Quarantined(reason) => reason.next.clone(),
            _ => "try again in a moment; `iohost status` shows how it goes".to_owned(),
        },
    )
}

fn word(service: &Service) -> &str {
    &service.device.name
}

fn ids(function: &PciFunction) -> PciIds {
    PciIds {
        vendor: function.vendor,
        device: function.device,
        subsystem_vendor: function.subsystem_vendor,
        subsystem_device: function.subsystem_device,
        class: function.class,
        revision: function.revision,
    }
}
