//! Gives folders that a layer only implies the attributes that its parents' folders of that name have.
//!
//! A layer may hold `a/b/c` without entries for `a` and `a/b`. In an overlay the uppermost folder's owner and mode win,
//! so folders made up on the spot would change those below. Called by the store before a layer is committed. Fails with
//! the I/O error of the step; the layer is then discarded.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{self, AtFlags, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use crate::integrations::layers::unpack::Unpacked;
use crate::utils::beneath::Root;

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Copies attributes for the root, if it had no entry, and for all implied folders. `parents` is top first.
pub(super) fn attributes(layer: &Utf8Path, unpacked: &Unpacked, parents: &[Utf8PathBuf]) -> io::Result<()> {
    let root = Root::open(layer.as_std_path())?;
    if !unpacked.root_given
        && let Some(parent) = parents.first()
    {
        copy(Root::open(parent.as_std_path())?.as_fd(), root.as_fd())?;
    }
    if unpacked.implicit.is_empty() {
        return Ok(());
    }
    let parents = parents.iter().map(|p| Root::open(p.as_std_path())).collect::<io::Result<Vec<_>>>()?;
    for path in &unpacked.implicit {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        for parent in &parents {
            match fs::openat2(parent.as_fd(), path, FOLDER, Mode::empty(), resolve) {
                Ok(from) => {
                    let to = root.open_at(path, FOLDER, Mode::empty())?;
                    copy(from.as_fd(), to.as_fd())?;
                    break;
                }
                Err(Errno::NOENT) => {}
                // A file, link or whiteout: what is below it is hidden.
                Err(Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => break,
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

/// Copies owner, mode, extended attributes and times from one folder to another, both by path.
pub(super) fn folder(from: &Utf8Path, to: &Utf8Path) -> io::Result<()> {
    copy(Root::open(from.as_std_path())?.as_fd(), Root::open(to.as_std_path())?.as_fd())
}

fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let stat = fs::fstat(from)?;
    fs::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let mut names = Vec::with_capacity(64 << 10);
    match fs::flistxattr(from, rustix::buffer::spare_capacity(&mut names)) {
        Ok(_) | Err(Errno::NOTSUP) => {}
        Err(e) => return Err(e.into()),
    }
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty() && !n.starts_with(b"trusted.overlay.")) {
        let Ok(name) = CString::new(std::ffi::OsStr::from_bytes(name).as_bytes()) else { continue };
        let mut value = Vec::with_capacity(64 << 10);
        fs::fgetxattr(from, &name, rustix::buffer::spare_capacity(&mut value))?;
        fs::fsetxattr(to, &name, &value, XattrFlags::empty())?;
    }
    let spec = |tv_sec: i64, nanos: u64| Timespec { tv_sec, tv_nsec: i64::try_from(nanos).unwrap_or(0) };
    let times = Timestamps {
        last_access: spec(stat.st_atime, stat.st_atime_nsec),
        last_modification: spec(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(fs::utimensat(to, "", &times, AtFlags::EMPTY_PATH).or_else(|_| fs::futimens(to, &times))?)
}
