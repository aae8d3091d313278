//! Mounts of the host: a pod's /dev/shm, private folders, unmounting, and what is mounted where.
//!
//! Used by `netns` and by the backends. **Every function blocks** (mounting can wait for a disk): call them on a
//! blocking thread. Fails with [`MountError`], which names step and path. A crash leaves at most one mount too many;
//! all functions may be repeated, and [`below`] finds what is left.
//!
//! Everything reads the *calling thread's* mount table: a thread may have a mount namespace of its own.

use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::core::error::Error;

/// Size of a pod's /dev/shm in bytes, what every runtime gives it.
pub const SHM_BYTES: u64 = 64 << 20;
const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// A mount operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step} {path}")]
pub struct MountError {
    step: &'static str,
    path: String,
    source: io::Error,
}

impl MountError {
    fn new(step: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self { step, path: path.display().to_string(), source: source.into() }
    }
}

impl From<MountError> for Error {
    fn from(e: MountError) -> Self {
        Error::io(format!("{} {}", e.step, e.path), e.source)
    }
}

/// A line of mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// Unique among the mounts of now.
    pub id: u64,
    /// Mount that it is on.
    pub parent: u64,
    /// Device number of the file system ("0:45"): the same for all mounts of it.
    pub device: String,
    /// Folder of the file system that is the mount's root.
    pub root: PathBuf,
    /// Where it is mounted.
    pub target: PathBuf,
    /// It has a peer group: mounts below it travel to its peers.
    pub shared: bool,
    /// It receives mounts from a master.
    pub slave: bool,
    /// File system type ("tmpfs", "nsfs").
    pub fstype: String,
    /// What is mounted.
    pub source: OsString,
    /// Options of the mount itself ("rw,nosuid").
    pub options: String,
    /// Options of the file system ("rw,size=65536k").
    pub super_options: String,
}

/// All mounts of this thread's mount namespace, in mount order.
pub fn list() -> Result<Vec<MountInfo>, MountError> {
    let text = std::fs::read(MOUNTINFO).map_err(|e| MountError::new("read", Path::new(MOUNTINFO), e))?;
    Ok(parse(&text))
}

/// Mounts at `prefix` and below it, last mounted first: the order to unmount them in.
pub fn below(prefix: &Path) -> Result<Vec<MountInfo>, MountError> {
    let mut found: Vec<_> = list()?.into_iter().filter(|m| m.target.starts_with(prefix)).collect();
    found.reverse();
    Ok(found)
}

/// The uppermost mount exactly at `path`, if there is one. The path is taken as it is: no links are followed.
pub fn at(path: &Path) -> Result<Option<MountInfo>, MountError> {
    Ok(list()?.into_iter().rev().find(|m| m.target == path))
}

/// Whether something is mounted exactly at `path`.
pub fn is_mount_point(path: &Path) -> Result<bool, MountError> {
    Ok(at(path)?.is_some())
}

/// The lines of a mountinfo file.
pub(crate) fn parse(text: &[u8]) -> Vec<MountInfo> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

/// A line that does not parse is skipped: the kernel writes none, and a new field must not blind us.
fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|b| *b == b' ');
    let number = |f: Option<&[u8]>| std::str::from_utf8(f?).ok()?.parse().ok();
    let text = |f: Option<&[u8]>| Some(String::from_utf8_lossy(f?).into_owned());
    let id = number(fields.next())?;
    let parent = number(fields.next())?;
    let device = text(fields.next())?;
    let root = PathBuf::from(unescape(fields.next()?));
    let target = PathBuf::from(unescape(fields.next()?));
    let options = text(fields.next())?;
    let (mut shared, mut slave) = (false, false);
    loop {
        match fields.next()? {
            b"-" => break,
            f if f.starts_with(b"shared:") => shared = true,
            f if f.starts_with(b"master:") => slave = true,
            _ => {}
        }
    }
    let fstype = text(fields.next())?;
    let source = unescape(fields.next()?);
    let super_options = text(fields.next())?;
    Some(MountInfo { id, parent, device, root, target, shared, slave, fstype, source, options, super_options })
}

/// The kernel writes space, tab, newline, backslash and # as three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                out.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                rest = &tail[3..];
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

/// Mounts a tmpfs of `bytes` for /dev/shm at `path` (made if absent): nosuid, nodev, noexec, mode 1777, of user and group
/// `owner`. Repeatable.
pub fn mount_shm(path: &Path, bytes: u64, owner: (u32, u32)) -> Result<(), MountError> {
    make_folder(path, 0o755)?;
    if at(path)?.is_some_and(|m| m.fstype == "tmpfs") {
        return Ok(());
    }
    let options = CString::new(format!("mode=1777,size={bytes},uid={},gid={}", owner.0, owner.1))
        .map_err(|e| MountError::new("mount options for", path, io::Error::from(e)))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("shm", path, "tmpfs", flags, options.as_c_str())
        .map_err(|e| MountError::new("mount a tmpfs at", path, e))
}

/// Makes `path` (an existing folder) a mount of its own that exchanges no mounts with the rest of the host, so that
/// mounts below it stay out of every other namespace. Repeatable.
pub fn make_private(path: &Path) -> Result<(), MountError> {
    match at(path)? {
        Some(m) if !m.shared && !m.slave => return Ok(()),
        Some(_) => {}
        None => rustix::mount::mount_bind(path, path).map_err(|e| MountError::new("bind on itself", path, e))?,
    }
    rustix::mount::mount_change(path, MountPropagationFlags::PRIVATE)
        .map_err(|e| MountError::new("make private", path, e))
}

