//! Execs and what they start: each has a cgroup of its own below the container's, is killed with all that is in it, and
//! leaves nothing. ExecSync's limits of time and output.
//!
//! Run by `cargo test --test execs`, as root. A crash leaves nothing: see `support`.

mod support;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use k8s_cri::v1::{ExecSyncRequest, ExecSyncResponse};
use support::client::{Client, block_on};
use support::crictl::{BUSYBOX, container_config};
use support::isolated;
use support::node::{Node, Options};
use support::streams::*;
use support::ws::Ws;

/// Stays in no tree, group or session of whoever started it.
const DAEMON: &str = "(setsid sh -c '(setsid sleep MARK &) & exit 0' </dev/null >/dev/null 2>&1 &); ";

async fn sync(client: &mut Client, id: &str, script: &str, timeout: i64) -> Result<ExecSyncResponse, tonic::Status> {
    let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
    let request = ExecSyncRequest { container_id: id.to_owned(), cmd, timeout };
    client.runtime.exec_sync(request).await.map(tonic::Response::into_inner)
}

/// The cgroup folder of a process in the hierarchy that counts processes (or the only one), below the container's.
fn group_of(pid: i32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("its cgroups");
    let pids = text.lines().find(|l| l.contains(":pids:")).or_else(|| text.lines().find(|l| l.starts_with("0::")));
    pids.and_then(|l| l.rsplit(':').next()).expect("a cgroup").to_owned()
}

/// Cgroups of execs that there are, in all hierarchies.
fn exec_groups() -> Vec<PathBuf> {
    let mut todo = vec![PathBuf::from("/sys/fs/cgroup")];
    let mut found = Vec::new();
    while let Some(folder) = todo.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                if entry.file_name().to_string_lossy().starts_with("exec-") {
                    found.push(entry.path());
                }
                todo.push(entry.path());
            }
        }
    }
    found
}

fn wait_no_groups() {
    support::wait_for("the execs' cgroups to go", LONG, || exec_groups().is_empty().then_some(()));
}

#[test]
fn a_timeout_ends_that_exec_and_all_that_it_started() {
    isolated("a_timeout_ends_that_exec_and_all_that_it_started", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        let (_pod, id) = sleeper(&crictl);
        block_on(async {
            let mut client = Client::connect(&node.socket()).await;
            // Another exec of the same container goes on.
            let url = exec_url(&mut client, &id, &["sleep", "7001"], false).await;
            let other = Ws::connect(&url, "v5.channel.k8s.io").await;
            let other_pid = wait_there("sleep 7001");
            let script = DAEMON.replace("MARK", "7002") + "sleep 7003 & (sleep 7004 &); sleep 7005";
            let begun = Instant::now();
            let call = sync(&mut client, &id, &script, 3);
            let look = tokio::task::spawn_blocking(|| {
                let pids = ["sleep 7002", "sleep 7003", "sleep 7004", "sleep 7005"].map(wait_there);
                pids.map(group_of)
            });
            let (answer, groups) = tokio::join!(call, look);
            let groups = groups.expect("the groups");
            assert_eq!(answer.expect_err("a timeout").code(), tonic::Code::DeadlineExceeded);
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
            assert!(groups.iter().all(|g| *g == groups[0] && g.contains(&format!("{id}/exec-"))), "{groups:?}");
            ["sleep 7002", "sleep 7003", "sleep 7004", "sleep 7005"].into_iter().for_each(wait_gone);
            assert_ne!(group_of(other_pid), groups[0]);
            assert_eq!(pids_of("sleep 7001"), [other_pid]);
            assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");
            let said = sync(&mut client, &id, "echo still here", 10).await.expect("ExecSync").stdout;
            assert_eq!(said, b"still here\n");
            // A client that goes takes its exec with it, and what that has left elsewhere.
            let script = DAEMON.replace("MARK", "7006") + "echo up; sleep 7007";
            let url = exec_url(&mut client, &id, &["sh", "-c", &script], false).await;
            let mut ws = Ws::connect(&url, "v5.channel.k8s.io").await;
            ws.until("up").await;
            wait_there("sleep 7006");
            drop(ws);
            ["sleep 7006", "sleep 7007"].into_iter().for_each(wait_gone);
            drop(other);
            wait_gone("sleep 7001");
            wait_no_groups();
        });
    });
}

#[test]
fn what_an_exec_leaves_running_is_the_containers() {
    isolated("what_an_exec_leaves_running_is_the_containers", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        let (_pod, id) = sleeper(&crictl);
        block_on(async {
            let mut client = Client::connect(&node.socket()).await;
            let script = DAEMON.replace("MARK", "7011") + "until pidof sleep | grep -q ' '; do :; done; echo done";
            let said = sync(&mut client, &id, &script, 30).await.expect("ExecSync");
            assert_eq!((said.exit_code, &said.stdout[..]), (0, &b"done\n"[..]));
            let pid = wait_there("sleep 7011");
            wait_no_groups();
            assert!(group_of(pid).ends_with(&format!("/{id}")), "{}", group_of(pid));
        });
        crictl.run(&["stop", "-t", "0", &id]);
        wait_gone("sleep 7011");
    });
}

