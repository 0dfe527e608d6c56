//! What sysfs says about PCI functions and IOMMU groups.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::in_use::is_held;
use crate::{PciAddress, PciError};

/// Bits 23–16 of the class code of every bridge.
const BRIDGE_BASE_CLASS: u32 = 0x06;

/// Bits 23–8 of the class code of a PCI-to-PCI bridge.
const BRIDGE_CLASS: u32 = 0x0604;

/// The PCI part of a sysfs.
///
/// Callable from any thread. Nothing is remembered between calls: devices come and go.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
    /// Where proc is, which knows what is mounted.
    proc: PathBuf,
    /// How an attribute is written; tests put a kernel that answers in its place.
    pub(crate) write: fn(&Path, &str) -> io::Result<()>,
    /// Whether a block device is held; tests answer in the kernel's place.
    pub(crate) is_held: fn(&Path) -> bool,
}

/// One PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciFunction {
    /// Where it is.
    pub address: PciAddress,
    /// Who made it.
    pub vendor: u16,
    /// What its maker calls it.
    pub device: u16,
    /// Who made the board.
    pub subsystem_vendor: u16,
    /// What the board's maker calls it.
    pub subsystem_device: u16,
    /// Base class, subclass and programming interface in 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// The kernel driver that has it.
    pub driver: Option<String>,
    /// The only driver that may bind to it, where somebody said so.
    pub driver_override: Option<String>,
    /// Its IOMMU group, `None` without an IOMMU.
    pub iommu_group: Option<u32>,
}

/// The functions that an IOMMU cannot tell apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IommuGroup {
    /// Its number, the `N` of `/dev/vfio/N`.
    pub number: u32,
    /// Its functions, by address.
    pub members: Vec<GroupMember>,
}

/// One function of an IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMember {
    /// Where it is.
    pub address: PciAddress,
    /// Base class, subclass and programming interface in 24 bits.
    pub class: u32,
    /// The kernel driver that has it.
    pub driver: Option<String>,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::at("/sys")
    }
}

