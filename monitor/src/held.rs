//! Containers whose first process has a parent that stays: another process, which writes down how it ended and then ends
//! itself. liblxc wants to be such a parent.
//!
//! Called by the server and by `container`. While the parent lives its word counts, when it was killed the first process is
//! ours to reap. Nothing here fails but the reading of the pid file. A crash of the monitor leaves both running.

use std::time::{Duration, Instant};

use lxcri_monitor_proto::v1;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::failure::{Failure, Result};
use crate::process::Process;
use crate::reaper::{Ended, Fate};
use crate::server::Server;
use crate::{clock, proctree};

/// A parent has this long to end after its child.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a monitor that has just begun waits for such a parent's word.
const LATE: Duration = Duration::from_secs(1);

/// Why a code can be unknown.
const UNTOLD: &str = "the process ended, its parent did not tell how, and the kernel does not either";

/// The parent of a container's first process.
#[derive(Debug, Default)]
pub struct Holder {
    /// Its pid while it lives.
    pub pid: Option<i32>,
    /// When it is killed because it does not end.
    pub until: Option<Instant>,
    /// It was another monitor's child: what it writes and what the kernel tells is all that can be known.
    pub lost: bool,
}

/// What is known of an end that a lost parent sees.
pub struct Told {
    /// The end, if it is told already.
    pub ended: Option<Ended>,
    /// The parent lives and will tell.
    pub awaited: bool,
}

/// What the parent has written.
fn told(status_file: &str) -> Option<Ended> {
    parse(&std::fs::read_to_string(status_file).ok()?)
}

/// "CODE SIGNAL KILLS"; a parent that does not know the last leaves it away.
fn parse(text: &str) -> Option<Ended> {
    let mut words = text.split_whitespace();
    let (code, signal) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let oom = words.next().and_then(|kills| kills.parse::<u64>().ok()).map(|kills| kills > 0);
    Some(Ended { code, signal, at: clock::now_ns(), note: "", oom })
}

fn parent_lives(pid_file: &str) -> bool {
    let parent = || std::fs::read_to_string(pid_file).ok()?.split_whitespace().nth(1)?.parse::<i32>().ok();
    parent().is_some_and(|pid| proctree::stat(pid).is_some_and(|s| !s.zombie))
}

