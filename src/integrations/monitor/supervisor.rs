//! The `Supervisor` port: one folder per pod under the run root, with the monitor's socket in it.
//!
//! Wired by `main`. Fails with [`MonitorError`]. A crash leaves monitors running and their sockets in place; what a
//! dead monitor leaves is removed by `cleanup`.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::client::Client;
use super::error::MonitorError;
use super::runtime_copy::RuntimeCopy;
use super::spawn;
use crate::core::error::{Error, Result};
use crate::core::ids::PodId;
use crate::core::ports::{MonitorLink, Supervisor};
use crate::fail_point;
use crate::utils::tasks::TaskSet;
use crate::utils::watched::watch;

/// A monitor says Hello in this time, or does not answer.
const HELLO: Duration = Duration::from_secs(10);
/// A monitor that was killed is gone in this time.
const DEATH: Duration = Duration::from_secs(10);

/// Where monitors are and what they are made of.
#[derive(Debug, Clone)]
pub struct MonitorConfig {
    /// The monitor's program, absolute.
    pub program: Utf8PathBuf,
    /// Programs in its place, by handler; absolute, and started as it is.
    pub others: BTreeMap<String, Utf8PathBuf>,
    /// Folder with a folder per pod.
    pub run_root: Utf8PathBuf,
    /// The OCI runtime, absolute: monitors run a copy of it in memory.
    pub runtime: Utf8PathBuf,
    /// cgroup v2 folder in which each monitor gets a cgroup named after its pod; None: they stay in the daemon's.
    pub cgroup: Option<Utf8PathBuf>,
    /// Owns readers and waiters.
    pub tasks: TaskSet,
}

/// Starts monitors and finds those that run.
#[derive(Debug)]
pub struct MonitorSupervisor {
    pub(super) config: MonitorConfig,
    runtime: Arc<RuntimeCopy>,
}

impl MonitorSupervisor {
    /// Touches nothing yet.
    pub fn new(config: MonitorConfig) -> Self {
        let runtime = RuntimeCopy::new(config.runtime.clone());
        Self { config, runtime }
    }

    fn folder(&self, pod: &PodId) -> Utf8PathBuf {
        self.config.run_root.join(pod.as_str())
    }

    /// A connected socket.
    async fn dial(&self, pod: &PodId) -> Result<OwnedFd, MonitorError> {
        let folder = self.folder(pod);
        let end = Instant::now() + HELLO;
        loop {
            let socket = spawn::socket()?;
            match spawn::with_address(&folder, |address| Ok(rustix::net::connect(&socket, address)?)) {
                Ok(()) => return Ok(socket),
                // Too many connections wait to be accepted.
                Err(e) if Errno::from_io_error(&e) == Some(Errno::AGAIN) && Instant::now() < end => {
                    sleep(Duration::from_millis(20)).await;
                }
                Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::NOENT | Errno::CONNREFUSED)) => {
                    return Err(MonitorError::NotRunning { pod: pod.to_string() });
                }
                Err(e) => return Err(MonitorError::host(format!("connect to {folder}/{}", spawn::SOCKET), e)),
            }
        }
    }

    async fn link(&self, pod: &PodId) -> Result<MonitorLink, MonitorError> {
        let socket = self.dial(pod).await?;
        let (client, hello, events) = Client::greet(pod, socket, &self.config.tasks, HELLO).await?;
        if let Some((program, copy)) = self.runtime.now().await {
            client.keep_program(program, &copy).await;
        }
        Ok(MonitorLink { monitor: client, hello, events })
    }

    async fn launch(&self, pod: &PodId, handler: &str, pod_info: &[u8]) -> Result<MonitorLink, MonitorError> {
        let program = self.config.others.get(handler).unwrap_or(&self.config.program);
        for path in [program, &self.config.run_root] {
            if !path.is_absolute() {
                return Err(MonitorError::Relative { path: path.clone() });
            }
        }
        let folder = self.folder(pod);
        match self.dial(pod).await {
            Ok(_) => return Err(MonitorError::Running { pod: pod.to_string() }),
            Err(MonitorError::NotRunning { .. }) => {}
            Err(error) => return Err(error),
        }
        spawn::make_folder(&folder)?;
        let listener = spawn::listen(&folder)?;
        fail_point!("monitor_spawn.bound");
        let mut child = spawn::start(program, pod, &folder, &listener, pod_info)?;
        // From here on only the monitor has it: when it dies, connecting is refused.
        drop(listener);
        fail_point!("monitor_spawn.started");
        if let (Some(cgroup), Some(pid)) = (&self.config.cgroup, child.id())
            && let Err(error) = spawn::enter_cgroup(cgroup, pod, pid)
        {
            let _ = child.kill().await;
            return Err(error);
        }
        // Taken while it can't have been reaped: this very process.
        let pidfd = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let pidfd = pidfd.and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK).ok());
        let (tell, mut ended) = oneshot::channel();
        let name = pod.clone();
        self.config.tasks.spawn_cancellable("monitor process", async move {
            let status = child.wait().await;
            tracing::debug!(pod = %name, ?status, "monitor ended");
            let _ = tell.send(status.map_or_else(|e| e.to_string(), |s| s.to_string()));
        });
        match self.link(pod).await {
            Err(error) => {
                // Either the end of its process explains it, or it still runs and is of no use.
                match timeout(Duration::from_millis(200), &mut ended).await {
                    Ok(Ok(status)) => {
                        let words = spawn::last_words(&folder);
                        Err(MonitorError::Stillborn { pod: pod.to_string(), status, words })
                    }
                    _ => {
                        if let Some(pidfd) = &pidfd {
                            let _ = pidfd_send_signal(pidfd, Signal::KILL);
                        }
                        self.end(pod).await;
                        Err(error)
                    }
                }
            }
            linked => linked,
        }
    }

    /// Kills the pod's monitor, found by its arguments, and waits for its end.
    async fn end(&self, pod: &PodId) {
        let folder = self.folder(pod);
        let (name, below) = (pod.clone(), folder.clone());
        // All of /proc is read.
        let found = tokio::task::spawn_blocking(move || running(&name, &below)).await.unwrap_or_default();
        for pid in found {
            let Ok(pidfd) = pidfd_open(pid, PidfdFlags::NONBLOCK) else { continue };
            // It must still be the one that was looked at.
            if !is_monitor(pid, pod, &folder) {
                continue;
            }
            tracing::warn!(%pod, pid = pid.as_raw_pid(), "killing a monitor");
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
            if let Ok(pidfd) = watch(pidfd, tokio::io::Interest::READABLE) {
                let _ = timeout(DEATH, pidfd.readable()).await;
            }
        }
    }
}

