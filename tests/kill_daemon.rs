//! kill -9 of the daemon between every two steps of a container's life changes nothing that crictl shows after the
//! restart, and no line of the log is lost.
//!
//! Run by `cargo test --test kill_daemon`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // a plugin's files are no state of the daemon

mod support;

use std::io::{BufRead, Read};
use std::time::Duration;

use serde_json::{Value, json};
use support::crictl::{BUSYBOX, Crictl, read_log, stream_lines};
use support::node::{Node, Options};
use support::{isolated, wait_for};

/// Everything that crictl shows, but for what changes by itself.
fn all_that_is_shown(crictl: &Crictl) -> Value {
    let list = |value: &Value, key: &str| -> Vec<String> {
        value[key].as_array().into_iter().flatten().filter_map(|e| e["id"].as_str().map(str::to_owned)).collect()
    };
    let (containers, pods, images) = (crictl.json(&["ps", "-a"]), crictl.json(&["pods"]), crictl.json(&["images"]));
    let status = |verb: &str, ids: Vec<String>| -> Vec<Value> {
        ids.iter().map(|id| crictl.json(&[verb, id])["status"].take()).collect()
    };
    json!({
        "inspect": status("inspect", list(&containers, "containers")),
        "inspectp": status("inspectp", list(&pods, "items")),
        "inspecti": status("inspecti", list(&images, "images")),
        "containers": containers,
        "pods": pods,
        "images": images,
    })
}

/// Kills the daemon, starts another, and compares what is shown.
fn crash(node: &mut Node, after: &str) {
    let crictl = node.crictl();
    let before = all_that_is_shown(&crictl);
    node.crash_daemon();
    let now = all_that_is_shown(&crictl);
    assert!(before == now, "after {after}, a kill -9 changed what is shown\nbefore: {before:#}\nafter: {now:#}");
}

#[test]
fn a_crash_between_any_two_steps_changes_nothing() {
    isolated("a_crash_between_any_two_steps_changes_nothing", || {
        let mut node = Node::start(Options::default());
        let crictl = node.crictl();
        let log = node.pod_logs("p").join("c/0.log");
        let grown = |by: usize| {
            let start = read_log(&log).len();
            wait_for("more lines in the log", Duration::from_secs(20), || {
                (read_log(&log).len() >= start + by).then_some(())
            });
        };

        crash(&mut node, "nothing");
        crictl.run(&["pull", BUSYBOX]);
        crash(&mut node, "pull");
        let pod = crictl.run_pod("p");
        crash(&mut node, "runp");
        let script = "trap 'echo end; exit 3' TERM; i=0; while :; do echo line $i; i=$((i+1)); sleep 0.01; done";
        let id = crictl.create(&pod, "p", "c", BUSYBOX, script);
        crash(&mut node, "create");
        crictl.run(&["start", &id]);
        crash(&mut node, "start");
        grown(20);
        assert_eq!(crictl.run(&["exec", "-s", &id, "echo", "still here"]), "still here");
        crash(&mut node, "exec");
        // An exec ends with its daemon; the next one takes its files away.
        let mut exec = crictl.command(&["exec", "-s", &id, "sleep", "4321"]).spawn().expect("crictl");
        support::streams::wait_there("sleep 4321");
        let folder = node.dir.join("run/pods").join(&pod).join("containers").join(&id);
        let files = || {
            let names = std::fs::read_dir(&folder).expect("its folder").flatten().map(|e| e.file_name());
            names.filter(|n| n.to_string_lossy().starts_with("exec-")).count()
        };
        assert!(files() > 0, "no file of an exec in {}", folder.display());
        node.crash_daemon();
        assert!(!exec.wait().expect("its end").success());
        wait_for("the exec's files to go", Duration::from_secs(20), || (files() == 0).then_some(()));
        support::streams::wait_gone("sleep 4321");
        grown(20);
        // The log flows while there is no daemon.
        node.kill_daemon();
        grown(50);
        node.start_daemon();
        assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");

        // One that has ended keeps its code, and so does one that ends while there is no daemon.
        let never_started = crictl.create(&pod, "p", "idle", BUSYBOX, "exit 0");
        let quick = crictl.create(&pod, "p", "quick", BUSYBOX, "exit 4");
        crictl.run(&["start", &quick]);
        assert_eq!(crictl.wait_exit(&quick)["exitCode"], 4);
        crash(&mut node, "the end of a container");
        crictl.run(&["rm", &never_started]);
        let late = crictl.create(&pod, "p", "late", BUSYBOX, "sleep 2; echo last words; exit 9");
        crictl.run(&["start", &late]);
        node.kill_daemon();
        let late_log = node.pod_logs("p").join("late/0.log");
        wait_for("the last words without a daemon", Duration::from_secs(20), || {
            (stream_lines(&read_log(&late_log), "stdout") == ["last words"]).then_some(())
        });
        node.start_daemon();
        let status = crictl.wait_exit(&late);
        assert_eq!((&status["exitCode"], &status["reason"]), (&9.into(), &"Error".into()), "{status}");
        crash(&mut node, "an end without a daemon");

        crictl.run(&["stop", "-t", "10", &id]);
        let status = crictl.wait_exit(&id);
        assert_eq!(status["exitCode"], 3, "{status}");
        crash(&mut node, "stop");
        let lines = stream_lines(&read_log(&log), "stdout");
        let (last, counted) = lines.split_last().expect("lines");
        assert_eq!(last, "end");
        let expected: Vec<_> = (0..counted.len()).map(|n| format!("line {n}")).collect();
        assert_eq!(counted, expected, "lines were lost or doubled");

        crictl.run(&["rm", &id]);
        crash(&mut node, "rm");
        crictl.run(&["stopp", &pod]);
        crash(&mut node, "stopp");
        crictl.run(&["rmp", &pod]);
        crash(&mut node, "rmp");
        crictl.run(&["rmi", BUSYBOX]);
        crash(&mut node, "rmi");
        assert_eq!(crictl.json(&["pods"])["items"].as_array().map_or(0, Vec::len), 0);
        assert_eq!(crictl.json(&["ps", "-a"])["containers"].as_array().map_or(0, Vec::len), 0);
    });
}

