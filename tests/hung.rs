//! Everything outside that the daemon waits for is replaced by something that hangs: its call ends at its deadline with
//! the right code and the name of what hung, what hung is killed with its children, and meanwhile every other pod, all
//! lists and statuses, the daemon's start and its end go on as if nothing were. ZFS has its own in `zfs`.
//!
//! A later backend joins by lines in [`ROWS`]: its programs are wrapped by [`wrap`] and hang once for each file
//! `/tmp/hang/<program>-<verb>`, or always while there is `/tmp/hang/all`.
//!
//! Run by `cargo test --test hung`, as root. A crash leaves nothing: see `support`.

// Tests start programs and write files as they like.
#![allow(clippy::disallowed_methods, clippy::print_stdout)]

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use k8s_cri::v1 as cri;
use support::client::{Client, block_on, container, create_request, pod, pull_request};
use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::streams::{exec_url, pids_of, wait_gone};
use support::ws::Ws;
use support::{isolated, wait_for};
use tonic::Code;

/// What hanging programs are, beside a wrapper.
const SLEEPER: &str = "sleep 77077";
/// Deadline of programs in the configuration, in seconds: longer than [`others`] takes on a slow machine.
const DEADLINE: u64 = 20;
/// Nothing that does not hang takes longer.
const QUICK: Duration = Duration::from_secs(10);
const HANG: &str = "/tmp/hang";

/// Which call of the CRI reaches what hangs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Call {
    Run,
    Create,
    Start,
    ExecSync,
    Update,
    Checkpoint,
    StopPod,
}

/// One thing that hangs: the handler that it belongs to, its flag, the call that meets it, and what the answer says.
struct Row {
    handler: &'static str,
    flag: &'static str,
    call: Call,
    says: &'static [&'static str],
}

const ROWS: &[Row] = &[
    Row { handler: "crun", flag: "crun-create", call: Call::Create, says: &["/crun ", " create ", "not done after"] },
    Row { handler: "crun", flag: "crun-start", call: Call::Start, says: &["/crun ", " start ", "not done after"] },
    Row { handler: "crun", flag: "crun-exec", call: Call::ExecSync, says: &["/crun ", " exec ", "not done after"] },
    Row { handler: "crun", flag: "crun-update", call: Call::Update, says: &["/crun ", " update ", "not done after"] },
    Row { handler: "crun", flag: "crun-checkpoint", call: Call::Checkpoint, says: &["criu", "not done after"] },
    Row { handler: "crun", flag: "criu-swrk", call: Call::Checkpoint, says: &["criu", "not done after"] },
    Row { handler: "crun", flag: "bridge-ADD", call: Call::Run, says: &["ADD of plugin \"bridge\"", "not done after"] },
    Row {
        handler: "crun",
        flag: "bridge-DEL",
        call: Call::StopPod,
        says: &["DEL of plugin \"bridge\"", "not done after"],
    },
];

fn script(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("its folder");
    std::fs::write(path, text).expect("a script");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("its mode");
}

/// A stand-in for `program` at `path` that runs it, unless its verb (which shell commands find) is to hang.
fn wrap(path: &str, program: &str, verb: &str) {
    let name = path.rsplit('/').next().expect("a name");
    // The child shows whether all of it is killed.
    let text = format!(
        "#!/bin/sh\n{verb}\nif [ -e {HANG}/all ] || mv {HANG}/{name}-$verb {HANG}/{name}-$verb.held 2>/dev/null; then\n\
         {SLEEPER} & wait\nfi\n{program}\n"
    );
    script(Path::new(path), &text);
}

