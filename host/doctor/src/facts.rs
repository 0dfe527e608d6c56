//! What the rules go by.
//!
//! Facts are plain values: a test makes a machine by writing them down. `None` is "not known" where
//! the text of a field does not say otherwise, and no rule finds fault with what it does not know.

use std::path::{Path, PathBuf};

use iohost_pci::{Configuration, PciAddress, PciBar, PciError, PciFunction, Sysfs};
use serde::Serialize;

use crate::boot::Boot;
use crate::process::{self, Processes};
use crate::{function, machine};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// The functions asked about; empty for the machine and all of its functions.
    pub devices: Vec<PciAddress>,
    /// Bytes that drivers are to have for DMA, all of them together.
    pub dma_bytes: u64,
    /// What a daemon that runs says of itself.
    pub daemon: Option<Daemon>,
}

/// What a daemon that runs says of itself.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Daemon {
    /// Its process.
    pub pid: u32,
    /// The PCI functions that it runs drivers on, or would.
    pub services: Vec<Owned>,
}

/// A function that the daemon has been told to run a driver on.
#[derive(Clone, Debug, Serialize)]
pub struct Owned {
    /// The function.
    pub address: PciAddress,
    /// The service's name.
    pub service: String,
    /// Its driver, once it is known.
    pub driver: Option<String>,
    /// The driver host, while there is one.
    pub pid: Option<u32>,
    /// How the configuration says that the function is reached: `vfio` for the best way, or the
    /// backend that it forces.
    pub backend: String,
    /// Whether that way is UNSAFE.
    pub is_unsafe: bool,
}

/// All that the rules go by.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The machine.
    pub machine: Machine,
    /// Who would open devices: the daemon if one runs, else this process.
    pub subject: Subject,
    /// The functions asked about.
    pub functions: Vec<Function>,
    /// Those asked about that are not there.
    pub missing: Vec<PciAddress>,
    /// Bytes that drivers are to have for DMA.
    pub dma_bytes: u64,
}

/// What is true of the machine, whatever the device.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// What stands between devices and memory.
    pub iommu: Iommu,
    /// Whether a device can only send the interrupts that are its own.
    pub remaps_interrupts: Option<bool>,
    /// Whether iommufd was told to do without that; `None` where there is no iommufd.
    pub iommufd_allows_unsafe_interrupts: Option<bool>,
    /// The same of VFIO's type 1 driver.
    pub type1_allows_unsafe_interrupts: Option<bool>,
    /// The driver that hands functions to VFIO.
    pub vfio_pci: Module,
    /// The driver that hands functions to UIO.
    pub uio_pci_generic: Module,
    /// Whether the kernel makes nodes for devices; known once VFIO is loaded.
    pub device_nodes: Option<bool>,
    /// Whether there is `/dev/iommu`, which those nodes need.
    pub iommufd: bool,
    /// Whether VFIO takes functions without an IOMMU; `None` where it never does.
    pub no_iommu_mode: Option<bool>,
    /// Whether the kernel has Landlock switched on.
    pub landlock: Option<bool>,
    /// How the kernel is started.
    pub boot: Boot,
}

/// What stands between devices and memory.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Iommu {
    /// Groups of functions that it keeps apart; none means that there is none at work.
    pub groups: usize,
    /// The units at work, as the kernel calls them: `dmar0`, `ivhd0`.
    pub units: Vec<String>,
    /// The tables in which the firmware describes one: `DMAR` (Intel), `IVRS` (AMD), `IORT` (Arm).
    pub tables: Vec<String>,
}

/// A driver that can be a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Module {
    /// It is there.
    Loaded,
    /// It can be loaded, or nobody knows whether it can.
    NotLoaded,
    /// This kernel was built without it.
    Absent,
}

/// Who would open devices.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Subject {
    /// Its process.
    pub pid: u32,
    /// Whether it is the daemon; else it is who asks.
    pub is_daemon: bool,
    /// Its effective user.
    pub uid: u32,
    /// The name of that user, or its number.
    pub user: String,
    /// Its groups.
    #[serde(skip)]
    pub gids: Vec<u32>,
    /// Whether no file is closed to it (`CAP_DAC_OVERRIDE`).
    pub opens_all_files: bool,
    /// Whether it may lock as much memory as there is (`CAP_IPC_LOCK`).
    pub locks_all_memory: bool,
    /// Bytes that it may lock; `None` without a limit.
    pub memlock: Option<u64>,
    /// Bytes that it may raise that to by itself; `None` without a limit.
    pub memlock_hard: Option<u64>,
}

