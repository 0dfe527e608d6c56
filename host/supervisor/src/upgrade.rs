//! One service on its way from one version of its driver to the next.
//!
//! ```text
//!   Draining ──▶ Trying ──▶ done
//!                  └──▶ GoingBack ──▶ done, and refused
//! ```
//! The new file stands in the driver directory under a name that is no plugin's, and is renamed to the
//! plugin's once its driver runs: so the directory has one whole version at any moment, and until then
//! the one that is known to run.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use iohost_control::host::{Failure, Ready, StateSize};
use iohost_control::varlink::Upgraded;
use iohost_interface::Description;
use log::warn;

use crate::plugins::Plugin;
use crate::request::Answer;
use crate::service::{Ending, LastWords};

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct Upgrade {
    pub(crate) step: Step,
    /// The new version, under its name for the time being.
    candidate: Plugin,
    /// Where the plugin is installed.
    installed: PathBuf,
    /// What the old version saved.
    state: Option<(StateSize, OwnedFd)>,
    /// How the last driver host ended that was to run.
    pub(crate) end: Option<Failure>,
    answer: Option<Answer<Upgraded>>,
}

#[derive(Debug)]
pub(crate) enum Step {
    /// The old version is asked to come to an end. With what it serves, if it goes on instead.
    Draining(Ready, Vec<Description>),
    /// The new version starts.
    Trying,
    /// The old version starts again, for this reason.
    GoingBack(Failure),
}

impl Upgrade {
    /// Puts the new version beside the installed one.
    pub(crate) fn begin(
        source: &Path,
        new: &Plugin,
        installed: &Path,
        (ready, interfaces): (Ready, Vec<Description>),
        answer: Answer<Upgraded>,
    ) -> Result<Self, (Failure, Answer<Upgraded>)> {
        let candidate = installed.with_extension("so.upgrade");
        match copy_whole(source, &candidate) {
            Ok(()) => Ok(Self {
                step: Step::Draining(ready, interfaces),
                candidate: Plugin { file: candidate, info: new.info.clone() },
                installed: installed.to_owned(),
                state: None,
                end: None,
                answer: Some(answer),
            }),
            Err(err) => Err((not_installed(installed, &err), answer)),
        }
    }

    /// The plugin that is to be started instead of the installed one.
    pub(crate) fn candidate(&self) -> Option<&Plugin> {
        matches!(self.step, Step::Trying).then_some(&self.candidate)
    }

    /// What the driver that starts is given.
    pub(crate) fn state(&self) -> Option<(StateSize, &OwnedFd)> {
        self.state.as_ref().map(|(size, file)| (*size, file))
    }

    pub(crate) fn keep_state(&mut self, size: StateSize, file: OwnedFd) {
        self.state = Some((size, file));
    }

    /// What follows the end of a driver host that is started now.
    pub(crate) fn ending(&self) -> Option<Ending> {
        matches!(self.step, Step::Trying).then_some(Ending::Replaced)
    }

    /// A driver host has ended, with these last words.
    pub(crate) fn host_ended(&mut self, words: Option<LastWords>, how: &str) {
        self.end = match words {
            Some(LastWords::Said(failure) | LastWords::Found(failure)) => Some(failure),
            Some(LastWords::Stopped) => None,
            None => Some(Failure::new(
                "driver-died",
                format!("its process {how}"),
                "read the log for what it said last",
            )),
        };
    }

    /// The new version runs: it is the installed one from now on.
    pub(crate) fn install(&self) -> Result<PathBuf, Failure> {
        let renamed = fs::rename(&self.candidate.file, &self.installed);
        renamed.map_err(|err| not_installed(&self.installed, &err))?;
        Ok(self.installed.clone())
    }

    /// It is over, as the asker is told.
    pub(crate) fn finish(mut self, result: Result<Upgraded, Failure>) {
        match fs::remove_file(&self.candidate.file) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                warn!(file:% = self.candidate.file.display(), err:%; "a file of an upgrade stays");
            }
            _ => {}
        }
        if let Some(answer) = self.answer.take() {
            answer.give(result);
        }
    }
}

/// A copy that is whole on the disk once it has its name's place.
fn copy_whole(source: &Path, target: &Path) -> io::Result<()> {
    // One of an upgrade that was broken off may be there, and be loaded.
    match fs::remove_file(target) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    fs::copy(source, target)?;
    File::open(target)?.sync_all()
}

fn not_installed(installed: &Path, err: &io::Error) -> Failure {
    Failure::new(
        "plugin-install",
        format!("the plugin cannot be installed as {}: {err}", installed.display()),
        "see to it that the daemon may write to the driver directory, and that there is room",
    )
}
