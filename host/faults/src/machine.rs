//! What a campaign is made on: a folder, a daemon with its driver hosts, and emulated devices.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};
use std::thread;
use std::time::{Duration, Instant};

use iohost_client::varlink::{Service, State};
use iohost_client::{ClientError, Daemon};
use iohost_device_models::edu::{Edu, Timing};
use iohost_device_models::{DeviceServer, Function, Stopper};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::{Campaign, CampaignError, PATIENCE};

/// All that a campaign has started. Gone when it is dropped.
pub(crate) struct Machine {
    folder: TempDir,
    iohost: PathBuf,
    daemon: Mutex<Child>,
    /// Held shared while a driver is away: its sessions, which the daemon alone has then, would be lost
    /// with it.
    takeover: RwLock<()>,
    devices: Vec<Device>,
}

/// An emulated device at a socket, in this process.
pub(crate) struct Device {
    pub(crate) function: Arc<Function<Edu>>,
    pub(crate) role: Role,
    stopper: Stopper,
}

/// Which driver a device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The one that the campaign is against.
    OnTrial,
    /// The probe, which fails from within when it is asked to.
    Probe,
    /// The probe without a sandbox, which would keep it from memory that it shares.
    FreeProbe,
}

impl Role {
    /// Of all devices.
    fn all(campaign: &Campaign) -> Vec<Self> {
        let mut roles = vec![Self::OnTrial; campaign.devices];
        roles.extend([Self::Probe, Self::FreeProbe]);
        roles
    }

    fn configuration(self, campaign: &Campaign) -> String {
        match self {
            Self::OnTrial => format!("driver = {:?}\n", campaign.driver),
            Self::Probe => format!("driver = {PROBE:?}\nmemory = {PROBE_BYTES}\n"),
            Self::FreeProbe => format!("driver = {PROBE:?}\nsandbox = \"off\"\n"),
        }
    }
}

/// The driver that fails when it is asked to.
pub const PROBE: &str = "probe";

/// What it may have of memory, so that it soon leaks all of it.
const PROBE_BYTES: u64 = 128 << 20;

/// The daemon did not live to the end.
pub(crate) struct Gone;

/// What processes have, to compare before and after.
#[derive(Clone, Debug, Default)]
pub(crate) struct Belongings {
    pub(crate) daemon: Held,
    /// Of all driver hosts.
    pub(crate) hosts: Held,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    /// How many there are of what: `socket`, `/memfd:queue`, `anon_inode`.
    pub(crate) descriptors: BTreeMap<String, u64>,
    pub(crate) threads: u64,
    pub(crate) resident_bytes: u64,
}

