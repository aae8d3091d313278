//! Puts data and attributes of one layer entry onto the file system, in the order in which they survive each other.
//!
//! Called by the unpacker. Owner before mode (chown clears setuid), both before capabilities (chown drops those too).
//! Fails with the step's name and its I/O error; keeps no state.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{self, AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};

use super::tar::{Entry, Kind, TarReader, Time};
use super::unpack::UnpackError;

/// An attribute that can't be set; becomes an [`UnpackError`] with the entry's name.
pub(super) enum Failed {
    Io(&'static str, io::Error),
    Refused(&'static str),
}

impl Failed {
    pub(super) fn at(self, entry: &Entry) -> UnpackError {
        let name = entry.path.as_slice().into();
        match self {
            Self::Io(what, source) => UnpackError::Io { entry: name, what, source },
            Self::Refused(why) => UnpackError::Refused { entry: name, why },
        }
    }
}

fn owner(entry: &Entry) -> Result<(Uid, Gid), Failed> {
    // The largest number means "leave as it is" to chown.
    let id = |n: u64| u32::try_from(n).ok().filter(|n| *n != u32::MAX);
    match (id(entry.uid), id(entry.gid)) {
        (Some(uid), Some(gid)) => Ok((Uid::from_raw(uid), Gid::from_raw(gid))),
        _ => Err(Failed::Refused("its owner or group is no possible id")),
    }
}

/// Owner, mode and extended attributes of an open file or folder. The attributes that this process may not set are
/// given back.
pub(super) fn attributes_fd(fd: BorrowedFd<'_>, entry: &Entry) -> Result<Refused, Failed> {
    let (uid, gid) = owner(entry)?;
    fs::fchown(fd, Some(uid), Some(gid)).map_err(|e| Failed::Io("setting its owner", e.into()))?;
    fs::fchmod(fd, Mode::from_raw_mode(entry.mode)).map_err(|e| Failed::Io("setting its mode", e.into()))?;
    set_all(entry, |name, value| Ok(fs::fsetxattr(fd, name, value, XattrFlags::empty())?))
}

/// The same for a folder by its name in an open one.
pub(super) fn folder_attributes(parent: BorrowedFd<'_>, name: &CStr, entry: &Entry) -> Result<Refused, Failed> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = fs::openat(parent, name, flags, Mode::empty()).map_err(|e| Failed::Io("opening it", e.into()))?;
    attributes_fd(fd.as_fd(), entry)
}

/// Owner, mode, extended attributes and times of a link, device or FIFO just made, which can't be opened. `later`: its
/// extended attributes are given back, as this process has no way to such a node.
pub(super) fn node_attributes(
    parent: BorrowedFd<'_>,
    name: &CStr,
    entry: &Entry,
    later: bool,
) -> Result<Refused, Failed> {
    let (uid, gid) = owner(entry)?;
    fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| Failed::Io("setting its owner", e.into()))?;
    if entry.kind != Kind::Symlink {
        fs::chmodat(parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())
            .map_err(|e| Failed::Io("setting its mode", e.into()))?;
    }
    let refused = match later {
        true => allowed(entry)?.into_iter().map(|(key, value)| (key.to_vec(), value.to_vec())).collect(),
        false => set_all(entry, |key, value| set_xattr_at(parent, name, key, value))?,
    };
    fs::utimensat(parent, name, &timestamps(entry.atime, entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| Failed::Io("setting its times", e.into()))?;
    Ok(refused)
}

/// Access and modification time of an open file or folder; without an access time it is the modification's.
pub(super) fn times_fd(fd: BorrowedFd<'_>, atime: Option<Time>, mtime: Time) -> io::Result<()> {
    Ok(fs::futimens(fd, &timestamps(atime, mtime))?)
}

fn timestamps(atime: Option<Time>, mtime: Time) -> Timestamps {
    let spec = |(tv_sec, nanos): Time| Timespec { tv_sec, tv_nsec: nanos.into() };
    Timestamps { last_access: spec(atime.unwrap_or(mtime)), last_modification: spec(mtime) }
}

/// Names and values.
type Attributes<'a> = Vec<(&'a [u8], &'a [u8])>;
/// Names and values that could not be set for want of a capability.
pub(super) type Refused = Vec<(Vec<u8>, Vec<u8>)>;

/// What overlayfs keeps its own marks under.
pub(super) const OVERLAY: &[u8] = b"trusted.overlay.";

/// Attributes that layers may set: all but overlayfs's own, which would forge redirects and opaque folders.
fn allowed(entry: &Entry) -> Result<Attributes<'_>, Failed> {
    let mut list = Vec::new();
    for (name, value) in &entry.xattrs {
        if name.is_empty() || name.len() > 255 || name.contains(&0) {
            return Err(Failed::Refused("an extended attribute's name is empty, too long or holds a NUL"));
        }
        if !name.starts_with(OVERLAY) {
            list.push((name.as_slice(), value.as_slice()));
        }
    }
    Ok(list)
}

/// File systems without a kind of attribute lose it, as with other tools; what fails otherwise fails the layer.
fn set_all(entry: &Entry, set: impl Fn(&[u8], &[u8]) -> io::Result<()>) -> Result<Refused, Failed> {
    let mut refused = Vec::new();
    for (name, value) in allowed(entry)? {
        match set(name, value) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => refused.push((name.to_vec(), value.to_vec())),
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                tracing::debug!(attribute = %String::from_utf8_lossy(name), "extended attribute can't be set here");
            }
            done => done.map_err(|e| Failed::Io("setting an extended attribute", e))?,
        }
    }
    Ok(refused)
}

/// Sets an extended attribute of `name` in an open folder, which is not followed.
pub(super) fn set_xattr_at(
    parent: BorrowedFd<'_>,
    name: &CStr,
    key: impl rustix::path::Arg,
    value: &[u8],
) -> io::Result<()> {
    // There is no fsetxattrat before Linux 6.13: the folder is reached by its descriptor's name.
    let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    Ok(fs::lsetxattr(path, key, value, XattrFlags::empty())?)
}

/// Writes the entry's data, leaving holes where it is sparse.
pub(super) fn data<R: Read>(
    file: &File,
    reader: &mut TarReader<R>,
    entry: &Entry,
    buffer: &mut [u8],
) -> Result<(), UnpackError> {
    let io = |source| UnpackError::Io { entry: entry.path.as_slice().into(), what: "writing it", source };
    let whole = [(0, entry.size)];
    for (offset, length) in entry.runs.as_deref().unwrap_or(&whole) {
        let mut done = 0;
        while done < *length {
            let want = usize::try_from(length - done).unwrap_or(usize::MAX).min(buffer.len());
            let got = reader.read_data(&mut buffer[..want])?;
            if got == 0 {
                return Err(io(io::ErrorKind::UnexpectedEof.into()));
            }
            file.write_all_at(&buffer[..got], offset + done).map_err(io)?;
            done += got as u64;
        }
    }
    if entry.runs.is_some() {
        file.set_len(entry.real_size).map_err(io)?;
    }
    Ok(())
}
