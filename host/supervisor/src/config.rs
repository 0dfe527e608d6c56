//! The configuration file.
//!
//! ```toml
//! driver_directory = "/usr/lib/iohost/drivers"
//! runtime_directory = "/run/iohost"
//! state_directory = "/var/lib/iohost"  # how to give back what was taken; one for all daemons
//! sandbox = "on"                  # of driver hosts: "off"; "on"; "required" (all of it, or the driver is
//!                                 # not started); "strict" (and a refused system call is its end)
//! admin_users = ["root"]          # who may bind, unbind and upgrade, beside root and the daemon's user
//! admin_groups = []
//!
//! [limits]
//! sessions_per_service = 16       # at the same time
//! queue_bytes = 1048576           # of a queue, where the client does not say
//! largest_queue_bytes = 67108864  # the most a client may ask for
//! sessions_per_client = 16        # of one process, with all services
//! memory_per_client = 268435456   # bytes of the queues of those sessions
//! connections_per_client = 64
//! requests_per_second = 1000      # of one process
//!
//! [restart]                       # all of it may be left out; a device can have its own
//! most = 5                        # restarts within the window; one death more is quarantine
//! window_seconds = 1800
//! pause_seconds = 1               # before the second restart (the first is at once), then doubled
//! longest_pause_seconds = 30
//! hang_seconds = 2                # work of a driver without a sign of life; 0 for never
//! hang_cap_seconds = 60           # the same, however much progress it reports
//! # hook = "/usr/local/bin/told"  # run at each death: docs/supervision.md
//! hook_seconds = 10               # then it is killed
//!
//! [[device]]
//! address = "0000:01:00.0"        # a PCI function
//! driver = "edu"                  # without it: the plugin whose match table fits best; if that one
//!                                 # does not start, the next best
//! # category = "diagnosis"        # only plugins of that category; without it: of the one without a name
//! # disabled = true               # leave the device alone, whatever else says it may be taken
//! interrupts = ["intx"]           # without it: whatever the device has
//! bind = true                     # take it from its kernel driver; give it back at the end
//! on_error = "reset"              # at an error of the device: "notify" (only its driver and the log),
//!                                 # "reset" (and start again), "isolate" (stop it); without it: notify
//! allow_users = ["root", 1000]    # who may open it, by name or number, beside root and the daemon's
//! allow_groups = []               # user; without both: whoever may connect to the control socket
//! # sandbox = "off"               # instead of the one for all
//! # user = "nobody"               # of its driver host; without it: a number that nobody else has
//! # memory = 1073741824           # bytes its driver host may have, and of each memory file
//! # backend = "vfio-group"        # force one; without it: vfio-cdev, or else vfio-group
//! # allow_unsafe = true           # what backends without an IOMMU need: vfio-no-iommu, uio
//!
//! [[device]]
//! name = "edu0"
//! socket = "/run/edu.sock"        # a device behind a vfio-user server
//! driver = "edu"                  # has to be named: the device says what it is too late
//! restart = { most = 0 }          # for this device alone; the keys of the table above
//!
//! [[match]]                       # PCI functions that iohost may take when it finds them, or when
//!                                 # they appear; none that the machine uses, and no [[device]]
//! primary = "0x11e81234"          # device and vendor; alternatives with spaces between them, each
//!                                 # under a mask if need be: "0x00001234&0x0000ffff"
//! # secondary = "0x11001af4"      # those of the board
//! # ids = "0x11e81234"            # either of the two
//! # class = "0x00ff0000"          # class in the upper 24 bits, revision in the rest
//! # driver, category, interrupts, on_error, backend and allow_unsafe as for a device
//! ```
//!
//! Each key of a `[[match]]` that is there has to agree. `iohost reload` and SIGHUP have the daemon
//! read the file again: what it says anew of a device restarts that device's driver, and no other.
//!
//! A mistake is reported with file, line and key, before anything is touched.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use iohost_control::host::{DeviceLocation, InterruptChoice, PciBackend};
use iohost_control::plugin::{Alternatives, PciMatch};
use iohost_pci::{Binding, PciAddress};
use nix::unistd::{Group, User};
use serde::Deserialize;
use toml::Spanned;

use crate::access::Allowed;
use crate::restart::{RestartChoices, RestartPolicy};

/// Where the configuration is unless a flag says otherwise.
pub const DEFAULT_CONFIG: &str = "/etc/iohost/iohost.toml";
/// Where plugins are unless flag or configuration say otherwise.
pub const DEFAULT_DRIVER_DIRECTORY: &str = "/usr/lib/iohost/drivers";
/// Where the control socket is unless flag or configuration say otherwise.
pub const DEFAULT_RUNTIME_DIRECTORY: &str = "/run/iohost";
/// Where it is noted how to give back what was taken, unless the configuration says otherwise.
pub const DEFAULT_STATE_DIRECTORY: &str = "/var/lib/iohost";

