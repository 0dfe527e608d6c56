//! Log lines on their way to the host, which adds the device and the driver.

use std::fmt::Write;

use log::kv::{Key, Value, VisitSource};
use log::{LevelFilter, Log, Metadata, Record};

use crate::abi;

/// Sends every line of this plugin to the host, which filters.
pub(crate) fn install() {
    if log::set_logger(&ToHost).is_ok() {
        log::set_max_level(LevelFilter::Trace);
    }
}

struct ToHost;

impl Log for ToHost {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut line = record.args().to_string();
        // Writing to a string does not fail.
        let _ = record.key_values().visit(&mut Fields(&mut line));
        abi::log(record.level() as u32, &line);
    }

    fn flush(&self) {}
}

struct Fields<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Fields<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), log::kv::Error> {
        let _ = write!(self.0, " {key}={value}");
        Ok(())
    }
}
