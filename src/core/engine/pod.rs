//! The task that owns one pod: takes commands from its bounded queue one after the other, hears its monitor, and
//! keeps the clock of stops under way. `sandbox_ops` and `container_ops` hold what it does.
//!
//! ```text
//! callers ──Command──> [queue] ──┐
//! monitor ──MonitorEvent─────────┼──> PodTask ──> records on disk, index in memory, monitor, backend
//! graces of stops ───────────────┘
//! ```
//! A stop or removal of the pod cancels `PodHandle::cancel` before it is queued, so that it also ends the wait of a
//! create that hangs. A panic here marks the pod: callers get Aborted, and the pod is taken up from its record
//! ([`recovery::restart`]).

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use camino::Utf8PathBuf;
use futures::FutureExt;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::field::Empty;
use tracing::{Instrument, Span};

use super::index::Index;
use super::takeover::Kept;
use super::{QUEUE, Shared, recovery};
use crate::core::backend::Backend;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, PodId};
use crate::core::metrics::metrics;
use crate::core::policy::Policy;
use crate::core::ports::{Monitor, MonitorEvent, MonitorLink};
use crate::core::records::{self, ContainerRecord, PodRecord};
use crate::core::spec::{ContainerConfig, Resources};
use crate::core::state::PodPhase;
use crate::utils::trace;

type Reply<T> = oneshot::Sender<Result<T>>;

/// A request to a pod's task.
pub(super) enum Command {
    Setup { reply: Reply<()> },
    AwaitSetup { reply: Reply<()> },
    CreateContainer { config: Box<ContainerConfig>, base: Base, reply: Reply<ContainerId> },
    StartContainer { id: ContainerId, reply: Reply<()> },
    StopContainer { id: ContainerId, grace: Duration, reply: Reply<()> },
    RemoveContainer { id: ContainerId, reply: Reply<()> },
    UpdateContainer { id: ContainerId, asked: Box<Resources>, by_plugin: bool, reply: Reply<()> },
    UpdateSandbox { resources: Box<Resources>, overhead: Box<Resources>, reply: Reply<()> },
    Stop { reply: Reply<()> },
    Remove { reply: Reply<()> },
}

/// A request with the caller's span, below which it is worked on: what is logged meanwhile has the ids of what it is about.
pub(super) struct Asked {
    pub(super) command: Command,
    pub(super) caller: Span,
}

impl Asked {
    fn span(&self, pod: &PodId) -> Span {
        let pod = pod.as_str();
        // Of the highest level, so that they are there for every line that is.
        let span =
            tracing::error_span!(parent: &self.caller, "pod", pod, container = Empty, request = self.command.name());
        if let Some(id) = self.command.container() {
            span.record("container", id.as_str());
        }
        span
    }
}

impl Command {
    fn name(&self) -> &'static str {
        match self {
            Self::Setup { .. } => "setup",
            Self::AwaitSetup { .. } => "await setup",
            Self::CreateContainer { .. } => "create container",
            Self::StartContainer { .. } => "start container",
            Self::StopContainer { .. } => "stop container",
            Self::RemoveContainer { .. } => "remove container",
            Self::UpdateContainer { .. } => "update container",
            Self::UpdateSandbox { .. } => "update",
            Self::Stop { .. } => "stop",
            Self::Remove { .. } => "remove",
        }
    }

    /// None: it is about the pod, or its container has no id yet.
    fn container(&self) -> Option<&ContainerId> {
        match self {
            Self::StartContainer { id, .. }
            | Self::StopContainer { id, .. }
            | Self::RemoveContainer { id, .. }
            | Self::UpdateContainer { id, .. } => Some(id),
            _ => None,
        }
    }
}

/// What a new container's root file system begins as.
pub(super) enum Base {
    /// Its image.
    Image,
    /// That of another container at some moment ([`LayerStore::fork_point`](crate::core::ports::LayerStore::fork_point)).
    Fork { of: ContainerId, point: String },
    /// Its image, with what the container of a checkpoint in this folder had changed; its processes are restored at its start.
    Restore { from: Utf8PathBuf },
}

/// How others reach the task.
#[derive(Clone)]
pub(super) struct PodHandle {
    pub(super) commands: mpsc::Sender<Asked>,
    pub(super) cancel: CancellationToken,
}

