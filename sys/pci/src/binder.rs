//! Taking functions for iohost and giving them back, so that it can always be undone.
//!
//! Before a [`Binder`] changes anything it writes down what it is about to do and what was there
//! before, and the note is there until the last change is made. Whoever comes next, after a crash
//! or a power loss, finds it and first undoes what was begun and finishes what was to be given
//! back. What was taken and is still so is left for the daemon to take up again or give back.
//!
//! Two locks: one per IOMMU group, held while something in it changes, which one waits for; and one
//! per function, held by the process that has taken it, which nobody waits for.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use log::{info, warn};

use crate::journal::{Journal, Lock, Persist, Record, Step, Undo};
use crate::{Binding, Former, PciAddress, PciError, PciFunction, Sysfs};

/// What is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// The function.
    pub address: PciAddress,
    /// What for.
    pub binding: Binding,
    /// With every function of its IOMMU group that VFIO can take, all of them or none.
    pub group: bool,
    /// Also what the machine uses, see [`Use`](crate::Use).
    pub force: bool,
    /// So that [`Binder::left`] says so until it is given back for good.
    pub persist: bool,
}

/// A function that an earlier process left behind, by a crash or on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// The function for whose sake things were taken.
    pub address: PciAddress,
    /// Whether it is to be taken again.
    pub persist: Option<Persist>,
    /// Whether there is something to give back or to undo.
    pub is_taken: bool,
}

/// Takes functions and gives them back.
///
/// Callable from any thread; what concerns one IOMMU group is done one after the other, also
/// between processes that share a state directory.
#[derive(Debug)]
pub struct Binder {
    sysfs: Sysfs,
    journal: Journal,
    /// The functions that this process has taken.
    owned: Mutex<BTreeMap<PciAddress, Lock>>,
}

impl Binder {
    /// A binder that keeps its notes in `state_directory`, which is made when it is needed.
    pub fn new(sysfs: Sysfs, state_directory: impl Into<PathBuf>) -> Self {
        let journal = Journal::new(state_directory.into());
        Self { sysfs, journal, owned: Mutex::default() }
    }

    /// Takes what is ordered, or changes nothing.
    ///
    /// A function bound as ordered is left as it is; taking one twice is taking it once, and the
    /// second order can add its group and that it persists. What an earlier process began with the
    /// group and did not finish is undone first.
    ///
    /// - Blocks while others change something in the group, and while the present drivers let go.
    /// - Errors: `InUse` with every function in the way and its uses, checked once more right
    ///   before each function is touched; `TakenElsewhere`; `TakenWith`; `NotForGroups`; those of
    ///   [`Sysfs::bind`]; those of the state directory.
    pub fn take(&self, order: &Order) -> Result<(), PciError> {
        let Order { address, binding, .. } = *order;
        let driver = binding.driver();
        if order.group && binding != Binding::Vfio {
            return Err(PciError::NotForGroups { address, driver });
        }
        let is_bound = self.sysfs.function(address)?.driver.as_deref() == Some(driver);
        if !is_bound {
            self.sysfs.check_permission(address)?;
        }
        let known = match self.journal.read(address) {
            // An ordinary user may use what somebody bound for them, and has nothing to note.
            Err(PciError::State { .. }) if is_bound => None,
            known => known?,
        };
        if is_bound && known.is_none() && !order.group && !order.persist {
            return Ok(());
        }

        let _busy = self.lock_group_of(address)?;
        let had_it = self.own(address)?;
        let taken = self.take_locked(order);
        if taken.is_err() && !had_it {
            self.disown(address);
        }
        taken
    }

    /// Gives back what was taken for `address`, each function to the driver it had, and returns
    /// that function's. Giving back what this process has not taken, or twice, changes nothing.
    ///
    /// Whoever bound a function to yet another driver meanwhile keeps it. `for_good` also ends what
    /// [`Order::persist`] began.
    ///
    /// - Blocks while others change something in the group, and while somebody has the device open.
    /// - Errors: `NoSuchDevice`, `Permission`, `NotBound` when a former driver did
    ///   not take its function back; besides reading and writing. All but `NoSuchDevice` leave a
    ///   note, so that the next call of [`take`](Self::take) or this tries again.
    pub fn give_back(
        &self,
        address: PciAddress,
        for_good: bool,
    ) -> Result<Option<String>, PciError> {
        let is_known = self.journal.read(address).map(|record| record.is_some());
        // Also without a note of its own it can be the one for which others were taken.
        match is_known.and_then(|known| Ok(known || !self.taken_for(address)?.is_empty())) {
            Ok(false) => {
                self.disown(address);
                return Ok(None);
            }
            // Written by somebody else, so it is not ours.
            Err(PciError::State { .. }) if !self.owned().contains_key(&address) => return Ok(None),
            _ => {}
        }
        let _busy = self.lock_group_of(address)?;
        match self.own(address) {
            Err(PciError::TakenElsewhere { .. }) => return Ok(None),
            owned => owned?,
        };
        let given_back = self.give_back_locked(address, for_good);
        self.disown(address);
        // This may have been what another function of the group waited for.
        self.finish_in_group_of(address, Some(address));
        given_back
    }

