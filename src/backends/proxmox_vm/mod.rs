//! Handler `proxmox-vm`: a pod is a Proxmox virtual machine, a linked clone of a template; the pod's containers are run in it by the
//! guest's agent with crun, from the same OCI images.
//!
//! `unit` makes and removes the VM, `owner` says whose one is, `orphans` looks for those that are nobody's, `image` makes images' disks,
//! `launch` plans containers and execs with the guest's paths, `volumes` says which of the kubelet's folders a guest gets and keeps
//! its copies in sync, `watch` sees VMs end. The pod's monitor is its relay (crate guest-relay), by which `guest` calls the agent.
//! A VM is found again by the pod's journal and by the identity in its notes; one without that is never touched. A crash leaves what the
//! journal names, or a VM that says whose it is.

mod guest;
mod image;
mod launch;
mod orphans;
mod owner;
mod plan;
mod stats;
mod unit;
mod volumes;
mod watch;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio_util::sync::CancellationToken;

use super::pods::{self, NodePods};
use super::proxmox::{Guests, locked, look};
use crate::core::backend::{Backend, Capabilities, ExecContext, IsKnown, Journal, Launch, LaunchContext};
use crate::core::blocking::blocking;
use crate::core::config::{Addresses, Orphans, VmNetwork};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, PodId};
use crate::core::ports::{Monitor, NetworkNotReady, monitor_v1};
use crate::core::records::{ContainerRecord, PodRecord, SandboxFacts};
use crate::core::spec::{ContainerConfig, NamespaceMode, Profile, SandboxConfig};
use crate::core::state::PodPhase;
use crate::core::stats::{PodSample, StatsTarget, StatsWanted};
use crate::integrations::proxmox_api::{Proxmox, Vmid};
use crate::utils::tasks::TaskSet;
use plan::VM;

/// How long a look at what a container has left may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a port of a pod is waited for.
const DIAL: Duration = Duration::from_secs(10);

/// Settings of the handler.
#[derive(Debug, Clone)]
pub struct ProxmoxVmConfig {
    /// This node's name in the cluster.
    pub node: String,
    /// Identity of this installation, for the VMs' notes.
    pub installation: String,
    /// Numbers that VMs get, first and last.
    pub vmids: (Vmid, Vmid),
    /// The template.
    pub template: Vmid,
    /// Storage of images' disks and of the disks with configurations.
    pub storage: String,
    /// Pool that they are in; "": none.
    pub pool: String,
    /// MiB of a VM whose pod has no limit.
    pub memory: u64,
    /// MiB beyond a pod's limit, at least.
    pub guest_memory: u64,
    /// What stands for the pods' monitors.
    pub relay: Utf8PathBuf,
    /// CPUs of a VM whose pod has no limit.
    pub cores: u32,
    /// The agent's port.
    pub port: u16,
    /// From a VM's start until its agent answers, at most.
    pub start_timeout: Duration,
    /// The kubelet's folder.
    pub kubelet_root: Utf8PathBuf,
    /// What becomes of VMs of this installation that belong to no pod.
    pub orphans: Orphans,
    /// How often they are looked for, and how long one has to be nobody's before it is removed.
    pub orphans_after: Duration,
    /// How long an image's disk is kept that no pod uses.
    pub images_after: Duration,
    /// What VMs are connected with.
    pub network: VmNetwork,
    /// Their IPv4 and IPv6 addresses.
    pub addresses: [Option<Addresses>; 2],
}

/// A pod whose relay runs.
struct Live {
    monitor: Option<Arc<dyn Monitor>>,
    /// Why its VM has ended, when it has.
    ended: tokio::sync::watch::Sender<Option<String>>,
    /// Ends what goes on for it.
    cancel: CancellationToken,
    /// What tells of changes in its volumes.
    volumes: Option<Arc<volumes::Watched>>,
}

impl Default for Live {
    fn default() -> Self {
        let (monitor, volumes, cancel) = (None, None, CancellationToken::new());
        Self { monitor, ended: tokio::sync::watch::channel(None).0, cancel, volumes }
    }
}

/// The backend.
#[derive(Clone)]
pub struct ProxmoxVmBackend(Arc<Inner>);

/// What its tasks hold.
pub struct Inner {
    config: ProxmoxVmConfig,
    api: Proxmox,
    /// For what is looked up on the node: settings and seccomp profiles.
    pods: Arc<NodePods>,
    tasks: TaskSet,
    live: Mutex<HashMap<PodId, Live>>,
    /// The VMs of pods and images: their numbers, and which are nobody's.
    vms: Guests,
    /// Images' disks, by the beginning of the image's id: one is made once, whoever asks, and no other waits for it.
    images: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<Vmid>>>>>,
    /// Held while a VM is given a disk; by whoever takes one away alone, and only where nobody has it.
    giving: tokio::sync::RwLock<()>,
}

