//! Pods of several runtime handlers on one node, chosen by RuntimeClass.

use serde_json::{Value, json};

use super::ctx::{Ctx, pod_with, shell, with};
use super::harness::Scenario;

pub const SCENARIOS: &[Scenario] = &[("handlers_side_by_side", side_by_side)];

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