fn prepare() -> Node {
    std::fs::create_dir_all(HANG).expect("the flags' folder");
    let verb = "verb=other\nfor w; do case $w in\n\
                create|start|exec|delete|update|checkpoint|pause|resume|features|--version) verb=$w; break;;\nesac; done\n\
                case \" $* \" in *\" --help \"*) verb=help;; esac";
    wrap("/tmp/hang/bin/crun", "exec /usr/bin/crun \"$@\"", verb);
    // Found before Debian's: crun's library starts it by its name.
    wrap("/usr/local/sbin/criu", "exec /usr/sbin/criu \"$@\"", "verb=$1");
    // Debian's plugins do not know the version that has STATUS and GC.
    let bridge = "case $CNI_COMMAND in STATUS|GC) exit 0;; esac\n\
                  sed 's/\"cniVersion\":\"1.1.0\"/\"cniVersion\":\"1.0.0\"/g' | /usr/lib/cni/bridge";
    wrap("/tmp/hang/plugins/bridge", bridge, "verb=$CNI_COMMAND");
    let network = serde_json::json!({
        "cniVersion": "1.1.0", "name": "hung",
        "plugins": [{"type": "bridge", "bridge": "lxcri-t0", "isGateway": true,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]]}}]
    });
    Node::prepare(Options {
        crun: "/tmp/hang/bin/crun".into(),
        plugin_dirs: vec!["/tmp/hang/plugins".into(), "/usr/lib/cni".into()],
        network: network.to_string(),
        more_lines: [
            format!("timeout = {DEADLINE}\ncheckpoint_timeout = {DEADLINE}"),
            format!("plugin_timeout = {DEADLINE}"),
            format!("progress_timeout = {}", DEADLINE / 2),
        ],
        ..Options::default()
    })
}

fn hang(flag: &str) {
    std::fs::write(Path::new(HANG).join(flag), "").expect("a flag");
}

fn wait_held(flag: &str) {
    let held = Path::new(HANG).join(format!("{flag}.held"));
    wait_for(&format!("{flag} to be called"), Duration::from_secs(30), || held.exists().then_some(()));
}

/// A pod, if need be with a container that is created or runs: its ids.
struct Made {
    pod: String,
    config: cri::PodSandboxConfig,
    container: String,
}

async fn make(c: &mut Client, node: &Node, name: &str, handler: &str, stage: usize) -> Made {
    let config = pod(name, &node.pod_logs(name));
    let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
    let pod = c.runtime.run_pod_sandbox(request).await.expect("RunPodSandbox").into_inner().pod_sandbox_id;
    let mut made = Made { pod, config, container: String::new() };
    if stage > 0 {
        made.container = create(c, &made).await.expect("CreateContainer");
    }
    if stage > 1 {
        let container_id = made.container.clone();
        c.runtime.start_container(cri::StartContainerRequest { container_id }).await.expect("StartContainer");
    }
    made
}

async fn create(c: &mut Client, made: &Made) -> Result<String, tonic::Status> {
    let config = container("c", BUSYBOX, "echo up; exec sleep 100000");
    let answer = c.runtime.create_container(create_request(&made.pod, config, &made.config)).await;
    answer.map(|a| a.into_inner().container_id)
}

async fn exec(c: &mut Client, container_id: &str, timeout: i64) -> Result<Vec<u8>, tonic::Status> {
    let cmd = ["echo", "hi"].map(str::to_owned).to_vec();
    let request = cri::ExecSyncRequest { container_id: container_id.into(), cmd, timeout };
    c.runtime.exec_sync(request).await.map(|a| a.into_inner().stdout)
}

async fn state(c: &mut Client, container_id: &str) -> i32 {
    let request = cri::ContainerStatusRequest { container_id: container_id.into(), verbose: false };
    c.runtime.container_status(request).await.expect("ContainerStatus").into_inner().status.expect("a status").state
}

async fn stop_pod(c: &mut Client, pod_sandbox_id: &str) -> Result<(), tonic::Status> {
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.into() };
    c.runtime.stop_pod_sandbox(request).await.map(drop)
}

async fn remove_pod(c: &mut Client, pod_sandbox_id: &str) {
    let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod_sandbox_id.into() };
    c.runtime.remove_pod_sandbox(request).await.expect("RemovePodSandbox");
}