/// A StopContainer that waits for its container's end.
pub(super) struct StopWait {
    pub(super) id: ContainerId,
    pub(super) deadline: Instant,
    pub(super) killed: bool,
    /// It was killed, and its monitor is asked whether it hangs if nothing is heard by then.
    pub(super) doubt: bool,
    pub(super) reply: Option<Reply<()>>,
}

/// What an earlier daemon, or a task that has panicked, left of a pod.
#[derive(Default)]
pub(super) struct Earlier {
    pub(super) containers: Vec<ContainerRecord>,
    /// Those that were half made or half removed.
    pub(super) half: Vec<ContainerRecord>,
    pub(super) link: Option<MonitorLink>,
    pub(super) kept: Kept,
    pub(super) takeover_at: Option<Instant>,
    /// When its take-down is tried again, should it fail.
    pub(super) retry: Option<(Instant, Duration)>,
}

/// Whether the task goes on.
#[derive(PartialEq, Eq)]
pub(super) enum Next {
    GoOn,
    End,
}

/// The task's own state.
pub(super) struct PodTask {
    pub(super) shared: Arc<Shared>,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) pod: PodRecord,
    /// Shared with the index, which shows them.
    pub(super) containers: BTreeMap<ContainerId, Arc<ContainerRecord>>,
    /// What an earlier daemon had half made or half removed: dropped before anything else is done.
    pub(super) half: Vec<ContainerId>,
    /// Containers made for a caller that did not wait.
    pub(super) unclaimed: Vec<ContainerId>,
    pub(super) monitor: Option<Arc<dyn Monitor>>,
    pub(super) events: Option<mpsc::Receiver<MonitorEvent>>,
    pub(super) cancel: CancellationToken,
    pub(super) stops: Vec<StopWait>,
    /// When a failed clean-up is tried again.
    pub(super) retry: Option<(Instant, Duration)>,
    /// What containers hang on, held for a monitor that dies.
    pub(super) kept: Kept,
    /// When monitors were replaced, of late.
    pub(super) takeovers: Vec<Instant>,
    /// When a take-over that failed is tried again.
    pub(super) takeover_at: Option<Instant>,
    commands: mpsc::Receiver<Asked>,
}

impl PodTask {
    /// What the pod's containers have to be like, and the handler whose policy that is.
    pub(super) fn policy(&self) -> Option<(&str, &Policy)> {
        self.shared.config.policies.get(self.pod.handler.as_str()).map(|policy| (self.pod.handler.as_str(), policy))
    }

    /// Puts a new pod into the index and starts its task.
    pub(super) fn start(
        shared: &Arc<Shared>,
        index: &mut Index,
        backend: Arc<dyn Backend>,
        pod: PodRecord,
    ) -> PodHandle {
        Self::take_up(shared, index, backend, pod, Earlier::default())
    }

    /// The same for a pod of an earlier daemon.
    pub(super) fn take_up(
        shared: &Arc<Shared>,
        index: &mut Index,
        backend: Arc<dyn Backend>,
        pod: PodRecord,
        earlier: Earlier,
    ) -> PodHandle {
        let Earlier { containers, half, link, kept, takeover_at, retry } = earlier;
        let containers: Vec<_> = containers.into_iter().map(Arc::new).collect();
        let (sender, commands) = mpsc::channel(QUEUE);
        let handle = PodHandle { commands: sender, cancel: CancellationToken::new() };
        index.insert(&pod, &containers, handle.clone());
        let (monitor, events) = link.map_or((None, None), |l| (Some(l.monitor), Some(l.events)));
        index.set_monitor(&pod.id, monitor.clone());
        backend.monitor_changed(&pod, monitor.as_ref());
        let id = pod.id.clone();
        let task = Self {
            shared: shared.clone(),
            backend,
            pod,
            containers: containers.into_iter().map(|c| (c.id.clone(), c)).collect(),
            half: half.into_iter().map(|c| c.id).collect(),
            unclaimed: Vec::new(),
            monitor,
            events,
            cancel: handle.cancel.clone(),
            stops: Vec::new(),
            retry,
            kept,
            takeovers: Vec::new(),
            takeover_at,
            commands,
        };
        let again = shared.clone();
        // Not below who asked first: the pod outlives the request.
        let span = tracing::error_span!(parent: None, "pod", pod = id.as_str());
        let what = format!("pod {}", id.short());
        let work = async move {
            if AssertUnwindSafe(PodTask::run(Box::new(task))).catch_unwind().await.is_err() {
                Box::pin(recovery::restart(again, id)).await;
            }
        };
        shared.tasks.spawn_cancellable(what, work.instrument(span));
        handle
    }

