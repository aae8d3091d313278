//! NRI (Node Resource Interface): programs of the node that are told of pods and containers, and change those that are made.
//!
//! Called by the engine ([`Plugins`]) and, for a container that is being made, by its backend ([`Nri::create`]). Plugins of a folder are
//! started once, with the daemon, and end with it (`launch`); others may connect to a socket, if that is configured. A plugin that
//! hangs or dies is closed and missed by nobody, unless it is required. Plugins are asked one after the other, by their index. A crash of
//! the daemon ends every connection: plugins of the folder end by that, and the next daemon starts them anew.

mod connection;
mod describe;
mod launch;
mod limits;
mod merge;
mod mux;
mod plugin;
pub mod wire;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use camino::Utf8PathBuf;
use prost::Message as _;
use tokio::net::UnixStream;
use tokio::sync::{RwLock, mpsc};

use connection::{CallError, Connection, Incoming};
pub use describe::New;
use merge::Merge;
use plugin::Plugin;
use wire::{
    Container, ContainerRequest, ContainerUpdate, CreateContainerResponse, Event, PluginInstance, PodRequest,
    PodSandbox, UpdateContainerRequest, UpdateContainerResponse, UpdateContainersRequest, UpdateContainersResponse,
    UpdatePodSandboxRequest, ValidateContainerAdjustmentRequest, ValidateContainerAdjustmentResponse,
};

use crate::core::error::{Error, Kind, Result};
use crate::core::plugins::{ContainerMoment, NewLimits, PluginHost, Plugins, PodMoment};
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::spec::Resources;
use crate::utils::tasks::TaskSet;

/// Version of NRI that we speak.
const VERSION: &str = "v0.12.0";
/// Pods and containers in one message of a synchronization: a message has 4 MiB at most.
const SYNC_BYTES: usize = 2 << 20;

/// Settings.
#[derive(Debug, Clone)]
pub struct NriConfig {
    /// Programs that are started: files named `NN-NAME`.
    pub plugin_dir: Utf8PathBuf,
    /// Their files: `NN-NAME.conf`, else `NAME.conf`.
    pub plugin_config_dir: Utf8PathBuf,
    /// Where others connect; None: nowhere.
    pub socket: Option<Utf8PathBuf>,
    /// How long a plugin has to register.
    pub registration_timeout: Duration,
    /// How long it has for an answer.
    pub request_timeout: Duration,
    /// Plugins ("NN-NAME" or "NAME") without which no container is made.
    pub required: Vec<String>,
    /// Handlers whose pods plugins are told of.
    pub handlers: Vec<&'static str>,
}

/// What plugins make of a container.
#[derive(Debug, Clone, Default)]
pub struct Creation {
    /// What is to be changed.
    pub adjust: wire::ContainerAdjustment,
    /// Its new limits among that, in our words.
    pub limits: Resources,
    /// New limits of others.
    pub updates: Vec<NewLimits>,
}

/// All plugins.
pub struct Nri {
    config: NriConfig,
    tasks: TaskSet,
    /// In the order in which they are asked. Held for writing while one is synchronized, so that it misses nothing.
    plugins: RwLock<Vec<Arc<Plugin>>>,
    host: OnceLock<Arc<dyn PluginHost>>,
}

impl Nri {
    /// Without plugins yet.
    pub fn new(config: NriConfig, tasks: TaskSet) -> Arc<Self> {
        Arc::new(Self { config, tasks, plugins: RwLock::default(), host: OnceLock::new() })
    }

    /// Starts the folder's plugins and waits until each has registered or failed to, then lets others connect.
    pub async fn start(self: &Arc<Self>, host: Arc<dyn PluginHost>) -> Result<()> {
        let _ = self.host.set(host);
        let started = launch::find(&self.config.plugin_dir)?.into_iter().map(|found| {
            let this = self.clone();
            async move {
                let name = found.name();
                if let Err(e) = this.launch(found).await {
                    tracing::error!(plugin = name, error = e.chain(), "a plugin is not there");
                }
            }
        });
        futures::future::join_all(started).await;
        if let Some(path) = &self.config.socket {
            let listener = launch::listen(path)?;
            let this = self.clone();
            self.tasks.spawn_cancellable("nri: listens", async move {
                loop {
                    match listener.accept().await {
                        Ok((stream, _)) => this.connected(stream),
                        Err(e) => {
                            tracing::warn!(error = %e, "a plugin can't connect");
                            tokio::time::sleep(Duration::from_secs(1)).await;
                        }
                    }
                }
            });
        }
        Ok(())
    }

