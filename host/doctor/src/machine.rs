//! What is true of the machine, whatever the device.

use iohost_pci::{UIO_PCI_GENERIC, VFIO_PCI};
use iohost_vfio::Nodes;

use crate::boot::Boot;
use crate::facts::{Iommu, Machine, Module, Root};

/// The name under which VFIO has its numbers for nodes of devices, where it has some.
///
/// Source: Linux, `drivers/vfio/device_cdev.c`, `vfio_cdev_init`.
const DEVICE_NODES: &str = "vfio-dev";

pub(crate) fn gather(root: &Root) -> Machine {
    let vfio_pci = module(root, VFIO_PCI);
    let numbers = root.text("/proc/devices").unwrap_or_default();
    let makes_nodes =
        numbers.lines().any(|line| line.split_whitespace().nth(1) == Some(DEVICE_NODES));
    let interrupts = root.text("/proc/interrupts").unwrap_or_default();
    Machine {
        iommu: iommu(root),
        remaps_interrupts: remaps_interrupts(&interrupts),
        iommufd_allows_unsafe_interrupts: root.switch("iommufd", "allow_unsafe_interrupts"),
        type1_allows_unsafe_interrupts: root.switch("vfio_iommu_type1", "allow_unsafe_interrupts"),
        vfio_pci,
        uio_pci_generic: module(root, UIO_PCI_GENERIC),
        device_nodes: (vfio_pci == Module::Loaded).then_some(makes_nodes),
        iommufd: root.at(Nodes::IOMMUFD).exists(),
        no_iommu_mode: root.switch("vfio", "enable_unsafe_noiommu_mode"),
        landlock: root
            .text("/sys/kernel/security/lsm")
            .map(|modules| modules.trim().split(',').any(|module| module == "landlock")),
        boot: Boot::gather(root),
    }
}

fn iommu(root: &Root) -> Iommu {
    let groups = root.names("/sys/kernel/iommu_groups");
    // VFIO's no-IOMMU mode makes groups of its own, which keep nothing apart.
    let is_one = |group: &&String| {
        let name = root.text(format!("/sys/kernel/iommu_groups/{group}/name"));
        name.as_deref() != Some("vfio-noiommu")
    };
    let mut tables = root.names("/sys/firmware/acpi/tables");
    tables.retain(|table| ["DMAR", "IVRS", "IORT"].contains(&table.as_str()));
    Iommu {
        groups: groups.iter().filter(is_one).count(),
        units: root.names("/sys/class/iommu"),
        tables,
    }
}

fn module(root: &Root, driver: &str) -> Module {
    if root.at(format!("/sys/bus/pci/drivers/{driver}")).exists() {
        return Module::Loaded;
    }
    let release = root.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let Some(list) = root.text(format!("/lib/modules/{release}/modules.dep")) else {
        return Module::NotLoaded;
    };
    // `kernel/drivers/vfio/pci/vfio-pci.ko.xz: ...`; file names have either dash.
    let is_it = |line: &str| {
        let file = line.split(':').next().unwrap_or_default();
        let name = file.rsplit('/').next().unwrap_or_default();
        name.split('.').next().unwrap_or_default().replace('_', "-") == driver.replace('_', "-")
    };
    if list.lines().any(is_it) { Module::NotLoaded } else { Module::Absent }
}

/// By the names that x86 gives its interrupt controllers: `IR-IO-APIC`, `IR-PCI-MSI` where they
/// remap. The kernel shows it nowhere else to a program.
fn remaps_interrupts(interrupts: &str) -> Option<bool> {
    let mut words = interrupts.split_whitespace();
    let is_plain = |word: &str| word.starts_with("IO-APIC") || word.starts_with("PCI-MSI");
    if words.clone().any(|word| word.starts_with("IR-")) {
        Some(true)
    } else {
        words.any(is_plain).then_some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;

    #[test]
    fn remapping_shows_in_the_names_of_interrupt_controllers() {
        let line = |chip| format!("  4:  12  0  {chip}   4-edge  ttyS0\nNMI: 0 0 Non-maskable\n");
        assert_eq!(remaps_interrupts(&line("IR-IO-APIC")), Some(true));
        assert_eq!(remaps_interrupts(&line("IR-PCI-MSIX-0000:01:00.0")), Some(true));
        assert_eq!(remaps_interrupts(&line("IO-APIC")), Some(false));
        assert_eq!(remaps_interrupts(&line("PCI-MSI")), Some(false));
        assert_eq!(remaps_interrupts(&line("GICv3")), None);
    }

    #[test]
    fn a_module_is_loaded_or_can_be_or_was_never_built() {
        let tree = Tree::new();
        tree.write("proc/sys/kernel/osrelease", "6.1.0\n");
        assert_eq!(module(&tree.place(), "vfio-pci"), Module::NotLoaded);
        tree.write("lib/modules/6.1.0/modules.dep", "kernel/uio/uio_pci_generic.ko.xz: a.ko\n");
        assert_eq!(module(&tree.place(), "vfio-pci"), Module::Absent);
        assert_eq!(module(&tree.place(), "uio_pci_generic"), Module::NotLoaded);
        tree.folder("sys/bus/pci/drivers/vfio-pci");
        assert_eq!(module(&tree.place(), "vfio-pci"), Module::Loaded);
    }

    #[test]
    fn nodes_of_devices_show_in_the_list_of_numbers_and_are_unknown_without_vfio() {
        let tree = Tree::new();
        tree.write("proc/devices", "Character devices:\n 10 misc\n236 vfio\n\nBlock devices:\n");
        assert_eq!(gather(&tree.place()).device_nodes, None);
        tree.folder("sys/bus/pci/drivers/vfio-pci");
        assert_eq!(gather(&tree.place()).device_nodes, Some(false));
        tree.write("proc/devices", "Character devices:\n511 vfio-dev\n");
        assert_eq!(gather(&tree.place()).device_nodes, Some(true));
    }

    #[test]
    fn groups_that_vfio_made_for_want_of_an_iommu_are_no_iommu() {
        let tree = Tree::new();
        tree.write("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n");
        assert_eq!(gather(&tree.place()).iommu.groups, 0);
        tree.folder("sys/kernel/iommu_groups/1");
        assert_eq!(gather(&tree.place()).iommu.groups, 1);
    }
}
