//! Files that are plugins, files that are not, and files that were plugins once.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use iohost_control::plugin::{Masked, Needs, PciIds};
use iohost_driver_abi::{
    ABI_VERSION, DescriptorHeader, DriverDescriptor, FIRST_DESCRIPTOR, MAGIC, Matching, Personality,
};
use iohost_driver_host::plugin_file::inspect;
use tempfile::TempDir;

/// Fields of an ELF header (System V ABI, "ELF Header").
const E_CLASS: u64 = 4;
const E_TYPE: u64 = 16;
const E_MACHINE: u64 = 18;

/// The `edu` plugin as cargo builds it.
fn edu() -> &'static Path {
    static EDU: OnceLock<PathBuf> = OnceLock::new();
    EDU.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let folder = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/test");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "edu"]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        let built = build.current_dir(env!("CARGO_MANIFEST_DIR")).status();
        assert!(built.unwrap().success(), "the plugin does not build");
        folder.join("libedu.so")
    })
}

/// A copy of the plugin, to be changed.
struct Copy {
    _folder: TempDir,
    path: PathBuf,
    file: File,
    /// Where the descriptor is in the file.
    descriptor: u64,
}

impl Copy {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libcopy.so");
        fs::copy(edu(), &path).unwrap();
        let bytes = fs::read(&path).unwrap();
        let start = [&MAGIC[..], &ABI_VERSION.to_ne_bytes()].concat();
        let descriptor = bytes.windows(start.len()).position(|window| window == start).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        Self { _folder: folder, path, file, descriptor: descriptor as u64 }
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, offset).unwrap();
    }

    /// Writes into the descriptor.
    fn describe(&self, offset: usize, bytes: &[u8]) {
        self.write(self.descriptor + offset as u64, bytes);
    }

    /// The code and the words of the refusal.
    fn refusal(&self) -> (String, String) {
        refusal(&self.path)
    }
}

fn refusal(path: &Path) -> (String, String) {
    let failure = inspect(path).unwrap_err();
    assert!(failure.message.starts_with(&path.display().to_string()), "{}", failure.message);
    assert!(!failure.next.is_empty());
    (failure.code, failure.message)
}

#[test]
fn the_plugin_that_cargo_built_is_read() {
    let edu = inspect(edu()).unwrap();
    assert_eq!(edu.name, "edu");
    assert_eq!(edu.needs, Needs { dma_bytes: 2048, messages: false }, "one entry at a time");
    let [personality] = &edu.personalities[..] else { panic!("{:?}", edu.personalities) };
    assert_eq!(*personality, iohost_control::plugin::Personality::pci(0x1234, 0x11e8));
    assert_eq!(edu.category, "");
}

#[test]
fn a_file_that_is_not_there_or_not_a_file_is_unreadable() {
    let folder = tempfile::tempdir().unwrap();
    let missing = refusal(&folder.path().join("nothing.so"));
    assert_eq!(missing.0, "plugin-unreadable");
    assert!(missing.1.contains("No such file"), "{}", missing.1);
    assert_eq!(refusal(folder.path()).0, "plugin-unreadable");
}

#[test]
fn a_text_file_and_an_empty_file_are_no_library() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [("text.so", "#!/bin/sh\n"), ("empty.so", ""), ("magic.so", "\x7fELF")] {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        let (code, message) = refusal(&path);
        assert_eq!(code, "plugin-not-a-library");
        assert!(message.contains("not a 64-bit ELF file"), "{message}");
    }
}

#[test]
fn a_plugin_that_lacks_functions_this_host_calls_is_refused_with_both_sizes() {
    let copy = Copy::new();
    let expected = FIRST_DESCRIPTOR;
    let size = std::mem::offset_of!(DescriptorHeader, size);
    copy.describe(size, &(expected as u32 - 8).to_ne_bytes());
    let (code, message) = copy.refusal();
    assert_eq!(code, "plugin-abi");
    assert!(message.contains(&format!("{} bytes, not {expected}", expected - 8)), "{message}");
    // A newer plugin has more, which this host leaves alone.
    copy.describe(size, &(expected as u32 + 8).to_ne_bytes());
    assert!(inspect(&copy.path).is_ok());
}

