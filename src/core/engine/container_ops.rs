//! What a pod's task does for its containers: make, start, stop, forget them, and take note of their ends.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use camino::Utf8PathBuf;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::events::EventKind;
use super::pod::{PodTask, StopWait};
use super::sandbox_ops::{killed_now, make_private_dir};
use super::{orphans, unknown_container, volumes};
use crate::core::backend::{Launch, LaunchContext};
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::limits;
use crate::core::ports::{Image, RootfsOptions, monitor_v1};
use crate::core::records::{self, ContainerRecord, ExitInfo, ResolvedUser, SandboxFacts};
use crate::core::spec::{ContainerConfig, NamespaceMode};
use crate::core::state::{ContainerPhase, ContainerRequest, PodPhase, PodRequest, Verdict};

/// After SIGKILL: how long until a container that does not end is called stuck.
const KILL_PATIENCE: Duration = Duration::from_secs(60);
/// Longer graces are as good as this one; the wire allows more than a clock can count.
const GRACE_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

impl PodTask {
    /// CreateContainer. On failure nothing is left.
    pub(super) async fn create_container(&mut self, config: ContainerConfig) -> Result<ContainerId> {
        if let Verdict::Refuse(why) = self.pod.phase.verdict(PodRequest::CreateContainer) {
            return Err(Error::precondition(format!("container {:?} in pod {}: {why}", config.name, self.pod.id)));
        }
        limits::check(&config.resources, &config.resources)
            .map_err(|e| e.context(format!("container {:?} in pod {}", config.name, self.pod.id)))?;
        if let Some(id) = self.taken(&config)? {
            return Ok(id);
        }
        let facts = self.pod.facts.clone().ok_or_else(|| Error::internal("a ready pod without facts"))?;
        let image = self.shared.ports.images.resolve(&config.image.image).ok_or_else(|| match &config.image {
            // Kubelets and crictl name a checkpoint by the path of its archive.
            image if image.image.starts_with('/') => Error::new(
                Kind::Unimplemented,
                format!(
                    "container {:?} from the archive {:?}: checkpoints can't be restored yet",
                    config.name, image.image
                ),
            ),
            image => Error::not_found(format!(
                "image {:?} of container {:?} is not here: pull it first",
                image.image, config.name
            )),
        })?;
        let mut record = self.new_record(&config, &image)?;
        let id = record.id.clone();
        self.save_container(&record).await?;
        match self.launch(&mut record, &config, &image, &facts).await {
            Ok(()) => {
                tracing::info!(
                    pod = self.pod.id.as_str(),
                    container = id.as_str(),
                    name = config.name,
                    image = config.image.image,
                    "container created"
                );
                self.containers.insert(id.clone(), record);
                self.tell(EventKind::Created, Some(&id));
                Ok(id)
            }
            Err(e) => {
                self.undo_create(&id).await;
                Err(e.context(format!("create container {:?} in pod {}", config.name, self.pod.id)))
            }
        }
    }

    /// The id of a container of that name and attempt that nobody waited for; one that somebody has is an error.
    fn taken(&mut self, config: &ContainerConfig) -> Result<Option<ContainerId>> {
        let same = |c: &&ContainerRecord| c.config.name == config.name && c.config.attempt == config.attempt;
        let Some(id) = self.containers.values().find(same).map(|c| c.id.clone()) else { return Ok(None) };
        if let Some(i) = self.unclaimed.iter().position(|u| *u == id) {
            self.unclaimed.remove(i);
            return Ok(Some(id));
        }
        Err(Error::new(
            Kind::AlreadyExists,
            format!("container {:?} (attempt {}) of pod {} is {id} already", config.name, config.attempt, self.pod.id),
        ))
    }

    fn new_record(&self, config: &ContainerConfig, image: &Image) -> Result<ContainerRecord> {
        let log_path = match (&self.pod.config.log_directory, config.log_path.as_str()) {
            (Some(folder), file) if !file.is_empty() => Some(log_file(folder, file)?),
            _ => None,
        };
        Ok(ContainerRecord {
            id: ContainerId::new(),
            pod: self.pod.id.clone(),
            config: config.clone(),
            image_id: image.id.clone(),
            image_ref: image.repo_digests.first().cloned().unwrap_or_else(|| image.id.to_string()),
            phase: ContainerPhase::Creating,
            created_at: self.shared.ports.clock.now_ns(),
            started_at: 0,
            finished_at: 0,
            exit: None,
            user: ResolvedUser::default(),
            log_path,
            stop_signal: libc::SIGTERM,
            pid: 0,
            pid_start_time: 0,
            cannot_run: None,
        })
    }

