//! Take-over of a pod whose monitor has died, or hangs: a new monitor is started, gets the streams of all containers that
//! live, and goes on as if it had made them.
//!
//! The daemon holds duplicates of what each container hangs on ([`Lent`]): buffered output is not lost while there is no
//! monitor, a terminal is not hung up, stdin has no end, and the kernel keeps exit codes for the pidfds. Without them (this
//! daemon is new, too) FIFOs are found by their paths, for the container keeps them open itself, and processes by pid and
//! start time. What the dead monitor had read and not written is lost: one read of 16 KiB at most.
//!
//! Called by a pod's task and by recovery. On failure nothing has changed, and `orphans` watches what runs. A crash in
//! between leaves a monitor that has part of the containers, which the next daemon ends and replaces.

use std::collections::BTreeMap;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use prost::Message;
use rustix::fs::{Mode, OFlags};
use tokio::time::{Duration, Instant};

use super::events::EventKind;
use super::pod::PodTask;
use super::{Shared, orphans, recovery};
use crate::core::backend::Backend;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::metrics::metrics;
use crate::core::ports::{Lent, MonitorLink, monitor_v1};
use crate::core::records::{self, ContainerRecord, PodRecord};
use crate::core::state::{ContainerPhase, PodPhase};
use crate::fail_point;
use crate::utils::atomic::{self, Durability};
use crate::utils::pidfd;

/// More of a pod's monitors than this do not die within [`WINDOW`] by chance.
const MOST: usize = 10;
/// See [`MOST`].
const WINDOW: Duration = Duration::from_secs(60);
/// A take-over that failed is tried again after this time.
pub(super) const AGAIN: Duration = Duration::from_secs(10);
/// File in a container's folder with the plan by which it was made.
const PLAN: &str = "plan";

/// The same of a container whose processes are restored at its start, whole.
const RESTORE: &str = "restore";

/// What is held for each container.
pub(super) type Kept = BTreeMap<ContainerId, Lent>;

/// A pod that has a monitor again.
pub(super) struct TakenOver {
    pub(super) link: MonitorLink,
    /// Containers of which it was not known that they had been started.
    pub(super) started: Vec<ContainerId>,
    /// Containers whose end the old monitor had written down and not told.
    pub(super) ended: Vec<(ContainerId, monitor_v1::Exit)>,
    /// The init of the shared PID namespace is gone.
    pub(super) init_ended: bool,
}

/// Writes down what a later monitor has to know of the container.
pub(super) async fn save_plan(run_dir: &Utf8Path, plan: &monitor_v1::CreateContainer) -> Result<()> {
    // It is not created again, and what `create` was given may be long.
    let plan = monitor_v1::CreateContainer { create: None, volume_mount_points: Vec::new(), ..plan.clone() };
    let (path, bytes) = (run_dir.join(PLAN), plan.encode_to_vec());
    blocking(move || {
        atomic::write(path.as_std_path(), &bytes, 0o600, Durability::Process)
            .map_err(|e| Error::io(format!("write {path}"), e))
    })
    .await
}

/// Writes down how a container is made at its start.
pub(super) async fn save_restore(run_dir: &Utf8Path, plan: &monitor_v1::CreateContainer) -> Result<()> {
    let (path, bytes) = (run_dir.join(RESTORE), plan.encode_to_vec());
    blocking(move || {
        atomic::write(path.as_std_path(), &bytes, 0o600, Durability::Process)
            .map_err(|e| Error::io(format!("write {path}"), e))
    })
    .await
}

/// What [`save_restore`] has written.
pub(super) async fn load_restore(run_dir: &Utf8Path) -> Result<monitor_v1::CreateContainer> {
    load_plan(run_dir.join(RESTORE)).await
}

async fn load_plan(path: Utf8PathBuf) -> Result<monitor_v1::CreateContainer> {
    let (shown, bytes) =
        (path.clone(), blocking(move || std::fs::read(&path).map_err(|e| Error::io(format!("read {path}"), e))));
    monitor_v1::CreateContainer::decode(&*bytes.await?)
        .map_err(|e| Error::because(Kind::Internal, format!("the plan {shown}"), e))
}

/// Names under which a container's descriptors are parked; its stdin is not, for it has to end with its last client.
fn parked_names(id: &ContainerId) -> [String; 4] {
    ["out", "err", "tty", "pid"].map(|what| format!("{id}.{what}"))
}

/// The container of such a name.
pub(super) fn parked_of(name: &str) -> Option<&str> {
    name.rsplit_once('.').map(|(id, _)| id)
}