/// What the parent says of a process that has ended before this monitor was there; waits shortly for one that is about to.
pub fn told_late(plan: &v1::CreateContainer) -> Option<Ended> {
    if plan.status_file.is_empty() {
        return None;
    }
    let until = Instant::now() + LATE;
    loop {
        let lives = parent_lives(&plan.pid_file);
        let ended = told(&plan.status_file);
        if ended.is_some() || !lives || Instant::now() > until {
            return ended;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Server {
    /// The process and its parent, whose pids a program wrote to a file; how the process ended if it has.
    pub fn take_held(
        &mut self,
        pid_file: &str,
        status_file: &str,
        since: Instant,
    ) -> Result<(Process, Holder, Option<Ended>)> {
        let text = std::fs::read_to_string(pid_file).map_err(|e| Failure::io(format_args!("read {pid_file}"), &e))?;
        let mut pids = text.split_whitespace().map(|w| w.parse().ok().filter(|pid| *pid > 1).and_then(Pid::from_raw));
        let (Some(Some(pid)), Some(Some(holder))) = (pids.next(), pids.next()) else {
            return Err(Failure::invalid(format!("{pid_file}: no two pids in it")));
        };
        let number = pid.as_raw_pid();
        let (start_time, session) = proctree::stat(number).map_or((0, 0), |s| (s.start_time, s.session));
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok();
        let process = Process { pid: number, start_time, pidfd, session };
        if let Fate::Child = self.reaper.fate(holder, since) {
            if let Some(pidfd) = &process.pidfd {
                self.watch_foreign(number, pidfd)?;
            }
            return Ok((process, Holder { pid: Some(holder.as_raw_pid()), ..Holder::default() }, None));
        }
        let ended = self.orphaned(&process, status_file, since);
        Ok((process, Holder::default(), ended))
    }

    /// Its parent has ended: how it ended, or None when it lives and is ours.
    fn orphaned(&mut self, process: &Process, status_file: &str, since: Instant) -> Option<Ended> {
        if let Some(ended) = told(status_file) {
            return Some(ended);
        }
        let fate = Pid::from_raw(process.pid).map_or(Fate::Foreign, |pid| self.reaper.fate(pid, since));
        match (fate, &process.pidfd) {
            (Fate::Child, _) => None,
            (Fate::Ended(ended), _) => Some(ended),
            (Fate::Foreign, Some(pidfd)) => {
                use std::os::fd::AsFd;
                Some(Ended::foreign(pidfd.as_fd()).unwrap_or_else(|| Ended::unknown(UNTOLD)))
            }
            (Fate::Foreign, None) => Some(Ended::unknown(UNTOLD)),
        }
    }

    /// A process that is not our child has ended. True: it is a container's whose parent, or the reaper, will tell how.
    pub fn held_init_ended(&mut self, pid: i32) -> bool {
        let held = |c: &&mut crate::container::Container| {
            !c.plan.status_file.is_empty() && !c.holder.lost && c.init.as_ref().is_some_and(|i| i.pid == pid)
        };
        let Some(container) = self.containers.values_mut().find(held) else { return false };
        container.refresh_oom();
        if container.holder.pid.is_some() {
            container.holder.until = Some(Instant::now() + PATIENCE);
        }
        true
    }

    /// What is known of the end of an adopted container's first process; None: it is no such process.
    pub fn told_of(&self, pid: i32) -> Option<Told> {
        let is = |c: &&crate::container::Container| c.holder.lost && c.init.as_ref().is_some_and(|i| i.pid == pid);
        let plan = &self.containers.values().find(is)?.plan;
        // In this order: it may tell and end in between.
        let lives = parent_lives(&plan.pid_file);
        let ended = told(&plan.status_file);
        Some(Told { ended, awaited: ended.is_none() && lives })
    }

    /// A child of ours that no program is has ended. True: it was such a parent.
    pub fn holder_ended(&mut self, pid: i32) -> bool {
        let Some((id, container)) = self.containers.iter_mut().find(|(_, c)| c.holder.pid == Some(pid)) else {
            return false;
        };
        let id = id.clone();
        container.holder = Holder::default();
        let status_file = container.plan.status_file.clone();
        let Some(init) = container.init.take() else { return true };
        // Its status may have come a moment before its parent's.
        let since = Instant::now().checked_sub(PATIENCE).unwrap_or_else(Instant::now);
        let ended = self.orphaned(&init, &status_file, since);
        if let Some(container) = self.containers.get_mut(&id) {
            container.init = Some(init);
        }
        if let Some(ended) = ended {
            self.container_init_ended(&id, ended);
        }
        true
    }

    /// Kills parents that do not end.
    pub fn holder_timers(&mut self, now: Instant) {
        for container in self.containers.values_mut() {
            if container.holder.until.is_some_and(|at| at <= now) {
                container.holder.until = None;
                if let Some(pid) = container.holder.pid {
                    // Our child, not reaped yet: nobody else has its number.
                    proctree::kill_tree(pid, None);
                }
            }
        }
    }

    /// The next time at which [`Server::holder_timers`] has work.
    pub fn next_holder_timer(&self) -> Option<Instant> {
        self.containers.values().filter_map(|c| c.holder.until).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_tells_code_signal_and_kills() {
        let told = |text: &str| parse(text).map(|e| (e.code, e.signal, e.oom));
        assert_eq!(told("137 9 1\n"), Some((137, 9, Some(true))));
        assert_eq!(told("0 0 0\n"), Some((0, 0, Some(false))));
        assert_eq!(told("3 0\n"), Some((3, 0, None)));
        assert_eq!(told("3"), None);
        assert_eq!(told("x 0"), None);
    }
}
