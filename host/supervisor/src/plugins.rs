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

    /// The plugin that fits the device best; among equals, the first by name.
    pub(crate) fn best_for(&self, ids: PciIds) -> Option<&Plugin> {
        let fit = |plugin: &Plugin| {
            plugin.info.personalities.iter().filter_map(|personality| personality.fit(ids)).max()
        };
        let fitting = self.usable.iter().filter_map(|plugin| Some((fit(plugin)?, plugin)));
        // `max_by_key` takes the last of equals, so from behind.
        fitting.rev().max_by_key(|(fit, _)| *fit).map(|(_, plugin)| plugin)
    }
}

#[cfg(test)]
mod tests {
    use iohost_control::plugin::{ClassMatch, Needs, Personality};

    use super::*;

    const EDU: PciIds = PciIds { vendor: 0x1234, device: 0x11e8, class: 0x00ff00 };

    fn plugins(list: &[(&str, Personality)]) -> Plugins {
        let plugin = |(name, personality): &(&str, Personality)| Plugin {
            file: format!("/{name}.so").into(),
            info: PluginInfo {
                name: name.to_string(),
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
        Personality { vendor: Some(0x1234), device: Some(0x11e8), class: None }
    }

    #[test]
    fn the_most_specific_plugin_wins() {
        let class = Some(ClassMatch { code: 0x00ff00, mask: 0xffff00 });
        let by_class = Personality { class, ..Personality::default() };
        let plugins = plugins(&[("any", by_class), ("edu", exact())]);
        assert_eq!(plugins.best_for(EDU).unwrap().info.name, "edu");
    }

    #[test]
    fn among_equals_the_first_name_wins() {
        let plugins = plugins(&[("a", exact()), ("b", exact()), ("c", exact())]);
        assert_eq!(plugins.best_for(EDU).unwrap().info.name, "a");
    }

    #[test]
    fn a_device_for_which_nothing_is_made_gets_nothing() {
        let other = PciIds { device: 1, ..EDU };
        assert_eq!(plugins(&[("edu", exact())]).best_for(other), None);
    }

    #[test]
    fn a_name_that_is_missing_is_answered_with_the_names_there_are() {
        let failure = plugins(&[("edu", exact())]).named("nvme").unwrap_err();
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
