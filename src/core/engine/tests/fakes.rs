//! Fakes behind the engine's ports: a world in memory that can be told to fail or to hang, and that outlives an engine.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::core::backend::*;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, Digest, PodId};
use crate::core::ports::*;
use crate::core::records::{PodRecord, ResolvedUser, Resource, SandboxFacts};
use crate::core::spec::{ContainerConfig, Resources, SandboxConfig};
use crate::core::stats::*;
use crate::utils::pidfd::ProcessId;

/// A container as the fake monitor holds it.
#[derive(Clone, Default)]
pub(super) struct FakeContainer {
    pub(super) phase: i32,
    pub(super) exit: Option<monitor_v1::Exit>,
    pub(super) info: Vec<u8>,
}

#[derive(Default)]
pub(super) struct FakeMonitorState {
    pub(super) info: Vec<u8>,
    pub(super) containers: BTreeMap<String, FakeContainer>,
    /// Pid of the pod's init, as it tells it; 0: none.
    pub(super) init: i32,
    pub(super) events: Option<mpsc::Sender<MonitorEvent>>,
}

/// Everything outside.
#[derive(Default)]
pub(super) struct World {
    pub(super) monitors: Mutex<BTreeMap<PodId, FakeMonitorState>>,
    pub(super) units: Mutex<BTreeSet<PodId>>,
    pub(super) rootfs: Mutex<BTreeSet<ContainerId>>,
    /// Name of the step that fails next, once.
    pub(super) fail: Mutex<Option<&'static str>>,
    /// Name of the step that fails whenever it is tried.
    pub(super) broken: Mutex<Option<&'static str>>,
    /// Name of the step that hangs until cancelled.
    pub(super) hang: Mutex<Option<&'static str>>,
    pub(super) reached: Notify,
    /// Name of the step that panics next, once.
    pub(super) panic: Mutex<Option<&'static str>>,
    /// Limits that containers were given.
    pub(super) limits: Mutex<Vec<Resources>>,
    /// Measurements of what containers have written.
    pub(super) measured: AtomicUsize,
    pub(super) clock: AtomicI64,
    /// Init of the pods that are made.
    pub(super) init: Mutex<Option<ProcessId>>,
    /// Containers that the next monitor finds out by itself.
    pub(super) found: Mutex<BTreeMap<String, FakeContainer>>,
    /// Containers that the backend was told to remove without a monitor.
    pub(super) removed: Mutex<BTreeSet<ContainerId>>,
}

pub(super) fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().expect("no test panics with it")
}

impl World {
    async fn step(&self, name: &'static str) -> Result<()> {
        if *locked(&self.hang) == Some(name) {
            self.reached.notify_one();
            std::future::pending::<()>().await;
        }
        let panics = locked(&self.panic).take_if(|f| *f == name).is_some();
        assert!(!panics, "{name} panics");
        let broken = *locked(&self.broken) == Some(name);
        match locked(&self.fail).take_if(|f| *f == name).or(broken.then_some(name)) {
            Some(_) => Err(Error::new(Kind::Unavailable, format!("{name} fails"))),
            None => Ok(()),
        }
    }

    /// The container's process ends.
    pub(super) async fn end(&self, pod: &PodId, id: &ContainerId, code: i32) {
        let exit = monitor_v1::Exit { code, finished_at: self.now_ns(), ..Default::default() };
        let events = {
            let mut monitors = locked(&self.monitors);
            let monitor = monitors.get_mut(pod).expect("a monitor");
            let c = monitor.containers.get_mut(id.as_str()).expect("a container");
            (c.phase, c.exit) = (monitor_v1::ContainerPhase::PhaseExited.into(), Some(exit.clone()));
            monitor.events.clone()
        };
        if let Some(events) = events {
            let _ = events.send(MonitorEvent::ContainerExited(id.clone(), exit)).await;
        }
    }

    /// What is still there of anything.
    pub(super) fn left(&self) -> (usize, usize, usize) {
        (locked(&self.monitors).len(), locked(&self.units).len(), locked(&self.rootfs).len())
    }
}

impl Clock for World {
    fn now_ns(&self) -> i64 {
        1_700_000_000_000_000_000 + self.clock.fetch_add(1, Ordering::Relaxed)
    }
    fn since_boot(&self) -> Duration {
        Duration::from_secs(1)
    }
}

