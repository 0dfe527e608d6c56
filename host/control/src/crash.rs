//! Crash reports: what the daemon writes down when a driver host dies, and `iohost crashes` shows.
//!
//! One file in JSON per death, in the folder [`FOLDER`] of the state directory, named by its number.
//! Whatever in it comes from the driver host's memory is what that process left there: a driver that
//! wrote where it should not can have made it say anything.

use serde::{Deserialize, Serialize};

use crate::host::Quiesced;

/// The folder of crash reports in the state directory.
pub const FOLDER: &str = "crashes";

/// How the file of a report is named: `NUMBER.json`.
pub const EXTENSION: &str = "json";

/// Why a driver host died. The set is closed: programs compare it, and operators' hooks get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeathReason {
    /// A signal that the daemon did not send, such as SIGSEGV.
    Signal,
    /// It exited by itself; or in a way that is not known, where an earlier daemon started it.
    Exit,
    /// The driver panicked.
    Panic,
    /// The driver gave no sign of life, or did not do in time what it was told.
    Hang,
    /// It broke the protocol.
    Protocol,
    /// The kernel killed it for want of memory.
    OutOfMemory,
    /// The daemon killed it for another reason of its own.
    Policy,
    /// It did not start, in a way that may pass.
    StartFailed,
    /// Its device reported an error.
    DeviceError,
    /// Its device is gone.
    DeviceGone,
    /// Its device could not be made fit to be used.
    DeviceUnfit,
}

impl DeathReason {
    /// All of them.
    pub const ALL: [DeathReason; 11] = [
        DeathReason::Signal,
        DeathReason::Exit,
        DeathReason::Panic,
        DeathReason::Hang,
        DeathReason::Protocol,
        DeathReason::OutOfMemory,
        DeathReason::Policy,
        DeathReason::StartFailed,
        DeathReason::DeviceError,
        DeathReason::DeviceGone,
        DeathReason::DeviceUnfit,
    ];

    /// The word, as it stands in reports and is given to hooks.
    pub const fn name(self) -> &'static str {
        match self {
            DeathReason::Signal => "signal",
            DeathReason::Exit => "exit",
            DeathReason::Panic => "panic",
            DeathReason::Hang => "hang",
            DeathReason::Protocol => "protocol",
            DeathReason::OutOfMemory => "out-of-memory",
            DeathReason::Policy => "policy",
            DeathReason::StartFailed => "start-failed",
            DeathReason::DeviceError => "device-error",
            DeathReason::DeviceGone => "device-gone",
            DeathReason::DeviceUnfit => "device-unfit",
        }
    }

    /// The reason that a failure's code stands for; `None` for a process that died without a word,
    /// where only its end says more.
    pub fn of_code(code: &str) -> Option<Self> {
        match code {
            "driver-died" => None,
            "driver-panicked" => Some(DeathReason::Panic),
            "driver-hung" => Some(DeathReason::Hang),
            "driver-protocol" => Some(DeathReason::Protocol),
            "killed" => Some(DeathReason::Policy),
            "device-error" => Some(DeathReason::DeviceError),
            "removed" => Some(DeathReason::DeviceGone),
            "device-quarantined" => Some(DeathReason::DeviceUnfit),
            _ => Some(DeathReason::StartFailed),
        }
    }
}

/// What the daemon does about a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// The driver starts again, after a pause.
    Restart {
        /// Milliseconds.
        pause_ms: u64,
    },
    /// The device is left alone until somebody asks, or it is plugged in anew.
    Quarantine,
    /// The daemon or the device is on its way out anyway.
    Stop,
}

impl Decision {
    /// The word, as it is given to hooks.
    pub const fn name(self) -> &'static str {
        match self {
            Decision::Restart { .. } => "restart",
            Decision::Quarantine => "quarantine",
            Decision::Stop => "stop",
        }
    }
}

/// The death of a driver host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CrashReport {
    /// Its number; goes up by one with each report.
    pub number: u64,
    /// When, in seconds since 1970.
    pub time: u64,
    /// The service's name.
    pub device: String,
    /// Where its device is.
    pub location: String,
    /// The driver.
    pub driver: String,
    /// Which driver host of the device it was.
    pub incarnation: u64,
    /// Its process.
    pub pid: u32,
    /// Why it died.
    pub reason: DeathReason,
    /// The same in words, with the values that matter: the signal's name, the panic's words and
    /// place, the queue that hung and how long.
    pub message: String,
    /// How the process ended: `exited with code 3`.
    pub ended: String,
    /// What the daemon does about it.
    pub decision: Decision,
    /// What the process said of its first panic, where that is known.
    pub panic: Option<String>,
    /// What became of the device before this driver started.
    pub device_before: Option<Quiesced>,
    /// What became of it after the death, by whoever made it safe; absent until that is done.
    pub device_after: Option<Quiesced>,
    /// Requests that had no answer.
    pub in_flight: Vec<InFlight>,
    /// More of them than there is room for.
    pub in_flight_left_out: u64,
    /// What each queue did last; those that did something last come first.
    pub queues: Vec<QueueEvents>,
}

/// A request that had no answer when the driver host died.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InFlight {
    /// The session's number.
    pub session: u64,
    /// The method: its name in the interface, or its number.
    pub method: String,
    /// How far it had come.
    pub stage: Stage,
    /// How long before the death it came, in microseconds.
    pub age_us: u64,
    /// What became of it.
    pub fate: String,
}

/// How far a request had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// It waited for its turn on the driver's queue.
    Queued,
    /// The driver was in it.
    Running,
    /// The driver had taken it, and owed the answer.
    Taken,
}

/// What a queue did last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QueueEvents {
    /// The queue's name.
    pub queue: String,
    /// What it was in the middle of, in words; absent when it was idle.
    pub doing: Option<String>,
    /// Pieces of work that it had run.
    pub executed: u64,
    /// The last events, oldest first.
    pub events: Vec<Event>,
}

/// Something that a queue did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// How long before the death, in microseconds.
    pub age_us: u64,
    /// In words.
    pub what: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_written_as_it_is_named() {
        for reason in DeathReason::ALL {
            let text = serde_json::to_string(&reason).unwrap();
            assert_eq!(text, format!("\"{}\"", reason.name()));
        }
    }
}