/// The named conditions of Status: whether they are met, and their words.
async fn conditions(c: &mut Client) -> Vec<(String, bool, String)> {
    let status = c.runtime.status(cri::StatusRequest::default()).await.expect("Status").into_inner().status;
    let all = status.expect("a status").conditions.into_iter();
    all.map(|c| (c.r#type, c.status, format!("{}: {}", c.reason, c.message))).collect()
}

async fn quick<T>(what: &str, work: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let done = work.await;
    assert!(begun.elapsed() < QUICK, "{what} took {:?}", begun.elapsed());
    done
}

/// What a kubelet asks for all the time is answered at once; gives the pods and containers that are listed.
async fn lists(c: &mut Client) -> (usize, usize) {
    quick("Status", conditions(c)).await;
    let pods = quick("ListPodSandbox", c.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default())).await;
    let pods = pods.expect("ListPodSandbox").into_inner().items.len();
    let all = quick("ListContainers", c.runtime.list_containers(cri::ListContainersRequest::default())).await;
    let all = all.expect("ListContainers").into_inner().containers;
    for id in all.iter().map(|c| c.id.clone()) {
        quick("ContainerStatus", state(c, &id)).await;
    }
    let stats = c.runtime.list_container_stats(cri::ListContainerStatsRequest::default());
    quick("ListContainerStats", stats).await.expect("ListContainerStats");
    let stats = c.runtime.list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest::default());
    quick("ListPodSandboxStats", stats).await.expect("ListPodSandboxStats");
    quick("ListImages", c.images.list_images(cri::ListImagesRequest::default())).await.expect("ListImages");
    quick("ImageFsInfo", c.images.image_fs_info(cri::ImageFsInfoRequest::default())).await.expect("ImageFsInfo");
    (pods, all.len())
}

/// Another pod's whole life, and all that is asked about the node.
async fn others(c: &mut Client, node: &Node, name: &str, handler: &str) {
    lists(c).await;
    let made = make(c, node, name, handler, 2).await;
    assert_eq!(exec(c, &made.container, 30).await.expect("ExecSync"), b"hi\n");
    lists(c).await;
    let stop = cri::StopContainerRequest { container_id: made.container.clone(), timeout: 0 };
    c.runtime.stop_container(stop).await.expect("StopContainer");
    stop_pod(c, &made.pod).await.expect("StopPodSandbox");
    remove_pod(c, &made.pod).await;
}

async fn call(mut c: Client, row: &'static Row, made: Made, node: &Node) -> Result<(), tonic::Status> {
    let container_id = made.container.clone();
    match row.call {
        Call::Run => {
            let config = Some(pod(row.flag, &node.pod_logs(row.flag)));
            let request = cri::RunPodSandboxRequest { config, runtime_handler: row.handler.into() };
            c.runtime.run_pod_sandbox(request).await.map(drop)
        }
        Call::Create => create(&mut c, &made).await.map(drop),
        Call::Start => c.runtime.start_container(cri::StartContainerRequest { container_id }).await.map(drop),
        Call::ExecSync => exec(&mut c, &container_id, 0).await.map(drop),
        Call::Update => {
            let linux = Some(cri::LinuxContainerResources { cpu_shares: 512, ..Default::default() });
            let request = cri::UpdateContainerResourcesRequest { container_id, linux, ..Default::default() };
            c.runtime.update_container_resources(request).await.map(drop)
        }
        Call::Checkpoint => {
            let location = format!("/tmp/{}.tar", row.flag);
            let request = cri::CheckpointContainerRequest { container_id, location, timeout: 3600 };
            c.runtime.checkpoint_container(request).await.map(drop)
        }
        Call::StopPod => stop_pod(&mut c, &made.pod).await,
    }
}

