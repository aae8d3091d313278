//! The engine: owns every pod, decides and acts through the ports. One task per pod ([`pod`]) makes all its changes;
//! this file is what callers see: requests are queued to that task, lists and statuses are answered from memory.
//!
//! Called by `cri` and by the library's users. Fails with `core::error::Error`. A crash at any point leaves records
//! on disk and monitors running; [`recovery`] takes up from there.

mod checkpoint;
mod container_ops;
mod dump;
mod events;
mod exec;
mod fork;
mod index;
mod orphans;
mod plugins;
mod pod;
mod pod_checkpoint;
mod pod_restore;
mod recovery;
mod sandbox_ops;
mod stats;
mod storage;
mod stream;
mod takeover;
#[cfg(test)]
mod tests;
mod unclaimed;
mod update;
mod volumes;

use std::collections::HashMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use camino::Utf8PathBuf;
use tokio::sync::{mpsc, oneshot};
use tracing::Span;

use super::backend::Backend;
use super::config::Router;
use super::error::{Error, Kind, Result};
use super::ids::{ContainerId, PodId};
use super::plugins::Plugins;
use super::policy::Policy;
use super::ports::{Clock, FdStore, ImageStore, LayerStore, Supervisor};
use super::records::{ContainerRecord, PodRecord, RecordStore};
use super::spec::{ContainerConfig, Owner, SandboxConfig};
use super::state::PodPhase;
use crate::utils::tasks::TaskSet;
use crate::utils::turns::Turns;

pub use dump::{ContainerDump, Dump, PodDump, TaskDump};
pub use events::{EVENT_QUEUE, EventKind, EventStream, PodEvent};
pub use exec::ExecOutput;
pub use fork::{Fork, Forked};
use index::Index;
pub use index::Scope;
use pod::{Asked, Base, Command, PodHandle, PodTask};
pub use pod_restore::Restored;
pub use recovery::RecoveryReport;
pub use stream::{Process, ProcessEnd, Terminal, Wanted};

/// Requests that may wait for one pod before more are refused.
const QUEUE: usize = 64;

/// Folders and figures of the engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// State folder (`/run/proxmox-lxcri`).
    pub state: Utf8PathBuf,
    /// Handler of pods that name none.
    pub default_handler: String,
    /// Which pods that name none get another.
    pub router: Router,
    /// What pods have to be like, by handler.
    pub policies: HashMap<&'static str, Policy>,
    /// Bytes that a container may write into its root file system if nobody says; 0: no limit.
    pub container_quota: u64,
    /// How long output of an exec is read after its end.
    pub exec_drain: Duration,
    /// This boot.
    pub boot_id: String,
}

/// Everything outside, behind its port.
pub struct Ports {
    /// One per handler.
    pub backends: Vec<Arc<dyn Backend>>,
    /// Root file systems.
    pub layers: Arc<dyn LayerStore>,
    /// Images.
    pub images: Arc<dyn ImageStore>,
    /// Monitors.
    pub supervisor: Arc<dyn Supervisor>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Descriptors for the next daemon.
    pub parked: Arc<dyn FdStore>,
    /// Plugins of the node; None: there are none.
    pub plugins: Option<Arc<dyn Plugins>>,
}

/// What the pods' tasks share.
struct Shared {
    config: EngineConfig,
    ports: Ports,
    records: RecordStore,
    index: RwLock<Index>,
    tasks: TaskSet,
    /// Something was done since it was last asked.
    active: std::sync::atomic::AtomicBool,
    events: events::Events,
    stats: stats::Samples,
    /// Containers that a checkpoint is being made of.
    checkpoints: std::sync::Mutex<std::collections::BTreeSet<ContainerId>>,
    /// One at a time freezes a pod's containers: the first to end would let them run on under the others.
    freezing: Turns<PodId>,
}

