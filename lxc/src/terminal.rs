//! A terminal of the container's own devpts for a process that is about to become a container's.
//!
//! Called by `become_it`, inside of the container. Fails with the system call; a crash leaves nothing.
#![allow(unsafe_code)] // TIOCSCTTY, setsid

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// A new terminal as this process' controlling one and its three streams; the master is returned.
pub fn take(uid: u32) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::open(c"/dev/ptmx", flags, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    let name: CString = rustix::pty::ptsname(&master, Vec::new())?;
    let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty())?;
    // The kernel has set the group, by devpts' option.
    rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None)?;
    // What opens the console by its name finds it.
    let _ = rustix::fs::symlink(name.as_c_str(), c"/dev/console");
    // SAFETY: plain system calls on descriptors that are open.
    unsafe {
        libc::setsid();
        if libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 1) != 0 {
            return Err(io::Error::last_os_error());
        }
        for stream in 0..3 {
            if libc::dup2(slave.as_fd().as_raw_fd(), stream) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(master)
}
