//! BARs, through the `resourceN` files of sysfs.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use iohost_registers::MappedRegion;

use crate::UioError;

/// The BARs of a function; what follows them in the list is its ROM and what is behind a bridge.
const BARS: usize = 6;

/// Bytes of the unit of mapping.
const PAGE: u64 = 4096;

/// Bits of a resource's flags. Source: Linux, `include/linux/ioport.h`.
const IO_PORTS: u64 = 0x100;
const MEMORY: u64 = 0x200;

/// One BAR.
#[derive(Debug)]
pub struct Bar {
    index: u8,
    /// Where it starts on the bus.
    start: u64,
    /// Bytes.
    pub size: u64,
    is_memory: bool,
    file: File,
    /// All of a BAR of memory, from the page on in which it starts; mapped when first needed.
    mapped: OnceLock<MappedRegion>,
}

/// Every BAR of the function in `sysfs`.
pub(crate) fn bars(sysfs: &Path) -> Result<Vec<Option<Bar>>, UioError> {
    let path = sysfs.join("resource");
    let text = std::fs::read_to_string(&path).map_err(|source| UioError::open(&path, source))?;
    let mut bars = Vec::new();
    for (index, line) in text.lines().take(BARS).enumerate() {
        let resource = resource(line)
            .ok_or_else(|| UioError::Malformed { path: path.clone(), text: line.to_owned() })?;
        bars.push(match resource {
            Some(resource) => Some(Bar::open(sysfs, index as u8, resource)?),
            None => None,
        });
    }
    Ok(bars)
}

