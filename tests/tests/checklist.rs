//! `tests/checklist.md` against the tree: each row has a test that exists, or an issue to come.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use iohost_interrupt_tests::RULES;

/// The rows of the reference's checklist. None may get lost.
const ROWS: usize = 143;

/// The issues that bring what is missing.
const ISSUES: [&str; 4] = ["3", "4", "5", "6"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

struct Row {
    name: String,
    tests: Vec<String>,
    issues: Vec<String>,
}

fn rows() -> Vec<Row> {
    let text = fs::read_to_string(root().join("tests/checklist.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|line| {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [class, item, state] = cells[..] else { panic!("not three cells: {line}") };
        let tests = state.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        let issues = state.split("issue ").skip(1);
        let number = |text: &str| text.chars().take_while(char::is_ascii_digit).collect();
        Row { name: format!("{class}: {item}"), tests, issues: issues.map(number).collect() }
    })
    .collect()
}

/// The names of all test functions of the tree, and of the rules that several tests run.
fn tests() -> BTreeSet<String> {
    let mut names: BTreeSet<_> = RULES.iter().map(|rule| rule.name.to_owned()).collect();
    for tier in ["sys", "host", "drivers", "tests"] {
        for file in sources(&root().join(tier)) {
            let text = fs::read_to_string(&file).unwrap();
            let mut marked = false;
            for line in text.lines().map(str::trim) {
                if let Some(rest) = line.strip_prefix("fn ").filter(|_| marked) {
                    let name = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_');
                    names.insert(name.collect());
                }
                // Other attributes may stand between the mark and the function.
                marked = line == "#[test]" || marked && line.starts_with("#[");
            }
        }
    }
    names
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

#[test]
fn every_row_of_the_checklist_has_a_test_or_an_issue_to_come() {
    let rows = rows();
    let names: BTreeSet<_> = rows.iter().map(|row| &row.name).collect();
    assert_eq!((rows.len(), names.len()), (ROWS, ROWS), "a row was lost or is there twice");
    for Row { name, tests, issues } in &rows {
        assert!(!tests.is_empty() || !issues.is_empty(), "{name}: nothing");
        for issue in issues {
            assert!(ISSUES.contains(&issue.as_str()), "{name}: no issue {issue}");
        }
    }
}

#[test]
fn every_test_that_the_checklist_names_exists() {
    let tests = tests();
    let named = rows()
        .into_iter()
        .flat_map(|row| row.tests.into_iter().map(move |test| (row.name.clone(), test)));
    let missing: Vec<_> = named.filter(|(_, test)| !tests.contains(test)).collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn every_rule_that_the_sdk_is_tested_for_stands_in_the_checklist() {
    let named: BTreeSet<_> = rows().into_iter().flat_map(|row| row.tests).collect();
    let sdk = sources(&root().join("host/testkit/tests/sdk"));
    let text: String = sdk.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let rule = |test: &String| RULES.iter().any(|rule| rule.name == test);
    let here = |test: &String| text.contains(&format!("fn {test}(")) || rule(test);
    let left_out: Vec<_> =
        tests().into_iter().filter(|test| here(test) && !named.contains(test)).collect();
    assert!(left_out.is_empty(), "{left_out:#?}");
}
