//! Files and folders below one that is given, without following links.
//!
//! Called by all that takes names from the node, or works where containers do. Fails with the path and the system call.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

use proxmox_lxcri_monitor::failure::{Failure, Result};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

/// A name that is one component of a path.
pub fn component(name: &str) -> Result<&str> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(part)), None) if part == name && name.len() <= 200 => Ok(name),
        _ => Err(Failure::invalid(format!("{name:?}: not a name"))),
    }
}

/// A relative path without "..": its folder's components and its name.
pub fn relative(path: &str) -> Result<(Vec<&str>, &str)> {
    let mut parts: Vec<&str> = path.split('/').collect();
    for part in &parts {
        component(part)?;
    }
    let name = parts.pop().ok_or_else(|| Failure::invalid("an empty path"))?;
    Ok((parts, name))
}

/// Opens a folder by its absolute path, which is the agent's own.
pub fn folder(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Failure::errno(path.display(), e))
}

/// Opens what is directly in a folder, never through a link.
pub fn open(folder: impl AsFd, name: &str, flags: OFlags, mode: u32) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let mode = if flags.contains(OFlags::CREATE) { Mode::from_raw_mode(mode) } else { Mode::empty() };
    loop {
        match rustix::fs::openat2(&folder, name, flags | OFlags::CLOEXEC, mode, resolve) {
            // A rename beside it: the kernel asks to try again.
            Err(Errno::AGAIN | Errno::INTR) => {}
            done => return done,
        }
    }
}

/// Opens a folder in a folder; makes it if it is not there.
pub fn make_folder(above: impl AsFd, name: &str, mode: u32) -> Result<OwnedFd> {
    let failed = |e| Failure::errno(name, e);
    match rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(failed(e)),
    }
    open(above, name, OFlags::DIRECTORY | OFlags::RDONLY, 0).map_err(failed)
}

/// A file's owner and permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Writes a new file at `path` below `root`; folders above are made with `folder_mode`. What is there is replaced at once.
pub fn write(root: impl AsFd, path: &str, content: &[u8], access: Access, folder_mode: u32) -> Result<()> {
    let (folders, name) = relative(path)?;
    let mut folder = root.as_fd().try_clone_to_owned().map_err(|e| Failure::io(path, &e))?;
    for part in folders {
        folder = make_folder(&folder, part, folder_mode)?;
    }
    let failed = |e| Failure::errno(path, e);
    let new = format!(".{name}.new");
    match rustix::fs::unlinkat(&folder, new.as_str(), AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(e) => return Err(failed(e)),
    }
    let file = open(&folder, &new, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, 0o600).map_err(failed)?;
    let mut file = File::from(file);
    file.write_all(content).map_err(|e| Failure::io(path, &e))?;
    rustix::fs::fchown(&file, Some(Uid::from_raw(access.uid)), Some(Gid::from_raw(access.gid))).map_err(failed)?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(access.mode & 0o7777)).map_err(failed)?;
    rustix::fs::renameat(&folder, new.as_str(), &folder, name).map_err(failed)
}

/// Removes a file or a folder with all in it; one that is not there is no error. Links are removed, not followed.
pub fn remove(path: &Path) -> Result<()> {
    let failed = |e: &std::io::Error| Failure::io(path.display(), e);
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(failed(&e)),
        // The standard library's goes by descriptors and follows no link either.
        #[allow(clippy::disallowed_methods)]
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path).map_err(|e| failed(&e)),
        Ok(_) => std::fs::remove_file(path).map_err(|e| failed(&e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths() {
        for bad in ["", ".", "..", "a/b", "/", "a/", "/a"] {
            assert!(component(bad).is_err(), "{bad:?}");
        }
        assert_eq!(component("..data").expect("a name"), "..data");
        for bad in ["", "/a", "a//b", "a/../b", "a/", "./a"] {
            assert!(relative(bad).is_err(), "{bad:?}");
        }
        assert_eq!(relative("a/b/c").expect("a path"), (vec!["a", "b"], "c"));
    }

    #[test]
    fn no_link_is_followed() {
        let dir = tempfile::tempdir().expect("a folder");
        let root = folder(dir.path()).expect("opened");
        let access =
            Access { mode: 0o640, uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() };
        write(&root, "a/b/file", b"one", access, 0o700).expect("written");
        write(&root, "a/b/file", b"two", access, 0o700).expect("written again");
        assert_eq!(std::fs::read(dir.path().join("a/b/file")).expect("read"), b"two");
        std::fs::create_dir(dir.path().join("outside")).expect("a folder");
        std::os::unix::fs::symlink(dir.path().join("outside"), dir.path().join("a/link")).expect("a link");
        assert!(write(&root, "a/link/file", b"x", access, 0o700).is_err());
        // A file's own name may be a link: it is replaced.
        std::os::unix::fs::symlink(dir.path().join("outside/target"), dir.path().join("a/name")).expect("a link");
        write(&root, "a/name", b"x", access, 0o700).expect("written");
        assert_eq!(std::fs::read_dir(dir.path().join("outside")).expect("listed").count(), 0);
        remove(&dir.path().join("a")).expect("removed");
        remove(&dir.path().join("a")).expect("gone already");
        assert!(dir.path().join("outside").is_dir());
    }
}
