//! One control plane and one node: nearly all that pods use.

use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use super::cluster::Cluster;
use super::ctx::{Ctx, pod};
use super::harness::{Runner, keep_up};
use super::{handlers, lifecycle, logs, network, nodeops, probes, resources, security, stats, streams, volumes};

/// Scenarios side by side: most wait most of the time.
const WIDTH: usize = 10;

pub fn group(runner: &Runner) {
    let start = Instant::now();
    let cluster = Arc::new(Cluster::lone(|plan, _| {
        plan.proxmox = true;
        plan.kubelet = logs::kubelet_config();
        plan.kubelet["allowedUnsafeSysctls"] = json!(["kernel.msg*"]);
    }));
    println!("figure: control plane and node Ready after {:.1} s", start.elapsed().as_secs_f64());
    runner.scenario("first_pod_is_ready_within_a_minute", || {
        let ctx = Ctx::new(cluster.clone(), "first");
        ctx.apply(&[pod("first", "sleep 1000")]);
        ctx.ready("first");
        let took = start.elapsed().as_secs_f64();
        println!("figure: first pod Ready {took:.1} s after the first program was started");
        ctx.close();
        assert!(took < 60.0, "{took} s");
    });
    let all = [
        lifecycle::SCENARIOS,
        probes::SCENARIOS,
        logs::SCENARIOS,
        streams::SCENARIOS,
        volumes::SCENARIOS,
        resources::SCENARIOS,
        security::SCENARIOS,
        network::SCENARIOS,
        stats::SCENARIOS,
        handlers::SCENARIOS,
    ];
    runner.parallel(&cluster, WIDTH, &all.concat());
    for (name, body) in nodeops::SCENARIOS {
        runner.one(&cluster, name, *body);
    }
    if runner.failed() {
        cluster.keep_logs();
    }
    keep_up();
}
