//! `/stats/summary` and `/metrics/cadvisor` of the kubelet.

use std::time::Duration;

use serde_json::{Value, json};

use super::ctx::{Ctx, LONG, PODTOOL, pod_with, shell};
use super::harness::Scenario;

pub const SCENARIOS: &[Scenario] = &[("stats_from_the_runtime", with_cri)];

fn busy(ctx: &Ctx) {
    let c = shell("c", "head -c 3000000 /dev/zero > /file; while :; do i=$((i+1)); done");
    let eater = json!({"name": "eater", "image": PODTOOL, "args": ["eat", "30"]});
    ctx.apply(&[pod_with("busy", json!({"containers": [c, eater]}))]);
    ctx.ready("busy");
}

fn summary(ctx: &Ctx) -> Option<Value> {
    let all = ctx.cluster.nodes()[0].kubelet_json("/stats/summary")?;
    let pods = all["pods"].as_array()?.clone();
    pods.into_iter().find(|p| p["podRef"]["name"] == "busy" && p["podRef"]["namespace"] == ctx.ns.as_str())
}

/// A value of the kubelet's cAdvisor endpoint for our pod.
fn sample(ctx: &Ctx, metric: &str, container: &str) -> Option<f64> {
    let text = ctx.cluster.nodes()[0].kubelet_get("/metrics/cadvisor")?;
    let ours = |l: &&str| {
        l.starts_with(&format!("{metric}{{"))
            && l.contains("pod=\"busy\"")
            && l.contains(&format!("namespace=\"{}\"", ctx.ns))
            && l.contains(&format!("container=\"{container}\""))
    };
    let line = text.lines().find(ours)?;
    // The time in milliseconds may stand behind the value.
    line.rsplit_once("} ")?.1.split(' ').next()?.parse().ok()
}

fn with_cri(ctx: &Ctx) {
    busy(ctx);
    let number = |v: &Value| v.as_f64().filter(|n| *n > 0.0);
    ctx.wait("whole statistics of the pod", LONG, || {
        let pod = summary(ctx)?;
        let of = |name: &str| pod["containers"].as_array()?.iter().find(|c| c["name"] == name).cloned();
        let (c, eater) = (of("c")?, of("eater")?);
        number(&c["cpu"]["usageCoreNanoSeconds"])?;
        number(&c["cpu"]["usageNanoCores"])?;
        number(&pod["cpu"]["usageCoreNanoSeconds"])?;
        number(&pod["memory"]["workingSetBytes"]).filter(|n| *n > 30e6)?;
        number(&eater["memory"]["workingSetBytes"]).filter(|n| *n > 30e6)?;
        number(&eater["memory"]["rssBytes"]).filter(|n| *n > 25e6)?;
        number(&c["rootfs"]["usedBytes"]).filter(|n| *n >= 3e6)?;
        number(&pod["network"]["rxBytes"])?;
        number(&pod["process_stats"]["process_count"])
    });
    let node = ctx.cluster.nodes()[0].kubelet_json("/stats/summary").expect("the summary")["node"].clone();
    for value in ["capacityBytes", "availableBytes", "usedBytes"] {
        assert!(number(&node["runtime"]["imageFs"][value]).is_some(), "{value}: {}", node["runtime"]);
    }
    for (metric, least) in [
        ("container_cpu_usage_seconds_total", 0.01),
        ("container_memory_working_set_bytes", 1e4),
        ("container_memory_usage_bytes", 1e4),
    ] {
        ctx.wait(&format!("{metric} in /metrics/cadvisor"), Duration::from_secs(60), || {
            sample(ctx, metric, "c").filter(|v| *v >= least)
        });
    }
}

/// Without the gate: containers by CRI, the pod as a whole by its cgroup, no network, nothing by name in cAdvisor's metrics.
/// docs/kubernetes.md says the same.
pub fn without(ctx: &Ctx) {
    busy(ctx);
    let pod = ctx.wait("the pod's use of CPU time", LONG, || {
        summary(ctx).filter(|p| p["cpu"]["usageCoreNanoSeconds"].as_f64().is_some_and(|n| n > 0.0))
    });
    let c = pod["containers"].as_array().expect("containers").iter().find(|c| c["name"] == "c").cloned().expect("c");
    for value in [&c["cpu"]["usageCoreNanoSeconds"], &c["memory"]["workingSetBytes"], &c["rootfs"]["usedBytes"]] {
        assert!(value.as_f64().is_some_and(|n| n > 0.0), "{c}");
    }
    assert!(pod["network"].is_null(), "{pod}");
    let all = ctx.cluster.nodes()[0].kubelet_json("/stats/summary").expect("the summary");
    assert!(all["node"]["memory"]["workingSetBytes"].as_f64().is_some_and(|n| n > 0.0), "{}", all["node"]);
    let images = &all["node"]["runtime"]["imageFs"];
    assert!(images["capacityBytes"].as_f64().is_some_and(|n| n > 0.0), "{images}");
    assert!(sample(ctx, "container_memory_working_set_bytes", "c").is_none(), "cAdvisor knows our pods");
}
