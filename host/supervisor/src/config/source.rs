//! The text of the file, to find lines and keys in, and what is wrong with it.

use std::ops::Range;
use std::path::{Path, PathBuf};

/// Why the configuration cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", place(file, *line))]
pub struct ConfigError {
    /// The file; empty where there is none and the defaults are what does not work.
    pub file: PathBuf,
    /// The line, where there is one.
    pub line: Option<usize>,
    /// What is wrong, with the key.
    pub message: String,
    /// What to do about it.
    pub next: String,
}

/// `file:line: `, as far as they are known.
fn place(file: &Path, line: Option<usize>) -> String {
    match line {
        Some(line) => format!("{}:{line}: ", file.display()),
        None if file.as_os_str().is_empty() => String::new(),
        None => format!("{}: ", file.display()),
    }
}

/// The file, to find lines in.
pub(super) struct Source<'a> {
    pub(super) file: &'a Path,
    pub(super) text: &'a str,
}

impl Source<'_> {
    /// The line of a key inside of a table, or that of the table.
    pub(super) fn line_of(&self, table: &Range<usize>, key: &str) -> usize {
        // The span of a table that is not written in one line is its header's.
        let rest = &self.text[table.start..];
        let end = if rest.starts_with('{') { Some(table.len()) } else { rest.find("\n[") };
        let text = &rest[..end.unwrap_or(rest.len())];
        let begins = |at: usize| !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let at = text.match_indices(key).map(|(at, _)| at).find(|at| begins(*at));
        self.line(table) + at.map_or(0, |at| text[..at].matches('\n').count())
    }

    /// Says what is wrong in words of our own where the parser's are about its own inside.
    pub(super) fn explain(&self, err: &toml::de::Error) -> ConfigError {
        let line = err.span().map(|span| self.line(&span));
        let message = err.message().trim();
        let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
        let (message, next) = match quoted.as_slice() {
            [unknown, known @ ..] if message.starts_with("unknown field") => {
                let near = nearest(unknown, known);
                let next = match near {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("the keys here are {}", known.join(", ")),
                };
                (format!("unknown key `{unknown}`"), next)
            }
            [unknown, known @ ..] if message.starts_with("unknown variant") => {
                let key = self.key_at(err.span());
                let next = format!("use one of {}", known.join(", "));
                (format!("key `{key}`: unknown value `{unknown}`"), next)
            }
            _ => {
                let key = self.key_at(err.span());
                let place = if key.is_empty() { String::new() } else { format!("key `{key}`: ") };
                (format!("{place}{message}"), "correct that line and start again".to_owned())
            }
        };
        ConfigError { file: self.file.to_owned(), line, message, next }
    }

    pub(super) fn error(&self, line: usize, message: String, next: &str) -> ConfigError {
        ConfigError { file: self.file.to_owned(), line: Some(line), message, next: next.to_owned() }
    }

    pub(super) fn line(&self, span: &Range<usize>) -> usize {
        self.text[..span.start].matches('\n').count() + 1
    }

    /// The key in the line of a span, for errors about values.
    fn key_at(&self, span: Option<Range<usize>>) -> &str {
        let Some(span) = span else { return "" };
        let line = self.text.lines().nth(self.line(&span) - 1).unwrap_or_default();
        line.split_once('=').map(|(key, _)| key.trim()).unwrap_or_default()
    }
}

/// The known key that was probably meant.
fn nearest<'a>(unknown: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = known.iter().map(|key| (strsim::damerau_levenshtein(unknown, key), *key)).min()?;
    // A third of the letters wrong is a typing error; more is another word.
    (near.0 <= unknown.len().div_ceil(3)).then_some(near.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{complaint, parse};

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_its_neighbour() {
        assert_eq!(
            complaint("\n[[device]]\nadress = \"0000:01:00.0\"\n"),
            "iohost.toml:3: unknown key `adress`\n  next: did you mean `address`?"
        );
        assert_eq!(
            complaint("[limits]\ncolour = 1\n"),
            "iohost.toml:2: unknown key `colour`\n  next: the keys here are \
             sessions_per_service, queue_bytes, largest_queue_bytes, sessions_per_client, \
             memory_per_client, connections_per_client, requests_per_second"
        );
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_with_its_key_and_line() {
        assert_eq!(
            complaint("[limits]\n\nqueue_bytes = \"many\"\n"),
            "iohost.toml:3: key `queue_bytes`: invalid type: string \"many\", expected u32\n  \
             next: correct that line and start again"
        );
        assert_eq!(
            complaint("[[device]]\naddress = \"01:00.0\"\ninterrupts = [\"irq\"]\n"),
            "iohost.toml:3: key `interrupts`: unknown value `irq`\n  next: use one of intx, msi, \
             msix"
        );
    }

    #[test]
    fn a_default_that_does_not_work_is_no_mistake_in_a_file() {
        let (message, next) = ("no drivers".to_owned(), "make some".to_owned());
        let err = ConfigError { file: PathBuf::new(), line: None, message, next };
        assert_eq!(err.to_string(), "no drivers");
    }

    #[test]
    fn broken_syntax_is_named_with_its_line() {
        let err = parse("driver_directory = \n").unwrap_err();
        assert_eq!(err.line, Some(1));
    }
}
