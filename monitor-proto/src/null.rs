//! A null device of one's own, for what a container's program has in place of a stream.
//!
//! Used by the monitor and by the helper of the handler lxc. Mode and owner of what a program has as a stream are its root's to
//! change, and OCI runtimes and liblxc change them unasked: with the node's /dev/null that would be every program's on the node.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Gid, Mode, OFlags, Uid, fchmod, fchown, makedev, mknodat, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

/// A new character device like /dev/null, mode 0666, open for reading and writing, on a file system that is mounted nowhere and goes
/// with its last descriptor. Fails with the system call; needs CAP_SYS_ADMIN and CAP_MKNOD.
pub fn own_null() -> rustix::io::Result<OwnedFd> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "size", "4k")?;
    fsconfig_create(&fs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let folder = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let mode = Mode::from_raw_mode(0o666);
    mknodat(&folder, "null", FileType::CharacterDevice, mode, makedev(1, 3))?;
    let null = openat(&folder, "null", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())?;
    // Whatever the umask.
    fchmod(&null, mode)?;
    Ok(null)
}

/// Gives mode and owner back to one that a program has had.
pub fn renew(null: &OwnedFd) -> rustix::io::Result<()> {
    fchown(null, Some(Uid::ROOT), Some(Gid::ROOT))?;
    fchmod(null, Mode::from_raw_mode(0o666))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_has_it() {
        if !rustix::process::geteuid().is_root() {
            println!("not run: device nodes are root's to make");
            return;
        }
        let (one, other) = (own_null().expect("a device"), own_null().expect("a device"));
        assert_eq!(rustix::io::write(&one, b"gone").expect("written"), 4);
        assert_eq!(rustix::io::read(&one, &mut [0; 8]).expect("read"), 0);
        fchmod(&one, Mode::RUSR).expect("its mode is changed");
        let node = rustix::fs::stat("/dev/null").expect("the node's");
        let other = rustix::fs::fstat(&other).expect("the other");
        assert_eq!((other.st_mode & 0o777, node.st_mode & 0o777), (0o666, 0o666));
        assert_eq!(other.st_rdev, node.st_rdev);
        fchown(&one, Some(Uid::from_raw(1000)), None).expect("its owner is changed");
        renew(&one).expect("renewed");
        let one = rustix::fs::fstat(&one).expect("the one");
        assert_eq!((one.st_mode & 0o777, one.st_uid), (0o666, 0));
    }
}