impl Sysfs {
    /// The sysfs mounted at `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), proc: "/proc".into(), write: write_attribute, is_held }
    }

    /// The same, with the proc mounted at `proc` instead of `/proc`.
    pub fn with_proc(self, proc: impl Into<PathBuf>) -> Self {
        Self { proc: proc.into(), ..self }
    }

    /// Whether this is the machine's own.
    pub(crate) fn is_the_kernels(&self) -> bool {
        self.root == Path::new("/sys")
    }

    /// Every PCI function there is, by address. A function that goes away meanwhile is left out.
    pub fn functions(&self) -> Result<Vec<PciFunction>, PciError> {
        let mut functions = Vec::new();
        for address in self.addresses(&self.root.join("bus/pci/devices"))? {
            match self.function(address) {
                Ok(function) => functions.push(function),
                Err(PciError::NoSuchDevice { .. }) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(functions)
    }

    /// The function at `address`.
    pub fn function(&self, address: PciAddress) -> Result<PciFunction, PciError> {
        self.read_function(address).map_err(|err| match err {
            // Gone, before or while we read.
            PciError::Read { source, .. }
                if source.kind() == ErrorKind::NotFound
                    && !self.directory(address).join("vendor").exists() =>
            {
                PciError::NoSuchDevice { address }
            }
            err => err,
        })
    }

    /// The IOMMU group of the function at `address`, with all its members.
    ///
    /// Errors: `NoIommu` where the function has none, besides those of reading.
    pub fn group_of(&self, address: PciAddress) -> Result<IommuGroup, PciError> {
        let function = self.function(address)?;
        let number = function.iommu_group.ok_or(PciError::NoIommu { address })?;
        let folder = self.root.join(format!("kernel/iommu_groups/{number}/devices"));
        let mut members = Vec::new();
        for address in self.addresses(&folder)? {
            let directory = self.directory(address);
            members.push(GroupMember {
                address,
                class: self.number(&directory, "class", 0xff_ffff)?,
                driver: link_name(&directory.join("driver"))?,
            });
        }
        Ok(IommuGroup { number, members })
    }

    /// The function's folder, as `bus/pci/devices` names it.
    pub fn directory(&self, address: PciAddress) -> PathBuf {
        self.root.join("bus/pci/devices").join(address.to_string())
    }

    /// Where sysfs is mounted.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where proc is mounted.
    pub(crate) fn proc(&self) -> &Path {
        &self.proc
    }

    /// The folder of a PCI driver; it exists while the driver is loaded.
    pub(crate) fn driver_directory(&self, driver: &str) -> PathBuf {
        self.root.join("bus/pci/drivers").join(driver)
    }

    /// The file that makes the kernel look for a driver.
    pub(crate) fn drivers_probe(&self) -> PathBuf {
        self.root.join("bus/pci/drivers_probe")
    }

    fn read_function(&self, address: PciAddress) -> Result<PciFunction, PciError> {
        let directory = self.directory(address);
        let id = |name| self.number(&directory, name, 0xffff).map(|id| id as u16);
        Ok(PciFunction {
            address,
            vendor: id("vendor")?,
            device: id("device")?,
            subsystem_vendor: id("subsystem_vendor")?,
            subsystem_device: id("subsystem_device")?,
            class: self.number(&directory, "class", 0xff_ffff)?,
            revision: self.number(&directory, "revision", 0xff)? as u8,
            driver: link_name(&directory.join("driver"))?,
            driver_override: self.driver_override(&directory)?,
            iommu_group: group_number(&directory.join("iommu_group"))?,
        })
    }

    fn driver_override(&self, directory: &Path) -> Result<Option<String>, PciError> {
        let text = read(&directory.join("driver_override"))?;
        // The kernel prints a null pointer this way.
        Ok(Some(text).filter(|text| !text.is_empty() && text != "(null)"))
    }

    /// An attribute that holds a hexadecimal number.
    fn number(&self, directory: &Path, name: &str, max: u32) -> Result<u32, PciError> {
        let path = directory.join(name);
        let text = read(&path)?;
        let digits = text.strip_prefix("0x");
        let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        number.filter(|number| *number <= max).ok_or(PciError::Malformed {
            path,
            text,
            expected: "hexadecimal number",
        })
    }

    /// The names in a folder of links to functions, in order.
    fn addresses(&self, folder: &Path) -> Result<Vec<PciAddress>, PciError> {
        let failed = |source| PciError::Read { path: folder.to_owned(), source };
        let mut addresses = Vec::new();
        for entry in fs::read_dir(folder).map_err(failed)? {
            // A group can hold devices of other buses; they are no PCI functions.
            let name = entry.map_err(failed)?.file_name();
            addresses.extend(name.to_str().and_then(|name| name.parse::<PciAddress>().ok()));
        }
        addresses.sort();
        Ok(addresses)
    }
}

impl IommuGroup {
    /// The members whose drivers keep VFIO from using the group.
    pub fn blockers(&self) -> Vec<GroupMember> {
        self.members.iter().filter(|member| member.blocks()).cloned().collect()
    }

    /// Whether VFIO can use the group once it has `functions`.
    pub(crate) fn check_without(&self, functions: &[PciAddress]) -> Result<(), PciError> {
        let mut blockers = self.blockers();
        // Their drivers are about to let go.
        blockers.retain(|member| !functions.contains(&member.address));
        match blockers.is_empty() {
            true => Ok(()),
            false => Err(PciError::GroupNotViable { group: self.number, blockers }),
        }
    }

    /// Whether VFIO can use the group.
    pub fn is_viable(&self) -> bool {
        !self.members.iter().any(GroupMember::blocks)
    }
}

impl GroupMember {
    /// Whether this member is taken when its whole group is: it is in the way, or nobody has it.
    /// A bridge that nobody has is the machine's.
    pub(crate) fn goes_with_its_group(&self) -> bool {
        self.blocks() || (self.driver.is_none() && self.class >> 16 != BRIDGE_BASE_CLASS)
    }

    /// Whether this member keeps VFIO from using the group: its driver does DMA on its own.
    ///
    /// Source: Linux sets `driver_managed_dma` for the drivers that do not: `vfio-pci` and its
    /// variants, `pci-stub`, and the driver of PCIe ports.
    pub fn blocks(&self) -> bool {
        match self.driver.as_deref() {
            None | Some("pci-stub") => false,
            Some("pcieport") => self.class >> 8 != BRIDGE_CLASS,
            Some(driver) => !driver.replace('_', "-").ends_with("vfio-pci"),
        }
    }
}

fn read(path: &Path) -> Result<String, PciError> {
    let text = fs::read_to_string(path)
        .map_err(|source| PciError::Read { path: path.to_owned(), source })?;
    Ok(text.trim_end_matches(['\n', '\0']).to_owned())
}

/// The last part of what a link points to; `None` when there is no link.
pub(crate) fn link_name(path: &Path) -> Result<Option<String>, PciError> {
    match fs::read_link(path) {
        Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
        Err(err) if err.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PciError::Read { path: path.to_owned(), source }),
    }
}

