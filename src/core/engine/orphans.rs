//! Containers whose monitor is gone and that no other one can take over now: their processes run on. Each is watched by a
//! pidfd until it ends, and can be killed and removed; exec, attach and log rotation need a monitor and are refused. The
//! exit code is what the kernel tells by the pidfd (from 6.15 on), else 255 with the reason, never 0.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::Shared;
use super::takeover::Kept;
use crate::core::backend::Backend;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::{ExecExit, Monitor, MonitorEvent, MonitorLink, monitor_v1};
use crate::core::records::{ContainerRecord, PodRecord};
use crate::utils::pidfd;

/// Why a code is 255.
const NOTE: &str = "its monitor died before it: the exit code is not known";

struct NoMonitor {
    backend: Arc<dyn Backend>,
    pod: PodRecord,
    pids: HashMap<ContainerId, Arc<OwnedFd>>,
}

/// Watches `running` in place of their monitor.
pub(super) fn watch(
    shared: &Arc<Shared>,
    backend: Arc<dyn Backend>,
    pod: &PodRecord,
    running: Vec<ContainerRecord>,
    kept: &Kept,
) -> MonitorLink {
    let (sender, events) = mpsc::channel(running.len().max(1));
    let mut pids = HashMap::new();
    for container in running {
        let held = kept.get(&container.id).and_then(|k| k.pidfd.as_ref()?.try_clone().ok());
        let fd = held.or_else(|| process_of(shared, &container).open().ok().flatten()).map(Arc::new);
        if let Some(fd) = &fd {
            pids.insert(container.id.clone(), fd.clone());
        }
        let (sender, shared_in, id) = (sender.clone(), shared.clone(), container.id);
        let (backend, pod) = (backend.clone(), pod.clone());
        shared.tasks.spawn_cancellable(format!("watch {}", id.short()), async move {
            if let Err(e) = backend.abandon_execs(&pod, &id).await {
                tracing::warn!(container = id.as_str(), error = e.chain(), "execs of a monitor that is gone run on");
            }
            let status = match fd {
                Some(fd) => pidfd::exit_status(fd).await,
                None => None,
            };
            let finished_at = shared_in.ports.clock.now_ns();
            let exit = match status {
                Some(status) => monitor_v1::Exit {
                    code: status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(255),
                    signal: status.signal().unwrap_or(0),
                    finished_at,
                    ..Default::default()
                },
                None => monitor_v1::Exit { code: 255, finished_at, note: NOTE.into(), ..Default::default() },
            };
            let _ = sender.send(MonitorEvent::ContainerExited(id, exit)).await;
        });
    }
    let monitor = Arc::new(NoMonitor { backend, pod: pod.clone(), pids });
    MonitorLink { monitor, hello: monitor_v1::HelloReply::default(), events }
}

/// The init of a container that was made in this boot.
pub(super) fn process_of(shared: &Shared, container: &ContainerRecord) -> pidfd::ProcessId {
    pidfd::ProcessId {
        pid: container.pid,
        start_time: container.pid_start_time,
        boot_id: shared.config.boot_id.clone(),
    }
}

impl NoMonitor {
    fn refuse<T>(&self) -> Result<T> {
        Err(Error::new(Kind::Unavailable, format!("the monitor of pod {} is gone", self.pod.id)))
    }
}

#[async_trait]
impl Monitor for NoMonitor {
    fn pid(&self) -> i32 {
        0
    }
    async fn create(&self, _: monitor_v1::CreateContainer, _: Vec<OwnedFd>) -> Result<monitor_v1::Created> {
        self.refuse()
    }
    async fn start(&self, _: &ContainerId) -> Result<i64> {
        self.refuse()
    }
    async fn signal(&self, container: &ContainerId, signal: i32, _all: bool) -> Result<()> {
        match self.pids.get(container) {
            Some(fd) => pidfd::signal(fd, signal).map_err(|e| Error::io(format!("signal container {container}"), e)),
            None => Ok(()),
        }
    }
    async fn delete(&self, container: &ContainerId) -> Result<()> {
        self.backend.remove_container(&self.pod, container).await
    }
    async fn exec(&self, _: monitor_v1::Exec, _: [Option<OwnedFd>; 3]) -> Result<ExecExit> {
        self.refuse()
    }
    async fn reopen_log(&self, _: &ContainerId) -> Result<()> {
        self.refuse()
    }
    async fn start_init(&self, _: monitor_v1::StartInit) -> Result<i32> {
        self.refuse()
    }
    async fn set_pod_info(&self, _: Vec<u8>) -> Result<()> {
        Ok(())
    }
    async fn shutdown(&self, _: bool) -> Result<()> {
        Ok(())
    }
}
