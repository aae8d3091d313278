//! What a pod's task does for the pod itself: make it, stop it, forget it.
//!
//! A create that fails is taken back whole. What can't be taken back at once (a CNI plugin that fails to free an
//! address) keeps the record in phase Stopping, frees the name, and is tried again until it succeeds.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::events::EventKind;
use super::pod::{Next, PodTask, next_event};
use crate::core::backend::Journal;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::plugins::PodMoment;
use crate::core::ports::{MonitorEvent, monitor_v1};
use crate::core::records::{self, ContainerRecord, PodRecord, RecordStore, Resource};
use crate::core::state::{ContainerPhase, PodPhase, PodRequest, Verdict};
use crate::fail_point;

/// How long processes that were killed may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(30);
/// First and last pause between tries of a clean-up.
pub(super) const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Writes notes into the pod's record.
struct RecordJournal {
    pod: PodRecord,
    store: RecordStore,
}

#[async_trait::async_trait]
impl Journal for RecordJournal {
    async fn note(&mut self, resources: Vec<Resource>) -> Result<()> {
        let before = self.pod.resources.len();
        for resource in resources {
            if !self.pod.resources.contains(&resource) {
                self.pod.resources.push(resource);
            }
        }
        if self.pod.resources.len() == before {
            return Ok(());
        }
        let (store, pod) = (self.store.clone(), self.pod.clone());
        blocking(move || store.save_pod(&pod)).await
    }
}

impl PodTask {
    /// RunPodSandbox. On failure nothing is left, or a retry is set.
    pub(super) async fn setup(&mut self) -> Result<()> {
        let started = Instant::now();
        match self.make_sandbox().await {
            Ok(()) => {
                let m = &self.pod.config.metadata;
                tracing::info!(
                    pod = self.pod.id.as_str(),
                    name = m.name,
                    namespace = m.namespace,
                    handler = self.pod.handler,
                    ms = started.elapsed().as_millis() as u64,
                    "pod runs"
                );
                self.tell(EventKind::Created, None);
                self.tell(EventKind::Started, None);
                Ok(())
            }
            Err(e) => {
                self.pod.phase = PodPhase::Stopping;
                if self.pod.facts.is_some() {
                    // They may have been told that it is there.
                    self.tell_plugins(PodMoment::Remove).await;
                }
                if let Err(left) = self.take_back().await {
                    tracing::error!(
                        pod = self.pod.id.as_str(),
                        error = left.chain(),
                        "a failed create can't be taken back yet"
                    );
                    self.publish_pod();
                    self.shared.index_mut().release_name(&self.pod);
                    self.retry = Some((Instant::now() + RETRY.0, RETRY.0));
                }
                Err(e)
            }
        }
    }

    async fn make_sandbox(&mut self) -> Result<()> {
        self.save_pod().await?;
        fail_point!("sandbox.recorded");
        let pod_dir = self.shared.pod_dir(self.id());
        let folder = pod_dir.clone();
        blocking(move || make_private_dir(&folder)).await?;
        fail_point!("sandbox.folder");
        let link =
            self.shared.ports.supervisor.spawn(self.id(), &self.pod.handler, records::encode(&self.pod)?).await?;
        self.set_monitor(Some(link));
        fail_point!("sandbox.monitor");
        let monitor = self.the_monitor()?;
        let mut journal = RecordJournal { pod: self.pod.clone(), store: self.shared.records.clone() };
        let made = self.backend.ensure_sandbox(&self.pod, &pod_dir, &*monitor, &mut journal, &self.cancel).await;
        self.pod.resources = journal.pod.resources;
        self.pod.facts = Some(made?);
        fail_point!("sandbox.made");
        self.may_run().await?;
        if self.cancel.is_cancelled() {
            return Err(Error::new(Kind::Aborted, format!("pod {} was stopped while it was made", self.pod.id)));
        }
        self.pod.phase = PodPhase::Ready;
        self.save_pod().await?;
        fail_point!("sandbox.ready");
        self.tell_monitor().await;
        fail_point!("sandbox.told");
        self.publish_pod();
        Ok(())
    }

    /// Undoes all that was made of the pod and forgets it.
    async fn take_back(&mut self) -> Result<()> {
        self.end_monitor().await?;
        self.backend.teardown(&self.pod, &self.shared.pod_dir(self.id())).await?;
        self.forget().await
    }

    /// The retry of a clean-up that failed.
    pub(super) async fn retry_cleanup(&mut self) -> Next {
        match self.take_back().await {
            Ok(()) => {
                tracing::info!(pod = self.pod.id.as_str(), "what a failed create had left is gone");
                Next::End
            }
            Err(e) => {
                let pause = self.retry.map_or(RETRY.0, |(_, p)| (p * 2).min(RETRY.1));
                tracing::warn!(
                    pod = self.pod.id.as_str(),
                    error = e.chain(),
                    next_s = pause.as_secs(),
                    "clean-up fails still"
                );
                self.retry = Some((Instant::now() + pause, pause));
                Next::GoOn
            }
        }
    }

