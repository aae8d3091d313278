//! A hundred pods come, run and go; afterwards the machine is as it was before: mounts, namespaces, cgroups, processes,
//! interfaces, iptables rules, address leases and the daemon's own files.
//!
//! Run by `cargo test --test churn`, as root; `CHURN_PODS` is the number of pods. A crash leaves nothing: see `support`.

mod support;

use std::time::{Duration, Instant};

use k8s_cri::v1::{
    ContainerStatusRequest, ListContainersRequest, ListPodSandboxRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};
use support::client::{Client, block_on, container, create_request, pod};
use support::crictl::{BUSYBOX, read_log, stream_lines};
use support::node::{Node, Options};
use support::{isolated, snapshot};

const CONTAINER_EXITED: i32 = 2;

/// One pod from start to removal. Even ones end by themselves, odd ones are stopped.
async fn live(mut client: Client, n: usize, logs: std::path::PathBuf) -> Duration {
    let start = Instant::now();
    let name = format!("churn-{n}");
    let config = pod(&name, &logs);
    let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
    let pod_id = client.runtime.run_pod_sandbox(request).await.expect("RunPodSandbox").into_inner().pod_sandbox_id;
    let script = if n.is_multiple_of(2) {
        format!("echo I am {n}; exit {}", n % 128)
    } else {
        format!("trap 'exit {}' TERM; echo I am {n}; while :; do sleep 0.05; done", n % 128)
    };
    let request = create_request(&pod_id, container("c", BUSYBOX, &script), &config);
    let id = client.runtime.create_container(request).await.expect("CreateContainer").into_inner().container_id;
    let start_request = StartContainerRequest { container_id: id.clone() };
    client.runtime.start_container(start_request).await.expect("StartContainer");
    let log = logs.join(&name).join("c.log");
    let deadline = Instant::now() + Duration::from_secs(60);
    while stream_lines(&read_log(&log), "stdout") != [format!("I am {n}")] {
        assert!(Instant::now() < deadline, "{name} said nothing");
        tokio::time::sleep(Duration::from_millis(20)).await; // the poll of a condition with a deadline
    }
    if n % 2 == 1 {
        let request = StopContainerRequest { container_id: id.clone(), timeout: 20 };
        client.runtime.stop_container(request).await.expect("StopContainer");
    }
    loop {
        let request = ContainerStatusRequest { container_id: id.clone(), verbose: false };
        let answer = client.runtime.container_status(request).await.expect("ContainerStatus").into_inner();
        let status = answer.status.expect("a status");
        if status.state == CONTAINER_EXITED {
            assert_eq!(status.exit_code, (n % 128) as i32, "{name}");
            break;
        }
        assert!(Instant::now() < deadline, "{name} does not end");
        tokio::time::sleep(Duration::from_millis(20)).await; // the poll of a condition with a deadline
    }
    let stop = StopPodSandboxRequest { pod_sandbox_id: pod_id.clone() };
    client.runtime.stop_pod_sandbox(stop).await.expect("StopPodSandbox");
    let remove = RemovePodSandboxRequest { pod_sandbox_id: pod_id };
    client.runtime.remove_pod_sandbox(remove).await.expect("RemovePodSandbox");
    start.elapsed()
}

#[test]
fn a_hundred_pods_leave_nothing() {
    isolated("a_hundred_pods_leave_nothing", || {
        let pods: usize = std::env::var("CHURN_PODS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
        let node = Node::start(Options::default());
        let logs = node.dir.join("logs");
        block_on(async {
            let mut client = Client::connect(&node.socket()).await;
            client.pull(BUSYBOX).await;
            // The first pod makes what stays for all: the bridge, chains, parent cgroups.
            live(client.clone(), 0, logs.clone()).await;
            let before = snapshot::take(&node);
            let start = Instant::now();
            let next = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(1));
            let mut workers = Vec::new();
            for _ in 0..4 {
                let (client, next, logs) = (client.clone(), next.clone(), logs.clone());
                workers.push(async move {
                    let mut times = Vec::new();
                    loop {
                        let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        if n > pods {
                            return times;
                        }
                        times.push(live(client.clone(), n, logs.clone()).await);
                    }
                });
            }
            let mut times: Vec<_> = futures::future::join_all(workers).await.into_iter().flatten().collect();
            times.sort();
            println!("\nfigure: {pods} pods in {:?}, each in {:?} (median)", start.elapsed(), times[times.len() / 2]);
            assert_eq!(times.len(), pods);
            let left = client.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.expect("ListPodSandbox");
            assert!(left.into_inner().items.is_empty());
            let left = client.runtime.list_containers(ListContainersRequest::default()).await.expect("ListContainers");
            assert!(left.into_inner().containers.is_empty());
            snapshot::assert_back_to(&before, &node);
        });
    });
}
