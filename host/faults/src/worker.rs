//! One device with its driver and its client: makes faults, and sees what comes of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use iohost_client::Session;
use iohost_control::host::Outcome;
use iohost_device_models::edu::Edu;
use iohost_device_models::{Fault as Lie, Function};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use probe_api::echo;

use crate::fault::{Death, Fault, Flaw};
use crate::machine::{self, Machine, Role};
use crate::offence::Offence;
use crate::score::Score;
use crate::stream::{Device, Halt, Stream};
use crate::{Campaign, CampaignError, PATIENCE};

/// The kind of client whose entries the probe gives back.
const ECHO: u64 = 2;

/// Entries under way while something goes wrong.
const BATCH: u64 = 16;

/// How long a driver may stand still before somebody kills it.
const STANDSTILL: Duration = Duration::from_secs(2);

pub(crate) struct Worker<'a> {
    machine: &'a Machine,
    service: String,
    role: Role,
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
        let (device, role) = (&machine.devices()[number].function, machine.devices()[number].role);
        let (client_type, upload, download) = match role {
            Role::OnTrial => (0, edu_api::UPLOAD, edu_api::DOWNLOAD),
            Role::Probe | Role::FreeProbe => (ECHO, echo::UPLOAD, echo::DOWNLOAD),
        };
        let session = machine.connect()?.open_as(&service, client_type).map_err(refused)?;
        let stream = Stream::open(&session, upload, download).map_err(refused)?;
        let random = Rng::with_seed(campaign.seed.wrapping_add(number as u64));
        let (device, score) = (device.clone(), Score::default());
        let mut worker =
            Self { machine, service, role, device, session, stream, random, score, is_over: false };
        // What is made only at a first death is there when stock is taken.
        worker.kill_driver(Death::Killed)?;
        worker.score.restarts.clear();
        Ok(worker)
    }

    /// Whether its driver is the one that the campaign is against.
    pub(crate) fn is_on_trial(&self) -> bool {
        self.role == Role::OnTrial
    }

    /// Makes faults as long as `goes_on` says, which is told how many there were so far. Says what came
    /// of them.
    pub(crate) fn work(&mut self, goes_on: impl Fn(u64) -> bool) -> Result<Score, CampaignError> {
        while goes_on(self.score.faults) && !self.is_over && self.machine.is_alive() {
            match self.role {
                Role::OnTrial => {
                    let fault = Fault::choose(&mut self.random);
                    self.make(fault)?;
                }
                Role::Probe | Role::FreeProbe => self.make_round()?,
            }
        }
        if self.machine.is_alive() {
            self.settle(Device::TellsTheTruth)?;
        }
        self.score.add_account(self.stream.account());
        Ok(std::mem::take(&mut self.score))
    }

    /// Each flaw that the driver can have, once, in any order, and clients in between.
    fn make_round(&mut self) -> Result<(), CampaignError> {
        let mut flaws = vec![Flaw::Panic, Flaw::Abort, Flaw::Segfault, Flaw::Hang];
        match self.role {
            Role::FreeProbe => flaws.push(Flaw::WildWrite),
            _ => flaws.extend([Flaw::MemoryLeak, Flaw::DescriptorLeak]),
        }
        self.random.shuffle(&mut flaws);
        for flaw in flaws {
            self.make(Fault::Within(flaw))?;
            let offence = Offence::ALL[self.random.usize(..Offence::ALL.len())];
            self.make(Fault::Client(offence))?;
        }
        Ok(())
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
            Fault::SetUp(times) => {
                let _ = self.stream.send(BATCH);
                let before = self.device.faults();
                self.device.fail_next(Lie::RefusesSetUp, times);
                self.kill_driver(Death::Killed)?;
                self.device.heal();
                let happened = self.device.faults() - before;
                self.score.faults += 1 + happened;
                self.score.driver_faults += 1;
                self.score.refusals += happened;
                self.settle(Device::TellsTheTruth)?;
            }
            Fault::Within(flaw) => {
                let _ = self.stream.send(BATCH);
                self.score.faults += 1;
                self.score.inner_faults += 1;
                self.fail_within(flaw)?;
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
        let machine = self.machine;
        let _daemon = machine.with_daemon();
        self.strike(death)
    }

    /// The same, where the daemon is not killed meanwhile.
    fn strike(&mut self, death: Death) -> Result<(), CampaignError> {
        let known = self.session.generation();
        let Some(pid) = self.machine.service(&self.service)?.pid else { return Ok(()) };
        let pid = Pid::from_raw(pid as i32);
        // A process that is gone already needs no signal.
        let _ = kill(pid, death.signal());
        let start = Instant::now();
        if death == Death::Stopped {
            let _ = kill(pid, Signal::SIGKILL);
        }
        self.await_next(known, || {
            if death == Death::Segfault {
                // The first one that comes from outside only takes away what catches it.
                let _ = kill(pid, Signal::SIGSEGV);
            }
        })?;
        self.score.restarts.push(start.elapsed());
        Ok(())
    }

    /// Has the driver do it to itself, and waits for the next one.
    fn fail_within(&mut self, flaw: Flaw) -> Result<(), CampaignError> {
        let machine = self.machine;
        let _daemon = machine.with_daemon();
        let refused = |err| machine::daemon("opening a session", err);
        let session = machine.connect()?.open(&self.service).map_err(refused)?;
        let probe = session.client::<probe_api::Client>().map_err(refused)?;
        let known = self.session.generation();
        // Whoever dies of a call does not answer it.
        match flaw {
            Flaw::Segfault => drop(probe.die(0)),
            Flaw::Abort => drop(probe.die(1)),
            Flaw::Panic => drop(probe.die(2)),
            Flaw::WildWrite => drop(probe.scribble(self.random.u8(..).into())),
            Flaw::Hang => drop(probe.hang()),
            Flaw::MemoryLeak => drop(probe.leak(0)),
            Flaw::DescriptorLeak => {
                if !matches!(probe.leak(1).wait_for(PATIENCE), Ok(1..)) {
                    self.score.notes.push(format!("{} leaked no descriptor", self.service));
                }
                // What needs none goes on, and what needs one is refused to whoever wants it.
                if self.stream.receive_all(Device::TellsTheTruth, PATIENCE).is_err() {
                    self.score.stuck += 1;
                }
                let _ = machine.connect()?.open(&self.service);
                self.look_for_strange_deaths();
                return self.strike(Death::Killed);
            }
        }
        self.await_next(known, || ())
    }

    /// Waits until the session has another driver host than the one it had, and does something again
    /// and again meanwhile.
    fn await_next(&mut self, known: u64, mut meanwhile: impl FnMut()) -> Result<(), CampaignError> {
        let (machine, session, service) = (self.machine, &self.session, &self.service);
        machine.wait(&format!("the next driver of {service}"), || {
            meanwhile();
            session.generation() > known
        })?;
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
