//! Crash reports on disk: written by a thread of their own, since a disk can be slow, full or gone,
//! and none of that may hold up the daemon.
//!
//! The newest [`MOST_REPORTS`] stay. A report is written twice: at the death, and once it is known
//! what became of the device.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;
use std::{fs, io, thread};

use iohost_control::crash::{CrashReport, EXTENSION, FOLDER};
use log::warn;

/// Reports that are kept.
const MOST_REPORTS: usize = 64;

/// The most bytes of one.
const MOST_BYTES: usize = 256 * 1024;

/// How long the daemon's end waits for what is still to be written.
const LAST_WRITES: Duration = Duration::from_secs(2);

/// The reports of a state directory.
#[derive(Debug)]
pub(crate) struct Crashes {
    folder: PathBuf,
    next: u64,
    writer: Option<Writer>,
}

#[derive(Debug)]
struct Writer {
    reports: Sender<CrashReport>,
    /// Closes when the last report is written.
    done: Receiver<()>,
}

impl Crashes {
    /// Those of a state directory, which need not be there.
    pub(crate) fn new(state_directory: &Path) -> Self {
        let folder = state_directory.join(FOLDER);
        // What cannot be read is overwritten at the worst.
        let last = numbers(&folder).ok().and_then(|numbers| numbers.last().copied());
        Self { folder, next: last.map_or(1, |last| last.saturating_add(1)), writer: None }
    }

    /// The number of the next report.
    pub(crate) fn number(&mut self) -> u64 {
        let number = self.next;
        self.next = self.next.saturating_add(1);
        number
    }

    /// Has a report written, in place of an earlier one of its number.
    pub(crate) fn write(&mut self, report: CrashReport) {
        if self.writer.is_none() {
            match start(self.folder.clone()) {
                Ok(writer) => self.writer = Some(writer),
                Err(err) => return warn!(err:%; "crash report not written: no thread for it"),
            }
        }
        if let Some(writer) = &self.writer {
            // The thread ends after us.
            let _ = writer.reports.send(report);
        }
    }
}

impl Drop for Crashes {
    fn drop(&mut self) {
        let Some(Writer { reports, done }) = self.writer.take() else { return };
        drop(reports);
        if done.recv_timeout(LAST_WRITES) == Err(RecvTimeoutError::Timeout) {
            warn!(folder:% = self.folder.display(); "crash reports are not written yet");
        }
    }
}

fn start(folder: PathBuf) -> io::Result<Writer> {
    let (reports, inbox) = mpsc::channel::<CrashReport>();
    let (end, done) = mpsc::channel();
    thread::Builder::new().name("crash-reports".into()).spawn(move || {
        for report in inbox {
            if let Err(err) = store(&folder, &report) {
                let (device, number) = (report.device, report.number);
                warn!(device, number, folder:% = folder.display(); "crash report not written: {err}");
            }
        }
        drop(end);
    })?;
    Ok(Writer { reports, done })
}

fn store(folder: &Path, report: &CrashReport) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut text = serde_json::to_vec_pretty(report)?;
    if text.len() > MOST_BYTES {
        let short = CrashReport { queues: Vec::new(), in_flight: Vec::new(), ..report.clone() };
        text = serde_json::to_vec_pretty(&short)?;
    }
    let file = |number: u64| folder.join(format!("{number}.{EXTENSION}"));
    // First makes room, for a disk that is nearly full.
    let mut numbers = numbers(folder)?;
    numbers.insert(report.number);
    while numbers.len() > MOST_REPORTS {
        if let Some(oldest) = numbers.pop_first() {
            fs::remove_file(file(oldest))?;
        }
    }
    let new = folder.join("new");
    let written = fs::write(&new, text).and_then(|()| fs::rename(&new, file(report.number)));
    written.inspect_err(|_| {
        // Half of it helps nobody.
        let _ = fs::remove_file(&new);
    })
}

