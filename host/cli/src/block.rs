//! `iohost block`: disks, for people.

mod attach;

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use iohost_block::{BlockDevice, BlockError, Disk, Operation, Pipeline, Request, Requests};
use iohost_client::{Daemon, ServiceMatch};
use iohost_control::host::Failure;
use serde::Serialize;
use serde_json::json;

use crate::CommandError;
use crate::options::{BlockCommand, BlockOptions, DiskOptions, Options};
use crate::output::{Output, table};

/// Bytes that are read or written at a time: several requests of a disk's.
const PART: usize = 4 << 20;

pub(crate) fn run(
    options: &Options,
    output: Output,
    block: &BlockOptions,
) -> Result<(), CommandError> {
    match &block.command {
        BlockCommand::Ls => list(options, output),
        BlockCommand::Info(disk) => info(options, output, disk),
        BlockCommand::Health(disk) => health(options, output, disk),
        BlockCommand::Read { disk, file, offset, length } => {
            read(options, output, disk, file.as_deref(), *offset, *length)
        }
        BlockCommand::Write { disk, file, offset } => write(options, output, disk, file, *offset),
        BlockCommand::Export { disk, at } => export(options, output, disk, at),
        BlockCommand::Attach(disk) => attach::attach(options, output, disk),
        BlockCommand::Detach { number, force } => attach::detach(output, *number, *force),
        BlockCommand::Bench { disk, depth, size, seconds, sequential, polled, write } => {
            let plan = Plan {
                depth: *depth,
                size: *size,
                time: Duration::from_secs((*seconds).into()),
                is_sequential: *sequential,
                is_polled: *polled,
                operation: if *write { Operation::Write } else { Operation::Read },
            };
            bench(options, output, disk, &plan)
        }
    }
}

/// A disk, for programs.
#[derive(Debug, Serialize)]
struct Described {
    service: String,
    disk: u32,
    bytes: u64,
    block: u32,
    read_only: bool,
    write_cache: bool,
    discard: bool,
    write_zeroes: bool,
    most_at_once: u64,
    model: String,
    serial: String,
}

impl Described {
    fn new(service: &str, disk: &Disk) -> Self {
        Self {
            service: service.to_owned(),
            disk: disk.number,
            bytes: disk.bytes(),
            block: disk.block,
            read_only: disk.is_read_only,
            write_cache: disk.has_write_cache,
            discard: disk.can_discard,
            write_zeroes: disk.can_write_zeroes,
            most_at_once: disk.most_at_once,
            model: disk.model.clone(),
            serial: disk.serial.clone(),
        }
    }
}

fn list(options: &Options, output: Output) -> Result<(), CommandError> {
    let mut daemon = options.connect()?;
    let mut disks = Vec::new();
    for service in daemon.find(&ServiceMatch::new().interface::<block_api::Client>())? {
        let requests = requests(&mut daemon, &service)?;
        for number in requests.disks().map_err(failed)? {
            let disk = requests.describe(number).map_err(failed)?;
            disks.push(Described::new(&service, &disk));
        }
    }
    let mut table = table(&["SERVICE", "DISK", "SIZE", "BLOCK", "", "MODEL", "SERIAL"]);
    for disk in &disks {
        table.add_row([
            disk.service.clone(),
            disk.disk.to_string(),
            HumanBytes(disk.bytes).to_string(),
            disk.block.to_string(),
            if disk.read_only { "read only" } else { "" }.to_owned(),
            disk.model.clone(),
            disk.serial.clone(),
        ]);
    }
    output.result(&json!({ "disks": disks }), table);
    Ok(())
}

fn info(options: &Options, output: Output, which: &DiskOptions) -> Result<(), CommandError> {
    let (_, disk) = find(options, which)?;
    let described = Described::new(&which.service, &disk);
    let yes = |is_so: bool| if is_so { "yes" } else { "no" };
    let text = format!(
        "disk          {} of {}\n\
         model         {}\n\
         serial        {}\n\
         size          {} ({} bytes)\n\
         block         {} bytes\n\
         read only     {}\n\
         write cache   {}\n\
         discard       {}\n\
         write zeroes  {}\n\
         at once       {} at most",
        described.disk,
        described.service,
        described.model,
        described.serial,
        HumanBytes(described.bytes),
        described.bytes,
        described.block,
        yes(described.read_only),
        yes(described.write_cache),
        yes(described.discard),
        yes(described.write_zeroes),
        HumanBytes(described.most_at_once),
    );
    output.result(&described, text);
    Ok(())
}

