//! `docs/operations.md` is whole and true: each reason that Status can give is in it, and each log line that it quotes is
//! one that the program says.
//!
//! Run by `cargo test --test operations`. Reads sources; leaves nothing.

use std::collections::BTreeSet;
use std::path::Path;

fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(folder).expect("a source folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).expect("a source file");
            // Tests make reasons of their own.
            let text = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
            found.push((path.display().to_string(), text));
        }
    }
}

fn all_sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found.retain(|(path, _)| !path.contains("/tests"));
    found
}

fn document() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md")).expect("the document")
}

/// String literals of a line.
fn literals(line: &str) -> impl Iterator<Item = &str> {
    line.split('"').skip(1).step_by(2)
}

#[test]
fn every_reason_of_a_condition_is_in_the_document() {
    let document = document();
    let mut reasons = BTreeSet::new();
    let mut conditions = BTreeSet::new();
    for (_, text) in all_sources() {
        for line in text.lines() {
            let word = |w: &&str| {
                w.len() > 5 && w.starts_with(|c: char| c.is_ascii_uppercase()) && w.chars().all(char::is_alphanumeric)
            };
            if line.contains("trouble(\"") || line.contains("reason: \"") || line.contains("NotReady\"") {
                reasons.extend(literals(line).filter(word).map(str::to_owned));
            }
            if line.contains("condition(\"") {
                conditions.extend(literals(line).filter(word).map(str::to_owned));
            }
        }
    }
    // Of failed containers, not of the node.
    for other in ["OOMKilled", "StartError", "Unknown", "Completed", "Error"] {
        reasons.remove(other);
    }
    assert!(reasons.len() >= 10, "the sources are not read as they are written: {reasons:?}");
    for (name, expected) in [("RuntimeReady", true), ("NetworkReady", true), ("StorageReady", true)] {
        assert_eq!(conditions.contains(name), expected, "{conditions:?}");
    }
    let missing: Vec<_> = reasons.iter().filter(|r| !document.contains(&format!("`{r}`"))).collect();
    assert!(missing.is_empty(), "docs/operations.md says nothing of the reasons {missing:?}");
    let missing: Vec<_> = conditions.iter().filter(|c| !document.contains(c.as_str())).collect();
    assert!(missing.is_empty(), "docs/operations.md says nothing of the conditions {missing:?}");
}

#[test]
fn every_log_line_in_the_document_is_one_that_is_said() {
    // As the compiler joins it, a literal may go over several lines.
    let said: String = all_sources().into_iter().map(|(_, text)| text).collect();
    let document = document();
    let quoted: Vec<&str> = document
        .lines()
        .filter(|l| l.starts_with("| \""))
        .filter_map(|l| l.split("\" |").next()?.strip_prefix("| \""))
        .collect();
    assert!(quoted.len() > 25, "the document is not read as it is written: {quoted:?}");
    let unknown: Vec<_> = quoted.iter().filter(|line| !said.contains(&format!("{line}\""))).collect();
    assert!(unknown.is_empty(), "docs/operations.md quotes what nobody says: {unknown:?}");
}

#[test]
fn every_deadline_key_in_the_document_is_one_of_the_configuration() {
    let document = document();
    let keys = ["handlers.crun.timeout", "handlers.crun.checkpoint_timeout", "network.plugin_timeout"];
    let more = ["images.progress_timeout", "images.zfs.timeout"];
    let config = serde_json::to_value(proxmox_lxcri::core::config::Config::default()).expect("the configuration");
    for key in keys.into_iter().chain(more) {
        assert!(document.contains(&format!("`{key}`")), "docs/operations.md says nothing of {key}");
        let value = key.split('.').try_fold(&config, |v, part| v.get(part));
        assert!(value.is_some_and(serde_json::Value::is_u64), "{key} is no number of the configuration");
    }
}
