//! What a process gives up before it runs code that it does not trust.
//!
//! [`Sandbox::enter`] takes, in this order, because each step needs what a later one takes away:
//!
//! 1. limits (setrlimit(2)): no core file, so many descriptors, so much memory;
//! 2. the capabilities' bounding and ambient sets, then user and groups (capabilities(7),
//!    setresuid(2), setgroups(2)), where the process may change them, then every capability;
//! 3. being looked into by others of its user (`PR_SET_DUMPABLE` 0) and gaining rights by `execve`
//!    (`PR_SET_NO_NEW_PRIVS`, both prctl(2));
//! 4. the file system, TCP, abstract sockets and signals to others (landlock(7)), as far as the
//!    kernel has it: what stays is reading the libraries that a plugin may need;
//! 5. every system call but those in `system_calls.policy` (seccomp(2)).
//!
//! There is no way back. Landlock and the capabilities are a thread's, and new threads inherit
//! them: a process that has more than one thread is refused.
//!
//! A refused system call fails with `EPERM` and is reported by its number once
//! ([`Report`]), or ends the process ([`OnRefusal`]).

mod files;
mod identity;
mod limits;
mod system_calls;

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

pub use identity::Identity;
pub use limits::MEMORY;
pub use system_calls::{PolicyError, call_name, report_to};

/// What is to be left of a process's rights.
#[derive(Debug)]
pub struct Sandbox<'a> {
    /// The user and group to become; `None` to stay who one is.
    pub identity: Option<Identity>,
    /// Nobody else is of that user, so what it has can be limited as a whole.
    pub is_alone: bool,
    /// Files beside the libraries that stay readable, by descriptors of them.
    pub readable: &'a [BorrowedFd<'a>],
    /// The most bytes of private memory, and of each memory file.
    pub memory: u64,
    /// The most descriptors.
    pub descriptors: u64,
    /// What a system call outside the policy leads to.
    pub on_refusal: OnRefusal,
}

/// What a system call outside the policy leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRefusal {
    /// It fails with `EPERM`.
    Fail,
    /// The process dies of `SIGSYS`.
    Kill,
}

/// How a refused system call is reported: as one packet on a socket, at its first time.
///
/// It is written by a signal handler, hence texts that are there already: the packet is `before`,
/// the number in decimal, `after`. A packet that the socket has no room for is sent at the next
/// time.
#[derive(Debug)]
pub struct Report {
    /// The socket, until [`report_to`] names another one.
    pub to: OwnedFd,
    /// What stands before the number.
    pub before: &'static str,
    /// What stands after it.
    pub after: &'static str,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enforced {
    /// What is in force, each in a few words.
    pub parts: Vec<String>,
    /// What this kernel, or a process without rights, cannot do, each in a few words.
    pub missing: Vec<String>,
}

impl fmt::Display for Enforced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.parts.join(", "))?;
        match self.missing.is_empty() {
            true => Ok(()),
            false => write!(f, "; not: {}", self.missing.join(", ")),
        }
    }
}

/// Why a process could not give up what it was to give up. It is in a state between, and has to
/// end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// It has several threads, and some steps bind the calling one only.
    #[error("the process has {threads} threads, and one is all it may have")]
    Threads {
        /// How many.
        threads: usize,
    },
    /// The kernel refused a step.
    #[error("{step}")]
    Step {
        /// Which, in words.
        step: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// Capabilities could not be dropped.
    #[error("dropping capabilities")]
    Capabilities(#[from] caps::errors::CapsError),
    /// Landlock refused a rule.
    #[error("restricting files")]
    Files(#[from] landlock::RulesetError),
    /// The policy has a mistake.
    #[error("reading the policy of system calls")]
    Policy(#[from] PolicyError),
    /// The filter of system calls was refused.
    #[error("filtering system calls")]
    SystemCalls(#[from] seccompiler::Error),
}

impl Sandbox<'_> {
    /// Gives up everything but what `self` says, for good.
    ///
    /// Errors: [`SandboxError`]; the process has lost some of its rights then, and has to end.
    /// What the kernel does not have is no error: see [`Enforced::missing`].
    pub fn enter(&self, report: Report) -> Result<Enforced, SandboxError> {
        let threads = std::fs::read_dir("/proc/self/task").map_err(step("counting the threads"))?;
        let threads = threads.count();
        if threads != 1 {
            return Err(SandboxError::Threads { threads });
        }
        let mut enforced = Enforced { parts: Vec::new(), missing: Vec::new() };
        limits::set(self)?;
        // Compiled first: reading libraries' folders is what it must not depend on.
        let filter = system_calls::Filter::compile()?;
        identity::change(self.identity, &mut enforced)?;
        nix::sys::prctl::set_dumpable(false).map_err(step_of("hiding from others"))?;
        nix::sys::prctl::set_no_new_privs().map_err(step_of("giving up new rights"))?;
        files::restrict(self.readable, &mut enforced)?;
        filter.apply(self.on_refusal, report, &mut enforced)?;
        Ok(enforced)
    }
}

fn step(step: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
    move |source| SandboxError::Step { step, source }
}

fn step_of(words: &'static str) -> impl FnOnce(nix::Error) -> SandboxError {
    move |source| step(words)(source.into())
}
