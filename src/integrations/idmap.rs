//! Idmapped mounts (mount_setattr(2), MOUNT_ATTR_IDMAP): what belongs to user 0 on disk belongs to a pod's root through
//! them, and what that root writes belongs to user 0 on disk.
//!
//! Called by the root file systems' drivers and, to try what the OCI runtime will do, by the backends. **Blocks**, as
//! mounting does. Fails with [`IdmapError`], which names the path and its file system. Mounts are detached: they end with
//! their descriptor, a crash leaves nothing.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::netns::{NetnsError, maps_holder};
use super::{mountattr, mounts};
use crate::core::error::{Error, Kind};
use crate::core::spec::UserNamespace;

/// Why there is no idmapped mount.
#[derive(Debug, thiserror::Error)]
pub enum IdmapError {
    /// Its file system, or one that is mounted below it, can't.
    #[error("{path}: its file system ({fstype}) has no idmapped mounts on this kernel")]
    Unsupported {
        /// The mount point that can't.
        path: String,
        /// "overlay", "nfs", ...
        fstype: String,
    },
    /// A system call failed.
    #[error("{step} {path}")]
    System {
        /// What was done.
        step: &'static str,
        /// To what.
        path: String,
        /// errno.
        source: io::Error,
    },
    /// There is no user namespace with these maps.
    #[error("a user namespace for an idmapped mount")]
    Userns(#[source] Box<NetnsError>),
}

impl From<IdmapError> for Error {
    fn from(e: IdmapError) -> Self {
        match e {
            IdmapError::Unsupported { .. } => Error::precondition(e.to_string()),
            IdmapError::System { step, path, source } => {
                let kind = match source.kind() {
                    // The kernel says so of a mount that has other maps already.
                    io::ErrorKind::PermissionDenied => Kind::FailedPrecondition,
                    io::ErrorKind::NotFound => Kind::InvalidArgument,
                    _ => Error::io("", io::Error::from(source.kind())).kind(),
                };
                Error::because(kind, format!("{step} {path}"), source)
            }
            IdmapError::Userns(source) => Error::from(*source).context("a user namespace for an idmapped mount"),
        }
    }
}

/// Id maps as the kernel wants them: an open user namespace that has them. It is nobody's and ends with this.
#[derive(Debug)]
pub struct Maps(File);

impl Maps {
    /// Makes the user namespace. Forks; blocks shortly.
    pub fn new(user: &UserNamespace) -> Result<Self, IdmapError> {
        maps_holder(user).map(Self).map_err(|e| IdmapError::Userns(Box::new(e)))
    }

    /// A detached copy of the mount at `path`, idmapped; with `recursive`, of all that is mounted below it, too.
    pub fn mount(&self, path: &Path, recursive: bool) -> Result<OwnedFd, IdmapError> {
        match self.try_mount(path, recursive) {
            Err(IdmapError::System { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                Err(self.culprit(path, recursive))
            }
            done => done,
        }
    }

    fn try_mount(&self, path: &Path, recursive: bool) -> Result<OwnedFd, IdmapError> {
        let failed =
            |step| move |e: Errno| IdmapError::System { step, path: path.display().to_string(), source: e.into() };
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
        let tree = open_tree(CWD, path, flags).map_err(failed("clone the mount at"))?;
        mountattr::set(&tree, libc::MOUNT_ATTR_IDMAP, Some(self.0.as_fd()), recursive)
            .map_err(failed("idmap the mount at"))?;
        Ok(tree)
    }

    /// Idmaps a mount that is attached nowhere and has no maps yet. `name` is for the error.
    pub(crate) fn apply(&self, mount: &OwnedFd, name: &str) -> Result<(), IdmapError> {
        mountattr::set(mount, libc::MOUNT_ATTR_IDMAP, Some(self.0.as_fd()), false).map_err(|e| match e {
            Errno::INVAL => IdmapError::Unsupported { path: name.into(), fstype: "detached".into() },
            e => IdmapError::System { step: "idmap", path: name.into(), source: e.into() },
        })
    }

    /// Which of the mounts it is that can't.
    fn culprit(&self, path: &Path, recursive: bool) -> IdmapError {
        let all = mounts::list().unwrap_or_default();
        let of = |path: &Path| {
            all.iter().filter(|m| path.starts_with(&m.target)).max_by_key(|m| m.target.components().count())
        };
        let below = all.iter().map(|m| &m.target).filter(|t| recursive && t.starts_with(path) && *t != path);
        let unable = |p: &&PathBuf| self.try_mount(p, false).is_err();
        let root = path.to_path_buf();
        let found = [&root].into_iter().chain(below).find(unable).unwrap_or(&root);
        let fstype = of(found).map_or_else(|| "unknown".into(), |m| m.fstype.clone());
        IdmapError::Unsupported { path: found.display().to_string(), fstype }
    }
}

/// Moves a detached mount onto `target`, an existing folder below `at`.
pub(crate) fn attach(mount: OwnedFd, at: BorrowedFd<'_>, target: &str) -> Result<(), IdmapError> {
    rustix::mount::move_mount(&mount, "", at, target, rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| IdmapError::System { step: "attach the mount", path: target.into(), source: e.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::spec::IdMapping;
    use crate::integrations::mounts::tests::in_private_mounts;
    use std::os::unix::fs::{MetadataExt, chown};

    #[test]
    fn owners_are_mapped_and_a_file_system_that_can_not_is_named() {
        in_private_mounts(|dir| {
            let map = vec![IdMapping { host_id: 300_000, container_id: 0, length: 1000 }];
            let maps = Maps::new(&UserNamespace { uids: map.clone(), gids: map }).unwrap();
            let (from, to) = (dir.join("from"), dir.join("to"));
            std::fs::create_dir_all(from.join("below")).unwrap();
            std::fs::create_dir(&to).unwrap();
            chown(&from, Some(5), Some(0)).unwrap();
            let folder = File::open(dir).unwrap();
            let folder = std::os::fd::AsFd::as_fd(&folder);
            attach(maps.mount(&from, true).unwrap(), folder, "to").unwrap();
            let seen = std::fs::metadata(&to).unwrap();
            assert_eq!((seen.uid(), seen.gid()), (300_005, 300_000));

            // A proc below can't be mapped: without it all is well, with it it is named.
            rustix::mount::mount("p", from.join("below"), "proc", rustix::mount::MountFlags::empty(), None).unwrap();
            drop(maps.mount(&from, false).unwrap());
            match maps.mount(&from, true) {
                Err(IdmapError::Unsupported { path, fstype }) => {
                    assert_eq!((path.as_str(), fstype.as_str()), ("/mnt/from/below", "proc"));
                }
                other => panic!("{other:?}"),
            }
            let e = Error::from(maps.mount(&dir.join("gone"), true).unwrap_err());
            assert_eq!(e.kind(), Kind::InvalidArgument, "{e:?}");
        });
    }
}
