//! What iohost has taken, on disk: how to undo it after a crash or a power loss.
//!
//! One file per function, in the state directory, from before the first change of the function
//! until after the last. A file is replaced whole and is on the disk before the call returns.
//! Locks are files beside them, which the kernel unlocks with the process that holds them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use log::error;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::{Former, PciAddress, PciError};

/// How often, and how soon again, a function is found to be somebody else's before that is so.
const LOOKS: u32 = 5;
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What is known of one function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// Whether it is to be taken again by the next daemon.
    pub(crate) persist: Option<Persist>,
    /// How it is given back; `None` while it is as it was.
    pub(crate) undo: Option<Undo>,
}

/// What the next daemon takes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Persist {
    /// The function.
    Function,
    /// The function with its whole IOMMU group.
    Group,
}

/// How a function is given back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Undo {
    /// The boot in which it was taken. The kernel forgets bindings at the next one.
    pub(crate) boot: String,
    pub(crate) step: Step,
    /// The function for whose sake it was taken: itself, or another one of its group. Those taken
    /// for the same one are taken and given back together.
    pub(crate) taken_for: PciAddress,
    /// The kernel driver it was taken for.
    pub(crate) driver: String,
    pub(crate) former: Former,
}

/// How far things have come with a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Step {
    /// Somewhere between its former driver and ours: to be undone.
    Taking,
    /// Ours.
    Taken,
    /// Somewhere between our driver and its former one: to be finished.
    GivingBack,
}

/// The state directory. It is made when it is first written to.
#[derive(Debug)]
pub(crate) struct Journal {
    directory: PathBuf,
    /// Called before each change on the disk; tests stop the program here.
    pub(crate) before_change: fn(),
}

/// A lock, held for as long as this lives.
pub(crate) type Lock = Flock<File>;

