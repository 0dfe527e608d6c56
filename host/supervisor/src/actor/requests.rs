//! Requests from the control interface.

use std::sync::mpsc::TryRecvError;
use std::time::Instant;

use iohost_control::host::{Failure, PciBackend, PowerState, QueueSize, Statistics, ToHost};
use iohost_control::varlink::{
    BindOptions, Bound, Description as Described, Device, DeviceList, Opened, Powered, Properties,
    Queue, Status, Unbound,
};
use iohost_event::{PacketError, Packets, Peer};
use iohost_pci::PciAddress;
use log::warn;

use super::{Actor, ids, not_running, word};
use crate::bindings::from_pci;
use crate::config::{DeviceConfig, Limits, Location};
use crate::plugins::Plugins;
use crate::request::{Answer, Request, stopping};
use crate::service::{Cause, Opening, Service, Session, Stage, State, Visitor};
use crate::session::SessionMemory;

impl Actor {
    pub(super) fn answer_requests(&mut self) {
        self.inbox.wake.take();
        loop {
            let request = match self.inbox.requests.try_recv() {
                Ok(request) => request,
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            };
            match request {
                Request::Devices(answer) => answer.give(self.devices()),
                Request::Status(answer) => answer.give(Ok(self.status())),
                Request::Upgrade { service, plugin, client, answer } => {
                    if let Some(answer) = self.for_admin(&client, "Upgrade", answer) {
                        self.upgrade(&service, &plugin, answer);
                    }
                }
                Request::Statistics { service, answer } => self.statistics(&service, answer),
                Request::Describe { service, answer } => answer.give(self.describe(&service)),
                Request::Bind { device, options, client, answer } => {
                    if let Some(answer) = self.for_admin(&client, "Bind", answer) {
                        self.bind(&device, options, answer);
                    }
                }
                Request::Unbind { device, client, answer } => {
                    if let Some(answer) = self.for_admin(&client, "Unbind", answer) {
                        self.unbind(&device, answer);
                    }
                }
                Request::Reload { client, answer } => {
                    if let Some(answer) = self.for_admin(&client, "Reload", answer) {
                        answer.give(self.reload());
                    }
                }
                Request::Watch(answer) => answer.give(Ok(self.watchers.add())),
                Request::Properties { service, answer } => self.properties(&service, answer),
                Request::Power { service, state, client, answer } => {
                    if let Some(answer) = self.for_admin(&client, "Power", answer) {
                        self.power(&service, state, answer);
                    }
                }
                Request::Open { service, wanted, client, answer } => {
                    self.open(&service, wanted, client, answer);
                }
            }
        }
    }

