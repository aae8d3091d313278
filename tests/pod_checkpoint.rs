//! CheckpointPod and RestorePod with the real crun and criu, on both drivers: containers of a pod go on in another one where they
//! were at one moment, with their files; the old pod runs on; what can't be is refused by name and leaves nothing.
//!
//! Run by `cargo test --test pod_checkpoint`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods, clippy::print_stdout)] // tests start programs and write files plainly

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use proxmox_lxcri::api::v1;
use proxmox_lxcri::api::v1::runtime_service_client::RuntimeServiceClient;
use serde_json::{Value, json};
use support::client::block_on;
use support::crictl::{BUSYBOX, Crictl, container_config, pod_config, read_log, stream_lines};
use support::node::{Node, Options};
use support::{daemon_program, isolated, wait_for};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

const LONG: Duration = Duration::from_secs(60);
/// Counts, ten times a second, into its log and its own files; a child does so into a file that both containers share.
const COUNTER: &str = "echo $GREETING > /made; rm /etc/passwd; (j=0; while :; do j=$((j+1)); echo $j > /child; sleep 0.1; done) & \
    i=0; while :; do i=$((i+1)); echo $i > /count; echo $i; sleep 0.1; done";

fn numbers(node: &Node, pod: &str, name: &str) -> Vec<u64> {
    let log = node.pod_logs(pod).join(name).join("0.log");
    if !log.exists() {
        return Vec::new();
    }
    stream_lines(&read_log(&log), "stdout").iter().filter_map(|l| l.parse().ok()).collect()
}

async fn connect(node: &Path) -> RuntimeServiceClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", node.display())).expect("an endpoint");
    RuntimeServiceClient::new(endpoint.connect().await.expect("the daemon answers"))
}

type Refusal = (Code, String);

fn checkpoint(node: &Node, request: v1::CheckpointPodRequest) -> Result<(), Refusal> {
    let socket = node.socket();
    block_on(async move {
        let answer = connect(&socket).await.checkpoint_pod(request).await;
        answer.map(drop).map_err(|s| (s.code(), s.message().to_owned()))
    })
}

fn restore(node: &Node, request: v1::RestorePodRequest) -> Result<v1::RestorePodResponse, Refusal> {
    let socket = node.socket();
    block_on(async move {
        let answer = connect(&socket).await.restore_pod(request).await;
        answer.map(tonic::Response::into_inner).map_err(|s| (s.code(), s.message().to_owned()))
    })
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Refusal>, code: Code, word: &str) {
    let (was, message) = answer.expect_err("a refusal");
    assert!(was == code && message.contains(word), "{was:?}: {message}");
}

fn namespaces() -> Option<v1::NamespaceOption> {
    Some(v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() })
}

