//! Where images and containers are kept: the folders, and with driver `zfs` pool and dataset.

use super::{Finding, Host};
use crate::core::config::{Config, LayerDriver};
use crate::integrations::zfs::{Dataset, PoolState, Reason, Source, Zfs, ZfsConfig};
use crate::integrations::zfs_store::OWNER;

/// Less than this left is a full disk or pool, as the store sees it.
const FULL: u64 = 64 << 20;
/// Less than this will be one soon.
const SOON: u64 = 2 << 30;

pub(super) async fn check(host: &Host, config: &Config) -> Vec<Finding> {
    let mut all = vec![root(host, config)];
    if config.images.driver == LayerDriver::Zfs {
        all.extend(zfs(config).await);
    }
    all
}

fn space(check: &'static str, name: &str, left: u64, advice: &str) -> Finding {
    let mib = left >> 20;
    match left {
        n if n < FULL => Finding::fault(check, format!("{name} is full: {mib} MiB are left"), advice),
        n if n < SOON => Finding::warning(check, format!("{name} is nearly full: {mib} MiB are left"), advice),
        _ => Finding::good(check, format!("{name}: {mib} MiB are left")),
    }
}

/// The nearest folder that is there says where `server.root` will be.
fn root(host: &Host, config: &Config) -> Finding {
    let root = host.path(&config.server.root);
    let there = root.ancestors().find(|p| p.try_exists().unwrap_or(false)).unwrap_or(&root);
    match rustix::fs::statvfs(there.as_std_path()) {
        Ok(stat) => {
            let left = stat.f_bavail.saturating_mul(stat.f_frsize);
            space("storage", config.server.root.as_str(), left, "crictl rmi --prune, or a larger file system")
        }
        Err(e) => {
            Finding::fault("storage", format!("{}: {e}", config.server.root), "mend the disk, or say server.root")
        }
    }
}

async fn zfs(config: &Config) -> Vec<Finding> {
    let settings = &config.images.zfs;
    let dataset: Dataset = match settings.dataset.parse() {
        Ok(dataset) => dataset,
        Err(e) => return vec![Finding::fault("zfs", format!("images.zfs.dataset: {e}"), "name it as zfs list does")],
    };
    let programs = ZfsConfig {
        zfs: settings.zfs_path.clone(),
        zpool: settings.zpool_path.clone(),
        deadline: settings.timeout().min(std::time::Duration::from_secs(20)),
        ..ZfsConfig::default()
    };
    let zfs = match Zfs::probe(programs).await {
        Ok(zfs) => zfs,
        Err(e) => {
            return vec![Finding::fault(
                "zfs",
                format!("ZFS does not answer: {e}"),
                "apt install zfsutils-linux; modprobe zfs",
            )];
        }
    };
    let pool = dataset.pool();
    match zfs.pool_state(pool).await {
        Ok(Some(PoolState::Online)) => {}
        Ok(Some(PoolState::Degraded)) => {
            let mut all = vec![Finding::warning(
                "zfs",
                format!("pool {pool} is degraded"),
                format!("zpool status {pool}, replace the disk"),
            )];
            all.extend(of_dataset(&zfs, &dataset, config).await);
            return all;
        }
        Ok(Some(PoolState::Suspended)) => {
            return vec![Finding::fault(
                "zfs",
                format!("pool {pool} is suspended: its devices are gone"),
                format!("bring them back, zpool clear {pool}"),
            )];
        }
        Ok(Some(PoolState::Unusable)) => {
            return vec![Finding::fault(
                "zfs",
                format!("pool {pool} can't be used"),
                format!("zpool status {pool}, restore it"),
            )];
        }
        Ok(None) => {
            return vec![Finding::fault(
                "zfs",
                format!("there is no pool {pool}"),
                format!("zpool import {pool}, or mend images.zfs.dataset"),
            )];
        }
        Err(e) => return vec![Finding::fault("zfs", format!("pool {pool}: {e}"), format!("zpool status {pool}"))],
    }
    of_dataset(&zfs, &dataset, config).await
}

async fn of_dataset(zfs: &Zfs, dataset: &Dataset, config: &Config) -> Vec<Finding> {
    let told = match zfs.get(dataset, &["available", OWNER]).await {
        Ok(told) => told,
        Err(e) if e.reason() == Reason::NotFound => {
            return vec![Finding::good("zfs", format!("{dataset} is made at the daemon's first start"))];
        }
        Err(e) => return vec![Finding::fault("zfs", format!("{dataset}: {e}"), format!("zfs get all {dataset}"))],
    };
    let of = |name: &str| told.get(dataset.as_str()).and_then(|p| p.get(name));
    let mut all = Vec::new();
    let ours = crate::daemon::storage::known_installation(&config.server.root);
    match (of(OWNER).filter(|v| v.source != Source::Elsewhere), ours) {
        (Some(tag), Ok(Some(ours))) if tag.text == ours => {}
        (Some(tag), Ok(ours)) => {
            let ours = ours.unwrap_or_else(|| "OUR-ID".into());
            all.push(Finding::fault(
                "zfs",
                format!("{dataset} belongs to another installation ({})", tag.text),
                format!("name another in images.zfs.dataset; if that one is gone: zfs set {OWNER}={ours} {dataset}"),
            ));
        }
        (None, Ok(_)) => all.push(Finding::warning(
            "zfs",
            format!("{dataset} has no tag of ours: it is taken over only if it is empty"),
            "name one that is not there yet in images.zfs.dataset",
        )),
        (_, Err(e)) => all.push(Finding::fault(
            "zfs",
            e.chain(),
            "restore the file from a backup, or remove it and set the dataset's tag anew",
        )),
    }
    match of("available").and_then(|v| v.text.parse().ok()) {
        Some(left) => {
            let advice = "crictl rmi --prune, remove snapshots, or grow the pool; destroyed datasets need a moment";
            all.push(space("zfs", &format!("pool {}", dataset.pool()), left, advice));
        }
        None => all.push(Finding::warning("zfs", format!("{dataset} does not say how much is left"), "")),
    }
    all
}
