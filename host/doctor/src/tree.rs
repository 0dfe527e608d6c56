//! A fabricated machine: the files that the kernel and the distribution would have.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;

use crate::facts::Root;

pub(crate) const PORT: &str = "0000:00:1c.0";
pub(crate) const EDU: &str = "0000:01:00.0";
pub(crate) const CARD: &str = "0000:02:00.0";

pub(crate) struct Tree {
    root: TempDir,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let tree = Self { root: tempfile::tempdir().unwrap() };
        tree.folder("sys/bus/pci/devices");
        tree.folder("proc");
        tree
    }

    /// A machine with an IOMMU, on which an `edu` is bound to `vfio-pci` and a network card to the
    /// kernel's driver.
    pub(crate) fn healthy() -> Self {
        let tree = Self::new();
        tree.add(PORT, (0x8086, 0x244e), 0x060400, 3, "pcieport");
        tree.add(EDU, (0x1234, 0x11e8), 0x00ff00, 3, "vfio-pci");
        tree.add(CARD, (0x8086, 0x10d3), 0x020000, 4, "e1000e");
        tree.write("sys/bus/pci/drivers_probe", "");
        tree.write("sys/firmware/acpi/tables/DMAR", "");
        tree.folder("sys/class/iommu/dmar0");
        tree.write("proc/cmdline", "quiet intel_iommu=on\n");
        tree.write("proc/interrupts", "  4:  12  IR-IO-APIC  4-edge  ttyS0\n");
        tree.write("proc/devices", "Character devices:\n236 vfio\n");
        tree.write("dev/vfio/3", "");
        tree.write("dev/vfio/vfio", "");
        tree
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn place(&self) -> Root {
        Root::new(self.root())
    }

    pub(crate) fn folder(&self, path: &str) {
        fs::create_dir_all(self.root().join(path)).unwrap();
    }

    pub(crate) fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn remove(&self, path: &str) {
        fs::remove_file(self.root().join(path)).unwrap();
    }

    fn link(&self, path: &str, target: impl AsRef<Path>) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    pub(crate) fn add(
        &self,
        address: &str,
        (vendor, device): (u16, u16),
        class: u32,
        group: u32,
        driver: &str,
    ) {
        let folder = format!("sys/bus/pci/devices/{address}");
        for (name, text) in [
            ("vendor", format!("0x{vendor:04x}\n")),
            ("device", format!("0x{device:04x}\n")),
            ("subsystem_vendor", "0x1af4\n".to_owned()),
            ("subsystem_device", "0x1100\n".to_owned()),
            ("class", format!("0x{class:06x}\n")),
            ("revision", "0x10\n".to_owned()),
            ("driver_override", "(null)\n".to_owned()),
            ("power_state", "D0\n".to_owned()),
            ("reset_method", "bus\n".to_owned()),
            ("resource", "0x00000000fea00000 0x00000000feafffff 0x0000000000040200\n".to_owned()),
        ] {
            self.write(&format!("{folder}/{name}"), text);
        }
        // A line, and one vector of MSI.
        let mut config = vec![0; 256];
        config[0..2].copy_from_slice(&vendor.to_le_bytes());
        (config[0x06], config[0x34], config[0x3d], config[0x40]) = (0x10, 0x40, 1, 0x05);
        self.write(&format!("{folder}/config"), config);

        let groups = format!("sys/kernel/iommu_groups/{group}");
        self.link(&format!("{groups}/devices/{address}"), self.root().join(&folder));
        self.link(&format!("{folder}/iommu_group"), self.root().join(&groups));
        self.folder(&format!("sys/bus/pci/drivers/{driver}"));
        let driver = self.root().join(format!("sys/bus/pci/drivers/{driver}"));
        self.link(&format!("{folder}/driver"), driver);
    }

    /// A kernel with nodes for devices has made one for a function.
    pub(crate) fn device_node(&self, address: &str, name: &str) {
        self.folder(&format!("sys/bus/pci/devices/{address}/vfio-dev/{name}"));
        self.write(&format!("dev/vfio/devices/{name}"), "");
        self.write("dev/iommu", "");
        self.write("proc/devices", "Character devices:\n511 vfio-dev\n");
    }

    /// A process with these capabilities; its soft and hard limit of locked memory in bytes.
    pub(crate) fn process(
        &self,
        pid: u32,
        name: &str,
        uid: u32,
        capabilities: u64,
        memlock: Option<(u64, u64)>,
    ) {
        self.write(
            &format!("proc/{pid}/status"),
            format!(
                "Name:\t{name}\nUid:\t0\t{uid}\t0\t0\nGid:\t0\t{uid}\t0\t0\nGroups:\t10 11 \n\
                 CapEff:\t{capabilities:016x}\n"
            ),
        );
        let limit = match memlock {
            Some((soft, hard)) => format!("{soft:<21}{hard:<21}bytes"),
            None => "unlimited            unlimited            bytes".to_owned(),
        };
        self.write(
            &format!("proc/{pid}/limits"),
            format!("Limit                     Soft Limit\nMax locked memory         {limit}\n"),
        );
        self.write(&format!("proc/{pid}/comm"), format!("{name}\n"));
        self.folder(&format!("proc/{pid}/fd"));
    }

    /// The process has a file open once more.
    pub(crate) fn opens(&self, pid: u32, target: &str) {
        let folder = format!("proc/{pid}/fd");
        let count = fs::read_dir(self.root().join(&folder)).unwrap().count();
        self.link(&format!("{folder}/{count}"), target);
    }
}
