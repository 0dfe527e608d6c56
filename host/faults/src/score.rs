//! How a campaign went.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::machine::Belongings;
use crate::stream::Account;

/// What a campaign counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Score {
    /// To make the same faults again.
    pub seed: u64,
    /// Things that went wrong, by intent.
    pub faults: u64,
    /// Of these, the devices'.
    pub device_faults: u64,
    /// What drivers were refused that they set up.
    pub refusals: u64,
    /// Driver hosts that were killed.
    pub driver_faults: u64,
    /// Drivers that failed by themselves.
    pub inner_faults: u64,
    /// The clients'.
    pub client_faults: u64,
    /// How often the daemon was killed.
    pub daemon_faults: u64,
    /// Entries that clients sent and got back.
    pub entries: u64,
    /// Entries with bytes that a device had spoiled. That is no fault of ours.
    pub damaged_entries: u64,
    /// How often a driver stood still until it was killed.
    pub stuck: u64,
    /// Processes of ours that died though nobody killed them, the daemon among them.
    pub host_deaths: u64,
    /// Entries that never came back.
    pub lost_entries: u64,
    /// Entries that came back twice.
    pub doubled_entries: u64,
    /// Entries that came back as others though the device did nothing wrong.
    pub corrupt_entries: u64,
    /// Devices that were not safe before their next driver.
    pub unclean_devices: u64,
    /// What is left behind, in words.
    pub leaks: Vec<String>,
    /// From a death until the client has the next driver.
    pub restart: RestartTimes,
    /// What was strange, in words.
    pub notes: Vec<String>,
    #[serde(skip)]
    pub(crate) restarts: Vec<Duration>,
    #[serde(skip)]
    pub(crate) deaths: u64,
}

/// How long restarts took, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RestartTimes {
    /// How many there were.
    pub count: u64,
    /// Half took no longer.
    pub p50_ms: f64,
    /// 99 of 100 took no longer.
    pub p99_ms: f64,
}

/// What a process may have more after a campaign than before: caches that fill, a heap in pieces.
const ROOM_BYTES: u64 = 32 << 20;

impl Score {
    /// Whether everything held that has to hold.
    pub fn is_clean(&self) -> bool {
        self.host_deaths == 0
            && self.lost_entries == 0
            && self.doubled_entries == 0
            && self.corrupt_entries == 0
            && self.unclean_devices == 0
            && self.leaks.is_empty()
    }

    pub(crate) fn sum(seed: u64, scores: Vec<Self>) -> Self {
        let mut sum = Self { seed, ..Self::default() };
        for score in scores {
            sum.faults += score.faults;
            sum.device_faults += score.device_faults;
            sum.refusals += score.refusals;
            sum.driver_faults += score.driver_faults;
            sum.inner_faults += score.inner_faults;
            sum.client_faults += score.client_faults;
            sum.daemon_faults += score.daemon_faults;
            sum.entries += score.entries;
            sum.damaged_entries += score.damaged_entries;
            sum.stuck += score.stuck;
            sum.host_deaths += score.host_deaths;
            sum.lost_entries += score.lost_entries;
            sum.doubled_entries += score.doubled_entries;
            sum.corrupt_entries += score.corrupt_entries;
            sum.unclean_devices += score.unclean_devices;
            sum.notes.extend(score.notes);
            sum.restarts.extend(score.restarts);
        }
        sum.restart = RestartTimes::of(&mut sum.restarts);
        sum
    }

    pub(crate) fn add_account(&mut self, account: Account) {
        let Account { entries, lost, doubled, damaged, corrupt } = account;
        self.entries += entries;
        self.lost_entries += lost;
        self.doubled_entries += doubled;
        self.damaged_entries += damaged;
        self.corrupt_entries += corrupt;
    }

    /// Compares what the processes have with what they had.
    pub(crate) fn take_stock(&mut self, before: &Belongings, after: &Belongings) {
        self.leaks.extend(before.excess(after));
    }
}

impl Belongings {
    /// Whether what is there later is no more than this.
    pub(crate) fn covers(&self, later: &Self) -> bool {
        self.excess(later).is_empty()
    }

    /// What is there later and not here, in words.
    fn excess(&self, later: &Self) -> Vec<String> {
        let mut leaks = Vec::new();
        for (whose, before, after) in [
            ("the daemon", &self.daemon, &later.daemon),
            ("driver hosts", &self.hosts, &later.hosts),
        ] {
            let mut compare = |what: &str, before: u64, after: u64| {
                if after > before {
                    leaks.push(format!("{whose}: {after} {what}, {before} before"));
                }
            };
            for (what, count) in &after.descriptors {
                let before = before.descriptors.get(what).copied().unwrap_or_default();
                compare(&format!("descriptors of {what}"), before, *count);
            }
            compare("threads", before.threads, after.threads);
            if after.resident_bytes > before.resident_bytes + ROOM_BYTES {
                compare("bytes", before.resident_bytes, after.resident_bytes);
            }
        }
        leaks
    }
}

impl RestartTimes {
    fn of(times: &mut [Duration]) -> Self {
        times.sort_unstable();
        let at = |percent: usize| {
            let place = (times.len() * percent / 100).min(times.len().saturating_sub(1));
            times.get(place).map_or(0.0, |time| time.as_secs_f64() * 1e3)
        };
        Self { count: times.len() as u64, p50_ms: at(50), p99_ms: at(99) }
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, faults, device_faults, driver_faults, client_faults, .. } = self;
        let Self { refusals, inner_faults, daemon_faults, .. } = self;
        writeln!(f, "seed              {seed}")?;
        writeln!(
            f,
            "faults            {faults}: {device_faults} of devices, {refusals} of their set-up, \
             {driver_faults} drivers killed, {inner_faults} that failed by themselves, \
             {client_faults} of clients, {daemon_faults} of the daemon"
        )?;
        writeln!(
            f,
            "entries           {}, {} of them spoiled by devices",
            self.entries, self.damaged_entries
        )?;
        writeln!(f, "host deaths       {}", self.host_deaths)?;
        writeln!(f, "lost entries      {}", self.lost_entries)?;
        writeln!(f, "doubled entries   {}", self.doubled_entries)?;
        writeln!(f, "corrupt entries   {}", self.corrupt_entries)?;
        writeln!(f, "unclean devices   {}", self.unclean_devices)?;
        writeln!(f, "leaks             {}", self.leaks.len())?;
        for words in self.leaks.iter().chain(&self.notes) {
            writeln!(f, "                  {words}")?;
        }
        writeln!(f, "drivers stuck     {}, until killed", self.stuck)?;
        let RestartTimes { count, p50_ms, p99_ms } = self.restart;
        write!(f, "restart to ready  p50 {p50_ms:.1} ms, p99 {p99_ms:.1} ms, of {count}")
    }
}
