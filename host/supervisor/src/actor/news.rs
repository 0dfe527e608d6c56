//! What driver hosts say, and what they and clients hear of services.

use std::collections::BTreeMap;

use iohost_control::host::{DeviceEvent, Failure, FromHost, PowerState, RunningService, ToHost};
use iohost_control::varlink::{Powered, Properties};
use iohost_event::PacketError;
use iohost_sandbox::call_name;
use log::{debug, info, warn};

use super::{Actor, protocol};
use crate::driver_process::{DriverProcess, Heard};
use crate::service::{Host, LastWords, Opening, Service, State};

/// Messages of one driver host that are dealt with before others get their turn.
const MESSAGES_PER_TURN: usize = 64;

/// What driver hosts say.
impl Actor {
    pub(super) fn with_host(&self, number: u64) -> Option<usize> {
        let is_it = |service: &Service| service.host().is_some_and(|host| host.number == number);
        self.services.iter().position(is_it)
    }

    pub(super) fn listen_to(&mut self, number: u64) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(at) = self.with_host(number) else { return };
            let Some(host) = self.services[at].host_mut() else { return };
            match host.process.receive() {
                Heard::Message(FromHost::HandedSession(session), fds) => {
                    self.session_handed_over(at, &session, fds);
                }
                Heard::Message(FromHost::Saved(size), fds) => self.saved(at, size, fds),
                Heard::Message(FromHost::HandedOver(handed), fds) => {
                    self.handed_over(at, handed, fds);
                }
                Heard::Message(message, _) => self.hear(at, message),
                Heard::Nothing => return,
                Heard::Closed => {
                    // It ends now, or it is killed.
                    host.has_time_at_most(self.options.patience.stop);
                    return;
                }
                Heard::Garbage(words) => return self.condemn(at, protocol(&words)),
            }
        }
        self.talkative.insert(number);
    }

    pub(super) fn hear(&mut self, at: usize, message: FromHost) {
        let patience = self.options.patience.stop;
        let service = &mut self.services[at];
        match (&mut service.state, message) {
            // It was found out in a lie before: it never runs.
            (State::Starting(host), FromHost::Ready(_)) if host.killed => {}
            (State::Starting(_), FromHost::Ready(ready)) => self.became_ready(at, ready),
            (
                State::Starting(host) | State::Running { host, .. } | State::Stopping(host),
                FromHost::Failed(failure),
            ) => {
                if !host.killed {
                    host.last_words = Some(LastWords::Said(failure));
                    host.has_time(patience);
                }
            }
            (
                State::Starting(_) | State::Running { .. } | State::Stopping(_),
                FromHost::Quiesced(quiesced),
            ) => self.quiesced(at, quiesced),
            (State::Starting(_) | State::Running { .. }, FromHost::DeviceEvent(event)) => {
                self.device_event(at, event);
            }
            // Whoever wants the device back does not wait for a stop that takes its time.
            (State::Stopping(host), FromHost::DeviceEvent(event)) => {
                if host.ending.is_none() && event == DeviceEvent::RemovalRequested {
                    self.device_event(at, event);
                }
            }
            (State::Stopping(host), FromHost::Stopped) => {
                if !host.killed {
                    host.last_words = Some(LastWords::Stopped);
                    host.has_time(patience);
                }
            }
            (State::Stopping(_), FromHost::NotDrained { waiting }) => self.not_drained(at, waiting),
            (State::Running { .. } | State::Stopping(_), FromHost::SessionOpened { session }) => {
                let known = service.sessions.get_mut(&session);
                let opening = known.and_then(|session| session.opening.take());
                if let Some(Opening { opened, fds, answer, .. }) = opening {
                    debug!(device = service.device.name, session; "session opened");
                    answer.give(Ok((opened, fds)));
                }
            }
            (State::Running { .. }, FromHost::SessionClosed { session, reason }) => {
                let ended = service.sessions.remove(&session);
                let opening = ended.and_then(|session| session.end(&self.poller));
                debug!(device = service.device.name, session, reason = reason; "session closed");
                if let Some(Opening { answer, .. }) = opening {
                    answer.give(Err(Failure::new(
                        "session-refused",
                        format!("the driver refused the session: {reason}"),
                        "read the driver's documentation for what it takes",
                    )));
                }
            }
            // Said before it handed over, and not handed over.
            (State::Starting(host), FromHost::SessionClosed { .. }) if host.is_taken_over => {}
            (State::Starting(host) | State::Running { host, .. }, FromHost::WatchServices)
                if host.told.is_none() =>
            {
                host.told = Some(BTreeMap::new())
            }
            (State::Starting(host) | State::Running { host, .. }, FromHost::Busy { is_busy }) => {
                host.is_busy = is_busy;
            }
            (State::Running { ready, .. }, FromHost::Registered) => {
                debug!(device = service.device.name; "visible from now on");
                ready.is_registered = true;
            }
            // Said on a queue of the driver's, before the host has said that it runs.
            (State::Starting(host), FromHost::Registered) => host.is_registered = true,
            (State::Starting(_) | State::Running { .. }, FromHost::Terminate) => self.terminate(at),
            (
                State::Starting(host) | State::Running { host, .. },
                FromHost::Power { state, is_late },
            ) => {
                power_news(&service.device.name, host, state, is_late);
            }
            (State::Running { host, .. }, FromHost::Properties { text }) => {
                for answer in host.asked_properties.drain(..) {
                    answer.give(Ok(Properties { entries: text.clone() }));
                }
            }
            (
                State::Starting(_) | State::Running { .. } | State::Stopping(_),
                FromHost::CallRefused { number },
            ) => self.call_refused(at, number),
            // Sent before it read that it has to stop.
            (
                State::Stopping(_),
                FromHost::Ready(_)
                | FromHost::SessionClosed { .. }
                | FromHost::Statistics(_)
                | FromHost::Properties { .. }
                | FromHost::Power { .. }
                | FromHost::Busy { .. }
                | FromHost::Registered
                | FromHost::Terminate
                | FromHost::WatchServices,
            ) => {}
            (State::Running { host, .. }, FromHost::Statistics(statistics)) => {
                for answer in host.asked.drain(..) {
                    answer.give(Ok(statistics.clone()));
                }
            }
            (_, message) => {
                let said = format!("an unexpected message: {message:?}");
                self.condemn(at, protocol(&said));
            }
        }
    }
}

