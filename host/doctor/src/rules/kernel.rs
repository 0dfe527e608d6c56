//! What the running kernel has: VFIO's modules, nodes for devices, Landlock.

use iohost_pci::VFIO_PCI;

use super::{at, finding};
use crate::boot::Boot;
use crate::facts::{Function, Machine, Module};
use crate::{Code, Finding, Severity};

pub(super) fn driver_not_loaded(machine: &Machine) -> Option<Finding> {
    match machine.vfio_pci {
        Module::Loaded => None,
        Module::NotLoaded => Some(finding(
            Code::DriverNotLoaded,
            format!("the kernel's driver {VFIO_PCI} is not loaded"),
            "load it; a line in /etc/modules-load.d does so at every start",
            Some(format!("modprobe {VFIO_PCI}")),
        )),
        Module::Absent => Some(finding(
            Code::DriverNotLoaded,
            format!("this kernel was built without {VFIO_PCI}"),
            "start a kernel with CONFIG_VFIO_PCI",
            None,
        )),
    }
}

pub(super) fn device_nodes(machine: &Machine) -> Option<Finding> {
    match machine.device_nodes {
        Some(true) if !machine.iommufd => Some(finding(
            Code::NoCdev,
            "the kernel makes nodes for devices, but /dev/iommu is not there".to_owned(),
            "load iommufd; until then devices are reached by their groups",
            Some("modprobe iommufd".to_owned()),
        )),
        Some(false) => {
            let other = machine.boot.kernels_with_device_nodes.last();
            Some(finding(
                Code::NoCdev,
                "this kernel makes no nodes for devices, which are reached by their groups instead"
                    .to_owned(),
                match other {
                    Some(release) => format!("kernel {release} on this machine makes them"),
                    None => "nothing has to be done; kernels with CONFIG_VFIO_DEVICE_CDEV and \
                             CONFIG_IOMMUFD make them"
                        .to_owned(),
                },
                other.map(|release| Boot::kernel(release)),
            ))
        }
        _ => None,
    }
}

/// The configuration forces a way that the kernel does not have: no longer a note.
pub(super) fn forced_cdev(machine: &Machine, function: &Function) -> Option<Finding> {
    let owner = function.owner.as_ref()?;
    let lacks = machine.device_nodes == Some(false) || !machine.iommufd;
    if owner.backend != "vfio-cdev" || !lacks {
        return None;
    }
    let message = format!(
        "the configuration of {} says backend = \"vfio-cdev\", which this kernel has not",
        function.address
    );
    let next = "take that line from the configuration and start the daemon again";
    Some(Finding { severity: Severity::Blocks, ..at(function, Code::NoCdev, message, next, None) })
}

pub(super) fn no_landlock(machine: &Machine) -> Option<Finding> {
    let off = machine.landlock == Some(false);
    off.then(|| {
        finding(
            Code::NoLandlock,
            "the kernel's Landlock is off, so a driver can read files that everybody may read"
                .to_owned(),
            "add `landlock` to the list lsm= on the kernel command line (the list that is in force \
             is in /sys/kernel/security/lsm), and reboot",
            None,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::tests::{found, only, owner};

    #[test]
    fn a_kernel_without_device_nodes_is_a_note_unless_the_configuration_wants_them() {
        let note = only(|facts, _| facts.machine.device_nodes = Some(false));
        assert_eq!((note.severity, note.command), (Severity::Notes, None));
        let other = only(|facts, _| {
            facts.machine.device_nodes = Some(false);
            facts.machine.boot.kernels_with_device_nodes = vec!["6.12-rig".to_owned()];
        });
        assert!(other.command.unwrap().contains("/boot/vmlinuz-6.12-rig"));
        let unloaded = only(|facts, _| facts.machine.iommufd = false);
        assert_eq!(unloaded.command.as_deref(), Some("modprobe iommufd"));

        let found = found(|facts, edu| {
            facts.machine.device_nodes = Some(false);
            edu.owner = owner(None, "vfio-cdev", false);
        });
        assert!(found.iter().any(|finding| finding.code == Code::NoCdev && finding.blocks()));
    }
}
