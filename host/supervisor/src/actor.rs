//! The daemon's one owner of state.
//!
//! It sleeps until a request, a signal, a message from a driver host, the end of one, or a
//! deadline, and deals with each as a whole before the next. Nothing here blocks: what waits for a
//! kernel driver to let go of its device has threads of its own (`Bindings`).

mod device_events;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::mem;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::TryRecvError;
use std::time::{Duration, Instant};

use iohost_control::host::{
    DeviceEvent, Failure, FromHost, MOST_DESCRIPTORS, OpenSession, PciBackend, QueueSize, Ready,
    RunningService, Start, Statistics, ToHost,
};
use iohost_control::plugin::PciIds;
use iohost_control::varlink::{
    BindOptions, Bound, Description as Described, Device, DeviceList, Opened, Queue, Status,
    Unbound,
};
use iohost_doctor::Code;
use iohost_event::{PacketError, Packets, Poller, Ready as Found};
use iohost_interface::Description;
use iohost_pci::{HotplugSocket, Order, PciAddress, PciFunction, Persist};
use log::{debug, error, info, warn};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use crate::Options;
use crate::bindings::{Bindings, Done, from_pci};
use crate::config::{Config, DeviceConfig, ErrorPolicy, Location};
use crate::driver_process::{DriverProcess, Heard};
use crate::needs;
use crate::plugins::{Plugin, Plugins};
use crate::request::{Answer, Inbox, Request, stopping};
use crate::restart::Decision;
use crate::service::{Cause, Ending, Host, LastWords, Opening, Service, Session, State, Then};
use crate::session::SessionMemory;
use crate::watchers::Watchers;

const REQUESTS: u64 = 0;
const SIGNALS: u64 = 1;
const BINDINGS: u64 = 2;
const HOTPLUG: u64 = 3;
/// Each driver host has two tokens from here on: its messages, then its end.
const HOSTS: u64 = 4;