impl Machine {
    pub(crate) fn start(campaign: &Campaign) -> Result<Self, CampaignError> {
        let folder = tempfile::Builder::new().prefix("iohost-faults").tempdir();
        let folder = folder.map_err(|err| setup("no folder for temporary files", err))?;
        let roles = Role::all(campaign);
        let devices = (0..)
            .zip(&roles)
            .map(|(number, role)| Device::serve(&folder.path().join(service(number)), *role))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|err| setup("no emulated device", err))?;
        let mut config = format!(
            "runtime_directory = {:?}\nstate_directory = {:?}\ndriver_directory = {:?}\n\
             restart = {{ most = 1000000000, pause_seconds = 0 }}\n\
             limits = {{ requests_per_second = 1000000, sessions_per_client = 10000, \
             connections_per_client = 10000, memory_per_client = 1099511627776 }}\n",
            folder.path().join("run"),
            folder.path().join("state"),
            campaign.driver_directory,
        );
        for (number, role) in (0..).zip(&roles) {
            let name = service(number);
            let socket = folder.path().join(&name);
            config += &format!("[[device]]\nname = {name:?}\nsocket = {socket:?}\n");
            config += &role.configuration(campaign);
        }
        fs::write(folder.path().join(CONFIG), config)
            .map_err(|err| setup("no configuration", err))?;
        let iohost = campaign.iohost.clone();
        let daemon = Mutex::new(start_daemon(&iohost, folder.path())?);
        let machine = Self { folder, iohost, daemon, takeover: RwLock::default(), devices };
        machine.wait("the daemon", || UnixStream::connect(machine.control()).is_ok())?;
        for number in 0..machine.devices.len() {
            machine.wait_until_ready(&service(number))?;
        }
        Ok(machine)
    }

    /// Kills the daemon, and waits for the next one to have all drivers running. Whether they are the
    /// same processes.
    pub(crate) fn replace_daemon(&self) -> Result<bool, CampaignError> {
        let _alone = self.takeover.write().expect(NO_PANIC);
        let before = self.hosts("all drivers")?;
        let mut daemon = self.daemon.lock().expect(NO_PANIC);
        if !matches!(daemon.try_wait(), Ok(None)) {
            // That was not us, and is found out by whoever looks.
            return Ok(true);
        }
        let _ = daemon.kill();
        let _ = daemon.wait();
        *daemon = start_daemon(&self.iohost, self.folder.path())?;
        Ok(before == self.hosts("the drivers of the next daemon")?)
    }

    /// The processes of all driver hosts, once all run.
    fn hosts(&self, what: &str) -> Result<Vec<u32>, CampaignError> {
        let mut hosts = None;
        self.wait(what, || {
            let status = self.connect().ok().and_then(|mut daemon| daemon.status().ok());
            let running = |service: Service| match service.state {
                State::Running => service.pid,
                _ => None,
            };
            hosts = status.and_then(|it| it.services.into_iter().map(running).collect());
            hosts.is_some()
        })?;
        Ok(hosts.unwrap_or_default())
    }

    /// While what this returns is held, the daemon is not killed by us.
    pub(crate) fn with_daemon(&self) -> RwLockReadGuard<'_, ()> {
        self.takeover.read().expect(NO_PANIC)
    }

    /// All devices: their number is their place.
    pub(crate) fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The daemon's control socket.
    pub(crate) fn control(&self) -> PathBuf {
        self.folder.path().join("run/io.iohost")
    }

    pub(crate) fn connect(&self) -> Result<Daemon, CampaignError> {
        Daemon::connect(self.control()).map_err(|err| daemon("connecting", err))
    }

    /// A service as `status` shows it.
    pub(crate) fn service(&self, name: &str) -> Result<Service, CampaignError> {
        let status =
            self.connect()?.status().map_err(|err| daemon("asking for its status", err))?;
        let found = status.services.into_iter().find(|service| service.name == name);
        found.ok_or_else(|| self.silence(format!("service {name}, which is not there")))
    }

    fn wait_until_ready(&self, name: &str) -> Result<(), CampaignError> {
        self.wait(&format!("the driver of {name}"), || {
            self.connect()
                .and_then(|mut daemon| {
                    daemon.bind(name).map_err(|err| self::daemon("starting a driver", err))
                })
                .is_ok()
        })
    }

    /// Waits until something is so.
    pub(crate) fn wait(
        &self,
        what: &str,
        mut is_so: impl FnMut() -> bool,
    ) -> Result<(), CampaignError> {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            if Instant::now() >= deadline {
                return Err(self.silence(what.to_owned()));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Says that something did not come to pass, and keeps the log.
    fn silence(&self, what: String) -> CampaignError {
        let kept = std::env::temp_dir().join(format!("iohost-faults-{}.log", std::process::id()));
        // Without it the error says less, and is one all the same.
        let _ = fs::copy(self.folder.path().join(LOG), &kept);
        CampaignError::Silence { what, log: kept }
    }

    /// What the daemon and the driver hosts have now.
    pub(crate) fn belongings(&self) -> Result<Belongings, CampaignError> {
        let pid = self.daemon.lock().expect(NO_PANIC).id();
        // Open until all is counted: the daemon closes its end a little after we close ours.
        let mut connection = self.connect()?;
        let status = connection.status().map_err(|err| daemon("asking for its status", err))?;
        let mut hosts = Held::default();
        for pid in status.services.iter().filter_map(|service| service.pid) {
            let held = Held::of(pid).map_err(|err| setup("no account of a driver host", err))?;
            for (what, count) in held.descriptors {
                *hosts.descriptors.entry(what).or_default() += count;
            }
            hosts.threads += held.threads;
            hosts.resident_bytes += held.resident_bytes;
        }
        let daemon = Held::of(pid).map_err(|err| setup("no account of the daemon", err))?;
        Ok(Belongings { daemon, hosts })
    }

    pub(crate) fn is_alive(&self) -> bool {
        matches!(self.daemon.lock().expect(NO_PANIC).try_wait(), Ok(None))
    }

    /// Ends the daemon as an operator does.
    pub(crate) fn stop(self) -> Result<(), Gone> {
        let mut daemon = self.daemon.lock().expect(NO_PANIC);
        if !matches!(daemon.try_wait(), Ok(None)) {
            return Err(Gone);
        }
        terminate(&daemon);
        match daemon.wait() {
            Ok(status) if status.success() => Ok(()),
            _ => Err(Gone),
        }
    }
}

/// The daemon's configuration, in the folder.
const CONFIG: &str = "iohost.toml";

/// The log of all daemons, in the folder.
const LOG: &str = "daemon.log";

/// Why the lock is never poisoned.
const NO_PANIC: &str = "nothing panics under this lock";

impl Drop for Machine {
    fn drop(&mut self) {
        if let Ok(daemon) = self.daemon.get_mut()
            && matches!(daemon.try_wait(), Ok(None))
        {
            terminate(daemon);
            let _ = daemon.wait();
        }
    }
}

fn start_daemon(iohost: &Path, folder: &Path) -> Result<Child, CampaignError> {
    let log = File::options().create(true).append(true).open(folder.join(LOG));
    Command::new(iohost)
        .args(["daemon", "--config"])
        .arg(folder.join(CONFIG))
        .stderr(log.map_err(|err| setup("no log", err))?)
        // A signal of the terminal's is for the campaign, which ends its daemon by itself.
        .process_group(0)
        .spawn()
        .map_err(|err| setup("no daemon", err))
}

fn terminate(daemon: &Child) {
    // It is ours and was not waited for, so the number is still its own.
    let _ = kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM);
}

