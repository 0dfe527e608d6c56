//! How a service gets its driver host. The numbers are those of the picture at [`State`].

use std::mem;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;

use iohost_control::host::{
    Confinement, Failure, MOST_DESCRIPTORS, Ready, Start, StartDescriptors, ToHost,
};
use iohost_control::varlink::Bound;
use iohost_doctor::Code;
use iohost_interface::Description;
use iohost_memory::flight_recorder::Recorder;
use iohost_pci::{Order, Persist};
use log::{debug, info, warn};
use nix::unistd::Uid;

use super::{Actor, ids, protocol};
use crate::bindings::{Done, from_pci};
use crate::config::{DeviceConfig, Location, SandboxMode};
use crate::driver_process::DriverProcess;
use crate::needs;
use crate::plugins::Plugin;
use crate::request::stopping;
use crate::service::{Cause, Host, State, Then};
use crate::upgrade::Upgrade;

/// Users of driver hosts, one after the other, and again from the start when they are used up, but
/// for those of the last driver host of each service.
///
/// Source: systemd, `docs/UIDS-GIDS.md`: nobody gives these to anything else.
pub(super) const DRIVER_USERS: RangeInclusive<u32> = 0x7000_0000..=0x7000_ffff;

/// Descriptors of a driver host beside those of its sessions: vectors, queues, memory.
const DESCRIPTORS: u64 = 2048;

impl Actor {
    /// What earlier daemons left: persistent devices are services, and what nobody wants goes back.
    pub(super) fn take_up_what_was_left(&mut self) {
        for left in self.bindings.left() {
            let known = self.position_called(&left.address.to_string());
            let (at, is_new) = match known {
                Some(at) => (at, false),
                None => (self.add(left.address), true),
            };
            let service = &mut self.services[at];
            let runs = service.host().is_some();
            if let Some(persist) = left.persist.filter(|_| !service.device.is_disabled) {
                service.device.bind = true;
                service.persists = true;
                service.group = persist == Persist::Group;
            }
            if runs {
                // A driver host of an earlier daemon has it: it is ours from now on, as it is.
                if let Some(order) = service.next_order() {
                    self.bindings.take(order);
                }
            } else if service.device.is_disabled {
                self.stop(at);
            } else if service.persists {
                // It is started.
            } else if is_new {
                self.stop(at);
            } else if !service.device.bind {
                // Nobody allowed us to have it; but somebody else may have bound it for us.
                service.state = State::GivingBack { then: Then::Start };
                self.bindings.give_back(left.address, false);
            }
        }
    }

    /// 1 and 5: chooses a plugin and takes the device.
    pub(super) fn start(&mut self, at: usize, cause: Cause) {
        if cause == Cause::Asked {
            self.services[at].failed.clear();
        }
        let device = &self.services[at].device;
        if device.is_disabled {
            let why = disabled(device);
            info!(device = device.name; "not started: {}", why.message);
            let service = &mut self.services[at];
            service.refuse_binds(&why);
            service.state = State::Down(why);
            return;
        }
        match self.is_to_be_taken(at) {
            Ok(false) => self.start_taken(at, cause),
            Ok(true) => {
                let service = &mut self.services[at];
                if let Some(order) = service.next_order() {
                    self.bindings.take(order);
                    service.state = State::Taking { cause, is_unwanted: false };
                }
            }
            Err(failure) => self.go_down(at, failure),
        }
    }

    /// 8: starts a driver host for a device that is ours.
    fn start_taken(&mut self, at: usize, cause: Cause) {
        match self.start_host(at, cause) {
            Ok(host) => self.services[at].state = State::Starting(host),
            Err(failure) => self.go_down(at, failure),
        }
    }

    fn start_host(&mut self, at: usize, cause: Cause) -> Result<Host, Failure> {
        let (plugin, choice) = match self.services[at].upgrade.as_ref().and_then(Upgrade::candidate)
        {
            Some(candidate) => (candidate.clone(), "it is upgraded".to_owned()),
            None => {
                let (plugin, choice) = self.choose_plugin(at)?;
                (plugin.clone(), choice)
            }
        };
        needs::check(&plugin.info, &self.services[at].device, iohost_doctor::may_lock())?;
        let service = &mut self.services[at];
        service.driver = Some(plugin.info.name.clone());
        service.choice = Some(choice);
        service.is_removed = false;
        service.incarnation += 1;
        let host = self.launch(at, Some(&plugin), cause)?;
        let service = &self.services[at];
        info!(
            device = service.device.name, driver = plugin.info.name, pid = host.process.pid(),
            incarnation = service.incarnation; "driver host started"
        );
        if service.device.is_unsafe() {
            warn!(
                device = service.device.name;
                "UNSAFE: no IOMMU keeps this device from the machine's memory"
            );
        }
        Ok(host)
    }

