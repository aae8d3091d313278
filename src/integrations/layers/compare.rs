//! Whether two trees of files are the same: kinds, owners, modes, times of change, extended attributes, contents.
//!
//! Called after an image was moved from one store to another, blocking, on trees that nobody changes. Links are not followed. What
//! overlayfs says of itself in attributes is not compared, nor numbers of links, which it counts in its own way, nor the root
//! folder's time of change, which unpacking a layer does not keep, nor parts of seconds where the second one's file system has
//! none. Fails with the I/O error of what can't be read.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Bytes of two files that are compared at a time.
const PIECE: usize = 128 << 10;

/// The first path that differs, and in what; None: the trees are the same.
pub fn difference(one: &Path, other: &Path) -> io::Result<Option<(PathBuf, &'static str)>> {
    let fine = keeps_nanoseconds(other)?;
    let mut todo = vec![PathBuf::new()];
    let mut buffers = (vec![0; PIECE], vec![0; PIECE]);
    while let Some(path) = todo.pop() {
        let (a, b) = (one.join(&path), other.join(&path));
        // The roots are descriptors' names, which are links.
        let meta = |at: &Path| if path.as_os_str().is_empty() { at.metadata() } else { at.symlink_metadata() };
        let (was, is) = (meta(&a)?, meta(&b)?);
        if let Some(what) = attributes(&was, &is, path.as_os_str().is_empty(), fine).or(xattrs_differ(&a, &b)?) {
            return Ok(Some((path, what)));
        }
        let kind = was.file_type();
        if kind.is_symlink() && a.read_link()? != b.read_link()? {
            return Ok(Some((path, "target")));
        }
        if kind.is_file() && !same_content(&a, &b, &mut buffers)? {
            return Ok(Some((path, "content")));
        }
        if kind.is_dir() {
            let (names, others) = (names(&a)?, names(&b)?);
            if names != others {
                let odd = names.symmetric_difference(&others).next().map(|n| path.join(n));
                return Ok(Some((odd.unwrap_or(path), "presence")));
            }
            todo.extend(names.into_iter().map(|n| path.join(n)));
        }
    }
    Ok(None)
}

/// Whether the file system keeps more of a time than its seconds, found out on the root folder, whose times are as before
/// afterwards: zfs-fuse does not, and nothing that is written there can have more.
fn keeps_nanoseconds(root: &Path) -> io::Result<bool> {
    let folder = File::open(root)?;
    let was = rustix::fs::fstat(&folder)?;
    let set = |last_modification| {
        let last_access = rustix::fs::Timespec { tv_sec: was.st_atime, tv_nsec: was.st_atime_nsec as _ };
        rustix::fs::futimens(folder.as_fd(), &rustix::fs::Timestamps { last_access, last_modification })
    };
    set(rustix::fs::Timespec { tv_sec: 1, tv_nsec: 999_999_937 })?;
    let kept = rustix::fs::fstat(&folder)?.st_mtime_nsec == 999_999_937;
    set(rustix::fs::Timespec { tv_sec: was.st_mtime, tv_nsec: was.st_mtime_nsec as _ })?;
    Ok(kept)
}

fn same_time(a: &Metadata, b: &Metadata, fine: bool) -> bool {
    a.mtime() == b.mtime() && (a.mtime_nsec() == b.mtime_nsec() || !fine)
}

fn attributes(a: &Metadata, b: &Metadata, root: bool, fine: bool) -> Option<&'static str> {
    let kind = |m: &Metadata| m.mode() & libc::S_IFMT;
    let device = |m: &Metadata| m.file_type().is_char_device() || m.file_type().is_block_device();
    let sized = |m: &Metadata| m.is_file() || m.is_symlink();
    [
        (kind(a) == kind(b), "kind"),
        (a.mode() == b.mode(), "mode"),
        ((a.uid(), a.gid()) == (b.uid(), b.gid()), "owner"),
        // The root's is of when it was unpacked.
        (root || same_time(a, b, fine), "time of change"),
        (!device(a) || a.rdev() == b.rdev(), "device"),
        (!sized(a) || a.len() == b.len(), "size"),
    ]
    .into_iter()
    .find_map(|(same, what)| (!same).then_some(what))
}

