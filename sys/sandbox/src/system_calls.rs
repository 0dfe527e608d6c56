//! Which system calls are left: `system_calls.policy`, as a filter in the kernel.

#![expect(unsafe_code)]
// UNSAFETY: the signal handler for what the filter refuses.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use nix::sys::signal::{SigSet, Signal};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};
use syscalls::Sysno;

use crate::{Enforced, OnRefusal, Report, SandboxError, step};

/// The file with the reasons.
const POLICY: &str = include_str!("system_calls.policy");

/// A mistake in the policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("system_calls.policy:{line}: {what}")]
pub struct PolicyError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong.
    pub what: String,
}

/// The name of a system call of this machine; its number where it has none.
pub fn call_name(number: u32) -> String {
    match Sysno::new(number as usize) {
        Some(call) => call.name().to_owned(),
        None => number.to_string(),
    }
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What the kernel is to run at every system call.
pub(crate) struct Filter {
    /// Makes libc take `clone` in place of `clone3`, whose flags no filter can look at.
    no_clone3: BpfProgram,
    allowed: BpfProgram,
    calls: usize,
}

impl Filter {
    pub(crate) fn compile() -> Result<Self, SandboxError> {
        let rules = rules(POLICY, std::process::id())?;
        let calls = rules.len();
        let clone3 = BTreeMap::from([(i64::from(Sysno::clone3.id()), Vec::new())]);
        let missing = SeccompAction::Errno(libc::ENOSYS as u32);
        Ok(Self {
            no_clone3: program(clone3, SeccompAction::Allow, missing)?,
            allowed: program(rules, SeccompAction::Trap, SeccompAction::Allow)?,
            calls,
        })
    }

    /// Puts the filter in force for every thread, and its reports on their way.
    pub(crate) fn apply(
        self,
        on_refusal: OnRefusal,
        report: Report,
        enforced: &mut Enforced,
    ) -> Result<(), SandboxError> {
        catch_refusals(on_refusal, report)?;
        let applied = apply_filter_all_threads(&self.no_clone3)
            .and_then(|()| apply_filter_all_threads(&self.allowed));
        match applied {
            Ok(()) => enforced.parts.push(format!("seccomp ({} calls)", self.calls)),
            // Source: seccomp(2): the kernel was built without filters.
            Err(seccompiler::Error::Seccomp(err))
                if matches!(err.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) =>
            {
                enforced.missing.push("seccomp (not in this kernel)".to_owned());
            }
            Err(err) => return Err(err.into()),
        }
        Ok(())
    }
}

fn program(
    rules: Rules,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<BpfProgram, SandboxError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH);
    let filter = architecture.and_then(|it| SeccompFilter::new(rules, otherwise, action, it));
    Ok(filter.and_then(BpfProgram::try_from).map_err(seccompiler::Error::from)?)
}

// ---- The policy's text ----

/// The rules of each call; none for one that is always allowed. `own` is what `self` stands for.
fn rules(policy: &str, own: u32) -> Result<Rules, PolicyError> {
    let mut rules = Rules::new();
    for (at, line) in policy.lines().enumerate() {
        let wrong = |what: String| PolicyError { line: at + 1, what };
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (left, reason) = line.split_once(" : ").ok_or(wrong("has no reason".to_owned()))?;
        if reason.trim().is_empty() {
            return Err(wrong("has no reason".to_owned()));
        }
        let (name, conditions) = left.split_once(' ').unwrap_or((left, ""));
        let (name, architecture) = match name.split_once('@') {
            Some((name, architecture)) => (name, architecture),
            None => (name, std::env::consts::ARCH),
        };
        if architecture != std::env::consts::ARCH {
            continue;
        }
        let call: Sysno =
            name.parse().map_err(|_| wrong(format!("there is no system call {name}")))?;
        let conditions = conditions.split(" and ").filter(|it| !it.is_empty());
        let conditions = conditions.map(|text| {
            condition(text, own).ok_or_else(|| wrong(format!("{text:?} is no condition")))
        });
        let conditions = conditions.collect::<Result<Vec<_>, _>>()?;
        let number = i64::from(call.id());
        let is_new = !rules.contains_key(&number);
        let ways = rules.entry(number).or_default();
        // Without conditions it is allowed in every way, and one more would take that back.
        if !is_new && (ways.is_empty() || conditions.is_empty()) {
            return Err(wrong(format!("{name} is allowed in every way by another line")));
        }
        if !conditions.is_empty() {
            ways.push(SeccompRule::new(conditions).map_err(|err| wrong(err.to_string()))?);
        }
    }
    Ok(rules)
}

