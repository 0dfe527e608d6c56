//! Another version of a driver in the place of the one that runs.
//!
//! The old one is asked to drain: it answers what is under way, saves what the next one has to know,
//! and stops as on request; its sessions wait as for any driver host that is to be followed by
//! another one. If the new one does not come to run, whatever it does instead, the old one is
//! started again with the same state, and the asker is told why.

use std::mem;
use std::os::fd::OwnedFd;
use std::path::Path;

use iohost_control::host::{Failure, StateSize, ToHost};
use iohost_control::varlink::Upgraded;
use iohost_interface::Description;
use log::{info, warn};

use super::{Actor, ids, not_running, protocol, word};
use crate::config::Location;
use crate::plugins::{Plugin, Plugins};
use crate::request::{Answer, stopping};
use crate::service::{Cause, Ending, State};
use crate::upgrade::{Step, Upgrade};

impl Actor {
    /// Checks the new version, and asks the old one to come to an end.
    pub(super) fn upgrade(&mut self, word: &str, file: &Path, answer: Answer<Upgraded>) {
        let (at, new, installed) = match self.checked_version(word, file) {
            Ok(checked) => checked,
            Err(failure) => return answer.give(Err(failure)),
        };
        let service = &mut self.services[at];
        let old = mem::replace(&mut service.state, State::Down(stopping()));
        let State::Running { mut host, ready, interfaces } = old else {
            unreachable!("checked_version refuses it");
        };
        let serves = (ready.clone(), interfaces.clone());
        let upgrade = match Upgrade::begin(file, &new, &installed, serves, answer) {
            Ok(upgrade) => upgrade,
            Err((failure, answer)) => {
                service.state = State::Running { host, ready, interfaces };
                return answer.give(Err(failure));
            }
        };
        info!(device = service.device.name, file:% = file.display(); "upgrading the driver");
        let (drain, stop) = (self.options.patience.drain, self.options.patience.stop);
        // A process that does not read its messages is killed when its time is over.
        let _ = host.process.send(&ToHost::Drain { limit_ms: drain.as_millis() as u64 }, &[]);
        host.has_time(drain + stop);
        host.ending = Some(Ending::Replaced);
        service.upgrade = Some(upgrade);
        service.state = State::Stopping(host);
    }

    /// The service, the new version, and where the old one is installed.
    fn checked_version(
        &mut self,
        word: &str,
        file: &Path,
    ) -> Result<(usize, Plugin, std::path::PathBuf), Failure> {
        if self.stopping {
            return Err(stopping());
        }
        let at = self.find(word)?;
        let State::Running { ready, .. } = &self.services[at].state else {
            return Err(not_running(&self.services[at]));
        };
        let running = ready.driver.clone();
        let info = (self.options.inspect)(file)?;
        let mismatch = |what: String| {
            Failure::new(
                "upgrade-mismatch",
                format!("{} {what}", file.display()),
                "give a plugin of the driver that runs, for this device",
            )
        };
        if info.name != running {
            return Err(mismatch(format!("is driver {:?}, not {running:?}", info.name)));
        }
        let device = &self.services[at].device;
        if let Location::Pci(address) = device.location {
            let function =
                self.options.sysfs.function(address).map_err(crate::bindings::from_pci)?;
            let fits = info.personalities.iter().any(|one| one.fit(ids(&function)).is_some());
            if !fits {
                return Err(mismatch(format!("is not for device {address}")));
            }
        }
        crate::needs::check(&info, device, iohost_doctor::may_lock())?;
        self.plugins = Plugins::scan(&self.config.driver_directory, self.options.inspect)?;
        let installed = self.plugins.named(&running)?.file.clone();
        Ok((at, Plugin { file: file.to_owned(), info }, installed))
    }

    /// The old version has calls under way, and goes on.
    pub(super) fn not_drained(&mut self, at: usize, waiting: u64) {
        let service = &mut self.services[at];
        let Some(upgrade) = service.upgrade.take_if(|it| matches!(it.step, Step::Draining(..)))
        else {
            return self.condemn(at, protocol("it cannot drain, and was not asked to"));
        };
        let limit = self.options.patience.drain;
        let failure = Failure::new(
            "driver-busy",
            format!(
                "{:?} has {waiting} calls under way that were not answered in {limit:?}",
                word(service)
            ),
            "try again when its clients do less; the driver goes on as before",
        );
        let old = mem::replace(&mut service.state, State::Down(stopping()));
        match (old, &upgrade.step) {
            (State::Stopping(mut host), Step::Draining(ready, interfaces)) if !host.killed => {
                host.deadline = None;
                host.is_not_replaced();
                let (ready, interfaces) = (ready.clone(), interfaces.clone());
                service.state = State::Running { host, ready, interfaces };
            }
            (old, _) => service.state = old,
        }
        upgrade.finish(Err(failure));
    }

