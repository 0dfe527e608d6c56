//! The operator's hook: a program that is run at each death.
//!
//! The actor only leaves a note. A thread per device, which is there while it has something to do,
//! starts the program, so that one that cannot be started at once (its file system hangs), does
//! not end, or ends badly holds up nobody: neither the daemon nor the hooks of other devices.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use iohost_control::crash::{DeathReason, Decision};
use iohost_event::{Poller, ProcessHandle, Ready};
use log::{info, warn};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// The most calls of one device that wait for an earlier one; of more, the oldest are left out.
const MOST_WAITING: usize = 8;

/// Why the lock of a line is never poisoned.
const NO_PANIC: &str = "nothing under this lock can fail";

/// What a hook is told.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) program: PathBuf,
    pub(crate) limit: Duration,
    pub(crate) device: String,
    pub(crate) driver: String,
    pub(crate) reason: DeathReason,
    pub(crate) incarnation: u64,
    pub(crate) decision: Decision,
    pub(crate) message: String,
    /// The number of the crash report.
    pub(crate) report: u64,
}

/// The hooks of all devices.
#[derive(Debug, Default)]
pub(crate) struct Hooks {
    lines: HashMap<String, Arc<Mutex<Line>>>,
}

/// The calls of one device, which are made one after the other.
#[derive(Debug, Default)]
struct Line {
    /// A thread makes calls.
    is_busy: bool,
    waiting: VecDeque<Call>,
}

impl Hooks {
    /// Has a call made, behind those of the same device.
    pub(crate) fn call(&mut self, call: Call) {
        let line = self.lines.entry(call.device.clone()).or_default().clone();
        let mut locked = line.lock().expect(NO_PANIC);
        if locked.waiting.len() == MOST_WAITING {
            locked.waiting.pop_front();
            warn!(device = call.device; "hook behind by {MOST_WAITING} calls: the oldest is left out");
        }
        let device = call.device.clone();
        locked.waiting.push_back(call);
        if locked.is_busy {
            return;
        }
        locked.is_busy = true;
        drop(locked);
        let theirs = line.clone();
        let started = thread::Builder::new().name("hook".into()).spawn(move || make(&theirs));
        if let Err(err) = started {
            // The next death tries again.
            line.lock().expect(NO_PANIC).is_busy = false;
            warn!(device, err:%; "no thread for the hook");
        }
    }
}

fn make(line: &Mutex<Line>) {
    loop {
        let next = {
            let mut line = line.lock().expect(NO_PANIC);
            let next = line.waiting.pop_front();
            line.is_busy = next.is_some();
            next
        };
        let Some(call) = next else { return };
        match call.run() {
            Ok(how) => info!(device = call.device, reason = call.reason.name(); "hook {how}"),
            Err(err) => {
                let program = call.program.display();
                warn!(device = call.device, hook:% = program; "hook failed: {err}");
            }
        }
    }
}

impl Call {
    /// Runs the program until it has ended, or is killed. How it ended, in words.
    fn run(&self) -> io::Result<String> {
        let mut child = self.command().spawn()?;
        let ended = Self::wait(&child, self.limit);
        if !ended.as_ref().is_ok_and(|ended| *ended) {
            // With whatever it started: they are a group of their own.
            let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
        }
        let status = child.wait()?;
        match ended? {
            false => Err(io::Error::other(format!("killed, as it took over {:?}", self.limit))),
            true if status.success() => Ok("ended".to_owned()),
            true => Err(io::Error::other(format!("it ended with {status}"))),
        }
    }

    fn command(&self) -> Command {
        let pause = match self.decision {
            Decision::Restart { pause_ms } => pause_ms,
            Decision::Quarantine | Decision::Stop => 0,
        };
        let mut command = Command::new(&self.program);
        command
            .args([&self.device, self.reason.name()])
            .args([&self.incarnation.to_string(), self.decision.name()])
            .env("IOHOST_DEVICE", &self.device)
            .env("IOHOST_DRIVER", &self.driver)
            .env("IOHOST_REASON", self.reason.name())
            .env("IOHOST_INCARNATION", self.incarnation.to_string())
            .env("IOHOST_DECISION", self.decision.name())
            .env("IOHOST_PAUSE_MS", pause.to_string())
            .env("IOHOST_MESSAGE", self.message.replace('\0', "?"))
            .env("IOHOST_CRASH", self.report.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0);
        command
    }

