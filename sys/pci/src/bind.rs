//! Moving a function to `vfio-pci`, and back.

use std::io::ErrorKind;
use std::path::Path;

use log::info;
use serde::{Deserialize, Serialize};

use crate::sysfs::link_name;
use crate::{PciAddress, PciError, Sysfs};

/// The kernel driver that hands a function to VFIO.
pub const VFIO_PCI: &str = "vfio-pci";

/// What `driver_override` takes for "no override".
const NO_OVERRIDE: &str = "\n";

/// How a function was bound before [`Sysfs::bind`], enough to undo it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Former {
    /// The function.
    pub address: PciAddress,
    /// The driver it had.
    pub driver: Option<String>,
    /// The override it had.
    pub driver_override: Option<String>,
}

impl Former {
    /// Whether [`Sysfs::bind`] found the function as it wanted it and changed nothing.
    pub fn was_bound_to_vfio(&self) -> bool {
        self.driver.as_deref() == Some(VFIO_PCI)
    }
}

impl Sysfs {
    /// Binds a function to `vfio-pci` and returns how it was bound before.
    ///
    /// A function that is bound already is left as it is. When something goes wrong on the way,
    /// the function is put back as far as the kernel lets us, and the first error is returned.
    /// Other members of its IOMMU group are never touched.
    ///
    /// - Blocks while its present driver lets go, which some drivers take seconds for.
    /// - Errors: `NoSuchDevice`, `NoIommu`, `DriverNotLoaded`, `GroupNotViable` with the members
    ///   in the way, `Permission`, `NotBound` when the driver refused; besides reading and writing.
    pub fn bind(&self, address: PciAddress) -> Result<Former, PciError> {
        let function = self.function(address)?;
        let group = self.group_of(address)?;
        let former =
            Former { address, driver: function.driver, driver_override: function.driver_override };
        if former.was_bound_to_vfio() {
            return Ok(former);
        }
        if !self.driver_directory(VFIO_PCI).exists() {
            return Err(PciError::DriverNotLoaded { driver: VFIO_PCI.to_owned() });
        }
        let mut blockers = group.blockers();
        // Its own driver is about to let go.
        blockers.retain(|member| member.address != address);
        if !blockers.is_empty() {
            return Err(PciError::GroupNotViable { group: group.number, blockers });
        }

        if let Err(err) = self.move_to_vfio(address) {
            // The first error is the one that explains; a second one adds nothing to it.
            let _ = self.restore(&former);
            return Err(err);
        }
        info!(
            device:% = address, former = former.driver.as_deref().unwrap_or("none");
            "bound to vfio-pci"
        );
        Ok(former)
    }

    /// Binds a function again as it was before [`bind`](Self::bind).
    ///
    /// Restores the override, takes the function from `vfio-pci`, and lets the kernel probe; a
    /// function that had no driver gets none. Doing it twice changes nothing more.
    ///
    /// - Blocks while somebody has the device open through VFIO: close it first.
    /// - Errors: `NoSuchDevice`, `Permission`, `NotBound` when the former driver did not take the
    ///   function back; besides reading and writing.
    pub fn restore(&self, former: &Former) -> Result<(), PciError> {
        if former.was_bound_to_vfio() {
            return Ok(());
        }
        let address = former.address;
        let present = self.function(address)?;
        if present.driver_override != former.driver_override {
            let value = former.driver_override.as_deref().unwrap_or(NO_OVERRIDE);
            self.set_override(address, value)?;
        }
        if present.driver == former.driver {
            return Ok(());
        }
        self.let_go(address)?;
        let Some(driver) = &former.driver else { return Ok(()) };

        self.probe(address)?;
        let mut bound = self.driver_of(address)?;
        if bound.as_ref() != Some(driver) {
            // The kernel prefers another driver, or the former one was bound by hand.
            self.let_go(address)?;
            self.attach(address, driver)?;
            bound = self.driver_of(address)?;
        }
        if bound.as_ref() != Some(driver) {
            return Err(PciError::NotBound { address, wanted: driver.clone(), bound });
        }
        info!(device:% = address, driver:% = driver; "bound to its former driver");
        Ok(())
    }

    fn move_to_vfio(&self, address: PciAddress) -> Result<(), PciError> {
        self.set_override(address, VFIO_PCI)?;
        self.let_go(address)?;
        self.probe(address)?;
        let bound = self.driver_of(address)?;
        if bound.as_deref() == Some(VFIO_PCI) {
            return Ok(());
        }
        Err(PciError::NotBound { address, wanted: VFIO_PCI.to_owned(), bound })
    }