    async fn run(mut self: Box<Self>) {
        // What is rarely done is boxed: as long as the pod lives its task has room for all that is not.
        Box::pin(self.resume()).await;
        loop {
            let others = self.retry.map(|(at, _)| at).into_iter().chain(self.takeover_at);
            let deadline = self.stops.iter().map(|s| s.deadline).chain(others).min();
            let next = tokio::select! {
                biased;
                event = next_event(&mut self.events) => { Box::pin(self.on_event(event)).await; Next::GoOn }
                why = unit_end(&*self.backend, &self.pod) => { Box::pin(self.on_unit_end(why)).await; Next::GoOn }
                () = sleep_until(deadline) => Box::pin(self.on_deadline()).await,
                command = self.commands.recv() => match command {
                    Some(asked) => {
                        let (span, step) = (asked.span(&self.pod.id), trace::step_of(&asked.caller, asked.command.name()));
                        let next = Box::pin(self.on_command(asked.command).instrument(step).instrument(span)).await;
                        // What a long one has used is given back after its end.
                        self.shared.active.store(true, std::sync::atomic::Ordering::Relaxed);
                        next
                    }
                    None => Next::End,
                },
            };
            if next == Next::End {
                break;
            }
            // A command or a deadline may have found out that there is none any more, as an event does.
            Box::pin(self.end_without_monitor()).await;
        }
        // Whoever still waits in the queue is told by the closing of their reply channels.
        self.shared.index_mut().remove(&self.pod.id);
    }

    async fn on_command(&mut self, command: Command) -> Next {
        self.shared.active.store(true, std::sync::atomic::Ordering::Relaxed);
        match command {
            Command::Setup { reply } => {
                let done = self.setup().await;
                let failed = done.is_err();
                if failed && self.retry.is_none() {
                    // The name is free before the caller hears of the failure: it retries with the same one.
                    self.shared.index_mut().remove(&self.pod.id);
                }
                if reply.send(done).is_err() && !failed {
                    self.shared.index_mut().set_unclaimed(&self.pod.id);
                }
                if failed && self.retry.is_none() { Next::End } else { Next::GoOn }
            }
            Command::AwaitSetup { reply } => {
                let made = self.pod.phase == PodPhase::Ready;
                answer(reply, if made { Ok(()) } else { Err(Error::new(Kind::Aborted, "the pod was not made")) })
            }
            Command::CreateContainer { config, base, reply } => {
                let done = self.create_container(*config, base).await;
                if let Err(Ok(id)) = reply.send(done) {
                    self.unclaimed.push(id);
                }
                Next::GoOn
            }
            Command::StartContainer { id, reply } => answer(reply, self.start_container(&id).await),
            Command::StopContainer { id, grace, reply } => {
                self.stop_container(id, grace, reply).await;
                Next::GoOn
            }
            Command::RemoveContainer { id, reply } => answer(reply, self.remove_container(&id).await),
            Command::UpdateContainer { id, asked, by_plugin, reply } => {
                answer(reply, self.update_container(&id, &asked, by_plugin).await)
            }
            Command::UpdateSandbox { resources, overhead, reply } => {
                answer(reply, self.update_sandbox(*resources, *overhead).await)
            }
            Command::Stop { reply } => answer(reply, self.stop_sandbox().await),
            Command::Remove { reply } => {
                let done = self.remove_sandbox().await;
                let next = if done.is_ok() { Next::End } else { Next::GoOn };
                if next == Next::End {
                    self.shared.index_mut().remove(&self.pod.id);
                }
                let _ = reply.send(done);
                next
            }
        }
    }