    pub(super) fn devices(&self) -> Result<DeviceList, Failure> {
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

    pub(super) fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            services: self.services.iter().map(Service::shown).collect(),
        }
    }

    /// Asks a driver host for its numbers, unless that is under way for somebody else.
    pub(super) fn statistics(&mut self, word: &str, answer: Answer<Statistics>) {
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

    /// Asks a driver host for what its driver says of itself.
    fn properties(&mut self, word: &str, answer: Answer<Properties>) {
        let service = match self.find(word) {
            Ok(at) => &mut self.services[at],
            Err(failure) => return answer.give(Err(failure)),
        };
        let State::Running { host, .. } = &mut service.state else {
            return answer.give(Err(not_running(service)));
        };
        if host.asked_properties.is_empty() {
            // A process that is gone already is noticed by its end.
            let _ = host.process.send(&ToHost::QueryProperties, &[]);
        }
        host.asked_properties.push(answer);
    }

    /// Has a driver go into a power state.
    fn power(&mut self, word: &str, state: PowerState, answer: Answer<Powered>) {
        let service = match self.find(word) {
            Ok(at) => &mut self.services[at],
            Err(failure) => return answer.give(Err(failure)),
        };
        let State::Running { host, .. } = &mut service.state else {
            return answer.give(Err(not_running(service)));
        };
        // A process that is gone already is noticed by its end.
        let _ = host.process.send(&ToHost::SetPower { state }, &[]);
        host.asked_power.push((state, answer));
    }

    pub(super) fn describe(&self, word: &str) -> Result<Described, Failure> {
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

    /// Refuses what only an administrator may ask for; else hands back who waits for the answer.
    fn for_admin<T>(&self, client: &Peer, method: &str, answer: Answer<T>) -> Option<Answer<T>> {
        match self.config.admins.check_admin(client, method) {
            Ok(()) => Some(answer),
            Err(failure) => {
                answer.give(Err(failure));
                None
            }
        }
    }

    pub(super) fn bind(&mut self, word: &str, options: BindOptions, answer: Answer<Bound>) {
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

    pub(super) fn unbind(&mut self, word: &str, answer: Answer<Unbound>) {
        let at = match (self.position_called(word), word.parse::<PciAddress>()) {
            (Some(at), _) => at,
            // No service any more, but it could not be given back when it was one.
            (None, Ok(address)) if self.is_left(address) => self.add(address),
            (None, _) => return answer.give(Err(self.no_such_service(word))),
        };
        self.services[at].unbinds.push(answer);
        self.stop(at);
    }

    pub(super) fn open(
        &mut self,
        word: &str,
        wanted: (Option<Vec<u32>>, u64),
        client: Peer,
        answer: Answer<(Opened, Vec<std::os::fd::OwnedFd>)>,
    ) {
        let at = match self.find(word) {
            Ok(at) => at,
            Err(failure) => return answer.give(Err(failure)),
        };
        let deadline = Instant::now() + self.options.patience.session;
        let service = &mut self.services[at];
        if let Some(allowed) = &service.device.clients
            && let Err(failure) = allowed.check_open(&client, &service.device.name)
        {
            return answer.give(Err(failure));
        }
        if service.runs_again_by(deadline) {
            return service.visitors.push(Visitor { deadline, wanted, client, answer });
        }
        self.open_now(at, deadline, wanted, client, answer);
    }

    pub(super) fn open_now(
        &mut self,
        at: usize,
        deadline: Instant,
        wanted: (Option<Vec<u32>>, u64),
        client: Peer,
        answer: Answer<(Opened, Vec<std::os::fd::OwnedFd>)>,
    ) {
        let number = self.next_session;
        self.next_session += 1;
        match self.open_session(at, number, wanted, &client) {
            Err(failure) => answer.give(Err(failure)),
            Ok((memory, socket, token, opened, fds)) => {
                let opening = Some(Opening { deadline, opened, fds, answer });
                let session = Session {
                    client: Some(client),
                    memory,
                    socket,
                    token,
                    generation: 1,
                    stage: Stage::Known,
                    client_is_gone: false,
                    opening,
                };
                self.services[at].sessions.insert(number, session);
            }
        }
    }

    /// Makes a session's descriptors and tells the driver host of it.
    pub(super) fn open_session(
        &self,
        at: usize,
        number: u64,
        (queue_bytes, client_type): (Option<Vec<u32>>, u64),
        client: &Peer,
    ) -> Result<(SessionMemory, Packets, u64, Opened, Vec<std::os::fd::OwnedFd>), Failure> {
        let service = &self.services[at];
        let State::Running { host, ready, interfaces } = &service.state else {
            return Err(not_running(service));
        };
        if !ready.is_registered {
            return Err(Failure::new(
                "not-registered",
                format!("the driver of {:?} runs and takes no clients yet", word(service)),
                "try again; the driver says when it is ready",
            ));
        }
        let kind = usize::try_from(client_type).unwrap_or(usize::MAX);
        let Some(interface) = interfaces.get(kind) else {
            let count = interfaces.len();
            return Err(Failure::new(
                "client-type",
                format!(
                    "driver {:?} has no clients of type {client_type}, but {count} from 0 on",
                    ready.driver
                ),
                "read the driver's documentation for the types of clients that it has",
            ));
        };
        let (limits, sessions) = (&self.config.limits, &service.sessions);
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
        self.check_share(client, bytes.iter().map(|bytes| u64::from(*bytes)).sum())?;
        let queues: Vec<QueueSize> =
            bytes.iter().map(|bytes| QueueSize { bytes: *bytes }).collect();
        let memory =
            SessionMemory::create(&queues, client_type).map_err(|err| err.into_failure())?;
        let (theirs, drivers) = Packets::pair().map_err(crate::no_resources)?;
        let token = self.watch_client(&drivers).map_err(crate::no_resources)?;
        let message = ToHost::OpenSession(memory.for_host(number, 1));
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
            interface: match kind {
                0 => ready.interface.clone(),
                further => ready.further_interfaces[further - 1].clone(),
            },
            queues: interface
                .queues
                .iter()
                .zip(&bytes)
                .map(|(queue, bytes)| Queue { name: queue.name.clone(), bytes: *bytes })
                .collect(),
        };
        let fds = memory.for_client(theirs, &interface.queues).map_err(crate::no_resources)?;
        Ok((memory, drivers, token, opened, fds))
    }

    /// A client may have one more session, of so many bytes, or is told why not. Sessions that were
    /// taken over are nobody's.
    fn check_share(&self, client: &Peer, bytes: u64) -> Result<(), Failure> {
        let Limits { sessions_per_client, memory_per_client, .. } = self.config.limits;
        let is_same = |one: &Peer, other: &Peer| (one.uid, one.pid) == (other.uid, other.pid);
        let of_client = self.services.iter().flat_map(|service| service.sessions.values());
        let of_client: Vec<&Session> = of_client
            .filter(|it| it.client.as_ref().is_some_and(|it| is_same(it, client)))
            .collect();
        let (uid, pid, count) = (client.uid, client.pid, of_client.len());
        let refused = |code: &str, message: String, key: &str| {
            warn!(uid, pid, code; "a client was refused: {message}");
            let next = format!("close sessions, or raise `{key}` in the configuration");
            Err(Failure::new(code, message, next))
        };
        if count >= sessions_per_client {
            let message = format!("process {pid} has {count} sessions already");
            return refused("client-sessions", message, "sessions_per_client");
        }
        let has: u64 = of_client.iter().map(|session| session.memory.bytes()).sum();
        if has + bytes > memory_per_client {
            let message = format!(
                "process {pid} has queues of {has} bytes and asks for {bytes} more; the most is \
                 {memory_per_client}"
            );
            return refused("client-memory", message, "memory_per_client");
        }
        Ok(())
    }

    /// The service that a word means: a name, a location, or a driver that only one service runs.
    pub(super) fn find(&self, word: &str) -> Result<usize, Failure> {
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

    pub(super) fn position_called(&self, word: &str) -> Option<usize> {
        // The short form of an address is as good as the long one.
        let address = word.parse::<PciAddress>().map(|address| address.to_string());
        let full = address.as_deref().unwrap_or(word);
        self.services.iter().position(|service| service.is_called(word) || service.is_called(full))
    }

    /// Whether an earlier daemon, or this one, has something of a function to give back.
    pub(super) fn is_left(&self, address: PciAddress) -> bool {
        self.bindings.left().iter().any(|left| left.address == address)
    }

    pub(super) fn no_such_service(&self, word: &str) -> Failure {
        let names: Vec<&str> =
            self.services.iter().map(|service| service.device.name.as_str()).collect();
        let next = match names.is_empty() {
            true => "bind a device (iohost bind ADDRESS), or add one to the configuration".into(),
            false => format!("name one of: {}", names.join(", ")),
        };
        Failure::new("no-such-service", format!("there is no service {word:?}"), next)
    }

    /// A service for a function that the configuration does not have.
    pub(super) fn add(&mut self, address: PciAddress) -> usize {
        self.add_called(address.to_string(), Location::Pci(address))
    }

    /// A service that the configuration does not have.
    pub(super) fn add_called(&mut self, name: String, location: Location) -> usize {
        let device = DeviceConfig::unconfigured(name, location);
        self.services.push(Service::new(device, true));
        self.services.len() - 1
    }
}