fn names(folder: &Path) -> io::Result<std::collections::BTreeSet<OsString>> {
    folder.read_dir()?.map(|entry| Ok(entry?.file_name())).collect()
}

type Attributes = BTreeMap<OsString, Option<Vec<u8>>>;

/// None: the file system has none.
fn xattrs(path: &Path) -> io::Result<Option<Attributes>> {
    let names = match xattr::list(path) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(None),
        names => names?,
    };
    let ours = names.filter(|n| !n.as_bytes().starts_with(b"trusted.overlay."));
    ours.map(|name| Ok((name.clone(), xattr::get(path, &name)?))).collect::<io::Result<Attributes>>().map(Some)
}

fn xattrs_differ(a: &Path, b: &Path) -> io::Result<Option<&'static str>> {
    // A file system without them loses them whoever writes the files.
    let (Some(a), Some(b)) = (xattrs(a)?, xattrs(b)?) else { return Ok(None) };
    Ok((a != b).then_some("extended attributes"))
}

fn same_content(a: &Path, b: &Path, buffers: &mut (Vec<u8>, Vec<u8>)) -> io::Result<bool> {
    let (mut a, mut b) = (File::open(a)?, File::open(b)?);
    loop {
        let n = a.read(&mut buffers.0)?;
        if n == 0 {
            return Ok(b.read(&mut buffers.1)? == 0);
        }
        match b.read_exact(&mut buffers.1[..n]) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            done => done?,
        }
        if buffers.0[..n] != buffers.1[..n] {
            return Ok(false);
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    #[test]
    fn every_difference_is_seen() {
        let temp = tempfile::tempdir().expect("a folder");
        let (a, b) = (temp.path().join("a"), temp.path().join("b"));
        let fill = |root: &Path| {
            std::fs::create_dir_all(root.join("d/e")).expect("folders");
            std::fs::write(root.join("d/file"), "content").expect("file");
            symlink("target", root.join("d/link")).expect("link");
            for name in ["d/file", "d/e", "d/link", "d", ""] {
                let time = rustix::fs::Timespec { tv_sec: 1, tv_nsec: 5 };
                let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
                let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(rustix::fs::CWD, root.join(name), &times, flags).expect("times");
            }
        };
        let differs = |change: &dyn Fn(&Path)| {
            let _ = std::fs::remove_dir_all(&a);
            let _ = std::fs::remove_dir_all(&b);
            fill(&a);
            fill(&b);
            change(&b);
            difference(&a, &b).expect("compared").map(|(path, what)| (path.display().to_string(), what))
        };
        assert_eq!(differs(&|_| ()), None);
        let keep_time = |path: &Path, change: &dyn Fn()| {
            let meta = path.metadata().expect("times");
            change();
            let time = rustix::fs::Timespec { tv_sec: meta.mtime(), tv_nsec: meta.mtime_nsec() };
            let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
            rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty()).expect("times");
        };
        let file = |root: &Path| root.join("d/file");
        let told = differs(&|r| keep_time(&file(r), &|| std::fs::write(file(r), "CONTENT").expect("written")));
        assert_eq!(told, Some(("d/file".into(), "content")));
        let told = differs(&|r| keep_time(&file(r), &|| std::fs::write(file(r), "more content").expect("written")));
        assert_eq!(told, Some(("d/file".into(), "size")));
        let mode = |r: &Path| std::fs::set_permissions(file(r), std::fs::Permissions::from_mode(0o4777)).expect("mode");
        assert_eq!(differs(&|r| mode(r)), Some(("d/file".into(), "mode")));
        assert_eq!(differs(&|r| chown(file(r), Some(1), None).expect("owner")), Some(("d/file".into(), "owner")));
        let told = differs(&|r| xattr::set(file(r), "trusted.x", b"y").expect("attribute"));
        assert_eq!(told, Some(("d/file".into(), "extended attributes")));
        let told = differs(&|r| keep_time(&r.join("d"), &|| std::fs::write(r.join("d/new"), "").expect("written")));
        assert_eq!(told, Some(("d/new".into(), "presence")));
        let told = differs(&|r| std::fs::write(r.join("d/new"), "").expect("written"));
        assert_eq!(told, Some(("d".into(), "time of change")));
    }
}
