//! The plugins in the driver directory, and which of them is for a device.

use std::path::{Path, PathBuf};

use iohost_control::host::Failure;
use iohost_control::plugin::{PciIds, PluginInfo};
use log::warn;

/// Reads what a plugin file says of itself, without running its code.
pub type Inspect = fn(&Path) -> Result<PluginInfo, Failure>;

/// What is in the driver directory.
#[derive(Clone, Debug)]
pub(crate) struct Plugins {
    directory: PathBuf,
    /// By name, then by file: the order in which ties are decided.
    usable: Vec<Plugin>,
    /// Files that are no plugin for this host, with the reason.
    unusable: Vec<(PathBuf, Failure)>,
}

/// A plugin file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plugin {
    pub(crate) file: PathBuf,
    pub(crate) info: PluginInfo,
}

impl Plugins {
    /// Reads every `*.so` of the directory.
    pub(crate) fn scan(directory: &Path, inspect: Inspect) -> Result<Self, Failure> {
        let unreadable = |err: std::io::Error| {
            Failure::new(
                "driver-directory",
                format!("the driver directory {} cannot be read: {err}", directory.display()),
                "create it and put plugins (*.so) there, or name another with --driver-dir",
            )
        };
        let mut plugins =
            Self { directory: directory.to_owned(), usable: Vec::new(), unusable: Vec::new() };
        for entry in std::fs::read_dir(directory).map_err(unreadable)? {
            let file = entry.map_err(unreadable)?.path();
            if file.extension().is_none_or(|extension| extension != "so") {
                continue;
            }
            match inspect(&file) {
                Ok(info) => plugins.usable.push(Plugin { file, info }),
                Err(failure) => {
                    warn!(
                        file:% = file.display(), code = failure.code, next = failure.next;
                        "not a usable plugin: {}", failure.message
                    );
                    plugins.unusable.push((file, failure));
                }
            }
        }
        plugins.usable.sort_by(|a, b| (&a.info.name, &a.file).cmp(&(&b.info.name, &b.file)));
        Ok(plugins)
    }

    /// The plugin of that name.
    pub(crate) fn named(&self, name: &str) -> Result<&Plugin, Failure> {
        if let Some(plugin) = self.usable.iter().find(|plugin| plugin.info.name == name) {
            return Ok(plugin);
        }
        // A file that looks as if it were meant explains more than its absence.
        let meant = self.unusable.iter().find(|(file, _)| {
            let stem = file.file_stem().unwrap_or_default().to_string_lossy();
            stem == name || stem == format!("lib{name}") || stem.ends_with(&format!("_{name}"))
        });
        if let Some((_, failure)) = meant {
            return Err(failure.clone());
        }
        let names: Vec<&str> = self.usable.iter().map(|plugin| plugin.info.name.as_str()).collect();
        let there = match names.is_empty() {
            true => "there are no plugins at all".to_owned(),
            false => format!("there are: {}", names.join(", ")),
        };
        Err(Failure::new(
            "no-such-plugin",
            format!("no plugin in {} is named {name:?}", self.directory.display()),
            format!("install the plugin there, or correct the name; {there}"),
        ))
    }

    /// The plugins of a category that are for a device, with how well they fit: the best first, and
    /// equals by name.
    pub(crate) fn candidates(&self, ids: PciIds, category: &str) -> Vec<(i32, &Plugin)> {
        let fit = |plugin: &Plugin| {
            plugin.info.personalities.iter().filter_map(|personality| personality.fit(ids)).max()
        };
        let competing = self.usable.iter().filter(|plugin| plugin.info.category == category);
        let mut fitting: Vec<_> =
            competing.filter_map(|plugin| Some((fit(plugin)?, plugin))).collect();
        fitting.sort_by_key(|(fit, _)| std::cmp::Reverse(*fit));
        fitting
    }

    /// The plugin that would be taken for a device that the configuration does not have.
    pub(crate) fn best_for(&self, ids: PciIds) -> Option<&Plugin> {
        self.candidates(ids, "").first().map(|(_, plugin)| *plugin)
    }
}

