//! What the daemon does about what happens to a device: somebody wants it back, it reports an
//! error, it is gone, it comes back, it could not be made safe.
//!
//! The driver host only tells; what follows is decided here, as the driver may be what hangs.

use std::mem;

use iohost_control::host::{DeviceEvent, Failure, Outcome, Quiesced, ToHost};
use iohost_control::varlink::Unbound;
use iohost_doctor::Code;
use iohost_pci::Hotplug;
use log::{error, info, warn};

use super::Actor;
use crate::bindings::from_pci;
use crate::config::{ErrorPolicy, Location};
use crate::request::stopping;
use crate::service::{Cause, Ending, Next, Service, State, Then};

impl Actor {
    /// A driver host says what became of making its device safe.
    pub(super) fn quiesced(&mut self, at: usize, quiesced: Quiesced) {
        let service = &mut self.services[at];
        let device = &service.device.name;
        match quiesced.outcome {
            Outcome::Quarantined => {
                error!(device, reason = quiesced.how; "the device is not fit to be used");
            }
            outcome => info!(device, outcome:?, how = quiesced.how; "the device is safe"),
        }
        service.quiesced = Some(quiesced.clone());
        self.finish_report(at, &quiesced);
    }

    /// Something happened to a device whose driver starts or runs.
    pub(super) fn device_event(&mut self, at: usize, event: DeviceEvent) {
        let device = &self.services[at].device;
        let name = device.name.clone();
        warn!(device = name, event:?; "the device has news");
        match (event, &device.location) {
            (DeviceEvent::RemovalRequested, _) => {
                let why = removed(&name, "somebody took the device back");
                self.end(at, ToHost::LetGo, Ending::Removed, why);
            }
            (DeviceEvent::Gone, Location::Pci(_)) => {
                let why = removed(&name, "the device does not answer any more");
                self.end(at, ToHost::LetGo, Ending::Removed, why);
            }
            // Its server may come back at any moment, and nobody would tell.
            (DeviceEvent::Gone, Location::Socket(_)) => {
                let why = removed(&name, "the device's server has left");
                self.end(at, ToHost::LetGo, Ending::Died, why);
            }
            (DeviceEvent::Error, _) => {
                let next = format!("read the kernel log (dmesg) for it; then: iohost bind {name}");
                let why = Failure::new(
                    "device-error",
                    format!("device {name:?} reported an error that it did not correct"),
                    next,
                );
                match device.on_error {
                    ErrorPolicy::Notify => {}
                    ErrorPolicy::Reset => self.end(at, ToHost::Stop, Ending::Died, why),
                    ErrorPolicy::Isolate => self.end(at, ToHost::Stop, Ending::Isolated, why),
                }
            }
        }
    }

    /// A driver wants to end.
    pub(super) fn terminate(&mut self, at: usize) {
        let name = &self.services[at].device.name;
        let why = Failure::new(
            "terminated",
            format!("the driver of {name:?} has ended itself"),
            format!("read its log for the reason, then start it again: iohost bind {name}"),
        );
        info!(device = name; "the driver ends itself");
        self.end(at, ToHost::Stop, Ending::Terminated, why);
    }

    /// Ends a driver for what happened to its device: clients are told why, and a driver that has
    /// not ended in time is killed.
    fn end(&mut self, at: usize, message: ToHost, ending: fn(Failure) -> Ending, why: Failure) {
        let patience = match message {
            ToHost::LetGo => self.options.patience.removal,
            _ => self.options.patience.stop,
        };
        let service = &mut self.services[at];
        let old = mem::replace(&mut service.state, State::Down(stopping()));
        let mut host = match old {
            State::Starting(host) | State::Running { host, .. } => host,
            // It stops already: only, whoever waits for the device waits no longer than this.
            State::Stopping(host) => host,
            other => {
                service.state = other;
                return;
            }
        };
        for answer in service.binds.drain(..) {
            answer.give(Err(why.clone()));
        }
        service.last_death = Some(why.clone());
        // A process that does not read its messages is killed when its time is over.
        let _ = host.process.send(&message, &[]);
        host.has_time_at_most(patience);
        host.ending = Some(ending(why));
        service.state = State::Stopping(host);
    }

    /// A driver host has ended, and its device is not fit to be used.
    pub(super) fn is_unfit(&self, at: usize) -> Option<Failure> {
        let service = &self.services[at];
        let quiesced = service.quiesced.as_ref()?;
        (quiesced.outcome == Outcome::Quarantined).then(|| unfit(service, quiesced))
    }

    /// A driver host has ended that was told to for this; `in_order` when it has closed its device
    /// as it was told, too.
    pub(super) fn ended(&mut self, at: usize, ending: Ending, in_order: bool) {
        if let Ending::Removed(why) = ending {
            return self.was_removed(at, why);
        }
        if let Some(unfit) = self.is_unfit(at) {
            return self.quarantine(at, unfit);
        }
        let was_safe = in_order || self.services[at].quiescing;
        self.services[at].quiescing = false;
        match ending {
            Ending::Replaced if self.stopping => self.stopped(at),
            Ending::Replaced if self.services[at].upgrade.is_some() => {
                self.next_version(at, in_order)
            }
            // The next driver host begins with making the device safe.
            Ending::Replaced => self.start(at, Cause::Asked),
            Ending::Removed(_) => unreachable!("dealt with above"),
            Ending::Stopped => self.stopped(at),
            Ending::Terminated(_) if self.stopping => self.stopped(at),
            Ending::Terminated(_) if !was_safe => self.quiesce_then(at, ending),
            Ending::Terminated(why) => self.put_away(at, Then::GoDown(why)),
            Ending::Died(_) if self.stopping => self.stopped(at),
            // The next driver host begins with making the device safe.
            Ending::Died(why) => self.died(at, why),
            Ending::Isolated(_) if !was_safe => self.quiesce_then(at, ending),
            // Somebody has asked for the device meanwhile, and it is safe.
            Ending::Isolated(_) if !self.services[at].unbinds.is_empty() => self.stopped(at),
            Ending::Isolated(why) => self.quarantine(at, why),
        }
    }