    fn set_override(&self, address: PciAddress, value: &str) -> Result<(), PciError> {
        let path = self.directory(address).join("driver_override");
        self.write_to(&path, value, || format!("set the driver of {address}"))
    }

    /// Takes the function from its driver, if it has one.
    fn let_go(&self, address: PciAddress) -> Result<(), PciError> {
        let Some(driver) = self.driver_of(address)? else { return Ok(()) };
        let path = self.driver_directory(&driver).join("unbind");
        self.write_to(&path, &address.to_string(), || format!("take {address} from {driver}"))
    }

    fn probe(&self, address: PciAddress) -> Result<(), PciError> {
        let action = || format!("let the kernel find a driver for {address}");
        match self.write_to(&self.drivers_probe(), &address.to_string(), action) {
            // Depending on its driver, a probe that fails is an error here or silence; what
            // counts is who has the function afterwards.
            Err(PciError::Write { .. }) => Ok(()),
            result => result,
        }
    }

    fn attach(&self, address: PciAddress, driver: &str) -> Result<(), PciError> {
        let path = self.driver_directory(driver).join("bind");
        match self.write_to(&path, &address.to_string(), || format!("give {address} to {driver}")) {
            // As in `probe`; this also covers a driver that was unloaded meanwhile.
            Err(PciError::Write { .. }) => Ok(()),
            result => result,
        }
    }

    fn driver_of(&self, address: PciAddress) -> Result<Option<String>, PciError> {
        let directory = self.directory(address);
        if !directory.exists() {
            return Err(PciError::NoSuchDevice { address });
        }
        link_name(&directory.join("driver"))
    }