/// Processes that are the pod's monitor, by their arguments.
fn running(pod: &PodId, folder: &Utf8Path) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str().and_then(|n| n.parse().ok()).and_then(Pid::from_raw));
    pids.filter(|pid| is_monitor(*pid, pod, folder)).collect()
}

fn is_monitor(pid: Pid, pod: &PodId, folder: &Utf8Path) -> bool {
    let line = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_pid())).unwrap_or_default();
    let mut words = line.split(|b| *b == 0).skip(1);
    [&b"--pod"[..], pod.as_str().as_bytes(), b"--run-dir", folder.as_str().as_bytes()]
        .into_iter()
        .all(|want| words.next() == Some(want))
}

/// Monitors of whatever pod whose folder is below `root`.
#[cfg(test)]
pub(super) fn running_below(root: &Utf8Path) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str().and_then(|n| n.parse().ok()).and_then(Pid::from_raw));
    let below = |pid: &Pid| {
        let line = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_pid())).unwrap_or_default();
        line.split(|b| *b == 0)
            .any(|word| word.starts_with(root.as_str().as_bytes()) && word != root.as_str().as_bytes())
            && line.split(|b| *b == 0).any(|word| word == b"--run-dir")
    };
    pids.filter(below).collect()
}

#[async_trait]
impl Supervisor for MonitorSupervisor {
    async fn spawn(&self, pod: &PodId, handler: &str, pod_info: Vec<u8>) -> Result<MonitorLink> {
        Ok(self.launch(pod, handler, &pod_info).await?)
    }

    async fn connect(&self, pod: &PodId) -> Result<MonitorLink> {
        Ok(self.link(pod).await?)
    }

    async fn list(&self) -> Result<Vec<PodId>> {
        let root = &self.config.run_root;
        let failed = |e| MonitorError::host(format!("list {root}"), e);
        let entries = match std::fs::read_dir(root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e).into()),
        };
        let mut pods = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            let Some(pod) = name.to_str().and_then(|n| n.parse::<PodId>().ok()) else { continue };
            if std::fs::symlink_metadata(self.folder(&pod).join(spawn::SOCKET)).is_ok() {
                pods.push(pod);
            }
        }
        Ok(pods)
    }

    async fn cleanup(&self, pod: &PodId) -> Result<()> {
        match self.link(pod).await {
            Ok(_) => return Err(Error::precondition(format!("pod {pod}: its monitor runs"))),
            Err(MonitorError::NotRunning { .. }) => {}
            Err(_) => self.end(pod).await,
        }
        let folder = self.folder(pod);
        for name in [spawn::SOCKET, spawn::LOG] {
            match std::fs::remove_file(folder.join(name)) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(MonitorError::host(format!("remove {folder}/{name}"), e).into());
                }
                _ => {}
            }
        }
        // What others keep in the folder is theirs to remove.
        let _ = std::fs::remove_dir(&folder);
        if let Some(cgroup) = &self.config.cgroup {
            let _ = std::fs::remove_dir(cgroup.join(pod.as_str()));
        }
        Ok(())
    }

    async fn kill(&self, pod: &PodId) -> Result<()> {
        self.end(pod).await;
        Ok(())
    }
}
