//! What a command says, for people or for programs.

use std::fmt;
use std::io::{self, Write};

use comfy_table::{ContentArrangement, Table, presets};
use iohost_control::host::Failure;
use iohost_doctor::Code;
use serde::Serialize;

/// Where results and errors go, and in which form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// The result: `value` as JSON, or `text`.
    pub(crate) fn result(self, value: &impl Serialize, text: impl fmt::Display) {
        if self.json {
            line(serde_json::to_string(value).expect("results have no maps with odd keys"));
        } else {
            line(text);
        }
    }

    /// A line for people while a command goes on.
    pub(crate) fn progress(self, text: impl fmt::Display) {
        if !self.json {
            line(text);
        }
    }

    pub(crate) fn error(self, failure: &Failure) {
        let text = match self.json {
            true => serde_json::to_string(failure).expect("a failure is three strings"),
            false => format!("iohost: {failure}{}", more(&failure.code)),
        };
        // Nothing is left to say when standard error is closed.
        let _ = writeln!(io::stderr(), "{text}");
    }
}

/// A further line for a code that `iohost explain` knows.
pub(crate) fn more(code: &str) -> String {
    match code.parse::<Code>() {
        Ok(code) => format!("\n  more: iohost explain {code}"),
        Err(()) => String::new(),
    }
}

/// A line on standard output; a reader that has read enough is no error.
fn line(text: impl fmt::Display) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// A table with a header and as little else as possible.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    // A serial console says that it is 0 columns wide: it does not know.
    if table.width() != Some(0) {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table
}

/// A backend in a table, with the word that nobody should overlook.
pub(crate) fn backend(name: &str, is_unsafe: bool) -> String {
    if is_unsafe { format!("{name} UNSAFE") } else { name.to_owned() }
}