/// The name of a device's service.
pub(crate) fn service(number: usize) -> String {
    format!("device{number}")
}

fn setup(what: &str, source: io::Error) -> CampaignError {
    CampaignError::Setup { what: what.to_owned(), source }
}

pub(crate) fn daemon(when: &str, source: ClientError) -> CampaignError {
    CampaignError::Daemon { when: when.to_owned(), source: Box::new(source) }
}

impl Device {
    fn serve(socket: &Path, role: Role) -> io::Result<Self> {
        let server = DeviceServer::bind(socket).map_err(io::Error::other)?;
        let stopper = server.stopper();
        let function = Arc::new(Function::new(Edu::new(Timing::Real { dma: Duration::ZERO })));
        let served = function.clone();
        thread::Builder::new().name("device".to_owned()).spawn(move || server.run(&served))?;
        Ok(Self { function, role, stopper })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stopper.stop();
    }
}

impl Held {
    fn of(pid: u32) -> io::Result<Self> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let mut descriptors = BTreeMap::new();
        for descriptor in fs::read_dir(process.join("fd"))? {
            // One that is closed meanwhile is not held.
            let Ok(target) = fs::read_link(descriptor?.path()) else { continue };
            let target = target.display().to_string();
            // "socket:[1234]", "anon_inode:[eventfd]".
            let what = match target.split_once(":[") {
                Some(("anon_inode", kind)) => kind.trim_end_matches(']').to_owned(),
                Some((kind, _number)) => kind.to_owned(),
                None => target,
            };
            *descriptors.entry(what).or_default() += 1;
        }
        let status = fs::read_to_string(process.join("status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = resident.and_then(|line| line.split_whitespace().next()?.parse().ok());
        Ok(Self {
            descriptors,
            threads: fs::read_dir(process.join("task"))?.count() as u64,
            resident_bytes: 1024 * kib.unwrap_or(0),
        })
    }
}
