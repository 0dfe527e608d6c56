//! Plugin files, read without running them.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use iohost_control::host::Failure;
use iohost_control::plugin::{Masked, Needs, Personality, PluginInfo};
use iohost_driver_abi::{
    ABI_VERSION, DescriptorHeader, DriverDescriptor, FIRST_DESCRIPTOR, MAGIC, MOST_PERSONALITIES,
    Matching, NAME_BYTES, SYMBOL,
};
use object::read::elf::ElfFile64;
use object::{Architecture, Endianness, Object, ObjectKind, ObjectSection, ObjectSymbol};

/// A plugin's file that has been found fit, and stays open: what is loaded is what was looked at,
/// whatever the path leads to by then.
#[derive(Debug)]
pub struct PluginFile {
    file: File,
    path: PathBuf,
}

impl PluginFile {
    /// Opens a file that [`inspect`] would accept.
    ///
    /// Errors: as `inspect`.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let (file, _) = opened(path)?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A name of the open file, for the dynamic loader. `$ORIGIN` in it is not the plugin's folder.
    pub(crate) fn name_of_descriptor(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}

impl AsFd for PluginFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Reads a plugin's descriptor from its file, and says why where there is none that this host
/// can use. Nothing of the file is run.
pub fn inspect(path: &Path) -> Result<PluginInfo, Failure> {
    opened(path).map(|(_, info)| info)
}

fn opened(path: &Path) -> Result<(File, PluginInfo), Failure> {
    let refused = |code: &str, message: String, next: &str| {
        Failure::new(code, format!("{}: {message}", path.display()), next)
    };
    let read = |path| -> std::io::Result<(File, Vec<u8>)> {
        let (mut file, mut bytes) = (File::open(path)?, Vec::new());
        file.read_to_end(&mut bytes)?;
        Ok((file, bytes))
    };
    let (file, bytes) = read(path).map_err(|err| {
        refused("plugin-unreadable", err.to_string(), "check the path and its permissions")
    })?;
    let elf = ElfFile64::<Endianness>::parse(&*bytes).map_err(|_| {
        refused(
            "plugin-not-a-library",
            "is not a 64-bit ELF file".to_owned(),
            "give the shared object (.so) that `cargo build` made of a `cdylib`",
        )
    })?;
    if elf.kind() != ObjectKind::Dynamic || elf.architecture() != HOST_ARCHITECTURE {
        return Err(refused(
            "plugin-not-a-library",
            format!("is a {:?} file for {:?}", elf.kind(), elf.architecture()),
            "build the driver as a `cdylib` for this machine",
        ));
    }
    let header =
        descriptor_bytes::<{ size_of::<DescriptorHeader>() }>(&elf, 0).ok_or_else(|| {
            refused(
                "plugin-no-driver",
                format!("exports no driver (no data symbol `{SYMBOL}`)"),
                "add `iohost_driver::export_driver!` to the driver's crate",
            )
        })?;
    let header = Header::read(&header);
    if header.magic != MAGIC {
        return Err(refused(
            "plugin-no-driver",
            format!("its symbol `{SYMBOL}` is no driver descriptor"),
            "build the driver with `iohost_driver::export_driver!`",
        ));
    }
    if header.abi_version != ABI_VERSION {
        return Err(refused(
            "plugin-abi",
            format!(
                "was built by {} for plugin ABI {}, this host has ABI {ABI_VERSION}",
                header.built_with, header.abi_version
            ),
            "build the driver against this host's version of iohost_driver",
        ));
    }
    if (header.size as usize) < FIRST_DESCRIPTOR {
        return Err(refused(
            "plugin-abi",
            format!(
                "was built by {} and lacks functions that this host calls (a descriptor of {} \
                 bytes, not {})",
                header.built_with, header.size, FIRST_DESCRIPTOR
            ),
            "build the driver against this host's version of iohost_driver",
        ));
    }
    const MATCHING: usize = std::mem::offset_of!(DriverDescriptor, matching);
    let matching = if header.size as usize >= MATCHING + size_of::<Matching>() {
        let bytes = descriptor_bytes::<{ size_of::<Matching>() }>(&elf, MATCHING as u64);
        let bytes = bytes.ok_or_else(|| {
            refused(
                "plugin-no-driver",
                format!("has a descriptor that ends before its {} bytes", header.size),
                "copy the whole file again",
            )
        })?;
        Competition::read(&bytes)
    } else {
        Competition::default()
    };
    let is_whole = |raw: &iohost_driver_abi::Personality| {
        raw.primary_mask >> 16 == 0 || raw.primary_mask & 0xffff != 0
    };
    if !header.personalities.iter().all(is_whole) {
        return Err(refused(
            "plugin-personality",
            "has a personality with a device id and no vendor id".to_owned(),
            "name the vendor too: a device id means nothing without it",
        ));
    }
    let personality = |(raw, score): (&iohost_driver_abi::Personality, i32)| Personality {
        primary: Masked { value: raw.primary, mask: raw.primary_mask },
        subsystem: Masked { value: raw.subsystem, mask: raw.subsystem_mask },
        class: Masked { value: raw.class, mask: raw.class_mask },
        score,
    };
    let personalities = header.personalities.iter().zip(matching.scores).map(personality).collect();
    let (name, category) = (header.name, matching.category);
    Ok((file, PluginInfo { name, category, personalities, needs: header.needs }))
}

const HOST_ARCHITECTURE: Architecture =
    if cfg!(target_arch = "aarch64") { Architecture::Aarch64 } else { Architecture::X86_64 };

/// Bytes of the descriptor from `offset`, of a part that holds no pointers, so that no relocation
/// changes them.
fn descriptor_bytes<const N: usize>(
    elf: &ElfFile64<'_, Endianness>,
    offset: u64,
) -> Option<[u8; N]> {
    let symbol = elf
        .dynamic_symbols()
        .find(|symbol| symbol.is_definition() && symbol.name() == Ok(SYMBOL))?;
    let section = elf.section_by_index(symbol.section_index()?).ok()?;
    let data = section.data_range(symbol.address().checked_add(offset)?, N as u64).ok()??;
    data.try_into().ok()
}

/// A `DescriptorHeader`, field by field.
struct Header {
    magic: [u8; 8],
    abi_version: u32,
    size: u32,
    name: String,
    built_with: String,
    needs: Needs,
    personalities: Vec<iohost_driver_abi::Personality>,
}

impl Header {
    fn read(bytes: &[u8; size_of::<DescriptorHeader>()]) -> Self {
        let mut fields = Fields(bytes);
        let magic = *fields.take();
        let abi_version = fields.number();
        let size = fields.number();
        let name = fields.text();
        let built_with = fields.text();
        let count = fields.number() as usize;
        let messages = fields.number() != 0;
        let needs = Needs { messages, dma_bytes: u64::from_ne_bytes(*fields.take()) };
        let personalities = std::iter::repeat_with(|| iohost_driver_abi::Personality {
            primary: fields.number(),
            primary_mask: fields.number(),
            subsystem: fields.number(),
            subsystem_mask: fields.number(),
            class: fields.number(),
            class_mask: fields.number(),
        });
        let personalities = personalities.take(count.min(MOST_PERSONALITIES)).collect();
        Self { magic, abi_version, size, name, built_with, needs, personalities }
    }
}

/// A `Matching`, as far as the supervisor takes an interest. Without one: all zeros.
#[derive(Default)]
struct Competition {
    category: String,
    scores: [i32; MOST_PERSONALITIES],
}

impl Competition {
    fn read(bytes: &[u8; size_of::<Matching>()]) -> Self {
        let mut fields = Fields(bytes);
        let category = fields.text();
        Self { category, scores: std::array::from_fn(|_| i32::from_ne_bytes(*fields.take())) }
    }
}

/// The fields that are left, in the order of the `repr(C)` structure, which has no padding.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> &'a [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the header has these fields");
        self.0 = rest;
        field
    }

    fn number(&mut self) -> u32 {
        u32::from_ne_bytes(*self.take())
    }

    fn text(&mut self) -> String {
        let text = self.take::<NAME_BYTES>();
        let len = text.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        String::from_utf8_lossy(&text[..len]).into_owned()
    }
}
