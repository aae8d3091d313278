//! Addresses, host ports, the node's network, RuntimeClasses.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::ctx::{Ctx, LONG, NGINX, pod_with, shell, with};
use super::harness::Scenario;
use crate::support::{repository, run};

pub const SCENARIOS: &[Scenario] = &[
    ("host_port", host_port),
    ("host_network", host_network),
    ("pods_reach_each_other", pod_to_pod),
    ("runtime_classes", runtime_classes),
];

fn web(more: Value) -> Value {
    with(json!({"name": "c", "image": NGINX, "readinessProbe": {"httpGet": {"port": 80}, "periodSeconds": 1}}), more)
}

fn fetch(url: &str) -> Option<String> {
    let out = Command::new("curl").args(["-sf", "--max-time", "10", url]).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

fn host_port(ctx: &Ctx) {
    let ports = json!({"ports": [{"containerPort": 80, "hostPort": 18080}]});
    ctx.apply(&[pod_with("p", json!({"containers": [web(ports)]}))]);
    ctx.ready("p");
    let url = format!("http://{}:18080/", ctx.cluster.nodes()[0].plan.ip);
    ctx.wait("the host port's answer", LONG, || fetch(&url).filter(|t| t.contains("Welcome to nginx")));
    ctx.kubectl(&["delete", "pod", "p", "--wait=true"]);
    assert!(fetch(&url).is_none(), "the port is still open");
}

fn host_network(ctx: &Ctx) {
    ctx.apply(&[pod_with("p", json!({"hostNetwork": true, "containers": [shell("c", "mkdir /www; echo hello > /www/x; httpd -p 18090 -h /www; sleep 1000")]}))]);
    let p = ctx.ready("p");
    assert_eq!(p["status"]["podIP"], p["status"]["hostIP"]);
    let url = format!("http://{}:18090/x", p["status"]["podIP"].as_str().expect("its address"));
    ctx.wait("its answer at the node's address", LONG, || fetch(&url).filter(|t| t == "hello\n"));
    assert_eq!(ctx.exec("p", "hostname"), run(&mut Command::new("hostname")).trim());
}

fn pod_to_pod(ctx: &Ctx) {
    ctx.apply(&[
        pod_with("server", json!({"containers": [web(json!({}))]})),
        pod_with("client", json!({"containers": [shell("c", "sleep 1000")]})),
    ]);
    let server = ctx.ready("server");
    let ip = server["status"]["podIP"].as_str().expect("its address");
    ctx.ready("client");
    assert!(ctx.exec("client", &format!("printf 'GET / HTTP/1.0\r\n\r\n' | nc {ip} 80")).contains("Welcome to nginx"));
    assert!(fetch(&format!("http://{ip}/")).is_some(), "the node does not reach its pod");
}

fn runtime_classes(ctx: &Ctx) {
    let file = repository().join("deploy/runtimeclasses.yaml");
    run(ctx.cluster.kubectl().arg("apply").arg("-f").arg(Path::new(&file)));
    let other = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nothing"}, "handler": "nothing"});
    ctx.kubectl_with(&["apply", "-f", "-"], other.to_string().as_bytes());
    let of = |name: &str, class: &str| {
        pod_with(name, json!({"runtimeClassName": class, "containers": [shell("c", "sleep 1000")]}))
    };
    ctx.apply(&[of("good", "crun"), of("bad", "nothing")]);
    ctx.ready("good");
    let sandbox = ctx.cluster.nodes()[0].crictl_json(&["pods", "--namespace", &ctx.ns, "--name", "good"]);
    assert_eq!(sandbox["items"][0]["runtimeHandler"], "crun", "{sandbox}");
    ctx.wait("an event that names the handler", LONG, || {
        let events = ctx.get("events?fieldSelector=involvedObject.name%3Dbad")?;
        let all = events["items"].as_array()?;
        all.iter()
            .any(|e| {
                e["reason"] == "FailedCreatePodSandBox" && e["message"].as_str().is_some_and(|m| m.contains("nothing"))
            })
            .then_some(())
    });
}
