//! A fabricated sysfs, with a kernel that answers writes as Linux does.

use std::cell::Cell;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::Sysfs;

const BOOT_ID: &str = "proc/sys/kernel/random/boot_id";

thread_local! {
    /// After how many more changes this thread stops.
    static CHANGES_LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Makes this thread panic instead of making its change of this number from here on, as if the
/// program had ended there.
pub(crate) fn stop_at_change(number: Option<usize>) {
    CHANGES_LEFT.set(number);
}

/// Counts a change that is about to be made.
pub(crate) fn count_changes() {
    if let Some(left) = CHANGES_LEFT.get() {
        CHANGES_LEFT.set(Some(left.checked_sub(1).expect("this is where the program ends")));
    }
}

pub(crate) struct Tree {
    root: TempDir,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("bus/pci/devices")).unwrap();
        fs::create_dir_all(root.path().join("bus/pci/drivers")).unwrap();
        fs::create_dir_all(root.path().join("kernel/iommu_groups")).unwrap();
        fs::create_dir_all(root.path().join("proc/self")).unwrap();
        fs::write(root.path().join("proc/self/mountinfo"), "").unwrap();
        fs::create_dir_all(root.path().join("proc/sys/kernel/random")).unwrap();
        fs::write(root.path().join(BOOT_ID), "the first\n").unwrap();
        Self { root }
    }

    pub(crate) fn sysfs(&self) -> Sysfs {
        let mut sysfs = Sysfs::at(self.root.path()).with_proc(self.root.path().join("proc"));
        sysfs.write = kernel;
        sysfs.is_held = |_| false;
        sysfs
    }

    pub(crate) fn turn_no_iommu_mode_on(&self) {
        let folder = self.root.path().join("module/vfio/parameters");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("enable_unsafe_noiommu_mode"), "Y\n").unwrap();
    }

    pub(crate) fn load(&self, driver: &str) {
        fs::create_dir_all(self.root.path().join("bus/pci/drivers").join(driver)).unwrap();
    }

    pub(crate) fn add(
        &self,
        address: &str,
        vendor: u16,
        device: u16,
        class: u32,
        group: Option<u32>,
    ) {
        let directory = self.root.path().join("bus/pci/devices").join(address);
        fs::create_dir(&directory).unwrap();
        for (name, text) in [
            ("vendor", format!("0x{vendor:04x}\n")),
            ("device", format!("0x{device:04x}\n")),
            ("subsystem_vendor", "0x1af4\n".to_owned()),
            ("subsystem_device", "0x1100\n".to_owned()),
            ("class", format!("0x{class:06x}\n")),
            ("revision", "0x10\n".to_owned()),
            ("driver_override", "(null)\n".to_owned()),
        ] {
            fs::write(directory.join(name), text).unwrap();
        }
        if let Some(group) = group {
            let folder = self.root.path().join(format!("kernel/iommu_groups/{group}"));
            fs::create_dir_all(folder.join("devices")).unwrap();
            symlink(&directory, folder.join("devices").join(address)).unwrap();
            symlink(&folder, directory.join("iommu_group")).unwrap();
        }
    }

    /// Binds a function to a driver, which the kernel prefers from then on.
    pub(crate) fn bind(&self, address: &str, driver: Option<&str>) {
        let Some(driver) = driver else { return };
        self.load(driver);
        self.set(address, "preferred", driver);
        attach(self.root.path(), address, driver);
    }

    /// Takes a function from its driver and gives it to another one, by somebody else's hand.
    pub(crate) fn rebind(&self, address: &str, driver: &str) {
        self.load(driver);
        fs::remove_file(self.device(address).join("driver")).unwrap();
        self.set(address, "driver_override", &format!("{driver}\n"));
        attach(self.root.path(), address, driver);
    }

    /// Boots the machine again: every function has the driver that the kernel prefers.
    pub(crate) fn boot(&self, id: &str) {
        fs::write(self.root.path().join(BOOT_ID), format!("{id}\n")).unwrap();
        for function in self.sysfs().functions().unwrap() {
            let address = function.address.to_string();
            let _ = fs::remove_file(self.device(&address).join("driver"));
            self.set(&address, "driver_override", "(null)\n");
            let preferred = fs::read_to_string(self.device(&address).join("preferred"));
            attach(self.root.path(), &address, &preferred.unwrap());
        }
    }

    /// A state directory, which is not there yet.
    pub(crate) fn state(&self) -> PathBuf {
        self.root.path().join("state")
    }

    pub(crate) fn set(&self, address: &str, attribute: &str, text: &str) {
        let path = self.root.path().join("bus/pci/devices").join(address).join(attribute);
        fs::write(path, text).unwrap();
    }
}

/// Disks and network interfaces.
impl Tree {
    /// A block device in a folder under a function.
    pub(crate) fn add_disk(&self, address: &str, folder: &str, number: &str) {
        self.make_disk(&self.device(address).join(folder), number);
    }