    /// Starts a driver host that runs a plugin, or none.
    pub(super) fn launch(
        &mut self,
        at: usize,
        plugin: Option<&Plugin>,
        cause: Cause,
    ) -> Result<Host, Failure> {
        let service = &mut self.services[at];
        service.quiesced = None;
        service.was_taken_over = false;
        service.refused_calls.clear();
        let confinement = plugin.and_then(|_| self.confinement(at));
        let service = &self.services[at];
        let number = self.next_host;
        self.next_host += 1;
        let (listener, files) = self.records.add(number).map_err(crate::no_resources)?;
        let spawned = DriverProcess::spawn(&self.options.driver_host, &service.device.name, files);
        let process = spawned.inspect_err(|_| self.records.files(number).remove())?;
        self.watch_host(&process, number).map_err(crate::no_resources)?;
        let recorder = Recorder::create().map_err(crate::no_resources)?;
        self.watch_recorder(&recorder, number).map_err(crate::no_resources)?;
        let start = Start {
            device: service.device.for_host(),
            interrupts: service.device.interrupts.clone(),
            confinement,
            plugin: plugin.map(|plugin| plugin.file.to_string_lossy().into_owned()),
            incarnation: service.incarnation,
            // Room for 2^32 entries of each driver host.
            registry: (number + 1) << 32,
            state: service.upgrade.as_ref().and_then(Upgrade::state).map(|(size, _)| size),
        };
        process.files().note(service, &start, process.pid()).map_err(crate::no_resources)?;
        let state = service.upgrade.as_ref().and_then(Upgrade::state);
        let beside = StartDescriptors {
            listener: listener.as_fd(),
            memory: recorder.memory(),
            bell: recorder.bell(),
            state: state.map(|(_, file)| file.as_fd()),
        };
        // A process that is gone already is noticed by its end.
        let _ = process.send(&ToHost::Start(start), &beside.in_order());
        Ok(Host {
            recorder: Some(recorder),
            is_retry: cause == Cause::Death,
            ending: service.upgrade.as_ref().and_then(Upgrade::ending),
            ..Host::new(number, process, self.options.patience.start)
        })
    }

    /// What a driver host for this service is to give up; `None` for nothing.
    fn confinement(&mut self, at: usize) -> Option<Confinement> {
        let device = &self.services[at].device;
        let mode = device.sandbox.unwrap_or(self.config.sandbox);
        if mode == SandboxMode::Off {
            warn!(
                device = device.name;
                "the sandbox is off: this driver has all the rights of the daemon"
            );
            return None;
        }
        let (user, memory) = (device.user, device.memory);
        let sessions = self.config.limits.sessions_per_service as u64;
        let identity = user.or_else(|| self.next_user());
        self.services[at].driver_user = identity.map(|(uid, _)| uid);
        Some(Confinement {
            identity,
            is_alone: user.is_none() && identity.is_some(),
            memory,
            // Each twice: the driver's, and duplicates for the next daemon.
            descriptors: DESCRIPTORS + 2 * sessions * MOST_DESCRIPTORS as u64,
            kills: mode == SandboxMode::Strict,
            required: matches!(mode, SandboxMode::Required | SandboxMode::Strict),
        })
    }

    /// A user that no driver host has, with the group of the same number; `None` where the daemon
    /// may not give any.
    fn next_user(&mut self) -> Option<(u32, u32)> {
        if !Uid::effective().is_root() {
            return None;
        }
        loop {
            let uid = self.next_user;
            let is_last = uid == *DRIVER_USERS.end();
            self.next_user = if is_last { *DRIVER_USERS.start() } else { uid + 1 };
            // There are more of them than services.
            if !self.services.iter().any(|service| service.driver_user == Some(uid)) {
                return Some((uid, uid));
            }
        }
    }

