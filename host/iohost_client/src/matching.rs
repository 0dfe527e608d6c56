//! Choosing a service by what it is, not by its name.

use std::fmt;

use iohost_control::varlink::{Device, Service, State};
use iohost_interface::{Description, InterfaceClient};

/// Which service a client means. Everything that is set has to agree; a new one matches every
/// service that runs.
///
/// ```
/// # mod adder_api { iohost_interface::interface! { pub interface adder; methods {} queues {} } }
/// use iohost_client::ServiceMatch;
///
/// let adders = ServiceMatch::new().interface::<adder_api::Client>().pci(0x1234, 0x11e8);
/// assert_eq!(adders.to_string(), "interface adder, PCI ids 1234:11e8");
/// ```
#[derive(Clone, Debug, Default)]
pub struct ServiceMatch {
    name: Option<String>,
    driver: Option<String>,
    interface: Option<Description>,
    /// Vendor and device.
    pci: Option<(u16, u16)>,
}

impl ServiceMatch {
    /// Matches every service.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only the service of this name.
    pub fn name(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// Only services that this driver runs.
    pub fn driver(mut self, driver: &str) -> Self {
        self.driver = Some(driver.to_owned());
        self
    }

    /// Only services that serve this interface, with every method and queue that `C` was built
    /// for ([`Description::offers`]).
    pub fn interface<C: InterfaceClient>(self) -> Self {
        match Description::parse(&C::description()) {
            Ok(declared) => Self { interface: Some(declared), ..self },
            // Not made by `interface!`: the name is what is left.
            Err(_) => self.interface_named(C::NAME),
        }
    }

    /// Only services that serve an interface of this name, whatever it consists of.
    pub fn interface_named(mut self, name: &str) -> Self {
        let name = name.to_owned();
        self.interface = Some(Description { name, methods: Vec::new(), queues: Vec::new() });
        self
    }

    /// Only services on a PCI function with these ids. A device behind a socket has none that the
    /// daemon knows, so it does not match.
    pub fn pci(mut self, vendor: u16, device: u16) -> Self {
        self.pci = Some((vendor, device));
        self
    }

    /// Whether it takes a look at the devices to decide.
    pub(crate) fn needs_devices(&self) -> bool {
        self.pci.is_some()
    }

    /// Whether it takes a look at the interface to decide.
    pub(crate) fn needs_interface(&self) -> bool {
        self.interface.is_some()
    }

    /// Whether a service agrees with everything but the interface.
    pub(crate) fn agrees(&self, service: &Service, devices: &[Device]) -> bool {
        let ids = || {
            let device = devices.iter().find(|device| device.location == service.location)?;
            device.vendor.zip(device.device)
        };
        service.state == State::Running
            && self.name.as_ref().is_none_or(|name| *name == service.name)
            && self.driver.as_ref().is_none_or(|driver| Some(driver) == service.driver.as_ref())
            && self.pci.is_none_or(|pci| ids() == Some(pci))
    }

    /// Whether the interface agrees that a service serves, in the text form.
    pub(crate) fn agrees_with_interface(&self, served: &str) -> bool {
        let served = || Description::parse(served).ok();
        let offers = |wanted: &Description| served().is_some_and(|it| it.offers(wanted).is_ok());
        self.interface.as_ref().is_none_or(offers)
    }
}

impl fmt::Display for ServiceMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        words.extend(self.name.as_ref().map(|name| format!("name {name}")));
        words.extend(self.driver.as_ref().map(|driver| format!("driver {driver}")));
        words.extend(self.interface.as_ref().map(|wanted| format!("interface {}", wanted.name)));
        if let Some((vendor, device)) = self.pci {
            words.push(format!("PCI ids {vendor:04x}:{device:04x}"));
        }
        match words.is_empty() {
            true => f.write_str("any driver"),
            false => f.write_str(&words.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(state: State) -> Service {
        Service {
            name: "edu0".into(),
            location: "0000:01:00.0".into(),
            driver: Some("edu".into()),
            state,
            reason: None,
            choice: None,
            pid: None,
            incarnation: 1,
            taken_over: false,
            backend: None,
            is_unsafe: false,
            reset: None,
            quiesced: None,
            sandbox: None,
            refused_calls: Vec::new(),
            sessions: 0,
            is_registered: state == State::Running,
            is_busy: false,
            power: None,
        }
    }

    fn device(vendor: Option<u16>) -> Device {
        Device {
            location: "0000:01:00.0".into(),
            kind: "vfio".into(),
            is_unsafe: false,
            vendor,
            device: Some(0x11e8),
            class: Some(0x00ff00),
            kernel_driver: None,
            iommu_group: None,
            service: None,
            plugin: None,
        }
    }

    #[test]
    fn everything_that_is_asked_for_has_to_agree() {
        let any = ServiceMatch::new;
        let (running, devices) = (service(State::Running), [device(Some(0x1234))]);
        let all = any().name("edu0").driver("edu").pci(0x1234, 0x11e8);
        assert!(all.agrees(&running, &devices));
        assert!(any().agrees(&running, &devices));
        for wrong in [
            all.clone().name("edu1"),
            all.clone().driver("nvme"),
            all.clone().pci(0x1234, 0x11e9),
            all.clone().pci(0x8086, 0x11e8),
        ] {
            assert!(!wrong.agrees(&running, &devices), "{wrong}");
        }
        assert!(!all.agrees(&service(State::Restarting), &devices), "it does not run");
        assert!(!all.agrees(&running, &[device(None)]), "the daemon does not know its ids");
        assert!(!all.agrees(&running, &[]));
    }

    #[test]
    fn an_interface_agrees_by_name_or_by_what_it_offers() {
        let served = "interface edu\nmethod 0 factorial(u32) -> (u32)\n";
        assert!(ServiceMatch::new().agrees_with_interface(""));
        assert!(ServiceMatch::new().interface_named("edu").agrees_with_interface(served));
        assert!(!ServiceMatch::new().interface_named("nvme").agrees_with_interface(served));
        assert!(!ServiceMatch::new().interface_named("edu").agrees_with_interface(""));
    }
}
