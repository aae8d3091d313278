//! The pool's health: looked at every few seconds and whenever an operation fails as if the pool were to blame.
//!
//! Run by the store as one task. What it finds is what the node's Status tells, and what makes operations fail at once
//! instead of after a deadline. When the pool is back, the store is read anew. Nothing of it is on disk.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::{Inner, blocking, mount};
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::StorageTrouble;
use crate::integrations::zfs::PoolState;

/// Less than this left is a full pool.
const FULL: u64 = 64 << 20;
/// How long a look may take.
const LOOK: Duration = Duration::from_secs(10);

/// Never ends.
pub(super) async fn run(store: Arc<Inner>) {
    loop {
        let found = tokio::time::timeout(LOOK, look(&store))
            .await
            .unwrap_or_else(|_| trouble("StoragePoolHangs", format!("ZFS does not answer within {LOOK:?}"), true));
        let before = store.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let was_away = before.as_ref().is_some_and(|t| t.blocks);
        let found = match found {
            Some(t) if t.blocks => Some(t),
            other if was_away => match come_back(&store).await {
                Ok(()) => other,
                Err(e) => {
                    trouble("StoragePoolUnreadable", format!("the pool is back but can't be read: {}", e.chain()), true)
                }
            },
            other => other,
        };
        if found != before {
            match &found {
                Some(t) => tracing::error!(reason = t.reason, "{}", t.message),
                None => tracing::info!(dataset = %store.config.dataset, "the pool is well"),
            }
            store.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&found);
            if was_away {
                store.doom.notify_one();
            }
        }
        let _ = tokio::time::timeout(store.config.health_interval, store.look.notified()).await;
    }
}

fn trouble(reason: &str, message: String, blocks: bool) -> Option<StorageTrouble> {
    Some(StorageTrouble { reason: reason.into(), message, blocks })
}

async fn look(store: &Arc<Inner>) -> Option<StorageTrouble> {
    let pool = store.config.dataset.pool();
    match store.zfs.pool_state(pool).await {
        Ok(Some(PoolState::Online | PoolState::Degraded)) => {}
        Ok(Some(PoolState::Suspended)) => {
            let message =
                format!("pool {pool} is suspended: its devices are gone; when they are back: zpool clear {pool}");
            return trouble("StoragePoolSuspended", message, true);
        }
        Ok(Some(PoolState::Unusable)) => {
            return trouble("StoragePoolFaulted", format!("pool {pool} can't be used: see zpool status {pool}"), true);
        }
        Ok(None) => {
            let message = format!("pool {pool} is not imported; to have it back: zpool import {pool}");
            return trouble("StoragePoolMissing", message, true);
        }
        Err(e) => {
            return trouble("StoragePoolUnknown", format!("pool {pool}: {}", Error::from(e).chain()), true);
        }
    }
    // A pool that hangs holds one thread at most.
    if store.asking.swap(true, Ordering::AcqRel) {
        return trouble("StoragePoolHangs", format!("{} does not say how full it is", store.config.folder), true);
    }
    let copy = store.clone();
    let space = blocking(move || {
        let space = mount::space(&copy.config.folder);
        copy.asking.store(false, Ordering::Release);
        space.map_err(|e| Error::io(&copy.config.folder, e))
    })
    .await;
    match space {
        Ok(Some(space)) if space.read_only => {
            let dataset = &store.config.dataset;
            let message = format!("{dataset} is read-only; to write to it again: zfs set readonly=off {dataset}");
            trouble("StorageReadOnly", message, true)
        }
        Ok(Some(space)) if space.left < FULL => {
            trouble("StoragePoolFull", format!("pool {pool} is full: {} MiB are left", space.left >> 20), false)
        }
        Ok(Some(_)) => None,
        // Unmounted by an export, or by somebody; mounted again below.
        Ok(None) => match store.mount_root().await {
            Ok(()) => None,
            Err(e) => trouble("StorageNotMounted", format!("{}: {}", store.config.dataset, e.chain()), false),
        },
        Err(e) => trouble("StorageNotMounted", e.chain(), false),
    }
}

async fn come_back(store: &Inner) -> Result<()> {
    tokio::time::timeout(store.config.zfs.deadline, async {
        store.mount_root().await?;
        store.load().await
    })
    .await
    .unwrap_or_else(|_| Err(Error::new(Kind::DeadlineExceeded, "reading the pool took too long")))
}
