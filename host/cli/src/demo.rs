//! `iohost demo`: everything an edu device can do, and whether it did it right.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use iohost_client::{Daemon, QueueConsumer, QueueProducer, WaitError};
use iohost_control::host::Failure;
use iohost_control::varlink::{Service, State};
use iohost_interface::IOReturn;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::CommandError;
use crate::call::hex;
use crate::options::{DemoOptions, Options};
use crate::output::Output;

/// How long the device may take for one answer or one entry. QEMU's takes 0.1 s.
const PATIENCE: Duration = Duration::from_secs(30);

/// The factorials asked for; 13! is the first that 32 bits cannot hold.
const FACTORIALS: std::ops::RangeInclusive<u32> = 0..=12;

/// Bytes of the DMA round trip.
const ROUND_TRIP: usize = edu_api::LONGEST_ENTRY;

/// What the demo did, for programs.
#[derive(Debug, Serialize)]
struct Account {
    service: String,
    location: String,
    driver: String,
    factorials: usize,
    dma_round_trip_bytes: usize,
    stream: Stream,
    timer_ticks: u64,
}

/// What went through both data queues.
#[derive(Debug, PartialEq, Serialize)]
struct Stream {
    bytes: u64,
    entries: u64,
    seconds: f64,
    sha256_sent: String,
    sha256_received: String,
}

pub(crate) fn run(
    options: &Options,
    output: Output,
    demo: &DemoOptions,
) -> Result<(), CommandError> {
    let source = Source::open(&demo.files, demo.limit)?;
    let mut daemon = options.connect()?;
    let service = wait_until_running(&mut daemon, &demo.service)?;
    let driver = service.driver.clone().unwrap_or_default();
    output.progress(format_args!("device      {} at {}", service.name, service.location));
    output.progress(format_args!(
        "driver      {driver} in process {}, over {}, reset before start: {}",
        service.pid.unwrap_or_default(),
        service.backend.as_deref().unwrap_or("?"),
        service.reset.as_deref().unwrap_or("?"),
    ));

    let session = daemon.open(&service.name)?;
    let edu = session.client::<edu_api::Client>()?;
    let ticks_before = edu.ticks().wait_for(PATIENCE).map_err(|err| failed("ticks", err))?;

    let factorials = check_factorials(&edu)?;
    output.progress(format_args!("factorials  {factorials} answered by interrupt, all right"));
    check_round_trip(&edu)?;
    output.progress(format_args!("dma         {ROUND_TRIP} bytes to the device and back, equal"));

    let upload = session.producer(edu_api::UPLOAD)?;
    let download = session.consumer(edu_api::DOWNLOAD)?;
    let stream = pass_through(source, upload, download, progress_bar(output))?;
    let mib = stream.bytes as f64 / f64::from(1 << 20);
    output.progress(format_args!(
        "stream      {mib:.1} MiB in {} entries through both queues in {:.1} s ({:.1} MiB/s)\n\
         sent        sha256 {}\n\
         received    sha256 {}, equal",
        stream.entries,
        stream.seconds,
        mib / stream.seconds,
        stream.sha256_sent,
        stream.sha256_received,
    ));

    let timer_ticks = wait_for_ticks(&edu, ticks_before)?;
    let account = Account {
        service: service.name,
        location: service.location,
        driver,
        factorials,
        dma_round_trip_bytes: ROUND_TRIP,
        stream,
        timer_ticks,
    };
    output.result(&account, format_args!("timer       {timer_ticks} ticks meanwhile"));
    Ok(())
}