pub(super) struct FakeBackend(pub(super) Arc<World>);

#[async_trait]
impl Backend for FakeBackend {
    fn handler(&self) -> &'static str {
        "fake"
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
    async fn probe(&self) -> Result<()> {
        Ok(())
    }
    fn check(&self, _: &SandboxConfig) -> Result<()> {
        Ok(())
    }
    async fn ensure_sandbox(
        &self,
        pod: &PodRecord,
        _: &Utf8Path,
        _: &dyn Monitor,
        journal: &mut dyn Journal,
        cancel: &CancellationToken,
    ) -> Result<SandboxFacts> {
        journal.note(vec![Resource { kind: "unit".into(), name: pod.id.to_string() }]).await?;
        locked(&self.0.units).insert(pod.id.clone());
        match cancel.run_until_cancelled(self.0.step("sandbox")).await {
            Some(done) => done.map(|()| SandboxFacts { init: locked(&self.0.init).clone(), ..SandboxFacts::default() }),
            None => Err(Error::new(Kind::Aborted, "cancelled")),
        }
    }
    async fn launch_plan(&self, context: LaunchContext<'_>) -> Result<Launch> {
        self.0.step("plan").await?;
        let plan = monitor_v1::CreateContainer { id: context.id.to_string(), ..Default::default() };
        Ok(Launch { plan, user: ResolvedUser::default(), stop_signal: libc::SIGTERM, adjusted: None })
    }
    async fn exec_plan(&self, context: ExecContext<'_>) -> Result<monitor_v1::Exec> {
        Ok(monitor_v1::Exec { exec_id: context.exec_id.into(), ..Default::default() })
    }
    fn end_exec(&self, _: &PodRecord, _: &ContainerId, _: &Utf8Path, _: &str) {}
    async fn remove_container(&self, _: &PodRecord, container: &ContainerId) -> Result<()> {
        locked(&self.0.removed).insert(container.clone());
        Ok(())
    }
    async fn teardown(&self, pod: &PodRecord, _: &Utf8Path) -> Result<()> {
        self.0.step("teardown").await?;
        locked(&self.0.units).remove(&pod.id);
        Ok(())
    }
    async fn network_status(&self) -> Result<(), NetworkNotReady> {
        Ok(())
    }
    async fn collect_garbage(&self, pods: &[PodRecord], _: &[ContainerId]) -> Result<()> {
        locked(&self.0.units).retain(|u| pods.iter().any(|p| p.id == *u));
        Ok(())
    }
    async fn stats(&self, targets: Vec<StatsTarget>, wanted: StatsWanted) -> Result<Vec<PodSample>> {
        let unit = || UnitSample {
            at: self.0.now_ns(),
            cpu: Some(CpuSample { usage_ns: 1, ..Default::default() }),
            ..Default::default()
        };
        let read = |t: StatsTarget| PodSample {
            unit: wanted.pods.then(unit),
            network: None,
            containers: t.containers.iter().map(|_| Some(unit())).collect(),
        };
        Ok(targets.into_iter().map(read).collect())
    }
    async fn update(&self, update: UpdateContext<'_>) -> Result<()> {
        self.0.step("update").await?;
        locked(&self.0.limits).push(update.merged.clone());
        Ok(())
    }
}

pub(super) struct FakeLayers(pub(super) Arc<World>);

#[async_trait]
impl LayerStore for FakeLayers {
    fn driver(&self) -> &'static str {
        "fake"
    }
    async fn has(&self, _: &Digest) -> Result<bool> {
        Ok(true)
    }
    async fn apply(
        &self,
        _: Option<&Digest>,
        _: &Digest,
        _: Box<dyn std::io::Read + Send>,
        _: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<Usage> {
        Ok(Usage::default())
    }
    async fn retain_layers(&self, _: &[Digest]) -> Result<u64> {
        Ok(0)
    }
    async fn create_rootfs(&self, container: &ContainerId, _: &[Digest], _: &RootfsOptions) -> Result<()> {
        locked(&self.0.rootfs).insert(container.clone());
        self.0.step("rootfs").await
    }
    async fn mount_rootfs(&self, _: &ContainerId) -> Result<OwnedFd> {
        Ok(std::fs::File::open("/").map_err(|e| Error::io("/", e))?.into())
    }
    async fn remove_rootfs(&self, container: &ContainerId) -> Result<()> {
        locked(&self.0.rootfs).remove(container);
        Ok(())
    }
    async fn list_rootfs(&self) -> Result<Vec<ContainerId>> {
        Ok(locked(&self.0.rootfs).iter().cloned().collect())
    }
    async fn rootfs_usage(&self, _: &ContainerId) -> Result<Usage> {
        self.0.measured.fetch_add(1, Ordering::Relaxed);
        self.0.step("measure").await?;
        Ok(Usage { bytes: 4096, inodes: 1 })
    }
    fn mountpoint(&self) -> Utf8PathBuf {
        "/".into()
    }
}

