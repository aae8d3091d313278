//! New limits for containers and pods, and what the kubelet tells of the node's network.
//!
//! Limits are changed by the pod's task through the backend, then put on record, so that statuses show what is in force.
//! A crash between the two leaves new limits with an old record; the kubelet compares and asks again.

use super::pod::{Command, PodTask};
use super::{Engine, Scope, unknown_container, unknown_pod};
use crate::core::backend::UpdateContext;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::limits;
use crate::core::plugins::{ContainerMoment, PodMoment};
use crate::core::spec::Resources;
use crate::core::state::{ContainerRequest, PodRequest, Verdict};

impl Engine {
    /// Changes the limits of a created or running container; what is not given (0, "") stays. NotFound,
    /// FailedPrecondition when it has ended, Unimplemented or InvalidArgument by name for what can't be honoured.
    pub async fn update_container(&self, scope: Scope, id: &str, asked: Resources) -> Result<()> {
        let (id, handle) = self.container_handle(scope, id)?;
        let asked = Box::new(asked);
        let gone = |e: Error| if e.kind() == Kind::Aborted { unknown_container(id.as_str()) } else { e };
        let update = |reply| Command::UpdateContainer { id: id.clone(), asked, by_plugin: false, reply };
        handle.ask(update).await.map_err(gone)
    }

    /// Changes the limits of a ready pod as a whole, as far as its unit is ours; others' are only put on record.
    pub async fn update_sandbox(
        &self,
        scope: Scope,
        id: &str,
        resources: Resources,
        overhead: Resources,
    ) -> Result<()> {
        let (id, handle) = self.shared.index().find_pod(scope, id)?.ok_or_else(|| unknown_pod(id))?;
        let (resources, overhead) = (Box::new(resources), Box::new(overhead));
        let gone = |e: Error| if e.kind() == Kind::Aborted { unknown_pod(id.as_str()) } else { e };
        handle.ask(|reply| Command::UpdateSandbox { resources, overhead, reply }).await.map_err(gone)
    }

    /// Tells every backend of the node's pod networks ("10.1.0.0/24"); none is success.
    pub async fn set_pod_cidrs(&self, cidrs: &[String]) -> Result<()> {
        for backend in self.backends() {
            backend.set_pod_cidrs(cidrs).await?;
        }
        Ok(())
    }
}

impl PodTask {
    /// `by_plugin`: it is a plugin's own wish, which no plugin is asked about.
    pub(super) async fn update_container(
        &mut self,
        id: &ContainerId,
        asked: &Resources,
        by_plugin: bool,
    ) -> Result<()> {
        let mut record = self.record(id).ok_or_else(|| unknown_container(id.as_str()))?;
        let named = |e: Error| e.context(format!("update container {id}"));
        if let Verdict::Refuse(why) = record.phase.verdict(ContainerRequest::Update) {
            return Err(named(Error::precondition(why)));
        }
        let changed = if by_plugin { asked.clone() } else { self.ask_limits(&record, asked).await.map_err(named)? };
        let asked = &changed;
        let merged = asked.over(&record.config.resources);
        limits::check(asked, &merged).map_err(named)?;
        if let Some((handler, policy)) = self.policy() {
            policy.check_limits(handler, &merged).map_err(named)?;
        }
        let run_dir = self.shared.run_dir(&self.pod.id, id);
        let context = UpdateContext { pod: &self.pod, container: &record, run_dir: &run_dir, asked, merged: &merged };
        self.backend.update(context).await.map_err(named)?;
        record.config.resources = merged;
        let record = self.put(record);
        tracing::info!(pod = self.pod.id.as_str(), container = id.as_str(), "container has new limits");
        self.save_container(&record).await?;
        if !by_plugin {
            self.tell_plugins_of(ContainerMoment::Updated, &record).await;
        }
        Ok(())
    }

    pub(super) async fn update_sandbox(&mut self, resources: Resources, overhead: Resources) -> Result<()> {
        let named = |e: Error| e.context("update the limits of the pod");
        if let Verdict::Refuse(why) = self.pod.phase.verdict(PodRequest::Update) {
            return Err(named(Error::precondition(format!("pod {}: {why}", self.pod.id))));
        }
        let merged = (resources.over(&self.pod.config.resources), overhead.over(&self.pod.config.overhead));
        limits::check(&resources, &merged.0).map_err(named)?;
        limits::check(&overhead, &merged.1).map_err(|e| named(e.context("overhead")))?;
        let (resources, overhead) = merged;
        self.ask_pod_limits(&resources, &overhead).await.map_err(named)?;
        self.backend.update_sandbox(&self.pod, &resources, &overhead).await.map_err(named)?;
        (self.pod.config.resources, self.pod.config.overhead) = (resources, overhead);
        self.save_pod().await?;
        self.tell_monitor().await;
        self.publish_pod();
        tracing::info!(pod = self.pod.id.as_str(), "pod has new limits");
        self.tell_plugins(PodMoment::Updated).await;
        Ok(())
    }
}