/// Messages of one driver host that are dealt with before others get their turn.
const MESSAGES_PER_TURN: usize = 64;

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
    poller: Poller,
    bindings: Bindings,
    /// Devices that come back; `None` where the kernel does not say.
    hotplug: Option<HotplugSocket>,
    /// A driver host has not read what it was told of services, so that it has to be told later.
    is_behind: bool,
    /// Clients that want to hear of services.
    watchers: Watchers,
    /// Driver hosts that said more than fits into a turn.
    talkative: BTreeSet<u64>,
    started: Instant,
    next_host: u64,
    next_session: u64,
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
    ) -> io::Result<Self> {
        let (signals, raised) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        pipe::register(SIGTERM, raised.try_clone()?)?;
        pipe::register(SIGINT, raised)?;
        let poller = Poller::new()?;
        poller.watch(&*inbox.wake, REQUESTS)?;
        poller.watch(&signals, SIGNALS)?;
        let bindings = Bindings::new(options.sysfs.clone(), &config.state_directory)?;
        poller.watch(bindings.wake(), BINDINGS)?;
        let hotplug = HotplugSocket::open()
            .inspect_err(|err| warn!(err:%; "a device that comes back will not be noticed"))
            .ok();
        if let Some(hotplug) = &hotplug {
            poller.watch(hotplug, HOTPLUG)?;
        }
        let services =
            config.devices.iter().map(|device| Service::new(device.clone(), false)).collect();
        Ok(Self {
            options: options.clone(),
            config,
            plugins,
            services,
            inbox,
            signals,
            poller,
            bindings,
            hotplug,
            is_behind: false,
            watchers: Watchers::default(),
            talkative: BTreeSet::new(),
            started: Instant::now(),
            next_host: 0,
            next_session: 1,
            stopping: false,
            is_hasty: false,
            trouble: None,
        })
    }

    /// Starts every service, then deals with events until all have stopped after a signal.
    pub(crate) fn run(&mut self) -> Result<(), Failure> {
        self.take_up_what_was_left();
        for at in 0..self.services.len() {
            if !self.services[at].is_between() {
                self.start(at, Cause::Asked);
            }
        }
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
                    BINDINGS => self.hear_of_bindings(),
                    HOTPLUG => self.hear_hotplug(),
                    _ if (token - HOSTS).is_multiple_of(2) => self.listen_to((token - HOSTS) / 2),
                    _ => self.bury((token - HOSTS) / 2),
                }
            }
            self.check_deadlines(Instant::now());
            self.tell_of_services();
        }
        self.trouble.take().map_or(Ok(()), Err)
    }

    fn is_finished(&self) -> bool {
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

/// Requests from the control interface.
impl Actor {
    fn answer_requests(&mut self) {
        self.inbox.wake.take();
        loop {
            let request = match self.inbox.requests.try_recv() {
                Ok(request) => request,
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            };
            match request {
                Request::Devices(answer) => answer.give(self.devices()),
                Request::Status(answer) => answer.give(Ok(self.status())),
                Request::Statistics { service, answer } => self.statistics(&service, answer),
                Request::Describe { service, answer } => answer.give(self.describe(&service)),
                Request::Bind { device, options, answer } => self.bind(&device, options, answer),
                Request::Unbind { device, answer } => self.unbind(&device, answer),
                Request::Watch(answer) => answer.give(Ok(self.watchers.add())),
                Request::Open { service, queue_bytes, answer } => {
                    self.open(&service, queue_bytes, answer);
                }
            }
        }
    }

    fn devices(&self) -> Result<DeviceList, Failure> {
        let functions = self.options.sysfs.functions().map_err(from_pci)?;
        let service_at = |location: &str| {
            let service = self.services.iter().find(|service| service.is_called(location));
            service.map(|service| service.device.name.clone())
        };
        let pci = functions.iter().map(|function| {
            let location = function.address.to_string();
            let configured = self.services.iter().find(|service| service.is_called(&location));
            let configured = configured.map(|service| &service.device);
            let backend = configured.and_then(|device| device.backend);
            Device {
                kind: backend.map_or("vfio", PciBackend::name).into(),
                is_unsafe: configured.is_some_and(DeviceConfig::is_unsafe),
                vendor: Some(function.vendor),
                device: Some(function.device),
                class: Some(function.class),
                kernel_driver: function.driver.clone(),
                iommu_group: function.iommu_group,
                service: service_at(&location),
                plugin: self.plugins.best_for(ids(function)).map(|plugin| plugin.info.name.clone()),
                location,
            }
        });
        let sockets = self.services.iter().filter_map(|service| match &service.device.location {
            Location::Pci(_) => None,
            Location::Socket(path) => Some(Device {
                location: path.display().to_string(),
                kind: "vfio-user".into(),
                is_unsafe: false,
                vendor: None,
                device: None,
                class: None,
                kernel_driver: None,
                iommu_group: None,
                service: Some(service.device.name.clone()),
                plugin: service.device.driver.clone(),
            }),
        });
        Ok(DeviceList { devices: pci.chain(sockets).collect() })
    }

    fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            services: self.services.iter().map(Service::shown).collect(),
        }
    }

    /// Asks a driver host for its numbers, unless that is under way for somebody else.
    fn statistics(&mut self, word: &str, answer: Answer<Statistics>) {
        let service = match self.find(word) {
            Ok(at) => &mut self.services[at],
            Err(failure) => return answer.give(Err(failure)),
        };
        let State::Running { host, .. } = &mut service.state else {
            return answer.give(Err(not_running(service)));
        };
        if host.asked.is_empty() {
            // A process that is gone already is noticed by its end.
            let _ = host.process.send(&ToHost::Query, &[]);
        }
        host.asked.push(answer);
    }

    fn describe(&self, word: &str) -> Result<Described, Failure> {
        let service = &self.services[self.find(word)?];
        match &service.state {
            State::Running { ready, .. } => Ok(Described {
                service: service.device.name.clone(),
                driver: ready.driver.clone(),
                interface: ready.interface.clone(),
            }),
            _ => Err(not_running(service)),
        }
    }

    fn bind(&mut self, word: &str, options: BindOptions, answer: Answer<Bound>) {
        if self.stopping {
            return answer.give(Err(stopping()));
        }
        match Plugins::scan(&self.config.driver_directory, self.options.inspect) {
            Ok(plugins) => self.plugins = plugins,
            Err(failure) => return answer.give(Err(failure)),
        }
        let at = match self.position_called(word) {
            Some(at) => at,
            None => match word.parse::<PciAddress>() {
                Ok(address) => self.add(address),
                Err(_) => return answer.give(Err(self.no_such_service(word))),
            },
        };
        let service = &mut self.services[at];
        if let Location::Socket(_) = service.device.location
            && (options.group || options.persist)
        {
            return answer.give(Err(Failure::new(
                "not-pci",
                format!("service {:?} is behind a socket: it has no group to bind", word),
                "bind it without --group and --persist; what the configuration has is there again \
                 at every start",
            )));
        }
        match &service.state {
            State::Running { ready, .. } if !options.group && !options.persist => {
                let (service, driver) = (service.device.name.clone(), ready.driver.clone());
                answer.give(Ok(Bound { service, driver }));
            }
            // What is added to it is done beside it.
            State::Running { .. } => {
                service.wants(options);
                if let Some(order) = service.next_order() {
                    service.binds.push(answer);
                    self.bindings.take(order);
                }
            }
            State::Starting(_) | State::Taking { is_unwanted: false, .. }
                if !options.group && !options.persist =>
            {
                service.binds.push(answer);
            }
            State::Starting(_)
            | State::Taking { .. }
            | State::Stopping(_)
            | State::GivingBack { .. } => answer.give(Err(not_running(service))),
            State::Down(_) | State::Restarting { .. } | State::Quarantined(_) => {
                // A person who asks has looked: the past does not count, and the device is theirs
                // to take.
                service.deaths.forget();
                service.device.bind = true;
                service.is_lost = false;
                service.wants(options);
                service.binds.push(answer);
                self.start(at, Cause::Asked);
            }
        }
    }

    fn unbind(&mut self, word: &str, answer: Answer<Unbound>) {
        let at = match (self.position_called(word), word.parse::<PciAddress>()) {
            (Some(at), _) => at,
            // No service any more, but it could not be given back when it was one.
            (None, Ok(address)) if self.is_left(address) => self.add(address),
            (None, _) => return answer.give(Err(self.no_such_service(word))),
        };
        self.services[at].unbinds.push(answer);
        self.stop(at);
    }

    fn open(
        &mut self,
        word: &str,
        queue_bytes: Option<Vec<u32>>,
        answer: Answer<(Opened, Vec<std::os::fd::OwnedFd>)>,
    ) {
        let at = match self.find(word) {
            Ok(at) => at,
            Err(failure) => return answer.give(Err(failure)),
        };
        let number = self.next_session;
        self.next_session += 1;
        match self.open_session(at, number, queue_bytes) {
            Err(failure) => answer.give(Err(failure)),
            Ok((memory, opened, fds)) => {
                let State::Running { sessions, .. } = &mut self.services[at].state else {
                    unreachable!("open_session refuses in every other state");
                };
                let deadline = Instant::now() + self.options.patience.session;
                let opening = Some(Opening { deadline, opened, fds, answer });
                sessions.insert(number, Session { _memory: memory, opening });
            }
        }
    }

    /// Makes a session's descriptors and tells the driver host of it.
    fn open_session(
        &self,
        at: usize,
        number: u64,
        queue_bytes: Option<Vec<u32>>,
    ) -> Result<(SessionMemory, Opened, Vec<std::os::fd::OwnedFd>), Failure> {
        let service = &self.services[at];
        let State::Running { host, ready, interface, sessions } = &service.state else {
            return Err(not_running(service));
        };
        let limits = &self.config.limits;
        if sessions.len() >= limits.sessions_per_service {
            return Err(Failure::new(
                "too-many-sessions",
                format!("service {:?} has {} sessions already", word(service), sessions.len()),
                "close one, or raise `sessions_per_service` in the configuration",
            ));
        }
        let declared = interface.queues.len();
        let bytes = queue_bytes.unwrap_or_else(|| vec![limits.queue_bytes; declared]);
        if bytes.len() != declared {
            return Err(Failure::new(
                "queue-count",
                format!("{} queue sizes for an interface of {declared} queues", bytes.len()),
                "give one size for each queue that `describe` shows, or none at all",
            ));
        }
        if let Some(too_large) = bytes.iter().find(|bytes| **bytes > limits.largest_queue_bytes) {
            return Err(Failure::new(
                "queue-size",
                format!("a queue of {too_large} bytes, the most is {}", limits.largest_queue_bytes),
                "ask for less, or raise `largest_queue_bytes` in the configuration",
            ));
        }
        let queues: Vec<QueueSize> =
            bytes.iter().map(|bytes| QueueSize { bytes: *bytes }).collect();
        let memory = SessionMemory::create(&queues).map_err(|err| err.into_failure())?;
        let (theirs, drivers) = Packets::pair().map_err(crate::no_resources)?;
        let message = ToHost::OpenSession(OpenSession { session: number, queues });
        host.process.send(&message, &memory.beside(&drivers)).map_err(|err| {
            let why = match err {
                PacketError::WouldBlock => "it has not read the earlier messages".to_owned(),
                other => other.to_string(),
            };
            Failure::new(
                "driver-silent",
                format!("the driver host of {:?} takes no session: {why}", word(service)),
                "try again; if it stays so, restart the driver: iohost unbind, iohost bind",
            )
        })?;
        let opened = Opened {
            session: number,
            service: service.device.name.clone(),
            interface: ready.interface.clone(),
            queues: interface
                .queues
                .iter()
                .zip(&bytes)
                .map(|(queue, bytes)| Queue { name: queue.name.clone(), bytes: *bytes })
                .collect(),
        };
        let fds = memory.duplicates(theirs).map_err(crate::no_resources)?;
        Ok((memory, opened, fds))
    }

    /// The service that a word means: a name, a location, or a driver that only one service runs.
    fn find(&self, word: &str) -> Result<usize, Failure> {
        if let Some(at) = self.position_called(word) {
            return Ok(at);
        }
        let runs = |service: &Service| {
            service.driver.as_deref().or(service.device.driver.as_deref()) == Some(word)
        };
        let all: Vec<usize> =
            (0..self.services.len()).filter(|at| runs(&self.services[*at])).collect();
        match all.as_slice() {
            [] => Err(self.no_such_service(word)),
            [only] => Ok(*only),
            several => {
                let names: Vec<&str> =
                    several.iter().map(|at| self.services[*at].device.name.as_str()).collect();
                Err(Failure::new(
                    "ambiguous",
                    format!("{} services run driver {word:?}", several.len()),
                    format!("name one of them: {}", names.join(", ")),
                ))
            }
        }
    }

    fn position_called(&self, word: &str) -> Option<usize> {
        // The short form of an address is as good as the long one.
        let address = word.parse::<PciAddress>().map(|address| address.to_string());
        let full = address.as_deref().unwrap_or(word);
        self.services.iter().position(|service| service.is_called(word) || service.is_called(full))
    }

    /// Whether an earlier daemon, or this one, has something of a function to give back.
    fn is_left(&self, address: PciAddress) -> bool {
        self.bindings.left().iter().any(|left| left.address == address)
    }

    fn no_such_service(&self, word: &str) -> Failure {
        let names: Vec<&str> =
            self.services.iter().map(|service| service.device.name.as_str()).collect();
        let next = match names.is_empty() {
            true => "bind a device (iohost bind ADDRESS), or add one to the configuration".into(),
            false => format!("name one of: {}", names.join(", ")),
        };
        Failure::new("no-such-service", format!("there is no service {word:?}"), next)
    }

    /// A service for a function that the configuration does not have.
    fn add(&mut self, address: PciAddress) -> usize {
        let device = DeviceConfig {
            name: address.to_string(),
            location: Location::Pci(address),
            driver: None,
            interrupts: Vec::new(),
            bind: true,
            backend: None,
            on_error: ErrorPolicy::default(),
            line: 0,
        };
        self.services.push(Service::new(device, true));
        self.services.len() - 1
    }
}

