//! Takes up what an earlier daemon left: for each pod its record, its monitor and the runtime are compared, and it is
//! adopted, finished or taken down. Never fatal: what can't be read is in quarantine, what can't be finished stays
//! listed and is tried again by the next stop or removal.
//!
//! | record            | monitor         | what happens                                                        |
//! |-------------------|-----------------|---------------------------------------------------------------------|
//! | Creating          | any             | taken down: whoever asked has no answer and asks again              |
//! | Ready, this boot  | answers         | adopted; containers' ends that nobody heard are taken from it        |
//! | Ready, this boot  | gone            | running containers are watched by pid, see `orphans`; none: NOTREADY |
//! | Ready, other boot | (gone)          | NOTREADY, containers EXITED: the kubelet then does not run them again |
//! | Stopping, Removing| any             | the step is resumed                                                 |
//! | none              | answers         | rebuilt from what the monitor keeps                                 |

use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};

use super::pod::{Command, PodTask};
use super::{Engine, Shared, orphans};
use crate::core::backend::Backend;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, PodId};
use crate::core::ports::{MonitorLink, monitor_v1};
use crate::core::records::{self, ContainerRecord, ExitInfo, PodRecord, Stored};
use crate::core::state::{ContainerPhase, PodPhase};

/// Pods recovered at once.
const PARALLEL: usize = 16;

/// Panics of one pod's task after which it is not started again.
const PANICS_MAX: u32 = 5;

/// What a recovery found; logged, and shown by Status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Pods that are there again.
    pub pods: usize,
    /// Running containers that are there again.
    pub running: usize,
    /// Folders whose records could not be read.
    pub quarantined: Vec<String>,
    /// Garbage was not collected, and why.
    pub garbage_kept: Option<String>,
}

/// What recovery decides for a pod.
enum Fate {
    Adopt,
    TakeDown,
    Resume(PodPhase),
}

impl Engine {
    /// Takes up all pods of an earlier daemon. To be called once, before anything is served.
    pub async fn recover(&self) -> Result<RecoveryReport> {
        if let Err(e) = self.sweep_checkpoints().await {
            tracing::warn!(error = e.chain(), "what checkpoints have left stays");
        }
        let store = self.shared.records.clone();
        let (stored, quarantined) = blocking(move || store.load()).await?;
        let mut report = RecoveryReport { quarantined, ..Default::default() };
        let known: Vec<PodId> = stored.iter().map(|(p, _)| p.id.clone()).collect();
        let monitors = self.shared.ports.supervisor.list().await?;
        let lost = monitors.into_iter().filter(|id| !known.contains(id));
        let mut work: Vec<Stored> = stored;
        for id in lost {
            work.extend(rebuild(&self.shared, &id).await);
        }
        futures::stream::iter(work)
            .for_each_concurrent(PARALLEL, |(pod, containers)| async {
                let id = pod.id.clone();
                if let Err(e) = recover_pod(&self.shared, pod, containers).await {
                    tracing::error!(pod = id.as_str(), error = e.chain(), "pod not recovered in full");
                }
            })
            .await;
        report.garbage_kept = self.collect_garbage().await.err().map(|e| e.chain());
        if let Some(why) = &report.garbage_kept {
            tracing::warn!(why, "garbage is kept");
        }
        let containers = self.containers(super::Scope::Local);
        report.pods = self.pods(super::Scope::Local).len();
        report.running = containers.iter().filter(|c| c.phase == ContainerPhase::Running).count();
        Ok(report)
    }

    /// Removes what carries our mark and nobody claims; refuses while anything is in quarantine.
    async fn collect_garbage(&self) -> Result<()> {
        if self.shared.records.has_quarantined_pods() {
            return Err(Error::precondition("unreadable records are in quarantine: what they own is not known"));
        }
        let (pods, claimed): (Vec<PodRecord>, Vec<ContainerId>) = {
            let index = self.shared.index();
            (index.all_pods(), index.all_container_ids())
        };
        for id in self.shared.ports.layers.list_rootfs().await? {
            if !claimed.contains(&id) {
                tracing::info!(container = id.as_str(), "removing a root file system that nobody claims");
                self.shared.ports.layers.remove_rootfs(&id).await?;
            }
        }
        for backend in &self.shared.ports.backends {
            backend.collect_garbage(&pods, &claimed).await?;
        }
        Ok(())
    }
}

/// A pod without a record, from what its monitor keeps; a monitor that is dead is cleaned away.
async fn rebuild(shared: &Arc<Shared>, id: &PodId) -> Option<Stored> {
    let supervisor = &shared.ports.supervisor;
    let link = match supervisor.connect(id).await {
        Ok(link) => link,
        Err(e) => {
            if !shared.records.has_quarantined_pods() {
                tracing::info!(pod = id.as_str(), why = e.chain(), "removing what a monitor without a record left");
                if let Err(e) = supervisor.cleanup(id).await {
                    tracing::warn!(pod = id.as_str(), error = e.chain(), "can't remove what a monitor left");
                }
            }
            return None;
        }
    };
    let pod: PodRecord = match records::decode(&link.hello.pod_info) {
        Ok(pod) => pod,
        Err(why) => {
            tracing::error!(
                pod = id.as_str(),
                why,
                "a monitor runs for a pod without a record, and what it keeps can't be read"
            );
            return None;
        }
    };
    let containers = link.hello.containers.iter().filter_map(rebuild_container).collect();
    tracing::warn!(pod = id.as_str(), "the record was lost; rebuilt from what the monitor keeps");
    Some((pod, containers))
}

