//! One `[[match]]`: the PCI functions that may be taken wherever they are.

use iohost_control::host::{InterruptChoice, PciBackend};
use iohost_control::plugin::{Alternatives, PciMatch};
use iohost_pci::PciAddress;
use serde::Deserialize;
use toml::Spanned;

use super::source::Source;
use super::{ConfigError, DeviceConfig, ErrorPolicy, Location};

/// PCI functions that may be taken wherever they are.
#[derive(Clone, Debug, PartialEq)]
pub struct MatchRule {
    /// Which ones.
    pub wanted: PciMatch,
    /// How each is driven, with another name and location.
    pattern: DeviceConfig,
}

impl MatchRule {
    /// The function at an address, as this rule has it driven.
    pub(crate) fn device(&self, address: PciAddress) -> DeviceConfig {
        let location = Location::Pci(address);
        DeviceConfig { name: location.to_string(), location, ..self.pattern.clone() }
    }

    /// The driver that it names, and the line of the rule.
    pub(crate) fn driver(&self) -> Option<(&str, usize)> {
        self.pattern.driver.as_deref().map(|driver| (driver, self.pattern.line))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawMatch {
    ids: Option<Spanned<String>>,
    primary: Option<Spanned<String>>,
    secondary: Option<Spanned<String>>,
    class: Option<Spanned<String>>,
    driver: Option<String>,
    #[serde(default)]
    category: String,
    #[serde(default)]
    interrupts: Vec<InterruptChoice>,
    backend: Option<Spanned<PciBackend>>,
    #[serde(default)]
    allow_unsafe: bool,
    #[serde(default)]
    on_error: ErrorPolicy,
}

impl Source<'_> {
    pub(super) fn check_rule(&self, rule: Spanned<RawMatch>) -> Result<MatchRule, ConfigError> {
        let line = self.line(&rule.span());
        let rule = rule.into_inner();
        let read = |name: &str, key: Option<Spanned<String>>| {
            let read = |text: Spanned<String>| {
                text.get_ref().parse::<Alternatives>().map_err(|err| {
                    self.error(
                        self.line(&text.span()),
                        format!("key `{name}`: {err}"),
                        "see the ids with `iohost devices`; the device's come first: 11e8:1234 is \
                         0x11e81234",
                    )
                })
            };
            key.map(read).transpose()
        };
        let wanted = PciMatch {
            ids: read("ids", rule.ids)?,
            primary: read("primary", rule.primary)?,
            secondary: read("secondary", rule.secondary)?,
            class: read("class", rule.class)?,
        };
        if wanted == PciMatch::default() {
            return Err(self.error(
                line,
                "a match has none of `ids`, `primary`, `secondary` and `class`".into(),
                "say which PCI functions may be taken, such as primary = \"0x11e81234\"",
            ));
        }
        let address = "0000:00:00.0".parse().expect("an address");
        let any = DeviceConfig::unconfigured(String::new(), Location::Pci(address));
        if let Some(backend) = &rule.backend {
            self.check_backend(backend, &any.location, rule.allow_unsafe)?;
        }
        let pattern = DeviceConfig {
            driver: rule.driver,
            interrupts: rule.interrupts,
            backend: rule.backend.map(Spanned::into_inner),
            on_error: rule.on_error,
            category: rule.category,
            line,
            ..any
        };
        Ok(MatchRule { wanted, pattern })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::parse;

    #[test]
    fn a_match_is_read_with_its_alternatives_and_how_what_it_finds_is_driven() {
        let config = parse(
            "[[match]]\nprimary = \"0x11e81234 0x00008086&0xffff\"\nclass = \"0x01080200\"\n\
             driver = \"edu\"\non_error = \"reset\"\n",
        );
        let rule = &config.unwrap().matches[0];
        assert_eq!(rule.wanted.primary, "0x11e81234 0x00008086&0xffff".parse().ok());
        assert_eq!(rule.driver(), Some(("edu", 1)));
        let device = rule.device("0000:01:00.0".parse().unwrap());
        assert_eq!((&*device.name, device.bind), ("0000:01:00.0", true));
        assert_eq!((device.driver.as_deref(), device.on_error), (Some("edu"), ErrorPolicy::Reset));
    }

    #[test]
    fn a_match_of_everything_or_of_nonsense_is_refused() {
        let message = |text| parse(text).unwrap_err().to_string();
        assert_eq!(
            message("[[match]]\ndriver = \"edu\"\n"),
            "iohost.toml:1: a match has none of `ids`, `primary`, `secondary` and `class`"
        );
        assert_eq!(
            message("[[match]]\n\nclass = \"disk\"\n"),
            "iohost.toml:3: key `class`: \"disk\" is not a number as 0x11e81234, or one under a \
             mask as 0x00001234&0x0000ffff"
        );
        assert!(message("[[match]]\nclass = \"1\"\nbackend = \"uio\"\n").contains("UNSAFE"));
        assert!(message("[[match]]\nclass = \"1\"\nname = \"a\"\n").contains("`name`"));
    }
}
