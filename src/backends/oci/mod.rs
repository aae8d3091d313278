//! The OCI runtime spec of a container, from the CRI request: shared by the backends that run OCI containers.
//!
//! [`plan`] is pure: everything that must be looked up (the user in the image, device nodes, profiles, what the host
//! can do) is in its input. What can't be honoured is refused by name.

pub mod adjust;
pub mod cdi;
pub mod classes;
pub mod linux;
pub mod mounts;
pub mod process;
pub mod seccomp;
pub mod selinux;
pub mod userns;
pub mod users;

use std::collections::BTreeSet;

use camino::Utf8Path;
use oci_spec::runtime::{LinuxDevice, LinuxSeccomp, Root, RootBuilder, Spec};

use crate::core::caps::CapSet;
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::Image;
use crate::core::records::{PodRecord, ResolvedUser, SandboxFacts};
use crate::core::spec::ContainerConfig;

/// What the node can do, looked up once at start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// cgroup v2 alone.
    pub cgroup_v2: bool,
    /// Swap of a cgroup can be limited.
    pub swap_limit: bool,
    /// There is a hugetlb controller.
    pub hugetlb: bool,
    /// Sizes of huge pages, as limits name them ("2MB").
    pub hugepage_sizes: Vec<String>,
    /// CPUs that are online; None: not known.
    pub online_cpus: Option<BTreeSet<u32>>,
    /// Memory nodes that are online; None: not known.
    pub online_mems: Option<BTreeSet<u32>>,
    /// AppArmor is on.
    pub apparmor: bool,
    /// SELinux is on.
    pub selinux: bool,
    /// The daemon's own bounding set: what "privileged" can mean.
    pub bounding: CapSet,
    /// The daemon may raise limits and lower oom_score_adj (CAP_SYS_RESOURCE).
    pub sys_resource: bool,
    /// The daemon's own oom_score_adj.
    pub oom_score_adj: i32,
    /// The daemon's own hard limit of open files.
    pub nofile_hard: u64,
    /// The OCI runtime knows recursive read-only mounts.
    pub recursive_read_only: bool,
}

/// Everything the spec is made from.
pub struct SpecInput<'a> {
    /// Pod.
    pub pod: &'a PodRecord,
    /// Its unit.
    pub facts: &'a SandboxFacts,
    /// Its folder, with hostname, hosts and resolv.conf.
    pub pod_dir: &'a Utf8Path,
    /// Container as asked for.
    pub config: &'a ContainerConfig,
    /// Its image.
    pub image: &'a Image,
    /// Its user, looked up.
    pub user: &'a ResolvedUser,
    /// Where its root file system will be mounted.
    pub rootfs: &'a Utf8Path,
    /// linux.cgroupsPath.
    pub cgroups_path: &'a str,
    /// PID namespace of the target container.
    pub target_pidns: Option<String>,
    /// Sources of its mounts, links resolved, in the order of `config.mounts`.
    pub mount_sources: Vec<String>,
    /// What CDI devices change.
    pub cdi: Vec<cdi::DeviceEdits>,
    /// Device nodes asked for (for privileged: all of the host's).
    pub devices: Vec<(LinuxDevice, String)>,
    /// Loaded profile, None: unconfined.
    pub seccomp: Option<LinuxSeccomp>,
    /// Name of the AppArmor profile, None: unconfined.
    pub apparmor: Option<String>,
    /// Most processes; 0: no limit.
    pub pids_limit: i64,
    /// Capabilities of containers that ask for nothing.
    pub default_caps: CapSet,
    /// The node.
    pub host: &'a HostFacts,
}

/// The spec.
pub fn plan(input: &SpecInput<'_>) -> Result<Spec> {
    refuse(input)?;
    let mut spec = Spec::default();
    spec.set_version("1.0.2".to_string());
    let root: Root = built(
        RootBuilder::default().path(input.rootfs.as_std_path()).readonly(input.config.security.readonly_rootfs).build(),
    )?;
    spec.set_root(Some(root));
    spec.set_hostname(None);
    spec.set_process(Some(process::plan(input)?));
    spec.set_mounts(Some(mounts::plan(input)?));
    spec.set_linux(Some(linux::plan(input)?));
    spec.set_annotations(None);
    spec.set_hooks(None);
    cdi::apply(&mut spec, &input.cdi, input.config.security.privileged)?;
    Ok(spec)
}

/// Demands that no OCI container can meet, or not yet.
fn refuse(input: &SpecInput<'_>) -> Result<()> {
    let config = input.config;
    if config.security.privileged && !input.pod.config.security.privileged {
        return Err(Error::invalid("a privileged container needs a privileged sandbox"));
    }
    userns::check_container(input)
}

pub(crate) fn built<T>(result: std::result::Result<T, impl std::error::Error + Send + Sync + 'static>) -> Result<T> {
    result.map_err(|e| Error::because(Kind::Internal, "build the OCI spec", e))
}
