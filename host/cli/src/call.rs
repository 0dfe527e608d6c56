//! `iohost call`: a method by its name, with arguments as text.

use std::time::Duration;

use iohost_control::host::Failure;
use iohost_interface::{Arguments, Description, IOReturn, Method};
use serde_json::{Value, json};

use crate::CommandError;
use crate::options::{CallOptions, Options};
use crate::output::Output;

pub(crate) fn run(
    options: &Options,
    output: Output,
    call: &CallOptions,
) -> Result<(), CommandError> {
    let mut daemon = options.connect()?;
    let Some(name) = &call.method else {
        let described = daemon.describe(&call.service)?;
        output.result(&described, described.interface.trim_end());
        return Ok(());
    };
    let session = daemon.open(&call.service)?;
    let method = find(session.description(), name)?;
    let arguments = encode(method, &call.arguments)?;
    let answer = session
        .call(method.selector, arguments)
        .wait(Some(Duration::from_secs(call.timeout)))
        .map_err(|status| failed(method, status))?;
    let results = decode(method, answer).map_err(|status| failed(method, status))?;
    let text: Vec<String> = results
        .iter()
        .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
        .collect();
    output.result(&json!({ "results": results }), text.join(" "));
    Ok(())
}

fn find<'a>(description: &'a Description, name: &str) -> Result<&'a Method, CommandError> {
    description.method(name).ok_or_else(|| {
        let methods: Vec<String> = description.methods.iter().map(Method::to_string).collect();
        CommandError::usage(Failure::new(
            "no-such-method",
            format!("interface {} has no method {name:?}", description.name),
            format!("it has: {}", methods.join("; ")),
        ))
    })
}

fn failed(method: &Method, status: IOReturn) -> Failure {
    let next = match status {
        IOReturn::OFFLINE => "the driver's process ended: see `iohost status` and the daemon's log",
        IOReturn::BUSY => "try again when the device has done what it does now",
        IOReturn::TIMEOUT => "give it longer with --timeout, or see `iohost status`",
        _ => "see the driver's documentation for what it takes",
    };
    let code = status.name().unwrap_or("status").to_lowercase().replace('_', "-");
    Failure::new(code, format!("{}: {status}", method.name), next)
}

/// Puts arguments in the form in which they travel, as `iohost_interface::Argument` does for
/// types that are known when a program is built.
fn encode(method: &Method, texts: &[String]) -> Result<Arguments, CommandError> {
    let wrong = |message: String| {
        let next = format!("it is called as {method}");
        CommandError::usage(Failure::new("bad-argument", message, next))
    };
    if texts.len() != method.arguments.len() {
        let (given, wanted) = (texts.len(), method.arguments.len());
        return Err(wrong(format!("{} takes {wanted} arguments, not {given}", method.name)));
    }
    let mut arguments = Arguments::default();
    for (text, kind) in texts.iter().zip(&method.arguments) {
        match kind.as_str() {
            "text" => arguments.structure = text.clone().into_bytes(),
            "bytes" => arguments.structure = bytes(text).map_err(wrong)?,
            _ => arguments.scalars.push(
                scalar(text, kind)
                    .ok_or_else(|| wrong(format!("{text:?} is not of type {kind}")))?,
            ),
        }
    }
    arguments.check().map_err(|status| wrong(format!("the arguments are too long: {status}")))?;
    Ok(arguments)
}

fn bytes(text: &str) -> Result<Vec<u8>, String> {
    if let Some(file) = text.strip_prefix('@') {
        return std::fs::read(file).map_err(|err| format!("{file} cannot be read: {err}"));
    }
    let Some(hex) = text.strip_prefix("hex:") else { return Ok(text.as_bytes().to_vec()) };
    let digits: Option<Vec<u8>> =
        hex.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
    match digits.filter(|digits| digits.len().is_multiple_of(2)) {
        Some(digits) => Ok(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()),
        None => Err(format!("{hex:?} is not an even number of hexadecimal digits")),
    }
}