/// What the configuration says, checked as far as a file can be.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where the plugins are.
    pub driver_directory: PathBuf,
    /// Where the control socket is made.
    pub runtime_directory: PathBuf,
    /// Where it is noted how to give back what was taken.
    pub state_directory: PathBuf,
    /// What clients may ask for.
    pub limits: Limits,
    /// When drivers are started again.
    pub restart: RestartChoices,
    /// What driver hosts give up, where their device does not say.
    pub sandbox: SandboxMode,
    /// Who may bind, unbind and upgrade, beside root and the daemon's user.
    pub admins: Allowed,
    /// The devices, in the order of the file; names and locations are unique.
    pub devices: Vec<DeviceConfig>,
    /// What may be taken wherever it is, in the order of the file: the first that agrees counts.
    pub matches: Vec<MatchRule>,
}

/// PCI functions that may be taken wherever they are.
#[derive(Clone, Debug, PartialEq)]
pub struct MatchRule {
    /// Which ones.
    pub wanted: PciMatch,
    /// How each is driven, with another name and location.
    pattern: DeviceConfig,
}

impl MatchRule {
    /// The function at an address, as this rule has it driven.
    pub(crate) fn device(&self, address: PciAddress) -> DeviceConfig {
        let location = Location::Pci(address);
        DeviceConfig { name: location.to_string(), location, ..self.pattern.clone() }
    }

    /// The driver that it names, and the line of the rule.
    pub(crate) fn driver(&self) -> Option<(&str, usize)> {
        self.pattern.driver.as_deref().map(|driver| (driver, self.pattern.line))
    }
}

/// What clients may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Sessions of one service at the same time.
    pub sessions_per_service: usize,
    /// Bytes of a queue, where the client does not say.
    pub queue_bytes: u32,
    /// The most bytes of a queue that a client may ask for.
    pub largest_queue_bytes: u32,
    /// Sessions of one process with all services.
    pub sessions_per_client: usize,
    /// Bytes of the queues of these sessions.
    pub memory_per_client: u64,
    /// Connections of one process.
    pub connections_per_client: usize,
    /// Requests of one process, on all its connections.
    pub requests_per_second: u32,
}

/// What a driver host gives up before it loads its plugin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxMode {
    /// Nothing: the driver has the daemon's rights.
    Off,
    /// What the kernel can take.
    #[default]
    On,
    /// Everything, or the driver does not start.
    Required,
    /// As `Required`, and a refused system call is the end of the driver host.
    Strict,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions_per_service: 16,
            queue_bytes: 1024 * 1024,
            largest_queue_bytes: 64 * 1024 * 1024,
            sessions_per_client: 16,
            memory_per_client: 256 * 1024 * 1024,
            connections_per_client: 64,
            requests_per_second: 1000,
        }
    }
}

/// One device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceConfig {
    /// The service's name.
    pub name: String,
    /// Where the device is.
    pub location: Location,
    /// The driver, where it is named.
    pub driver: Option<String>,
    /// The kinds of interrupt the driver may use; empty for all.
    pub interrupts: Vec<InterruptChoice>,
    /// Whether iohost may take the device from its kernel driver.
    pub bind: bool,
    /// How a PCI function is to be reached; `None` for the best way that VFIO has.
    pub backend: Option<PciBackend>,
    /// What to do about an error that the device reports.
    pub on_error: ErrorPolicy,
    /// The category of drivers that compete for it; most have the one without a name.
    pub category: String,
    /// Whether it is to be left alone, unless somebody asks for it.
    pub is_disabled: bool,
    /// When its driver is started again, where that is another answer than for all.
    pub restart: RestartChoices,
    /// Who may open the service; `None` for whoever may connect.
    pub clients: Option<Allowed>,
    /// What its driver host gives up; `None` for what all do.
    pub sandbox: Option<SandboxMode>,
    /// User and group of its driver host, by number; `None` for a user of its own.
    pub user: Option<(u32, u32)>,
    /// Bytes of private memory of its driver host, and of each memory file.
    pub memory: u64,
    /// The line of the entry.
    pub line: usize,
}

/// What to do about an error that a device reports and has not corrected itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorPolicy {
    /// Tell the driver and the log.
    #[default]
    Notify,
    /// Stop the driver, reset the device, start it again.
    Reset,
    /// Stop the driver, reset the device, and leave it alone until somebody asks.
    Isolate,
}

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A PCI function of this machine.
    Pci(PciAddress),
    /// A vfio-user server.
    Socket(PathBuf),
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Location::Pci(address) => address.fmt(f),
            Location::Socket(path) => path.display().fmt(f),
        }
    }
}

impl DeviceConfig {
    /// A device of which nothing is said but that iohost may take it.
    pub(crate) fn unconfigured(name: String, location: Location) -> Self {
        Self {
            name,
            location,
            driver: None,
            interrupts: Vec::new(),
            bind: true,
            backend: None,
            on_error: ErrorPolicy::default(),
            category: String::new(),
            is_disabled: false,
            restart: RestartChoices::default(),
            clients: None,
            sandbox: None,
            user: None,
            memory: iohost_sandbox::MEMORY,
            line: 0,
        }
    }

