//! Handler `crun`: a pod is a set of pinned namespaces and a cgroup, a container an OCI bundle that crun (or any OCI
//! runtime with its command line) runs under the pod's monitor.
//!
//! `sandbox` makes and takes down the pod, `launch` plans containers and execs; the OCI spec itself is `backends::oci`.
//! crun's own state is below `<state>/crun`; a crash leaves there what [`CrunBackend::collect_garbage`] or the
//! container's removal takes away.

mod checkpoint;
mod destinations;
mod devices;
mod dial;
mod files;
mod launch;
mod sandbox;
mod stats;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio_util::sync::CancellationToken;

use super::oci::{self, HostFacts};
use crate::core::backend::{
    Backend, Capabilities, CheckpointContext, ExecContext, Journal, Launch, LaunchContext, UpdateContext,
};
use crate::core::blocking::blocking;
use crate::core::caps::CapSet;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::{Monitor, NetworkNotReady, PodNetwork, monitor_v1};
use crate::core::records::{PodRecord, SandboxFacts};
use crate::core::spec::{NamespaceMode, Profile, Resources, SandboxConfig};
use crate::core::stats::{PodSample, StatsTarget, StatsWanted};
use crate::integrations::cgroup::{Driver, Hierarchy, Parent};
use crate::integrations::netns::NamespacePins;
use crate::integrations::{apparmor, host};
use crate::utils::process::Spawn;
use crate::utils::tasks::TaskSet;

/// PATH of crun itself.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Settings of the handler.
#[derive(Debug, Clone)]
pub struct CrunConfig {
    /// crun, absolute.
    pub program: Utf8PathBuf,
    /// Longest call of it.
    pub timeout: Duration,
    /// State folder of the daemon.
    pub state: Utf8PathBuf,
    /// Who makes cgroups.
    pub driver: Driver,
    /// Longest log line in bytes.
    pub log_line_max: u32,
    /// Most processes of a container; 0: no limit.
    pub pids_limit: i64,
    /// Capabilities of containers that ask for nothing.
    pub default_caps: CapSet,
    /// Folders of CDI files; a later one wins.
    pub cdi_spec_dirs: Vec<Utf8PathBuf>,
    /// Folder of Localhost seccomp profiles with relative names.
    pub seccomp_root: Utf8PathBuf,
    /// Pods with a network of their own may listen on ports below 1024 without a capability.
    pub unprivileged_ports: bool,
    /// They may ping without a capability.
    pub unprivileged_icmp: bool,
    /// Whether containers can have idmapped root file systems, or why not.
    pub idmapped_rootfs: std::result::Result<(), String>,
}

/// The backend.
pub struct CrunBackend {
    config: CrunConfig,
    host: HostFacts,
    hierarchy: Hierarchy,
    pins: NamespacePins,
    network: Arc<dyn PodNetwork>,
    /// What outlives the call that began it.
    tasks: TaskSet,
    /// Identity of the program that answered `--version`: it is asked again only when it changes.
    probed: std::sync::Mutex<Option<(u64, std::time::SystemTime)>>,
    traffic: stats::TrafficCache,
    /// Whether pods can have user namespaces, or why not.
    user_namespaces: std::result::Result<(), String>,
    /// The runtime puts execs into cgroups of their own.
    exec_cgroup: bool,
}

