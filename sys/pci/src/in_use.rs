//! What the machine uses a function for: disks and network interfaces under it.
//!
//! Source: Linux, `Documentation/ABI/stable/sysfs-block` and `testing/sysfs-class-net`,
//! proc(5) (`mountinfo`, `swaps`), open(2) on `O_EXCL` and block devices.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;

use crate::sysfs::link_name;
use crate::{PciAddress, PciError, Sysfs};

/// A network interface that is up has this bit of its `flags` (`IFF_UP`, netdevice(7)).
const UP: u32 = 1;

/// One thing that the machine uses a function for. Displayed as a sentence without its full stop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Use {
    /// A block device has a file system that is mounted.
    Mounted {
        /// The block device, `/dev/nvme0n1p1`.
        device: PathBuf,
        /// Where.
        on: PathBuf,
    },
    /// A block device is swapped to.
    Swap {
        /// The block device.
        device: PathBuf,
    },
    /// Another block device is made of this one: LVM, dm-crypt, software RAID, bcache.
    Part {
        /// The block device.
        device: PathBuf,
        /// The one made of it.
        of: PathBuf,
        /// The name that the device mapper has for that one.
        called: Option<String>,
    },
    /// A block device is held by somebody, and sysfs does not say by whom: a mount in another
    /// namespace, ZFS, a virtual machine.
    Held {
        /// The block device.
        device: PathBuf,
    },
    /// A network interface is up.
    Up {
        /// The interface.
        interface: String,
    },
    /// A network interface belongs to a bridge, a bond or the like.
    Member {
        /// The interface.
        interface: String,
        /// The bridge or bond.
        of: String,
    },
}

impl Use {
    /// The command that ends this use, where there is one for it.
    pub fn command(&self) -> Option<String> {
        match self {
            Use::Mounted { on, .. } => Some(format!("umount {}", on.display())),
            Use::Swap { device } => Some(format!("swapoff {}", device.display())),
            Use::Part { called: Some(name), .. } => Some(format!("dmsetup remove {name}")),
            Use::Part { of, .. } if name_of(of).starts_with("md") => {
                Some(format!("mdadm --stop {}", of.display()))
            }
            Use::Part { .. } | Use::Held { .. } => None,
            Use::Up { interface } => Some(format!("ip link set {interface} down")),
            Use::Member { interface, .. } => Some(format!("ip link set {interface} nomaster")),
        }
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Use::Mounted { device, on } => {
                write!(f, "{} is mounted on {}", device.display(), on.display())
            }
            Use::Swap { device } => write!(f, "{} is swapped to", device.display()),
            Use::Part { device, of, called } => {
                write!(f, "{} is part of {}", device.display(), of.display())?;
                called.iter().try_for_each(|name| write!(f, " ({name})"))
            }
            Use::Held { device } => {
                write!(f, "{} is held by a mount elsewhere or another program", device.display())
            }
            Use::Up { interface } => write!(f, "network interface {interface} is up"),
            Use::Member { interface, of } => {
                write!(f, "network interface {interface} belongs to {of}")
            }
        }
    }
}

impl Sysfs {
    /// What the machine uses the function at `address` for; empty for nothing that shows.
    ///
    /// Looks at every block device under the function, and at those made of them: where they are
    /// mounted, whether they are swapped to, and whether the kernel gives them away exclusively,
    /// which it tries for an instant. Looks at every network interface under the function. What it
    /// cannot see: network interfaces in another network namespace.
    ///
    /// The list is in the order in which uses rest on each other, the lowest first. What comes and
    /// goes meanwhile may be in it or not.
    ///
    /// Errors: `NoSuchDevice`, and those of reading sysfs and proc.
    pub fn uses_of(&self, address: PciAddress) -> Result<Vec<Use>, PciError> {
        let function = match fs::canonicalize(self.directory(address)) {
            Ok(function) => function,
            Err(err) if err.kind() == ErrorKind::NotFound => {
                return Err(PciError::NoSuchDevice { address });
            }
            Err(source) => return Err(PciError::Read { path: self.directory(address), source }),
        };
        let mut uses = Vec::new();
        self.disks_in_use(&function, &mut uses)?;
        self.interfaces_in_use(&function, &mut uses)?;
        Ok(uses)
    }

