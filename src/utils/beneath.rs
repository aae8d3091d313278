//! Works inside a folder whose content is hostile: image layers and container root file systems.
//!
//! Called by the unpacker, the overlay store and by backends that read a container's files. Every path is resolved
//! by the kernel as if the folder were `/` (openat2 with RESOLVE_IN_ROOT, and no magic links), so that no symbolic
//! link, `..` or absolute path leads out. Fails with the plain I/O error of the step; a crash in the middle of a
//! removal leaves a smaller tree that can be removed again.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Symbolic links followed while making a folder's parents, as the kernel's own limit.
const MAX_LINKS: usize = 40;
/// Folders kept open at once while removing a tree; deeper ones are moved up first.
const MAX_OPEN: usize = 128;
/// Names read from a folder before they are acted on.
const BATCH: usize = 1024;

/// A folder that paths can't leave.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

impl Root {
    /// Opens `path` (followed as usual) as a root.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { fd: fs::open(path, flags, Mode::empty())? })
    }

    /// Takes an open folder as a root.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// The folder itself.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Opens `path` inside the root, following links inside it.
    pub fn open_at(&self, path: impl AsRef<Path>, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let path = path.as_ref();
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        loop {
            match fs::openat2(&self.fd, path, flags | OFlags::CLOEXEC, mode, resolve) {
                // A rename elsewhere raced with "..": the kernel asks to try again.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(e.into()),
                Ok(fd) => return Ok(fd),
            }
        }
    }

    /// Opens a folder inside the root, for use as the base of `*at` calls.
    pub fn open_dir(&self, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
        self.open_at(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
    }

    /// Opens the folder that holds `path`'s last name, and gives that name. The last name is not resolved: it may be a
    /// link. `path` must end in a normal name.
    pub fn open_parent(&self, path: &Path) -> io::Result<(OwnedFd, CString)> {
        let name = last_name(path)?;
        Ok((self.open_dir(path.parent().unwrap_or(Path::new("")))?, name))
    }

    /// Path inside the root, without links, of the folder that `path` leads to: for a program that knows nothing of
    /// roots. It is worth as much as the promise that nobody changes the root's content.
    pub fn resolve_dir(&self, path: &Path) -> io::Result<PathBuf> {
        self.resolve_to(path, false, &|_| false)
    }

    /// As [`Root::resolve_dir`], of what may be no folder, or not be there: then links are followed as far as there are any, and
    /// not beyond a place that `covered` knows, by its path inside the root: the rest is added as it is.
    pub fn resolve_until(&self, path: &Path, covered: &dyn Fn(&Path) -> bool) -> io::Result<PathBuf> {
        self.resolve_to(path, true, covered)
    }

    fn resolve_to(&self, path: &Path, anything: bool, covered: &dyn Fn(&Path) -> bool) -> io::Result<PathBuf> {
        let parts = |path: &Path| path.components().map(|c| c.as_os_str().to_owned()).rev().collect::<Vec<_>>();
        let (mut pending, mut done, mut links) = (parts(path), PathBuf::new(), 0);
        while let Some(part) = pending.pop() {
            match part.as_bytes() {
                b"/" => done = PathBuf::new(),
                b"." => {}
                b".." => drop(done.pop()),
                _ => {
                    let next = done.join(&part);
                    if covered(&next) {
                        return Ok(pending.into_iter().rev().fold(next, |path, part| path.join(part)));
                    }
                    let fd = match self.open_at(&next, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()) {
                        Err(e) if anything && e.kind() == io::ErrorKind::NotFound => {
                            done = next;
                            continue;
                        }
                        opened => opened?,
                    };
                    match FileType::from_raw_mode(fs::fstat(&fd)?.st_mode) {
                        FileType::Directory => done = next,
                        FileType::Symlink if links < MAX_LINKS => {
                            links += 1;
                            let target = fs::readlinkat(&fd, "", Vec::new())?;
                            pending.extend(parts(Path::new(OsStr::from_bytes(target.as_bytes()))));
                        }
                        FileType::Symlink => return Err(Errno::LOOP.into()),
                        _ if anything && pending.is_empty() => done = next,
                        _ => return Err(Errno::NOTDIR.into()),
                    }
                }
            }
        }
        Ok(done)
    }

    /// Makes the folder `path` with its parents (mode `mode` less the umask), following links inside the root, even
    /// those that lead to what is not there yet. `made` hears of each new folder, parents first.
    pub fn mkdir_all(&self, path: &Path, mode: u32, made: &mut dyn FnMut(&Path)) -> io::Result<OwnedFd> {
        let mut path = path.to_path_buf();
        let mut links = 0;
        loop {
            match self.open_dir(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                done => return done,
            }
            // The shortest missing prefix is made, or, where it is a link to nowhere, replaced by what it names.
            let mut prefix = PathBuf::new();
            let mut missing = None;
            let mut parts = path.components();
            for part in parts.by_ref() {
                prefix.push(part);
                match self.open_dir(&prefix) {
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {
                        missing = Some(self.open_parent(&prefix)?);
                        break;
                    }
                    Err(e) => return Err(e),
                }
            }
            let Some((parent, name)) = missing else { continue };
            match fs::mkdirat(&parent, &name, Mode::from_raw_mode(mode)) {
                Ok(()) => made(&prefix),
                Err(Errno::EXIST) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    // Anything but a link here appeared this moment; readlinkat then fails with EINVAL.
                    let target = fs::readlinkat(&parent, &name, Vec::new())?;
                    let mut next = prefix.parent().unwrap_or(Path::new("")).join(OsStr::from_bytes(target.as_bytes()));
                    next.push(parts.as_path());
                    path = next.strip_prefix("/").map(Path::to_path_buf).unwrap_or(next);
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Opens the folder `path`, making what is missing of it (mode `mode` less the umask), and follows no link on the way:
    /// one is an error (ELOOP), wherever it leads.
    pub fn folder_without_links(&self, path: &Path, mode: u32) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut folder = self.open_dir(".")?;
        for part in path.components() {
            let std::path::Component::Normal(name) = part else { return Err(Errno::INVAL.into()) };
            let made = match fs::openat(&folder, name, flags, Mode::empty()) {
                Err(Errno::NOENT) => match fs::mkdirat(&folder, name, Mode::from_raw_mode(mode)) {
                    Ok(()) | Err(Errno::EXIST) => fs::openat(&folder, name, flags, Mode::empty()),
                    Err(e) => Err(e),
                },
                opened => opened,
            };
            folder = made.map_err(|e| match e {
                // What open says of a link depends on what else was asked for.
                Errno::NOTDIR if is_link(&folder, name) => Errno::LOOP,
                e => e,
            })?;
        }
        Ok(folder)
    }

    /// Makes a place to mount on, a folder or an empty file, with the folders on the way; one that is there is success.
    pub fn make_point(&self, path: &str, folder: bool) -> io::Result<()> {
        let path = Path::new(path);
        if folder {
            return self.mkdir_all(path, 0o755, &mut |_| {}).map(drop);
        }
        if let Some(parent) = path.parent() {
            self.mkdir_all(parent, 0o755, &mut |_| {})?;
        }
        match self.create_file(path, 0o644) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map(drop),
        }
    }

    /// Makes a new regular file; fails if anything of that name is there, a link included.
    pub fn create_file(&self, path: &Path, mode: u32) -> io::Result<File> {
        let (parent, name) = self.open_parent(path)?;
        create_file_at(parent.as_fd(), &name, mode)
    }

    /// Makes a symbolic link that holds `target` as it is.
    pub fn symlink(&self, target: &OsStr, path: &Path) -> io::Result<()> {
        let (parent, name) = self.open_parent(path)?;
        Ok(fs::symlinkat(target, parent, &name)?)
    }

    /// Makes `new` another name of `existing`; where that is a symbolic link, of the link itself.
    pub fn link(&self, existing: &Path, new: &Path) -> io::Result<()> {
        let (from, from_name) = self.open_parent(existing)?;
        let (to, to_name) = self.open_parent(new)?;
        Ok(fs::linkat(from, &from_name, to, &to_name, AtFlags::empty())?)
    }

    /// Makes a device node, FIFO or socket.
    pub fn mknod(&self, path: &Path, kind: FileType, mode: u32, device: u64) -> io::Result<()> {
        let (parent, name) = self.open_parent(path)?;
        Ok(fs::mknodat(parent, &name, kind, Mode::from_raw_mode(mode), device)?)
    }

    /// Removes `path` with everything below it; a link is removed and not followed. Not there is success.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        match self.open_parent(path) {
            Ok((parent, name)) => remove_at(parent.as_fd(), &name),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Reads a regular file of at most `max` bytes, following links inside the root.
    pub fn read_file(&self, path: impl AsRef<Path>, max: u64) -> io::Result<Vec<u8>> {
        // Looked at before it is opened: opening a FIFO waits, and opening a device does whatever that device does.
        let found = self.open_at(path, OFlags::PATH, Mode::empty())?;
        let stat = fs::fstat(&found)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = fs::open(format!("/proc/self/fd/{}", found.as_raw_fd()), flags, Mode::empty())?;
        let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {max} bytes"));
        if u64::try_from(stat.st_size).unwrap_or(u64::MAX) > max {
            return Err(too_large());
        }
        let mut data = Vec::new();
        File::from(fd).take(max.saturating_add(1)).read_to_end(&mut data)?;
        if data.len() as u64 > max { Err(too_large()) } else { Ok(data) }
    }
}

/// Reads the file `path` inside the folder `root`, at most `max` bytes: /etc/passwd of a container, for instance.
pub fn read_file(root: &Path, path: &Path, max: u64) -> io::Result<Vec<u8>> {
    Root::open(root)?.read_file(path, max)
}

/// Makes a new regular file in an open folder; see [`Root::create_file`].
pub fn create_file_at(parent: BorrowedFd<'_>, name: &CStr, mode: u32) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(fs::openat(parent, name, flags, Mode::from_raw_mode(mode))?.into())
}

fn is_link(folder: &OwnedFd, name: &OsStr) -> bool {
    let stat = fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW);
    stat.is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Symlink)
}

