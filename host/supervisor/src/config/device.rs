//! One `[[device]]`, and how a device is named, reached and driven.

use std::path::PathBuf;

use iohost_control::host::{DeviceLocation, InterruptChoice, PciBackend};
use iohost_pci::{Binding, PciAddress};
use serde::Deserialize;
use toml::Spanned;

use super::restart::RawRestart;
use super::source::Source;
use super::users::NameOrNumber;
use super::{ConfigError, SandboxMode};
use crate::access::Allowed;
use crate::restart::{RestartChoices, RestartPolicy};

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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDevice {
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

impl Source<'_> {
    /// `policy` is what holds where the entry says nothing.
    pub(super) fn check(
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

    pub(super) fn check_backend(
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{complaint, parse};

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
}
