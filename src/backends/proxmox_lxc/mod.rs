//! Handler `proxmox-lxc`: a pod is a Proxmox container (CT), made and limited through the Proxmox API and seen in its GUI; the pod's
//! containers are run by the OCI runtime from the node, in the CT's user, network, IPC and UTS namespaces, with PID namespaces
//! below the CT's and cgroups beside its own, so that whatever stops the CT ends them.
//!
//! `unit` makes and removes the CT, `owner` says whose one is, `network` says what Proxmox connects them with, `launch` plans
//! containers and execs. With the profile `native` a CT's init becomes the pod's one container (`native`). An OCI runtime's calls are
//! made inside of the CT's PID namespace by the helper of the handler `lxc` (`within`, `keep`, `inherit`, `forget`). A CT is found
//! again by the pod's journal and by the identity in its notes; one without that is never touched. A crash leaves what the journal
//! names, or a CT that says whose it is.

mod launch;
mod native;
mod network;
mod owner;
mod plan;
mod template;
mod unit;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio_util::sync::CancellationToken;

use super::lxc::limits;
use super::oci::linux;
use super::pods::{self, NodePods};
use super::proxmox::Guests;
use crate::core::backend::{
    Backend, Capabilities, ExecContext, IsKnown, Journal, Launch, LaunchContext, UpdateContext,
};
use crate::core::blocking::blocking;
use crate::core::config::Orphans;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::{Monitor, NetworkNotReady, monitor_v1};
use crate::core::records::{PodRecord, SandboxFacts};
use crate::core::spec::{ContainerConfig, IdMapping, NamespaceMode, Resources, SandboxConfig, UserNamespace};
use crate::core::stats::{PodSample, StatsTarget, StatsWanted};
use crate::integrations::proxmox_api::{Proxmox, Vmid};
use plan::CT;

pub use network::{CtNets, CtNetwork};

/// Settings of the handler.
#[derive(Debug, Clone)]
pub struct ProxmoxLxcConfig {
    /// This node's name in the cluster.
    pub node: String,
    /// Identity of this installation, for the CTs' notes.
    pub installation: String,
    /// Numbers that CTs get, first and last.
    pub vmids: (Vmid, Vmid),
    /// Storage of their root file systems.
    pub storage: String,
    /// Pool that they are in; "": none.
    pub pool: String,
    /// Storage of the template that they are made of.
    pub template_storage: String,
    /// What becomes the init of that template.
    pub init: Utf8PathBuf,
    /// The program that enters CTs.
    pub helper: Utf8PathBuf,
    /// The OCI runtime, absolute.
    pub runtime: Utf8PathBuf,
    /// Longest call of either.
    pub timeout: Duration,
    /// First id on the node of a CT's users and groups, and how many there are.
    pub ids: (u32, u32),
    /// What becomes of CTs of this installation that belong to no pod.
    pub orphans: Orphans,
    /// How often they are looked for, and how long one has to be nobody's before it is removed.
    pub orphans_after: Duration,
    /// What Proxmox connects them with; None: the node's CNI plugins do.
    pub network: Option<CtNets>,
    /// New pods are of the profile `native`.
    pub native: bool,
}

/// The backend.
pub struct ProxmoxLxcBackend {
    config: ProxmoxLxcConfig,
    api: Proxmox,
    /// Cgroups of its own making, without systemd: those of a CT are Proxmox's.
    pods: Arc<NodePods>,
    /// The template that is known to be there.
    template: tokio::sync::Mutex<Option<String>>,
    /// The CTs: their numbers, and which are nobody's.
    cts: Guests,
}

impl ProxmoxLxcBackend {
    /// Nothing is asked yet.
    pub fn new(config: ProxmoxLxcConfig, api: Proxmox, pods: Arc<NodePods>) -> Self {
        let remove_after = (config.orphans == Orphans::Remove).then_some(config.orphans_after);
        let cts = Guests::new(&CT, &api, &config.node, &config.installation, config.vmids, remove_after);
        Self { config, api, pods, template: Default::default(), cts }
    }

    /// Every CT has the same users.
    fn users(&self) -> UserNamespace {
        let (host_id, length) = self.config.ids;
        let all = vec![IdMapping { container_id: 0, host_id, length }];
        UserNamespace { uids: all.clone(), gids: all }
    }

    /// Where the OCI runtime keeps its states.
    fn root(&self) -> Utf8PathBuf {
        self.pods.config.state.join("crun-ct")
    }