#[test]
fn what_hangs_ends_at_its_deadline_and_holds_up_nobody_else() {
    isolated("what_hangs_ends_at_its_deadline_and_holds_up_nobody_else", || {
        let mut node = prepare();
        node.start_daemon();
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            let mut pods = Vec::new();
            for row in ROWS {
                let stage = match row.call {
                    Call::Run | Call::Create => 0,
                    Call::Start => 1,
                    _ => 2,
                };
                pods.push(make(&mut c, &node, &format!("pod-{}", row.flag), row.handler, stage).await);
            }
            let ids: Vec<_> = pods.iter().map(|m| (m.pod.clone(), m.container.clone())).collect();
            let ended = make(&mut c, &node, "ended", "", 2).await;
            let streamed = make(&mut c, &node, "streamed", "", 2).await;
            let timed = make(&mut c, &node, "timed", "", 2).await;
            let frozen = make(&mut c, &node, "frozen", "", 2).await;
            let monitor = monitor_of(&mut c, &frozen.pod).await;

            // One after the other, so that each flag meets its own call; then all hang at once.
            let begun = Instant::now();
            let mut calls: Vec<_> = ROWS
                .iter()
                .zip(pods)
                .map(|(row, made)| (row, Box::pin(call(c.clone(), row, made, &node)), None))
                .collect();
            for (row, work, _) in &mut calls {
                hang(row.flag);
                let flag = row.flag;
                let held = tokio::task::spawn_blocking(move || wait_held(flag));
                tokio::select! {
                    early = work.as_mut() => panic!("{flag}: {early:?} before it was called"),
                    held = held => held.expect("held"),
                }
            }
            println!("all hang after {:?}", begun.elapsed());
            let waiting = async {
                for (row, work, done) in &mut calls {
                    *done = Some((work.await, begun.elapsed()));
                    assert!(begun.elapsed() < Duration::from_secs(DEADLINE * 3), "{}: late", row.flag);
                }
            };
            let rest = async {
                let mut c = c.clone();
                // An exec whose time is up, or whose client goes, takes what hangs with it at once.
                hang("crun-exec");
                let late = exec(&mut c, &timed.container, 2).await.expect_err("the exec hangs");
                assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
                let before = pids_of(SLEEPER).len();
                let url = exec_url(&mut c, &streamed.container, &["echo", "hi"], false).await;
                hang("crun-exec");
                let ws = Ws::connect(&url, "v5.channel.k8s.io").await;
                let more = || (pids_of(SLEEPER).len() > before).then_some(());
                tokio::task::block_in_place(|| wait_for("the exec to hang", Duration::from_secs(20), more));
                drop(ws);
                let less = || (pids_of(SLEEPER).len() <= before).then_some(());
                tokio::task::block_in_place(|| wait_for("the exec to be killed", Duration::from_secs(20), less));
                // A container's end is told though the runtime does not forget it.
                hang("crun-delete");
                let stop = cri::StopContainerRequest { container_id: ended.container.clone(), timeout: 0 };
                quick("StopContainer", c.runtime.stop_container(stop)).await.expect("StopContainer");
                tokio::task::block_in_place(|| wait_held("crun-delete"));
                assert_eq!(state(&mut c, &ended.container).await, cri::ContainerState::ContainerExited as i32);
                // A monitor that hangs is one pod's trouble.
                signal(monitor, rustix::process::Signal::STOP);
                let hung = {
                    let (mut c, id) = (c.clone(), frozen.container.clone());
                    tokio::spawn(async move { exec(&mut c, &id, 0).await })
                };
                others(&mut c, &node, "other", "").await;
                println!(
                    "figure: another pod's life beside {} things that hang: done after {:?}",
                    ROWS.len() + 4,
                    begun.elapsed()
                );
                assert!(
                    begun.elapsed() < Duration::from_secs(DEADLINE),
                    "not beside what hangs: {:?}",
                    begun.elapsed()
                );
                let hung = hung.await.expect("its task").expect_err("the monitor hangs");
                assert_eq!(hung.code(), Code::DeadlineExceeded, "{hung}");
                assert!(hung.message().contains("the monitor has not answered"), "{hung}");
                stop_pod(&mut c, &frozen.pod).await.expect("a pod with a hanging monitor is stopped");
                remove_pod(&mut c, &frozen.pod).await;
            };
            tokio::join!(waiting, rest);
            for (row, _, done) in calls {
                let (answer, after) = done.expect("an answer");
                let status = answer.expect_err(row.flag);
                println!("{}: {after:?}: {status}", row.flag);
                assert_eq!(status.code(), Code::DeadlineExceeded, "{}: {status}", row.flag);
                for word in row.says {
                    assert!(status.message().contains(word), "{}: no {word:?} in: {status}", row.flag);
                }
            }
            wait_gone(SLEEPER);
            // What hung once works now, and nothing is left.
            for (row, (pod, container)) in ROWS.iter().zip(&ids) {
                let running = cri::ContainerState::ContainerRunning as i32;
                match row.call {
                    Call::ExecSync | Call::Update | Call::Checkpoint => {
                        assert_eq!(state(&mut c, container).await, running, "{}", row.flag);
                        assert_eq!(exec(&mut c, container, 30).await.expect(row.flag), b"hi\n");
                    }
                    Call::Start => {
                        assert_eq!(state(&mut c, container).await, cri::ContainerState::ContainerExited as i32);
                    }
                    Call::Run | Call::Create | Call::StopPod => {}
                }
                stop_pod(&mut c, pod).await.expect(row.flag);
                remove_pod(&mut c, pod).await;
            }
            for made in [&ended, &streamed, &timed] {
                stop_pod(&mut c, &made.pod).await.expect("StopPodSandbox");
                remove_pod(&mut c, &made.pod).await;
            }
            assert_eq!(lists(&mut c).await, (0, 0));
        });
    });
}

