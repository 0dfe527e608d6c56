//! User, groups and capabilities.

use std::fmt;

use caps::{CapSet, Capability};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::{Enforced, SandboxError, step_of};

/// A user and a group, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub uid: u32,
    /// The only group.
    pub gid: u32,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {}, gid {}", self.uid, self.gid)
    }
}

/// Becomes `identity`, where the process may, and drops every capability.
pub(crate) fn change(
    identity: Option<Identity>,
    enforced: &mut Enforced,
) -> Result<(), SandboxError> {
    // Needs CAP_SETPCAP; without it there is nothing in it that the process could get at, since
    // it gives up new rights by `execve`.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    match identity {
        Some(identity) if may_change()? => {
            become_user(identity)?;
            enforced.parts.push(identity.to_string());
        }
        Some(_) => enforced.missing.push(format!("own user (stays uid {})", Uid::effective())),
        None => enforced.missing.push(format!("own user (uid {} is kept)", Uid::effective())),
    }
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Inheritable, CapSet::Permitted] {
        caps::clear(None, set)?;
    }
    enforced.parts.push("no capabilities".to_owned());
    Ok(())
}

fn may_change() -> Result<bool, SandboxError> {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability);
    Ok(has(Capability::CAP_SETUID)? && has(Capability::CAP_SETGID)?)
}

fn become_user(Identity { uid, gid }: Identity) -> Result<(), SandboxError> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setgroups(&[]).map_err(step_of("leaving all groups"))?;
    setresgid(gid, gid, gid).map_err(step_of("changing the group"))?;
    setresuid(uid, uid, uid).map_err(step_of("changing the user"))
}
