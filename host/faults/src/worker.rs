//! One device with its driver and its client: makes faults, and sees what comes of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use iohost_client::Session;
use iohost_control::host::Outcome;
use iohost_device_models::Function;
use iohost_device_models::edu::Edu;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::fault::{Death, Fault};
use crate::machine::{self, Machine};
use crate::score::Score;
use crate::stream::{Device, Halt, Stream};
use crate::{Campaign, CampaignError, PATIENCE};

/// Entries under way while something goes wrong.
const BATCH: u64 = 16;

/// How long a driver may stand still before somebody kills it.
const STANDSTILL: Duration = Duration::from_secs(2);

pub(crate) struct Worker<'a> {
    machine: &'a Machine,
    service: String,
    device: Arc<Function<Edu>>,
    session: Session,
    stream: Stream,
    random: Rng,
    score: Score,
    /// The session is over, which it should not be.
    is_over: bool,
}

impl<'a> Worker<'a> {
    pub(crate) fn start(
        machine: &'a Machine,
        number: usize,
        campaign: &Campaign,
    ) -> Result<Self, CampaignError> {
        let service = machine::service(number);
        let refused = |err| machine::daemon("opening a session", err);
        let session = machine.connect()?.open(&service).map_err(refused)?;
        let stream = Stream::open(&session).map_err(refused)?;
        let random = Rng::with_seed(campaign.seed.wrapping_add(number as u64));
        let device = machine.device(number);
        let score = Score::default();
        let mut worker =
            Self { machine, service, device, session, stream, random, score, is_over: false };
        // What is made only at a first death is there when stock is taken.
        worker.kill_driver(Death::Killed)?;
        worker.score.restarts.clear();
        Ok(worker)
    }

    /// Makes faults until there were as many, and says what came of them.
    pub(crate) fn work(
        &mut self,
        share: u64,
        count: &impl Fn(u64),
    ) -> Result<Score, CampaignError> {
        while self.score.faults < share && !self.is_over && self.machine.is_alive() {
            let before = self.score.faults;
            let fault = Fault::choose(&mut self.random);
            self.make(fault)?;
            count(self.score.faults - before);
        }
        if self.machine.is_alive() {
            self.settle(Device::TellsTheTruth)?;
        }
        self.score.add_account(self.stream.account());
        Ok(std::mem::take(&mut self.score))
    }

    fn make(&mut self, fault: Fault) -> Result<(), CampaignError> {
        match fault {
            Fault::Device(lie, times) => {
                let before = self.device.faults();
                self.device.fail_next(lie, times);
                let batch = self.random.u64(1..=BATCH);
                // What cannot be sent now is sent another time.
                let _ = self.stream.send(batch);
                let met = self.stream.receive_all(Device::Lies, STANDSTILL);
                self.device.heal();
                let happened = self.device.faults() - before;
                self.score.faults += happened;
                self.score.device_faults += happened;
                if met.is_err() {
                    self.settle(Device::Lies)?;
                }
            }
            Fault::Spurious(times) => {
                let _ = self.stream.send(BATCH);
                (0..times).for_each(|_| self.device.interrupt_without_cause(0));
                self.score.faults += u64::from(times);
                self.score.device_faults += u64::from(times);
                self.settle(Device::TellsTheTruth)?;
            }
            Fault::Client(offence) => {
                let control = self.machine.control();
                // Refused in between two drivers, or because of another offence: then it was none.
                if offence.commit(&control, &self.service, &mut self.random).is_ok() {
                    self.score.faults += 1;
                    self.score.client_faults += 1;
                }
                let _ = self.stream.send(BATCH);
                self.settle(Device::TellsTheTruth)?;
            }
            Fault::Daemon => {
                let _ = self.stream.send(BATCH);
                self.score.faults += 1;
                self.score.daemon_faults += 1;
                if !self.machine.replace_daemon()? {
                    self.score.host_deaths += 1;
                    self.score.notes.push("a driver host did not outlive its daemon".to_owned());
                }
                self.settle(Device::TellsTheTruth)?;
            }
            Fault::Driver(death) => {
                let _ = self.stream.send(BATCH);
                self.score.faults += 1;
                self.score.driver_faults += 1;
                self.kill_driver(death)?;
                self.settle(Device::TellsTheTruth)?;
            }
        }
        self.look_for_strange_deaths();
        Ok(())
    }

    /// Waits until all entries are back. A driver that stands still with a device that is well is
    /// killed, which is what an operator does.
    fn settle(&mut self, device: Device) -> Result<(), CampaignError> {
        match self.stream.receive_all(device, STANDSTILL) {
            Ok(()) => return Ok(()),
            Err(Halt::Broken(err)) => {
                self.score.notes.push(format!("the session with {} ended: {err}", self.service));
                self.stream.give_up();
                self.is_over = true;
                return Ok(());
            }
            Err(Halt::Standstill) => self.score.stuck += 1,
        }
        self.kill_driver(Death::Killed)?;
        if self.stream.receive_all(device, PATIENCE).is_err() {
            self.stream.give_up();
        }
        Ok(())
    }

    /// Has the driver host die and waits for the next one.
    fn kill_driver(&mut self, death: Death) -> Result<(), CampaignError> {
        let _daemon = self.machine.with_daemon();
        let known = self.session.generation();
        let Some(pid) = self.machine.service(&self.service)?.pid else { return Ok(()) };
        let pid = Pid::from_raw(pid as i32);
        // A process that is gone already needs no signal.
        let _ = kill(pid, death.signal());
        let start = Instant::now();
        if death == Death::Hang {
            let _ = kill(pid, Signal::SIGKILL);
        }
        let (machine, session, service) = (self.machine, &self.session, &self.service);
        machine.wait(&format!("the next driver of {service}"), || {
            if death == Death::Segfault {
                // The first one that comes from outside only takes away what catches it.
                let _ = kill(pid, Signal::SIGSEGV);
            }
            session.generation() > known
        })?;
        self.score.restarts.push(start.elapsed());
        self.score.deaths += 1;
        let quiesced = machine.service(service)?.quiesced;
        let is_clean = quiesced.is_some_and(|quiesced| quiesced.outcome != Outcome::Quarantined);
        self.score.unclean_devices += u64::from(!is_clean);
        Ok(())
    }

    /// Driver hosts that died though nobody killed them.
    fn look_for_strange_deaths(&mut self) {
        let strange = self.session.generation().saturating_sub(1 + self.score.deaths);
        if strange > 0 {
            self.score.host_deaths += strange;
            self.score.deaths += strange;
            self.score.notes.push(format!("the driver host of {} died by itself", self.service));
        }
    }
}