fn health(options: &Options, output: Output, which: &DiskOptions) -> Result<(), CommandError> {
    let (requests, _) = find(options, which)?;
    let health = requests.health().map_err(failed)?;
    let celsius = i32::from(health.temperature) - 273;
    let warnings: Vec<&str> = [
        (0, "spare below its threshold"),
        (1, "temperature"),
        (2, "unreliable"),
        (3, "read only"),
        (4, "backup of volatile memory failed"),
    ]
    .into_iter()
    .filter(|(bit, _)| health.warnings >> bit & 1 == 1)
    .map(|(_, words)| words)
    .collect();
    // A unit is a thousand times 512 bytes.
    let bytes = |units: u64| units.saturating_mul(512_000);
    let value = json!({
        "warnings": warnings,
        "temperature_celsius": celsius,
        "spare_percent": health.spare,
        "spare_threshold_percent": health.spare_threshold,
        "used_percent": health.used,
        "read_bytes": bytes(health.read_units),
        "written_bytes": bytes(health.written_units),
        "power_cycles": health.power_cycles,
        "power_on_hours": health.power_on_hours,
        "unsafe_shutdowns": health.unsafe_shutdowns,
        "media_errors": health.media_errors,
    });
    let text = format!(
        "warnings          {}\n\
         temperature       {celsius} °C\n\
         spare             {} % (warns below {} %)\n\
         used              {} % of its life\n\
         read              {}\n\
         written           {}\n\
         power cycles      {}\n\
         power on          {} h\n\
         unsafe shutdowns  {}\n\
         media errors      {}",
        if warnings.is_empty() { "none".to_owned() } else { warnings.join(", ") },
        health.spare,
        health.spare_threshold,
        health.used,
        HumanBytes(bytes(health.read_units)),
        HumanBytes(bytes(health.written_units)),
        health.power_cycles,
        health.power_on_hours,
        health.unsafe_shutdowns,
        health.media_errors,
    );
    output.result(&value, text);
    Ok(())
}

fn read(
    options: &Options,
    output: Output,
    which: &DiskOptions,
    file: Option<&Path>,
    offset: u64,
    length: Option<u64>,
) -> Result<(), CommandError> {
    let mut disk = open(options, which)?;
    let (block, end) = (u64::from(disk.info().block), disk.info().bytes());
    let length = length.unwrap_or(end.saturating_sub(offset));
    if offset.checked_add(length).is_none_or(|last| last > end) {
        let message = format!("{length} bytes at {offset} of a disk of {end} bytes");
        let next = "name bytes that are on the disk";
        return Err(CommandError::usage(Failure::new("block-range", message, next)));
    }
    let mut target: Box<dyn Write> = match file {
        Some(path) => Box::new(File::create(path).map_err(|err| unusable(path, &err))?),
        None => Box::new(io::stdout().lock()),
    };
    let place = file.unwrap_or(Path::new("standard output"));
    let bar = progress_bar(output, "reading", length);
    let mut data = Vec::new();
    let mut at = offset;
    while at < offset + length {
        // Whole blocks around what is wanted.
        let first = at / block * block;
        let last = (offset + length).min(first + PART as u64);
        data.resize((last - first).next_multiple_of(block) as usize, 0);
        disk.read(first, &mut data).map_err(failed)?;
        let wanted = &data[(at - first) as usize..(last - first) as usize];
        target.write_all(wanted).map_err(|err| unusable(place, &err))?;
        at = last;
        bar.set_position(at - offset);
    }
    target.flush().map_err(|err| unusable(place, &err))?;
    bar.finish_and_clear();
    if file.is_some() {
        let text = format!("read {length} bytes from {offset} on into {}", place.display());
        output.result(&json!({ "bytes": length, "offset": offset }), text);
    }
    Ok(())
}

