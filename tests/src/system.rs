//! An emulated device, a daemon and what belongs to them, as processes in a folder of their own.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use iohost_client::Daemon;
use iohost_client::varlink::Service;
use iohost_event::Packets;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long anything may take before a test gives up on it. Nothing here measures time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon with its configuration. Everything it started is gone when it is dropped.
pub struct System {
    folder: TempDir,
    daemon: Option<Child>,
}

/// An emulated device, in a process of its own.
pub struct Emulated {
    process: Child,
    socket: PathBuf,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; `None` for a signal.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl System {
    /// A folder for a system; nothing runs yet. It has an empty folder for plugins.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder for temporary files");
        fs::create_dir(folder.path().join("drivers")).expect("an empty folder");
        Self { folder, daemon: None }
    }

    /// A daemon with the `edu` driver on one emulated device, as service `edu0`, ready.
    pub fn with_edu() -> (Self, Emulated) {
        Self::with_driver("edu")
    }

    /// As [`with_edu`](Self::with_edu), with another driver for the same device.
    pub fn with_driver(driver: &str) -> (Self, Emulated) {
        let mut system = Self::new();
        let device = system.start_edu_device("edu0");
        system.install_driver(driver);
        system.start(&system.device_config("edu0", driver));
        system.await_ready("edu0");
        (system, device)
    }

    /// A path in the system's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The daemon's control socket.
    pub fn socket(&self) -> PathBuf {
        self.path("run/io.iohost")
    }

    /// The lines of a configuration for an emulated `edu`.
    pub fn edu_config(&self, name: &str) -> String {
        self.device_config(name, "edu")
    }

    /// The lines of a configuration for an emulated `edu` with some driver.
    pub fn device_config(&self, name: &str, driver: &str) -> String {
        let socket = self.path(name);
        format!("[[device]]\nname = {name:?}\nsocket = {socket:?}\ndriver = {driver:?}\n")
    }

    /// Starts an emulated device whose DMA takes no time. Its socket has its name.
    pub fn start_edu_device(&self, name: &str) -> Emulated {
        self.start_device("iohost-edu-device", name, &["--dma-latency-ms", "0"])
    }

    /// Starts an emulated NVMe controller with these namespaces, as its program takes them.
    pub fn start_nvme_device(&self, name: &str, namespaces: &[&str]) -> Emulated {
        let arguments: Vec<_> =
            namespaces.iter().flat_map(|namespace| ["--namespace", *namespace]).collect();
        self.start_device("iohost-nvme-device", name, &arguments)
    }

    fn start_device(&self, program_name: &str, name: &str, arguments: &[&str]) -> Emulated {
        let socket = self.path(name);
        let process = program(program_name)
            .args(arguments)
            .arg("--socket")
            .arg(&socket)
            .stderr(self.log(name))
            .spawn()
            .expect("starting the emulated device");
        eventually("the device's socket", || is_socket(&socket));
        Emulated { process, socket }
    }

    /// Puts the `edu` plugin where the daemon looks for plugins.
    pub fn install_edu_driver(&self) {
        self.install_driver("edu");
    }

    /// Puts a plugin where the daemon looks for plugins.
    pub fn install_driver(&self, name: &str) {
        let file = format!("lib{name}.so");
        let installed = self.path("drivers").join(&file);
        fs::copy(binary(&file), installed).expect("copying the plugin");
    }

    /// Starts the daemon and waits for its socket. `config` comes after the folders.
    pub fn start(&mut self, config: &str) {
        let daemon = self.daemon_command(config).stderr(self.log("daemon")).spawn();
        self.daemon = Some(daemon.expect("starting the daemon"));
        let socket = self.socket();
        // The file is there before anybody listens on it.
        eventually("the daemon to listen", || UnixStream::connect(&socket).is_ok());
    }

    /// Runs a daemon that is expected to refuse.
    pub fn start_refused(&self, config: &str) -> Ended {
        ended(self.daemon_command(config).output().expect("running the daemon"))
    }

