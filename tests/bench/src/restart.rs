//! How long clients stand still when a driver dies; and what a driver host takes that does nothing.
//!
//! From the `SIGKILL` of the driver host to the first entry that is sent after it, through the next
//! driver and the device, and back: noticing the death, starting a process, opening and resetting the
//! device (an emulated one, whose reset takes no time), loading and starting the driver, and handing
//! the session over. The client has not closed anything.
//!
//! The peer is the least that any restart takes: a process of this program that is killed, noticed by
//! `waitpid`, spawned again, and sends a byte back. There is no device, no driver and no session.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use iohost_tests::{System, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::rounds::{Better, Case, Effort, Metric, Peer, Side, percentile, this_program};

const RESTART: &str = "restart";

pub const CASES: &[Case] = &[
    Case {
        bench: "restart",
        name: RESTART,
        metrics: &[
            Metric { name: "death_to_first_entry_p50_us", better: Better::Lower },
            Metric { name: "death_to_first_entry_p99_us", better: Better::Lower },
        ],
        ours,
        peers: &[Peer { name: "waitpid and spawn", run: spawn_again }],
    },
    Case {
        bench: "restart",
        name: "driver-host-memory",
        metrics: &[Metric { name: "idle_driver_host_pss_kib", better: Better::Lower }],
        ours: memory_of_driver_hosts,
        peers: &[Peer { name: "a process that waits", run: memory_of_processes }],
    },
];

/// Long enough for anything.
const PATIENCE: Duration = Duration::from_secs(30);

fn ours(effort: Effort) -> Result<Vec<f64>> {
    let (system, _device) = System::with_edu();
    let session = system.connect().open("edu0")?;
    let mut upload = session.producer(edu_api::UPLOAD)?;
    let mut download = session.consumer(edu_api::DOWNLOAD)?;
    let mut entry = Vec::new();
    let mut round_trip = |number: u64| -> Result<()> {
        upload.send_within(&number.to_ne_bytes(), PATIENCE)?;
        download.receive_within(&mut entry, PATIENCE)?;
        ensure!(entry == number.to_ne_bytes(), "another entry came back");
        Ok(())
    };
    let mut times = Vec::new();
    for number in 0..effort.of(20, 1) {
        let host = system.await_ready("edu0");
        round_trip(2 * number)?;
        let start = Instant::now();
        kill(Pid::from_raw(host as i32), Signal::SIGKILL)?;
        round_trip(2 * number + 1)?;
        times.push(start.elapsed().as_nanos() as f64 / 1000.0);

        // The policy restarts at once the first time only. A death that is not counted, and somebody
        // who asks, make the next one the first again.
        let known = session.generation();
        let host = system.await_ready("edu0");
        kill(Pid::from_raw(host as i32), Signal::SIGKILL)?;
        eventually("the next driver", || {
            let _ = system.connect().bind("edu0");
            session.generation() > known
        });
    }
    Ok(figures(times))
}

fn spawn_again(effort: Effort) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    let (mut child, mut socket) = spawn(effort)?;
    for _ in 0..effort.of(20, 1) {
        let start = Instant::now();
        child.kill()?;
        child.wait()?;
        (child, socket) = spawn(effort)?;
        times.push(start.elapsed().as_nanos() as f64 / 1000.0);
    }
    socket.shutdown(Shutdown::Both)?;
    child.wait()?;
    Ok(figures(times))
}

/// A process that has said that it is there, and its socket.
fn spawn(effort: Effort) -> Result<(Child, UnixStream)> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let mut command = this_program("--other-end", RESTART, Side::Peer(0), effort)?;
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    let child = command.spawn()?;
    drop(command);
    ours.read_exact(&mut [0]).context("the process ended early")?;
    Ok((child, ours))
}

/// Says that it is there, and waits for its end.
pub fn other_end() -> Result<()> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    let mut socket = UnixStream::from(socket);
    socket.write_all(&[1])?;
    let _ = socket.read(&mut [0]);
    Ok(())
}

/// The mean of several driver hosts, which share their program and their plugin. Their driver has
/// no clients.
fn memory_of_driver_hosts(effort: Effort) -> Result<Vec<f64>> {
    let mut system = System::new();
    let names: Vec<String> = (0..effort.of(16, 2)).map(|number| format!("edu{number}")).collect();
    let _devices: Vec<_> = names.iter().map(|name| system.start_edu_device(name)).collect();
    system.install_driver("probe");
    system.start(&names.iter().map(|name| system.device_config(name, "probe")).collect::<String>());
    mean_memory(names.iter().map(|name| system.await_ready(name)).collect())
}

/// The same of as many processes of this program, which wait for a byte.
fn memory_of_processes(effort: Effort) -> Result<Vec<f64>> {
    let all = (0..effort.of(16, 2)).map(|_| spawn(effort)).collect::<Result<Vec<_>>>()?;
    let memory = mean_memory(all.iter().map(|(child, _)| child.id()).collect());
    for (mut child, socket) in all {
        socket.shutdown(Shutdown::Both)?;
        child.wait()?;
    }
    memory
}

/// What processes have for themselves, and their part of what they share: `Pss` of proc(5), in KiB.
fn mean_memory(processes: Vec<u32>) -> Result<Vec<f64>> {
    let count = processes.len() as f64;
    let of = |process: u32| -> Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup"))
            .context("the memory of a driver host; it takes root, or sandbox = \"off\"")?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    };
    let sum = processes.into_iter().map(of).sum::<Result<f64>>()?;
    Ok(vec![sum / count])
}

fn figures(times: Vec<f64>) -> Vec<f64> {
    vec![percentile(times.clone(), 50), percentile(times, 99)]
}