pub(super) struct FakeImages;

#[async_trait]
impl ImageStore for FakeImages {
    async fn pull(&self, _: &str, _: Option<RegistryAuth>) -> Result<Arc<Image>> {
        Err(Error::internal("not in this test"))
    }
    async fn load(&self, _: &ImageSource, _: Option<&str>) -> Result<Vec<Arc<Image>>> {
        Err(Error::internal("not in this test"))
    }
    fn list(&self) -> Vec<Arc<Image>> {
        self.resolve("image").into_iter().collect()
    }
    fn resolve(&self, reference: &str) -> Option<Arc<Image>> {
        let id = Digest::from_sha256(&[7; 32]);
        (reference == "image").then(|| {
            Arc::new(Image {
                id: id.clone(),
                repo_tags: vec![],
                repo_digests: vec![],
                size: 1,
                chains: vec![id],
                config: ImageConfig::default(),
                pinned: false,
                pulled_at: 0,
            })
        })
    }
    async fn remove(&self, _: &str) -> Result<()> {
        Ok(())
    }
    fn usage(&self) -> (Utf8PathBuf, Usage) {
        ("/".into(), Usage::default())
    }
}

pub(super) struct FakeSupervisor(pub(super) Arc<World>);

impl FakeSupervisor {
    fn link(&self, pod: &PodId) -> MonitorLink {
        let (sender, events) = mpsc::channel(64);
        let mut monitors = locked(&self.0.monitors);
        let state = monitors.get_mut(pod).expect("a monitor");
        state.events = Some(sender);
        let report = |(id, c): (&String, &FakeContainer)| monitor_v1::ContainerReport {
            id: id.clone(),
            phase: c.phase,
            exit: c.exit.clone(),
            info: c.info.clone(),
            started_at: 1,
            ..Default::default()
        };
        let hello = monitor_v1::HelloReply {
            pod_info: state.info.clone(),
            init_pid: state.init,
            containers: state.containers.iter().map(report).collect(),
            ..Default::default()
        };
        MonitorLink { monitor: Arc::new(FakeMonitor { world: self.0.clone(), pod: pod.clone() }), hello, events }
    }
}

#[async_trait]
impl Supervisor for FakeSupervisor {
    async fn spawn(&self, pod: &PodId, _handler: &str, pod_info: Vec<u8>) -> Result<MonitorLink> {
        self.0.step("spawn").await?;
        let containers = std::mem::take(&mut *locked(&self.0.found));
        let state = FakeMonitorState { info: pod_info, containers, ..Default::default() };
        locked(&self.0.monitors).insert(pod.clone(), state);
        Ok(self.link(pod))
    }
    async fn connect(&self, pod: &PodId) -> Result<MonitorLink> {
        if !locked(&self.0.monitors).contains_key(pod) {
            return Err(Error::not_found("no monitor"));
        }
        Ok(self.link(pod))
    }
    async fn list(&self) -> Result<Vec<PodId>> {
        Ok(locked(&self.0.monitors).keys().cloned().collect())
    }
    async fn cleanup(&self, pod: &PodId) -> Result<()> {
        match locked(&self.0.monitors).contains_key(pod) {
            true => Err(Error::precondition("its monitor runs")),
            false => Ok(()),
        }
    }
    async fn kill(&self, pod: &PodId) -> Result<()> {
        locked(&self.0.monitors).remove(pod);
        Ok(())
    }
}

struct FakeMonitor {
    world: Arc<World>,
    pod: PodId,
}