#[test]
fn an_executable_and_an_object_file_are_no_library() {
    for (kind, name) in [(1_u16, "Relocatable"), (2, "Executable"), (4, "Core")] {
        let copy = Copy::new();
        copy.write(E_TYPE, &kind.to_ne_bytes());
        let (code, message) = copy.refusal();
        assert_eq!(code, "plugin-not-a-library");
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn a_library_for_another_machine_is_refused_with_its_name() {
    let copy = Copy::new();
    const RISCV: u16 = 243;
    copy.write(E_MACHINE, &RISCV.to_ne_bytes());
    let (code, message) = copy.refusal();
    assert_eq!(code, "plugin-not-a-library");
    assert!(message.contains("Riscv64"), "{message}");
    copy.write(E_CLASS, &[1]);
    assert!(copy.refusal().1.contains("not a 64-bit ELF file"));
}

#[test]
fn a_library_or_a_program_without_a_driver_is_refused_with_the_symbol_it_lacks() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let paths = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    let libc = paths.clone().find(|path| path.contains("libc.so")).unwrap();
    // A position independent program is a shared object to the linker.
    for path in [Path::new(libc), &std::env::current_exe().unwrap()] {
        let (code, message) = refusal(path);
        assert_eq!(code, "plugin-no-driver");
        assert!(message.contains("no data symbol `iohost_driver`"), "{message}");
    }
}

#[test]
fn a_symbol_that_is_no_descriptor_is_refused() {
    let copy = Copy::new();
    copy.describe(0, b"NOTOURS!");
    let (code, message) = copy.refusal();
    assert_eq!(code, "plugin-no-driver");
    assert!(message.contains("no driver descriptor"), "{message}");
}

#[test]
fn a_plugin_for_another_abi_is_refused_with_both_versions_and_its_builder() {
    let copy = Copy::new();
    for other in [0, ABI_VERSION + 1, u32::MAX] {
        copy.describe(std::mem::offset_of!(DescriptorHeader, abi_version), &other.to_ne_bytes());
        let (code, message) = copy.refusal();
        assert_eq!(code, "plugin-abi");
        for words in [&*format!("ABI {other},"), &format!("has ABI {ABI_VERSION}"), "rustc "] {
            assert!(message.contains(words), "no {words:?} in {message}");
        }
    }
}

/// Where the first personality is in the descriptor, plus a field of it.
fn personality(field: usize) -> usize {
    std::mem::offset_of!(DescriptorHeader, personalities) + field
}

#[test]
fn a_personality_is_read_with_its_masks_its_score_and_the_drivers_category() {
    use std::mem::offset_of;
    let copy = Copy::new();
    for (field, value) in [
        (offset_of!(Personality, primary_mask), 0xfff0_ffff_u32),
        (offset_of!(Personality, subsystem), 0x1100_1af4),
        (offset_of!(Personality, subsystem_mask), u32::MAX),
        (offset_of!(Personality, class), 0x10),
        (offset_of!(Personality, class_mask), 0xff),
    ] {
        copy.describe(personality(field), &value.to_ne_bytes());
    }
    let matching = offset_of!(DriverDescriptor, matching);
    copy.describe(matching + offset_of!(Matching, category), b"diagnosis");
    copy.describe(matching + offset_of!(Matching, scores), &(-5_i32).to_ne_bytes());
    let info = inspect(&copy.path).unwrap();
    let read = info.personalities[0];
    assert_eq!((&*info.category, read.score), ("diagnosis", -5));
    assert_eq!(read.primary, Masked { value: 0x11e8_1234, mask: 0xfff0_ffff });
    assert_eq!(read.subsystem, Masked::exactly(0x1100_1af4));
    assert_eq!(read.class, Masked { value: 0x10, mask: 0xff });
}

#[test]
fn a_personality_that_no_device_can_have_is_refused() {
    for mask in [0xffff_0000_u32, 0x0001_0000] {
        let copy = Copy::new();
        let field = std::mem::offset_of!(Personality, primary_mask);
        copy.describe(personality(field), &mask.to_ne_bytes());
        let (code, message) = copy.refusal();
        assert_eq!(code, "plugin-personality");
        assert!(message.contains("no vendor id"), "{message}");
    }
}

#[test]
fn a_plugin_from_before_there_were_scores_is_read_without_them() {
    let copy = Copy::new();
    let size = std::mem::offset_of!(DescriptorHeader, size);
    let matching = std::mem::offset_of!(DriverDescriptor, matching);
    copy.describe(matching, b"not for it");
    copy.describe(size, &(FIRST_DESCRIPTOR as u32).to_ne_bytes());
    let info = inspect(&copy.path).unwrap();
    assert_eq!((&*info.category, info.personalities[0].score), ("", 0));
    copy.describe(size, &(FIRST_DESCRIPTOR as u32 - 1).to_ne_bytes());
    assert_eq!(copy.refusal().0, "plugin-abi");
}

#[test]
fn personalities_of_all_zeros_are_read_and_fit_no_device() {
    let ids = PciIds { vendor: 0x1234, device: 0x11e8, class: 0x00_ff00, ..PciIds::default() };
    let fits = |path| {
        let personalities = inspect(path).unwrap().personalities;
        let fitting = personalities.iter().filter(|one| one.fit(ids).is_some()).count();
        (personalities.len(), fitting)
    };
    let copy = Copy::new();
    let count = std::mem::offset_of!(DescriptorHeader, personality_count);
    for (claimed, read) in [(2_u32, 2), (16, 16), (17, 16), (u32::MAX, 16)] {
        copy.describe(count, &claimed.to_ne_bytes());
        assert_eq!(fits(&copy.path), (read, 1), "{claimed}, all but the first of them zeros");
    }
    copy.describe(personality(0), &[0; size_of::<Personality>()]);
    assert_eq!(fits(&copy.path), (16, 0));
}

#[test]
fn names_without_an_end_and_of_any_bytes_are_read_as_far_as_they_go() {
    let copy = Copy::new();
    let name = std::mem::offset_of!(DescriptorHeader, name);
    copy.describe(name, &[b'x'; 64]);
    assert_eq!(inspect(&copy.path).unwrap().name, "x".repeat(64));
    copy.describe(name, &[0xff; 64]);
    assert_eq!(inspect(&copy.path).unwrap().name, "\u{fffd}".repeat(64));
    copy.describe(name, &[0; 64]);
    assert_eq!(inspect(&copy.path).unwrap().name, "");
}

#[test]
fn a_plugin_cut_off_at_any_page_is_refused() {
    let copy = Copy::new();
    let len = copy.file.metadata().unwrap().len();
    // From the end, so that cutting is all it takes.
    for pages in (0..len.div_ceil(4096)).rev() {
        copy.file.set_len(pages * 4096).unwrap();
        assert!(inspect(&copy.path).is_err(), "cut off at {:#x}", pages * 4096);
    }
}

#[test]
fn a_plugin_with_any_bytes_changed_is_read_or_refused() {
    let copy = Copy::new();
    let bytes = fs::read(&copy.path).unwrap();
    let len = bytes.len() as u64;
    // Where what is read stands: the ELF header, symbols and strings after it, the descriptor, the
    // section headers at the end; and anywhere.
    let places = [(0, 64), (0, 0x8000), (copy.descriptor, 0x400), (len - 0x1000, 0x1000), (0, len)];
    let mut random = Random(0x0123_4567_89ab_cdef);
    for round in 0..1_000 {
        let (start, span) = places[round % places.len()];
        let changed: Vec<_> = (0..=random.below(7)).map(|_| start + random.below(span)).collect();
        for &at in &changed {
            copy.write(at, &[random.below(256) as u8]);
        }
        // Either is fine; a panic is not.
        let _ = inspect(&copy.path);
        for &at in &changed {
            copy.write(at, &bytes[at as usize..][..1]);
        }
    }
    assert!(inspect(&copy.path).is_ok(), "all of it was put back");
}

/// Knuth's linear congruential generator: the same changes in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) % limit
    }
}
