//! Taking devices from their kernel drivers and giving them back, off the actor's thread.
//!
//! A kernel driver lets go of its device when it likes, so each device that is taken or given back
//! has a thread while that lasts. What is asked of one device is done in order; devices wait for
//! each other only where they share an IOMMU group, in the [`Binder`].

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use iohost_control::host::Failure;
use iohost_doctor::refusal;
use iohost_event::Signal;
use iohost_pci::{Binder, Left, Order, PciAddress, PciError, Sysfs};
use log::warn;

/// What is to be done with a device.
#[derive(Clone, Copy, Debug)]
enum Job {
    Take(Order),
    GiveBack { address: PciAddress, for_good: bool },
}

/// What was done, and how it went.
#[derive(Debug)]
pub(crate) enum Done {
    Taken(Order, Result<(), Failure>),
    /// With the kernel driver that has the device again.
    GivenBack(Result<Option<String>, Failure>),
}

/// The devices that are being taken and given back.
#[derive(Debug)]
pub(crate) struct Bindings {
    binder: Arc<Binder>,
    /// What is under way, with what is to follow.
    jobs: BTreeMap<PciAddress, VecDeque<Job>>,
    done: Receiver<(PciAddress, Done)>,
    report: Sender<(PciAddress, Done)>,
    wake: Arc<Signal>,
}

impl Bindings {
    pub(crate) fn new(sysfs: Sysfs, state_directory: &Path) -> io::Result<Self> {
        let (report, done) = channel();
        Ok(Self {
            binder: Arc::new(Binder::new(sysfs, state_directory)),
            jobs: BTreeMap::new(),
            done,
            report,
            wake: Arc::new(Signal::new()?),
        })
    }

    /// Raised after each job.
    pub(crate) fn wake(&self) -> &Signal {
        &self.wake
    }

    /// What earlier daemons left.
    pub(crate) fn left(&self) -> Vec<Left> {
        self.binder.left().unwrap_or_else(|err| {
            warn!(next = err.next_step(); "what earlier daemons left is not known: {err}");
            Vec::new()
        })
    }

    pub(crate) fn take(&mut self, order: Order) {
        self.queue(order.address, Job::Take(order));
    }

    /// `for_good` if no later daemon is to take it again by itself.
    pub(crate) fn give_back(&mut self, address: PciAddress, for_good: bool) {
        self.queue(address, Job::GiveBack { address, for_good });
    }

    /// What has been done since the last call.
    pub(crate) fn finished(&mut self) -> Vec<(PciAddress, Done)> {
        self.wake.take();
        let done: Vec<_> = self.done.try_iter().collect();
        for (address, _) in &done {
            let Some(jobs) = self.jobs.get_mut(address) else { continue };
            match jobs.pop_front() {
                Some(job) => self.start(*address, job),
                None => drop(self.jobs.remove(address)),
            }
        }
        done
    }

    pub(crate) fn are_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    fn queue(&mut self, address: PciAddress, job: Job) {
        if let Some(jobs) = self.jobs.get_mut(&address) {
            return jobs.push_back(job);
        }
        self.jobs.insert(address, VecDeque::new());
        self.start(address, job);
    }

    fn start(&self, address: PciAddress, job: Job) {
        let (binder, report, wake) = (self.binder.clone(), self.report.clone(), self.wake.clone());
        let run = move || {
            // The actor has ended if nobody listens.
            let _ = report.send((address, job.run(&binder)));
            wake.raise();
        };
        if let Err(err) = thread::Builder::new().name(format!("bind {address}")).spawn(run) {
            let _ = self.report.send((address, job.failed(crate::no_resources(err))));
            self.wake.raise();
        }
    }
}

impl Job {
    fn run(self, binder: &Binder) -> Done {
        match self {
            Job::Take(order) => Done::Taken(order, binder.take(&order).map_err(from_pci)),
            Job::GiveBack { address, for_good } => {
                Done::GivenBack(binder.give_back(address, for_good).map_err(from_pci))
            }
        }
    }

    fn failed(self, failure: Failure) -> Done {
        match self {
            Job::Take(order) => Done::Taken(order, Err(failure)),
            Job::GiveBack { .. } => Done::GivenBack(Err(failure)),
        }
    }
}

/// A refusal of sysfs as it is shown.
pub(crate) fn from_pci(err: PciError) -> Failure {
    let code = refusal::of_pci(&err).name();
    let source = std::error::Error::source(&err).map(|source| format!(": {source}"));
    Failure::new(code, format!("{err}{}", source.unwrap_or_default()), err.next_step())
}
