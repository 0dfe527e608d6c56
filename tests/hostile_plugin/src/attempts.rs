//! The ways out, each by its name.

#![expect(unsafe_code)]
// UNSAFETY: system calls as a hostile plugin makes them, past every library.

use std::ffi::{CString, c_long};
use std::io;

use libc::{
    AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_UNIX, AF_VSOCK, AT_FDCWD, EACCES, EAGAIN, EFBIG,
    EMFILE, ENOMEM, ENOSYS, EPERM, O_CREAT, O_RDONLY, O_RDWR, O_WRONLY, SOCK_RAW, SOCK_STREAM,
};

/// Against what.
pub struct Target {
    pub daemon: u32,
    pub other: u32,
    pub folder: String,
    pub control: String,
}

/// What became of an attempt.
pub enum Outcome {
    /// It was refused, with this error.
    Refused(&'static str),
    /// It was not.
    Escaped(String),
}

type Attempt = fn(&Target) -> Outcome;

/// One for each thing that a driver has no business with.
#[rustfmt::skip]
pub const ATTEMPTS: &[(&str, Attempt)] = &[
    // Files.
    ("read a file that everybody may read", |_| open("/etc/passwd", O_RDONLY)),
    ("read a secret", |_| open("/etc/shadow", O_RDONLY)),
    ("read a file of the daemon's", |t| open(&t.victim(), O_RDONLY)),
    ("write a file of the daemon's", |t| open(&t.victim(), O_WRONLY)),
    ("make a file", |t| open(&t.fresh(), O_WRONLY | O_CREAT)),
    ("make a file without a name", |t| open(&t.folder, O_RDWR | libc::O_TMPFILE)),
    ("list the root folder", |_| open("/", O_RDONLY | libc::O_DIRECTORY)),
    ("make a folder", |t| path(libc::SYS_mkdirat, &t.fresh(), 0o700)),
    ("make a device node", |t| path(libc::SYS_mknodat, &t.fresh(), (libc::S_IFIFO | 0o600) as usize)),
    ("remove a file", |t| path(libc::SYS_unlinkat, &t.victim(), 0)),
    ("rename a file", |t| two(libc::SYS_renameat2, &t.victim(), &t.fresh())),
    ("make a hard link", |t| two(libc::SYS_linkat, &t.victim(), &t.fresh())),
    ("make a symbolic link", |t| {
        let (from, to) = (c(&t.victim()), c(&t.fresh()));
        call(libc::SYS_symlinkat, &[at(&from), FDCWD, at(&to)])
    }),
    ("change a file's mode", |t| path(libc::SYS_fchmodat, &t.victim(), 0o777)),
    ("change a file's owner", |t| {
        let name = c(&t.victim());
        call(libc::SYS_fchownat, &[FDCWD, at(&name), 1, 1, 0])
    }),
    ("shorten a file", |t| {
        let name = c(&t.victim());
        call(libc::SYS_truncate, &[at(&name), 0])
    }),
    ("mark a file", |t| {
        let (name, key) = (c(&t.victim()), c("user.mark"));
        call(libc::SYS_setxattr, &[at(&name), at(&key), at(&key), 1, 0])
    }),
    ("set a file's times", |t| {
        let name = c(&t.victim());
        call(libc::SYS_utimensat, &[FDCWD, at(&name), 0, 0])
    }),
    ("open a file by its handle", |_| call(libc::SYS_open_by_handle_at, &[FDCWD, 0, 0])),
    ("watch files", |_| call(libc::SYS_inotify_init1, &[0])),

    // The machine, through files.
    ("open the machine's memory", |_| open("/dev/mem", O_RDWR)),
    ("open the kernel's log", |_| open("/dev/kmsg", O_WRONLY)),
    ("open VFIO's container", |_| open("/dev/vfio/vfio", O_RDWR)),
    ("open the group of another device", |_| open("/dev/vfio/0", O_RDWR)),
    ("open iommufd", |_| open("/dev/iommu", O_RDWR)),
    ("open the terminal", |_| open("/dev/tty", O_RDWR)),
    ("bind a device through sysfs", |_| open("/sys/bus/pci/drivers_probe", O_WRONLY)),
    ("write a device's configuration", |_| {
        open("/sys/bus/pci/devices/0000:00:00.0/config", O_RDWR)
    }),
    ("set the program for core files", |_| open("/proc/sys/kernel/core_pattern", O_WRONLY)),
    ("press a system request key", |_| open("/proc/sysrq-trigger", O_WRONLY)),

    // Other processes.
    ("look into the daemon by ptrace", |t| {
        // An address that has to be 0, so that nothing is attached to.
        call(libc::SYS_ptrace, &[libc::PTRACE_SEIZE as usize, t.daemon as usize, 1, 0])
    }),
    ("read the daemon's memory", |t| read_memory(t.daemon)),
    ("write the daemon's memory", |t| {
        let parts = [0_usize; 2];
        let parts = parts.as_ptr() as usize;
        call(libc::SYS_process_vm_writev, &[t.daemon as usize, parts, 1, parts, 1, 0])
    }),
    ("read another driver host's memory", |t| read_memory(t.other)),
    ("open the daemon's memory as a file", |t| open(&format!("/proc/{}/mem", t.daemon), O_RDONLY)),
    ("open another driver host's memory as a file", |t| {
        open(&format!("/proc/{}/mem", t.other), O_RDONLY)
    }),
    ("read the daemon's environment", |t| open(&format!("/proc/{}/environ", t.daemon), O_RDONLY)),
    ("signal the daemon", |t| call(libc::SYS_kill, &[t.daemon as usize, 0])),
    ("signal another driver host", |t| call(libc::SYS_kill, &[t.other as usize, 0])),
    ("signal every process", |_| call(libc::SYS_kill, &[usize::MAX, 0])),
    ("signal a thread of the daemon", |t| {
        call(libc::SYS_tgkill, &[t.daemon as usize, t.daemon as usize, 0])
    }),
    ("queue a signal to the daemon", |t| {
        call(libc::SYS_rt_sigqueueinfo, &[t.daemon as usize, 0, 0])
    }),
    ("have the kernel signal the daemon", |t| {
        call(libc::SYS_fcntl, &[2, libc::F_SETOWN as usize, t.daemon as usize])
    }),
    ("hold the daemon by a descriptor", |t| call(libc::SYS_pidfd_open, &[t.daemon as usize, 0])),
    ("take a descriptor of the daemon", |_| call(libc::SYS_pidfd_getfd, &[0, 0, 0])),
    ("change the daemon's limits", |t| {
        let limit = [1_u64 << 20; 2];
        let limit = limit.as_ptr() as usize;
        call(libc::SYS_prlimit64, &[t.daemon as usize, libc::RLIMIT_NOFILE as usize, limit, 0])
    }),
    ("compare with the daemon", |t| {
        call(libc::SYS_kcmp, &[t.daemon as usize, t.daemon as usize, 0, 0, 0])
    }),

    // New processes and programs.
    ("fork", |_| fork()),
    ("clone a process", |_| {
        finish_child(call(libc::SYS_clone, &[libc::SIGCHLD as usize, 0, 0, 0, 0]))
    }),
    ("clone into a user namespace", |_| {
        let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
        finish_child(call(libc::SYS_clone, &[flags as usize, 0, 0, 0, 0]))
    }),
    ("clone a process by clone3", |_| allowing(&[(ENOSYS, "ENOSYS")], call(libc::SYS_clone3, &[0, 0]))),
    ("run a program", |_| {
        let name = c("/nonexistent");
        call(libc::SYS_execve, &[at(&name), 0, 0])
    }),
    ("run a program from memory", |_| run_from_memory()),

    // Network.
    ("a socket of IPv4", |_| socket(AF_INET, SOCK_STREAM)),
    ("a socket of IPv6", |_| socket(AF_INET6, SOCK_STREAM)),
    ("a raw socket", |_| socket(AF_PACKET, SOCK_RAW)),
    ("a socket to the kernel", |_| socket(AF_NETLINK, SOCK_RAW)),
    ("a socket to virtual machines", |_| socket(AF_VSOCK, SOCK_STREAM)),
    ("connect to the control socket", |t| connect(&t.control)),
    ("connect to the device of another driver", |t| connect(&format!("{}/other0", t.folder))),
    ("a pair of sockets", |_| {
        let pair = [0_i32; 2];
        call(libc::SYS_socketpair, &[AF_UNIX as usize, SOCK_STREAM as usize, 0, pair.as_ptr() as usize])
    }),

    // Rights.
    ("become root", |_| call(libc::SYS_setuid, &[0])),
    ("become root's group", |_| call(libc::SYS_setgid, &[0])),
    ("join groups", |_| call(libc::SYS_setgroups, &[0, 0])),
    ("take capabilities", |_| {
        // A version that there is not, so that none is lost either.
        let mut head = [0_u32; 2];
        call(libc::SYS_capset, &[head.as_mut_ptr() as usize, 0])
    }),
    ("raise a limit", |_| {
        let limit = [u64::MAX; 2];
        let limit = limit.as_ptr() as usize;
        call(libc::SYS_prlimit64, &[0, libc::RLIMIT_CORE as usize, limit, 0])
    }),
    ("be looked into again", |_| call(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as usize, 1, 0, 0, 0])),
    ("catch the reports of refused calls", |_| {
        let action = [0_usize; 8];
        call(libc::SYS_rt_sigaction, &[libc::SIGSYS as usize, action.as_ptr() as usize, 0, 8])
    }),
    ("realtime priority", |_| {
        let priority = [0_i32];
        call(libc::SYS_sched_setscheduler, &[0, libc::SCHED_FIFO as usize, priority.as_ptr() as usize])
    }),
    ("a better priority", |_| {
        let set = call(libc::SYS_setpriority, &[0, 0, -20_isize as usize]);
        call(libc::SYS_setpriority, &[0, 0, 0]);
        set
    }),
    ("another personality", |_| call(libc::SYS_personality, &[0xffff_ffff])),
    ("a namespace", |_| call(libc::SYS_unshare, &[libc::CLONE_NEWUTS as usize])),
    ("another's namespace", |_| call(libc::SYS_setns, &[usize::MAX, 0])),
    ("another root folder", |_| path1(libc::SYS_chroot, "/")),
    ("push characters into the terminal", |_| {
        let character = [b'x'];
        call(libc::SYS_ioctl, &[2, libc::TIOCSTI as usize, character.as_ptr() as usize])
    }),