    async fn launch(
        &mut self,
        record: &mut ContainerRecord,
        config: &ContainerConfig,
        image: &Arc<Image>,
        facts: &SandboxFacts,
    ) -> Result<()> {
        let monitor = self.the_monitor()?;
        let run_dir = self.shared.run_dir(&self.pod.id, &record.id);
        let (folder, log) = (run_dir.clone(), record.log_path.clone());
        blocking(move || {
            make_private_dir(&folder)?;
            match log.as_deref().and_then(|l| l.parent()) {
                Some(parent) => {
                    std::fs::create_dir_all(parent).map_err(|e| Error::io(format!("make log folder {parent}"), e))
                }
                None => Ok(()),
            }
        })
        .await?;
        let layers = &self.shared.ports.layers;
        let wanted = volumes::find(&*self.shared.ports.images, config)?;
        volumes::note(&wanted, &mut record.config);
        let user = self.pod.config.security.namespaces.user.clone().unwrap_or_default();
        let volumes = volumes::chains(&wanted);
        let options = RootfsOptions { uid_map: user.uids, gid_map: user.gids, volumes, ..Default::default() };
        layers.create_rootfs(&record.id, &image.chains, &options).await?;
        let rootfs = layers.mount_rootfs(&record.id).await?;
        let (volumes, volume_mounts) =
            volumes::mount(&self.shared, wanted, config, self.pod.config.security.namespaces.user.as_ref()).await?;
        let target = self.target(config)?;
        let Launch { mut plan, user, stop_signal } = self
            .backend
            .launch_plan(LaunchContext {
                pod: &self.pod,
                facts,
                pod_dir: &self.shared.pod_dir(&self.pod.id),
                run_dir: &run_dir,
                rootfs_mount_point: &self.shared.config.state.join("rootfs/mnt"),
                id: &record.id,
                config,
                image,
                rootfs: rootfs.as_fd(),
                volumes: &volumes,
                target,
                log_path: record.log_path.as_deref(),
            })
            .await?;
        (record.user, record.stop_signal) = (user, stop_signal);
        plan.info = records::encode(record)?;
        let mounts = std::iter::once(rootfs).chain(volume_mounts).collect();
        let made = tokio::select! {
            made = monitor.create(plan, mounts) => made,
            () = self.cancel.cancelled() => {
                return Err(Error::new(Kind::Aborted, "the pod was stopped meanwhile"));
            }
        };
        match made {
            Ok(made) => (record.pid, record.pid_start_time) = (made.pid, made.pid_start_time),
            // A pod that is not restarted must end with it and not be created for ever: StartContainer tells.
            Err(e) if e.kind() == Kind::Internal => match self.backend.cannot_run(&run_dir).await {
                Some(why) => record.cannot_run = Some(why),
                None => return Err(e),
            },
            Err(e) => return Err(e),
        }
        record.phase = ContainerPhase::Created;
        self.save_container(record).await
    }

    fn target(&self, config: &ContainerConfig) -> Result<Option<&ContainerRecord>> {
        let namespaces = &config.security.namespaces;
        if namespaces.pid != NamespaceMode::Target {
            return Ok(None);
        }
        let wanted = namespaces.target.as_deref().unwrap_or_default();
        let found = self.containers.values().find(|c| c.id.as_str() == wanted);
        match found {
            Some(c) if c.phase == ContainerPhase::Running => Ok(Some(c)),
            Some(c) => Err(Error::precondition(format!("target container {wanted}: {}", c.phase.word()))),
            None => Err(Error::invalid(format!("target container {wanted:?} is not in pod {}", self.pod.id))),
        }
    }

    async fn undo_create(&mut self, id: &ContainerId) {
        let mut left = Vec::new();
        left.extend(self.reap(id).await.err());
        left.extend(self.drop_files(id).await.err());
        for e in left {
            tracing::error!(container = id.as_str(), error = e.chain(), "a failed create left something behind");
        }
        self.shared.index_mut().forget_container(&self.pod.id, id);
    }

    /// Kills and removes the container in the runtime, through the monitor or without it.
    pub(super) async fn reap(&self, id: &ContainerId) -> Result<()> {
        match &self.monitor {
            Some(monitor) => monitor.delete(id).await,
            None => self.backend.remove_container(&self.pod, id).await,
        }
    }

    /// Removes root file system, run folder and record.
    async fn drop_files(&self, id: &ContainerId) -> Result<()> {
        // A root file system that is busy goes at the next start; it must not keep the container from going.
        if let Err(e) = self.shared.ports.layers.remove_rootfs(id).await {
            tracing::error!(container = id.as_str(), error = e.chain(), "the root file system stays for now");
        }
        let (store, pod, id, folder) =
            (self.shared.records.clone(), self.pod.id.clone(), id.clone(), self.shared.run_dir(&self.pod.id, id));
        blocking(move || {
            crate::utils::beneath::remove_tree(folder.as_std_path())
                .map_err(|e| Error::io(format!("remove {folder}"), e))?;
            store.delete_container(&pod, &id)
        })
        .await
    }