    /// What earlier processes left and nobody has now, by address.
    ///
    /// Errors: those of the state directory. One that this process may not read holds nothing that
    /// it could take up.
    pub fn left(&self) -> Result<Vec<Left>, PciError> {
        let records = match self.journal.all() {
            Err(PciError::State { source, .. }) if source.kind() == ErrorKind::PermissionDenied => {
                return Ok(Vec::new());
            }
            records => records?,
        };
        let mut left: BTreeMap<PciAddress, Left> = BTreeMap::new();
        let nothing = |address| Left { address, persist: None, is_taken: false };
        for (address, record) in records {
            left.entry(address).or_insert_with(|| nothing(address)).persist = record.persist;
            if let Some(undo) = record.undo {
                let taken_for = undo.taken_for;
                left.entry(taken_for).or_insert_with(|| nothing(taken_for)).is_taken = true;
            }
        }
        left.retain(|address, left| {
            let is_something = left.is_taken || left.persist.is_some();
            is_something && !self.journal.is_owned(*address)
        });
        Ok(left.into_values().collect())
    }

    fn take_locked(&self, order: &Order) -> Result<(), PciError> {
        let Order { address, binding, .. } = *order;
        let driver = binding.driver();
        self.finish_in_group_of(address, None);

        let known = self.journal.read(address)?;
        let undo = known.as_ref().and_then(|record| record.undo.as_ref());
        if let Some(taken_for) = undo.map(|undo| undo.taken_for).filter(|other| *other != address) {
            return Err(PciError::TakenWith { address, taken_for });
        }
        let group = self.sysfs.check(address, binding)?;
        if undo.is_some_and(|undo| undo.driver != driver) {
            // By way of its former driver, so that a note has one driver of ours to know.
            self.give_back_locked(address, false)?;
        }
        let mut functions = vec![address];
        if let Some(group) = &group {
            if order.group {
                let others = group.members.iter().filter(|member| member.goes_with_its_group());
                let others = others.map(|member| member.address);
                functions.extend(others.filter(|other| *other != address));
            }
            group.check_without(&functions)?;
        }
        let mut to_move = Vec::new();
        for function in functions {
            let present = self.sysfs.function(function)?;
            if present.driver.as_deref() == Some(driver) {
                continue;
            }
            self.sysfs.check_permission(function)?;
            let record = self.journal.read(function)?;
            let undo = record.as_ref().and_then(|record| record.undo.as_ref());
            if let Some(taken_for) = undo.map(|undo| undo.taken_for).filter(|t| *t != address) {
                return Err(PciError::TakenWith { address: function, taken_for });
            }
            let former = before_us(present, undo);
            to_move.push((former, record.and_then(|record| record.persist)));
        }
        self.check_uses(to_move.iter().map(|(former, _)| former.address), order.force)?;

        let boot = self.boot()?;
        let note = |former: &Former, persist, step| {
            let undo = Undo {
                boot: boot.clone(),
                step,
                taken_for: address,
                driver: driver.to_owned(),
                former: former.clone(),
            };
            self.journal.write(former.address, &Record { persist, undo: Some(undo) })
        };
        let moved = (|| {
            for (former, persist) in &to_move {
                note(former, *persist, Step::Taking)?;
            }
            for (former, _) in &to_move {
                if !order.force {
                    // Right before: somebody may have mounted it since.
                    self.check_uses([former.address], false)?;
                }
                self.sysfs.move_to(former.address, driver)?;
            }
            to_move.iter().try_for_each(|(former, persist)| note(former, *persist, Step::Taken))
        })();
        if let Err(err) = moved {
            // The first error is the one that explains. What cannot be put back has a note.
            for (former, _) in to_move.iter().rev() {
                if let Err(err) = self.put_back(former.address, false) {
                    warn!(device:% = former.address, error:% = err; "not put back yet");
                }
            }
            return Err(err);
        }
        for (former, _) in &to_move {
            let from = former.driver.as_deref().unwrap_or("none");
            info!(device:% = former.address, former = from; "bound to {driver}");
        }
        if order.persist {
            let mut record =
                self.journal.read(address)?.unwrap_or(Record { persist: None, undo: None });
            let is_group = order.group || record.persist == Some(Persist::Group);
            record.persist = Some(if is_group { Persist::Group } else { Persist::Function });
            self.journal.write(address, &record)?;
        }
        Ok(())
    }

