//! Takes up what an earlier daemon left: for each pod its record, its monitor and the runtime are compared, and it is
//! adopted, finished or taken down. Never fatal: what can't be read is in quarantine, what can't be finished stays
//! listed and is tried again by the next stop or removal.
//!
//! | record            | monitor         | what happens                                                        |
//! |-------------------|-----------------|---------------------------------------------------------------------|
//! | Creating          | any             | taken down: whoever asked has no answer and asks again              |
//! | Ready, this boot  | answers         | adopted; containers' ends that nobody heard are taken from it        |
//! | Ready, this boot  | gone, or hangs  | another one takes over, see `takeover`; if that fails, see `orphans`   |
//! | Ready, other boot | (gone)          | NOTREADY, containers EXITED: the kubelet then does not run them again |
//! | Stopping, Removing| any             | the step is resumed                                                 |
//! | none              | answers         | rebuilt from what the monitor keeps                                 |

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use camino::Utf8Path;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use tokio::time::Instant;

use super::pod::{Command, Earlier, PodTask};
use super::sandbox_ops::RETRY;
use super::takeover::{self, TakenOver};
use super::{Engine, Shared, orphans, pod_restore};
use crate::core::backend::Backend;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, PodId};
use crate::core::metrics::metrics;
use crate::core::ports::{MonitorLink, monitor_v1};
use crate::core::records::{self, ContainerRecord, ExitInfo, PodRecord, Stored};
use crate::core::state::{ContainerPhase, PodPhase};
use crate::fail_point;

