//! Random operations, on a thread of the stress or in a handler of a queue.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::{hint, thread};

use fastrand::Rng;
use iohost_dispatch::{Clock, QueueOptions};
use iohost_interface::IOReturn;

use crate::subject::{Inside, Lane, Ledger, Subject};
use crate::witness::{MEANT, Witness};
use crate::world::World;

/// How deep handlers beget handlers.
const DEEPEST: u32 = 3;

/// More threads than this do not sleep at a time: an engine has 64 workers at the most.
const MOST_ASLEEP: usize = 12;

/// Events that many sleep on.
const SHARED_EVENTS: usize = 3;

pub struct Actor {
    world: Arc<World>,
    rng: Rng,
    lane: Arc<Lane>,
    /// What this thread holds, innermost last.
    held: Vec<Inside>,
    depth: u32,
}

impl Actor {
    /// A thread that holds nothing.
    pub fn thread(world: &Arc<World>, rng: Rng) -> Self {
        Self { world: world.clone(), lane: world.lane(), rng, held: Vec::new(), depth: 0 }
    }

    /// A handler that runs on a queue.
    pub fn handler(world: &Arc<World>, inside: Inside, rng: Rng, depth: u32) -> Self {
        // Concurrent blocks have no order among them, so each is a lane of its own.
        let lane = match inside.is_alone() {
            true => inside.subject.lane.clone(),
            false => world.ledger.lane(),
        };
        Self { world: world.clone(), rng, lane, held: vec![inside], depth }
    }

    /// What handlers do.
    pub fn handle(&mut self) {
        match self.rng.u32(..16) {
            0..8 => (0..self.rng.u32(..60)).for_each(|_| hint::spin_loop()),
            8 => thread::yield_now(),
            9..14 if self.depth < DEEPEST => self.act(),
            _ => {}
        }
    }

    /// Does one thing.
    pub fn act(&mut self) {
        if self.world.is_closing() || !self.holds_all() {
            return;
        }
        self.depth += 1;
        match self.rng.u32(..100) {
            0..36 => self.dispatch_async(),
            36..54 => self.dispatch_sync(),
            54..62 => self.dispatch_concurrent(),
            62..72 => self.sleep(),
            72..76 => self.wake(),
            76 => self.cancel(),
            77..84 => self.operate_timer(),
            84..92 => self.operate_interrupt(),
            92..95 => self.operate_descriptor(),
            95 => self.misuse(),
            96 => self.short_lived_queue(),
            97 => self.inspect(),
            _ => self.pile_up(),
        }
        self.depth -= 1;
    }

    /// `false` after an aborted sleep; then nothing more is done.
    fn holds_all(&self) -> bool {
        self.held.iter().all(|inside| inside.subject.queue.on_queue())
    }

    fn holds(&self, subject: &Arc<Subject>) -> bool {
        self.held.iter().any(|inside| Arc::ptr_eq(&inside.subject, subject))
    }

    fn dispatch_async(&mut self) {
        let subject = self.world.any_subject(&mut self.rng);
        self.send(&subject);
    }

    fn send(&mut self, subject: &Arc<Subject>) {
        let (world, rng, depth) = (self.world.clone(), self.rng.fork(), self.depth);
        let panics = self.rng.u32(..50) == 0;
        self.lane.send(subject, "async", |ticket| {
            subject.queue.dispatch_async(move || {
                let tally = &world.ledger.tally;
                Actor::handler(&world, ticket.begin(), rng, depth).handle();
                if panics {
                    tally.panics_meant.one();
                    panic::panic_any(MEANT);
                }
            });
        });
    }

    /// More than one turn of a queue.
    fn pile_up(&mut self) {
        let subject = self.world.any_subject(&mut self.rng);
        for _ in 0..self.rng.u32(..300) {
            self.lane.send(&subject, "async", |ticket| {
                subject.queue.dispatch_async(move || drop(ticket.begin()));
            });
        }
    }

    fn dispatch_sync(&mut self) {
        let subject = self.world.any_subject(&mut self.rng);
        let panics = self.rng.u32(..50) == 0;
        self.sync(&subject, panics, Self::handle);
    }