/// The numbers of the reports in a folder.
fn numbers(folder: &Path) -> io::Result<BTreeSet<u64>> {
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let path = PathBuf::from(entry?.file_name());
        let is_report = path.extension().is_some_and(|extension| extension == EXTENSION);
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok());
        numbers.extend(number.filter(|_| is_report));
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use iohost_control::crash::{DeathReason, Decision};

    use super::*;

    fn report(number: u64) -> CrashReport {
        CrashReport {
            number,
            time: 0,
            device: "edu0".into(),
            location: "/run/edu.sock".into(),
            driver: "edu".into(),
            incarnation: 1,
            pid: 7,
            reason: DeathReason::Signal,
            message: "it died".into(),
            ended: "was killed by signal 11 (SIGSEGV)".into(),
            decision: Decision::Quarantine,
            panic: None,
            device_before: None,
            device_after: None,
            in_flight: Vec::new(),
            in_flight_left_out: 0,
            queues: Vec::new(),
        }
    }

    fn read(folder: &Path, number: u64) -> CrashReport {
        let text = fs::read(folder.join(format!("{FOLDER}/{number}.json"))).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    #[test]
    fn the_newest_reports_stay_and_numbers_go_on_after_a_restart() {
        let state = tempfile::tempdir().unwrap();
        let mut crashes = Crashes::new(state.path());
        for _ in 0..MOST_REPORTS + 10 {
            let number = crashes.number();
            crashes.write(report(number));
        }
        drop(crashes);
        let kept = numbers(&state.path().join(FOLDER)).unwrap();
        assert_eq!(kept, (11..=MOST_REPORTS as u64 + 10).collect());
        assert_eq!(Crashes::new(state.path()).number(), MOST_REPORTS as u64 + 11);
    }

    #[test]
    fn a_report_is_written_again_in_its_place() {
        let state = tempfile::tempdir().unwrap();
        let mut crashes = Crashes::new(state.path());
        crashes.write(report(1));
        crashes.write(CrashReport { message: "and it is known why".into(), ..report(1) });
        drop(crashes);
        assert_eq!(read(state.path(), 1).message, "and it is known why");
    }

    #[test]
    fn a_report_that_is_too_long_is_written_without_its_lists() {
        let state = tempfile::tempdir().unwrap();
        let event = iohost_control::crash::Event { age_us: 0, what: "x".repeat(MOST_BYTES) };
        let queue = iohost_control::crash::QueueEvents {
            queue: "q".into(),
            doing: None,
            executed: 0,
            events: vec![event],
        };
        let mut crashes = Crashes::new(state.path());
        crashes.write(CrashReport { queues: vec![queue], ..report(1) });
        drop(crashes);
        assert_eq!(read(state.path(), 1), report(1));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_and_the_next_report_is_tried() {
        let state = tempfile::tempdir().unwrap();
        fs::write(state.path().join(FOLDER), "in the way").unwrap();
        let mut crashes = Crashes::new(state.path());
        crashes.write(report(1));
        let err = store(&state.path().join(FOLDER), &report(1)).unwrap_err();
        assert!(!err.to_string().is_empty());
        drop(crashes);
        fs::remove_file(state.path().join(FOLDER)).unwrap();
        let mut crashes = Crashes::new(state.path());
        crashes.write(report(2));
        drop(crashes);
        assert_eq!(read(state.path(), 2), report(2));
    }

    #[test]
    fn a_disk_that_is_full_leaves_no_half_report() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join(FOLDER);
        fs::create_dir(&folder).unwrap();
        // Writing to it fails as to a full disk.
        std::os::unix::fs::symlink("/dev/full", folder.join("new")).unwrap();
        let err = store(&folder, &report(1)).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::StorageFull);
        assert!(!folder.join("1.json").exists());
    }

    #[test]
    fn what_is_no_report_in_the_folder_is_left_alone() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join(FOLDER);
        fs::create_dir(&folder).unwrap();
        for name in ["notes.txt", "x.json", "9.txt", "new"] {
            fs::write(folder.join(name), "mine").unwrap();
        }
        assert_eq!(numbers(&folder).unwrap(), BTreeSet::new());
        assert_eq!(Crashes::new(state.path()).number(), 1);
    }
}