/// One PCI function.
#[derive(Clone, Debug, Serialize)]
pub struct Function {
    /// Where it is.
    pub address: PciAddress,
    /// Who made it.
    pub vendor: u16,
    /// What its maker calls it.
    pub device: u16,
    /// Base class, subclass and programming interface in 24 bits.
    pub class: u32,
    /// The kernel driver that has it.
    pub driver: Option<String>,
    /// Its IOMMU group; `None`: it is in none.
    pub group: Option<Group>,
    /// What the machine uses it for, as sentences, and how that is ended.
    pub uses: Vec<Use>,
    /// How it would be reached: `vfio-cdev`, `vfio-group`.
    pub way: &'static str,
    /// The nodes that this takes, those that are there.
    pub nodes: Vec<Node>,
    /// Who has it or its group open.
    pub openers: Vec<Opener>,
    /// Whether the subject may take it from its kernel driver.
    pub may_bind: bool,
    /// What its configuration space says.
    pub configuration: Configuration,
    /// Its power state, as the kernel has set it.
    pub kernel_power_state: Option<String>,
    /// How it can be reset alone, best first. `None`: it cannot; empty: somebody took that away.
    pub reset_methods: Option<Vec<String>>,
    /// Its BARs.
    pub bars: Vec<PciBar>,
    /// What the daemon does with it.
    pub owner: Option<Owned>,
}

/// The functions that the IOMMU cannot tell apart.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// Its number.
    pub number: u32,
    /// Its functions.
    pub members: Vec<Member>,
}

/// One of them.
#[derive(Clone, Debug, Serialize)]
pub struct Member {
    /// Where it is.
    pub address: PciAddress,
    /// The kernel driver that has it.
    pub driver: Option<String>,
    /// Whether it is a bridge.
    pub is_bridge: bool,
    /// Whether its driver keeps VFIO from using the group.
    pub blocks: bool,
    /// What the machine uses it for.
    pub uses: Vec<Use>,
}

/// Something that the machine uses a function for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Use {
    /// Whether it is a disk that is used; else a network interface.
    pub is_disk: bool,
    /// What, as a sentence without its full stop.
    pub what: String,
    /// The command that ends it.
    pub command: Option<String>,
}

/// A node in `/dev`.
#[derive(Clone, Debug, Serialize)]
pub struct Node {
    /// Its path.
    pub path: PathBuf,
    /// Its owner's number.
    pub uid: u32,
    /// Its group's number.
    pub gid: u32,
    /// Its permissions, in the usual nine bits.
    pub mode: u32,
    /// Whether the subject may open it for reading and writing.
    pub may_open: bool,
}

/// A process that has a device open.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Opener {
    /// The process.
    pub pid: u32,
    /// What it runs.
    pub name: String,
    /// The node that it has open.
    pub node: PathBuf,
}

impl Facts {
    /// Reads what the kernel shows; `root` is where `sys`, `proc`, `dev`, `etc`, `boot` and `lib`
    /// are, `/` but for tests. Changes nothing and opens no device.
    ///
    /// What other processes have open is seen by root only.
    ///
    /// Errors: those of sysfs, but for functions that are not there.
    pub fn gather(root: &Path, question: &Question) -> Result<Self, PciError> {
        let place = Root::new(root);
        let sysfs = Sysfs::at(place.at("/sys")).with_proc(place.at("/proc"));
        let daemon = question.daemon.as_ref();
        let subject = process::subject(&place, daemon.map(|daemon| daemon.pid));
        let machine = machine::gather(&place);
        let processes = Processes::with_devices_open(&place);
        let mut missing = Vec::new();
        let listed = match &question.devices[..] {
            [] => sysfs.functions()?,
            asked => {
                let mut found = Vec::new();
                for address in asked {
                    match sysfs.function(*address) {
                        Ok(function) => found.push(function),
                        Err(PciError::NoSuchDevice { address }) => missing.push(address),
                        Err(err) => return Err(err),
                    }
                }
                found
            }
        };
        let around = function::Around {
            root: &place,
            sysfs: &sysfs,
            machine: &machine,
            subject: &subject,
            processes: &processes,
            daemon,
        };
        let gather = |listed: PciFunction| around.gather(listed);
        let mut functions = Vec::new();
        for gathered in listed.into_iter().map(gather) {
            match gathered {
                Ok(function) => functions.push(function),
                // It went while we looked.
                Err(PciError::NoSuchDevice { address }) => missing.push(address),
                Err(err) => return Err(err),
            }
        }
        Ok(Self { machine, subject, functions, missing, dma_bytes: question.dma_bytes })
    }
}

/// Where the files of a machine are.
pub(crate) struct Root(PathBuf);

impl Root {
    pub(crate) fn new(root: &Path) -> Self {
        Self(root.to_owned())
    }

    /// The file that is `path` on the machine.
    pub(crate) fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// What a file says, without the end of its last line; `None` where it cannot be read.
    pub(crate) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = std::fs::read_to_string(self.at(path)).ok()?;
        Some(text.trim_end_matches(['\n', '\0']).to_owned())
    }

    /// What a switch of a module says.
    pub(crate) fn switch(&self, module: &str, parameter: &str) -> Option<bool> {
        let text = self.text(format!("/sys/module/{module}/parameters/{parameter}"))?;
        Some(matches!(text.as_str(), "Y" | "1"))
    }

    /// The names in a folder, in order; none where it is not there.
    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.at(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }
}