/// The life of a service; the numbers are those of the picture at [`State`].
impl Actor {
    /// What earlier daemons left: persistent devices are services, and what nobody wants goes back.
    fn take_up_what_was_left(&mut self) {
        for left in self.bindings.left() {
            let known = self.position_called(&left.address.to_string());
            let (at, is_new) = match known {
                Some(at) => (at, false),
                None => (self.add(left.address), true),
            };
            let service = &mut self.services[at];
            if let Some(persist) = left.persist {
                service.device.bind = true;
                service.persists = true;
                service.group = persist == Persist::Group;
            } else if is_new {
                self.stop(at);
            } else if !service.device.bind {
                // Nobody allowed us to have it; but somebody else may have bound it for us.
                service.state = State::GivingBack { then: Then::Start };
                self.bindings.give_back(left.address, false);
            }
        }
    }

    /// 1 and 5: chooses a plugin and takes the device.
    fn start(&mut self, at: usize, cause: Cause) {
        match self.is_to_be_taken(at) {
            Ok(false) => self.start_taken(at, cause),
            Ok(true) => {
                let service = &mut self.services[at];
                if let Some(order) = service.next_order() {
                    self.bindings.take(order);
                    service.state = State::Taking { cause, is_unwanted: false };
                }
            }
            Err(failure) => self.go_down(at, failure),
        }
    }