impl std::ops::Deref for ProxmoxVmBackend {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

fn refused(what: impl Into<String>) -> Error {
    Error::new(Kind::Unimplemented, format!("handler proxmox-vm: {}", what.into()))
}

impl ProxmoxVmBackend {
    /// Nothing is asked yet.
    pub fn new(config: ProxmoxVmConfig, api: Proxmox, pods: Arc<NodePods>, tasks: TaskSet) -> Self {
        let remove_after = (config.orphans == Orphans::Remove).then_some(config.orphans_after);
        let vms = Guests::new(&VM, &api, &config.node, &config.installation, config.vmids, remove_after);
        Self(Arc::new(Inner {
            config,
            api,
            pods,
            tasks,
            live: Default::default(),
            vms,
            images: Default::default(),
            giving: Default::default(),
        }))
    }

    /// The pod's relay.
    fn monitor_of(&self, pod: &PodId) -> Result<Arc<dyn Monitor>> {
        let monitor = locked(&self.live).get(pod).and_then(|live| live.monitor.clone());
        monitor.ok_or_else(|| Error::new(Kind::Unavailable, format!("pod {pod} has no relay to its VM")))
    }

    /// The same where there is one.
    fn monitor_if_any(&self, pod: &PodId) -> Option<Arc<dyn Monitor>> {
        self.monitor_of(pod).ok()
    }

    /// Folder of a pod under the state folder.
    fn pod_dir(&self, pod: &PodId) -> Utf8PathBuf {
        self.pods.config.state.join("pods").join(pod.as_str())
    }

    /// Addresses of the VM that is `n`th of its range.
    fn ips(&self, n: u32) -> Vec<IpAddr> {
        let at = |a: &Addresses| a.at(n).split('/').next().and_then(|ip| ip.parse().ok());
        self.config.addresses.iter().flatten().filter_map(at).collect()
    }
}

#[async_trait]
impl Backend for ProxmoxVmBackend {
    fn handler(&self) -> &'static str {
        "proxmox-vm"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { user_namespaces: false, recursive_read_only_mounts: true }
    }

    async fn probe(&self) -> Result<()> {
        for (what, path) in [("package e2fsprogs", Utf8Path::new(image::MKE2FS)), ("relay", &self.config.relay)] {
            std::fs::metadata(path)
                .map_err(|e| Error::because(Kind::FailedPrecondition, format!("{path} ({what})"), e))?;
        }
        let template = self.config.template;
        let config = look(self.api.vm_config(&self.config.node, template)).await?;
        let config = config.map_err(|e| Error::from(e).context(format!("the template, VM {template}")))?;
        match config.get("template") {
            Some("1") => Ok(()),
            _ => Err(Error::precondition(format!("VM {template} (handlers.proxmox-vm.template) is no template"))),
        }
    }

    fn adapt_pod(&self, pod: &mut SandboxConfig) -> Result<()> {
        // Where the kubelet puts its pods on the node is nothing to a VM.
        pod.cgroup_parent = String::new();
        Ok(())
    }

    fn adapt_container(&self, pod: &PodRecord, container: &mut ContainerConfig) -> Result<()> {
        if container.security.namespaces.user.is_some() {
            return Err(refused("a pod can't have a user namespace of its own"));
        }
        let what = match container.security.namespaces.pid {
            NamespaceMode::Container => None,
            NamespaceMode::Pod => Some("containers can't share their processes (shareProcessNamespace)"),
            NamespaceMode::Node => Some("a VM can't have the node's PID namespace"),
            NamespaceMode::Target => Some("a container can't be in the PID namespace of another one"),
        };
        if let Some(what) = what {
            return Err(refused(what));
        }
        if !container.devices.is_empty() || !container.cdi_devices.is_empty() {
            return Err(refused("a VM can't have devices of the node"));
        }
        if !container.resources.cpuset_cpus.is_empty() || !container.resources.cpuset_mems.is_empty() {
            return Err(refused("CPUs and memory nodes of the node can't be chosen for a VM's container (cpuset)"));
        }
        if let Profile::Localhost(name) = &container.security.apparmor {
            return Err(refused(format!("AppArmor profile {name:?} can't be had in a VM")));
        }
        for m in &container.mounts {
            volumes::classify(&self.config.kubelet_root, &pod.config.metadata.uid, m)?;
        }
        // The VM's own, which nobody else is in.
        let namespaces = &mut container.security.namespaces;
        (namespaces.network, namespaces.ipc) = (NamespaceMode::Node, NamespaceMode::Node);
        Ok(())
    }