    /// The old version leaves something to the new one.
    pub(super) fn saved(&mut self, at: usize, size: StateSize, mut fds: Vec<OwnedFd>) {
        let service = &mut self.services[at];
        match (&mut service.upgrade, fds.pop()) {
            (Some(upgrade), Some(file)) if matches!(upgrade.step, Step::Draining(..)) => {
                upgrade.keep_state(size, file);
            }
            _ => self.condemn(at, protocol("it saves a state, and was not asked to")),
        }
    }

    /// The driver host of an upgrade has ended: in order the old one's, which makes room for the new
    /// one, or that of one which did not come to run.
    pub(super) fn next_version(&mut self, at: usize, in_order: bool) {
        let service = &mut self.services[at];
        let Some(upgrade) = &mut service.upgrade else { return };
        let unknown = || Failure::new("driver-died", "its process ended", "read the log");
        let why = upgrade.end.take();
        match &upgrade.step {
            Step::Draining(..) if in_order => {
                upgrade.step = Step::Trying;
                self.start(at, Cause::Asked);
            }
            Step::Trying => {
                let why = why.unwrap_or_else(unknown);
                warn!(
                    device = service.device.name, reason = why.message;
                    "the new version does not run, going back to the one before it"
                );
                upgrade.step = Step::GoingBack(why);
                // As after a death: if it does not start either, it is tried again.
                self.start(at, Cause::Death);
            }
            // It died before it had come to an end.
            Step::Draining(..) | Step::GoingBack(_) => {
                let why = why.unwrap_or_else(unknown);
                if let Some(upgrade) = service.upgrade.take() {
                    upgrade.finish(Err(why.clone()));
                }
                self.died(at, why);
            }
        }
    }

    /// Why the version that is ready is not fit to go on with the sessions of the one before it.
    pub(super) fn unfit_version(&self, at: usize, interfaces: &[Description]) -> Option<Failure> {
        let service = &self.services[at];
        let upgrade = service.upgrade.as_ref()?;
        let earlier = service.served.as_ref()?;
        let continues = |(kind, earlier): (usize, &Description)| {
            interfaces.get(kind).is_some_and(|interface| interface.continues(earlier))
        };
        let is_fit = earlier.iter().enumerate().all(continues);
        (matches!(upgrade.step, Step::Trying) && !is_fit).then(|| {
            Failure::new(
                "other-interface",
                "it serves another interface than the version that its clients use",
                "end its sessions and unbind the device, install the plugin, and bind it again",
            )
        })
    }

    /// A version runs, if there is an upgrade: the new one, or the old one again.
    pub(super) fn version_runs(&mut self, at: usize) {
        let service = &mut self.services[at];
        let Some(upgrade) = service.upgrade.take() else { return };
        let result = match &upgrade.step {
            Step::Draining(..) | Step::Trying => upgrade.install().map(|plugin| Upgraded {
                service: service.device.name.clone(),
                driver: service.driver.clone().unwrap_or_default(),
                plugin: plugin.display().to_string(),
                incarnation: service.incarnation,
            }),
            Step::GoingBack(why) => Err(Failure::new(
                "upgrade-failed",
                format!(
                    "the new version of driver {:?} does not run, and the one before it runs again: \
                     {}",
                    service.driver.as_deref().unwrap_or_default(),
                    why.message
                ),
                why.next.clone(),
            )),
        };
        if let Ok(upgraded) = &result {
            info!(device = service.device.name, file = upgraded.plugin; "driver upgraded");
        }
        upgrade.finish(result);
    }

    /// Ends upgrades of services that have gone another way: stopped, removed, quarantined.
    pub(super) fn settle_upgrades(&mut self) {
        for service in &mut self.services {
            let goes_on = match &service.state {
                State::Stopping(host) => matches!(host.ending, Some(Ending::Replaced)),
                State::Taking { .. } | State::Starting(_) => true,
                // The old version is tried again, with what it saved.
                State::Restarting { .. } => true,
                _ => false,
            };
            if goes_on && !self.stopping {
                continue;
            }
            if let Some(upgrade) = service.upgrade.take() {
                let why = not_running(service);
                upgrade.finish(Err(why));
            }
        }
    }
}
