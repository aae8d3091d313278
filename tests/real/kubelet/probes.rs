//! Liveness, readiness and startup probes of all four kinds.

use serde_json::{Value, json};

use super::ctx::{BUSYBOX, Ctx, PODTOOL, container, is_ready, pod_with, shell, with};
use super::harness::Scenario;

pub const SCENARIOS: &[Scenario] =
    &[("readiness_probes", readiness), ("liveness_probes", liveness), ("startup_probes", startup)];

/// Serves an empty folder on port 80; a file `ok` is its health.
const WEB: &str = "mkdir -p /www; touch /www/ok; httpd -p 80 -h /www;";

/// A container that serves one kind of probe, the probe, and what makes it fail and succeed.
fn kinds() -> Vec<(&'static str, Value, Value, &'static str, &'static str)> {
    let web = |more: &str| shell("c", &format!("{WEB} {more} while :; do sleep 1; done"));
    vec![
        ("exec", web(""), json!({"exec": {"command": ["test", "-e", "/www/ok"]}}), "rm /www/ok", "touch /www/ok"),
        ("http", web(""), json!({"httpGet": {"port": 80, "path": "/ok"}}), "rm /www/ok", "touch /www/ok"),
        ("tcp", web(""), json!({"tcpSocket": {"port": 80}}), "killall httpd", "httpd -p 80 -h /www"),
    ]
}

fn grpc_pod(name: &str, probes: Value) -> Value {
    // podtool has no shell: a second container in the same PID namespace makes it sick through its root.
    let tool = with(
        json!({"name": "c", "image": PODTOOL, "args": ["grpc", "5000"], "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]}),
        probes,
    );
    let hand = json!({"name": "hand", "image": BUSYBOX, "command": ["sh", "-c", "while :; do sleep 1; done"], "volumeMounts": [{"name": "tmp", "mountPath": "/t"}]});
    pod_with(name, json!({"containers": [tool, hand], "volumes": [{"name": "tmp", "emptyDir": {}}]}))
}

fn every(probe: &Value, seconds: i32, failures: i32) -> Value {
    with(probe.clone(), json!({"periodSeconds": seconds, "failureThreshold": failures, "timeoutSeconds": 5}))
}

fn readiness(ctx: &Ctx) {
    let all = kinds();
    let mut pods: Vec<Value> = all
        .iter()
        .map(|(name, c, probe, ..)| {
            pod_with(name, json!({"containers": [with(c.clone(), json!({"readinessProbe": every(probe, 1, 1)}))]}))
        })
        .collect();
    pods.push(grpc_pod("grpc", json!({"readinessProbe": every(&json!({"grpc": {"port": 5000}}), 1, 1)})));
    ctx.apply(&pods);
    all.iter().for_each(|(name, ..)| drop(ctx.ready(name)));
    ctx.ready("grpc");
    all.iter().for_each(|(name, _, _, fail, _)| drop(ctx.exec(name, fail)));
    ctx.exec("grpc -c hand", "touch /t/sick");
    for name in all.iter().map(|k| k.0).chain(["grpc"]) {
        ctx.wait_pod(name, "not Ready", |p| !is_ready(p));
    }
    all.iter().for_each(|(name, _, _, _, cure)| drop(ctx.exec(name, cure)));
    ctx.exec("grpc -c hand", "rm /t/sick");
    for name in all.iter().map(|k| k.0).chain(["grpc"]) {
        let p = ctx.ready(name);
        assert_eq!(container(&p, "c")["restartCount"], 0, "{name}");
    }
}

fn liveness(ctx: &Ctx) {
    let all = kinds();
    let mut pods: Vec<Value> = all
        .iter()
        .map(|(name, c, probe, ..)| {
            let probe = with(every(probe, 1, 2), json!({"initialDelaySeconds": 2}));
            pod_with(name, json!({"containers": [with(c.clone(), json!({"livenessProbe": probe}))]}))
        })
        .collect();
    let grpc = with(every(&json!({"grpc": {"port": 5000}}), 1, 2), json!({"initialDelaySeconds": 2}));
    pods.push(grpc_pod("grpc", json!({"livenessProbe": grpc})));
    ctx.apply(&pods);
    for (name, _, _, fail, _) in &all {
        ctx.ready(name);
        ctx.exec(name, fail);
    }
    ctx.ready("grpc");
    ctx.exec("grpc -c hand", "touch /t/sick");
    for name in all.iter().map(|k| k.0).chain(["grpc"]) {
        // The evented PLEG (alpha) has been seen to make a second container of a slow start: that is no end of the first.
        let p = ctx.wait_pod(name, "restarted", |p| {
            let c = container(p, "c");
            c["restartCount"].as_i64() >= Some(1) && c["lastState"]["terminated"].is_object()
        });
        let last = &container(&p, "c")["lastState"]["terminated"];
        // A shell as PID 1 is deaf to SIGTERM: it was killed when its time was up.
        let code = if name == "grpc" { last["exitCode"].as_i64().filter(|c| *c != 0) } else { Some(137) };
        assert_eq!((last["exitCode"].as_i64(), last["reason"].as_str()), (code, Some("Error")), "{p}");
    }
}

/// A slow start is waited for, during which the other probes are silent; one that never ends is a restart.
fn startup(ctx: &Ctx) {
    let ok = json!({"exec": {"command": ["test", "-e", "/ok"]}});
    let probes = json!({"startupProbe": every(&ok, 1, 60), "livenessProbe": every(&ok, 1, 1)});
    let slow = with(shell("c", "sleep 5; touch /ok; sleep 1000"), probes);
    let stuck = with(shell("c", "sleep 1000"), json!({"startupProbe": every(&ok, 1, 3)}));
    ctx.apply(&[pod_with("slow", json!({"containers": [slow]})), pod_with("stuck", json!({"containers": [stuck]}))]);
    let p = ctx.ready("slow");
    assert_eq!(container(&p, "c")["restartCount"], 0, "{p}");
    ctx.wait_pod("stuck", "restarted", |p| container(p, "c")["restartCount"].as_i64() >= Some(1));
}
