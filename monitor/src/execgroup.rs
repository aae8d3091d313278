//! The cgroup that an exec has of its own, below its container's: killed with it, and removed after it.
//!
//! Used by `exec`. The daemon makes the group's folders (one on v2, one per hierarchy on v1) and the OCI runtime puts
//! the process into them. Nothing here fails: a group that is gone has no processes, and one that can't be removed yet is
//! tried again. A crash of the monitor leaves the group, which goes with its container or by the daemon.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cgroup;
use crate::failure::{Failure, Result};
use crate::server::Server;

/// First pause before a group that is not empty yet is looked at again; each is twice the one before.
const PAUSE: Duration = Duration::from_millis(5);
/// Longest such pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// An exec's group.
#[derive(Debug)]
pub struct ExecGroup {
    /// The one that lists the processes first.
    folders: Vec<PathBuf>,
    kill: bool,
    due: Instant,
    pause: Duration,
}

impl ExecGroup {
    /// Of the folders that a request names. One that could be a whole container's, or the host's, is refused.
    pub fn new(folders: Vec<String>) -> Result<Self> {
        let folders: Vec<PathBuf> = folders.into_iter().map(PathBuf::from).collect();
        let deep = |f: &PathBuf| f.is_absolute() && f.components().count() > 5 && is_execs(f);
        if !folders.iter().all(deep) {
            return Err(Failure::invalid("the cgroup of an exec is an absolute folder exec-..."));
        }
        Ok(Self { folders, kill: false, due: Instant::now(), pause: PAUSE })
    }

    /// Whether there is a group at all: an older daemon names none.
    pub fn is_none(&self) -> bool {
        self.folders.is_empty()
    }

    /// SIGKILL to all that is in it, now and until it is gone.
    pub fn kill(&mut self) {
        self.kill = true;
        if let Some(folder) = self.folders.first() {
            cgroup::kill(&folder.to_string_lossy());
        }
    }

    /// Whether it is gone. What a killed exec has left is killed; what one that ended by itself has left running (a daemon
    /// that somebody started by hand) becomes the container's own.
    fn clear(&self) -> bool {
        if self.kill
            && let Some(folder) = self.folders.first()
        {
            cgroup::kill(&folder.to_string_lossy());
        }
        let mut gone = true;
        for folder in &self.folders {
            if !self.kill
                && let Some(parent) = folder.parent()
            {
                cgroup::move_all(folder, parent);
            }
            gone &= cgroup::remove(folder);
        }
        gone
    }
}

/// The last part of the path says that it is an exec's.
fn is_execs(folder: &Path) -> bool {
    folder.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.len() > 5 && n.starts_with("exec-"))
}

impl Server {
    /// The exec is over: its group goes now or, when its last process is gone, later.
    pub fn end_group(&mut self, mut group: ExecGroup) {
        if !group.is_none() && !group.clear() {
            group.due = Instant::now() + group.pause;
            self.groups.push(group);
        }
    }

    /// Looks again at groups that were not empty.
    pub fn group_timers(&mut self, now: Instant) {
        self.groups.retain_mut(|group| {
            if group.due > now {
                return true;
            }
            group.pause = (group.pause * 2).min(PAUSE_MAX);
            group.due = now + group.pause;
            !group.clear()
        });
    }

    /// The next time at which [`Server::group_timers`] has work.
    pub fn next_group_timer(&self) -> Option<Instant> {
        self.groups.iter().map(|g| g.due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_execs_own_folder_is_taken() {
        let new = |path: &str| ExecGroup::new(vec![path.into()]).is_ok();
        assert!(new("/sys/fs/cgroup/pids/tests/c1/exec-1"));
        assert!(ExecGroup::new(Vec::new()).is_ok_and(|g| g.is_none()));
        for bad in ["/sys/fs/cgroup/tests/c1", "exec-1", "/sys/fs/cgroup", "/a/exec-1", "/sys/fs/cgroup/x/c1/exec-"] {
            assert!(!new(bad), "{bad}");
        }
    }

    #[test]
    fn a_group_that_is_gone_is_gone() {
        let mut group = ExecGroup::new(vec!["/sys/fs/cgroup/none/such/exec-1".into()]).expect("a group");
        group.kill();
        assert!(group.clear());
    }
}
