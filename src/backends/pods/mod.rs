//! Pods that are namespaces and a cgroup of the node itself: what the backends share whose containers join them.
//!
//! `sandbox` makes and takes down the pod, `launch` looks up what a container needs, `stats` reads what is used. A
//! crash leaves what the pod's journal names.

mod adjust;
pub mod bundle;
pub mod classes;
pub mod destinations;
pub mod devices;
pub mod dial;
pub mod files;
pub mod launch;
pub mod sandbox;
pub mod stats;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};

use super::oci::{self, HostFacts};
use crate::core::blocking::blocking;
use crate::core::caps::CapSet;
use crate::core::error::{Error, Result};
use crate::core::ids::{ContainerId, PodId};
use crate::core::ports::{NetworkNotReady, PodNetwork};
use crate::core::records::PodRecord;
use crate::core::spec::{NamespaceMode, Profile, Resources, SandboxConfig};
use crate::integrations::cgroup::{Driver, Hierarchy, Mode, Parent};
use crate::integrations::netns::NamespacePins;
use crate::integrations::nri::Nri;
use crate::integrations::{apparmor, host};
use crate::utils::inquiry::Inquiry;
use crate::utils::tasks::TaskSet;

/// PATH of programs of the node.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long a status waits for the network's plugins.
const NETWORK_PATIENCE: Duration = Duration::from_secs(2);
/// How long their last answer counts when they are slow.
const NETWORK_FRESH: Duration = Duration::from_secs(60);
/// How long the start waits for the AppArmor profile.
const PROFILE_PATIENCE: Duration = Duration::from_secs(5);

/// What the network's plugins said last.
struct NetworkAsked {
    inquiry: Inquiry<std::result::Result<(), NetworkNotReady>>,
    last: Mutex<Option<(Instant, std::result::Result<(), NetworkNotReady>)>>,
}

/// Settings.
#[derive(Debug, Clone)]
pub struct PodsConfig {
    /// State folder of the daemon.
    pub state: Utf8PathBuf,
    /// Who makes cgroups.
    pub driver: Driver,
    /// Longest log line in bytes.
    pub log_line_max: u32,
    /// Largest log in bytes; 0: no limit.
    pub log_size_max: u64,
    /// Most processes of a container; 0: no limit.
    pub pids_limit: i64,
    /// Capabilities of containers that ask for nothing.
    pub default_caps: CapSet,
    /// Folders of CDI files; a later one wins.
    pub cdi_spec_dirs: Vec<Utf8PathBuf>,
    /// Folders of OCI hooks; a later one wins.
    pub hooks_dirs: Vec<Utf8PathBuf>,
    /// Classes of block I/O; None: there are none.
    pub blockio_config_file: Option<Utf8PathBuf>,
    /// Groups of Intel RDT that annotations may ask for.
    pub rdt_classes: Vec<String>,
    /// Folder of Localhost seccomp profiles with relative names.
    pub seccomp_root: Utf8PathBuf,
    /// Pods with a network of their own may listen on ports below 1024 without a capability.
    pub unprivileged_ports: bool,
    /// They may ping without a capability.
    pub unprivileged_icmp: bool,
    /// Whether containers can have idmapped root file systems, or why not.
    pub idmapped_rootfs: std::result::Result<(), String>,
}

/// The node's pods.
pub struct NodePods {
    /// Settings.
    pub config: PodsConfig,
    /// The node.
    pub host: HostFacts,
    /// Its cgroups.
    pub hierarchy: Hierarchy,
    /// Their namespaces.
    pub pins: NamespacePins,
    /// Their network.
    pub network: Arc<dyn PodNetwork>,
    /// What outlives the call that began it.
    pub tasks: TaskSet,
    /// Plugins that change containers; None: there are none.
    pub plugins: Option<Arc<Nri>>,
    network_asked: NetworkAsked,
    traffic: stats::TrafficCache,
}