/// The engine; cheap to clone.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Shared {
    fn backend(&self, handler: &str) -> Result<Arc<dyn Backend>> {
        let name = if handler.is_empty() { &self.config.default_handler } else { handler };
        self.ports.backends.iter().find(|b| b.handler() == name).cloned().ok_or_else(|| {
            let known: Vec<_> = self.ports.backends.iter().map(|b| b.handler()).collect();
            Error::invalid(format!("no runtime handler {name:?}; there is {}", known.join(", ")))
        })
    }

    fn pod_dir(&self, pod: &PodId) -> Utf8PathBuf {
        self.config.state.join("pods").join(pod.as_str())
    }

    fn run_dir(&self, pod: &PodId, container: &ContainerId) -> Utf8PathBuf {
        self.pod_dir(pod).join("containers").join(container.as_str())
    }

    fn checkpointing(&self) -> std::sync::MutexGuard<'_, std::collections::BTreeSet<ContainerId>> {
        self.checkpoints.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn index(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn index_mut(&self) -> std::sync::RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Engine {
    /// An engine without pods; [`Engine::recover`] finds those of an earlier daemon.
    pub fn new(config: EngineConfig, ports: Ports, records: RecordStore, tasks: TaskSet) -> Self {
        let (index, active, events, stats, checkpoints, freezing) = Default::default();
        let shared = Shared { config, ports, records, index, tasks, active, events, stats, checkpoints, freezing };
        Self { shared: Arc::new(shared) }
    }

    /// All backends, the default first.
    pub fn backends(&self) -> Vec<Arc<dyn Backend>> {
        let mut all = self.shared.ports.backends.clone();
        all.sort_by_key(|b| b.handler() != self.shared.config.default_handler);
        all
    }

    /// Whether any pod was changed since this was last asked.
    pub fn take_activity(&self) -> bool {
        self.shared.active.swap(false, std::sync::atomic::Ordering::Relaxed)
    }

    /// Makes records that were written since the last call outlive the machine.
    pub async fn sync_records(&self) -> Result<()> {
        let store = self.shared.records.clone();
        // A node that does nothing starts no thread for it.
        if store.is_synced() {
            return Ok(());
        }
        super::blocking::blocking(move || store.sync()).await
    }

    /// The images.
    pub fn images(&self) -> &Arc<dyn ImageStore> {
        &self.shared.ports.images
    }

    /// The root file systems.
    pub fn layers(&self) -> &Arc<dyn LayerStore> {
        &self.shared.ports.layers
    }

    /// The clock.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.shared.ports.clock
    }

    // ------------------------------------------------------------------------------------------ pods

    /// Makes a pod. A second call with the same metadata while the first is at work joins it.
    pub async fn run_sandbox(&self, owner: Owner, mut config: SandboxConfig, handler: &str) -> Result<PodId> {
        let routed = match handler {
            "" => {
                let who = (config.metadata.namespace.as_str(), config.metadata.name.as_str());
                self.shared.config.router.handler(who, &config.labels, &config.annotations).unwrap_or_default()
            }
            named => named,
        };
        let backend = self.shared.backend(routed)?;
        backend.adapt_pod(&mut config)?;
        if let Some(policy) = self.shared.config.policies.get(backend.handler()) {
            policy.check_pod(backend.handler(), &config)?;
        }
        for (what, asked) in [("resources", &config.resources), ("overhead", &config.overhead)] {
            super::limits::check(asked, asked)
                .map_err(|e| e.context(format!("the {what} of pod {}", config.metadata.name)))?;
        }
        backend.check(&config)?;
        loop {
            match self.reserve(owner, &config, &backend)? {
                Reservation::Mine { id, handle } => {
                    return handle.ask(|reply| Command::Setup { reply }).await.map(|()| id);
                }
                Reservation::Claimed(id) => return Ok(id),
                Reservation::Join { id, handle } => {
                    // Its task ends when the first try fails: then the name is free and this call makes the pod.
                    match handle.ask(|reply| Command::AwaitSetup { reply }).await {
                        // Unless it panicked: then the name is held until what it left is gone, and the caller asks again.
                        Err(e) if e.kind() == Kind::Aborted && self.pod_panics(&id) == 0 => continue,
                        other => return other.map(|()| id),
                    }
                }
            }
        }
    }

    fn reserve(&self, owner: Owner, config: &SandboxConfig, backend: &Arc<dyn Backend>) -> Result<Reservation> {
        let mut index = self.shared.index_mut();
        if let Some(id) = index.by_name(owner, &config.metadata) {
            let id = id.clone();
            let (phase, handle) = index.phase_and_handle(&id).ok_or_else(|| Error::internal("name without a pod"))?;
            if phase == PodPhase::Ready && index.claim(&id) {
                return Ok(Reservation::Claimed(id));
            }
            if phase == PodPhase::Creating {
                return Ok(Reservation::Join { id, handle });
            }
            let m = &config.metadata;
            return Err(Error::new(
                Kind::AlreadyExists,
                format!(
                    "pod {}/{} (uid {}, attempt {}) is sandbox {id} already",
                    m.namespace, m.name, m.uid, m.attempt
                ),
            ));
        }
        if owner == Owner::Local
            && let Some(id) = index.local_by_name(&config.metadata)
        {
            let m = &config.metadata;
            return Err(Error::new(
                Kind::AlreadyExists,
                format!("there is a local pod {}/{} already (sandbox {id}): remove it first", m.namespace, m.name),
            ));
        }
        let record = PodRecord {
            id: PodId::new(),
            owner,
            handler: backend.handler().to_string(),
            config: config.clone(),
            created_at: self.shared.ports.clock.now_ns(),
            boot_id: self.shared.config.boot_id.clone(),
            phase: PodPhase::Creating,
            resources: Vec::new(),
            facts: None,
        };
        let id = record.id.clone();
        let handle = PodTask::start(&self.shared, &mut index, backend.clone(), record);
        Ok(Reservation::Mine { id, handle })
    }

    /// Ends everything in the pod and frees its network. Unknown is success; so is a second time.
    pub async fn stop_sandbox(&self, scope: Scope, id: &str) -> Result<()> {
        let Some((id, handle)) = self.shared.index().find_pod(scope, id)? else { return Ok(()) };
        handle.cancel.cancel();
        let done = handle.ask(|reply| Command::Stop { reply }).await;
        self.gone_is_done(&id, done)
    }

    /// Stops the pod if need be and forgets it with its containers. Unknown is success.
    pub async fn remove_sandbox(&self, scope: Scope, id: &str) -> Result<()> {
        let Some((id, handle)) = self.shared.index().find_pod(scope, id)? else { return Ok(()) };
        handle.cancel.cancel();
        let done = handle.ask(|reply| Command::Remove { reply }).await;
        self.gone_is_done(&id, done)
    }

    /// All pods that `scope` sees (those being created are not among them), oldest first.
    pub fn pods(&self, scope: Scope) -> Vec<Arc<PodRecord>> {
        self.shared.index().pods(scope)
    }

    /// A pod by id or unique prefix.
    pub fn pod(&self, scope: Scope, id: &str) -> Result<Arc<PodRecord>> {
        let index = self.shared.index();
        match index.find_pod(scope, id)? {
            Some((id, _)) => {
                Span::current().record("pod", id.as_str());
                index.pod(&id).ok_or_else(|| unknown_pod(id.as_str()))
            }
            None => Err(unknown_pod(id)),
        }
    }

    // ------------------------------------------------------------------------------------------ containers

    /// Makes a container in a pod.
    pub async fn create_container(&self, scope: Scope, pod: &str, config: ContainerConfig) -> Result<ContainerId> {
        let handle = self.shared.index().find_pod(scope, pod)?.map(|(_, h)| h).ok_or_else(|| unknown_pod(pod))?;
        handle.ask(|reply| Command::CreateContainer { config: Box::new(config), base: Base::Image, reply }).await
    }

    /// Lets it run.
    pub async fn start_container(&self, scope: Scope, id: &str) -> Result<()> {
        let (id, handle) = self.container_handle(scope, id)?;
        handle.ask(|reply| Command::StartContainer { id, reply }).await
    }

    /// Asks it to end, and kills it after `grace` (zero: at once). Not running is success; so is unknown.
    pub async fn stop_container(&self, scope: Scope, id: &str, grace: Duration) -> Result<()> {
        let Some((id, handle)) = self.shared.index().find_container(scope, id)? else { return Ok(()) };
        let done = handle.ask(|reply| Command::StopContainer { id: id.clone(), grace, reply }).await;
        self.gone_is_done(&id, done)
    }

    /// Ends and forgets it. Unknown is success.
    pub async fn remove_container(&self, scope: Scope, id: &str) -> Result<()> {
        let Some((id, handle)) = self.shared.index().find_container(scope, id)? else { return Ok(()) };
        let done = handle.ask(|reply| Command::RemoveContainer { id: id.clone(), reply }).await;
        self.gone_is_done(&id, done)
    }

    /// A pod that went away while it was asked is gone: for verbs that want it gone that is success. One whose task has
    /// ended while the pod is still listed is not: this daemon stops, or the task has failed; the pod may run.
    fn gone_is_done(&self, id: &impl Listed, result: Result<()>) -> Result<()> {
        match result {
            Err(e) if e.kind() == Kind::Aborted && !id.is_listed(&self.shared.index()) => Ok(()),
            other => other,
        }
    }

    fn container_handle(&self, scope: Scope, id: &str) -> Result<(ContainerId, PodHandle)> {
        self.shared.index().find_container(scope, id)?.ok_or_else(|| unknown_container(id))
    }

    /// All containers that `scope` sees, oldest first.
    pub fn containers(&self, scope: Scope) -> Vec<Arc<ContainerRecord>> {
        self.shared.index().containers(scope)
    }

    /// A container by id or unique prefix.
    pub fn container(&self, scope: Scope, id: &str) -> Result<Arc<ContainerRecord>> {
        let index = self.shared.index();
        match index.find_container(scope, id)? {
            Some((id, _)) => {
                let record = index.container(&id).ok_or_else(|| unknown_container(id.as_str()))?;
                Span::current().record("container", id.as_str()).record("pod", record.pod.as_str());
                Ok(record)
            }
            None => Err(unknown_container(id)),
        }
    }

    /// Pids for `status --verbose`: the pod's monitor.
    pub fn monitor_pid(&self, pod: &PodId) -> Option<i32> {
        self.shared.index().monitor(pod).map(|m| m.pid())
    }

    /// How often the pod's task has panicked and was started anew.
    pub fn pod_panics(&self, pod: &PodId) -> u32 {
        self.shared.index().panics(pod)
    }

    /// Folder of a container under the state folder.
    pub fn container_run_dir(&self, container: &ContainerRecord) -> Utf8PathBuf {
        self.shared.run_dir(&container.pod, &container.id)
    }
}

