//! The kubelet's alpha feature gates that change how it speaks with a runtime: EventedPLEG and CRIListStreaming. The same
//! scenarios as elsewhere, with them on; and statistics with PodAndContainerStatsFromCRI off.

use std::sync::Arc;

use super::cluster::Cluster;
use super::ctx::{Ctx, LONG, container, pod};
use super::harness::{Runner, Scenario, keep_up};
use super::{lifecycle, nodeops, probes, stats, streams};

const MORE: &[Scenario] = &[("events_and_streamed_lists", evented), ("stats_without_the_runtimes_own", stats::without)];

pub fn group(runner: &Runner) {
    let cluster = Arc::new(Cluster::lone(|plan, _| {
        plan.gates = vec![("EventedPLEG", true), ("CRIListStreaming", true), ("PodAndContainerStatsFromCRI", false)];
        plan.deployed = false;
    }));
    let wanted = [
        "crash_loop_back_off",
        "init_and_sidecar_containers",
        "restart_policies_and_exit_codes",
        "hooks_and_graceful_deletion",
        "out_of_memory",
        "job_completes_or_gives_up",
        "liveness_probes",
        "exec",
    ];
    let known = [lifecycle::SCENARIOS, probes::SCENARIOS, streams::SCENARIOS].concat();
    let chosen: Vec<_> = known.into_iter().filter(|(n, _)| wanted.contains(n)).chain(MORE.iter().copied()).collect();
    assert_eq!(chosen.len(), wanted.len() + MORE.len());
    runner.parallel(&cluster, 8, &chosen);
    for (name, body) in nodeops::SCENARIOS
        .iter()
        .filter(|(n, _)| matches!(*n, "kubelet_restart_keeps_pods" | "daemon_crash_keeps_pods"))
    {
        runner.one(&cluster, name, *body);
    }
    if runner.failed() {
        cluster.keep_logs();
    }
    keep_up();
}

/// The kubelet says itself that it is connected to the events, and that its lists are streams.
fn evented(ctx: &Ctx) {
    ctx.apply(&[pod("p", "sleep 2; exit 6")]);
    let p = ctx.phase("p", "Failed");
    assert_eq!(container(&p, "c")["state"]["terminated"]["exitCode"], 6);
    let metric = |name: &str| -> Option<f64> {
        let text = ctx.cluster.nodes()[0].kubelet_get("/metrics")?;
        text.lines().find(|l| l.starts_with(name) && !l.starts_with('#'))?.rsplit(' ').next()?.parse().ok()
    };
    let connected = ctx.wait("the connection to the runtime's events", LONG, || {
        metric("kubelet_evented_pleg_connection_success_count")
    });
    assert!(connected >= 1.0, "{connected}");
    // A kubelet to which a runtime says UNIMPLEMENTED goes back to plain lists, and says so.
    let log = std::fs::read_to_string(ctx.cluster.nodes()[0].dir.join("kubelet.log")).expect("the kubelet's log");
    assert!(log.contains("CRIListStreaming"), "the gate is not in the kubelet's log");
    let back: Vec<_> = log.lines().filter(|l| l.contains("not implemented, falling back")).collect();
    assert!(back.is_empty(), "{back:?}");
}
