//! Load: pods that come and go ten at a time with execs, logs at full speed, lists and statistics; a thousand containers on
//! record; many loggers; output without a newline; hundreds of execs; clients of streams that are slow or vanish. Nothing is
//! lost, and memory and descriptors are flat: they grow by less than 5 % after a warm-up.
//!
//! Run by `cargo test --test load`, as root. The long forms are chosen by LOAD_MINUTES (1), LOAD_LOGGERS (20), LOAD_LINE_MIB
//! (300) and LOAD_EXECS (300). `make bench-load` runs the churn on release programs and the same on containerd
//! (`another_runtime`). A crash leaves nothing: see `support`.

// Tests start programs and write files as they like.
#![allow(clippy::disallowed_methods, clippy::print_stdout)]

mod load_support;
mod support;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use k8s_cri::v1 as cri;
use load_support::{Measured, Quiet, Target, churn, descriptors, exec, make, memory, remove, tell};
use support::client::{Client, block_on};
use support::crictl::{BUSYBOX, read_log, stream_lines};
use support::node::{Node, Options};
use support::streams::{exec_url, pids_of};
use support::ws::Ws;
use support::{isolated, snapshot, wait_for};

/// Pods that come and go at once.
const PARALLEL: usize = 10;
/// Before memory is looked at first.
const WARM_UP: Duration = Duration::from_secs(15);
/// A log that is longer is rotated, as a kubelet does it.
const ROTATE: u64 = 32 << 20;
/// What memory may grow by beside its hundredth parts, in KiB: a page here and there is no leak.
const SLACK: u64 = 256;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

fn ours(node: &Node) -> Target {
    Target {
        name: "proxmox-lxcri",
        socket: node.socket(),
        daemon: node.daemon_pid(),
        helpers: &["lxcri-monitor"],
        logs: node.dir.join("logs"),
    }
}

