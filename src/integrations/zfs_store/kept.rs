//! zfs-fuse alone: its mounts stay attached below the store's `mnt` folder for as long as anybody may use them.
//!
//! The kernel tells zfs-fuse of closed files in the background, and of none any more once the last mount of a dataset has
//! gone. zfs-fuse waits for ever for files that were not closed, and meanwhile serves nobody. So the last mount must never go
//! by chance (with a killed container, a killed daemon): it is the one that is attached here, outlives all of them, and
//! is taken away by [`release`] when no other is left in any mount namespace and the kernel has told everything.
//!
//! Called by the store on blocking threads. Fails with the step. A crash leaves mounts attached: the next start goes on
//! with them.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use camino::Utf8Path;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, UnmountFlags, fsconfig_create, fsmount, fsopen,
    open_tree, unmount,
};

use super::mount::{MountError, failed};
use crate::fail_point;
use crate::integrations::mounts::{self, MountInfo};
use crate::integrations::zfs::{Dataset, Reason, ZfsError};

/// The mount exactly at `at`.
fn found(at: &Utf8Path) -> io::Result<Option<MountInfo>> {
    mounts::at(at.as_std_path()).map_err(io::Error::other)
}

/// Whether a dataset is attached at `at` and zfs-fuse serves it. What a zfs-fuse that has ended left there is taken away.
pub(super) fn attached(at: &Utf8Path) -> Result<bool, MountError> {
    let step = |step: &'static str| move |source| MountError::Kernel { name: at.to_string(), step, source };
    if found(at).map_err(step("looking for its mount"))?.is_none() {
        return Ok(false);
    }
    match rustix::fs::statvfs(at.as_std_path()) {
        Err(Errno::NOTCONN | Errno::CONNABORTED) => {
            mounts::unmount(at.as_std_path()).map_err(io::Error::other).map_err(step("taking a dead mount away"))?;
            Ok(false)
        }
        Err(e) => Err(failed(at.as_str(), "looking at it")(e)),
        Ok(_) => Ok(true),
    }
}

/// A detached copy of what is attached at `at`.
pub(super) fn copy(name: &str, at: &Utf8Path) -> Result<OwnedFd, MountError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, at.as_std_path(), flags).map_err(failed(name, "open_tree"))
}

/// Takes the mount at `at` away, if there is one. Busy: somebody has or may have something of it open.
pub(super) fn release(dataset: &Dataset, at: &Utf8Path) -> Result<(), ZfsError> {
    let refused = |reason, message: String| ZfsError::Failed { what: format!("unmount {dataset}"), reason, message };
    let broken = |step: &'static str| move |e: io::Error| refused(Reason::Other, format!("{step}: {e}"));
    let busy = |message: String| Err(refused(Reason::Busy, message));
    if !attached(at).map_err(|e| refused(Reason::Other, crate::core::error::Error::from(e).chain()))? {
        return Ok(());
    }
    let Some(mount) = found(at).map_err(broken("looking for its mount"))? else { return Ok(()) };
    fail_point!("zfs.release.before");
    if let Some(who) = user(&mount).map_err(broken("looking for other mounts of it"))? {
        return busy(format!("it is mounted elsewhere ({who})"));
    }
    let untold = untold(&mount.device).map_err(broken("asking what zfs-fuse was not told of"))?;
    if untold > 0 {
        return busy(format!("{untold} requests wait for zfs-fuse"));
    }
    // Not detached: it fails when a file is open.
    match unmount(at.as_std_path(), UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => return busy("a file of it is open".into()),
        done => done.map_err(|e| broken("umount")(e.into()))?,
    }
    fail_point!("zfs.release.unmounted");
    let _ = std::fs::remove_dir(at.as_std_path());
    Ok(())
}

/// Who has another mount of the same file system, or may have one: "process 7". Copies that follow ours are none: they go
/// with it.
fn user(mount: &MountInfo) -> io::Result<Option<String>> {
    let own = std::fs::read_link("/proc/thread-self/ns/mnt")?;
    let other = |m: &MountInfo| m.device == mount.device && m.target != mount.target;
    if mounts::list().map_err(io::Error::other)?.iter().any(other) {
        return Ok(Some("in this mount namespace".into()));
    }
    let mut seen = std::collections::HashSet::from([own]);
    for entry in std::fs::read_dir("/proc")?.flatten() {
        if !entry.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let who = format!("process {}", entry.file_name().to_string_lossy());
        match look(&entry.path(), &mut seen, mount) {
            Seen::Nothing => {}
            Seen::Mount => return Ok(Some(who)),
            // Its first thread has ended, or all of it is about to.
            Seen::Unknown => {
                let Ok(threads) = std::fs::read_dir(entry.path().join("task")) else { continue };
                for thread in threads.flatten() {
                    if !matches!(look(&thread.path(), &mut seen, mount), Seen::Nothing) {
                        return Ok(Some(who));
                    }
                }
            }
        }
    }
    Ok(None)
}