    /// A sync call on a queue: inline where it is held, and not at all where waiting could be
    /// mutual.
    fn sync(&mut self, subject: &Arc<Subject>, panics: bool, block: impl FnOnce(&mut Self)) {
        if self.holds(subject) {
            return self.sync_inline(subject);
        }
        if self.held.iter().any(|inside| inside.subject.rank >= subject.rank) {
            return;
        }
        let ticket = self.lane.ticket(subject, "sync");
        let witness = self.lane.begins("sync, waiting or in its block");
        let called = panic::catch_unwind(AssertUnwindSafe(|| {
            subject.queue.dispatch_sync(|| {
                let depth = self.held.len();
                self.held.push(ticket.begin());
                block(self);
                // Left before it panics: the queue is released on the way.
                self.held.truncate(depth);
                if panics {
                    panic::panic_any(MEANT);
                }
                depth
            })
        }));
        let tally = &subject.ledger.tally;
        match called {
            Ok(Ok(depth)) => {
                witness.check(depth == self.held.len(), || "sync is nested".to_owned())
            }
            Ok(Err(IOReturn::ABORTED)) => {
                tally.aborted.one();
                witness.check(subject.is_over(), || {
                    format!(
                        "no sync call is aborted while its queue {} lives",
                        subject.queue.name()
                    )
                });
            }
            Ok(Err(err)) => witness.broken(format!("dispatch_sync works: {err:?}")),
            Err(_) => {}
        }
        witness.check(!subject.queue.on_queue(), || {
            format!("after a sync call its queue {} is not held", subject.queue.name())
        });
    }

    fn sync_inline(&self, subject: &Arc<Subject>) {
        let here = thread::current().id();
        let ran = subject.queue.dispatch_sync(|| thread::current().id());
        self.lane.begins("sync, inline").check(ran == Ok(here), || {
            format!("a sync call on the held queue {} runs at once: {ran:?}", subject.queue.name())
        });
        subject.ledger.tally.inline.one();
    }

    fn dispatch_concurrent(&mut self) {
        let subject = self.world.any_subject(&mut self.rng);
        if !subject.reentrant {
            let refused = subject.queue.dispatch_concurrent(|| ());
            return self.refused(refused, IOReturn::UNSUPPORTED);
        }
        for _ in 0..self.rng.u32(1..6) {
            let (world, rng, depth) = (self.world.clone(), self.rng.fork(), self.depth);
            self.lane.send_concurrent(&subject, |ticket| {
                let block = move || Actor::handler(&world, ticket.begin(), rng, depth).handle();
                subject.queue.dispatch_concurrent(block).expect("the queue is reentrant");
            });
            if self.rng.u32(..3) == 0 {
                self.send(&subject);
            }
        }
    }

    fn sleep(&mut self) {
        let Some(inside) = self.held.last() else {
            let subject = self.world.any_subject(&mut self.rng);
            return self.sync(&subject, false, Self::sleep);
        };
        let subject = inside.subject.clone();
        if !subject.reentrant || !inside.is_alone() {
            let error =
                if subject.reentrant { IOReturn::NOT_PERMITTED } else { IOReturn::UNSUPPORTED };
            return self.refused(subject.queue.sleep(1, None), error);
        }
        if subject.ledger.asleep.load(SeqCst) >= MOST_ASLEEP {
            return;
        }
        // Until the sleep is over, other handlers of this queue use its lane. This one has nothing
        // half sent, so the lane's order stays true.
        let (event, deadline) = match self.rng.u32(..3) {
            0 => {
                // One that holds another queue meanwhile must not depend on the waker of somebody
                // else, which may be waiting for that queue.
                let shared = self.held.len() == 1;
                let event = match shared {
                    true => self.rng.usize(1..=SHARED_EVENTS),
                    false => subject.new_event(),
                };
                self.send_waker(&subject, event);
                (event, None)
            }
            waker => {
                let event = subject.new_event();
                if waker == 1 {
                    self.send_waker(&subject, event);
                }
                (event, Some(self.soon(&subject)))
            }
        };
        let inside = self.held.last_mut().expect("it was there");
        inside.sleep(event, deadline);
    }

    /// A deadline, which may have passed.
    fn soon(&mut self, subject: &Arc<Subject>) -> (Clock, u64) {
        let clock = self.rng.choice([Clock::Uptime, Clock::Continuous, Clock::Wall]);
        let clock = clock.expect("there are three");
        let ahead = self.rng.choice([0, 20_000, 200_000, 2_000_000]).expect("there are four");
        (clock, subject.queue.now(clock) + self.rng.u64(..=ahead))
    }

    /// Has somebody wake who sleeps on an event then.
    fn send_waker(&mut self, subject: &Arc<Subject>, event: usize) {
        let all = self.rng.u32(..4) == 0;
        let (sleeping, world) = (subject.clone(), self.world.clone());
        let wake = move |lane: &Lane| {
            let subject = &sleeping;
            lane.send(subject, "waker", |ticket| {
                subject.queue.dispatch_async(move || {
                    let inside = ticket.begin();
                    inside.subject.wake(&inside.witness, event, all);
                });
            });
        };
        // Not by way of a queue that waits for one this thread holds beside.
        if self.held.len() > 1 || self.rng.bool() {
            return wake(&self.lane);
        }
        let relay = world.any_home(&mut self.rng);
        self.lane.send(&relay.clone(), "waker's relay", |ticket| {
            relay.queue.dispatch_async(move || {
                let inside = ticket.begin();
                wake(&inside.subject.lane);
            });
        });
    }

