//! How a driver host ends, and what its service becomes then. The numbers are those of the picture at
//! [`State`].

use std::mem;
use std::time::Instant;

use iohost_control::crash;
use iohost_control::host::{Failure, ToHost};
use iohost_control::varlink::Unbound;
use iohost_event::PacketError;
use iohost_sandbox::call_name;
use log::{debug, error, warn};
use nix::sys::signal::Signal;

use super::{Actor, given_back, protocol, why};
use crate::config::Location;
use crate::request::stopping;
use crate::restart::Decision;
use crate::service::{Cause, Deadline, Ending, LastWords, Next, State, Then};

impl Actor {
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
    fn give_up(&mut self, at: usize) {
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
