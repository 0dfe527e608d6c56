//! `iohost crashes`: the reports that the daemon wrote, from its state directory.
//!
//! They are read from the files and not asked of the daemon, because one looks at them when things
//! went wrong, which may be the daemon itself; who may read them is who may read the files.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fs, io};

use iohost_control::crash::{CrashReport, Decision, EXTENSION, FOLDER};
use iohost_control::host::{Failure, Quiesced};
use iohost_supervisor::{Config, DEFAULT_CONFIG, DEFAULT_STATE_DIRECTORY};
use serde::Serialize;

use crate::CommandError;
use crate::options::{CrashCommand, CrashesOptions};
use crate::output::{Output, table};

pub(crate) fn run(output: Output, options: &CrashesOptions) -> Result<(), CommandError> {
    let folder = state_directory(options).join(FOLDER);
    match options.command {
        None => list(output, &folder),
        Some(CrashCommand::Show { number }) => {
            let report = read(&folder, number)?;
            output.result(&report, describe(&report));
            Ok(())
        }
    }
}

fn state_directory(options: &CrashesOptions) -> PathBuf {
    let configured = || {
        let config = Config::read(Path::new(DEFAULT_CONFIG)).ok();
        config.map_or(DEFAULT_STATE_DIRECTORY.into(), |config| config.state_directory)
    };
    options.state_dir.clone().unwrap_or_else(configured)
}

/// The result of `iohost crashes --json`.
#[derive(Serialize)]
struct List {
    crashes: Vec<CrashReport>,
}

fn list(output: Output, folder: &Path) -> Result<(), CommandError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries.collect::<io::Result<Vec<_>>>(),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(err) => Err(err),
    };
    let entries = entries.map_err(|err| unreadable(folder, &err.to_string()))?;
    let number = |entry: &fs::DirEntry| {
        let path = entry.path();
        let is_report = path.extension().is_some_and(|extension| extension == EXTENSION);
        path.file_stem().filter(|_| is_report)?.to_str()?.parse::<u64>().ok()
    };
    let mut numbers: Vec<u64> = entries.iter().filter_map(number).collect();
    numbers.sort_unstable();
    // One that goes, as the oldest do, or that is of another version, does not hide the others.
    let crashes: Vec<_> =
        numbers.into_iter().filter_map(|number| read(folder, number).ok()).collect();
    if crashes.is_empty() {
        output.result(&List { crashes }, format_args!("no crash reports in {}", folder.display()));
        return Ok(());
    }
    let mut shown =
        table(&["CRASH", "WHEN", "DEVICE", "DRIVER", "INCARNATION", "REASON", "DECISION", "WHAT"]);
    for report in &crashes {
        shown.add_row([
            report.number.to_string(),
            ago(report.time),
            report.device.clone(),
            report.driver.clone(),
            report.incarnation.to_string(),
            report.reason.name().to_owned(),
            report.decision.name().to_owned(),
            report.message.lines().next().unwrap_or_default().to_owned(),
        ]);
    }
    let text = format!("{}\nmore: iohost crashes show CRASH", shown.trim_fmt());
    output.result(&List { crashes }, text);
    Ok(())
}

fn read(folder: &Path, number: u64) -> Result<CrashReport, Failure> {
    let file = folder.join(format!("{number}.{EXTENSION}"));
    let text = fs::read(&file).map_err(|err| match err.kind() {
        io::ErrorKind::NotFound => Failure::new(
            "no-such-crash",
            format!("there is no crash report {number} in {}", folder.display()),
            "list those that there are with `iohost crashes`; the oldest are removed",
        ),
        _ => unreadable(&file, &err.to_string()),
    })?;
    serde_json::from_slice(&text).map_err(|err| unreadable(&file, &err.to_string()))
}

fn unreadable(place: &Path, why: &str) -> Failure {
    Failure::new(
        "crash-unreadable",
        format!("{} cannot be read: {why}", place.display()),
        "read it as the user that the daemon runs as, or name its state directory with --state-dir",
    )
}

fn ago(time: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let seconds = now.saturating_sub(time);
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

fn before(age_us: u64) -> String {
    match age_us {
        0..10_000 => format!("{age_us} µs"),
        10_000..10_000_000 => format!("{} ms", age_us / 1000),
        _ => format!("{} s", age_us / 1_000_000),
    }
}

fn describe(report: &CrashReport) -> String {
    let CrashReport { number, device, location, driver, incarnation, pid, .. } = report;
    let decision = match report.decision {
        Decision::Restart { pause_ms: 0 } => "started again at once".to_owned(),
        Decision::Restart { pause_ms } => format!("started again after {pause_ms} ms"),
        Decision::Quarantine => {
            "left alone until `iohost bind`, or until it is replugged".to_owned()
        }
        Decision::Stop => "stopped, as was wanted".to_owned(),
    };
    let safe = |quiesced: &Option<Quiesced>| match quiesced {
        Some(Quiesced { outcome, how, found, left }) => {
            let outcome = format!("{outcome:?}").to_lowercase();
            format!("{outcome}, {how}\n  registers: {found}\n  then:      {left}")
        }
        None => "not known".to_owned(),
    };
    let mut text = format!(
        "crash {number}, {}\n\
         device:    {device} ({location})\n\
         driver:    {driver}, incarnation {incarnation}, process {pid}\n\
         reason:    {}: {}\n\
         process:   {}\n\
         decision:  {decision}\n\
         device was made safe before: {}\n\
         device was made safe after:  {}",
        ago(report.time),
        report.reason.name(),
        report.message,
        report.ended,
        safe(&report.device_before),
        safe(&report.device_after),
    );
    if let Some(panic) = &report.panic {
        text += &format!("\npanic:     {panic}");
    }
    match report.in_flight.is_empty() {
        true => text += "\nrequests in flight: none",
        false => text += "\nrequests in flight:",
    }
    for call in &report.in_flight {
        let stage = format!("{:?}", call.stage).to_lowercase();
        text += &format!(
            "\n  {} of session {}, {stage}, since {}: {}",
            call.method,
            call.session,
            before(call.age_us),
            call.fate
        );
    }
    if report.in_flight_left_out > 0 {
        text += &format!("\n  and up to {} more", report.in_flight_left_out);
    }
    for queue in &report.queues {
        text += &format!("\nqueue {:?}: {} done", queue.queue, queue.executed);
        if let Some(doing) = &queue.doing {
            text += &format!(", in the middle of {doing}");
        }
        for event in &queue.events {
            text += &format!("\n  {:>9} before  {}", before(event.age_us), event.what);
        }
    }
    text
}