    fn disks_in_use(&self, function: &Path, uses: &mut Vec<Use>) -> Result<(), PciError> {
        let all = class(&self.root().join("class/block"))?;
        let mut above = vec![function.to_owned()];
        above.extend(self.nvme_subsystems_of(function)?);
        let mut seen = BTreeSet::new();
        let mut disks = Vec::new();
        let mut mounts = None;
        // Each round looks at what is made of what the one before found.
        while !above.is_empty() {
            let folders = std::mem::take(&mut above);
            for folder in &all {
                if !folders.iter().any(|above| folder.starts_with(above))
                    || !seen.insert(folder.clone())
                {
                    continue;
                }
                let Some(disk) = Disk::read(folder) else { continue };
                let mounts = match &mounts {
                    Some(mounts) => mounts,
                    None => mounts.insert(Mounts::read(self.proc())?),
                };
                let before = uses.len();
                mounts.uses_of(&disk, uses);
                for holder in class(&folder.join("holders"))? {
                    let called = fs::read_to_string(holder.join("dm/name")).ok();
                    uses.push(Use::Part {
                        device: disk.node.clone(),
                        of: Disk::read(&holder).map_or_else(|| node_called(&holder), |d| d.node),
                        called: called.map(|name| name.trim_end().to_owned()),
                    });
                    above.push(holder);
                }
                disks.push((disk, uses.len() > before));
            }
        }
        // Partitions before their disks: a disk is held where one of its partitions is or is used,
        // and that says less.
        disks.sort_by(|(a, _), (b, _)| b.folder.cmp(&a.folder));
        let mut used: Vec<PathBuf> = Vec::new();
        let mut held = Vec::new();
        for (disk, is_used) in disks {
            let is_explained = is_used || used.iter().any(|other| other.starts_with(&disk.folder));
            if !is_explained && (self.is_held)(&disk.node) {
                held.push(Use::Held { device: disk.node });
                used.push(disk.folder);
            } else if is_used {
                used.push(disk.folder);
            }
        }
        uses.extend(held.into_iter().rev());
        Ok(())
    }

    /// Where the disks of an NVMe controller are that can be reached through other ones as well:
    /// not under the function.
    fn nvme_subsystems_of(&self, function: &Path) -> Result<Vec<PathBuf>, PciError> {
        let mut subsystems = Vec::new();
        for subsystem in class(&self.root().join("class/nvme-subsystem"))? {
            if class(&subsystem)?.iter().any(|controller| controller.starts_with(function)) {
                subsystems.push(subsystem);
            }
        }
        Ok(subsystems)
    }

    fn interfaces_in_use(&self, function: &Path, uses: &mut Vec<Use>) -> Result<(), PciError> {
        for folder in class(&self.root().join("class/net"))? {
            if !folder.starts_with(function) {
                continue;
            }
            let interface = name_of(&folder);
            let flags = fs::read_to_string(folder.join("flags")).unwrap_or_default();
            let flags = flags.trim_end().trim_start_matches("0x");
            if u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & UP != 0) {
                uses.push(Use::Up { interface: interface.clone() });
            }
            if let Some(of) = link_name(&folder.join("master"))? {
                uses.push(Use::Member { interface, of });
            }
        }
        Ok(())
    }
}

/// A block device.
struct Disk {
    /// Its folder in sysfs.
    folder: PathBuf,
    /// `major:minor`.
    number: String,
    /// Its file in `/dev`.
    node: PathBuf,
}

impl Disk {
    /// `None` when it is gone.
    fn read(folder: &Path) -> Option<Self> {
        let number = fs::read_to_string(folder.join("dev")).ok()?.trim_end().to_owned();
        let events = fs::read_to_string(folder.join("uevent")).unwrap_or_default();
        let named = events.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        let node = named.map_or_else(|| node_called(folder), |name| Path::new("/dev").join(name));
        Some(Self { folder: folder.to_owned(), number, node })
    }
}

/// What is mounted and swapped to.
struct Mounts {
    mounted: Vec<Mounted>,
    swaps: Vec<PathBuf>,
}

struct Mounted {
    number: String,
    /// What was mounted; the number of some file systems (btrfs) is not that of their disk.
    source: PathBuf,
    on: PathBuf,
}

impl Mounts {
    fn read(proc: &Path) -> Result<Self, PciError> {
        let path = proc.join("self/mountinfo");
        let text = fs::read(&path).map_err(|source| PciError::Read { path, source })?;
        let mounted = text.split(|byte| *byte == b'\n').filter_map(Mounted::parse).collect();
        // A kernel without swap has no such file.
        let text = fs::read(proc.join("swaps")).unwrap_or_default();
        let files = text.split(|byte| *byte == b'\n').skip(1);
        let files = files.filter_map(|line| line.split(|byte| *byte == b' ').next());
        Ok(Self { mounted, swaps: files.map(unescape).collect() })
    }