    fn write_to(
        &self,
        path: &Path,
        value: &str,
        action: impl FnOnce() -> String,
    ) -> Result<(), PciError> {
        (self.write)(path, value).map_err(|source| match source.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                PciError::Permission { action: action(), path: path.to_owned(), source }
            }
            _ => PciError::Write { path: path.to_owned(), value: value.to_owned(), source },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;

    const EDU: &str = "0000:01:00.0";

    fn edu() -> PciAddress {
        EDU.parse().unwrap()
    }

    /// A tree with an unbound `edu` in group 3 and `vfio-pci` loaded.
    fn tree() -> Tree {
        let tree = Tree::new();
        tree.load("vfio-pci");
        tree.add(EDU, 0x1234, 0x11e8, 0x00ff00, Some(3));
        tree
    }

    #[test]
    fn a_function_moves_to_vfio_and_back_to_its_driver() {
        let tree = tree();
        tree.bind(EDU, Some("edu_driver"));
        let sysfs = tree.sysfs();

        let former = sysfs.bind(edu()).unwrap();
        assert_eq!(sysfs.function(edu()).unwrap().driver.as_deref(), Some("vfio-pci"));
        assert_eq!(former.driver.as_deref(), Some("edu_driver"));

        sysfs.restore(&former).unwrap();
        let function = sysfs.function(edu()).unwrap();
        assert_eq!(function.driver.as_deref(), Some("edu_driver"));
        assert_eq!(function.driver_override, None);
    }

    #[test]
    fn a_function_without_a_driver_is_without_one_again() {
        let tree = tree();
        let sysfs = tree.sysfs();
        let former = sysfs.bind(edu()).unwrap();

        sysfs.restore(&former).unwrap();

        let function = sysfs.function(edu()).unwrap();
        assert_eq!((function.driver, function.driver_override), (None, None));
    }

    #[test]
    fn restoring_twice_is_restoring_once() {
        let tree = tree();
        tree.bind(EDU, Some("edu_driver"));
        let sysfs = tree.sysfs();
        let former = sysfs.bind(edu()).unwrap();

        sysfs.restore(&former).unwrap();
        sysfs.restore(&former).unwrap();

        let driver = sysfs.function(edu()).unwrap().driver;
        assert_eq!(driver.as_deref(), Some("edu_driver"));
    }

    #[test]
    fn a_function_bound_already_is_left_alone_by_binding_and_restoring() {
        let tree = tree();
        tree.bind(EDU, Some("vfio-pci"));
        let mut sysfs = tree.sysfs();
        sysfs.write = |path, _| panic!("nothing is to be written, but {path:?} is");

        let former = sysfs.bind(edu()).unwrap();
        sysfs.restore(&former).unwrap();

        assert!(former.was_bound_to_vfio());
    }

    #[test]
    fn an_override_that_was_there_is_there_again() {
        let tree = tree();
        tree.bind(EDU, Some("edu_driver"));
        tree.set(EDU, "driver_override", "edu_driver\n");
        let sysfs = tree.sysfs();

        let former = sysfs.bind(edu()).unwrap();
        sysfs.restore(&former).unwrap();

        let function = sysfs.function(edu()).unwrap();
        assert_eq!(function.driver_override.as_deref(), Some("edu_driver"));
        assert_eq!(function.driver.as_deref(), Some("edu_driver"));
    }

    #[test]
    fn a_former_driver_bound_by_hand_gets_its_function_back() {
        let tree = tree();
        tree.bind(EDU, Some("edu_driver"));
        // What the kernel would choose by itself.
        tree.set(EDU, "preferred", "other_driver");
        tree.load("other_driver");
        let sysfs = tree.sysfs();

        let former = sysfs.bind(edu()).unwrap();
        sysfs.restore(&former).unwrap();

        let driver = sysfs.function(edu()).unwrap().driver;
        assert_eq!(driver.as_deref(), Some("edu_driver"));
    }

    #[test]
    fn a_function_without_an_iommu_is_refused() {
        let tree = Tree::new();
        tree.load("vfio-pci");
        tree.add(EDU, 1, 2, 0, None);
        let err = tree.sysfs().bind(edu()).unwrap_err();
        assert!(matches!(err, PciError::NoIommu { .. }), "{err}");
        assert!(err.next_step().contains("intel_iommu=on"));
    }

    #[test]
    fn a_missing_vfio_module_is_named() {
        let tree = Tree::new();
        tree.add(EDU, 1, 2, 0, Some(3));
        let err = tree.sysfs().bind(edu()).unwrap_err();
        assert_eq!(err.to_string(), "the kernel has no PCI driver vfio-pci");
        assert_eq!(err.next_step(), "load it: modprobe vfio-pci");
    }

    #[test]
    fn a_group_in_use_is_refused_naming_the_blockers_and_touching_nothing() {
        let tree = tree();
        tree.bind(EDU, Some("edu_driver"));
        tree.add("0000:01:00.1", 1, 2, 0x010802, Some(3));
        tree.bind("0000:01:00.1", Some("nvme"));

        let err = tree.sysfs().bind(edu()).unwrap_err();

        assert_eq!(err.to_string(), "IOMMU group 3 cannot be used: 0000:01:00.1 is bound to nvme");
        let command = "echo 0000:01:00.1 > /sys/bus/pci/devices/0000:01:00.1/driver/unbind";
        assert!(err.next_step().ends_with(command), "{}", err.next_step());
        let driver = tree.sysfs().function(edu()).unwrap().driver;
        assert_eq!(driver.as_deref(), Some("edu_driver"));
    }

    #[test]
    fn a_driver_that_refuses_leaves_the_function_as_it_was() {
        let tree = tree();
        tree.bind(EDU, Some("edu_driver"));
        tree.set(EDU, "refused_by", "vfio-pci");

        let err = tree.sysfs().bind(edu()).unwrap_err();

        assert_eq!(
            err.to_string(),
            "PCI device 0000:01:00.0 did not bind to vfio-pci, it is now bound to no driver"
        );
        let function = tree.sysfs().function(edu()).unwrap();
        assert_eq!(function.driver.as_deref(), Some("edu_driver"));
        assert_eq!(function.driver_override, None);
    }

    #[test]
    fn a_missing_permission_names_the_action_and_the_file() {
        let tree = tree();
        let mut sysfs = tree.sysfs();
        sysfs.write = |_, _| Err(ErrorKind::PermissionDenied.into());

        let err = sysfs.bind(edu()).unwrap_err();

        let text = err.to_string();
        assert!(text.starts_with("no permission to set the driver of 0000:01:00.0"), "{text}");
        assert!(text.ends_with("0000:01:00.0/driver_override)"), "{text}");
    }

    #[test]
    fn a_device_that_vanishes_while_binding_is_no_such_device() {
        let tree = tree();
        let mut sysfs = tree.sysfs();
        sysfs.write = |path, _| {
            std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
            Ok(())
        };
        let err = sysfs.bind(edu()).unwrap_err();
        assert!(matches!(err, PciError::NoSuchDevice { .. }), "{err}");
    }
}
