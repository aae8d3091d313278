//! A node whose images' disk fills up: unused images go first, then pods.

use std::sync::Arc;

use serde_json::json;

use super::cluster::{Cluster, condition};
use super::ctx::{BUSYBOX, Ctx, LONG, pod_with, shell, with};
use super::harness::{Runner, keep_up};
use super::process::tail;

/// Size of the disk for images and root file systems, and what must stay free of it, in MiB.
const DISK: u32 = 400;
const FREE: u32 = 150;

pub fn group(runner: &Runner) {
    let cluster = Arc::new(Cluster::lone(|plan, _| {
        plan.root_mib = Some(DISK);
        plan.kubelet = json!({
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "10Mi", "imagefs.available": format!("{FREE}Mi")},
            "evictionPressureTransitionPeriod": "5s",
            "imageMinimumGCAge": "1s",
        });
    }));
    runner.one(&cluster, "unused_images_are_collected", images);
    runner.one(&cluster, "a_pod_that_fills_the_disk_is_evicted", eviction);
    if runner.failed() {
        cluster.keep_logs();
    }
    keep_up();
}

fn has_image(ctx: &Ctx, name: &str) -> bool {
    ctx.cluster.nodes()[0].crictl_json(&["images"]).to_string().contains(name)
}

fn pressure(ctx: &Ctx) -> bool {
    let node = ctx.cluster.get("/api/v1/nodes/node-1").expect("the node");
    condition(&node, "DiskPressure") == Some("True")
}

/// One pod stays; images of pods that are gone are removed when the disk is nearly full, its own is not.
fn images(ctx: &Ctx) {
    ctx.apply(&[pod_with("stays", json!({"containers": [shell("c", "sleep 10000")]}))]);
    ctx.ready("stays");
    for n in ["1", "2", "3"] {
        let image = format!("registry.k8s.io/lxcri/ballast:{n}");
        ctx.apply(&[pod_with(
            &format!("b-{n}"),
            json!({"containers": [{"name": "c", "image": image, "args": ["grpc", "5000"]}]}),
        )]);
        ctx.ready(&format!("b-{n}"));
        assert!(has_image(ctx, "lxcri/ballast"));
    }
    ctx.kubectl(&["delete", "pod", "b-1", "b-2", "b-3", "--wait=true"]);
    // The kubelet takes stock of images every five minutes and at its start, and spares those it has not seen before.
    {
        let mut nodes = ctx.cluster.nodes();
        nodes[0].kubelet.take().expect("the kubelet").stop();
        nodes[0].restart_kubelet();
    }
    // It does not know its pods at once.
    ctx.wait("exec to work again", LONG, || {
        ctx.output(&["exec", "stays", "--", "true"]).status.success().then_some(())
    });
    // What is left free is brought below the limit.
    ctx.exec("stays", "head -c 140000000 /dev/zero > /ballast");
    ctx.wait("the unused images to go", LONG, || (!has_image(ctx, "lxcri/ballast")).then_some(()));
    assert!(has_image(ctx, "busybox"), "an image in use was removed");
    ctx.exec("stays", "rm /ballast");
    ctx.wait("the pressure's end", LONG, || (!pressure(ctx)).then_some(()));
    assert!(super::ctx::is_ready(&ctx.pod("stays")), "a pod was evicted: {}", ctx.pod("stays"));
}

fn eviction(ctx: &Ctx) {
    let hog = with(
        json!({"name": "c", "image": BUSYBOX, "command": ["sh", "-c", "sleep 3; head -c 280000000 /dev/zero > /big; sleep 10000"]}),
        json!({}),
    );
    let small = with(shell("c", "sleep 10000"), json!({"resources": {"requests": {"ephemeral-storage": "20Mi"}}}));
    ctx.apply(&[pod_with("small", json!({"containers": [small]}))]);
    ctx.ready("small");
    ctx.apply(&[pod_with("hog", json!({"containers": [hog]}))]);
    let p = ctx.wait_pod("hog", "evicted", |p| p["status"]["reason"] == "Evicted");
    assert!(
        p["status"]["message"].as_str().is_some_and(|m| m.contains("ephemeral-storage")),
        "{p}\n{}",
        tail(&ctx.cluster.nodes()[0].dir.join("kubelet.log"), 5)
    );
    ctx.wait("the pressure's end", LONG, || (!pressure(ctx)).then_some(()));
    assert!(super::ctx::is_ready(&ctx.pod("small")), "the small pod was evicted: {}", ctx.pod("small"));
}