fn park(shared: &Shared, id: &ContainerId, lent: &Lent) {
    use std::os::fd::AsFd;
    let fds = [&lent.stdout, &lent.stderr, &lent.terminal, &lent.pidfd];
    for (name, fd) in parked_names(id).iter().zip(fds) {
        if let Some(fd) = fd {
            shared.ports.parked.park(name, fd.as_fd());
        }
    }
}

/// What an earlier daemon has parked of a container, and what can be had of its streams without its monitor.
fn found(shared: &Shared, id: &ContainerId, plan: &monitor_v1::CreateContainer) -> Lent {
    let [stdout, stderr, terminal, pidfd] = parked_names(id).map(|name| shared.ports.parked.take(&name));
    let open = by_path(plan);
    Lent { stdin: open.stdin, stdout: stdout.or(open.stdout), stderr: stderr.or(open.stderr), terminal, pidfd }
}

fn by_path(plan: &monitor_v1::CreateContainer) -> Lent {
    let Some(stdio) = plan.stdio.as_ref().filter(|s| !s.terminal) else { return Lent::default() };
    let open = |path: &str, flags: OFlags| {
        let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC;
        (!path.is_empty()).then(|| rustix::fs::open(path, flags, Mode::empty()).ok()).flatten()
    };
    Lent {
        // Fails where nobody reads any more, and where it was closed for good: then the FIFO is gone.
        stdin: open(&stdio.stdin, OFlags::WRONLY),
        stdout: open(&stdio.stdout, OFlags::RDONLY),
        stderr: open(&stdio.stderr, OFlags::RDONLY),
        ..Lent::default()
    }
}

fn lives(container: &ContainerRecord) -> bool {
    let made = container.cannot_run.is_none() && !container.restore;
    made && matches!(container.phase, ContainerPhase::Created | ContainerPhase::Running)
}

/// Whether the monitor has all that lives, containers and init: one that was interrupted while it took them over has not, and
/// those would be nobody's.
pub(super) fn knows_all(link: &MonitorLink, pod: &PodRecord, containers: &[ContainerRecord]) -> bool {
    let known = |c: &ContainerRecord| report(link, c).is_some();
    let nobodys_init = init_of(pod).is_some_and(|i| i.pid != link.hello.init_pid && i.is_alive().unwrap_or(false));
    !nobodys_init && containers.iter().filter(|c| lives(c)).all(known)
}

fn report<'a>(link: &'a MonitorLink, container: &ContainerRecord) -> Option<&'a monitor_v1::ContainerReport> {
    link.hello.containers.iter().find(|r| r.id == container.id.as_str())
}

/// Of containers that live by their records: those that were started, and those that have ended.
fn news<'a>(
    link: &MonitorLink,
    containers: impl Iterator<Item = &'a ContainerRecord>,
) -> (Vec<ContainerId>, Vec<(ContainerId, monitor_v1::Exit)>) {
    let (mut started, mut ended) = (Vec::new(), Vec::new());
    for container in containers {
        match report(link, container).map(|r| (r.phase(), r.exit.clone())) {
            Some((monitor_v1::ContainerPhase::PhaseExited, Some(exit))) => ended.push((container.id.clone(), exit)),
            Some((monitor_v1::ContainerPhase::PhaseRunning, _)) if container.phase == ContainerPhase::Created => {
                started.push(container.id.clone());
            }
            _ => {}
        }
    }
    (started, ended)
}

/// Whether a monitor that [knows all](knows_all) has no init any more where there was one.
pub(super) fn has_lost_init(link: &MonitorLink, pod: &PodRecord) -> bool {
    init_of(pod).is_some_and(|init| init.pid != link.hello.init_pid)
}

fn init_of(pod: &PodRecord) -> Option<&pidfd::ProcessId> {
    pod.facts.as_ref()?.init.as_ref()
}