/// The monitor was given the record while the container was being made: what it is now the monitor knows.
fn rebuild_container(report: &monitor_v1::ContainerReport) -> Option<ContainerRecord> {
    let mut record: ContainerRecord = records::decode(&report.info).ok()?;
    record.phase = ContainerPhase::Created;
    (record.pid, record.pid_start_time) = (report.pid, report.pid_start_time);
    Some(record)
}

async fn recover_pod(shared: &Arc<Shared>, mut pod: PodRecord, mut containers: Vec<ContainerRecord>) -> Result<()> {
    let backend = match shared.backend(&pod.handler) {
        Ok(backend) => backend,
        Err(e) => {
            return Err(
                e.context(format!("the handler of pod {} is not configured any more; its record stays", pod.id))
            );
        }
    };
    let same_boot = pod.boot_id == shared.config.boot_id;
    let link = match shared.ports.supervisor.connect(&pod.id).await {
        Ok(link) => Some(link),
        Err(e) if e.kind() == Kind::NotFound => None,
        Err(e) => {
            tracing::error!(pod = pod.id.as_str(), error = e.chain(), "the pod's monitor does not answer");
            None
        }
    };
    if !same_boot {
        after_reboot(&mut pod, &mut containers, shared.ports.clock.now_ns());
    }
    let fate = match pod.phase {
        // Nobody was told its id, and its name is free for whoever asks again.
        PodPhase::Creating => Fate::TakeDown,
        PodPhase::Stopping if pod.facts.is_none() => Fate::TakeDown,
        PodPhase::Ready if same_boot => Fate::Adopt,
        PodPhase::Ready => Fate::Resume(PodPhase::Stopping),
        PodPhase::NotReady => Fate::Adopt,
        phase => Fate::Resume(phase),
    };
    if pod.phase == PodPhase::Creating {
        // As a create that fails under this daemon: it holds no name while it is taken down.
        (pod.phase, pod.facts) = (PodPhase::Stopping, None);
    }
    for container in &mut containers {
        compare(shared, container, link.as_ref()).await;
    }
    containers.sort_by_key(|c| c.created_at);
    let (half, whole): (Vec<_>, Vec<_>) =
        containers.into_iter().partition(|c| matches!(c.phase, ContainerPhase::Creating | ContainerPhase::Removing));
    for container in half {
        drop_half(shared, &backend, &pod, &container, link.as_ref()).await;
    }
    // The pod first: of a rebuilt one there is no folder yet.
    let (store, pod_record, records) = (shared.records.clone(), pod.clone(), whole.clone());
    blocking(move || {
        store.save_pod(&pod_record)?;
        records.iter().try_for_each(|container| store.save_container(container))
    })
    .await?;
    start(shared, backend, pod, whole, link, fate).await
}

/// A pod's task has panicked: what it had in memory is not trusted any more. The pod is marked, and taken up from its
/// record as after a restart of the daemon; one that panics again and again is left as it is, for its requests fail.
pub(super) fn restart(shared: Arc<Shared>, id: PodId) -> BoxFuture<'static, ()> {
    async move {
        let panics = shared.index_mut().count_panic(&id);
        tracing::error!(pod = id.as_str(), panics, "a pod's task panicked: the pod is taken up from its record");
        if panics > PANICS_MAX {
            tracing::error!(pod = id.as_str(), "too many panics: the pod is left alone until the daemon starts again");
            return;
        }
        let (store, wanted) = (shared.records.clone(), id.clone());
        let done = match blocking(move || store.load_one(&wanted)).await {
            Ok(Some((pod, containers))) => recover_pod(&shared, pod, containers).await,
            Ok(None) => {
                shared.index_mut().remove(&id);
                shared.ports.supervisor.cleanup(&id).await
            }
            Err(e) => Err(e),
        };
        if let Err(e) = done {
            tracing::error!(pod = id.as_str(), error = e.chain(), "pod not recovered in full");
        }
    }
    .boxed()
}

async fn start(
    shared: &Arc<Shared>,
    backend: Arc<dyn Backend>,
    pod: PodRecord,
    containers: Vec<ContainerRecord>,
    link: Option<MonitorLink>,
    fate: Fate,
) -> Result<()> {
    let link = link.or_else(|| {
        let running: Vec<_> = containers.iter().filter(|c| c.phase == ContainerPhase::Running).cloned().collect();
        (!running.is_empty()).then(|| orphans::watch(shared, backend.clone(), &pod, running))
    });
    let id = pod.id.clone();
    let handle = PodTask::start(shared, &mut shared.index_mut(), backend, pod, containers, link);
    match fate {
        Fate::Adopt => Ok(()),
        Fate::Resume(PodPhase::Stopping) => handle.ask(|reply| Command::Stop { reply }).await,
        Fate::TakeDown | Fate::Resume(_) => handle.ask(|reply| Command::Remove { reply }).await,
    }
    .map_err(|e| e.context(format!("finish pod {id}")))
}

