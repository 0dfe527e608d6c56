//! Landlock: files, TCP, abstract sockets, signals.
//!
//! Only opening a file is restricted, not what is open already; and a memory file belongs to no
//! file system, so it can be opened anew by its descriptor (`/proc/self/fd/N`). Walking to that
//! name is free.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, Scope,
};

use crate::{Enforced, SandboxError};

/// Where the dynamic loader finds the libraries that a plugin needs (ld.so(8)).
const LIBRARIES: [&str; 6] =
    ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"];

/// The newest version whose rights are known here; the kernel takes those that it knows.
const KNOWN: ABI = ABI::V6;

pub(crate) fn restrict(
    readable: &[BorrowedFd<'_>],
    enforced: &mut Enforced,
) -> Result<(), SandboxError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    // Which machine has which of them differs.
    for folder in LIBRARIES.iter().filter_map(|path| PathFd::new(path).ok()) {
        rules = rules.add_rule(PathBeneath::new(folder, reading()))?;
    }
    for file in readable {
        rules = rules.add_rule(PathBeneath::new(*file, AccessFs::ReadFile))?;
    }
    let status = rules.restrict_self()?;
    match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => {
            enforced.parts.push(format!("landlock {}", effective_abi as i32));
        }
        LandlockStatus::NotEnabled => {
            enforced.missing.push("landlock (not in the kernel's lsm= list)".to_owned());
        }
        LandlockStatus::NotImplemented => {
            enforced.missing.push("landlock (not in this kernel)".to_owned());
        }
    }
    Ok(())
}

fn reading() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::ReadDir
}