/// The service of that name or driver, once it runs.
fn wait_until_running(daemon: &mut Daemon, word: &str) -> Result<Service, CommandError> {
    let find = |daemon: &mut Daemon| -> Result<Option<Service>, CommandError> {
        let is_it = |service: &Service| {
            service.name == word
                || service.location == word
                || service.driver.as_deref() == Some(word)
        };
        Ok(daemon.status()?.services.into_iter().find(is_it))
    };
    if let Some(service) = find(daemon)?
        && matches!(service.state, State::Starting | State::Restarting)
    {
        // Answered once the driver runs.
        daemon.bind(&service.name)?;
    }
    // Opening refuses, in words, what does not run or is not there.
    drop(daemon.open(word)?);
    find(daemon)?.ok_or_else(|| {
        Failure::new("no-such-service", format!("service {word:?} went away"), "try again").into()
    })
}

fn check_factorials(edu: &edu_api::Client) -> Result<usize, Failure> {
    for n in FACTORIALS {
        let answer = edu.factorial(n).wait_for(PATIENCE).map_err(|err| failed("factorial", err))?;
        let expected: u32 = (1..=n).product();
        if answer != expected {
            return Err(wrong(format!("the device says {n}! = {answer}, it is {expected}")));
        }
    }
    Ok(FACTORIALS.count())
}

fn check_round_trip(edu: &edu_api::Client) -> Result<(), Failure> {
    // No byte equals its neighbours, so that a shift shows.
    let data: Vec<u8> = (0..ROUND_TRIP).map(|at| (at * 7 + at / 256) as u8).collect();
    let back = edu
        .dma_round_trip(data.clone())
        .wait_for(PATIENCE)
        .map_err(|err| failed("dma_round_trip", err))?;
    if back.len() != data.len() {
        return Err(wrong(format!("{} of {} bytes came back by DMA", back.len(), data.len())));
    }
    match back.iter().zip(&data).position(|(back, sent)| back != sent) {
        None => Ok(()),
        Some(at) => Err(wrong(format!("byte {at} came back by DMA as another"))),
    }
}

