//! Handler `lxc`: a pod is a set of pinned namespaces and a cgroup, as with crun; a container is one of liblxc, run by a
//! small helper under the pod's monitor.
//!
//! `plan` turns an OCI spec into liblxc's configuration and a plan for the container's first process, `seccomp` and `limits`
//! are parts of that; `launch` plans containers and execs, `lxcfs` asks whether that runs, `system` has what an
//! init wants to be different. The containers are below `<state>/lxc`, where liblxc's own tools
//! see them. A crash leaves there what [`Backend::collect_garbage`] or the container's removal takes away.

pub mod by_hand;
mod launch;
pub(super) mod limits;
mod lines;
mod lxcfs;
pub(in crate::backends) mod plan;
mod seccomp;
mod system;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio_util::sync::CancellationToken;

use super::oci::linux;
use super::pods::{self, NodePods, PATH};
use crate::core::backend::{Backend, Capabilities, ExecContext, Journal, Launch, LaunchContext, UpdateContext};
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::{Monitor, NetworkNotReady, monitor_v1};
use crate::core::records::{PodRecord, SandboxFacts};
use crate::core::spec::{Resources, SandboxConfig};
use crate::core::stats::{PodSample, StatsTarget, StatsWanted};
use crate::integrations::cgroup::{Driver, Parent};
use crate::integrations::netns;
use crate::utils::process::Spawn;

/// Group of the container's processes in a systemd scope.
const INNER: &str = "container";
/// Where lxcfs is mounted on Debian and Proxmox.
const LXCFS: &str = "/var/lib/lxcfs";

/// Settings of the handler.
#[derive(Debug, Clone)]
pub struct LxcConfig {
    /// The helper that loads liblxc.
    pub helper: Utf8PathBuf,
    /// What becomes a container's first process.
    pub init: Utf8PathBuf,
    /// liblxc; "": as the loader finds it.
    pub library: String,
    /// Longest call of the helper.
    pub timeout: Duration,
    /// Cgroup below which the processes are that liblxc runs in, from the hierarchies' roots.
    pub holders: Utf8PathBuf,
}

/// The backend.
pub struct LxcBackend {
    config: LxcConfig,
    pods: Arc<NodePods>,
    holders: Utf8PathBuf,
    lxcfs: lxcfs::Lxcfs,
    /// Identity of the helper that found liblxc: it is asked again only when it changes.
    probed: std::sync::Mutex<Option<(u64, std::time::SystemTime)>>,
    /// Held while [`Self::hidden_net`] is made.
    hiding: tokio::sync::Mutex<()>,
}

/// Where the network namespace is pinned in which liblxc listens for its tools, beside the folder of the pods' containers.
///
/// It listens at abstract sockets, which belong to a network namespace, and asks nobody for more than to be root: whoever
/// is root in the node's network, without any capability, could stop containers and get descriptors of the node's files.
fn hidden_net(lxcpath: &Utf8Path) -> Utf8PathBuf {
    lxcpath.with_extension("net")
}

impl LxcBackend {
    /// Nothing is looked at yet: a node without liblxc has this handler, too, and says so in [`Backend::probe`].
    pub fn new(config: LxcConfig, pods: Arc<NodePods>) -> Self {
        let holders = config.holders.clone();
        let (lxcfs, probed, hiding) = Default::default();
        Self { config, pods, holders, lxcfs, probed, hiding }
    }

    fn lxcpath(&self) -> Utf8PathBuf {
        self.pods.config.state.join("lxc")
    }

    /// The pin of [`hidden_net`], made if it is not there.
    async fn hidden_net(&self) -> Result<Utf8PathBuf> {
        let path = hidden_net(&self.lxcpath());
        if !netns::is_pinned(&path)? {
            let _one = self.hiding.lock().await;
            netns::pin_empty_net(&path).await?;
        }
        Ok(path)
    }