/// The last name of `path` as the kernel wants it; `.`, `..` and nothing are refused.
fn last_name(path: &Path) -> io::Result<CString> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    CString::new(name.as_bytes()).map_err(|_| Errno::INVAL.into())
}

/// Removes the file or folder at `path` with everything below it, never following a link (`path`'s own parents are
/// followed as usual). Not there is success.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let name = last_name(path)?;
    let parent = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    match Root::open(parent) {
        Ok(parent) => remove_at(parent.as_fd(), &name),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

struct Frame {
    fd: OwnedFd,
    name: CString,
    folders: Vec<CString>,
}

fn open_frame(parent: BorrowedFd<'_>, name: CString) -> io::Result<Option<Frame>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match fs::openat(parent, &name, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(Frame { fd, name, folders: Vec::new() })),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Removes `name` in an open folder with everything below it, following nothing. Not there is success.
///
/// Needs a bounded number of descriptors and no stack however deep the tree is.
pub fn remove_at(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    let Some(top) = open_frame(parent, name.to_owned())? else { return Ok(()) };
    let mut stack = vec![top];
    let mut moved = 0_u64;
    while let Some(mut frame) = stack.pop() {
        if let Some(name) = frame.folders.pop() {
            let child = open_frame(frame.fd.as_fd(), name)?;
            stack.push(frame);
            stack.extend(child);
            continue;
        }
        let found = scan(&mut frame)?;
        if !frame.folders.is_empty() && stack.len() >= MAX_OPEN {
            let top = &stack[0];
            for name in frame.folders.drain(..) {
                moved += 1;
                let up = CString::new(format!(".deep-{}-{moved}", std::process::id())).map_err(io::Error::other)?;
                fs::renameat(&frame.fd, &name, &top.fd, &up)?;
            }
        }
        if found {
            stack.push(frame);
            continue;
        }
        let above = stack.last().map_or(parent, |f| f.fd.as_fd());
        match fs::unlinkat(above, &frame.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Unlinks what is no folder among the next names, lists the folders, and tells whether there was anything.
fn scan(frame: &mut Frame) -> io::Result<bool> {
    let mut names = Vec::new();
    for entry in Dir::read_from(&frame.fd)?.take(BATCH) {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    let found = !names.is_empty();
    for (name, kind) in names {
        if kind == FileType::Directory {
            frame.folders.push(name);
            continue;
        }
        match fs::unlinkat(&frame.fd, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => frame.folders.push(name),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn tree() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(dir.path().join("root")).expect("mkdir");
        std::fs::create_dir(dir.path().join("outside")).expect("mkdir");
        std::fs::File::create(dir.path().join("outside/secret")).expect("create");
        let root = Root::open(&dir.path().join("root")).expect("open");
        (dir, root)
    }

    #[test]
    fn links_never_lead_out() {
        let (dir, root) = tree();
        let r = dir.path().join("root");
        symlink(dir.path().join("outside"), r.join("abs")).expect("symlink");
        symlink("../../../../..", r.join("up")).expect("symlink");
        symlink("/proc/self/root", r.join("magic")).expect("symlink");
        assert!(root.read_file("abs/secret", 10).is_err());
        assert!(root.read_file("../outside/secret", 10).is_err());
        assert!(root.open_dir("magic/etc").is_err());
        let up = root.open_dir("up").expect("up is the root itself");
        assert_eq!(fs::fstat(up).expect("stat").st_ino, fs::fstat(root.as_fd()).expect("stat").st_ino);
        root.create_file(Path::new("up/new"), 0o600).expect("create");
        assert!(r.join("new").try_exists().expect("exists"));
    }

    #[test]
    fn folders_are_made_where_dangling_links_point_inside() {
        let (dir, root) = tree();
        let r = dir.path().join("root");
        symlink("/a/b", r.join("link")).expect("symlink");
        symlink(dir.path().join("outside/x"), r.join("evil")).expect("symlink");
        symlink("loop", r.join("loop")).expect("symlink");
        let mut made = Vec::new();
        root.mkdir_all(Path::new("link/c"), 0o755, &mut |p| made.push(p.to_path_buf())).expect("mkdir");
        assert!(r.join("a/b/c").is_dir());
        assert_eq!(made.last().expect("made"), Path::new("a/b/c"));
        root.mkdir_all(Path::new("evil/y"), 0o755, &mut |_| {}).expect("mkdir");
        assert!(!dir.path().join("outside/x").try_exists().expect("exists"));
        assert!(root.mkdir_all(Path::new("loop/x"), 0o755, &mut |_| {}).is_err());
    }

    #[test]
    fn what_is_covered_is_not_followed() {
        let (dir, root) = tree();
        let r = dir.path().join("root");
        std::fs::create_dir(r.join("v")).expect("mkdir");
        symlink("/elsewhere", r.join("v/link")).expect("symlink");
        symlink("v/link", r.join("to")).expect("symlink");
        let until = |path: &str| root.resolve_until(Path::new(path), &|p| p == Path::new("v")).expect("resolved");
        for path in ["/v/link/f", "/to/f", "/./to/f"] {
            assert_eq!(until(path), Path::new("v/link/f"), "{path}");
        }
        assert_eq!(until("/v"), Path::new("v"));
        assert_eq!(root.resolve_until(Path::new("/to/f"), &|_| false).expect("resolved"), Path::new("elsewhere/f"));
    }

    #[test]
    fn folders_without_links_follow_none() {
        let (dir, root) = tree();
        let r = dir.path().join("root");
        symlink("real", r.join("inside")).expect("symlink");
        symlink(dir.path().join("outside"), r.join("out")).expect("symlink");
        let fd = root.folder_without_links(Path::new("real/sub"), 0o755).expect("made");
        assert_eq!(fs::fstat(fd).expect("stat").st_ino, fs::stat(r.join("real/sub")).expect("stat").st_ino);
        for bad in ["inside/x", "out", "out/x", "real/../y", "/z"] {
            assert!(root.folder_without_links(Path::new(bad), 0o755).is_err(), "{bad}");
        }
        let e = root.folder_without_links(Path::new("inside"), 0o755).expect_err("a link");
        assert_eq!(e.raw_os_error(), Some(libc::ELOOP));
        assert!(!dir.path().join("outside/x").try_exists().expect("exists"));
    }

    #[test]
    fn reads_only_regular_files_within_their_limit() {
        let (dir, root) = tree();
        std::fs::copy("/etc/hostname", dir.path().join("root/f")).expect("copy");
        root.mknod(Path::new("fifo"), FileType::Fifo, 0o600, 0).expect("mkfifo");
        assert!(root.read_file("f", 1 << 20).is_ok());
        assert!(root.read_file("f", 0).is_err());
        assert!(root.read_file("fifo", 10).is_err());
        assert!(root.read_file(".", 10).is_err());
        assert_eq!(root.read_file("none", 10).expect_err("none").kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn removes_trees_without_following() {
        let (dir, root) = tree();
        let r = dir.path().join("root");
        root.mkdir_all(Path::new("a/b/c"), 0o755, &mut |_| {}).expect("mkdir");
        symlink(dir.path().join("outside"), r.join("a/b/out")).expect("symlink");
        symlink(dir.path().join("outside"), r.join("link")).expect("symlink");
        for n in 0..(BATCH * 2 + 7) {
            std::fs::File::create(r.join(format!("a/f{n}"))).expect("create");
        }
        root.remove(Path::new("a")).expect("remove");
        root.remove(Path::new("link")).expect("remove");
        root.remove(Path::new("none/x")).expect("remove");
        assert_eq!(std::fs::read_dir(&r).expect("list").count(), 0);
        assert!(dir.path().join("outside/secret").try_exists().expect("exists"));
        remove_tree(&r).expect("remove");
        remove_tree(&r).expect("again");
    }

    #[test]
    fn removes_trees_deeper_than_any_path() {
        let (dir, root) = tree();
        let mut at = root.open_dir(".").expect("open");
        for _ in 0..1500 {
            fs::mkdirat(&at, "0123456789", Mode::RWXU).expect("mkdir");
            at = fs::openat(&at, "0123456789", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("open");
        }
        root.remove(Path::new("0123456789")).expect("remove");
        assert_eq!(std::fs::read_dir(dir.path().join("root")).expect("list").count(), 0);
    }
}
