//! The node loses its power, its disk fills up, fails or becomes read-only, or its clock jumps: each ends in clear errors, and
//! all works again afterwards.
//!
//! Run by `cargo test --test power_and_disk`, as root; `POWER_ROUNDS` is how often the power is lost (3), `FAULT_SEED` repeats the
//! moments. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // the disk is filled by hand

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use k8s_cri::v1 as cri;
use support::client::{Client, block_on, container, create_request, pod};
use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::{isolated, run, snapshot};

const EXITED: i32 = 2;
const NOTREADY: i32 = 1;
/// Nothing that is waited for takes longer.
const LONG: Duration = Duration::from_secs(60);

/// A pod from start to removal; the first failure ends it, but for the removal, which is tried all the same.
async fn live(client: &mut Client, name: &str, logs: &Path) -> Result<(), tonic::Status> {
    let config = pod(name, logs);
    let request = cri::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
    let pod_id = client.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    let done = run_container(client, &pod_id, &config).await;
    let stopped = client.runtime.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod_id.clone() }).await;
    let removed = client.runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod_id }).await;
    done.and(stopped.map(drop)).and(removed.map(drop))
}

async fn run_container(client: &mut Client, pod_id: &str, config: &cri::PodSandboxConfig) -> Result<(), tonic::Status> {
    let request = create_request(pod_id, container("c", BUSYBOX, "echo said; exit 3"), config);
    let id = client.runtime.create_container(request).await?.into_inner().container_id;
    client.runtime.start_container(cri::StartContainerRequest { container_id: id.clone() }).await?;
    let end = Instant::now() + LONG;
    loop {
        let request = cri::ContainerStatusRequest { container_id: id.clone(), verbose: false };
        let status = client.runtime.container_status(request).await?.into_inner().status.expect("a status");
        if status.state == EXITED {
            assert_eq!(status.exit_code, 3, "{status:?}");
            break;
        }
        assert!(Instant::now() < end, "{status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await; // the poll of a condition with a deadline
    }
    client.runtime.remove_container(cri::RemoveContainerRequest { container_id: id }).await.map(drop)
}

/// Removes every pod that is listed.
async fn remove_all(client: &mut Client) {
    let list = client
        .runtime
        .list_pod_sandbox(cri::ListPodSandboxRequest::default())
        .await
        .expect("ListPodSandbox")
        .into_inner();
    for pod in list.items {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.id };
        client.runtime.remove_pod_sandbox(request).await.expect("RemovePodSandbox");
    }
}

/// Numbers that a seed repeats.
fn random(seed: &mut u64, below: u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    (*seed >> 11) % below.max(1)
}

/// Ends all that a power cut ends, and takes away what a boot takes away.
fn cut_the_power(dir: &Path) {
    let me = std::process::id();
    let end = Instant::now() + LONG;
    loop {
        let mut killed = 0;
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
            let line = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            let kept =
                ["docker-registry", "bash"].iter().any(|k| line.split('\0').next().is_some_and(|p| p.ends_with(k)));
            if pid == 1 || pid == me || line.is_empty() || kept {
                continue;
            }
            if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                killed += 1;
            }
        }
        if killed == 0 {
            break;
        }
        assert!(Instant::now() < end, "processes that can't be ended");
        std::thread::sleep(Duration::from_millis(20)); // the poll of a condition with a deadline
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let points: Vec<&str> = mounts.lines().filter_map(|l| l.split(' ').nth(4)).collect();
    let ours = [dir.join("run").display().to_string(), "/run/netns/".into()];
    for point in points.iter().rev().filter(|p| ours.iter().any(|o| p.starts_with(o.as_str()) && **p != o.as_str())) {
        let _ = Command::new("umount").args(["-l", point]).output();
    }
    for folder in [dir.join("run"), "/run/netns".into()] {
        for entry in std::fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
    }
    let clean = "ip link delete lxcri-t0; iptables -t nat -F; iptables -t nat -X; find /sys/fs/cgroup -depth -path '*/tests/*' \
        -type d -exec rmdir {} +; true";
    let _ = Command::new("sh").args(["-c", clean]).output();
    boot_anew(dir);
}

/// Another boot id: the kernel's is covered by a file of ours.
fn boot_anew(dir: &Path) {
    let id = dir.join("boot_id");
    let first = !id.exists();
    std::fs::write(&id, std::fs::read("/proc/sys/kernel/random/uuid").expect("a uuid")).expect("a boot id");
    if first {
        std::fs::set_permissions(&id, std::fs::Permissions::from_mode(0o444)).expect("its mode");
        run(Command::new("mount").arg("--bind").arg(&id).arg("/proc/sys/kernel/random/boot_id"));
    }
}

