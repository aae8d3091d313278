//! The two things that a container's cgroup is asked: whether the kernel killed for memory, and to kill everybody.
//!
//! Called by the server; v2 first, v1 as far as a hybrid host needs it. Fails by saying nothing: a cgroup that is gone
//! has no processes, and what it counted last is what counts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};

/// Counts OOM kills in a memory cgroup.
///
/// systemd removes an empty scope at once, often before anybody could ask for its last count. What its ancestors count
/// includes their descendants and outlives them: they are asked when the container's own group is gone.
pub struct OomWatch {
    file: OwnedFd,
    first: u64,
    last: u64,
    /// The group was removed before its last count was read.
    lost: bool,
    /// `memory.events` of the groups above, nearest first, with their counts at the start (v2 only).
    above: Vec<(PathBuf, u64)>,
}

impl OomWatch {
    /// Opens `memory.events` (v2) or `memory.oom_control` (v1) in `folder`; what was counted until now is not ours.
    pub fn open(folder: &str) -> Option<Self> {
        if folder.is_empty() {
            return None;
        }
        let open = |name: &str| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::openat(CWD, Path::new(folder).join(name), flags, Mode::empty()).ok()
        };
        let file = open("memory.events").or_else(|| open("memory.oom_control"))?;
        let first = read_count(file.as_fd())?;
        let files = Path::new(folder).ancestors().skip(1).map(|a| a.join("memory.events"));
        let above = files.map_while(|path| count_at(&path).map(|n| (path, n))).collect();
        Some(Self { file, first, last: first, lost: false, above })
    }

    /// For a container of another monitor: the group is its own, so that all that was counted in it counts.
    pub fn adopt(folder: &str) -> Option<Self> {
        Self::open(folder).map(|watch| Self { first: 0, ..watch })
    }

    /// Reads the counter, now or never: call it when the file has an event and when the init has ended.
    pub fn refresh(&mut self) {
        match read_count(self.file.as_fd()) {
            Some(count) => self.last = count,
            None => self.lost = true,
        }
    }

    /// Whether there was a kill since it was opened, as of the last refresh. Of a group that is gone its ancestors
    /// tell; they count their other descendants, too, so that only a container that SIGKILL ended is believed.
    pub fn killed(&self, by_sigkill: bool) -> bool {
        if self.last > self.first || !self.lost || !by_sigkill {
            return self.last > self.first;
        }
        self.above.iter().find_map(|(path, first)| count_at(path).map(|n| n > *first)).unwrap_or(false)
    }

    /// To watch for events (EPOLLPRI).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn count_at(path: &Path) -> Option<u64> {
    let file = rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    read_count(file.as_fd())
}

fn read_count(file: BorrowedFd<'_>) -> Option<u64> {
    let mut buffer = [0u8; 512];
    let n = rustix::io::pread(file, &mut buffer, 0).ok()?;
    parse_count(std::str::from_utf8(&buffer[..n]).ok()?)
}

fn parse_count(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// SIGKILL to all processes in `folder` and below. Never to a cgroup that we are in ourselves: such a plan is wrong.
pub fn kill(folder: &str) {
    if folder.is_empty() || holds_us(Path::new(folder), 0) {
        return;
    }
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let path = Path::new(folder).join("cgroup.kill");
    if let Ok(file) = rustix::fs::openat(CWD, path, flags, Mode::empty())
        && rustix::io::write(&file, b"1").is_ok()
    {
        return;
    }
    // v1: whoever forks faster than this loop is met again by the next one.
    for _ in 0..16 {
        if kill_listed(Path::new(folder), 0) == 0 {
            return;
        }
    }
}

/// Moves the processes of one group, not of those below it, to another. Best effort: what forks meanwhile is met by the
/// next round; on v2 a group that gives controllers to others takes none.
pub fn move_all(from: &Path, to: &Path) {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::openat(CWD, to.join("cgroup.procs"), flags, Mode::empty()) else { return };
    for _ in 0..16 {
        let moved = |pid: &i32| rustix::io::write(&file, pid.to_string().as_bytes()).is_ok();
        if listed(from).iter().filter(|pid| moved(pid)).count() == 0 {
            return;
        }
    }
}

/// Removes a group with the empty ones below it; false: somebody is in it.
pub fn remove(folder: &Path) -> bool {
    below(folder).for_each(|child| {
        remove(&child);
    });
    match rustix::fs::rmdir(folder) {
        Ok(()) => true,
        Err(e) => matches!(e, rustix::io::Errno::NOENT | rustix::io::Errno::NODEV),
    }
}

fn kill_listed(folder: &Path, depth: u32) -> usize {
    let mut killed = 0;
    for pid in listed(folder) {
        if let Some(pid) = Pid::from_raw(pid)
            && !crate::proctree::stat(pid.as_raw_pid()).is_none_or(|s| s.zombie)
            && kill_process(pid, Signal::KILL).is_ok()
        {
            killed += 1;
        }
    }
    if depth < 16 {
        killed += below(folder).map(|child| kill_listed(&child, depth + 1)).sum::<usize>();
    }
    killed
}

fn listed(folder: &Path) -> Vec<i32> {
    let text = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|l| l.parse().ok()).filter(|pid| *pid > 1).collect()
}

/// Whether this process is in `folder` or below it.
fn holds_us(folder: &Path, depth: u32) -> bool {
    listed(folder).contains(&(std::process::id() as i32))
        || (depth < 16 && below(folder).any(|child| holds_us(&child, depth + 1)))
}

fn below(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_count() {
        assert_eq!(parse_count("low 0\nhigh 0\nmax 3\noom 2\noom_kill 2\noom_group_kill 0\n"), Some(2));
        assert_eq!(parse_count("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"), Some(5));
        assert_eq!(parse_count("oom_kill_disable 0\nunder_oom 0\n"), None);
    }
}