    /// Kills the daemon, and nothing else.
    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        signal(&daemon, Signal::SIGKILL);
        await_end(&mut daemon);
    }

    /// The driver hosts that daemons have noted, and not seen end.
    pub fn noted_hosts(&self) -> Vec<u32> {
        let Ok(entries) = fs::read_dir(self.path("run/hosts")) else { return Vec::new() };
        let texts = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
        let pid = |text: String| {
            let digits = text.split("\"pid\":").nth(1)?.split(',').next()?;
            digits.parse().ok()
        };
        texts.filter_map(pid).collect()
    }

    fn daemon_command(&self, config: &str) -> Command {
        let (run, drivers) = (self.path("run"), self.path("drivers"));
        let path = self.path("iohost.toml");
        let folders = format!("runtime_directory = {run:?}\ndriver_directory = {drivers:?}\n");
        fs::write(&path, folders + config).expect("writing the configuration");
        let mut command = program("iohost");
        command.args(["daemon", "--config"]).arg(path);
        command
    }

    /// Runs `iohost` as a client of this daemon.
    pub fn iohost(&self, arguments: &[&str]) -> Ended {
        let mut command = program("iohost");
        command.arg("--runtime-dir").arg(self.path("run")).args(arguments);
        ended(command.output().expect("running iohost"))
    }

    /// Starts `iohost` as a client that goes on; whoever starts it ends it.
    pub fn start_iohost(&self, arguments: &[&str]) -> Child {
        let mut command = program("iohost");
        command.arg("--runtime-dir").arg(self.path("run")).args(arguments);
        command.spawn().expect("starting iohost")
    }

    /// A connection to the daemon.
    pub fn connect(&self) -> Daemon {
        Daemon::connect(self.socket()).expect("the daemon listens")
    }

    /// A session as bare descriptors: its socket, then memory and two eventfds per queue.
    pub fn open_raw(&self, service: &str) -> (Packets, Vec<OwnedFd>) {
        let stream = UnixStream::connect(self.socket()).expect("the daemon listens");
        let request = format!(
            "{{\"method\":\"io.iohost.Open\",\"parameters\":{{\"service\":{service:?}}}}}\0"
        );
        (&stream).write_all(request.as_bytes()).expect("the daemon reads");
        let socket = Packets::from(OwnedFd::from(stream));
        let mut reply = vec![0; 65536];
        let packet = socket.receive(&mut reply, 16).expect("the daemon answers");
        let text = String::from_utf8_lossy(&reply[..packet.len]);
        let mut fds = packet.fds.into_iter();
        let session = fds.next().unwrap_or_else(|| panic!("no session: {text}"));
        (Packets::from(session), fds.collect())
    }

    /// A service, as `status` shows it.
    pub fn service(&self, name: &str) -> Service {
        let status = self.connect().status().expect("the daemon answers");
        let service = status.services.into_iter().find(|service| service.name == name);
        service.unwrap_or_else(|| panic!("no service {name}"))
    }

    /// Waits until a service runs, and gives its process.
    pub fn await_ready(&self, name: &str) -> u32 {
        eventually("the driver to run", || format!("{:?}", self.service(name).state) == "Running");
        self.service(name).pid.expect("a driver that runs has a process")
    }

    /// Waits until a service runs that has had so many driver hosts, and gives its process.
    pub fn await_ready_again(&self, name: &str, incarnation: u64) -> u32 {
        eventually("the next driver host", || self.service(name).incarnation == incarnation);
        self.await_ready(name)
    }

    /// What the daemon and its driver hosts logged.
    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.path("daemon.log")).expect("the daemon's log")
    }

    /// Stops the daemon as an operator does, and gives its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        signal(&daemon, Signal::SIGTERM);
        await_end(&mut daemon).code()
    }

    fn log(&self, name: &str) -> Stdio {
        let log = self.path(&format!("{name}.log"));
        File::options().append(true).create(true).open(log).expect("a log file").into()
    }
}

impl Default for System {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            signal(daemon, Signal::SIGTERM);
            await_end(daemon);
            let log = self.daemon_log();
            if std::thread::panicking() {
                eprintln!("the daemon's log:\n{log}");
            } else {
                assert_no_panic_of_ours(&log);
            }
        }
        // Those that wait for a daemon that does not come.
        for pid in self.noted_hosts() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
    }
}

impl Emulated {
    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits until something is so. Panics, with what it waited for, when it never is.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Plugins may panic, as their tests want it; the daemon and its driver hosts never do.
fn assert_no_panic_of_ours(log: &str) {
    let is_ours = |line: &&str| {
        let place = line.split_once("' panicked at ").or_else(|| line.split_once(") panicked at "));
        let of_a_plugin = |place: &str| {
            ["drivers/", "tests/hostile_plugin/"].iter().any(|folder| place.contains(folder))
        };
        place.is_some_and(|(_, place)| !of_a_plugin(place))
    };
    if let Some(line) = log.lines().find(is_ours) {
        panic!("{line}\nthe daemon's log:\n{log}");
    }
}

fn await_end(process: &mut Child) -> ExitStatus {
    let mut status = None;
    eventually("a process to end", || {
        status = process.try_wait().expect("our own child");
        status.is_some()
    });
    status.expect("it has ended")
}

fn signal(process: &Child, signal: Signal) {
    let _ = kill(Pid::from_raw(process.id() as i32), signal);
}

fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

fn ended(output: Output) -> Ended {
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A program that cargo built, to be started.
pub fn program(name: &str) -> Command {
    Command::new(binary(name))
}

/// Copies a program or script to where it is to be started from.
///
/// The copy is written by another process: a child that another test starts meanwhile could hold a
/// file of ours open for writing, and a program that is open so is not run (ETXTBSY).
pub fn copy_program(source: &Path, target: &Path) {
    let copied = Command::new("install").arg(source).arg(target).status().unwrap();
    assert!(copied.success(), "{copied}");
}

/// A file that cargo built beside this test, after seeing to it that it is built.
fn binary(name: &str) -> PathBuf {
    built_files().join(name)
}

/// Where the programs, plugins and libraries are that cargo built, after seeing to it that they are
/// built.
pub fn built_files() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let test = std::env::current_exe().expect("a program is a file");
        let folder = test.parent().expect("target/PROFILE/deps/test, or target/PROFILE/program");
        let folder =
            if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet"]);
        for package in PACKAGES {
            build.args(["-p", package]);
        }
        if folder.ends_with("release") {
            build.arg("--release");
        }
        let built = build.current_dir(env!("CARGO_MANIFEST_DIR")).status();
        assert!(built.expect("cargo runs").success(), "the programs do not build");
        folder.to_owned()
    });
    folder.clone()
}

/// The packages that whole-system tests need files of.
const PACKAGES: [&str; 8] = [
    "iohost",
    "iohost_driver_host",
    "iohost_device_models",
    "iohost_client_c",
    "edu",
    "probe",
    "hostile_plugin",
    "nvme",
];

#[cfg(test)]
mod tests {
    use super::assert_no_panic_of_ours;

    #[test]
    fn a_plugin_may_panic() {
        assert_no_panic_of_ours("thread 'Default' (7) panicked at drivers/probe/src/lib.rs:1:2:");
    }

    #[test]
    #[should_panic(expected = "host/supervisor/src/actor.rs:1:2")]
    fn the_daemon_may_not() {
        assert_no_panic_of_ours(
            "fine\nthread 'a' (7) panicked at host/supervisor/src/actor.rs:1:2:",
        );
    }
}