    /// A call of the helper about a container; what it says of its own failures goes to `log`.
    fn call(&self, name: &str, log: &Utf8Path, mut arguments: Vec<String>) -> monitor_v1::Program {
        let mut option = |name: &str, value: &str| arguments.extend([format!("--{name}"), value.to_owned()]);
        option("lxcpath", self.lxcpath().as_str());
        option("name", name);
        option("log", log.as_str());
        if !self.config.library.is_empty() {
            option("library", &self.config.library);
        }
        monitor_v1::Program {
            path: self.config.helper.to_string(),
            args: arguments,
            env: vec![format!("PATH={PATH}")],
            cwd: String::new(),
            deadline_ms: u32::try_from(self.config.timeout.as_millis()).unwrap_or(u32::MAX),
            error_log: log.to_string(),
            // The first process sets its own; what liblxc runs in stays as its monitor is.
            oom_score_adj: -999,
        }
    }

    /// With systemd the container is in a scope, which only systemd can make: its own tool starts the helper in one.
    fn scoped(&self, mut call: monitor_v1::Program, parent: &Parent, id: &ContainerId) -> monitor_v1::Program {
        if parent.driver() == Driver::Cgroupfs {
            return call;
        }
        let scope = parent.container(id);
        let slice = scope.parent().and_then(Utf8Path::file_name).unwrap_or_default();
        let mut args: Vec<String> =
            ["--scope", "--quiet", "--collect", "--property=Delegate=yes"].map(String::from).into();
        args.push(format!("--slice={slice}"));
        args.push(format!("--unit={}", scope.file_name().unwrap_or_default()));
        args.extend(["--".to_owned(), call.path]);
        args.append(&mut call.args);
        // The scope has to have somebody in it until liblxc has made the container's group.
        for root in self.pods.hierarchy.roots() {
            args.extend(["--cgroup".to_owned(), root.join(&scope).join("helper").to_string()]);
        }
        monitor_v1::Program { path: "/usr/bin/systemd-run".into(), args, ..call }
    }

    /// The group that liblxc makes for a container.
    fn cgroup(&self, parent: &Parent, id: &ContainerId) -> Utf8PathBuf {
        match parent.driver() {
            Driver::Cgroupfs => parent.container(id),
            Driver::Systemd => parent.container(id).join(INNER),
        }
    }

    /// Whether lxcfs runs.
    async fn lxcfs(&self) -> Result<bool> {
        self.lxcfs.ask(|| Utf8Path::new(LXCFS).join("proc/meminfo").try_exists().unwrap_or(false)).await
    }

    fn run_dir(&self, pod: &PodRecord, container: &ContainerId) -> Utf8PathBuf {
        self.pods.config.state.join("pods").join(pod.id.as_str()).join("containers").join(container.as_str())
    }

    async fn delete(&self, parent: &Parent, id: &ContainerId, run_dir: &Utf8Path) -> Result<()> {
        let log = Utf8Path::new("/dev/null");
        let call = self.call(id.as_str(), log, self.delete_arguments(parent, id, &run_dir.join("pid")));
        Spawn::new(&call.path, &call.args).env("PATH", PATH).deadline(self.config.timeout).run_ok().await?;
        Ok(())
    }
}