    // The kernel.
    ("mount", |_| {
        let (place, kind) = (c("/"), c("no-such-kind"));
        call(libc::SYS_mount, &[0, at(&place), at(&kind), 0, 0])
    }),
    ("unmount", |_| path1(libc::SYS_umount2, "/nonexistent")),
    ("pivot the root", |_| {
        let place = c("/nonexistent");
        call(libc::SYS_pivot_root, &[at(&place), at(&place)])
    }),
    ("load a module", |_| {
        let options = c("");
        call(libc::SYS_init_module, &[0, 0, at(&options)])
    }),
    ("unload a module", |_| path1(libc::SYS_delete_module, "no_such_module")),
    // A wrong magic number, which is looked at once the right is there.
    ("reboot", |_| call(libc::SYS_reboot, &[0, 0, 0, 0])),
    ("swap", |_| path1(libc::SYS_swapon, "/nonexistent")),
    ("name the machine", |_| call(libc::SYS_sethostname, &[0, usize::MAX])),
    ("set the clock", |_| {
        let time = [0_i64, -1];
        call(libc::SYS_clock_settime, &[0, time.as_ptr() as usize])
    }),
    ("read the kernel's log", |_| call(libc::SYS_syslog, &[10, 0, 0])),
    ("account processes", |_| path1(libc::SYS_acct, "/nonexistent")),
    ("load a BPF program", |_| call(libc::SYS_bpf, &[5, 0, 0])),
    ("count events of the machine", |_| call(libc::SYS_perf_event_open, &[0, 0, 0, 0, 0])),
    ("handle page faults", |_| call(libc::SYS_userfaultfd, &[0])),
    ("a ring of system calls", |_| call(libc::SYS_io_uring_setup, &[1, 0])),
    ("a key", |_| call(libc::SYS_keyctl, &[0, -3_isize as usize, 1, 0, 0])),
    ("shared memory of System V", |_| call(libc::SYS_shmget, &[0, 4096, 0o600])),
    ("a message queue", |_| path1(libc::SYS_mq_open, "queue")),
    #[cfg(target_arch = "x86_64")]
    ("I/O ports", |_| call(libc::SYS_ioperm, &[0x80, 1, 0])),
    #[cfg(target_arch = "x86_64")]
    ("all I/O ports", |_| call(libc::SYS_iopl, &[3])),

