//! How much of everything (getrlimit(2)).

#![expect(unsafe_code)]
// UNSAFETY: how a signal is taken.

use caps::{CapSet, Capability};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::{Sandbox, SandboxError, step_of};

/// The bytes of private memory, and of each memory file, that a process has without being told.
pub const MEMORY: u64 = 1 << 30;

/// Threads of a user that is one process's alone, beside one for each processor.
const THREADS: u64 = 256;

pub(crate) fn set(sandbox: &Sandbox<'_>) -> Result<(), SandboxError> {
    // Whoever has this capability locks as much as there is; without it the same has to come from
    // the limit, which counts mappings for DMA.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_IPC_LOCK)? {
        // Refused without CAP_SYS_RESOURCE; then the limit is the one that was configured.
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    }
    limit(Resource::RLIMIT_CORE, 0)?;
    limit(Resource::RLIMIT_NOFILE, sandbox.descriptors)?;
    // Private writable memory: heaps, stacks, and so threads. Address space as a whole says little
    // of a process that maps BARs. Memory files are not in it.
    limit(Resource::RLIMIT_DATA, sandbox.memory)?;
    limit(Resource::RLIMIT_FSIZE, sandbox.memory)?;
    limit(Resource::RLIMIT_MSGQUEUE, 0)?;
    limit(Resource::RLIMIT_RTPRIO, 0)?;
    if sandbox.is_alone {
        // Counts everything of the user.
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
        limit(Resource::RLIMIT_NPROC, THREADS + processors)?;
    }
    // A file that would become too long is an error to whoever makes it, not the process's end.
    // SAFETY: ignoring a signal runs no code.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.map_err(step_of("ignoring SIGXFSZ"))?;
    Ok(())
}

/// Lowers both limits; what is lower already stays.
fn limit(resource: Resource, most: u64) -> Result<(), SandboxError> {
    let (soft, hard) = getrlimit(resource).map_err(step_of("reading a limit"))?;
    let set = setrlimit(resource, soft.min(most), hard.min(most));
    set.map_err(step_of("lowering a limit"))
}
