//! What happens to the node and not to a pod: the kubelet or the daemon goes and comes back, the node boots anew. These
//! scenarios run one after the other.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::ctx::{Ctx, LONG, container, is_ready, pod, pod_with, shell, with};
use super::harness::{Scenario, long};
use crate::support::run;

pub const SCENARIOS: &[Scenario] = &[
    ("static_pod_has_a_mirror", static_pod),
    ("kubelet_restart_keeps_pods", kubelet_restart),
    ("kubelet_is_gone_for_a_while", kubelet_gone),
    ("daemon_crash_keeps_pods", daemon_crash),
    ("node_boots_anew", reboot),
];

fn id(pod: &Value) -> (String, i64) {
    let c = container(pod, "c");
    (c["containerID"].as_str().unwrap_or_default().to_owned(), c["restartCount"].as_i64().unwrap_or(-1))
}

fn lasting(name: &str) -> Value {
    // Stays on a node that nobody hears of.
    let forever = json!([{"operator": "Exists"}]);
    pod_with(name, json!({"tolerations": forever, "containers": [shell("c", "while :; do date +%s; sleep 1; done")]}))
}

fn static_pod(ctx: &Ctx) {
    let (dir, node) = {
        let nodes = ctx.cluster.nodes();
        (nodes[0].dir.join("manifests"), nodes[0].plan.name.clone())
    };
    let mut manifest = pod_with("fixed", json!({"containers": [shell("c", "echo here; sleep 1000")]}));
    manifest["metadata"]["namespace"] = json!(ctx.ns);
    std::fs::write(dir.join(".fixed"), manifest.to_string()).expect("a manifest");
    std::fs::rename(dir.join(".fixed"), dir.join("fixed.json")).expect("in its place");
    let name = format!("fixed-{node}");
    let first = id(&ctx.ready(&name));
    assert_eq!(ctx.logs(&[&name]), "here\n");
    // Deleted by the API only the mirror goes, and comes back.
    ctx.kubectl(&["delete", "pod", &name, "--wait=false"]);
    ctx.wait("the mirror to be there again", LONG, || {
        let p = ctx.get(&format!("pods/{name}"))?;
        (p["metadata"]["deletionTimestamp"].is_null() && is_ready(&p) && id(&p) == first).then_some(())
    });
    manifest["spec"]["containers"][0]["command"][2] = json!("echo changed; sleep 1000");
    std::fs::write(dir.join(".fixed"), manifest.to_string()).expect("a manifest");
    std::fs::rename(dir.join(".fixed"), dir.join("fixed.json")).expect("in its place");
    ctx.wait("the changed pod", LONG, || {
        let p = ctx.get(&format!("pods/{name}"))?;
        (is_ready(&p) && id(&p).0 != first.0).then_some(())
    });
    std::fs::remove_file(dir.join("fixed.json")).expect("the manifest");
    ctx.gone(&name);
}

fn kubelet_restart(ctx: &Ctx) {
    ctx.apply(&[lasting("p"), pod("done", "exit 3")]);
    let before = id(&ctx.ready("p"));
    ctx.phase("done", "Failed");
    {
        let mut nodes = ctx.cluster.nodes();
        nodes[0].kubelet.take().expect("the kubelet").stop();
        nodes[0].restart_kubelet();
    }
    ctx.cluster.wait_node_ready("node-1");
    ctx.apply(&[pod("after", "sleep 1000")]);
    ctx.ready("after");
    assert_eq!(id(&ctx.ready("p")), before, "another container");
    assert_eq!(id(&ctx.pod("done")).1, 0, "what had ended was run again");
    assert_eq!(ctx.exec("p", "echo here"), "here");
}

/// Containers end and others run on while there is no kubelet; it then sees both as they are.
fn kubelet_gone(ctx: &Ctx) {
    let gone_for = Duration::from_secs(if long() { 600 } else { 20 });
    let forever = json!([{"operator": "Exists"}]);
    let ends = pod_with(
        "ends",
        json!({"restartPolicy": "Never", "tolerations": forever, "containers": [shell("c", "sleep 8; echo the end; exit 11")]}),
    );
    ctx.apply(&[lasting("stays"), ends]);
    let before = id(&ctx.ready("stays"));
    ctx.ready("ends");
    let mut nodes = ctx.cluster.nodes();
    nodes[0].kubelet.take().expect("the kubelet").kill();
    let start = Instant::now();
    crate::support::wait_for("the time without a kubelet to pass", gone_for * 2, || {
        (start.elapsed() >= gone_for).then_some(())
    });
    nodes[0].restart_kubelet();
    drop(nodes);
    ctx.cluster.wait_node_ready("node-1");
    let p = ctx.phase("ends", "Failed");
    assert_eq!(container(&p, "c")["state"]["terminated"]["exitCode"], 11, "{p}");
    assert_eq!(ctx.logs(&["ends"]), "the end\n");
    assert_eq!(id(&ctx.ready("stays")), before);
    // A line for each second: none is missing for the time without a kubelet.
    let lines: Vec<u64> = ctx.logs(&["stays"]).lines().filter_map(|l| l.parse().ok()).collect();
    let gaps: Vec<_> = lines.windows(2).filter(|w| w[1] - w[0] > 5).collect();
    assert!(gaps.is_empty() && lines.len() > 20, "{} lines, gaps: {gaps:?}", lines.len());
}

