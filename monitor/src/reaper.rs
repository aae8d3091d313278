//! The one reaper: every child that ends is seen here, those that nobody knows yet included.
//!
//! Called by the server when SIGCHLD is readable. Statuses of unknown pids are kept for a while: a container's init
//! can end before the file with its pid is read. A crash loses them; the next reaper is the host's init.
#![allow(unsafe_code)] // signal masks, signalfd and PIDFD_GET_INFO: no safe wrapper

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Instant;

use lxcri_monitor_proto::v1::Exit;
use rustix::process::{Pid, WaitOptions, WaitStatus};

/// Statuses of unknown pids that are kept; the oldest goes first.
const UNKNOWN_MAX: usize = 1024;

/// `struct pidfd_info` as of Linux 6.15 (include/uapi/linux/pidfd.h); exit codes are told from then on.
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

/// How a process ended, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// 0..255; 128 + the signal's number when killed.
    pub code: i32,
    /// 0 unless killed.
    pub signal: i32,
    /// Unix time in nanoseconds.
    pub at: i64,
    /// Why the code is not the process's own; "" when it is.
    pub note: &'static str,
    /// Whether the kernel killed for memory in its group; None: whoever tells of the end does not know.
    pub oom: Option<bool>,
}

impl Ended {
    fn now(status: WaitStatus) -> Self {
        let at = crate::clock::now_ns();
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Self { code, signal: 0, at, note: "", oom: None },
            (None, Some(signal)) => Self { code: 128 + signal, signal, at, note: "", oom: None },
            (None, None) => Self { code: 255, signal: 0, at, note: "ended in no known way", oom: None },
        }
    }

    /// An end whose code nobody can tell, and why.
    pub fn unknown(note: &'static str) -> Self {
        Self { code: 255, signal: 0, at: crate::clock::now_ns(), note, oom: None }
    }

    /// The end of a process that is not our child, by its pidfd; None: it is not reaped yet, or the kernel does not tell.
    pub fn foreign(pidfd: BorrowedFd<'_>) -> Option<Self> {
        let at = crate::clock::now_ns();
        let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
        // SAFETY: the kernel writes at most the 64 bytes that the request's number names, into a struct of that size.
        let done = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) } == 0;
        if !done || info.mask & PIDFD_INFO_EXIT == 0 {
            return None;
        }
        Some(match info.exit_code & 0x7f {
            0 => Self { code: info.exit_code >> 8 & 0xff, signal: 0, at, note: "", oom: None },
            signal => Self { code: 128 + signal, signal, at, note: "", oom: None },
        })
    }

    /// As the wire has it.
    pub fn to_wire(self) -> Exit {
        let oom = self.oom.unwrap_or(false);
        Exit { code: self.code, signal: self.signal, finished_at: self.at, oom, note: self.note.into() }
    }
}

/// What has become of a process that a program left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Our child, alive.
    Child,
    /// Ended and reaped.
    Ended(Ended),
    /// Not our child, or never there.
    Foreign,
}

/// The reaper.
pub struct Reaper {
    signals: OwnedFd,
    unknown: VecDeque<(i32, Instant, Ended)>,
}

impl Reaper {
    /// Blocks all signals but those that report a fault in this very process, and takes SIGCHLD by descriptor.
    /// Blocked and not ignored, since what is ignored stays so in the containers. Call it before any thread is made.
    pub fn start() -> io::Result<Self> {
        for signal in (1..=64).filter(|s| *s != libc::SIGPIPE) {
            // SAFETY: no handler is set. What this process was started to ignore must not stay so in containers.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        // SAFETY: the set is made by sigfillset before it is used; all pointers are to this frame.
        let fd = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut set);
            for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGABRT, libc::SIGTRAP] {
                libc::sigdelset(&raw mut set, fault);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGCHLD);
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd returned a new descriptor that nobody else owns.
        let signals = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { signals, unknown: VecDeque::new() })
    }

    /// Readable when a child has ended.
    pub fn signals(&self) -> &OwnedFd {
        &self.signals
    }

    /// Forgets the signals that came; call before [`Reaper::next`].
    pub fn acknowledge(&self) {
        while rustix::io::read(&self.signals, &mut [0u8; 128]).is_ok_and(|n| n > 0) {}
    }

    /// The next child that has ended.
    pub fn next(&self) -> Option<(i32, Ended)> {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => Some((pid.as_raw_pid(), Ended::now(status))),
            _ => None,
        }
    }

    /// Keeps the status of a pid that nobody knows yet.
    pub fn keep(&mut self, pid: i32, ended: Ended) {
        if self.unknown.len() >= UNKNOWN_MAX {
            self.unknown.pop_front();
        }
        self.unknown.push_back((pid, Instant::now(), ended));
    }

    /// What has become of `pid`, left behind by a program that began at `since`. An older status of the same number is
    /// another process's.
    pub fn fate(&mut self, pid: Pid, since: Instant) -> Fate {
        match rustix::process::waitpid(Some(pid), WaitOptions::NOHANG) {
            Ok(None) => return Fate::Child,
            Ok(Some((_, status))) => return Fate::Ended(Ended::now(status)),
            Err(_) => {}
        }
        let number = pid.as_raw_pid();
        match self.unknown.iter().rposition(|(p, at, _)| *p == number && *at >= since) {
            Some(at) => self.unknown.remove(at).map_or(Fate::Foreign, |(_, _, ended)| Fate::Ended(ended)),
            None => Fate::Foreign,
        }
    }
}
