//! Kill -9 at every named point of the ZFS store: afterwards the store opens, `check` calls it clean, and an image runs.
//!
//! Run by `cargo test --test zfs_crash`, as root: each point is hit once. With `ZFS_CRASH_ROUNDS` it is hit that many times,
//! and as often when it is met for the second time. Works on a pool of zfs-fuse in the tests' environment. A point is hit in a
//! process of its own: this program, started again.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod images_support;
mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use images_support::{Item, layer};
use proxmox_lxcri::core::ids::{ContainerId, Digest};
use proxmox_lxcri::core::ports::{Claims, LayerStore, RootfsOptions, StreamFrom, Usage};
use proxmox_lxcri::integrations::layers::pipeline::digest_of;
use proxmox_lxcri::integrations::layers::unpack::Limits;
use proxmox_lxcri::integrations::zfs::ZfsConfig;
use proxmox_lxcri::integrations::zfs_store::{ZfsStore, ZfsStoreConfig};
use proxmox_lxcri::utils::tasks::TaskSet;
use support::{given, isolated, repository, run};

const NAME: &str = "every_point_may_be_the_last";
const POINT: &str = "LXCRI_FAILPOINT";
const STEP: &str = "LXCRI_CRASH_STEP";

/// Every point of the store, as its sources have them.
fn points() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/integrations/zfs_store");
    let mut points = BTreeSet::new();
    for file in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        points.extend(text.split("fail_point!(\"").skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
    }
    points
}

fn tars() -> [Vec<u8>; 2] {
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let base =
        [Item::dir("bin"), Item::file("bin/busybox", &busybox).mode(0o755), Item::file("gone", b"x"), Item::dir("etc")];
    [layer(&base), layer(&[Item::file("etc/name", b"image"), Item::file(".wh.gone", b"")])]
}

fn chains() -> [Digest; 2] {
    [digest_of(b"base"), digest_of(b"top")]
}

fn id(n: u8) -> ContainerId {
    format!("{n:02x}").repeat(32).parse().unwrap()
}

async fn open() -> (Arc<ZfsStore>, TaskSet) {
    let tasks = TaskSet::new("crash-test");
    let config = ZfsStoreConfig {
        zfs: ZfsConfig::default(),
        dataset: "tank/lxcri".parse().unwrap(),
        folder: "/tmp/store/zfs".into(),
        owner: "a".repeat(32),
        limits: Limits::default(),
        unpacker: proxmox_lxcri::integrations::layers::confined::Unpacker::Here,
        health_interval: Duration::from_secs(5),
    };
    (ZfsStore::open(config, tasks.clone()).await.unwrap(), tasks)
}

async fn pull(store: &ZfsStore) {
    let ([base, top], [a, b]) = (tars(), chains());
    let apply = |parent: Option<Digest>, chain: Digest, tar: Vec<u8>| async move {
        let tar = Box::new(std::io::Cursor::new(tar));
        store.apply(parent.as_ref(), &chain, tar, Box::new(|| Ok(()))).await.unwrap();
    };
    apply(None, a.clone(), base).await;
    apply(Some(a), b, top).await;
}

/// What a shell says in a container's root file system.
async fn says(store: &ZfsStore, n: u8, script: &str) -> String {
    let fd = store.mount_rootfs(&id(n)).await.unwrap();
    let root = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
    run(Command::new("chroot").args([&root, "/bin/busybox", "sh", "-c", script]))
}

/// A container runs a program of the image and finds its files as the image has them.
async fn runs(store: &ZfsStore, n: u8) {
    store.create_rootfs(&id(n), &chains(), &RootfsOptions::default()).await.unwrap();
    let script = "/bin/busybox cat /etc/name; [ ! -e /gone ] && echo ,whole; echo new > /new";
    assert_eq!(says(store, n, script).await, "image,whole\n");
}

/// Another one begins as the first has become; a moment that nothing is forked from is given back.
async fn forks(store: &ZfsStore, of: u8, n: u8) {
    let of_all = [id(of)];
    let point = store.fork_point(&of_all, None).await.unwrap();
    store.fork_rootfs(&id(of), &point, &id(n), &RootfsOptions::default()).await.unwrap();
    assert_eq!(says(store, n, "/bin/busybox cat /new").await, "new\n");
    let point = store.fork_point(&of_all, None).await.unwrap();
    store.drop_fork_point(&of_all, &point).await.unwrap();
}

const STREAMS: [&str; 2] = ["/tmp/store/base.stream", "/tmp/store/top.stream"];