    fn give_back_locked(
        &self,
        address: PciAddress,
        for_good: bool,
    ) -> Result<Option<String>, PciError> {
        let noted = self.journal.read(address)?;
        if let Some(record) = noted.filter(|record| for_good && record.persist.is_some()) {
            self.journal.write(address, &Record { persist: None, ..record })?;
        }
        let mut functions = self.taken_for(address)?;
        // All of them before the first: from here on there is only one way to go.
        for (function, record) in &mut functions {
            if let Some(undo) = &mut record.undo {
                undo.step = Step::GivingBack;
                self.journal.write(*function, record)?;
            }
        }
        let former = functions.iter().find(|(function, _)| *function == address);
        let former = former.and_then(|(_, record)| record.undo.clone());
        let mut result = Ok(former.and_then(|undo| undo.former.driver));
        for (function, _) in functions {
            if let Err(err) = self.put_back(function, true) {
                warn!(device:% = function, error:% = err; "not given back");
                result = result.and(Err(err));
            }
        }
        result
    }

    /// Undoes and finishes what concerns the group of a function and was left half done. What
    /// cannot be is tried again next time, and somebody who lives has it under way.
    fn finish_in_group_of(&self, address: PciAddress, but: Option<PciAddress>) {
        let finish = || -> Result<(), PciError> {
            let group: Vec<PciAddress> = match self.sysfs.group_of(address) {
                Ok(group) => group.members.iter().map(|member| member.address).collect(),
                Err(_) => vec![address],
            };
            group.iter().for_each(|function| self.journal.tidy(*function));
            let mut sets: BTreeMap<PciAddress, bool> = BTreeMap::new();
            for (function, record) in self.journal.all()? {
                let Some(undo) = record.undo.filter(|_| group.contains(&function)) else {
                    continue;
                };
                let is_over = undo.step == Step::Taken && undo.boot == self.boot()?;
                *sets.entry(undo.taken_for).or_default() |= !is_over;
            }
            for (taken_for, is_unfinished) in sets {
                if !is_unfinished || Some(taken_for) == but {
                    continue;
                }
                let is_ours = taken_for == address && but.is_none();
                // Held until it is done, unless it is ours anyway.
                let _owner = match is_ours {
                    true => None,
                    false if self.owned().contains_key(&taken_for) => continue,
                    false => match self.journal.own(taken_for) {
                        Ok(lock) => Some(lock),
                        Err(_) => continue,
                    },
                };
                info!(device:% = taken_for; "undoing what was left half done");
                self.give_back_locked(taken_for, false)?;
            }
            Ok(())
        };
        if let Err(err) = finish() {
            warn!(device:% = address, error:% = err; "something left half done stays so");
        }
    }

    /// Puts one function back as its note says and takes the note away.
    fn put_back(&self, address: PciAddress, is_asked: bool) -> Result<(), PciError> {
        let Some(record) = self.journal.read(address)? else { return Ok(()) };
        let Some(undo) = &record.undo else { return Ok(()) };
        let done = Record { persist: record.persist, undo: None };
        if undo.boot != self.boot()? {
            return self.journal.write(address, &done);
        }
        let present = match self.sysfs.function(address) {
            Err(err @ PciError::NoSuchDevice { .. }) => {
                self.journal.write(address, &done)?;
                return if is_asked { Err(err) } else { Ok(()) };
            }
            present => present?,
        };
        let is_foreign = present.driver.as_ref().is_some_and(|driver| {
            *driver != undo.driver && Some(driver) != undo.former.driver.as_ref()
        });
        if is_foreign {
            let driver = present.driver.as_deref().unwrap_or_default();
            warn!(device:% = address, driver = driver; "bound by somebody else since, left alone");
        } else {
            self.sysfs.restore(&undo.former)?;
        }
        self.journal.write(address, &done)
    }

    /// The functions taken for one, that one first.
    fn taken_for(&self, address: PciAddress) -> Result<Vec<(PciAddress, Record)>, PciError> {
        let mut functions = self.journal.all()?;
        functions.retain(|(_, record)| {
            record.undo.as_ref().is_some_and(|undo| undo.taken_for == address)
        });
        functions.sort_by_key(|(function, _)| *function != address);
        Ok(functions)
    }