    /// The pod as what is shared with other handlers wants to see it: its cgroups are the CT's.
    fn in_ct(&self, pod: &PodRecord) -> Result<PodRecord> {
        // After its end the journal names no CT any more.
        let cgroup = match &pod.facts {
            Some(facts) => facts.cgroup_parent.clone(),
            None => plan::cgroup(CT.vmid(pod)?),
        };
        let mut pod = pod.clone();
        pod.config.cgroup_parent = cgroup;
        Ok(pod)
    }
}

#[async_trait]
impl Backend for ProxmoxLxcBackend {
    fn handler(&self) -> &'static str {
        "proxmox-lxc"
    }

    fn capabilities(&self) -> Capabilities {
        // A pod can't have users of its own inside of the CT's.
        Capabilities { user_namespaces: false, recursive_read_only_mounts: true }
    }

    async fn probe(&self) -> Result<()> {
        if let Err(why) = &self.pods.config.idmapped_rootfs {
            let what = format!("containers have the users of their CT, which root file systems here can't have: {why}");
            return Err(Error::precondition(what));
        }
        for (what, path) in [("helper", &self.config.helper), ("OCI runtime", &self.config.runtime)] {
            std::fs::metadata(path)
                .map_err(|e| Error::because(Kind::FailedPrecondition, format!("{what} {path} (handlers)"), e))?;
        }
        let version = self.cts.check_node().await?;
        if self.config.native {
            native::check_kernel(&native::kernel())?;
            native::check_proxmox(&version)?;
        }
        self.config.network.as_ref().map_or(Ok(()), |_| CtNets::check_release(&version))
    }

    fn adapt_pod(&self, pod: &mut SandboxConfig) -> Result<()> {
        let namespaces = &mut pod.security.namespaces;
        let named = |what: &str| {
            let m = &pod.metadata;
            Err(Error::new(Kind::Unimplemented, format!("pod {}/{}: {what}", m.namespace, m.name)))
        };
        if namespaces.user.is_some() {
            return named(
                "handler proxmox-lxc gives every pod its CT's users: it can't have a user namespace of its own",
            );
        }
        if let Some(what) = CT.node_namespace(namespaces) {
            return named(&what);
        }
        // A privileged pod may have containers that are not; the others are refused one by one.
        namespaces.user = Some(self.users());
        Ok(())
    }

    fn adapt_container(&self, pod: &PodRecord, container: &mut ContainerConfig) -> Result<()> {
        if container.security.privileged {
            let what = "a privileged container can't be in a CT, whose root is nobody on the node";
            return Err(Error::new(Kind::Unimplemented, what));
        }
        if container.security.namespaces.pid == NamespaceMode::Target {
            return Err(Error::new(
                Kind::Unimplemented,
                "handler proxmox-lxc can't share the processes of one container",
            ));
        }
        let users = pod.config.security.namespaces.user.clone();
        for m in container.mounts.iter_mut().filter(|m| m.image.is_none()) {
            let users = users.clone().unwrap_or_default();
            (m.uid_mappings, m.gid_mappings) = (users.uids, users.gids);
        }
        container.security.namespaces.user = users;
        if native::is(pod) {
            native::check_container(container)?;
            native::check_only(&self.pods.config.state, &pod.id)?;
            container.security.namespaces.pid = NamespaceMode::Pod;
        }
        Ok(())
    }

    fn check(&self, pod: &SandboxConfig) -> Result<()> {
        if self.config.network.is_some() {
            CtNets::check(pod)?;
        }
        if self.config.native {
            native::check_kernel(&native::kernel())?;
        }
        self.pods
            .check(&SandboxConfig { cgroup_parent: String::new(), ..pod.clone() }, &self.pods.config.idmapped_rootfs)
    }

    async fn ensure_sandbox(
        &self,
        pod: &PodRecord,
        pod_dir: &Utf8Path,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
        cancel: &CancellationToken,
    ) -> Result<SandboxFacts> {
        self.make_unit(pod, pod_dir, monitor, journal, cancel).await
    }

    async fn launch_plan(&self, context: LaunchContext<'_>) -> Result<Launch> {
        match native::is(context.pod) {
            true => self.plan_native(context).await,
            false => self.plan_launch(context).await,
        }
    }

    async fn cannot_run(&self, run_dir: &Utf8Path) -> Option<String> {
        pods::launch::cannot_run(run_dir.join("crun.log")).await
    }

    async fn exec_plan(&self, context: ExecContext<'_>) -> Result<monitor_v1::Exec> {
        self.plan_exec(context).await
    }

    fn end_exec(&self, pod: &PodRecord, container: &ContainerId, run_dir: &Utf8Path, exec_id: &str) {
        // Where no CT is known any more there are no groups, and files all the same.
        let in_ct = self.in_ct(pod);
        self.pods.remove_exec(in_ct.as_ref().unwrap_or(pod), container, run_dir, exec_id);
    }

    async fn abandon_execs(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        self.pods.abandon_execs(&self.in_ct(pod)?, container).await
    }

    async fn dial(&self, pod: &PodRecord, port: u16) -> Result<std::net::TcpStream> {
        pods::dial::dial(pod, port).await
    }

    async fn has_started(&self, _: &PodRecord, container: &ContainerId) -> Result<bool> {
        // crun takes it away when it lets the first process run.
        let fifo = self.root().join(container.as_str()).join("exec.fifo");
        Ok(!fifo.try_exists().map_err(|e| Error::io(format!("look at {fifo}"), e))?)
    }

    async fn environment(&self, _: &PodRecord, run_dir: &Utf8Path) -> Result<Vec<String>> {
        pods::bundle::environment(run_dir).await
    }

    async fn remove_container(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        let pod = self.in_ct(pod)?;
        let parent = self.pods.parent(&pod)?;
        self.pods.kill_container(&parent, container).await?;
        self.forget(&pod, &parent, container).await
    }

    async fn teardown(&self, pod: &PodRecord, pod_dir: &Utf8Path) -> Result<()> {
        self.end_unit(pod, pod_dir).await
    }

    async fn network_status(&self) -> std::result::Result<(), NetworkNotReady> {
        self.pods.network_status().await
    }

    async fn collect_garbage(&self, pods: &[PodRecord], containers: &[ContainerId]) -> Result<()> {
        // Of pods of an earlier daemon, also where an operator has deleted the CT.
        for pod in pods {
            CT.claimed(std::slice::from_ref(pod))
                .into_iter()
                .filter(|n| !CT.is_taken(pod, *n))
                .for_each(|n| self.cts.keep(n));
        }
        for id in pods::sandbox::unclaimed(self.root(), containers).await? {
            // Its processes have ended with its CT, which belongs to no pod any more.
            let state = self.root().join(id.as_str());
            let gone = state.clone();
            blocking(move || {
                crate::utils::beneath::remove_tree(gone.as_std_path())
                    .map_err(|e| Error::io(format!("remove {state}"), e))
            })
            .await?;
        }
        Ok(())
    }

    async fn look_for_orphans(&self, pods: &[PodRecord], is_known: &IsKnown) -> Result<()> {
        self.sweep_orphans(pods, is_known).await
    }

    fn orphans_after(&self) -> Option<Duration> {
        Some(self.config.orphans_after)
    }

    async fn freeze(&self, pod: &PodRecord, container: &ContainerId, frozen: bool) -> Result<()> {
        self.pods.freeze(&self.in_ct(pod)?, container, frozen).await
    }

    async fn stats(&self, targets: Vec<StatsTarget>, wanted: StatsWanted) -> Result<Vec<PodSample>> {
        let in_ct = |target: StatsTarget| match self.in_ct(&target.pod) {
            Ok(pod) => StatsTarget { pod: Arc::new(pod), ..target },
            Err(_) => target,
        };
        self.pods.read_stats(targets.into_iter().map(in_ct).collect(), wanted).await
    }

    async fn update(&self, update: UpdateContext<'_>) -> Result<()> {
        let UpdateContext { pod, container, asked, merged, .. } = update;
        let changes = linux::update(asked, merged, &self.pods.host_now(merged))?;
        let files = limits::settings(&changes, self.pods.host.cgroup_v2)?;
        let parent = self.pods.parent(&self.in_ct(pod)?)?;
        let group = parent.container(&container.id);
        self.pods.change_limits(&parent, container, group, files, asked).await
    }

    async fn update_sandbox(&self, pod: &PodRecord, resources: &Resources, overhead: &Resources) -> Result<()> {
        self.change_unit(pod, resources, overhead).await
    }

    async fn set_pod_cidrs(&self, cidrs: &[String]) -> Result<()> {
        self.pods.network.set_pod_cidrs(cidrs).await
    }
}
