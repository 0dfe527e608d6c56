//! Notes the compiler's version, which a plugin's descriptor carries for people.

use std::env;
use std::process::Command;

fn main() {
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC for build scripts");
    let version = Command::new(rustc).arg("--version").output().expect("rustc tells its version");
    let version = String::from_utf8_lossy(&version.stdout);
    // "rustc 1.95.0 (59807616e 2026-04-14)": the commit would not fit and adds nothing.
    let version = version.split(" (").next().unwrap_or_default().trim();
    println!("cargo::rustc-env=IOHOST_RUSTC={version}");
    println!("cargo::rerun-if-changed=build.rs");
}
