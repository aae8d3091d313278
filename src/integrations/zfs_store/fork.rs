//! Root file systems that begin as another container's was at a cut: clones of a container's snapshot.
//!
//! Called by the store. A cut that was made for a fork alone is `@lxcri:fork-<number>`, is not listed, and goes with the last
//! fork of it ([`reaper`](super::reaper)). A container that is removed while it has forks keeps its dataset until they are
//! gone, too: ZFS keeps a snapshot that has clones, and what both share is there once. Fails by name when there is no such cut.
//! A crash leaves at most a cut without a fork, which the next start takes away.

use super::Inner;
use super::state::{CUT, FORK};
use crate::core::error::{Error, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::RootfsOptions;
use crate::fail_point;
use crate::integrations::zfs::{Reason, Snapshot, ZfsError};

impl Inner {
    /// The name of a snapshot that all of them have.
    pub(super) async fn fork_point(&self, containers: &[ContainerId], name: Option<&str>) -> Result<String> {
        if let Some(name) = name {
            for id in containers {
                if !self.cuts(id)?.iter().any(|n| n == name) {
                    return Err(Error::not_found(format!("container {} has no snapshot {name:?}", id.short())));
                }
            }
            return Ok(format!("{CUT}{name}"));
        }
        let point = format!("{FORK}{}", &uuid::Uuid::new_v4().simple().to_string()[..12]);
        let all: Vec<Snapshot> = containers.iter().map(|id| self.point(id, &point)).collect::<Result<_>>()?;
        let made = self.zfs.snapshot(&all, &[]).await.map_err(|e| self.noted(e));
        fail_point!("zfs.fork.snapshot");
        for id in containers {
            if let Some(rootfs) = self.state().rootfs.get_mut(id) {
                rootfs.add_cut(point.clone());
            }
        }
        if let Err(e) = made {
            // zfs-fuse makes them one by one: some may be there.
            if let Err(left) = self.drop_fork_point(containers, &point).await {
                tracing::warn!(error = left.chain(), "a fork's snapshots stay until the next start");
            }
            return Err(e);
        }
        Ok(point)
    }

    fn point(&self, of: &ContainerId, point: &str) -> Result<Snapshot> {
        Ok(self.container(of)?.snapshot(point).map_err(ZfsError::from)?)
    }

    pub(super) async fn fork(
        &self,
        of: &ContainerId,
        point: &str,
        id: &ContainerId,
        options: &RootfsOptions,
    ) -> Result<()> {
        let origin = self.point(of, point)?;
        let top = {
            let state = self.state();
            let source = state.rootfs.get(of).filter(|r| r.cuts.iter().any(|c| c == point));
            source.ok_or_else(|| Error::not_found(format!("container {} has no such cut", of.short())))?.top.clone()
        };
        self.make_clone(id, &origin, &top, Some(origin.clone()), options).await
    }

    /// Takes the snapshots away that nothing is a fork of.
    pub(super) async fn drop_fork_point(&self, containers: &[ContainerId], point: &str) -> Result<()> {
        if !point.starts_with(FORK) {
            return Ok(());
        }
        for id in containers {
            self.drop_snapshot(&self.point(id, point)?).await?;
        }
        Ok(())
    }

    /// One snapshot of a fork; one that is gone or has other forks is left.
    pub(super) async fn drop_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        match self.zfs.destroy_snapshot(snapshot).await {
            Err(e) if e.reason() == Reason::HasDependents => return Ok(()),
            Err(e) if e.reason() != Reason::NotFound => return Err(self.noted(e)),
            _ => {}
        }
        if let Ok(id) = snapshot.dataset().leaf().parse::<ContainerId>()
            && let Some(rootfs) = self.state().rootfs.get_mut(&id)
        {
            rootfs.cuts.retain(|c| c != snapshot.name());
        }
        Ok(())
    }

    /// What a crash left between a snapshot and the fork of it.
    pub(super) async fn drop_idle_forks(&self) {
        let idle = std::mem::take(&mut self.state().idle);
        for snapshot in idle {
            if let Err(e) = self.drop_snapshot(&snapshot).await {
                tracing::warn!(%snapshot, error = e.chain(), "a snapshot that a fork was to be made of stays");
            }
        }
    }
}