    /// StopPodSandbox: everything in it ends, its network and namespaces go; containers stay, exited.
    pub(super) async fn stop_sandbox(&mut self) -> Result<()> {
        if self.pod.phase.verdict(PodRequest::Stop) == Verdict::Done {
            return Ok(());
        }
        self.take_down().await?;
        if let Err(e) = self.save_pod().await {
            // Not stopped as long as a restart would find it ready: whoever asked asks again.
            self.pod.phase = PodPhase::Stopping;
            return Err(e);
        }
        fail_point!("stop_pod.saved");
        self.publish_pod();
        tracing::info!(pod = self.pod.id.as_str(), "pod stopped");
        self.tell(EventKind::Stopped, None);
        Ok(())
    }

    /// Writes down which step is under way, where that can be: a full disk must not keep what would free it from going.
    async fn mark(&self) {
        if let Err(e) = self.save_pod().await {
            tracing::error!(pod = self.pod.id.as_str(), error = e.chain(), "a step is taken that is not on record");
        }
    }

    /// All of a stop but for its record.
    async fn take_down(&mut self) -> Result<()> {
        self.pod.phase = PodPhase::Stopping;
        self.mark().await;
        self.publish_pod();
        fail_point!("stop_pod.marked");
        self.tell_plugins(PodMoment::Stop).await;
        self.end_containers().await?;
        fail_point!("stop_pod.ended");
        self.end_monitor().await?;
        fail_point!("stop_pod.monitor");
        self.backend.teardown(&self.pod, &self.shared.pod_dir(self.id())).await?;
        fail_point!("stop_pod.torn");
        self.pod.phase = PodPhase::NotReady;
        self.pod.resources.clear();
        Ok(())
    }

    /// RemovePodSandbox.
    pub(super) async fn remove_sandbox(&mut self) -> Result<()> {
        if self.pod.phase.verdict(PodRequest::Stop) != Verdict::Done {
            self.take_down().await?;
            self.tell(EventKind::Stopped, None);
        }
        self.pod.phase = PodPhase::Removing;
        self.mark().await;
        self.publish_pod();
        fail_point!("remove_pod.marked");
        for id in self.containers.keys().cloned().collect::<Vec<_>>() {
            self.remove_container(&id).await?;
        }
        fail_point!("remove_pod.containers");
        self.tell_plugins(PodMoment::Remove).await;
        self.forget().await?;
        tracing::info!(pod = self.pod.id.as_str(), "pod removed");
        self.tell(EventKind::Deleted, None);
        Ok(())
    }

    async fn forget(&mut self) -> Result<()> {
        self.shared.ports.supervisor.cleanup(self.id()).await?;
        fail_point!("remove_pod.monitor");
        let (store, id, folder) = (self.shared.records.clone(), self.id().clone(), self.shared.pod_dir(self.id()));
        blocking(move || {
            crate::utils::beneath::remove_tree(folder.as_std_path())
                .map_err(|e| Error::io(format!("remove {folder}"), e))?;
            fail_point!("remove_pod.folder");
            store.delete_pod(&id)
        })
        .await
    }

    async fn end_monitor(&mut self) -> Result<()> {
        if let Some(monitor) = self.monitor.clone() {
            // One that hangs is not waited for.
            let ended = match monitor.ping().await {
                Ok(()) => monitor.shutdown(true).await,
                Err(e) => {
                    self.kill_hung(&e).await;
                    Err(e)
                }
            };
            if let Err(e) = ended {
                tracing::warn!(pod = self.pod.id.as_str(), error = e.chain(), "the monitor does not end by itself");
            }
            self.set_monitor(None);
        }
        let supervisor = &self.shared.ports.supervisor;
        match supervisor.cleanup(self.id()).await {
            // One that hung when it was given up, and goes on now.
            Err(e) if e.kind() == Kind::FailedPrecondition => {
                tracing::warn!(pod = self.pod.id.as_str(), "a monitor that was given up is there again: it is ended");
                supervisor.connect(self.id()).await?.monitor.shutdown(true).await?;
                supervisor.cleanup(self.id()).await
            }
            done => done,
        }
    }

