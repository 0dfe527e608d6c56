//! The IOMMU and its groups: whether one is at work, remaps interrupts, covers the device and keeps
//! it apart; and VFIO's mode without one.

use super::binding::commands_to_end;
use super::{at, finding, is_unsafe};
use crate::boot::Boot;
use crate::facts::{Function, Iommu, Machine};
use crate::{Code, Finding};

pub(super) fn no_iommu(machine: &Machine) -> Option<Finding> {
    let Machine { iommu: Iommu { groups, tables, .. }, boot, .. } = machine;
    if *groups > 0 {
        return None;
    }
    let off = boot.words_that(turns_iommu_off);
    let (why, next, command) = if !off.is_empty() {
        (
            format!("the kernel command line says {}", off.join(" ")),
            format!("take {} from the kernel command line and reboot", off.join(" ")),
            boot.without(&off),
        )
    } else if tables.is_empty() {
        (
            "the firmware describes none (no DMAR, IVRS or IORT table)".to_owned(),
            "turn VT-d, AMD-Vi or the like on in the firmware's setup".to_owned(),
            Some(Boot::firmware_setup()),
        )
    } else if tables.iter().any(|table| table == "DMAR")
        && boot.words_that(|word| word.starts_with("intel_iommu=")).is_empty()
    {
        (
            "this kernel waits to be told".to_owned(),
            "add intel_iommu=on to the kernel command line and reboot".to_owned(),
            boot.with("intel_iommu=on"),
        )
    } else {
        (
            format!("the firmware describes one ({}), and the kernel did not start it", {
                tables.join(", ")
            }),
            "read the kernel log for why: dmesg | grep -i -e DMAR -e AMD-Vi -e iommu".to_owned(),
            None,
        )
    };
    Some(finding(Code::NoIommu, format!("no IOMMU is at work: {why}"), next, command))
}

/// Source: Linux, `Documentation/admin-guide/kernel-parameters.txt`.
fn turns_iommu_off(word: &str) -> bool {
    let Some((name, value)) = word.split_once('=') else { return false };
    // The last one counts.
    let mut choices = value.split(',').filter(|choice| ["on", "off"].contains(choice));
    ["intel_iommu", "amd_iommu", "iommu"].contains(&name) && choices.next_back() == Some("off")
}

fn turns_remapping_off(word: &str) -> bool {
    word == "nointremap" || word == "intremap=off"
}

pub(super) fn interrupts(machine: &Machine) -> Option<Finding> {
    if machine.iommu.groups == 0 || machine.remaps_interrupts != Some(false) {
        return None;
    }
    let by_nodes = machine.device_nodes == Some(true) && machine.iommufd;
    let (module, allows) = match by_nodes {
        true => ("iommufd", machine.iommufd_allows_unsafe_interrupts),
        false => ("vfio_iommu_type1", machine.type1_allows_unsafe_interrupts),
    };
    let parameter = format!("/sys/module/{module}/parameters/allow_unsafe_interrupts");
    if allows == Some(true) {
        return Some(finding(
            Code::UnsafeInterrupts,
            format!("interrupts are not remapped, and {module} was told to accept that"),
            "turn interrupt remapping on, and then take that back",
            Some(format!("echo 0 > {parameter}")),
        ));
    }
    let off = machine.boot.words_that(turns_remapping_off);
    let risk = format!("or accept the risk: echo 1 > {parameter}");
    Some(if off.is_empty() {
        finding(
            Code::NoInterruptRemapping,
            "the IOMMU does not remap interrupts".to_owned(),
            format!("turn interrupt remapping on in the firmware's setup; {risk}"),
            Some(Boot::firmware_setup()),
        )
    } else {
        let off = off.join(" ");
        finding(
            Code::NoInterruptRemapping,
            format!("interrupts are not remapped: the kernel command line says {off}"),
            format!("take {off} from the kernel command line and reboot; {risk}"),
            machine.boot.without(&machine.boot.words_that(turns_remapping_off)),
        )
    })
}

pub(super) fn no_iommu_mode(machine: &Machine) -> Option<Finding> {
    let on = machine.no_iommu_mode == Some(true);
    on.then(|| {
        finding(
            Code::NoIommuModeOn,
            "VFIO's no-IOMMU mode is on, which is UNSAFE: it hands out devices that nothing keeps \
             from the machine's memory"
                .to_owned(),
            "turn it off where no device of this machine needs it",
            Some("echo 0 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode".to_owned()),
        )
    })
}

pub(super) fn not_covered(machine: &Machine, function: &Function) -> Option<Finding> {
    if machine.iommu.groups == 0 || function.group.is_some() || is_unsafe(function) {
        return None;
    }
    Some(at(
        function,
        Code::NoIommu,
        format!("the IOMMU does not cover {}: it is in no group", function.address),
        "put the device into another slot, or read why: dmesg | grep -i -e DMAR -e AMD-Vi",
        None,
    ))
}