    /// StartContainer.
    pub(super) async fn start_container(&mut self, id: &ContainerId) -> Result<()> {
        let mut record = self.containers.get(id).cloned().ok_or_else(|| unknown_container(id.as_str()))?;
        if let Verdict::Refuse(why) = record.phase.verdict(ContainerRequest::Start) {
            return Err(Error::precondition(format!("start container {id}: {why}")));
        }
        if self.pod.phase != PodPhase::Ready {
            return Err(Error::precondition(format!("start container {id}: the sandbox is {}", self.pod.phase.word())));
        }
        self.unclaimed.retain(|u| u != id);
        if let Some(why) = record.cannot_run.clone() {
            let now = self.shared.ports.clock.now_ns();
            let exit = ExitInfo { code: 128, reason: "StartError".into(), message: why.clone() };
            self.finish(&mut record, now, exit).await;
            return Err(Error::invalid(format!("start container {id}: {why}")));
        }
        match self.the_monitor()?.start(id).await {
            Ok(started_at) => {
                record.phase = ContainerPhase::Running;
                record.started_at = started_at;
                self.containers.insert(id.clone(), record.clone());
                tracing::info!(pod = self.pod.id.as_str(), container = id.as_str(), pid = record.pid, "container runs");
                let saved = self.save_container(&record).await;
                self.tell(EventKind::Started, Some(id));
                saved
            }
            Err(e) => {
                let note = e.chain();
                let now = self.shared.ports.clock.now_ns();
                self.finish(&mut record, now, ExitInfo { code: 128, reason: "StartError".into(), message: note }).await;
                Err(e.context(format!("start container {id}")))
            }
        }
    }

    /// A container's process ended: its end goes on record, then what the runtime keeps of it goes.
    pub(super) async fn on_exit(&mut self, id: &ContainerId, exit: monitor_v1::Exit) {
        let Some(mut record) = self.containers.get(id).cloned() else { return };
        if record.phase == ContainerPhase::Exited {
            return;
        }
        let info = exit_info(&exit);
        tracing::info!(
            pod = self.pod.id.as_str(),
            container = id.as_str(),
            code = info.code,
            reason = info.reason,
            "container ended"
        );
        self.finish(&mut record, exit.finished_at, info).await;
    }

    async fn finish(&mut self, record: &mut ContainerRecord, finished_at: i64, exit: ExitInfo) {
        record.phase = ContainerPhase::Exited;
        record.finished_at = finished_at.max(record.started_at).max(1);
        record.exit = Some(exit);
        record.pid = 0;
        self.containers.insert(record.id.clone(), record.clone());
        let saved = self.save_container(record).await;
        if let Err(e) = &saved {
            // Lists show it from memory; after a restart the monitor's exit record tells it again.
            tracing::error!(
                container = record.id.as_str(),
                error = e.chain(),
                "a container's end is not on record yet"
            );
            self.shared.index_mut().publish_container(record);
        }
        self.tell(EventKind::Stopped, Some(&record.id));
        if saved.is_ok()
            && let Err(e) = self.reap(&record.id).await
        {
            tracing::warn!(
                container = record.id.as_str(),
                error = e.chain(),
                "an ended container is still known to the runtime"
            );
        }
        for wait in self.stops.iter_mut().filter(|w| w.id == record.id) {
            if let Some(reply) = wait.reply.take() {
                let _ = reply.send(Ok(()));
            }
        }
        self.stops.retain(|w| w.id != record.id);
    }

    /// StopContainer: the signal now, the answer when it has ended.
    pub(super) async fn stop_container(
        &mut self,
        id: ContainerId,
        grace: Duration,
        reply: oneshot::Sender<Result<()>>,
    ) {
        let Some(record) = self.containers.get(&id) else {
            let _ = reply.send(Ok(()));
            return;
        };
        if record.phase.verdict(ContainerRequest::Stop) == Verdict::Done {
            let _ = reply.send(Ok(()));
            return;
        }
        let killed = grace.is_zero();
        let signal = if killed { libc::SIGKILL } else { record.stop_signal };
        let sent = match self.the_monitor() {
            Ok(monitor) => monitor.signal(&id, signal, killed).await,
            Err(e) => Err(e),
        };
        if let Err(e) = sent {
            let _ = reply.send(Err(e.context(format!("stop container {id}"))));
            return;
        }
        let deadline = Instant::now() + if killed { KILL_PATIENCE } else { grace.min(GRACE_MAX) };
        self.stops.push(StopWait { id, deadline, killed, reply: Some(reply) });
    }

