//! What is shipped for systemd and udev says what they understand.

use std::fs;
use std::path::Path;
use std::process::Command;

fn packaging(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("packaging");
    fs::read_to_string(folder.join(name)).unwrap()
}

#[test]
fn systemd_understands_the_unit_with_and_without_its_drop_in() {
    let folder = tempfile::tempdir().unwrap();
    let unit = folder.path().join("iohost.service");
    // The program is looked for, and is not installed here.
    let text = packaging("iohost.service").replace("/usr/local/bin/iohost", "/bin/true");
    let verify = |text: &str| {
        fs::write(&unit, text).unwrap();
        let verified = Command::new("systemd-analyze").arg("verify").arg(&unit).output();
        verified.ok().map(|output| String::from_utf8(output.stderr).unwrap())
    };
    let Some(complaints) = verify(&text) else {
        return println!("not run: there is no systemd-analyze");
    };
    let ours = |text: &str| text.lines().any(|line| line.contains("iohost.service"));
    assert!(!ours(&complaints), "{complaints}");
    // It does look.
    let complaints = verify(&text.replace("KillMode=", "KillMood=")).unwrap();
    assert!(ours(&complaints), "{complaints}");

    let drop_ins = folder.path().join("iohost.service.d");
    fs::create_dir(&drop_ins).unwrap();
    fs::write(drop_ins.join("unprivileged.conf"), packaging("unprivileged.conf")).unwrap();
    let complaints = verify(&text).unwrap();
    assert!(!complaints.contains("unprivileged.conf"), "{complaints}");
}

/// Whoever may open a node has the device; who may connect to the daemon is another question.
#[test]
fn the_group_of_the_nodes_is_not_that_of_the_clients() {
    let rules = packaging("60-iohost.rules");
    let rules: Vec<&str> = rules.lines().filter(|line| line.starts_with("SUBSYSTEM==")).collect();
    assert_eq!(rules.len(), 3);
    for rule in rules {
        assert!(rule.ends_with("GROUP=\"iohost-devices\", MODE=\"0660\""), "{rule}");
    }
    assert!(packaging("iohost.service").contains("\nGroup=iohost\n"));
    assert!(packaging("unprivileged.conf").contains("\nSupplementaryGroups=iohost-devices\n"));
    for group in ["g iohost ", "g iohost-devices "] {
        assert!(packaging("sysusers.conf").contains(group), "{group}");
    }
}
