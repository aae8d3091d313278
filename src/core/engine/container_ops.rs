//! What a pod's task does for its containers: make, start, stop, forget them, and take note of their ends.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use camino::Utf8PathBuf;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::events::EventKind;
use super::pod::{Base, PodTask, StopWait};
use super::sandbox_ops::{killed_now, make_private_dir};
use super::{pod_restore, takeover, unknown_container, volumes};
use crate::core::backend::{Launch, LaunchContext};
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::plugins::ContainerMoment;
use crate::core::ports::{Image, RootfsOptions, monitor_v1};
use crate::core::records::{self, ContainerRecord, ExitInfo, ResolvedUser, SandboxFacts};
use crate::core::spec::{ContainerConfig, NamespaceMode};
use crate::core::state::{ContainerPhase, ContainerRequest, PodPhase, PodRequest, Verdict};
use crate::core::{limits, quota};
use crate::fail_point;

/// After SIGKILL: how long until a container that does not end is called stuck.
const KILL_PATIENCE: Duration = Duration::from_secs(60);
/// After SIGKILL: how long until its monitor is asked whether it hangs.
const DOUBT: Duration = Duration::from_secs(10);
/// With less room than this, in bytes, a runtime may fail for the want of it.
const ROOM: u64 = 64 << 10;
/// Longer graces are as good as this one; the wire allows more than a clock can count.
const GRACE_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

impl PodTask {
    /// CreateContainer. On failure nothing is left.
    pub(super) async fn create_container(&mut self, mut config: ContainerConfig, base: Base) -> Result<ContainerId> {
        if let Verdict::Refuse(why) = self.pod.phase.verdict(PodRequest::CreateContainer) {
            return Err(Error::precondition(format!("container {:?} in pod {}: {why}", config.name, self.pod.id)));
        }
        self.backend
            .adapt_container(&self.pod, &mut config)
            .and_then(|()| self.policy().map_or(Ok(()), |(handler, policy)| policy.apply(handler, &mut config)))
            .and_then(|()| limits::check(&config.resources, &config.resources))
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
                    "container {:?} from the archive {:?}: only whole pods are restored from checkpoints",
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
        tracing::Span::current().record("container", id.as_str());
        self.save_container(&Arc::new(record.clone())).await?;
        fail_point!("create.recorded");
        match self.launch(&mut record, &config, &image, &facts, &base).await {
            Ok(()) => {
                tracing::info!(
                    pod = self.pod.id.as_str(),
                    container = id.as_str(),
                    name = config.name,
                    image = config.image.image,
                    "container created"
                );
                // The lists have it already; from here on they share it.
                let record = self.put(record);
                self.shared.index_mut().publish_container(&record);
                self.keep(&id).await;
                fail_point!("create.kept");
                self.tell(EventKind::Created, Some(&id));
                if let Some(made) = self.containers.get(&id) {
                    self.tell_plugins_of(ContainerMoment::Created, made).await;
                }
                Ok(id)
            }
            Err(e) => {
                if self.monitor_failed(&e).await {
                    self.on_monitor_gone().await;
                }
                self.undo_create(&id).await;
                record.phase = ContainerPhase::Removing;
                self.tell_plugins_of(ContainerMoment::Remove, &record).await;
                Err(e.context(format!("create container {:?} in pod {}", config.name, self.pod.id)))
            }
        }
    }

