//! A program of a cluster that runs until its owner is dropped, with its output in a log file.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::support::wait_for;

/// A running program. Dropping it is kill -9.
pub struct Process {
    name: String,
    child: Child,
    pub log: PathBuf,
}

impl Process {
    /// Starts it; its log is `<dir>/<name>.log`, which is appended to.
    pub fn start(name: &str, dir: &Path, command: &mut Command) -> Self {
        let log = dir.join(format!("{name}.log"));
        let file = || File::options().create(true).append(true).open(&log).expect("a log file");
        let child = command.stdin(Stdio::null()).stdout(file()).stderr(file()).spawn();
        let child = child.unwrap_or_else(|e| panic!("{command:?}: {e}"));
        Self { name: name.to_owned(), child, log }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Panics with the end of the log when it has ended.
    pub fn assert_alive(&mut self) {
        if let Ok(Some(status)) = self.child.try_wait() {
            panic!("{} ended: {status}\n{}", self.name, tail(&self.log, 30));
        }
    }

    /// Waits until `ready`; it must not end meanwhile.
    pub fn wait_until(&mut self, what: &str, limit: Duration, mut ready: impl FnMut() -> bool) {
        wait_for(&format!("{}: {what}", self.name), limit, || {
            self.assert_alive();
            ready().then_some(())
        });
    }

    /// kill -9.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, then waits for its end.
    pub fn stop(mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
        wait_for(&format!("the end of {}", self.name), Duration::from_secs(60), || {
            self.child.try_wait().expect("its status")
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a file.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Resident memory of a process in KiB, all of it and what is its own (heap and stacks). Not the proportional set: pages of
/// the program's file are shared with the daemons of other tests that come and go.
pub fn memory_kib(pid: u32) -> (u64, u64) {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let value = |key: &str| -> u64 {
        let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_else(|| panic!("{path}: no {key}"));
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    };
    (value("Rss:"), value("Anonymous:"))
}
