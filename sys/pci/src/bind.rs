//! Moving a function to a kernel driver that hands it out, and back.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use log::info;
use serde::{Deserialize, Serialize};

use crate::sysfs::link_name;
use crate::{IommuGroup, PciAddress, PciError, Sysfs};

/// The kernel driver that hands a function to VFIO.
pub const VFIO_PCI: &str = "vfio-pci";

/// The kernel driver that hands a function to UIO.
pub const UIO_PCI_GENERIC: &str = "uio_pci_generic";

/// Where the kernel says whether VFIO takes functions that no IOMMU covers.
const NO_IOMMU_MODE: &str = "module/vfio/parameters/enable_unsafe_noiommu_mode";

/// What a function is bound for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// VFIO, which contains its DMA.
    Vfio,
    /// VFIO in its no-IOMMU mode, which contains nothing.
    VfioNoIommu,
    /// UIO, which contains nothing.
    Uio,
}

impl Binding {
    /// The kernel driver for this.
    pub fn driver(self) -> &'static str {
        match self {
            Binding::Vfio | Binding::VfioNoIommu => VFIO_PCI,
            Binding::Uio => UIO_PCI_GENERIC,
        }
    }
}

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

impl Sysfs {
    /// Binds a function for something and returns how it was bound before.
    ///
    /// A function that is bound already is left as it is. When something goes wrong on the way,
    /// the function is put back as far as the kernel lets us, and the first error is returned.
    /// Other members of its IOMMU group are never touched. Nothing is written down: who has to be
    /// able to undo it after a crash uses a [`Binder`](crate::Binder).
    ///
    /// - Blocks while its present driver lets go, which some drivers take seconds for.
    /// - Errors: `NoSuchDevice`, `DriverNotLoaded`, `Permission`, `NotBound` when the driver
    ///   refused, `InUse`; for VFIO `NoIommu`, and `GroupNotViable` with the members in the way;
    ///   for VFIO without an IOMMU `HasIommu` and `NoIommuModeOff`; besides reading and writing.
    pub fn bind(&self, address: PciAddress, binding: Binding) -> Result<Former, PciError> {
        let function = self.function(address)?;
        let group = self.check(address, binding)?;
        let former =
            Former { address, driver: function.driver, driver_override: function.driver_override };
        let driver = binding.driver();
        if former.driver.as_deref() == Some(driver) {
            return Ok(former);
        }
        if let Some(group) = group {
            group.check_without(&[address])?;
        }
        let uses = self.uses_of(address)?;
        if !uses.is_empty() {
            return Err(PciError::InUse { functions: vec![(address, uses)] });
        }
        if let Err(err) = self.move_to(address, driver) {
            // The first error is the one that explains; a second one adds nothing to it.
            let _ = self.restore(&former);
            return Err(err);
        }
        info!(
            device:% = address, former = former.driver.as_deref().unwrap_or("none");
            "bound to {driver}"
        );
        Ok(former)
    }

    /// Binds a function again as it was before [`bind`](Self::bind).
    ///
    /// Restores the override, takes the function from its driver, and lets the kernel probe; a
    /// function that had no driver gets none. Doing it twice changes nothing more.
    ///
    /// - Blocks while somebody has the device open: close it first.
    /// - Errors: `NoSuchDevice`, `Permission`, `NotBound` when the former driver did not take the
    ///   function back; besides reading and writing.
    pub fn restore(&self, former: &Former) -> Result<(), PciError> {
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

    /// Whether the machine has what a binding needs; the function's group where VFIO uses it.
    pub(crate) fn check(
        &self,
        address: PciAddress,
        binding: Binding,
    ) -> Result<Option<IommuGroup>, PciError> {
        let function = self.function(address)?;
        let group = match binding {
            Binding::Vfio => Some(self.group_of(address)?),
            Binding::VfioNoIommu | Binding::Uio => None,
        };
        let driver = binding.driver();
        if function.driver.as_deref() == Some(driver) {
            return Ok(group);
        }
        if !self.driver_directory(driver).exists() {
            return Err(PciError::DriverNotLoaded { driver: driver.to_owned() });
        }
        if binding == Binding::VfioNoIommu {
            if let Some(group) = function.iommu_group {
                return Err(PciError::HasIommu { address, group });
            }
            if !self.is_no_iommu_mode_on() {
                return Err(PciError::NoIommuModeOff { address });
            }
        }
        Ok(group)
    }

    /// Whether this process may change the driver of a function.
    pub(crate) fn check_permission(&self, address: PciAddress) -> Result<(), PciError> {
        let path = self.directory(address).join("driver_override");
        let opened = OpenOptions::new().write(true).open(&path).map(drop);
        opened.map_err(|source| refused(source, path, "", || set_the_driver_of(address)))
    }

    pub(crate) fn move_to(&self, address: PciAddress, driver: &str) -> Result<(), PciError> {
        self.set_override(address, driver)?;
        self.let_go(address)?;
        self.probe(address)?;
        let bound = self.driver_of(address)?;
        if bound.as_deref() == Some(driver) {
            return Ok(());
        }
        Err(PciError::NotBound { address, wanted: driver.to_owned(), bound })
    }

    fn is_no_iommu_mode_on(&self) -> bool {
        std::fs::read_to_string(self.root().join(NO_IOMMU_MODE))
            .is_ok_and(|text| text.trim_end() == "Y")
    }

    fn set_override(&self, address: PciAddress, value: &str) -> Result<(), PciError> {
        let path = self.directory(address).join("driver_override");
        self.write_to(&path, value, || set_the_driver_of(address))
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
        (self.write)(path, value).map_err(|source| refused(source, path.into(), value, action))
    }
}

fn refused(
    source: io::Error,
    path: PathBuf,
    value: &str,
    action: impl FnOnce() -> String,
) -> PciError {
    match source.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            PciError::Permission { action: action(), path, source }
        }
        _ => PciError::Write { path, value: value.to_owned(), source },
    }
}

