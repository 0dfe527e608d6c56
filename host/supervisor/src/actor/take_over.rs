//! Driver hosts of a daemon that is gone, and of this one when it goes without them.
//!
//! A driver host goes on without its daemon, and so do its sessions, whose descriptors it has as well.
//! A new daemon finds the record of each (`host_records.rs`), connects, and asks it to hand over; what
//! it says comes as messages like any other, and ends with `Ready`. Until then the service is
//! `Starting`. What it was told to run is known from its record. The rest is what it says, and is
//! checked: it can make up sessions, of its own service only.
//!
//! One that does not hand over in time, or lies, is killed, and the device is started anew. So is the
//! device of one that died while nobody was there. One that runs what the configuration does not have
//! any more is stopped.

use std::collections::btree_map::Entry;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use iohost_control::host::{DeviceLocation, HandedOver, OpenSession, ToHost};
use iohost_event::Packets;
use iohost_memory::flight_recorder::Recorder;
use iohost_pci::PciAddress;
use log::{debug, info, warn};
use nix::sys::signal::Signal;

use super::{Actor, protocol};
use crate::config::Location;
use crate::driver_process::DriverProcess;
use crate::host_records::{Found, HostRecord};
use crate::service::{Ending, Host, Session, Stage, State};
use crate::session::SessionMemory;

/// The highest number that a driver host is believed; far beyond what anybody counts to.
const HIGHEST_NUMBER: u64 = 1 << 48;

impl Actor {
    /// Begins to take over every driver host that runs.
    pub(super) fn take_over_hosts(&mut self) {
        for found in self.records.found() {
            self.next_host = self.next_host.max(found.number + 1);
            self.take_over(found);
        }
    }

    fn take_over(&mut self, found: Found) {
        let Found { number, record, process } = found;
        let wanted = self.service_of(&record);
        let is_wanted = wanted.is_some();
        let at = match (wanted, &process) {
            (Some(at), _) => at,
            (None, None) => return,
            (None, Some(_)) => match self.unwanted(&record) {
                Some(at) => at,
                None => return,
            },
        };
        let service = &mut self.services[at];
        service.group |= record.group;
        service.incarnation = service.incarnation.max(record.start.incarnation);
        let identity = record.start.confinement.as_ref().and_then(|it| it.identity);
        service.driver_user = identity.map(|(uid, _)| uid);
        let device = service.device.name.clone();
        let Some(handle) = process else {
            warn!(device, pid = record.pid(); "the driver host ended while there was no daemon");
            return;
        };
        let socket = self.records.connect(number).or_else(|err| {
            // It has closed the socket that it was given. It is killed, like any that leaves.
            warn!(device, pid = record.pid(), err:%; "a driver host cannot be asked to hand over");
            Packets::pair().map(|(ours, _)| ours)
        });
        let socket = match socket {
            Ok(socket) => socket,
            Err(err) => {
                let _ = handle.signal(Signal::SIGKILL);
                return warn!(device, err:%; "a driver host is killed: nobody could listen to it");
            }
        };
        let process =
            DriverProcess::earlier(record.pid(), handle, socket, self.records.files(number));
        if let Err(err) = self.watch_host(&process, number) {
            // Dropped, it is killed: nobody would hear of it.
            return warn!(device, err:%; "a driver host cannot be watched");
        }
        let runs_plugin = record.start.plugin.is_some();
        let message = match is_wanted && runs_plugin {
            true => ToHost::HandOver,
            false => ToHost::Stop,
        };
        info!(device, pid = process.pid(), is_wanted; "found the driver host of an earlier daemon");
        // One that is gone already is noticed by its end.
        let _ = process.send(&message, &[]);
        let patience = self.options.patience;
        let host = Host {
            ending: Some(if is_wanted { Ending::Replaced } else { Ending::Stopped }),
            is_taken_over: is_wanted,
            // It may be starting its driver.
            ..Host::new(number, process, patience.start + patience.stop)
        };
        let service = &mut self.services[at];
        service.state = match message {
            ToHost::HandOver => State::Starting(host),
            _ => State::Stopping(host),
        };
    }

    /// The service for which a driver host was started, if there is one and it is the same device;
    /// one that was bound on request is made again.
    fn service_of(&mut self, record: &HostRecord) -> Option<usize> {
        let is_it = |(name, device): (&str, DeviceLocation)| {
            name == record.service && device == record.start.device
        };
        let known = self.services.iter().position(|service| {
            let device = &service.device;
            is_it((device.name.as_str(), device.for_host()))
                && device.interrupts == record.start.interrupts
                && !device.is_disabled
                && service.host().is_none()
        });
        if known.is_some() {
            return known;
        }
        let address = record.service.parse::<PciAddress>().ok()?;
        match self.position_called(&record.service) {
            // The configuration has it now, otherwise.
            Some(_) => None,
            None if record.on_request => Some(self.add(address)),
            None if record.by_rule => self.add_by_rule(address),
            None => None,
        }
    }

