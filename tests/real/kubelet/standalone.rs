//! A kubelet without a control plane: static pods.

use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::Registry;
use super::ctx::{BUSYBOX, NGINX, is_ready, pod_with, shell};
use super::harness::{Runner, keep, keep_up};
use super::node::{Node, Plan};
use crate::support::{run, wait_for};

const LIMIT: Duration = Duration::from_secs(90);

pub fn group(runner: &Runner) {
    let registry = Registry::start("/tmp/kube".as_ref());
    let mut node = Node::prepare(Plan::lone(&registry.address));
    node.start_daemon();
    node.start_kubelet(None);
    runner.scenario("static_pod_runs_and_follows_its_file", || static_pod(&node));
    runner.scenario("restart_keeps_static_pods", || restart(&mut node));
    runner.scenario("local_pods_are_left_alone", || local_pod(&mut node));
    // The last one: it ends the registry.
    runner.scenario("bfc_pod_starts_without_a_registry", || bfc_pod(&node, registry));
    if runner.failed() {
        keep(&node.dir, "node");
    }
    keep_up();
}

fn write(node: &Node, name: &str, pod: &Value) {
    // By rename: the kubelet reads what it sees.
    let (tmp, path) = (node.dir.join("manifest.tmp"), node.dir.join("manifests").join(format!("{name}.json")));
    std::fs::write(&tmp, pod.to_string()).expect("a manifest");
    std::fs::rename(&tmp, &path).expect("a manifest in its place");
}

fn remove(node: &Node, name: &str) {
    std::fs::remove_file(node.dir.join("manifests").join(format!("{name}.json"))).expect("a manifest that was there");
}

/// The pod `<name>-<node>` as the kubelet shows it.
fn find(node: &Node, name: &str) -> Option<Value> {
    let list = node.kubelet_json("/pods")?;
    let full = format!("{name}-{}", node.plan.name);
    list["items"].as_array()?.iter().find(|p| p["metadata"]["name"] == full.as_str()).cloned()
}

fn wait_ready(node: &Node, name: &str) -> Value {
    wait_for(&format!("static pod {name} to be Ready"), LIMIT, || find(node, name).filter(is_ready))
}

/// Sandboxes that are up: those that are not go with the kubelet's next collection, once a minute.
fn sandboxes(node: &Node, name: &str) -> usize {
    let full = format!("{name}-{}", node.plan.name);
    node.crictl_json(&["pods", "--state", "ready", "--name", &full])["items"].as_array().map_or(0, Vec::len)
}

fn static_pod(node: &Node) {
    let web = json!({"name": "web", "image": NGINX, "ports": [{"containerPort": 80}],
        "readinessProbe": {"httpGet": {"port": 80, "path": "/"}, "periodSeconds": 1}});
    write(node, "web", &pod_with("web", json!({"containers": [web]})));
    let pod = wait_ready(node, "web");
    let ip = pod["status"]["podIP"].as_str().expect("its address");
    let page = run(std::process::Command::new("curl").args(["-sf", &format!("http://{ip}/")]));
    assert!(page.contains("Welcome to nginx"), "{page}");
    // Another file is another pod.
    let changed = pod_with("web", json!({"containers": [shell("other", "echo changed; sleep 1000")]}));
    write(node, "web", &changed);
    wait_for("the changed pod", LIMIT, || {
        let pod = find(node, "web").filter(is_ready)?;
        (pod["status"]["containerStatuses"][0]["name"] == "other").then_some(())
    });
    remove(node, "web");
    wait_for("the pod's end", LIMIT, || (find(node, "web").is_none() && sandboxes(node, "web") == 0).then_some(()));
}

fn restart(node: &mut Node) {
    write(node, "stays", &pod_with("stays", json!({"containers": [shell("c", "sleep 1000")]})));
    let id = |pod: &Value| pod["status"]["containerStatuses"][0]["containerID"].clone();
    let before = id(&wait_ready(node, "stays"));
    node.kubelet.take().expect("the kubelet").kill();
    node.restart_kubelet();
    let after = wait_for("the pod after the restart", LIMIT, || find(node, "stays").filter(is_ready));
    assert_eq!(id(&after), before, "another container");
    assert_eq!(after["status"]["containerStatuses"][0]["restartCount"], 0);
    remove(node, "stays");
    wait_for("the pod's end", LIMIT, || (find(node, "stays").is_none() && sandboxes(node, "stays") == 0).then_some(()));
}

/// An air-gapped node: the image is in a container in a folder, and no registry answers.
fn bfc_pod(node: &Node, registry: Registry) {
    let out = node.dir.join("bfc/demo@1.bfc");
    let mut pack = std::process::Command::new(crate::support::daemon_program());
    pack.arg("--config").arg(node.dir.join("config.toml")).args(["bfc", "pack", BUSYBOX]).arg(&out);
    run(&mut pack);
    drop(registry);
    // Whatever earlier pods have left: each layer has to come out of the container.
    for image in node.crictl_json(&["images"])["images"].as_array().into_iter().flatten() {
        run(&mut node.crictl(&["rmi", image["id"].as_str().expect("an id")]));
    }
    let (image, missing) = ("bfc.local/demo:1", node.crictl(&["pull", BUSYBOX]).output().expect("crictl"));
    assert!(!missing.status.success(), "the registry still answers");
    let script = "echo from a container file; sleep 1000";
    let container = json!({"name": "c", "image": image, "command": ["sh", "-c", script], "imagePullPolicy": "Always"});
    write(node, "gapped", &pod_with("gapped", json!({"containers": [container]})));
    let pod = wait_ready(node, "gapped");
    let status = &pod["status"]["containerStatuses"][0];
    assert!(status["imageID"].as_str().is_some_and(|id| id.contains("sha256:")), "{status}");
    assert_eq!(status["image"], image, "{status}");
    remove(node, "gapped");
    wait_for("the pod's end", LIMIT, || {
        (find(node, "gapped").is_none() && sandboxes(node, "gapped") == 0).then_some(())
    });
}

/// A pod of our own command line: the kubelet neither sees nor ends it, also not when it starts anew.
fn local_pod(node: &mut Node) {
    let config = node.dir.join("config.toml");
    let local = |args: &[&str]| {
        let mut command = std::process::Command::new(crate::support::daemon_program());
        command.arg("--config").arg(&config).args(args);
        run(&mut command)
    };
    // Detached, so that it stays.
    let id = local(&["run", "-d", "--name", "mine", BUSYBOX, "sleep", "1000"]).trim().to_owned();
    assert!(!node.crictl_json(&["pods"]).to_string().contains("mine"), "crictl sees a local pod");
    let running = || local(&["ps"]).lines().any(|l| l.contains("mine"));
    assert!(running(), "{}", local(&["ps"]));
    node.kubelet.take().expect("the kubelet").kill();
    node.restart_kubelet();
    // The kubelet ends what it does not know within two of its rounds; a static pod's life takes longer than those.
    write(node, "beside", &pod_with("beside", json!({"containers": [shell("c", "sleep 1000")]})));
    wait_ready(node, "beside");
    remove(node, "beside");
    wait_for("the pod's end", LIMIT, || {
        (find(node, "beside").is_none() && sandboxes(node, "beside") == 0).then_some(())
    });
    assert!(running(), "the kubelet ended a local pod");
    let shown = node.kubelet_get("/pods").unwrap_or_default() + &node.kubelet_get("/stats/summary").unwrap_or_default();
    assert!(!shown.contains("mine"), "the kubelet shows a local pod");
    local(&["rm", "-f", &id]);
}
