//! Several nodes on one machine: a network namespace, a daemon and a kubelet each. Pods of different nodes reach each other
//! over plain routes; each node's network comes from the template and the pods' network that the API gave the node.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use super::cluster::{Cluster, ControlPlane, Registry};
use super::ctx::{Ctx, LONG, NGINX, is_ready, pod_with, shell};
use super::harness::{Runner, Scenario, keep_up};
use super::node::Plan;
use crate::support::run;

const GATEWAY: &str = "10.20.0.1";

const SCENARIOS: &[Scenario] = &[
    ("pods_of_different_nodes_reach_each_other", reach),
    ("daemon_set_on_every_node", everywhere),
    ("logs_and_exec_on_every_node", streams),
    ("a_drained_node_is_empty", drain),
];

pub fn two(runner: &Runner) {
    group(runner, 2);
}

pub fn three(runner: &Runner) {
    group(runner, 3);
}

fn group(runner: &Runner, count: usize) {
    let start = Instant::now();
    let registry = Registry::start(Path::new("/tmp/kube"));
    connect(count, &registry.address);
    let plan = |n: usize| Plan {
        name: format!("node-{n}"),
        ip: address(n),
        netns: Some(format!("node-{n}")),
        registry: format!("{GATEWAY}:5000"),
        network: None,
        ..Plan::lone("")
    };
    let control = ControlPlane { ip: GATEWAY.into(), pod_cidr: "10.30.0.0/16".into(), ..Default::default() };
    let cluster = Arc::new(Cluster::start(registry, control, (1..=count).map(plan).collect()));
    route(&cluster, count);
    println!("figure: {count} nodes Ready after {:.1} s", start.elapsed().as_secs_f64());
    let (drained, rest) = SCENARIOS.split_last().expect("scenarios");
    runner.parallel(&cluster, 3, rest);
    runner.one(&cluster, drained.0, drained.1);
    if runner.failed() {
        cluster.keep_logs();
    }
    keep_up();
}

fn address(n: usize) -> String {
    format!("10.20.0.{}", 10 + n)
}

fn ip(args: &str) {
    run(Command::new("ip").args(args.split(' ')));
}

/// Namespaces on a bridge; the registry, which listens on the loopback address alone, at the bridge's port 5000.
fn connect(count: usize, registry: &str) {
    ip("link add nodes type bridge");
    ip(&format!("address add {GATEWAY}/24 dev nodes"));
    ip("link set nodes up");
    for n in 1..=count {
        let ns = format!("node-{n}");
        ip(&format!("netns add {ns}"));
        ip(&format!("link add veth-{n} type veth peer name eth0 netns {ns}"));
        ip(&format!("link set veth-{n} master nodes up"));
        for inside in [
            "link set lo up".to_owned(),
            format!("address add {}/24 dev eth0", address(n)),
            "link set eth0 up".to_owned(),
            format!("route add default via {GATEWAY}"),
        ] {
            ip(&format!("-n {ns} {inside}"));
        }
        run(Command::new("nsenter").args([
            &format!("--net=/run/netns/{ns}"),
            "sysctl",
            "-qw",
            "net.ipv4.ip_forward=1",
        ]));
    }
    run(Command::new("sysctl").args(["-qw", "net.ipv4.conf.nodes.route_localnet=1"]));
    let rule =
        format!("-t nat -A PREROUTING -i nodes -p tcp -d {GATEWAY} --dport 5000 -j DNAT --to-destination {registry}");
    run(Command::new("iptables").args(rule.split(' ')));
}

/// Each node's pods by way of the node, in all other nodes and outside.
fn route(cluster: &Cluster, count: usize) {
    for n in 1..=count {
        let node = cluster.get(&format!("/api/v1/nodes/node-{n}")).expect("the node");
        let pods = node["spec"]["podCIDR"].as_str().expect("the pods' network").to_owned();
        ip(&format!("route add {pods} via {}", address(n)));
        for other in (1..=count).filter(|o| *o != n) {
            ip(&format!("-n node-{other} route add {pods} via {}", address(n)));
        }
    }
}

