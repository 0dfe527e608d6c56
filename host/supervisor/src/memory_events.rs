//! Whether the kernel has killed somebody of ours for want of memory.
//!
//! A process that the kernel kills for that ends by SIGKILL, as by any other. What tells them apart
//! is a count of the control group that the daemon is in with its driver hosts (Linux,
//! `Documentation/admin-guide/cgroup-v2.rst`, memory.events). Where there is none, nothing is known.

use std::fs;
use std::path::{Path, PathBuf};

/// The count, and how far it was looked at.
#[derive(Debug)]
pub(crate) struct MemoryEvents {
    file: Option<PathBuf>,
    kills: u64,
}

impl MemoryEvents {
    /// Those of the control group of this process.
    pub(crate) fn of_this_process() -> Self {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
        Self::in_file(
            group.map(|group| Path::new("/sys/fs/cgroup").join(group).join("memory.events")),
        )
    }

    fn in_file(file: Option<PathBuf>) -> Self {
        let mut events = Self { file, kills: 0 };
        events.kills = events.read();
        events
    }

    /// Whether somebody was killed since this was asked last.
    pub(crate) fn has_killed(&mut self) -> bool {
        let kills = self.read();
        std::mem::replace(&mut self.kills, kills) < kills
    }

    fn read(&self) -> u64 {
        let text = self.file.as_ref().and_then(|file| fs::read_to_string(file).ok());
        let text = text.unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("memory.events");
        let write = |kills| fs::write(&file, format!("low 0\noom 9\noom_kill {kills}\n")).unwrap();
        write(3);
        let mut events = MemoryEvents::in_file(Some(file.clone()));
        assert!(!events.has_killed(), "that was before");
        write(4);
        assert!(events.has_killed());
        assert!(!events.has_killed());
    }

    #[test]
    fn without_a_control_group_nothing_is_known() {
        assert!(!MemoryEvents::in_file(None).has_killed());
        assert!(!MemoryEvents::in_file(Some("/nonexistent".into())).has_killed());
    }
}