    fn connected(self: &Arc<Self>, stream: UnixStream) {
        let this = self.clone();
        self.tasks.spawn_cancellable("nri: a plugin connects", async move {
            if let Err(e) = this.admit(stream, None).await {
                tracing::error!(error = e.chain(), "a plugin that has connected is not admitted");
            }
        });
    }

    async fn launch(self: &Arc<Self>, found: launch::Found) -> Result<()> {
        let text = launch::settings(&self.config.plugin_config_dir, &found)?;
        let (stream, ended) = launch::start(&found, &self.tasks)?;
        let admitted = self.admit(stream, Some((found, text))).await;
        // Whose connection ends is not needed any more: its end kills the program.
        let connection = match admitted {
            Ok(connection) => connection,
            Err(e) => {
                ended.cancel();
                return Err(e);
            }
        };
        self.tasks.spawn_cancellable("nri: waits for a plugin's end", async move {
            connection.closed().await;
            ended.cancel();
        });
        Ok(())
    }

    /// Registers, configures and synchronizes a plugin. A failure has ended its connection.
    async fn admit(
        self: &Arc<Self>,
        stream: UnixStream,
        launched: Option<(launch::Found, String)>,
    ) -> Result<Arc<Connection>> {
        let (connection, mut calls) = Connection::start(stream, &self.tasks);
        let plugin = self.greet(&connection, &mut calls, launched).await;
        let plugin = match plugin {
            Ok(plugin) => Arc::new(plugin),
            Err(e) => {
                connection.close();
                return Err(e);
            }
        };
        let name = plugin.name();
        let mut all = self.plugins.write().await;
        let updates = match self.synchronize(&plugin).await {
            Ok(updates) => updates,
            Err(e) => {
                connection.close();
                return Err(e.context(format!("synchronize plugin {name:?}")));
            }
        };
        all.retain(|p| !p.connection.is_closed());
        all.push(plugin.clone());
        all.sort_by_key(|p| (p.index.clone(), p.base.clone()));
        drop(all);
        tracing::info!(plugin = name, "a plugin is there");
        let this = self.clone();
        self.tasks.spawn_cancellable(format!("nri: {name}"), async move {
            this.change(&name, updates).await;
            this.serve(&plugin, calls).await;
            this.plugins.write().await.retain(|p| !Arc::ptr_eq(p, &plugin));
            tracing::warn!(plugin = name, "a plugin has gone");
        });
        Ok(connection)
    }

    async fn greet(
        &self,
        connection: &Arc<Connection>,
        calls: &mut mpsc::Receiver<Incoming>,
        launched: Option<(launch::Found, String)>,
    ) -> Result<Plugin> {
        let within = self.config.registration_timeout;
        let first = tokio::select! {
            first = tokio::time::timeout(within, calls.recv()) => first.map_err(|_| {
                Error::new(Kind::DeadlineExceeded, format!("it has not registered within {} ms", within.as_millis()))
            })?,
            () = connection.closed() => None,
        };
        let first = first.ok_or_else(|| Error::new(Kind::Unavailable, "it has ended before it registered"))?;
        let asked = match first.method.as_str() {
            "RegisterPlugin" => wire::RegisterPluginRequest::decode(first.payload.as_slice())
                .map_err(|e| Error::because(Kind::InvalidArgument, "what it registers with", e))?,
            other => return Err(Error::invalid(format!("its first call is {other}, not RegisterPlugin"))),
        };
        let (index, base, settings) = match launched {
            // Its file says who it is, whatever it says.
            Some((found, settings)) => (found.index, found.base, settings),
            None => {
                if let Err(e) = launch::check(&asked.plugin_idx, &asked.plugin_name) {
                    connection.answer(&first, Err(e.chain())).await;
                    return Err(e);
                }
                (asked.plugin_idx, asked.plugin_name, String::new())
            }
        };
        connection.answer(&first, Ok(Vec::new())).await;
        let full = format!("{index}-{base}");
        let required = self.config.required.iter().any(|r| *r == full || *r == base);
        let millis = |of: Duration| i64::try_from(of.as_millis()).unwrap_or(i64::MAX);
        let request = wire::ConfigureRequest {
            config: settings,
            runtime_name: "proxmox-lxcri".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            registration_timeout: millis(within),
            request_timeout: millis(self.config.request_timeout),
            nri_version: VERSION.into(),
        };
        let within = self.config.request_timeout;
        let answer: wire::ConfigureResponse = connection
            .call("Configure", &request, within)
            .await
            .map_err(|e| Error::because(Kind::Unavailable, format!("configure plugin {full:?}"), e))?;
        if answer.events & !plugin::ALL != 0 {
            return Err(Error::invalid(format!("plugin {full:?} wants events that are none: {:#x}", answer.events)));
        }
        let events = if answer.events == 0 { plugin::ALL } else { answer.events };
        let policy = answer.failure_policy.unwrap_or_default();
        let (connection, old) = (connection.clone(), Default::default());
        Ok(Plugin { index, base, connection, events, policy, required, within, old })
    }

