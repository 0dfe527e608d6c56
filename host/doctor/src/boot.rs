//! How the kernel is started, and the command that changes it.

use serde::Serialize;

use crate::facts::Root;

const GRUB_DEFAULTS: &str = "/etc/default/grub";
const GRUBBY: &str = "/usr/sbin/grubby";

/// How the kernel is started.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Boot {
    /// The words of its command line.
    pub words: Vec<String>,
    /// How that is changed for the next start, where we know how.
    pub loader: Option<Loader>,
    /// Other kernels on this machine that make nodes for devices, by their release.
    pub kernels_with_device_nodes: Vec<String>,
    /// Whether this is a machine of systemd, with a service for iohost.
    pub has_unit: bool,
}

/// How the command line is changed for the next start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Loader {
    /// GRUB by the file that Debian and its kin make its menu from.
    GrubDefaults,
    /// What Fedora and its kin have for any loader.
    Grubby,
}

impl Boot {
    pub(crate) fn gather(root: &Root) -> Self {
        let words = root.text("/proc/cmdline").unwrap_or_default();
        let loader = if root.at(GRUBBY).exists() {
            Some(Loader::Grubby)
        } else {
            root.at(GRUB_DEFAULTS).exists().then_some(Loader::GrubDefaults)
        };
        let release = root.text("/proc/sys/kernel/osrelease").unwrap_or_default();
        let makes_nodes = |other: &String| {
            let configuration = root.text(format!("/boot/config-{other}")).unwrap_or_default();
            let is_set = |option| configuration.lines().any(|line| line == option);
            *other != release && is_set("CONFIG_VFIO_DEVICE_CDEV=y")
        };
        let configurations = root.names("/boot").into_iter();
        let releases = configurations
            .filter_map(|name| name.strip_prefix("config-").map(str::to_owned))
            .filter(makes_nodes);
        let units = ["/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];
        let is_unit = |folder: &&str| root.at(format!("{folder}/iohost.service")).exists();
        Self {
            words: words.split_whitespace().map(str::to_owned).collect(),
            loader,
            kernels_with_device_nodes: releases.collect(),
            has_unit: root.at("/run/systemd/system").exists() && units.iter().any(is_unit),
        }
    }

    /// The words of the command line that `is_meant` is true of, each once.
    pub(crate) fn words_that(&self, is_meant: impl Fn(&str) -> bool) -> Vec<String> {
        let mut words: Vec<String> =
            self.words.iter().filter(|word| is_meant(word)).cloned().collect();
        words.sort();
        words.dedup();
        words
    }

    /// Starts the machine again without some words.
    pub(crate) fn without(&self, words: &[String]) -> Option<String> {
        Some(match self.loader? {
            Loader::Grubby => {
                format!(
                    "grubby --update-kernel=ALL --remove-args=\"{}\"; shutdown -r now",
                    words.join(" ")
                )
            }
            Loader::GrubDefaults => {
                let scripts: Vec<String> = words
                    .iter()
                    .map(|word| format!(r"-e 's/\([^-._[:alnum:]]\){}\>/\1/g'", escaped(word)))
                    .collect();
                format!(
                    "sed -i {} {GRUB_DEFAULTS} && update-grub && shutdown -r now",
                    scripts.join(" ")
                )
            }
        })
    }

    /// Starts the machine again with one word more.
    pub(crate) fn with(&self, word: &str) -> Option<String> {
        Some(match self.loader? {
            Loader::Grubby => {
                format!("grubby --update-kernel=ALL --args=\"{word}\"; shutdown -r now")
            }
            Loader::GrubDefaults => format!(
                "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{} /' {GRUB_DEFAULTS} && update-grub && shutdown -r now",
                escaped(word)
            ),
        })
    }

    /// Starts another kernel.
    pub(crate) fn kernel(release: &str) -> String {
        format!(
            "kexec -l /boot/vmlinuz-{release} --initrd=/boot/initrd.img-{release} \
             --reuse-cmdline && systemctl kexec"
        )
    }

    /// Starts the machine again in its firmware's setup.
    pub(crate) fn firmware_setup() -> String {
        "systemctl reboot --firmware-setup".to_owned()
    }
}

/// A word as a regular expression of sed that finds nothing else.
fn escaped(word: &str) -> String {
    let escape = |letter: char| match letter {
        '.' | '/' | '*' | '[' | ']' | '\\' | '^' | '$' | '&' => format!("\\{letter}"),
        letter => letter.to_string(),
    };
    word.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// What a command of `Boot` makes of GRUB's file, with `update-grub` and `reboot` left out.
    fn grub_after(before: &str, command: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("grub");
        std::fs::write(&file, before).unwrap();
        let command = command
            .replace(GRUB_DEFAULTS, file.to_str().unwrap())
            .replace("update-grub && shutdown -r now", "true");
        let status = Command::new("sh").args(["-c", &command]).status().unwrap();
        assert!(status.success(), "{command}");
        std::fs::read_to_string(file).unwrap()
    }

    fn grub() -> Boot {
        Boot { loader: Some(Loader::GrubDefaults), ..Boot::default() }
    }

    #[test]
    fn the_command_for_grub_takes_the_words_and_leaves_their_neighbours() {
        let before = "GRUB_CMDLINE_LINUX=\"intel_iommu=off quiet x.nointremap nointremap\"\n";
        let words = ["intel_iommu=off".to_owned(), "nointremap".to_owned()];
        let after = grub_after(before, &grub().without(&words).unwrap());
        assert_eq!(after, "GRUB_CMDLINE_LINUX=\" quiet x.nointremap \"\n");
    }

    #[test]
    fn the_command_for_grub_adds_a_word() {
        let after =
            grub_after("GRUB_CMDLINE_LINUX=\"\"\n", &grub().with("intel_iommu=on").unwrap());
        assert_eq!(after, "GRUB_CMDLINE_LINUX=\"intel_iommu=on \"\n");
    }

    #[test]
    fn a_loader_that_is_not_known_has_no_command() {
        assert_eq!(Boot::default().without(&["nointremap".to_owned()]), None);
        let fedora = Boot { loader: Some(Loader::Grubby), ..Boot::default() };
        let command = fedora.with("intel_iommu=on").unwrap();
        assert_eq!(
            command,
            "grubby --update-kernel=ALL --args=\"intel_iommu=on\"; shutdown -r now"
        );
    }
}