    /// Whether nothing but the driver keeps the device from the machine's memory.
    pub(crate) fn is_unsafe(&self) -> bool {
        self.backend.is_some_and(PciBackend::is_unsafe)
    }

    /// What a PCI function has to be bound for.
    pub(crate) fn binding(&self) -> Binding {
        match self.backend {
            None | Some(PciBackend::VfioCdev | PciBackend::VfioGroup) => Binding::Vfio,
            Some(PciBackend::VfioNoIommu) => Binding::VfioNoIommu,
            Some(PciBackend::Uio) => Binding::Uio,
        }
    }

    /// The device as a driver host is told of it.
    pub(crate) fn for_host(&self) -> DeviceLocation {
        match &self.location {
            Location::Pci(address) => {
                DeviceLocation::Pci { address: address.to_string(), backend: self.backend }
            }
            Location::Socket(path) => {
                DeviceLocation::VfioUser { socket: path.to_string_lossy().into_owned() }
            }
        }
    }
}

/// Why the configuration cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", place(file, *line))]
pub struct ConfigError {
    /// The file; empty where there is none and the defaults are what does not work.
    pub file: PathBuf,
    /// The line, where there is one.
    pub line: Option<usize>,
    /// What is wrong, with the key.
    pub message: String,
    /// What to do about it.
    pub next: String,
}

/// `file:line: `, as far as they are known.
fn place(file: &Path, line: Option<usize>) -> String {
    match line {
        Some(line) => format!("{}:{line}: ", file.display()),
        None if file.as_os_str().is_empty() => String::new(),
        None => format!("{}: ", file.display()),
    }
}