/// `argN OP VALUE`, `argN & MASK == VALUE`; `None` for what is neither.
fn condition(text: &str, own: u32) -> Option<SeccompCondition> {
    let words: Vec<&str> = text.split(' ').collect();
    let (argument, operation, value) = match words[..] {
        [argument, "==", value] => (argument, SeccompCmpOp::Eq, value),
        [argument, "!=", value] => (argument, SeccompCmpOp::Ne, value),
        [argument, "&", mask, "==", value] => {
            (argument, SeccompCmpOp::MaskedEq(number(mask, own)?), value)
        }
        _ => return None,
    };
    let (argument, length) = match argument.strip_suffix(".64") {
        Some(argument) => (argument, SeccompCmpArgLen::Qword),
        None => (argument, SeccompCmpArgLen::Dword),
    };
    let argument = argument.strip_prefix("arg")?.parse().ok()?;
    SeccompCondition::new(argument, length, operation, number(value, own)?).ok()
}

fn number(text: &str, own: u32) -> Option<u64> {
    let (digits, radix) = match text {
        "self" => return Some(own.into()),
        _ if text.starts_with("0x") => (&text[2..], 16),
        _ if text.starts_with("0o") => (&text[2..], 8),
        _ => (text, 10),
    };
    u64::from_str_radix(digits, radix).ok()
}

// ---- What is refused ----

struct Refusals {
    report: Report,
    kills: bool,
    /// A bit for each number that was reported.
    reported: [AtomicU64; 16],
}

static REFUSALS: OnceLock<Refusals> = OnceLock::new();

/// The digits of the largest number, the most bytes of a report around it.
const DIGITS: usize = 10;
const LONGEST_REPORT: usize = 128;

fn catch_refusals(on_refusal: OnRefusal, report: Report) -> Result<(), SandboxError> {
    assert!(report.before.len() + DIGITS + report.after.len() <= LONGEST_REPORT);
    let kills = on_refusal == OnRefusal::Kill;
    // Whoever was first stays: a process enters once.
    let _ = REFUSALS.set(Refusals { report, kills, reported: Default::default() });
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = refused;
    set_handler(handler as *const () as usize, libc::SA_SIGINFO | libc::SA_ONSTACK)
        .map_err(step("catching refused system calls"))?;
    // A blocked one would be the end of the process at the first refusal.
    let unblocked = SigSet::from(Signal::SIGSYS).thread_unblock();
    unblocked.map_err(crate::step_of("catching refused system calls"))
}

