//! Puts a container's root file system and volumes where its runtime looks for them, for as long as `create` runs.
//!
//! Called by the server. The folder is in a private mount, so that nothing of this is seen outside this monitor.
//! Fails with the system call; a crash takes the mount with it, since the mount namespace is the monitor's own.

use std::os::fd::OwnedFd;

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, UnmountFlags};

use crate::failure::{Failure, Result};

/// Moves a detached mount onto `folder`.
pub fn attach(mount: OwnedFd, folder: &str) -> Result<()> {
    rustix::mount::move_mount(mount, "", CWD, folder, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| Failure::errno(format_args!("move a container's mount onto {folder}"), e))
}

/// Takes it away from here; the container has its own.
pub fn detach(folder: &str) {
    let _ = rustix::mount::unmount(folder, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
}
