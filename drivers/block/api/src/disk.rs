//! What a disk is, and how it is. All numbers are little endian.

use iohost_interface::IOReturn;

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    /// Its number at this driver.
    pub number: u32,
    /// Bytes of a block: a power of two, at least 512.
    pub block: u32,
    /// Blocks there are.
    pub blocks: u64,
    /// The most bytes that go to the device at once: longer requests are cut up by the driver.
    pub most_at_once: u64,
    /// Writes are refused.
    pub is_read_only: bool,
    /// A write can be lost with the power until there was a flush.
    pub has_write_cache: bool,
    /// `Discard` is supported.
    pub can_discard: bool,
    /// `WriteZeroes` is supported.
    pub can_write_zeroes: bool,
    /// The maker's words.
    pub model: String,
    /// The maker's number.
    pub serial: String,
}

impl Disk {
    /// Bytes there are.
    pub fn bytes(&self) -> u64 {
        self.blocks * u64::from(self.block)
    }

    /// Puts it into its encoding.
    pub fn to_bytes(&self) -> Vec<u8> {
        let flags =
            [self.is_read_only, self.has_write_cache, self.can_discard, self.can_write_zeroes];
        let flags = flags.iter().rev().fold(0_u8, |all, flag| all << 1 | u8::from(*flag));
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&self.block.to_le_bytes());
        bytes.extend_from_slice(&self.blocks.to_le_bytes());
        bytes.extend_from_slice(&self.most_at_once.to_le_bytes());
        bytes.push(flags);
        for text in [&self.model, &self.serial] {
            let len = text.floor_char_boundary(255);
            bytes.push(len as u8);
            bytes.extend_from_slice(&text.as_bytes()[..len]);
        }
        bytes
    }

    /// Takes it from its encoding. Errors: `IPC_ERROR` for anything that is none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, IOReturn> {
        let mut rest = Rest(bytes);
        let (number, block) = (rest.u32()?, rest.u32()?);
        let (blocks, most_at_once) = (rest.u64()?, rest.u64()?);
        let [flags] = rest.take()?;
        let flag = |place: u32| flags >> place & 1 == 1;
        let disk = Self {
            number,
            block,
            blocks,
            most_at_once,
            is_read_only: flag(0),
            has_write_cache: flag(1),
            can_discard: flag(2),
            can_write_zeroes: flag(3),
            model: rest.text()?,
            serial: rest.text()?,
        };
        let is_sound = block.is_power_of_two()
            && (512..=1 << 20).contains(&block)
            && blocks.checked_mul(block.into()).is_some();
        if is_sound { Ok(disk) } else { Err(IOReturn::IPC_ERROR) }
    }
}

/// How a device is. What it does not tell is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Warnings: bit 0 spare below its threshold, 1 temperature, 2 unreliable, 3 read only, 4 the
    /// backup of volatile memory failed.
    pub warnings: u8,
    /// Kelvin.
    pub temperature: u16,
    /// Percent of the spare capacity that is left.
    pub spare: u8,
    /// Percent of the spare below which bit 0 of the warnings is set.
    pub spare_threshold: u8,
    /// Percent of its life that is used, by the maker's estimate; may be above 100.
    pub used: u8,
    /// Bytes read and written, in units of 512,000.
    pub read_units: u64,
    /// Bytes written, in units of 512,000.
    pub written_units: u64,
    /// How often it was switched on.
    pub power_cycles: u64,
    /// Hours it was on.
    pub power_on_hours: u64,
    /// How often it lost its power without being told before.
    pub unsafe_shutdowns: u64,
    /// Bytes lost for good, by occurrences.
    pub media_errors: u64,
}

impl Health {
    /// Puts it into its encoding.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.warnings, self.spare, self.spare_threshold, self.used];
        bytes.extend_from_slice(&self.temperature.to_le_bytes());
        for number in [
            self.read_units,
            self.written_units,
            self.power_cycles,
            self.power_on_hours,
            self.unsafe_shutdowns,
            self.media_errors,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// Takes it from its encoding. Errors: `IPC_ERROR` for anything that is none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, IOReturn> {
        let mut rest = Rest(bytes);
        let [warnings, spare, spare_threshold, used] = rest.take()?;
        Ok(Self {
            warnings,
            spare,
            spare_threshold,
            used,
            temperature: u16::from_le_bytes(rest.take()?),
            read_units: rest.u64()?,
            written_units: rest.u64()?,
            power_cycles: rest.u64()?,
            power_on_hours: rest.u64()?,
            unsafe_shutdowns: rest.u64()?,
            media_errors: rest.u64()?,
        })
    }
}

/// What is left of an encoding.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], IOReturn> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(IOReturn::IPC_ERROR)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u32(&mut self) -> Result<u32, IOReturn> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, IOReturn> {
        self.take().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, IOReturn> {
        let [len] = self.take()?;
        let (text, rest) = self.0.split_at_checked(len.into()).ok_or(IOReturn::IPC_ERROR)?;
        self.0 = rest;
        Ok(String::from_utf8_lossy(text).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_comes_back_as_it_went_and_half_of_one_is_none() {
        let disk = Disk {
            number: 3,
            block: 4096,
            blocks: 1 << 40,
            most_at_once: 1 << 20,
            is_read_only: false,
            has_write_cache: true,
            can_discard: false,
            can_write_zeroes: true,
            model: "a model".into(),
            serial: "№ 1".into(),
        };
        let bytes = disk.to_bytes();
        assert_eq!(Disk::from_bytes(&bytes), Ok(disk.clone()));
        for len in 0..bytes.len() {
            assert_eq!(Disk::from_bytes(&bytes[..len]), Err(IOReturn::IPC_ERROR), "{len}");
        }
        let odd = Disk { block: 1000, ..disk };
        assert_eq!(Disk::from_bytes(&odd.to_bytes()), Err(IOReturn::IPC_ERROR));
    }

    #[test]
    fn health_comes_back_as_it_went() {
        let health = Health { warnings: 4, temperature: 313, media_errors: 7, ..Health::default() };
        assert_eq!(Health::from_bytes(&health.to_bytes()), Ok(health));
        assert_eq!(Health::from_bytes(&[0; 20]), Err(IOReturn::IPC_ERROR));
    }
}
