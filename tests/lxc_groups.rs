//! What the cgroups of liblxc's containers are asked and told: kills for want of memory, freezing, and the view that lxcfs
//! makes of their limits.
//!
//! Run by `cargo test --test lxc_groups`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // tests start programs, and write files that tell a container to go on

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use support::crictl::{BUSYBOX, Crictl, container_config, read_log, stream_lines};
use support::node::{Node, Options};
use support::{isolated, snapshot, wait_for};

const LONG: Duration = Duration::from_secs(60);
/// More and more memory.
const GREEDY: &str = "x=a; while :; do x=$x$x; done";

fn lxc_node() -> Node {
    Node::start(Options { handler: "lxc".into(), ..Options::default() })
}

/// A running container with so much memory.
fn run(crictl: &Crictl, pod_id: &str, name: &str, script: &str, memory: u64) -> String {
    let mut config = container_config(name, BUSYBOX, script);
    config["linux"]["resources"] = json!({"memory_limit_in_bytes": memory});
    let file = crictl.file(&format!("c-{name}"), &config);
    let id = crictl.run(&["create", "--no-pull", pod_id, &file, &crictl.pod_file("p")]);
    crictl.run(&["start", &id]);
    id
}

fn log_of(node: &Node, name: &str) -> Vec<String> {
    stream_lines(&read_log(&node.pod_logs("p").join(name).join("0.log")), "stdout")
}

fn pid_of(crictl: &Crictl, id: &str) -> i32 {
    crictl.json(&["inspect", id])["info"]["pid"].as_i64().and_then(|pid| pid.try_into().ok()).expect("a pid")
}

fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("a signal");
}

/// Pid of the pod's monitor.
fn monitor(pod: &str) -> Option<i32> {
    let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
    let mut pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let line = |pid: &i32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    pids.find(|pid| line(pid).split(|b| *b == 0).skip(1).take(2).eq([&b"--pod"[..], pod.as_bytes()]))
}

fn verdict(status: &Value) -> (i64, String) {
    (status["exitCode"].as_i64().unwrap_or(-1), status["reason"].as_str().unwrap_or_default().to_owned())
}

fn killed_for_memory(status: &Value) {
    assert_eq!(verdict(status), (137, "OOMKilled".into()), "{status}");
}

/// liblxc removes the group that counts such kills as soon as the program has ended: the count has to be asked before.
#[test]
fn a_container_that_was_killed_for_memory_says_so() {
    isolated("a_container_that_was_killed_for_memory_says_so", || {
        let mut node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let mut before = snapshot::take(&node);
        let pod = crictl.run_pod("p");
        for n in 0..8 {
            let id = run(&crictl, &pod, &format!("greedy-{n}"), GREEDY, 32 << 20);
            killed_for_memory(&crictl.wait_exit(&id));
        }
        // One that outlives the kill of another of its processes, as runc and crun have it.
        let id = run(&crictl, &pod, "parent", &format!("sh -c '{GREEDY}'; exit 3"), 32 << 20);
        assert_eq!(verdict(&crictl.wait_exit(&id)), (3, "OOMKilled".into()));
        // One that somebody else kills, also while another one is killed for memory.
        let id = run(&crictl, &pod, "killed", "exec sleep 1000", 32 << 20);
        let greedy = run(&crictl, &pod, "beside", GREEDY, 32 << 20);
        kill(pid_of(&crictl, &id));
        assert_eq!(verdict(&crictl.wait_exit(&id)), (137, "Error".into()));
        killed_for_memory(&crictl.wait_exit(&greedy));

        // With another monitor than the one that started it.
        let waits = format!("until [ -e /go ]; do sleep 0.05; done; {GREEDY}");
        let go = |pid: i32| std::fs::write(format!("/proc/{pid}/root/go"), "").expect("the word");
        let id = run(&crictl, &pod, "taken-over", &waits, 32 << 20);
        let old = monitor(&pod).expect("a monitor");
        kill(old);
        wait_for("another monitor", LONG, || monitor(&pod).filter(|pid| *pid != old));
        go(pid_of(&crictl, &id));
        killed_for_memory(&crictl.wait_exit(&id));

        // With neither daemon nor monitor there to see it.
        let id = run(&crictl, &pod, "unseen", &waits, 32 << 20);
        let pid = pid_of(&crictl, &id);
        node.kill_daemon();
        kill(monitor(&pod).expect("a monitor"));
        go(pid);
        let gone = || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(());
        wait_for("its end", LONG, gone);
        node.start_daemon();
        let status = wait_for("its end to be known", LONG, || {
            let status = crictl.container_status(&id);
            (status["state"] == "CONTAINER_EXITED").then_some(status)
        });
        killed_for_memory(&status);
        crictl.run(&["rmp", "-f", &pod]);
        before.entry("interfaces").or_default().push("lxcri-t0".into());
        snapshot::assert_back_to(&before, &node);
    });
}

