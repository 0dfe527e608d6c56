//! What a plugin says of itself, read from its file without running its code, and which devices
//! that is.
//!
//! The rules are those of DriverKit's matching (IOPCIFamily, `IOPCIDevice::matchPropertyTable`):
//! a driver is for a device if one of its personalities is; a personality is if each dword that it
//! names is equal under its mask; and in the text form ([`PciMatch`]) each key holds alternatives.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A plugin's name and the devices it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginInfo {
    /// The driver's name; the configuration and the log use it.
    pub name: String,
    /// Only drivers of one category compete for a device. Most have the one without a name.
    pub category: String,
    /// The devices it drives; any of them suffices.
    pub personalities: Vec<Personality>,
    /// What it cannot do without.
    pub needs: Needs,
}

/// What a driver cannot do without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// The most memory that it has mapped for its device at a time; 0: none.
    pub dma_bytes: u64,
    /// Interrupts by message, MSI or MSI-X.
    pub messages: bool,
}

/// A dword of configuration space, and which of its bits have to agree. None of them: all do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Masked {
    /// The bits to find.
    pub value: u32,
    /// The bits that count.
    pub mask: u32,
}

/// One kind of device that a driver is for. A dword whose mask is 0 matches anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Personality {
    /// At 0x00: the device's number in the upper half, its vendor's in the lower.
    pub primary: Masked,
    /// At 0x2C: those of the board.
    pub subsystem: Masked,
    /// At 0x08: the class code in the upper 24 bits, the revision in the lower 8.
    pub class: Masked,
    /// What the driver thinks of itself (`IOProbeScore`), on top of how closely it fits.
    pub score: i32,
}

/// What a PCI function says of itself in its configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PciIds {
    /// The vendor's number.
    pub vendor: u16,
    /// The device's number, as its vendor gave it.
    pub device: u16,
    /// The number of the board's vendor.
    pub subsystem_vendor: u16,
    /// The board's number, as its vendor gave it.
    pub subsystem_device: u16,
    /// The class code, 24 bits.
    pub class: u32,
    /// The revision.
    pub revision: u8,
}

impl PciIds {
    /// The dword at 0x00 of configuration space.
    pub fn primary(&self) -> u32 {
        u32::from(self.device) << 16 | u32::from(self.vendor)
    }

    /// The dword at 0x2C.
    pub fn subsystem(&self) -> u32 {
        u32::from(self.subsystem_device) << 16 | u32::from(self.subsystem_vendor)
    }

    /// The dword at 0x08.
    pub fn class_and_revision(&self) -> u32 {
        self.class << 8 | u32::from(self.revision)
    }
}

impl Masked {
    /// All bits have to agree.
    pub fn exactly(value: u32) -> Self {
        Self { value, mask: u32::MAX }
    }

    /// Whether a dword agrees.
    pub fn agrees(&self, dword: u32) -> bool {
        (self.value ^ dword) & self.mask == 0
    }

    fn is_set(&self) -> bool {
        self.mask != 0
    }
}

impl Personality {
    /// The devices of a vendor that have a number.
    pub fn pci(vendor: u16, device: u16) -> Self {
        let primary = Masked::exactly(u32::from(device) << 16 | u32::from(vendor));
        Self { primary, ..Self::default() }
    }

    /// How well this personality fits a device: more is better, `None` is not at all.
    ///
    /// It is the driver's own score, and how much of the device it names: 1000 for its number (a
    /// part of that for a part of its bits) and 1 for its vendor, as `IOPCIMatch` counts, and 10
    /// for each bit of class, revision and subsystem. So a device's number beats any class; a class
    /// beats a vendor alone; and of two that agree, the one that asks for more wins. A personality
    /// that names nothing fits nothing, nor does a device's number without its vendor.
    pub fn fit(&self, ids: PciIds) -> Option<i32> {
        let Self { primary, subsystem, class, score } = self;
        let names_something = primary.is_set() || subsystem.is_set() || class.is_set();
        let (device, vendor) = (primary.mask >> 16, primary.mask & 0xffff);
        let is_whole = names_something && (device == 0 || vendor != 0);
        let agrees = primary.agrees(ids.primary())
            && subsystem.agrees(ids.subsystem())
            && class.agrees(ids.class_and_revision());
        let bits = |mask: u32| mask.count_ones() as i32;
        let closeness = 1000 * bits(device) / 16
            + i32::from(vendor != 0)
            + 10 * (bits(subsystem.mask) + bits(class.mask));
        (is_whole && agrees).then(|| score.saturating_add(closeness))
    }
}

