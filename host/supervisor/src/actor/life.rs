//! The life of a service. The numbers are those of the picture at [`State`].

use std::mem;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::time::Instant;

use iohost_control::crash;
use iohost_control::host::{
    Confinement, Failure, MOST_DESCRIPTORS, Ready, Start, StartDescriptors, ToHost,
};
use iohost_control::varlink::{Bound, Unbound};
use iohost_doctor::Code;
use iohost_event::PacketError;
use iohost_interface::Description;
use iohost_memory::flight_recorder::Recorder;
use iohost_pci::{Order, Persist};
use iohost_sandbox::call_name;
use log::{debug, error, info, warn};
use nix::sys::signal::Signal;
use nix::unistd::Uid;

use super::{Actor, given_back, ids, protocol, why};
use crate::bindings::{Done, from_pci};
use crate::config::{DeviceConfig, Location, SandboxMode};
use crate::driver_process::DriverProcess;
use crate::needs;
use crate::plugins::Plugin;
use crate::request::stopping;
use crate::restart::Decision;
use crate::service::{Cause, Deadline, Ending, Host, LastWords, Next, State, Then};
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
    pub(super) fn start_taken(&mut self, at: usize, cause: Cause) {
        match self.start_host(at, cause) {
            Ok(host) => self.services[at].state = State::Starting(host),
            Err(failure) => self.go_down(at, failure),
        }
    }

    pub(super) fn start_host(&mut self, at: usize, cause: Cause) -> Result<Host, Failure> {
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
    fn try_next(&mut self, at: usize, failure: &Failure, is_retry: bool) -> bool {
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
    pub(super) fn is_to_be_taken(&self, at: usize) -> Result<bool, Failure> {
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

    pub(super) fn taken(&mut self, at: usize, order: &Order, result: Result<(), Failure>) {
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

    /// 6: asks a driver host to stop; a service without one is stopped already.
    pub(super) fn stop(&mut self, at: usize) {
        let service = &mut self.services[at];
        let old = mem::replace(&mut service.state, State::Down(stopping()));
        let mut host = match old {
            State::Starting(host) | State::Running { host, .. } => host,
            State::Stopping(mut host) => {
                host.is_not_replaced();
                service.state = State::Stopping(host);
                return;
            }
            State::Taking { cause, .. } => {
                service.state = State::Taking { cause, is_unwanted: true };
                return service.refuse_binds(&given_back());
            }
            State::GivingBack { then } => {
                let then = if let Then::Start = then { Then::Stop } else { then };
                service.state = State::GivingBack { then };
                return;
            }
            State::Down(_) | State::Restarting { .. } | State::Quarantined(_) => {
                return self.stopped(at);
            }
        };
        host.is_not_replaced();
        let sent = host.process.send(&ToHost::Stop, &[]);
        if !host.killed {
            host.has_time(self.options.patience.stop);
        }
        service.state = State::Stopping(host);
        service.refuse_binds(&given_back());
        if let Err(PacketError::WouldBlock) = sent {
            self.condemn(at, protocol("it does not read its messages"));
        }
    }

    /// 7: the driver host is gone, as was wanted.
    pub(super) fn stopped(&mut self, at: usize) {
        self.put_away(at, Then::Stop);
    }

    /// 3: it cannot run, and only a request tries again.
    pub(super) fn go_down(&mut self, at: usize, failure: Failure) {
        let service = &mut self.services[at];
        error!(
            device = service.device.name, code = failure.code, next = failure.next;
            "driver not started: {}", failure.message
        );
        let is_kept = service.persists && service.binds.is_empty();
        if service.on_request && !is_kept {
            // Nobody asked for it by configuration; what was taken for it goes back.
            self.put_away(at, Then::GoDown(failure));
        } else {
            service.refuse_binds(&failure);
            service.state = State::Down(failure);
        }
    }

    /// 9: gives the device back, if it is ours.
    pub(super) fn put_away(&mut self, at: usize, then: Then) {
        let service = &mut self.services[at];
        service.state = State::GivingBack { then };
        match service.device.location {
            Location::Pci(address) if !service.is_lost => {
                // At its end the daemon keeps in mind what persists.
                let for_good = !self.stopping || !service.unbinds.is_empty();
                self.bindings.give_back(address, for_good);
            }
            _ => self.given_back(at, Ok(None)),
        }
    }

    /// 10: the device is given back, as far as that was possible.
    pub(super) fn given_back(&mut self, at: usize, result: Result<Option<String>, Failure>) {
        let service = &mut self.services[at];
        let result = match result {
            Err(failure) if service.is_removed && failure.code == "no-such-device" => Ok(None),
            result => result,
        };
        if let Err(failure) = &result {
            error!(
                device = service.device.name, next = failure.next;
                "device not given back: {}", failure.message
            );
            self.trouble.get_or_insert_with(|| failure.clone());
        }
        let next = format!("start it again: iohost bind {}", service.device.name);
        let stopped = Failure::new("stopped", "it was stopped on request", next);
        let State::GivingBack { then } =
            mem::replace(&mut service.state, State::Down(stopped.clone()))
        else {
            unreachable!("a device is given back in that state alone, and it waits for this");
        };
        if let (Then::Start, false) = (&then, self.stopping) {
            return self.start(at, Cause::Asked);
        }
        let why = match then {
            Then::GoDown(failure) => failure,
            Then::Stop | Then::Start => stopped,
        };
        service.refuse_binds(&why);
        for answer in service.unbinds.drain(..) {
            answer.give(result.clone().map(|kernel_driver| Unbound { kernel_driver }));
        }
        (service.group, service.persists) = (false, false);
        service.state = State::Down(why);
        match (service.next.take(), self.stopping) {
            (Some(Next::Remove), _) => {
                self.services.remove(at);
                return;
            }
            (Some(Next::Replace(device)), false) if !service.is_lost => {
                service.device = *device;
                service.deaths.forget();
                return self.start(at, Cause::Asked);
            }
            _ => {}
        }
        if service.on_request && !self.stopping {
            self.services.remove(at);
        }
    }

    /// A driver host has ended.
    pub(super) fn bury(&mut self, number: u64) {
        // What it said before its end comes first.
        self.listen_to(number);
        let Some(at) = self.with_host(number) else { return };
        let service = &mut self.services[at];
        let Some(host) = service.host_mut() else { return };
        let Some(mut exit) = host.process.ended() else { return };
        let pid = host.process.pid();
        if host.process.was_killed_by(Signal::SIGSYS) {
            exit.words += &match service.refused_calls.last() {
                Some(call) => format!(": seccomp: system call {call} ({})", call_name(*call)),
                None => ": seccomp: a system call of a thread that had blocked SIGSYS".to_owned(),
            };
        }
        let how = exit.words.clone();
        let Some(host) = service.host_mut() else { return };
        let (last_words, is_retry) = (host.last_words.clone(), host.is_retry);
        let ending = host.ending.take();
        if let Some(upgrade) = &mut service.upgrade {
            upgrade.host_ended(last_words.clone(), &how);
        }
        debug!(device = service.device.name, pid, how = how; "driver host ended");
        service.orphan_sessions();

        let name = service.device.name.clone();
        let unexpected = || {
            Failure::new(
                "driver-died",
                format!("the driver host of {name:?} (process {pid}) {how}"),
                "read the log for what it said last; `iohost status` shows when it starts again",
            )
        };
        self.keep_evidence(at, exit);
        if let Some(ending) = ending {
            if let (Ending::Isolated(why), false) = (&ending, self.services[at].quiescing) {
                self.report(at, why, crash::Decision::Quarantine);
            }
            let in_order = matches!(last_words, Some(LastWords::Stopped));
            return self.ended(at, ending, in_order);
        }
        if let Some(unfit) = self.is_unfit(at) {
            self.report(at, &unfit, crash::Decision::Quarantine);
            return self.quarantine(at, unfit);
        }
        let service = &mut self.services[at];
        let old = mem::replace(&mut service.state, State::Down(stopping()));
        match (old, last_words) {
            (State::Stopping(_), Some(LastWords::Stopped)) => self.stopped(at),
            // Its driver never ran, and it said why; there is nothing to stop.
            (State::Stopping(host), Some(LastWords::Said(_))) if !host.was_ready => {
                self.stopped(at);
            }
            (State::Stopping(_), words) => {
                let why = match words {
                    Some(LastWords::Said(failure) | LastWords::Found(failure)) => failure,
                    _ => unexpected(),
                };
                warn!(device = service.device.name; "driver not stopped in order: {}", why.message);
                self.report(at, &why, crash::Decision::Stop);
                self.trouble.get_or_insert(why);
                // It was to make its device safe, and has not: another one does.
                self.quiesce_then(at, Ending::Stopped);
            }
            (State::Starting(_), Some(LastWords::Said(failure))) if is_the_drivers(&failure) => {
                if !self.try_next(at, &failure, is_retry) {
                    match self.choose_plugin(at).err().unwrap_or(failure) {
                        failure if is_retry => self.died(at, failure),
                        failure => self.go_down(at, failure),
                    }
                }
            }
            (State::Starting(_), Some(LastWords::Said(failure))) if !is_retry => {
                self.go_down(at, failure);
            }
            (State::Starting(_), words) => {
                let why = why(words).unwrap_or_else(unexpected);
                let is_hung = why.code == "driver-hung";
                if !(is_hung && self.try_next(at, &why, is_retry)) {
                    self.died(at, why);
                }
            }
            (State::Running { .. }, words) => {
                let why = why(words).unwrap_or_else(unexpected);
                self.died(at, why);
            }
            (other, _) => service.state = other,
        }
    }

    /// 4: decides whether and when the next driver host starts.
    pub(super) fn died(&mut self, at: usize, why: Failure) {
        let now = Instant::now();
        let policy = self.policy(at);
        let decision = self.services[at].deaths.add(now, &policy);
        let shown = match decision {
            Decision::RestartAfter(pause) => {
                crash::Decision::Restart { pause_ms: pause.as_millis() as u64 }
            }
            Decision::Quarantine => crash::Decision::Quarantine,
        };
        self.report(at, &why, shown);
        let service = &mut self.services[at];
        service.refuse_binds(&why);
        service.last_death = Some(why.clone());
        // It is matched anew.
        service.failed.clear();
        match decision {
            Decision::RestartAfter(pause) => {
                warn!(
                    device = service.device.name, pause_ms = pause.as_millis() as u64,
                    reason = why.message; "driver host died, restarting"
                );
                service.state = State::Restarting { at: now + pause, why };
            }
            Decision::Quarantine => {
                error!(
                    device = service.device.name, reason = why.message;
                    "driver host died too often"
                );
                let next = format!(
                    "correct the cause, then start it again: iohost bind {}",
                    service.device.name
                );
                let ending = Ending::Isolated(Failure { next, ..why });
                self.quiesce_then(at, ending);
            }
        }
    }

    /// Kills a driver host for what it did; its end is dealt with when it comes.
    pub(super) fn condemn(&mut self, at: usize, failure: Failure) {
        let patience = self.options.patience.stop;
        let service = &mut self.services[at];
        let device = service.device.name.clone();
        let Some(host) = service.host_mut() else { return };
        if host.killed {
            return;
        }
        warn!(device, pid = host.process.pid(), reason = failure.message; "killing driver host");
        host.last_words = Some(LastWords::Found(failure));
        host.killed = true;
        host.has_time(patience);
        host.process.kill();
    }

    pub(super) fn check_deadlines(&mut self, now: Instant) {
        // From behind: a service that is done can leave the list.
        for at in (0..self.services.len()).rev() {
            self.end_late_openings(at, now);
            self.look_for_hang(at, now);
            let service = &mut self.services[at];
            if let State::Restarting { at: due, .. } = service.state {
                if due <= now && !self.stopping {
                    self.start(at, Cause::Death);
                }
                continue;
            }
            let Some(host) = service.host() else { continue };
            let Some(Deadline { patience, .. }) =
                host.deadline.filter(|deadline| deadline.at <= now)
            else {
                continue;
            };
            if host.killed {
                self.give_up(at);
                continue;
            }
            let name = &service.device.name;
            let what = match &service.state {
                State::Starting(_) => "did not become ready",
                State::Stopping(_) => "did not stop",
                _ => "closed its connection but did not end",
            };
            let failure = Failure::new(
                "driver-hung",
                format!("the driver host of {name:?} {what} within {patience:?}"),
                "read the log for what it did last; IOHOST_LOG=debug shows more",
            );
            self.condemn(at, failure);
        }
    }

    /// A driver host that SIGKILL does not end hangs in the kernel, with its device. Nothing of
    /// that device is touched again.
    pub(super) fn give_up(&mut self, at: usize) {
        let service = &mut self.services[at];
        let pid = service.host().map_or(0, |host| host.process.pid());
        let failure = Failure::new(
            "driver-unkillable",
            format!("the driver host of {:?} (process {pid}) does not die", service.device.name),
            "read the kernel log (dmesg); the device may need a power cycle",
        );
        error!(device = service.device.name, pid; "driver host does not die");
        self.trouble.get_or_insert_with(|| failure.clone());
        for answer in service.unbinds.drain(..) {
            answer.give(Err(failure.clone()));
        }
        service.refuse_binds(&failure);
        service.is_lost = true;
        service.state = State::Down(failure);
    }
}

/// Whether a driver did not start for what it or its file is, so that another one may.
fn is_the_drivers(failure: &Failure) -> bool {
    failure.code == "driver-start" || failure.code.starts_with("plugin-")
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