async fn monitor_of(c: &mut Client, pod_sandbox_id: &str) -> i32 {
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod_sandbox_id.into(), verbose: true };
    let info = c.runtime.pod_sandbox_status(request).await.expect("PodSandboxStatus").into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
    info["monitorPid"].as_i64().and_then(|p| i32::try_from(p).ok()).expect("the monitor's pid")
}

fn signal(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, signal).expect("a signal");
}

#[test]
fn the_daemon_starts_and_ends_beside_everything_that_hangs() {
    isolated("the_daemon_starts_and_ends_beside_everything_that_hangs", || {
        let mut node = prepare();
        // A kernel with AppArmor, as far as the daemon can tell, and a parser that hangs.
        let run = |args: &[&str]| drop(support::run(std::process::Command::new(args[0]).args(&args[1..])));
        run(&["mount", "-t", "tmpfs", "tmpfs", "/sys/module"]);
        run(&["mount", "-t", "tmpfs", "tmpfs", "/sys/kernel/security"]);
        for (path, text) in
            [("/sys/module/apparmor/parameters/enabled", "Y\n"), ("/sys/kernel/security/apparmor/profiles", "")]
        {
            std::fs::create_dir_all(Path::new(path).parent().expect("a folder")).expect("its folder");
            std::fs::write(path, text).expect(path);
        }
        wrap("/usr/sbin/apparmor_parser", "exit 1", "verb=load");
        node.start_daemon();
        let (pods, monitor) = block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            let mut pods = Vec::new();
            for name in ["runs", "frozen", "stopping", "updating"] {
                pods.push(make(&mut c, &node, name, "", 2).await);
            }
            let monitor = monitor_of(&mut c, &pods[1].pod).await;
            // The daemon is told to end in the middle of all this.
            std::fs::write(Path::new(HANG).join("all"), "").expect("a flag");
            let registry = SilentRegistry::start(&node, "silent.test", Silence::Layers);
            for n in 0..3 {
                let (mut c, image) = (c.clone(), registry.image(n));
                tokio::spawn(async move { c.images.pull_image(pull_request(&image)).await });
            }
            let (mut first, id) = (c.clone(), pods[2].pod.clone());
            tokio::spawn(async move { stop_pod(&mut first, &id).await });
            let linux = Some(cri::LinuxContainerResources { cpu_shares: 512, ..Default::default() });
            let container_id = pods[3].container.clone();
            let request = cri::UpdateContainerResourcesRequest { container_id, linux, ..Default::default() };
            let mut second = c.clone();
            tokio::spawn(async move { second.runtime.update_container_resources(request).await });
            let (container_id, location) = (pods[0].container.clone(), "/tmp/c.tar".to_owned());
            let request = cri::CheckpointContainerRequest { container_id, location, timeout: 3600 };
            let mut third = c.clone();
            tokio::spawn(async move { third.runtime.checkpoint_container(request).await });
            let all = || (pids_of(SLEEPER).len() >= 3).then_some(());
            tokio::task::block_in_place(|| wait_for("all of it to hang", Duration::from_secs(30), all));
            lists(&mut c).await;
            (pods, monitor)
        });
        let begun = Instant::now();
        node.stop_daemon();
        println!("figure: SIGTERM beside hanging programs and pulls: ended after {:?}", begun.elapsed());
        // Those of the daemon's; the monitors' have their own deadlines.
        signal(monitor, rustix::process::Signal::STOP);
        let begun = Instant::now();
        node.start_daemon();
        let took = begun.elapsed();
        println!("figure: start with everything hanging: {took:?}");
        assert!(took < Duration::from_secs(45), "the start waited for what hangs: {took:?}");
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            assert_eq!(lists(&mut c).await, (4, 4));
            let all = conditions(&mut c).await;
            let find = |name: &str| all.iter().find(|(t, _, _)| t == name).expect(name);
            let (_, ready, text) = find("RuntimeReady");
            assert!(!ready && text.starts_with("RuntimeNotReady: ") && text.contains("/tmp/hang/bin/crun"), "{text}");
            let (_, ready, text) = find("NetworkReady");
            assert!(!ready && text.starts_with("NetworkPluginNotReady: ") && text.contains("STATUS"), "{text}");
            assert_eq!(state(&mut c, &pods[0].container).await, cri::ContainerState::ContainerRunning as i32);
        });
        let begun = Instant::now();
        node.stop_daemon();
        println!("figure: SIGTERM beside a start that is not done: ended after {:?}", begun.elapsed());
        // All is well again: what was begun is finished without another start.
        node.start_daemon();
        std::fs::remove_file(Path::new(HANG).join("all")).expect("the flag");
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            let end = Instant::now() + Duration::from_secs(60);
            while conditions(&mut c).await.iter().any(|(_, ready, _)| !ready) {
                assert!(Instant::now() < end, "not ready: {:?}", conditions(&mut c).await);
                tokio::time::sleep(Duration::from_millis(100)).await; // the poll of a condition with a deadline
            }
            for made in &pods {
                let end = Instant::now() + Duration::from_secs(DEADLINE * 3);
                while let Err(e) = stop_pod(&mut c, &made.pod).await {
                    assert!(Instant::now() < end, "{e}");
                }
                remove_pod(&mut c, &made.pod).await;
            }
            others(&mut c, &node, "after", "").await;
            assert_eq!(lists(&mut c).await, (0, 0));
        });
    });
}