impl Config {
    /// Reads the file. A missing file is an error; the caller knows whether it was asked for.
    pub fn read(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file).map_err(|err| ConfigError {
            file: file.to_owned(),
            line: None,
            message: format!("the configuration cannot be read: {err}"),
            next: "create the file, or name another one with --config".into(),
        })?;
        Self::parse(file, &text)
    }

    /// What an empty file says.
    pub fn empty() -> Self {
        Self::parse(Path::new(""), "").expect("an empty configuration has no mistakes")
    }

    /// Reads the text of `file`.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let source = Source { file, text };
        let raw: RawConfig = toml::from_str(text).map_err(|err| source.explain(&err))?;
        let restart = source.check_restart(raw.restart, &RestartPolicy::default())?;
        let for_all = RestartPolicy::default().with(&restart);
        let mut devices: Vec<DeviceConfig> = Vec::new();
        for entry in raw.device {
            let device = source.check(entry, &for_all)?;
            if let Some(other) = devices
                .iter()
                .find(|other| other.name == device.name || other.location == device.location)
            {
                let message = format!(
                    "device {:?} at {} is configured already in line {}",
                    device.name, device.location, other.line
                );
                return Err(source.error(
                    device.line,
                    message,
                    "remove one of the two, or give each its own name and location",
                ));
            }
            devices.push(device);
        }
        let matches = raw.matches.into_iter().map(|rule| source.check_rule(rule));
        let matches = matches.collect::<Result<_, _>>()?;
        let admins = Allowed {
            users: source.users(raw.admin_users)?,
            groups: source.groups(raw.admin_groups)?,
        };
        Ok(Self {
            matches,
            driver_directory: raw.driver_directory,
            runtime_directory: raw.runtime_directory,
            state_directory: raw.state_directory,
            limits: raw.limits,
            restart,
            sandbox: raw.sandbox,
            admins,
            devices,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    #[serde(default = "default_driver_directory")]
    driver_directory: PathBuf,
    #[serde(default = "default_runtime_directory")]
    runtime_directory: PathBuf,
    #[serde(default = "default_state_directory")]
    state_directory: PathBuf,
    #[serde(default)]
    limits: Limits,
    restart: Option<Spanned<RawRestart>>,
    #[serde(default)]
    sandbox: SandboxMode,
    #[serde(default)]
    admin_users: Vec<Spanned<NameOrNumber>>,
    #[serde(default)]
    admin_groups: Vec<Spanned<NameOrNumber>>,
    #[serde(default)]
    device: Vec<Spanned<RawDevice>>,
    #[serde(default, rename = "match")]
    matches: Vec<Spanned<RawMatch>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRestart {
    most: Option<usize>,
    window_seconds: Option<Seconds>,
    pause_seconds: Option<Seconds>,
    longest_pause_seconds: Option<Seconds>,
    hang_seconds: Option<Seconds>,
    hang_cap_seconds: Option<Seconds>,
    hook: Option<PathBuf>,
    hook_seconds: Option<Seconds>,
}

/// A time in seconds, whole or with a fraction.
struct Seconds(Duration);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// Longer than any daemon runs; and sums of such times stay far from any limit.
        const MOST: f64 = 365.0 * 24.0 * 3600.0;
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Seconds;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "seconds from 0 to {MOST}")
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Seconds, E> {
                if !(0.0..=MOST).contains(&value) {
                    return Err(E::invalid_value(serde::de::Unexpected::Float(value), &self));
                }
                Ok(Seconds(Duration::from_secs_f64(value)))
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Seconds, E> {
                self.visit_f64(value as f64)
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Seconds, E> {
                self.visit_f64(value as f64)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

fn default_driver_directory() -> PathBuf {
    DEFAULT_DRIVER_DIRECTORY.into()
}

fn default_runtime_directory() -> PathBuf {
    DEFAULT_RUNTIME_DIRECTORY.into()
}

fn default_state_directory() -> PathBuf {
    DEFAULT_STATE_DIRECTORY.into()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDevice {
    name: Option<String>,
    address: Option<Spanned<String>>,
    socket: Option<PathBuf>,
    driver: Option<String>,
    #[serde(default)]
    interrupts: Vec<InterruptChoice>,
    #[serde(default)]
    bind: bool,
    backend: Option<Spanned<PciBackend>>,
    #[serde(default)]
    allow_unsafe: bool,
    #[serde(default)]
    on_error: ErrorPolicy,
    restart: Option<Spanned<RawRestart>>,
    #[serde(default)]
    category: String,
    #[serde(default)]
    disabled: bool,
    allow_users: Option<Vec<Spanned<NameOrNumber>>>,
    allow_groups: Option<Vec<Spanned<NameOrNumber>>>,
    sandbox: Option<SandboxMode>,
    user: Option<Spanned<NameOrNumber>>,
    memory: Option<u64>,
}

/// A user or a group.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a name or a number")]
enum NameOrNumber {
    Number(u32),
    Name(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMatch {
    ids: Option<Spanned<String>>,
    primary: Option<Spanned<String>>,
    secondary: Option<Spanned<String>>,
    class: Option<Spanned<String>>,
    driver: Option<String>,
    #[serde(default)]
    category: String,
    #[serde(default)]
    interrupts: Vec<InterruptChoice>,
    backend: Option<Spanned<PciBackend>>,
    #[serde(default)]
    allow_unsafe: bool,
    #[serde(default)]
    on_error: ErrorPolicy,
}

/// The file, to find lines in.
struct Source<'a> {
    file: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    /// `policy` is what holds where the entry says nothing.
    fn check(
        &self,
        entry: Spanned<RawDevice>,
        policy: &RestartPolicy,
    ) -> Result<DeviceConfig, ConfigError> {
        let line = self.line(&entry.span());
        let device = entry.into_inner();
        let location = match (device.address, device.socket) {
            (Some(address), None) => Location::Pci(address.get_ref().parse().map_err(|err| {
                self.error(
                    self.line(&address.span()),
                    format!("key `address`: {err}"),
                    "list the devices that are there with `iohost devices`",
                )
            })?),
            (None, Some(socket)) => {
                if device.driver.is_none() {
                    return Err(self.error(
                        line,
                        "a device with `socket` has no key `driver`".into(),
                        "name the driver: a device behind a socket says what it is only to a \
                         driver host",
                    ));
                }
                Location::Socket(socket)
            }
            (Some(_), Some(_)) => {
                return Err(self.error(
                    line,
                    "a device has both `address` and `socket`".into(),
                    "keep `address` for a PCI function, or `socket` for a vfio-user device",
                ));
            }
            (None, None) => {
                return Err(self.error(
                    line,
                    "a device has neither `address` nor `socket`".into(),
                    "add `address = \"dddd:bb:dd.f\"` for a PCI function, or `socket` and \
                     `driver` for a vfio-user device",
                ));
            }
        };
        let name = device.name.unwrap_or_else(|| location.to_string());
        if name.is_empty() || name.contains(|c: char| c.is_control() || c.is_whitespace()) {
            return Err(self.error(
                line,
                format!("key `name`: {name:?} is not a name"),
                "use a word without spaces, such as `edu0`",
            ));
        }
        if let Some(backend) = &device.backend {
            self.check_backend(backend, &location, device.allow_unsafe)?;
        }
        let restart = self.check_restart(device.restart, policy)?;
        let clients = match (device.allow_users, device.allow_groups) {
            (None, None) => None,
            (users, groups) => Some(Allowed {
                users: self.users(users.unwrap_or_default())?,
                groups: self.groups(groups.unwrap_or_default())?,
            }),
        };
        let user = device.user.map(|user| self.user_and_group(user)).transpose()?;
        Ok(DeviceConfig {
            clients,
            sandbox: device.sandbox,
            user,
            memory: device.memory.unwrap_or(iohost_sandbox::MEMORY),
            name,
            location,
            driver: device.driver,
            interrupts: device.interrupts,
            bind: device.bind,
            backend: device.backend.map(Spanned::into_inner),
            on_error: device.on_error,
            category: device.category,
            is_disabled: device.disabled,
            restart,
            line,
        })
    }

    fn check_rule(&self, rule: Spanned<RawMatch>) -> Result<MatchRule, ConfigError> {
        let line = self.line(&rule.span());
        let rule = rule.into_inner();
        let read = |name: &str, key: Option<Spanned<String>>| {
            let read = |text: Spanned<String>| {
                text.get_ref().parse::<Alternatives>().map_err(|err| {
                    self.error(
                        self.line(&text.span()),
                        format!("key `{name}`: {err}"),
                        "see the ids with `iohost devices`; the device's come first: 11e8:1234 is \
                         0x11e81234",
                    )
                })
            };
            key.map(read).transpose()
        };
        let wanted = PciMatch {
            ids: read("ids", rule.ids)?,
            primary: read("primary", rule.primary)?,
            secondary: read("secondary", rule.secondary)?,
            class: read("class", rule.class)?,
        };
        if wanted == PciMatch::default() {
            return Err(self.error(
                line,
                "a match has none of `ids`, `primary`, `secondary` and `class`".into(),
                "say which PCI functions may be taken, such as primary = \"0x11e81234\"",
            ));
        }
        let address = "0000:00:00.0".parse().expect("an address");
        let any = DeviceConfig::unconfigured(String::new(), Location::Pci(address));
        if let Some(backend) = &rule.backend {
            self.check_backend(backend, &any.location, rule.allow_unsafe)?;
        }
        let pattern = DeviceConfig {
            driver: rule.driver,
            interrupts: rule.interrupts,
            backend: rule.backend.map(Spanned::into_inner),
            on_error: rule.on_error,
            category: rule.category,
            line,
            ..any
        };
        Ok(MatchRule { wanted, pattern })
    }

    /// What a table of restarts says, in place of `policy`.
    fn check_restart(
        &self,
        raw: Option<Spanned<RawRestart>>,
        policy: &RestartPolicy,
    ) -> Result<RestartChoices, ConfigError> {
        let Some(raw) = raw else { return Ok(RestartChoices::default()) };
        let span = raw.span();
        let raw = raw.into_inner();
        let time = |seconds: Option<Seconds>| seconds.map(|Seconds(time)| time);
        let choices = RestartChoices {
            most: raw.most,
            window: time(raw.window_seconds),
            pause: time(raw.pause_seconds),
            longest_pause: time(raw.longest_pause_seconds),
            hang: time(raw.hang_seconds),
            hang_cap: time(raw.hang_cap_seconds),
            hook: raw.hook,
            hook_limit: time(raw.hook_seconds),
        };
        match policy.with(&choices).mistake() {
            None => Ok(choices),
            Some((key, why)) => Err(self.error(
                self.line_of(&span, key),
                format!("key `{key}`: {why}"),
                "correct it, or leave it out for the default",
            )),
        }
    }

    /// The line of a key inside of a table, or that of the table.
    fn line_of(&self, table: &Range<usize>, key: &str) -> usize {
        // The span of a table that is not written in one line is its header's.
        let rest = &self.text[table.start..];
        let end = if rest.starts_with('{') { Some(table.len()) } else { rest.find("\n[") };
        let text = &rest[..end.unwrap_or(rest.len())];
        let begins = |at: usize| !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let at = text.match_indices(key).map(|(at, _)| at).find(|at| begins(*at));
        self.line(table) + at.map_or(0, |at| text[..at].matches('\n').count())
    }

    fn users(&self, users: Vec<Spanned<NameOrNumber>>) -> Result<Vec<u32>, ConfigError> {
        users.into_iter().map(|user| Ok(self.user_and_group(user)?.0)).collect()
    }

    /// A user, and its own group: of a number that has no name, the same number.
    fn user_and_group(&self, user: Spanned<NameOrNumber>) -> Result<(u32, u32), ConfigError> {
        let line = self.line(&user.span());
        match user.into_inner() {
            NameOrNumber::Number(uid) => {
                let known = User::from_uid(uid.into()).ok().flatten();
                Ok((uid, known.map_or(uid, |user| user.gid.as_raw())))
            }
            NameOrNumber::Name(name) => match User::from_name(&name) {
                Ok(Some(user)) => Ok((user.uid.as_raw(), user.gid.as_raw())),
                _ => Err(self.unknown("user", &name, line)),
            },
        }
    }

    fn groups(&self, groups: Vec<Spanned<NameOrNumber>>) -> Result<Vec<u32>, ConfigError> {
        let number = |group: Spanned<NameOrNumber>| {
            let line = self.line(&group.span());
            match group.into_inner() {
                NameOrNumber::Number(gid) => Ok(gid),
                NameOrNumber::Name(name) => match Group::from_name(&name) {
                    Ok(Some(group)) => Ok(group.gid.as_raw()),
                    _ => Err(self.unknown("group", &name, line)),
                },
            }
        };
        groups.into_iter().map(number).collect()
    }

    fn unknown(&self, kind: &str, name: &str, line: usize) -> ConfigError {
        let message = format!("this machine has no {kind} {name:?}");
        self.error(line, message, &format!("create the {kind}, or give its number"))
    }

    fn check_backend(
        &self,
        backend: &Spanned<PciBackend>,
        location: &Location,
        allow_unsafe: bool,
    ) -> Result<(), ConfigError> {
        let line = self.line(&backend.span());
        let backend = *backend.get_ref();
        if let Location::Socket(_) = location {
            return Err(self.error(
                line,
                format!(
                    "key `backend`: {} is for a PCI function, not for `socket`",
                    backend.name()
                ),
                "remove the key: a device with `socket` is reached by vfio-user",
            ));
        }
        if backend.is_unsafe() && !allow_unsafe {
            return Err(self.error(
                line,
                format!(
                    "key `backend`: {} is UNSAFE: no IOMMU keeps the device from the machine's \
                     memory",
                    backend.name()
                ),
                "add `allow_unsafe = true` to the device if you accept that, or remove the key",
            ));
        }
        Ok(())
    }

    /// Says what is wrong in words of our own where the parser's are about its own inside.
    fn explain(&self, err: &toml::de::Error) -> ConfigError {
        let line = err.span().map(|span| self.line(&span));
        let message = err.message().trim();
        let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
        let (message, next) = match quoted.as_slice() {
            [unknown, known @ ..] if message.starts_with("unknown field") => {
                let near = nearest(unknown, known);
                let next = match near {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("the keys here are {}", known.join(", ")),
                };
                (format!("unknown key `{unknown}`"), next)
            }
            [unknown, known @ ..] if message.starts_with("unknown variant") => {
                let key = self.key_at(err.span());
                let next = format!("use one of {}", known.join(", "));
                (format!("key `{key}`: unknown value `{unknown}`"), next)
            }
            _ => {
                let key = self.key_at(err.span());
                let place = if key.is_empty() { String::new() } else { format!("key `{key}`: ") };
                (format!("{place}{message}"), "correct that line and start again".to_owned())
            }
        };
        ConfigError { file: self.file.to_owned(), line, message, next }
    }

    fn error(&self, line: usize, message: String, next: &str) -> ConfigError {
        ConfigError { file: self.file.to_owned(), line: Some(line), message, next: next.to_owned() }
    }

    fn line(&self, span: &Range<usize>) -> usize {
        self.text[..span.start].matches('\n').count() + 1
    }

    /// The key in the line of a span, for errors about values.
    fn key_at(&self, span: Option<Range<usize>>) -> &str {
        let Some(span) = span else { return "" };
        let line = self.text.lines().nth(self.line(&span) - 1).unwrap_or_default();
        line.split_once('=').map(|(key, _)| key.trim()).unwrap_or_default()
    }
}

/// The known key that was probably meant.
fn nearest<'a>(unknown: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = known.iter().map(|key| (strsim::damerau_levenshtein(unknown, key), *key)).min()?;
    // A third of the letters wrong is a typing error; more is another word.
    (near.0 <= unknown.len().div_ceil(3)).then_some(near.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("iohost.toml"), text)
    }

    fn complaint(text: &str) -> String {
        let err = parse(text).unwrap_err();
        format!("{err}\n  next: {}", err.next)
    }

    #[test]
    fn the_example_in_the_documentation_is_valid() {
        let source = include_str!("config.rs");
        let lines = source.lines().skip_while(|line| *line != "//! ```toml").skip(1);
        let example: Vec<&str> = lines
            .take_while(|line| *line != "//! ```")
            .map(|line| line.trim_start_matches("//!"))
            .collect();

        let config = parse(&example.join("\n")).unwrap();

        assert_eq!(config.limits, Limits::default());
        let policy = RestartPolicy::default();
        assert_eq!(policy.with(&config.restart), policy, "the example shows the defaults");
        assert_eq!(config.devices[1].restart.most, Some(0));
        assert_eq!(config.devices[0].name, "0000:01:00.0");
        assert_eq!(config.devices[0].interrupts, [InterruptChoice::IntX]);
        assert_eq!(config.devices[1].location, Location::Socket("/run/edu.sock".into()));
        assert_eq!(config.matches.len(), 1);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_its_neighbour() {
        assert_eq!(
            complaint("\n[[device]]\nadress = \"0000:01:00.0\"\n"),
            "iohost.toml:3: unknown key `adress`\n  next: did you mean `address`?"
        );
        assert_eq!(
            complaint("[limits]\ncolour = 1\n"),
            "iohost.toml:2: unknown key `colour`\n  next: the keys here are \
             sessions_per_service, queue_bytes, largest_queue_bytes, sessions_per_client, \
             memory_per_client, connections_per_client, requests_per_second"
        );
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_with_its_key_and_line() {
        assert_eq!(
            complaint("[limits]\n\nqueue_bytes = \"many\"\n"),
            "iohost.toml:3: key `queue_bytes`: invalid type: string \"many\", expected u32\n  \
             next: correct that line and start again"
        );
        assert_eq!(
            complaint("[[device]]\naddress = \"01:00.0\"\ninterrupts = [\"irq\"]\n"),
            "iohost.toml:3: key `interrupts`: unknown value `irq`\n  next: use one of intx, msi, \
             msix"
        );
    }

    #[test]
    fn a_match_is_read_with_its_alternatives_and_how_what_it_finds_is_driven() {
        let config = parse(
            "[[match]]\nprimary = \"0x11e81234 0x00008086&0xffff\"\nclass = \"0x01080200\"\n\
             driver = \"edu\"\non_error = \"reset\"\n",
        );
        let rule = &config.unwrap().matches[0];
        assert_eq!(rule.wanted.primary, "0x11e81234 0x00008086&0xffff".parse().ok());
        assert_eq!(rule.driver(), Some(("edu", 1)));
        let device = rule.device("0000:01:00.0".parse().unwrap());
        assert_eq!((&*device.name, device.bind), ("0000:01:00.0", true));
        assert_eq!((device.driver.as_deref(), device.on_error), (Some("edu"), ErrorPolicy::Reset));
    }

    #[test]
    fn a_match_of_everything_or_of_nonsense_is_refused() {
        let message = |text| parse(text).unwrap_err().to_string();
        assert_eq!(
            message("[[match]]\ndriver = \"edu\"\n"),
            "iohost.toml:1: a match has none of `ids`, `primary`, `secondary` and `class`"
        );
        assert_eq!(
            message("[[match]]\n\nclass = \"disk\"\n"),
            "iohost.toml:3: key `class`: \"disk\" is not a number as 0x11e81234, or one under a \
             mask as 0x00001234&0x0000ffff"
        );
        assert!(message("[[match]]\nclass = \"1\"\nbackend = \"uio\"\n").contains("UNSAFE"));
        assert!(message("[[match]]\nclass = \"1\"\nname = \"a\"\n").contains("`name`"));
    }

    #[test]
    fn a_device_without_a_place_is_refused() {
        assert_eq!(
            complaint("[[device]]\ndriver = \"edu\"\n"),
            "iohost.toml:1: a device has neither `address` nor `socket`\n  next: add `address = \
             \"dddd:bb:dd.f\"` for a PCI function, or `socket` and `driver` for a vfio-user device"
        );
    }

    #[test]
    fn an_address_that_is_none_is_refused() {
        assert_eq!(
            complaint("[[device]]\naddress = \"edu\"\n"),
            "iohost.toml:2: key `address`: \"edu\" is not a PCI address such as 0000:00:1f.2 or \
             00:1f.2\n  next: list the devices that are there with `iohost devices`"
        );
    }

    #[test]
    fn a_device_behind_a_socket_has_to_name_its_driver() {
        let err = parse("[[device]]\nsocket = \"/run/edu.sock\"\n").unwrap_err();
        assert_eq!(err.message, "a device with `socket` has no key `driver`");
    }

    #[test]
    fn an_unsafe_backend_has_to_be_allowed() {
        for backend in ["uio", "vfio-no-iommu"] {
            let entry = format!("[[device]]\naddress = \"01:00.0\"\nbackend = \"{backend}\"\n");
            assert_eq!(
                complaint(&entry),
                format!(
                    "iohost.toml:3: key `backend`: {backend} is UNSAFE: no IOMMU keeps the device \
                     from the machine's memory\n  next: add `allow_unsafe = true` to the device if \
                     you accept that, or remove the key"
                )
            );
            let allowed = parse(&format!("{entry}allow_unsafe = true\n")).unwrap();
            assert!(allowed.devices[0].is_unsafe());
        }
    }

    #[test]
    fn a_safe_backend_needs_no_leave_and_an_unknown_one_is_refused() {
        for backend in [PciBackend::VfioCdev, PciBackend::VfioGroup] {
            let name = backend.name();
            let config =
                parse(&format!("[[device]]\naddress = \"01:00.0\"\nbackend = \"{name}\"\n"));
            let device = &config.unwrap().devices[0];
            assert_eq!((device.backend, device.is_unsafe()), (Some(backend), false));
        }
        assert_eq!(
            complaint("[[device]]\naddress = \"01:00.0\"\nbackend = \"vfio\"\n"),
            "iohost.toml:3: key `backend`: unknown value `vfio`\n  next: use one of vfio-cdev, \
             vfio-group, vfio-no-iommu, uio"
        );
    }

    #[test]
    fn a_backend_of_a_socket_is_refused() {
        let err = parse("[[device]]\nsocket = \"/s\"\ndriver = \"edu\"\nbackend = \"vfio-cdev\"\n")
            .unwrap_err();
        assert_eq!(err.message, "key `backend`: vfio-cdev is for a PCI function, not for `socket`");
    }

    #[test]
    fn a_restart_table_is_for_all_devices_and_one_of_a_device_for_that_one() {
        let config = parse(
            "[restart]\nmost = 3\npause_seconds = 0.5\nhook = \"/bin/true\"\n\
             [[device]]\nname = \"a\"\nsocket = \"/a\"\ndriver = \"edu\"\n\
             [device.restart]\nhang_seconds = 0\n\
             [[device]]\nname = \"b\"\nsocket = \"/b\"\ndriver = \"edu\"\n",
        );
        let config = config.unwrap();
        let half = Duration::from_millis(500);
        assert_eq!((config.restart.most, config.restart.pause), (Some(3), Some(half)));
        assert_eq!(config.restart.hook, Some("/bin/true".into()));
        assert_eq!(config.devices[0].restart.hang, Some(Duration::ZERO));
        assert_eq!(config.devices[1].restart, RestartChoices::default());
    }

    #[test]
    fn a_restart_table_that_makes_no_sense_is_refused_with_key_and_line() {
        assert_eq!(
            complaint("\n[restart]\nmost = 2\npause_seconds = -1\n"),
            "iohost.toml:4: key `pause_seconds`: invalid value: floating point `-1.0`, expected \
             seconds from 0 to 31536000\n  next: correct that line and start again"
        );
        assert_eq!(
            complaint("[restart]\nmost = 2\n\nlongest_pause_seconds = 10\npause_seconds = 60\n"),
            "iohost.toml:5: key `pause_seconds`: the first pause of 60s is longer than the longest \
             one of 10s\n  next: correct it, or leave it out for the default"
        );
        // Of all devices and of one together.
        let err = parse(
            "[restart]\nhang_seconds = 5\n[[device]]\nsocket = \"/a\"\ndriver = \"edu\"\n\
             restart = { hang_cap_seconds = 4 }\n",
        );
        let err = err.unwrap_err();
        assert_eq!((err.line, err.message.starts_with("key `hang_cap_seconds`")), (Some(6), true));
        assert_eq!(
            complaint("[restart]\nhooks = \"/bin/true\"\n"),
            "iohost.toml:2: unknown key `hooks`\n  next: did you mean `hook`?"
        );
        let err = parse("[restart]\nmost = -1\n").unwrap_err();
        assert!(err.to_string().starts_with("iohost.toml:2: key `most`"), "{err}");
    }

    #[test]
    fn the_same_device_twice_is_refused_with_both_lines() {
        let err =
            parse("[[device]]\naddress = \"01:00.0\"\n[[device]]\naddress = \"0000:01:00.0\"")
                .unwrap_err();
        assert_eq!(
            err.to_string(),
            "iohost.toml:3: device \"0000:01:00.0\" at 0000:01:00.0 is configured already in line 1"
        );
    }

    #[test]
    fn a_default_that_does_not_work_is_no_mistake_in_a_file() {
        let (message, next) = ("no drivers".to_owned(), "make some".to_owned());
        let err = ConfigError { file: PathBuf::new(), line: None, message, next };
        assert_eq!(err.to_string(), "no drivers");
    }

    #[test]
    fn who_may_open_a_device_is_given_by_names_and_numbers() {
        let device = "[[device]]\naddress = \"01:00.0\"\n";
        let config = parse(&format!("{device}allow_users = [\"root\", 1000]\n")).unwrap();
        let allowed = Allowed { users: vec![0, 1000], groups: vec![] };
        assert_eq!(config.devices[0].clients, Some(allowed));
        assert_eq!(parse(device).unwrap().devices[0].clients, None);
        assert_eq!(
            complaint(&format!("{device}allow_groups = [\"no-such-group\"]\n")),
            "iohost.toml:3: this machine has no group \"no-such-group\"\n  next: create the \
             group, or give its number"
        );
        assert_eq!(
            complaint("admin_users = [\n  \"no-such-user\"]\n"),
            "iohost.toml:2: this machine has no user \"no-such-user\"\n  next: create the user, \
             or give its number"
        );
    }

    #[test]
    fn the_sandbox_is_on_unless_it_is_set() {
        let config = parse("[[device]]\naddress = \"01:00.0\"\nsandbox = \"off\"\n").unwrap();
        assert_eq!(config.sandbox, SandboxMode::On);
        assert_eq!(config.devices[0].sandbox, Some(SandboxMode::Off));
        assert_eq!(
            complaint("sandbox = \"maybe\"\n"),
            "iohost.toml:1: key `sandbox`: unknown value `maybe`\n  next: use one of off, on, \
             required, strict"
        );
    }

    #[test]
    fn broken_syntax_is_named_with_its_line() {
        let err = parse("driver_directory = \n").unwrap_err();
        assert_eq!(err.line, Some(1));
    }
}
