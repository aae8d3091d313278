//! The profile `native` of the handler proxmox-lxc with the tests' Proxmox server, which really runs its containers by Debian's `lxc`:
//! a CT whose init becomes its pod's one container.
//!
//! Run by `cargo test --test proxmox_native`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // tests write files and look into /proc plainly

mod support;

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use support::crictl::{BUSYBOX, Crictl, container_config, read_log, stream_lines};
use support::node::{Node, Options};
use support::{isolated, wait_for};

const LONG: Duration = Duration::from_secs(30);

fn start(lines: &str) -> Node {
    let lines = [String::new(), format!("profile = \"native\"\n{lines}")];
    Node::start(Options { handler: "proxmox-lxc".into(), proxmox_lines: lines, ..Options::default() })
}

fn create(crictl: &Crictl, pod: &str, of: &str, config: &Value) -> (bool, String) {
    let name = config["metadata"]["name"].as_str().expect("a name");
    let file = crictl.file(&format!("container-{of}-{name}"), config);
    let out = crictl.output(&["create", "--no-pull", pod, &file, &crictl.pod_file(of)]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.success(), said.trim().to_owned())
}

fn is_not_ready(crictl: &Crictl, pod: &str) {
    wait_for("NOTREADY", LONG, || {
        (crictl.json(&["inspectp", pod])["status"]["state"] == "SANDBOX_NOTREADY").then_some(())
    });
}

/// The host's pid of a CT's init, as Proxmox has it.
fn init_of(vmid: u32) -> i64 {
    let out = Command::new("lxc-info").args(["-n", &vmid.to_string(), "-p", "-H"]).output().expect("lxc-info");
    String::from_utf8_lossy(&out.stdout).trim().parse().expect("a pid")
}

fn keeps_to_the_contract(node: &Node) {
    if let Some(violations) = node.pve.as_ref().expect("a Proxmox").violations() {
        assert!(violations.is_empty(), "{violations:?}");
    }
}

