//! The CRI front: gRPC in, engine calls out. Knows the wire types and `core`, no backend and no tool.
//!
//! [`Front`] is one socket's view: the CRI socket sees pods of kubelets and crictl, the local one sees all and makes
//! local ones. Errors are turned into gRPC codes in [`status`] alone.

mod around;
pub mod convert;
pub mod deadline;
pub mod image;
pub mod local;
mod measure;
pub mod runtime;
pub mod server;
mod spans;
pub mod status;
pub mod streaming;
pub mod to_wire;

use std::sync::Arc;

use crate::core::config::{CgroupDriver, Config};
use crate::core::engine::{Engine, Scope};
use crate::core::ports::LogLevel;
use crate::core::spec::Owner;

/// What the services of one socket stand on.
#[derive(Clone)]
pub struct Front {
    /// The engine.
    pub engine: Engine,
    /// Whose pods it shows.
    pub scope: Scope,
    /// Owner of pods made through it.
    pub owner: Owner,
    /// Serves exec, attach and port-forward.
    pub streaming: Arc<streaming::Streaming>,
    /// The node's configuration, for Status.
    pub config: Arc<Config>,
    /// Driver that the kubelet is told.
    pub cgroup_driver: CgroupDriver,
    /// What is logged.
    pub level: Arc<dyn LogLevel>,
    /// Extra facts for a verbose Status, as JSON values by name.
    pub info: Arc<serde_json::Map<String, serde_json::Value>>,
}