impl CrunBackend {
    /// Looks at the node; a crun that is missing is no error here, but in [`Backend::probe`].
    pub async fn new(
        config: CrunConfig,
        hierarchy: Hierarchy,
        pins: NamespacePins,
        network: Arc<dyn PodNetwork>,
        tasks: TaskSet,
    ) -> Result<Self> {
        let powers = host::powers()?;
        let v2 = matches!(hierarchy.mode, crate::integrations::cgroup::Mode::Unified);
        let facts = HostFacts {
            cgroup_v2: v2,
            swap_limit: hierarchy.can_limit_swap(),
            hugetlb: hierarchy.has_controller("hugetlb"),
            hugepage_sizes: host::hugepage_sizes(),
            online_cpus: None,
            online_mems: None,
            apparmor: apparmor::is_enabled(),
            selinux: host::selinux(),
            bounding: powers.bounding,
            sys_resource: powers.effective.has("SYS_RESOURCE"),
            oom_score_adj: powers.oom_score_adj,
            nofile_hard: powers.nofile_hard,
            recursive_read_only: false,
        };
        let (probed, traffic) = Default::default();
        let mut this = Self {
            config,
            host: facts,
            hierarchy,
            pins,
            network,
            tasks,
            probed,
            traffic,
            user_namespaces: Ok(()),
            exec_cgroup: false,
        };
        this.exec_cgroup = this.knows_exec_cgroup().await;
        let features = this.features().await;
        let knows = |list: &serde_json::Value, word| list.as_array().is_some_and(|l| l.iter().any(|v| v == word));
        this.host.recursive_read_only = knows(&features["mountOptions"], "rro");
        let linux = &features["linux"];
        let idmaps = &linux["mountExtensions"]["idmap"]["enabled"];
        this.user_namespaces = match knows(&linux["namespaces"], "user") && idmaps == &serde_json::Value::Bool(true) {
            true => this.config.idmapped_rootfs.clone(),
            false => Err(format!("{} has none, or no idmapped mounts", this.config.program)),
        };
        if let Err(why) = &this.user_namespaces {
            tracing::info!(why, "pods can't have user namespaces");
        }
        if this.host.apparmor
            && let Err(e) = apparmor::load_default().await
        {
            tracing::warn!(error = e.chain(), "containers with the default AppArmor profile will be refused");
        }
        Ok(this)
    }

    /// crun from 1.8.5 on has `features`: what it can do, as the OCI runtime spec's features.md has it. Null from others.
    async fn features(&self) -> serde_json::Value {
        let features = Spawn::new(self.config.program.as_str(), ["features"]).env("PATH", PATH).run_ok().await;
        features.ok().and_then(|output| serde_json::from_slice(&output.stdout).ok()).unwrap_or_default()
    }

