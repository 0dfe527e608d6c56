//! The conversation with the daemon, from the first message to the exit.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use iohost_control::host::{
    DeviceEvent as Heard, DeviceLocation, Failure, FromHost, HandedOver, InterruptChoice,
    LONGEST_MESSAGE, OpenSession, Outcome, PciBackend, PowerState as Power, QueueStatistics,
    Quiesced, Ready, Start, StartDescriptors, StateSize, Statistics, ToHost,
};
use iohost_device_backend::{
    Access, DeviceBackend, DeviceError, DeviceEvent, InterruptKind, UioBackend, VfioBackend,
    VfioUserBackend, quiesce,
};
use iohost_dispatch::Engine;
use iohost_event::{PacketListener, Packets};
use iohost_interface::with_sources;
use iohost_memory::flight_recorder::{Kind, Recorder};
use log::{error, info};

use crate::confinement::confine;
use crate::daemon::{Daemon, Teller};
use crate::failures::{
    device_failure, internal, load_failure, server_failure, start_failure, uio_failure,
    vfio_failure,
};
use crate::plugin::{LoadedPlugin, NewSession, SessionQueue};
use crate::plugin_file::PluginFile;
use crate::session::Sessions;
use crate::{
    Device, Driver, EventWatch, PowerNews, PowerState, Registry, Services, Told, saved_state,
};

/// The most kinds of clients that a driver can have.
const MOST_CLIENT_TYPES: u64 = 16;

/// Runs a driver host: what `iohost-driver-host` does. `daemon` is the socket it was given.
pub fn run(daemon: Packets) -> Result<()> {
    let daemon = Arc::new(Daemon::new(daemon));
    let (message, fds) = daemon.receive()?.context("the daemon left before the start")?;
    let ToHost::Start(start) = message else {
        bail!("expected `start`, the daemon sent {message:?}")
    };
    let count = fds.len();
    let Some(beside) = StartDescriptors::from_order(fds) else {
        bail!("the daemon sent {count} descriptors beside `start`")
    };
    let conversation =
        Conversation { daemon: daemon.clone(), listener: PacketListener::from(beside.listener) };
    let state = start.state.zip(beside.state);
    let started = recorder(beside.memory, beside.bell)
        .and_then(|recorder| Running::start(start, state, &daemon, recorder));
    let running = match started {
        Ok(running) => running,
        Err(failure) => {
            daemon.send(&FromHost::Failed(failure.clone()))?;
            return Err(failure.into());
        }
    };
    daemon.send(&FromHost::Ready(running.ready.clone()))?;
    let told = conversation.serve(&running);
    match told {
        Ok(End::LetGo) => running.let_go(),
        Ok(End::Stop) | Err(_) => {
            let quiesced = running.stop();
            daemon.send(&FromHost::Quiesced(quiesced))?;
        }
    }
    told?;
    daemon.send(&FromHost::Stopped)
}

/// Why the conversation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The daemon said `stop`.
    Stop,
    /// It said `let_go`.
    LetGo,
}

/// The conversation with one daemon after the other.
struct Conversation {
    daemon: Arc<Daemon>,
    listener: PacketListener,
}

