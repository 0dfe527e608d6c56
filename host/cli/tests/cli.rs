//! The command as it is typed, without a daemon or with one that gets no device.

use std::fs::File;
use std::io::Read;
use std::process::Output;

use assert_cmd::Command;
use serde_json::Value;
use tempfile::TempDir;

fn iohost(arguments: &[&str]) -> Output {
    let mut command = Command::cargo_bin("iohost").unwrap();
    command.args(arguments).env_remove("IOHOST_LOG").output().unwrap()
}

fn error(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn every_command_has_help_with_an_example() {
    for command in ["daemon", "devices", "bind", "unbind", "status", "call", "block", "demo"] {
        let output = iohost(&[command, "--help"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{command}");
        assert!(text.contains("\nExample"), "{command}:\n{text}");
        assert!(text.contains("--json"), "{command}:\n{text}");
    }
}

#[test]
fn wrong_usage_is_exit_code_two() {
    assert_eq!(iohost(&["fly"]).status.code(), Some(2));
    assert_eq!(iohost(&["bind"]).status.code(), Some(2));
    assert_eq!(iohost(&["--socket", "/x", "--runtime-dir", "/y", "status"]).status.code(), Some(2));
}

#[test]
fn without_a_daemon_the_error_says_how_to_start_one() {
    let directory = TempDir::new().unwrap();
    let directory = directory.path().to_str().unwrap();
    for command in [&["status"][..], &["bind", "edu0"], &["unbind", "edu0"], &["call", "edu"]] {
        let output = iohost(&[&["--runtime-dir", directory], command].concat());
        assert_eq!(output.status.code(), Some(1));
        let text = error(&output);
        let expected = format!("iohost: no daemon listens on {directory}/io.iohost");
        assert!(text.starts_with(&expected), "{text}");
        assert!(text.contains("\n  next: start the daemon: iohost daemon"), "{text}");
    }
}

#[test]
fn an_error_as_json_has_code_message_and_next_step() {
    let output = iohost(&["--json", "--socket", "/nowhere/io.iohost", "status"]);
    let failure: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(failure["code"], "not-running");
    assert!(failure["message"].as_str().unwrap().contains("/nowhere/io.iohost"));
    assert!(failure["next"].as_str().unwrap().starts_with("start the daemon"));
    assert!(output.stdout.is_empty());
}

#[test]
fn devices_are_listed_without_a_daemon() {
    let output = iohost(&["--json", "--socket", "/nowhere/io.iohost", "devices"]);
    // A machine without PCI has no folder for it in sysfs; that is said, too.
    if output.status.success() {
        let list: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(list["devices"].is_array(), "{list}");
    } else {
        let failure: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert_eq!(failure["code"], "sysfs");
    }
}

#[test]
fn a_mistake_in_the_configuration_is_exit_code_two_with_file_line_and_key() {
    let directory = TempDir::new().unwrap();
    let config = directory.path().join("iohost.toml");
    std::fs::write(&config, "# devices\n[[device]]\nadress = \"0000:01:00.0\"\n").unwrap();
    let output =
        iohost(&["daemon", "--driver-host", "/bin/true", "--config", config.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        error(&output),
        format!(
            "iohost: {}:3: unknown key `adress`\n  next: did you mean `address`?\n  more: iohost explain config\n",
            config.display()
        )
    );
}

#[test]
fn a_config_that_is_not_there_is_named() {
    let output = iohost(&["daemon", "--driver-host", "/bin/true", "--config", "/nowhere.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(error(&output).starts_with("iohost: /nowhere.toml: the configuration cannot be read"));
}

#[test]
fn a_file_for_the_demo_that_is_not_there_is_named_before_anything_else() {
    let output = iohost(&["demo", "/nowhere.bin"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(error(&output).starts_with("iohost: /nowhere.bin cannot be read"));
}

#[test]
fn a_terminal_that_does_not_know_its_width_gets_whole_words() {
    let terminal = nix::pty::openpty(None, None).unwrap();
    let mut explain = {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_iohost"));
        command.arg("explain").stdout(terminal.slave).spawn().unwrap()
    };
    let mut text = String::new();
    // It ends with an error when nobody has the other end any more.
    let _ = File::from(terminal.master).read_to_string(&mut text);
    assert!(explain.wait().unwrap().success());
    let code = text.lines().find(|line| line.starts_with(" no-such-disk "));
    assert!(code.is_some_and(|line| line.contains("has no disk of this number")), "{text}");
}
