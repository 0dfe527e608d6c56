//! `libiohost` and its header, as C programs use them.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use iohost_interface::{Arguments, IOReturn};
use iohost_tests::{System, built_files};

/// Every warning is an error, in the header's C and in what it says it can be used from.
const STRICT: [&str; 5] = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// What a program needs that has the static library in it.
const SYSTEM_LIBRARIES: [&str; 5] = ["-lgcc_s", "-lpthread", "-lm", "-ldl", "-lc"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

fn compiler() -> Command {
    let mut compiler = Command::new("cc");
    compiler.args(STRICT).arg("-I").arg(root().join("host/iohost_client_c/include"));
    // What the C library declares beyond C11.
    compiler.arg("-D_POSIX_C_SOURCE=200809L");
    compiler
}

fn successful(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// A program of a C file, with the shared library or with the static one.
fn build(system: &System, source: &str, is_static: bool) -> PathBuf {
    let libraries = built_files();
    let program = system.path("program");
    let mut compiler = compiler();
    compiler.arg(root().join(source)).arg("-o").arg(&program);
    match is_static {
        true => compiler.arg(libraries.join("libiohost.a")).args(SYSTEM_LIBRARIES),
        false => {
            let place = format!("-Wl,-rpath,{}", libraries.display());
            compiler.arg("-L").arg(&libraries).arg("-liohost").arg(place)
        }
    };
    successful(compiler);
    program
}

fn run(system: &System, program: &Path, service: &str) -> String {
    let mut command = Command::new(program);
    command.arg(system.socket()).arg(service);
    String::from_utf8(successful(command).stdout).unwrap()
}

#[test]
fn the_c_example_computes_and_streams_with_either_library() {
    let (system, _device) = System::with_edu();
    for is_static in [false, true] {
        let program = build(&system, "host/iohost_client_c/examples/edu.c", is_static);
        let said = run(&system, &program, "edu0");
        assert_eq!(said, "10! = 3628800\n1000 entries came back\n");
    }
}

#[test]
fn a_c_program_is_told_what_cannot_be_and_maps_memory() {
    let (system, _device) = System::with_driver("probe");
    let program = build(&system, "tests/c/probe.c", false);
    assert_eq!(run(&system, &program, "edu0"), "0 failures\n");
}

/// The names of the header's functions: what comes before a parenthesis in a declaration.
fn declared(header: &str) -> BTreeSet<String> {
    let code: String = header.split("/*").map(|part| part.split("*/").last().unwrap()).collect();
    let code: String = code.lines().filter(|line| !line.starts_with('#')).collect();
    let name = |part: &str| {
        let name = part.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next()?;
        name.starts_with("iohost_").then(|| name.to_owned())
    };
    let mut before_parentheses: Vec<_> = code.split('(').collect();
    before_parentheses.pop();
    before_parentheses.into_iter().filter_map(name).collect()
}

#[test]
fn the_header_declares_what_the_library_exports() {
    let source = read("host/iohost_client_c/src/abi.rs");
    let exported: BTreeSet<String> = source
        .split("extern \"C\" fn ")
        .skip(1)
        .map(|rest| rest.split('(').next().unwrap().to_owned())
        .filter(|name| name.starts_with("iohost_"))
        .collect();
    assert!(!exported.is_empty(), "the search itself finds something");
    assert_eq!(declared(&read("host/iohost_client_c/include/iohost.h")), exported);
}

#[test]
fn the_headers_numbers_are_those_of_the_library() {
    let header = read("host/iohost_client_c/include/iohost.h");
    let mut source = String::from("#include \"iohost.h\"\n");
    let mut found = 0;
    for code in (0x2bc..=0x2f0).map(|code: u32| IOReturn((0xE000_0000 | code) as i32)) {
        let Some(name) = code.name() else { continue };
        if header.contains(&format!("#define IOHOST_{name} ")) {
            let number = code.0;
            writeln!(source, "_Static_assert(IOHOST_{name} == {number}, \"{name}\");").unwrap();
            found += 1;
        }
    }
    let statuses = header.matches("IOHOST_STATUS(0x").count();
    assert_eq!(found, statuses, "every status of the header is one of ours");
    let checks = [
        ("IOHOST_SUCCESS", 0),
        ("IOHOST_MOST_SCALARS", Arguments::MOST_SCALARS),
        ("IOHOST_LONGEST_STRUCTURE", Arguments::LONGEST_STRUCTURE),
        ("sizeof(iohost_status)", size_of::<IOReturn>()),
        ("sizeof(size_t)", size_of::<usize>()),
        ("sizeof(_Bool)", size_of::<bool>()),
        ("sizeof(int)", size_of::<i32>()),
    ];
    for (what, number) in checks {
        writeln!(source, "_Static_assert({what} == {number}, \"{what}\");").unwrap();
    }
    writeln!(source, "_Static_assert(IOHOST_FOREVER == {}u, \"forever\");", u64::MAX).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("numbers.c");
    std::fs::write(&file, source).unwrap();
    let mut compiler = compiler();
    compiler.arg("-fsyntax-only").arg(file);
    successful(compiler);
}