    /// Whether the program has ended in time.
    fn wait(child: &Child, limit: Duration) -> io::Result<bool> {
        let handle = ProcessHandle::of_child(child)?;
        let poller = Poller::new()?;
        poller.watch_while_readable(&handle, 0)?;
        let mut found = Ready::new(1);
        let deadline = std::time::Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            poller.wait(&mut found, Some(left + Duration::from_millis(1)))?;
            if found.tokens().next().is_some() {
                return Ok(true);
            }
            if left.is_zero() {
                return Ok(false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use super::*;

    const WATCHDOG: Duration = Duration::from_secs(60);

    /// The file is written by another process: a child that another test starts meanwhile could
    /// hold one of ours open for writing, and a program that is open so is not run (ETXTBSY).
    fn script(folder: &std::path::Path, text: &str) -> PathBuf {
        let (draft, file) = (folder.join("draft"), folder.join("hook"));
        fs::write(&draft, format!("#!/bin/sh\n{text}\n")).unwrap();
        let copied = Command::new("install").arg(&draft).arg(&file).status().unwrap();
        assert!(copied.success(), "{copied}");
        file
    }

    fn call(program: PathBuf, device: &str, incarnation: u64) -> Call {
        Call {
            program,
            limit: WATCHDOG,
            device: device.into(),
            driver: "edu".into(),
            reason: DeathReason::Hang,
            incarnation,
            decision: Decision::Restart { pause_ms: 2000 },
            message: "it hung".into(),
            report: 7,
        }
    }

    fn wait_until(is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + WATCHDOG;
        while !is_so() {
            assert!(Instant::now() < deadline, "it never came to that");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn text(file: &std::path::Path) -> String {
        fs::read_to_string(file).unwrap_or_default()
    }

    #[test]
    fn a_hook_is_told_by_arguments_and_environment() {
        let folder = tempfile::tempdir().unwrap();
        let said = folder.path().join("said");
        let program = script(
            folder.path(),
            &format!(
                "echo \"$*|$IOHOST_DEVICE|$IOHOST_DRIVER|$IOHOST_REASON|$IOHOST_INCARNATION|\
                 $IOHOST_DECISION|$IOHOST_PAUSE_MS|$IOHOST_MESSAGE|$IOHOST_CRASH\" > {}",
                said.display()
            ),
        );
        assert_eq!(call(program, "edu0", 3).run().unwrap(), "ended");
        let expected = "edu0 hang 3 restart|edu0|edu|hang|3|restart|2000|it hung|7\n";
        assert_eq!(text(&said), expected);
    }

    #[test]
    fn calls_of_a_device_come_one_after_the_other_and_those_of_another_do_not_wait() {
        let folder = tempfile::tempdir().unwrap();
        let said = folder.path().join("said");
        let gate = folder.path().join("gate");
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // That of device `a` waits until somebody opens the gate, each time.
        let text_of_hook = format!(
            "[ $1 = a ] && read line < {}\necho $1$3 >> {}",
            gate.display(),
            said.display()
        );
        let program = script(folder.path(), &text_of_hook);
        let mut hooks = Hooks::default();
        for incarnation in 1..=2 {
            hooks.call(call(program.clone(), "a", incarnation));
        }
        hooks.call(call(program, "b", 1));
        wait_until(|| text(&said) == "b1\n");
        fs::write(&gate, "go\n").unwrap();
        wait_until(|| text(&said) == "b1\na1\n");
        fs::write(&gate, "go\n").unwrap();
        wait_until(|| text(&said) == "b1\na1\na2\n");
    }

    #[test]
    fn a_hook_that_hangs_is_killed_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let child = folder.path().join("child");
        let program =
            script(folder.path(), &format!("sleep 1000 &\necho $! > {}\nwait", child.display()));
        let limited = Call { limit: Duration::from_secs(5), ..call(program, "a", 1) };
        let err = limited.run().unwrap_err();
        assert_eq!(err.to_string(), "killed, as it took over 5s");
        let sleeper = text(&child).trim().to_owned();
        assert!(!sleeper.is_empty(), "it had started something");
        let is_gone = || {
            let state = text(&PathBuf::from(format!("/proc/{sleeper}/stat")));
            // Nobody may have waited for it yet.
            state.is_empty() || state.contains(") Z ")
        };
        wait_until(is_gone);
    }

    #[test]
    fn a_hook_that_is_not_there_or_fails_is_an_error_in_words() {
        let missing = call("/nonexistent/hook".into(), "a", 1).run().unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let folder = tempfile::tempdir().unwrap();
        let err = call(script(folder.path(), "exit 3"), "a", 1).run().unwrap_err();
        assert!(err.to_string().contains("exit status: 3"), "{err}");
    }

    #[test]
    fn a_device_that_dies_faster_than_its_hook_runs_has_a_bounded_line() {
        let folder = tempfile::tempdir().unwrap();
        let gate = folder.path().join("gate");
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let program = script(folder.path(), &format!("read line < {}", gate.display()));
        let mut hooks = Hooks::default();
        for incarnation in 1..=100 {
            let limit = Duration::from_secs(2);
            hooks.call(Call { limit, ..call(program.clone(), "a", incarnation) });
        }
        let line = hooks.lines["a"].lock().unwrap();
        assert!(line.waiting.len() <= MOST_WAITING, "{} wait", line.waiting.len());
        assert_eq!(line.waiting.back().unwrap().incarnation, 100, "the latest is not left out");
    }
}