/// Sends the reports of this process's refused system calls to another socket from now on, each call
/// anew at its next time. Does nothing where none are reported. Needs dup3(2).
pub fn report_to(socket: BorrowedFd<'_>) -> io::Result<()> {
    let Some(refusals) = REFUSALS.get() else { return Ok(()) };
    let (from, to) = (socket.as_raw_fd(), refusals.report.to.as_raw_fd());
    // The handler goes on with the same number, which never stands for nothing meanwhile.
    // SAFETY: the number is our own for the life of the process, and stays an open descriptor.
    if unsafe { libc::dup3(from, to, libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    refusals.reported.iter().for_each(|word| word.store(0, SeqCst));
    Ok(())
}

fn set_handler(handler: usize, flags: c_int) -> io::Result<()> {
    // SAFETY: all zeros is a `sigaction` without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: the action is whole, and its handler does what signal-safety(7) allows.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs in place of a refused system call, in its thread: reports it, and gives it its result.
extern "C" fn refused(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO this is the thread's context, ours until the return (sigaction(2)).
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    // SAFETY: it is this thread's own, and lives as long as the thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    let number = exchange(context, -libc::EPERM);
    if let Some(refusals) = REFUSALS.get() {
        refusals.tell(number);
        if refusals.kills {
            let _ = set_handler(libc::SIG_DFL, 0);
            // Comes when this handler has returned, and cannot be missed.
            // SAFETY: raising a signal touches no memory of ours.
            unsafe { libc::raise(libc::SIGSYS) };
        }
    }
    // SAFETY: as above.
    unsafe { *errno = before };
}

/// The number of the system call that a thread made, and in its place the result of that.
///
/// Source: Linux, `kernel/seccomp.c`, SECCOMP_RET_TRAP: the registers are as before the call, and
/// the thread goes on behind it.
fn exchange(context: &mut libc::ucontext_t, result: c_int) -> u32 {
    #[cfg(target_arch = "x86_64")]
    {
        let register = &mut context.uc_mcontext.gregs[libc::REG_RAX as usize];
        std::mem::replace(register, i64::from(result)) as u32
    }
    #[cfg(target_arch = "aarch64")]
    {
        context.uc_mcontext.regs[0] = i64::from(result) as u64;
        context.uc_mcontext.regs[8] as u32
    }
}

impl Refusals {
    /// Reports a number at its first time. Async-signal-safe: no lock, no allocation.
    fn tell(&self, number: u32) {
        let (word, bit) = (number as usize / 64 % self.reported.len(), 1 << (number % 64));
        if self.reported[word].fetch_or(bit, SeqCst) & bit != 0 {
            return;
        }
        let mut packet = [0; LONGEST_REPORT];
        let len = write_report(&self.report, number, &mut packet);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let to = self.report.to.as_raw_fd();
        // SAFETY: the first `len` bytes are initialised and ours.
        let sent = unsafe { libc::send(to, packet.as_ptr().cast(), len, flags) };
        if sent < 0 {
            self.reported[word].fetch_and(!bit, SeqCst);
        }
    }
}

/// The report's bytes, and how many.
fn write_report(report: &Report, number: u32, into: &mut [u8; LONGEST_REPORT]) -> usize {
    let mut digits = [0; DIGITS];
    let (mut rest, mut first) = (number, DIGITS);
    loop {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let mut len = 0;
    for part in [report.before.as_bytes(), &digits[first..], report.after.as_bytes()] {
        into[len..len + part.len()].copy_from_slice(part);
        len += part.len();
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(policy: &str) -> String {
        rules(policy, 1).unwrap_err().to_string()
    }

    #[test]
    fn the_policy_has_no_mistake() {
        assert!(rules(POLICY, 1).unwrap().len() > 50);
        Filter::compile().unwrap();
    }

    /// The way out of a sandbox, each by itself.
    #[test]
    fn the_policy_leaves_nothing_that_reaches_others() {
        let rules = rules(POLICY, 1).unwrap();
        let never = "execve execveat fork vfork ptrace process_vm_readv process_vm_writev socket \
                     socketpair connect bind listen accept mount umount2 unshare setns \
                     chroot pivot_root setuid setresuid setgid setgroups capset keyctl add_key bpf \
                     perf_event_open userfaultfd io_uring_setup init_module finit_module reboot \
                     kexec_load swapon sethostname clock_settime settimeofday setrlimit \
                     open_by_handle_at pidfd_open pidfd_getfd pidfd_send_signal tkill unlinkat \
                     renameat linkat symlinkat mkdirat mknodat truncate sched_setscheduler \
                     sched_setattr personality openat2 move_pages migrate_pages kcmp \
                     process_madvise rt_sigqueueinfo rt_tgsigqueueinfo";
        for name in never.split_whitespace() {
            // Not every architecture has each of them.
            let Ok(call) = name.parse::<Sysno>() else { continue };
            assert!(!rules.contains_key(&i64::from(call.id())), "{name} is allowed");
        }
        let partly = "openat clone kill tgkill prctl prlimit64 ioctl fchmod accept4";
        for name in partly.split_whitespace() {
            let call: Sysno = name.parse().unwrap();
            assert!(!rules[&i64::from(call.id())].is_empty(), "{name} is allowed in every way");
        }
    }

    #[test]
    fn a_mistake_in_a_policy_is_named_with_its_line() {
        assert_eq!(complaint("\nread"), "system_calls.policy:2: has no reason");
        assert_eq!(complaint("reed : x"), "system_calls.policy:1: there is no system call reed");
        assert_eq!(
            complaint("kill arg0 ~ 3 : x"),
            "system_calls.policy:1: \"arg0 ~ 3\" is no condition"
        );
        assert_eq!(
            complaint("read : x\nread arg0 == 1 : x"),
            "system_calls.policy:2: read is allowed in every way by another line"
        );
    }

    #[test]
    fn a_line_for_another_architecture_does_not_count_here() {
        assert!(rules("read@vax : x", 1).unwrap().is_empty());
    }

    #[test]
    fn a_report_has_the_number_between_its_texts() {
        let to = std::io::stderr();
        let to = std::os::fd::AsFd::as_fd(&to).try_clone_to_owned().unwrap();
        let report = Report { to, before: "<", after: ">" };
        for (number, expected) in [(0, "<0>"), (101, "<101>"), (u32::MAX, "<4294967295>")] {
            let mut packet = [0; LONGEST_REPORT];
            let len = write_report(&report, number, &mut packet);
            assert_eq!(&packet[..len], expected.as_bytes());
        }
    }
}