    /// 8: starts a driver host for a device that is ours.
    fn start_taken(&mut self, at: usize, cause: Cause) {
        match self.start_host(at, cause) {
            Ok(host) => self.services[at].state = State::Starting(host),
            Err(failure) => self.go_down(at, failure),
        }
    }

    fn start_host(&mut self, at: usize, cause: Cause) -> Result<Host, Failure> {
        let plugin = self.choose_plugin(&self.services[at].device)?.clone();
        needs::check(&plugin.info, &self.services[at].device, iohost_doctor::may_lock())?;
        let service = &mut self.services[at];
        service.driver = Some(plugin.info.name.clone());
        service.is_removed = false;
        service.incarnation += 1;
        let host = self.launch(at, Some(&plugin), cause)?;
        let service = &self.services[at];
        info!(
            device = service.device.name, driver = plugin.info.name, pid = host.process.pid(),
            incarnation = service.incarnation; "driver host started"
        );
        if service.device.is_unsafe() {
            warn!(
                device = service.device.name;
                "UNSAFE: no IOMMU keeps this device from the machine's memory"
            );
        }
        Ok(host)
    }

    /// Starts a driver host that runs a plugin, or none.
    fn launch(
        &mut self,
        at: usize,
        plugin: Option<&Plugin>,
        cause: Cause,
    ) -> Result<Host, Failure> {
        let service = &mut self.services[at];
        service.quiesced = None;
        let process = DriverProcess::spawn(&self.options.driver_host, &service.device.name)?;
        let number = self.next_host;
        self.next_host += 1;
        self.poller.watch(process.messages(), HOSTS + 2 * number).map_err(crate::no_resources)?;
        self.poller.watch(process.end(), HOSTS + 2 * number + 1).map_err(crate::no_resources)?;
        let start = ToHost::Start(Start {
            device: service.device.for_host(),
            interrupts: service.device.interrupts.clone(),
            plugin: plugin.map(|plugin| plugin.file.to_string_lossy().into_owned()),
            incarnation: service.incarnation,
        });
        // A process that is gone already is noticed by its end.
        let _ = process.send(&start, &[]);
        Ok(Host {
            number,
            process,
            deadline: Some(Instant::now() + self.options.patience.start),
            last_words: None,
            was_ready: false,
            is_retry: cause == Cause::Death,
            killed: false,
            ending: None,
            told: None,
            asked: Vec::new(),
        })
    }

