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

mod device;
mod limits;
mod match_rule;
mod restart;
mod source;
mod users;

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use crate::access::Allowed;
use crate::restart::{RestartChoices, RestartPolicy};

pub use device::{DeviceConfig, ErrorPolicy, Location};
pub use limits::Limits;
pub use match_rule::MatchRule;
pub use source::ConfigError;

use device::RawDevice;
use match_rule::RawMatch;
use restart::RawRestart;
use source::Source;
use users::NameOrNumber;

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

fn default_driver_directory() -> PathBuf {
    DEFAULT_DRIVER_DIRECTORY.into()
}

fn default_runtime_directory() -> PathBuf {
    DEFAULT_RUNTIME_DIRECTORY.into()
}

fn default_state_directory() -> PathBuf {
    DEFAULT_STATE_DIRECTORY.into()
}

#[cfg(test)]
mod tests {
    use iohost_control::host::InterruptChoice;

    use super::*;

    pub(super) fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("iohost.toml"), text)
    }

    pub(super) fn complaint(text: &str) -> String {
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
}
