//! What the next daemon has to know to find the driver hosts of this one.
//!
//! Each driver host has two files in `hosts` of the runtime directory, named by its number: the socket
//! on which it waits for the next daemon when this one is gone, and a record of what this daemon
//! started, which is there before the driver host is told to start anything. Everything else the driver
//! host knows itself. Nothing is written to the disk for good: the files are of use as long as the
//! process runs.
//!
//! The directory is the daemon's user's alone, since whoever connects can stop the driver.

use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use iohost_control::host::{Failure, Start};
use iohost_event::{PacketListener, Packets, ProcessHandle, process_start};
use log::warn;
use serde::{Deserialize, Serialize};

use crate::service::Service;

/// A driver host, as the daemon that started it noted it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HostRecord {
    /// The service's name.
    pub(crate) service: String,
    /// Whether the service was asked for by `bind`.
    pub(crate) on_request: bool,
    /// Whether a rule of the configuration brought it.
    pub(crate) by_rule: bool,
    /// Whether the whole IOMMU group is taken with it.
    pub(crate) group: bool,
    /// What it was told to run.
    pub(crate) start: Start,
    /// The process, with its start and the boot it is of: the number alone is given away again.
    pid: u32,
    started: u64,
    boot: String,
}

/// The directory of records and sockets.
#[derive(Clone, Debug)]
pub(crate) struct HostRecords {
    path: Arc<PathBuf>,
    directory: Arc<File>,
    boot: String,
}

/// A record of an earlier daemon's.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) number: u64,
    pub(crate) record: HostRecord,
    /// Its process; `None` if it has ended.
    pub(crate) process: Option<ProcessHandle>,
}

/// The files of one driver host.
#[derive(Debug)]
pub(crate) struct Files {
    records: HostRecords,
    number: u64,
}

impl HostRecords {
    /// Opens the directory in the runtime directory, and makes it first if it is not there.
    pub(crate) fn open(runtime: &Path) -> Result<Self, Failure> {
        let path = runtime.join("hosts");
        let refused = |err: io::Error| {
            Failure::new(
                "runtime-directory",
                format!("the directory {} cannot be used: {err}", path.display()),
                "remove what is in its place, or name another directory with --runtime-dir",
            )
        };
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(err) if err.kind() != io::ErrorKind::AlreadyExists => return Err(refused(err)),
            _ => {}
        }
        let directory = File::open(&path).map_err(refused)?;
        directory.set_permissions(Permissions::from_mode(0o700)).map_err(refused)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(refused)?;
        let (path, directory) = (Arc::new(path), Arc::new(directory));
        Ok(Self { path, directory, boot: boot.trim().to_owned() })
    }

    /// The socket and, once it is known, the record of a new driver host. The files go when what is
    /// returned is told so.
    pub(crate) fn add(&self, number: u64) -> io::Result<(PacketListener, Files)> {
        let files = Files { records: self.clone(), number };
        let listener = PacketListener::bind(&self.directory, &number.to_string())?;
        Ok((listener, files))
    }

    /// What earlier daemons left, by number. What is of no use any more is removed.
    pub(crate) fn found(&self) -> Vec<Found> {
        let mut numbers: Vec<u64> = Vec::new();
        match std::fs::read_dir(&*self.path) {
            Ok(entries) => {
                let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
                numbers
                    .extend(names.filter_map(|name| name.split('.').next()?.parse::<u64>().ok()));
            }
            Err(err) => warn!(err:%; "driver hosts of earlier daemons cannot be looked for"),
        }
        numbers.sort_unstable();
        numbers.dedup();
        numbers.into_iter().filter_map(|number| self.look_at(number)).collect()
    }

    /// Connects to a driver host that waits for the next daemon, or will.
    pub(crate) fn connect(&self, number: u64) -> io::Result<Packets> {
        PacketListener::connect(&self.directory, &number.to_string())
    }

    pub(crate) fn files(&self, number: u64) -> Files {
        Files { records: self.clone(), number }
    }

    fn look_at(&self, number: u64) -> Option<Found> {
        let record = std::fs::read(self.record_path(number))
            .and_then(|text| Ok(serde_json::from_slice::<HostRecord>(&text)?));
        let record = match record {
            Ok(record) if record.boot == self.boot => record,
            other => {
                match other {
                    // From before the machine was started anew.
                    Ok(_) => {}
                    // Its daemon was killed before it was told to start anything, so it ends.
                    Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                    Err(err) => warn!(number, err:%; "a driver host's record cannot be read"),
                }
                self.files(number).remove();
                return None;
            }
        };
        let process = ProcessHandle::of(record.pid, record.started).unwrap_or_else(|err| {
            warn!(number, pid = record.pid, err:%; "a driver host cannot be looked at");
            None
        });
        if process.is_none() {
            self.files(number).remove();
        }
        Some(Found { number, record, process })
    }

    fn record_path(&self, number: u64) -> PathBuf {
        self.path.join(format!("{number}.json"))
    }
}

impl HostRecord {
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }
}

impl Files {
    /// Notes a process that was started, before it is told to do anything.
    pub(crate) fn note(&self, service: &Service, start: &Start, pid: u32) -> io::Result<()> {
        let record = HostRecord {
            service: service.device.name.clone(),
            on_request: service.on_request,
            by_rule: service.by_rule,
            group: service.group,
            start: start.clone(),
            pid,
            started: process_start(pid)?,
            boot: self.records.boot.clone(),
        };
        let path = self.records.record_path(self.number);
        // Whoever finds it finds it whole.
        let unfinished = path.with_extension("new");
        std::fs::write(&unfinished, serde_json::to_vec(&record)?)?;
        std::fs::rename(unfinished, path)
    }

    /// The process has ended.
    pub(crate) fn remove(&self) {
        let socket = self.records.path.join(self.number.to_string());
        let record = self.records.record_path(self.number);
        for path in [&record, &record.with_extension("new"), &socket] {
            match std::fs::remove_file(path) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => {
                    warn!(file:% = path.display(), err:%; "a file of a driver host stays");
                }
                _ => {}
            }
        }
    }
}