impl FakeMonitor {
    fn with<T>(&self, f: impl FnOnce(&mut FakeMonitorState) -> T) -> Result<T> {
        match locked(&self.world.monitors).get_mut(&self.pod) {
            Some(state) => Ok(f(state)),
            None => Err(Error::new(Kind::Unavailable, "the monitor is gone")),
        }
    }
}

#[async_trait]
impl Monitor for FakeMonitor {
    fn pid(&self) -> i32 {
        1
    }
    async fn create(&self, plan: monitor_v1::CreateContainer, _: Vec<OwnedFd>) -> Result<monitor_v1::Created> {
        self.world.step("create").await?;
        let c = FakeContainer { phase: monitor_v1::ContainerPhase::PhaseCreated.into(), exit: None, info: plan.info };
        self.with(|s| s.containers.insert(plan.id, c))?;
        Ok(monitor_v1::Created { pid: 1, pid_start_time: 1 })
    }
    async fn start(&self, container: &ContainerId) -> Result<i64> {
        self.world.step("start").await?;
        self.with(|s| {
            if let Some(c) = s.containers.get_mut(container.as_str()) {
                c.phase = monitor_v1::ContainerPhase::PhaseRunning.into();
            }
        })?;
        Ok(self.world.now_ns())
    }
    async fn signal(&self, container: &ContainerId, signal: i32, _: bool) -> Result<()> {
        self.world.step("signal").await?;
        // A process that obeys SIGTERM unless the test says that it does not.
        if signal == libc::SIGKILL || *locked(&self.world.hang) != Some("sigterm") {
            self.world.end(&self.pod, container, 128 + signal).await;
        }
        Ok(())
    }
    async fn delete(&self, container: &ContainerId) -> Result<()> {
        self.world.step("delete").await?;
        self.with(|s| s.containers.remove(container.as_str())).map(drop)
    }
    async fn exec(&self, _: monitor_v1::Exec, _: [Option<OwnedFd>; 3]) -> Result<ExecExit> {
        Ok(ExecExit { exit: monitor_v1::Exit::default(), timed_out: false })
    }
    async fn reopen_log(&self, _: &ContainerId) -> Result<()> {
        Ok(())
    }
    async fn start_init(&self, _: monitor_v1::StartInit) -> Result<i32> {
        Ok(1)
    }
    async fn adopt(&self, adopt: monitor_v1::AdoptContainer, _: &Lent) -> Result<()> {
        self.world.step("adopt").await?;
        let plan = adopt.plan.unwrap_or_default();
        let phase = match adopt.running {
            true => monitor_v1::ContainerPhase::PhaseRunning,
            false => monitor_v1::ContainerPhase::PhaseCreated,
        };
        let c = FakeContainer { phase: phase.into(), exit: None, info: plan.info };
        self.with(|s| s.containers.insert(plan.id, c)).map(drop)
    }
    async fn adopt_init(&self, pid: i32, _: u64, _: BorrowedFd<'_>) -> Result<()> {
        self.with(|s| s.init = pid)
    }
    async fn set_pod_info(&self, pod_info: Vec<u8>) -> Result<()> {
        self.with(|s| s.info = pod_info)
    }
    async fn ping(&self) -> Result<()> {
        self.world.step("ping").await?;
        self.with(|_| ())
    }
    async fn shutdown(&self, _: bool) -> Result<()> {
        locked(&self.world.monitors).remove(&self.pod);
        Ok(())
    }
}

/// A pod called `name`.
pub(super) fn pod_config(name: &str) -> SandboxConfig {
    crate::core::records::tests::pod(name).config
}

/// A container called `name`.
pub(super) fn container_config(name: &str) -> ContainerConfig {
    ContainerConfig {
        name: name.into(),
        attempt: 0,
        image: crate::core::spec::ImageSpec { image: "image".into(), ..Default::default() },
        command: vec!["true".into()],
        args: vec![],
        working_dir: String::new(),
        envs: vec![],
        mounts: vec![],
        devices: vec![],
        cdi_devices: vec![],
        labels: Default::default(),
        annotations: Default::default(),
        log_path: String::new(),
        stdin: false,
        stdin_once: false,
        tty: false,
        stop_signal: None,
        resources: Default::default(),
        security: Default::default(),
    }
}