impl Conversation {
    /// Answers the daemon until it says that this is the end.
    fn serve(&self, running: &Running) -> Result<End> {
        loop {
            let (message, fds) = match self.daemon.receive()? {
                Some(said) => said,
                None => self.daemon.await_next(&self.listener)?,
            };
            match message {
                ToHost::HandOver => self.daemon.hand_over(|tell| running.hand_over(tell))?,
                ToHost::Start(_) => bail!("the daemon sent a second `start`"),
                ToHost::OpenSession(open) => self.open_session(running, open, fds)?,
                ToHost::CloseSession { session } => {
                    if let Some(sessions) = &running.sessions {
                        sessions.close(session);
                    }
                }
                ToHost::ServiceBegan(service) => {
                    if let Some(driver) = &running.driver {
                        driver.services().began(service);
                    }
                }
                ToHost::ServiceEnded { name } => {
                    if let Some(driver) = &running.driver {
                        driver.services().ended(&name);
                    }
                }
                ToHost::QueryProperties => {
                    let text = running.properties();
                    self.daemon.send(&FromHost::Properties { text })?;
                }
                ToHost::SetPower { state } => {
                    if let Some(driver) = &running.driver {
                        driver.set_power_state(match state {
                            Power::Off => PowerState::Off,
                            Power::Low => PowerState::Low,
                            Power::On => PowerState::On,
                        });
                    }
                }
                ToHost::Query => {
                    self.daemon.send(&FromHost::Statistics(running.statistics()))?;
                }
                ToHost::Drain { limit_ms } => {
                    match running.drain(Duration::from_millis(limit_ms)) {
                        Ok(saved) => {
                            if let Some((version, data)) = saved {
                                self.send_state(version, &data)?;
                            }
                            return Ok(End::Stop);
                        }
                        Err(waiting) => {
                            let waiting = waiting as u64;
                            self.daemon.send(&FromHost::NotDrained { waiting })?;
                        }
                    }
                }
                ToHost::Stop => return Ok(End::Stop),
                ToHost::LetGo => return Ok(End::LetGo),
            }
        }
    }

    fn send_state(&self, version: u32, data: &[u8]) -> Result<()> {
        let (size, file) =
            saved_state::write(version, data).context("saving the driver's state")?;
        let message = FromHost::Saved(size);
        self.daemon.hand_over(|tell| tell(&message, &[file.as_fd()]))
    }

    fn open_session(&self, running: &Running, open: OpenSession, fds: Vec<OwnedFd>) -> Result<()> {
        let session = open.session;
        let opened = match &running.sessions {
            Some(sessions) => {
                let parts = session_parts(&open, fds);
                parts.and_then(|(socket, offered)| {
                    if let Some(driver) = &running.driver {
                        driver.expect_client_type(session, open.client_type);
                    }
                    sessions.open(socket, offered)
                })
            }
            None => Err("there is no driver".to_owned()),
        };
        self.daemon.send(&match opened {
            Ok(()) => FromHost::SessionOpened { session },
            Err(reason) => FromHost::SessionClosed { session, reason },
        })
    }
}

fn recorder(memory: OwnedFd, bell: OwnedFd) -> Result<Arc<Recorder>, Failure> {
    let attached = Recorder::attach(memory, bell);
    attached
        .map(Arc::new)
        .map_err(|err| internal(format!("the flight recorder: {}", with_sources(&err))))
}

/// Tells the daemon of a driver that panicked, and ends the process: what the driver's state is
/// worth, nobody knows. The device is made safe by whoever has it next.
fn end_for(daemon: &Daemon, driver: &str, recorder: &Recorder, reason: &str) -> ! {
    error!(reason; "the driver has failed");
    recorder.panicked(reason);
    let failure = Failure::new(
        "driver-panicked",
        format!("driver {driver:?} {reason}"),
        "report it to the driver's author, with `iohost crashes show`",
    );
    let _ = daemon.send(&FromHost::Failed(failure));
    // As a program of Rust ends by a panic.
    std::process::exit(101)
}

/// The socket of a session, and what the driver gets, from the descriptors in the order of
/// `OpenSession`.
fn session_parts(open: &OpenSession, fds: Vec<OwnedFd>) -> Result<(Packets, NewSession), String> {
    let expected = 2 + 3 * open.queues.len();
    if fds.len() != expected {
        return Err(match fds.len() {
            0 => "the driver has no descriptors left".to_owned(),
            found => format!("{found} descriptors for a session that has {expected}"),
        });
    }
    let mut fds = fds.into_iter();
    let mut next = || fds.next().expect("counted above");
    let socket = Packets::from(next());
    let ledger = Some(next());
    let queues = open.queues.iter().map(|queue| SessionQueue {
        bytes: queue.bytes,
        memory: next(),
        available: next(),
        serviced: next(),
    });
    let queues = queues.collect();
    Ok((socket, NewSession { number: open.session, generation: open.generation, queues, ledger }))
}