    fn choose_plugin(&self, device: &DeviceConfig) -> Result<&Plugin, Failure> {
        if let Some(name) = &device.driver {
            return self.plugins.named(name);
        }
        let Location::Pci(address) = device.location else {
            return Err(Failure::new(
                "no-driver",
                format!("device {:?} names no driver", device.name),
                "add the key `driver` to the device in the configuration",
            ));
        };
        let function = self.options.sysfs.function(address).map_err(from_pci)?;
        self.plugins.best_for(ids(&function)).ok_or_else(|| {
            let PciFunction { vendor, device, class, .. } = function;
            Failure::new(
                "no-driver",
                format!(
                    "no plugin in {} is for device {address} ({vendor:04x}:{device:04x}, class \
                     {class:06x})",
                    self.config.driver_directory.display()
                ),
                "install a plugin for it there",
            )
        })
    }

    /// Whether a device has to be taken first: a PCI function, where iohost may. Refused is what no
    /// plugin is for, and what would have to be bound and may not be.
    fn is_to_be_taken(&self, at: usize) -> Result<bool, Failure> {
        let device = &self.services[at].device;
        self.choose_plugin(device)?;
        let Location::Pci(address) = device.location else { return Ok(false) };
        if device.bind {
            return Ok(true);
        }
        let has = self.options.sysfs.function(address).map_err(from_pci)?.driver;
        let wanted = device.binding().driver();
        if has.as_deref() == Some(wanted) {
            return Ok(false);
        }
        let has = has.unwrap_or_else(|| "no driver".into());
        Err(Failure::new(
            Code::NotBound.name(),
            format!("device {address} is bound to {has}, not to {wanted}"),
            format!(
                "take it with `iohost bind {address}`, or set `bind = true` for it in the \
                 configuration"
            ),
        ))
    }

    /// Devices were taken, or given back, or not.
    fn hear_of_bindings(&mut self) {
        for (address, done) in self.bindings.finished() {
            let at = self.position_called(&address.to_string());
            match (at, done) {
                (Some(at), Done::Taken(order, result)) => self.taken(at, &order, result),
                (Some(at), Done::GivenBack(result)) => self.given_back(at, result),
                // A service is kept while something is done for it.
                (None, done) => debug!(device:% = address, done:? = done; "for no service"),
            }
        }
    }

    fn taken(&mut self, at: usize, order: &Order, result: Result<(), Failure>) {
        let service = &mut self.services[at];
        service.persists |= order.persist && result.is_ok();
        match (&service.state, result) {
            (State::Taking { is_unwanted: true, .. }, _) => self.stopped(at),
            (State::Taking { cause, .. }, Ok(())) => {
                let cause = *cause;
                self.start_taken(at, cause);
            }
            (State::Taking { .. }, Err(failure)) => self.go_down(at, failure),
            // What was added to a service that runs; one that ended meanwhile has said so.
            (State::Running { ready, .. }, result) => {
                let (service_name, driver) = (service.device.name.clone(), ready.driver.clone());
                let bound = result.map(|()| Bound { service: service_name, driver });
                for answer in service.binds.drain(..) {
                    answer.give(bound.clone());
                }
            }
            _ => {}
        }
    }

    /// 2: the driver runs.
    fn became_ready(&mut self, at: usize, ready: Ready) {
        let interface = match Description::parse(&ready.interface) {
            Ok(interface) if 3 * interface.queues.len() < MOST_DESCRIPTORS => interface,
            Ok(interface) => {
                let count = interface.queues.len();
                return self.condemn(at, protocol(&format!("an interface of {count} queues")));
            }
            Err(err) => return self.condemn(at, protocol(&err.to_string())),
        };
        let service = &mut self.services[at];
        let old = mem::replace(&mut service.state, State::Down(stopping()));
        let State::Starting(mut host) = old else {
            unreachable!("became_ready is called for a service that starts");
        };
        host.deadline = None;
        host.was_ready = true;
        info!(
            device = service.device.name, driver = ready.driver, backend = ready.backend,
            reset = ready.reset, incarnation = service.incarnation; "driver running"
        );
        service.driver = Some(ready.driver.clone());
        service.reset = Some(ready.reset.clone());
        for answer in service.binds.drain(..) {
            let service = service.device.name.clone();
            answer.give(Ok(Bound { service, driver: ready.driver.clone() }));
        }
        service.state = State::Running { host, ready, interface, sessions: BTreeMap::new() };
    }

    /// 6: asks a driver host to stop; a service without one is stopped already.
    fn stop(&mut self, at: usize) {
        let service = &mut self.services[at];
        let old = mem::replace(&mut service.state, State::Down(stopping()));
        let mut host = match old {
            State::Starting(host) | State::Running { host, .. } => host,
            State::Stopping(host) => {
                service.state = State::Stopping(host);
                return;
            }
            State::Taking { cause, .. } => {
                service.state = State::Taking { cause, is_unwanted: true };
                return service.refuse_binds(&given_back());
            }
            State::GivingBack { then } => {
                let then = if let Then::Start = then { Then::Stop } else { then };
                service.state = State::GivingBack { then };
                return;
            }
            State::Down(_) | State::Restarting { .. } | State::Quarantined(_) => {
                return self.stopped(at);
            }
        };
        let sent = host.process.send(&ToHost::Stop, &[]);
        if !host.killed {
            host.deadline = Some(Instant::now() + self.options.patience.stop);
        }
        service.state = State::Stopping(host);
        service.refuse_binds(&given_back());
        if let Err(PacketError::WouldBlock) = sent {
            self.condemn(at, protocol("it does not read its messages"));
        }
    }