/// Calls that were under way when the daemon was killed: what was promised is there, what was not is gone or whole, and
/// the same call made again succeeds.
#[test]
fn a_crash_in_the_middle_of_a_call_can_be_repeated() {
    isolated("a_crash_in_the_middle_of_a_call_can_be_repeated", || {
        let mut node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let before = support::snapshot::take(&node);
        for (round, delay_ms) in [5, 20, 40, 60, 90, 130, 180].into_iter().enumerate() {
            let name = format!("m{round}");
            let crictl = node.crictl();
            let pod_name = name.clone();
            let call = std::thread::spawn(move || {
                let pod = crictl.output(&["runp", &crictl.pod_file(&pod_name)]);
                pod.status.success()
            });
            // Not a wait for something to happen: the point in time at which the crash comes is what is varied.
            std::thread::sleep(Duration::from_millis(delay_ms));
            node.crash_daemon();
            let _ = call.join().expect("the call's thread");
            // The kubelet tries again with the same attempt, or finds the pod in the list.
            let listed = node.crictl().json(&["pods", "--name", &name]);
            let ready = listed["items"].as_array().into_iter().flatten().find(|p| p["state"] == "SANDBOX_READY");
            let pod = match ready {
                Some(pod) => pod["id"].as_str().expect("an id").to_owned(),
                None => {
                    for dead in listed["items"].as_array().into_iter().flatten() {
                        node.crictl().run(&["rmp", "-f", dead["id"].as_str().expect("an id")]);
                    }
                    node.crictl().run_pod(&name)
                }
            };
            let crictl = node.crictl();
            let id = crictl.create(&pod, &name, "c", BUSYBOX, "exit 0");
            crictl.run(&["start", &id]);
            assert_eq!(crictl.wait_exit(&id)["exitCode"], 0, "round {round}");
            crictl.run(&["rmp", "-f", &pod]);
        }
        let mut before = before;
        before.entry("interfaces").or_default().push("lxcri-t0".into());
        support::snapshot::assert_back_to(&before, &node);
    });
}