/// Makes `path` (a folder, made if absent) a shared mount, as iproute2 does with /run/netns: namespaces pinned in it
/// are seen in every mount namespace that follows the host. Repeatable, also beside a running `ip netns add`.
pub fn make_shared(path: &Path) -> Result<(), MountError> {
    make_folder(path, 0o755)?;
    let folder = std::fs::File::open(path).map_err(|e| MountError::new("open", path, e))?;
    // iproute2 holds the same lock: without it two starters would stack a bind mount each.
    rustix::fs::flock(&folder, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|e| MountError::new("lock", path, e))?;
    match at(path)? {
        Some(m) if m.shared => return Ok(()),
        Some(_) => {}
        None => {
            rustix::mount::mount_bind_recursive(path, path).map_err(|e| MountError::new("bind on itself", path, e))?
        }
    }
    rustix::mount::mount_change(path, MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .map_err(|e| MountError::new("make shared", path, e))
}

/// Detaches everything that is mounted at `path`, busy or not. Nothing mounted, or no such path, is success.
pub fn unmount(path: &Path) -> Result<(), MountError> {
    loop {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {} // there may be another one below
            Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            Err(e) => return Err(MountError::new("unmount", path, e)),
        }
    }
}

/// Bind-mounts the file or folder `source` on `target`.
pub(crate) fn bind(source: &Path, target: &Path) -> Result<(), MountError> {
    rustix::mount::mount_bind(source, target).map_err(|e| MountError::new("bind-mount on", target, e))
}

fn make_folder(path: &Path, mode: u32) -> Result<(), MountError> {
    if path.as_os_str().as_bytes().contains(&0) || !path.is_absolute() {
        return Err(MountError::new("use as a mount point", path, io::Error::from(io::ErrorKind::InvalidInput)));
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|e| MountError::new("create folder", path, e))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    /// Runs `body` in a thread with a private mount namespace and a tmpfs on `folder`: nothing it mounts outlives
    /// it, nothing reaches the host.
    pub(crate) fn in_private_mounts<T: Send + 'static>(body: impl FnOnce(&Path) -> T + Send + 'static) -> T {
        let thread = std::thread::spawn(move || {
            crate::integrations::netns::unshare_thread(rustix::thread::UnshareFlags::NEWNS).unwrap();
            rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            rustix::mount::mount("t", "/mnt", "tmpfs", MountFlags::empty(), None).unwrap();
            body(Path::new("/mnt"))
        });
        thread.join().unwrap()
    }

    #[test]
    fn parses_captured_lines() {
        let text = br"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
36 35 98:0 /mnt1 /a\040b\134\011c rw,noatime master:1 propagate_from:2 - zfs tank/a\040b rw,errors=continue
broken line
40 22 0:4 net:[4026532281] /run/netns/x rw shared:9 master:3 - nsfs nsfs rw
";
        let all = parse(text);
        assert_eq!(all.len(), 3);
        assert_eq!((all[0].device.as_str(), all[2].device.as_str()), ("254:0", "0:4"));
        assert!(all[0].shared && !all[0].slave && all[0].fstype == "ext4");
        assert_eq!(all[1].target, Path::new("/a b\\\tc"));
        assert_eq!((all[1].source.to_str(), all[1].slave), (Some("tank/a b"), true));
        assert_eq!((all[2].root.to_str(), all[2].shared && all[2].slave), (Some("net:[4026532281]"), true));
        assert_eq!(unescape(br"\04x\\040\999"), r"\04x\ \999");
    }

    #[test]
    fn shm_is_mounted_once_and_as_it_should_be() {
        in_private_mounts(|dir| {
            let path = dir.join("pod one/shm");
            mount_shm(&path, SHM_BYTES, (300_000, 300_001)).unwrap();
            mount_shm(&path, SHM_BYTES, (300_000, 300_001)).unwrap();
            let found = below(&path).unwrap();
            assert_eq!(found.len(), 1);
            assert!(["nosuid", "nodev", "noexec"].iter().all(|o| found[0].options.contains(o)), "{found:?}");
            assert!(found[0].super_options.contains("size=65536k"), "{found:?}");
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o1777);
            let meta = std::fs::metadata(&path).unwrap();
            assert_eq!((meta.uid(), meta.gid()), (300_000, 300_001));
            let _busy = std::fs::File::create(path.join("f")).unwrap();
            unmount(&path).unwrap();
            unmount(&path).unwrap();
            unmount(&dir.join("gone")).unwrap();
            assert!(!is_mount_point(&path).unwrap());
            assert!(mount_shm(Path::new("relative"), 1, (0, 0)).is_err());
        });
    }

    #[test]
    fn private_and_shared_folders() {
        in_private_mounts(|dir| {
            let (shared, private) = (dir.join("netns"), dir.join("rootfs"));
            make_shared(&shared).unwrap();
            make_shared(&shared).unwrap();
            assert_eq!(below(&shared).unwrap().len(), 1);
            assert!(at(&shared).unwrap().unwrap().shared);
            rustix::mount::mount_change(dir, MountPropagationFlags::SHARED).unwrap();
            std::fs::create_dir(&private).unwrap();
            make_private(&private).unwrap();
            make_private(&private).unwrap();
            let found = below(&private).unwrap();
            assert!(found.len() == 1 && !found[0].shared && !found[0].slave, "{found:?}");
            // A shared mount that is there already becomes private itself.
            make_private(&shared).unwrap();
            let found = below(&shared).unwrap();
            assert!(found.len() == 1 && !found[0].shared, "{found:?}");
        });
    }
}
