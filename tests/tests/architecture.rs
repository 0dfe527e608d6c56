//! The walls of the tree, checked: which tier may depend on which, and where `unsafe` may stand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The tiers, from the kernel up. A crate may use its own tier and those before it.
const TIERS: [&str; 4] = ["sys", "host", "drivers", "tests"];

/// The modules outside `sys/` that may say `unsafe`, each where a C ABI ends: both ends of the
/// plugins', and ours of the clients'. Each is a file, and those in the folder of its name.
const ABI_ENDS: [&str; 3] =
    ["host/iohost_driver/src/abi", "host/driver_host/src/plugin", "host/iohost_client_c/src/abi"];

/// The plugin that does what is forbidden, to see that it is: it makes system calls by number.
const ATTACKS: &str = "tests/hostile_plugin/src/attempts.rs";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Our packages: name to the folder below the root, with the names of all their dependencies,
/// those for building and testing included and marked.
fn packages() -> BTreeMap<String, (String, Vec<(String, bool)>)> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let package = |package: &Value| {
        let manifest = PathBuf::from(package["manifest_path"].as_str().unwrap());
        let folder = manifest.parent().unwrap().strip_prefix(root()).unwrap();
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        let dependencies = dependencies.map(|dependency| {
            let name = dependency["name"].as_str().unwrap().to_owned();
            (name, dependency["kind"].as_str() == Some("dev"))
        });
        let name = package["name"].as_str().unwrap().to_owned();
        (name, (folder.to_str().unwrap().to_owned(), dependencies.collect()))
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

fn tier(folder: &str) -> usize {
    let first = folder.split('/').next().unwrap();
    TIERS.iter().position(|tier| *tier == first).unwrap_or_else(|| panic!("{folder}: no tier"))
}

#[test]
fn dependencies_point_up_the_tiers_only() {
    let packages = packages();
    for (name, (folder, dependencies)) in &packages {
        for (dependency, _) in dependencies {
            let Some((other, _)) = packages.get(dependency) else { continue };
            // One exception, and it is no dependency on a driver: the interface crate that
            // clients of a driver share with it.
            if other.ends_with("/api") {
                continue;
            }
            assert!(
                tier(other) <= tier(folder),
                "{name} ({folder}) depends on {dependency} ({other}), which is below it"
            );
        }
    }
}

#[test]
fn a_driver_sees_the_sdk_and_interfaces_only() {
    let packages = packages();
    for (name, (folder, dependencies)) in &packages {
        if !folder.starts_with("drivers/") {
            continue;
        }
        for (dependency, for_tests) in dependencies {
            let Some((other, _)) = packages.get(dependency) else { continue };
            let allowed = other.ends_with("/api")
                || dependency == "iohost_driver"
                || (folder.ends_with("/api") && dependency == "iohost_interface")
                || (*for_tests && other.starts_with("host/"));
            assert!(allowed, "driver {name} depends on {dependency} ({other})");
        }
    }
}

#[test]
fn unsafe_stands_in_sys_and_at_the_ends_of_the_c_abis() {
    let output = Command::new("git")
        .args(["grep", "-lE", r"^[^/]*\bunsafe( \{| fn| impl| extern)", "--", "*.rs"])
        .current_dir(root())
        .output()
        .unwrap();
    let files = String::from_utf8(output.stdout).unwrap();
    let outside: Vec<_> = files.lines().filter(|file| !file.starts_with("sys/")).collect();
    assert!(!files.is_empty(), "the search itself finds something");
    let stray: Vec<_> = outside
        .iter()
        .filter(|file| {
            // Declaring the ABI's function types is not using them.
            **file != ATTACKS
                && !ABI_ENDS.iter().any(|end| {
                    let rest = file.strip_prefix(end);
                    rest.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
                })
        })
        .collect();
    assert!(stray.is_empty(), "unsafe in {stray:?}");
}

#[test]
fn every_crate_says_how_it_stands_to_unsafe_code() {
    for (name, (folder, _)) in packages() {
        let library = root().join(&folder).join("src/lib.rs");
        let file =
            if library.exists() { library } else { root().join(&folder).join("src/main.rs") };
        let text = std::fs::read_to_string(&file).unwrap();
        let abi_end = ABI_ENDS.iter().any(|end| end.starts_with(&format!("{folder}/")));
        let forbids = text.contains("#![forbid(unsafe_code)]");
        assert!(
            folder.starts_with("sys/") || abi_end || forbids || ATTACKS.starts_with(&folder),
            "{name} ({folder}) does not forbid unsafe code"
        );
    }
}

#[test]
fn no_crate_or_module_is_named_after_nothing() {
    let output = Command::new("git").args(["ls-files"]).current_dir(root()).output().unwrap();
    let files = String::from_utf8(output.stdout).unwrap();
    for part in files.lines().flat_map(|file| file.split('/').map(move |part| (file, part))) {
        let (file, part) = part;
        let name = part.strip_suffix(".rs").unwrap_or(part);
        let empty = ["util", "utils", "common", "base", "core", "helpers", "misc"];
        assert!(!empty.contains(&name), "{file}: say what it provides");
    }
}