/// Gives the pod a monitor that has all its containers; one that lives and was only not heard of any more is connected anew.
pub(super) async fn take_over(
    shared: &Arc<Shared>,
    backend: &Arc<dyn Backend>,
    pod: &PodRecord,
    containers: &[ContainerRecord],
    kept: &mut Kept,
) -> Result<TakenOver> {
    let supervisor = &shared.ports.supervisor;
    if let Ok(link) = supervisor.connect(&pod.id).await {
        if knows_all(&link, pod, containers) {
            let init_ended = has_lost_init(&link, pod);
            let (started, ended) = news(&link, containers.iter().filter(|c| lives(c)));
            return Ok(TakenOver { link, started, ended, init_ended });
        }
        drop(link);
        supervisor.kill(&pod.id).await?;
    }
    supervisor.cleanup(&pod.id).await?;
    fail_point!("takeover.cleaned");
    let mut ended = Vec::new();
    let mut plans = Vec::new();
    for container in containers {
        let run_dir = shared.run_dir(&pod.id, &container.id);
        let exit = if lives(container) { recovery::read_exit(&run_dir.join("exit.json")) } else { None };
        if exit.is_some() || container.phase == ContainerPhase::Exited {
            // The successor is not told of it, and would remove nothing; the dead one may not have come to that.
            if let Err(e) = backend.remove_container(pod, &container.id).await {
                tracing::warn!(container = container.id.as_str(), error = e.chain(), "it stays known to the runtime");
            }
        }
        if let Some(exit) = exit {
            ended.push((container.id.clone(), exit));
        } else if lives(container) {
            plans.push((container, load_plan(run_dir.join(PLAN)).await?));
            if let Err(e) = backend.abandon_execs(pod, &container.id).await {
                tracing::warn!(container = container.id.as_str(), error = e.chain(), "execs of a dead monitor run on");
            }
        }
    }
    let link = supervisor.spawn(&pod.id, &pod.handler, records::encode(pod)?).await?;
    fail_point!("takeover.spawned");
    // One that finds out by itself what runs has nothing to be given.
    if !plans.is_empty() && plans.iter().all(|(container, _)| report(&link, container).is_some()) {
        let init_ended = has_lost_init(&link, pod);
        let (started, more) = news(&link, plans.iter().map(|(container, _)| *container));
        ended.extend(more);
        return Ok(TakenOver { link, started, ended, init_ended });
    }
    match adopt(shared, backend, pod, &link, plans, kept).await {
        Ok((started, init_ended)) => Ok(TakenOver { link, started, ended, init_ended }),
        Err(e) => {
            drop(link);
            // Half of the pod in one hand and half in another is worse than none: it is tried again as a whole.
            supervisor.kill(&pod.id).await?;
            Err(e)
        }
    }
}

async fn adopt(
    shared: &Arc<Shared>,
    backend: &Arc<dyn Backend>,
    pod: &PodRecord,
    link: &MonitorLink,
    plans: Vec<(&ContainerRecord, monitor_v1::CreateContainer)>,
    kept: &mut Kept,
) -> Result<(Vec<ContainerId>, bool)> {
    let mut started = Vec::new();
    for (container, plan) in plans {
        let mut running = container.phase == ContainerPhase::Running;
        if !running {
            running = backend.has_started(pod, &container.id).await.unwrap_or_else(|e| {
                tracing::warn!(container = container.id.as_str(), error = e.chain(), "taken as not started");
                false
            });
            started.extend(running.then(|| container.id.clone()));
        }
        let lent = kept.entry(container.id.clone()).or_insert_with(|| found(shared, &container.id, &plan));
        if lent.pidfd.is_none() {
            let failed = |e| Error::io(format!("process {} of container {}", container.pid, container.id), e);
            lent.pidfd = orphans::process_of(shared, container).open().map_err(failed)?;
        }
        let now = shared.ports.clock.now_ns();
        let started_at = if container.started_at == 0 && running { now } else { container.started_at };
        let request = monitor_v1::AdoptContainer {
            plan: Some(plan),
            pid: container.pid,
            pid_start_time: container.pid_start_time,
            started_at,
            running,
            streams: None,
        };
        link.monitor.adopt(request, lent).await?;
        fail_point!("takeover.adopted");
    }
    let Some(init) = init_of(pod) else { return Ok((started, false)) };
    match init.open().map_err(|e| Error::io(format!("the init of pod {}", pod.id), e))? {
        Some(pidfd) => {
            use std::os::fd::AsFd;
            link.monitor.adopt_init(init.pid, init.start_time, pidfd.as_fd()).await?;
            Ok((started, false))
        }
        None => Ok((started, true)),
    }
}

impl PodTask {
    /// Holds what a container hangs on. An older monitor lends nothing, and one that dies now is noticed by its connection.
    pub(super) async fn keep(&mut self, id: &ContainerId) {
        let Some(monitor) = &self.monitor else { return };
        match monitor.lend(id).await {
            Ok(lent) => {
                park(&self.shared, id, &lent);
                self.kept.insert(id.clone(), lent);
            }
            Err(e) => tracing::debug!(container = id.as_str(), why = e.chain(), "nothing of it is held"),
        }
    }

