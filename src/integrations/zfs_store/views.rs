//! Root file systems and layers as others see them: idmapped for a user namespace, read-only as an image volume, compared
//! with their image for a checkpoint.
//!
//! Called by the store. On disk everything has the ids of the image, whatever namespace a container is in: the mount maps
//! them. Fails by name where this ZFS can't. All mounts are attached nowhere; a crash leaves at most a clone for a comparison, which the
//! next start destroys.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use super::state::Doomed;
use super::{Inner, blocking, diff, mount, path_of};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, Digest};
use crate::core::ports::{ChangeKind, FileChange, RootfsChanges};
use crate::core::spec::UserNamespace;
use crate::integrations::idmap::{IdmapError, Maps};
use crate::integrations::mountattr;
use crate::integrations::zfs::Flavor;

/// What an image as a volume may not be used for.
const VOLUME: u64 =
    libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

impl Inner {
    /// Refuses user namespaces where the ZFS has no way for them.
    pub(super) fn may_idmap(&self) -> Result<()> {
        match self.zfs.flavor() {
            Flavor::Kernel(..) => Ok(()),
            // It checks owners itself, by ids that are the host's: root of such a pod could neither give a file away
            // nor read what is not its own. A copy with shifted owners would not change that (a test in tests/zfs.rs).
            Flavor::Fuse => Err(Error::new(
                Kind::Unimplemented,
                "root file systems for user namespaces: zfs-fuse knows no user namespaces (OpenZFS from 2.2 on does)",
            )),
        }
    }

    /// Tries an idmapped mount of the dataset that holds everything; nobody sees it.
    pub(super) async fn try_idmap(&self) -> Result<()> {
        self.may_idmap()?;
        let (name, zfs) = (self.config.dataset.to_string(), self.zfs.flavor().describe());
        let map = vec![crate::core::spec::IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
        let user = UserNamespace { uids: map.clone(), gids: map };
        blocking(move || idmapped(mount::by_kernel(&name, false)?, &user, &name, &zfs).map(drop)).await
    }

    /// A detached mount of a container's root; see `LayerStore::mount_rootfs`.
    pub(super) async fn mount_for(&self, id: &ContainerId, user: Option<UserNamespace>) -> Result<OwnedFd> {
        let dataset = self.container(id)?;
        let fd = self.mount(&dataset).await?;
        self.seen_by(fd, user, dataset.to_string()).await
    }

    async fn seen_by(&self, fd: OwnedFd, user: Option<UserNamespace>, name: String) -> Result<OwnedFd> {
        let Some(user) = user else { return Ok(fd) };
        self.may_idmap()?;
        let zfs = self.zfs.flavor().describe();
        blocking(move || idmapped(fd, &user, &name, &zfs)).await
    }

    /// The work of `LayerStore::mount_volume`.
    pub(super) async fn volume(&self, chains: &[Digest], user: Option<UserNamespace>) -> Result<OwnedFd> {
        let top = chains.last().ok_or_else(|| Error::invalid("an image volume of no layer"))?;
        if !self.state().layers.contains_key(top) {
            return Err(Error::not_found(format!("layer {top} is not in the ZFS store")));
        }
        let fd = match self.zfs.flavor() {
            Flavor::Kernel(..) => {
                let name = self.ready(top)?.to_string();
                blocking(move || Ok(mount::by_kernel(&name, true)?)).await?
            }
            // It can't mount snapshots. Nothing is written to a layer after its commit, so it is the same.
            Flavor::Fuse => self.mount(&self.layer(top)?).await?,
        };
        mountattr::set(&fd, VOLUME, None, false)
            .map_err(|e| Error::io("making an image volume read-only", e.into()))?;
        self.seen_by(fd, user, self.layer(top)?.to_string()).await
    }

    /// The work of `LayerStore::rootfs_changes`. Owners are those in the container.
    pub(super) async fn changes(self: &Arc<Self>, id: &ContainerId) -> Result<RootfsChanges> {
        let top = self.state().rootfs.get(id).map(|r| r.top.clone());
        let top = top.ok_or_else(|| Error::not_found(format!("container {} has no root file system", id.short())))?;
        let folder = self.mount(&self.container(id)?).await?;
        mountattr::guard(&folder).map_err(|e| Error::io("a view of a root file system", e.into()))?;
        let (before, temporary) = self.open_snapshot(&self.ready(&top)?).await?;
        let found = blocking(move || {
            let found = diff::compare(&path_of(&before), &path_of(&folder));
            sorted(folder, found.map_err(|e| Error::io("comparing root file systems", e))?)
        })
        .await;
        if let Some(dataset) = temporary {
            self.doom(dataset, Doomed::new(Vec::new()));
        }
        found
    }
}

/// What changed and what is gone, apart.
fn sorted(folder: OwnedFd, found: Vec<FileChange>) -> Result<RootfsChanges> {
    let base = path_of(&folder);
    let (mut changed, mut deleted) = (Vec::new(), Vec::new());
    for FileChange { path, kind } in found {
        if kind == ChangeKind::Deleted {
            deleted.push([b"/", path.as_os_str().as_bytes()].concat());
            continue;
        }
        // A socket means nothing without who listens.
        if !std::fs::symlink_metadata(base.join(&path)).is_ok_and(|m| m.file_type().is_socket()) {
            changed.push(path.as_os_str().as_bytes().to_vec());
        }
    }
    // A folder before what is in it.
    changed.sort();
    Ok(RootfsChanges { folder, changed, deleted, opaque: Vec::new(), user: None })
}

/// Maps the owners of a mount that is attached nowhere.
fn idmapped(fd: OwnedFd, user: &UserNamespace, name: &str, zfs: &str) -> Result<OwnedFd> {
    match Maps::new(user).and_then(|maps| maps.apply(&fd, name)) {
        Ok(()) => Ok(fd),
        Err(IdmapError::Unsupported { .. }) => Err(Error::new(
            Kind::Unimplemented,
            format!("{name}: {zfs} has no idmapped mounts on this kernel (OpenZFS has them from 2.2 on)"),
        )),
        Err(e) => Err(e.into()),
    }
}
