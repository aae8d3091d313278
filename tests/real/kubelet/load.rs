//! Many pods, and a daemon that is killed over and over; afterwards everything is as before.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::Cluster;
use super::ctx::{Ctx, container, is_ready, pod_with, shell, with};
use super::harness::{Runner, keep_up, long};
use super::process::memory_kib;
use crate::support::snapshot::{self, Snapshot};

const PODS: usize = 110;
/// As many: a heap that has held them once is as large as it gets.
const WARM: usize = PODS;
const PATIENCE: Duration = Duration::from_secs(400);

pub fn group(runner: &Runner) {
    let cluster = Arc::new(Cluster::lone(|plan, _| {
        // The kubelet's own limit on its questions, which would be the test's subject else.
        plan.kubelet = json!({"kubeAPIQPS": 200, "kubeAPIBurst": 400, "registryPullQPS": 0, "eventRecordQPS": 0});
    }));
    runner.one(&cluster, "many_pods_and_nothing_left", many);
    runner.one(&cluster, "daemon_killed_every_ten_seconds", kills);
    if runner.failed() {
        cluster.keep_logs();
    }
    keep_up();
}

fn sleeper(name: &str) -> Value {
    pod_with(name, json!({"containers": [shell("c", "trap exit TERM; while :; do sleep 3600 & wait; done")]}))
}

fn dir(ctx: &Ctx) -> PathBuf {
    ctx.cluster.nodes()[0].dir.clone()
}

/// What is there of the node, without what the kubelet keeps of its own.
fn stock(dir: &Path) -> Snapshot {
    let mut all = snapshot::take_of(dir);
    // The test's own kubectl and the like come and go.
    all.insert("processes", Vec::new());
    for list in all.values_mut() {
        list.retain(|entry| !entry.contains("/images/"));
    }
    all
}

fn monitors() -> usize {
    let programs = std::fs::read_dir("/proc").expect("/proc").flatten();
    let lines = programs.filter_map(|e| std::fs::read_to_string(e.path().join("cmdline")).ok());
    lines.filter(|l| l.split('\0').next().is_some_and(|p| p.ends_with("proxmox-lxcri-monitor"))).count()
}

fn delete_all(ctx: &Ctx) {
    ctx.kubectl(&["delete", "pods", "--all", "--wait=false"]);
    ctx.wait("the end of all pods", PATIENCE, || ctx.get("pods")?["items"].as_array()?.is_empty().then_some(()));
}

/// Also of the sandboxes, which the kubelet collects once a minute.
fn all_gone(ctx: &Ctx) {
    delete_all(ctx);
    ctx.wait("the end of all sandboxes", PATIENCE, || {
        let left = ctx.cluster.nodes()[0].crictl_json(&["pods"]);
        left["items"].as_array().is_none_or(Vec::is_empty).then_some(())
    });
}

fn nothing_left(ctx: &Ctx, before: &Snapshot) {
    let dir = dir(ctx);
    let start = Instant::now();
    loop {
        let left = snapshot::added(before, &stock(&dir));
        if left.is_empty() && monitors() == 0 {
            return;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "left behind, {} entries, {} monitors:\n{}",
            left.len(),
            monitors(),
            left[..left.len().min(40)].join("\n")
        );
        std::thread::sleep(Duration::from_millis(500)); // the poll of a condition with a deadline
    }
}

/// The least memory of the daemon within a few seconds of quiet.
fn daemon_kib(ctx: &Ctx) -> (u64, u64) {
    let pid = ctx.cluster.nodes()[0].daemon.as_ref().expect("the daemon").pid();
    let samples = (0..40).map(|_| {
        std::thread::sleep(Duration::from_millis(250)); // memory is given back a while after work
        memory_kib(pid)
    });
    samples.min().expect("samples")
}

fn ready_count(ctx: &Ctx) -> Option<usize> {
    Some(ctx.get("pods")?["items"].as_array()?.iter().filter(|p| is_ready(p)).count())
}