    /// It has ended: nothing of it is held any more.
    pub(super) fn let_go(&mut self, id: &ContainerId) {
        self.kept.remove(id);
        parked_names(id).iter().for_each(|name| self.shared.ports.parked.forget(name));
    }

    /// The monitor died, hung up, or hangs: another one takes the pod over. If that can't be, running containers are watched
    /// by their pids from here on, and it is tried again.
    pub(super) async fn on_monitor_gone(&mut self) {
        if self.shared.tasks.token().is_cancelled() {
            // It is this daemon that goes; the monitor stays for the next one.
            self.events = None;
            return;
        }
        self.set_monitor(None);
        let running = self.containers.values().filter(|c| c.phase == ContainerPhase::Running);
        let running: Vec<_> = running.map(|c| ContainerRecord::clone(c)).collect();
        match self.pod.phase {
            PodPhase::Ready => {}
            PodPhase::Stopping if !running.is_empty() => {}
            _ => return,
        }
        metrics().monitors_lost.inc();
        tracing::error!(pod = self.pod.id.as_str(), running = running.len(), "the pod's monitor is gone");
        // The new one may die over it, too: a second try finds out whether that was by chance.
        let mut done = Box::pin(self.take_over()).await;
        if done.as_ref().is_err_and(|e| e.kind() == Kind::Unavailable) {
            done = Box::pin(self.take_over()).await;
        }
        if let Err(e) = done {
            tracing::error!(
                pod = self.pod.id.as_str(),
                error = e.chain(),
                "no other monitor can take the pod over now"
            );
            if !self.backend.on_node() {
                // Nobody but a monitor knows what became of them.
                self.takeover_at = Some(Instant::now() + AGAIN);
            } else if !running.is_empty() {
                let link = orphans::watch(&self.shared, self.backend.clone(), &self.pod, running, &self.kept);
                self.set_monitor(Some(link));
                self.takeover_at = Some(Instant::now() + AGAIN);
            }
        }
    }

    /// Gives the pod another monitor, and takes note of what the old one had not told.
    pub(super) async fn take_over(&mut self) -> Result<()> {
        let now = Instant::now();
        self.takeover_at = None;
        self.takeovers.retain(|at| now.duration_since(*at) < WINDOW);
        if self.takeovers.len() >= MOST {
            return Err(Error::new(Kind::Unavailable, format!("{MOST} monitors have died within {WINDOW:?}")));
        }
        self.takeovers.push(now);
        let all: Vec<ContainerRecord> = self.containers.values().map(|c| ContainerRecord::clone(c)).collect();
        let TakenOver { link, started, ended, init_ended } =
            take_over(&self.shared, &self.backend, &self.pod, &all, &mut self.kept).await?;
        self.set_monitor(Some(link));
        metrics().monitors_replaced.inc();
        tracing::warn!(pod = self.pod.id.as_str(), containers = all.len(), "another monitor has taken the pod over");
        for id in started {
            let Some(mut record) = self.record(&id) else { continue };
            record.phase = ContainerPhase::Running;
            record.started_at = self.shared.ports.clock.now_ns();
            let record = self.put(record);
            if let Err(e) = self.save_container(&record).await {
                tracing::error!(container = id.as_str(), error = e.chain(), "its start is not on record yet");
            }
            self.tell(EventKind::Started, Some(&id));
        }
        for (id, exit) in ended {
            self.on_exit(&id, exit).await;
        }
        if init_ended {
            let note = "it ended while neither daemon nor monitor watched it".into();
            self.on_init_exit(monitor_v1::Exit { code: 255, note, ..Default::default() }).await;
        }
        Ok(())
    }

    /// Whether a call failed because the monitor is gone or hangs, and not for a reason of its own.
    pub(super) async fn monitor_failed(&self, error: &Error) -> bool {
        let (Kind::Unavailable | Kind::DeadlineExceeded) = error.kind() else { return false };
        let Some(monitor) = &self.monitor else { return true };
        match monitor.ping().await {
            Ok(()) => false,
            Err(e) => {
                self.kill_hung(&e).await;
                true
            }
        }
    }

    /// A monitor that has not answered in its time is killed: nothing has to wait for it once more.
    pub(super) async fn kill_hung(&self, error: &Error) {
        if error.kind() == Kind::DeadlineExceeded
            && let Err(e) = self.shared.ports.supervisor.kill(&self.pod.id).await
        {
            tracing::error!(pod = self.pod.id.as_str(), error = e.chain(), "a monitor that hangs can't be killed");
        }
    }
}