    /// 7: the driver host is gone, as was wanted.
    fn stopped(&mut self, at: usize) {
        self.put_away(at, Then::Stop);
    }

    /// 3: it cannot run, and only a request tries again.
    fn go_down(&mut self, at: usize, failure: Failure) {
        let service = &mut self.services[at];
        error!(
            device = service.device.name, code = failure.code, next = failure.next;
            "driver not started: {}", failure.message
        );
        let is_kept = service.persists && service.binds.is_empty();
        if service.on_request && !is_kept {
            // Nobody asked for it by configuration; what was taken for it goes back.
            self.put_away(at, Then::GoDown(failure));
        } else {
            service.refuse_binds(&failure);
            service.state = State::Down(failure);
        }
    }

    /// 9: gives the device back, if it is ours.
    fn put_away(&mut self, at: usize, then: Then) {
        let service = &mut self.services[at];
        service.state = State::GivingBack { then };
        match service.device.location {
            Location::Pci(address) if !service.is_lost => {
                // At its end the daemon keeps in mind what persists.
                let for_good = !self.stopping || !service.unbinds.is_empty();
                self.bindings.give_back(address, for_good);
            }
            _ => self.given_back(at, Ok(None)),
        }
    }

    /// 10: the device is given back, as far as that was possible.
    fn given_back(&mut self, at: usize, result: Result<Option<String>, Failure>) {
        let service = &mut self.services[at];
        let result = match result {
            Err(failure) if service.is_removed && failure.code == "no-such-device" => Ok(None),
            result => result,
        };
        if let Err(failure) = &result {
            error!(
                device = service.device.name, next = failure.next;
                "device not given back: {}", failure.message
            );
            self.trouble.get_or_insert_with(|| failure.clone());
        }
        let next = format!("start it again: iohost bind {}", service.device.name);
        let stopped = Failure::new("stopped", "it was stopped on request", next);
        let State::GivingBack { then } =
            mem::replace(&mut service.state, State::Down(stopped.clone()))
        else {
            unreachable!("a device is given back in that state alone, and it waits for this");
        };
        if let (Then::Start, false) = (&then, self.stopping) {
            return self.start(at, Cause::Asked);
        }
        let why = match then {
            Then::GoDown(failure) => failure,
            Then::Stop | Then::Start => stopped,
        };
        service.refuse_binds(&why);
        for answer in service.unbinds.drain(..) {
            answer.give(result.clone().map(|kernel_driver| Unbound { kernel_driver }));
        }
        (service.group, service.persists) = (false, false);
        service.state = State::Down(why);
        if service.on_request && !self.stopping {
            self.services.remove(at);
        }
    }

    /// A driver host has ended.
    fn bury(&mut self, number: u64) {
        // What it said before its end comes first.
        self.listen_to(number);
        let Some(at) = self.with_host(number) else { return };
        let service = &mut self.services[at];
        let Some(host) = service.host_mut() else { return };
        let Some(how) = host.process.ended() else { return };
        let pid = host.process.pid();
        let (last_words, is_retry) = (host.last_words.clone(), host.is_retry);
        let ending = host.ending.take();
        debug!(device = service.device.name, pid, how = how; "driver host ended");

        let name = service.device.name.clone();
        let unexpected = || {
            Failure::new(
                "driver-died",
                format!("the driver host of {name:?} (process {pid}) {how}"),
                "read the log for what it said last; `iohost status` shows when it starts again",
            )
        };
        if let Some(ending) = ending {
            let in_order = matches!(last_words, Some(LastWords::Stopped));
            return self.ended(at, ending, in_order);
        }
        if let Some(unfit) = self.is_unfit(at) {
            return self.quarantine(at, unfit);
        }
        let service = &mut self.services[at];
        let old = mem::replace(&mut service.state, State::Down(stopping()));
        match (old, last_words) {
            (State::Stopping(_), Some(LastWords::Stopped)) => self.stopped(at),
            // Its driver never ran, and it said why; there is nothing to stop.
            (State::Stopping(host), Some(LastWords::Said(_))) if !host.was_ready => {
                self.stopped(at);
            }
            (State::Stopping(_), words) => {
                let why = match words {
                    Some(LastWords::Said(failure) | LastWords::Found(failure)) => failure,
                    _ => unexpected(),
                };
                warn!(device = service.device.name; "driver not stopped in order: {}", why.message);
                self.trouble.get_or_insert(why);
                // It was to make its device safe, and has not: another one does.
                self.quiesce_then(at, Ending::Stopped);
            }
            (State::Starting(_), Some(LastWords::Said(failure))) if !is_retry => {
                self.go_down(at, failure);
            }
            (State::Starting(_), words) => {
                let why = why(words).unwrap_or_else(unexpected);
                self.died(at, why);
            }
            (State::Running { sessions, .. }, words) => {
                let why = why(words).unwrap_or_else(unexpected);
                for session in sessions.into_values() {
                    if let Some(opening) = session.opening {
                        opening.answer.give(Err(why.clone()));
                    }
                }
                self.died(at, why);
            }
            (other, _) => service.state = other,
        }
    }