/// Where a registry says nothing any more.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Silence {
    Headers,
    Body,
    Token,
    Layers,
}

/// A registry that stops in the middle, for ever.
struct SilentRegistry {
    name: String,
}

impl SilentRegistry {
    fn start(node: &Node, name: &str, silence: Silence) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            for mut stream in listener.incoming().flatten() {
                let own = stream.try_clone().expect("a socket");
                std::thread::spawn(move || answer(&mut stream, silence, address.port()));
                kept.push(own);
            }
        });
        hosts(node, name, &address.to_string());
        Self { name: name.into() }
    }

    fn image(&self, n: usize) -> String {
        format!("{}/image{n}:1", self.name)
    }
}

fn hosts(node: &Node, name: &str, address: &str) {
    let folder = node.dir.join("certs.d").join(name);
    std::fs::create_dir_all(&folder).expect("certs.d");
    let text = format!(
        "server = \"http://{address}\"\n\n[host.\"http://{address}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
    );
    std::fs::write(folder.join("hosts.toml"), text).expect("hosts.toml");
}

fn digest(data: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(data).iter().fold("sha256:".to_owned(), |text, b| text + &format!("{b:02x}"))
}

/// Configuration and manifest of an image with three layers that never come.
fn silent_image(name: &str) -> (Vec<u8>, Vec<u8>) {
    let diffs: Vec<_> = (0..3).map(|n| digest(format!("{name} {n}").as_bytes())).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diffs}
    });
    let config = config.to_string().into_bytes();
    let layers: Vec<_> = diffs
        .iter()
        .map(|d| serde_json::json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": d, "size": 4096}))
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len()},
        "layers": layers,
    });
    (config, manifest.to_string().into_bytes())
}