    fn host(&self) -> Result<&Arc<dyn PluginHost>> {
        self.host.get().ok_or_else(|| Error::internal("plugins before their host"))
    }

    /// Tells a new plugin all that there is; what it wants to be changed comes back.
    async fn synchronize(&self, plugin: &Plugin) -> Result<Vec<ContainerUpdate>> {
        let (mut pods, mut containers) = self.host()?.state();
        pods.retain(|p| self.take_part(&p.handler));
        containers.retain(|c| pods.iter().any(|p| p.id == c.pod));
        let of = |c: &ContainerRecord| pods.iter().find(|p| p.id == c.pod).map(|p| describe::container(c, p));
        let mut containers: Vec<Container> = containers.iter().filter_map(|c| of(c)).collect();
        let mut pods: Vec<PodSandbox> = pods.iter().map(|p| describe::pod(p)).collect();
        loop {
            let (some_pods, some) = (take(&mut pods), take(&mut containers));
            let more = !pods.is_empty() || !containers.is_empty();
            let request = wire::SynchronizeRequest { pods: some_pods, containers: some, more };
            let answer = plugin.connection.call("Synchronize", &request, plugin.within).await;
            let answer: wire::SynchronizeResponse = match answer {
                Ok(answer) => answer,
                Err(e @ CallError::Refused { .. }) => {
                    return Err(Error::because(Kind::FailedPrecondition, "refused", e));
                }
                Err(e) => return Err(Error::because(Kind::Unavailable, "no answer", e)),
            };
            if !more {
                return Ok(answer.update);
            }
            if !answer.more {
                return Err(Error::invalid("it does not know that a synchronization may have several parts"));
            }
        }
    }

    /// The plugin's own calls, until its connection ends.
    async fn serve(&self, plugin: &Plugin, mut calls: mpsc::Receiver<Incoming>) {
        loop {
            let call = tokio::select! {
                call = calls.recv() => call,
                () = plugin.connection.closed() => None,
            };
            let Some(call) = call else { return };
            let done = match call.method.as_str() {
                "UpdateContainers" => match UpdateContainersRequest::decode(call.payload.as_slice()) {
                    Ok(asked) => {
                        if !asked.evict.is_empty() {
                            tracing::warn!(plugin = plugin.name(), "evictions are not done");
                        }
                        let failed = self.change(&plugin.name(), asked.update).await;
                        Ok(UpdateContainersResponse { failed }.encode_to_vec())
                    }
                    Err(e) => Err(e.to_string()),
                },
                other => Err(format!("no method {other:?}, or not any more")),
            };
            plugin.connection.answer(&call, done).await;
        }
    }