/// Rotates a container's log until told to end; gives the bytes of content that went through it, marked lines apart.
async fn rotate(mut c: Client, container_id: String, log: PathBuf, over: &AtomicBool, seen: &AtomicU64) {
    let old = log.with_extension("old");
    loop {
        let last = over.load(Ordering::Relaxed);
        let long = std::fs::metadata(&log).is_ok_and(|m| m.len() > ROTATE);
        if long && !last {
            std::fs::rename(&log, &old).expect("the log is renamed");
            let request = cri::ReopenContainerLogRequest { container_id: container_id.clone() };
            match c.runtime.reopen_container_log(request).await {
                // It has ended meanwhile: all it said is in the old one.
                Err(e) if e.code() == tonic::Code::FailedPrecondition => {}
                answer => drop(answer.expect("ReopenContainerLog")),
            }
            let path = old.clone();
            let bytes = tokio::task::spawn_blocking(move || content_bytes(&path)).await.expect("count");
            seen.fetch_add(bytes, Ordering::Relaxed);
            std::fs::remove_file(&old).expect("the old log goes");
        }
        if last {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await; // as a kubelet looks now and then
    }
}

/// Bytes of content in a CRI log, without the records' heads and ends.
fn content_bytes(log: &Path) -> u64 {
    use std::io::BufRead as _;
    let Ok(file) = std::fs::File::open(log) else { return 0 };
    let mut reader = std::io::BufReader::with_capacity(1 << 20, file);
    let (mut bytes, mut line) = (0, Vec::new());
    while reader.read_until(b'\n', &mut line).expect("the log is read") > 0 {
        let head = line.splitn(4, |b| *b == b' ').take(3).map(|p| p.len() + 1).sum::<usize>();
        assert!(line.ends_with(b"\n") && head < line.len(), "{}: half a record", log.display());
        bytes += (line.len() - head - 1) as u64;
        line.clear();
    }
    bytes
}

/// Rounds of a load in which memory may grow before it stays. A heap finds its size within a few; a leak grows in each.
const ROUNDS: usize = 5;

/// What has grown by more than 5 % and the slack, in words.
fn grown(before: &Quiet, after: &Quiet, slack: u64, helpers_slack: u64) -> Vec<String> {
    let rows = [
        ("the daemon's PSS (KiB)", before.daemon.pss, after.daemon.pss, slack),
        ("the daemon's RSS (KiB)", before.daemon.rss, after.daemon.rss, slack),
        ("the monitors' PSS (KiB)", before.helpers.pss, after.helpers.pss, helpers_slack),
        ("the daemon's descriptors", before.descriptors as u64, after.descriptors as u64, 2),
    ];
    let more = rows.into_iter().filter(|(_, before, after, slack)| *after > before + before / 20 + slack);
    more.map(|(what, before, after, _)| format!("{what} grew from {before} to {after}")).collect()
}

/// Whether the load's last round, `n` of [`ROUNDS`], left memory as it was; fails where none did.
fn is_flat(t: &Target, n: usize, before: &Quiet, after: &Quiet, helpers_slack: u64) -> bool {
    tell_memory(t, before, after);
    let grown = grown(before, after, SLACK, helpers_slack);
    assert!(grown.is_empty() || n < ROUNDS, "after {n} rounds of the same: {}", grown.join(", "));
    grown.iter().for_each(|what| t.figure(format_args!("round {n}: {what}; once more")));
    grown.is_empty()
}

fn tell_memory(t: &Target, before: &Quiet, after: &Quiet) {
    let percent = |b: u64, a: u64| (a as f64 / b.max(1) as f64 - 1.0) * 100.0;
    let (b, a) = (before.daemon, after.daemon);
    t.figure(format_args!(
        "the daemon after the load: {} KiB PSS ({:+.1} %), {} KiB RSS ({:+.1} %), {} descriptors (before {})",
        a.pss,
        percent(b.pss, a.pss),
        a.rss,
        percent(b.rss, a.rss),
        after.descriptors,
        before.descriptors
    ));
    let (b, a) = (before.helpers, after.helpers);
    t.figure(format_args!(
        "its processes for pods: {} KiB PSS ({:+.1} %), {} KiB RSS ({:+.1} %)",
        a.pss,
        percent(b.pss, a.pss),
        a.rss,
        percent(b.rss, a.rss)
    ));
}

/// The churn on whatever runtime: warm-up, load for `time`, memory before and after; a container logs at full speed beside.
/// Where `flat`, memory has to stay, and the load is repeated until it does.
async fn load(c: &mut Client, t: &Target, time: Duration, flat: bool) {
    let m = Measured::default();
    let stays = make(c, t, "stays", "echo here; exec sleep 100000", &m).await;
    let loud =
        make(c, t, "loud", "echo begin; exec yes 'a line of output that is written as fast as it can be'", &m).await;
    let log = t.logs.join("loud").join("c.log");
    let (over, seen) = (AtomicBool::new(false), AtomicU64::new(0));
    let rotating = rotate(c.clone(), loud.container.clone(), log.clone(), &over, &seen);
    let own = c.clone();
    let working = async {
        churn(&own, t, PARALLEL, WARM_UP, &Arc::default()).await;
        let mut before = t.quiet().await;
        for round in 1.. {
            let logged = seen.load(Ordering::Relaxed);
            let (m, begun) = (Arc::new(Measured::default()), Instant::now());
            let pods = churn(&own, t, PARALLEL, time, &m).await;
            let took = begun.elapsed();
            let logged = (seen.load(Ordering::Relaxed) - logged) as f64 / took.as_secs_f64() / f64::from(1 << 20);
            tell(t, pods, took, PARALLEL, &m);
            t.figure(format_args!("a container's log beside it: {logged:.1} MiB of content a second"));
            let after = t.quiet().await;
            if !flat {
                tell_memory(t, &before, &after);
                break;
            }
            if is_flat(t, round, &before, &after, SLACK) {
                break;
            }
            before = after;
        }
        over.store(true, Ordering::Relaxed);
    };
    tokio::join!(working, rotating);
    for made in [stays, loud] {
        remove(c, &made.pod, &m).await;
    }
}

#[test]
fn pods_come_and_go_and_memory_stays() {
    isolated("pods_come_and_go_and_memory_stays", || {
        let time = Duration::from_secs(60 * setting("LOAD_MINUTES", 1));
        let node = Node::start(Options::default());
        let t = ours(&node);
        block_on(async {
            let mut c = Client::connect(&t.socket).await;
            c.pull(BUSYBOX).await;
            // The first pod makes what stays for all: the bridge, chains, parent cgroups.
            let m = Measured::default();
            let first = make(&mut c, &t, "first", "true", &m).await;
            remove(&mut c, &first.pod, &m).await;
            let clean = snapshot::take(&node);
            load(&mut c, &t, time, true).await;
            snapshot::assert_back_to(&clean, &node);
        });
    });
}

/// The same on containerd with the same crun, where LOAD_PEER=1: `make bench-load` prints both.
#[test]
fn another_runtime() {
    if std::env::var_os("LOAD_PEER").is_none() {
        println!("not run: another_runtime (what another runtime does is no test of this one: make bench-load)");
        return;
    }
    isolated("another_runtime", || {
        let time = Duration::from_secs(60 * setting("LOAD_MINUTES", 1));
        // Its registry, network and logs are a node's; its daemon is another.
        let node = Node::prepare(Options::default());
        let mut containerd = Containerd::start(&node);
        let t = containerd.target(&node);
        block_on(async {
            let mut c = Client::connect(&t.socket).await;
            c.pull(BUSYBOX).await;
            load(&mut c, &t, time, false).await;
        });
        let _ = containerd.daemon.kill();
        let _ = containerd.daemon.wait();
    });
}

struct Containerd {
    daemon: std::process::Child,
    socket: PathBuf,
}

impl Containerd {
    fn start(node: &Node) -> Self {
        let programs = support::given("LXCRI_CONTAINERD");
        let dir = node.dir.join("containerd");
        std::fs::create_dir_all(&dir).expect("its folder");
        let socket = dir.join("c.sock");
        let (d, cni, certs) = (dir.display(), node.dir.join("cni"), node.dir.join("certs.d"));
        let config = format!(
            r#"version = 3
root = "{d}/lib"
state = "{d}/run"
[grpc]
  address = "{socket}"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{certs}"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "registry.k8s.io/pause:3.10"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{cni}"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "crun"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.crun]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.crun.options]
        BinaryName = "/usr/bin/crun"
        SystemdCgroup = false
"#,
            socket = socket.display(),
            cni = cni.display(),
            certs = certs.display(),
        );
        std::fs::write(dir.join("config.toml"), config).expect("config.toml");
        let log = || std::fs::File::options().create(true).append(true).open(node.log_file()).expect("its log");
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display());
        let mut daemon = Command::new(programs.join("containerd"))
            .arg("--config")
            .arg(dir.join("config.toml"))
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .spawn()
            .expect("containerd starts");
        wait_for("containerd's answer", Duration::from_secs(60), || {
            let ended = daemon.try_wait().ok().flatten();
            let said = || std::fs::read_to_string(node.log_file()).unwrap_or_default();
            assert!(ended.is_none(), "containerd ended: {ended:?}\n{}", said());
            block_on(async {
                let stream = tokio::net::UnixStream::connect(&socket).await.ok()?;
                drop(stream);
                let mut c = Client::connect(&socket).await;
                let status = c.runtime.status(cri::StatusRequest::default()).await.ok()?.into_inner().status?;
                status.conditions.iter().all(|c| c.status).then_some(())
            })
        });
        Self { daemon, socket }
    }

    fn target(&self, node: &Node) -> Target {
        Target {
            name: "containerd",
            socket: self.socket.clone(),
            daemon: self.daemon.id(),
            helpers: &["containerd-shim", "pause"],
            logs: node.dir.join("logs"),
        }
    }
}