/// Pods recovered at once.
const PARALLEL: usize = 16;
/// How long the start waits for what has to be finished or collected: a plugin, a runtime or a disk that hangs may need
/// this daemon to be up before it is well again.
const PATIENCE: Duration = Duration::from_secs(3);

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
        fail_point!("recovery.loaded");
        let mut report = RecoveryReport { quarantined, ..Default::default() };
        let known: Vec<PodId> = stored.iter().map(|(p, _)| p.id.clone()).collect();
        let monitors = self.shared.ports.supervisor.list().await?;
        let lost = monitors.into_iter().filter(|id| !known.contains(id));
        let mut work: Vec<Stored> = stored;
        for id in lost {
            work.extend(rebuild(&self.shared, &id).await);
        }
        // Those that were half made or half removed are claimed until they are gone.
        let halves: Vec<ContainerId> = work
            .iter()
            .flat_map(|(_, containers)| containers)
            .filter(|c| is_half(c.phase))
            .map(|c| c.id.clone())
            .collect();
        let taken_up: Vec<Option<Option<_>>> = futures::stream::iter(work)
            .map(|(pod, containers)| recover_listed(&self.shared, pod, containers))
            .buffer_unordered(PARALLEL)
            .collect()
            .await;
        let unlisted = taken_up.iter().filter(|p| p.is_none()).count();
        metrics().recovered(taken_up.len() - unlisted, unlisted + report.quarantined.len());
        let finishing: Vec<_> = taken_up.into_iter().flatten().flatten().collect();
        // All pods are listed. What is left to do for them is theirs alone.
        fail_point!("recovery.pods");
        // The pods' tasks take or replace what is parked of live containers, some only after this.
        if unlisted == 0 {
            let live = self.containers(super::Scope::Local);
            let live: HashSet<&str> = live.iter().filter(|c| c.exit.is_none()).map(|c| c.id.as_str()).collect();
            self.shared.ports.parked.sweep(&|name| takeover::parked_of(name).is_some_and(|id| live.contains(id)));
        }
        let all = async move {
            futures::future::join_all(finishing).await;
        };
        self.beside("finish pods of an earlier daemon", all).await;
        report.garbage_kept = match unlisted {
            0 => {
                let collected = self.collect_garbage(halves).await.err().map(|e| e.chain());
                self.watch_for_orphans();
                collected
            }
            n => Some(format!("{n} pods could not be taken up: what they own is not garbage")),
        };
        if let Some(why) = &report.garbage_kept {
            tracing::warn!(why, "garbage is kept");
        }
        let containers = self.containers(super::Scope::Local);
        report.pods = self.pods(super::Scope::Local).len();
        report.running = containers.iter().filter(|c| c.phase == ContainerPhase::Running).count();
        Ok(report)
    }

    /// Runs `work` and waits for it [`PATIENCE`] at most; then it goes on while pods are served.
    async fn beside(&self, what: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        let (tell, told) = tokio::sync::oneshot::channel();
        self.shared.tasks.spawn_cancellable(what, async move {
            work.await;
            let _ = tell.send(());
        });
        if tokio::time::timeout(PATIENCE, told).await.is_err() {
            tracing::warn!(what, "this takes long and goes on while pods are served");
        }
    }

    /// Removes what carries our mark and neither a pod nor `halves` claims; refuses while anything is in quarantine.
    /// Backends list what could be garbage before this returns; what needs programs goes on beside, see the port.
    async fn collect_garbage(&self, halves: Vec<ContainerId>) -> Result<()> {
        if self.shared.records.has_quarantined_pods() {
            return Err(Error::precondition("unreadable records are in quarantine: what they own is not known"));
        }
        let (pods, claimed): (Vec<PodRecord>, Vec<ContainerId>) = {
            let index = self.shared.index();
            (index.all_pods(), index.all_container_ids().into_iter().chain(halves).collect())
        };
        let (restores, kept) = (self.shared.records.restores(), claimed.clone());
        blocking(move || pod_restore::sweep(&restores, &kept)).await?;
        for id in self.shared.ports.layers.list_rootfs().await? {
            if !claimed.contains(&id) {
                tracing::info!(container = id.as_str(), "removing a root file system that nobody claims");
                self.shared.ports.layers.remove_rootfs(&id).await?;
            }
        }
        for backend in &self.shared.ports.backends {
            backend.collect_garbage(&pods, &claimed).await?;
        }
        fail_point!("recovery.collected");
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

/// Backends begin the names of an exec's files in a container's folder with this.
const EXEC_FILES: &str = "exec-";

/// What is left to do for a pod that is listed again.
type Finish = BoxFuture<'static, Result<()>>;

/// Lists the pod; gives what is left to do for it, and None where it can't be listed.
async fn recover_listed(
    shared: &Arc<Shared>,
    pod: PodRecord,
    containers: Vec<ContainerRecord>,
) -> Option<Option<BoxFuture<'static, ()>>> {
    let id = pod.id.clone();
    let folders: Vec<_> = containers.iter().map(|c| shared.run_dir(&pod.id, &c.id)).collect();
    let swept = blocking(move || {
        folders.iter().for_each(|folder| sweep_execs(folder));
        Ok(())
    });
    let failed = move |e: Error| {
        tracing::error!(pod = id.as_str(), error = e.chain(), "pod not recovered in full");
    };
    if let Err(e) = swept.await {
        failed(e);
        return None;
    }
    match recover_pod(shared, pod, containers).await {
        Ok(finish) => Some(finish.map(|finish| finish.map(|done| done.unwrap_or_else(failed)).boxed())),
        Err(e) => {
            failed(e);
            None
        }
    }
}

/// Removes the files of an earlier daemon's execs, which have ended with it.
fn sweep_execs(run_dir: &Utf8Path) {
    let Ok(entries) = run_dir.read_dir_utf8() else { return };
    for entry in entries.flatten().filter(|e| e.file_name().starts_with(EXEC_FILES)) {
        let _ = std::fs::remove_file(entry.path());
    }
}

fn is_half(phase: ContainerPhase) -> bool {
    matches!(phase, ContainerPhase::Creating | ContainerPhase::Removing)
}

