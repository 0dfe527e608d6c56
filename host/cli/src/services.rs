//! `iohost status`, `bind` and `unbind`.

use iohost_control::host::{Outcome, Quiesced};
use iohost_control::varlink::{BindOptions, Status};

use crate::CommandError;
use crate::options::{BindingOptions, Options};
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
            format!("{:?}", service.state).to_lowercase(),
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
        if let Some(Quiesced { outcome, how }) = &service.quiesced {
            let what = match outcome {
                Outcome::Reset => "its device is safe, reset by",
                Outcome::Clean => "its device is safe, but not reset",
                Outcome::Quarantined => "its device is quarantined",
            };
            text += &format!("\n{}: {what}: {how}", service.name);
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

pub(crate) fn unbind(options: &Options, output: Output, device: &str) -> Result<(), CommandError> {
    let unbound = options.connect()?.unbind(device)?;
    let text = match &unbound.kernel_driver {
        Some(driver) => format!("{device} is stopped and bound to {driver} again"),
        None => format!("{device} is stopped; it has no kernel driver to go back to"),
    };
    output.result(&unbound, text);
    Ok(())
}
