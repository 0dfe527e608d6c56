//! What the device is bound to, and who has or uses it: the machine, a process, iohost itself.

use iohost_pci::VFIO_PCI;

use super::{at, is_unsafe, runs, sysfs};
use crate::facts::{Function, Opener, Subject, Use};
use crate::{Code, Finding};

/// The highest use first: what rests on others is ended before them.
pub(super) fn commands_to_end(uses: &[Use]) -> impl Iterator<Item = String> {
    uses.iter().rev().filter_map(|found| found.command.clone())
}

pub(super) fn uses(function: &Function) -> Vec<Finding> {
    let kinds = [(Code::DiskInUse, true), (Code::InterfaceInUse, false)];
    let of_kind = |(code, is_disk): (Code, bool)| {
        let uses: Vec<Use> =
            function.uses.iter().filter(|found| found.is_disk == is_disk).cloned().collect();
        if uses.is_empty() {
            return None;
        }
        let what: Vec<_> = uses.iter().map(|found| found.what.as_str()).collect();
        // One that nobody knows how to end leaves the rest without a point.
        let all_end = uses.iter().all(|found| found.command.is_some());
        let commands: Vec<String> = commands_to_end(&uses).collect();
        Some(at(
            function,
            code,
            format!("the machine uses {}: {}", function.address, what.join(", ")),
            "end these uses, if the machine can do without; iohost bind --force does not ask",
            all_end.then(|| commands.join(" && ")),
        ))
    };
    kinds.into_iter().filter_map(of_kind).collect()
}

pub(super) fn owned(function: &Function) -> Option<Finding> {
    let (owner, pid) = runs(function)?;
    let driver = owner.driver.as_deref().unwrap_or("a driver");
    Some(at(
        function,
        Code::DeviceOwned,
        format!(
            "iohost has {}: service {} runs {driver} on it in process {pid}",
            function.address, owner.service
        ),
        "give it back, if somebody else is to have it",
        Some(format!("iohost unbind {}", function.address)),
    ))
}

pub(super) fn busy(function: &Function) -> Vec<Finding> {
    let ours = runs(function).map(|(_, pid)| pid);
    let mut others: Vec<&Opener> =
        function.openers.iter().filter(|opener| Some(opener.pid) != ours).collect();
    others.sort_by_key(|opener| opener.pid);
    others.dedup_by_key(|opener| opener.pid);
    let busy = |opener: &Opener| {
        let Opener { pid, name, node } = opener;
        at(
            function,
            Code::DeviceBusy,
            format!(
                "{} is in use: process {pid} ({name}) has {} open",
                function.address,
                node.display()
            ),
            "stop that process",
            Some(format!("kill {pid}")),
        )
    };
    others.into_iter().map(busy).collect()
}

pub(super) fn unsafe_backend(function: &Function) -> Option<Finding> {
    let owner = function.owner.as_ref().filter(|owner| owner.is_unsafe)?;
    Some(at(
        function,
        Code::UnsafeBackend,
        format!(
            "the configuration reaches {} by {}, which is UNSAFE",
            function.address, owner.backend
        ),
        "leave `backend` and `allow_unsafe` out of its configuration",
        None,
    ))
}

pub(super) fn not_bound(subject: &Subject, function: &Function) -> Option<Finding> {
    let is_bound = function.driver.as_deref() == Some(VFIO_PCI);
    if is_bound || is_unsafe(function) || runs(function).is_some() {
        return None;
    }
    let address = function.address;
    let has = function.driver.as_deref().unwrap_or("no driver");
    if function.may_bind {
        return Some(at(
            function,
            Code::NotBound,
            format!("{address} is bound to {has}, not to {VFIO_PCI}"),
            "let the daemon take it",
            Some(format!("iohost bind {address}")),
        ));
    }
    let unbind = match function.driver {
        Some(_) => format!("echo {address} > {} && ", sysfs(function, "driver/unbind")),
        None => String::new(),
    };
    let command = format!(
        "echo {VFIO_PCI} > {} && {unbind}echo {address} > /sys/bus/pci/drivers_probe",
        sysfs(function, "driver_override")
    );
    Some(at(
        function,
        Code::NoPermission,
        format!(
            "user {} may not take {address} from {has} and bind it to {VFIO_PCI}",
            subject.user
        ),
        "bind it as root, or run the daemon as root",
        Some(command),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::tests::{found, only, opener, owner, used};

    #[test]
    fn a_use_that_nobody_can_end_leaves_no_command() {
        let finding = only(|_, edu| {
            edu.uses =
                vec![used(true, "a", Some("umount /mnt")), used(true, "/dev/sda is held", None)];
        });
        assert_eq!((finding.code, finding.command), (Code::DiskInUse, None));
    }

    #[test]
    fn a_driver_host_of_ours_does_not_make_its_own_device_busy() {
        let finding = only(|_, edu| {
            edu.owner = owner(Some(7), "vfio", false);
            edu.openers = vec![opener(7), opener(7)];
        });
        assert_eq!(finding.code, Code::DeviceOwned);
        assert_eq!(finding.command.as_deref(), Some("iohost unbind 0000:01:00.0"));

        let found = found(|_, edu| {
            edu.owner = owner(Some(7), "vfio", false);
            edu.openers = vec![opener(8), opener(7)];
        });
        let codes: Vec<Code> = found.iter().map(|finding| finding.code).collect();
        assert_eq!(codes, [Code::DeviceBusy, Code::DeviceOwned]);
        assert_eq!(found[0].command.as_deref(), Some("kill 8"));
    }

    #[test]
    fn who_may_not_bind_is_told_the_commands_for_root() {
        let finding = only(|_, edu| edu.driver = Some("nvme".to_owned()));
        let folder = "/sys/bus/pci/devices/0000:01:00.0";
        assert_eq!(
            finding.command.unwrap(),
            format!(
                "echo vfio-pci > {folder}/driver_override && \
                 echo 0000:01:00.0 > {folder}/driver/unbind && \
                 echo 0000:01:00.0 > /sys/bus/pci/drivers_probe"
            )
        );
    }
}
