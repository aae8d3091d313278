//! The handler proxmox-lxc with the tests' Proxmox server, which really runs its containers by Debian's `lxc`: pods as Proxmox
//! containers, and the pods' containers inside of them.
//!
//! Run by `cargo test --test proxmox_lxc`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // tests write files and look into /proc plainly

mod support;

use std::time::Duration;

use serde_json::json;
use support::crictl::{BUSYBOX, container_config, read_log, stream_lines};
use support::node::{Node, Options};
use support::pve::What;
use support::{isolated, wait_for};

const LONG: Duration = Duration::from_secs(30);

fn start() -> Node {
    Node::start(Options { handler: "proxmox-lxc".into(), ..Options::default() })
}

#[test]
fn a_pod_is_a_ct() {
    isolated("a_pod_is_a_ct", || {
        let node = start();
        let pve = node.pve.as_ref().expect("a Proxmox");
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let script =
            "id -u; cat /proc/self/uid_map; hostname; echo $$; trap 'exit 7' TERM; while :; do sleep 0.1; done";
        let id = crictl.create(&pod, "p", "c", BUSYBOX, script);
        crictl.run(&["start", &id]);
        let log = || stream_lines(&read_log(&node.pod_logs("p").join("c/0.log")), "stdout");
        let said = wait_for("its words", LONG, || Some(log()).filter(|l| l.len() > 3));
        let words: Vec<Vec<&str>> = said.iter().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(words, [vec!["0"], vec!["0", "100000", "65536"], vec!["p"], vec!["1"]]);
        assert_eq!(crictl.run(&["exec", "-s", &id, "sh", "-c", "echo $((40+2))"]), "42");
        let (good, said) = crictl.try_run(&["exec", "-s", &id, "sh", "-c", "exit 5"]);
        assert!(!good && said.contains("exited with 5"), "{said}");
        crictl.run(&["stop", "-t", "20", &id]);
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 7);
        let killed = crictl.create(&pod, "p", "k", BUSYBOX, "exec sleep 1000");
        crictl.run(&["start", &killed]);
        crictl.run(&["stop", "-t", "0", &killed]);
        assert_eq!(crictl.wait_exit(&killed)["exitCode"], 137);
        crictl.run(&["rmp", "-f", &pod]);
        assert_eq!(pve.count("DELETE", "/lxc/9000"), 1);
        assert!(!std::path::Path::new("/var/lib/lxc/9000").exists());
        if let Some(violations) = pve.violations() {
            assert!(violations.is_empty(), "{violations:?}");
        }
    });
}

#[test]
fn what_an_operator_does_to_the_ct_is_seen() {
    isolated("what_an_operator_does_to_the_ct_is_seen", || {
        let node = start();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let id = crictl.create(&pod, "p", "c", BUSYBOX, "exec sleep 1000");
        crictl.run(&["start", &id]);
        let status = std::process::Command::new("lxc-stop").args(["-k", "-n", "9000"]).status().expect("lxc-stop");
        assert!(status.success());
        assert_ne!(crictl.wait_exit(&id)["exitCode"], 0);
        wait_for("NOTREADY", LONG, || {
            (crictl.json(&["inspectp", &pod])["status"]["state"] == "SANDBOX_NOTREADY").then_some(())
        });
        crictl.run(&["rmp", "-f", &pod]);
    });
}

#[test]
fn what_a_ct_can_not_do_is_refused_by_name() {
    isolated("what_a_ct_can_not_do_is_refused_by_name", || {
        let node = start();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let mut config = container_config("c", BUSYBOX, "true");
        config["linux"]["security_context"] = json!({"privileged": true});
        let (made, said) =
            crictl.try_run(&["create", "--no-pull", &pod, &crictl.file("c", &config), &crictl.pod_file("p")]);
        assert!(!made && said.contains("privileged"), "{said}");
        crictl.run(&["rmp", "-f", &pod]);
    });
}

#[test]
fn many_at_once_have_numbers_of_their_own_and_faults_leave_nothing() {
    isolated("many_at_once_have_numbers_of_their_own_and_faults_leave_nothing", || {
        let mut node = start();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        crictl.run_pod("first");
        let pve = node.pve.as_ref().expect("a Proxmox");
        let files: Vec<(String, String)> =
            (0..20).map(|n| (format!("m{n}"), crictl.pod_file(&format!("m{n}")))).collect();
        let mut running: Vec<_> =
            files.iter().map(|(_, f)| crictl.command(&["runp", f]).spawn().expect("crictl")).collect();
        for child in &mut running {
            assert!(child.wait().expect("its end").success());
        }
        let list = crictl.json(&["pods"]);
        assert_eq!(list["items"].as_array().map_or(0, Vec::len), 21);
        assert_eq!(pve.count("POST", "/nodes/pve1/lxc"), 21 * 2, "a create and a start for each");
        node.crash_daemon();
        let pve = node.pve.as_ref().expect("a Proxmox");
        for pod in crictl.json(&["pods"])["items"].as_array().expect("pods") {
            assert_eq!(pod["state"], "SANDBOX_READY");
            crictl.run(&["rmp", "-f", pod["id"].as_str().expect("an id")]);
        }
        // A call that fails, one after the other: nothing is left, and the next try succeeds.
        for (method, path, what) in [
            ("POST", "/nodes/pve1/lxc", What::Status(500, "got timeout".into())),
            ("POST", "/status/start", What::Status(500, "startup failed".into())),
            ("GET", "/status/current", What::Status(596, String::new())),
        ] {
            pve.fault(method, path, 1, what);
            // A create that failed is seen by its caller, or was repeated.
            let (_, said) = crictl.try_run(&["runp", &crictl.pod_file("again")]);
            let pods = crictl.json(&["pods"]);
            for pod in pods["items"].as_array().into_iter().flatten() {
                crictl.run(&["rmp", "-f", pod["id"].as_str().expect("an id")]);
            }
            let empty = wait_for(&format!("no CT after {method} {path}: {said}"), LONG, || {
                Some(pve.guests()).filter(Vec::is_empty)
            });
            assert!(empty.is_empty());
        }
        let again = crictl.run_pod("again");
        crictl.run(&["rmp", "-f", &again]);
        assert!(pve.guests().is_empty());
    });
}

#[test]
fn a_number_that_somebody_else_has_is_left_to_him() {
    isolated("a_number_that_somebody_else_has_is_left_to_him", || {
        let node = start();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let first = crictl.run_pod("first");
        crictl.run(&["rmp", "-f", &first]);
        let pve = node.pve.as_ref().expect("a Proxmox");
        // The token may not see it in any list.
        pve.add_hidden_guest(9000);
        let second = crictl.run_pod("second");
        assert_eq!(pve.guests(), [9000, 9001]);
        crictl.run(&["rmp", "-f", &second]);
        assert_eq!(pve.guests(), [9000], "somebody else's CT is gone");
    });
}
