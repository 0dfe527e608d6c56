//! Log lines on standard error, the same from the daemon and from every driver host.
//!
//! Each line has its level and the `key=value` fields of the record. On a terminal or in a file
//! it starts with the time in seconds since boot, as `dmesg` shows it, so that lines of several
//! processes and of the kernel sort together. When standard error is the journal (systemd sets
//! `JOURNAL_STREAM`) it starts with the priority instead (`<4>`, see sd-daemon(3)); the journal
//! has the time.

use std::fmt;
use std::io::Write;

use env_logger::{Builder, Env};
use iohost_event::Clock;
use log::kv::{self, Key, Value, VisitSource};
use log::{Level, LevelFilter, Record};

/// The environment variable that sets what is logged: a level (`debug`), or several for parts of
/// the program (`info,iohost_supervisor=trace`).
pub const VARIABLE: &str = "IOHOST_LOG";

/// Starts logging at `level` unless [`VARIABLE`] says otherwise. Each line starts with `subject`,
/// where there is one: a driver host's device. Once per process; a second call does nothing.
pub fn start(level: LevelFilter, subject: Option<&str>) {
    let subject = subject.map_or_else(String::new, |subject| format!("{subject}: "));
    let mut builder = Builder::new();
    builder.filter_level(level).parse_env(Env::new().filter(VARIABLE));
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        builder.format(move |out, record| {
            writeln!(out, "<{}>{subject}{}", priority(record), Line(record))
        });
    } else {
        builder.format(move |out, record| {
            let now = Clock::Uptime.now();
            let (seconds, micros) = (now / 1_000_000_000, now / 1000 % 1_000_000);
            writeln!(
                out,
                "[{seconds:5}.{micros:06}] {:5} {subject}{}",
                record.level(),
                Line(record)
            )
        });
    }
    let _ = builder.try_init();
}

/// The syslog priority of a record.
fn priority(record: &Record<'_>) -> u8 {
    match record.level() {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// A record as one line: what a peer had a say in cannot start another.
struct Line<'a>(&'a Record<'a>);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", one_line(&self.0.args().to_string()))?;
        let mut fields = Fields { out: f, error: Ok(()) };
        // The visitor never fails; what the formatter says is kept beside it.
        let _ = self.0.key_values().visit(&mut fields);
        fields.error
    }
}

struct Fields<'a, 'f> {
    out: &'a mut fmt::Formatter<'f>,
    error: fmt::Result,
}

impl<'kvs> VisitSource<'kvs> for Fields<'_, '_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        let value = one_line(&value.to_string());
        let plain = !value.is_empty() && !value.contains([' ', '=', '"']);
        let written = match plain {
            true => write!(self.out, " {key}={value}"),
            false => write!(self.out, " {key}={value:?}"),
        };
        self.error = self.error.and(written);
        Ok(())
    }
}

fn one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_fields_and_stays_one_line() {
        let fields: &[(&str, &str)] = &[("device", "edu0"), ("reason", "two\nwords")];
        let record = Record::builder().args(format_args!("died")).key_values(&fields).build();
        assert_eq!(Line(&record).to_string(), "died device=edu0 reason=\"two words\"");
    }
}