    /// Where a driver host stops that nobody wants: at the service that wants its device otherwise,
    /// which starts then, or as a service that is forgotten then.
    fn unwanted(&mut self, record: &HostRecord) -> Option<usize> {
        let location = match &record.start.device {
            DeviceLocation::Pci { address, .. } => Location::Pci(address.parse().ok()?),
            DeviceLocation::VfioUser { socket } => Location::Socket(PathBuf::from(socket)),
        };
        let same = self
            .services
            .iter()
            .position(|service| service.device.location == location && service.host().is_none());
        Some(same.unwrap_or_else(|| self.add_called(record.service.clone(), location)))
    }

    /// Whether a driver host has still to hand over.
    pub(super) fn is_taking_over(&self) -> bool {
        self.services.iter().any(|service| service.host().is_some_and(|host| host.is_taken_over))
    }

    /// The first answer of a driver host that is asked to hand over.
    /// Beside it are the memory and the bell of its flight recorder.
    pub(super) fn handed_over(&mut self, at: usize, handed: HandedOver, fds: Vec<OwnedFd>) {
        let service = &mut self.services[at];
        match &mut service.state {
            State::Starting(host) if host.is_taken_over && host.recorder.is_none() => {
                let number = host.number;
                host.told = handed.told;
                host.device_before = handed.quiesced.clone();
                service.quiesced = handed.quiesced;
                match self.take_up_recorder(number, fds) {
                    Ok(recorder) => {
                        if let Some(host) = self.services[at].host_mut() {
                            host.recorder = Some(recorder);
                        }
                    }
                    Err(words) => {
                        let said = format!("its flight recorder is handed over as {words}");
                        self.condemn(at, protocol(&said));
                    }
                }
            }
            // Asked before it was told to stop.
            State::Stopping(_) => {}
            _ => self.condemn(at, protocol("it hands over, and was not asked to")),
        }
    }

    fn take_up_recorder(&self, number: u64, fds: Vec<OwnedFd>) -> Result<Recorder, String> {
        let [memory, bell] =
            <[OwnedFd; 2]>::try_from(fds).map_err(|fds| format!("{} descriptors", fds.len()))?;
        let recorder = Recorder::attach(memory, bell).map_err(|err| err.to_string())?;
        self.watch_recorder(&recorder, number).map_err(|err| format!("a bell: {err}"))?;
        Ok(recorder)
    }

    /// A driver host that hands over has this session.
    pub(super) fn session_handed_over(&mut self, at: usize, open: &OpenSession, fds: Vec<OwnedFd>) {
        match &self.services[at].state {
            State::Starting(host) if host.is_taken_over => {}
            State::Stopping(_) => return,
            _ => {
                return self.condemn(at, protocol("it hands over a session, and was not asked to"));
            }
        }
        if let Err(words) = self.take_up_session(at, open, fds) {
            let said = format!("session {} is handed over as {words}", open.session);
            self.condemn(at, protocol(&said));
        }
    }

    fn take_up_session(
        &mut self,
        at: usize,
        open: &OpenSession,
        fds: Vec<OwnedFd>,
    ) -> Result<(), String> {
        if open.session > HIGHEST_NUMBER || open.generation > HIGHEST_NUMBER || open.generation == 0
        {
            return Err(format!("number {}, generation {}", open.session, open.generation));
        }
        let most = self.config.limits.sessions_per_service;
        let service = &self.services[at];
        if service.sessions.len() >= most {
            let device = service.device.name.as_str();
            warn!(device, session = open.session, most; "more sessions than there may be now");
            if let Some(host) = service.host() {
                let _ = host.process.send(&ToHost::CloseSession { session: open.session }, &[]);
            }
            return Ok(());
        }
        let (socket, memory) = SessionMemory::take_up(&open.queues, open.client_type, fds)?;
        let token = self.watch_client(&socket).map_err(|err| format!("a socket: {err}"))?;
        let session = Session {
            client: None,
            memory,
            socket,
            token,
            generation: open.generation,
            stage: Stage::Known,
            client_is_gone: false,
            opening: None,
        };
        self.next_session = self.next_session.max(open.session + 1);
        let service = &mut self.services[at];
        match service.sessions.entry(open.session) {
            Entry::Vacant(place) => {
                debug!(device = service.device.name, session = open.session; "session taken over");
                place.insert(session);
                Ok(())
            }
            Entry::Occupied(_) => {
                session.end(&self.poller);
                Err("one that it has already".to_owned())
            }
        }
    }

    /// Whether the sessions that were handed over have the queues that the driver serves.
    pub(super) fn sessions_fit(&self, at: usize) -> bool {
        let service = &self.services[at];
        let State::Running { interfaces, .. } = &service.state else { return true };
        service.sessions.values().all(|session| session.memory.fits(interfaces))
    }

    /// Lets every driver host run on, for the next daemon.
    pub(super) fn leave_hosts(&mut self) {
        for service in std::mem::take(&mut self.services) {
            let host = match service.state {
                State::Starting(host) | State::Running { host, .. } | State::Stopping(host) => host,
                _ => continue,
            };
            info!(device = service.device.name, pid = host.process.pid(); "left for the next daemon");
            host.process.keep();
        }
    }
}