pub(super) fn not_viable(function: &Function) -> Option<Finding> {
    let group = function.group.as_ref().filter(|_| !is_unsafe(function))?;
    let others = || group.members.iter().filter(|member| member.address != function.address);
    let blockers: Vec<_> = others().filter(|member| member.blocks).collect();
    if blockers.is_empty() {
        return None;
    }
    let named: Vec<String> = blockers
        .iter()
        .map(|member| {
            let driver = member.driver.as_deref().unwrap_or("no driver");
            let uses: Vec<_> = member.uses.iter().map(|found| found.what.as_str()).collect();
            let uses =
                if uses.is_empty() { String::new() } else { format!(" ({})", uses.join(", ")) };
            format!("{} is bound to {driver}{uses}", member.address)
        })
        .collect();
    // What the machine uses is let go first; each in the order in which it can be.
    let ends = blockers.iter().flat_map(|member| commands_to_end(&member.uses));
    let unbind = |address| format!("echo {address} > /sys/bus/pci/devices/{address}/driver/unbind");
    let unbinds = blockers.iter().map(|member| unbind(member.address));
    let commands: Vec<String> = ends.chain(unbinds).collect();
    Some(at(
        function,
        Code::GroupNotViable,
        format!("IOMMU group {} cannot be used: {}", group.number, named.join(", ")),
        format!(
            "take these from their drivers, or take the whole group: iohost bind --group {}",
            function.address
        ),
        Some(commands.join(" && ")),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::tests::{found, only, owner, used};

    #[test]
    fn no_iommu_is_told_with_its_reason_and_what_helps_against_that_one() {
        let without = |words: &str, tables: &[&str]| {
            only(|facts, edu| {
                edu.group = None;
                let iommu = &mut facts.machine.iommu;
                iommu.groups = 0;
                iommu.tables = tables.iter().map(|table| (*table).to_owned()).collect();
                facts.machine.boot.words = words.split(' ').map(str::to_owned).collect();
            })
        };
        let off = without("quiet intel_iommu=on intel_iommu=off", &["DMAR"]);
        assert!(off.message.ends_with("the kernel command line says intel_iommu=off"), "{off:?}");
        let command = off.command.unwrap();
        assert!(
            command.contains("intel_iommu=off") && command.ends_with("shutdown -r now"),
            "{command}"
        );

        let no_table = without("intel_iommu=on", &[]);
        assert!(no_table.message.contains("the firmware describes none"), "{no_table:?}");
        assert_eq!(no_table.command.as_deref(), Some("systemctl reboot --firmware-setup"));

        let not_told = without("quiet", &["DMAR"]);
        assert!(not_told.next.starts_with("add intel_iommu=on"), "{not_told:?}");
        assert!(not_told.command.unwrap().contains("&intel_iommu=on "));

        let broken = without("intel_iommu=on", &["DMAR"]);
        assert!(broken.next.contains("dmesg"), "{broken:?}");
        let broken = without("quiet", &["IVRS"]);
        assert!(broken.message.contains("(IVRS)") && broken.command.is_none(), "{broken:?}");
    }

    #[test]
    fn words_that_turn_the_iommu_off_are_known_and_others_are_not() {
        for word in ["intel_iommu=off", "amd_iommu=off", "iommu=off", "intel_iommu=on,off"] {
            assert!(turns_iommu_off(word), "{word}");
        }
        for word in ["intel_iommu=on", "intel_iommu=off,on", "iommu=pt", "acpi=off", "intel_iommu"]
        {
            assert!(!turns_iommu_off(word), "{word}");
        }
    }

    #[test]
    fn remapping_off_by_the_command_line_differs_from_none_in_the_firmware() {
        let by_word = only(|facts, _| {
            facts.machine.remaps_interrupts = Some(false);
            facts.machine.boot.words.push("nointremap".to_owned());
        });
        assert!(by_word.command.unwrap().contains("nointremap"));
        let risk = "echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts";
        assert!(by_word.next.ends_with(risk), "{}", by_word.next);
        let by_firmware = only(|facts, _| facts.machine.remaps_interrupts = Some(false));
        assert!(by_firmware.command.unwrap().contains("--firmware-setup"));
    }

    #[test]
    fn a_kernel_without_device_nodes_is_asked_of_the_module_that_it_uses_instead() {
        let found = found(|facts, _| {
            facts.machine.device_nodes = Some(false);
            facts.machine.remaps_interrupts = Some(false);
            facts.machine.type1_allows_unsafe_interrupts = Some(true);
        });
        let codes: Vec<Code> = found.iter().map(|finding| finding.code).collect();
        assert_eq!(codes, [Code::UnsafeInterrupts, Code::NoCdev]);
        assert!(found[0].command.as_ref().unwrap().contains("vfio_iommu_type1"));
    }

    #[test]
    fn every_blocker_of_a_group_is_named_and_let_go_after_what_uses_it() {
        let finding = only(|_, edu| {
            let members = &mut edu.group.as_mut().unwrap().members;
            let sibling = &mut members[2];
            (sibling.driver, sibling.blocks) = (Some("nvme".to_owned()), true);
            sibling.uses = vec![
                used(true, "/dev/nvme0n1p1 is part of /dev/dm-0", Some("dmsetup remove data")),
                used(true, "/dev/dm-0 is mounted on /mnt", Some("umount /mnt")),
            ];
            let mut other = members[2].clone();
            (other.address, other.uses) = ("0000:01:00.2".parse().unwrap(), Vec::new());
            members.push(other);
        });
        assert!(
            finding.message.starts_with(
                "IOMMU group 3 cannot be used: 0000:01:00.1 is bound to nvme (/dev/nvme0n1p1"
            ),
            "{finding:?}"
        );
        assert!(finding.message.ends_with("0000:01:00.2 is bound to nvme"), "{finding:?}");
        assert_eq!(
            finding.command.unwrap(),
            "umount /mnt && dmsetup remove data && \
             echo 0000:01:00.1 > /sys/bus/pci/devices/0000:01:00.1/driver/unbind && \
             echo 0000:01:00.2 > /sys/bus/pci/devices/0000:01:00.2/driver/unbind"
        );
    }

    #[test]
    fn a_device_that_is_reached_without_an_iommu_does_not_miss_it() {
        let finding = only(|facts, edu| {
            facts.machine.iommu.groups = 0;
            (edu.group, edu.driver) = (None, Some("uio_pci_generic".to_owned()));
            edu.owner = owner(None, "uio", true);
        });
        assert_eq!(finding.code, Code::UnsafeBackend);
    }
}
