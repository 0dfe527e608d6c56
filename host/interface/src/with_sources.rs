//! Errors in words.

use std::error::Error;

/// An error with everything it was caused by, on one line.
pub fn with_sources(err: &dyn Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        text = format!("{text}: {err}");
        cause = err.source();
    }
    text
}