    fn check_uses(
        &self,
        functions: impl IntoIterator<Item = PciAddress>,
        force: bool,
    ) -> Result<(), PciError> {
        let mut in_use = Vec::new();
        for function in functions {
            let uses = self.sysfs.uses_of(function)?;
            if !uses.is_empty() {
                in_use.push((function, uses));
            }
        }
        if in_use.is_empty() {
            return Ok(());
        }
        let err = PciError::InUse { functions: in_use };
        if force {
            warn!("taken by force: {err}");
            return Ok(());
        }
        Err(err)
    }

    /// Waits until nobody else changes something in the group of a function. One that is not in a
    /// group, or not there, is a group of its own.
    fn lock_group_of(&self, address: PciAddress) -> Result<Lock, PciError> {
        match self.sysfs.function(address) {
            Ok(function) if function.iommu_group.is_some() => {
                let group = function.iommu_group.unwrap_or_default();
                self.journal.lock(&format!("group-{group}"))
            }
            _ => self.journal.lock(&format!("function-{address}")),
        }
    }

    /// Makes this process the one that has a function; says whether it was already.
    fn own(&self, address: PciAddress) -> Result<bool, PciError> {
        let mut owned = self.owned();
        if owned.contains_key(&address) {
            return Ok(true);
        }
        owned.insert(address, self.journal.own(address)?);
        Ok(false)
    }

    fn disown(&self, address: PciAddress) {
        self.owned().remove(&address);
    }

    fn owned(&self) -> MutexGuard<'_, BTreeMap<PciAddress, Lock>> {
        // A map of locks is whole after every single operation.
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What names this boot of the machine (random(4)).
    fn boot(&self) -> Result<String, PciError> {
        let path = self.sysfs.proc().join("sys/kernel/random/boot_id");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim_end().to_owned()),
            Err(source) => Err(PciError::Read { path, source }),
        }
    }
}