#[async_trait]
impl Backend for LxcBackend {
    fn handler(&self) -> &'static str {
        "lxc"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { user_namespaces: self.pods.config.idmapped_rootfs.is_ok(), recursive_read_only_mounts: true }
    }

    async fn probe(&self) -> Result<()> {
        let helper = &self.config.helper;
        let missing = |e| Error::because(Kind::FailedPrecondition, format!("helper {helper} (handlers.lxc)"), e);
        let meta = std::fs::metadata(helper).map_err(missing)?;
        let init = &self.config.init;
        if !init.is_file() {
            return Err(Error::precondition(format!("{init} (handlers.lxc.init) is not there")));
        }
        let seen = (meta.len(), meta.modified().map_err(missing)?);
        if *self.probed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) == Some(seen) {
            return Ok(());
        }
        let mut args = vec!["version"];
        if !self.config.library.is_empty() {
            args.extend(["--library", self.config.library.as_str()]);
        }
        Spawn::new(helper.as_str(), args)
            .env("PATH", PATH)
            .deadline(Duration::from_secs(10))
            .run_ok()
            .await
            .map_err(|e| Error::because(Kind::FailedPrecondition, "liblxc (package liblxc1) can't be used", e))?;
        *self.probed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(seen);
        Ok(())
    }

    fn check(&self, pod: &SandboxConfig) -> Result<()> {
        self.pods.check(pod, &self.pods.config.idmapped_rootfs)
    }

    async fn ensure_sandbox(
        &self,
        pod: &PodRecord,
        pod_dir: &Utf8Path,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
        cancel: &CancellationToken,
    ) -> Result<SandboxFacts> {
        self.probe().await?;
        self.pods.make_sandbox(pod, pod_dir, monitor, journal, cancel).await
    }

    async fn launch_plan(&self, context: LaunchContext<'_>) -> Result<Launch> {
        self.plan_launch(context).await
    }

    async fn cannot_run(&self, run_dir: &Utf8Path) -> Option<String> {
        pods::launch::cannot_run(run_dir.join("lxc.log")).await
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

    async fn has_started(&self, pod: &PodRecord, container: &ContainerId) -> Result<bool> {
        let run_dir = self.run_dir(pod, container);
        blocking(move || launch::has_started(&run_dir)).await
    }

    async fn environment(&self, _: &PodRecord, run_dir: &Utf8Path) -> Result<Vec<String>> {
        pods::bundle::environment(run_dir).await
    }

    async fn remove_container(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        let parent = self.pods.parent(pod)?;
        self.pods.kill_container(&parent, container).await?;
        self.delete(&parent, container, &self.run_dir(pod, container)).await
    }

    async fn teardown(&self, pod: &PodRecord, pod_dir: &Utf8Path) -> Result<()> {
        self.pods.take_down(pod, pod_dir).await
    }

    async fn network_status(&self) -> std::result::Result<(), NetworkNotReady> {
        self.pods.network_status().await
    }

    async fn collect_garbage(&self, _: &[PodRecord], containers: &[ContainerId]) -> Result<()> {
        // What all pods of the node have alike is swept by handler crun.
        let unclaimed = pods::sandbox::unclaimed(self.lxcpath(), containers).await?;
        let delete = |id: ContainerId| {
            // Its pod is not known any more, and with it where its group was: what ran in it is gone since then.
            let call = self.call(id.as_str(), Utf8Path::new("/dev/null"), vec!["delete".to_owned()]);
            (Spawn::new(&call.path, &call.args).env("PATH", PATH).deadline(self.config.timeout), id)
        };
        self.pods.sweep_containers(unclaimed.into_iter().map(delete).collect()).await
    }

    async fn freeze(&self, pod: &PodRecord, container: &ContainerId, frozen: bool) -> Result<()> {
        self.pods.freeze(pod, container, frozen).await
    }

    async fn stats(&self, targets: Vec<StatsTarget>, wanted: StatsWanted) -> Result<Vec<PodSample>> {
        self.pods.read_stats(targets, wanted).await
    }

    async fn update(&self, update: UpdateContext<'_>) -> Result<()> {
        let UpdateContext { pod, container, asked, merged, .. } = update;
        let limits = linux::update(asked, merged, &self.pods.host_now(merged))?;
        let files = limits::settings(&limits, self.pods.host.cgroup_v2)?;
        let parent = self.pods.parent(pod)?;
        let group = self.cgroup(&parent, &container.id);
        self.pods.change_limits(&parent, container, group, files, asked).await
    }

    async fn update_sandbox(&self, pod: &PodRecord, resources: &Resources, overhead: &Resources) -> Result<()> {
        self.pods.change_pod_limits(pod, resources, overhead).await
    }

    async fn set_pod_cidrs(&self, cidrs: &[String]) -> Result<()> {
        self.pods.network.set_pod_cidrs(cidrs).await
    }
}
