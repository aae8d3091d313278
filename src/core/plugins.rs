//! Plugins of the node that watch pods and change containers (NRI), as the engine knows them.
//!
//! `integrations::nri` implements [`Plugins`], the engine [`PluginHost`]; without plugins there is neither. What a plugin changes in a
//! container that is being made is asked for by its backend, which has the container's specification.

use std::sync::Arc;

use async_trait::async_trait;

use super::error::Result;
use super::records::{ContainerRecord, PodRecord};
use super::spec::Resources;

/// What happens to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodMoment {
    /// It is made and about to be ready; a plugin may refuse it.
    Run,
    /// Its limits have changed.
    Updated,
    /// It is about to be stopped.
    Stop,
    /// It is about to be forgotten.
    Remove,
}

/// What happens to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerMoment {
    /// It is made.
    Created,
    /// It is about to be let run; a plugin may refuse that.
    Start,
    /// It runs.
    Started,
    /// Its limits have changed.
    Updated,
    /// It has ended.
    Stop,
    /// It is about to be forgotten.
    Remove,
}

/// New limits that a plugin wants a container to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewLimits {
    /// The plugin.
    pub plugin: String,
    /// Id of the container.
    pub container: String,
    /// What is not given stays as it is.
    pub resources: Resources,
    /// It does not matter whether they can be had.
    pub ignore_failure: bool,
}

/// What plugins have made of a container that is being made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Adjusted {
    /// The limits that it has now.
    pub resources: Resources,
    /// What else is to change.
    pub updates: Vec<NewLimits>,
}

/// All plugins. A plugin that does not answer in time is closed and counts as one that says nothing; only what is required of the node's
/// configuration, or asked for by the plugin itself, fails with it.
#[async_trait]
pub trait Plugins: Send + Sync {
    /// Whether pods of this handler are theirs.
    fn take_part(&self, handler: &str) -> bool;
    /// Tells them of a pod. An error is a plugin's no.
    async fn pod(&self, moment: PodMoment, pod: &PodRecord) -> Result<()>;
    /// Asks them about new limits of a pod as a whole.
    async fn update_pod(&self, pod: &PodRecord, resources: &Resources, overhead: &Resources) -> Result<()>;
    /// Tells them of a container; what they want of others comes back. An error is a plugin's no.
    async fn container(
        &self,
        moment: ContainerMoment,
        pod: &PodRecord,
        container: &ContainerRecord,
    ) -> Result<Vec<NewLimits>>;
    /// Asks them about new limits of a container: what is asked for afterwards, and what they want of others.
    async fn update(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
        asked: &Resources,
    ) -> Result<(Resources, Vec<NewLimits>)>;
}

/// What plugins see of the engine, and ask of it by themselves.
#[async_trait]
pub trait PluginHost: Send + Sync {
    /// All pods and containers of now.
    fn state(&self) -> (Vec<Arc<PodRecord>>, Vec<Arc<ContainerRecord>>);
    /// Changes the limits of a container; plugins are not asked about it.
    async fn set_limits(&self, wanted: &NewLimits) -> Result<()>;
}