fn pod(node: &Node, name: &str) -> v1::PodSandboxConfig {
    let metadata =
        v1::PodSandboxMetadata { name: name.into(), uid: format!("uid-{name}"), namespace: "tests".into(), attempt: 1 };
    v1::PodSandboxConfig {
        metadata: Some(metadata),
        hostname: name.into(),
        log_directory: node.pod_logs(name).display().to_string(),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: "/tests".into(),
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: namespaces(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container(node: &Node, name: &str) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: BUSYBOX.into(), ..Default::default() }),
        command: vec!["/bin/sh".into(), "-c".into(), COUNTER.into()],
        mounts: vec![v1::Mount {
            host_path: node.dir.join("volume").display().to_string(),
            container_path: "/volume".into(),
            ..Default::default()
        }],
        log_path: format!("{name}/0.log"),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: namespaces(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn started(crictl: &Crictl, node: &Node, pod: &str, name: &str, more: &Value) -> String {
    let mut config = container_config(name, BUSYBOX, COUNTER);
    config["mounts"] = json!([{"host_path": node.dir.join("volume"), "container_path": "/volume"}]);
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    let id =
        crictl.run(&["create", "--no-pull", pod, &crictl.file(&format!("{name}-c"), &config), &crictl.pod_file("p")]);
    crictl.run(&["start", &id]);
    id
}

/// What only checkpoints and restores under way have.
fn leftovers(node: &Node) -> Vec<PathBuf> {
    let folders = [node.dir.join("lib/checkpoints"), node.dir.join("lib/restores")];
    folders.iter().flat_map(|f| std::fs::read_dir(f).into_iter().flatten().flatten()).map(|e| e.path()).collect()
}

fn above(node: &Node, pod: &str, name: &str, least: u64) -> u64 {
    wait_for("the counter", LONG, || numbers(node, pod, name).last().copied().filter(|n| *n > least))
}

/// What criu said of a restore.
fn criu_log(node: &Node, id: &str) -> String {
    let log = node.dir.join("lib/restores").join(id).join("work/restore.log");
    let log = std::fs::read_to_string(log).unwrap_or_default();
    let from = log.lines().count().saturating_sub(40);
    log.lines().skip(from).collect::<Vec<_>>().join("\n")
}

/// cgroups of the v2 hierarchy, in use or not, with one of these ids in their path.
fn v2_groups<'a>(node: &Node, ids: impl Iterator<Item = &'a &'a String>) -> Vec<String> {
    let at = node.dir.join("v2");
    std::fs::create_dir_all(&at).expect("a folder");
    let mounted = Command::new("mount").args(["-t", "cgroup2", "none"]).arg(&at).status().expect("mount");
    assert!(mounted.success(), "no v2 hierarchy");
    let found = Command::new("find").arg(&at).args(["-type", "d"]).output().expect("find");
    assert!(Command::new("umount").arg(&at).status().expect("umount").success());
    let found = String::from_utf8_lossy(&found.stdout).into_owned();
    let ids: Vec<_> = ids.collect();
    found.lines().filter(|l| ids.iter().any(|id| l.contains(id.as_str()))).map(String::from).collect()
}

fn life(options: Options) {
    let zfs = options.zfs;
    let mut node = Node::start(options);
    let crictl = node.crictl();
    crictl.run(&["pull", BUSYBOX]);
    std::fs::create_dir_all(node.dir.join("volume")).expect("a volume");
    let old = crictl.run(&["runp", &crictl.file("pod-p", &pod_config("p", &node.pod_logs("p")))]);
    let ids = ["a", "b"].map(|name| started(&crictl, &node, &old, name, &json!({})));
    let before = ["a", "b"].map(|name| above(&node, "p", name, 5));
    let out = node.dir.join("out");
    let path = out.display().to_string();
    let of = |ids: &[&String], output_path: &str| v1::CheckpointPodRequest {
        pod_sandbox_id: old.clone(),
        output_path: output_path.into(),
        container_ids: ids.iter().map(ToString::to_string).collect(),
        options: BTreeMap::new(),
    };
    let option = BTreeMap::from([("leave-running".to_owned(), "no".to_owned())]);
    refused(
        checkpoint(&node, v1::CheckpointPodRequest { options: option.clone(), ..of(&[], &path) }),
        Code::InvalidArgument,
        "leave-running",
    );
    let nobody = v1::CheckpointPodRequest { pod_sandbox_id: "nobody".into(), ..of(&[], &path) };
    refused(checkpoint(&node, nobody), Code::NotFound, "nobody");
    refused(checkpoint(&node, of(&[&ids[0], &ids[0]], &path)), Code::InvalidArgument, "twice");
    refused(checkpoint(&node, of(&[], "relative")), Code::InvalidArgument, "output_path");
    refused(checkpoint(&node, of(&[], &node.dir.display().to_string())), Code::InvalidArgument, "not empty");
    assert!(!out.exists() && leftovers(&node).is_empty());

    // All at one moment; the old pod goes on.
    let begun = Instant::now();
    checkpoint(&node, of(&[], &path)).expect("a checkpoint");
    println!("figure: a checkpoint of a pod of two containers in {:?}", begun.elapsed());
    assert_eq!(leftovers(&node), Vec::<PathBuf>::new());
    for (file, mode) in [("pod.json", 0o600), ("c0/rootfs.tar", 0o600), ("c1/checkpoint", 0o700)] {
        assert_eq!(std::fs::metadata(out.join(file)).expect(file).permissions().mode() & 0o777, mode, "{file}");
    }
    let at = ["a", "b"].map(|name| numbers(&node, "p", name).len() as u64);
    for (n, name) in ["a", "b"].into_iter().enumerate() {
        above(&node, "p", name, at[n] + 5);
        let all = numbers(&node, "p", name);
        assert_eq!(all, (1..=all.len() as u64).collect::<Vec<_>>(), "nothing lost, nothing twice");
    }
    refused(checkpoint(&node, of(&[], &path)), Code::InvalidArgument, "not empty");

    let from = |name: &str, containers: &[&str]| v1::RestorePodRequest {
        checkpoint_path: path.clone(),
        config: Some(pod(&node, name)),
        container_configs: containers.iter().map(|c| container(&node, c)).collect(),
        ..Default::default()
    };
    refused(
        restore(&node, v1::RestorePodRequest { options: option, ..from("q", &["a", "b"]) }),
        Code::InvalidArgument,
        "leave-running",
    );
    refused(restore(&node, from("q", &["a"])), Code::InvalidArgument, "\"b\"");
    refused(restore(&node, from("q", &["a", "b", "c"])), Code::InvalidArgument, "\"c\"");
    let nowhere = v1::RestorePodRequest { checkpoint_path: "/no/such".into(), ..from("q", &["a", "b"]) };
    refused(restore(&node, nowhere), Code::NotFound, "pod.json");
    let mut moved = from("q", &["a", "b"]);
    moved.container_configs[1].mounts[0].container_path = "/elsewhere".into();
    refused(restore(&node, moved), Code::FailedPrecondition, "volume");
    let mut other = from("q", &["a", "b"]);
    other.container_configs[0].image.as_mut().expect("an image").image = "no/such:1".into();
    refused(restore(&node, other), Code::NotFound, "pull it first");
    let mut terminal = from("q", &["a", "b"]);
    terminal.container_configs[0].tty = true;
    refused(restore(&node, terminal), Code::Unimplemented, "terminals");
    assert_eq!((crictl.run(&["pods", "-q"]), leftovers(&node)), (old.clone(), Vec::new()));
    refused(restore(&node, from("p", &["a", "b"])), Code::AlreadyExists, "already");

    // A new pod beside the old one, with nothing running in it before it is started.
    let made = restore(&node, from("q", &["b", "a"])).expect("a restored pod");
    let names: Vec<&str> = made.restored_containers.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["b", "a"]);
    let new: BTreeMap<&str, &String> =
        made.restored_containers.iter().map(|c| (c.name.as_str(), &c.container_id)).collect();
    for id in new.values() {
        assert_eq!(crictl.container_state(id), "CONTAINER_CREATED");
    }
    // Neither the checkpoint nor this daemon is needed for the rest.
    std::fs::remove_dir_all(&out).expect("the checkpoint");
    crictl.run(&["rmp", "-f", &old]);
    node.crash_daemon();
    for id in new.values() {
        assert_eq!(crictl.container_state(id), "CONTAINER_CREATED");
        let begun = Instant::now();
        let (started, said) = crictl.try_run(&["start", id]);
        assert!(started, "{said}\n{}", criu_log(&node, id));
        println!("figure: a restore of a container's processes in {:?}", begun.elapsed());
        assert_eq!(crictl.container_state(id), "CONTAINER_RUNNING");
    }
    let exec = |id: &str, script: &str| crictl.run(&["exec", "-s", id, "sh", "-c", script]);
    for (n, (name, id)) in new.iter().enumerate() {
        above(&node, "q", name, 0);
        let all = numbers(&node, "q", name);
        let first = all[0];
        assert!(
            first > before[n] && first <= at[n] + 1,
            "{name}: began at {first}, was seen at {} and {}",
            before[n],
            at[n]
        );
        above(&node, "q", name, first + 5);
        assert_eq!(exec(id, "cat /made; ls /etc/passwd 2>&1 | grep -c 'No such'; hostname"), "hello\n1\nq");
        // Its child lives, too, and its files are its own.
        let child = || exec(id, "cat /child").parse::<u64>().ok();
        let was = wait_for("the child", LONG, child);
        wait_for("the child to go on", LONG, || child().filter(|n| *n > was));
        let group = exec(id, "cat /proc/1/cgroup");
        assert!(group.contains(id.as_str()) && ids.iter().all(|old| !group.contains(old.as_str())), "{group}");
    }
    assert_eq!(leftovers(&node), Vec::<PathBuf>::new());
    // The daemon dies, and it is a container as any other.
    node.crash_daemon();
    let a = new["a"];
    crictl.run(&["stop", "-t", "0", a]);
    assert_eq!(crictl.container_status(a)["exitCode"], 137);
    crictl.run(&["rmp", "-f", &made.pod_sandbox_id]);
    assert_eq!(v2_groups(&node, new.values()), Vec::<String>::new());
    if !zfs {
        return;
    }
    // Root file systems that are still busy go a little later.
    wait_for("a clean store", LONG, || {
        let mut check = Command::new(daemon_program());
        check.arg("--local-socket").arg(node.local_socket()).args(["storage", "check"]);
        let out = check.output().expect("our command line");
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        (out.status.success() && said.contains("zfs: clean") && !said.contains("being destroyed")).then_some(())
    });
}