/// A device that is open, with its driver.
struct Running {
    // In the order in which they have to go: events, sessions, driver, device, engine.
    events: EventWatch,
    sessions: Option<Arc<Sessions>>,
    driver: Option<Arc<Driver>>,
    device: Arc<Device>,
    engine: Engine,
    /// What the queues do, which every daemon watches.
    recorder: Arc<Recorder>,
    quiesced: Quiesced,
    ready: Ready,
    /// The end is near: what fails from here on changes nothing.
    ends: Arc<AtomicBool>,
}

impl Running {
    fn start(
        start: Start,
        state: Option<(StateSize, OwnedFd)>,
        daemon: &Arc<Daemon>,
        recorder: Arc<Recorder>,
    ) -> Result<Self, Failure> {
        let backend = open_device(&start.device)?;
        let taken = Device::take_over(backend, allowed(&start.interrupts));
        let (device, quiesced) = taken.map_err(|err| {
            if let DeviceError::Quarantined(quiesced) = &err {
                // The daemon gone: nobody to hear of it.
                let _ = daemon.send(&FromHost::Quiesced(for_daemon(quiesced.as_ref().clone())));
            }
            device_failure(&start.device, &err)
        })?;
        let quiesced = for_daemon(quiesced);
        let reset = match quiesced.outcome {
            Outcome::Reset => "done".to_owned(),
            Outcome::Clean | Outcome::Quarantined => quiesced.how.clone(),
        };
        let _ = daemon.send(&FromHost::Quiesced(quiesced.clone()));
        let plugin = start.plugin.map(|path| PluginFile::open(Path::new(&path))).transpose()?;
        // Here this process stops being trusted. It is one thread so far, since half of a sandbox
        // is a thread's own; every thread from here on, and the plugin, are born inside.
        let sandbox = match (&start.confinement, &plugin) {
            (Some(wanted), Some(plugin)) => Some(confine(wanted, plugin, &daemon.connection())?),
            _ => None,
        };
        let engine = Engine::start_recorded(recorder.clone())
            .map_err(|err| internal(format!("the dispatch engine does not start: {err}")))?;
        let listener = daemon.clone();
        let lane = Mutex::new(recorder.lane("(device)"));
        let events = EventWatch::start(&device, move |event| {
            let (event, number) = match event {
                DeviceEvent::Error => (Heard::Error, 1),
                DeviceEvent::RemovalRequested => (Heard::RemovalRequested, 2),
                DeviceEvent::Gone => (Heard::Gone, 3),
            };
            if let Some(lane) = &*lane.lock().expect("nothing under this lock can fail") {
                lane.note(Kind::Device, number, 0);
            }
            listener.tell_of_device(event);
        });
        let events = events
            .map_err(|err| internal(format!("nobody would hear of the device's events: {err}")))?;
        let mut ready = Ready {
            driver: String::new(),
            backend: device.backend().kind().to_owned(),
            reset,
            interface: String::new(),
            further_interfaces: Vec::new(),
            is_registered: true,
            sandbox,
        };
        let ends = Arc::new(AtomicBool::new(false));
        let Some(plugin) = plugin else {
            let (sessions, driver) = (None, None);
            return Ok(Self {
                events,
                sessions,
                driver,
                device,
                engine,
                recorder,
                quiesced,
                ready,
                ends,
            });
        };
        let plugin =
            LoadedPlugin::load(&plugin).map_err(|err| load_failure(plugin.path(), &err))?;
        let asker = daemon.clone();
        let services = Services::new(move || {
            // The daemon gone: the next one is told when it takes this driver host over.
            let _ = asker.send(&FromHost::WatchServices);
        });
        let teller = daemon.clone();
        let registry = Registry::starting_at(start.registry).telling(move |told| {
            let message = match told {
                Told::Registered => FromHost::Registered,
                Told::Busy(is_busy) => FromHost::Busy { is_busy },
                Told::Terminate => FromHost::Terminate,
            };
            let _ = teller.send(&message);
        });
        let teller = daemon.clone();
        let services = services.with_registry(registry).telling_power(move |news| {
            let (state, is_late) = match news {
                PowerNews::Reached(state) => (state, false),
                PowerNews::Late(state) => (state, true),
            };
            let state = match state {
                PowerState::Off => Power::Off,
                PowerState::Low => Power::Low,
                PowerState::On => Power::On,
            };
            let _ = teller.send(&FromHost::Power { state, is_late });
        });
        let started = Driver::start(&engine, plugin, device.clone(), Arc::new(services));
        let driver = started.map_err(|err| start_failure(&err, device.last_dma_refusal()))?;
        if let Some((size, file)) = state {
            let data = saved_state::read(size, file)
                .map_err(|err| internal(format!("what the driver before it saved: {err}")))?;
            driver.restore(size.version, &data).map_err(|err| start_failure(&err, None))?;
        }
        ready.driver = driver.name();
        ready.interface = driver.description();
        ready.further_interfaces =
            (1..MOST_CLIENT_TYPES).map_while(|kind| driver.description_for(kind)).collect();
        ready.is_registered = driver.services().registry().is_registered();
        let driver = Arc::new(driver);
        let (told, name, ending) = (daemon.clone(), driver.name(), ends.clone());
        let failed = recorder.clone();
        driver.on_failure(move |reason| {
            if !ending.load(SeqCst) {
                end_for(&told, &name, &failed, reason);
            }
        });
        let teller = daemon.clone();
        let sessions = Sessions::new(driver.clone(), move |session, reason| {
            let reason = reason.to_owned();
            // The daemon gone: the next one never hears of the session.
            let _ = teller.send(&FromHost::SessionClosed { session, reason });
        });
        let sessions =
            sessions.map_err(|status| internal(format!("no session queue: {status}")))?;
        info!(incarnation = start.incarnation, driver = ready.driver.as_str(); "driver started");
        let (sessions, driver) = (Some(sessions), Some(driver));
        Ok(Self { events, sessions, driver, device, engine, recorder, quiesced, ready, ends })
    }

