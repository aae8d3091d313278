//! Processes as /proc shows them: when one started, and how to kill one with all that it started.
//!
//! Called by the server. Reading fails only by the process being gone; killing is best effort and says nothing. The
//! walk is what an exec without a cgroup of its own needs; with one, [`crate::cgroup::kill`] takes its place.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// What /proc/<pid>/stat says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Parent.
    pub parent: i32,
    /// Process group.
    pub group: i32,
    /// Session.
    pub session: i32,
    /// Clock ticks since boot.
    pub start_time: u64,
    /// Dead, and not reaped yet.
    pub zombie: bool,
}

/// Reads /proc/<pid>/stat; None when there is no such process.
pub fn stat(pid: i32) -> Option<Stat> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Field 2, the name, is in brackets and may hold anything, brackets too: the fields follow the last one.
fn parse(text: &str) -> Option<Stat> {
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let zombie = matches!(fields.next()?, "Z" | "X");
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    let session = fields.next()?.parse().ok()?;
    let start_time = fields.nth(15)?.parse().ok()?;
    Some(Stat { parent, group, session, start_time, zombie })
}

/// Kills `root`, its descendants, and what is in `session` or in a process group or session that `root` leads
/// (children whose parent died are not its descendants any more). Each is stopped when found and the search repeated until it finds no new
/// one, so that a process that forks can't outrun it.
pub fn kill_tree(root: i32, session: Option<i32>) {
    let mut found: BTreeMap<i32, OwnedFd> = BTreeMap::new();
    let own = std::process::id() as i32;
    let session = session.filter(|s| *s > 1 && stat(own).is_none_or(|own| own.session != *s));
    for _ in 0..32 {
        let mut new = false;
        for (pid, stat) in all() {
            let related = pid == root
                || stat.session == root
                || stat.group == root
                || session == Some(stat.session)
                || found.contains_key(&stat.parent);
            if !related || pid == own || pid == 1 || stat.zombie || found.contains_key(&pid) {
                continue;
            }
            let Some(fd) = Pid::from_raw(pid).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok()) else { continue };
            // The pidfd must be of the process that was looked at.
            if self::stat(pid).is_some_and(|s| s.start_time == stat.start_time) {
                let _ = pidfd_send_signal(&fd, Signal::STOP);
                found.insert(pid, fd);
                new = true;
            }
        }
        if !new {
            break;
        }
    }
    for fd in found.values() {
        let _ = pidfd_send_signal(fd, Signal::KILL);
    }
}

fn all() -> impl Iterator<Item = (i32, Stat)> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, stat(pid)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines() {
        let line = "77 (a) b) c) S 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 1 2\n";
        let want = Stat { parent: 1, group: 2, session: 3, start_time: 4242, zombie: false };
        assert_eq!(parse(line), Some(want));
        assert!(parse("77 (x) Z 1 2 3 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 1 1").is_some_and(|s| s.zombie));
        for bad in ["", "1", "1 (x", "1 (x) S 1"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        let own = stat(std::process::id() as i32).expect("own");
        assert!(own.start_time > 0 && !own.zombie);
    }
}
