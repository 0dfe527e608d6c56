//! `iohost doctor` and `iohost explain`.

use std::fmt::Write;
use std::path::Path;

use iohost_client::ClientError;
use iohost_control::host::Failure;
use iohost_doctor::{
    Code, Daemon, DeviceReport, Explanation, Facts, Finding, Function, Machine, Module, Owned,
    Question, Report, refusal,
};
use iohost_pci::{BarMapping, PciAddress, PciBar};
use serde::Serialize;

use crate::CommandError;
use crate::options::{DoctorOptions, Options};
use crate::output::{Output, table};

/// Whether iohost can have the devices.
pub(crate) enum Verdict {
    Clear,
    Blocked,
}

pub(crate) fn run(
    options: &Options,
    output: Output,
    doctor: &DoctorOptions,
) -> Result<Verdict, CommandError> {
    let question = Question {
        devices: doctor.devices.clone(),
        dma_bytes: doctor.dma_memory,
        daemon: ask_daemon(options, output),
    };
    let facts = Facts::gather(Path::new("/"), &question).map_err(|err| {
        Failure::new(refusal::of_pci(&err).name(), err.to_string(), err.next_step())
    })?;
    let is_overview = question.devices.is_empty();
    let report = Report::of(facts, is_overview);
    output.result(&report, describe(&report, is_overview).trim_end());
    Ok(if report.blocks { Verdict::Blocked } else { Verdict::Clear })
}

/// What a daemon that runs says of its devices. One that does not answer is no reason to say
/// nothing of the rest.
fn ask_daemon(options: &Options, output: Output) -> Option<Daemon> {
    let asked = options.connect().and_then(|mut daemon| Ok((daemon.status()?, daemon.devices()?)));
    let (status, devices) = match asked {
        Ok(answers) => answers,
        Err(ClientError::NotRunning { .. }) => return None,
        Err(err) => {
            output.error(&err.failure());
            return None;
        }
    };
    let owned = devices.into_iter().filter_map(|device| {
        let address: PciAddress = device.location.parse().ok()?;
        let name = device.service?;
        let service = status.services.iter().find(|service| service.name == name)?;
        Some(Owned {
            address,
            driver: service.driver.clone(),
            pid: service.pid,
            backend: device.kind,
            is_unsafe: device.is_unsafe,
            service: name,
        })
    });
    Some(Daemon { pid: status.pid, services: owned.collect() })
}

fn describe(report: &Report, is_overview: bool) -> String {
    let mut text = describe_machine(report);
    list(&mut text, &report.findings);
    if is_overview {
        text += "\n";
        text += &overview(&report.devices);
    } else {
        for device in &report.devices {
            text += "\n";
            text += &describe_function(&device.facts);
            list(&mut text, &device.findings);
        }
    }
    let all = || report.devices.iter().flat_map(|device| &device.findings).chain(&report.findings);
    if all().next().is_some() {
        text += "\nThe commands are for root; `iohost explain CODE` says more of a finding.\n";
    }
    text
}

/// The findings, each with its command on a line of its own, after a dollar sign.
fn list(text: &mut String, findings: &[Finding]) {
    for Finding { code, severity, message, next, command, .. } in findings {
        line(text, format_args!("  {severity} {code}: {message}"));
        line(text, format_args!("    next: {next}"));
        if let Some(command) = command {
            line(text, format_args!("    $ {command}"));
        }
    }
}

fn line(text: &mut String, line: impl std::fmt::Display) {
    writeln!(text, "{line}").expect("writing to a string cannot fail");
}

fn fact(text: &mut String, name: &str, value: impl std::fmt::Display) {
    line(text, format_args!("  {name:<21} {value}"));
}

fn describe_machine(report: &Report) -> String {
    let Report { machine, subject, .. } = report;
    let mut text = "this machine\n".to_owned();
    let iommu = &machine.iommu;
    fact(
        &mut text,
        "IOMMU",
        match iommu.groups {
            0 => "none at work".to_owned(),
            groups => format!("on: {}, {groups} groups", join(&iommu.units, "unnamed")),
        },
    );
    fact(&mut text, "interrupt remapping", known(machine.remaps_interrupts, "on", "off"));
    fact(&mut text, "vfio-pci", module(machine.vfio_pci));
    fact(&mut text, "nodes of devices", known(machine.device_nodes, "yes", "no"));
    fact(&mut text, "iommufd", if machine.iommufd { "yes" } else { "no" });
    fact(&mut text, "uio_pci_generic", module(machine.uio_pci_generic));
    fact(&mut text, "no-IOMMU mode", no_iommu_mode(machine));
    let limit = match subject.memlock {
        _ if subject.locks_all_memory => "no limit".to_owned(),
        None => "no limit".to_owned(),
        Some(bytes) => format!("{bytes} bytes"),
    };
    let who = match subject.is_daemon {
        true => format!("the daemon, process {}, user {}", subject.pid, subject.user),
        false => format!("user {}; no daemon was asked", subject.user),
    };
    fact(&mut text, "locked memory", format_args!("{limit} ({who})"));
    text
}

fn no_iommu_mode(machine: &Machine) -> &'static str {
    match machine.no_iommu_mode {
        Some(true) => "on: UNSAFE",
        Some(false) => "off",
        None => "none",
    }
}