    fn uses_of(&self, disk: &Disk, uses: &mut Vec<Use>) {
        let device = &disk.node;
        for mounted in &self.mounted {
            if mounted.number == disk.number || mounted.source == *device {
                uses.push(Use::Mounted { device: device.clone(), on: mounted.on.clone() });
            }
        }
        if self.swaps.contains(device) {
            uses.push(Use::Swap { device: device.clone() });
        }
    }
}

impl Mounted {
    /// Reads one line; proc(5) says what the words are.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|byte| *byte == b' ');
        let number = String::from_utf8(words.nth(2)?.to_owned()).ok()?;
        let on = unescape(words.nth(1)?);
        let source = unescape(words.skip_while(|word| *word != b"-").nth(2)?);
        // A link such as those of /dev/mapper.
        let source = match source.is_absolute() {
            true => fs::canonicalize(&source).unwrap_or(source),
            false => source,
        };
        Some(Self { number, source, on })
    }
}

/// A path as the kernel writes it into a table: what would break the table is in octal.
fn unescape(word: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = word;
    while let [byte, after @ ..] = rest {
        let digits = after.get(..3).filter(|_| *byte == b'\\').and_then(|d| d.as_array::<3>());
        let octal = digits
            .filter(|digits| digits.iter().all(|digit| (b'0'..b'8').contains(digit)))
            .map(|digits| digits.iter().fold(0u8, |all, digit| all * 8 + (digit - b'0')));
        bytes.push(octal.unwrap_or(*byte));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(bytes).into()
}

/// Where the links in a folder lead, in order of their names. A folder that is not there has none.
fn class(folder: &Path) -> Result<Vec<PathBuf>, PciError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(err) if err.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(PciError::Read { path: folder.to_owned(), source }),
    };
    let mut links: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    links.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    // One that leads nowhere any more is gone.
    Ok(links.iter().filter_map(|link| fs::canonicalize(link).ok()).collect())
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The file in `/dev` of a block device, from its name in sysfs, which has no slashes.
fn node_called(folder: &Path) -> PathBuf {
    Path::new("/dev").join(name_of(folder).replace('!', "/"))
}