fn names(ctx: &Ctx) -> Vec<String> {
    ctx.cluster.nodes().iter().map(|n| n.plan.name.clone()).collect()
}

/// A pod on a node of choice.
fn on(node: &str, mut pod: Value) -> Value {
    pod["spec"]["nodeName"] = json!(node);
    pod
}

fn reach(ctx: &Ctx) {
    let web = json!({"name": "c", "image": NGINX, "readinessProbe": {"httpGet": {"port": 80}, "periodSeconds": 1}});
    let nodes = names(ctx);
    let mut pods = Vec::new();
    for node in &nodes {
        pods.push(on(node, pod_with(&format!("server-{node}"), json!({"containers": [web]}))));
        pods.push(on(node, pod_with(&format!("client-{node}"), json!({"containers": [shell("c", "sleep 1000")]}))));
    }
    ctx.apply(&pods);
    let mut networks = BTreeSet::new();
    for server in &nodes {
        let ready = ctx.ready(&format!("server-{server}"));
        let ip = ready["status"]["podIP"].as_str().expect("its address").to_owned();
        networks.insert(ip.rsplit_once('.').map(|(net, _)| net.to_owned()));
        for client in &nodes {
            ctx.ready(&format!("client-{client}"));
            let page = ctx
                .exec(&format!("client-{client}"), &format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 10 {ip} 80"));
            assert!(page.contains("Welcome to nginx"), "{client} -> {server}: {page}");
        }
    }
    assert_eq!(networks.len(), nodes.len(), "nodes share a network: {networks:?}");
}

fn everywhere(ctx: &Ctx) {
    let labels = json!({"app": "each"});
    let spec = json!({"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [shell("c", "sleep 1000")]}}});
    ctx.apply(&[json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "each"}, "spec": spec})]);
    ctx.kubectl(&["rollout", "status", "daemonset/each", "--timeout=120s"]);
    let on: BTreeSet<_> =
        ctx.pods("app=each").iter().map(|p| p["spec"]["nodeName"].as_str().unwrap_or("").to_owned()).collect();
    assert_eq!(on, names(ctx).into_iter().collect());
}

fn streams(ctx: &Ctx) {
    let nodes = names(ctx);
    let pods: Vec<_> = nodes
        .iter()
        .map(|n| on(n, pod_with(n, json!({"containers": [shell("c", "echo on $HOSTNAME; sleep 1000")]}))))
        .collect();
    ctx.apply(&pods);
    for node in &nodes {
        ctx.ready(node);
        assert_eq!(ctx.logs(&[node]), format!("on {node}\n"));
        assert_eq!(ctx.exec(node, "cat /etc/hostname"), *node);
        // Each daemon sees its own pods alone.
        let seen = ctx.cluster.nodes().iter().find(|n| n.plan.name == *node).expect("the node").crictl_json(&[
            "pods",
            "--namespace",
            &ctx.ns,
        ]);
        assert_eq!(seen["items"].as_array().map_or(0, Vec::len), 1, "{seen}");
    }
}

fn drain(ctx: &Ctx) {
    let labels = json!({"app": "moves"});
    let spec = json!({"replicas": 4, "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [shell("c", "sleep 1000")]}}});
    ctx.apply(&[json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "moves"}, "spec": spec})]);
    ctx.kubectl(&["rollout", "status", "deployment/moves", "--timeout=120s"]);
    ctx.kubectl(&["drain", "node-1", "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=120s"]);
    ctx.wait("all of them on other nodes", LONG, || {
        let pods = ctx.pods("app=moves");
        (pods.len() == 4 && pods.iter().all(|p| is_ready(p) && p["spec"]["nodeName"] != "node-1")).then_some(())
    });
    ctx.kubectl(&["uncordon", "node-1"]);
}