/// Alternatives for one dword, as DriverKit writes them: `0x11e81234`, or `0x00001234&0x0000ffff`
/// under a mask, several with spaces between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alternatives(Vec<(u32, Option<u32>)>);

/// A text that is no list of alternatives.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a number as 0x11e81234, or one under a mask as 0x00001234&0x0000ffff")]
pub struct NotAlternatives(String);

impl FromStr for Alternatives {
    type Err = NotAlternatives;

    fn from_str(text: &str) -> Result<Self, NotAlternatives> {
        let number = |text: &str| {
            let digits = text.strip_prefix("0x").or(text.strip_prefix("0X")).unwrap_or(text);
            // A sign is a number to the standard library.
            let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            u32::from_str_radix(digits, 16).ok().filter(|_| is_hex)
        };
        let one = |word: &str| {
            let read = match word.split_once('&') {
                Some((value, mask)) => {
                    number(value).zip(number(mask)).map(|(value, mask)| (value, Some(mask)))
                }
                None => number(word).map(|value| (value, None)),
            };
            read.ok_or_else(|| NotAlternatives(word.to_owned()))
        };
        let all = text.split_whitespace().map(one).collect::<Result<Vec<_>, _>>()?;
        if all.is_empty() {
            return Err(NotAlternatives(text.to_owned()));
        }
        Ok(Self(all))
    }
}

impl Alternatives {
    fn agree(&self, dword: u32, default_mask: u32) -> bool {
        self.0.iter().any(|(value, mask)| {
            Masked { value: *value, mask: mask.unwrap_or(default_mask) }.agrees(dword)
        })
    }
}

/// Which devices, as DriverKit's keys say it: each key that is there has to agree, and one of its
/// alternatives is enough for that. Without any key: no device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciMatch {
    /// `IOPCIMatch`: device and vendor, or else those of the board.
    pub ids: Option<Alternatives>,
    /// `IOPCIPrimaryMatch`: device and vendor.
    pub primary: Option<Alternatives>,
    /// `IOPCISecondaryMatch`: device and vendor of the board.
    pub secondary: Option<Alternatives>,
    /// `IOPCIClassMatch`: the class in the upper 24 bits; the revision counts under a mask only.
    pub class: Option<Alternatives>,
}

impl PciMatch {
    /// Whether a device is one of them.
    pub fn agrees(&self, ids: PciIds) -> bool {
        const ALL: u32 = u32::MAX;
        const CLASS: u32 = 0xffff_ff00;
        let asks = [&self.ids, &self.primary, &self.secondary, &self.class];
        let is_in = |key: &Option<Alternatives>, dwords: &[u32], mask| match key {
            Some(key) => dwords.iter().any(|dword| key.agree(*dword, mask)),
            None => true,
        };
        asks.iter().any(|key| key.is_some())
            && is_in(&self.ids, &[ids.primary(), ids.subsystem()], ALL)
            && is_in(&self.primary, &[ids.primary()], ALL)
            && is_in(&self.secondary, &[ids.subsystem()], ALL)
            && is_in(&self.class, &[ids.class_and_revision()], CLASS)
    }
}

