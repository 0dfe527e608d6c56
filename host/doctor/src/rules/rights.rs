//! What the user or the daemon may do: how much memory it may lock, which nodes it may open.

use std::path::Path;

use super::{at, finding};
use crate::facts::{Function, Node, Subject};
use crate::{Code, Finding};

pub(super) fn locked_memory(subject: &Subject, need: u64, has_unit: bool) -> Option<Finding> {
    let have = subject.memlock.filter(|have| *have < need && !subject.locks_all_memory)?;
    let who = match subject.is_daemon {
        true => format!("the daemon (process {})", subject.pid),
        false => format!("user {} here", subject.user),
    };
    let kib = need.div_ceil(1024);
    let line = format!("LimitMEMLOCK={need} in the [Service] section of its unit file");
    let (next, command) = match (has_unit, subject.is_daemon) {
        (true, _) => (
            format!("give the daemon {line}"),
            format!(
                "mkdir -p /etc/systemd/system/iohost.service.d && \
                 printf '[Service]\\nLimitMEMLOCK={need}\\n' \
                 > /etc/systemd/system/iohost.service.d/memlock.conf && \
                 systemctl daemon-reload && systemctl restart iohost"
            ),
        ),
        (false, true) => (
            format!(
                "raise the limit of the daemon, for drivers that start from now on; for good: {line}"
            ),
            format!("prlimit --pid {} --memlock={need}:{need}", subject.pid),
        ),
        (false, false) => {
            let root = match subject.memlock_hard {
                Some(hard) if hard < need => format!(" (as root: the hard limit is {hard})"),
                _ => String::new(),
            };
            (
                format!(
                    "raise the limit in the shell that starts the daemon{root}; for good: {line}"
                ),
                format!("ulimit -l {kib}"),
            )
        }
    };
    let message = format!("drivers need {need} bytes of locked memory, and {who} may lock {have}");
    Some(finding(Code::MemlockTooSmall, message, next, Some(command)))
}

pub(super) fn permission(subject: &Subject, function: &Function) -> Option<Finding> {
    let closed: Vec<&Node> = function.nodes.iter().filter(|node| !node.may_open).collect();
    if closed.is_empty() {
        return None;
    }
    let list = |separator: &str| {
        let paths = closed.iter().map(|node| node.path.as_path()).map(Path::display);
        paths.map(|path| path.to_string()).collect::<Vec<_>>().join(separator)
    };
    Some(at(
        function,
        Code::VfioPermission,
        format!("user {} may not open {}", subject.user, list(" and ")),
        "give it to that user; a udev rule does so each time the device is bound",
        Some(format!("chown {} {}", subject.user, list(" "))),
    ))
}

#[cfg(test)]
mod tests {
    use crate::facts::Facts;
    use crate::rules::tests::{found, only};

    #[test]
    fn locked_memory_is_told_with_need_and_have_and_the_line_of_the_unit_file() {
        let small = |facts: &mut Facts| facts.subject.memlock = Some(64 << 10);
        let here = only(|facts, _| small(facts));
        assert_eq!(
            here.message,
            "drivers need 8388608 bytes of locked memory, and user operator here may lock 65536"
        );
        assert!(here.next.contains("LimitMEMLOCK=8388608"), "{}", here.next);
        assert_eq!(here.command.as_deref(), Some("ulimit -l 8192"));

        let daemon = only(|facts, _| {
            small(facts);
            facts.subject.is_daemon = true;
        });
        assert_eq!(daemon.command.as_deref(), Some("prlimit --pid 41 --memlock=8388608:8388608"));
        let unit = only(|facts, _| {
            small(facts);
            facts.machine.boot.has_unit = true;
        });
        assert!(unit.command.unwrap().contains("[Service]\\nLimitMEMLOCK=8388608\\n"));
    }

    #[test]
    fn locked_memory_without_a_limit_is_no_finding() {
        assert_eq!(found(|facts, _| facts.subject.memlock = None), []);
        let all = found(|facts, _| {
            facts.subject.memlock = Some(0);
            facts.subject.locks_all_memory = true;
        });
        assert_eq!(all, []);
    }

    #[test]
    fn nodes_that_are_closed_are_given_with_one_command() {
        let finding = only(|_, edu| edu.nodes.iter_mut().for_each(|node| node.may_open = false));
        assert_eq!(
            finding.command.as_deref(),
            Some("chown operator /dev/vfio/devices/vfio0 /dev/iommu")
        );
    }
}