async fn recover_pod(
    shared: &Arc<Shared>,
    mut pod: PodRecord,
    mut containers: Vec<ContainerRecord>,
) -> Result<Option<Finish>> {
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
            tracing::error!(
                pod = pod.id.as_str(),
                error = e.chain(),
                "the pod's monitor does not answer: it is killed"
            );
            shared.ports.supervisor.kill(&pod.id).await?;
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
    let stopping = pod.phase == PodPhase::Stopping && containers.iter().any(|c| c.phase == ContainerPhase::Running);
    let can_be_taken = same_boot && (pod.phase == PodPhase::Ready || stopping);
    // A daemon that died in the middle of a take-over has left a monitor that knows nothing of what runs.
    let mut link = link.filter(|link| !can_be_taken || takeover::knows_all(link, &pod, &containers));
    let mut taken = false;
    let mut fate = fate;
    let mut kept = takeover::Kept::new();
    if pod.phase == PodPhase::Ready && link.as_ref().is_some_and(|link| takeover::has_lost_init(link, &pod)) {
        tracing::error!(pod = pod.id.as_str(), "the init of the pod's PID namespace ended while no daemon ran");
        fate = Fate::Resume(PodPhase::Stopping);
    }
    if link.is_none() && can_be_taken {
        match takeover::take_over(shared, &backend, &pod, &containers, &mut kept).await {
            Ok(TakenOver { link: new, started, ended: told, init_ended }) => {
                metrics().monitors_lost.inc();
                metrics().monitors_replaced.inc();
                tracing::warn!(pod = pod.id.as_str(), "its monitor had died: another one has taken the pod over");
                for container in &mut containers {
                    if started.contains(&container.id) {
                        container.phase = ContainerPhase::Running;
                        container.started_at = shared.ports.clock.now_ns();
                    }
                    if let Some((_, exit)) = told.iter().find(|(id, _)| *id == container.id) {
                        ended(container, exit);
                    }
                }
                if init_ended && pod.phase == PodPhase::Ready {
                    fate = Fate::Resume(PodPhase::Stopping);
                }
                (link, taken) = (Some(new), true);
            }
            Err(e) => {
                tracing::error!(pod = pod.id.as_str(), error = e.chain(), "no other monitor can take the pod over");
            }
        }
    }
    if !taken {
        for container in &mut containers {
            compare(shared, container, link.as_ref(), backend.on_node()).await;
        }
    }
    containers.sort_by_key(|c| c.created_at);
    let (half, whole): (Vec<_>, Vec<_>) = containers.into_iter().partition(|c| is_half(c.phase));
    fail_point!("recovery.compared");
    // The pod first: of a rebuilt one there is no folder yet.
    let (store, pod_record, records) = (shared.records.clone(), pod.clone(), whole.clone());
    let saved = blocking(move || {
        store.save_pod(&pod_record)?;
        records.iter().try_for_each(|container| store.save_container(container))
    })
    .await;
    if let Err(e) = saved {
        // A full disk must not make pods that run disappear: what was found out is found out again by the next daemon.
        tracing::error!(pod = pod.id.as_str(), error = e.chain(), "what a pod has become is not on record yet");
    }
    fail_point!("recovery.saved");
    let earlier = Earlier { containers: whole, half, link, kept, takeover_at: None, retry: None };
    Ok(start(shared, backend, pod, earlier, fate))
}