fn set_the_driver_of(address: PciAddress) -> String {
    format!("set the driver of {address}")
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

        let former = sysfs.bind(edu(), Binding::Vfio).unwrap();
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
        let former = sysfs.bind(edu(), Binding::Vfio).unwrap();

        sysfs.restore(&former).unwrap();

        let function = sysfs.function(edu()).unwrap();
        assert_eq!((function.driver, function.driver_override), (None, None));
    }

    #[test]
    fn restoring_twice_is_restoring_once() {
        let tree = tree();
        tree.bind(EDU, Some("edu_driver"));
        let sysfs = tree.sysfs();
        let former = sysfs.bind(edu(), Binding::Vfio).unwrap();

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

        let former = sysfs.bind(edu(), Binding::Vfio).unwrap();
        sysfs.restore(&former).unwrap();

        assert_eq!(former.driver.as_deref(), Some("vfio-pci"));
    }

    #[test]
    fn an_override_that_was_there_is_there_again() {
        let tree = tree();
        tree.bind(EDU, Some("edu_driver"));
        tree.set(EDU, "driver_override", "edu_driver\n");
        let sysfs = tree.sysfs();

        let former = sysfs.bind(edu(), Binding::Vfio).unwrap();
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

        let former = sysfs.bind(edu(), Binding::Vfio).unwrap();
        sysfs.restore(&former).unwrap();

        let driver = sysfs.function(edu()).unwrap().driver;
        assert_eq!(driver.as_deref(), Some("edu_driver"));
    }

    #[test]
    fn a_function_without_an_iommu_is_refused() {
        let tree = Tree::new();
        tree.load("vfio-pci");
        tree.add(EDU, 1, 2, 0, None);
        let err = tree.sysfs().bind(edu(), Binding::Vfio).unwrap_err();
        assert!(matches!(err, PciError::NoIommu { .. }), "{err}");
        assert!(err.next_step().contains("intel_iommu=on"));
    }

    #[test]
    fn a_missing_vfio_module_is_named() {
        let tree = Tree::new();
        tree.add(EDU, 1, 2, 0, Some(3));
        let err = tree.sysfs().bind(edu(), Binding::Vfio).unwrap_err();
        assert_eq!(err.to_string(), "the kernel has no PCI driver vfio-pci");
        assert_eq!(err.next_step(), "load it: modprobe vfio-pci");
    }

    #[test]
    fn a_group_in_use_is_refused_naming_the_blockers_and_touching_nothing() {
        let tree = tree();
        tree.bind(EDU, Some("edu_driver"));
        tree.add("0000:01:00.1", 1, 2, 0x010802, Some(3));
        tree.bind("0000:01:00.1", Some("nvme"));

        let err = tree.sysfs().bind(edu(), Binding::Vfio).unwrap_err();

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

        let err = tree.sysfs().bind(edu(), Binding::Vfio).unwrap_err();

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

        let err = sysfs.bind(edu(), Binding::Vfio).unwrap_err();

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
        let err = sysfs.bind(edu(), Binding::Vfio).unwrap_err();
        assert!(matches!(err, PciError::NoSuchDevice { .. }), "{err}");
    }

    #[test]
    fn a_function_moves_to_uio_whatever_its_group_does_and_back() {
        let tree = tree();
        tree.load("uio_pci_generic");
        tree.bind(EDU, Some("vfio-pci"));
        tree.add("0000:01:00.1", 1, 2, 0x010802, Some(3));
        tree.bind("0000:01:00.1", Some("nvme"));
        let sysfs = tree.sysfs();

        let former = sysfs.bind(edu(), Binding::Uio).unwrap();
        let driver = sysfs.function(edu()).unwrap().driver;
        assert_eq!(driver.as_deref(), Some("uio_pci_generic"));

        sysfs.restore(&former).unwrap();
        let function = sysfs.function(edu()).unwrap();
        assert_eq!(function.driver.as_deref(), Some("vfio-pci"));
        assert_eq!(function.driver_override, None);
    }

    #[test]
    fn vfio_takes_a_function_without_an_iommu_only_in_its_unsafe_mode() {
        let tree = Tree::new();
        tree.load("vfio-pci");
        tree.add(EDU, 1, 2, 0, None);
        let err = tree.sysfs().bind(edu(), Binding::VfioNoIommu).unwrap_err();
        assert!(matches!(err, PciError::NoIommuModeOff { .. }), "{err}");
        assert!(err.next_step().contains("enable_unsafe_noiommu_mode"), "{}", err.next_step());

        tree.turn_no_iommu_mode_on();
        tree.sysfs().bind(edu(), Binding::VfioNoIommu).unwrap();
    }

    #[test]
    fn a_function_behind_an_iommu_is_not_bound_to_do_without() {
        let tree = tree();
        tree.turn_no_iommu_mode_on();
        let err = tree.sysfs().bind(edu(), Binding::VfioNoIommu).unwrap_err();
        assert!(matches!(err, PciError::HasIommu { group: 3, .. }), "{err}");
        assert_eq!(tree.sysfs().function(edu()).unwrap().driver, None);
    }
}