enum Seen {
    Nothing,
    Mount,
    Unknown,
}

/// Looks at the mounts of one process or thread (`/proc/<pid>`), unless somebody with the same has been looked at.
fn look(process: &Path, seen: &mut std::collections::HashSet<std::path::PathBuf>, mount: &MountInfo) -> Seen {
    let namespace = match std::fs::read_link(process.join("ns/mnt")) {
        Ok(namespace) => Some(namespace),
        // Its namespace is a secret (of a process with more rights than ours), its mounts are not.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => None,
        // A process that ends gives its namespaces up before its files; when it is a zombie both are gone.
        Err(_) => {
            return match state(process) {
                None | Some(b'Z' | b'X') if process.parent().is_some_and(|p| p.ends_with("task")) => Seen::Nothing,
                None => Seen::Nothing,
                Some(_) => Seen::Unknown,
            };
        }
    };
    if namespace.as_ref().is_some_and(|n| seen.contains(n)) {
        return Seen::Nothing;
    }
    let Ok(text) = std::fs::read(process.join("mountinfo")) else { return Seen::Unknown };
    // Ids of mounts are the same in whatever namespace: one with ours lives where we do.
    let follows = |m: &MountInfo| m.id == mount.id || m.target == mount.target && (m.shared || m.slave);
    if mounts::parse(&text).iter().any(|m| m.device == mount.device && !follows(m)) {
        return Seen::Mount;
    }
    seen.extend(namespace);
    Seen::Nothing
}

/// State letter of a process or thread; None: it is gone.
fn state(process: &Path) -> Option<u8> {
    let text = std::fs::read(process.join("stat")).ok()?;
    // Its name, in parentheses, may hold anything.
    let end = text.iter().rposition(|b| *b == b')')?;
    text.get(end + 2).copied()
}

/// Requests that the kernel has not had answered, closed files among them. `device` is "0:45".
fn untold(device: &str) -> io::Result<u64> {
    let Some((_, minor)) = device.split_once(':') else { return Err(io::Error::other("not a device's number")) };
    let fs = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&fs)?;
    let control = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    let path = Path::new(OsStr::new(minor)).join("waiting");
    let file = match rustix::fs::openat(&control, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(0),
        file => file?,
    };
    let text = io::read_to_string(std::fs::File::from(file))?;
    text.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_of_processes() {
        assert!(matches!(state(Path::new("/proc/thread-self")), Some(b'R' | b'S' | b'D')));
        assert_eq!(state(Path::new("/proc/0")), None);
    }

    #[test]
    fn a_mount_is_found_wherever_it_is() {
        crate::integrations::mounts::tests::in_private_mounts(|dir| {
            let (one, two) = (dir.join("one"), dir.join("two"));
            for folder in [&one, &two] {
                std::fs::create_dir(folder).unwrap();
            }
            rustix::mount::mount("t", &one, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
            let mount = mounts::at(&one).unwrap().unwrap();
            assert_eq!(user(&mount).unwrap(), None);
            rustix::mount::mount_bind(&one, &two).unwrap();
            assert!(user(&mount).unwrap().unwrap().contains("this"));
            rustix::mount::unmount(&two, UnmountFlags::DETACH).unwrap();
            // Ours is no other's, wherever it is met.
            let met = look(Path::new("/proc/thread-self"), &mut std::collections::HashSet::new(), &mount);
            assert!(matches!(met, Seen::Nothing));
            // In another namespace, as a container has it.
            let (told, wait) = std::sync::mpsc::channel();
            let (go, end) = std::sync::mpsc::channel::<()>();
            let other = std::thread::spawn(move || {
                crate::integrations::netns::unshare_thread(rustix::thread::UnshareFlags::NEWNS).unwrap();
                told.send(()).unwrap();
                let _ = end.recv();
            });
            wait.recv().unwrap();
            // It is a thread of this process, whose first one does not have it: seen by its own entry.
            let thread = std::fs::read_dir("/proc/self/task").unwrap().flatten().any(|t| {
                let mut seen =
                    std::collections::HashSet::from([std::fs::read_link("/proc/thread-self/ns/mnt").unwrap()]);
                matches!(look(&t.path(), &mut seen, &mount), Seen::Mount)
            });
            assert!(thread);
            drop(go);
            other.join().unwrap();
        });
    }
}
