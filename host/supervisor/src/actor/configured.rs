//! What the configuration says, at the start and each time it is read again; and devices that a
//! rule of it is for, which come when they come.
//!
//! A new configuration is checked as a whole before anything follows from it. What it says of a
//! device that it said before is left alone, so that its driver and its clients hear nothing.

use std::io::Read;

use iohost_control::host::Failure;
use iohost_control::varlink::Reloaded;
use iohost_pci::PciAddress;
use log::{debug, error, info, warn};

use super::{Actor, ids};
use crate::config::{DeviceConfig, ErrorPolicy, Location};
use crate::request::stopping;
use crate::service::{Cause, Next, Service};
use crate::{check_plugins, read_config};

impl Actor {
    /// Somebody sent SIGHUP.
    pub(super) fn take_reload_signal(&mut self) {
        let mut bytes = [0; 64];
        while matches!(self.reload.read(&mut bytes), Ok(1..)) {}
        if !self.stopping {
            // It has said what is wrong, and there is nobody else to tell.
            let _ = self.reload();
        }
    }

    /// Reads configuration and plugins again, and begins with what has changed.
    pub(super) fn reload(&mut self) -> Result<Reloaded, Failure> {
        if self.stopping {
            return Err(stopping());
        }
        let read = read_config(&self.options).and_then(|(config, file)| {
            let plugins = check_plugins(&self.options, &config, &file)?;
            Ok((config, plugins))
        });
        let (config, plugins) = read.map_err(|err| {
            error!(next = err.next; "the configuration stays as it was: {err}");
            Failure::new("config", err.to_string(), &err.next)
        })?;
        for (key, old, new) in [
            ("runtime_directory", &self.config.runtime_directory, &config.runtime_directory),
            ("state_directory", &self.config.state_directory, &config.state_directory),
        ] {
            if old != new {
                warn!("`{key}` is another one from the next start of the daemon on");
            }
        }
        self.plugins = plugins;
        let old = std::mem::replace(&mut self.config, config);
        self.config.runtime_directory = old.runtime_directory;
        self.config.state_directory = old.state_directory;
        let reloaded = self.follow_configuration();
        let Reloaded { started, stopped, restarted, kept } = &reloaded;
        info!(
            started:? = started, stopped:? = stopped, restarted:? = restarted, kept = kept.len();
            "the configuration was read again"
        );
        Ok(reloaded)
    }

    fn follow_configuration(&mut self) -> Reloaded {
        let mut reloaded = Reloaded::default();
        // From behind: a service can leave the list at once.
        for at in (0..self.services.len()).rev() {
            match self.wanted(&self.services[at]) {
                Some((mut device, by_rule)) => {
                    let service = &mut self.services[at];
                    (service.on_request, service.by_rule) = (false, by_rule);
                    let name = device.name.clone();
                    if service.next.is_none() && is_same(&service.device, &device) {
                        device.bind |= service.device.bind;
                        service.device = device;
                        reloaded.kept.push(name);
                    } else {
                        reloaded.restarted.push(name);
                        self.end_for(at, Next::Replace(Box::new(device)));
                    }
                }
                None => {
                    let service = &mut self.services[at];
                    let name = service.device.name.clone();
                    if service.on_request || service.persists {
                        // A person asked for it, and the configuration has no say in it.
                        service.on_request = true;
                        reloaded.kept.push(name);
                    } else {
                        reloaded.stopped.push(name);
                        self.end_for(at, Next::Remove);
                    }
                }
            }
        }
        for names in [&mut reloaded.stopped, &mut reloaded.restarted, &mut reloaded.kept] {
            names.reverse();
        }
        let before = self.services.len();
        for device in self.config.devices.clone() {
            if !self.has(&device.location) {
                self.services.push(Service::new(device, false));
                self.start(self.services.len() - 1, Cause::Asked);
            }
        }
        self.look_for_devices();
        let new = self.services.iter().skip(before);
        reloaded.started = new.map(|service| service.device.name.clone()).collect();
        reloaded
    }

    /// What the configuration wants of a service's device, and whether a rule of it does.
    fn wanted(&self, service: &Service) -> Option<(DeviceConfig, bool)> {
        let location = &service.device.location;
        let named = self.config.devices.iter().find(|device| device.location == *location);
        if let Some(device) = named {
            return Some((device.clone(), false));
        }
        let Location::Pci(address) = *location else { return None };
        if !service.by_rule {
            return None;
        }
        // One that is not there says nothing of itself; it is looked at when it is back.
        let is_away = service.is_removed && service.next.is_none();
        let device = self.by_rule(address).or(is_away.then(|| service.device.clone()))?;
        Some((device, true))
    }

    /// Ends a service so that another one can begin on its device, or none.
    fn end_for(&mut self, at: usize, next: Next) {
        self.services[at].next = Some(next);
        self.stop(at);
    }

    fn has(&self, location: &Location) -> bool {
        self.services.iter().any(|service| service.device.location == *location)
    }

    /// Functions that a rule is for, and that are no services yet, become some.
    pub(super) fn look_for_devices(&mut self) {
        if self.config.matches.is_empty() {
            return;
        }
        match self.options.sysfs.functions() {
            Ok(functions) => functions.iter().for_each(|function| self.appeared(function.address)),
            Err(err) => warn!(next = err.next_step(); "nobody looks for devices: {err}"),
        }
    }

    /// A function is there.
    pub(super) fn appeared(&mut self, address: PciAddress) {
        if self.stopping || self.has(&Location::Pci(address)) {
            return;
        }
        if let Some(at) = self.add_by_rule(address) {
            self.start(at, Cause::Asked);
        }
    }

    /// A service for a function that a rule is for, if one is.
    pub(super) fn add_by_rule(&mut self, address: PciAddress) -> Option<usize> {
        let device = self.by_rule(address)?;
        info!(device = device.name, line = device.line; "a device that a rule is for");
        let mut service = Service::new(device, false);
        service.by_rule = true;
        self.services.push(service);
        Some(self.services.len() - 1)
    }

    /// How a rule has the function at an address driven; `None` for one that nobody allowed us to
    /// have, or that no plugin is for.
    fn by_rule(&self, address: PciAddress) -> Option<DeviceConfig> {
        let function = self.options.sysfs.function(address).ok()?;
        let ids = ids(&function);
        let rule = self.config.matches.iter().find(|rule| rule.wanted.agrees(ids))?;
        let device = rule.device(address);
        let is_driven =
            device.driver.is_some() || !self.plugins.candidates(ids, &device.category).is_empty();
        if !is_driven {
            debug!(device = device.name, line = device.line; "no plugin for a device of a rule");
        }
        is_driven.then_some(device)
    }
}

/// Whether a driver that runs as the one says may go on as the other says. What is done about an
/// error is asked when there is one, and a device that was bound by hand stays so.
fn is_same(one: &DeviceConfig, other: &DeviceConfig) -> bool {
    let compared = |device: &DeviceConfig| DeviceConfig {
        line: 0,
        on_error: ErrorPolicy::default(),
        bind: false,
        ..device.clone()
    };
    compared(one) == compared(other)
}