    /// 4: decides whether and when the next driver host starts.
    fn died(&mut self, at: usize, why: Failure) {
        let now = Instant::now();
        let service = &mut self.services[at];
        service.refuse_binds(&why);
        service.last_death = Some(why.clone());
        match service.deaths.add(now, &self.options.restart) {
            Decision::RestartAfter(pause) => {
                warn!(
                    device = service.device.name, pause_ms = pause.as_millis() as u64,
                    reason = why.message; "driver host died, restarting"
                );
                service.state = State::Restarting { at: now + pause, why };
            }
            Decision::Quarantine => {
                error!(
                    device = service.device.name, reason = why.message;
                    "driver host died too often"
                );
                let next = format!(
                    "correct the cause, then start it again: iohost bind {}",
                    service.device.name
                );
                let ending = Ending::Isolated(Failure { next, ..why });
                self.quiesce_then(at, ending);
            }
        }
    }

    /// Kills a driver host for what it did; its end is dealt with when it comes.
    fn condemn(&mut self, at: usize, failure: Failure) {
        let patience = self.options.patience.stop;
        let service = &mut self.services[at];
        let device = service.device.name.clone();
        let Some(host) = service.host_mut() else { return };
        if host.killed {
            return;
        }
        warn!(device, pid = host.process.pid(), reason = failure.message; "killing driver host");
        host.last_words = Some(LastWords::Found(failure));
        host.killed = true;
        host.deadline = Some(Instant::now() + patience);
        host.process.kill();
    }

    fn check_deadlines(&mut self, now: Instant) {
        // From behind: a service that is done can leave the list.
        for at in (0..self.services.len()).rev() {
            let service = &mut self.services[at];
            if let State::Running { host, sessions, .. } = &mut service.state {
                let late = |session: &Session| {
                    session.opening.as_ref().is_some_and(|opening| opening.deadline <= now)
                };
                for (number, session) in sessions.extract_if(.., |_, session| late(session)) {
                    let _ = host.process.send(&ToHost::CloseSession { session: number }, &[]);
                    if let Some(opening) = session.opening {
                        opening.answer.give(Err(Failure::new(
                            "driver-silent",
                            format!(
                                "the driver did not take the session within {:?}",
                                self.options.patience.session
                            ),
                            "try again; if it stays so, restart it: iohost unbind, iohost bind",
                        )));
                    }
                }
            }
            if let State::Restarting { at: due, .. } = service.state {
                if due <= now && !self.stopping {
                    self.start(at, Cause::Death);
                }
                continue;
            }
            let Some(host) = service.host() else { continue };
            if host.deadline.is_none_or(|deadline| deadline > now) {
                continue;
            }
            if host.killed {
                self.give_up(at);
                continue;
            }
            let name = &service.device.name;
            let (what, patience) = match &service.state {
                State::Starting(_) => ("did not become ready", self.options.patience.start),
                State::Stopping(_) => ("did not stop", self.options.patience.stop),
                _ => ("closed its connection but did not end", self.options.patience.stop),
            };
            let failure = Failure::new(
                "driver-hung",
                format!("the driver host of {name:?} {what} within {patience:?}"),
                "read the log for what it did last; IOHOST_LOG=debug shows more",
            );
            self.condemn(at, failure);
        }
    }

    /// A driver host that SIGKILL does not end hangs in the kernel, with its device. Nothing of
    /// that device is touched again.
    fn give_up(&mut self, at: usize) {
        let service = &mut self.services[at];
        let pid = service.host().map_or(0, |host| host.process.pid());
        let failure = Failure::new(
            "driver-unkillable",
            format!("the driver host of {:?} (process {pid}) does not die", service.device.name),
            "read the kernel log (dmesg); the device may need a power cycle",
        );
        error!(device = service.device.name, pid; "driver host does not die");
        self.trouble.get_or_insert_with(|| failure.clone());
        for answer in service.unbinds.drain(..) {
            answer.give(Err(failure.clone()));
        }
        service.refuse_binds(&failure);
        service.is_lost = true;
        service.state = State::Down(failure);
    }
}

/// What driver hosts say.
impl Actor {
    fn with_host(&self, number: u64) -> Option<usize> {
        let is_it = |service: &Service| service.host().is_some_and(|host| host.number == number);
        self.services.iter().position(is_it)
    }

