//! docs/security.md is true: every test that it names is there, the unit keeps from its children nothing that they need, and
//! every format in the table has its fuzz target: the table, the targets in fuzz/, their entries
//! in its manifest and their corpora name the same.
#![allow(clippy::disallowed_methods)] // tests read files plainly

use std::collections::BTreeSet;
use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn names(folder: &str, ending: &str) -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let names = entries.map(|e| e.expect("an entry").file_name().into_string().expect("a name"));
    names.filter_map(|n| n.strip_suffix(ending).map(String::from)).collect()
}

#[test]
fn every_format_has_its_target() {
    let text = read("docs/security.md");
    let table = text.split("<!-- fuzz targets -->").nth(1).expect("the table of fuzz targets");
    let cell = |line: &str| Some(line.split('|').nth(2)?.trim().strip_prefix('`')?.strip_suffix('`')?.to_owned());
    let listed: BTreeSet<String> = table.lines().filter_map(cell).collect();
    assert!(listed.len() >= 17, "{listed:?}");
    assert_eq!(listed, names("fuzz/fuzz_targets", ".rs"), "the table and fuzz/fuzz_targets");
    assert_eq!(listed, names("fuzz/corpus", ""), "the table and fuzz/corpus");
    let manifest: toml::Table = read("fuzz/Cargo.toml").parse().expect("fuzz/Cargo.toml");
    let bins = manifest["bin"].as_array().expect("programs");
    let bins: BTreeSet<String> = bins.iter().filter_map(|b| Some(b.get("name")?.as_str()?.to_owned())).collect();
    assert_eq!(listed, bins, "the table and fuzz/Cargo.toml");
    for target in listed {
        let corpus = names(&format!("fuzz/corpus/{target}"), "");
        assert!(!corpus.is_empty(), "fuzz/corpus/{target} is empty");
    }
}

/// `tests/file.rs: name` and `src/…/file.rs: name` in the document are tests that are there.
#[test]
fn every_promise_has_its_test() {
    let text = read("docs/security.md");
    let mut named = 0;
    for (n, line) in text.lines().enumerate() {
        for quoted in line.split('`').skip(1).step_by(2) {
            let Some((file, tests)) = quoted.split_once(".rs: ") else { continue };
            let source = read(&format!("{file}.rs"));
            for test in tests.split(", ") {
                assert!(source.contains(&format!("fn {test}(")), "docs/security.md:{}: {file}.rs has no {test}", n + 1);
                named += 1;
            }
        }
    }
    assert!(named >= 30, "{named} tests are named");
    for line in text.lines().filter(|l| l.starts_with("| ") && !l.contains("---")) {
        assert!(!line.ends_with("| |"), "a promise without a test: {line}");
    }
}

/// What systemd gives a unit its containers get, too: nothing that a privileged pod needs may be taken away there.
#[test]
fn the_unit_takes_nothing_from_containers() {
    // Those that end with the daemon's own process, or are what containers are to have.
    const KNOWN: [&str; 16] = [
        "Type",
        "ExecStart",
        "ExecReload",
        "Restart",
        "RestartSec",
        "KillMode",
        "Delegate",
        "OOMPolicy",
        "OOMScoreAdjust",
        "TasksMax",
        "LimitNOFILE",
        "LimitNPROC",
        "LimitCORE",
        "NotifyAccess",
        "WatchdogSec",
        "FileDescriptorStoreMax",
    ];
    let unit = read("deploy/proxmox-lxcri.service");
    let service = unit.split("[Service]").nth(1).and_then(|s| s.split("\n[").next()).expect("[Service]");
    for key in service.lines().filter(|l| !l.starts_with('#')).filter_map(|l| Some(l.split_once('=')?.0)) {
        assert!(KNOWN.contains(&key), "{key}: do containers inherit it? If not, it belongs to the list");
    }
}