#[test]
fn pods_go_on_where_they_were() {
    isolated("pods_go_on_where_they_were", || life(Options::default()));
}

#[test]
fn pods_go_on_where_they_were_on_zfs() {
    isolated("pods_go_on_where_they_were_on_zfs", || {
        life(Options { zfs: true, pool_size: "1G".into(), ..Options::default() });
    });
}

#[test]
fn what_can_not_be_restored_is_not_begun() {
    isolated("what_can_not_be_restored_is_not_begun", || {
        let mut node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        std::fs::create_dir_all(node.dir.join("volume")).expect("a volume");
        let pod = crictl.run(&["runp", &crictl.file("pod-p", &pod_config("p", &node.pod_logs("p")))]);
        let request = |output: &str| v1::CheckpointPodRequest {
            pod_sandbox_id: pod.clone(),
            output_path: node_path(output),
            ..Default::default()
        };
        refused(checkpoint(&node, request("out")), Code::FailedPrecondition, "none of its containers runs");
        let tty = started(&crictl, &node, &pod, "tty", &json!({"tty": true, "stdin": true}));
        refused(checkpoint(&node, request("out")), Code::Unimplemented, "terminals");
        crictl.run(&["rm", "-f", &tty]);
        let id = started(&crictl, &node, &pod, "c", &json!({}));
        wait_for("the counter", LONG, || numbers(&node, "p", "c").last().copied().filter(|n| *n > 5));
        // criu breaks down in the middle: nothing is left, and the container runs on.
        let (criu, aside) = (Path::new("/usr/sbin/criu"), Path::new("/usr/sbin/criu.aside"));
        std::fs::rename(criu, aside).expect("criu aside");
        std::fs::write(criu, "#!/bin/sh\nexit 1\n").expect("another criu");
        std::fs::set_permissions(criu, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        refused(checkpoint(&node, request("out")), Code::Internal, "runs on");
        assert_eq!(std::fs::read_dir(node_path("out")).expect("the folder").count(), 0);
        std::fs::remove_file(criu).expect("another criu");
        std::fs::rename(aside, criu).expect("criu back");
        let now = numbers(&node, "p", "c").len() as u64;
        wait_for("it runs on", LONG, || numbers(&node, "p", "c").last().copied().filter(|n| *n > now + 5));
        checkpoint(&node, request("out")).expect("a checkpoint");
        // One whose images are damaged: the container is CREATED, its start fails, ends it and leaves nothing.
        std::fs::write(Path::new(&node_path("out")).join("c0/checkpoint/inventory.img"), "nonsense").expect("damage");
        let request = v1::RestorePodRequest {
            checkpoint_path: node_path("out"),
            config: Some(self::pod(&node, "q")),
            container_configs: vec![container(&node, "c")],
            ..Default::default()
        };
        let made = restore(&node, request).expect("a restored pod");
        let new = &made.restored_containers[0].container_id;
        let (good, said) = crictl.try_run(&["start", new]);
        assert!(!good && said.contains("criu") || said.contains("CRIU"), "{said}");
        let status = crictl.container_status(new);
        assert_eq!(
            (status["state"].as_str(), status["reason"].as_str()),
            (Some("CONTAINER_EXITED"), Some("StartError"))
        );
        crictl.run(&["rmp", "-f", &made.pod_sandbox_id]);
        assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");
        assert_eq!(leftovers(&node), Vec::<PathBuf>::new());
        // What a daemon that was killed in the middle has left goes at the next start.
        let (left, half) = (node.dir.join("lib/checkpoints/x"), node.dir.join("half"));
        std::fs::create_dir_all(&left).expect("a folder");
        std::fs::create_dir_all(half.join("c0/checkpoint")).expect("a folder");
        std::fs::create_dir_all(node.dir.join("lib/restores/nobody")).expect("a folder");
        std::fs::write(left.join("unfinished-pod"), half.display().to_string()).expect("a note");
        node.crash_daemon();
        wait_for("the start's cleaning", LONG, || leftovers(&node).is_empty().then_some(()));
        assert_eq!(std::fs::read_dir(&half).expect("the folder").count(), 0);
    });
}

fn node_path(name: &str) -> String {
    format!("/tmp/node/{name}")
}
