//! What a root file system costs on ZFS beside the bare `zfs clone` and mount of the same snapshot: with few layers and many,
//! a small image and a large one, with exactly 10 datasets in the pool and with many.
//!
//! Run by `cargo test --test zfs_cost`, as root, on a pool of zfs-fuse, or on the pool `ZFS_COST_POOL` of whatever ZFS there is. `ZFS_DATASETS`
//! is how many are many (60, in `make bench` 2,000), `ZFS_COST_IMAGE_MIB` the size of the large image (64, there 512);
//! Each is the lower quartile of 31. `ZFS_COST_STRICT=1` makes the factors count: 1.3 beside the bare clone, and 1.5 beside the small image of one layer, times what the bare clone grows by. Prints figures.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::print_stdout)] // tests start programs and print figures

mod support;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxmox_lxcri::core::ids::{ContainerId, Digest};
use proxmox_lxcri::core::ports::{LayerStore, RootfsOptions};
use proxmox_lxcri::integrations::layers::confined::Unpacker;
use proxmox_lxcri::integrations::layers::pipeline::digest_of;
use proxmox_lxcri::integrations::layers::unpack::Limits;
use proxmox_lxcri::integrations::zfs::ZfsConfig;
use proxmox_lxcri::integrations::zfs_store::{ZfsStore, ZfsStoreConfig};
use proxmox_lxcri::utils::tasks::TaskSet;
use support::{given, isolated, repository, run, wait_for};

const TRIES: usize = 31;
const NAME: &str = "a_root_file_system_costs_a_clone_and_a_mount";
/// How many datasets are few.
const FEW: usize = 10;
/// Longest time until a dataset that was removed is gone.
const GONE: Duration = Duration::from_secs(120);

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().map_or(default, |n| n.parse().unwrap())
}

fn zfs(args: &[&str]) -> String {
    run(Command::new("/usr/sbin/zfs").args(args))
}

fn there(dataset: &str) -> bool {
    Command::new("/usr/sbin/zfs").args(["list", "-H", "-o", "name", dataset]).output().unwrap().status.success()
}

/// A layer's tar, in files of at most 1 MiB. As a stream: to start a program costs more in a process with much memory.
fn write_layer(n: usize, bytes: usize, out: std::io::PipeWriter) {
    let mut tar = tar::Builder::new(out);
    for (k, at) in (0..bytes).step_by(1 << 20).enumerate() {
        // No block is like another, nor can be made smaller.
        let mut word = (n * 1_000_003 + k + 1) as u64;
        let next = || {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            word.to_le_bytes()
        };
        let size = (bytes - at).min(1 << 20);
        let data: Vec<u8> = std::iter::repeat_with(next).take(size / 8).flatten().collect();
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        tar.append_data(&mut header, format!("{n}-{k}"), data.as_slice()).unwrap();
    }
    tar.into_inner().unwrap();
}

struct Bench {
    pool: String,
    store: Arc<ZfsStore>,
    /// Datasets that were made to make up the number.
    filling: usize,
}

impl Bench {
    async fn open(pool: &str, tasks: &TaskSet) -> Self {
        std::fs::create_dir_all("/tmp/store").unwrap();
        let config = ZfsStoreConfig {
            zfs: ZfsConfig::default(),
            dataset: format!("{pool}/lxcri").parse().unwrap(),
            folder: "/tmp/store/zfs".into(),
            owner: "d".repeat(32),
            limits: Limits::default(),
            unpacker: Unpacker::Here,
            health_interval: Duration::from_secs(60),
        };
        Self { pool: pool.into(), store: ZfsStore::open(config, tasks.clone()).await.unwrap(), filling: 0 }
    }

    /// An image of layers of that many bytes each.
    async fn image(&self, name: &str, layers: &[usize]) -> Vec<Digest> {
        let mut chains = Vec::new();
        for (n, &bytes) in layers.iter().enumerate() {
            let chain = digest_of(format!("{name}{n}").as_bytes());
            let (tar, out) = std::io::pipe().unwrap();
            std::thread::spawn(move || write_layer(n, bytes, out));
            let tar = Box::new(tar);
            self.store.apply(chains.last(), &chain, tar, Box::new(|| Ok(()))).await.unwrap();
            chains.push(chain);
        }
        chains
    }

    async fn drop_images(&self) {
        self.store.retain_layers(&[]).await.unwrap();
        let layers = format!("{}/lxcri/layers", self.pool);
        wait_for("layers to go", GONE, || {
            (zfs(&["list", "-H", "-r", "-o", "name", &layers]).lines().count() == 1).then_some(())
        });
    }

    fn count(&self) -> usize {
        zfs(&["list", "-H", "-r", "-t", "filesystem,volume", "-o", "name", &self.pool]).lines().count()
    }

