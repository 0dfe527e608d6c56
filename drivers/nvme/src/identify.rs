//! What `Identify` tells, checked: NVM Express 1.4, section 5.15.2.

use iohost_driver::prelude::*;

use crate::memory::PAGE;
use crate::prp;

/// What the controller is like, as far as it matters.
#[derive(Clone, Debug, Default)]
pub struct Controller {
    pub model: String,
    pub serial: String,
    pub firmware: String,
    /// The most bytes of one transfer: `MDTS`, and what a list of ours holds.
    pub most_bytes: u64,
    /// The largest number that a namespace can have: `NN`.
    pub most_namespaces: u32,
    /// Aborts that can be under way at a time.
    pub aborts: usize,
    pub has_shadow_doorbells: bool,
    /// I/O commands can have an SGL, of data that begins at a multiple of 4.
    pub takes_sgls: bool,
    pub has_dataset_management: bool,
    pub has_write_zeroes: bool,
    pub has_write_cache: bool,
    /// It tells when namespaces change.
    pub tells_of_namespaces: bool,
}

impl Controller {
    /// Figure 247.
    pub fn parse(data: &[u8]) -> Result<Self> {
        let (submission, completion) = (data[512], data[513]);
        ensure!(
            (submission & 0xf..=submission >> 4).contains(&6)
                && (completion & 0xf..=completion >> 4).contains(&4),
            IOReturn::UNSUPPORTED,
            "queue entries of 2^{}..{} and 2^{}..{} bytes, every controller has 64 and 16",
            submission & 0xf,
            submission >> 4,
            completion & 0xf,
            completion >> 4
        );
        let most_bytes = match u32::from(data[77]) {
            0 => prp::MOST_BYTES,
            shift => (PAGE as u64).checked_shl(shift).unwrap_or(u64::MAX).min(prp::MOST_BYTES),
        };
        let most_namespaces = u32_at(data, 516);
        ensure!(
            most_namespaces < u32::MAX - 1,
            IOReturn::DEVICE_ERROR,
            "the number of namespaces is {most_namespaces:#x}"
        );
        let optional = u16_at(data, 520);
        Ok(Self {
            serial: text(&data[4..24]),
            model: text(&data[24..64]),
            firmware: text(&data[64..72]),
            // A shift that loses all bits.
            most_bytes: if most_bytes == 0 { prp::MOST_BYTES } else { most_bytes },
            most_namespaces,
            aborts: usize::from(data[258]) + 1,
            has_shadow_doorbells: u16_at(data, 256) >> 8 & 1 == 1,
            takes_sgls: matches!(u32_at(data, 536) & 3, 1 | 2),
            has_dataset_management: optional >> 2 & 1 == 1,
            has_write_zeroes: optional >> 3 & 1 == 1,
            has_write_cache: data[525] & 1 == 1,
            tells_of_namespaces: u32_at(data, 92) >> 8 & 1 == 1,
        })
    }
}

/// A namespace that can be read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// A block has `1 << shift` bytes.
    pub shift: u32,
    pub blocks: u64,
    pub is_read_only: bool,
}

impl Namespace {
    /// Figure 245. Nothing for one that is not active; an error for one that we cannot use.
    pub fn parse(data: &[u8]) -> Result<Option<Self>> {
        let blocks = u64_at(data, 0);
        if blocks == 0 {
            return Ok(None);
        }
        let format = usize::from(data[26] & 0xf);
        ensure!(
            format <= usize::from(data[25]),
            IOReturn::DEVICE_ERROR,
            "it has format {format} of {} formats",
            usize::from(data[25]) + 1
        );
        let (metadata, shift) = (u16_at(data, 128 + 4 * format), data[130 + 4 * format]);
        ensure!(
            metadata == 0,
            IOReturn::UNSUPPORTED,
            "its blocks have {metadata} bytes of metadata"
        );
        ensure!(
            shift == 9 || shift == 12,
            IOReturn::UNSUPPORTED,
            "its blocks have 2^{shift} bytes, 512 and 4096 are supported"
        );
        ensure!(
            blocks <= u64::MAX >> 1 >> shift,
            IOReturn::DEVICE_ERROR,
            "it has {blocks:#x} blocks of 2^{shift} bytes, which is no number of bytes"
        );
        Ok(Some(Self { shift: shift.into(), blocks, is_read_only: data[99] & 1 == 1 }))
    }

    pub fn bytes(&self) -> u64 {
        self.blocks << self.shift
    }
}

/// The numbers of an active namespace list (figure 249), which has to ascend from `after` and ends
/// with a zero; and whether there can be more.
pub fn active_list(data: &[u8], after: u32, most: u32) -> Result<(Vec<u32>, bool)> {
    let mut last = after;
    let mut numbers = Vec::new();
    for entry in data.chunks_exact(4) {
        let number = u32_at(entry, 0);
        if number == 0 {
            return Ok((numbers, false));
        }
        ensure!(
            number > last && number <= most,
            IOReturn::DEVICE_ERROR,
            "the list of namespaces has {number} after {last}, the most is {most}"
        );
        last = number;
        numbers.push(number);
    }
    Ok((numbers, true))
}

/// ASCII, without the spaces that fill it up and without what nobody can read.
fn text(bytes: &[u8]) -> String {
    let readable = |byte: &u8| if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '?' };
    bytes.iter().map(readable).collect::<String>().trim().to_owned()
}

pub fn u16_at(data: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(data[at..at + 2].try_into().expect("two bytes"))
}

pub fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(data[at..at + 4].try_into().expect("four bytes"))
}

pub fn u64_at(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(data[at..at + 8].try_into().expect("eight bytes"))
}