impl fmt::Display for PciIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}, class {:06x}", self.vendor, self.device, self.class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EDU: PciIds = PciIds {
        vendor: 0x1234,
        device: 0x11e8,
        subsystem_vendor: 0x1af4,
        subsystem_device: 0x1100,
        class: 0x00ff00,
        revision: 0x10,
    };

    fn masked(value: u32, mask: u32) -> Masked {
        Masked { value, mask }
    }

    fn by_class(value: u32, mask: u32) -> Personality {
        Personality { class: masked(value, mask), ..Personality::default() }
    }

    #[test]
    fn the_closer_personality_fits_better() {
        let exact = Personality::pci(0x1234, 0x11e8);
        let with = |subsystem, class| Personality { subsystem, class, ..exact };
        let any = Masked::default();
        let fits = [
            with(Masked::exactly(0x1100_1af4), masked(0x0010, 0xff)),
            with(Masked::exactly(0x1100_1af4), any),
            with(any, masked(0x0010, 0xff)),
            exact,
            Personality { primary: masked(0x11e0_1234, 0xfff0_ffff), ..Personality::default() },
            by_class(0x00ff_0010, 0xffff_ffff),
            by_class(0x00ff_0000, 0xffff_ff00),
            by_class(0x0000_0000, 0xff00_0000),
            Personality { primary: masked(0x1234, 0xffff), ..Personality::default() },
        ]
        .map(|personality| personality.fit(EDU).unwrap());
        assert!(fits.is_sorted_by(|closer, next| closer > next), "{fits:?}");
    }

    #[test]
    fn a_driver_may_think_more_or_less_of_itself_than_its_closeness() {
        let exact = Personality::pci(0x1234, 0x11e8);
        let with = |score| Personality { score, ..exact }.fit(EDU).unwrap();
        assert_eq!([with(-1000), with(0), with(500)], [1, 1001, 1501]);
        assert_eq!(with(i32::MAX), i32::MAX);
    }

    #[test]
    fn what_is_named_has_to_agree() {
        let of = |primary| Personality { primary, ..Personality::default() };
        let edu = Personality::pci(0x1234, 0x11e8);
        for (personality, why) in [
            (Personality::pci(0x1234, 1), "another device"),
            (Personality::pci(0x8086, 0x11e8), "another vendor"),
            (of(masked(0x11e8_0000, 0xffff_0000)), "no vendor"),
            (of(masked(0x11e8_0000, 0xffff_00ff)), "another vendor under a mask"),
            (Personality { class: masked(0x0108_0200, 0xffff_ff00), ..edu }, "another class"),
            (Personality { class: masked(0x11, 0xff), ..edu }, "another revision"),
            (Personality { subsystem: Masked::exactly(0x1101_1af4), ..edu }, "another board"),
            (Personality::default(), "nothing named"),
        ] {
            assert_eq!(personality.fit(EDU), None, "{why}");
        }
    }

    /// Keys as a table: `IOPCIMatch`, primary, secondary, class.
    fn agrees(keys: [&str; 4]) -> bool {
        let read = |text: &str| (!text.is_empty()).then(|| text.parse().unwrap());
        let [ids, primary, secondary, class] = keys.map(read);
        PciMatch { ids, primary, secondary, class }.agrees(EDU)
    }

    #[test]
    fn alternatives_of_a_key_are_or_and_keys_are_and() {
        for (keys, expected) in [
            (["0x11e81234", "", "", ""], true),
            (["11E81234", "", "", ""], true),
            (["0x11001af4", "", "", ""], true),
            (["0x11e81235", "", "", ""], false),
            (["0x00001111 0x11e81234", "", "", ""], true),
            (["0x00001234&0x0000ffff", "", "", ""], true),
            (["0x00001234&0xf000ffff", "", "", ""], false),
            (["", "0x11e81234", "", ""], true),
            (["", "0x11001af4", "", ""], false),
            (["", "", "0x11001af4", ""], true),
            (["", "", "0x11e81234", ""], false),
            (["", "", "", "0x00ff0000"], true),
            (["", "", "", "0x00ff0077"], true),
            (["", "", "", "0x00ff0010&0xffffffff"], true),
            (["", "", "", "0x00ff0011&0xffffffff"], false),
            (["", "", "", "0x01080200 0x00ff0000"], true),
            (["", "", "", "0x00000010&0x000000ff"], true),
            (["", "0x11e81234", "0x11001af4", "0x00ff0000"], true),
            (["", "0x11e81234", "0x11001af4", "0x01080200"], false),
            (["", "0x11e81235", "0x11001af4", ""], false),
            (["", "", "", ""], false),
        ] {
            assert_eq!(agrees(keys), expected, "{keys:?}");
        }
    }

    #[test]
    fn what_is_no_alternative_is_refused_with_the_word() {
        for (text, word) in [
            ("", ""),
            ("edu", "edu"),
            ("0x1 0xg", "0xg"),
            ("0x1&", "0x1&"),
            ("&0xff", "&0xff"),
            ("0x123456789", "0x123456789"),
            ("+1", "+1"),
            ("0x1&0x2&0x3", "0x1&0x2&0x3"),
        ] {
            let refused = text.parse::<Alternatives>().unwrap_err();
            assert_eq!(refused, NotAlternatives(word.to_owned()), "{text:?}");
        }
    }
}
