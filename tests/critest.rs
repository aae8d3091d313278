//! critest, whole, against the daemon with the crun handler: nothing fails, and exactly the specs of
//! `tests/critest/skips.toml` are skipped.
//!
//! Run by `cargo test --test critest`, as root. `scripts/test-critest` starts the daemon in the tests' environment; its logs
//! are target/test-logs/critest.log and critest-daemon.log.

// A test starts a script of its own.
#![allow(clippy::disallowed_methods, clippy::print_stdout)]

use std::collections::BTreeSet;
use std::process::Command;

use serde::Deserialize;

/// Specs that must be found in a run, whatever their state: fewer, and the run was cut short.
const SPECS: usize = 122;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Vec<Spec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
}

impl Spec {
    fn name(&self) -> String {
        let mut parts = self.container_hierarchy_texts.clone().unwrap_or_default();
        parts.push(self.leaf_node_text.clone());
        parts.join(" ")
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Skips {
    skip: Vec<Skip>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Skip {
    spec: String,
    reason: String,
}

/// Runs scripts/test-critest; its status is told, not judged.
fn critest(arguments: &[String]) -> (bool, String) {
    let out = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/test-critest"))
        .args(arguments)
        .env("LXCRI_BIN", env!("CARGO_BIN_EXE_proxmox-lxcri"))
        .output()
        .expect("scripts/test-critest");
    (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned())
}

/// What skips.toml names.
fn listed() -> BTreeSet<String> {
    let listed: Skips = toml::from_str(include_str!("critest/skips.toml")).expect("skips.toml");
    assert!(listed.skip.iter().all(|s| !s.reason.is_empty()), "a skip without a reason");
    listed.skip.into_iter().map(|s| s.spec).collect()
}

/// `CRITEST_ROUNDS`: how many times in a row.
#[test]
fn every_spec_passes_or_is_listed_with_its_reason() {
    let rounds = std::env::var("CRITEST_ROUNDS").map_or(1, |n| n.parse().expect("CRITEST_ROUNDS is a number"));
    for _ in 0..rounds {
        whole_run();
    }
}

fn whole_run() {
    let logs = concat!(env!("CARGO_MANIFEST_DIR"), "/target/test-logs");
    std::fs::create_dir_all(logs).expect("the folder for logs");
    let report = format!("{logs}/critest.json");
    let _ = std::fs::remove_file(&report);
    let (_, said) = critest(&[format!("-ginkgo.json-report={report}")]);
    let text = std::fs::read_to_string(&report).unwrap_or_else(|e| panic!("no report ({e}):\n{said}"));
    let suites: Vec<Suite> = serde_json::from_str(&text).expect("ginkgo's report");
    let specs: Vec<&Spec> = suites.iter().flat_map(|s| &s.spec_reports).filter(|s| s.leaf_node_type == "It").collect();
    let of =
        |state: &str| -> BTreeSet<String> { specs.iter().filter(|s| s.state == state).map(|s| s.name()).collect() };
    let (passed, skipped) = (of("passed"), of("skipped"));
    println!("figure: critest: {} passed, {} skipped, of {}", passed.len(), skipped.len(), specs.len());
    let rest: Vec<String> = specs
        .iter()
        .filter(|s| !matches!(s.state.as_str(), "passed" | "skipped"))
        .map(|s| format!("{}: {}", s.state, s.name()))
        .collect();
    assert!(rest.is_empty(), "not passed:\n{}\n{said}", rest.join("\n"));
    assert_eq!(specs.len(), SPECS, "the run is not whole");
    let listed = listed();
    let unlisted: Vec<_> = skipped.difference(&listed).collect();
    let not_skipped: Vec<_> = listed.difference(&skipped).collect();
    assert!(unlisted.is_empty(), "skipped, but not listed in skips.toml: {unlisted:#?}");
    assert!(not_skipped.is_empty(), "listed in skips.toml, but not skipped: {not_skipped:#?}");
}

#[test]
fn as_many_pass_when_four_run_at_a_time() {
    let (succeeded, said) = critest(&["-parallel".into(), "4".into()]);
    let skipped = listed().len();
    let expected = format!("SUCCESS! -- {} Passed | 0 Failed | 0 Pending | {skipped} Skipped", SPECS - skipped);
    assert!(succeeded && said.contains(&expected), "expected {expected:?}:\n{said}");
    println!("figure: critest -parallel 4: {expected}");
}
