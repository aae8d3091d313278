//! `delete`: takes away what a container has left in the runtime: its processes, groups and configuration.
//!
//! Repeatable; what is gone is success. The container's files are its maker's.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::options::Options;

/// How long killed processes may take to leave their groups.
const KILL: Duration = Duration::from_secs(10);

/// `delete`.
pub fn delete(options: &Options) -> Result<(), String> {
    if options.name.is_empty() || options.name.contains('/') || options.name.starts_with('.') {
        return Err("delete: a container's name is needed".into());
    }
    if let Some(holder) = second_number(&options.pid_file) {
        kill_if_ours(holder, &options.name);
    }
    for group in &options.remove {
        remove_group(Path::new(group))?;
    }
    for group in &options.prune {
        // Another container's parent may be on its way out through it.
        let _ = std::fs::remove_dir(group);
    }
    let _ = std::fs::remove_file(lxcri_lxc::lock_file(&options.lxcpath, &options.name));
    let folder = Path::new(&options.lxcpath).join(&options.name);
    for file in ["config", "config.new"] {
        let _ = std::fs::remove_file(folder.join(file));
    }
    // Places of mounts that the helper made: empty here, since its mounts were its own.
    let mounts = folder.join("mounts");
    for entry in std::fs::read_dir(&mounts).into_iter().flatten().flatten() {
        let _ = std::fs::remove_dir(entry.path()).or_else(|_| std::fs::remove_file(entry.path()));
    }
    let _ = std::fs::remove_dir(&mounts);
    match std::fs::remove_dir(&folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("remove {}: {e}", folder.display())),
        _ => Ok(()),
    }
}

/// The parent's pid in "PID PARENT".
fn second_number(file: &str) -> Option<i32> {
    std::fs::read_to_string(file).ok()?.split_whitespace().nth(1)?.parse().ok()
}

/// The container has ended by now, and so has its parent, unless it hangs.
fn kill_if_ours(pid: i32, name: &str) {
    let Some(fd) = rustix::process::Pid::from_raw(pid)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok())
    else {
        return;
    };
    // After the descriptor, so that it is this process that has those arguments.
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let ours = arguments.split(|b| *b == 0).any(|a| a == name.as_bytes());
    if !ours {
        return;
    }
    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
    if matches!(rustix::event::poll(&mut fds, Some(&second)), Ok(0)) {
        let _ = rustix::process::pidfd_send_signal(&fd, rustix::process::Signal::KILL);
    }
}

/// Kills what is in a group, removes it and what is below it.
pub fn remove_group(folder: &Path) -> Result<(), String> {
    let until = Instant::now() + KILL;
    loop {
        let failed = match remove_tree(folder) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => e,
        };
        if Instant::now() > until {
            return Err(format!("remove cgroup {}: {failed}", folder.display()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn remove_tree(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)?.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    for pid in std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Some(pid) = pid.parse().ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    std::fs::remove_dir(folder)
}