/// How a function was bound before we came, which is not what we made of it since.
fn before_us(present: PciFunction, undo: Option<&Undo>) -> Former {
    let PciFunction { address, driver, driver_override, .. } = present;
    let Some(undo) = undo else { return Former { address, driver, driver_override } };
    let is_ours = |name: &Option<String>| name.as_ref().is_none_or(|name| *name == undo.driver);
    Former {
        address,
        driver: if is_ours(&driver) { undo.former.driver.clone() } else { driver },
        driver_override: match is_ours(&driver_override) {
            true => undo.former.driver_override.clone(),
            false => driver_override,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::tree::{Tree, count_changes, stop_at_change};

    const EDU: &str = "0000:01:00.0";
    const NVME: &str = "0000:01:00.1";
    const BRIDGE: &str = "0000:00:1c.0";

    fn at(address: &str) -> PciAddress {
        address.parse().unwrap()
    }

    fn order(address: &str) -> Order {
        let binding = Binding::Vfio;
        Order { address: at(address), binding, group: false, force: false, persist: false }
    }

    /// Group 3: a bridge, `edu` with a driver and an override, `nvme`.
    fn group() -> Tree {
        let tree = Tree::new();
        tree.load("vfio-pci");
        tree.load("uio_pci_generic");
        tree.add(BRIDGE, 1, 2, 0x060400, Some(3));
        tree.bind(BRIDGE, Some("pcieport"));
        tree.add(EDU, 0x1234, 0x11e8, 0x00ff00, Some(3));
        tree.bind(EDU, Some("edu_driver"));
        tree.set(EDU, "driver_override", "edu_driver\n");
        tree.add(NVME, 1, 2, 0x010802, Some(3));
        tree.bind(NVME, Some("nvme"));
        tree
    }

    /// Group 3 with `edu` alone.
    fn alone() -> Tree {
        let tree = Tree::new();
        tree.load("vfio-pci");
        tree.load("uio_pci_generic");
        tree.add(EDU, 0x1234, 0x11e8, 0x00ff00, Some(3));
        tree.bind(EDU, Some("edu_driver"));
        tree
    }

    fn binder(tree: &Tree) -> Binder {
        let mut binder = Binder::new(tree.sysfs(), tree.state());
        binder.journal.before_change = count_changes;
        binder
    }

    /// Driver and override of every function.
    fn bindings(tree: &Tree) -> Vec<(String, Option<String>, Option<String>)> {
        let functions = tree.sysfs().functions().unwrap().into_iter();
        functions.map(|f| (f.address.to_string(), f.driver, f.driver_override)).collect()
    }

    fn driver(tree: &Tree, address: &str) -> Option<String> {
        tree.sysfs().function(at(address)).unwrap().driver
    }

    fn records(tree: &Tree) -> usize {
        binder(tree).journal.all().unwrap().len()
    }

    #[test]
    fn a_function_is_taken_once_however_often_and_given_back_once() {
        let tree = alone();
        let before = bindings(&tree);
        let binder = binder(&tree);
        binder.take(&order(EDU)).unwrap();
        let taken = bindings(&tree);
        binder.take(&order(EDU)).unwrap();
        assert_eq!(bindings(&tree), taken);
        assert_eq!(driver(&tree, EDU).as_deref(), Some("vfio-pci"));
        assert_eq!(records(&tree), 1);

        assert_eq!(binder.give_back(at(EDU), true).unwrap().as_deref(), Some("edu_driver"));
        assert_eq!(bindings(&tree), before);
        assert_eq!(records(&tree), 0);
        assert_eq!(binder.give_back(at(EDU), true).unwrap(), None);
        assert_eq!(bindings(&tree), before);
    }

    #[test]
    fn a_function_somebody_else_bound_needs_no_state_directory_and_is_never_given_back() {
        let tree = alone();
        tree.bind(EDU, None);
        tree.sysfs().bind(at(EDU), Binding::Vfio).unwrap();
        let binder = Binder::new(tree.sysfs(), "/proc/no/such/place");
        binder.take(&order(EDU)).unwrap();
        assert_eq!(binder.give_back(at(EDU), true).unwrap(), None);
        assert_eq!(driver(&tree, EDU).as_deref(), Some("vfio-pci"));
    }

    #[test]
    fn a_whole_group_is_taken_but_for_its_bridge_and_given_back() {
        let tree = group();
        let before = bindings(&tree);
        let binder = binder(&tree);
        let err = binder.take(&order(EDU)).unwrap_err();
        assert!(matches!(err, PciError::GroupNotViable { .. }), "{err}");
        assert!(err.next_step().contains("--group"), "{}", err.next_step());

        binder.take(&Order { group: true, ..order(EDU) }).unwrap();
        assert_eq!(driver(&tree, EDU).as_deref(), Some("vfio-pci"));
        assert_eq!(driver(&tree, NVME).as_deref(), Some("vfio-pci"));
        assert_eq!(driver(&tree, BRIDGE).as_deref(), Some("pcieport"));
        let err = binder.take(&order(NVME)).unwrap_err();
        assert!(matches!(err, PciError::TakenWith { .. }), "{err}");
        assert_eq!(err.next_step(), format!("give both back first: iohost unbind {EDU}"));

        binder.give_back(at(EDU), true).unwrap();
        assert_eq!(bindings(&tree), before);
        assert_eq!(records(&tree), 0);
    }

    #[test]
    fn a_group_of_which_one_function_refuses_is_as_it_was() {
        let tree = group();
        let before = bindings(&tree);
        tree.set(NVME, "refused_by", "vfio-pci");
        let err = binder(&tree).take(&Order { group: true, ..order(EDU) }).unwrap_err();
        assert!(matches!(err, PciError::NotBound { address, .. } if address == at(NVME)), "{err}");
        assert_eq!(bindings(&tree), before);
        assert_eq!(records(&tree), 0);
    }

    #[test]
    fn functions_in_use_are_refused_with_each_use_and_taken_by_force() {
        let tree = group();
        tree.add_disk(NVME, "nvme/nvme0/nvme0n1", "259:0");
        tree.mount("259:0", "/dev/nvme0n1", "/data");
        tree.add_interface(EDU, "net/eth0", 0x1003);
        let before = bindings(&tree);
        let whole = Order { group: true, ..order(EDU) };
        let err = binder(&tree).take(&whole).unwrap_err();
        assert_eq!(
            err.to_string(),
            "PCI device 0000:01:00.0 is in use: network interface eth0 is up; PCI device \
             0000:01:00.1 is in use: /dev/nvme0n1 is mounted on /data"
        );
        assert_eq!(
            err.next_step(),
            "end that first: ip link set eth0 down; umount /data; or take it all the same with \
             --force, which breaks whatever uses it"
        );
        assert_eq!(bindings(&tree), before);
        assert_eq!(records(&tree), 0);

        binder(&tree).take(&Order { force: true, ..whole }).unwrap();
        assert_eq!(driver(&tree, NVME).as_deref(), Some("vfio-pci"));
    }

    #[test]
    fn what_is_mounted_in_the_last_moment_is_not_taken() {
        let tree = alone();
        tree.add_disk(EDU, "nvme/nvme0/nvme0n1", "259:0");
        let before = bindings(&tree);
        thread_local! { static MOUNTS: std::cell::RefCell<Option<PathBuf>> = Default::default(); }
        MOUNTS.set(Some(tree.sysfs().proc().join("self/mountinfo")));
        let mut binder = binder(&tree);
        // The note is written after everything was looked at.
        binder.journal.before_change = || {
            if let Some(path) = MOUNTS.take() {
                fs::write(path, "36 35 259:0 / /data rw - ext4 /dev/nvme0n1 rw\n").unwrap();
            }
        };
        let err = binder.take(&order(EDU)).unwrap_err();
        assert!(matches!(err, PciError::InUse { .. }), "{err}");
        assert_eq!(bindings(&tree), before);
        assert_eq!(records(&tree), 0);
    }

    #[test]
    fn what_another_process_has_is_refused_and_left_alone() {
        let tree = alone();
        let first = binder(&tree);
        first.take(&order(EDU)).unwrap();
        let taken = bindings(&tree);
        let second = binder(&tree);
        assert_eq!(second.left().unwrap(), []);
        let pid = std::process::id();
        let err = second.take(&order(EDU)).unwrap_err();
        assert_eq!(
            err.to_string(),
            format!("PCI device 0000:01:00.0 is taken by another iohost, process {pid}")
        );
        assert_eq!(second.give_back(at(EDU), true).unwrap(), None);
        assert_eq!(bindings(&tree), taken);

        drop(first); // as its process ends, however it does
        let left = Left { address: at(EDU), persist: None, is_taken: true };
        assert_eq!(second.left().unwrap(), [left]);
        second.take(&order(EDU)).unwrap();
        second.give_back(at(EDU), true).unwrap();
        assert_eq!(driver(&tree, EDU).as_deref(), Some("edu_driver"));
    }

    #[test]
    fn changes_in_one_group_wait_for_each_other() {
        let tree = alone();
        let one = binder(&tree);
        let busy = one.lock_group_of(at(EDU)).unwrap();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| binder(&tree).take(&order(EDU)));
            // It cannot have begun: a note would be the first of it.
            while !waits_for_a_lock() {
                assert!(!other.is_finished());
                std::thread::yield_now();
            }
            assert_eq!(records(&tree), 0);
            drop(busy);
            other.join().unwrap().unwrap();
        });
        assert_eq!(records(&tree), 1);
    }

    /// Whether a lock of this process is waited for (proc(5), `/proc/locks`).
    fn waits_for_a_lock() -> bool {
        let pid = std::process::id().to_string();
        let locks = fs::read_to_string("/proc/locks").unwrap();
        locks.lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            words.next() == Some("->") && words.any(|word| word == pid)
        })
    }

    #[test]
    fn a_function_taken_for_vfio_and_then_for_uio_goes_back_to_its_first_driver() {
        let tree = alone();
        let before = bindings(&tree);
        let binder = binder(&tree);
        binder.take(&order(EDU)).unwrap();
        binder.take(&Order { binding: Binding::Uio, ..order(EDU) }).unwrap();
        assert_eq!(driver(&tree, EDU).as_deref(), Some("uio_pci_generic"));
        binder.give_back(at(EDU), true).unwrap();
        assert_eq!(bindings(&tree), before);
    }

    #[test]
    fn a_group_is_only_for_vfio() {
        let tree = alone();
        let uio = Order { binding: Binding::Uio, group: true, ..order(EDU) };
        let err = binder(&tree).take(&uio).unwrap_err();
        assert!(matches!(err, PciError::NotForGroups { .. }), "{err}");
    }

    #[test]
    fn whoever_bound_it_to_yet_another_driver_keeps_it() {
        let tree = alone();
        let binder = binder(&tree);
        binder.take(&order(EDU)).unwrap();
        tree.rebind(EDU, "somebodys_driver");
        let theirs = bindings(&tree);
        assert_eq!(binder.give_back(at(EDU), true).unwrap().as_deref(), Some("edu_driver"));
        assert_eq!(bindings(&tree), theirs);
        assert_eq!(records(&tree), 0);
    }

    #[test]
    fn what_cannot_be_given_back_yet_is_tried_again() {
        let tree = alone();
        let before = bindings(&tree);
        let binder = binder(&tree);
        binder.take(&order(EDU)).unwrap();
        tree.set(EDU, "refused_by", "edu_driver");
        let err = binder.give_back(at(EDU), true).unwrap_err();
        assert!(matches!(err, PciError::NotBound { .. }), "{err}");
        assert_eq!(records(&tree), 1);

        tree.set(EDU, "refused_by", "");
        binder.give_back(at(EDU), true).unwrap();
        assert_eq!(bindings(&tree), before);
        assert_eq!(records(&tree), 0);
    }

    #[test]
    fn what_was_half_taken_is_undone_before_another_function_of_the_group_is_taken() {
        let tree = group();
        let uio = |address| Order { binding: Binding::Uio, ..order(address) };
        let before = tree.sysfs().function(at(NVME)).unwrap();
        let first = binder(&tree);
        stop_at_change(Some(4)); // the note, the override, unbound, and not yet bound
        catch_unwind(AssertUnwindSafe(|| first.take(&uio(NVME)))).unwrap_err();
        stop_at_change(None);
        drop(first);
        assert_eq!(driver(&tree, NVME), None);

        binder(&tree).take(&uio(EDU)).unwrap();
        assert_eq!(tree.sysfs().function(at(NVME)).unwrap(), before);
        assert_eq!(records(&tree), 1);
    }

    #[test]
    fn what_was_wholly_taken_stays_so_when_another_function_of_the_group_is_taken() {
        let tree = group();
        let uio = |address| Order { binding: Binding::Uio, ..order(address) };
        binder(&tree).take(&uio(NVME)).unwrap();
        binder(&tree).take(&uio(EDU)).unwrap();
        assert_eq!(driver(&tree, NVME).as_deref(), Some("uio_pci_generic"));
        assert_eq!(records(&tree), 2);
    }

    #[test]
    fn what_could_not_be_given_back_is_when_another_function_of_the_group_was() {
        let tree = group();
        let before = bindings(&tree);
        let binder = binder(&tree);
        for address in [EDU, NVME] {
            binder.take(&Order { binding: Binding::Uio, ..order(address) }).unwrap();
        }
        tree.set(NVME, "refused_by", "nvme");
        binder.give_back(at(NVME), true).unwrap_err();
        tree.set(NVME, "refused_by", "");
        binder.give_back(at(EDU), true).unwrap();
        assert_eq!(bindings(&tree), before);
        assert_eq!(records(&tree), 0);
    }

    #[test]
    fn what_persists_is_left_until_it_is_given_back_for_good() {
        let tree = alone();
        let before = bindings(&tree);
        let binder = binder(&tree);
        binder.take(&Order { persist: true, ..order(EDU) }).unwrap();
        binder.give_back(at(EDU), false).unwrap();
        assert_eq!(bindings(&tree), before);
        let left = |is_taken| Left { address: at(EDU), persist: Some(Persist::Function), is_taken };
        assert_eq!(binder.left().unwrap(), [left(false)]);

        binder.take(&Order { persist: true, ..order(EDU) }).unwrap();
        drop(binder);
        let binder = self::binder(&tree);
        assert_eq!(binder.left().unwrap(), [left(true)]);
        binder.give_back(at(EDU), true).unwrap();
        assert_eq!(binder.left().unwrap(), []);
        assert_eq!(bindings(&tree), before);
    }

    #[test]
    fn after_a_boot_nothing_is_undone_and_what_persists_is_taken_anew() {
        let tree = group();
        let before = bindings(&tree);
        binder(&tree).take(&Order { group: true, persist: true, ..order(EDU) }).unwrap();
        tree.boot("another");
        let booted = bindings(&tree);
        assert_ne!(booted, before, "the override of its administrator is gone, too");

        let binder = binder(&tree);
        let persist = Some(Persist::Group);
        assert_eq!(binder.left().unwrap(), [Left { address: at(EDU), persist, is_taken: true }]);
        binder.take(&Order { group: true, ..order(EDU) }).unwrap();
        assert_eq!(driver(&tree, NVME).as_deref(), Some("vfio-pci"));
        binder.give_back(at(EDU), true).unwrap();
        assert_eq!(bindings(&tree), booted);
        assert_eq!(records(&tree), 0);
    }

    #[test]
    fn a_state_file_that_makes_no_sense_stands_in_its_own_functions_way_only() {
        let tree = group();
        let file = tree.state().join(format!("{NVME}.json"));
        let whole = Order { group: true, ..order(EDU) };
        fs::create_dir_all(tree.state()).unwrap();
        fs::write(&file, "{").unwrap();
        let err = binder(&tree).take(&whole).unwrap_err();
        assert!(matches!(err, PciError::StateMalformed { .. }), "{err}");
        assert!(err.next_step().ends_with(&format!("rm {}", file.display())));
        assert_eq!(binder(&tree).left().unwrap(), []);

        tree.rebind(NVME, "vfio-pci");
        binder(&tree).take(&order(EDU)).unwrap();
        binder(&tree).give_back(at(EDU), true).unwrap();
    }

    #[test]
    fn a_state_directory_that_cannot_be_written_refuses_before_anything_is_touched() {
        let tree = alone();
        let before = bindings(&tree);
        let err = Binder::new(tree.sysfs(), "/proc/iohost").take(&order(EDU)).unwrap_err();
        assert!(matches!(err, PciError::State { .. }), "{err}");
        assert!(err.next_step().contains("state_directory"));
        assert_eq!(bindings(&tree), before);
    }

    #[test]
    fn a_device_that_vanished_is_forgotten() {
        let tree = alone();
        let binder = binder(&tree);
        binder.take(&order(EDU)).unwrap();
        fs::remove_dir_all(tree.sysfs().directory(at(EDU))).unwrap();
        let err = binder.give_back(at(EDU), true).unwrap_err();
        assert!(matches!(err, PciError::NoSuchDevice { .. }), "{err}");
        assert_eq!(records(&tree), 0);
    }

    /// What is stopped in the middle: what came before it, and itself.
    type Scenario = (&'static str, fn() -> Tree, fn(&Binder), fn(&Binder) -> Result<(), PciError>);

    const SCENARIOS: [Scenario; 6] = [
        ("take", alone, |_| (), |binder| binder.take(&order(EDU))),
        (
            "take to persist",
            alone,
            |_| (),
            |binder| binder.take(&Order { persist: true, ..order(EDU) }),
        ),
        (
            "take the group",
            group,
            |_| (),
            |binder| binder.take(&Order { group: true, ..order(EDU) }),
        ),
        (
            "take for another driver",
            alone,
            |binder| binder.take(&order(EDU)).unwrap(),
            |binder| binder.take(&Order { binding: Binding::Uio, ..order(EDU) }),
        ),
        (
            "give back",
            alone,
            |binder| binder.take(&Order { persist: true, ..order(EDU) }).unwrap(),
            |binder| binder.give_back(at(EDU), true).map(drop),
        ),
        (
            "give back the group",
            group,
            |binder| binder.take(&Order { group: true, ..order(EDU) }).unwrap(),
            |binder| binder.give_back(at(EDU), true).map(drop),
        ),
    ];

    /// Runs every scenario, each time stopped at the next of its changes until it comes through,
    /// and calls `then` with what it left and how it was before.
    fn stopped_at_each_change(
        then: impl Fn(&str, &Tree, Vec<(String, Option<String>, Option<String>)>),
    ) {
        for (name, tree, prepare, run) in SCENARIOS {
            for change in 0.. {
                let tree = tree();
                let before = bindings(&tree);
                let binder = binder(&tree);
                prepare(&binder);
                stop_at_change(Some(change));
                let ran = catch_unwind(AssertUnwindSafe(|| run(&binder)));
                stop_at_change(None);
                drop(binder); // with its locks, as the kernel does
                then(&format!("{name}, stopped at change {change}"), &tree, before);
                if ran.is_ok() {
                    assert!(change > 3, "{name} has only {change} changes");
                    break;
                }
            }
        }
    }

    #[test]
    fn stopped_at_any_change_the_next_run_gives_everything_back() {
        stopped_at_each_change(|when, tree, before| {
            let next = binder(tree);
            for left in next.left().unwrap() {
                next.give_back(left.address, true).unwrap();
            }
            assert_eq!(bindings(tree), before, "{when}");
            assert_eq!(records(tree), 0, "{when}");
        });
    }

    #[test]
    fn stopped_at_any_change_the_next_run_takes_what_is_asked_and_can_still_undo_it() {
        stopped_at_each_change(|when, tree, before| {
            let next = binder(tree);
            next.take(&Order { group: true, ..order(EDU) }).unwrap();
            for function in tree.sysfs().functions().unwrap() {
                let is_bridge = function.address == at(BRIDGE);
                let expected = if is_bridge { "pcieport" } else { "vfio-pci" };
                assert_eq!(function.driver.as_deref(), Some(expected), "{when}");
            }
            next.give_back(at(EDU), true).unwrap();
            assert_eq!(bindings(tree), before, "{when}");
            assert_eq!(records(tree), 0, "{when}");
        });
    }

    #[test]
    fn stopped_at_any_change_by_a_power_loss_the_next_run_touches_nothing_and_forgets() {
        stopped_at_each_change(|when, tree, _| {
            tree.boot("another");
            let booted = bindings(tree);
            let mut sysfs = tree.sysfs();
            sysfs.write = |path, _| panic!("nothing is to be written, but {path:?} is");
            let next = Binder::new(sysfs, tree.state());
            for left in next.left().unwrap() {
                next.give_back(left.address, true).unwrap();
            }
            assert_eq!(bindings(tree), booted, "{when}");
            assert_eq!(records(tree), 0, "{when}");
        });
    }
}