impl NodePods {
    /// Looks at the node.
    pub async fn new(
        config: PodsConfig,
        hierarchy: Hierarchy,
        pins: NamespacePins,
        network: Arc<dyn PodNetwork>,
        tasks: TaskSet,
    ) -> Result<Self> {
        let powers = host::powers()?;
        let host = HostFacts {
            cgroup_v2: matches!(hierarchy.mode, Mode::Unified),
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
        let network_asked =
            NetworkAsked { inquiry: Inquiry::new("network status", tasks.clone()), last: Mutex::default() };
        let traffic = Default::default();
        let this = Self { config, host, hierarchy, pins, network, tasks, plugins: None, network_asked, traffic };
        this.load_apparmor().await;
        Ok(this)
    }

    /// The same with plugins.
    pub fn with_plugins(self, plugins: Option<Arc<Nri>>) -> Self {
        Self { plugins, ..self }
    }

    /// Loads the default profile, waiting for it no longer than [`PROFILE_PATIENCE`]; then it is loaded beside all else.
    async fn load_apparmor(&self) {
        if !self.host.apparmor {
            return;
        }
        let loading = Inquiry::new("load the AppArmor profile", self.tasks.clone());
        let load = || async {
            if let Err(e) = apparmor::load_default().await {
                tracing::warn!(error = e.chain(), "containers with the default AppArmor profile will be refused");
            }
        };
        if loading.ask(PROFILE_PATIENCE, load).await.is_none() {
            tracing::warn!("loading the default AppArmor profile takes long and goes on while pods are served");
        }
    }

    /// What the network's plugins say; those that are slow are not waited for.
    pub async fn network_status(&self) -> std::result::Result<(), NetworkNotReady> {
        let network = self.network.clone();
        let answer = self.network_asked.inquiry.ask(NETWORK_PATIENCE, || async move { network.status().await }).await;
        let mut last = self.network_asked.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = answer {
            return last.insert((Instant::now(), answer)).1.clone();
        }
        // It goes on being asked; what it said last still counts for a while.
        match &*last {
            Some((at, answer)) if at.elapsed() < NETWORK_FRESH => answer.clone(),
            _ => Err(NetworkNotReady {
                reason: "NetworkPluginNotReady".into(),
                message: format!("the network's plugins have not answered STATUS within {NETWORK_PATIENCE:?}"),
            }),
        }
    }

    /// The node as limits see it: CPUs come and go.
    pub fn host_now(&self, asked: &Resources) -> HostFacts {
        let mut host = self.host.clone();
        if !asked.cpuset_cpus.is_empty() {
            host.online_cpus = host::online("cpu");
        }
        if !asked.cpuset_mems.is_empty() {
            host.online_mems = host::online("node");
        }
        host
    }

    /// Where a pod's cgroups are.
    pub fn parent(&self, pod: &PodRecord) -> Result<Parent> {
        Ok(Parent::new(self.config.driver, &pod.config.cgroup_parent, &pod.id)?)
    }

    /// Gives the group `to`, a path from the hierarchies' roots, the limit of processes that whoever has made the pod's own group has
    /// set for it, "none" included. Where there is no such group, nothing is set.
    pub async fn copy_process_limit(&self, pod: &SandboxConfig, id: &PodId, to: String) -> Result<()> {
        let from = &pod.cgroup_parent;
        if from.is_empty() || *from == to {
            return Ok(());
        }
        let driver = if from.ends_with(".slice") { Driver::Systemd } else { Driver::Cgroupfs };
        let (hierarchy, from) = (self.hierarchy.clone(), Parent::new(driver, from, id)?);
        let to = Utf8Path::new(&to).strip_prefix("/").unwrap_or(Utf8Path::new(&to)).to_owned();
        blocking(move || Ok(hierarchy.copy_process_limit(from.relative(), &to)?)).await
    }

    /// Kills what execs of a container have left and removes their cgroups.
    pub async fn abandon_execs(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        let (hierarchy, parent, container) = (self.hierarchy.clone(), self.parent(pod)?, container.clone());
        blocking(move || Ok(hierarchy.end_execs(&parent, &container, Some(sandbox::KILL))?)).await
    }

    /// Stops all processes of a container where they are, or lets them run on.
    pub async fn freeze(&self, pod: &PodRecord, container: &ContainerId, frozen: bool) -> Result<()> {
        let (hierarchy, parent, container) = (self.hierarchy.clone(), self.parent(pod)?, container.clone());
        blocking(move || Ok(hierarchy.freeze(&parent, &container, frozen)?)).await
    }

    /// Whether the profile can be had on this node.
    pub fn check_apparmor(&self, profile: &Profile) -> Result<()> {
        match profile {
            Profile::Localhost(name) if !self.host.apparmor => Err(Error::precondition(format!(
                "AppArmor profile {name:?} is asked for, but this kernel has AppArmor off"
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses a pod that can't be. `user_namespaces`: whether the backend's containers can have them, or why not.
    pub fn check(&self, pod: &SandboxConfig, user_namespaces: &std::result::Result<(), String>) -> Result<()> {
        let named = |e: Error| e.context(format!("pod {}/{}", pod.metadata.namespace, pod.metadata.name));
        oci::userns::check_pod(&pod.security.namespaces).map_err(named)?;
        if pod.security.namespaces.user.is_some()
            && let Err(why) = user_namespaces
        {
            return Err(named(Error::precondition(format!("user namespaces can't be had on this node: {why}"))));
        }
        if pod.security.namespaces.pid == NamespaceMode::Target {
            return Err(named(Error::invalid("a sandbox has no target PID namespace")));
        }
        self.check_apparmor(&pod.security.apparmor).map_err(named)?;
        Parent::new(self.config.driver, &pod.cgroup_parent, &PodId::new()).map_err(|e| named(e.into()))?;
        files::bandwidth(&pod.annotations).map_err(named)?;
        Ok(())
    }
}