    pub(super) async fn on_event(&mut self, event: Option<MonitorEvent>) {
        match event {
            Some(MonitorEvent::ContainerExited(id, exit)) => self.on_exit(&id, exit).await,
            Some(MonitorEvent::InitExited(exit)) => self.on_init_exit(exit).await,
            Some(MonitorEvent::StdinClosed(id)) => {
                if let Some(kept) = self.kept.get_mut(&id) {
                    kept.stdin = None;
                }
            }
            Some(MonitorEvent::LogTrouble(id, what)) if what.is_empty() => {
                tracing::info!(container = id.as_str(), "the log can be written again");
            }
            Some(MonitorEvent::LogTrouble(id, what)) => {
                tracing::warn!(container = id.as_str(), what, "the log can't be written; output waits");
            }
            Some(MonitorEvent::LogDropped(id, bytes)) => {
                metrics().log_dropped(bytes);
                tracing::warn!(
                    container = id.as_str(),
                    bytes,
                    "the log was larger than runtime.log_size_max and begins anew"
                );
            }
            Some(MonitorEvent::Gone) | None => {
                self.on_monitor_gone().await;
                self.end_without_monitor().await;
            }
        }
    }

    async fn on_deadline(&mut self) -> Next {
        self.kill_overdue().await;
        if self.takeover_at.is_some_and(|at| at <= Instant::now()) {
            self.on_monitor_gone().await;
        }
        match self.retry {
            Some((at, _)) if at <= Instant::now() => self.retry_cleanup().await,
            _ => Next::GoOn,
        }
    }

    // ---------------------------------------------------------------------------------------- records

    pub(super) fn publish_pod(&self) {
        self.shared.index_mut().publish_pod(&self.pod);
    }

    pub(super) async fn save_pod(&self) -> Result<()> {
        let (store, pod) = (self.shared.records.clone(), self.pod.clone());
        blocking(move || store.save_pod(&pod)).await
    }

    /// A container's record, to be changed.
    pub(super) fn record(&self, id: &ContainerId) -> Option<ContainerRecord> {
        self.containers.get(id).map(|c| ContainerRecord::clone(c))
    }

    /// Keeps the record as it is now.
    pub(super) fn put(&mut self, record: ContainerRecord) -> Arc<ContainerRecord> {
        let record = Arc::new(record);
        self.containers.insert(record.id.clone(), record.clone());
        record
    }

    /// Writes the record, then shows it to lists.
    pub(super) async fn save_container(&self, record: &Arc<ContainerRecord>) -> Result<()> {
        let (store, copy) = (self.shared.records.clone(), record.clone());
        blocking(move || store.save_container(&copy)).await?;
        self.shared.index_mut().publish_container(record);
        Ok(())
    }

    /// Gives the monitor the record to keep, so that a lost record can be rebuilt from it.
    pub(super) async fn tell_monitor(&self) {
        if let (Some(monitor), Ok(info)) = (&self.monitor, records::encode(&self.pod))
            && let Err(e) = monitor.set_pod_info(info).await
        {
            tracing::warn!(pod = self.pod.id.as_str(), error = e.chain(), "the monitor did not take the pod's record");
        }
    }

    pub(super) fn set_monitor(&mut self, link: Option<MonitorLink>) {
        let (monitor, events) = link.map_or((None, None), |l| (Some(l.monitor), Some(l.events)));
        self.shared.index_mut().set_monitor(&self.pod.id, monitor.clone());
        self.backend.monitor_changed(&self.pod, monitor.as_ref());
        (self.monitor, self.events) = (monitor, events);
    }

    pub(super) fn the_monitor(&self) -> Result<Arc<dyn Monitor>> {
        self.monitor.clone().ok_or_else(|| Error::new(Kind::Unavailable, format!("pod {} has no monitor", self.pod.id)))
    }

    pub(super) fn id(&self) -> &PodId {
        &self.pod.id
    }
}

fn answer<T>(reply: Reply<T>, done: Result<T>) -> Next {
    let _ = reply.send(done);
    Next::GoOn
}

/// The next event; never, while there is no monitor.
pub(super) async fn next_event(events: &mut Option<mpsc::Receiver<MonitorEvent>>) -> Option<MonitorEvent> {
    match events {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

/// The end of a ready pod's unit.
async fn unit_end(backend: &dyn Backend, pod: &PodRecord) -> String {
    match pod.phase {
        PodPhase::Ready => backend.unit_ended(&pod.id).await,
        _ => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
