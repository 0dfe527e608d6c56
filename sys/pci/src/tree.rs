//! A fabricated sysfs, with a kernel that answers writes as Linux does.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;

use crate::Sysfs;

pub(crate) struct Tree {
    root: TempDir,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("bus/pci/devices")).unwrap();
        fs::create_dir_all(root.path().join("bus/pci/drivers")).unwrap();
        fs::create_dir_all(root.path().join("kernel/iommu_groups")).unwrap();
        Self { root }
    }

    pub(crate) fn sysfs(&self) -> Sysfs {
        let mut sysfs = Sysfs::at(self.root.path());
        sysfs.write = kernel;
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

    pub(crate) fn set(&self, address: &str, attribute: &str, text: &str) {
        let path = self.root.path().join("bus/pci/devices").join(address).join(attribute);
        fs::write(path, text).unwrap();
    }
}

/// What Linux does at a write to these four attributes (`drivers/base/bus.c`,
/// `drivers/pci/pci-driver.c`).
fn kernel(path: &Path, value: &str) -> io::Result<()> {
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