    // More than its share.
    ("2 GiB of memory", |_| map(2 << 30, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)),
    ("shared memory without a file", |_| map(4096, libc::MAP_SHARED | libc::MAP_ANONYMOUS)),
    ("a memory file of 2 GiB", |_| long_memory_file()),
    ("10,000 descriptors", |_| many_descriptors()),
    ("1,200 threads", |_| many_threads()),
];

/// A system call that no policy allows.
pub fn misbehave() {
    call(libc::SYS_reboot, &[0, 0, 0, 0]);
}

impl Target {
    fn victim(&self) -> String {
        format!("{}/victim", self.folder)
    }

    fn fresh(&self) -> String {
        format!("{}/new", self.folder)
    }
}

const FDCWD: usize = AT_FDCWD as isize as usize;

fn c(text: &str) -> CString {
    CString::new(text).expect("no zero byte")
}

fn at(text: &CString) -> usize {
    text.as_ptr() as usize
}

/// Makes a system call; refused is one for which there is no permission.
fn call(number: c_long, arguments: &[usize]) -> Outcome {
    outcome(raw(number, arguments))
}

fn raw(number: c_long, arguments: &[usize]) -> io::Result<c_long> {
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: pointers among the arguments lead to what the caller holds, or nowhere, which the
    // kernel finds out; no attempt changes memory that somebody else uses.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

fn outcome(done: io::Result<c_long>) -> Outcome {
    match done {
        Err(err) if err.raw_os_error() == Some(EPERM) => Outcome::Refused("EPERM"),
        Err(err) if err.raw_os_error() == Some(EACCES) => Outcome::Refused("EACCES"),
        // Something else than the lack of a right.
        Err(err) => Outcome::Escaped(err.to_string()),
        Ok(result) => Outcome::Escaped(result.to_string()),
    }
}

/// Also these errors are refusals.
fn allowing(refusals: &[(i32, &'static str)], outcome: Outcome) -> Outcome {
    let Outcome::Escaped(how) = outcome else { return outcome };
    let errors = refusals.iter().map(|(errno, name)| (io::Error::from_raw_os_error(*errno), name));
    match errors.into_iter().find(|(err, _)| err.to_string() == how) {
        Some((_, name)) => Outcome::Refused(name),
        None => Outcome::Escaped(how),
    }
}

fn open(name: &str, flags: i32) -> Outcome {
    let name = c(name);
    let opened = raw(libc::SYS_openat, &[FDCWD, at(&name), flags as usize, 0o600]);
    if let Ok(fd) = opened {
        close(fd);
    }
    outcome(opened)
}

fn close(fd: c_long) {
    let _ = raw(libc::SYS_close, &[fd as usize]);
}

fn path(number: c_long, name: &str, last: usize) -> Outcome {
    let name = c(name);
    call(number, &[FDCWD, at(&name), last])
}

fn path1(number: c_long, name: &str) -> Outcome {
    let name = c(name);
    call(number, &[at(&name), 0])
}

fn two(number: c_long, from: &str, to: &str) -> Outcome {
    let (from, to) = (c(from), c(to));
    call(number, &[FDCWD, at(&from), FDCWD, at(&to), 0])
}

fn socket(family: i32, kind: i32) -> Outcome {
    let made = raw(libc::SYS_socket, &[family as usize, kind as usize, 0]);
    if let Ok(fd) = made {
        close(fd);
    }
    outcome(made)
}

fn connect(to: &str) -> Outcome {
    let made = raw(libc::SYS_socket, &[AF_UNIX as usize, SOCK_STREAM as usize, 0]);
    let Ok(fd) = made else { return outcome(made) };
    let mut address = vec![AF_UNIX as u8, 0];
    address.extend_from_slice(to.as_bytes());
    address.push(0);
    let connected =
        raw(libc::SYS_connect, &[fd as usize, address.as_ptr() as usize, address.len()]);
    close(fd);
    outcome(connected)
}

fn read_memory(of: u32) -> Outcome {
    let parts = [0_usize; 2];
    let parts = parts.as_ptr() as usize;
    call(libc::SYS_process_vm_readv, &[of as usize, parts, 1, parts, 1, 0])
}

fn fork() -> Outcome {
    #[cfg(target_arch = "x86_64")]
    return finish_child(call(libc::SYS_fork, &[]));
    #[cfg(not(target_arch = "x86_64"))]
    finish_child(call(libc::SYS_clone, &[libc::SIGCHLD as usize, 0, 0, 0, 0]))
}

/// A child does nothing, and is waited for.
fn finish_child(forked: Outcome) -> Outcome {
    match &forked {
        Outcome::Escaped(child) if child == "0" => {
            // SAFETY: ends the child without anything else of its program.
            unsafe { libc::_exit(0) }
        }
        Outcome::Escaped(child) => {
            if let Ok(child) = child.parse::<usize>() {
                let _ = raw(libc::SYS_wait4, &[child, 0, 0, 0]);
            }
        }
        Outcome::Refused(_) => {}
    }
    forked
}

fn memory_file() -> c_long {
    let name = c("attempt");
    raw(libc::SYS_memfd_create, &[at(&name), 0]).expect("memory files are allowed")
}

fn run_from_memory() -> Outcome {
    let fd = memory_file();
    let empty = c("");
    let run =
        raw(libc::SYS_execveat, &[fd as usize, at(&empty), 0, 0, libc::AT_EMPTY_PATH as usize]);
    close(fd);
    outcome(run)
}

fn map(len: usize, flags: i32) -> Outcome {
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let mapped = raw(libc::SYS_mmap, &[0, len, protection, flags as usize, usize::MAX, 0]);
    if let Ok(start) = mapped {
        let _ = raw(libc::SYS_munmap, &[start as usize, len]);
    }
    allowing(&[(ENOMEM, "ENOMEM")], outcome(mapped))
}

fn long_memory_file() -> Outcome {
    let fd = memory_file();
    let sized = raw(libc::SYS_ftruncate, &[fd as usize, 2 << 30]);
    close(fd);
    allowing(&[(EFBIG, "EFBIG")], outcome(sized))
}

fn many_descriptors() -> Outcome {
    let mut all = Vec::new();
    let refused = loop {
        match raw(libc::SYS_dup, &[0]) {
            Ok(fd) if all.len() < 10_000 => all.push(fd),
            done => break done,
        }
    };
    all.into_iter().for_each(close);
    allowing(&[(EMFILE, "EMFILE")], outcome(refused))
}

fn many_threads() -> Outcome {
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Arc::new(std::sync::Mutex::new(held));
    let mut all = Vec::new();
    let refused = loop {
        let held = held.clone();
        // Waits until nobody holds them any more.
        let thread = std::thread::Builder::new().spawn(move || {
            let _ = held.lock().map(|held| held.recv());
        });
        match thread {
            Ok(thread) if all.len() < 1200 => all.push(thread),
            Ok(thread) => {
                all.push(thread);
                break Ok(1200);
            }
            Err(err) => break Err(err),
        }
    };
    drop(hold);
    for thread in all {
        let _ = thread.join();
    }
    allowing(&[(EAGAIN, "EAGAIN"), (ENOMEM, "EAGAIN")], outcome(refused))
}