    /// The best plugin for a device that has not failed on it, and why it is that one, in words.
    pub(super) fn choose_plugin(&self, at: usize) -> Result<(&Plugin, String), Failure> {
        let service = &self.services[at];
        let device = &service.device;
        let failed = |plugin: &Plugin| {
            let failed = service.failed.iter().find(|(name, _)| *name == plugin.info.name);
            failed.map(|(_, failure)| failure)
        };
        if let Some(name) = &device.driver {
            let plugin = self.plugins.named(name)?;
            return match failed(plugin) {
                Some(failure) => Err(failure.clone()),
                None => Ok((plugin, "the configuration names it".to_owned())),
            };
        }
        let Location::Pci(address) = device.location else {
            return Err(Failure::new(
                "no-driver",
                format!("device {:?} names no driver", device.name),
                "add the key `driver` to the device in the configuration",
            ));
        };
        let function = self.options.sysfs.function(address).map_err(from_pci)?;
        let candidates = self.plugins.candidates(ids(&function), &device.category);
        let chosen = candidates.iter().find(|(_, plugin)| failed(plugin).is_none());
        if let Some((_, plugin)) = chosen {
            return Ok((plugin, in_words(&candidates, &plugin.info.name, &service.failed)));
        }
        match service.failed.as_slice() {
            [] => {
                let ids = ids(&function);
                let category = match device.category.as_str() {
                    "" => String::new(),
                    category => format!(" of category {category:?}"),
                };
                let directory = self.config.driver_directory.display();
                Err(Failure::new(
                    "no-driver",
                    format!("no plugin{category} in {directory} is for device {address} ({ids})"),
                    "install a plugin for it there",
                ))
            }
            [(_, failure)] => Err(failure.clone()),
            // The best one had reason to start; what the others lacked may be said with it.
            [(_, best), ..] => {
                let all: Vec<_> = service
                    .failed
                    .iter()
                    .map(|(name, why)| format!("{name}: {}", why.message))
                    .collect();
                let count = all.len();
                let message = format!("none of {count} drivers started: {}", all.join("; "));
                Err(Failure { message, ..best.clone() })
            }
        }
    }

    /// A driver did not start on a device that the next best one may start on. Whether there is
    /// such a one.
    pub(super) fn try_next(&mut self, at: usize, failure: &Failure, is_retry: bool) -> bool {
        let service = &mut self.services[at];
        let (None, Some(driver)) = (&service.device.driver, service.driver.clone()) else {
            return false;
        };
        service.failed.push((driver.clone(), failure.clone()));
        if self.choose_plugin(at).is_err() {
            return false;
        }
        let device = &self.services[at].device.name;
        warn!(device, driver; "the next best driver is tried: {}", failure.message);
        self.start_taken(at, if is_retry { Cause::Death } else { Cause::Asked });
        true
    }

    /// Whether a device has to be taken first: a PCI function, where iohost may. Refused is what no
    /// plugin is for, and what would have to be bound and may not be.
    fn is_to_be_taken(&self, at: usize) -> Result<bool, Failure> {
        let device = &self.services[at].device;
        self.choose_plugin(at)?;
        let Location::Pci(address) = device.location else { return Ok(false) };
        if device.bind {
            return Ok(true);
        }
        let has = self.options.sysfs.function(address).map_err(from_pci)?.driver;
        let wanted = device.binding().driver();
        if has.as_deref() == Some(wanted) {
            return Ok(false);
        }
        let has = has.unwrap_or_else(|| "no driver".into());
        Err(Failure::new(
            Code::NotBound.name(),
            format!("device {address} is bound to {has}, not to {wanted}"),
            format!(
                "take it with `iohost bind {address}`, or set `bind = true` for it in the \
                 configuration"
            ),
        ))
    }

    /// Devices were taken, or given back, or not.
    pub(super) fn hear_of_bindings(&mut self) {
        for (address, done) in self.bindings.finished() {
            let at = self.position_called(&address.to_string());
            match (at, done) {
                (Some(at), Done::Taken(order, result)) => self.taken(at, &order, result),
                (Some(at), Done::GivenBack(result)) => self.given_back(at, result),
                // A service is kept while something is done for it.
                (None, done) => debug!(device:% = address, done:? = done; "for no service"),
            }
        }
    }