/// A pod's task has panicked: what it had in memory is not trusted any more. The pod is marked, and taken up from its
/// record as after a restart of the daemon; one that panics again and again is left as it is, for its requests fail.
pub(super) fn restart(shared: Arc<Shared>, id: PodId) -> BoxFuture<'static, ()> {
    async move {
        let panics = shared.index_mut().count_panic(&id);
        metrics().panics.inc();
        tracing::error!(pod = id.as_str(), panics, "a pod's task panicked: the pod is taken up from its record");
        if panics > PANICS_MAX {
            tracing::error!(pod = id.as_str(), "too many panics: the pod is left alone until the daemon starts again");
            return;
        }
        let (store, wanted) = (shared.records.clone(), id.clone());
        let done = match blocking(move || store.load_one(&wanted)).await {
            Ok(Some((pod, containers))) => match recover_pod(&shared, pod, containers).await {
                Ok(Some(finish)) => finish.await,
                Ok(None) => Ok(()),
                Err(e) => Err(e),
            },
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

/// Starts the pod's task, which first drops what is half; gives what else there is to wait for.
fn start(
    shared: &Arc<Shared>,
    backend: Arc<dyn Backend>,
    pod: PodRecord,
    mut earlier: Earlier,
    fate: Fate,
) -> Option<Finish> {
    let running = |c: &&ContainerRecord| c.phase == ContainerPhase::Running;
    let running: Vec<_> = earlier.containers.iter().filter(running).cloned().collect();
    if earlier.link.is_none() && !running.is_empty() {
        if backend.on_node() {
            earlier.link = Some(orphans::watch(shared, backend.clone(), &pod, running, &earlier.kept));
        }
        earlier.takeover_at = Some(Instant::now() + takeover::AGAIN);
    }
    if matches!(fate, Fate::TakeDown) {
        // Nobody asks for it again who was never told of it.
        earlier.retry = Some((Instant::now() + RETRY.0, RETRY.0));
    }
    let id = pod.id.clone();
    let nothing_left = earlier.half.is_empty() && matches!(fate, Fate::Adopt);
    let handle = PodTask::take_up(shared, &mut shared.index_mut(), backend, pod, earlier);
    let finish = async move {
        match fate {
            // Asked when all that is half is gone: it waits behind that.
            Fate::Adopt => handle.ask(|reply| Command::AwaitSetup { reply }).await.or(Ok(())),
            Fate::Resume(PodPhase::Stopping) => handle.ask(|reply| Command::Stop { reply }).await,
            Fate::TakeDown | Fate::Resume(_) => handle.ask(|reply| Command::Remove { reply }).await,
        }
        .map_err(|e: Error| e.context(format!("finish pod {id}")))
    };
    if nothing_left { None } else { Some(finish.boxed()) }
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
async fn compare(shared: &Arc<Shared>, container: &mut ContainerRecord, link: Option<&MonitorLink>, on_node: bool) {
    if !matches!(container.phase, ContainerPhase::Created | ContainerPhase::Running) || container.cannot_run.is_some() {
        return;
    }
    let report = link.and_then(|l| l.hello.containers.iter().find(|r| r.id == container.id.as_str()));
    if container.restore {
        // Without a monitor that has it, it was not made yet.
        let Some(report) = report else { return };
        (container.restore, container.phase) = (false, ContainerPhase::Running);
        (container.pid, container.pid_start_time) = (report.pid, report.pid_start_time);
        container.started_at = shared.ports.clock.now_ns();
    }
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
    } else if link.is_none() && !on_node {
        // Another monitor will know.
    } else if !orphans::process_of(shared, container).is_alive().unwrap_or(false) {
        let exit = monitor_v1::Exit {
            code: 255,
            finished_at: shared.ports.clock.now_ns(),
            note: "it ended while neither daemon nor monitor watched it: the exit code is not known".into(),
            ..Default::default()
        };
        ended(container, &exit);
    }
}

fn ended(container: &mut ContainerRecord, exit: &monitor_v1::Exit) {
    container.phase = ContainerPhase::Exited;
    container.finished_at = exit.finished_at.max(container.started_at).max(1);
    container.exit = Some(super::container_ops::exit_info(exit));
    container.pid = 0;
}

/// The exit record that the monitor leaves beside the container's FIFOs.
pub(super) fn read_exit(path: &camino::Utf8Path) -> Option<monitor_v1::Exit> {
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

impl PodTask {
    /// First thing a task does: containers that ended while no daemon ran are taken out of the runtime; a pod without
    /// monitor and without anything to watch ends.
    pub(super) async fn resume(&mut self) {
        for id in std::mem::take(&mut self.half) {
            match self.drop_half(&id).await {
                Ok(()) => {
                    tracing::info!(container = id.as_str(), "a container that was half made or half removed is gone")
                }
                Err(e) => tracing::error!(container = id.as_str(), error = e.chain(), "half a container stays"),
            }
        }
        let ended: Vec<_> =
            self.containers.values().filter(|c| c.phase == ContainerPhase::Exited).map(|c| c.id.clone()).collect();
        if self.pod.phase != PodPhase::Ready || self.monitor.is_none() {
            return self.end_without_monitor().await;
        }
        let live: Vec<_> = self.containers.values().filter(|c| c.exit.is_none()).map(|c| c.id.clone()).collect();
        for id in live {
            // An earlier daemon may have been killed over a cut.
            if let Err(e) = self.backend.freeze(&self.pod, &id, false).await {
                tracing::debug!(container = id.as_str(), error = e.chain(), "not thawed");
            }
            self.keep(&id).await;
        }
        for id in ended {
            // Where nobody was there to take it when it ended.
            if let Some(record) = self.containers.get(&id).cloned() {
                self.fetch_what_is_left(&record).await;
            }
            if let Err(e) = self.reap(&id).await {
                tracing::warn!(
                    container = id.as_str(),
                    error = e.chain(),
                    "an ended container is still known to the runtime"
                );
            }
        }
    }

    /// Removes a container that was being made or removed.
    async fn drop_half(&self, id: &ContainerId) -> Result<()> {
        self.reap(id).await?;
        // A monitor that died over it has left what its successor knows nothing of.
        self.backend.remove_container(&self.pod, id).await?;
        self.drop_files(id).await
    }
}
