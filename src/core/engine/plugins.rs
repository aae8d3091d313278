//! What a pod's task tells the node's plugins (NRI), and what they ask of the engine.
//!
//! Without plugins, and for pods of handlers that take no part, nothing of it costs anything. A plugin's no to what ends is logged: what ends,
//! ends. New limits that plugins want of other containers are set by those containers' own tasks, beside what they were asked
//! about: waiting for them could wait for ever.

use std::sync::{Arc, Weak};

use async_trait::async_trait;

use super::pod::{Command, PodTask};
use super::{Engine, Scope, Shared, unknown_container};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::limits;
use crate::core::plugins::{Adjusted, ContainerMoment, NewLimits, PluginHost, Plugins, PodMoment};
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::spec::Resources;

impl PodTask {
    /// Those of this pod.
    fn plugins(&self) -> Option<&Arc<dyn Plugins>> {
        self.shared.ports.plugins.as_ref().filter(|p| p.take_part(&self.pod.handler))
    }

    /// Asks them whether the pod may be.
    pub(super) async fn may_run(&self) -> Result<()> {
        let Some(plugins) = self.plugins() else { return Ok(()) };
        plugins.pod(PodMoment::Run, &self.pod).await
    }

    /// Tells them of the pod.
    pub(super) async fn tell_plugins(&self, moment: PodMoment) {
        let Some(plugins) = self.plugins() else { return };
        if let Err(e) = plugins.pod(moment, &self.pod).await {
            tracing::warn!(pod = self.pod.id.as_str(), ?moment, error = e.chain(), "a plugin's no changes nothing");
        }
    }

    /// Asks them whether a container may be let run.
    pub(super) async fn may_start(&self, container: &ContainerRecord) -> Result<()> {
        let Some(plugins) = self.plugins() else { return Ok(()) };
        let updates = plugins.container(ContainerMoment::Start, &self.pod, container).await?;
        self.set_later(updates);
        Ok(())
    }

    /// Tells them of a container.
    pub(super) async fn tell_plugins_of(&self, moment: ContainerMoment, container: &ContainerRecord) {
        let Some(plugins) = self.plugins() else { return };
        match plugins.container(moment, &self.pod, container).await {
            Ok(updates) => self.set_later(updates),
            Err(e) => {
                let container = container.id.as_str();
                tracing::warn!(container, ?moment, error = e.chain(), "a plugin's no changes nothing");
            }
        }
    }

    /// Takes over what they have made of a container that is being made; the policy counts for that, too.
    pub(super) fn note_adjusted(
        &self,
        record: &mut ContainerRecord,
        adjusted: Option<Adjusted>,
    ) -> Result<Vec<NewLimits>> {
        let Some(Adjusted { resources, updates }) = adjusted else { return Ok(Vec::new()) };
        limits::check(&resources, &resources)?;
        if let Some((handler, policy)) = self.policy() {
            policy.check_limits(handler, &resources).map_err(|e| e.context("as plugins have changed it"))?;
        }
        record.config.resources = resources;
        Ok(updates)
    }

    /// Asks them about new limits of a container: those that are asked for then.
    pub(super) async fn ask_limits(&self, container: &ContainerRecord, asked: &Resources) -> Result<Resources> {
        let Some(plugins) = self.plugins() else { return Ok(asked.clone()) };
        let (asked, updates) = plugins.update(&self.pod, container, asked).await?;
        self.set_later(updates);
        Ok(asked)
    }

    /// Asks them about new limits of the pod.
    pub(super) async fn ask_pod_limits(&self, resources: &Resources, overhead: &Resources) -> Result<()> {
        let Some(plugins) = self.plugins() else { return Ok(()) };
        plugins.update_pod(&self.pod, resources, overhead).await
    }

    /// Has limits of other containers changed, without waiting for it.
    pub(super) fn set_later(&self, updates: Vec<NewLimits>) {
        if updates.is_empty() {
            return;
        }
        let host = Host(Arc::downgrade(&self.shared));
        self.shared.tasks.spawn_cancellable("limits by plugins", async move {
            for wanted in updates {
                let NewLimits { plugin, container, ignore_failure, .. } = &wanted;
                match host.set_limits(&wanted).await {
                    Err(e) if !ignore_failure => {
                        tracing::error!(
                            plugin,
                            container,
                            error = e.chain(),
                            "limits that a plugin wants can't be had"
                        );
                    }
                    _ => {}
                }
            }
        });
    }
}

/// The engine as plugins see it.
struct Host(Weak<Shared>);

impl Engine {
    /// What plugins see of it.
    pub fn plugin_host(&self) -> Arc<dyn PluginHost> {
        Arc::new(Host(Arc::downgrade(&self.shared)))
    }
}

#[async_trait]
impl PluginHost for Host {
    fn state(&self) -> (Vec<Arc<PodRecord>>, Vec<Arc<ContainerRecord>>) {
        let Some(shared) = self.0.upgrade() else { return Default::default() };
        let index = shared.index();
        (index.pods(Scope::Local), index.containers(Scope::Local))
    }

    async fn set_limits(&self, wanted: &NewLimits) -> Result<()> {
        let shared = self.0.upgrade().ok_or_else(|| Error::new(Kind::Unavailable, "the daemon ends"))?;
        let id: ContainerId =
            wanted.container.parse().map_err(|_| Error::invalid(format!("{:?} is no container", wanted.container)))?;
        let found = shared.index().find_container(Scope::Local, id.as_str())?;
        let (id, handle) = found.ok_or_else(|| unknown_container(id.as_str()))?;
        // Theirs are the pods of some handlers alone.
        let pod = shared.index().container(&id).map(|c| c.pod.clone());
        let handler = pod.and_then(|pod| shared.index().pod(&pod)).map(|pod| pod.handler.clone());
        let theirs = shared.ports.plugins.as_ref().zip(handler).is_some_and(|(p, handler)| p.take_part(&handler));
        if !theirs {
            return Err(unknown_container(id.as_str()));
        }
        let asked = Box::new(wanted.resources.clone());
        handle.ask(|reply| Command::UpdateContainer { id, asked, by_plugin: true, reply }).await
    }
}