    fn check(&self, pod: &SandboxConfig) -> Result<()> {
        let m = &pod.metadata;
        let named = |what: String| Err(refused(what).context(format!("pod {}/{}", m.namespace, m.name)));
        let namespaces = &pod.security.namespaces;
        if let Some(what) = VM.node_namespace(namespaces) {
            return named(what);
        }
        if namespaces.user.is_some() {
            return named("a pod can't have a user namespace of its own".into());
        }
        if let Some(port) = pod.port_mappings.iter().find(|p| p.host_port != 0) {
            return named(format!("host port {} can't be had: a VM has an address of its own", port.host_port));
        }
        let limits = ["kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"];
        if let Some(key) = limits.into_iter().find(|key| pod.annotations.contains_key(*key)) {
            return named(format!("annotation {key}: handlers.proxmox-vm.network.rate limits all pods"));
        }
        if let Some(name) = pod.sysctls.keys().next() {
            return named(format!("sysctl {name} can't be set in a VM yet"));
        }
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
        self.make_unit(pod, pod_dir, monitor, journal, cancel).await
    }

    async fn launch_plan(&self, context: LaunchContext<'_>) -> Result<Launch> {
        self.plan_launch(context).await
    }

    async fn cannot_run(&self, run_dir: &Utf8Path) -> Option<String> {
        self.why_not(run_dir).await
    }

    async fn exec_plan(&self, context: ExecContext<'_>) -> Result<monitor_v1::Exec> {
        self.plan_exec(context).await
    }

    fn end_exec(&self, pod: &PodRecord, _: &ContainerId, _: &Utf8Path, exec_id: &str) {
        let Some(monitor) = self.monitor_if_any(&pod.id) else { return };
        let folder = launch::exec_folder(exec_id);
        self.tasks.spawn_cancellable("files of an exec", async move {
            if let Err(e) = guest::remove(&*monitor, folder).await {
                tracing::debug!(error = e.chain(), "files of an exec stay in the guest");
            }
        });
    }

    fn monitor_changed(&self, pod: &PodRecord, monitor: Option<&Arc<dyn Monitor>>) {
        self.attend(pod, monitor);
    }

    async fn container_ended(&self, pod: &PodRecord, container: &ContainerRecord) -> Result<()> {
        // Whoever waits for the end is not kept by a guest that is away.
        match tokio::time::timeout(PATIENCE, self.fetch_messages(pod, container)).await {
            Ok(fetched) => fetched,
            Err(_) => {
                Err(Error::new(Kind::DeadlineExceeded, format!("the guest has not answered within {PATIENCE:?}")))
            }
        }
    }

    async fn container_removed(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        match pod.phase {
            // With its VM it is gone.
            PodPhase::Ready => self.forget(pod, container).await,
            _ => Ok(()),
        }
    }

    async fn unit_ended(&self, pod: &PodId) -> String {
        let ended = locked(&self.live).get(pod).map(|live| live.ended.subscribe());
        if let Some(mut ended) = ended
            && let Ok(why) = ended.wait_for(Option::is_some).await
        {
            return why.clone().unwrap_or_default();
        }
        std::future::pending().await
    }

    fn on_node(&self) -> bool {
        false
    }

    async fn dial(&self, pod: &PodRecord, port: u16) -> Result<std::net::TcpStream> {
        let ips = pod.facts.as_ref().map(|f| f.network.ips.clone()).unwrap_or_default();
        let ip = ips.first().copied().ok_or_else(|| Error::precondition(format!("pod {} has no address", pod.id)))?;
        let connect = move || Ok(std::net::TcpStream::connect_timeout(&SocketAddr::new(ip, port), DIAL));
        blocking(connect).await?.map_err(|e| {
            let what = format!(
                "connect with {ip} port {port} of pod {} (what listens on its loopback alone can't be reached)",
                pod.id
            );
            Error::because(Kind::Unavailable, what, e)
        })
    }

    async fn environment(&self, _: &PodRecord, run_dir: &Utf8Path) -> Result<Vec<String>> {
        pods::bundle::environment(run_dir).await
    }

    async fn remove_container(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        // Whoever has a relay has a guest; without one the VM is gone, or goes.
        match self.monitor_if_any(&pod.id) {
            Some(monitor) if pod.phase == PodPhase::Ready => {
                monitor.delete(container).await?;
                self.forget(pod, container).await
            }
            _ => Ok(()),
        }
    }

    async fn teardown(&self, pod: &PodRecord, pod_dir: &Utf8Path) -> Result<()> {
        self.end_unit(pod, pod_dir).await
    }

    async fn network_status(&self) -> std::result::Result<(), NetworkNotReady> {
        VM.bridge_status(&self.config.network.bridge)
    }

    async fn collect_garbage(&self, _: &[PodRecord], _: &[ContainerId]) -> Result<()> {
        // What there is of pods is in their VMs.
        Ok(())
    }

    async fn look_for_orphans(&self, pods: &[PodRecord], is_known: &IsKnown) -> Result<()> {
        self.sweep_orphans(pods, is_known).await
    }

    fn orphans_after(&self) -> Option<Duration> {
        Some(self.config.orphans_after)
    }

    async fn stats(&self, targets: Vec<StatsTarget>, wanted: StatsWanted) -> Result<Vec<PodSample>> {
        Ok(self.read_stats(targets, wanted).await)
    }
}
