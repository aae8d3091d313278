//! Pods of several runtime handlers on one node, chosen by RuntimeClass.

use serde_json::{Value, json};

use super::cluster::condition;
use super::ctx::{BUSYBOX, Ctx, LONG, container, pod_with, shell, with};
use super::harness::Scenario;
use crate::support::repository;

pub const SCENARIOS: &[Scenario] =
    &[("handlers_side_by_side", side_by_side), ("a_deployment_of_proxmox_cts", a_deployment_of_cts)];

/// Serves a word on port 80, and knows its own address.
const WEB: &str =
    "mkdir /www; hostname > /www/name; httpd -p 80 -h /www; trap 'exit 0' TERM; while :; do sleep 0.2; done";

fn side_by_side(ctx: &Ctx) {
    let handlers = ["crun", "lxc"];
    // Of names of its own: another scenario makes those of deploy/ at the same time.
    let named = |handler: &str| format!("side-{handler}");
    let class = |handler: &&str| json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": named(handler)}, "handler": handler});
    ctx.apply(&handlers.iter().map(class).collect::<Vec<_>>());
    let probe = json!({"readinessProbe": {"exec": {"command": ["test", "-e", "/www/name"]}, "periodSeconds": 1}});
    let limits = json!({"resources": {"limits": {"memory": "64Mi", "cpu": "500m"}}});
    let pod = |name: &&str| -> Value {
        let container = with(with(shell("c", WEB), probe.clone()), limits.clone());
        pod_with(
            name,
            json!({"runtimeClassName": named(name), "terminationGracePeriodSeconds": 10, "containers": [container]}),
        )
    };
    ctx.apply(&handlers.iter().map(pod).collect::<Vec<_>>());
    let address = |name: &str| ctx.ready(name)["status"]["podIP"].as_str().expect("an address").to_owned();
    let addresses = handlers.map(address);
    // liblxc leaves its mark in /dev; each reaches the other over the pods' network.
    for (i, name) in handlers.iter().enumerate() {
        let seen = ctx.exec(name, "[ -e /dev/.lxc-boot-id ] && echo lxc || echo crun");
        assert_eq!(seen, *name);
        let other = 1 - i;
        assert_eq!(ctx.exec(name, &format!("wget -q -O - http://{}/name", addresses[other])), handlers[other]);
        assert_eq!(ctx.exec(name, "echo $$ > /dev/null; tr '\\0' ' ' < /proc/1/cmdline | cut -c1-5"), "sh -c");
    }
    for name in handlers {
        ctx.kubectl(&["delete", "pod", name, "--wait=false"]);
        ctx.gone(name);
    }
}

/// What RuntimeClass `proxmox-lxc` of deploy/ says, under another name: another scenario makes those of deploy/ at the same time.
fn class_of_deploy(name: &str) -> String {
    let all = std::fs::read_to_string(repository().join("deploy/runtimeclasses.yaml")).expect("deploy/");
    let one = all.split("---\n").find(|part| part.contains("handler: proxmox-lxc")).expect("the class");
    one.replace("name: proxmox-lxc", &format!("name: {name}"))
}

/// A Deployment whose pods are Proxmox containers, beside one of crun's: Ready, exec, logs, an update, a Job's exit code, and
/// nothing on Proxmox when it is gone.
fn a_deployment_of_cts(ctx: &Ctx) {
    ctx.kubectl_with(&["apply", "-f", "-"], class_of_deploy("side-ct").as_bytes());
    let limits = json!({"resources": {"limits": {"memory": "48Mi", "cpu": "200m"}}});
    let probe = json!({"readinessProbe": {"exec": {"command": ["test", "-e", "/www/name"]}, "periodSeconds": 1}});
    let deployment = |name: &str, class: Option<&str>, word: &str| -> Value {
        let script = format!("echo {word} of $(hostname); {WEB}");
        let container = with(with(shell("c", &script), probe.clone()), limits.clone());
        let mut spec = json!({"terminationGracePeriodSeconds": 5, "containers": [container]});
        if let Some(class) = class {
            spec["runtimeClassName"] = json!(class);
        }
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": {
            "replicas": 2, "selector": {"matchLabels": {"app": name}},
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": spec}}})
    };
    let rolled_out = |name: &str| ctx.kubectl(&["rollout", "status", "--timeout=120s", &format!("deployment/{name}")]);
    ctx.apply(&[deployment("ct", Some("side-ct"), "first"), deployment("plain", None, "first")]);
    rolled_out("ct");
    rolled_out("plain");
    let names = |label: &str| -> Vec<String> {
        ctx.pods(label).iter().map(|p| p["metadata"]["name"].as_str().expect("a name").to_owned()).collect()
    };
    let cts = |ctx: &Ctx| {
        let nodes = ctx.cluster.nodes();
        let pve = nodes[0].pve.as_ref().expect("a Proxmox");
        pve.guests()
            .iter()
            .filter_map(|n| Some((pve.config(*n, "hostname")?, pve.config(*n, "memory")?)))
            .collect::<Vec<_>>()
    };
    let mut found = cts(ctx);
    found.sort();
    // What the containers may have and the overhead of the RuntimeClass.
    let mut expected: Vec<_> = names("app=ct").into_iter().map(|name| (name, "64".to_owned())).collect();
    expected.sort();
    assert_eq!(found, expected, "a CT for each pod of the Deployment, none for others'");
    for (label, root) in [("app=ct", "100000"), ("app=plain", "0")] {
        for name in names(label) {
            assert_eq!(ctx.exec(&name, "read a b c < /proc/self/uid_map; echo $b"), root, "{name}");
            assert_eq!(ctx.logs(&[&name]).lines().next(), Some(format!("first of {name}").as_str()));
        }
    }
    let old = names("app=ct");
    ctx.apply(&[deployment("ct", Some("side-ct"), "second")]);
    rolled_out("ct");
    for name in names("app=ct").iter().filter(|n| !old.contains(n)) {
        assert_eq!(ctx.logs(&[name]).lines().next(), Some(format!("second of {name}").as_str()));
    }
    old.iter().for_each(|name| ctx.gone(name));
    let mut spec =
        json!({"restartPolicy": "Never", "runtimeClassName": "side-ct", "containers": [shell("c", "exit 7")]});
    spec["containers"][0]["image"] = json!(BUSYBOX);
    ctx.apply(&[json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "seven"}, "spec": {
        "backoffLimit": 0, "template": {"metadata": {"labels": {"app": "seven"}}, "spec": spec}}})]);
    ctx.wait("the Job's failure", LONG, || {
        let job = ctx.get("apis/batch/v1 jobs/seven")?;
        (condition(&job, "Failed") == Some("True")).then_some(())
    });
    let job = ctx.pods("app=seven").into_iter().next().expect("the Job's pod");
    assert_eq!(container(&job, "c")["state"]["terminated"]["exitCode"], 7, "{}", job["status"]);
    ctx.kubectl(&["delete", "deployment", "ct", "plain", "--wait=false"]);
    ctx.kubectl(&["delete", "job", "seven", "--wait=false"]);
    ctx.wait("no CT and no volume", LONG, || {
        let nodes = ctx.cluster.nodes();
        let pve = nodes[0].pve.as_ref().expect("a Proxmox");
        (pve.guests().is_empty() && pve.volumes().is_empty()).then_some(())
    });
    ctx.kubectl(&["delete", "runtimeclass", "side-ct"]);
}