#[cfg(test)]
mod tests {
    use iohost_control::plugin::{Masked, Needs, Personality};

    use super::*;

    const EDU: PciIds = PciIds {
        vendor: 0x1234,
        device: 0x11e8,
        subsystem_vendor: 0x1af4,
        subsystem_device: 0x1100,
        class: 0x00ff00,
        revision: 0x10,
    };

    /// Plugins by name, category and personality.
    fn plugins(list: &[(&str, &str, Personality)]) -> Plugins {
        let plugin = |(name, category, personality): &(&str, &str, Personality)| Plugin {
            file: format!("/{name}.so").into(),
            info: PluginInfo {
                name: name.to_string(),
                category: category.to_string(),
                personalities: vec![*personality],
                needs: Needs::default(),
            },
        };
        Plugins {
            directory: "/drivers".into(),
            usable: list.iter().map(plugin).collect(),
            unusable: Vec::new(),
        }
    }

    fn exact() -> Personality {
        Personality::pci(0x1234, 0x11e8)
    }

    fn by_class() -> Personality {
        let class = Masked { value: 0x00ff_0000, mask: 0xffff_ff00 };
        Personality { class, ..Personality::default() }
    }

    fn with_score(score: i32, personality: Personality) -> Personality {
        Personality { score, ..personality }
    }

    #[test]
    fn candidates_come_best_first_by_closeness_score_and_name() {
        let revision = Masked { value: 0x10, mask: 0xff };
        let by_revision = Personality { class: revision, ..exact() };
        for (list, expected) in [
            (vec![("a", "", by_class()), ("b", "", exact())], "b a"),
            (vec![("a", "", exact()), ("b", "", by_revision)], "b a"),
            (vec![("a", "", exact()), ("b", "", exact()), ("c", "", exact())], "a b c"),
            (vec![("a", "", exact()), ("b", "", with_score(1, exact()))], "b a"),
            (vec![("a", "", with_score(-1, exact())), ("b", "", exact())], "b a"),
            (vec![("a", "", exact()), ("b", "", with_score(1000, by_class()))], "b a"),
            (vec![("a", "", Personality::pci(0x1234, 1)), ("b", "", by_class())], "b"),
            (vec![("a", "", Personality::pci(0x1234, 1))], ""),
        ] {
            let plugins = plugins(&list);
            let found = plugins.candidates(EDU, "");
            let names: Vec<_> = found.iter().map(|(_, plugin)| &*plugin.info.name).collect();
            assert_eq!(names.join(" "), expected, "{list:?}");
        }
    }

    #[test]
    fn drivers_of_another_category_do_not_compete() {
        let plugins = plugins(&[
            ("edu", "", by_class()),
            ("tester", "diagnosis", exact()),
            ("other", "diagnosis", by_class()),
        ]);
        let names = |category| {
            let found = plugins.candidates(EDU, category);
            found.iter().map(|(_, plugin)| plugin.info.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(""), ["edu"]);
        assert_eq!(names("diagnosis"), ["tester", "other"]);
        assert_eq!(names("none of these"), [""; 0]);
    }

    #[test]
    fn a_device_for_which_nothing_is_made_gets_nothing() {
        let other = PciIds { device: 1, ..EDU };
        assert_eq!(plugins(&[("edu", "", exact())]).best_for(other), None);
    }

    #[test]
    fn a_name_that_is_missing_is_answered_with_the_names_there_are() {
        let failure = plugins(&[("edu", "", exact())]).named("nvme").unwrap_err();
        assert_eq!(
            failure.to_string(),
            "no plugin in /drivers is named \"nvme\"\n  next: install the plugin there, or \
             correct the name; there are: edu"
        );
    }

    #[test]
    fn a_file_that_was_meant_explains_why_it_is_no_plugin() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("libedu.so"), "text").unwrap();
        let inspect: Inspect = |_| Err(Failure::new("plugin-abi", "made for another iohost", ""));
        let plugins = Plugins::scan(directory.path(), inspect).unwrap();
        assert_eq!(plugins.named("edu").unwrap_err().code, "plugin-abi");
    }
}