    /// The id of a container of that name and attempt that nobody waited for; one that somebody has is an error.
    fn taken(&mut self, config: &ContainerConfig) -> Result<Option<ContainerId>> {
        let same = |c: &&Arc<ContainerRecord>| c.config.name == config.name && c.config.attempt == config.attempt;
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
            quota: quota::of(&self.pod.config.annotations, &config.annotations, self.shared.config.container_quota)?,
            restore: false,
        })
    }

    async fn launch(
        &mut self,
        record: &mut ContainerRecord,
        config: &ContainerConfig,
        image: &Arc<Image>,
        facts: &SandboxFacts,
        base: &Base,
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
        let quota = record.quota;
        let options = RootfsOptions { uid_map: user.uids, gid_map: user.gids, volumes, quota };
        fail_point!("create.folder");
        match base {
            Base::Image => layers.create_rootfs(&record.id, &image.chains, &options).await?,
            Base::Fork { of, point } => layers.fork_rootfs(of, point, &record.id, &options).await?,
            Base::Restore { from } => {
                layers.create_rootfs(&record.id, &image.chains, &options).await?;
                pod_restore::write_files(&self.shared, &record.id, from).await?;
            }
        }
        fail_point!("create.rootfs");
        let rootfs = layers.mount_rootfs(&record.id).await?;
        fail_point!("create.mounted");
        let (volumes, volume_mounts) =
            volumes::mount(&self.shared, wanted, config, self.pod.config.security.namespaces.user.as_ref()).await?;
        let target = self.target(config)?;
        let Launch { mut plan, user, stop_signal, adjusted } = self
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
        let updates = self.note_adjusted(record, adjusted)?;
        plan.info = records::encode(record)?;
        takeover::save_plan(&run_dir, &plan).await?;
        fail_point!("create.planned");
        if let Base::Restore { from } = base {
            return self.prepare_restore(record, config, plan, from).await;
        }
        // A plan without a place for it is of a container that has another.
        let rootfs = Some(rootfs).filter(|_| !plan.rootfs_mount_point.is_empty());
        let mounts = rootfs.into_iter().chain(volume_mounts).collect();
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
                None => return Err(full(&run_dir, e)),
            },
            Err(e) => return Err(e),
        }
        fail_point!("create.made");
        record.phase = ContainerPhase::Created;
        self.save_container(&Arc::new(record.clone())).await?;
        fail_point!("create.saved");
        self.set_later(updates);
        Ok(())
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
        // A monitor that has died over it has left what its successor knows nothing of.
        left.extend(self.backend.remove_container(&self.pod, id).await.err());
        left.extend(self.drop_files(id).await.err());
        for e in left {
            tracing::error!(container = id.as_str(), error = e.chain(), "a failed create left something behind");
        }
        self.shared.index_mut().forget_container(&self.pod.id, id);
    }

    /// Kills and removes the container in the runtime, through the monitor or without it.
    pub(super) async fn reap(&self, id: &ContainerId) -> Result<()> {
        match &self.monitor {
            Some(monitor) => match monitor.delete(id).await {
                Err(e) if e.kind() == Kind::Unavailable => {
                    tracing::warn!(container = id.as_str(), error = e.chain(), "removed without its monitor");
                    self.backend.remove_container(&self.pod, id).await
                }
                done => done,
            },
            None => self.backend.remove_container(&self.pod, id).await,
        }
    }

    /// Removes root file system, run folder and record.
    pub(super) async fn drop_files(&self, id: &ContainerId) -> Result<()> {
        // A root file system that is busy goes at the next start; it must not keep the container from going.
        if let Err(e) = self.shared.ports.layers.remove_rootfs(id).await {
            tracing::error!(container = id.as_str(), error = e.chain(), "the root file system stays for now");
        }
        fail_point!("remove.rootfs");
        let (store, pod, id, folder) =
            (self.shared.records.clone(), self.pod.id.clone(), id.clone(), self.shared.run_dir(&self.pod.id, id));
        let shared = self.shared.clone();
        blocking(move || {
            pod_restore::forget(&shared, &id)?;
            crate::utils::beneath::remove_tree(folder.as_std_path())
                .map_err(|e| Error::io(format!("remove {folder}"), e))?;
            fail_point!("remove.folder");
            store.delete_container(&pod, &id)
        })
        .await
    }

    /// StartContainer.
    pub(super) async fn start_container(&mut self, id: &ContainerId) -> Result<()> {
        let mut record = self.record(id).ok_or_else(|| unknown_container(id.as_str()))?;
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
        if let Err(e) = self.may_start(&record).await {
            let now = self.shared.ports.clock.now_ns();
            let exit = ExitInfo { code: 128, reason: "StartError".into(), message: e.chain() };
            self.finish(&mut record, now, exit).await;
            return Err(e.context(format!("start container {id}")));
        }
        fail_point!("start.asked");
        let restored = record.restore;
        if restored && let Err(e) = self.restore(&mut record).await {
            return Err(self.not_restored(record, e).await);
        }
        let mut asked = self.the_monitor()?.start(id).await;
        if restored && asked.as_ref().is_err_and(|e| e.kind() == Kind::FailedPrecondition) {
            // Its processes ran, and have ended already: that is told next.
            asked = Ok(self.shared.ports.clock.now_ns());
        }
        if let Err(e) = &asked
            && self.monitor_failed(e).await
        {
            // Whether it runs is found out by whoever takes the pod over.
            self.on_monitor_gone().await;
            match self.containers.get(id) {
                Some(now) if now.phase == ContainerPhase::Running => return Ok(()),
                Some(now) if now.phase == ContainerPhase::Created => asked = self.the_monitor()?.start(id).await,
                // It ran, and has ended already.
                Some(now) if now.started_at > 0 => return Ok(()),
                _ => {}
            }
        }
        match asked {
            Ok(started_at) => {
                fail_point!("start.answered");
                record.phase = ContainerPhase::Running;
                record.started_at = started_at;
                let record = self.put(record);
                tracing::info!(pod = self.pod.id.as_str(), container = id.as_str(), pid = record.pid, "container runs");
                let saved = self.save_container(&record).await;
                fail_point!("start.saved");
                self.tell(EventKind::Started, Some(id));
                self.tell_plugins_of(ContainerMoment::Started, &record).await;
                saved
            }
            Err(e) => {
                let e = full(&self.shared.run_dir(&self.pod.id, id), e);
                let note = e.chain();
                let now = self.shared.ports.clock.now_ns();
                self.finish(&mut record, now, ExitInfo { code: 128, reason: "StartError".into(), message: note }).await;
                Err(e.context(format!("start container {id}")))
            }
        }
    }

    /// Its processes could not be restored: nothing of them is left, and it has ended.
    async fn not_restored(&mut self, mut record: ContainerRecord, e: Error) -> Error {
        let id = record.id.clone();
        if self.monitor_failed(&e).await {
            self.on_monitor_gone().await;
        }
        // A monitor that has died over it has left what its successor knows nothing of.
        if let Err(left) = self.backend.remove_container(&self.pod, &id).await {
            tracing::warn!(container = id.as_str(), error = left.chain(), "a failed restore left something behind");
        }
        let now = self.shared.ports.clock.now_ns();
        record.restore = false;
        let exit = ExitInfo { code: 128, reason: "StartError".into(), message: e.chain() };
        self.finish(&mut record, now, exit).await;
        e.context(format!("restore container {id}"))
    }

    /// A container's process ended: its end goes on record, then what the runtime keeps of it goes.
    pub(super) async fn on_exit(&mut self, id: &ContainerId, exit: monitor_v1::Exit) {
        let Some(mut record) = self.record(id) else { return };
        if record.phase == ContainerPhase::Exited {
            return;
        }
        fail_point!("exit.heard");
        let info = exit_info(&exit);
        tracing::info!(
            pod = self.pod.id.as_str(),
            container = id.as_str(),
            code = info.code,
            reason = info.reason,
            "container ended"
        );
        self.fetch_what_is_left(&record).await;
        self.finish(&mut record, exit.finished_at, info).await;
    }

    /// What a container that has ended left for the node in its unit.
    pub(super) async fn fetch_what_is_left(&self, record: &ContainerRecord) {
        if let Err(e) = self.backend.container_ended(&self.pod, record).await {
            tracing::warn!(
                container = record.id.as_str(),
                error = e.chain(),
                "a part of what a container has left is not on the node"
            );
        }
    }

    async fn finish(&mut self, record: &mut ContainerRecord, finished_at: i64, exit: ExitInfo) {
        record.phase = ContainerPhase::Exited;
        record.finished_at = finished_at.max(record.started_at).max(1);
        record.exit = Some(exit);
        record.pid = 0;
        self.let_go(&record.id);
        let record = &self.put(record.clone());
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
        fail_point!("exit.saved");
        self.tell(EventKind::Stopped, Some(&record.id));
        // Whoever waits for its end has it: what the runtime keeps of it is ours to remove, however long that takes.
        for wait in self.stops.iter_mut().filter(|w| w.id == record.id) {
            if let Some(reply) = wait.reply.take() {
                let _ = reply.send(Ok(()));
            }
        }
        self.stops.retain(|w| w.id != record.id);
        self.tell_plugins_of(ContainerMoment::Stop, record).await;
        if saved.is_ok()
            && let Err(e) = self.reap(&record.id).await
        {
            tracing::warn!(
                container = record.id.as_str(),
                error = e.chain(),
                "an ended container is still known to the runtime"
            );
        }
        fail_point!("exit.reaped");
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
        if record.restore {
            // It has no processes yet.
            let now = self.shared.ports.clock.now_ns();
            self.on_exit(&id, killed_now(now, "stopped before it was restored")).await;
            let _ = reply.send(Ok(()));
            return;
        }
        let killed = grace.is_zero();
        let signal = if killed { libc::SIGKILL } else { record.stop_signal };
        if let Err(e) = self.signal(&id, signal, killed).await {
            let _ = reply.send(Err(e.context(format!("stop container {id}"))));
            return;
        }
        fail_point!("stop.signalled");
        if self.containers.get(&id).is_none_or(|c| c.phase != ContainerPhase::Running) {
            let _ = reply.send(Ok(()));
            return;
        }
        let deadline = Instant::now() + if killed { DOUBT } else { grace.min(GRACE_MAX) };
        self.stops.push(StopWait { id, deadline, killed, doubt: killed, reply: Some(reply) });
    }

    /// Sends a signal, if need be through another monitor.
    pub(super) async fn signal(&mut self, id: &ContainerId, signal: i32, all: bool) -> Result<()> {
        match self.the_monitor()?.signal(id, signal, all).await {
            // This is answered at once, or not at all.
            Err(e) if e.kind() == Kind::DeadlineExceeded || self.monitor_failed(&e).await => {
                self.kill_hung(&e).await;
                self.on_monitor_gone().await;
                self.the_monitor()?.signal(id, signal, all).await?;
            }
            sent => sent?,
        }
        // With cgroup v1 not even SIGKILL reaches who is frozen, by a daemon that died over a cut, or by somebody else.
        if signal == libc::SIGKILL
            && let Err(e) = self.backend.freeze(&self.pod, id, false).await
        {
            tracing::debug!(container = id.as_str(), error = e.chain(), "not thawed");
        }
        Ok(())
    }

    /// Graces that are over: SIGKILL; and after that an error to the caller.
    pub(super) async fn kill_overdue(&mut self) {
        let now = Instant::now();
        for i in (0..self.stops.len()).rev() {
            if self.stops[i].deadline > now {
                continue;
            }
            let id = self.stops[i].id.clone();
            if std::mem::take(&mut self.stops[i].doubt) {
                self.stops[i].deadline = now + KILL_PATIENCE;
                if let Some(monitor) = self.monitor.clone()
                    && let Err(e) = monitor.ping().await
                {
                    tracing::error!(container = id.as_str(), error = e.chain(), "its monitor hangs");
                    self.kill_hung(&e).await;
                    // Ends that it knows of are told, which changes the list that is gone through here.
                    self.on_monitor_gone().await;
                    return;
                }
                continue;
            }
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
            (self.stops[i].killed, self.stops[i].doubt) = (true, true);
            self.stops[i].deadline = now + DOUBT;
            if let Err(e) = self.signal(&id, libc::SIGKILL, true).await {
                tracing::error!(
                    container = id.as_str(),
                    error = e.chain(),
                    "can't kill a container whose grace is over"
                );
            }
            // The list may have changed.
            return;
        }
    }

    /// RemoveContainer.
    pub(super) async fn remove_container(&mut self, id: &ContainerId) -> Result<()> {
        let Some(mut record) = self.record(id) else { return Ok(()) };
        if record.phase != ContainerPhase::Exited {
            self.reap(id).await?;
            if record.phase == ContainerPhase::Running {
                self.on_exit(id, killed_now(self.shared.ports.clock.now_ns(), "removed while running")).await;
                record = self.record(id).unwrap_or(record);
            }
        } else {
            // Usually gone since its end; a removal that failed then is made up for.
            self.reap(id).await?;
        }
        fail_point!("remove.reaped");
        record.phase = ContainerPhase::Removing;
        self.tell_plugins_of(ContainerMoment::Remove, &record).await;
        let (store, copy) = (self.shared.records.clone(), record);
        if let Err(e) = blocking(move || store.save_container(&copy)).await {
            // A full disk must not keep what would free it from going.
            tracing::error!(container = id.as_str(), error = e.chain(), "a step is taken that is not on record");
        }
        fail_point!("remove.marked");
        if let Err(e) = self.backend.container_removed(&self.pod, id).await {
            tracing::warn!(
                container = id.as_str(),
                error = e.chain(),
                "its pod's unit keeps a part of a removed container"
            );
        }
        self.drop_files(id).await?;
        self.let_go(id);
        self.containers.remove(id);
        self.shared.index_mut().forget_container(&self.pod.id, id);
        tracing::info!(pod = self.pod.id.as_str(), container = id.as_str(), "container removed");
        self.tell(EventKind::Deleted, Some(id));
        Ok(())
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

/// A runtime that has no room for its words says nothing: it is said for it.
fn full(folder: &Utf8PathBuf, e: Error) -> Error {
    let Ok(stat) = rustix::fs::statvfs(folder.as_std_path()) else { return e };
    let free = stat.f_bavail * stat.f_frsize;
    if e.kind() != Kind::Internal || free >= ROOM {
        return e;
    }
    let message = format!("No space left on device: {free} bytes are free in {folder}");
    Error::because(Kind::ResourceExhausted, message, e)
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