/// Records that were changed after `since` and not synced may be there with nothing in them.
fn tear_records(lib: &Path, since: std::time::SystemTime, seed: &mut u64) -> usize {
    let mut torn = 0;
    for pod in std::fs::read_dir(lib.join("pods")).into_iter().flatten().flatten() {
        let path = pod.path().join("pod.json");
        let newer = std::fs::metadata(&path).and_then(|m| m.modified()).is_ok_and(|at| at > since);
        if newer && random(seed, 4) == 0 {
            std::fs::write(&path, "").expect("torn");
            torn += 1;
        }
    }
    torn
}

#[test]
fn the_power_is_lost_at_any_moment() {
    isolated("the_power_is_lost_at_any_moment", || {
        let given = |name: &str| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        let mut seed = given("FAULT_SEED").unwrap_or(now.as_nanos() as u64) | 1;
        println!("\nfigure: FAULT_SEED={seed}");
        let rounds = given("POWER_ROUNDS").unwrap_or(3);
        let mut node = Node::prepare(Options::default());
        boot_anew(&node.dir);
        node.start_daemon();
        let (logs, lib, cut) = (node.dir.join("logs"), node.dir.join("lib"), node.dir.join("cut"));
        block_on(async {
            let mut client = Client::connect(&node.socket()).await;
            client.pull(BUSYBOX).await;
            live(&mut client, "first", &logs).await.expect("the first pod");
            let before = snapshot::take(&node);
            let (mut torn, mut seen) = (0, 0);
            for round in 0..rounds {
                let mut workers = Vec::new();
                for n in 0..3 {
                    let (socket, logs) = (node.socket(), logs.clone());
                    workers.push(std::thread::spawn(move || {
                        block_on(async {
                            let mut client = Client::connect(&socket).await;
                            // Until the daemon is gone.
                            for i in 0.. {
                                if live(&mut client, &format!("w{n}-{round}-{i}"), &logs).await.is_err() {
                                    return;
                                }
                            }
                        });
                    }));
                }
                let since = std::time::SystemTime::now();
                // The point in time is what is varied.
                std::thread::sleep(Duration::from_millis(200 + random(&mut seed, 1500)));
                let daemon =
                    rustix::process::Pid::from_raw(i32::try_from(node.daemon_pid()).expect("a pid")).expect("a pid");
                rustix::process::kill_process(daemon, rustix::process::Signal::STOP).expect("SIGSTOP");
                let _ = std::fs::remove_dir_all(&cut);
                run(Command::new("cp").arg("-a").arg(&lib).arg(&cut));
                node.kill_daemon();
                cut_the_power(&node.dir);
                workers.into_iter().for_each(|w| w.join().expect("a worker"));
                std::fs::remove_dir_all(&lib).expect("removed");
                std::fs::rename(&cut, &lib).expect("what was on disk");
                let now_torn = tear_records(&lib, since, &mut seed);
                torn += now_torn;
                node.start_daemon();
                let list = client
                    .runtime
                    .list_pod_sandbox(cri::ListPodSandboxRequest::default())
                    .await
                    .expect("pods")
                    .into_inner();
                assert!(list.items.iter().all(|p| p.state == NOTREADY), "{:?}", list.items);
                seen += list.items.len();
                let list = client
                    .runtime
                    .list_containers(cri::ListContainersRequest::default())
                    .await
                    .expect("containers")
                    .into_inner();
                assert!(list.containers.iter().all(|c| c.state == EXITED), "{:?}", list.containers);
                for c in list.containers {
                    let request = cri::ContainerStatusRequest { container_id: c.id, verbose: false };
                    let status = client.runtime.container_status(request).await.expect("a status").into_inner();
                    let status = status.status.expect("a status");
                    assert!(matches!(status.exit_code, 3 | 255), "{status:?}");
                    assert!(status.finished_at >= status.started_at, "{status:?}");
                }
                remove_all(&mut client).await;
                live(&mut client, &format!("after-{round}"), &logs).await.expect("a pod after the cut");
                let quarantine = lib.join("quarantine");
                let kept = std::fs::read_dir(&quarantine).into_iter().flatten().flatten().count();
                assert!(kept <= now_torn, "{kept} pods are set aside, {now_torn} records were torn");
                // An operator has looked at them; then what they owned is collected.
                let _ = std::fs::remove_dir_all(&quarantine);
                node.crash_daemon();
                snapshot::assert_back_to(&before, &node);
            }
            println!(
                "figure: the power was lost {rounds} times; {seen} pods were listed afterwards, {torn} records were torn"
            );
        });
    });
}

/// A failure that says what is full or broken, and not something else.
fn says(e: &tonic::Status, words: &[&str]) {
    assert!(words.iter().any(|w| e.message().contains(w)), "{e:?}");
}

