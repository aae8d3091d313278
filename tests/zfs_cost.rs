//! What a root file system costs on ZFS beside the bare `zfs clone` and mount of the same snapshot, with few datasets and with
//! many.
//!
//! Run by `cargo test --test zfs_cost`, as root, on a pool of zfs-fuse; `ZFS_DATASETS` is how many are many (60, in `make bench`
//! 2,000), `ZFS_COST_STRICT=1` makes the factor of 1.3 count. Prints figures.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::print_stdout)] // tests start programs and print figures

mod images_support;
mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use images_support::{Item, layer};
use proxmox_lxcri::core::ids::ContainerId;
use proxmox_lxcri::core::ports::{LayerStore, RootfsOptions};
use proxmox_lxcri::integrations::layers::pipeline::digest_of;
use proxmox_lxcri::integrations::layers::unpack::Limits;
use proxmox_lxcri::integrations::zfs::ZfsConfig;
use proxmox_lxcri::integrations::zfs_store::{ZfsStore, ZfsStoreConfig};
use proxmox_lxcri::utils::tasks::TaskSet;
use support::{given, isolated, repository, run};

const TRIES: usize = 31;

fn zfs(args: &[&str]) {
    run(Command::new("/usr/sbin/zfs").args(args));
}

/// Median of each.
async fn measure(store: &ZfsStore, chains: &[proxmox_lxcri::core::ids::Digest], round: usize) -> (Duration, Duration) {
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    let snapshot = format!("tank/lxcri/layers/{}@ready", chains.last().unwrap().hex());
    for n in 0..TRIES {
        // Now one first, now the other: a transaction that ends meanwhile hits both alike.
        for first in [n % 2 == 0, n % 2 == 1] {
            let start = Instant::now();
            if first {
                let id = ContainerId::new();
                store.create_rootfs(&id, chains, &RootfsOptions::default()).await.unwrap();
                let mount = store.mount_rootfs(&id).await.unwrap();
                ours.push(start.elapsed());
                drop(mount);
                continue;
            }
            let (name, at) = (format!("tank/bare-{round}-{n}"), format!("mountpoint=/tmp/bare/{round}-{n}"));
            zfs(&["clone", "-o", "lxcri:owner=x", "-o", "canmount=noauto", "-o", &at, &snapshot, &name]);
            // zfs-fuse has mounted it by now; that it says so is the mount's price.
            let _ = Command::new("/usr/sbin/zfs").args(["mount", &name]).output().unwrap();
            bare.push(start.elapsed());
        }
    }
    ours.sort();
    bare.sort();
    (ours[TRIES / 2], bare[TRIES / 2])
}

#[test]
fn a_root_file_system_costs_a_clone_and_a_mount() {
    isolated("a_root_file_system_costs_a_clone_and_a_mount", || {
        run(Command::new(repository().join("tests/env/pool")).arg(given("LXCRI_ZFS_FUSE")));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let tasks = TaskSet::new("cost");
            std::fs::create_dir_all("/tmp/store").unwrap();
            let config = ZfsStoreConfig {
                zfs: ZfsConfig::default(),
                dataset: "tank/lxcri".parse().unwrap(),
                folder: "/tmp/store/zfs".into(),
                owner: "d".repeat(32),
                limits: Limits::default(),
            unpacker: proxmox_lxcri::integrations::layers::confined::Unpacker::Here,
                health_interval: Duration::from_secs(60),
            };
            let store = ZfsStore::open(config, tasks.clone()).await.unwrap();
            let mut chains = Vec::new();
            for n in 0..8 {
                let tar = layer(&[Item::dir("d"), Item::file(&format!("d/{n}"), &[7; 300_000])]);
                let chain = digest_of(format!("{n}").as_bytes());
                let tar = Box::new(std::io::Cursor::new(tar));
                store.apply(chains.last(), &chain, tar, Box::new(|| Ok(()))).await.unwrap();
                chains.push(chain);
            }
            let one = measure(&store, &chains[..1], 0).await;
            let few = measure(&store, &chains, 1).await;
            let many: usize = std::env::var("ZFS_DATASETS").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
            for n in 0..many {
                zfs(&["create", "-o", "mountpoint=none", &format!("tank/many-{n}")]);
            }
            let crowd = measure(&store, &chains, 2).await;
            for (what, (ours, bare)) in [("one layer", one), ("eight layers", few), ("many datasets", crowd)] {
                let factor = ours.as_secs_f64() / bare.as_secs_f64();
                println!("figure: root file system, {what} ({many} are many): {ours:?}, bare clone and mount {bare:?}, factor {factor:.2}");
                let limit = if std::env::var_os("ZFS_COST_STRICT").is_some() { 1.3 } else { 3.0 };
                assert!(factor <= limit, "{what}: {factor:.2} times the bare clone and mount");
            }
            tasks.shutdown().await;
        });
    });
}