#[test]
fn execs_die_with_the_daemon_and_with_the_monitor() {
    isolated("execs_die_with_the_daemon_and_with_the_monitor", || {
        let mut node = Node::start(Options::default());
        let crictl = node.crictl();
        let (pod, id) = sleeper(&crictl);
        let begin = |mark: &'static str, last: &'static str| {
            let script = DAEMON.replace("MARK", mark) + "exec sleep " + last;
            let mut child = crictl.command(&["exec", "-i", &id, "sh", "-c", &script]);
            let child = Running(child.spawn().expect("crictl"));
            wait_there(&format!("sleep {mark}"));
            wait_there(&format!("sleep {last}"));
            assert!(!exec_groups().is_empty());
            child
        };
        let _first = begin("7021", "7022");
        node.kill_daemon();
        ["sleep 7021", "sleep 7022"].into_iter().for_each(wait_gone);
        wait_no_groups();
        // As an earlier daemon has left it between making the group and using it.
        let sleeping = group_of(wait_there("sleep 100000"));
        let root = if PathBuf::from("/sys/fs/cgroup/pids").is_dir() { "/sys/fs/cgroup/pids" } else { "/sys/fs/cgroup" };
        std::fs::create_dir(format!("{root}{sleeping}/exec-left")).expect("a group");
        node.start_daemon();
        wait_no_groups();

        let _second = begin("7023", "7024");
        let monitor =
            crictl.json(&["inspectp", &pod])["info"]["monitorPid"].as_i64().and_then(|p| i32::try_from(p).ok());
        let monitor = monitor.unwrap_or_else(|| monitors()[0]);
        let pid = rustix::process::Pid::from_raw(monitor).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill -9");
        ["sleep 7023", "sleep 7024"].into_iter().for_each(wait_gone);
        wait_no_groups();
        // The container has its own life.
        assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");
        crictl.run(&["stopp", &pod]);
        crictl.run(&["rmp", "-f", &pod]);
    });
}

/// Pids of all monitors.
fn monitors() -> Vec<i32> {
    let named =
        |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == "lxcri-monitor");
    let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
    pids.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(named).collect()
}

#[test]
fn the_containers_limits_hold_for_its_execs() {
    isolated("the_containers_limits_hold_for_its_execs", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let mut config = container_config("c", BUSYBOX, "exec sleep 100000");
        config["linux"]["resources"] = serde_json::json!({"memory_limit_in_bytes": 64 << 20});
        let id = crictl.run(&["create", "--no-pull", &pod, &crictl.file("c", &config), &crictl.pod_file("p")]);
        crictl.run(&["start", &id]);
        block_on(async {
            let mut client = Client::connect(&node.socket()).await;
            // A shell variable of 16 MiB fits, one of 256 MiB does not.
            let hog = |mib: u32| format!("x=$(head -c {} /dev/zero | tr '\\0' x); echo ${{#x}}", mib << 20);
            let said = sync(&mut client, &id, &hog(4), 60).await.expect("ExecSync");
            assert_eq!(said.stdout, format!("{}\n", 4 << 20).as_bytes());
            let said = sync(&mut client, &id, &hog(256), 60).await.expect("ExecSync");
            assert_eq!(said.exit_code, 137, "{}", String::from_utf8_lossy(&said.stderr));
            assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");
        });
    });
}

#[test]
fn exec_sync_has_limits_of_output_and_does_not_wait_for_others() {
    isolated("exec_sync_has_limits_of_output_and_does_not_wait_for_others", || {
        let node = Node::start(Options::default());
        let (_pod, id) = sleeper(&node.crictl());
        block_on(async {
            let client = Client::connect(&node.socket()).await;
            let mut client = Client { runtime: client.runtime.max_decoding_message_size(64 << 20), ..client };
            // Both streams together fit into one message of 16 MiB, and the process is not stopped by what is cut.
            let script = "head -c 30000000 /dev/zero | tr '\\0' o; head -c 30000000 /dev/zero | tr '\\0' e >&2; exit 3";
            let said = sync(&mut client, &id, script, 60).await.expect("ExecSync");
            assert_eq!(said.exit_code, 3);
            let (out, err) = (said.stdout.len(), said.stderr.len());
            assert!(out + err <= 16 << 20 && out + err > 15 << 20 && out > 7 << 20 && err > 7 << 20, "{out} + {err}");
            assert!(said.stdout.iter().all(|b| *b == b'o') && said.stderr.iter().all(|b| *b == b'e'));
            // A child in the background has its output.
            let begun = Instant::now();
            let said = sync(&mut client, &id, "sleep 7031 & echo out", 60).await.expect("ExecSync");
            assert_eq!((said.exit_code, &said.stdout[..]), (0, &b"out\n"[..]));
            assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
            assert_eq!(pids_of("sleep 7031").len(), 1);
        });
    });
}