    /// Kills all containers and waits until each one's end is on record.
    async fn end_containers(&mut self) -> Result<()> {
        let alive = |p: ContainerPhase| matches!(p, ContainerPhase::Running | ContainerPhase::Created);
        self.kill_all().await?;
        let deadline = Instant::now() + KILL_PATIENCE;
        while self.monitor.is_some() && self.containers.values().any(|c| c.phase == ContainerPhase::Running) {
            match tokio::time::timeout_at(deadline, next_event(&mut self.events)).await {
                Ok(Some(MonitorEvent::ContainerExited(id, exit))) => self.on_exit(&id, exit).await,
                Ok(Some(MonitorEvent::Gone) | None) => {
                    self.on_monitor_gone().await;
                    self.kill_all().await?;
                }
                // The pod goes down anyway.
                Ok(Some(
                    MonitorEvent::InitExited(_)
                    | MonitorEvent::LogTrouble(..)
                    | MonitorEvent::LogDropped(..)
                    | MonitorEvent::StdinClosed(_),
                )) => {}
                Err(_) => {
                    return Err(Error::new(
                        Kind::DeadlineExceeded,
                        format!(
                            "containers of pod {} were killed but are not gone after {KILL_PATIENCE:?}",
                            self.pod.id
                        ),
                    ));
                }
            }
        }
        let rest: Vec<_> = self.containers.values().filter(|c| alive(c.phase)).map(|c| c.id.clone()).collect();
        for id in rest {
            // Never started, or running without anybody to tell of its end.
            self.reap(&id).await?;
            self.on_exit(&id, killed_now(self.shared.ports.clock.now_ns(), "killed with its pod")).await;
        }
        Ok(())
    }

    /// SIGKILL to all that runs. A monitor that hangs must not keep its pod from going: another one takes over, or else it is
    /// ended, and the runtime asked instead.
    async fn kill_all(&mut self) -> Result<()> {
        let running: Vec<ContainerId> =
            self.containers.values().filter(|c| c.phase == ContainerPhase::Running).map(|c| c.id.clone()).collect();
        for id in &running {
            if self.monitor.is_none() {
                break;
            }
            if let Err(e) = self.signal(id, libc::SIGKILL, true).await {
                tracing::error!(pod = self.pod.id.as_str(), error = e.chain(), "going on without the monitor");
                self.set_monitor(None);
                // It may answer, and only not reach what it is to kill.
                self.shared.ports.supervisor.kill(self.id()).await?;
                self.shared.ports.supervisor.cleanup(self.id()).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn on_init_exit(&mut self, exit: monitor_v1::Exit) {
        if self.pod.phase == PodPhase::Ready {
            tracing::error!(
                pod = self.pod.id.as_str(),
                code = exit.code,
                "the init of the pod's PID namespace ended: the pod is not ready any more"
            );
            if let Err(e) = self.stop_sandbox().await {
                tracing::error!(pod = self.pod.id.as_str(), error = e.chain(), "a pod without init can't be stopped");
            }
        }
    }

    /// The pod's unit has ended by somebody else's doing, and all that ran in it: the pod becomes NOTREADY.
    pub(super) async fn on_unit_end(&mut self, why: String) {
        if self.pod.phase != PodPhase::Ready {
            return;
        }
        tracing::error!(pod = self.pod.id.as_str(), why, "the pod's unit has ended: the pod is not ready any more");
        // Its monitor would wait for what is gone.
        self.set_monitor(None);
        if let Err(e) = self.shared.ports.supervisor.kill(self.id()).await {
            tracing::error!(pod = self.pod.id.as_str(), error = e.chain(), "its monitor can't be ended");
        }
        let lives = |c: &&Arc<ContainerRecord>| matches!(c.phase, ContainerPhase::Running | ContainerPhase::Created);
        for id in self.containers.values().filter(lives).map(|c| c.id.clone()).collect::<Vec<_>>() {
            // One that had ended by itself, and whose monitor had no time to say so.
            let told = super::recovery::read_exit(&self.shared.run_dir(&self.pod.id, &id).join("exit.json"));
            let finished_at = self.shared.ports.clock.now_ns();
            let lost = monitor_v1::Exit { code: 255, finished_at, note: why.clone(), ..Default::default() };
            self.on_exit(&id, told.unwrap_or(lost)).await;
        }
        if let Err(e) = self.stop_sandbox().await {
            tracing::error!(
                pod = self.pod.id.as_str(),
                error = e.chain(),
                "a pod without its unit can't be stopped yet"
            );
        }
    }

    /// Without a monitor, and with nothing left to watch, no container can be made in the pod ever again: it becomes
    /// NOTREADY, so that the kubelet makes another one in its place.
    pub(super) async fn end_without_monitor(&mut self) {
        // One whose containers are not on the node is without a monitor until another one can be had.
        if self.pod.phase != PodPhase::Ready || self.monitor.is_some() || self.takeover_at.is_some() {
            return;
        }
        tracing::error!(pod = self.pod.id.as_str(), "the pod has no monitor: it is not ready any more");
        if let Err(e) = self.stop_sandbox().await {
            tracing::error!(pod = self.pod.id.as_str(), error = e.chain(), "a pod without monitor can't be stopped");
        }
    }
}

/// The exit of a container that was killed before anything was heard of its end.
pub(super) fn killed_now(now: i64, why: &str) -> monitor_v1::Exit {
    monitor_v1::Exit { code: 137, signal: libc::SIGKILL, finished_at: now, oom: false, note: why.to_string() }
}

/// Makes a folder with mode 0700 and its parents.
pub(super) fn make_private_dir(path: &camino::Utf8Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| Error::io(format!("make folder {path}"), e))
}
