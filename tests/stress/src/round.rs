//! One round: a world, threads that do random things to it, an end, and the count.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use iohost_dispatch::Engine;

use crate::actor::Actor;
use crate::subject::{Ledger, Subject};
use crate::tally::Tally;
use crate::watchdog;
use crate::witness::{Witness, broken};
use crate::world::World;

/// How a round ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// Everything under way is waited for.
    Quiet,
    /// Every queue is cancelled with work waiting.
    Cancelled,
    /// The engine is dropped, with work waiting and threads sending.
    Dropped,
}

/// How long threads and descriptors may take to go: those of the kernel do so on their own time.
const GOING: Duration = Duration::from_secs(20);

/// What the process has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Belongings {
    threads: usize,
    descriptors: usize,
}

pub fn run(seed: u64, number: u64, total: &Tally) {
    let mut rng = Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number);
    // Two draws apart, or neighbouring rounds begin alike.
    rng = Rng::with_seed(rng.u64(..));
    let before = Belongings::now();
    let ledger = Arc::new(Ledger::default());
    let end = rng.choice([End::Quiet, End::Quiet, End::Cancelled, End::Dropped]).expect("four");

    watchdog::at("making the world");
    let engine = Engine::with_workers(rng.usize(1..=5)).expect("an engine");
    let world = World::new(&engine, &ledger, &mut rng);
    watchdog::watch(Arc::downgrade(&world));
    let operations = rng.u32(200..3000);
    let threads: Vec<_> = (0..rng.usize(1..=4))
        .map(|number| {
            let (world, rng) = (world.clone(), rng.fork());
            let thread = thread::Builder::new().name(format!("stress-{number}"));
            let act = move || {
                let mut actor = Actor::thread(&world, rng);
                (0..operations).for_each(|_| actor.act());
            };
            thread.spawn(act).expect("a thread")
        })
        .collect();

    let engine = match end {
        End::Quiet | End::Cancelled => Some(engine),
        End::Dropped => {
            watchdog::at("waiting for some work to be done");
            let enough = rng.u64(..u64::from(operations));
            eventually(|| {
                ledger.tally.ran.get() >= enough || threads.iter().all(|t| t.is_finished())
            });
            watchdog::at("dropping the engine in the middle");
            ledger.ending.store(true, SeqCst);
            drop(engine);
            world.close();
            None
        }
    };
    watchdog::at("waiting for the threads");
    threads.into_iter().for_each(|thread| thread.join().expect("a thread of the stress"));
    world.close();
    match end {
        End::Quiet => {
            settle(&world, &mut rng);
            ledger.tally.ended_quiet.one();
        }
        End::Cancelled => {
            cancel_all(&world);
            ledger.tally.ended_cancelled.one();
        }
        End::Dropped => ledger.tally.ended_dropped.one(),
    }

    watchdog::at("taking the world down");
    let subjects: Vec<_> = world.subjects().iter().map(Arc::downgrade).collect();
    drop(world);
    if let Some(engine) = engine {
        // From here on nobody sends; blocks that are there may still be dropped with the queues
        // that were cancelled.
        drop(engine);
    }
    count(&ledger, end);
    watchdog::at("waiting for queues to go");
    eventually(|| subjects.iter().all(|subject| subject.strong_count() == 0));
    watchdog::at("waiting for threads and descriptors to go");
    before.expect_again();
    total.add(&ledger.tally);
}