    /// Has everything answered that is under way, and asks the driver what the next version has to
    /// know.
    fn drain(&self, limit: Duration) -> Result<Option<(u32, Vec<u8>)>, usize> {
        if let Some(sessions) = &self.sessions {
            sessions.drain(limit)?;
        }
        Ok(self.driver.as_ref().and_then(|driver| driver.save()))
    }

    /// Tells a new daemon everything, `Ready` last.
    fn hand_over(&self, tell: Teller<'_>) -> Result<()> {
        let quiesced = Some(self.quiesced.clone());
        let told = self.driver.as_ref().and_then(|driver| driver.services().known());
        let recorder = [self.recorder.memory(), self.recorder.bell()];
        tell(&FromHost::HandedOver(HandedOver { quiesced, told }), &recorder)?;
        if let Some(sessions) = &self.sessions {
            sessions.hand_over(tell)?;
        }
        let mut ready = self.ready.clone();
        if let Some(driver) = &self.driver {
            let registry = driver.services().registry();
            ready.is_registered = registry.is_registered();
            tell(&FromHost::Busy { is_busy: registry.is_busy() }, &[])?;
        }
        tell(&FromHost::Ready(ready), &[])
    }

    /// The registry as JSON; without the entries that the driver made where they are too many for a
    /// message.
    fn properties(&self) -> String {
        let shown = self.driver.as_ref().map(|driver| driver.services().registry().shown());
        let mut shown = shown.unwrap_or_else(|| serde_json::Value::Array(Vec::new()));
        let room = LONGEST_MESSAGE / 2;
        if shown.to_string().len() > room
            && let Some(entries) = shown.as_array_mut()
        {
            entries.truncate(2);
        }
        shown.to_string()
    }