/// An integer in decimal or, after `0x`, hexadecimal; `true` or `false`. As wide as its type.
fn scalar(text: &str, kind: &str) -> Option<u64> {
    if kind == "bool" {
        return text.parse::<bool>().ok().map(u64::from);
    }
    let value = match text.strip_prefix("0x") {
        Some(hex) => i128::from_str_radix(hex, 16).ok()?,
        None => text.parse::<i128>().ok()?,
    };
    let (signed, bits) = kind.split_at_checked(1)?;
    let bits: u32 = bits.parse().ok().filter(|bits| *bits <= 64)?;
    let range = match signed {
        "u" => 0..1_i128 << bits,
        "i" => -(1_i128 << (bits - 1))..1_i128 << (bits - 1),
        _ => return None,
    };
    // Truncation keeps the two's complement, which is how signed values travel.
    range.contains(&value).then_some(value as u64)
}

fn decode(method: &Method, answer: Arguments) -> Result<Vec<Value>, IOReturn> {
    let mut scalars = answer.scalars.into_iter();
    let mut structure = Some(answer.structure);
    let mut next = || scalars.next().ok_or(IOReturn::BAD_ARGUMENT);
    let mut results = Vec::new();
    for kind in &method.results {
        results.push(match kind.as_str() {
            "bool" => Value::from(next()? != 0),
            "text" => {
                let bytes = structure.take().ok_or(IOReturn::BAD_ARGUMENT)?;
                Value::from(String::from_utf8_lossy(&bytes).into_owned())
            }
            "bytes" => Value::from(hex(&structure.take().ok_or(IOReturn::BAD_ARGUMENT)?)),
            signed if signed.starts_with('i') => Value::from(next()? as i64),
            _ => Value::from(next()?),
        });
    }
    Ok(results)
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn method(arguments: &[&str], results: &[&str]) -> Method {
        Method {
            selector: 0,
            name: "f".into(),
            arguments: arguments.iter().map(|kind| kind.to_string()).collect(),
            results: results.iter().map(|kind| kind.to_string()).collect(),
            is_idempotent: false,
        }
    }

    #[test]
    fn a_number_has_to_fit_its_type() {
        assert_eq!(scalar("255", "u8"), Some(255));
        assert_eq!(scalar("0xff", "u8"), Some(255));
        assert_eq!(scalar("-1", "i16"), Some(u64::MAX));
        assert_eq!(scalar("18446744073709551615", "u64"), Some(u64::MAX));
        for (text, kind) in [("256", "u8"), ("-1", "u32"), ("128", "i8"), ("five", "u32")] {
            assert_eq!(scalar(text, kind), None, "{text} as {kind}");
        }
    }

    #[test]
    fn arguments_travel_as_those_of_a_typed_client_do() {
        let method = method(&["u32", "bytes"], &[]);
        let arguments = encode(&method, &["5".into(), "hex:00ff".into()]).ok().unwrap();
        assert_eq!(
            arguments,
            Arguments { scalars: vec![5], structure: vec![0, 255], ..Default::default() }
        );
    }

    #[test]
    fn a_wrong_count_names_the_signature() {
        let err = encode(&method(&["u32"], &["u32"]), &[]).err().unwrap();
        assert_eq!(
            err.failure.to_string(),
            "f takes 1 arguments, not 0\n  next: it is called as f(u32) -> (u32)"
        );
        assert_eq!(err.exit_code, 2);
    }

    #[test]
    fn results_are_shown_by_their_types() {
        let answer =
            Arguments { scalars: vec![u64::MAX, 1], structure: vec![0xab], ..Default::default() };
        let results = decode(&method(&[], &["i32", "bool", "bytes"]), answer).unwrap();
        assert_eq!(results, [json!(-1), json!(true), json!("ab")]);
    }
}
