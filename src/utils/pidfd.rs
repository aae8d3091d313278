//! Processes that can't be mixed up: a pid with its start time and the boot it belongs to, and pidfds.
//!
//! Written into records (monitors, inits) and checked before anything is signalled: a bare pid on disk may name
//! another process by now. Fails with the I/O error of /proc or of pidfd_open; holds no state.
// One system call that rustix offers for named signals only.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use serde::{Deserialize, Serialize};

/// A process of this or an earlier boot, as it is stored on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Pid in the host's PID namespace.
    pub pid: i32,
    /// Clock ticks from boot to its start: field 22 of /proc/<pid>/stat (proc(5)).
    pub start_time: u64,
    /// /proc/sys/kernel/random/boot_id at that time.
    pub boot_id: String,
}

/// Sends `signal` (any number, real-time ones too) to the process behind `fd`; one that has ended is no error.
pub fn signal(fd: &OwnedFd, signal: i32) -> io::Result<()> {
    // SAFETY: pidfd_send_signal(2) with a descriptor that lives across the call, no siginfo and no flags.
    let done = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    match done {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            e => Err(e),
        },
    }
}

/// Waits until the process behind `fd` has ended.
pub async fn ended(fd: std::sync::Arc<OwnedFd>) -> io::Result<()> {
    // SAFETY: the Arc inside the AsyncFd keeps the descriptor open and the same for as long as it is registered.
    let watched = unsafe { tokio::io::unix::AsyncFd::register(fd) }?;
    watched.readable().await.map(drop)
}

/// `struct pidfd_info` as of Linux 6.15 (include/uapi/linux/pidfd.h).
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    ids: [u32; 11],
    exit_code: i32,
}
/// _IOWR(0xFF, 11, struct pidfd_info), 64 bytes.
const PIDFD_GET_INFO: libc::Ioctl = 0xC040_FF0Bu32 as libc::Ioctl;
const PIDFD_INFO_EXIT: u64 = 1 << 3;
/// An ended process is reaped by its parent in this time, or its status is given up.
const REAPED: std::time::Duration = std::time::Duration::from_secs(5);

/// Waits until the process behind `fd`, whosever child, has ended and is reaped. Its status, where the kernel tells it.
pub async fn exit_status(fd: std::sync::Arc<OwnedFd>) -> Option<std::process::ExitStatus> {
    use std::os::unix::process::ExitStatusExt;
    ended(fd.clone()).await.ok()?;
    let end = tokio::time::Instant::now() + REAPED;
    loop {
        let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
        // SAFETY: the kernel writes at most the 64 bytes that the request's number names, into a struct of that size.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) } == 0;
        if done && info.mask & PIDFD_INFO_EXIT != 0 {
            return Some(std::process::ExitStatus::from_raw(info.exit_code));
        }
        // A kernel that tells no codes would be asked in vain, but no longer than this.
        if tokio::time::Instant::now() >= end {
            return None;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Identity of the running boot.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Start time in clock ticks since boot; NotFound when there is no such process or only its zombie.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let stat = match std::fs::read(format!("/proc/{pid}/stat")) {
        // A process that ends between open and read gives ESRCH.
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(io::ErrorKind::NotFound.into()),
        other => other?,
    };
    match parse_stat(&stat) {
        Some((b'Z' | b'X', _)) => Err(io::ErrorKind::NotFound.into()),
        Some((_, start)) => Ok(start),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat has no start time"))),
    }
}

/// State and start time; the second field may hold spaces and parentheses of the program's choice.
fn parse_stat(stat: &[u8]) -> Option<(u8, u64)> {
    let end = stat.iter().rposition(|b| *b == b')')?;
    let mut fields = std::str::from_utf8(&stat[end + 1..]).ok()?.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

impl ProcessId {
    /// Identity of a running process; NotFound when it has ended.
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, start_time: start_time(pid)?, boot_id: boot_id()? })
    }

    /// A pidfd of exactly this process; None when it has ended (or belongs to an earlier boot).
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        // Pid::from_raw takes negative numbers for a bug of the caller and panics; here they come from disk.
        let Some(pid) = Some(self.pid).filter(|p| *p > 0).and_then(rustix::process::Pid::from_raw) else {
            return Ok(None);
        };
        if boot_id()? != self.boot_id {
            return Ok(None);
        }
        let fd = match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // Looked at after opening: from here on the descriptor and the start time speak of the same process.
        match start_time(self.pid) {
            Ok(start) if start == self.start_time => Ok(Some(fd)),
            Ok(_) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether it runs.
    pub fn is_alive(&self) -> io::Result<bool> {
        Ok(self.open()?.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_hostile_name() {
        let rest = (4..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(parse_stat(format!("7 (a) R 1 (b) S {rest}").as_bytes()), Some((b'S', 22)));
        assert_eq!(parse_stat(b"7 (a"), None);
        assert_eq!(parse_stat(b"7 (a) R 1"), None);
    }

    #[test]
    fn knows_itself_and_nobody_else() {
        let me = ProcessId::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.is_alive().unwrap());
        assert!(!ProcessId { start_time: me.start_time + 1, ..me.clone() }.is_alive().unwrap());
        assert!(!ProcessId { boot_id: "another".into(), ..me.clone() }.is_alive().unwrap());
        for pid in [0, -1, i32::MAX] {
            assert!(!ProcessId { pid, ..me.clone() }.is_alive().unwrap(), "{pid}");
        }
    }
}