/// Text of a file with every id in `ids` replaced.
fn renamed(mut text: String, ids: &[(String, String)]) -> String {
    for (old, new) in ids {
        text = text.replace(old, new);
    }
    text
}

fn new_id() -> String {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).expect("random bytes");
    bytes.iter().fold(String::new(), |text, b| text + &format!("{b:02x}"))
}

/// Copies a pod's records under new ids.
fn copy_records(pods: &Path, pod: &str, containers: &[String], n: usize) {
    let mut ids = vec![(pod.to_owned(), new_id()), ("\"uid-p\"".into(), format!("\"uid-{n}\""))];
    ids.extend(containers.iter().map(|c| (c.clone(), new_id())));
    let mut todo = vec![pods.join(pod)];
    while let Some(folder) = todo.pop() {
        let to = |path: &Path| PathBuf::from(renamed(path.display().to_string(), &ids));
        std::fs::create_dir_all(to(&folder)).expect("a folder");
        for entry in std::fs::read_dir(&folder).expect("records").flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                todo.push(entry.path());
            } else {
                let text = std::fs::read_to_string(entry.path()).expect("a record");
                std::fs::write(to(&entry.path()), renamed(text, &ids)).expect("a record");
            }
        }
    }
}

#[test]
fn a_thousand_containers_on_record() {
    isolated("a_thousand_containers_on_record", || {
        const EACH: usize = 100;
        const PODS: usize = 10;
        let mut node = Node::start(Options::default());
        let (pod, ids) = block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            let (t, m) = (ours(&node), Measured::default());
            let made = make(&mut c, &t, "p", "exit 3", &m).await;
            let mut ids = vec![made.container.clone()];
            for n in 1..EACH {
                let config = support::client::container(&format!("c{n}"), BUSYBOX, "exit 3");
                let request = support::client::create_request(&made.pod, config, &made.config);
                ids.push(c.runtime.create_container(request).await.expect("CreateContainer").into_inner().container_id);
            }
            let stop = cri::StopPodSandboxRequest { pod_sandbox_id: made.pod.clone() };
            // So many that end at once are more than are told at once.
            let begun = Instant::now();
            c.runtime.stop_pod_sandbox(stop).await.expect("StopPodSandbox");
            assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
            (made.pod, ids)
        });
        node.stop_daemon();
        let few = start_to_answer(&mut node);
        let small = block_on(ours(&node).quiet());
        node.stop_daemon();
        for n in 1..PODS {
            copy_records(&node.dir.join("lib/pods"), &pod, &ids, n);
        }
        let many = start_to_answer(&mut node);
        let t = ours(&node);
        block_on(async {
            let mut c = Client::connect(&t.socket).await;
            let all = c.runtime.list_containers(cri::ListContainersRequest::default()).await.expect("ListContainers");
            let all = all.into_inner().containers;
            assert_eq!(all.len(), EACH * PODS);
            assert!(all.iter().all(|c| c.state == cri::ContainerState::ContainerExited as i32));
            let (lists, one) = (load_support::Times::default(), load_support::Times::default());
            for n in 0..50 {
                let list = lists.of(c.runtime.list_containers(cri::ListContainersRequest::default())).await;
                list.expect("ListContainers");
                let request = cri::ContainerStatusRequest { container_id: all[n * 7].id.clone(), verbose: false };
                one.of(c.runtime.container_status(request)).await.expect("ContainerStatus");
            }
            let big = t.quiet().await;
            let more = (big.daemon.pss.saturating_sub(small.daemon.pss)) as f64 / ((PODS - 1) * EACH) as f64;
            t.figure(format_args!("start with {} containers on record: {many:?}, with {EACH}: {few:?}", all.len()));
            let ((_, list, list_95), (_, status, status_95)) = (lists.summary(), one.summary());
            t.figure(format_args!("ListContainers of {}: median {list:.1} ms, 95 % below {list_95:.1} ms", all.len()));
            t.figure(format_args!("ContainerStatus among them: median {status:.1} ms, 95 % below {status_95:.1} ms"));
            t.figure(format_args!("memory for a container on record: {more:.1} KiB PSS"));
            // A record is a few lines of JSON: a start that takes a hundredth of a second each reads something else, too.
            assert!(many < few + Duration::from_secs(10), "{many:?} after {few:?}");
            let pods = c.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.expect("ListPodSandbox");
            let begun = Instant::now();
            let gone = pods.into_inner().items.into_iter().map(|p| {
                let mut c = c.clone();
                async move {
                    let request = cri::RemovePodSandboxRequest { pod_sandbox_id: p.id };
                    c.runtime.remove_pod_sandbox(request).await.expect("RemovePodSandbox");
                }
            });
            futures::future::join_all(gone).await;
            t.figure(format_args!("removing {PODS} pods with their containers: {:?}", begun.elapsed()));
            let left = c.runtime.list_containers(cri::ListContainersRequest::default()).await.expect("ListContainers");
            assert!(left.into_inner().containers.is_empty());
        });
    });
}

