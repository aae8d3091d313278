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