/// The timer goes on by itself; that it went on at all is what is looked at.
fn wait_for_ticks(edu: &edu_api::Client, before: u64) -> Result<u64, Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = edu.ticks().wait_for(PATIENCE).map_err(|err| failed("ticks", err))?;
        if now > before {
            return Ok(now - before);
        }
        if Instant::now() >= deadline {
            return Err(wrong(format!("the driver's timer did not tick within {PATIENCE:?}")));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Sends everything from one thread and receives it in this one, as two programs would.
fn pass_through(
    source: Source,
    upload: QueueProducer,
    mut download: QueueConsumer,
    bar: ProgressBar,
) -> Result<Stream, Failure> {
    let total = source.total;
    bar.set_length(total);
    let started = Instant::now();
    let sender = thread::spawn(move || send_all(source, upload));

    let mut received = Sha256::new();
    let mut entry = Vec::new();
    let (mut bytes, mut entries) = (0, 0);
    let mut trouble = None;
    while bytes < total {
        if let Err(err) = download.receive_within(&mut entry, PATIENCE) {
            trouble = Some(stream_failed("receiving", &err));
            break;
        }
        received.update(&entry);
        bytes += entry.len() as u64;
        entries += 1;
        bar.set_position(bytes);
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    // The sender's trouble comes first: what is not sent cannot be received.
    let sent = sender.join().map_err(|_| wrong("the sending thread panicked".into()))??;
    if let Some(trouble) = trouble {
        return Err(trouble);
    }
    let stream = Stream {
        bytes,
        entries,
        seconds,
        sha256_sent: hex(&sent),
        sha256_received: hex(&received.finalize()),
    };
    match bytes == total && stream.sha256_sent == stream.sha256_received {
        true => Ok(stream),
        false => Err(wrong(format!(
            "{total} bytes with sha256 {} were sent, {bytes} with {} came back",
            stream.sha256_sent, stream.sha256_received
        ))),
    }
}

fn send_all(mut source: Source, mut upload: QueueProducer) -> Result<Vec<u8>, Failure> {
    let mut sent = Sha256::new();
    let mut entry = vec![0; edu_api::LONGEST_ENTRY];
    loop {
        let len = source.fill(&mut entry)?;
        if len == 0 {
            return Ok(sent.finalize().to_vec());
        }
        sent.update(&entry[..len]);
        upload
            .send_within(&entry[..len], PATIENCE)
            .map_err(|err| stream_failed("sending", &err))?;
    }
}

/// The files, as one run of bytes whose length is known before it starts.
struct Source {
    files: std::vec::IntoIter<(PathBuf, u64)>,
    current: Option<(PathBuf, std::io::Take<File>)>,
    total: u64,
}

impl Source {
    /// Opens the files, or this program itself where there are none.
    fn open(files: &[PathBuf], limit: Option<u64>) -> Result<Self, CommandError> {
        let ourselves = Path::new("/proc/self/exe").to_owned();
        let files = if files.is_empty() { vec![ourselves] } else { files.to_vec() };
        let mut left = limit.unwrap_or(u64::MAX);
        let mut parts = Vec::new();
        for file in files {
            let len = std::fs::metadata(&file).map_err(|err| unreadable(&file, &err))?.len();
            let part = len.min(left);
            left -= part;
            parts.push((file, part));
        }
        let total = parts.iter().map(|(_, len)| len).sum();
        if total == 0 {
            return Err(CommandError::usage(Failure::new(
                "nothing-to-send",
                "the files are empty",
                "name files with something in them",
            )));
        }
        Ok(Self { files: parts.into_iter(), current: None, total })
    }

    /// Fills the buffer as far as there is something; 0 at the end.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, Failure> {
        let mut filled = 0;
        while filled < buffer.len() {
            let Some((path, file)) = &mut self.current else {
                let Some((path, len)) = self.files.next() else { break };
                let file = File::open(&path).map_err(|err| unreadable(&path, &err).failure)?;
                self.current = Some((path, file.take(len)));
                continue;
            };
            let len =
                file.read(&mut buffer[filled..]).map_err(|err| unreadable(path, &err).failure)?;
            if len == 0 {
                if file.limit() > 0 {
                    return Err(Failure::new(
                        "file-changed",
                        format!("{} became shorter while it was sent", path.display()),
                        "name files that nobody writes to",
                    ));
                }
                self.current = None;
            }
            filled += len;
        }
        Ok(filled)
    }
}

fn progress_bar(output: Output) -> ProgressBar {
    if output.is_json() || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "stream      {bar:40} {bytes}/{total_bytes} {bytes_per_sec}";
    ProgressBar::new(0)
        .with_style(ProgressStyle::with_template(style).expect("the template is a constant"))
}

fn unreadable(file: &Path, err: &std::io::Error) -> CommandError {
    CommandError::usage(Failure::new(
        "file",
        format!("{} cannot be read: {err}", file.display()),
        "name files that this user may read",
    ))
}

fn failed(what: &str, status: IOReturn) -> Failure {
    Failure::new(
        "demo-call",
        format!("{what}: {status}"),
        "see `iohost status` and the daemon's log for what the driver did",
    )
}

fn stream_failed(what: &str, err: &WaitError) -> Failure {
    Failure::new(
        "demo-stream",
        format!("{what} entries: {err}"),
        "see `iohost status` and the daemon's log for what the driver did",
    )
}

fn wrong(message: String) -> Failure {
    Failure::new("demo-wrong", message, "the device or its driver is broken; report it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_one_run_of_bytes_up_to_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| directory.path().join(name));
        std::fs::write(&paths[0], "one").unwrap();
        std::fs::write(&paths[1], "two").unwrap();

        let mut source = Source::open(&paths, Some(5)).ok().unwrap();

        assert_eq!(source.total, 5);
        let mut buffer = [0; 4];
        assert_eq!(source.fill(&mut buffer).unwrap(), 4);
        assert_eq!(&buffer, b"onet");
        assert_eq!(source.fill(&mut buffer).unwrap(), 1);
        assert_eq!(source.fill(&mut buffer).unwrap(), 0);
    }
}