/// The first and the last address, and the flags; `Some(None)` of a resource that is not there.
fn resource(line: &str) -> Option<Option<(u64, u64, u64)>> {
    let mut numbers =
        line.split_whitespace().map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let (start, end, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
    if flags & (IO_PORTS | MEMORY) == 0 {
        return Some(None);
    }
    (start <= end && end < u64::MAX).then_some(Some((start, end, flags)))
}

impl Bar {
    fn open(
        sysfs: &Path,
        index: u8,
        (start, end, flags): (u64, u64, u64),
    ) -> Result<Self, UioError> {
        let path: PathBuf = sysfs.join(format!("resource{index}"));
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let file = opened.map_err(|source| UioError::open(&path, source))?;
        let is_memory = flags & MEMORY != 0;
        Ok(Self { index, start, size: end - start + 1, is_memory, file, mapped: OnceLock::new() })
    }

    /// The whole pages that are this BAR's alone.
    pub fn mappable(&self) -> Option<Range<u64>> {
        let whole = self.size / PAGE * PAGE;
        let on_a_page = self.start.is_multiple_of(PAGE);
        (self.is_memory && on_a_page && whole > 0).then_some(0..whole)
    }

    pub(crate) fn is_memory(&self) -> bool {
        self.is_memory
    }

    /// Reads 1, 2, 4 or (not of I/O ports) 8 bytes at their natural alignment, as one access.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), UioError> {
        let at = self.check(offset, data.len())?;
        if !self.is_memory {
            let read = self.file.read_exact_at(data, offset);
            return read.map_err(|source| self.refused("reading", offset, source));
        }
        let region = self.region()?;
        let done = match data.len() {
            1 => region.read::<u8>(at).map(|value| data.copy_from_slice(&value.to_ne_bytes())),
            2 => region.read::<u16>(at).map(|value| data.copy_from_slice(&value.to_ne_bytes())),
            4 => region.read::<u32>(at).map(|value| data.copy_from_slice(&value.to_ne_bytes())),
            _ => region.read::<u64>(at).map(|value| data.copy_from_slice(&value.to_ne_bytes())),
        };
        done.ok_or_else(|| self.out_of_range(offset, data.len()))
    }

    /// Writes; see [`read`](Self::read).
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<(), UioError> {
        let at = self.check(offset, data.len())?;
        if !self.is_memory {
            let written = self.file.write_all_at(data, offset);
            return written.map_err(|source| self.refused("writing", offset, source));
        }
        let region = self.region()?;
        let done = match *data {
            [a] => region.write(at, a),
            [a, b] => region.write(at, u16::from_ne_bytes([a, b])),
            [a, b, c, d] => region.write(at, u32::from_ne_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                region.write(at, u64::from_ne_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => None,
        };
        done.ok_or_else(|| self.out_of_range(offset, data.len()))
    }

    /// Maps part of what is [`mappable`](Self::mappable), from a page on.
    pub(crate) fn map(&self, range: Range<u64>) -> Result<MappedRegion, UioError> {
        let inside = |all: &Range<u64>| {
            all.start <= range.start && range.start < range.end && range.end <= all.end
        };
        if !self.mappable().as_ref().is_some_and(inside) || !range.start.is_multiple_of(PAGE) {
            let (start, end) = (range.start, range.end);
            return Err(UioError::NotMappable { index: self.index, start, end });
        }
        let len = (range.end - range.start) as usize;
        MappedRegion::map(&self.file, range.start, len)
            .map_err(|source| self.refused("mapping", range.start, source))
    }

    fn region(&self) -> Result<&MappedRegion, UioError> {
        if let Some(region) = self.mapped.get() {
            return Ok(region);
        }
        let len = (self.start % PAGE + self.size) as usize;
        let region = MappedRegion::map(&self.file, 0, len)
            .map_err(|source| self.refused("mapping", 0, source))?;
        Ok(self.mapped.get_or_init(|| region))
    }

    /// Where in [`region`](Self::region) an access is.
    fn check(&self, offset: u64, len: usize) -> Result<usize, UioError> {
        let widest = if self.is_memory { 8 } else { 4 };
        let natural = len.is_power_of_two() && len <= widest && offset.is_multiple_of(len as u64);
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= self.size);
        match natural && inside {
            true => Ok((self.start % PAGE + offset) as usize),
            false => Err(self.out_of_range(offset, len)),
        }
    }

    fn out_of_range(&self, offset: u64, len: usize) -> UioError {
        UioError::OutOfRange { index: self.index, offset, len, size: self.size }
    }

    fn refused(&self, verb: &str, offset: u64, source: io::Error) -> UioError {
        let operation = format!("{verb} BAR {} at {offset:#x}", self.index);
        UioError::Device { operation, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function with 8 KiB of memory, 256 bytes of memory in the middle of a page, and ports.
    fn function() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let resource = "0x00000000febf0000 0x00000000febf1fff 0x0000000000040200\n\
                        0x00000000febf2100 0x00000000febf21ff 0x0000000000040200\n\
                        0x000000000000c040 0x000000000000c05f 0x0000000000040101\n\
                        0x0000000000000000 0x0000000000000000 0x0000000000000000\n";
        std::fs::write(folder.path().join("resource"), resource).unwrap();
        for (index, size) in [(0, 0x2000), (1, 0x1000), (2, 0x20)] {
            let path = folder.path().join(format!("resource{index}"));
            std::fs::write(path, vec![0; size]).unwrap();
        }
        folder
    }

    #[test]
    fn bars_are_as_the_kernel_lists_them() {
        let folder = function();
        let bars = bars(folder.path()).unwrap();
        let shown: Vec<_> =
            bars.iter().map(|bar| bar.as_ref().map(|bar| (bar.size, bar.mappable()))).collect();
        assert_eq!(
            shown,
            [Some((0x2000, Some(0..0x2000))), Some((0x100, None)), Some((0x20, None)), None]
        );
    }

    #[test]
    fn an_access_goes_to_its_place_in_every_kind_of_bar() {
        let folder = function();
        let bars = bars(folder.path()).unwrap();
        // Where the file has it: a mapping starts on a page, the second BAR in the middle of one.
        for (index, place) in [(0, 0x10), (1, 0x110), (2, 0x10)] {
            let bar = bars[index].as_ref().unwrap();
            for len in [1, 2, 4, 8] {
                if len == 8 && !bar.is_memory() {
                    continue;
                }
                let value = &[0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, index as u8][..len];
                bar.write(0x10, value).unwrap();
                let mut read = vec![0; len];
                bar.read(0x10, &mut read).unwrap();
                let file = std::fs::read(folder.path().join(format!("resource{index}"))).unwrap();
                assert_eq!((&read[..], &file[place..place + len]), (value, value));
            }
        }
    }

    #[test]
    fn an_access_that_does_not_fit_is_refused() {
        let folder = function();
        let bars = bars(folder.path()).unwrap();
        for (index, offset, len) in
            [(0, 0x2000, 4), (0, 2, 4), (0, 0, 3), (1, 0x100, 1), (2, 0, 8), (0, u64::MAX - 3, 4)]
        {
            let bar: &Bar = bars[index].as_ref().unwrap();
            let read = bar.read(offset, &mut vec![0; len]).unwrap_err();
            let write = bar.write(offset, &vec![0; len]).unwrap_err();
            for err in [read, write] {
                assert!(matches!(err, UioError::OutOfRange { .. }), "{index} {offset:#x}: {err}");
            }
        }
    }

    #[test]
    fn only_whole_pages_of_a_bar_alone_are_mapped() {
        let folder = function();
        let bars = bars(folder.path()).unwrap();
        let bar = |index: usize| bars[index].as_ref().unwrap();
        assert_eq!(bar(0).map(0x1000..0x2000).unwrap().len(), 0x1000);
        for (index, range) in [
            (0, 0..0x3000),
            (0, 1..0x1000),
            (0, 0..0),
            (0, 0x2000..0x3000),
            (1, 0..0x100),
            (2, 0..0x20),
        ] {
            let err = bar(index).map(range.clone()).unwrap_err();
            assert!(matches!(err, UioError::NotMappable { .. }), "{index} {range:x?}: {err}");
        }
    }

    #[test]
    fn a_list_that_makes_no_sense_is_named_with_its_line() {
        for line in ["what", "0x10 0x0f 0x200", "0x0 0xffffffffffffffff 0x200", "0x0 0x1"] {
            assert_eq!(resource(line), None, "{line}");
        }
    }
}
