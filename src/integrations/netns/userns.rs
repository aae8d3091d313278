//! A user namespace and the pod's other namespaces inside it: made by a forked child, because a thread of a process
//! that has others can't make a user namespace.
//!
//! Called by `netns` on its thread. The child makes system calls only and waits on a pipe until it is dropped; the
//! namespaces outlive it once they are pinned. Fails with the step's errno. A crash of the daemon closes the pipe, so
//! the child ends, too.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use camino::Utf8PathBuf;
use rustix::thread::UnshareFlags;

use super::NetnsError;
use crate::core::spec::{IdMapping, UserNamespace};

/// A process that holds new namespaces open. Ends when dropped.
pub(super) struct Holder {
    pid: libc::pid_t,
    /// Closing it ends the child.
    go_on: Option<File>,
}

impl Holder {
    /// Makes a user namespace with the given maps and, inside it, the namespaces of `flags`.
    pub fn start(user: &UserNamespace, flags: UnshareFlags) -> Result<Self, NetnsError> {
        let (uids, gids) = (map_text(&user.uids)?, map_text(&user.gids)?);
        let failed = |step: &str| {
            let step = format!("{step} of a user namespace");
            move |e: io::Error| NetnsError::System { step, source: e }
        };
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from);
        let (report, reporter) = pipe().map_err(failed("make a pipe for the child"))?;
        let (waiter, go_on) = pipe().map_err(failed("make a pipe for the child"))?;
        // SAFETY: the child runs `child` alone, which makes async-signal-safe system calls and ends by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            child(reporter.as_raw_fd(), waiter.as_raw_fd(), flags.bits() as libc::c_int);
        }
        if pid < 0 {
            return Err(failed("fork the child")(io::Error::last_os_error()));
        }
        drop((reporter, waiter));
        let mut holder = Self { pid, go_on: Some(File::from(go_on)) };
        let mut report = File::from(report);
        holder.expect(&mut report).map_err(failed("unshare"))?;
        for (name, text) in [("uid_map", uids), ("gid_map", gids)] {
            let file = std::fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/{name}"));
            file.and_then(|mut f| f.write_all(text.as_bytes())).map_err(failed(&format!("write the {name}")))?;
        }
        let told = holder.go_on.as_mut().map_or(Ok(()), |pipe| pipe.write_all(b"."));
        told.map_err(failed("talk to the child"))?;
        holder.expect(&mut report).map_err(failed("unshare the other namespaces"))?;
        Ok(holder)
    }

    /// The child reports four bytes for each step: its errno, 0 for success.
    fn expect(&mut self, report: &mut File) -> io::Result<()> {
        let mut errno = [0u8; 4];
        report.read_exact(&mut errno)?;
        match i32::from_ne_bytes(errno) {
            0 => Ok(()),
            e => Err(io::Error::from_raw_os_error(e)),
        }
    }

    /// Folder of its namespaces.
    pub fn namespaces(&self) -> Utf8PathBuf {
        format!("/proc/{}/ns", self.pid).into()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.go_on.take());
        // SAFETY: our own child, which nobody else waits for; a null status is allowed. EINTR is tried again.
        while unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) } < 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
    }
}

/// The child's whole life. Never returns, allocates nothing, takes no lock.
fn child(report: RawFd, wait: RawFd, flags: libc::c_int) -> ! {
    // SAFETY: plain system calls on descriptors that the parent made for us; buffers live on this stack.
    unsafe {
        // Copies of the daemon's descriptors (pipes of containers) must not live on here.
        libc::dup2(report, 0);
        libc::dup2(wait, 1);
        libc::close_range(2, libc::c_uint::MAX, 0);
        let step = |flags: libc::c_int| {
            let done = libc::unshare(flags);
            let errno = if done == 0 { 0 } else { *libc::__errno_location() };
            libc::write(0, (&raw const errno).cast(), size_of::<libc::c_int>()) == 4 && errno == 0
        };
        let mut byte = 0u8;
        if step(libc::CLONE_NEWUSER) && libc::read(1, (&raw mut byte).cast(), 1) == 1 && step(flags) {
            // Until the parent closes its end.
            while libc::read(1, (&raw mut byte).cast(), 1) > 0 {}
        }
        libc::_exit(0)
    }
}

/// Lines of uid_map (user_namespaces(7)).
fn map_text(map: &[IdMapping]) -> Result<String, NetnsError> {
    // The kernel refuses overlaps, too, but only with EINVAL.
    let overlap = |a: &IdMapping, b: &IdMapping| {
        let cross = |x: u32, y: u32| {
            let (x, y) = (u64::from(x), u64::from(y));
            x < y + u64::from(b.length) && y < x + u64::from(a.length)
        };
        cross(a.container_id, b.container_id) || cross(a.host_id, b.host_id)
    };
    let bad = map.iter().enumerate().any(|(n, a)| {
        a.length == 0
            || a.host_id.checked_add(a.length).is_none()
            || a.container_id.checked_add(a.length).is_none()
            || map[..n].iter().any(|b| overlap(a, b))
    });
    if map.is_empty() || bad {
        return Err(NetnsError::IdMap(format!("{map:?}")));
    }
    Ok(map.iter().map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.length)).collect())
}
