//! What this process gives up before it loads its plugin: the whole of it is `iohost_sandbox`'s;
//! here is what the daemon wants of it, and what the daemon hears of it.

use std::os::fd::AsFd;

use iohost_control::host::{Confinement, Failure};
use iohost_event::Packets;
use iohost_sandbox::{Identity, OnRefusal, Report, Sandbox, SandboxError};
use log::info;

use crate::device::with_sources;
use crate::plugin_file::PluginFile;

/// `FromHost::CallRefused` around its number, for a signal handler that cannot make JSON.
const REFUSED_BEFORE: &str = r#"{"call_refused":{"number":"#;
const REFUSED_AFTER: &str = "}}";

/// Gives up what `wanted` says, with the plugin's file still readable. Returns what is in force,
/// in words.
///
/// The process has one thread so far: what binds a thread then binds all that come.
pub(crate) fn confine(
    wanted: &Confinement,
    plugin: &PluginFile,
    daemon: &Packets,
) -> Result<String, Failure> {
    let to = daemon.as_fd().try_clone_to_owned().map_err(|source| {
        not_entered(&SandboxError::Step { step: "keeping the daemon's socket", source })
    })?;
    let sandbox = Sandbox {
        identity: wanted.identity.map(|(uid, gid)| Identity { uid, gid }),
        is_alone: wanted.is_alone,
        readable: &[plugin.as_fd()],
        memory: wanted.memory,
        descriptors: wanted.descriptors,
        on_refusal: if wanted.kills { OnRefusal::Kill } else { OnRefusal::Fail },
    };
    let report = Report { to, before: REFUSED_BEFORE, after: REFUSED_AFTER };
    let enforced = sandbox.enter(report).map_err(|err| not_entered(&err))?;
    info!(sandbox:% = enforced; "confined");
    if wanted.required && !enforced.missing.is_empty() {
        return Err(Failure::new(
            "sandbox-incomplete",
            format!("the sandbox is required, and lacks: {}", enforced.missing.join(", ")),
            "give the daemon root's rights and the kernel what is missing, or set \
             `sandbox = \"on\"` for the device to do without",
        ));
    }
    Ok(enforced.to_string())
}

fn not_entered(err: &SandboxError) -> Failure {
    Failure::new(
        "sandbox-failed",
        format!("the driver host could not confine itself: {}", with_sources(err)),
        "look for what forbids it: another sandbox around the daemon, or its limits; \
         `sandbox = \"off\"` for the device runs its driver without",
    )
}

#[cfg(test)]
mod tests {
    use iohost_control::host::FromHost;

    use super::*;

    #[test]
    fn a_report_of_a_refused_call_is_a_message_to_the_daemon() {
        let text = format!("{REFUSED_BEFORE}101{REFUSED_AFTER}");
        let message: FromHost = serde_json::from_str(&text).unwrap();
        assert_eq!(message, FromHost::CallRefused { number: 101 });
    }
}