    /// `exec --cgroup` is crun's from 1.3 on, and runc's. Without it an exec is killed by its descendants and session.
    async fn knows_exec_cgroup(&self) -> bool {
        let help = Spawn::new(self.config.program.as_str(), ["exec", "--help"]).env("PATH", PATH).run_ok().await;
        let knows = help.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("--cgroup"));
        if !knows {
            tracing::warn!(program = %self.config.program, "no `exec --cgroup`: daemons that an exec starts outlive its kill");
        }
        knows
    }

    fn root(&self) -> Utf8PathBuf {
        self.config.state.join("crun")
    }

    /// A call of crun; what it says of its own failures goes to `log`.
    fn call(&self, log: &Utf8Path, oom_score_adj: i32, verb: &[&str]) -> monitor_v1::Program {
        let root = self.root();
        let mut args = vec!["--root", root.as_str(), "--log", log.as_str()];
        if self.config.driver == Driver::Systemd {
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

    /// The node as limits see it: CPUs come and go.
    fn host_now(&self, asked: &Resources) -> HostFacts {
        let mut host = self.host.clone();
        if !asked.cpuset_cpus.is_empty() {
            host.online_cpus = host::online("cpu");
        }
        if !asked.cpuset_mems.is_empty() {
            host.online_mems = host::online("node");
        }
        host
    }

    fn parent(&self, pod: &PodRecord) -> Result<Parent> {
        Ok(Parent::new(self.config.driver, &pod.config.cgroup_parent, &pod.id)?)
    }

    /// Whether the profile can be had on this node.
    fn check_apparmor(&self, profile: &Profile) -> Result<()> {
        match profile {
            Profile::Localhost(name) if !self.host.apparmor => Err(Error::precondition(format!(
                "AppArmor profile {name:?} is asked for, but this kernel has AppArmor off"
            ))),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Backend for CrunBackend {
    fn handler(&self) -> &'static str {
        "crun"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            user_namespaces: self.user_namespaces.is_ok(),
            recursive_read_only_mounts: self.host.recursive_read_only,
        }
    }

    async fn probe(&self) -> Result<()> {
        if let Some(why) = self.hierarchy.crun_refusal() {
            return Err(Error::precondition(why));
        }
        let program = &self.config.program;
        let missing =
            |e| Error::because(Kind::FailedPrecondition, format!("OCI runtime {program} (handlers.crun.path)"), e);
        let meta = std::fs::metadata(program).map_err(missing)?;
        let seen = (meta.len(), meta.modified().map_err(missing)?);
        if *self.probed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) == Some(seen) {
            return Ok(());
        }
        Spawn::new(program.as_str(), ["--version"])
            .env("PATH", PATH)
            .deadline(Duration::from_secs(10))
            .run_ok()
            .await
            .map_err(|e| Error::because(Kind::FailedPrecondition, "the OCI runtime does not work", e))?;
        *self.probed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(seen);
        Ok(())
    }

    fn check(&self, pod: &SandboxConfig) -> Result<()> {
        let named = |e: Error| e.context(format!("pod {}/{}", pod.metadata.namespace, pod.metadata.name));
        oci::userns::check_pod(&pod.security.namespaces).map_err(named)?;
        if pod.security.namespaces.user.is_some()
            && let Err(why) = &self.user_namespaces
        {
            return Err(named(Error::precondition(format!("user namespaces can't be had on this node: {why}"))));
        }
        if pod.security.namespaces.pid == NamespaceMode::Target {
            return Err(named(Error::invalid("a sandbox has no target PID namespace")));
        }
        self.check_apparmor(&pod.security.apparmor).map_err(named)?;
        Parent::new(self.config.driver, &pod.cgroup_parent, &crate::core::ids::PodId::new())
            .map_err(|e| named(e.into()))?;
        files::bandwidth(&pod.annotations).map_err(named)?;
        Ok(())
    }

    async fn ensure_sandbox(
        &self,
        pod: &PodRecord,
        pod_dir: &Utf8Path,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
        cancel: &CancellationToken,
    ) -> Result<SandboxFacts> {
        self.make_sandbox(pod, pod_dir, monitor, journal, cancel).await
    }

    async fn launch_plan(&self, context: LaunchContext<'_>) -> Result<Launch> {
        self.plan_launch(context).await
    }

    async fn cannot_run(&self, run_dir: &Utf8Path) -> Option<String> {
        launch::cannot_run(run_dir).await
    }

    async fn exec_plan(&self, context: ExecContext<'_>) -> Result<monitor_v1::Exec> {
        self.plan_exec(context).await
    }

    fn end_exec(&self, pod: &PodRecord, container: &ContainerId, run_dir: &Utf8Path, exec_id: &str) {
        self.remove_exec(pod, container, run_dir, exec_id);
    }

    async fn abandon_execs(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        let (hierarchy, parent, container) = (self.hierarchy.clone(), self.parent(pod)?, container.clone());
        blocking(move || Ok(hierarchy.end_execs(&parent, &container, Some(sandbox::KILL))?)).await
    }

    async fn dial(&self, pod: &PodRecord, port: u16) -> Result<std::net::TcpStream> {
        dial::dial(pod, port).await
    }

    async fn remove_container(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        self.force_remove(&self.parent(pod)?, container).await
    }

    async fn teardown(&self, pod: &PodRecord, pod_dir: &Utf8Path) -> Result<()> {
        self.take_down(pod, pod_dir).await
    }

    async fn network_status(&self) -> std::result::Result<(), NetworkNotReady> {
        self.network.status().await
    }

    async fn collect_garbage(&self, pods: &[PodRecord], containers: &[ContainerId]) -> Result<()> {
        self.sweep(pods, containers).await
    }

    async fn freeze(&self, pod: &PodRecord, container: &ContainerId, frozen: bool) -> Result<()> {
        let verb = if frozen { "pause" } else { "resume" };
        let root = self.root();
        let call = Spawn::new(self.config.program.as_str(), ["--root", root.as_str(), verb, container.as_str()]);
        let done = call.env("PATH", PATH).deadline(self.config.timeout).run_ok().await;
        done.map(drop).map_err(|e| Error::from(e).context(format!("pod {}", pod.id)))
    }
    async fn stats(&self, targets: Vec<StatsTarget>, wanted: StatsWanted) -> Result<Vec<PodSample>> {
        self.read_stats(targets, wanted).await
    }

    async fn update(&self, update: UpdateContext<'_>) -> Result<()> {
        self.change_limits(update).await
    }

    async fn checkpoint(&self, checkpoint: CheckpointContext<'_>) -> Result<()> {
        self.dump(checkpoint).await
    }

    async fn update_sandbox(&self, pod: &PodRecord, resources: &Resources, overhead: &Resources) -> Result<()> {
        self.change_pod_limits(pod, resources, overhead).await
    }

    async fn set_pod_cidrs(&self, cidrs: &[String]) -> Result<()> {
        self.network.set_pod_cidrs(cidrs).await
    }
}