#[test]
fn a_cts_init_is_its_pods_container() {
    isolated("a_cts_init_is_its_pods_container", || {
        let mut node = start("");
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let pve = node.pve.as_ref().expect("a Proxmox");
        assert_eq!(pve.config(9000, "cmode").as_deref(), Some("shell"));
        let (shared, data) = (node.dir.join("shared"), node.dir.join("data"));
        for folder in [&shared, &data] {
            std::fs::create_dir_all(folder).expect("a folder");
        }
        std::fs::write(data.join("word"), "from the node\n").expect("a file");
        let script = "echo $$ $(id -u):$(id -g) $(pwd) $GREETING $(hostname); cat /data/word; cat /proc/self/uid_map; echo error >&2\n\
                      grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status; touch /no 2>/dev/null || echo read-only\n\
                      echo mine > /shared/made; trap 'echo asked; exit 7' TERM; while :; do sleep 0.1; done";
        let mut config = container_config("c", BUSYBOX, script);
        config["working_dir"] = json!("/tmp");
        config["mounts"] = json!([
            {"host_path": data, "container_path": "/data", "readonly": true},
            {"host_path": shared, "container_path": "/shared"},
        ]);
        std::os::unix::fs::chown(&shared, Some(1000), Some(1001)).expect("an owner");
        config["linux"]["resources"] =
            json!({"memory_limit_in_bytes": 64 << 20, "cpu_period": 100_000, "cpu_quota": 50_000});
        config["linux"]["security_context"] = json!({
            "namespace_options": {"pid": 1}, "run_as_user": {"value": 1000}, "run_as_group": {"value": 1001},
            "readonly_rootfs": true, "no_new_privs": true, "seccomp": {"profile_type": 0},
        });
        let (made, id) = create(&crictl, &pod, "p", &config);
        assert!(made, "{id}");
        // It waits, as the CT's init and nothing else.
        assert_eq!(crictl.container_state(&id), "CONTAINER_CREATED");
        node.crash_daemon();
        assert_eq!(crictl.container_state(&id), "CONTAINER_CREATED");
        crictl.run(&["start", &id]);
        let file = node.pod_logs("p").join("c/0.log");
        let log = |stream: &str| stream_lines(&read_log(&file), stream);
        let said = wait_for("its words", LONG, || Some(log("stdout")).filter(|l| l.len() > 5));
        let words: Vec<String> = said.iter().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            words,
            ["1 1000:1001 /tmp hello p", "from the node", "0 100000 65536", "NoNewPrivs: 1", "Seccomp: 2", "read-only"]
        );
        assert_eq!(log("stderr"), ["error"]);
        wait_for("its file", LONG, || {
            std::fs::read_to_string(shared.join("made")).ok().filter(|text| text == "mine\n")
        });
        let init = init_of(9000);
        let info = crictl.json(&["inspect", &id]);
        assert_eq!(info["info"]["pid"], init, "Proxmox's init is the container's process: {}", info["info"]);
        let line = std::fs::read_to_string(format!("/proc/{init}/cmdline")).expect("its command line");
        assert!(line.starts_with("/bin/sh\0-c\0echo $$"), "{line:?}");
        // Nobody of the runtime's is left beside it.
        let others = crictl.run(&["exec", "-s", &id, "sh", "-c", "cat /proc/[0-9]*/comm | sort -u | tr '\\n' ' '"]);
        assert!(!others.contains("crun"), "{others}");
        assert_eq!(
            crictl.run(&["exec", "-s", &id, "sh", "-c", "echo $(id -u) $((40+2)) $(readlink /proc/1/exe)"]),
            "1000 42 /bin/sh"
        );
        let (good, said) = crictl.try_run(&["exec", "-s", &id, "sh", "-c", "exit 5"]);
        assert!(!good && said.contains("exited with 5"), "{said}");
        // Proxmox's own way in.
        let out = Command::new("lxc-attach")
            .args(["-n", "9000", "--", "/bin/cat", "/data/word"])
            .output()
            .expect("lxc-attach");
        assert_eq!(String::from_utf8_lossy(&out.stdout), "from the node\n", "{}", String::from_utf8_lossy(&out.stderr));
        let stats = crictl.json(&["stats", &id]);
        let used = stats["stats"][0]["memory"]["workingSetBytes"]["value"].as_str().map(str::to_owned);
        assert!(used.as_deref().and_then(|n| n.parse::<u64>().ok()).is_some_and(|n| n > 0), "{stats}");
        crictl.run(&["update", "--memory", &(48 << 20).to_string(), &id]);

        // There is no place for another, and nothing is made of it.
        for name in ["sidecar", "c"] {
            let (made, said) = create(&crictl, &pod, "p", &container_config(name, BUSYBOX, "true"));
            assert!(!made, "{said}");
            if name == "sidecar" {
                assert!(
                    said.contains("FailedPrecondition") && said.contains("is container") && said.contains("native"),
                    "{said}"
                );
            }
        }
        assert_eq!(crictl.run(&["exec", "-s", &id, "echo", "well"]), "well");
        node.crash_daemon();
        assert_eq!(crictl.run(&["exec", "-s", &id, "echo", "well"]), "well");
        crictl.run(&["stop", "-t", "20", &id]);
        let status = crictl.wait_exit(&id);
        assert_eq!((&status["exitCode"], &status["reason"]), (&7.into(), &"Error".into()), "{status}");
        assert_eq!(log("stdout").last().map(String::as_str), Some("asked"));
        is_not_ready(&crictl, &pod);
        crictl.run(&["rmp", "-f", &pod]);
        let pve = node.pve.as_ref().expect("a Proxmox");
        assert!(pve.guests().is_empty() && pve.volumes().is_empty());
        keeps_to_the_contract(&node);
    });
}