/// From the daemon's start to its answer.
fn start_to_answer(node: &mut Node) -> Duration {
    let begun = Instant::now();
    node.start_daemon();
    begun.elapsed()
}

#[test]
fn output_without_end_and_many_loggers() {
    isolated("output_without_end_and_many_loggers", || {
        let node = Node::start(Options::default());
        let t = ours(&node);
        block_on(async {
            let mut c = Client::connect(&t.socket).await;
            c.pull(BUSYBOX).await;
            let m = Measured::default();
            endless_line(&mut c, &t, &m).await;
            loggers(&mut c, &t, &m).await;
        });
    });
}

/// All of it arrives, in pieces; the monitor's memory does not know how long the line is.
async fn endless_line(c: &mut Client, t: &Target, m: &Measured) {
    let mib = setting("LOAD_LINE_MIB", 300);
    let script = format!("until [ -e /go ]; do sleep 0.05; done; head -c {} /dev/zero | tr '\\0' x", mib << 20);
    let made = make(c, t, "line", &script, m).await;
    let monitor = t.helpers()[0];
    let (before, begun) = (memory(monitor), Instant::now());
    let log = t.logs.join("line").join("c.log");
    let (over, seen) = (AtomicBool::new(false), AtomicU64::new(0));
    assert_eq!(exec(c, &made.container, ": > /go", m).await.0, 0);
    let mut own = c.clone();
    let mut most = before;
    let watching = async {
        loop {
            let request = cri::ContainerStatusRequest { container_id: made.container.clone(), verbose: false };
            let answer = own.runtime.container_status(request).await.expect("ContainerStatus").into_inner();
            let now = memory(monitor);
            (most.pss, most.rss) = (most.pss.max(now.pss), most.rss.max(now.rss));
            if answer.status.expect("a status").state == cri::ContainerState::ContainerExited as i32 {
                over.store(true, Ordering::Relaxed);
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await; // the poll of an end that has to come
        }
    };
    tokio::join!(rotate(c.clone(), made.container.clone(), log.clone(), &over, &seen), watching);
    let took = begun.elapsed();
    let bytes = seen.load(Ordering::Relaxed) + content_bytes(&log);
    assert_eq!(bytes, mib << 20, "bytes of the line in the log");
    t.figure(format_args!(
        "{mib} MiB without a newline: {:.1} MiB a second, the monitor's memory {} KiB PSS before and {} at most",
        mib as f64 / took.as_secs_f64(),
        before.pss,
        most.pss
    ));
    assert!(most.pss < before.pss + 1024, "the monitor grew from {before:?} to {most:?}");
    remove(c, &made.pod, m).await;
}

/// Containers that all log at full speed: every line of each is there, in its order.
async fn loggers(c: &mut Client, t: &Target, m: &Measured) {
    const LINES: usize = 5000;
    let count = setting("LOAD_LOGGERS", 20) as usize;
    let script = format!(
        "n=1; while :; do until [ -e /go$n ]; do sleep 0.2; done; seq {LINES}; seq {LINES} >&2; n=$((n + 1)); done"
    );
    let mut all = Vec::new();
    for n in 0..count {
        all.push(make(c, t, &format!("logger-{n}"), &script, m).await);
    }
    let expected: Vec<String> = (1..=LINES).map(|n| n.to_string()).collect();
    // Memory is compared from the second round on: in the first, what a monitor needs once for all its work is made.
    let mut before = None;
    for round in 1.. {
        let begun = Instant::now();
        for made in &all {
            assert_eq!(exec(c, &made.container, &format!(": > /go{round}"), m).await.0, 0);
        }
        for n in 0..count {
            let log = t.logs.join(format!("logger-{n}")).join("c.log");
            let whole = || {
                let text = std::fs::read(&log).unwrap_or_default();
                (text.iter().filter(|b| **b == b'\n').count() >= 2 * LINES * round).then_some(())
            };
            tokio::task::block_in_place(|| wait_for("all lines", Duration::from_secs(300), whole));
            let log = read_log(&log);
            for stream in ["stdout", "stderr"] {
                let all = vec![expected.clone(); round].concat();
                assert_eq!(stream_lines(&log, stream), all, "logger {n}, {stream}");
            }
        }
        let took = begun.elapsed();
        let after = t.quiet().await;
        if let Some(before) = before.replace(after) {
            t.figure(format_args!(
                "{count} containers logging at once: {:.0} lines a second in all, none lost",
                (2 * LINES * count) as f64 / took.as_secs_f64()
            ));
            if is_flat(t, round, &before, &after, SLACK * count as u64 / 10) {
                break;
            }
        }
    }
    for made in all {
        remove(c, &made.pod, m).await;
    }
}

#[test]
fn execs_and_clients_that_are_slow_or_vanish() {
    isolated("execs_and_clients_that_are_slow_or_vanish", || {
        let node = Node::start(Options::default());
        let t = ours(&node);
        block_on(async {
            let mut c = Client::connect(&t.socket).await;
            c.pull(BUSYBOX).await;
            let m = Measured::default();
            let made = make(&mut c, &t, "p", "exec sleep 100000", &m).await;
            let id = made.container.clone();
            let monitor = t.helpers()[0];
            let count = setting("LOAD_EXECS", 300);
            let clients = (count / 10).min(100) as usize;
            // All that is needed once: threads, buffers, the program's own pages.
            execs(&mut c, &id, count.min(300), &Measured::default()).await;
            streams(&mut c, &id, clients).await;
            let mut before = t.quiet().await;
            let of_monitor = descriptors(monitor);
            for round in 1.. {
                let (m, begun) = (Measured::default(), Instant::now());
                execs(&mut c, &id, count, &m).await;
                let (n, median, p95) = m.exec.summary();
                t.figure(format_args!(
                    "{n} ExecSync, four at once: {:.1} a second, median {median:.1} ms, 95 % below {p95:.1} ms",
                    n as f64 / begun.elapsed().as_secs_f64()
                ));
                streams(&mut c, &id, clients).await;
                // Nothing of them is left.
                let gone = || (pids_of(FLOOD).is_empty() && pids_of("sleep 77078").is_empty()).then_some(());
                tokio::task::block_in_place(|| wait_for("all execs to end", Duration::from_secs(60), gone));
                let after = t.quiet().await;
                assert_eq!(descriptors(monitor), of_monitor, "the monitor's descriptors");
                if is_flat(&t, round, &before, &after, SLACK / 4) {
                    break;
                }
                before = after;
            }
            remove(&mut c, &made.pod, &m).await;
        });
    });
}

/// Many, four at once; each says its number and ends with another code.
async fn execs(c: &mut Client, id: &str, count: u64, m: &Measured) {
    let next = AtomicU64::new(0);
    let workers = (0..4).map(|_| {
        let mut c = c.clone();
        let next = &next;
        async move {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= count {
                    return;
                }
                let (code, said) = exec(&mut c, id, &format!("echo number {n}; exit {}", n % 50), m).await;
                assert_eq!((code, said), ((n % 50) as i32, format!("number {n}\n").into_bytes()));
            }
        }
    });
    futures::future::join_all(workers).await;
}

/// Output without an end.
const FLOOD: &str = "yes 0123456789abcdef";

/// Clients of exec: those that read a little and vanish, those that never read, those that vanish before anything comes.
async fn streams(c: &mut Client, id: &str, count: usize) {
    let mut kept = Vec::new();
    for n in 0..count {
        let command: &[&str] = if n % 3 == 2 { &["sleep", "77078"] } else { &["yes", "0123456789abcdef"] };
        let url = exec_url(c, id, command, false).await;
        let mut ws = Ws::connect(&url, "v5.channel.k8s.io").await;
        if n % 3 == 0 {
            for _ in 0..10 {
                ws.next().await.expect("output");
            }
        }
        // One in four stays a while without reading; the others vanish at once.
        if n.is_multiple_of(4) {
            kept.push(ws);
        }
    }
    // Beside clients that do not read, others are served.
    assert_eq!(exec(c, id, "echo hi", &Measured::default()).await, (0, b"hi\n".to_vec()));
}
