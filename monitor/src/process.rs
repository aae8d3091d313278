//! Processes that a program leaves to the monitor: a container's init, an exec, the pod's init.
//!
//! Used by `container`, `exec` and `init`. Known by pidfd, so that a signal never meets a stranger. Fails when the pid
//! file has no pid in it; a process that has ended is no failure.

use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::failure::{Failure, Result};
use crate::proctree;
use crate::reaper::{Ended, Fate};
use crate::server::Server;

/// A process that a program left to us.
pub struct Process {
    /// In our PID namespace.
    pub pid: i32,
    /// Clock ticks since boot; 0: it had ended already.
    pub start_time: u64,
    /// None: it had ended already.
    pub pidfd: Option<OwnedFd>,
    /// The session that it was in at first; 0: unknown. A runtime may make the session before the process.
    pub session: i32,
}

impl Process {
    /// Sends a signal (1..=64); one that has ended is no error.
    pub fn signal(&self, number: i32) -> Result<()> {
        let Some(pidfd) = &self.pidfd else { return Ok(()) };
        match signal_of(number).map(|s| pidfd_send_signal(pidfd, s)) {
            Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => Ok(()),
            Some(Err(e)) => Err(Failure::errno(format_args!("signal {number} to process {}", self.pid), e)),
            None => Err(Failure::invalid(format!("{number} is not a signal"))),
        }
    }
}

#[allow(unsafe_code)] // real-time signals have no names
fn signal_of(number: i32) -> Option<Signal> {
    // SAFETY: it is a number that Linux knows, and it is only sent, never given a handler here.
    (1..=64).contains(&number).then(|| unsafe { Signal::from_raw_unchecked(number) })
}

impl Server {
    /// The process whose pid a program wrote to a file, and how it ended if it has.
    pub fn take_process(&mut self, pid_file: &str, since: Instant) -> Result<(Process, Option<Ended>)> {
        let text = std::fs::read_to_string(pid_file).map_err(|e| Failure::io(format_args!("read {pid_file}"), &e))?;
        let pid = text.trim().parse().ok().filter(|pid| *pid > 1).and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| Failure::invalid(format!("{pid_file}: no pid in it")))?;
        let number = pid.as_raw_pid();
        let (start_time, session) = proctree::stat(number).map_or((0, 0), |s| (s.start_time, s.session));
        let pidfd = pidfd_open(pid, PidfdFlags::empty());
        match self.reaper.fate(pid, since) {
            Fate::Ended(ended) => Ok((Process { pid: number, start_time: 0, pidfd: None, session: 0 }, Some(ended))),
            Fate::Child => {
                let pidfd = pidfd.map_err(|e| Failure::errno(format_args!("pidfd_open {pid}"), e))?;
                Ok((Process { pid: number, start_time, pidfd: Some(pidfd), session }, None))
            }
            Fate::Foreign => {
                let Ok(pidfd) = pidfd else {
                    let note = "the process ended before it could be watched and was not this monitor's child";
                    let process = Process { pid: number, start_time: 0, pidfd: None, session: 0 };
                    return Ok((process, Some(Ended::unknown(note))));
                };
                self.watch_foreign(number, &pidfd)?;
                Ok((Process { pid: number, start_time, pidfd: Some(pidfd), session }, None))
            }
        }
    }
}
