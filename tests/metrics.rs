//! Metrics of a whole daemon: the format, what is counted, and that dashboard and alerts ask for what there is.
//!
//! Run by `make test`, as root. A crash leaves nothing: see `support`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and read files plainly

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use support::crictl::BUSYBOX;
use support::node::{Node, Options};

const ADDRESS: &str = "127.0.0.1:9537";

/// In the tests' environment, with Prometheus' own tool.
fn isolated(name: &str, body: impl FnOnce()) {
    let promtool = || {
        let out = support::run(&mut Command::new(support::repository().join("tests/tools/promtool")));
        PathBuf::from(out.lines().last().unwrap_or_default()).join("promtool")
    };
    support::isolated_in("trixie", name, support::monitor_program, &[("LXCRI_PROMTOOL", promtool)], body);
}

/// What promtool says of a text; it has to be content.
#[track_caller]
fn promtool(verb: &[&str], text: &str) {
    let mut check = Command::new(support::given("LXCRI_PROMTOOL"));
    let mut check =
        check.args(verb).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    check.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let out = check.wait_with_output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && out.stderr.is_empty(), "promtool {verb:?}: {said}");
}

/// Status line with headers, and body.
fn get(request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(ADDRESS).expect("the metrics' listener");
    write!(stream, "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").expect("an answer");
    (head.to_owned(), body.to_owned())
}

/// Samples as "name{labels}" with their values. Panics at what is not Prometheus' text format, version 0.0.4.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let (mut kinds, mut helps, mut found) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
    for line in text.lines().filter(|l| !l.is_empty()) {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next()) {
            (Some("#"), Some("HELP")) => {
                let name = words.next().expect("a name");
                assert!(words.next().is_some_and(|help| !help.is_empty()), "{line}");
                assert!(helps.insert(name.to_owned()), "twice: {line}");
            }
            (Some("#"), Some("TYPE")) => {
                let (name, kind) = (words.next().expect("a name"), words.next().expect("a kind"));
                assert!(matches!(kind, "counter" | "gauge" | "histogram"), "{line}");
                assert!((kind == "counter") == name.ends_with("_total"), "{line}");
                assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "twice: {line}");
            }
            (Some("#"), _) => panic!("what no reader of the format knows: {line}"),
            _ => {
                let (sample, value) = line.rsplit_once(' ').expect("a value");
                let name = sample.split('{').next().unwrap();
                let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
                let family = family.filter(|f| kinds.get(*f).is_some_and(|k| k == "histogram")).unwrap_or(name);
                assert!(kinds.contains_key(family) && helps.contains(family), "neither kind nor help: {line}");
                assert!(family.starts_with("proxmox_lxcri_"), "{line}");
                let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
                assert!(found.insert(sample.to_owned(), value).is_none(), "twice: {line}");
            }
        }
    }
    found
}

/// Metrics that a query names, with the labels that it names of each.
fn asked(query: &str) -> Vec<(String, Vec<String>)> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut all = Vec::new();
    for (at, _) in query.match_indices("proxmox_lxcri_") {
        let rest = &query[at..];
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let selector = rest[end..].strip_prefix('{').and_then(|s| s.split('}').next()).unwrap_or_default();
        let labels = selector.split(',').filter_map(|part| part.split(['=', '!', '~']).next());
        let labels: Vec<String> = labels.map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect();
        all.push((rest[..end].to_owned(), labels));
    }
    // Labels that results are grouped by are those of all that is named.
    for part in query.split(" by (").skip(1) {
        let grouped = part.split(')').next().unwrap_or_default().split(',').map(|l| l.trim().to_owned());
        let grouped: Vec<String> = grouped.collect();
        all.iter_mut().for_each(|(_, labels)| labels.extend(grouped.clone()));
    }
    all
}