    fn statistics(&self) -> Statistics {
        let queues = self.engine.numbers().into_iter().map(|queue| QueueStatistics {
            name: queue.name,
            depth: queue.depth,
            executed: queue.executed,
            dropped: queue.dropped,
            longest_ns: queue.longest_ns,
            wait_p50_ns: queue.wait.p50_ns,
            wait_p99_ns: queue.wait.p99_ns,
            run_p50_ns: queue.run.p50_ns,
            run_p99_ns: queue.run.p99_ns,
        });
        Statistics {
            sessions: self.sessions.as_ref().map_or(0, |sessions| sessions.count() as u64),
            queues: queues.collect(),
        }
    }

    /// Stops the driver and leaves the device safe for the next one.
    fn stop(self) -> Quiesced {
        self.ends.store(true, SeqCst);
        if let Some(driver) = &self.driver {
            driver.stop();
        }
        // What the sequence does to the device is no news.
        drop(self.events);
        let quiesced = for_daemon(self.device.give_back());
        info!(outcome:? = quiesced.outcome, how = quiesced.how; "driver stopped");
        quiesced
    }

    /// Stops the driver and closes the device as it is.
    fn let_go(self) {
        self.ends.store(true, SeqCst);
        if let Some(driver) = &self.driver {
            driver.stop();
        }
        self.device.let_go();
        info!("driver stopped, device let go");
    }
}

fn for_daemon(quiesced: quiesce::Quiesced) -> Quiesced {
    let outcome = match quiesced.outcome {
        quiesce::Outcome::Clean => Outcome::Clean,
        quiesce::Outcome::Reset => Outcome::Reset,
        quiesce::Outcome::Quarantined => Outcome::Quarantined,
    };
    let quiesce::Quiesced { how, found, left, .. } = quiesced;
    Quiesced { outcome, how, found, left }
}

fn open_device(location: &DeviceLocation) -> Result<Arc<dyn DeviceBackend>, Failure> {
    match location {
        DeviceLocation::Pci { address, backend } => {
            let directory = Path::new("/sys/bus/pci/devices").join(address);
            let access = match backend {
                None => Access::best(&directory),
                Some(PciBackend::VfioCdev) => Access::Cdev,
                Some(PciBackend::VfioGroup) => Access::Group,
                Some(PciBackend::VfioNoIommu) => Access::NoIommu,
                Some(PciBackend::Uio) => {
                    let opened = UioBackend::open(&directory);
                    let opened = opened.map(|backend| Arc::new(backend) as _);
                    return opened.map_err(|err| uio_failure(address, &err));
                }
            };
            let opened = VfioBackend::open(&directory, access);
            opened.map(|backend| Arc::new(backend) as _).map_err(|err| vfio_failure(address, &err))
        }
        DeviceLocation::VfioUser { socket } => {
            let opened = VfioUserBackend::open(Path::new(socket));
            opened.map(|backend| Arc::new(backend) as _).map_err(|err| server_failure(socket, &err))
        }
    }
}

fn allowed(choices: &[InterruptChoice]) -> Vec<InterruptKind> {
    if choices.is_empty() {
        return vec![InterruptKind::IntX, InterruptKind::Msi, InterruptKind::MsiX];
    }
    let kind = |choice: &InterruptChoice| match choice {
        InterruptChoice::IntX => InterruptKind::IntX,
        InterruptChoice::Msi => InterruptKind::Msi,
        InterruptChoice::MsiX => InterruptKind::MsiX,
    };
    choices.iter().map(kind).collect()
}

/// The daemon's socket, as a driver host is given it: its standard input.
pub fn inherited() -> Result<Packets> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    Ok(Packets::from(socket))
}
