//! Attributes of mounts that are attached nowhere (mount_setattr(2)): id maps, and looking without following links.
//!
//! Called by `idmap` and by the root file systems' drivers. **Blocks**, as mounting does. Fails with errno. Mounts are
//! detached: they end with their descriptor, a crash leaves nothing.
#![allow(unsafe_code)] // mount_setattr(2), which rustix does not have

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

/// linux/mount.h: no symbolic link below the mount is followed, by nobody.
const NOSYMFOLLOW: u64 = 0x0020_0000;

/// A detached, read-only view of `folder` in which the kernel follows no symbolic link and opens no device: for readers
/// of a folder whose owner changes it meanwhile, and could put a link to anywhere in the place of a folder.
pub(crate) fn view(folder: &Path) -> Result<OwnedFd, Errno> {
    let tree = open_tree(CWD, folder, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    guard(&tree)?;
    Ok(tree)
}

/// Makes a detached mount such a view.
pub(crate) fn guard(tree: &OwnedFd) -> Result<(), Errno> {
    set(tree, NOSYMFOLLOW | libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV, None, false)
}

/// Sets attributes (`MOUNT_ATTR_*`) of a detached mount; `userns` goes with MOUNT_ATTR_IDMAP.
pub(crate) fn set(
    tree: &OwnedFd,
    attributes: u64,
    userns: Option<BorrowedFd<'_>>,
    recursive: bool,
) -> Result<(), Errno> {
    let attributes = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: 0,
        userns_fd: userns.map_or(0, |fd| fd.as_raw_fd().unsigned_abs().into()),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the descriptors are open, the path is a C string, and the structure is alive and as long as is said.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;
    use crate::integrations::mounts::tests::in_private_mounts;

    #[test]
    fn links_are_seen_and_not_followed() {
        in_private_mounts(|dir| {
            std::fs::create_dir_all(dir.join("in/folder")).unwrap();
            std::fs::create_dir(dir.join("out")).unwrap();
            std::fs::write(dir.join("out/secret"), "s").unwrap();
            std::fs::write(dir.join("in/folder/file"), "f").unwrap();
            std::os::unix::fs::symlink("../out", dir.join("in/link")).unwrap();
            let view = view(&dir.join("in")).unwrap();
            let at = |name: &str| Path::new("/proc/self/fd").join(view.as_raw_fd().to_string()).join(name);
            assert_eq!(std::fs::read(at("folder/file")).unwrap(), b"f");
            assert_eq!(std::fs::read_link(at("link")).unwrap(), Path::new("../out"));
            assert_eq!(std::fs::read(at("link/secret")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
            assert_eq!(std::fs::write(at("folder/new"), "").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        });
    }
}