    /// A block device that no function has: one made of others.
    pub(crate) fn add_made_disk(&self, folder: &str, number: &str) {
        self.make_disk(&self.root.path().join("devices/virtual").join(folder), number);
    }

    fn make_disk(&self, folder: &Path, number: &str) {
        fs::create_dir_all(folder.join("holders")).unwrap();
        fs::write(folder.join("dev"), format!("{number}\n")).unwrap();
        self.link("class/block", folder);
    }

    pub(crate) fn name_mapped(&self, disk: &str, name: &str) {
        let folder = self.root.path().join("class/block").join(disk).join("dm");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("name"), format!("{name}\n")).unwrap();
    }

    pub(crate) fn add_holder(&self, disk: &str, holder: &str) {
        let disks = self.root.path().join("class/block");
        let holder_folder = fs::canonicalize(disks.join(holder)).unwrap();
        symlink(holder_folder, disks.join(disk).join("holders").join(holder)).unwrap();
    }

    /// An NVMe controller in a folder under a function, in the one subsystem.
    pub(crate) fn add_to_nvme_subsystem(&self, address: &str, controller: &str) {
        let controller = self.device(address).join(controller);
        fs::create_dir_all(&controller).unwrap();
        let subsystem = self.root.path().join("devices/virtual/nvme-subsystem/nvme-subsys0");
        fs::create_dir_all(&subsystem).unwrap();
        symlink(&controller, subsystem.join(controller.file_name().unwrap())).unwrap();
        let class = self.root.path().join("class/nvme-subsystem");
        if !class.exists() {
            self.link("class/nvme-subsystem", &subsystem);
        }
    }

    pub(crate) fn mount(&self, number: &str, source: &str, on: &str) {
        let path = self.root.path().join("proc/self/mountinfo");
        let line = format!("36 35 {number} / {on} rw,noatime shared:1 - ext4 {source} rw\n");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, text + &line).unwrap();
    }

    pub(crate) fn set_swaps(&self, files: &[&str]) {
        let head = "Filename                Type        Size    Used    Priority\n".to_owned();
        let lines: String =
            files.iter().map(|file| format!("{file} partition\t999420\t0\t-2\n")).collect();
        fs::write(self.root.path().join("proc/swaps"), head + &lines).unwrap();
    }

    /// A network interface in a folder under a function.
    pub(crate) fn add_interface(&self, address: &str, folder: &str, flags: u32) {
        let folder = self.device(address).join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("flags"), format!("{flags:#x}\n")).unwrap();
        self.link("class/net", &folder);
    }

    pub(crate) fn enslave(&self, address: &str, interface: &str, to: &str) {
        let master = self.device(address).join(interface).join("master");
        symlink(self.root.path().join("class/net").join(to), master).unwrap();
    }

    fn device(&self, address: &str) -> PathBuf {
        self.root.path().join("bus/pci/devices").join(address)
    }

    fn link(&self, class: &str, folder: &Path) {
        let class = self.root.path().join(class);
        fs::create_dir_all(&class).unwrap();
        symlink(folder, class.join(folder.file_name().unwrap())).unwrap();
    }
}

/// What Linux does at a write to these four attributes (`drivers/base/bus.c`,
/// `drivers/pci/pci-driver.c`).
fn kernel(path: &Path, value: &str) -> io::Result<()> {
    count_changes();
    let name = path.file_name().unwrap().to_str().unwrap();
    let root = path.ancestors().find(|folder| folder.join("bus/pci").exists()).unwrap();
    let device = |address: &str| root.join("bus/pci/devices").join(address);
    match name {
        "driver_override" => {
            let text = if value == "\n" { "(null)\n".to_owned() } else { format!("{value}\n") };
            fs::write(path, text)
        }
        "unbind" => {
            let driver = path.parent().unwrap().file_name().unwrap().to_owned();
            let link = device(value).join("driver");
            if fs::read_link(&link)?.file_name() != Some(&driver) {
                return Err(io::Error::from_raw_os_error(19)); // ENODEV
            }
            fs::remove_file(link)
        }
        "drivers_probe" => {
            let directory = device(value);
            if directory.join("driver").exists() {
                return Ok(());
            }
            let forced = fs::read_to_string(directory.join("driver_override"))?;
            let preferred = fs::read_to_string(directory.join("preferred")).unwrap_or_default();
            let driver = if forced == "(null)\n" { preferred } else { forced };
            if root.join("bus/pci/drivers").join(driver.trim()).exists() && !driver.is_empty() {
                attach(root, value, driver.trim());
            }
            Ok(())
        }
        "bind" => {
            let driver = path.parent().unwrap().file_name().unwrap().to_str().unwrap();
            attach(root, value, driver);
            Ok(())
        }
        _ => panic!("Linux has no attribute {name}"),
    }
}

fn attach(root: &Path, address: &str, driver: &str) {
    let directory = root.join("bus/pci/devices").join(address);
    let refused = fs::read_to_string(directory.join("refused_by")).unwrap_or_default();
    if refused != driver {
        symlink(root.join("bus/pci/drivers").join(driver), directory.join("driver")).unwrap();
    }
}