/// The layers as streams, and what is to be told of them.
async fn send(store: &ZfsStore) -> [Usage; 2] {
    let ([a, b], file) = (chains(), |n: usize| File::create(STREAMS[n]).unwrap().into());
    store.send_layer(&a, &StreamFrom::Nothing, file(0)).await.unwrap();
    store.send_layer(&b, &StreamFrom::Parent(a.clone()), file(1)).await.unwrap();
    [&a, &b].map(|chain| store.layer_usage(chain).unwrap())
}

async fn receive(store: &ZfsStore, usages: [Usage; 2]) {
    for ((chain, usage), stream) in chains().iter().zip(usages).zip(STREAMS) {
        let stream = File::open(stream).unwrap().into();
        store.receive_layer(chain, usage, None, stream, Box::new(|| Ok(()))).await.unwrap();
    }
}

/// As the engine and the image store do it after a start, and whenever something is removed.
async fn remove_all(store: &ZfsStore) {
    for id in store.list_rootfs().await.unwrap() {
        store.remove_rootfs(&id).await.unwrap();
    }
}

async fn until_clean(store: &ZfsStore, claimed: &[ContainerId]) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let report =
            store.check(&|| Claims { whole: claimed.iter().cloned().collect(), ..Claims::default() }).await.unwrap();
        let going = |n: &String| n.contains("being destroyed") || n.contains("removed, but stays");
        if report.problems.is_empty() && !report.notes.iter().any(going) {
            return;
        }
        assert!(Instant::now() < deadline, "{report:?}");
        tokio::time::sleep(Duration::from_millis(20)).await; // the poll of a condition with a deadline
    }
}

/// The life of an image: everything that has a point.
async fn life() {
    let (store, tasks) = open().await;
    pull(&store).await;
    runs(&store, 1).await;
    forks(&store, 1, 3).await;
    let usages = send(&store).await;
    let all_gone = || async {
        remove_all(&store).await;
        store.retain_layers(&[]).await.unwrap();
        until_clean(&store, &[]).await;
    };
    all_gone().await;
    receive(&store, usages).await;
    runs(&store, 4).await;
    all_gone().await;
    tasks.shutdown().await;
}

/// What a crash left is taken up.
async fn afterwards() {
    let (store, tasks) = open().await;
    remove_all(&store).await;
    pull(&store).await;
    store.retain_layers(&chains()).await.unwrap();
    runs(&store, 2).await;
    until_clean(&store, &[id(2)]).await;
    remove_all(&store).await;
    // The layers stay: the next point may be met with them there, or with none.
    until_clean(&store, &[]).await;
    tasks.shutdown().await;
}

fn step(step: &str, point: Option<&str>) -> std::process::Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", NAME, "--nocapture", "--test-threads=1"]).env(STEP, step).env_remove(POINT);
    if let Some(point) = point {
        command.env(POINT, point);
    }
    command.output().unwrap()
}

fn empty() {
    let out = step("empty", None);
    assert!(out.status.success(), "{}", support::describe(&out));
}

#[test]
fn every_point_may_be_the_last() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    match std::env::var(STEP).as_deref() {
        Ok("life") => return runtime().block_on(life()),
        Ok("afterwards") => return runtime().block_on(afterwards()),
        Ok("empty") => {
            return runtime().block_on(async {
                let (store, tasks) = open().await;
                store.retain_layers(&[]).await.unwrap();
                until_clean(&store, &[]).await;
                tasks.shutdown().await;
            });
        }
        _ => {}
    }
    isolated(NAME, || {
        run(Command::new(repository().join("tests/env/pool")).arg(given("LXCRI_ZFS_FUSE")).arg("2G"));
        std::fs::create_dir_all("/tmp/store").unwrap();
        let points = points();
        assert!(points.len() >= 20, "{points:?}");
        // The point is met at its first time; in the long form also at its second (the layer on top, the second removal).
        let long = std::env::var("ZFS_CRASH_ROUNDS").ok().map(|n| n.parse::<usize>().unwrap());
        let (rounds, times) = (long.unwrap_or(1), if long.is_some() { &[1, 2][..] } else { &[1] });
        for round in 0..rounds {
            for point in &points {
                for &time in times {
                    let out = step("life", Some(&format!("{point}:{time}")));
                    let killed = out.status.signal() == Some(9);
                    assert!(killed || (time == 2 && out.status.success()), "{point}: {}", support::describe(&out));
                    let out = step("afterwards", None);
                    assert!(out.status.success(), "after {point}:{time}, round {round}: {}", support::describe(&out));
                    empty();
                }
            }
        }
        println!("figure: killed at {} points, {} times each", points.len(), rounds * times.len());
    });
}
