//! Every refusal that the sources of `host/` can make has a code of the catalogue, and every code
//! of the catalogue is one that is found or refused with.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use iohost_doctor::Code;

/// What stands before the code of a refusal.
const MARKS: [&str; 3] = ["Failure::new(", "refused(", "code: "];

/// The sources of the processes, without their tests, and without this crate's catalogue and rules.
fn sources() -> Vec<(PathBuf, String)> {
    let host = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = fs::read_dir(host)
        .unwrap()
        .map(|entry| entry.unwrap().path().join("src"))
        .filter(|folder| folder.is_dir())
        .collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if !path.ends_with("doctor/src/rules") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && !["catalogue.rs", "rules.rs"].iter().any(|name| path.ends_with(name))
            {
                let text = fs::read_to_string(&path).unwrap();
                let product = text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned();
                found.push((path, product));
            }
        }
    }
    assert!(found.len() > 50, "{found:?}");
    found
}

/// The word in quotation marks that `text` begins with, if that is what it begins with.
fn quoted(text: &str) -> Option<&str> {
    let word = text.trim_start().strip_prefix('"')?.split('"').next()?;
    let is_plain = |letter: char| letter.is_ascii_lowercase() || letter == '-';
    (!word.is_empty() && word.chars().all(is_plain)).then_some(word)
}

#[test]
fn every_code_of_a_refusal_is_explained() {
    let (mut found, mut unexplained) = (BTreeSet::new(), BTreeSet::new());
    for (path, text) in sources() {
        // The client has its codes in a table: `=> ("code", "next step")`.
        let is_table = path.ends_with("iohost_client/src/error.rs");
        let marks = MARKS.into_iter().chain(is_table.then_some("("));
        for mark in marks {
            for code in text.split(mark).skip(1).filter_map(quoted) {
                if code.parse::<Code>().is_err() {
                    unexplained.insert((code.to_owned(), path.clone()));
                }
                found.insert(code.to_owned());
            }
        }
    }
    assert!(unexplained.is_empty(), "not in host/doctor/src/catalogue.rs: {unexplained:?}");
    assert!(found.len() > 40, "the search itself finds them: {found:?}");
}

#[test]
fn every_code_without_a_severity_is_one_that_something_refuses_with() {
    let sources = sources();
    for code in Code::ALL.iter().filter(|code| code.severity().is_none()) {
        let (word, variant) = (format!("\"{code}\""), format!("Code::{code:?}"));
        let is_used =
            sources.iter().any(|(_, text)| text.contains(&word) || text.contains(&variant));
        assert!(is_used, "nothing refuses with {code}");
    }
}
