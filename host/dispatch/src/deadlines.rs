//! The deadlines of all timers of an engine.
//!
//! Per clock: the deadlines in order, and one timer of the kernel that is set to the earliest
//! moment at which some timer must have fired (its deadline plus its leeway). When it expires,
//! every timer whose deadline has passed fires, also those whose leeway would have let them
//! wait: that is how leeway saves wake-ups.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, Weak};
use std::time::Duration;

use iohost_event::{Clock, Timer};

use crate::{EngineClock, NO_PANIC};

/// A timer, seen from the engine.
pub(crate) trait Expire: Send + Sync {
    /// The deadline armed with this generation has passed. Called on a worker.
    fn expired(&self, generation: u64);
}

/// The deadlines of one engine.
pub(crate) struct Deadlines {
    tables: [Table; CLOCKS.len()],
    /// The time of a virtual clock, the same on all three.
    virtual_now: Option<AtomicU64>,
    next_id: AtomicU64,
}

const CLOCKS: [Clock; 3] = [Clock::Uptime, Clock::Continuous, Clock::Wall];

/// The token of the first table's timer; the others follow.
const FIRST_TOKEN: u64 = 1;

struct Table {
    clock: Clock,
    timer: Timer,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// By deadline, then by number.
    by_deadline: BTreeMap<(u64, u64), Entry>,
    /// By the latest moment to fire, then by number.
    by_latest: BTreeSet<(u64, u64)>,
    /// What the kernel's timer is set to.
    set_to: Option<u64>,
}

struct Entry {
    latest: u64,
    timer: Weak<dyn Expire>,
    generation: u64,
}

/// Where a deadline stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Armed {
    table: usize,
    key: (u64, u64),
}

impl Deadlines {
    pub(crate) fn new(clock: EngineClock) -> io::Result<Self> {
        let [a, b, c] = CLOCKS;
        Ok(Self {
            tables: [Table::new(a)?, Table::new(b)?, Table::new(c)?],
            virtual_now: match clock {
                EngineClock::Real => None,
                EngineClock::Virtual => Some(AtomicU64::new(1_000_000_000)),
            },
            next_id: AtomicU64::new(0),
        })
    }

    /// The kernel's timers, with the token each is to be watched under.
    pub(crate) fn timers(&self) -> impl Iterator<Item = (u64, &Timer)> {
        (FIRST_TOKEN..).zip(self.tables.iter().map(|table| &table.timer))
    }

    pub(crate) fn now(&self, clock: Clock) -> u64 {
        self.virtual_now.as_ref().map_or_else(|| clock.now(), |now| now.load(Relaxed))
    }

    pub(crate) fn advance(&self, by: Duration) {
        let now = self.virtual_now.as_ref().expect("only a virtual clock can be moved");
        now.fetch_add(by.as_nanos() as u64, Relaxed);
    }

    pub(crate) fn arm(
        &self,
        clock: Clock,
        deadline: u64,
        leeway: u64,
        timer: Weak<dyn Expire>,
        generation: u64,
    ) -> Armed {
        let table = CLOCKS.iter().position(|known| *known == clock).expect("all three are known");
        let key = (deadline, self.next_id.fetch_add(1, Relaxed));
        let latest = deadline.saturating_add(leeway);
        let mut waiting = self.tables[table].waiting.lock().expect(NO_PANIC);
        waiting.by_deadline.insert(key, Entry { latest, timer, generation });
        waiting.by_latest.insert((latest, key.1));
        self.set_timer(table, &mut waiting);
        Armed { table, key }
    }

    /// Takes a deadline back; one that has just expired is not there any more, which is fine.
    /// The kernel's timer stays set: one wake-up for nothing is cheaper than setting it anew.
    pub(crate) fn disarm(&self, armed: Armed) {
        self.tables[armed.table].waiting.lock().expect(NO_PANIC).remove(armed.key);
    }

    /// The timer with this token expired.
    pub(crate) fn expire(&self, token: u64) {
        self.expire_table((token - FIRST_TOKEN) as usize);
    }

    /// Fires what is due on a virtual clock; nothing on a real one.
    pub(crate) fn expire_virtual(&self) {
        if self.virtual_now.is_some() {
            (0..self.tables.len()).for_each(|table| self.expire_table(table));
        }
    }

    fn expire_table(&self, table: usize) {
        let now = self.now(self.tables[table].clock);
        let mut due = Vec::new();
        let mut waiting = self.tables[table].waiting.lock().expect(NO_PANIC);
        while let Some((&key, _)) = waiting.by_deadline.first_key_value()
            && key.0 <= now
        {
            due.extend(waiting.remove(key));
        }
        waiting.set_to = None;
        self.set_timer(table, &mut waiting);
        drop(waiting);
        // In the order of their deadlines, and without the lock: a timer may arm itself anew.
        for entry in due {
            if let Some(timer) = entry.timer.upgrade() {
                timer.expired(entry.generation);
            }
        }
    }

    fn set_timer(&self, table: usize, waiting: &mut Waiting) {
        let earliest = waiting.by_latest.first().map(|(latest, _)| *latest);
        if let Some(earliest) = earliest
            && waiting.set_to.is_none_or(|set_to| earliest < set_to)
            && self.virtual_now.is_none()
        {
            self.tables[table].timer.arm(earliest).expect("a timerfd takes any deadline");
            waiting.set_to = Some(earliest);
        }
    }
}

impl Table {
    fn new(clock: Clock) -> io::Result<Self> {
        Ok(Self { clock, timer: Timer::new(clock)?, waiting: Mutex::default() })
    }
}

impl Waiting {
    fn remove(&mut self, key: (u64, u64)) -> Option<Entry> {
        let entry = self.by_deadline.remove(&key)?;
        self.by_latest.remove(&(entry.latest, key.1));
        Some(entry)
    }
}