fn daemon_crash(ctx: &Ctx) {
    ctx.apply(&[lasting("a"), lasting("b"), pod("done", "exit 3")]);
    let before: Vec<_> = ["a", "b"].iter().map(|p| id(&ctx.ready(p))).collect();
    ctx.phase("done", "Failed");
    for _ in 0..3 {
        ctx.cluster.nodes()[0].crash_daemon();
    }
    ctx.wait("exec to work again", LONG, || ctx.output(&["exec", "a", "--", "true"]).status.success().then_some(()));
    ctx.apply(&[pod("after", "sleep 1000")]);
    ctx.ready("after");
    let after: Vec<_> = ["a", "b"].iter().map(|p| id(&ctx.ready(p))).collect();
    assert_eq!(after, before);
    assert_eq!(id(&ctx.pod("done")).1, 0);
}

/// As after a power cut: no process is left, /run is empty, mounts and network are gone, and the boot id is another.
fn reboot(ctx: &Ctx) {
    let once = |name: &str, script: &str| {
        let c = with(shell("c", script), json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
        let v = json!([{"name": "v", "hostPath": {"path": format!("/tmp/{}", ctx.ns), "type": "DirectoryOrCreate"}}]);
        pod_with(name, json!({"restartPolicy": "Never", "containers": [c], "volumes": v}))
    };
    ctx.apply(&[
        lasting("always"),
        once("done", "echo ran >> /v/done"),
        once("running", "echo ran >> /v/running; sleep 10000"),
    ]);
    let before = ctx.ready("always");
    ctx.ready("running");
    let done = ctx.phase("done", "Succeeded");
    let boot =
        |ctx: &Ctx| ctx.cluster.get("/api/v1/nodes/node-1").expect("the node")["status"]["nodeInfo"]["bootID"].clone();
    let boot_before = boot(ctx);
    let mut nodes = ctx.cluster.nodes();
    let node = &mut nodes[0];
    node.kubelet.take().expect("the kubelet").kill();
    node.daemon.take().expect("the daemon").kill();
    cut_the_power(&node.dir);
    node.start_daemon();
    node.restart_kubelet();
    drop(nodes);
    ctx.wait("the new boot id", LONG, || (boot(ctx) != boot_before).then_some(()));
    ctx.cluster.wait_node_ready("node-1");
    let after = ctx.wait_pod("always", "running again", |p| is_ready(p) && id(p).1 == id(&before).1 + 1);
    assert_ne!(id(&after).0, id(&before).0);
    assert_eq!(ctx.exec("always", "echo here"), "here");
    // Neither what had ended nor what may not be run again is.
    let ended = ctx.phase("running", "Failed");
    assert_ne!(container(&ended, "c")["state"]["terminated"]["exitCode"], 0, "{ended}");
    assert_eq!(id(&ctx.pod("done")), id(&done));
    for name in ["done", "running"] {
        assert_eq!(std::fs::read_to_string(format!("/tmp/{}/{name}", ctx.ns)).expect("its runs"), "ran\n", "{name}");
    }
    ctx.apply(&[pod("after", "sleep 1000")]);
    ctx.ready("after");
}

/// Ends all that is not of the control plane or of this test, and takes away what a boot takes away.
fn cut_the_power(dir: &Path) {
    let kept = [
        "etcd",
        "kube-apiserver",
        "kube-controller",
        "kube-scheduler",
        "kubectl",
        "docker-registry",
        "kubelet-",
        "bash",
    ];
    let me = std::process::id().to_string();
    for round in 0..50 {
        let mut killed = 0;
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if pid == "1" || pid == me || !pid.bytes().all(|b| b.is_ascii_digit()) {
                continue;
            }
            let Ok(line) = std::fs::read_to_string(entry.path().join("cmdline")) else { continue };
            let program = line.split('\0').next().unwrap_or_default().rsplit('/').next().unwrap_or_default().to_owned();
            if line.is_empty() || kept.iter().any(|k| program.starts_with(k)) {
                continue;
            }
            if let Some(pid) = pid.parse().ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                killed += 1;
            }
        }
        if killed == 0 {
            break;
        }
        assert!(round < 49, "processes that can't be ended");
        std::thread::sleep(Duration::from_millis(50)); // the poll of a condition with a deadline
    }
    // Mounts of the kubelet, of the daemon and of the pinned namespaces; the last ones first.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let points: Vec<&str> = mounts.lines().filter_map(|l| l.split(' ').nth(4)).collect();
    let ours = [dir.join("kubelet"), dir.join("run"), "/run/netns/".into()].map(|p| p.display().to_string());
    for point in points.iter().rev().filter(|p| ours.iter().any(|o| p.starts_with(o.as_str()) && **p != o.as_str())) {
        let _ = Command::new("umount").args(["-l", point]).output();
    }
    for folder in [dir.join("run"), "/run/netns".into()] {
        for entry in std::fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
    }
    let _ = Command::new("ip").args(["link", "delete", "cni0"]).output();
    run(Command::new("sh").args(["-c", "iptables-save -t nat | grep -E 'CNI' > /dev/null && iptables -t nat -F; find /sys/fs/cgroup -depth -path '*kubepods*' -type d -exec rmdir {} + 2> /dev/null; true"]));
    let id = dir.join("boot_id");
    let fresh = std::fs::read_to_string("/proc/sys/kernel/random/uuid").expect("a uuid");
    std::fs::write(&id, fresh).expect("a boot id");
    std::fs::set_permissions(&id, std::fs::Permissions::from_mode(0o444)).expect("its mode");
    run(Command::new("mount").arg("--bind").arg(&id).arg("/proc/sys/kernel/random/boot_id"));
}