fn describe_function(function: &Function) -> String {
    let Function { address, vendor, device, class, .. } = function;
    let mut text = format!("{address}  {vendor:04x}:{device:04x}, class {class:06x}\n");
    fact(&mut text, "kernel driver", function.driver.as_deref().unwrap_or("none"));
    fact(
        &mut text,
        "IOMMU group",
        match &function.group {
            None => "none".to_owned(),
            Some(group) => group.number.to_string(),
        },
    );
    for member in function.group.iter().flat_map(|group| &group.members) {
        let driver = member.driver.as_deref().unwrap_or("no driver");
        let role = match (member.is_bridge, member.blocks) {
            (_, true) => "blocks",
            (true, false) => "a bridge, does not block",
            (false, false) => "does not block",
        };
        fact(&mut text, "", format_args!("{} {driver}, {role}", member.address));
    }
    fact(&mut text, "reached by", function.way);
    for node in &function.nodes {
        let rights = if node.may_open { "may be opened" } else { "may not be opened" };
        let path = node.path.display();
        fact(&mut text, "", format_args!("{path} mode {:o}, {rights}", node.mode));
    }
    let state = match (function.configuration.power_state, &function.kernel_power_state) {
        (Some(0), _) => "D0",
        (Some(1), _) => "D1",
        (Some(2), _) => "D2",
        (Some(_), _) => "D3hot",
        (None, Some(state)) => state,
        (None, None) => "not known",
    };
    fact(&mut text, "power state", state);
    fact(
        &mut text,
        "reset",
        function.reset_methods.as_deref().map_or("none".to_owned(), |all| join(all, "none")),
    );
    let vectors = |count: Option<u32>| count.map_or("?".to_owned(), |count| count.to_string());
    let known = &function.configuration;
    fact(
        &mut text,
        "interrupts",
        format_args!(
            "INTx {}, MSI {}, MSI-X {}",
            u8::from(known.has_line),
            vectors(known.msi),
            vectors(known.msi_x)
        ),
    );
    for PciBar { index, size, mapping } in &function.bars {
        let mapping = match mapping {
            BarMapping::Whole => "memory, can be mapped",
            BarMapping::IfAloneInItsPage => "memory, can be mapped if alone in its page",
            BarMapping::Ports => "I/O ports, cannot be mapped",
            BarMapping::Unassigned => "has no address",
        };
        fact(&mut text, &format!("BAR {index}"), format_args!("{size:#x} bytes, {mapping}"));
    }
    text
}

/// The functions that iohost could take, and what is the matter with them, by code.
fn overview(devices: &[DeviceReport]) -> String {
    let mut shown = table(&["FUNCTION", "ID", "KERNEL DRIVER", "GROUP", "FINDINGS"]);
    for DeviceReport { facts, findings } in devices {
        if findings.iter().any(|finding| finding.code == Code::NotAnEndpoint) {
            continue;
        }
        let codes: Vec<String> = findings.iter().map(|finding| finding.code.to_string()).collect();
        shown.add_row([
            facts.address.to_string(),
            format!("{:04x}:{:04x}", facts.vendor, facts.device),
            facts.driver.clone().unwrap_or_else(|| "-".into()),
            facts.group.as_ref().map_or("-".into(), |group| group.number.to_string()),
            if codes.is_empty() { "-".into() } else { codes.join(" ") },
        ]);
    }
    format!("{}\n", shown.trim_fmt())
}

fn known(fact: Option<bool>, yes: &'static str, no: &'static str) -> &'static str {
    fact.map_or("not known", |fact| if fact { yes } else { no })
}

fn module(module: Module) -> &'static str {
    match module {
        Module::Loaded => "loaded",
        Module::NotLoaded => "not loaded",
        Module::Absent => "not in this kernel",
    }
}

fn join(words: &[String], nothing: &str) -> String {
    if words.is_empty() { nothing.to_owned() } else { words.join(" ") }
}

/// What there is to say of a code, or all codes.
pub(crate) fn explain(output: Output, code: Option<&str>) -> Result<(), CommandError> {
    let Some(word) = code else {
        all_codes(output);
        return Ok(());
    };
    let code: Code = word.parse().map_err(|()| {
        CommandError::usage(Failure::new(
            "no-such-code",
            format!("there is no code {word:?}"),
            "`iohost explain` lists all codes",
        ))
    })?;
    let explanation = code.explanation();
    let Explanation { severity, means, why, check, fix, .. } = explanation;
    let severity = severity.map_or(String::new(), |severity| format!(" ({severity})"));
    let text =
        format!("{code}{severity}: {means}\n\n{why}\n\nSee for yourself: {check}\n\nFix: {fix}");
    output.result(&explanation, text);
    Ok(())
}

fn all_codes(output: Output) {
    #[derive(Serialize)]
    struct Codes {
        codes: Vec<Explanation>,
    }
    let codes: Vec<Explanation> = Code::ALL.iter().map(|code| code.explanation()).collect();
    let mut shown = table(&["CODE", "MEANS"]);
    for Explanation { code, means, .. } in &codes {
        shown.add_row([code.name(), means]);
    }
    let text = shown.trim_fmt();
    output.result(&Codes { codes }, text);
}