    /// Graces that are over: SIGKILL; and after that an error to the caller.
    pub(super) async fn kill_overdue(&mut self) {
        let now = Instant::now();
        for i in (0..self.stops.len()).rev() {
            if self.stops[i].deadline > now {
                continue;
            }
            let id = self.stops[i].id.clone();
            if self.stops[i].killed {
                let wait = self.stops.swap_remove(i);
                if let Some(reply) = wait.reply {
                    let _ = reply.send(Err(Error::new(
                        Kind::DeadlineExceeded,
                        format!("container {id} was killed but is not gone after {KILL_PATIENCE:?}"),
                    )));
                }
                continue;
            }
            self.stops[i].killed = true;
            self.stops[i].deadline = now + KILL_PATIENCE;
            if let Some(monitor) = self.monitor.clone()
                && let Err(e) = monitor.signal(&id, libc::SIGKILL, true).await
            {
                tracing::error!(
                    container = id.as_str(),
                    error = e.chain(),
                    "can't kill a container whose grace is over"
                );
            }
        }
    }

    /// RemoveContainer.
    pub(super) async fn remove_container(&mut self, id: &ContainerId) -> Result<()> {
        let Some(mut record) = self.containers.get(id).cloned() else { return Ok(()) };
        if record.phase != ContainerPhase::Exited {
            self.reap(id).await?;
            if record.phase == ContainerPhase::Running {
                self.on_exit(id, killed_now(self.shared.ports.clock.now_ns(), "removed while running")).await;
                record = self.containers.get(id).cloned().unwrap_or(record);
            }
        } else {
            // Usually gone since its end; a removal that failed then is made up for.
            self.reap(id).await?;
        }
        record.phase = ContainerPhase::Removing;
        let (store, copy) = (self.shared.records.clone(), record);
        blocking(move || store.save_container(&copy)).await?;
        self.drop_files(id).await?;
        self.containers.remove(id);
        self.shared.index_mut().forget_container(&self.pod.id, id);
        tracing::info!(pod = self.pod.id.as_str(), container = id.as_str(), "container removed");
        self.tell(EventKind::Deleted, Some(id));
        Ok(())
    }

    /// The monitor died or hung up: running containers are watched by their pids from here on.
    pub(super) fn on_monitor_gone(&mut self) {
        if self.shared.tasks.token().is_cancelled() {
            // It is this daemon that goes; the monitor stays for the next one.
            self.events = None;
            return;
        }
        self.set_monitor(None);
        let running: Vec<_> =
            self.containers.values().filter(|c| c.phase == ContainerPhase::Running).cloned().collect();
        if self.pod.phase == PodPhase::Ready {
            tracing::error!(pod = self.pod.id.as_str(), running = running.len(), "the pod's monitor is gone");
        }
        if !running.is_empty() {
            let link = orphans::watch(&self.shared, self.backend.clone(), &self.pod, running);
            self.set_monitor(Some(link));
        }
    }
}

/// `folder/file`, refused when `file` would leave the folder.
fn log_file(folder: &Utf8PathBuf, file: &str) -> Result<Utf8PathBuf> {
    let leaves = camino::Utf8Path::new(file)
        .components()
        .any(|c| !matches!(c, camino::Utf8Component::Normal(_) | camino::Utf8Component::CurDir));
    if leaves || file.contains('\0') {
        return Err(Error::invalid(format!("log path {file:?} leaves the pod's log folder {folder}")));
    }
    Ok(folder.join(file))
}

/// Code and reason as the kubelet shows them.
pub(super) fn exit_info(exit: &monitor_v1::Exit) -> ExitInfo {
    let reason = match (exit.oom, exit.code) {
        (true, _) => "OOMKilled",
        (false, 0) => "Completed",
        _ => "Error",
    };
    ExitInfo { code: exit.code, reason: reason.into(), message: exit.note.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_files_stay_in_their_folder() {
        let folder = Utf8PathBuf::from("/var/log/pods/x");
        assert_eq!(log_file(&folder, "c/0.log").expect("fits"), "/var/log/pods/x/c/0.log");
        for bad in ["../x", "/etc/passwd", "a/../../x", "a\0b"] {
            assert!(log_file(&folder, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn reasons_are_the_kubelets() {
        let exit = |code, oom| exit_info(&monitor_v1::Exit { code, oom, ..Default::default() }).reason;
        assert_eq!(
            (exit(0, false), exit(7, false), exit(137, true)),
            ("Completed".into(), "Error".into(), "OOMKilled".into())
        );
    }
}
