//! Handler `crun`: a pod is a set of pinned namespaces and a cgroup, a container an OCI bundle that crun (or any OCI
//! runtime with its command line) runs under the pod's monitor.
//!
//! The pod is `backends::pods`, the OCI spec `backends::oci`; `launch` plans containers and execs.
//! crun's own state is below `<state>/crun`; a crash leaves there what [`Backend::collect_garbage`] or the
//! container's removal takes away.

mod checkpoint;
mod launch;
mod limits;
mod program;
mod restore;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio_util::sync::CancellationToken;

use super::pods::{self, NodePods, PATH};
use crate::core::backend::{
    Backend, Capabilities, CheckpointContext, ExecContext, Journal, Launch, LaunchContext, RestoreContext,
    UpdateContext,
};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::{Monitor, NetworkNotReady, monitor_v1};
use crate::core::records::{PodRecord, SandboxFacts};
use crate::core::spec::{ContainerConfig, Resources, SandboxConfig};
use crate::core::stats::{PodSample, StatsTarget, StatsWanted};
use crate::integrations::cgroup::{Driver, Parent};
use crate::utils::process::Spawn;

/// Settings of the handler.
#[derive(Debug, Clone)]
pub struct CrunConfig {
    /// crun, absolute.
    pub program: Utf8PathBuf,
    /// Longest call of it.
    pub timeout: Duration,
    /// Longest dump of a checkpoint.
    pub checkpoint_timeout: Duration,
}

/// The backend.
pub struct CrunBackend {
    config: CrunConfig,
    pods: Arc<NodePods>,
    /// The OCI runtime's program: whether it answers, and what it can do.
    program: Arc<program::Program>,
}

impl CrunBackend {
    /// Looks at crun; one that is missing is no error here, but in [`Backend::probe`].
    pub async fn new(config: CrunConfig, pods: Arc<NodePods>) -> Self {
        let idmapped = pods.config.idmapped_rootfs.clone();
        let program = program::Program::new(config.program.clone(), idmapped, pods.tasks.clone());
        let this = Self { config, pods, program };
        // One that hangs keeps nobody from serving what is there already; Status tells, and asks again.
        if let Err(e) = this.program.probe().await {
            tracing::warn!(why = e.chain(), "no container can be made or started yet");
        }
        this
    }

    fn root(&self) -> Utf8PathBuf {
        self.pods.config.state.join("crun")
    }

    /// A call of crun; what it says of its own failures goes to `log`.
    fn call(&self, log: &Utf8Path, oom_score_adj: i32, verb: &[&str]) -> monitor_v1::Program {
        let root = self.root();
        let mut args = vec!["--root", root.as_str(), "--log", log.as_str()];
        if self.pods.config.driver == Driver::Systemd {
            args.push("--systemd-cgroup");
        }
        args.extend(verb);
        monitor_v1::Program {
            path: self.config.program.to_string(),
            args: args.into_iter().map(String::from).collect(),
            env: vec![format!("PATH={PATH}")],
            cwd: String::new(),
            deadline_ms: u32::try_from(self.config.timeout.as_millis()).unwrap_or(u32::MAX),
            error_log: log.to_string(),
            oom_score_adj,
        }
    }

    /// Kills and removes a container that no monitor holds, known to the runtime or not.
    async fn force_remove(&self, parent: &Parent, container: &ContainerId) -> Result<()> {
        self.pods.kill_container(parent, container).await?;
        self.delete(container).await?;
        self.pods.remove_groups(parent, container).await
    }

    async fn delete(&self, container: &ContainerId) -> Result<()> {
        let known = self.root().join(container.as_str());
        if !known.try_exists().map_err(|e| Error::io(format!("look at {known}"), e))? {
            return Ok(());
        }
        self.delete_call(container).run_ok().await?;
        Ok(())
    }

    fn delete_call(&self, container: &ContainerId) -> Spawn {
        let root = self.root();
        let mut args = vec!["--root", root.as_str()];
        if self.pods.config.driver == Driver::Systemd {
            args.push("--systemd-cgroup");
        }
        args.extend(["delete", "--force", container.as_str()]);
        Spawn::new(self.config.program.as_str(), args).env("PATH", PATH).deadline(self.config.timeout)
    }
}

