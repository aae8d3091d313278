//! What operators see of a running daemon: events as they happen, what containers use, dumps, and a bundle that gives no secret away.
//!
//! Run by `make test`, as root. A crash leaves nothing: see `support`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use base64::Engine as _;
use serde_json::{Value, json};
use support::crictl::{BUSYBOX, container_config, pod_config};
use support::node::{Node, Options};
use support::{daemon_program, isolated, wait_for};

fn lxcri(node: &Node) -> Command {
    let mut command = Command::new(daemon_program());
    command.arg("--config").arg(node.dir.join("config.toml")).stdin(Stdio::null());
    command
}

fn said(command: &mut Command) -> (String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (out, errors) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert!(status.success(), "{command:?}: {status}: {errors}");
    (out, errors)
}

/// `events` that runs beside the test; ended when dropped.
struct Listener {
    child: Child,
    out: PathBuf,
    errors: PathBuf,
}

impl Listener {
    /// One that is listening: the daemon says how many do.
    fn start(node: &Node, name: &str, args: &[&str]) -> Self {
        let listeners = || dump(node)["engine"]["eventListeners"].as_u64().unwrap();
        let before = listeners();
        let (out, errors) = (node.dir.join(format!("{name}.out")), node.dir.join(format!("{name}.err")));
        let mut command = lxcri(node);
        command.arg("events").args(args).stdout(File::create(&out).unwrap()).stderr(File::create(&errors).unwrap());
        let listener = Self { child: command.spawn().unwrap(), out, errors };
        wait_for("the listener", Duration::from_secs(10), || (listeners() > before).then_some(()));
        listener
    }