fn group_number(path: &Path) -> Result<Option<u32>, PciError> {
    let Some(name) = link_name(path)? else { return Ok(None) };
    match name.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(PciError::Malformed {
            path: path.to_owned(),
            text: name,
            expected: "number of a group",
        }),
    }
}

/// One write, as the kernel wants it: an attribute takes its value whole.
fn write_attribute(path: &Path, value: &str) -> io::Result<()> {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    file.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;

    #[test]
    fn a_function_is_read_with_all_that_identifies_it() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x1234, 0x11e8, 0x00ff00, Some(7));

        let function = tree.sysfs().function("01:00.0".parse().unwrap()).unwrap();

        assert_eq!(
            function,
            PciFunction {
                address: "01:00.0".parse().unwrap(),
                vendor: 0x1234,
                device: 0x11e8,
                subsystem_vendor: 0x1af4,
                subsystem_device: 0x1100,
                class: 0x00ff00,
                revision: 0x10,
                driver: None,
                driver_override: None,
                iommu_group: Some(7),
            }
        );
    }

    #[test]
    fn functions_are_listed_by_address() {
        let tree = Tree::new();
        for address in ["0000:02:00.0", "0000:00:1f.2", "0001:00:00.0"] {
            tree.add(address, 1, 2, 0, None);
        }
        let addresses: Vec<String> = tree
            .sysfs()
            .functions()
            .unwrap()
            .iter()
            .map(|function| function.address.to_string())
            .collect();
        assert_eq!(addresses, ["0000:00:1f.2", "0000:02:00.0", "0001:00:00.0"]);
    }

    #[test]
    fn an_address_with_no_device_says_so() {
        let err = Tree::new().sysfs().function("00:05.0".parse().unwrap()).unwrap_err();
        assert_eq!(err.to_string(), "there is no PCI device 0000:00:05.0");
    }

    #[test]
    fn an_identification_that_is_no_number_is_named_with_its_file() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 1, 2, 0, None);
        let address = "01:00.0".parse().unwrap();
        fs::write(tree.sysfs().directory(address).join("vendor"), "what\n").unwrap();

        let err = tree.sysfs().function(address).unwrap_err();

        assert!(matches!(err, PciError::Malformed { ref text, .. } if text == "what"), "{err}");
        assert!(err.to_string().contains("0000:01:00.0/vendor"), "{err}");
    }

    #[test]
    fn a_group_lists_every_member_and_only_foreign_drivers_block() {
        let tree = Tree::new();
        for (address, class, driver) in [
            ("0000:00:1c.0", 0x060400, Some("pcieport")),
            ("0000:01:00.0", 0x00ff00, Some("vfio-pci")),
            ("0000:01:00.1", 0x010802, Some("nvme")),
            ("0000:01:00.2", 0x00ff00, None),
            ("0000:01:00.3", 0x00ff00, Some("pci-stub")),
            ("0000:01:00.4", 0x020000, Some("mlx5_vfio_pci")),
            ("0000:01:00.5", 0x00ff00, Some("pcieport")),
        ] {
            tree.add(address, 1, 2, class, Some(3));
            tree.bind(address, driver);
        }

        let group = tree.sysfs().group_of("01:00.0".parse().unwrap()).unwrap();

        let blockers: Vec<String> =
            group.blockers().iter().map(|member| member.address.to_string()).collect();
        assert_eq!((group.number, group.members.len()), (3, 7));
        assert_eq!(blockers, ["0000:01:00.1", "0000:01:00.5"]);
        assert!(!group.is_viable());
    }
}