/// A reboot ended everything; what the pod had outside is taken down by the stop that follows.
fn after_reboot(pod: &mut PodRecord, containers: &mut [ContainerRecord], now: i64) {
    for c in containers.iter_mut() {
        if matches!(c.phase, ContainerPhase::Running | ContainerPhase::Created) {
            c.phase = ContainerPhase::Exited;
            c.finished_at = now.max(c.started_at);
            let message = "the node was rebooted while the container ran".to_string();
            c.exit = Some(ExitInfo { code: 255, reason: "Unknown".into(), message });
            c.pid = 0;
        }
    }
    if pod.phase == PodPhase::Ready {
        tracing::info!(pod = pod.id.as_str(), "the node was rebooted: the pod is not ready any more");
    }
}

/// Brings a container's record up to what its monitor, its exit record or its process says.
async fn compare(shared: &Arc<Shared>, container: &mut ContainerRecord, link: Option<&MonitorLink>) {
    if !matches!(container.phase, ContainerPhase::Created | ContainerPhase::Running) || container.cannot_run.is_some() {
        return;
    }
    let report = link.and_then(|l| l.hello.containers.iter().find(|r| r.id == container.id.as_str()));
    if let Some(report) = report {
        container.started_at = container.started_at.max(report.started_at);
        match (report.phase(), &report.exit) {
            (monitor_v1::ContainerPhase::PhaseExited, Some(exit)) => ended(container, exit),
            (monitor_v1::ContainerPhase::PhaseRunning, _) => container.phase = ContainerPhase::Running,
            _ => {}
        }
        return;
    }
    let exit_file = shared.run_dir(&container.pod, &container.id).join("exit.json");
    if let Some(exit) = read_exit(&exit_file) {
        ended(container, &exit);
    } else if !orphans::process_of(shared, container).is_alive().unwrap_or(false) {
        let exit = monitor_v1::Exit {
            code: 255,
            finished_at: shared.ports.clock.now_ns(),
            note: "it ended while neither daemon nor monitor watched it: the exit code is not known".into(),
            ..Default::default()
        };
        ended(container, &exit);
    } else {
        container.phase = ContainerPhase::Running;
    }
}

fn ended(container: &mut ContainerRecord, exit: &monitor_v1::Exit) {
    container.phase = ContainerPhase::Exited;
    container.finished_at = exit.finished_at.max(container.started_at).max(1);
    container.exit = Some(super::container_ops::exit_info(exit));
    container.pid = 0;
}

/// The exit record that the monitor leaves beside the container's FIFOs.
fn read_exit(path: &camino::Utf8Path) -> Option<monitor_v1::Exit> {
    #[derive(serde::Deserialize)]
    struct ExitFile {
        version: u32,
        exit_code: i32,
        signal: i32,
        finished_at: i64,
        oom: bool,
        note: String,
    }
    let file: ExitFile = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (file.version == 1).then_some(monitor_v1::Exit {
        code: file.exit_code,
        signal: file.signal,
        finished_at: file.finished_at,
        oom: file.oom,
        note: file.note,
    })
}

/// Removes a container that was being made or removed.
async fn drop_half(
    shared: &Arc<Shared>,
    backend: &Arc<dyn Backend>,
    pod: &PodRecord,
    container: &ContainerRecord,
    link: Option<&MonitorLink>,
) {
    let id = &container.id;
    let done = async {
        match link {
            Some(link) => link.monitor.delete(id).await?,
            None => backend.remove_container(pod, id).await?,
        }
        shared.ports.layers.remove_rootfs(id).await?;
        let run_dir = shared.run_dir(&pod.id, id);
        let (store, pod, id) = (shared.records.clone(), pod.id.clone(), id.clone());
        blocking(move || {
            crate::utils::beneath::remove_tree(run_dir.as_std_path())
                .map_err(|e| Error::io(format!("remove {run_dir}"), e))?;
            store.delete_container(&pod, &id)
        })
        .await
    };
    match done.await {
        Ok(()) => tracing::info!(container = id.as_str(), "a container that was half made or half removed is gone"),
        Err(e) => tracing::error!(container = id.as_str(), error = e.chain(), "half a container stays"),
    }
}

impl PodTask {
    /// First thing a task does: containers that ended while no daemon ran are taken out of the runtime; a pod without
    /// monitor and without anything to watch ends.
    pub(super) async fn resume(&mut self) {
        let ended: Vec<_> =
            self.containers.values().filter(|c| c.phase == ContainerPhase::Exited).map(|c| c.id.clone()).collect();
        if self.pod.phase != PodPhase::Ready || self.monitor.is_none() {
            return self.end_without_monitor().await;
        }
        for id in ended {
            if let Err(e) = self.reap(&id).await {
                tracing::warn!(
                    container = id.as_str(),
                    error = e.chain(),
                    "an ended container is still known to the runtime"
                );
            }
        }
    }
}
