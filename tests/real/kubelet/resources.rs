//! Requests and limits: QoS cgroups, resize in place, limits of a pod as a whole.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::ctx::{Ctx, LONG, container, is_ready, pod_with, shell, with};
use super::harness::Scenario;

pub const SCENARIOS: &[Scenario] =
    &[("qos_cgroups", qos), ("in_place_resize", resize), ("pod_level_resources", pod_level)];

/// A value in the cgroup of a container or, without one, of a pod; None: no such cgroup or file.
fn cgroup(pod: &Value, container_name: Option<&str>, v1: &str, v2: &str) -> Option<String> {
    let qos = pod["status"]["qosClass"].as_str()?.to_lowercase();
    let uid = pod["metadata"]["uid"].as_str()?;
    let below = match qos.as_str() {
        "guaranteed" => format!("kubepods/pod{uid}"),
        qos => format!("kubepods/{qos}/pod{uid}"),
    };
    let root = PathBuf::from("/sys/fs/cgroup");
    let (root, file) = match root.join("cgroup.controllers").exists() {
        true => (root, v2),
        false => (root.join(if v1.starts_with("cpu.") { "cpu" } else { "memory" }), v1),
    };
    let mut folder = root.join(below);
    if let Some(name) = container_name {
        let id = container(pod, name)["containerID"].as_str()?.rsplit('/').next()?.to_owned();
        folder =
            std::fs::read_dir(&folder).ok()?.flatten().map(|e| e.path()).find(|p| p.to_string_lossy().contains(&id))?;
    }
    Some(std::fs::read_to_string(folder.join(file)).ok()?.trim().to_owned())
}

fn resources(requests: Value, limits: Value) -> Value {
    json!({"resources": {"requests": requests, "limits": limits}})
}

fn score(ctx: &Ctx, pod: &str) -> i32 {
    ctx.exec(pod, "cat /proc/1/oom_score_adj").parse().expect("a number")
}

fn qos(ctx: &Ctx) {
    let all = json!({"cpu": "100m", "memory": "64Mi"});
    let c = |more: Value| with(shell("c", "sleep 1000"), more);
    ctx.apply(&[
        pod_with("guaranteed", json!({"containers": [c(resources(all.clone(), all.clone()))]})),
        pod_with(
            "burstable",
            json!({"containers": [c(resources(json!({"cpu": "50m", "memory": "32Mi"}), json!({"memory": "128Mi"})))]}),
        ),
        pod_with("best-effort", json!({"containers": [c(json!({}))]})),
    ]);
    let guaranteed = ctx.ready("guaranteed");
    assert_eq!(guaranteed["status"]["qosClass"], "Guaranteed");
    let memory = |p: &Value, c: Option<&str>| cgroup(p, c, "memory.limit_in_bytes", "memory.max");
    let mib = |n: u64| Some((n << 20).to_string());
    assert_eq!(memory(&guaranteed, Some("c")), mib(64));
    assert_eq!(memory(&guaranteed, None), mib(64));
    let quota = cgroup(&guaranteed, Some("c"), "cpu.cfs_quota_us", "cpu.max").expect("a quota");
    assert!(quota.starts_with("10000"), "{quota}");
    let burstable = ctx.ready("burstable");
    assert_eq!(burstable["status"]["qosClass"], "Burstable");
    assert_eq!(memory(&burstable, Some("c")), mib(128));
    let best = ctx.ready("best-effort");
    assert_eq!(best["status"]["qosClass"], "BestEffort");
    assert!(memory(&best, Some("c")).is_some(), "the container is not below its pod's cgroup");
    assert_eq!(score(ctx, "best-effort"), 1000);
    let middle = score(ctx, "burstable");
    assert!((3..1000).contains(&middle), "{middle}");
    // -997 needs a capability that the tests' machine may lack; then it is as low as is permitted.
    assert!(score(ctx, "guaranteed") <= middle);
}

fn resize(ctx: &Ctx) {
    let c = with(
        shell("c", "sleep 1000"),
        resources(json!({"cpu": "100m", "memory": "32Mi"}), json!({"cpu": "200m", "memory": "64Mi"})),
    );
    let restarts = with(
        shell("r", "sleep 1000"),
        with(
            resources(json!({"memory": "32Mi"}), json!({"memory": "64Mi"})),
            json!({"resizePolicy": [{"resourceName": "memory", "restartPolicy": "RestartContainer"}]}),
        ),
    );
    ctx.apply(&[pod_with("p", json!({"containers": [c, restarts]}))]);
    let before = ctx.ready("p");
    let patch = json!({"spec": {"containers": [
        {"name": "c", "resources": {"requests": {"cpu": "150m", "memory": "48Mi"}, "limits": {"cpu": "300m", "memory": "96Mi"}}},
        {"name": "r", "resources": {"limits": {"memory": "80Mi"}}}]}});
    ctx.kubectl(&["patch", "pod", "p", "--subresource", "resize", "-p", &patch.to_string()]);
    let p = ctx.wait_pod("p", "the new limits in its status", |p| {
        let limits = |n: &str| container(p, n)["resources"]["limits"].clone();
        limits("c")["memory"] == "96Mi"
            && limits("c")["cpu"] == "300m"
            && limits("r")["memory"] == "80Mi"
            && is_ready(p)
    });
    assert_eq!(cgroup(&p, Some("c"), "memory.limit_in_bytes", "memory.max"), Some((96_u64 << 20).to_string()));
    assert!(cgroup(&p, Some("c"), "cpu.cfs_quota_us", "cpu.max").expect("a quota").starts_with("30000"));
    assert_eq!(container(&p, "c")["restartCount"], 0, "{p}");
    assert_eq!(container(&p, "c")["containerID"], container(&before, "c")["containerID"]);
    let p = ctx.wait_pod("p", "the restart that its policy wants", |p| container(p, "r")["restartCount"] == 1);
    ctx.wait("the restarted container's limit", LONG, || {
        (cgroup(&p, Some("r"), "memory.limit_in_bytes", "memory.max")? == (80_u64 << 20).to_string()).then_some(())
    });
}

fn pod_level(ctx: &Ctx) {
    let spec = json!({"resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "200m", "memory": "128Mi"}},
        "containers": [shell("a", "sleep 1000"), with(shell("b", "sleep 1000"), json!({"resources": {"limits": {"memory": "48Mi"}}}))]});
    ctx.apply(&[pod_with("p", spec)]);
    let p = ctx.ready("p");
    let memory = |c: Option<&str>| cgroup(&p, c, "memory.limit_in_bytes", "memory.max");
    assert_eq!(memory(None), Some((128_u64 << 20).to_string()), "the pod's own limit");
    assert_eq!(memory(Some("b")), Some((48_u64 << 20).to_string()));
    assert!(cgroup(&p, None, "cpu.cfs_quota_us", "cpu.max").expect("a quota").starts_with("20000"));
}