fn fill(folder: &Path, leave_kib: u64) -> PathBuf {
    let file = folder.join("filler");
    let stat = rustix::fs::statvfs(folder).expect("statvfs");
    let free = stat.f_bavail * stat.f_frsize / 1024;
    let bytes = free.saturating_sub(leave_kib) * 1024;
    let f = std::fs::File::create(&file).expect("a file");
    rustix::fs::fallocate(&f, rustix::fs::FallocateFlags::empty(), 0, bytes).expect("filled");
    file
}

#[test]
fn a_disk_that_fills_up_fails_or_is_read_only_is_told() {
    isolated("a_disk_that_fills_up_fails_or_is_read_only_is_told", || {
        let file = PathBuf::from("/tmp/failpoint");
        let options = Options { root_size_mib: Some(96), failpoint_file: Some(file.clone()), ..Default::default() };
        let mut node = Node::prepare(options);
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(node.dir.join("run")));
        node.start_daemon();
        let (logs, lib, state) = (node.dir.join("logs"), node.dir.join("lib"), node.dir.join("run"));
        block_on(async {
            let mut client = Client::connect(&node.socket()).await;
            client.pull(BUSYBOX).await;
            live(&mut client, "first", &logs).await.expect("the first pod");
            let before = snapshot::take(&node);
            let full = ["No space left", "os error 28", "ENOSPC"];
            let mut refused = 0;
            for (what, folder) in [("records", &lib), ("state", &state)] {
                // So many KiB are free: the write that fails is another one each time.
                for free in (0..).step_by(4).take(16) {
                    let filler = fill(folder, free);
                    let done = live(&mut client, &format!("full-{what}-{free}"), &logs).await;
                    std::fs::remove_file(filler).expect("room again");
                    if let Err(e) = done {
                        says(&e, &full);
                        refused += 1;
                    }
                    // What could not be written down then is made up for.
                    remove_all(&mut client).await;
                }
                live(&mut client, &format!("room-{what}"), &logs).await.expect("with room");
                snapshot::assert_back_to(&before, &node);
            }
            assert!(refused >= 4, "a full disk was noticed {refused} times");

            let error = "atomic.write 1 error";
            std::fs::write(&file, error).expect("armed");
            says(
                &live(&mut client, "eio", &logs).await.expect_err("an I/O error"),
                &["Input/output error", "os error 5"],
            );
            std::fs::remove_file(&file).expect("mended");
            remove_all(&mut client).await;
            live(&mut client, "mended", &logs).await.expect("a disk that works");
            snapshot::assert_back_to(&before, &node);

            // What runs when it happens goes on, ends, and is removed when that can be written down.
            let config = pod("runs", &logs);
            let request = cri::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
            let pod_id = client.runtime.run_pod_sandbox(request).await.expect("a pod").into_inner().pod_sandbox_id;
            let script = "trap 'exit 4' TERM; while :; do sleep 0.05; done";
            let request = create_request(&pod_id, container("c", BUSYBOX, script), &config);
            let id = client.runtime.create_container(request).await.expect("a container").into_inner().container_id;
            let request = cri::StartContainerRequest { container_id: id.clone() };
            client.runtime.start_container(request).await.expect("its start");
            // The daemon's own lock keeps all of the folder from a remount: its records have one of their own.
            let pods = lib.join("pods");
            run(Command::new("mount").arg("--bind").args([&pods, &pods]));
            run(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(&pods));
            says(
                &live(&mut client, "ro", &logs).await.expect_err("read-only"),
                &["Read-only file system", "os error 30"],
            );
            let request = cri::StopContainerRequest { container_id: id.clone(), timeout: 20 };
            client.runtime.stop_container(request).await.expect("a stop needs no disk");
            let request = cri::ContainerStatusRequest { container_id: id.clone(), verbose: false };
            let status = client.runtime.container_status(request.clone()).await.expect("a status").into_inner();
            let status = status.status.expect("a status");
            assert_eq!((status.state, status.exit_code), (EXITED, 4), "{status:?}");
            run(Command::new("umount").arg(&pods));
            // Its end was in memory and in the monitor's hands: a daemon that starts now knows it, too.
            node.crash_daemon();
            let again = client.runtime.container_status(request).await.expect("a status").into_inner();
            let again = again.status.expect("a status");
            assert_eq!((again.state, again.exit_code), (EXITED, 4), "{again:?}");
            remove_all(&mut client).await;
            live(&mut client, "writable", &logs).await.expect("writable again");
            snapshot::assert_back_to(&before, &node);
            println!("\nfigure: {refused} lives of a pod were refused by a full disk, at another write each");
        });
    });
}