/// What the index lists.
trait Listed {
    fn is_listed(&self, index: &Index) -> bool;
}

impl Listed for PodId {
    fn is_listed(&self, index: &Index) -> bool {
        index.pod(self).is_some()
    }
}

impl Listed for ContainerId {
    fn is_listed(&self, index: &Index) -> bool {
        index.container(self).is_some()
    }
}

enum Reservation {
    /// The caller makes it.
    Mine { id: PodId, handle: PodHandle },
    /// It was made for a caller that did not wait; it is this caller's now.
    Claimed(PodId),
    /// Somebody is making it.
    Join { id: PodId, handle: PodHandle },
}

fn unknown_pod(id: &str) -> Error {
    Error::not_found(format!("no pod sandbox {id:?}"))
}

fn unknown_container(id: &str) -> Error {
    Error::not_found(format!("no container {id:?}"))
}

impl PodHandle {
    /// Queues a command and waits for its answer. A full queue is ResourceExhausted, a task that ended Aborted.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<Result<T>>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(Asked { command: command(reply), caller: Span::current() }).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => {
                Error::new(Kind::ResourceExhausted, format!("{QUEUE} requests wait for this pod already"))
            }
            mpsc::error::TrySendError::Closed(_) => Error::new(Kind::Aborted, "the pod is gone"),
        })?;
        answer.await.unwrap_or_else(|_| Err(Error::new(Kind::Aborted, "the pod went away")))
    }
}
