//! Snapshots that users make of containers, rollbacks to them, and what differs.
//!
//! Called by the store. The snapshots are `@lxcri-<name>`; what else is in the pool is not looked at. Fails by name when a
//! container has no such cut. A crash between two containers' snapshots (zfs-fuse alone; OpenZFS makes them in one
//! transaction) leaves a cut of some of them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::state::{CUT, Doomed, FORK, MADE, READY, snapshots_of};
use super::{Inner, blocking, diff, mount, path_of};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::FileChange;
use crate::integrations::mountattr;
use crate::integrations::zfs::{Flavor, Reason, Snapshot, Value, ZfsError};

fn absent(id: &ContainerId) -> Error {
    Error::not_found(format!("container {} has no root file system", id.short()))
}

impl Inner {
    fn cut(&self, id: &ContainerId, name: &str) -> Result<Snapshot> {
        Ok(self.container(id)?.snapshot(&format!("{CUT}{name}")).map_err(ZfsError::from)?)
    }

    /// Names of a container's cuts.
    pub(super) fn cuts(&self, id: &ContainerId) -> Result<Vec<String>> {
        let state = self.state();
        let rootfs = state.rootfs.get(id).ok_or_else(|| absent(id))?;
        Ok(rootfs.cuts.iter().filter_map(|c| c.strip_prefix(CUT)).map(str::to_owned).collect())
    }

    /// One moment for all of them.
    pub(super) async fn snapshot(&self, containers: &[ContainerId], name: &str) -> Result<()> {
        let mut all = Vec::new();
        for id in containers {
            if self.cuts(id)?.iter().any(|n| n == name) {
                return Err(Error::new(
                    Kind::AlreadyExists,
                    format!("container {} has a snapshot {name:?} already", id.short()),
                ));
            }
            all.push(self.cut(id, name)?);
        }
        if let Err(e) = self.zfs.snapshot(&all, &[]).await {
            // zfs-fuse makes them one by one, and one that was late may be made all the same.
            // What was there before, unknown to us, is kept.
            for snapshot in all.iter().filter(|_| e.reason() != Reason::Exists) {
                if let Err(left) = self.zfs.destroy_snapshot(snapshot).await
                    && left.reason() != Reason::NotFound
                {
                    tracing::warn!(%snapshot, error = %left, "a snapshot of a cut that failed may stay");
                }
            }
            self.read_cuts(containers).await;
            return Err(self.noted(e));
        }
        let mut state = self.state();
        for id in containers {
            if let Some(rootfs) = state.rootfs.get_mut(id) {
                rootfs.add_cut(format!("{CUT}{name}"));
            }
        }
        Ok(())
    }

    /// Takes over which cuts the pool has of them: it has done something else than what was asked for.
    async fn read_cuts(&self, containers: &[ContainerId]) {
        for id in containers {
            let Ok(dataset) = self.container(id) else { continue };
            match self.snapshots(&dataset).await {
                Ok(mut there) => {
                    there.retain(|s| s.starts_with(CUT) || s.starts_with(FORK));
                    if let Some(rootfs) = self.state().rootfs.get_mut(id) {
                        rootfs.cuts = there;
                    }
                }
                Err(e) => tracing::warn!(%dataset, error = %e, "its snapshots can't be listed"),
            }
        }
    }

    /// Newer cuts go. Whatever can be found out is found out for all containers before the first is changed.
    pub(super) async fn rollback(&self, containers: &[ContainerId], name: &str) -> Result<()> {
        let mut all = Vec::new();
        for id in containers {
            let cut = self.cut(id, name)?;
            if !self.cuts(id)?.iter().any(|n| n == name) {
                return Err(Error::not_found(format!("container {} has no snapshot {name:?}", id.short())));
            }
            let newer = self.can_roll_back(id, &cut).await?;
            all.push((id, cut, newer));
        }
        for (id, cut, _) in &all {
            // zfs-fuse can't do it under a mount; OpenZFS can.
            self.let_go(cut.dataset()).await.map_err(|e| match e.reason() {
                Reason::Busy => {
                    let what = format!("container {}: zfs-fuse can't roll back what runs: stop it first", id.short());
                    Error::because(Kind::FailedPrecondition, what, e)
                }
                _ => self.noted(e),
            })?;
        }
        for (n, (id, cut, newer)) in all.iter().enumerate() {
            let done = self.roll_back(cut, newer).await.map_err(|e| self.noted(e));
            self.read_cuts(std::slice::from_ref(*id)).await;
            done.map_err(|e| match n {
                0 => e.context(format!("container {}", id.short())),
                _ => e.context(format!("container {}, after {n} of the pod's others were put back", id.short())),
            })?;
        }
        Ok(())
    }

    /// Our own newer cuts go by their names: one of somebody else that was made since they were looked at stays, and keeps the
    /// rollback from being done.
    async fn roll_back(&self, cut: &Snapshot, newer: &[String]) -> std::result::Result<(), ZfsError> {
        for name in newer.iter().rev() {
            match self.zfs.destroy_snapshot(&cut.dataset().snapshot(name)?).await {
                Err(e) if e.reason() != Reason::NotFound => return Err(e),
                _ => {}
            }
        }
        self.zfs.rollback(cut).await
    }