    /// Has a driver host without a driver make the device safe, which the one before it did not,
    /// and goes on then.
    pub(super) fn quiesce_then(&mut self, at: usize, ending: Ending) {
        self.services[at].quiescing = true;
        match self.launch(at, None, Cause::Asked) {
            Ok(mut host) => {
                let service = &mut self.services[at];
                info!(device = service.device.name, pid = host.process.pid(); "making the device safe");
                let _ = host.process.send(&ToHost::Stop, &[]);
                host.ending = Some(ending);
                service.state = State::Stopping(host);
            }
            Err(failure) => {
                warn!(reason = failure.message; "nobody makes the device safe");
                self.ended(at, ending, false);
            }
        }
    }

    fn was_removed(&mut self, at: usize, why: Failure) {
        let service = &mut self.services[at];
        warn!(device = service.device.name; "device removed: {}", why.message);
        // Who has it now has it. How it was before us stays noted for the day that it comes back.
        service.is_removed = true;
        service.state = State::Down(why);
        for answer in service.unbinds.drain(..) {
            answer.give(Ok(Unbound { kernel_driver: None }));
        }
        match service.next.take() {
            Some(Next::Replace(device)) => service.device = *device,
            Some(Next::Remove) => return drop(self.services.remove(at)),
            None => {}
        }
        if mem::take(&mut service.is_back) && !self.stopping {
            self.start_again(at);
        }
    }

    /// Nothing but a request starts it again. The device stays in our hands.
    pub(super) fn quarantine(&mut self, at: usize, why: Failure) {
        let service = &mut self.services[at];
        error!(device = service.device.name, reason = why.message; "device quarantined");
        for answer in service.binds.drain(..) {
            answer.give(Err(why.clone()));
        }
        for answer in service.unbinds.drain(..) {
            answer.give(Err(why.clone()));
        }
        if self.stopping {
            self.trouble.get_or_insert_with(|| why.clone());
        }
        service.last_death = Some(why.clone());
        service.state = State::Quarantined(why);
        match service.next.take() {
            Some(Next::Replace(device)) => service.device = *device,
            // It stays in our hands until somebody has looked, and goes then.
            Some(Next::Remove) => service.on_request = true,
            None => {}
        }
    }

    /// The kernel has announcements: devices may be there again, or be new.
    pub(super) fn hear_hotplug(&mut self) {
        while let Some(event) = self.hotplug.as_ref().and_then(|socket| socket.next_event()) {
            if self.stopping {
                continue;
            }
            for at in 0..self.services.len() {
                if !self.is_back(at, &event) {
                    continue;
                }
                match &self.services[at].state {
                    State::Stopping(_) => self.services[at].is_back = true,
                    _ => self.start_again(at),
                }
            }
            match event {
                Hotplug::Added(address) => self.appeared(address),
                Hotplug::Missed => self.look_for_devices(),
                Hotplug::Bound(..) => {}
            }
        }
    }

    /// The device of a service is there again.
    fn start_again(&mut self, at: usize) {
        let service = &mut self.services[at];
        service.is_removed = false;
        // Plugged in anew: what its predecessor did is no sign of what it will do.
        service.deaths.forget();
        info!(device = service.device.name; "the device is there again");
        self.start(at, Cause::Asked);
    }

    /// Whether this is the coming of a service's device that is waited for. One that was unbound by hand is back when
    /// it is bound again, and not because it is still there.
    fn is_back(&self, at: usize, event: &Hotplug) -> bool {
        let service = &self.services[at];
        let Location::Pci(ours) = service.device.location else { return false };
        // A device that was given up is held by us, so it can come only after it went.
        let is_replaced = matches!(service.state, State::Quarantined(_))
            && matches!(event, Hotplug::Added(address) if *address == ours);
        if is_replaced && service.device.bind {
            return true;
        }
        let is_awaited = match &service.state {
            // One that was not there yet, or not ours, has never been: it comes in the same way.
            State::Down(why) => {
                service.is_removed
                    || ["no-such-device", Code::NotBound.name()].contains(&&*why.code)
            }
            // The driver host has let the device go, and we have not heard of its end yet.
            State::Stopping(host) => {
                matches!(host.ending, Some(Ending::Removed(_))) && !matches!(event, Hotplug::Missed)
            }
            _ => false,
        };
        let wanted = service.device.binding().driver();
        is_awaited
            && match event {
                Hotplug::Added(address) => *address == ours && service.device.bind,
                Hotplug::Bound(address, driver) => *address == ours && driver == wanted,
                Hotplug::Missed => {
                    let function = self.options.sysfs.function(ours).map_err(from_pci);
                    function.is_ok_and(|function| function.driver.as_deref() == Some(wanted))
                }
            }
    }
}

fn removed(name: &str, how: &str) -> Failure {
    Failure::new(
        "removed",
        format!("device {name:?} was removed: {how}"),
        format!("it starts again when the device comes back, or by: iohost bind {name}"),
    )
}

fn unfit(service: &Service, quiesced: &Quiesced) -> Failure {
    let name = &service.device.name;
    Failure::new(
        "device-quarantined",
        format!("device {name:?} is not fit to be used: {}", quiesced.how),
        format!("power-cycle the device, then start it again: iohost bind {name}"),
    )
}