fn answer(stream: &mut TcpStream, silence: Silence, port: u16) {
    loop {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                _ => return,
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let name = path.split('/').nth(2).unwrap_or_default().to_owned();
        let (config, manifest) = silent_image(&name);
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let (kind, body) = match silence {
            Silence::Headers => return forever(stream),
            Silence::Token if path.starts_with("/token") => return forever(stream),
            Silence::Token => {
                let challenge = format!("Bearer realm=\"http://127.0.0.1:{port}/token\",service=\"x\"");
                let _ = write!(stream, "HTTP/1.1 401 No\r\nWWW-Authenticate: {challenge}\r\nContent-Length: 0\r\n\r\n");
                continue;
            }
            Silence::Body => {
                let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n{{");
                return forever(stream);
            }
            Silence::Layers if path.contains("/manifests/") => (kind, manifest),
            Silence::Layers if path.contains(&digest(&config)) => ("application/octet-stream", config),
            Silence::Layers => {
                let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 4096\r\n\r\n\0\0");
                return forever(stream);
            }
        };
        let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n", body.len());
        let _ = stream.write_all(&body);
    }
}

/// Until the other end goes.
fn forever(stream: &mut TcpStream) {
    let mut rest = [0; 512];
    while matches!(stream.read(&mut rest), Ok(1..)) {}
}

#[test]
fn registries_that_hang_end_their_own_pulls_only() {
    isolated("registries_that_hang_end_their_own_pulls_only", || {
        let mut node = prepare();
        node.start_daemon();
        let mut wanted = Vec::new();
        for (name, silence) in [("headers", Silence::Headers), ("body", Silence::Body), ("token", Silence::Token)] {
            wanted.push(SilentRegistry::start(&node, &format!("{name}.test"), silence).image(0));
        }
        // Nobody answers there: packets go nowhere.
        hosts(&node, "connect.test", "192.0.2.77:5000");
        wanted.push("connect.test/image0:1".into());
        // More layers at once than a small pool has threads: none of them may be what others need.
        let layers = SilentRegistry::start(&node, "layers.test", Silence::Layers);
        wanted.extend((0..24).map(|n| layers.image(n)));
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            let begun = Instant::now();
            let pulls: Vec<_> = wanted
                .iter()
                .map(|image| {
                    let (mut c, request) = (c.clone(), pull_request(image));
                    tokio::spawn(async move { (c.images.pull_image(request).await, begun.elapsed()) })
                })
                .collect();
            let mut own = c.clone();
            let beside = async {
                tokio::time::sleep(Duration::from_secs(2)).await; // until the pulls hang, in whatever order
                others(&mut own, &node, "other", "").await;
                begun.elapsed()
            };
            let after = beside.await;
            println!("figure: another pod's life beside {} pulls that hang: done after {after:?}", wanted.len());
            for (image, pull) in wanted.iter().zip(pulls) {
                let (answer, after) = pull.await.expect("a pull");
                let status = answer.expect_err(image);
                let host = image.split('/').next().expect("a host");
                assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Unavailable), "{image}: {status}");
                assert!(status.message().contains(host), "{image}: {status}");
                // Time without a byte, at each step that gets one.
                assert!(after < Duration::from_secs(DEADLINE * 3), "{image}: {after:?}");
            }
            assert!(c.images.pull_image(pull_request(BUSYBOX)).await.is_ok());
        });
    });
}

#[test]
fn a_monitor_that_hangs_at_its_start_is_killed() {
    isolated("a_monitor_that_hangs_at_its_start_is_killed", || {
        let mut node = prepare();
        let config = node.dir.join("config.toml");
        let text = std::fs::read_to_string(&config).expect("the configuration");
        let real = support::given("LXCRI_MONITOR");
        script(
            Path::new("/tmp/hang/monitor"),
            &format!(
                "#!/bin/sh\nmv {HANG}/monitor-start {HANG}/x 2>/dev/null && exec {SLEEPER}\nexec {} \"$@\"\n",
                real.display()
            ),
        );
        std::fs::write(&config, text.replace(&real.display().to_string(), "/tmp/hang/monitor")).expect("config.toml");
        node.start_daemon();
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            hang("monitor-start");
            let config = Some(pod("hung", &node.pod_logs("hung")));
            let request = cri::RunPodSandboxRequest { config, ..Default::default() };
            let mut own = c.clone();
            let (status, ()) = tokio::join!(own.runtime.run_pod_sandbox(request), async {
                let taken = || Path::new("/tmp/hang/x").exists().then_some(());
                tokio::task::block_in_place(|| wait_for("the monitor's start", QUICK, taken));
                others(&mut c, &node, "other", "").await;
            });
            let status = status.expect_err("the monitor hangs");
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
            assert!(status.message().contains("the monitor has not answered Hello"), "{status}");
            wait_gone(SLEEPER);
            // The same pod, with a monitor that works.
            let hung = make(&mut c, &node, "hung", "", 2).await;
            remove_pod(&mut c, &hung.pod).await;
        });
    });
}
