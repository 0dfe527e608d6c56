//! How many instructions a process executes between two places, on the thread that counts.
//!
//! Counted by single steps of `ptrace(2)`, which needs no rights and no tool, and gives the same
//! number each time.

use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::rounds::{Effort, Side, this_program};

/// What stands between what is counted.
const MARK: Signal = Signal::SIGUSR1;

/// Starts the other end of a case, which says [`begin`] and then [`mark`] `N` times, and counts what
/// it executes from each to the next.
pub fn counted<const N: usize>(case: &str, side: Side, effort: Effort) -> Result<[u64; N]> {
    let child = this_program("--other-end", case, side, effort)?.stdout(Stdio::null()).spawn()?;
    let child = Pid::from_raw(child.id().try_into()?);
    let options = ptrace::Options::PTRACE_O_EXITKILL;
    let mut counts = [0; N];
    // It attaches itself to us and stops at its first mark.
    wait_for_mark(child, |_| bail!("it steps though nobody said so"))?;
    ptrace::setoptions(child, options).context("ptrace(2), which counts instructions")?;
    for count in &mut counts {
        ptrace::step(child, None)?;
        wait_for_mark(child, |child| {
            *count += 1;
            Ok(ptrace::step(child, None)?)
        })?;
    }
    ptrace::cont(child, None)?;
    let ended = waitpid(child, None)?;
    ensure!(ended == WaitStatus::Exited(child, 0), "what is counted: {ended:?}");
    Ok(counts)
}

fn wait_for_mark(child: Pid, mut stepped: impl FnMut(Pid) -> Result<()>) -> Result<()> {
    loop {
        match waitpid(child, None)? {
            WaitStatus::Stopped(_, MARK) => return Ok(()),
            WaitStatus::Stopped(_, Signal::SIGTRAP) => stepped(child)?,
            other => bail!("what is counted: {other:?}"),
        }
    }
}

/// What this thread executes from here on is counted.
pub fn begin() -> Result<()> {
    ptrace::traceme().context("ptrace(2), which counts instructions")?;
    mark()
}

/// One count ends here, and the next one begins.
pub fn mark() -> Result<()> {
    Ok(raise(MARK)?)
}