    fn listen_to(&mut self, number: u64) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(at) = self.with_host(number) else { return };
            let Some(host) = self.services[at].host_mut() else { return };
            match host.process.receive() {
                Heard::Message(message) => self.hear(at, message),
                Heard::Nothing => return,
                Heard::Closed => {
                    // It ends now, or it is killed.
                    let soon = Instant::now() + self.options.patience.stop;
                    host.deadline = Some(host.deadline.map_or(soon, |deadline| deadline.min(soon)));
                    return;
                }
                Heard::Garbage(words) => return self.condemn(at, protocol(&words)),
            }
        }
        self.talkative.insert(number);
    }

    fn hear(&mut self, at: usize, message: FromHost) {
        let patience = self.options.patience.stop;
        let service = &mut self.services[at];
        match (&mut service.state, message) {
            (State::Starting(_), FromHost::Ready(ready)) => self.became_ready(at, ready),
            (
                State::Starting(host) | State::Running { host, .. } | State::Stopping(host),
                FromHost::Failed(failure),
            ) => {
                if !host.killed {
                    host.last_words = Some(LastWords::Said(failure));
                    host.deadline = Some(Instant::now() + patience);
                }
            }
            (
                State::Starting(_) | State::Running { .. } | State::Stopping(_),
                FromHost::Quiesced(quiesced),
            ) => self.quiesced(at, quiesced),
            (State::Starting(_) | State::Running { .. }, FromHost::DeviceEvent(event)) => {
                self.device_event(at, event);
            }
            // Whoever wants the device back does not wait for a stop that takes its time.
            (State::Stopping(host), FromHost::DeviceEvent(event)) => {
                if host.ending.is_none() && event == DeviceEvent::RemovalRequested {
                    self.device_event(at, event);
                }
            }
            (State::Stopping(host), FromHost::Stopped) => {
                if !host.killed {
                    host.last_words = Some(LastWords::Stopped);
                    host.deadline = Some(Instant::now() + patience);
                }
            }
            (State::Running { sessions, .. }, FromHost::SessionOpened { session }) => {
                let opening = sessions.get_mut(&session).and_then(|session| session.opening.take());
                if let Some(Opening { opened, fds, answer, .. }) = opening {
                    debug!(device = service.device.name, session; "session opened");
                    answer.give(Ok((opened, fds)));
                }
            }
            (State::Running { sessions, .. }, FromHost::SessionClosed { session, reason }) => {
                let opening = sessions.remove(&session).and_then(|session| session.opening);
                debug!(device = service.device.name, session, reason = reason; "session closed");
                if let Some(Opening { answer, .. }) = opening {
                    answer.give(Err(Failure::new(
                        "session-refused",
                        format!("the driver refused the session: {reason}"),
                        "read the driver's documentation for what it takes",
                    )));
                }
            }
            (State::Starting(host) | State::Running { host, .. }, FromHost::WatchServices)
                if host.told.is_none() =>
            {
                host.told = Some(BTreeMap::new())
            }
            // Sent before it read that it has to stop.
            (
                State::Stopping(_),
                FromHost::Ready(_)
                | FromHost::SessionOpened { .. }
                | FromHost::SessionClosed { .. }
                | FromHost::Statistics(_)
                | FromHost::WatchServices,
            ) => {}
            (State::Running { host, .. }, FromHost::Statistics(statistics)) => {
                for answer in host.asked.drain(..) {
                    answer.give(Ok(statistics.clone()));
                }
            }
            (_, message) => {
                let said = format!("an unexpected message: {message:?}");
                self.condemn(at, protocol(&said));
            }
        }
    }
}

/// What driver hosts and clients hear of services.
impl Actor {
    /// Tells each driver host that asked what has changed since it was told last: what has ended
    /// first. A service that restarted meanwhile has ended and begun.
    fn tell_of_services(&mut self) {
        self.watchers.tell(&self.services);
        self.is_behind = false;
        if !self.services.iter().any(|service| service.host().is_some_and(|h| h.told.is_some())) {
            return;
        }
        let running: Vec<RunningService> =
            self.services.iter().filter_map(Service::running).collect();
        for service in &mut self.services {
            let Some(host) = service.host_mut() else { continue };
            let Some(told) = &mut host.told else { continue };
            match tell(&host.process, told, &running) {
                // One that is gone hears nothing, and its end is dealt with elsewhere.
                Ok(()) | Err(PacketError::Closed) => {}
                Err(_) => self.is_behind = true,
            }
        }
    }
}

fn tell(
    process: &DriverProcess,
    told: &mut BTreeMap<String, u64>,
    running: &[RunningService],
) -> Result<(), PacketError> {
    let runs = |(name, incarnation): (&String, &u64)| {
        running.iter().any(|is| is.name == *name && is.incarnation == *incarnation)
    };
    let ended: Vec<String> =
        told.iter().filter(|told| !runs(*told)).map(|(name, _)| name.clone()).collect();
    for name in ended {
        process.send(&ToHost::ServiceEnded { name: name.clone() }, &[])?;
        told.remove(&name);
    }
    for service in running {
        if !told.contains_key(&service.name) {
            process.send(&ToHost::ServiceBegan(service.clone()), &[])?;
            told.insert(service.name.clone(), service.incarnation);
        }
    }
    Ok(())
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
    PciIds { vendor: function.vendor, device: function.device, class: function.class }
}