/// Whether somebody in the kernel holds a block device: it refuses to be opened exclusively. One
/// that cannot be opened at all (no permission, no medium) counts as not held.
pub(crate) fn is_held(node: &Path) -> bool {
    let mut options = fs::OpenOptions::new();
    options.read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK);
    let refused = |err: io::Error| err.raw_os_error() == Some(Errno::EBUSY as i32);
    options.open(node).is_err_and(refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;

    const NVME: &str = "0000:01:00.0";
    const OTHER: &str = "0000:02:00.0";

    fn uses(tree: &Tree, address: &str) -> Vec<String> {
        let uses = tree.sysfs().uses_of(address.parse().unwrap()).unwrap();
        uses.iter().map(Use::to_string).collect()
    }

    /// Two functions, of which the first has a disk with two partitions.
    fn tree() -> Tree {
        let tree = Tree::new();
        tree.add(NVME, 1, 2, 0x010802, Some(3));
        tree.add(OTHER, 1, 2, 0x010802, Some(4));
        tree.add_disk(NVME, "nvme/nvme0/nvme0n1", "259:0");
        tree.add_disk(NVME, "nvme/nvme0/nvme0n1/nvme0n1p1", "259:1");
        tree.add_disk(NVME, "nvme/nvme0/nvme0n1/nvme0n1p2", "259:2");
        tree
    }

    #[test]
    fn a_disk_that_nobody_uses_is_not_in_use() {
        let tree = tree();
        tree.mount("8:1", "/dev/sda1", "/");
        assert!(uses(&tree, NVME).is_empty());
    }

    #[test]
    fn a_mounted_partition_is_named_with_each_place() {
        let tree = tree();
        tree.mount("259:1", "/dev/nvme0n1p1", "/");
        tree.mount("259:1", "/dev/root", "/var/lib/some\\040where");
        assert_eq!(
            uses(&tree, NVME),
            ["/dev/nvme0n1p1 is mounted on /", "/dev/nvme0n1p1 is mounted on /var/lib/some where"]
        );
        assert!(uses(&tree, OTHER).is_empty());
    }

    #[test]
    fn a_file_system_with_a_number_of_its_own_is_known_by_its_source() {
        let tree = tree();
        tree.mount("0:40", "/dev/nvme0n1p2", "/home");
        assert_eq!(uses(&tree, NVME), ["/dev/nvme0n1p2 is mounted on /home"]);
    }

    #[test]
    fn swap_is_named() {
        let tree = tree();
        tree.set_swaps(&["/dev/sda2", "/dev/nvme0n1p2"]);
        assert_eq!(uses(&tree, NVME), ["/dev/nvme0n1p2 is swapped to"]);
    }

    #[test]
    fn what_a_partition_is_part_of_is_followed_to_where_it_is_mounted() {
        let tree = tree();
        tree.add_made_disk("md127", "9:127");
        tree.add_made_disk("dm-0", "254:0");
        tree.name_mapped("dm-0", "vg-root");
        tree.add_holder("nvme0n1p2", "md127");
        tree.add_holder("md127", "dm-0");
        tree.mount("254:0", "/dev/mapper/vg-root", "/");
        assert_eq!(
            uses(&tree, NVME),
            [
                "/dev/nvme0n1p2 is part of /dev/md127",
                "/dev/md127 is part of /dev/dm-0 (vg-root)",
                "/dev/dm-0 is mounted on /",
            ]
        );
        let commands: Vec<_> = tree.sysfs().uses_of(NVME.parse().unwrap()).unwrap();
        let commands: Vec<_> = commands.iter().filter_map(Use::command).collect();
        assert_eq!(commands, ["mdadm --stop /dev/md127", "dmsetup remove vg-root", "umount /"]);
    }

    #[test]
    fn disks_that_hold_each_other_are_looked_at_once() {
        let tree = tree();
        tree.add_made_disk("dm-0", "254:0");
        tree.add_holder("nvme0n1p2", "dm-0");
        tree.add_holder("dm-0", "dm-0");
        assert_eq!(uses(&tree, NVME).len(), 2);
    }

    #[test]
    fn a_disk_that_several_controllers_reach_is_found_from_each() {
        let tree = Tree::new();
        for (address, controller) in [(NVME, "nvme/nvme0"), (OTHER, "nvme/nvme1")] {
            tree.add(address, 1, 2, 0x010802, None);
            tree.add_to_nvme_subsystem(address, controller);
        }
        tree.add_made_disk("nvme-subsystem/nvme-subsys0/nvme0n1", "259:0");
        tree.mount("259:0", "/dev/nvme0n1", "/data");
        assert_eq!(uses(&tree, NVME), ["/dev/nvme0n1 is mounted on /data"]);
        assert_eq!(uses(&tree, OTHER), ["/dev/nvme0n1 is mounted on /data"]);
    }

    #[test]
    fn a_disk_that_the_kernel_does_not_give_away_is_held() {
        let tree = tree();
        tree.add_disk(NVME, "nvme/nvme0/nvme0n1/nvme0n1p3", "259:3");
        let mut sysfs = tree.sysfs();
        sysfs.is_held = |node| node != Path::new("/dev/nvme0n1p2");
        let uses = |sysfs: &Sysfs| {
            let uses = sysfs.uses_of(NVME.parse().unwrap()).unwrap();
            uses.iter().map(Use::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            uses(&sysfs),
            [
                "/dev/nvme0n1p1 is held by a mount elsewhere or another program",
                "/dev/nvme0n1p3 is held by a mount elsewhere or another program",
            ],
            "and the whole disk, which says less"
        );
        tree.mount("259:1", "/dev/nvme0n1p1", "/");
        assert_eq!(
            uses(&sysfs),
            [
                "/dev/nvme0n1p1 is mounted on /",
                "/dev/nvme0n1p3 is held by a mount elsewhere or another program",
            ],
            "what is known explains it"
        );
    }

    #[test]
    fn a_network_interface_is_in_use_while_it_is_up_or_belongs_to_a_bridge() {
        let tree = Tree::new();
        tree.add(NVME, 1, 2, 0x020000, None);
        tree.add(OTHER, 1, 2, 0x020000, None);
        tree.add_interface(NVME, "eth0", 0x1002);
        tree.add_interface(OTHER, "virtio2/net/eth1", 0x1003);
        assert!(uses(&tree, NVME).is_empty());
        assert_eq!(uses(&tree, OTHER), ["network interface eth1 is up"]);

        tree.enslave(NVME, "eth0", "br0");
        assert_eq!(uses(&tree, NVME), ["network interface eth0 belongs to br0"]);
        let command = tree.sysfs().uses_of(NVME.parse().unwrap()).unwrap()[0].command();
        assert_eq!(command.as_deref(), Some("ip link set eth0 nomaster"));
    }

    #[test]
    fn a_function_that_is_not_there_is_no_such_device() {
        let err = Tree::new().sysfs().uses_of(NVME.parse().unwrap()).unwrap_err();
        assert!(matches!(err, PciError::NoSuchDevice { .. }), "{err}");
    }
}
