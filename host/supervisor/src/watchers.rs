//! What clients hear of services: one that runs, one that runs no more, and why.

use std::collections::BTreeMap;

use iohost_control::host::{Failure, RunningService};
use iohost_control::varlink::{EventKind, ServiceEvent};
use smol::channel::{self, Receiver, Sender};

use crate::service::{Ending, Service, State, Then};

/// Events that wait for one client. One that has more is told no more: its stream ends.
const MOST_WAITING: usize = 1024;

/// Everybody who watches. A client that is gone is noticed at the next event.
#[derive(Debug, Default)]
pub(crate) struct Watchers(Vec<Watcher>);

#[derive(Debug)]
struct Watcher {
    events: Sender<ServiceEvent>,
    /// The services it was told to run.
    told: BTreeMap<String, RunningService>,
}

impl Watchers {
    /// One more, who is told of the services that run now at the next `tell`.
    pub(crate) fn add(&mut self) -> Receiver<ServiceEvent> {
        let (events, receiver) = channel::bounded(MOST_WAITING);
        self.0.push(Watcher { events, told: BTreeMap::new() });
        receiver
    }

    /// Tells everybody what has changed since the last time: what has ended first. A service that
    /// restarted meanwhile has ended and begun.
    pub(crate) fn tell(&mut self, services: &[Service]) {
        if self.0.is_empty() {
            return;
        }
        let running: Vec<RunningService> = services.iter().filter_map(Service::running).collect();
        self.0.retain_mut(|watcher| {
            watcher.changes(&running).into_iter().all(|(kind, service)| {
                let reason = match kind {
                    EventKind::Began => None,
                    EventKind::Ended => Some(why_ended(&service, services).into()),
                };
                let RunningService { name, driver, interface, incarnation } = service;
                let event =
                    ServiceEvent { kind, service: name, driver, interface, incarnation, reason };
                watcher.events.try_send(event).is_ok()
            }) && !watcher.events.is_closed()
        });
    }
}

impl Watcher {
    /// What it has not been told yet, and is told now.
    fn changes(&mut self, running: &[RunningService]) -> Vec<(EventKind, RunningService)> {
        let ended = self.told.extract_if(.., |_, told| !running.contains(told));
        let mut changes: Vec<_> = ended.map(|(_, service)| (EventKind::Ended, service)).collect();
        for service in running {
            if !self.told.contains_key(&service.name) {
                self.told.insert(service.name.clone(), service.clone());
                changes.push((EventKind::Began, service.clone()));
            }
        }
        changes
    }
}

/// Why a service that ran runs no more, as far as the daemon still knows.
fn why_ended(ended: &RunningService, services: &[Service]) -> Failure {
    let stopped = || {
        Failure::new(
            "stopped",
            format!("service {:?} was stopped on request", ended.name),
            format!("start it again: iohost bind {}", ended.name),
        )
    };
    let Some(service) = services.iter().find(|service| service.device.name == ended.name) else {
        return stopped();
    };
    match &service.state {
        State::Down(why)
        | State::GivingBack { then: Then::GoDown(why) }
        | State::Restarting { why, .. }
        | State::Quarantined(why) => why.clone(),
        State::GivingBack { .. } => stopped(),
        State::Stopping(host) => {
            host.ending.as_ref().and_then(Ending::why).cloned().unwrap_or_else(stopped)
        }
        // The next one was started in the same turn.
        State::Taking { .. } | State::Starting(_) | State::Running { .. } => {
            service.last_death.clone().unwrap_or_else(stopped)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(name: &str, incarnation: u64) -> RunningService {
        let (driver, interface) = ("edu".to_owned(), "edu".to_owned());
        RunningService { name: name.to_owned(), driver, interface, incarnation }
    }

    #[test]
    fn what_changed_is_told_once_and_a_restart_is_an_end_and_a_beginning() {
        let (events, _receiver) = channel::bounded(1);
        let mut watcher = Watcher { events, told: BTreeMap::new() };
        let mut told = |now: &[RunningService]| -> Vec<String> {
            let changes = watcher.changes(now).into_iter();
            changes.map(|(kind, it)| format!("{kind:?} {} {}", it.name, it.incarnation)).collect()
        };
        assert_eq!(told(&[running("a", 1), running("b", 1)]), ["Began a 1", "Began b 1"]);
        assert!(told(&[running("a", 1), running("b", 1)]).is_empty());
        assert_eq!(told(&[running("a", 1), running("b", 2)]), ["Ended b 1", "Began b 2"]);
        assert_eq!(told(&[running("b", 2)]), ["Ended a 1"]);
    }

    #[test]
    fn a_watcher_that_left_or_does_not_listen_is_forgotten() {
        let mut watchers = Watchers::default();
        let kept = watchers.add();
        drop(watchers.add());
        watchers.tell(&[]);
        assert_eq!(watchers.0.len(), 1);
        let event = || ServiceEvent {
            kind: EventKind::Began,
            service: String::new(),
            driver: String::new(),
            interface: String::new(),
            incarnation: 1,
            reason: None,
        };
        while watchers.0[0].events.try_send(event()).is_ok() {}
        watchers.0[0].told.insert("gone".to_owned(), running("gone", 1));
        watchers.tell(&[]);
        assert!(watchers.0.is_empty());
        assert_eq!(kept.len(), MOST_WAITING, "what it was told before is still there");
    }
}
