//! What is true of one function.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use iohost_pci::{
    Configuration, GroupMember, IommuGroup, PciAddress, PciError, PciFunction, Sysfs, VFIO_PCI,
};
use iohost_vfio::Nodes;

use crate::facts::{Daemon, Function, Group, Machine, Member, Node, Opener, Root, Subject, Use};
use crate::process::Processes;

/// The base class of bridges, bits 23–16 of the class code.
pub(crate) const BRIDGES: u32 = 0x06;

/// What a function is looked at in.
pub(crate) struct Around<'a> {
    pub(crate) root: &'a Root,
    pub(crate) sysfs: &'a Sysfs,
    pub(crate) machine: &'a Machine,
    pub(crate) subject: &'a Subject,
    pub(crate) processes: &'a Processes,
    pub(crate) daemon: Option<&'a Daemon>,
}

impl Around<'_> {
    pub(crate) fn gather(&self, listed: PciFunction) -> Result<Function, PciError> {
        let address = listed.address;
        let directory = self.sysfs.directory(address);
        let nodes = Nodes::of(&directory);
        let group = match listed.iommu_group {
            Some(_) if !nodes.is_without_iommu => Some(self.sysfs.group_of(address)?),
            _ => None,
        };
        let owner = self.daemon.and_then(|daemon| {
            daemon.services.iter().find(|owned| owned.address == address).cloned()
        });
        let way = self.way(&nodes, owner.as_ref().map(|owned| owned.backend.as_str()));
        let openers = self.openers(address, &nodes, group.as_ref());
        let is_bound = listed.driver.as_deref() == Some(VFIO_PCI);
        Ok(Function {
            address,
            vendor: listed.vendor,
            device: listed.device,
            class: listed.class,
            driver: listed.driver,
            uses: self.uses(address),
            way,
            nodes: if is_bound { self.nodes(&nodes, way) } else { Vec::new() },
            openers,
            may_bind: self.may_write(&directory.join("driver_override"))
                && self.may_write(&self.root.at("/sys/bus/pci/drivers_probe")),
            // The kernel would wake a function in D3cold for us to read this.
            configuration: match self.sysfs.kernel_power_state(address).as_deref() {
                Some("D3cold") => Configuration { answers: true, ..Configuration::default() },
                _ => self.sysfs.configuration(address)?,
            },
            kernel_power_state: self.sysfs.kernel_power_state(address),
            reset_methods: self.sysfs.reset_methods(address)?,
            bars: self.sysfs.bars(address)?,
            group: group.map(|group| self.group(group)),
            owner,
        })
    }

    /// As the driver host would choose it: what the configuration forces, else the function's own
    /// node where there is one.
    fn way(&self, nodes: &Nodes, forced: Option<&str>) -> &'static str {
        match forced {
            Some("vfio-cdev") => "vfio-cdev",
            Some("vfio-group") => "vfio-group",
            Some("vfio-no-iommu") => "vfio-no-iommu",
            Some("uio") => "uio",
            // A function that is not bound yet has no node, and will have one.
            _ if nodes.device.is_none()
                && self.machine.device_nodes == Some(true)
                && self.machine.iommufd =>
            {
                "vfio-cdev"
            }
            _ if nodes.device.as_ref().is_some_and(|node| self.root.at(node).exists())
                && self.machine.iommufd =>
            {
                "vfio-cdev"
            }
            _ => "vfio-group",
        }
    }

    fn nodes(&self, nodes: &Nodes, way: &str) -> Vec<Node> {
        let wanted = match way {
            "vfio-cdev" => [nodes.device.clone(), Some(Nodes::IOMMUFD.into())],
            "vfio-group" => [nodes.group.clone(), Some(Nodes::CONTAINER.into())],
            _ => [None, None],
        };
        wanted.into_iter().flatten().filter_map(|path| self.node(path)).collect()
    }

    fn node(&self, path: PathBuf) -> Option<Node> {
        let file = fs::metadata(self.root.at(&path)).ok()?;
        Some(Node {
            path,
            uid: file.uid(),
            gid: file.gid(),
            mode: file.mode() & 0o777,
            may_open: self.subject.may_open(&file),
        })
    }

    /// Who has the function open, or its group, or another function of the group by its own node.
    fn openers(
        &self,
        address: PciAddress,
        nodes: &Nodes,
        group: Option<&IommuGroup>,
    ) -> Vec<Opener> {
        let others = group.map(|group| &group.members[..]).unwrap_or_default().iter();
        let others = others.filter(|member| member.address != address);
        let theirs =
            others.filter_map(|member| Nodes::of(&self.sysfs.directory(member.address)).device);
        let uio = fs::read_dir(self.sysfs.directory(address).join("uio")).into_iter().flatten();
        let uio = uio.flatten().map(|entry| Path::new("/dev").join(entry.file_name()));
        let ours = nodes.group.iter().chain(&nodes.device).cloned();
        let all: Vec<PathBuf> = ours.chain(theirs).chain(uio).collect();
        all.iter().flat_map(|node| self.processes.of(node)).collect()
    }

    fn may_write(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|file| self.subject.may_write(&file))
    }

    fn group(&self, group: IommuGroup) -> Group {
        let member = |member: GroupMember| Member {
            address: member.address,
            is_bridge: member.class >> 16 == BRIDGES,
            blocks: member.blocks(),
            uses: self.uses(member.address),
            driver: member.driver,
        };
        Group { number: group.number, members: group.members.into_iter().map(member).collect() }
    }

    /// What cannot be found out is no reason to say nothing of the rest.
    fn uses(&self, address: PciAddress) -> Vec<Use> {
        use iohost_pci::Use as Found;
        let uses = self.sysfs.uses_of(address).unwrap_or_default();
        let told = |found: &Found| Use {
            is_disk: !matches!(found, Found::Up { .. } | Found::Member { .. }),
            what: found.to_string(),
            command: found.command(),
        };
        uses.iter().map(told).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use iohost_pci::BarMapping;

    use crate::facts::{Daemon, Facts, Owned, Question};
    use crate::tree::{CARD, EDU, Tree};

    fn question(devices: &[&str]) -> Question {
        Question {
            devices: devices.iter().map(|device| device.parse().unwrap()).collect(),
            dma_bytes: 1,
            daemon: None,
        }
    }

    #[test]
    fn a_function_is_gathered_with_its_group_its_nodes_and_who_has_them_open() {
        let tree = Tree::healthy();
        tree.process(7, "qemu-system", 4242, 0, None);
        tree.opens(7, "/dev/vfio/3");
        let facts = Facts::gather(tree.root(), &question(&[EDU])).unwrap();

        let [edu] = &facts.functions[..] else { panic!("{facts:?}") };
        assert_eq!((edu.vendor, edu.device, edu.class), (0x1234, 0x11e8, 0x00ff00));
        assert_eq!(edu.driver.as_deref(), Some("vfio-pci"));
        let members: Vec<_> = edu.group.as_ref().unwrap().members.iter().collect();
        assert_eq!(members.len(), 2);
        assert!(members[0].is_bridge && !members[0].blocks, "{:?}", members[0]);
        assert_eq!(edu.way, "vfio-group");
        let nodes: Vec<&Path> = edu.nodes.iter().map(|node| node.path.as_path()).collect();
        assert_eq!(nodes, [Path::new("/dev/vfio/3"), Path::new("/dev/vfio/vfio")]);
        assert_eq!(edu.openers.len(), 1);
        assert_eq!((edu.openers[0].pid, edu.openers[0].name.as_str()), (7, "qemu-system"));
        assert_eq!(edu.configuration.msi, Some(1));
        assert_eq!(edu.reset_methods, Some(vec!["bus".to_owned()]));
        assert_eq!(edu.bars[0].mapping, BarMapping::Whole);
        assert_eq!(edu.kernel_power_state.as_deref(), Some("D0"));
    }

    #[test]
    fn a_function_with_a_node_of_its_own_is_reached_by_it() {
        let tree = Tree::healthy();
        tree.device_node(EDU, "vfio0");
        let facts = Facts::gather(tree.root(), &question(&[EDU])).unwrap();
        let edu = &facts.functions[0];
        assert_eq!(edu.way, "vfio-cdev");
        let nodes: Vec<&Path> = edu.nodes.iter().map(|node| node.path.as_path()).collect();
        assert_eq!(nodes, [Path::new("/dev/vfio/devices/vfio0"), Path::new("/dev/iommu")]);
    }

    #[test]
    fn what_the_configuration_forces_is_how_a_function_is_reached() {
        let tree = Tree::healthy();
        tree.device_node(EDU, "vfio0");
        let owned = Owned {
            address: EDU.parse().unwrap(),
            service: "edu0".to_owned(),
            driver: None,
            pid: None,
            backend: "vfio-group".to_owned(),
            is_unsafe: false,
        };
        let daemon = Some(Daemon { pid: 1, services: vec![owned] });
        let facts = Facts::gather(tree.root(), &Question { daemon, ..question(&[EDU]) }).unwrap();
        assert_eq!(facts.functions[0].way, "vfio-group");
        assert_eq!(facts.functions[0].owner.as_ref().unwrap().service, "edu0");
        assert!(facts.subject.is_daemon);
    }

    #[test]
    fn a_function_that_is_not_there_is_missing_and_the_others_are_not() {
        let tree = Tree::healthy();
        let facts = Facts::gather(tree.root(), &question(&["0000:09:00.0", CARD])).unwrap();
        assert_eq!(facts.missing, ["0000:09:00.0".parse().unwrap()]);
        assert_eq!(facts.functions.len(), 1);
    }

    #[test]
    fn without_a_device_all_functions_are_gathered() {
        let tree = Tree::healthy();
        let facts = Facts::gather(tree.root(), &question(&[])).unwrap();
        assert_eq!(facts.functions.len(), 3);
    }

    #[test]
    fn a_function_in_d3cold_is_not_woken_to_be_read() {
        let tree = Tree::healthy();
        let folder = format!("sys/bus/pci/devices/{EDU}");
        tree.write(&format!("{folder}/power_state"), "D3cold\n");
        tree.remove(&format!("{folder}/config"));
        let facts = Facts::gather(tree.root(), &question(&[EDU])).unwrap();
        assert_eq!(facts.functions[0].kernel_power_state.as_deref(), Some("D3cold"));
        assert!(facts.functions[0].configuration.answers);
    }
}
