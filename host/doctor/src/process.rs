//! What processes may do, and what they have open.
//!
//! Source: proc(5), capabilities(7).

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};

use crate::facts::{Opener, Root, Subject};

/// Source: Linux, `include/uapi/linux/capability.h`.
const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_IPC_LOCK: u32 = 14;

/// Who would open devices: process `daemon`, or else this one.
///
/// What cannot be read of a process is what it would be for a user without any rights.
pub(crate) fn subject(root: &Root, daemon: Option<u32>) -> Subject {
    let pid = daemon.unwrap_or_else(std::process::id);
    let status = root.text(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        let mut lines = status.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or_default().trim()
    };
    let numbers = |name: &str| -> Vec<u32> {
        field(name).split_whitespace().filter_map(|number| number.parse().ok()).collect()
    };
    // Real, effective, saved, and that of the file system.
    let uid = numbers("Uid").get(1).copied().unwrap_or(u32::MAX);
    let mut gids = numbers("Groups");
    gids.extend(numbers("Gid").get(1));
    let capabilities = u64::from_str_radix(field("CapEff"), 16).unwrap_or(0);
    let limits = root.text(format!("/proc/{pid}/limits")).unwrap_or_default();
    let (memlock, memlock_hard) = locked_memory(&limits);
    Subject {
        pid,
        is_daemon: daemon.is_some(),
        uid,
        user: user_name(uid),
        gids,
        opens_all_files: capabilities >> CAP_DAC_OVERRIDE & 1 != 0,
        locks_all_memory: capabilities >> CAP_IPC_LOCK & 1 != 0,
        memlock,
        memlock_hard,
    }
}

/// How much memory this process, and those that it starts, may lock; `None`: as much as there is.
pub fn may_lock() -> Option<u64> {
    let subject = subject(&Root::new(Path::new("/")), None);
    subject.memlock.filter(|_| !subject.locks_all_memory)
}

/// The soft and the hard limit, in bytes.
fn locked_memory(limits: &str) -> (Option<u64>, Option<u64>) {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let mut numbers = line.unwrap_or_default().split_whitespace().map(|word| word.parse().ok());
    (numbers.next().flatten(), numbers.next().flatten())
}

fn user_name(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}

impl Subject {
    /// Whether its permissions let it open a file for writing, and for reading where `reads`.
    ///
    /// Access control lists are not looked at: who has rights by one of them is told to need some.
    pub(crate) fn may_write(&self, file: &Metadata) -> bool {
        const WRITE: u32 = 0o2;
        self.has(file, WRITE)
    }

    /// The same for reading and writing.
    pub(crate) fn may_open(&self, file: &Metadata) -> bool {
        const READ_AND_WRITE: u32 = 0o6;
        self.has(file, READ_AND_WRITE)
    }

    fn has(&self, file: &Metadata, bits: u32) -> bool {
        let shift = match () {
            () if self.opens_all_files => return true,
            () if file.uid() == self.uid => 6,
            () if self.gids.contains(&file.gid()) => 3,
            () => 0,
        };
        file.mode() >> shift & bits == bits
    }
}

/// The processes that have nodes of devices open.
pub(crate) struct Processes {
    by_node: BTreeMap<PathBuf, Vec<(u32, String)>>,
}

impl Processes {
    /// Looks through the descriptors of every process that this one may look at.
    pub(crate) fn with_devices_open(root: &Root) -> Self {
        let mut by_node: BTreeMap<PathBuf, Vec<(u32, String)>> = BTreeMap::new();
        let pids = root.names("/proc").into_iter().filter_map(|name| name.parse::<u32>().ok());
        for pid in pids {
            let descriptors = fs::read_dir(root.at(format!("/proc/{pid}/fd")));
            let mut nodes: Vec<PathBuf> = descriptors
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
                .filter(|target| is_of_a_device(target))
                .collect();
            nodes.sort();
            nodes.dedup();
            for node in nodes {
                let name = root.text(format!("/proc/{pid}/comm")).unwrap_or_default();
                by_node.entry(node).or_default().push((pid, name));
            }
        }
        Self { by_node }
    }

    /// Those that have `node` open.
    pub(crate) fn of<'a>(&'a self, node: &'a Path) -> impl Iterator<Item = Opener> + 'a {
        let processes = self.by_node.get(node).into_iter().flatten();
        processes.map(|(pid, name)| Opener { pid: *pid, name: name.clone(), node: node.to_owned() })
    }
}

fn is_of_a_device(target: &Path) -> bool {
    let is_uio = |target: &Path| {
        let number = target.to_str().and_then(|target| target.strip_prefix("/dev/uio"));
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    };
    target.starts_with("/dev/vfio") || is_uio(target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;

    #[test]
    fn a_process_is_read_with_its_rights_and_limits() {
        let tree = Tree::new();
        tree.process(41, "iohost", 4242, 0x0000_0000_0000_4002, Some((65536, 8388608)));
        let subject = subject(&tree.place(), Some(41));
        assert!(subject.is_daemon && subject.opens_all_files && subject.locks_all_memory);
        assert_eq!((subject.uid, subject.user.as_str()), (4242, "4242"));
        assert_eq!((subject.memlock, subject.memlock_hard), (Some(65536), Some(8388608)));
        assert_eq!(subject.gids, [10, 11, 4242]);

        tree.process(42, "iohost", 4242, 0, None);
        let subject = super::subject(&tree.place(), Some(42));
        assert!(!subject.opens_all_files && !subject.locks_all_memory);
        assert_eq!((subject.memlock, subject.memlock_hard), (None, None));
    }

    #[test]
    fn permissions_are_those_of_the_owner_else_of_the_group_else_of_all() {
        let tree = Tree::new();
        tree.write("file", "");
        let file = |mode| {
            use std::os::unix::fs::PermissionsExt;
            let path = tree.place().at("/file");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            fs::metadata(path).unwrap()
        };
        let owner = file(0o600).uid();
        let group = file(0o600).gid();
        let mut somebody = subject(&tree.place(), Some(1));
        assert!(!somebody.may_open(&file(0o660)));
        assert!(somebody.may_open(&file(0o606)));
        assert!(somebody.may_write(&file(0o602)) && !somebody.may_open(&file(0o602)));
        somebody.gids = vec![group];
        assert!(somebody.may_open(&file(0o660)) && !somebody.may_open(&file(0o606)));
        somebody.uid = owner;
        assert!(somebody.may_open(&file(0o600)) && !somebody.may_open(&file(0o066)));
        somebody.opens_all_files = true;
        assert!(somebody.may_open(&file(0o000)));
    }

    #[test]
    fn whoever_has_a_node_of_vfio_or_uio_open_is_found() {
        let tree = Tree::new();
        tree.process(7, "qemu", 4242, 0, None);
        for target in ["/dev/vfio/3", "/dev/vfio/3", "/dev/uio0", "/dev/null", "/dev/uiofoo"] {
            tree.opens(7, target);
        }
        let processes = Processes::with_devices_open(&tree.place());
        let qemu = |node: &str| Opener { pid: 7, name: "qemu".to_owned(), node: node.into() };
        for node in ["/dev/vfio/3", "/dev/uio0"] {
            let found: Vec<_> = processes.of(Path::new(node)).collect();
            assert_eq!(found, [qemu(node)]);
        }
        assert_eq!(processes.by_node.len(), 2);
    }
}
