//! What was found.

use iohost_pci::PciAddress;
use serde::Serialize;

use crate::facts::{Facts, Function, Machine, Subject};
use crate::{Code, Severity, rules};

/// What doctor has to say.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether something keeps iohost from the devices asked about, or from every device.
    pub blocks: bool,
    /// The machine.
    pub machine: Machine,
    /// Who would open devices.
    pub subject: Subject,
    /// What is the matter with the machine.
    pub findings: Vec<Finding>,
    /// The functions.
    pub devices: Vec<DeviceReport>,
}

/// A function with its findings.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    /// What is known of it.
    #[serde(flatten)]
    pub facts: Function,
    /// What is the matter with it.
    pub findings: Vec<Finding>,
}

/// One thing that is the matter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// What it is.
    pub code: Code,
    /// How much it matters.
    pub severity: Severity,
    /// The function, where it is not the machine.
    pub device: Option<PciAddress>,
    /// One sentence with the values that matter.
    pub message: String,
    /// What to do about it, in words.
    pub next: String,
    /// The command that removes it, for root; `None` where no command does.
    pub command: Option<String>,
}

impl Report {
    /// Applies the rules. `is_overview`: all functions are there, and none was asked about; what is
    /// the matter with one is then no reason to say that something blocks.
    pub fn of(facts: Facts, is_overview: bool) -> Self {
        let mut findings = rules::of_machine(&facts);
        let devices: Vec<DeviceReport> = facts
            .functions
            .iter()
            .map(|function| DeviceReport {
                facts: function.clone(),
                findings: rules::of_function(&facts, function),
            })
            .collect();
        findings.extend(facts.missing.iter().map(|address| rules::missing(*address)));
        let counted = devices.iter().filter(|_| !is_overview).flat_map(|device| &device.findings);
        let blocks = findings.iter().chain(counted).any(Finding::blocks);
        Self { blocks, machine: facts.machine, subject: facts.subject, findings, devices }
    }
}

impl Finding {
    /// Whether it keeps iohost from the device.
    pub fn blocks(&self) -> bool {
        self.severity == Severity::Blocks
    }
}
