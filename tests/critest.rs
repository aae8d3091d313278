//! critest, whole, against the daemon with the handler crun, or another where LXCRI_TEST_HANDLER says so: nothing fails, and
//! exactly the specs of `tests/critest/skips.toml` (and the handler's own list) are skipped.
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
    /// With this storage alone.
    #[serde(default)]
    storage: Option<String>,
}

/// Runs scripts/test-critest; its status is told, not judged.
fn critest(arguments: &[String]) -> (bool, String) {
    let handler = std::env::var("LXCRI_TEST_HANDLER").unwrap_or_else(|_| "crun".into());
    critest_on(&handler, arguments)
}

fn critest_on(handler: &str, arguments: &[String]) -> (bool, String) {
    let out = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/test-critest"))
        .args(arguments)
        .env("LXCRI_TEST_HANDLER", handler)
        .env("LXCRI_BIN", env!("CARGO_BIN_EXE_proxmox-lxcri"))
        .output()
        .expect("scripts/test-critest");
    (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned())
}

fn named(text: &str) -> Vec<String> {
    let listed: Skips = toml::from_str(text).expect("a list of skips");
    assert!(listed.skip.iter().all(|s| !s.reason.is_empty()), "a skip without a reason");
    let storage = std::env::var("LXCRI_TEST_STORAGE").unwrap_or_else(|_| "overlay".into());
    let here = |s: &Skip| s.storage.as_ref().is_none_or(|only| *only == storage);
    listed.skip.into_iter().filter(here).map(|s| s.spec).collect()
}

/// What the handler can't do: left out by us, since critest asks for it on every handler.
fn beyond_the_handler() -> Vec<String> {
    let handler = std::env::var("LXCRI_TEST_HANDLER").unwrap_or_default();
    let (list, most) = match handler.as_str() {
        "lxc" => (named(include_str!("critest/skips-lxc.toml")), 8),
        "proxmox-lxc" => (named(include_str!("critest/skips-proxmox-lxc.toml")), 20),
        _ => return Vec::new(),
    };
    assert!(list.len() <= most, "at most {most} specs");
    list
}

/// What the lists of skips name.
fn listed() -> BTreeSet<String> {
    named(include_str!("critest/skips.toml")).into_iter().chain(beyond_the_handler()).collect()
}

/// The arguments that leave those out: one pattern each, with what is special to patterns escaped.
fn without() -> Vec<String> {
    patterns(beyond_the_handler())
}

fn patterns(specs: Vec<String>) -> Vec<String> {
    let literal = |spec: String| -> String {
        spec.chars().flat_map(|c| if "\\.+*?()|[]{}^$".contains(c) { vec!['\\', c] } else { vec![c] }).collect()
    };
    specs.into_iter().map(|spec| format!("-ginkgo.skip={}$", literal(spec))).collect()
}

/// `CRITEST_ROUNDS`: how many times in a row. `CRITEST_FOCUS`: a part of the specs alone, of which `CRITEST_PASSED` have to
/// pass and none may fail.
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
    let mut arguments = vec![format!("-ginkgo.json-report={report}")];
    let focus = std::env::var("CRITEST_FOCUS").ok().filter(|f| !f.is_empty());
    arguments.extend(focus.iter().map(|f| format!("-ginkgo.focus={f}")));
    arguments.extend(without());
    let (_, said) = critest(&arguments);
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
    if let Some(focus) = focus {
        let least: usize =
            std::env::var("CRITEST_PASSED").map_or(1, |n| n.parse().expect("CRITEST_PASSED is a number"));
        assert!(passed.len() >= least, "{focus:?}: {} of {least} specs passed\n{said}", passed.len());
        return;
    }
    assert_eq!(specs.len(), SPECS, "the run is not whole");
    let listed = listed();
    let unlisted: Vec<_> = skipped.difference(&listed).collect();
    let not_skipped: Vec<_> = listed.difference(&skipped).collect();
    assert!(unlisted.is_empty(), "skipped, but not listed in skips.toml: {unlisted:#?}");
    assert!(not_skipped.is_empty(), "listed in skips.toml, but not skipped: {not_skipped:#?}");
}

/// What containers are and how they live: 40 specs or more.
fn slice(handler: &str, without: &[String]) {
    let slice = [
        "support basic operations on container",
        "NamespaceOption",
        "bucket",
        "NoNewPrivs",
        "Mount Readonly",
        "Multiple Containers",
    ];
    let mut arguments = slice.iter().map(|part| format!("-ginkgo.focus={part}")).collect::<Vec<_>>();
    arguments.extend_from_slice(without);
    let (succeeded, said) = critest_on(handler, &arguments);
    let passed = said.split("SUCCESS! -- ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u32>().ok());
    assert!(succeeded && passed.is_some_and(|n| n >= 40), "not 40 specs:\n{said}");
    println!("figure: critest on the handler {handler}, a slice: {} passed", passed.unwrap_or(0));
}

/// The whole is for `make test-lxc`.
#[test]
fn a_slice_passes_on_the_handler_lxc() {
    slice("lxc", &[]);
}

/// The whole is for `make test-proxmox-lxc`.
#[test]
fn a_slice_passes_on_the_handler_proxmox_lxc() {
    slice("proxmox-lxc", &patterns(named(include_str!("critest/skips-proxmox-lxc.toml"))));
}

#[test]
fn as_many_pass_when_four_run_at_a_time() {
    let (succeeded, said) = critest(&["-parallel".into(), "4".into()]);
    let skipped = listed().len();
    let expected = format!("SUCCESS! -- {} Passed | 0 Failed | 0 Pending | {skipped} Skipped", SPECS - skipped);
    assert!(succeeded && said.contains(&expected), "expected {expected:?}:\n{said}");
    println!("figure: critest -parallel 4: {expected}");
}