    fn taken(&mut self, at: usize, order: &Order, result: Result<(), Failure>) {
        let service = &mut self.services[at];
        service.persists |= order.persist && result.is_ok();
        match (&service.state, result) {
            (State::Taking { is_unwanted: true, .. }, _) => self.stopped(at),
            (State::Taking { cause, .. }, Ok(())) => {
                let cause = *cause;
                self.start_taken(at, cause);
            }
            (State::Taking { .. }, Err(failure)) => self.go_down(at, failure),
            // What was added to a service that runs; one that ended meanwhile has said so.
            (State::Running { ready, .. }, result) => {
                let (service_name, driver) = (service.device.name.clone(), ready.driver.clone());
                let bound = result.map(|()| Bound { service: service_name, driver });
                for answer in service.binds.drain(..) {
                    answer.give(bound.clone());
                }
            }
            _ => {}
        }
    }

    /// 2: the driver runs.
    pub(super) fn became_ready(&mut self, at: usize, mut ready: Ready) {
        let read = |text: &String| match Description::parse(text) {
            Ok(interface) if 2 + 3 * interface.queues.len() <= MOST_DESCRIPTORS => Ok(interface),
            Ok(interface) => Err(format!("an interface of {} queues", interface.queues.len())),
            Err(err) => Err(err.to_string()),
        };
        let all = std::iter::once(&ready.interface).chain(&ready.further_interfaces);
        let interfaces = match all.map(read).collect::<Result<Vec<_>, _>>() {
            Ok(interfaces) => interfaces,
            Err(words) => return self.condemn(at, protocol(&words)),
        };
        if let Some(failure) = self.unfit_version(at, &interfaces) {
            return self.condemn(at, failure);
        }
        let service = &mut self.services[at];
        let old = mem::replace(&mut service.state, State::Down(stopping()));
        let State::Starting(mut host) = old else {
            unreachable!("became_ready is called for a service that starts");
        };
        host.deadline = None;
        host.was_ready = true;
        ready.is_registered |= host.is_registered;
        let is_taken_over = mem::take(&mut host.is_taken_over);
        service.was_taken_over |= is_taken_over;
        host.is_not_replaced();
        info!(
            device = service.device.name, driver = ready.driver, backend = ready.backend,
            reset = ready.reset, incarnation = service.incarnation; "driver running"
        );
        service.driver = Some(ready.driver.clone());
        service.reset = Some(ready.reset.clone());
        service.sandbox = Some(ready.sandbox.clone().unwrap_or_else(|| "off".to_owned()));
        for answer in service.binds.drain(..) {
            let service = service.device.name.clone();
            answer.give(Ok(Bound { service, driver: ready.driver.clone() }));
        }
        service.state = State::Running { host, ready, interfaces };
        if is_taken_over && !self.sessions_fit(at) {
            return self.condemn(at, protocol("sessions with other queues than its interface has"));
        }
        self.keep_sessions_that_fit(at);
        self.version_runs(at);
        self.watch_for_hangs(at);
    }
}

fn disabled(device: &DeviceConfig) -> Failure {
    Failure::new(
        "disabled",
        format!(
            "device {:?} is disabled in line {} of the configuration",
            device.name, device.line
        ),
        "take `disabled` out of the device there, then: iohost reload",
    )
}

/// Why a plugin was chosen.
fn in_words(candidates: &[(i32, &Plugin)], chosen: &str, failed: &[(String, Failure)]) -> String {
    if let [(score, _)] = candidates {
        return format!("it alone is for the device (score {score})");
    }
    let describe = |(score, plugin): &(i32, &Plugin)| {
        let name = &plugin.info.name;
        match failed.iter().find(|(failed, _)| failed == name) {
            Some((_, why)) => format!("{name} (score {score}, not started: {})", why.message),
            None => format!("{name} (score {score})"),
        }
    };
    let all: Vec<_> = candidates.iter().map(describe).collect();
    let why = match failed.is_empty() {
        true => "it fits best",
        false => "it fits best of those that start",
    };
    let equals = |score| candidates.iter().filter(|(other, _)| *other == score).count() > 1;
    let tie = candidates.iter().any(|(score, plugin)| plugin.info.name == chosen && equals(*score));
    let tie = if tie { ", the first by name among equals" } else { "" };
    format!("{why}{tie}: {}", all.join(", "))
}
