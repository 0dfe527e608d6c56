//! What a plugin says of itself, read from its file without running its code.

use serde::{Deserialize, Serialize};

/// A plugin's name and the devices it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginInfo {
    /// The driver's name; the configuration and the log use it.
    pub name: String,
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

/// One kind of device that a driver is for. What is `None` matches anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Personality {
    /// The vendor's number.
    pub vendor: Option<u16>,
    /// The device's number, as its vendor gave it.
    pub device: Option<u16>,
    /// The class code (base class, subclass, programming interface; 24 bits) and which of its
    /// bits have to agree.
    pub class: Option<ClassMatch>,
}

/// A class code under a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassMatch {
    /// The 24 bits to find.
    pub code: u32,
    /// The bits of them that count.
    pub mask: u32,
}

/// What a PCI function says of itself in its configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PciIds {
    /// The vendor's number.
    pub vendor: u16,
    /// The device's number, as its vendor gave it.
    pub device: u16,
    /// The class code, 24 bits.
    pub class: u32,
}

impl Personality {
    /// How closely this personality fits a device: more is closer, `None` is not at all.
    ///
    /// Vendor and device together beat any class; a class beats a vendor alone; among classes the
    /// one with more bits that count wins. A personality that names nothing fits nothing.
    pub fn fit(&self, ids: PciIds) -> Option<u32> {
        let mut fit = 0;
        if let Some(device) = self.device {
            // A device number means nothing without the vendor that gave it.
            self.vendor?;
            (device == ids.device).then_some(())?;
            fit += 1000;
        }
        if let Some(vendor) = self.vendor {
            (vendor == ids.vendor).then_some(())?;
            fit += 1;
        }
        if let Some(class) = self.class {
            ((class.code ^ ids.class) & class.mask == 0).then_some(())?;
            fit += 10 * class.mask.count_ones();
        }
        (fit > 0).then_some(fit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EDU: PciIds = PciIds { vendor: 0x1234, device: 0x11e8, class: 0x00ff00 };

    #[test]
    fn the_closer_personality_fits_better() {
        let exact = Personality { vendor: Some(0x1234), device: Some(0x11e8), class: None };
        let class = Some(ClassMatch { code: 0x00ff00, mask: 0xffff00 });
        let by_class = Personality { class, ..Personality::default() };
        let loose = Some(ClassMatch { code: 0x000000, mask: 0xff0000 });
        let by_base_class = Personality { class: loose, ..Personality::default() };
        let by_vendor = Personality { vendor: Some(0x1234), ..Personality::default() };

        let fits = [exact, by_class, by_base_class, by_vendor].map(|p| p.fit(EDU).unwrap());

        assert!(fits.is_sorted_by(|closer, next| closer > next), "{fits:?}");
    }

    #[test]
    fn what_is_named_has_to_agree() {
        let other_device = Personality { vendor: Some(0x1234), device: Some(1), class: None };
        let no_vendor = Personality { vendor: None, device: Some(0x11e8), class: None };
        let class = Some(ClassMatch { code: 0x010802, mask: 0xffffff });
        let other_class = Personality { vendor: Some(0x1234), device: None, class };

        for personality in [other_device, no_vendor, other_class, Personality::default()] {
            assert_eq!(personality.fit(EDU), None, "{personality:?}");
        }
    }
}