/// Waits until all that was sent has run and all that came was delivered.
fn settle(world: &Arc<World>, rng: &mut Rng) {
    let ledger = &world.ledger;
    watchdog::at("waiting for the blocks sent");
    eventually(|| sent_is_done(ledger));
    watchdog::at("waiting for handlers that act");
    // Nobody sent those, and one that began before the world closed could make a source anew below.
    for subject in world.subjects() {
        // A queue that is cancelled has no handlers.
        let _ = subject.queue.dispatch_sync(|| ());
    }
    eventually(|| sent_is_done(ledger));
    watchdog::at("waiting for what is enabled at last");
    let lane = world.lane();
    for (number, timer) in world.timers.iter().enumerate() {
        let subject = timer.subject(world);
        let world = world.clone();
        lane.send(&subject, "timer, enabled at last", |ticket| {
            subject.queue.dispatch_async(move || {
                world.timers[number].enable_at_last(&ticket.begin());
            });
        });
    }
    world.interrupts.iter().for_each(|interrupt| interrupt.enable_at_last(&lane));
    world.descriptors.iter().for_each(|descriptor| descriptor.watch_at_last(rng));
    eventually(|| sent_is_done(ledger));
    watchdog::at("waiting for timers that were armed");
    eventually(|| world.timers.iter().all(|timer| timer.is_done()));
    watchdog::at("waiting for interrupts that were raised");
    eventually(|| world.interrupts.iter().all(|interrupt| interrupt.is_done()));
    watchdog::at("waiting for descriptor events");
    eventually(|| world.descriptors.iter().all(|descriptor| descriptor.is_done()));
    eventually(|| sent_is_done(ledger));
    watchdog::at("waiting for the queues to say that they are empty");
    eventually(|| world.subjects().iter().all(|subject| subject.queue.numbers().depth == 0));
}

fn sent_is_done(ledger: &Ledger) -> bool {
    let tally = &ledger.tally;
    tally.sent.get() == tally.ran.get() + tally.dropped.get()
        && ledger.asleep.load(SeqCst) == 0
        && ledger.completions_open.load(SeqCst) == 0
        && tally.cancels_sent.get() == tally.cancels_ran.get()
}

/// Cancels every queue as it is, and waits for the handlers.
fn cancel_all(world: &Arc<World>) {
    watchdog::at("cancelling all queues");
    let lane = world.lane();
    let subjects: Vec<Arc<Subject>> = world.subjects();
    for subject in &subjects {
        subject.cancel(lane.begins("cancel at last"), 2);
    }
    watchdog::at("waiting for the cancel handlers");
    eventually(|| sent_is_done(&world.ledger));
}

/// What was sent either ran or was dropped, all of it, and nothing twice.
fn count(ledger: &Ledger, end: End) {
    watchdog::at("counting");
    eventually(|| {
        let tally = &ledger.tally;
        tally.sent.get() <= tally.ran.get() + tally.dropped.get()
            && tally.cancels_sent.get() <= tally.cancels_ran.get() + tally.cancels_dropped.get()
            && ledger.completions_open.load(SeqCst) == 0
            && ledger.asleep.load(SeqCst) == 0
    });
    let tally = &ledger.tally;
    let witness = Witness { lane: 0, operation: 0, what: "the count at the end" };
    let pairs = [
        ("blocks", tally.sent.get(), tally.ran.get() + tally.dropped.get()),
        (
            "cancel handlers",
            tally.cancels_sent.get(),
            tally.cancels_ran.get() + tally.cancels_dropped.get(),
        ),
        ("panics", tally.panics_meant.get(), tally.panics_told.get()),
    ];
    for (what, sent, came) in pairs {
        witness.check(sent == came, || format!("{what}: {sent} sent, {came} ended, in {end:?}"));
    }
}

/// Waits until something is so. The watchdog ends a wait that never ends.
fn eventually(mut so: impl FnMut() -> bool) {
    let mut pause = Duration::from_micros(50);
    while !so() {
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

impl Belongings {
    fn now() -> Self {
        let count = |folder| std::fs::read_dir(folder).map_or(0, Iterator::count);
        Self { threads: count("/proc/self/task"), descriptors: count("/proc/self/fd") }
    }

    /// Stand-in workers leave on their own, so threads get some time.
    fn expect_again(self) {
        let started = Instant::now();
        while Self::now() != self {
            if started.elapsed() > GOING {
                broken(format_args!(
                    "no thread and no descriptor is left over: {self:?} before, {:?} after",
                    Self::now()
                ));
            }
            thread::sleep(Duration::from_micros(200));
        }
    }
}
