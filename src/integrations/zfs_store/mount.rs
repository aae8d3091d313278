//! Mounts of datasets that are attached nowhere: by fsopen(2) with the kernel's ZFS; with zfs-fuse, which can only mount
//! where others see it, a detached copy of that mount ([`kept`]).
//!
//! Called by the store on blocking threads (all but [`by_fuse`]). The descriptor is for move_mount(2). With the kernel's
//! ZFS the dataset is not mounted any more when its last copy is closed and nothing is attached. Fails with the step.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use camino::Utf8Path;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

use super::kept;
use crate::core::error::{Error, Kind};
use crate::fail_point;
use crate::integrations::zfs::{Dataset, Zfs, ZfsError};

/// Why there is no mount.
#[derive(Debug, thiserror::Error)]
pub(super) enum MountError {
    /// The kernel refused.
    #[error("mounting {name}: {step}")]
    Kernel {
        name: String,
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// zfs-fuse refused.
    #[error("mounting {name}")]
    Zfs {
        name: String,
        #[source]
        source: ZfsError,
    },
}

impl From<MountError> for Error {
    fn from(e: MountError) -> Self {
        let message = e.to_string();
        match e {
            MountError::Kernel { source, .. } => {
                let kind = match source.raw_os_error() {
                    Some(libc::EBUSY) => Kind::FailedPrecondition,
                    Some(libc::ENOENT) => Kind::NotFound,
                    Some(libc::EIO | libc::ENXIO | libc::EAGAIN) => Kind::Unavailable,
                    Some(code) => Error::io("", io::Error::from_raw_os_error(code)).kind(),
                    None => Kind::Internal,
                };
                Error::because(kind, message, source)
            }
            MountError::Zfs { source, .. } => Error::from(source).context(message),
        }
    }
}

pub(super) fn failed<'a>(name: &'a str, step: &'static str) -> impl Fn(Errno) -> MountError + 'a {
    move |e| MountError::Kernel { name: name.to_owned(), step, source: e.into() }
}

/// A dataset, or a snapshot read-only. `name` is of a type that was checked.
pub(super) fn by_kernel(name: &str, read_only: bool) -> Result<OwnedFd, MountError> {
    let fs = fsopen("zfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed(name, "fsopen"))?;
    fsconfig_set_string(&fs, "source", name).map_err(failed(name, "naming it"))?;
    if read_only {
        fsconfig_set_flag(&fs, "ro").map_err(failed(name, "making it read-only"))?;
    }
    fsconfig_create(&fs).map_err(failed(name, "creating it"))?;
    let flags = if read_only { MountAttrFlags::MOUNT_ATTR_RDONLY } else { MountAttrFlags::empty() };
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, flags).map_err(failed(name, "fsmount"))
}

/// The same of zfs-fuse: a copy of what is attached at `at`, the dataset's mountpoint property, and stays there.
pub(super) async fn by_fuse(zfs: &Zfs, dataset: &Dataset, at: &Utf8Path) -> Result<OwnedFd, MountError> {
    let (name, place) = (dataset.to_string(), at.to_owned());
    let attached = on_thread(dataset, move || kept::attached(&place)).await?;
    if !attached {
        let told = |source| MountError::Zfs { name: dataset.to_string(), source };
        zfs.mount(dataset).await.map_err(told)?;
    }
    fail_point!("zfs.mount.attached");
    let place = at.to_owned();
    let fd = on_thread(dataset, move || kept::copy(&name, &place)).await;
    fail_point!("zfs.mount.copied");
    fd
}

async fn on_thread<T: Send + 'static>(
    dataset: &Dataset,
    work: impl FnOnce() -> Result<T, MountError> + Send + 'static,
) -> Result<T, MountError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        Err(MountError::Kernel { name: dataset.to_string(), step: "the mounting thread", source: io::Error::other(e) })
    })
}

/// Objects (files, folders and so on) in the mounted dataset.
pub(super) fn objects(mount: BorrowedFd<'_>) -> io::Result<u64> {
    let stat = rustix::fs::fstatvfs(mount)?;
    Ok(stat.f_files.saturating_sub(stat.f_ffree))
}

/// What a mounted file system has room for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Space {
    /// Bytes that can still be written.
    pub left: u64,
    /// None at all, whatever is left.
    pub read_only: bool,
}

/// Of the file system mounted exactly at `folder`; None: nothing is.
pub(super) fn space(folder: &Utf8Path) -> io::Result<Option<Space>> {
    let above = folder.parent().unwrap_or(folder);
    if std::fs::metadata(folder).map(|m| dev(&m))? == std::fs::metadata(above).map(|m| dev(&m))? {
        return Ok(None);
    }
    let stat = rustix::fs::statvfs(folder.as_std_path())?;
    let read_only = stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY);
    Ok(Some(Space { left: stat.f_bavail.saturating_mul(stat.f_frsize), read_only }))
}

fn dev(meta: &std::fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::dev(meta)
}