    /// Makes the pool have exactly `count` datasets.
    fn fill(&mut self, count: usize) {
        let there = self.count();
        for _ in there..count {
            self.filling += 1;
            zfs(&["create", "-o", "mountpoint=none", &format!("{}/fill-{}", self.pool, self.filling)]);
        }
        for _ in count..there {
            zfs(&["destroy", &format!("{}/fill-{}", self.pool, self.filling)]);
            self.filling -= 1;
        }
        assert_eq!(self.count(), count, "datasets");
    }

    /// Lower quartile of each, ours and the bare clone and mount: what else the machine does is in the upper ones.
    async fn measure(&self, chains: &[Digest]) -> (Duration, Duration) {
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        let snapshot = format!("{}/lxcri/layers/{}@ready", self.pool, chains.last().unwrap().hex());
        // Where ours are, too: what is there to be read of a place (its properties, of all that is above) is ZFS's own price.
        let (name, at) = (format!("{}/lxcri/containers/bare", self.pool), "/tmp/bare");
        for n in 0..TRIES {
            // Now one first, now the other: a transaction that ends meanwhile hits both alike.
            for first in [n % 2 == 0, n % 2 == 1] {
                if first {
                    let id = ContainerId::new();
                    let start = Instant::now();
                    self.store.create_rootfs(&id, chains, &RootfsOptions::default()).await.unwrap();
                    let mount = self.store.mount_rootfs(&id).await.unwrap();
                    ours.push(start.elapsed());
                    drop(mount);
                    self.store.remove_rootfs(&id).await.unwrap();
                    let dataset = format!("{}/lxcri/containers/{id}", self.pool);
                    wait_for("a container's dataset to go", GONE, || (!there(&dataset)).then_some(()));
                    continue;
                }
                let place = format!("mountpoint={at}");
                let start = Instant::now();
                zfs(&["clone", "-o", "lxcri:owner=x", "-o", "canmount=noauto", "-o", &place, &snapshot, &name]);
                // zfs-fuse has mounted it by now; that it says so is the mount's price.
                let _ = Command::new("/usr/sbin/zfs").args(["mount", &name]).output().unwrap();
                bare.push(start.elapsed());
                let destroyed =
                    || Command::new("/usr/sbin/zfs").args(["destroy", &name]).output().unwrap().status.success();
                wait_for("the bare clone to go", GONE, || destroyed().then_some(()));
            }
        }
        ours.sort();
        bare.sort();
        (ours[TRIES / 4], bare[TRIES / 4])
    }
}

#[test]
fn a_root_file_system_costs_a_clone_and_a_mount() {
    let given_pool = std::env::var("ZFS_COST_POOL").ok();
    isolated(NAME, || {
        if given_pool.is_none() {
            run(Command::new(repository().join("tests/env/pool")).arg(given("LXCRI_ZFS_FUSE")));
        }
        let pool = given_pool.as_deref().unwrap_or("tank");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let tasks = TaskSet::new("cost");
            let mut bench = Bench::open(pool, &tasks).await;
            let (many, large) = (number("ZFS_DATASETS", 60), number("ZFS_COST_IMAGE_MIB", 64));
            let mut all = Vec::new();
            // The pool itself, three of the store, and the layers.
            let images = [
                ("one layer of 1 MiB".to_owned(), vec![1 << 20], FEW),
                ("six layers of 1 MiB".to_owned(), vec![1 << 20; 6], FEW),
                (format!("one layer of {large} MiB"), vec![large << 20], FEW),
                ("six layers of 1 MiB".to_owned(), vec![1 << 20; 6], many),
            ];
            for (n, (what, layers, datasets)) in images.iter().enumerate() {
                let chains = bench.image(&format!("image{n}"), layers).await;
                bench.fill(*datasets);
                let (ours, bare) = bench.measure(&chains).await;
                assert_eq!(bench.count(), *datasets, "datasets at the end");
                let factor = ours.div_duration_f64(bare);
                println!(
                    "figure: root file system, {what}, {datasets} datasets: {ours:.2?}, bare clone and mount {bare:.2?}, factor {factor:.2}"
                );
                all.push((format!("{what}, {datasets} datasets"), ours, bare));
                // A large image's blocks are freed in the background, which would be measured with what comes next.
                if layers[0] == 1 << 20 {
                    bench.drop_images().await;
                }
            }
            let strict = std::env::var_os("ZFS_COST_STRICT").is_some_and(|s| !s.is_empty());
            let (beside, growth) = if strict { (1.3, 1.5) } else { (3.0, 5.0) };
            for (what, ours, bare) in &all {
                let factor = ours.div_duration_f64(*bare);
                assert!(factor <= beside, "{what}: {factor:.2} times the bare clone and mount");
                // What the bare clone grows by is ZFS's own.
                let first = &all[0];
                let (grown, bare_grown) = (ours.div_duration_f64(first.1), bare.div_duration_f64(first.2).max(1.0));
                assert!(grown <= growth * bare_grown, "{what}: {grown:.2} times what the smallest costs");
            }
            bench.drop_images().await;
            tasks.shutdown().await;
        });
    });
}