#[async_trait]
impl Backend for CrunBackend {
    fn handler(&self) -> &'static str {
        "crun"
    }

    fn capabilities(&self) -> Capabilities {
        let abilities = self.program.abilities();
        Capabilities {
            user_namespaces: abilities.user_namespaces.is_ok(),
            recursive_read_only_mounts: abilities.recursive_read_only,
        }
    }

    async fn probe(&self) -> Result<()> {
        if let Some(why) = self.pods.hierarchy.crun_refusal() {
            return Err(Error::precondition(why));
        }
        self.program.probe().await
    }

    fn check(&self, pod: &SandboxConfig) -> Result<()> {
        self.pods.check(pod, &self.program.abilities().user_namespaces)
    }

    async fn ensure_sandbox(
        &self,
        pod: &PodRecord,
        pod_dir: &Utf8Path,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
        cancel: &CancellationToken,
    ) -> Result<SandboxFacts> {
        self.pods.make_sandbox(pod, pod_dir, monitor, journal, cancel).await
    }

    async fn launch_plan(&self, context: LaunchContext<'_>) -> Result<Launch> {
        self.plan_launch(context).await
    }

    async fn cannot_run(&self, run_dir: &Utf8Path) -> Option<String> {
        pods::launch::cannot_run(run_dir.join("crun.log")).await
    }

    async fn exec_plan(&self, context: ExecContext<'_>) -> Result<monitor_v1::Exec> {
        self.plan_exec(context).await
    }

    fn end_exec(&self, pod: &PodRecord, container: &ContainerId, run_dir: &Utf8Path, exec_id: &str) {
        self.pods.remove_exec(pod, container, run_dir, exec_id);
    }

    async fn abandon_execs(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        self.pods.abandon_execs(pod, container).await
    }

    async fn dial(&self, pod: &PodRecord, port: u16) -> Result<std::net::TcpStream> {
        pods::dial::dial(pod, port).await
    }

    async fn has_started(&self, _: &PodRecord, container: &ContainerId) -> Result<bool> {
        let root = self.root();
        let call = Spawn::new(self.config.program.as_str(), ["--root", root.as_str(), "state", container.as_str()]);
        let output = call.env("PATH", PATH).deadline(self.config.timeout).run_ok().await?;
        let state: serde_json::Value = serde_json::from_slice(&output.stdout)
            .map_err(|e| Error::because(Kind::Internal, format!("the state of container {container}"), e))?;
        // "stopped" is one that ran, or that was killed before: its end is told either way.
        Ok(state["status"] != "created")
    }

    async fn remove_container(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        self.force_remove(&self.pods.parent(pod)?, container).await
    }

    async fn teardown(&self, pod: &PodRecord, pod_dir: &Utf8Path) -> Result<()> {
        self.pods.take_down(pod, pod_dir).await
    }

    async fn network_status(&self) -> std::result::Result<(), NetworkNotReady> {
        self.pods.network_status().await
    }

    async fn collect_garbage(&self, pods: &[PodRecord], containers: &[ContainerId]) -> Result<()> {
        let unclaimed = pods::sandbox::unclaimed(self.root(), containers).await?;
        let deletes = unclaimed.into_iter().map(|id| (self.delete_call(&id), id)).collect();
        self.pods.sweep(pods, containers, deletes).await
    }

    async fn freeze(&self, pod: &PodRecord, container: &ContainerId, frozen: bool) -> Result<()> {
        self.pods.freeze(pod, container, frozen).await
    }

    async fn stats(&self, targets: Vec<StatsTarget>, wanted: StatsWanted) -> Result<Vec<PodSample>> {
        self.pods.read_stats(targets, wanted).await
    }

    async fn update(&self, update: UpdateContext<'_>) -> Result<()> {
        self.change_limits(update).await
    }

    async fn checkpoint(&self, checkpoint: CheckpointContext<'_>) -> Result<()> {
        self.dump(checkpoint).await
    }

    fn can_restore(&self, pod: &SandboxConfig, container: &ContainerConfig) -> Result<()> {
        restore::check(pod, container)
    }

    async fn restore_plan(
        &self,
        context: RestoreContext<'_>,
        plan: monitor_v1::CreateContainer,
    ) -> Result<monitor_v1::CreateContainer> {
        self.plan_restore(context, plan).await
    }

    async fn update_sandbox(&self, pod: &PodRecord, resources: &Resources, overhead: &Resources) -> Result<()> {
        self.pods.change_pod_limits(pod, resources, overhead).await
    }

    async fn environment(&self, _: &PodRecord, run_dir: &Utf8Path) -> Result<Vec<String>> {
        pods::bundle::environment(run_dir).await
    }

    async fn set_pod_cidrs(&self, cidrs: &[String]) -> Result<()> {
        self.pods.network.set_pod_cidrs(cidrs).await
    }
}