    fn wake(&mut self) {
        let (event, all) = (self.rng.usize(1..=SHARED_EVENTS), self.rng.bool());
        match self.held.last() {
            // Of two concurrent blocks that wake at a time each wakes some: no way to say whom.
            Some(inside) if !inside.is_alone() => {}
            Some(inside) => inside.subject.wake(&self.lane.begins("wake"), event, all),
            None => {
                let subject = self.world.any_subject(&mut self.rng);
                self.sync(&subject, false, Self::wake);
            }
        }
    }

    fn cancel(&mut self) {
        let subject = self.world.replace_any(&mut self.rng);
        if self.rng.bool() {
            self.send(&subject);
        }
        subject.cancel(self.lane.begins("cancel"), self.rng.u64(1..=2));
        if self.rng.bool() {
            self.send(&subject);
        }
        if self.rng.bool() {
            self.sync(&subject, false, Self::handle);
        }
    }

    fn operate_timer(&mut self) {
        let world = self.world.clone();
        let number = self.rng.usize(..world.timers.len());
        let timer = &world.timers[number];
        if !timer.exact {
            return timer.operate(&world, &self.lane, &mut self.rng);
        }
        // In a block of the timer's own queue, where a new deadline takes the old one back.
        let subject = timer.subject(&world);
        let mut rng = self.rng.fork();
        self.lane.send(&subject, "timer's block", |ticket| {
            subject.queue.dispatch_async(move || {
                let inside = ticket.begin();
                world.timers[number].operate_here(&inside, &mut rng);
            });
        });
    }

    fn operate_interrupt(&mut self) {
        let world = self.world.clone();
        let interrupt = self.rng.choice(&world.interrupts).expect("there are some");
        interrupt.operate(&world, &self.lane, &mut self.rng);
    }

    fn operate_descriptor(&mut self) {
        let world = self.world.clone();
        let descriptor = self.rng.choice(&world.descriptors).expect("there are some");
        descriptor.operate(&world, &self.lane, &mut self.rng);
    }

    /// What is refused at once, and changes nothing.
    fn misuse(&mut self) {
        let subject = self.world.any_subject(&mut self.rng);
        if self.holds(&subject) {
            return;
        }
        self.refused(subject.queue.wakeup(1), IOReturn::NOT_PERMITTED);
        self.refused(subject.queue.wakeup_all(1), IOReturn::NOT_PERMITTED);
        let error = if subject.reentrant { IOReturn::NOT_PERMITTED } else { IOReturn::UNSUPPORTED };
        self.refused(subject.queue.sleep(1, None), error);
    }

    fn refused<T: std::fmt::Debug>(&self, answer: Result<T, IOReturn>, error: IOReturn) {
        self.lane.begins("misuse").check(answer.as_ref().err() == Some(&error), || {
            format!("a misuse is refused by {error:?}, and not {answer:?}")
        });
        self.world.ledger.tally.refused.one();
    }

    /// A queue whose only handle goes while its blocks wait.
    fn short_lived_queue(&mut self) {
        let (beside, reentrant) = (self.world.any_subject(&mut self.rng), self.rng.bool());
        let made = beside.queue.create_beside("short-lived", QueueOptions { reentrant });
        let queue = made.expect("a name that is short enough");
        let next = Arc::new(AtomicU64::new(0));
        for number in 0..self.rng.u64(..8) {
            let stray = Stray::new(&self.world.ledger, self.lane.begins("stray"));
            let next = next.clone();
            queue.dispatch_async(move || stray.run(&next, number));
        }
    }

    fn inspect(&mut self) {
        let subject = self.world.any_subject(&mut self.rng);
        let numbers = subject.queue.numbers();
        let expected: Vec<_> =
            self.held.iter().map(|inside| inside.subject.queue.name().to_owned()).collect();
        let held = subject.queue.held();
        let witness = self.lane.begins("inspect");
        witness.check(held == expected, || format!("held says {expected:?}, and not {held:?}"));
        witness.check(numbers.name == subject.queue.name(), || "numbers have a name".to_owned());
    }
}

/// A block that knows its queue by nothing.
struct Stray {
    ledger: Arc<Ledger>,
    witness: Witness,
    ran: bool,
}

impl Stray {
    fn new(ledger: &Arc<Ledger>, witness: Witness) -> Self {
        ledger.tally.sent.one();
        Self { ledger: ledger.clone(), witness, ran: false }
    }

    fn run(mut self, next: &AtomicU64, number: u64) {
        self.ran = true;
        self.ledger.tally.ran.one();
        let before = next.fetch_add(1, SeqCst);
        self.witness.check(before == number, || {
            format!("blocks of a short-lived queue run in order: {number} as number {before}")
        });
    }
}

impl Drop for Stray {
    fn drop(&mut self) {
        if !self.ran {
            self.witness.check(self.ledger.is_ending(), || {
                "a queue outlives its last handle until its blocks have run".to_owned()
            });
            self.ledger.tally.dropped.one();
        }
    }
}
