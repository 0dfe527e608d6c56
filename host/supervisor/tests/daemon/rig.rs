//! A daemon in a directory of its own.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use iohost_client::Daemon;
use iohost_client::varlink::Service;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use tempfile::TempDir;

/// After this a test that waits has failed; nothing in a test takes this long.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(60);

pub(crate) struct Rig {
    directory: Option<TempDir>,
    path: PathBuf,
    daemon: Child,
    lines: Receiver<String>,
}

impl Rig {
    /// A daemon with one device per script, each named as its script is.
    pub(crate) fn start(scripts: &[&str]) -> Self {
        // A script called `error-…` or `isolate-…` is a device with that policy.
        let device = |script: &&str| {
            let mut text = format!(
                "[[device]]\nname = {script:?}\nsocket = \"/{script}\"\ndriver = {script:?}\n"
            );
            let policy = script.strip_prefix("error-");
            let policy = policy.or(script.starts_with("isolate-").then_some("isolate"));
            if let Some(policy) = policy {
                text += &format!("on_error = {policy:?}\n");
            }
            text
        };
        let config: String = scripts.iter().map(device).collect();
        let directory = directory(&config);
        for script in scripts {
            let plugin = directory.path().join("drivers").join(script).with_extension("so");
            std::fs::write(plugin, "").unwrap();
        }
        let mut rig = Self::run(directory);
        rig.wait_for("daemon started");
        rig
    }

    /// A daemon without plugins, which may not get far.
    pub(crate) fn with_config(config: &str) -> Self {
        Self::run(directory(config))
    }

    /// Another daemon in the same directory.
    pub(crate) fn second_daemon(&self) -> Self {
        let (daemon, lines) = spawn(&self.path);
        Self { directory: None, path: self.path.clone(), daemon, lines }
    }