fn many(ctx: &Ctx) {
    // What is there once and for all (threads, caches, the image) is there after a few.
    let warm: Vec<_> = (0..WARM).map(|n| sleeper(&format!("warm-{n}"))).collect();
    ctx.apply(&warm);
    ctx.wait("the first pods", PATIENCE, || (ready_count(ctx)? == WARM).then_some(()));
    all_gone(ctx);
    let before_kib = daemon_kib(ctx);
    let before = stock(&dir(ctx));
    let start = Instant::now();
    let pods: Vec<_> = (0..PODS).map(|n| sleeper(&format!("p-{n}"))).collect();
    ctx.apply(&pods);
    ctx.wait("all pods to be Ready", PATIENCE, || (ready_count(ctx)? == PODS).then_some(()));
    println!("figure: {PODS} pods Ready after {:.0} s", start.elapsed().as_secs_f64());
    println!(
        "figure: the daemon's memory (of it its own): {before_kib:?} KiB before, {:?} KiB with {PODS} pods",
        daemon_kib(ctx)
    );
    let stay = Duration::from_secs(if long() { 1800 } else { 60 });
    let start = Instant::now();
    while start.elapsed() < stay {
        let list = ctx.wait("the list of pods", PATIENCE, || ctx.get("pods"));
        for p in list["items"].as_array().expect("a list") {
            assert!(is_ready(p) && container(p, "c")["restartCount"] == 0, "does not stay: {p}");
        }
        std::thread::sleep(Duration::from_secs(2)); // how long they stay is what is tried
    }
    let start = Instant::now();
    all_gone(ctx);
    println!("figure: {PODS} pods deleted after {:.0} s", start.elapsed().as_secs_f64());
    nothing_left(ctx, &before);
    let after_kib = daemon_kib(ctx);
    println!("figure: the daemon's memory (of it its own): {before_kib:?} KiB before, {after_kib:?} KiB after");
    assert!(after_kib.0 * 10 <= before_kib.0 * 11, "the daemon's memory grew from {before_kib:?} to {after_kib:?} KiB");
}

/// Pods come and go, thirty at a time, while the daemon is killed every ten seconds. Each container writes a line when it
/// starts: one line each, or it was started anew.
fn kills(ctx: &Ctx) {
    let before = stock(&dir(ctx));
    let starts = format!("/tmp/{}", ctx.ns);
    std::fs::create_dir_all(&starts).expect("a folder");
    let volume = json!([{"name": "starts", "hostPath": {"path": starts}}]);
    let made = |name: String| {
        let c = with(
            shell("c", "echo started >> /starts/$HOSTNAME; trap exit TERM; while :; do sleep 3600 & wait; done"),
            json!({"volumeMounts": [{"name": "starts", "mountPath": "/starts"}]}),
        );
        pod_with(&name, json!({"containers": [c], "volumes": volume}))
    };
    let (rounds, wave) = if long() { (20, 30) } else { (3, 30) };
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut kills = 0;
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut kills = 0;
            let mut last = Instant::now();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                if last.elapsed() >= Duration::from_secs(10) {
                    ctx.cluster.nodes()[0].crash_daemon();
                    kills += 1;
                    last = Instant::now();
                }
                std::thread::sleep(Duration::from_millis(100)); // the time between kills is what is tried
            }
            kills
        });
        // Ends the killer also when this thread panics.
        struct Stop<'a>(&'a std::sync::atomic::AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let guard = Stop(&stop);
        for round in 0..rounds {
            let pods: Vec<_> = (0..wave).map(|n| made(format!("r{round}-{n}"))).collect();
            ctx.apply(&pods);
            ctx.wait("all pods to be Ready", PATIENCE, || (ready_count(ctx)? == wave).then_some(()));
            let ids = |ctx: &Ctx| -> BTreeMap<String, String> {
                let list = ctx.get("pods").expect("the pods");
                let all = list["items"].as_array().expect("a list");
                all.iter()
                    .map(|p| {
                        (
                            p["metadata"]["name"].as_str().unwrap_or("").into(),
                            container(p, "c")["containerID"].as_str().unwrap_or("").into(),
                        )
                    })
                    .collect()
            };
            let first = ids(ctx);
            let start = Instant::now();
            // At least one kill while they run.
            ctx.wait("the next kill", Duration::from_secs(60), || {
                (start.elapsed() > Duration::from_secs(12)).then_some(())
            });
            assert_eq!(ids(ctx), first, "containers were replaced");
            delete_all(ctx);
        }
        drop(guard);
        kills = killer.join().expect("the killer");
    });
    println!("figure: {} pods came and went during {kills} kills of the daemon", rounds * wave);
    assert!(kills >= 3);
    let mut files = 0;
    for entry in std::fs::read_dir(&starts).expect("the starts").flatten() {
        let text = std::fs::read_to_string(entry.path()).expect("a file");
        assert_eq!(text, "started\n", "{:?}: started more than once", entry.file_name());
        files += 1;
    }
    assert_eq!(files, rounds * wave, "pods that never started were Ready");
    all_gone(ctx);
    nothing_left(ctx, &before);
}
