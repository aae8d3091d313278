//! What does not vary from machine to machine, counted: processes, mounts, syncs and bytes written for a pod's life, an exec and a
//! list, beside the committed baseline in tests/costs.toml. A count that rises over it fails.
//!
//! Run by `cargo test --test costs`, as root. The daemon and all that it starts run under strace for a few lives each; what happens
//! once for many is divided away. `COSTS_PRINT=1` prints the counts in the baseline's form. Where times are too noisy to be held by a
//! test, these are what they come from.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::print_stdout)] // tests start programs and print figures

mod support;

use std::collections::{BTreeMap, HashMap};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use k8s_cri::v1 as cri;
use support::client::{Client, block_on, container, create_request, pod};
use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::{isolated, wait_for};

/// Lives of pods, execs and rounds of lists that are counted.
const TIMES: u64 = 6;
/// System calls that start something, change mounts, go to the disk, or to a bus.
const CALLS: &str = "execve,clone,clone3,fork,vfork,mount,umount2,move_mount,open_tree,fsmount,fsync,fdatasync,syncfs,sync,\
    write,pwrite64,writev,pwritev,pwritev2,connect";

/// Counts by what was counted: `daemon.fsync`, `started.crun`, ...
type Counts = BTreeMap<String, u64>;

/// A strace that follows the daemon, the monitors that there are, and all that they start.
struct Trace {
    strace: Child,
    file: std::path::PathBuf,
    programs: HashMap<u32, String>,
}

impl Trace {
    fn begin(node: &Node, phase: &str) -> Self {
        let mut programs: HashMap<u32, String> = monitors().into_iter().map(|pid| (pid, "monitor".into())).collect();
        programs.insert(node.daemon_pid(), "daemon".into());
        let file = node.dir.join(phase);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-yy", "-s", "32", "-e", &format!("trace={CALLS}"), "-e", "signal=none", "-o"]).arg(&file);
        for pid in programs.keys() {
            strace.args(["-p", &pid.to_string()]);
        }
        let strace = strace.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("strace");
        wait_for("strace to follow them", Duration::from_secs(20), || {
            programs.keys().all(|pid| traced(*pid)).then_some(())
        });
        Self { strace, file, programs }
    }

    fn end(mut self) -> Counts {
        support::run(Command::new("kill").args(["-INT", &self.strace.id().to_string()]));
        self.strace.wait().unwrap();
        count(&String::from_utf8_lossy(&std::fs::read(&self.file).unwrap()), self.programs)
    }
}

/// The pods' monitors.
fn monitors() -> Vec<u32> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let named =
        |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == "lxcri-monitor");
    pids.filter(named).collect()
}

/// Whether each of its threads has a tracer.
fn traced(pid: u32) -> bool {
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().all(|t| {
        let status = std::fs::read_to_string(t.path().join("status")).unwrap_or_default();
        status.lines().any(|l| l.strip_prefix("TracerPid:").is_some_and(|p| p.trim() != "0"))
    })
}

/// The counts in what strace wrote. Who does it: the daemon and its forks, the monitor and its forks, or one of the others, of which
/// only the starts are counted: what crun or a plugin does is theirs.
/// `programs` are those of the processes that there were at first.
fn count(trace: &str, mut programs: HashMap<u32, String>) -> Counts {
    let mut counts = Counts::new();
    let calls = calls(trace);
    // Read first: a child may be seen before its parent's call has returned.
    let starts = |call: &&Call| matches!(call.name.as_str(), "clone" | "clone3" | "fork" | "vfork");
    let parents: HashMap<u32, u32> = calls.iter().filter(starts).map(|c| (c.result as u32, c.pid)).collect();
    for Call { pid, name: call, arguments, result } in calls {
        let mut ancestor = pid;
        while let (None, Some(parent)) = (programs.get(&ancestor), parents.get(&ancestor)) {
            ancestor = *parent;
        }
        // The daemon's threads that there were before have no parent here.
        let program = programs.get(&ancestor).cloned().unwrap_or_else(|| "daemon".into());
        let own = matches!(program.as_str(), "daemon" | "monitor");
        let mut add = |what: String, n: u64| *counts.entry(what).or_default() += n;
        match call.as_str() {
            "execve" => {
                let mut strings = arguments.split('"').skip(1).step_by(2);
                let (path, first) = (strings.next().unwrap_or_default(), strings.next().unwrap_or_default());
                // By a descriptor: a copy in memory, whose name is its first argument.
                let path = if path.starts_with("/proc/self/fd/") { first } else { path };
                let name = match path.rsplit('/').next().unwrap_or(path) {
                    n if n.contains("monitor") => "monitor".to_owned(),
                    n => n.to_owned(),
                };
                add(format!("started.{name}"), 1);
                programs.insert(pid, name);
            }
            // Threads are a matter of how many calls happen to come at once.
            "clone" | "clone3" | "fork" | "vfork" if own && !arguments.contains("CLONE_THREAD") => {
                add(format!("{program}.forks"), 1);
            }
            "clone" | "clone3" | "fork" | "vfork" => {}
            "write" | "pwrite64" | "writev" | "pwritev" | "pwritev2" if own => {
                // `12</a/file>`: no socket, pipe or other thing without a name, and no device or kernel's file.
                let file = arguments.split_once('<').map_or("", |(_, f)| f);
                let kernels = ["/proc/", "/sys/", "/dev/"].iter().any(|k| file.starts_with(k));
                if file.starts_with('/') && !kernels && !file.contains("memfd:") && !file.contains("daemon.log") {
                    add(format!("{program}.bytes"), result);
                }
            }
            "write" | "pwrite64" | "writev" | "pwritev" | "pwritev2" => {}
            // One call of D-Bus at least for each connection; whoever makes it, systemd does the work.
            "connect" if arguments.contains("/dbus/") || arguments.contains("/run/systemd/private") => {
                add(format!("{program}.buses"), 1);
            }
            "connect" => {}
            _ if own => add(format!("{program}.{call}"), 1),
            _ => {}
        }
    }
    counts
}

