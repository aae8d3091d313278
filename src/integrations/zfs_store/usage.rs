//! What containers have written: one `zfs get` for all of them, kept for a while.
//!
//! Called by the store. A caller gets the last value at once; an old one is measured anew in the background. Only the
//! first caller of all waits, a moment at most: the engine asks off the path of its lists. Nothing is on disk.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{Inner, blocking, kept, mount};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::Usage;
use crate::integrations::zfs::Flavor;

/// How long a measurement is good.
const FRESH: Duration = Duration::from_secs(9);
/// How long the first caller waits.
const WAIT: Duration = Duration::from_secs(3);

/// The last measurement.
#[derive(Debug, Default)]
pub(super) struct Cache {
    known: Mutex<(Option<Instant>, HashMap<ContainerId, Usage>)>,
    measuring: AtomicBool,
    measured: Notify,
}

impl Cache {
    fn known(&self) -> MutexGuard<'_, (Option<Instant>, HashMap<ContainerId, Usage>)> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container that is gone.
    pub(super) fn forget(&self, container: &ContainerId) {
        self.known().1.remove(container);
    }
}

/// See the module's words.
pub(super) async fn of(store: &Arc<Inner>, container: &ContainerId) -> Result<Usage> {
    let mut measured = std::pin::pin!(store.used.measured.notified());
    measured.as_mut().enable();
    let (at, value) = {
        let known = store.used.known();
        (known.0, known.1.get(container).copied())
    };
    if at.is_none_or(|at| at.elapsed() > FRESH || value.is_none()) && !store.used.measuring.swap(true, Ordering::AcqRel)
    {
        let store = store.clone();
        store.tasks.clone().spawn_cancellable("measure root file systems", async move {
            let _done = Done(&store);
            if let Err(e) = measure(&store).await {
                tracing::warn!(error = e.chain(), "what containers have written is not known");
            }
        });
    }
    if let Some(value) = value {
        return Ok(value);
    }
    let _ = tokio::time::timeout(WAIT, measured).await;
    let value = store.used.known().1.get(container).copied();
    value.ok_or_else(|| Error::new(Kind::Unavailable, format!("container {}: not measured yet", container.short())))
}

struct Done<'a>(&'a Inner);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.used.measuring.store(false, Ordering::Release);
        self.0.used.measured.notify_waiters();
    }
}

async fn measure(store: &Arc<Inner>) -> Result<()> {
    let containers = store.place("containers")?;
    let all = store.zfs.get_all(&containers, &["used"]).await.map_err(|e| store.noted(e))?;
    let mut fresh = HashMap::new();
    for (name, properties) in &all {
        let Some(id) = name.rsplit('/').next().and_then(|leaf| leaf.parse::<ContainerId>().ok()) else { continue };
        let Some(bytes) = properties.get("used").and_then(|v| v.text.parse().ok()) else { continue };
        fresh.insert(id, Usage { bytes, inodes: 0 });
    }
    let copy = store.clone();
    let fresh = blocking(move || {
        for (id, usage) in &mut fresh {
            usage.inodes = new_objects(&copy, id).unwrap_or(0);
        }
        Ok(fresh)
    })
    .await?;
    *store.used.known() = (Some(Instant::now()), fresh);
    Ok(())
}

/// Objects beside those of the layers. The kernel's ZFS is asked through mounts of a moment, zfs-fuse through the one that it
/// keeps, if this daemon knows what the container began with.
fn new_objects(store: &Inner, id: &ContainerId) -> Option<u64> {
    use std::os::fd::AsFd;
    let (top, base) = {
        let state = store.state();
        (state.rootfs.get(id)?.top.clone(), state.objects.get(id).copied())
    };
    let Flavor::Kernel(..) = store.zfs.flavor() else {
        let (dataset, base) = (store.container(id).ok()?, base?);
        let at = store.kept(&dataset);
        let mount = kept::attached(&at).ok()?.then(|| kept::copy(dataset.as_str(), &at).ok())??;
        return Some(mount::objects(mount.as_fd()).ok()?.saturating_sub(base));
    };
    let base = match base {
        Some(base) => base,
        None => {
            let layer = mount::by_kernel(&store.ready(&top).ok()?.to_string(), true).ok()?;
            let base = mount::objects(layer.as_fd()).ok()?;
            store.state().objects.insert(id.clone(), base);
            base
        }
    };
    let now = mount::by_kernel(store.container(id).ok()?.as_str(), false).ok()?;
    Some(mount::objects(now.as_fd()).ok()?.saturating_sub(base))
}