#[test]
fn whatever_ends_a_native_ct_is_told_of_its_container() {
    isolated("whatever_ends_a_native_ct_is_told_of_its_container", || {
        let mut node = start("");
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let run = |name: &str, script: &str| {
            let pod = crictl.run_pod(name);
            let id = crictl.create(&pod, name, "c", BUSYBOX, script);
            crictl.run(&["start", &id]);
            (pod, id)
        };
        // A stop in the GUI.
        let (pod, id) = run("stopped", "exec sleep 1000");
        let status = Command::new("lxc-stop").args(["-k", "-n", "9000"]).status().expect("lxc-stop");
        assert!(status.success());
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 137);
        is_not_ready(&crictl, &pod);
        crictl.run(&["rmp", "-f", &pod]);
        // Its own end, well and quick, and without a daemon.
        let (pod, id) = run("well", "echo done");
        let status = crictl.wait_exit(&id);
        assert_eq!((&status["exitCode"], &status["reason"]), (&0.into(), &"Completed".into()), "{status}");
        is_not_ready(&crictl, &pod);
        crictl.run(&["rmp", "-f", &pod]);
        let (pod, id) = run("late", "sleep 2; echo last words; exit 9");
        node.kill_daemon();
        let log = node.pod_logs("late").join("c/0.log");
        wait_for("the last words without a daemon", LONG, || {
            (stream_lines(&read_log(&log), "stdout") == ["last words"]).then_some(())
        });
        node.start_daemon();
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 9);
        is_not_ready(&crictl, &pod);
        crictl.run(&["rmp", "-f", &pod]);
        // A kill by the kubelet; one that was never started; a pod that never had one.
        let (pod, id) = run("killed", "exec sleep 1000");
        crictl.run(&["stop", "-t", "0", &id]);
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 137);
        crictl.run(&["rmp", "-f", &pod]);
        let idle = crictl.run_pod("idle");
        let id = crictl.create(&idle, "idle", "c", BUSYBOX, "exec sleep 1000");
        crictl.run(&["rm", &id]);
        is_not_ready(&crictl, &idle);
        let empty = crictl.run_pod("empty");
        for pod in [idle, empty] {
            crictl.run(&["rmp", "-f", &pod]);
        }
        let pve = node.pve.as_ref().expect("a Proxmox");
        assert!(pve.guests().is_empty() && pve.volumes().is_empty());
        keeps_to_the_contract(&node);
    });
}

#[test]
fn what_a_native_ct_can_not_be_is_refused_and_leaves_it_to_another_try() {
    isolated("what_a_native_ct_can_not_be_is_refused_and_leaves_it_to_another_try", || {
        let mut node = start("");
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let mut host = support::crictl::pod_config("host", &node.pod_logs("host"));
        host["linux"]["security_context"]["namespace_options"]["network"] = json!(2);
        let (made, said) = crictl.try_run(&["runp", &crictl.file("pod-host", &host)]);
        assert!(!made && said.contains("Unimplemented") && said.contains("the node's network namespace"), "{said}");
        let pod = crictl.run_pod("p");
        let mut privileged = container_config("privileged", BUSYBOX, "true");
        privileged["linux"]["security_context"]["privileged"] = json!(true);
        let mut profile = container_config("profile", BUSYBOX, "true");
        profile["linux"]["security_context"]["apparmor"] = json!({"profile_type": 2, "localhost_ref": "mine"});
        for (config, word) in [(&privileged, "privileged"), (&profile, "AppArmor profile")] {
            let (made, said) = create(&crictl, &pod, "p", config);
            assert!(!made && said.contains("Unimplemented") && said.contains(word), "{said}");
        }
        // What can't run is told at its start, and is the CT's no more than before.
        let mut absent = container_config("absent", BUSYBOX, "true");
        absent["command"] = json!(["/no/such"]);
        let (made, id) = create(&crictl, &pod, "p", &absent);
        assert!(made, "{id}");
        let (started, said) = crictl.try_run(&["start", &id]);
        assert!(!started && said.contains("/no/such"), "{said}");
        assert_eq!(crictl.container_status(&id)["reason"], "StartError");
        // With a terminal, and made under the other profile's daemon.
        let file = node.dir.join("config.toml");
        let text = std::fs::read_to_string(&file).expect("the configuration").replace("\"native\"", "\"pod\"");
        std::fs::write(&file, text).expect("the configuration");
        node.crash_daemon();
        let mut terminal = container_config("terminal", BUSYBOX, "tty; test -t 1 && echo $$ on a terminal; exit 3");
        terminal["tty"] = json!(true);
        let (made, id) = create(&crictl, &pod, "p", &terminal);
        assert!(made, "{id}");
        crictl.run(&["start", &id]);
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 3);
        let said = stream_lines(&read_log(&node.pod_logs("p").join("terminal/0.log")), "stdout");
        assert!(said[0].starts_with("/dev/pts/") && said[1].starts_with("1 on a terminal"), "{said:?}");
        is_not_ready(&crictl, &pod);
        // A new pod is of the new profile.
        let other = crictl.run_pod("other");
        for name in ["a", "b"] {
            let id = crictl.create(&other, "other", name, BUSYBOX, "exec sleep 1000");
            crictl.run(&["start", &id]);
        }
        for pod in [&pod, &other] {
            crictl.run(&["rmp", "-f", pod]);
        }
        assert!(node.pve.as_ref().expect("a Proxmox").guests().is_empty());
        keeps_to_the_contract(&node);
    });
}