/// A system call that succeeded.
struct Call {
    pid: u32,
    name: String,
    arguments: String,
    result: u64,
}

/// Those in what strace wrote, in the order in which they ended.
fn calls(trace: &str) -> Vec<Call> {
    let mut begun: HashMap<u32, String> = HashMap::new();
    let mut calls = Vec::new();
    for line in trace.lines() {
        let Some((pid, rest)) = line.split_once(' ') else { continue };
        let Ok(pid) = pid.parse::<u32>() else { continue };
        let rest = rest.trim_start();
        if let Some(part) = rest.strip_suffix(" <unfinished ...>") {
            begun.insert(pid, part.to_owned());
            continue;
        }
        let whole = match rest.strip_prefix("<... ").and_then(|r| r.split_once(" resumed>")) {
            Some((_, end)) => format!("{}{end}", begun.remove(&pid).unwrap_or_default()),
            None => rest.to_owned(),
        };
        let (Some((name, arguments)), Some((_, result))) = (whole.split_once('('), whole.rsplit_once(" = ")) else {
            continue;
        };
        if let Some(Ok(result)) = result.split([' ', '<']).next().map(str::parse) {
            calls.push(Call { pid, name: name.into(), arguments: arguments.into(), result });
        }
    }
    calls
}

async fn life(c: &mut Client, node: &Node, name: &str) {
    let pod = pod(name, &node.pod_logs(name));
    let request = cri::RunPodSandboxRequest { config: Some(pod.clone()), ..Default::default() };
    let pod_sandbox_id = c.runtime.run_pod_sandbox(request).await.expect("RunPodSandbox").into_inner().pod_sandbox_id;
    let config = container("c", BUSYBOX, "trap 'exit 0' TERM; echo ready; while :; do sleep 3600 & wait $!; done");
    let made = c.runtime.create_container(create_request(&pod_sandbox_id, config, &pod)).await;
    let container_id = made.expect("CreateContainer").into_inner().container_id;
    let id = || container_id.clone();
    c.runtime.start_container(cri::StartContainerRequest { container_id: id() }).await.expect("StartContainer");
    let log = node.pod_logs(name).join(name).join("c.log");
    wait_for("the trap to be set", Duration::from_secs(20), || {
        std::fs::read_to_string(&log).is_ok_and(|l| l.contains("ready")).then_some(())
    });
    let stop = cri::StopContainerRequest { container_id: id(), timeout: 10 };
    c.runtime.stop_container(stop).await.expect("StopContainer");
    c.runtime.remove_container(cri::RemoveContainerRequest { container_id: id() }).await.expect("RemoveContainer");
    let stop = cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
    c.runtime.stop_pod_sandbox(stop).await.expect("StopPodSandbox");
    c.runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id }).await.expect("RemovePodSandbox");
}

async fn lists(c: &mut Client) {
    c.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.expect("ListPodSandbox");
    c.runtime.list_containers(cri::ListContainersRequest::default()).await.expect("ListContainers");
    c.runtime.list_container_stats(cri::ListContainerStatsRequest::default()).await.expect("ListContainerStats");
    c.images.list_images(cri::ListImagesRequest::default()).await.expect("ListImages");
}

/// The counts for one, from those of [`TIMES`]: what came less often than each time belongs to none of them.
fn each(phase: &str, counts: &Counts) -> Counts {
    let each = counts.iter().map(|(k, n)| (format!("{phase}.{k}"), n / TIMES));
    each.filter(|(_, n)| *n > 0).collect()
}

