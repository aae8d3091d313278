//! What the engine is doing, for whoever looks for a fault (`debug dump`): tasks, queues, monitors, locks.
//!
//! A look at what is in memory: waits for nothing, so that it also answers when something hangs. Names and ids only: nothing of
//! what pods were configured with.

use std::time::Duration;

use serde::Serialize;

use super::{Engine, QUEUE, Scope};
use crate::core::ids::ContainerId;
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::spec::Owner;

/// The whole.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Dump {
    /// Tasks that have not ended, oldest first.
    pub tasks: Vec<TaskDump>,
    /// All pods, local ones too.
    pub pods: Vec<PodDump>,
    /// Who listens to events.
    pub event_listeners: usize,
    /// Containers that a checkpoint is being made of.
    pub checkpoints: Vec<ContainerId>,
}

/// A task.
#[derive(Debug, Serialize)]
pub struct TaskDump {
    /// What it is.
    pub task: String,
    /// How long it has run, in seconds.
    pub seconds: u64,
}

/// A pod.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodDump {
    /// Id.
    pub id: String,
    /// Its namespace and name in Kubernetes.
    pub name: String,
    /// Made by our own command line.
    pub local: bool,
    /// Handler.
    pub handler: String,
    /// Where it is in its life.
    pub phase: &'static str,
    /// Requests that wait for its task.
    pub waiting: usize,
    /// It was told to stop.
    pub cancelled: bool,
    /// Its containers are being frozen for a cut.
    pub freezing: bool,
    /// Its monitor; None: there is none, or it is away.
    pub monitor_pid: Option<i32>,
    /// How often its task has panicked.
    pub panics: u32,
    /// Kinds of what it owns outside, as its journal has them.
    pub owns: Vec<String>,
    /// Its containers, oldest first.
    pub containers: Vec<ContainerDump>,
}

/// A container.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerDump {
    /// Id.
    pub id: String,
    /// Its name in the pod.
    pub name: String,
    /// Where it is in its life.
    pub phase: &'static str,
    /// Its first process; 0: none.
    pub pid: i32,
    /// How it ended.
    pub exit_code: Option<i32>,
}

impl From<&ContainerRecord> for ContainerDump {
    fn from(c: &ContainerRecord) -> Self {
        Self {
            id: c.id.to_string(),
            name: c.config.name.clone(),
            phase: c.phase.word(),
            pid: c.pid,
            exit_code: c.exit.as_ref().map(|e| e.code),
        }
    }
}

impl Engine {
    /// What is going on.
    pub fn dump(&self) -> Dump {
        let shared = &self.shared;
        let pods = self.pods(Scope::Local).iter().map(|pod| self.pod_dump(pod)).collect();
        let task = |(task, since): (String, Duration)| TaskDump { task, seconds: since.as_secs() };
        Dump {
            pods,
            event_listeners: shared.events.listeners(),
            checkpoints: shared.checkpointing().iter().cloned().collect(),
            tasks: shared.tasks.running().into_iter().map(task).collect(),
        }
    }

    fn pod_dump(&self, pod: &PodRecord) -> PodDump {
        let index = self.shared.index();
        let handle = index.handle(&pod.id);
        PodDump {
            id: pod.id.to_string(),
            name: format!("{}/{}", pod.config.metadata.namespace, pod.config.metadata.name),
            local: pod.owner == Owner::Local,
            handler: pod.handler.clone(),
            phase: pod.phase.word(),
            waiting: handle.map_or(0, |h| QUEUE - h.commands.capacity()),
            cancelled: handle.is_some_and(|h| h.cancel.is_cancelled()),
            freezing: self.shared.freezing.taken(&pod.id),
            monitor_pid: index.monitor(&pod.id).map(|m| m.pid()),
            panics: index.panics(&pod.id),
            owns: pod.resources.iter().map(|r| r.kind.clone()).collect(),
            containers: index.containers_of(&pod.id).iter().map(|c| ContainerDump::from(c.as_ref())).collect(),
        }
    }
}
