//! Sessions between one driver host and the next.
//!
//! A session is kept while another driver host is to come ([`Service::comes_back`]), whatever way the
//! service takes there. So nothing here follows from single steps of a service's life: after each turn
//! it is looked at what state each service is in, and what its sessions are due.

use std::io;
use std::mem;
use std::time::Instant;

use iohost_control::host::{Failure, ToHost};
use iohost_event::{PacketError, Packets, Poller};
use iohost_interface::Description;
use iohost_interface::packet::encode_away;
use log::{debug, warn};

use super::{Actor, SESSIONS, not_running, word};
use crate::service::{Opening, Service, Session, Stage, State, Visitor};

impl Actor {
    /// The client of a session has left. A driver host that has the session notices, and says so once
    /// it has read everything that the client sent.
    pub(super) fn client_left(&mut self, token: u64) {
        let sessions = self.services.iter_mut().flat_map(|service| service.sessions.values_mut());
        for session in sessions.filter(|session| session.token == token) {
            session.client_is_gone = true;
        }
    }

    /// Watches the driver's end of a session's socket for its client's end, under the token that this
    /// returns.
    pub(super) fn watch_client(&self, socket: &Packets) -> io::Result<u64> {
        let token = SESSIONS + self.next_token.get();
        self.next_token.set(self.next_token.get() + 1);
        self.poller.watch_for_end_once(socket, token)?;
        Ok(token)
    }

    /// The driver that runs now may serve another interface than the one before it.
    pub(super) fn keep_sessions_that_fit(&mut self, at: usize) {
        let service = &mut self.services[at];
        let State::Running { interfaces, .. } = &service.state else { return };
        let interfaces = interfaces.clone();
        let earlier = service.served.replace(interfaces.clone()).unwrap_or_default();
        let continues = |(kind, earlier): (usize, &Description)| {
            interfaces.get(kind).is_some_and(|interface| interface.continues(earlier))
        };
        if !earlier.iter().enumerate().all(continues) {
            let why = Failure::new(
                "other-interface",
                format!("the driver of {:?} serves another interface now", word(service)),
                "open a new session",
            );
            service.end_sessions(&self.poller, &why);
        }
    }

    /// Gives each session what it is due, at the end of a turn.
    pub(super) fn settle_sessions(&mut self) {
        for at in 0..self.services.len() {
            let service = &mut self.services[at];
            if service.sessions.is_empty() && service.visitors.is_empty() {
                continue;
            }
            let is_running = matches!(service.state, State::Running { .. });
            if !is_running && (self.stopping || !service.comes_back()) {
                let why = not_running(service);
                service.end_sessions(&self.poller, &why);
                for visitor in service.visitors.drain(..) {
                    visitor.answer.give(Err(why.clone()));
                }
                continue;
            }
            service.tell_clients();
            service.forget_clients_that_left(&self.poller);
            if is_running {
                self.is_behind |= !service.hand_over_sessions();
                for visitor in mem::take(&mut service.visitors) {
                    let Visitor { deadline, wanted, client, answer } = visitor;
                    self.open_now(at, deadline, wanted, client, answer);
                }
            }
        }
    }

    /// Refuses those who have waited for a session long enough.
    pub(super) fn end_late_openings(&mut self, at: usize, now: Instant) {
        let patience = self.options.patience.session;
        let service = &mut self.services[at];
        let late = |opening: &Option<Opening>| {
            opening.as_ref().is_some_and(|opening| opening.deadline <= now)
        };
        let ended: Vec<(u64, Session)> =
            service.sessions.extract_if(.., |_, session| late(&session.opening)).collect();
        for (number, session) in ended {
            if let Some(host) = service.host() {
                let _ = host.process.send(&ToHost::CloseSession { session: number }, &[]);
            }
            if let Some(opening) = session.end(&self.poller) {
                opening.answer.give(Err(Failure::new(
                    "driver-silent",
                    format!("the driver did not take the session within {patience:?}"),
                    "try again; if it stays so, restart it: iohost unbind, iohost bind",
                )));
            }
        }
        let why = not_running(service);
        for visitor in service.visitors.extract_if(.., |visitor| visitor.deadline <= now) {
            visitor.answer.give(Err(why.clone()));
        }
    }
}

impl Service {
    /// The driver host is gone that had the sessions.
    pub(crate) fn orphan_sessions(&mut self) {
        for session in self.sessions.values_mut() {
            if session.stage == Stage::Known {
                session.stage = Stage::Orphaned;
            }
        }
    }

    /// Tells clients that their driver host died, and which calls it had begun.
    fn tell_clients(&mut self) {
        for (number, session) in &mut self.sessions {
            if session.stage != Stage::Orphaned {
                continue;
            }
            session.stage = Stage::Waiting;
            // A client that does not have the session yet never has to know.
            if session.opening.is_some() {
                continue;
            }
            let away = encode_away(session.generation, session.memory.begun());
            session.generation += 1;
            if let Err(err) = session.socket.send_at_once(&away) {
                if !matches!(err, PacketError::Closed) {
                    warn!(device = self.device.name, session = number; "its client does not read");
                }
                session.client_is_gone = true;
            }
        }
    }

    /// Forgets sessions without a client that no driver host has.
    fn forget_clients_that_left(&mut self, poller: &Poller) {
        let left = |session: &Session| session.client_is_gone && session.stage != Stage::Known;
        for (number, session) in self.sessions.extract_if(.., |_, session| left(session)) {
            debug!(device = self.device.name, session = number; "its client left");
            session.end(poller);
        }
    }

    /// Gives the driver host that runs the sessions that wait for one. `false` if it has to be tried
    /// again.
    fn hand_over_sessions(&mut self) -> bool {
        let State::Running { host, .. } = &self.state else { return true };
        for (number, session) in &mut self.sessions {
            if session.stage != Stage::Waiting {
                continue;
            }
            let message = session.memory.for_host(*number, session.generation);
            let descriptors = session.memory.beside(&session.socket);
            match host.process.send(&ToHost::OpenSession(message), &descriptors) {
                Ok(()) => session.stage = Stage::Known,
                // Its end is dealt with when it comes.
                Err(PacketError::Closed) => return true,
                Err(_) => return false,
            }
        }
        true
    }

    /// The sessions are over for good.
    fn end_sessions(&mut self, poller: &Poller, why: &Failure) {
        for session in mem::take(&mut self.sessions).into_values() {
            if let Some(opening) = session.end(poller) {
                opening.answer.give(Err(why.clone()));
            }
        }
    }
}

impl Session {
    /// Lets go of everything; who waits for the session is still to be told.
    pub(crate) fn end(self, poller: &Poller) -> Option<Opening> {
        // The driver host's duplicate would keep it watched.
        let _ = poller.forget(&self.socket);
        self.opening
    }
}