/// Whoever runs a container in the foreground waits for a daemon that is away: all output comes, the exit code, and the pod goes.
#[test]
fn a_pod_in_the_foreground_outlives_the_daemon() {
    isolated("a_pod_in_the_foreground_outlives_the_daemon", || {
        let mut node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let script = "echo begun; until [ -e /go ]; do sleep 0.05; done; echo over; exit 9";
        let mut run = std::process::Command::new(support::daemon_program());
        run.arg("--local-socket")
            .arg(node.local_socket())
            .args(["run", "--rm", "--name", "front", BUSYBOX, "sh", "-c"]);
        run.arg(script).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut run = run.spawn().expect("the program");
        // What is told of the container's start has arrived.
        let mut out = std::io::BufReader::new(run.stdout.take().expect("its output"));
        let mut said = String::new();
        out.read_line(&mut said).expect("its first line");
        let pid = support::streams::wait_there(&format!("sh -c {script}"));
        node.kill_daemon();
        // It ends while nobody can tell.
        std::fs::write(format!("/proc/{pid}/root/go"), "").expect("the word");
        std::thread::sleep(Duration::from_secs(1));
        node.start_daemon();
        out.read_to_string(&mut said).expect("all of it");
        let end = run.wait_with_output().expect("its end");
        assert_eq!((end.status.code(), &*said), (Some(9), "begun\nover\n"), "{}", support::describe(&end));
        assert!(String::from_utf8_lossy(&end.stderr).contains("the daemon is away"), "{}", support::describe(&end));
        let mut list = std::process::Command::new(support::daemon_program());
        let list = support::run(list.arg("--local-socket").arg(node.local_socket()).args(["ps", "-a"]));
        assert!(!list.contains("front"), "its pod is left: {list}");
    });
}

/// What a network plugin owes to pods that are gone keeps no daemon from serving: the plugin may wait for a pod of the node.
#[test]
fn a_plugin_that_hangs_for_a_pod_that_is_gone_delays_nothing() {
    isolated("a_plugin_that_hangs_for_a_pod_that_is_gone_delays_nothing", || {
        use std::os::unix::fs::PermissionsExt;
        let plugins = std::path::Path::new("/tmp/plugins");
        std::fs::create_dir_all(plugins).expect("a folder");
        for name in ["host-local", "portmap", "loopback"] {
            std::os::unix::fs::symlink(format!("/usr/lib/cni/{name}"), plugins.join(name)).expect("a plugin");
        }
        let script = r#"#!/bin/sh
if [ $CNI_COMMAND = DEL ]; then
  [ ! -e /tmp/plugins/hang ] || { echo > /tmp/plugins/hangs; exec sleep 1000; }
  [ ! -e /tmp/plugins/fail ] || { echo '{"cniVersion":"1.0.0","code":11,"msg":"not now"}'; exit 1; }
fi
exec /usr/lib/cni/bridge
"#;
        let bridge = plugins.join("bridge");
        std::fs::write(&bridge, script).expect("a plugin");
        std::fs::set_permissions(&bridge, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        let mut node = Node::start(Options { plugin_dirs: vec!["/tmp/plugins".into()], ..Default::default() });
        let crictl = node.crictl();
        let pod = crictl.run_pod("gone");
        let leases = || {
            let all = std::fs::read_dir("/var/lib/cni/networks").into_iter().flatten().flatten();
            let files = all.flat_map(|d| std::fs::read_dir(d.path()).into_iter().flatten().flatten());
            files.filter(|f| std::fs::read_to_string(f.path()).is_ok_and(|t| t.contains(&pod))).count()
        };
        assert_eq!(leases(), 1);
        // Once the namespace is gone, the plugin's refusal does not keep the pod.
        std::fs::write(plugins.join("fail"), "").expect("a file");
        assert!(!crictl.try_run(&["stopp", &pod]).0, "the plugin's refusal was not told");
        crictl.run(&["stopp", &pod]);
        crictl.run(&["rmp", &pod]);
        assert_eq!(leases(), 1);

        std::fs::write(plugins.join("hang"), "").expect("a file");
        let start = std::time::Instant::now();
        node.crash_daemon();
        let other = crictl.run_pod("other");
        let took = start.elapsed();
        assert!(std::fs::exists(plugins.join("hangs")).expect("a look"), "the plugin was not asked");
        assert!(took < Duration::from_secs(30), "served after {took:?}");
        for file in ["hang", "fail"] {
            std::fs::remove_file(plugins.join(file)).expect("removed");
        }
        node.crash_daemon();
        wait_for("the address of the pod that is gone", Duration::from_secs(20), || (leases() == 0).then_some(()));
        crictl.run(&["rmp", "-f", &other]);
    });
}