#[test]
fn nothing_costs_more_than_before() {
    isolated("nothing_costs_more_than_before", || {
        let node = Node::start(Options::default());
        let mut found = Counts::new();
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            // What is made once for all.
            life(&mut c, &node, "warm-1").await;
            life(&mut c, &node, "warm-2").await;
            let trace = |phase| Trace::begin(&node, phase);

            let t = trace("pod");
            for n in 0..TIMES {
                life(&mut c, &node, &format!("p-{n}")).await;
            }
            found.extend(each("pod", &t.end()));

            let config = pod("execs", &node.pod_logs("execs"));
            let request = cri::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
            let id = c.runtime.run_pod_sandbox(request).await.expect("RunPodSandbox").into_inner().pod_sandbox_id;
            let made = create_request(&id, container("c", BUSYBOX, "exec sleep 3600"), &config);
            let container_id =
                c.runtime.create_container(made).await.expect("CreateContainer").into_inner().container_id;
            let start = cri::StartContainerRequest { container_id: container_id.clone() };
            c.runtime.start_container(start).await.expect("StartContainer");
            let t = trace("exec");
            for _ in 0..TIMES {
                let cmd = vec!["true".into()];
                let request = cri::ExecSyncRequest { container_id: container_id.clone(), cmd, timeout: 20 };
                assert_eq!(c.runtime.exec_sync(request).await.expect("ExecSync").into_inner().exit_code, 0);
            }
            found.extend(each("exec", &t.end()));

            let t = trace("list");
            for _ in 0..TIMES {
                lists(&mut c).await;
            }
            found.extend(each("list", &t.end()));
            let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: id };
            c.runtime.remove_pod_sandbox(remove).await.expect("RemovePodSandbox");
        });
        if std::env::var_os("COSTS_PRINT").is_some() {
            found.iter().for_each(|(what, n)| println!("figure: {what} = {n}"));
        }
        compare(&found);
    });
}

fn compare(found: &Counts) {
    let path = support::repository().join("tests/costs.toml");
    let baseline: toml::Table = std::fs::read_to_string(&path).expect("the baseline").parse().expect("TOML");
    let allowed = |what: &str| {
        what.split('.').try_fold(None, |at: Option<&toml::Value>, key| {
            let next = at.map_or_else(|| baseline.get(key), |t| t.get(key))?;
            Some(Some(next))
        })
    };
    let allowed = |what: &str| allowed(what).flatten().and_then(toml::Value::as_integer).unwrap_or(0) as u64;
    // Ids, addresses and times are not always of the same length.
    let slack = |what: &str| if what.ends_with(".bytes") { allowed(what) / 20 } else { 0 };
    let over: Vec<String> = found
        .iter()
        .filter(|(what, n)| **n > allowed(what) + slack(what))
        .map(|(what, n)| format!("{what}: {n}, before {}", allowed(what)))
        .collect();
    assert!(over.is_empty(), "costs more than tests/costs.toml says:\n{}", over.join("\n"));
    for needed in ["pod.started.crun", "pod.daemon.bytes", "exec.started.crun"] {
        assert!(found.contains_key(needed), "{needed} was not counted: {found:?}");
    }
}

#[test]
fn what_strace_writes_is_understood() {
    let trace = r#"10 clone3({flags=CLONE_VM|CLONE_VFORK, exit_signal=SIGCHLD} <unfinished ...>
11 execve("/proc/self/fd/9", ["/usr/bin/crun", "exec"], 0x1 /* 3 vars */ <unfinished ...>
10 <... clone3 resumed> => {parent_tid=[0]}, 88) = 11
11 <... execve resumed>) = 0
11 mount("", "/a", "", 0, NULL) = 0
10 clone3({flags=CLONE_VM|CLONE_THREAD}, 88) = 12
12 write(7</tmp/node/lib/a>, ""..., 300) = 300
12 write(8<UNIX-STREAM:[1->2]>, ""..., 99) = 99
12 fdatasync(7</tmp/node/lib/a>) = 0
12 mount("x", "y", "z", 0, NULL) = -1 EPERM (Operation not permitted)
12 connect(9<UNIX-STREAM:[3]>, {sa_family=AF_UNIX, sun_path="/a/ours.sock"}, 110) = 0
11 connect(9<UNIX-STREAM:[4]>, {sa_family=AF_UNIX, sun_path="/run/dbus/system_bus_socket"}, 29) = 0
12 umount2("/a", MNT_DETACH) = 0"#;
    let counts = count(trace, HashMap::from([(10, "daemon".into())]));
    let expected = [
        ("crun.buses", 1),
        ("daemon.bytes", 300),
        ("daemon.fdatasync", 1),
        ("daemon.forks", 1),
        ("daemon.umount2", 1),
        ("started.crun", 1),
    ];
    assert_eq!(counts, expected.map(|(k, n)| (k.to_owned(), n)).into());
}