    /// Refuses what would take more than our own newer cuts, whose names it returns, oldest first.
    async fn can_roll_back(&self, id: &ContainerId, cut: &Snapshot) -> Result<Vec<String>> {
        let told = self.zfs.get_all(cut.dataset(), &["type", MADE, "userrefs"]).await.map_err(|e| self.noted(e))?;
        let there = snapshots_of(cut.dataset().as_str(), &told);
        let Some(at) = there.iter().position(|s| s == cut.name()) else {
            self.read_cuts(std::slice::from_ref(id)).await;
            return Err(Error::not_found(format!("snapshot {cut} is not in the pool any more")));
        };
        let newer = &there[at + 1..];
        if let Some(other) = newer.iter().find(|s| !s.starts_with(CUT) && !s.starts_with(FORK)) {
            let what = format!("container {}: @{other} is newer and not ours; remove that first", id.short());
            return Err(Error::precondition(what));
        }
        let made = |p: &std::collections::BTreeMap<String, Value>| p.get(MADE)?.text.parse::<u64>().ok();
        let of_cut = told.get(&cut.to_string()).and_then(made);
        let is_bookmark =
            |name: &str| name.strip_prefix(cut.dataset().as_str()).is_some_and(|rest| rest.starts_with('#'));
        if let Some((mark, _)) = told.iter().find(|(name, p)| is_bookmark(name) && made(p) > of_cut) {
            let what = format!("container {}: {mark} is newer and not ours; remove that first", id.short());
            return Err(Error::precondition(what));
        }
        let held = |name: &&String| {
            let holds = told.get(&format!("{}@{name}", cut.dataset())).and_then(|p| p.get("userrefs"));
            holds.is_some_and(|v| v.text.parse::<u64>().is_ok_and(|n| n > 0))
        };
        if let Some(held) = newer.iter().find(held) {
            let what = format!("container {}: @{held} is newer and held: zfs release it first", id.short());
            return Err(Error::precondition(what));
        }
        let state = self.state();
        let live = state.rootfs.values().filter_map(|r| r.fork_of.as_ref());
        let mut forks = live.chain(state.doomed.values().filter_map(|d| d.fork_of.as_ref()));
        match forks.any(|of| of.dataset() == cut.dataset() && newer.iter().any(|s| s == of.name())) {
            true => Err(Error::precondition(format!(
                "container {}: a fork is made of a newer state; remove that first",
                id.short()
            ))),
            false => Ok(newer.to_vec()),
        }
    }

    /// Compares a container with its cut or its layers by walking both.
    pub(super) async fn diff(self: &Arc<Self>, id: &ContainerId, from: Option<&str>) -> Result<Vec<FileChange>> {
        let top = self.state().rootfs.get(id).ok_or_else(|| absent(id))?.top.clone();
        let from = match from {
            None => self.ready(&top)?,
            Some(name) if self.cuts(id)?.iter().any(|n| n == name) => self.cut(id, name)?,
            Some(name) => return Err(Error::not_found(format!("container {} has no snapshot {name:?}", id.short()))),
        };
        let (before, temporary) = self.open_snapshot(&from).await?;
        let after = self.mount(&self.container(id)?).await;
        let changes = blocking(move || {
            let after = after?;
            // Its processes may put a link in the place of a folder while both are walked.
            for tree in [&before, &after] {
                mountattr::guard(tree).map_err(|e| Error::io("a view of a root file system", e.into()))?;
            }
            diff::compare(&path_of(&before), &path_of(&after)).map_err(|e| Error::io("comparing root file systems", e))
        })
        .await;
        if let Some(dataset) = temporary {
            self.doom(dataset, Doomed::new(Vec::new()));
        }
        changes
    }

    /// A snapshot's content. zfs-fuse can't mount snapshots: a clone of it is made, to be destroyed by the caller.
    pub(super) async fn open_snapshot(
        &self,
        snapshot: &Snapshot,
    ) -> Result<(OwnedFd, Option<crate::integrations::zfs::Dataset>)> {
        if let Flavor::Kernel(..) = self.zfs.flavor() {
            let name = snapshot.to_string();
            return Ok((blocking(move || Ok(mount::by_kernel(&name, true)?)).await?, None));
        }
        debug_assert!(snapshot.name() == READY || snapshot.name().starts_with(CUT));
        let dataset = self.place(&format!("tmp-{}", uuid::Uuid::new_v4().simple()))?;
        let properties = self.properties(&dataset)?;
        self.state().temporary.insert(dataset.clone());
        let made = match self.zfs.clone_snapshot(snapshot, &dataset, &properties).await {
            Ok(()) => self.mount(&dataset).await,
            Err(e) => Err(self.noted(e)),
        };
        match made {
            Ok(fd) => Ok((fd, Some(dataset))),
            // Also one that was late may be made all the same.
            Err(e) => {
                self.doom(dataset, Doomed::new(Vec::new()));
                Err(e)
            }
        }
    }
}