impl Actor {
    /// The sandbox refused a driver host a system call. It is told of once for each, unless the
    /// process lies; then it is remembered as often as there are calls, and no more.
    fn call_refused(&mut self, at: usize, number: u32) {
        const MOST: usize = 512;
        let service = &mut self.services[at];
        let is_new = !service.refused_calls.contains(&number);
        if is_new && service.refused_calls.len() < MOST {
            service.refused_calls.push(number);
            warn!(
                device = service.device.name, call = call_name(number), number;
                "seccomp: the sandbox refused the driver a system call"
            );
        }
    }
}

/// What driver hosts and clients hear of services.
impl Actor {
    /// Tells each driver host that asked what has changed since it was told last: what has ended
    /// first. A service that restarted meanwhile has ended and begun.
    pub(super) fn tell_of_services(&mut self) {
        self.watchers.tell(&self.services);
        self.is_behind = false;
        // A driver host that was told of a service does not hear that it ended while it only has not
        // been taken over yet.
        if self.is_taking_over() {
            return;
        }
        if !self.services.iter().any(|service| service.host().is_some_and(|h| h.told.is_some())) {
            return;
        }
        let running: Vec<RunningService> =
            self.services.iter().filter_map(Service::running).collect();
        for service in &mut self.services {
            let Some(host) = service.host_mut() else { continue };
            let Some(told) = &mut host.told else { continue };
            match tell(&host.process, told, &running) {
                // One that is gone hears nothing, and its end is dealt with elsewhere.
                Ok(()) | Err(PacketError::Closed) => {}
                Err(_) => self.is_behind = true,
            }
        }
    }
}

/// What became of a power state: whoever asked for it has an answer.
fn power_news(device: &str, host: &mut Host, state: PowerState, is_late: bool) {
    if is_late {
        warn!(device, state:?; "the driver has not acknowledged its power state in 20 s");
    } else {
        info!(device, state:?; "the driver has another power state");
        host.power = state;
    }
    for (_, answer) in host.asked_power.extract_if(.., |(asked, _)| *asked == state) {
        answer.give(match is_late {
            false => Ok(Powered { state }),
            true => Err(Failure::new(
                "power-late",
                format!("the driver of {device:?} has not acknowledged the state within 20 s"),
                "read its log; `iohost status` shows when it has",
            )),
        });
    }
}

fn tell(
    process: &DriverProcess,
    told: &mut BTreeMap<String, u64>,
    running: &[RunningService],
) -> Result<(), PacketError> {
    let runs = |(name, incarnation): (&String, &u64)| {
        running.iter().any(|is| is.name == *name && is.incarnation == *incarnation)
    };
    let ended: Vec<String> =
        told.iter().filter(|told| !runs(*told)).map(|(name, _)| name.clone()).collect();
    for name in ended {
        process.send(&ToHost::ServiceEnded { name: name.clone() }, &[])?;
        told.remove(&name);
    }
    for service in running {
        if !told.contains_key(&service.name) {
            process.send(&ToHost::ServiceBegan(service.clone()), &[])?;
            told.insert(service.name.clone(), service.incarnation);
        }
    }
    Ok(())
}
