//! `iohost status`, `bind`, `unbind`, `upgrade`, `reload`, `properties` and `power`.

use std::path::Path;

use iohost_control::host::{Outcome, PowerState, Quiesced};
use iohost_control::varlink::{BindOptions, Reloaded, Service, State, Status};

use crate::CommandError;
use crate::options::{BindingOptions, Options, PowerChoice};
use crate::output::{Output, backend, more, table};

pub(crate) fn status(options: &Options, output: Output) -> Result<(), CommandError> {
    let status = options.connect()?.status()?;
    let text = describe(&status);
    output.result(&status, text);
    Ok(())
}

pub(crate) fn statistics(
    options: &Options,
    output: Output,
    service: &str,
) -> Result<(), CommandError> {
    let statistics = options.connect()?.statistics(service)?;
    let mut shown = table(&[
        "QUEUE",
        "WAITING",
        "EXECUTED",
        "DROPPED",
        "WAIT p50/p99 µs",
        "RUN p50/p99 µs",
        "LONGEST µs",
    ]);
    let micros = |ns: u64| format!("{}.{}", ns / 1000, ns / 100 % 10);
    for queue in &statistics.queues {
        shown.add_row([
            queue.name.clone(),
            queue.depth.to_string(),
            queue.executed.to_string(),
            queue.dropped.to_string(),
            format!("{} / {}", micros(queue.wait_p50_ns), micros(queue.wait_p99_ns)),
            format!("{} / {}", micros(queue.run_p50_ns), micros(queue.run_p99_ns)),
            micros(queue.longest_ns),
        ]);
    }
    let text = format!("{service}: {} sessions\n{}", statistics.sessions, shown.trim_fmt());
    output.result(&statistics, text);
    Ok(())
}

fn describe(status: &Status) -> String {
    let Status { version, pid, uptime_seconds, services } = status;
    let mut text = format!("iohost {version}, process {pid}, up {uptime_seconds} s");
    if services.is_empty() {
        return text + "\nno services: bind a device, or add one to the configuration";
    }
    let mut shown = table(&[
        "SERVICE",
        "LOCATION",
        "BACKEND",
        "DRIVER",
        "STATE",
        "PROCESS",
        "INCARNATION",
        "SESSIONS",
    ]);
    for service in services {
        shown.add_row([
            service.name.clone(),
            service.location.clone(),
            backend(service.backend.as_deref().unwrap_or("-"), service.is_unsafe),
            service.driver.clone().unwrap_or_else(|| "-".into()),
            state(service),
            service
                .quiesced
                .as_ref()
                .map_or("-".into(), |quiesced| format!("{:?}", quiesced.outcome).to_lowercase()),
            service.pid.map_or("-".into(), |pid| pid.to_string()),
            service.incarnation.to_string(),
            service.sessions.to_string(),
        ]);
    }
    text = format!("{text}\n{}", shown.trim_fmt());
    for service in services {
        if let Some(Quiesced { outcome, how, .. }) = &service.quiesced {
            let what = match outcome {
                Outcome::Reset => "its device is safe, reset by",
                Outcome::Clean => "its device is safe, but not reset",
                Outcome::Quarantined => "its device is quarantined",
            };
            text += &format!("\n{}: {what}: {how}", service.name);
        }
        if let (Some(driver), Some(choice)) = (&service.driver, &service.choice) {
            text += &format!("\n{}: driver {driver}, because {choice}", service.name);
        }
        if service.taken_over {
            text += &format!("\n{}: an earlier daemon started its driver", service.name);
        }
        if let Some(sandbox) = &service.sandbox {
            text += &format!("\n{}: sandbox: {sandbox}", service.name);
            if !service.refused_calls.is_empty() {
                text += &format!("; refused so far: {}", service.refused_calls.join(", "));
            }
        }
        if let Some(reason) = &service.reason {
            text += &format!("\n{}: {}\n  next: {}", service.name, reason.message, reason.next);
            text += &more(&reason.code);
        }
    }
    text
}

/// What a service is doing, and what its driver says that it is.
fn state(service: &Service) -> String {
    let mut words = vec![format!("{:?}", service.state).to_lowercase()];
    if service.state == State::Running {
        words.extend((!service.is_registered).then(|| "hidden".to_owned()));
        words.extend(service.is_busy.then(|| "busy".to_owned()));
        let power = service.power.filter(|power| *power != PowerState::On);
        words.extend(power.map(|power| format!("power {power:?}").to_lowercase()));
    }
    words.join(", ")
}

pub(crate) fn bind(
    options: &Options,
    output: Output,
    binding: &BindingOptions,
) -> Result<(), CommandError> {
    let BindingOptions { ref device, group, persist, force } = *binding;
    let bound = options.connect()?.bind_with(device, BindOptions { group, force, persist })?;
    output.result(&bound, format_args!("{} runs driver {}", bound.service, bound.driver));
    Ok(())
}

pub(crate) fn upgrade(
    options: &Options,
    output: Output,
    service: &str,
    plugin: &Path,
) -> Result<(), CommandError> {
    let upgraded = options.connect()?.upgrade(service, plugin)?;
    let text = format!(
        "{} runs the new version of driver {}, installed as {}",
        upgraded.service, upgraded.driver, upgraded.plugin
    );
    output.result(&upgraded, text);
    Ok(())
}

pub(crate) fn unbind(options: &Options, output: Output, device: &str) -> Result<(), CommandError> {
    let unbound = options.connect()?.unbind(device)?;
    let text = match &unbound.kernel_driver {
        Some(driver) => format!("{device} is stopped and bound to {driver} again"),
        None => format!("{device} is stopped; it has no kernel driver to go back to"),
    };
    output.result(&unbound, text);
    Ok(())
}

pub(crate) fn reload(options: &Options, output: Output) -> Result<(), CommandError> {
    let reloaded = options.connect()?.reload()?;
    let Reloaded { started, stopped, restarted, kept } = &reloaded;
    let mut lines = Vec::new();
    for (names, what) in [
        (started, "is started"),
        (stopped, "is stopped and given back"),
        (restarted, "is started again"),
        (kept, "goes on as it was"),
    ] {
        lines.extend(names.iter().map(|name| format!("{name} {what}")));
    }
    let text = if lines.is_empty() { "there are no services".into() } else { lines.join("\n") };
    output.result(&reloaded, text);
    Ok(())
}

pub(crate) fn properties(
    options: &Options,
    output: Output,
    service: &str,
) -> Result<(), CommandError> {
    let properties = options.connect()?.properties(service)?;
    // A text that is no JSON is shown as it came.
    let entries: serde_json::Value =
        serde_json::from_str(&properties.entries).unwrap_or(properties.entries.into());
    let text = serde_json::to_string_pretty(&entries).unwrap_or_default();
    output.result(&entries, text);
    Ok(())
}

pub(crate) fn power(
    options: &Options,
    output: Output,
    service: &str,
    state: PowerChoice,
) -> Result<(), CommandError> {
    let state = match state {
        PowerChoice::Off => PowerState::Off,
        PowerChoice::Low => PowerState::Low,
        PowerChoice::On => PowerState::On,
    };
    let powered = options.connect()?.set_power_state(service, state)?;
    let state = format!("{:?}", powered.state).to_lowercase();
    output.result(&powered, format_args!("{service} is {state}"));
    Ok(())
}
