//! What a pod costs while it runs: the memory of its monitor and the growth of the daemon, beside their budgets, and the time
//! until its container runs.
//!
//! Run by `cargo test --test density`, as root; `DENSITY_PODS` is the number of pods (default 20), each with one container
//! that sleeps and has logged a line. Figures are proportional set sizes (PSS) from smaps_rollup. The monitor is the
//! static program that is shipped, so its budget always counts; the daemon's counts where `DENSITY_STRICT` is set, with
//! the release program (`make bench`).

mod support;

use std::time::{Duration, Instant};

use k8s_cri::v1 as cri;
use support::client::{Client, block_on, container, create_request, pod};
use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::{isolated, wait_for};

/// KiB per pod.
const MONITOR_BUDGET: u64 = 200;
/// KiB per pod.
const DAEMON_BUDGET: u64 = 50;

/// Proportional set size in KiB.
fn pss(pid: i64) -> u64 {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let line = text.lines().find_map(|l| l.strip_prefix("Pss:")).unwrap_or_else(|| panic!("{path}: no Pss"));
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// The least that the process holds within a few seconds of quiet: memory is given back a while after work.
async fn quiet(pid: i64) -> u64 {
    let mut least = pss(pid);
    for _ in 0..40 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        least = least.min(pss(pid));
    }
    least
}

/// Pids of the processes that liblxc runs in.
fn holders() -> Vec<i64> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains("proxmox-lxcri-lxc\0create") {
            found.push(pid);
        }
    }
    found
}

/// Their mean proportional set size and what is of each alone, in KiB.
fn of_holders(pids: &[i64]) -> (u64, u64) {
    let private = |pid: &i64| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup");
        let of = |key: &str| -> u64 {
            let line = text.lines().find_map(|l| l.strip_prefix(key)).expect("a line");
            line.trim().trim_end_matches(" kB").parse().expect("a number")
        };
        of("Private_Dirty:") + of("Private_Clean:")
    };
    let n = pids.len() as u64;
    (pids.iter().map(|p| pss(*p)).sum::<u64>() / n, pids.iter().map(private).sum::<u64>() / n)
}

async fn monitor_pid(c: &mut Client, pod_sandbox_id: &str) -> i64 {
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod_sandbox_id.into(), verbose: true };
    let info = c.runtime.pod_sandbox_status(request).await.expect("PodSandboxStatus").into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
    info["monitorPid"].as_i64().expect("the monitor's pid")
}

/// A pod with a container; the pod's id, and how long the container took from CreateContainer to StartContainer's answer.
async fn start(c: &mut Client, node: &Node, name: &str) -> (String, Duration) {
    let pod = pod(name, &node.pod_logs(name));
    let request = cri::RunPodSandboxRequest { config: Some(pod.clone()), ..Default::default() };
    let id = c.runtime.run_pod_sandbox(request).await.expect("RunPodSandbox").into_inner().pod_sandbox_id;
    let config = container("c", BUSYBOX, "echo here; exec sleep 3600");
    let begun = Instant::now();
    let made = c.runtime.create_container(create_request(&id, config, &pod)).await.expect("CreateContainer");
    let container_id = made.into_inner().container_id;
    c.runtime.start_container(cri::StartContainerRequest { container_id }).await.expect("StartContainer");
    (id, begun.elapsed())
}

#[test]
fn a_pod_stays_within_its_memory() {
    isolated("a_pod_stays_within_its_memory", || {
        let pods: u64 = std::env::var("DENSITY_PODS").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
        let node = Node::start(Options::default());
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            // The first pods also warm up what is there once: threads, caches, the allocator.
            let mut ids = Vec::new();
            for n in 0..4 {
                ids.push(start(&mut c, &node, &format!("warm-{n}")).await.0);
            }
            let daemon = i64::from(node.daemon_pid());
            let before = quiet(daemon).await;
            let mut took = Vec::new();
            for n in 0..pods {
                let (id, time) = start(&mut c, &node, &format!("p-{n}")).await;
                ids.push(id);
                took.push(time);
            }
            took.sort();
            let mut monitors = Vec::new();
            for id in &ids {
                monitors.push(monitor_pid(&mut c, id).await);
            }
            let mean = || monitors.iter().map(|p| pss(*p)).sum::<u64>() / monitors.len() as u64;
            // A monitor gives back what it needed for its work once it is quiet.
            let monitor = wait_for("the monitors' budget", Duration::from_secs(30), || {
                Some(mean()).filter(|kib| *kib <= MONITOR_BUDGET)
            });
            let growth = quiet(daemon).await.saturating_sub(before) / pods;
            // With the handler lxc each container has a process that liblxc runs in.
            let holders = holders();
            if !holders.is_empty() {
                let (mean, private) = of_holders(&holders);
                println!("figure: liblxc's process of a container: {mean} KiB PSS, {private} KiB of its own");
            }
            println!(
                "\nfigure: a container is created and started in {:.1?} (median), {:.1?} (least)",
                took[took.len() / 2],
                took[0]
            );
            println!("figure: PSS of a monitor: {monitor} KiB (budget {MONITOR_BUDGET}), {} of them", monitors.len());
            println!(
                "figure: growth of the daemon: {growth} KiB a pod (budget {DAEMON_BUDGET}), from {before} KiB PSS"
            );
            if std::env::var_os("DENSITY_STRICT").is_some() {
                assert!(growth <= DAEMON_BUDGET, "the daemon grew by {growth} KiB a pod");
            }
            for pod_sandbox_id in ids {
                c.runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id }).await.expect("removed");
            }
        });
    });
}
