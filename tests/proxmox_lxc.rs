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

/// Of what a pod's start takes, our own share on an idle machine, in milliseconds: a release build has to do with it.
const SHARE: u128 = 150;

#[test]
fn our_own_share_of_a_pods_start() {
    isolated("our_own_share_of_a_pods_start", || {
        let node = Node::prepare(Options {
            handler: "proxmox-lxc".into(),
            crun: "/tmp/node/timed-crun".into(),
            ..Options::default()
        });
        let times = node.dir.join("crun-times");
        let script = format!(
            "#!/bin/sh\ns=$(date +%s%N)\n/usr/bin/crun \"$@\"\nr=$?\necho $(($(date +%s%N) - s)) >> {}\nexit $r\n",
            times.display()
        );
        std::fs::write(node.dir.join("timed-crun"), script).expect("a program");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(node.dir.join("timed-crun"), mode).expect("mode");
        let mut node = node;
        node.start_daemon();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let warm = crictl.run_pod("warm");
        crictl.run(&["rmp", "-f", &warm]);
        let pve = node.pve.as_ref().expect("a Proxmox");
        let mut shares = Vec::new();
        support::client::block_on(async {
            let mut client = support::client::Client::connect(&node.socket()).await;
            for n in 0..5 {
                let config = support::client::pod(&format!("p{n}"), &node.pod_logs("p"));
                let _ = std::fs::remove_file(&times);
                let begun = std::time::Instant::now();
                let request = k8s_cri::v1::RunPodSandboxRequest {
                    config: Some(config.clone()),
                    runtime_handler: "proxmox-lxc".into(),
                };
                let pod = client.runtime.run_pod_sandbox(request).await.expect("a pod").into_inner().pod_sandbox_id;
                let container = support::client::container("c", BUSYBOX, "exec sleep 1000");
                let request = support::client::create_request(&pod, container, &config);
                let id = client.runtime.create_container(request).await.expect("a container").into_inner().container_id;
                let request = k8s_cri::v1::StartContainerRequest { container_id: id };
                client.runtime.start_container(request).await.expect("started");
                let ended = std::time::Instant::now();
                let said = std::fs::read_to_string(&times).expect("crun's times");
                let crun: u64 = said.lines().map(|l| l.parse::<u64>().expect("a number")).sum();
                assert_eq!(said.lines().count(), 2, "create and start");
                let (crun, api) = (Duration::from_nanos(crun), pve.busy(begun, ended));
                let all = ended - begun;
                assert!(crun < all && api < all, "crun {crun:?}, Proxmox {api:?} of {all:?}");
                shares.push((all.saturating_sub(crun + api), all, api, crun));
                let request = k8s_cri::v1::RemovePodSandboxRequest { pod_sandbox_id: pod };
                client.runtime.remove_pod_sandbox(request).await.expect("removed");
            }
        });
        shares.sort();
        let (own, all, api, crun) = shares[shares.len() / 2];
        println!(
            "figure: our own share of a pod's start on proxmox-lxc: {} ms (at most {SHARE} in a release build), of {} ms; the \
             Proxmox API and its tasks {} ms, crun {} ms",
            own.as_millis(),
            all.as_millis(),
            api.as_millis(),
            crun.as_millis()
        );
        // Others may have this machine's CPUs in `make test`; scripts/bench has it to itself.
        let limit = if std::env::var_os("LXCRI_BENCH").is_some() { SHARE } else { 20 * SHARE };
        assert!(own.as_millis() <= limit, "{own:?}, more than {limit} ms");
    });
}

#[test]
fn each_privilege_of_the_role_is_needed_and_named() {
    isolated("each_privilege_of_the_role_is_needed_and_named", || {
        let mut node = start();
        let role = node.pve.as_ref().expect("a Proxmox").role();
        // Those that a pod needs, by the call that is refused without; the others are of verbs of the command line.
        let pods = [
            ("Datastore.AllocateSpace", "POST /nodes/pve1/lxc"),
            ("Datastore.AllocateTemplate", "POST /nodes/pve1/storage/local/upload"),
            ("Datastore.Audit", "GET /nodes/pve1/storage/local/content"),
            ("VM.Allocate", "POST /nodes/pve1/lxc"),
            ("VM.Audit", "GET /nodes/pve1/lxc/9000/status/current"),
            ("VM.Config.CPU", "POST /nodes/pve1/lxc"),
            ("VM.Config.Disk", "POST /nodes/pve1/lxc"),
            ("VM.Config.Memory", "POST /nodes/pve1/lxc"),
            ("VM.Config.Network", "POST /nodes/pve1/lxc"),
            ("VM.Config.Options", "POST /nodes/pve1/lxc"),
            ("VM.PowerMgmt", "POST /nodes/pve1/lxc/9000/status/start"),
        ];
        assert!(pods.iter().all(|(p, _)| role.iter().any(|r| r == p)), "{role:?}");
        let config = node.dir.join("config.toml");
        let check = || {
            let out = std::process::Command::new(support::daemon_program())
                .args(["proxmox", "check", "--config", config.to_str().expect("UTF-8")])
                .args(["--pool", "k8s", "--storage", "local", "--bridge", "vmbr0"])
                .output()
                .expect("the program");
            format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
        };
        let has =
            |said: &str, privilege: &str| said.split_whitespace().any(|w| w.trim_matches([',', ':']) == privilege);
        for privilege in &role {
            let pve = node.pve.as_ref().expect("a Proxmox");
            pve.take_away(privilege);
            let said = check();
            assert!(has(&said, privilege), "{privilege}: {said}");
            assert!(role.iter().all(|other| other == privilege || !has(&said, other)), "{privilege}: {said}");
            pve.take_away("");
            let Some((_, call)) = pods.iter().find(|(p, _)| p == privilege) else { continue };
            if privilege.starts_with("Datastore.A") {
                // Only asked for by a daemon that knows of no template.
                node.crash_daemon();
                node.pve.as_ref().expect("a Proxmox").drop_templates();
            }
            let pve = node.pve.as_ref().expect("a Proxmox");
            let crictl = node.crictl();
            pve.take_away(privilege);
            let (made, said) = crictl.try_run(&["runp", &crictl.pod_file("p")]);
            let refused = said.contains("PermissionDenied") && said.contains(call);
            assert!(!made && refused && said.contains(&format!("lacks {privilege} on /")), "{privilege}: {said}");
            pve.take_away("");
            wait_for(&format!("nothing of a pod without {privilege}"), LONG, || {
                (pve.guests().is_empty() && pve.volumes().is_empty()).then_some(())
            });
        }
        let crictl = node.crictl();
        let pod = crictl.run_pod("p");
        crictl.run(&["rmp", "-f", &pod]);
    });
}