    /// What it has printed, when that has `words`.
    fn told(&self, words: &str) -> String {
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        wait_for(words, Duration::from_secs(20), || {
            let text = read(&self.out) + &read(&self.errors);
            text.contains(words).then_some(text)
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn dump(node: &Node) -> Value {
    serde_json::from_str(&said(lxcri(node).args(["debug", "dump"])).0).unwrap()
}

#[test]
fn events_and_what_is_used_are_told_as_they_are() {
    isolated("events_and_what_is_used_are_told_as_they_are", || {
        let mut node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let all = Listener::start(&node, "all", &["-o", "json"]);
        let one = Listener::start(&node, "one", &["--pod", "other"]);
        let follows = Listener::start(&node, "follows", &["-f"]);
        let pod = crictl.run_pod("p");
        let script = "trap 'exit 3' TERM; head -c 8000000 /dev/zero > /dev/shm/x; while :; do :; done";
        let container = crictl.create(&pod, "p", "busy", BUSYBOX, script);
        crictl.run(&["start", &container]);

        // One busy loop is about a CPU; the container's name and pod are with it.
        let top = said(lxcri(&node).args(["top", "-d", "2", "-o", "json"])).0;
        let rows: Value = serde_json::from_str(&top).unwrap();
        let [row] = rows.as_array().unwrap().as_slice() else { panic!("one container: {top}") };
        assert_eq!((row["pod"].as_str(), row["container"].as_str()), (Some("tests/p"), Some("busy")), "{top}");
        assert_eq!(row["id"], container.as_str());
        let cpu = row["cpu_millis"].as_u64().unwrap();
        assert!((100..=1100).contains(&cpu), "a busy loop takes {cpu}m");
        assert!(row["memory"].as_u64().unwrap() > 100_000, "{top}");
        let table = said(lxcri(&node).args(["top", "-d", "1", "-n", "2"])).0;
        assert_eq!(table.matches("containers: 1, CPU: ").count(), 2, "{table}");
        assert!(!table.contains('\x1b'), "no terminal is steered that is none");

        // What the daemon is doing.
        let told = dump(&node);
        let [it] = told["engine"]["pods"].as_array().unwrap().as_slice() else { panic!("one pod: {told}") };
        assert_eq!(
            (it["name"].as_str(), it["phase"].as_str(), it["waiting"].as_u64()),
            (Some("tests/p"), Some("ready"), Some(0))
        );
        assert_eq!(it["containers"][0]["phase"], "running");
        assert!(Path::new(&format!("/proc/{}/comm", it["monitorPid"])).exists(), "{told}");
        assert_eq!(told["process"]["pid"], node.daemon_pid());
        assert_eq!(told["engine"]["eventListeners"], 3);
        let tasks = told["engine"]["tasks"].as_array().unwrap();
        assert!(tasks.iter().any(|t| t["task"] == "housekeeping"), "{told}");

        crictl.run(&["stop", "-t", "20", &container]);
        crictl.run(&["rmp", "-f", &pod]);
        let text = all.told("\"deleted\",\"namespace\":\"tests\",\"pod\":\"p\"");
        let events: Vec<Value> = wait_for("the pod's own end", Duration::from_secs(10), || {
            let text = std::fs::read_to_string(&all.out).unwrap();
            let events: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
            events.iter().any(|e| e["event"] == "deleted" && e["container"].is_null()).then_some(events)
        });
        let of = |container: bool| {
            let mine = events.iter().filter(|e| e["container"].is_null() != container);
            mine.map(|e| e["event"].as_str().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(of(true), ["created", "started", "stopped", "deleted"], "{text}");
        let pods = of(false);
        assert_eq!((pods.first(), pods.last()), (Some(&"created"), Some(&"deleted")), "{text}");
        let ended = events.iter().find(|e| e["event"] == "stopped" && !e["container"].is_null()).unwrap();
        assert_eq!((&ended["container"]["name"], &ended["container"]["exit_code"]), (&json!("busy"), &json!(3)));
        assert_eq!((ended["pod_id"].as_str(), ended["container"]["id"].as_str()), (Some(&*pod), Some(&*container)));
        follows.told("stopped  container");
        assert_eq!(std::fs::read_to_string(&one.out).unwrap(), "", "another pod's");

        // The daemon is killed: who follows goes on with the next one, the others end with status 1.
        node.crash_daemon();
        follows.told("the daemon is there again");
        let Listener { ref child, .. } = all;
        let gone =
            || std::fs::read_to_string(format!("/proc/{}/stat", child.id())).map_or(true, |s| s.contains(") Z "));
        wait_for("the end of who does not follow", Duration::from_secs(10), || gone().then_some(()));
        wait_for("the follower", Duration::from_secs(10), || {
            (dump(&node)["engine"]["eventListeners"] == 1).then_some(())
        });
        let second = node.crictl().run_pod("second");
        follows.told("tests/second");
        node.crictl().run(&["rmp", "-f", &second]);
        node.stop_daemon();
        // Without a daemon it says what to do.
        let out = lxcri(&node).args(["events", "-f"]).output().unwrap();
        let errors = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(1) && errors.contains("proxmox-lxcri serve"), "{errors}");
    });
}

/// What is in a bundle, by name.
fn parts(path: &Path) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(File::open(path).unwrap()));
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let (name, mut text) = (entry.path().unwrap().display().to_string(), String::new());
        entry.read_to_string(&mut text).unwrap();
        (name.strip_prefix("proxmox-lxcri-debug/").unwrap().to_owned(), text)
    });
    entries.collect()
}

#[test]
fn a_bundle_gives_no_secret_away() {
    isolated("a_bundle_gives_no_secret_away", || {
        // Each is marked: whatever the archive has of any of them has the mark.
        const MARK: &str = "Xm4rkX";
        let base64 = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let (password, token) = (format!("pa55{MARK}one"), format!("0c1d2e3f-{MARK}-two"));
        let auth = base64(&format!("user:{password}"));
        let images = "auth_file = \"/tmp/auth.json\"".to_owned();
        let mut node = Node::prepare(Options {
            more_lines: [String::new(), String::new(), images],
            more_config: "[proxmox]\nendpoints = [\"https://127.0.0.1:1\"]\ntoken_id = \"lxcri@pve!node1\"\ntoken_file = \"/tmp/token\"\n".into(),
            ..Options::default()
        });
        let private = |path: &str, text: &str| {
            std::fs::write(path, text).unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
        };
        private("/tmp/auth.json", &json!({"auths": {"r.example": {"auth": auth}}}).to_string());
        private("/tmp/token", &format!("{token}\n"));
        node.start_daemon();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let mut pod = pod_config("p", &node.pod_logs("p"));
        pod["annotations"] = json!({"kubectl.kubernetes.io/last-applied-configuration": format!("{MARK}three")});
        pod["labels"]["l"] = json!("a-label");
        let pod_file = crictl.file("pod-secret", &pod);
        let id = crictl.run(&["runp", &pod_file]);
        let mut config = container_config("c", BUSYBOX, &format!("exec sleep 4321 # --password={MARK}four"));
        config["envs"] = json!([{"key": "DB_PASSWORD", "value": format!("{MARK}five")}]);
        config["annotations"] = json!({"a": format!("{MARK}six")});
        let container = crictl.run(&["create", "--no-pull", &id, &crictl.file("secret", &config), &pod_file]);
        crictl.run(&["start", &container]);
        let mut log = File::options().append(true).open(node.log_file()).unwrap();
        for line in [
            format!("known without a word of warning: {password} {token} {auth}"),
            format!("GET https://user:{MARK}seven@r.example/v2/"),
            format!("authorization: Basic {}", base64(&format!("u:{MARK}"))),
            format!("exec failed: app --api-key {MARK}eight --all"),
            format!("{{\"fields\":{{\"message\":\"token={MARK}nine\"}}}}"),
            "the last line of the log".into(),
        ] {
            writeln!(log, "{line}").unwrap();
        }

        let to = node.dir.join("bundle.tar.gz");
        let bundle = |node: &Node| {
            let (out, errors) =
                said(lxcri(node).args(["debug", "bundle", "--to"]).arg(&to).arg("--log").arg(node.log_file()));
            assert_eq!(out.trim(), to.display().to_string());
            errors
        };
        let errors = bundle(&node);
        assert_eq!(std::fs::metadata(&to).unwrap().permissions().mode() & 0o7777, 0o600);
        let there = parts(&to);
        let marked = [MARK.to_owned(), base64(&format!("u:{MARK}")), auth.clone(), password.clone(), token.clone()];
        for (name, text) in &there {
            for mark in &marked {
                assert!(!text.contains(mark.as_str()), "{name} has {mark}");
            }
        }
        // What is to help is in it.
        assert!(there["log.txt"].ends_with("the last line of the log\n"), "{}", there["log.txt"]);
        assert!(there["log.txt"].contains("serving") && there["log.txt"].contains("app --api-key <redacted> --all"));
        assert!(there["config.toml"].contains("token_file = \"/tmp/token\""), "{}", there["config.toml"]);
        let dump: Value = serde_json::from_str(&there["dump.json"]).unwrap();
        assert_eq!(dump["engine"]["pods"][0]["id"], id.as_str());
        assert!(there["status.json"].contains("RuntimeReady") && there["images.json"].contains("busybox"));
        assert!(
            there["doctor.json"].contains("\"check\": \"crun\"") && there["node/crun.txt"].starts_with("crun version")
        );
        assert!(there["node/proc/self/mountinfo"].contains(" - "));
        let about: Value = serde_json::from_str(&there["about.json"]).unwrap();
        assert!(about["parts"].as_array().unwrap().len() > 12, "{about}");
        // There is no systemd here, which is said in both places.
        assert!(about["missing"]["node/unit.txt"].is_string() && errors.contains("without node/unit.txt"), "{errors}");

        // Without a daemon and with a configuration that does not fit, the rest is there.
        crictl.run(&["rmp", "-f", &id]);
        node.stop_daemon();
        let path = node.dir.join("config.toml");
        let good = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{good}\n[serverr]\n")).unwrap();
        let errors = bundle(&node);
        let there = parts(&to);
        assert!(!there.contains_key("dump.json") && there.contains_key("doctor.json"));
        assert!(errors.contains("without dump.json") && errors.contains("did you mean server?"), "{errors}");
        std::fs::write(&path, good).unwrap();
    });
}

#[test]
fn every_line_about_a_pod_names_it() {
    isolated("every_line_about_a_pod_names_it", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let from = std::fs::metadata(node.log_file()).unwrap().len() as usize;
        let pod = crictl.run_pod("p");
        let container = crictl.create(&pod, "p", "c", BUSYBOX, "trap 'exit 3' TERM; while :; do sleep 0.1; done");
        crictl.run(&["start", &container]);
        crictl.run(&["exec", "-s", &container, "true"]);
        crictl.run(&["stop", "-t", "20", &container]);
        crictl.run(&["rm", &container]);
        crictl.run(&["rmp", "-f", &pod]);
        let log = std::fs::read_to_string(node.log_file()).unwrap().split_off(from);
        // Where nothing is done but for a pod.
        let of_pods =
            ["core::engine", "backends::", "integrations::cni", "integrations::netns", "integrations::monitor"];
        let lines: Vec<&str> =
            log.lines().filter(|l| of_pods.iter().any(|m| l.contains(&format!("proxmox_lxcri::{m}")))).collect();
        assert!(lines.len() >= 4, "{log}");
        for line in &lines {
            assert!(line.contains(&pod), "{line}");
        }
        let of_container: Vec<_> = lines.iter().filter(|l| l.contains(&container)).collect();
        assert!(of_container.len() >= 3, "{log}");
        // Traces have spans of their own, which are nobody's to read here.
        assert!(!log.contains("otel.name"), "{log}");
    });
}