fn queries() -> Vec<String> {
    let read =
        |name: &str| std::fs::read_to_string(support::repository().join("deploy/monitoring").join(name)).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&read("dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let mut all: Vec<String> =
        panels.flat_map(|p| p["targets"].as_array().unwrap()).map(|t| t["expr"].as_str().unwrap().to_owned()).collect();
    // A rule's expression goes on until the next key of the same depth.
    let alerts = read("alerts.yaml");
    all.extend(alerts.split("expr:").skip(1).map(|rest| {
        let lines = rest.lines().take_while(|l| !["for:", "labels:"].iter().any(|k| l.trim_start().starts_with(k)));
        lines.map(str::trim).collect::<Vec<_>>().join(" ").trim_start_matches(">-").trim().to_owned()
    }));
    assert!(all.len() > 20, "{all:?}");
    all
}

#[test]
fn what_dashboard_and_alerts_ask_for_is_there() {
    isolated("what_dashboard_and_alerts_ask_for_is_there", || {
        let metrics = format!("[metrics]\nenabled = true\naddress = \"{ADDRESS}\"\n");
        let mut node = Node::start(Options { handler: "crun".into(), more_config: metrics, ..Options::default() });
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        assert!(!crictl.try_run(&["pull", "unreachable.test/none:1"]).0);
        let pod = crictl.run_pod("measured");
        crictl.create(&pod, "measured", "c", BUSYBOX, "sleep 1000");
        assert!(!crictl.try_run(&["inspectp", "0123456789"]).0);
        let (head, text) = get("GET /metrics");
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain; version=0.0.4"), "{head}");
        let found = samples(&text);
        let value = |sample: &str| found.get(&format!("proxmox_lxcri_{sample}")).copied();
        assert_eq!(value("pods{owner=\"cri\",handler=\"crun\",phase=\"ready\"}"), Some(1.0), "{text}");
        assert_eq!(
            (value("monitors"), value("images"), value("storage_ready{driver=\"overlay\"}")),
            (Some(1.0), Some(1.0), Some(1.0))
        );
        assert_eq!(value("cri_call_duration_seconds_count{method=\"RunPodSandbox\",code=\"OK\"}"), Some(1.0), "{text}");
        assert_eq!(value("image_pull_duration_seconds_count{result=\"ok\"}"), Some(1.0), "{text}");
        assert!(value("image_pull_duration_seconds_count{result=\"failed\"}") >= Some(1.0), "{text}");
        assert!(value("storage_used_bytes{driver=\"overlay\"}") > Some(100_000.0), "{text}");
        assert!(!text.contains("measured") && !text.contains(&pod), "names and ids are no labels");

        // A monitor that dies, and a daemon that is started anew, are counted.
        let monitor: serde_json::Value = serde_json::from_str(&crictl.run(&["inspectp", &pod])).unwrap();
        let pid = monitor["info"]["monitorPid"].as_i64().or_else(|| monitor["info"]["info"]["monitorPid"].as_i64());
        let pid = rustix::process::Pid::from_raw(pid.expect("the monitor's pid") as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        support::wait_for("another monitor", std::time::Duration::from_secs(20), || {
            (samples(&get("GET /metrics").1).get("proxmox_lxcri_monitors_replaced_total") == Some(&1.0)).then_some(())
        });
        assert_eq!(samples(&get("GET /metrics").1)["proxmox_lxcri_monitors_lost_total"], 1.0);
        node.crash_daemon();
        let text = get("GET /metrics").1;
        assert_eq!(samples(&text)["proxmox_lxcri_pods_recovered_total{result=\"ok\"}"], 1.0, "{text}");
        crictl.run(&["pull", BUSYBOX]);

        // Every query names metrics and labels that there are. Of Proxmox, which is not there, nothing is told yet.
        let text = get("GET /metrics").1;
        let found = samples(&text);
        for query in queries() {
            for (metric, labels) in asked(&query) {
                if metric.starts_with("proxmox_lxcri_proxmox_call_duration_seconds_") {
                    let end = metric.trim_start_matches("proxmox_lxcri_proxmox_call_duration_seconds_");
                    assert!(["bucket", "sum", "count"].contains(&end), "{query}");
                    assert!(
                        labels.iter().all(|l| ["method", "result", "le", "instance"].contains(&l.as_str())),
                        "{query}"
                    );
                    continue;
                }
                let of_it: Vec<&String> = found.keys().filter(|s| s.split('{').next() == Some(&metric)).collect();
                assert!(!of_it.is_empty(), "{query}: {metric} is not there\n{text}");
                for label in labels.iter().filter(|l| *l != "instance") {
                    assert!(
                        of_it.iter().all(|s| s.contains(&format!("{label}=\""))),
                        "{query}: {metric} has no {label}"
                    );
                }
            }
        }
        promtool(&["check", "metrics"], &text);
        let rules = support::repository().join("deploy/monitoring/alerts.yaml");
        promtool(&["check", "rules", "--lint=all", "--lint-fatal", rules.to_str().unwrap()], "");

        // Nothing else is answered.
        assert!(get("GET /").0.starts_with("HTTP/1.1 404") && get("POST /metrics").0.starts_with("HTTP/1.1 405"));
        node.stop_daemon();
        // Off unless it is turned on.
        let config = node.dir.join("config.toml");
        let off =
            std::fs::read_to_string(&config).unwrap().replace("enabled = true\naddress", "enabled = false\naddress");
        std::fs::write(&config, off).unwrap();
        node.start_daemon();
        assert!(TcpStream::connect(ADDRESS).is_err(), "it listens though it is off");
        node.stop_daemon();
    });
}

#[test]
fn a_log_that_outgrows_its_limit_begins_anew_and_is_counted() {
    isolated("a_log_that_outgrows_its_limit_begins_anew_and_is_counted", || {
        const LIMIT: u64 = 1 << 20;
        let metrics = format!("[metrics]\nenabled = true\naddress = \"{ADDRESS}\"\n");
        let runtime = format!("log_size_max = {LIMIT}\n");
        for handler in ["crun", "lxc"] {
            let options = Options {
                handler: handler.into(),
                more_config: metrics.clone(),
                runtime: runtime.clone(),
                ..Options::default()
            };
            let mut node = Node::start(options);
            let crictl = node.crictl();
            crictl.run(&["pull", BUSYBOX]);
            let pod = crictl.run_pod("loud");
            let script = "i=0; while [ $i -lt 60000 ]; do echo a line of output that is written as fast as it can be $i; i=$((i+1)); done";
            let id = crictl.create(&pod, "loud", "c", BUSYBOX, script);
            crictl.run(&["start", &id]);
            crictl.wait_exit(&id);
            let log = std::fs::read_to_string(node.pod_logs("loud").join("c/0.log")).unwrap();
            let first = log.lines().next().unwrap();
            assert!(
                first.contains(" stderr F proxmox-lxcri: the ") && first.contains("runtime.log_size_max"),
                "{first}"
            );
            assert!(log.len() as u64 <= LIMIT && log.ends_with("as it can be 59999\n"), "{handler}: {}", log.len());
            let found = samples(&get("GET /metrics").1);
            let value = |name: &str| found[&format!("proxmox_lxcri_{name}")];
            assert!(value("logs_dropped_total") >= 3.0, "{handler}");
            let bytes = value("log_dropped_bytes_total");
            assert!(bytes > 3.0 * 900_000.0 && bytes < 10_000_000.0, "{handler}: {bytes}");
            let (_, shown) = crictl.try_run(&["logs", &id]);
            assert!(shown.contains("were dropped"), "crictl reads it");
            crictl.run(&["rmp", "-f", &pod]);
            node.stop_daemon();
        }
    });
}