fn write(
    options: &Options,
    output: Output,
    which: &DiskOptions,
    file: &Path,
    offset: u64,
) -> Result<(), CommandError> {
    let mut disk = open(options, which)?;
    let (block, end) = (u64::from(disk.info().block), disk.info().bytes());
    let is_input = file == Path::new("-");
    let mut source: Box<dyn Read> = match is_input {
        true => Box::new(io::stdin().lock()),
        false => Box::new(File::open(file).map_err(|err| unusable(file, &err))?),
    };
    let length = if is_input { 0 } else { file.metadata().map_or(0, |found| found.len()) };
    if !offset.is_multiple_of(block) || offset.checked_add(length).is_none_or(|last| last > end) {
        let message = format!("{length} bytes at {offset} of a disk of {end} bytes");
        let next = format!("begin at a multiple of {block}, and end on the disk");
        return Err(CommandError::usage(Failure::new("block-range", message, next)));
    }
    let bar = progress_bar(output, "writing", length);
    let mut data = vec![0; PART];
    let mut at = offset;
    loop {
        let len = fill(&mut *source, &mut data).map_err(|err| unusable(file, &err))?;
        if len == 0 {
            break;
        }
        // Of a last block that is not full the rest stays as it is.
        let whole = len.next_multiple_of(block as usize);
        if whole > len && at + whole as u64 <= end {
            let mut rest = vec![0; block as usize];
            let last = whole - block as usize;
            disk.read(at + last as u64, &mut rest).map_err(failed)?;
            data[len..whole].copy_from_slice(&rest[len - last..]);
        }
        disk.write(at, &data[..whole]).map_err(failed)?;
        at += len as u64;
        bar.set_position(at - offset);
        if len < PART {
            break;
        }
    }
    disk.flush().map_err(failed)?;
    bar.finish_and_clear();
    let written = at - offset;
    let text = format!("wrote {written} bytes from {offset} on, and flushed");
    output.result(&json!({ "bytes": written, "offset": offset }), text);
    Ok(())
}

/// Fills the buffer as far as there is something.
fn fill(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(len) => filled += len,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(filled)
}

/// Each client has a session of its own, and a thread.
fn export(
    options: &Options,
    output: Output,
    which: &DiskOptions,
    socket: &Path,
) -> Result<(), CommandError> {
    // So that a wrong name is an error now and not for every client.
    let disk = find(options, which)?.1;
    let is_stale = UnixStream::connect(socket)
        .is_err_and(|err| err.kind() == io::ErrorKind::ConnectionRefused);
    if is_stale {
        std::fs::remove_file(socket).map_err(|err| unusable(socket, &err))?;
    }
    let listener = UnixListener::bind(socket).map_err(|err| unusable(socket, &err))?;
    let text = format!("disk {} of {} at {}", disk.number, which.service, socket.display());
    output.result(&json!({ "disk": disk.number, "socket": socket }), text);
    thread::scope(|scope| {
        loop {
            let (stream, _) = listener.accept().map_err(|err| unusable(socket, &err))?;
            scope.spawn(|| match open_pipeline(options, which) {
                Ok(mut disk) => {
                    let ended = iohost_block::nbd::serve(stream, &mut disk);
                    if let Err(err) = ended {
                        output.error(&unusable(socket, &err).failure);
                    }
                }
                Err(err) => output.error(&err.failure),
            });
        }
    })
}

/// What is measured.
struct Plan {
    depth: u32,
    size: u64,
    time: Duration,
    is_sequential: bool,
    is_polled: bool,
    operation: Operation,
}

