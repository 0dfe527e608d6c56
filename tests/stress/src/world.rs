//! What a round has: queues in slots, sources on them, and who sends.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, RwLock, Weak};

use fastrand::Rng;
use iohost_dispatch::{Engine, Queue};

use crate::sources::{Descriptor, Interrupt, Timer};
use crate::subject::{Lane, Ledger, Subject};

pub struct World {
    pub ledger: Arc<Ledger>,
    /// A slot's index is the rank of its queue.
    slots: Vec<RwLock<Arc<Subject>>>,
    /// The first slots keep their queue for the whole round; in the others a cancelled queue is
    /// replaced.
    homes: usize,
    pub timers: Vec<Timer>,
    pub interrupts: Vec<Interrupt>,
    pub descriptors: Vec<Descriptor>,
    /// Nothing new is begun; what is under way goes on.
    closing: AtomicBool,
    lanes: Mutex<Vec<Weak<Lane>>>,
}

impl World {
    pub fn new(engine: &Engine, ledger: &Arc<Ledger>, rng: &mut Rng) -> Arc<Self> {
        let (homes, others) = (rng.usize(2..=4), rng.usize(1..=4));
        let make = |name: &str, options| Queue::create_for(ledger.clone(), engine, name, options);
        let slots: Vec<_> = (0..homes + others)
            .map(|rank| {
                // One of each kind stays.
                let reentrant = if rank < 2 { rank == 1 } else { rng.bool() };
                RwLock::new(Subject::new(ledger, rank, reentrant, &make))
            })
            .collect();
        Arc::new_cyclic(|world| {
            let subject = |rng: &mut Rng| slots[rng.usize(..slots.len())].read().unwrap().clone();
            let timers = (0..rng.usize(2..=6))
                .map(|number| Timer::new(world, number, number % 2 == 0, &subject(rng), rng.fork()))
                .collect();
            let interrupts = (0..rng.usize(2..=5))
                .map(|number| {
                    Interrupt::new(world, number, number % 2 == 1, &subject(rng), rng.fork())
                })
                .collect();
            let descriptors = (0..rng.usize(1..=3))
                .map(|number| Descriptor::new(world, number, &subject(rng), rng.fork()))
                .collect();
            let lanes = slots.iter().map(|slot| Arc::downgrade(&slot.read().unwrap().lane));
            Self {
                ledger: ledger.clone(),
                homes,
                timers,
                interrupts,
                descriptors,
                closing: AtomicBool::new(false),
                lanes: Mutex::new(lanes.collect()),
                slots,
            }
        })
    }

    /// A lane of its own, for a thread.
    pub fn lane(&self) -> Arc<Lane> {
        let lane = self.ledger.lane();
        self.lanes.lock().unwrap().push(Arc::downgrade(&lane));
        lane
    }

    pub fn subjects(&self) -> Vec<Arc<Subject>> {
        self.slots.iter().map(|slot| slot.read().unwrap().clone()).collect()
    }

    pub fn any_subject(&self, rng: &mut Rng) -> Arc<Subject> {
        self.subject(rng.usize(..self.slots.len()))
    }

    pub fn subject(&self, slot: usize) -> Arc<Subject> {
        self.slots[slot].read().unwrap().clone()
    }

    /// A queue that is there until the end of the round.
    pub fn any_home(&self, rng: &mut Rng) -> Arc<Subject> {
        self.subject(rng.usize(..self.homes))
    }

    /// Takes a queue that may be cancelled out of its slot and puts another one there.
    pub fn replace_any(&self, rng: &mut Rng) -> Arc<Subject> {
        let slot = rng.usize(self.homes..self.slots.len());
        let mut place = self.slots[slot].write().unwrap();
        let beside = place.queue.clone();
        let make = |name: &str, options| beside.create_beside(name, options);
        let new = Subject::new(&self.ledger, slot, rng.bool(), &make);
        std::mem::replace(&mut *place, new)
    }

    pub fn close(&self) {
        self.closing.store(true, SeqCst);
    }

    pub fn is_closing(&self) -> bool {
        self.closing.load(SeqCst)
    }

    /// Tells of everything there is.
    pub fn dump(&self) {
        for subject in self.subjects() {
            eprintln!("  {}", subject.describe());
        }
        for lane in self.lanes.lock().unwrap().iter().filter_map(Weak::upgrade) {
            eprintln!("  lane {}: {}", lane.id, lane.doing());
        }
        self.timers.iter().for_each(|timer| eprintln!("  {}", timer.describe()));
        self.interrupts.iter().for_each(|interrupt| eprintln!("  {}", interrupt.describe()));
        self.descriptors.iter().for_each(|descriptor| eprintln!("  {}", descriptor.describe()));
        let ledger = &self.ledger;
        eprintln!(
            "  {} completions open, {} asleep; {:?}",
            ledger.completions_open.load(SeqCst),
            ledger.asleep.load(SeqCst),
            ledger.tally,
        );
    }
}