/// By what freezes (`container commit`), and by liblxc's own tools; what is frozen can be ended all the same.
#[test]
fn a_container_is_frozen_and_runs_on() {
    isolated("a_container_is_frozen_and_runs_on", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let script = "dd if=/dev/urandom of=/big bs=65536 count=640 2> /dev/null; \
                      i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done";
        let id = run(&crictl, &pod, "c", script, 256 << 20);
        let file = Path::new("/sys/fs/cgroup/freezer/tests").join(&id).join("freezer.state");
        let state = || std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let lines = || log_of(&node, "c").len();
        let goes_on = || {
            let before = lines();
            wait_for("the container to go on", LONG, || (lines() > before + 5).then_some(()));
        };
        goes_on();

        let mut commit = Command::new(support::daemon_program());
        commit.arg("--local-socket").arg(node.local_socket()).args(["container", "commit", &id, "local/frozen:1"]);
        let mut commit = commit.spawn().expect("the commit");
        let mut seen = false;
        let status = wait_for("the commit", LONG, || {
            seen |= state().trim() == "FROZEN";
            commit.try_wait().expect("wait")
        });
        assert!(status.success());
        assert!(seen, "it was not frozen while its files were read");
        assert_eq!(state().trim(), "THAWED");
        goes_on();

        let tool = |name: &str| {
            let net = format!("--net={}", node.dir.join("run/lxc.net").display());
            let mut command = Command::new("nsenter");
            support::run(command.args([&net, name, "-P"]).arg(node.dir.join("run/lxc")).args(["-n", &id]));
        };
        tool("lxc-freeze");
        assert_eq!(state().trim(), "FROZEN");
        let stopped = lines();
        let begun = Instant::now();
        wait_for("half a second", LONG, || (begun.elapsed() > Duration::from_millis(500)).then_some(()));
        assert!(lines() <= stopped + 1, "it writes while it is frozen");
        // What would join it would be stopped as well, timeout or not.
        for exec in [&["exec", "-s", "--timeout", "60"][..], &["exec"]] {
            let begun = Instant::now();
            let (good, said) = crictl.try_run(&[exec, &[&id, "true"]].concat());
            assert!(!good && said.contains("is paused"), "{said}");
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        }
        tool("lxc-unfreeze");
        goes_on();
        tool("lxc-freeze");
        let begun = Instant::now();
        crictl.run(&["stop", "-t", "2", &id]);
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 137);
        crictl.run(&["rmp", "-f", &pod]);
    });
}

/// lxcfs at its usual place; its process.
fn lxcfs() -> Child {
    let place = PathBuf::from("/var/lib/lxcfs");
    std::fs::create_dir_all(&place).expect("a folder");
    let child = Command::new("lxcfs").arg(&place).spawn().expect("lxcfs");
    wait_for("lxcfs", LONG, || place.join("proc/meminfo").exists().then_some(()));
    child
}

#[test]
fn a_container_sees_its_own_limits_by_lxcfs() {
    isolated("a_container_sees_its_own_limits_by_lxcfs", || {
        let mut lxcfs = lxcfs();
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let script = "grep MemTotal: /proc/meminfo; cut -d. -f1 /proc/uptime; \
                      for f in cpuinfo diskstats meminfo stat swaps uptime; do grep -c \"/proc/$f \" /proc/mounts; done; exec sleep 1000";
        let id = run(&crictl, &pod, "c", script, 64 << 20);
        let seen = wait_for("its words", LONG, || Some(log_of(&node, "c")).filter(|log| log.len() >= 8));
        let total = |line: &str| line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
        assert_eq!(total(&seen[0]), Some(64 << 10), "{seen:?}");
        // Since the container's start, not the node's.
        assert!(seen[1].parse::<u64>().expect("seconds") < 60, "{seen:?}");
        assert_eq!(seen[2..], ["1"; 6], "{seen:?}");
        let meminfo = |id: &str| crictl.run(&["exec", "-s", id, "grep", "MemTotal:", "/proc/meminfo"]);
        assert_eq!(total(&meminfo(&id)), Some(64 << 10));
        // What changes is seen at once.
        crictl.run(&["update", "--memory", &(96 << 20).to_string(), &id]);
        assert_eq!(total(&meminfo(&id)), Some(96 << 10));

        // Without it containers start all the same, and see the node.
        lxcfs.kill().expect("its end");
        lxcfs.wait().expect("its end");
        let id = run(&crictl, &pod, "without", "exec sleep 1000", 64 << 20);
        assert!(total(&meminfo(&id)) > Some(64 << 10));
        crictl.run(&["rmp", "-f", &pod]);
        support::run(Command::new("umount").args(["-l", "/var/lib/lxcfs"]));
    });
}