    /// Changes limits by a plugin's own wish; those that could not be.
    async fn change(&self, plugin: &str, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate> {
        let mut failed = Vec::new();
        for update in updates {
            let mut merge = Merge::default();
            let strict = ContainerUpdate { ignore_failure: false, ..update.clone() };
            let done = match merge.update(plugin, vec![strict], None).and_then(|()| merge.limits()) {
                Ok(limits) => self.set(limits).await,
                Err(e) => Err(e),
            };
            if let Err(e) = done {
                tracing::warn!(plugin, container = update.container_id, error = e.chain(), "new limits of a plugin's");
                if !update.ignore_failure {
                    failed.push(update);
                }
            }
        }
        failed
    }

    async fn set(&self, limits: Vec<NewLimits>) -> Result<()> {
        for wanted in limits {
            self.host()?.set_limits(&wanted).await?;
        }
        Ok(())
    }

    /// What plugins make of a container that is being made. An error is a plugin's no, a conflict, or what can't be done.
    pub async fn create(&self, of: &New<'_>) -> Result<Creation> {
        let all = self.plugins.read().await;
        self.check_required(&all)?;
        let (pod, pristine) = (describe::pod(of.pod), describe::new(of));
        let mut merge = Merge::of(pristine.clone());
        for plugin in all.iter() {
            let (pod, container) = (Some(pod.clone()), Some(merge.container.clone()));
            let request = ContainerRequest { pod, container };
            let answer: Option<CreateContainerResponse> = plugin.ask(Event::CreateContainer, &request).await?;
            let Some(answer) = answer else { continue };
            let name = plugin.name();
            if !answer.evict.is_empty() {
                tracing::warn!(plugin = name, "evictions are not done");
            }
            if let Some(adjust) = answer.adjust {
                merge.adjust(&name, adjust)?;
            }
            merge.update(&name, answer.update, Some(of.id.as_str()))?;
        }
        self.validate(&all, pod, pristine, &merge).await?;
        let resources = merge.adjust.linux.as_ref().and_then(|l| l.resources.as_ref());
        let mut limits = resources.map(limits::to_core).transpose()?.unwrap_or_default();
        let score = merge.adjust.linux.as_ref().and_then(|l| l.oom_score_adj);
        limits.oom_score_adj = score.map(|s| s.value);
        Ok(Creation { limits, updates: merge.limits()?, adjust: merge.adjust })
    }

    fn check_required(&self, all: &[Arc<Plugin>]) -> Result<()> {
        let there =
            |name: &String| all.iter().any(|p| !p.connection.is_closed() && (p.base == *name || p.name() == *name));
        match self.config.required.iter().find(|name| !there(name)) {
            Some(name) => {
                Err(Error::precondition(format!("plugin {name:?} is required (nri.required_plugins) and is not there")))
            }
            None => Ok(()),
        }
    }

    async fn validate(&self, all: &[Arc<Plugin>], pod: PodSandbox, pristine: Container, merge: &Merge) -> Result<()> {
        if !all.iter().any(|p| p.wants(Event::ValidateContainerAdjustment)) {
            return Ok(());
        }
        let instance = |p: &Arc<Plugin>| PluginInstance { name: p.base.clone(), index: p.index.clone() };
        let request = ValidateContainerAdjustmentRequest {
            pod: Some(pod),
            container: Some(pristine),
            adjust: Some(merge.adjust.clone()),
            update: merge.updates(),
            owners: Some(merge.owners()),
            plugins: all.iter().map(instance).collect(),
        };
        for plugin in all {
            let answer: Option<ValidateContainerAdjustmentResponse> =
                plugin.ask(Event::ValidateContainerAdjustment, &request).await?;
            if let Some(answer) = answer
                && answer.reject
            {
                let message = format!("plugin {:?} rejects the adjustments: {}", plugin.name(), answer.reason);
                return Err(Error::precondition(message));
            }
        }
        Ok(())
    }
}

/// As many as fit a message.
fn take<T: prost::Message>(from: &mut Vec<T>) -> Vec<T> {
    let mut bytes = 0;
    let fit = from.iter().take_while(|one| {
        bytes += one.encoded_len();
        bytes <= SYNC_BYTES
    });
    // One that is too long by itself is told as such by the call.
    let count = fit.count().max(1).min(from.len());
    from.drain(..count).collect()
}

#[async_trait]
impl Plugins for Nri {
    fn take_part(&self, handler: &str) -> bool {
        self.config.handlers.contains(&handler)
    }