fn bench(
    options: &Options,
    output: Output,
    which: &DiskOptions,
    plan: &Plan,
) -> Result<(), CommandError> {
    let mut daemon = options.connect()?;
    let memory = (u64::from(plan.depth) * plan.size).next_multiple_of(block_api::HUGE_PAGE);
    let refused = |message: String, next: &str| {
        CommandError::usage(Failure::new("block-range", message, next))
    };
    if plan.size == 0 || memory > block_api::MOST_MEMORY {
        let message = format!("{} requests of {} bytes at a time", plan.depth, plan.size);
        return Err(refused(message, "ask for less at a time: 256 MiB at most"));
    }
    let mut requests = requests_with(&mut daemon, &which.service, memory as usize)?;
    let disk = choose(&requests, which)?;
    let places = disk.bytes() / plan.size;
    if places == 0 || !plan.size.is_multiple_of(disk.block.into()) {
        let message =
            format!("requests of {} bytes, the disk has blocks of {}", plan.size, disk.block);
        return Err(refused(message, "ask for whole blocks, and no more than the disk has"));
    }

    let bar = progress_bar(output, "measuring", plan.time.as_millis() as u64);
    let mut next_place = 0;
    let mut request = |tag: u64| {
        let place = match plan.is_sequential {
            true => next_place % places,
            false => fastrand::u64(0..places),
        };
        next_place += 1;
        Request {
            tag,
            operation: plan.operation,
            is_polled: plan.is_polled,
            memory: 0,
            disk: disk.number,
            offset: place * plan.size,
            length: plan.size,
            at: tag * plan.size,
            generation: 0,
        }
    };
    let started = Instant::now();
    let mut sent = vec![started; plan.depth as usize];
    let mut next: Vec<Request> = (0..u64::from(plan.depth)).map(&mut request).collect();
    let (mut done, mut under_way, mut longest) = (0_u64, plan.depth, Duration::ZERO);
    let mut total = Duration::ZERO;
    while under_way > 0 {
        if requests.at_hand() == 0 {
            requests.send_all(&next).map_err(failed)?;
            next.clear();
        }
        let completion = requests.completion().map_err(failed)?;
        completion.outcome.map_err(|failure| failed(failure.into()))?;
        let now = Instant::now();
        let began =
            sent.get_mut(completion.tag as usize).ok_or_else(|| failed(BlockError::Malformed))?;
        let took = now - *began;
        (total, longest) = (total + took, longest.max(took));
        done += 1;
        if done.is_multiple_of(1024) {
            bar.set_position((now - started).as_millis() as u64);
        }
        if now - started < plan.time {
            *began = now;
            next.push(request(completion.tag));
        } else {
            under_way -= 1;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let per_second = done as f64 / seconds;
    let rate = per_second * plan.size as f64 / f64::from(1 << 20);
    let mean = total.as_secs_f64() / done as f64 * 1e6;
    let value = json!({
        "requests": done,
        "seconds": seconds,
        "per_second": per_second,
        "mib_per_second": rate,
        "mean_microseconds": mean,
        "longest_microseconds": longest.as_secs_f64() * 1e6,
        "depth": plan.depth,
        "size": plan.size,
    });
    let text = format!(
        "{done} requests of {} bytes at depth {} in {seconds:.1} s\n\
         {per_second:.0} per second, {rate:.1} MiB/s, {mean:.1} µs each, {:.1} µs at the longest",
        plan.size,
        plan.depth,
        longest.as_secs_f64() * 1e6,
    );
    output.result(&value, text);
    Ok(())
}

/// A session with no more memory than questions need.
fn requests(daemon: &mut Daemon, service: &str) -> Result<Requests, CommandError> {
    requests_with(daemon, service, 4096)
}

fn requests_with(
    daemon: &mut Daemon,
    service: &str,
    memory: usize,
) -> Result<Requests, CommandError> {
    Requests::new(daemon.open(service)?, memory).map_err(failed)
}

fn find(options: &Options, which: &DiskOptions) -> Result<(Requests, Disk), CommandError> {
    let requests = requests(&mut options.connect()?, &which.service)?;
    let disk = choose(&requests, which)?;
    Ok((requests, disk))
}

/// The disk that was named, or the first one.
fn choose(requests: &Requests, which: &DiskOptions) -> Result<Disk, CommandError> {
    let number = match which.disk {
        Some(number) => number,
        None => *requests.disks().map_err(failed)?.first().ok_or_else(|| {
            let message = format!("service {:?} has no disk", which.service);
            Failure::new("no-such-disk", message, "see `iohost block ls`")
        })?,
    };
    requests.describe(number).map_err(failed)
}

fn open(options: &Options, which: &DiskOptions) -> Result<BlockDevice, CommandError> {
    let number = number_of(options, which)?;
    BlockDevice::open(options.connect()?.open(&which.service)?, number).map_err(failed)
}

fn open_pipeline(options: &Options, which: &DiskOptions) -> Result<Pipeline, CommandError> {
    let number = number_of(options, which)?;
    Pipeline::open(options.connect()?.open(&which.service)?, number).map_err(failed)
}

fn number_of(options: &Options, which: &DiskOptions) -> Result<u32, CommandError> {
    match which.disk {
        Some(number) => Ok(number),
        None => Ok(find(options, which)?.1.number),
    }
}

fn failed(err: BlockError) -> CommandError {
    match err {
        BlockError::Session(err) => err.into(),
        BlockError::NoSuchDisk { .. } => {
            Failure::new("no-such-disk", err.to_string(), "see `iohost block ls`").into()
        }
        err => Failure::new(
            "block-failed",
            err.to_string(),
            "see `iohost block health`, `iohost status` and the daemon's log",
        )
        .into(),
    }
}

fn unusable(file: &Path, err: &io::Error) -> CommandError {
    CommandError::usage(Failure::new(
        "file",
        format!("{}: {err}", file.display()),
        "name a file that this user may read or write",
    ))
}

fn progress_bar(output: Output, what: &str, length: u64) -> ProgressBar {
    if output.is_json() || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = match what {
        "measuring" => "{msg} {bar:40} {percent} %",
        _ => "{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec}",
    };
    let style = ProgressStyle::with_template(style).expect("the templates are constants");
    ProgressBar::new(length).with_style(style).with_message(what.to_owned())
}
