//! How many system calls a process makes, all of its threads and children together.
//!
//! Counted by `ptrace(2)`, which slows the process down and needs no rights and no tool.

use std::io::{BufRead, BufReader, Write, stdin};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Starts a program that calls [`wait_to_be_counted`], with `line`, and counts from there to its
/// end. The caller has no other child meanwhile.
pub fn count(mut program: Command, line: &str) -> Result<u64> {
    let mut child = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    // What the loader does is not counted.
    let mut output = BufReader::new(child.stdout.take().context("it has a pipe")?);
    output.read_line(&mut String::new())?;
    let main = Pid::from_raw(child.id().try_into()?);
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(main, options).context("ptrace(2), which counts system calls")?;
    // From this stop on it is let go from system call to system call.
    ptrace::interrupt(main)?;
    child.stdin.take().context("it has a pipe")?.write_all(format!("{line}\n").as_bytes())?;
    let mut stops = 0;
    loop {
        let (thread, signal) = match waitpid(None, Some(WaitPidFlag::__WALL))? {
            WaitStatus::PtraceSyscall(thread) => {
                stops += 1;
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, ..) => (thread, None),
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            // Once going in, once coming out.
            WaitStatus::Exited(thread, 0) if thread == main => return Ok(stops / 2),
            WaitStatus::Exited(thread, _) if thread != main => continue,
            other => bail!("the program whose system calls are counted: {other:?}"),
        };
        match ptrace::syscall(thread, signal) {
            // The thread has ended meanwhile.
            Err(nix::errno::Errno::ESRCH) | Ok(()) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

/// To be called by a program that is counted from here on. Returns the line for it.
pub fn wait_to_be_counted() -> Result<String> {
    println!("ready");
    let mut line = String::new();
    stdin().read_line(&mut line)?;
    Ok(line.trim().to_owned())
}