    async fn pod(&self, moment: PodMoment, pod: &PodRecord) -> Result<()> {
        let event = match moment {
            PodMoment::Run => Event::RunPodSandbox,
            PodMoment::Updated => Event::PostUpdatePodSandbox,
            PodMoment::Stop => Event::StopPodSandbox,
            PodMoment::Remove => Event::RemovePodSandbox,
        };
        let pod = describe::pod(pod);
        let request = PodRequest { pod: Some(pod.clone()) };
        let mut first = Ok(());
        for plugin in self.plugins.read().await.iter() {
            first = first.and(plugin.tell(event, &request, &pod, None).await);
            // What ends, ends: everybody is told.
            if first.is_err() && moment == PodMoment::Run {
                break;
            }
        }
        first
    }

    async fn update_pod(&self, pod: &PodRecord, resources: &Resources, overhead: &Resources) -> Result<()> {
        let request = UpdatePodSandboxRequest {
            pod: Some(describe::pod(pod)),
            overhead_linux_resources: Some(limits::to_wire(overhead)),
            linux_resources: Some(limits::to_wire(resources)),
        };
        for plugin in self.plugins.read().await.iter() {
            plugin.ask::<wire::Empty>(Event::UpdatePodSandbox, &request).await?;
        }
        Ok(())
    }

    async fn container(
        &self,
        moment: ContainerMoment,
        pod: &PodRecord,
        container: &ContainerRecord,
    ) -> Result<Vec<NewLimits>> {
        let event = match moment {
            ContainerMoment::Created => Event::PostCreateContainer,
            ContainerMoment::Start => Event::StartContainer,
            ContainerMoment::Started => Event::PostStartContainer,
            ContainerMoment::Updated => Event::PostUpdateContainer,
            ContainerMoment::Stop => Event::StopContainer,
            ContainerMoment::Remove => Event::RemoveContainer,
        };
        let (container, pod) = (describe::container(container, pod), describe::pod(pod));
        let request = ContainerRequest { pod: Some(pod.clone()), container: Some(container.clone()) };
        let (mut merge, mut first) = (Merge::default(), Ok(()));
        for plugin in self.plugins.read().await.iter() {
            let told = if moment == ContainerMoment::Stop {
                let answer = plugin.ask::<UpdateContainerResponse>(event, &request).await;
                answer.and_then(|a| {
                    a.map_or(Ok(()), |a| merge.update(&plugin.name(), a.update, Some(container.id.as_str())))
                })
            } else {
                plugin.tell(event, &request, &pod, Some(&container)).await
            };
            first = first.and(told);
            if first.is_err() && moment == ContainerMoment::Start {
                break;
            }
        }
        first.and_then(|()| merge.limits())
    }

    async fn update(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
        asked: &Resources,
    ) -> Result<(Resources, Vec<NewLimits>)> {
        let (pod, it) = (describe::pod(pod), describe::container(container, pod));
        let mut now = limits::to_wire(asked);
        let mut merge = Merge::default();
        for plugin in self.plugins.read().await.iter() {
            let (pod, container) = (Some(pod.clone()), Some(it.clone()));
            let request = UpdateContainerRequest { pod, container, linux_resources: Some(now.clone()) };
            let answer: Option<UpdateContainerResponse> = plugin.ask(Event::UpdateContainer, &request).await?;
            let Some(answer) = answer else { continue };
            if !answer.evict.is_empty() {
                tracing::warn!(plugin = plugin.name(), "evictions are not done");
            }
            let own = answer.update.iter().filter(|u| u.container_id == it.id);
            own.filter_map(|u| u.linux.as_ref()?.resources.as_ref()).for_each(|r| merge::set_limits(&mut now, r));
            merge.update(&plugin.name(), answer.update, None)?;
        }
        let mut updates = merge.limits()?;
        updates.retain(|u| u.container != it.id);
        let asked = Resources { oom_score_adj: asked.oom_score_adj, ..limits::to_core(&now)? };
        Ok((asked, updates))
    }
}

#[cfg(test)]
mod tests;