impl Journal {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory, before_change: || {} }
    }

    /// What is known of a function. Where nothing was ever written, nothing is known.
    pub(crate) fn read(&self, address: PciAddress) -> Result<Option<Record>, PciError> {
        let path = self.record(address);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(PciError::State { path, source }),
        };
        match serde_json::from_slice(&text) {
            Ok(record) => Ok(Some(record)),
            Err(err) => Err(PciError::StateMalformed { path, why: err.to_string() }),
        }
    }

    /// What is known of every function, by address. A file that makes no sense is left out, and
    /// said so; it stands in the way of its own function only.
    pub(crate) fn all(&self) -> Result<Vec<(PciAddress, Record)>, PciError> {
        let mut records = Vec::new();
        for address in self.addresses()? {
            match self.read(address) {
                Ok(record) => records.extend(record.map(|record| (address, record))),
                Err(err @ PciError::StateMalformed { .. }) => {
                    error!(device:% = address, next = err.next_step(); "{err}");
                }
                Err(err) => return Err(err),
            }
        }
        Ok(records)
    }

    fn addresses(&self) -> Result<Vec<PciAddress>, PciError> {
        let failed = |source| PciError::State { path: self.directory.clone(), source };
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(failed(source)),
        };
        let mut addresses = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            let stem = name.to_str().and_then(|name| name.strip_suffix(".json"));
            addresses.extend(stem.and_then(|stem| stem.parse::<PciAddress>().ok()));
        }
        addresses.sort();
        Ok(addresses)
    }

    /// Replaces what is known of a function; with nothing to know, its file is removed. On the
    /// disk when this returns.
    pub(crate) fn write(&self, address: PciAddress, record: &Record) -> Result<(), PciError> {
        let path = self.record(address);
        let failed = |source| PciError::State { path: path.clone(), source };
        if record.persist.is_none() && record.undo.is_none() {
            (self.before_change)();
            return match fs::remove_file(&path) {
                Err(err) if err.kind() == ErrorKind::NotFound => Ok(()),
                Err(err) => Err(failed(err)),
                Ok(()) => sync(&self.directory).map_err(failed),
            };
        }
        self.make_directory()?;
        let new = path.with_extension("new");
        (self.before_change)();
        let mut file = options().truncate(true).open(&new).map_err(failed)?;
        let text = serde_json::to_string_pretty(record).expect("a record has no maps");
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
        (self.before_change)();
        fs::rename(&new, &path).map_err(failed)?;
        sync(&self.directory).map_err(failed)
    }

    /// Removes what a write that was stopped left beside a function's file. Nobody else may be
    /// writing it.
    pub(crate) fn tidy(&self, address: PciAddress) {
        let _ = fs::remove_file(self.record(address).with_extension("new"));
    }

    /// Waits until nobody else, in this process or another one, changes anything of what the name
    /// stands for.
    pub(crate) fn lock(&self, name: &str) -> Result<Lock, PciError> {
        let path = self.directory.join(format!("{name}.busy"));
        let mut file = self.lock_file(&path)?;
        loop {
            match Flock::lock(file, FlockArg::LockExclusive) {
                Ok(lock) => return Ok(lock),
                Err((again, Errno::EINTR)) => file = again,
                Err((_, errno)) => return Err(PciError::State { path, source: errno.into() }),
            }
        }
    }

    /// Makes this process the one that has a function. Errors: `TakenElsewhere`, besides those of
    /// the state directory.
    pub(crate) fn own(&self, address: PciAddress) -> Result<Lock, PciError> {
        let path = self.directory.join(format!("{address}.owner"));
        let mut file = self.lock_file(&path)?;
        for attempt in 1.. {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(mut lock) => {
                    let written = lock
                        .set_len(0)
                        .and_then(|()| lock.rewind())
                        .and_then(|()| writeln!(lock, "{}", std::process::id()));
                    written.map_err(|source| PciError::State { path, source })?;
                    return Ok(lock);
                }
                // Another process may only be looking whether somebody has it.
                Err((held, Errno::EWOULDBLOCK)) if attempt < LOOKS => file = held,
                Err((mut held, Errno::EWOULDBLOCK)) => {
                    let mut pid = String::new();
                    let _ = held.read_to_string(&mut pid);
                    return Err(PciError::TakenElsewhere { address, pid: pid.trim().parse().ok() });
                }
                Err((_, errno)) => return Err(PciError::State { path, source: errno.into() }),
            }
            thread::sleep(LOOK_AGAIN);
        }
        unreachable!("the last attempt returns")
    }

    /// Whether a process has a function.
    pub(crate) fn is_owned(&self, address: PciAddress) -> bool {
        matches!(self.own(address), Err(PciError::TakenElsewhere { .. }))
    }

    fn record(&self, address: PciAddress) -> PathBuf {
        self.directory.join(format!("{address}.json"))
    }

    fn lock_file(&self, path: &Path) -> Result<File, PciError> {
        self.make_directory()?;
        let open = options().read(true).truncate(false).open(path);
        open.map_err(|source| PciError::State { path: path.to_owned(), source })
    }

    fn make_directory(&self) -> Result<(), PciError> {
        let path = &self.directory;
        if path.is_dir() {
            return Ok(());
        }
        // Who can open a lock can hold it, so this is for nobody else.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .and_then(|()| path.parent().map_or(Ok(()), sync))
            .map_err(|source| PciError::State { path: path.clone(), source })
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.create(true).write(true).mode(0o600);
    options
}

/// Puts the names in a directory on the disk.
fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_an_error_with_its_file_and_what_was_noted_before_stays() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::new(folder.path().to_owned());
        let address: PciAddress = "0000:01:00.0".parse().unwrap();
        let noted = Record { persist: Some(Persist::Function), undo: None };
        journal.write(address, &noted).unwrap();
        let new = journal.record(address).with_extension("new");
        std::os::unix::fs::symlink("/dev/full", new).unwrap();

        let other = Record { persist: Some(Persist::Group), undo: None };
        let Err(PciError::State { path, source }) = journal.write(address, &other) else {
            panic!("a full disk takes nothing")
        };
        assert_eq!((path, source.kind()), (journal.record(address), ErrorKind::StorageFull));
        assert_eq!(journal.read(address).unwrap(), Some(noted));
    }
}