    /// Kills the daemon, and everything that `also` does to what it leaves; then starts another one.
    pub(crate) fn replace_daemon(&mut self, also: impl FnOnce(&Self)) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
        also(self);
        self.start_daemon();
    }

    /// Starts another daemon in the place of one that has ended.
    pub(crate) fn start_daemon(&mut self) {
        (self.daemon, self.lines) = spawn(&self.path);
        self.wait_for("daemon started");
    }

    /// The driver hosts that daemons have noted, and not seen end.
    pub(crate) fn noted_hosts(&self) -> Vec<u32> {
        let Ok(entries) = std::fs::read_dir(self.path("run/hosts")) else { return Vec::new() };
        let records = entries.filter_map(|entry| std::fs::read(entry.ok()?.path()).ok());
        let pid = |text: Vec<u8>| {
            let record: serde_json::Value = serde_json::from_slice(&text).ok()?;
            record["pid"].as_u64()?.try_into().ok()
        };
        records.filter_map(pid).collect()
    }

    fn run(directory: TempDir) -> Self {
        let path = directory.path().to_owned();
        let (daemon, lines) = spawn(&path);
        Self { directory: Some(directory), path, daemon, lines }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("run/io.iohost")
    }

    pub(crate) fn connect(&self) -> Daemon {
        Daemon::connect(self.socket()).unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// Waits until the daemon says something, in a line that no earlier wait has passed.
    pub(crate) fn wait_for(&mut self, words: &str) {
        let mut said = Vec::new();
        loop {
            match self.lines.recv_timeout(WATCHDOG) {
                Ok(line) if line.contains(words) => return,
                Ok(line) => said.push(line),
                Err(err) => panic!("{words:?} was not said ({err}), but:\n{}", said.join("\n")),
            }
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.daemon.id(), signal);
    }

    pub(crate) fn exit_code(&mut self) -> i32 {
        self.daemon.wait().unwrap().code().unwrap()
    }

    /// A function in the daemon's sysfs, behind no IOMMU.
    pub(crate) fn add_pci(&self, address: &str, vendor: &str, device: &str) {
        let directory = self.path("sys/bus/pci/devices").join(address);
        std::fs::create_dir_all(&directory).unwrap();
        for (name, text) in [
            ("vendor", vendor),
            ("device", device),
            ("subsystem_vendor", "0x1af4"),
            ("subsystem_device", "0x1100"),
            ("class", "0x00ff00"),
            ("revision", "0x10"),
            ("driver_override", "(null)"),
        ] {
            std::fs::write(directory.join(name), format!("{text}\n")).unwrap();
        }
    }

    /// A function with the ids of `edu`, alone in its IOMMU group and bound for VFIO already.
    pub(crate) fn add_edu(&self, address: &str) {
        self.add_pci(address, "0x1234", "0x11e8");
        let device = self.path("sys/bus/pci/devices").join(address);
        let driver = self.path("sys/bus/pci/drivers/vfio-pci");
        let group = self.path("sys/kernel/iommu_groups").join(&address[5..7]);
        for folder in [&driver, &group.join("devices")] {
            std::fs::create_dir_all(folder).unwrap();
        }
        symlink(&group, device.join("iommu_group")).unwrap();
        symlink(&device, group.join("devices").join(address)).unwrap();
        symlink(driver, device.join("driver")).unwrap();
        std::fs::write(device.join("driver_override"), "vfio-pci\n").unwrap();
    }

    /// Announces a function as the kernel does.
    pub(crate) fn announce(&self, action: &str, address: &str, more: &str) {
        let text = format!(
            "{action}@/devices/{address}\0ACTION={action}\0SUBSYSTEM=pci\0\
             PCI_SLOT_NAME={address}\0{more}"
        );
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        socket.send_to(text.as_bytes(), self.path("sys/uevents")).unwrap();
    }

    /// Puts a plugin of that name where the daemon looks for them.
    pub(crate) fn install(&self, name: &str) {
        std::fs::write(self.path("drivers").join(name).with_extension("so"), "").unwrap();
    }

    /// Writes the configuration anew, behind its folders.
    pub(crate) fn configure(&self, config: &str) {
        std::fs::write(self.path("iohost.toml"), folders(&self.path) + config).unwrap();
    }

    /// The line of the configuration in which the text of `configure` begins.
    pub(crate) const FIRST_LINE: usize = 4;

    /// A service, as `status` shows it.
    pub(crate) fn service(&self, name: &str) -> Option<Service> {
        let services = self.connect().status().unwrap().services;
        services.into_iter().find(|service| service.name == name)
    }

    /// Puts a function alone into an IOMMU group, and under a driver that lets go of it only when
    /// somebody reads the path that this returns.
    pub(crate) fn give_to_slow_driver(&self, address: &str) -> PathBuf {
        let device = self.path("sys/bus/pci/devices").join(address);
        let drivers = self.path("sys/bus/pci/drivers");
        let group = self.path("sys/kernel/iommu_groups/3");
        for folder in [&drivers.join("slow"), &drivers.join("vfio-pci"), &group.join("devices")] {
            std::fs::create_dir_all(folder).unwrap();
        }
        symlink(&group, device.join("iommu_group")).unwrap();
        symlink(&device, group.join("devices").join(address)).unwrap();
        symlink(drivers.join("slow"), device.join("driver")).unwrap();
        std::fs::write(self.path("sys/bus/pci/drivers_probe"), "").unwrap();
        let unbind = drivers.join("slow/unbind");
        // Whoever opens a pipe for writing waits for a reader.
        mkfifo(&unbind, Mode::S_IRWXU).unwrap();
        unbind
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        if self.directory.is_some() {
            // Those that wait for the next daemon.
            for pid in self.noted_hosts() {
                let _ = nix::sys::signal::kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
        }
        drop(self.directory.take());
    }
}

pub(crate) fn kill(pid: u32, signal: Signal) {
    nix::sys::signal::kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

fn directory(config: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for name in ["drivers", "sys/bus/pci/devices"] {
        std::fs::create_dir_all(directory.path().join(name)).unwrap();
    }
    let text = folders(directory.path()) + config;
    std::fs::write(directory.path().join("iohost.toml"), text).unwrap();
    directory
}

fn folders(directory: &Path) -> String {
    let path = directory.display();
    format!(
        "driver_directory = \"{path}/drivers\"\nruntime_directory = \"{path}/run\"\n\
         state_directory = \"{path}/state\"\n"
    )
}

fn spawn(directory: &Path) -> (Child, Receiver<String>) {
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_scripted-driver-host"))
        .arg("daemon")
        .arg(directory.join("iohost.toml"))
        .env_remove("JOURNAL_STREAM")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = BufReader::new(daemon.stderr.take().unwrap());
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            // Nobody listens any more once the test is over.
            let _ = sender.send(line);
        }
    });
    (daemon, lines)
}
