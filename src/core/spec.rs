//! What a caller asks for, parsed: pods and containers as the engine and the backends see them.
//!
//! Made by `cri::convert` (from the wire) and by tests; stored in records. Values of environment variables
//! are never stored: they may be secrets.

use std::collections::BTreeMap;
use std::net::IpAddr;

use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};

/// Who asked for a pod, and so who is shown it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// A kubelet or crictl, through the CRI socket.
    Cri,
    /// Our own CLI, through the local socket; hidden from the CRI socket.
    Local,
}

/// Identity of a pod as its maker names it; unique among living sandboxes.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodMetadata {
    /// Pod name.
    pub name: String,
    /// Pod uid.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// How often the sandbox was made before.
    pub attempt: u32,
}

/// Which namespace a process gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceMode {
    /// The pod's, shared by its containers.
    #[default]
    Pod,
    /// One for the container alone.
    Container,
    /// The host's.
    Node,
    /// That of another container of the pod.
    Target,
}

/// Namespaces of a pod or container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Namespaces {
    /// Network: Pod or Node.
    pub network: NamespaceMode,
    /// PID: Pod, Container, Node or Target.
    pub pid: NamespaceMode,
    /// IPC: Pod or Node.
    pub ipc: NamespaceMode,
    /// Container whose PID namespace is joined with Target.
    pub target: Option<String>,
    /// User namespace: None is the host's.
    pub user: Option<UserNamespace>,
}

/// Id maps of a pod with its own user namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UserNamespace {
    /// User ids.
    pub uids: Vec<IdMapping>,
    /// Group ids.
    pub gids: Vec<IdMapping>,
}

impl UserNamespace {
    /// The host's id of a user of the pod; None: it is not mapped.
    pub fn host_uid(&self, uid: u32) -> Option<u32> {
        host_id(&self.uids, uid)
    }

    /// The host's id of a group of the pod; None: it is not mapped.
    pub fn host_gid(&self, gid: u32) -> Option<u32> {
        host_id(&self.gids, gid)
    }
}

/// The id inside of one of the host's, by an id map; None: it has none.
pub fn inner_id(map: &[IdMapping], id: u32) -> Option<u32> {
    let line = map.iter().find(|m| id.checked_sub(m.host_id).is_some_and(|n| n < m.length))?;
    line.container_id.checked_add(id - line.host_id)
}

/// The host's id of an id inside, by an id map.
pub fn host_id(map: &[IdMapping], id: u32) -> Option<u32> {
    let line = map.iter().find(|m| id.checked_sub(m.container_id).is_some_and(|n| n < m.length))?;
    line.host_id.checked_add(id - line.container_id)
}

/// One line of an id map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// First id on the host.
    pub host_id: u32,
    /// First id in the container.
    pub container_id: u32,
    /// How many.
    pub length: u32,
}

/// A seccomp or AppArmor profile by name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// The built-in one.
    RuntimeDefault,
    /// None.
    #[default]
    Unconfined,
    /// A file (seccomp) or a loaded profile (AppArmor).
    Localhost(String),
}

/// SELinux label parts; passed on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SelinuxOptions {
    /// User part.
    pub user: String,
    /// Role part.
    pub role: String,
    /// Type part.
    pub kind: String,
    /// Level part.
    pub level: String,
}

/// How supplemental groups of the request and of the image's group file go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SupplementalGroupsPolicy {
    /// Both.
    #[default]
    Merge,
    /// The request's alone.
    Strict,
}

/// DNS settings of a pod; empty: the host's resolv.conf.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DnsConfig {
    /// Name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

/// Transport protocol of a port mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A host port that leads to a port of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Protocol.
    pub protocol: Protocol,
    /// Port in the pod.
    pub container_port: u16,
    /// Port on the host; 0: none.
    pub host_port: u16,
    /// Host address; None: all.
    pub host_ip: Option<IpAddr>,
}

/// Limits of a container or pod; 0, "" and empty mean "not given".
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resources {
    /// CFS period in microseconds.
    pub cpu_period: i64,
    /// CFS quota in microseconds per period; -1: none.
    pub cpu_quota: i64,
    /// Relative weight, 2..262144.
    pub cpu_shares: i64,
    /// Bytes.
    pub memory_limit: i64,
    /// Bytes of memory and swap together.
    pub memory_swap_limit: i64,
    /// -1000..1000; None: not given.
    pub oom_score_adj: Option<i64>,
    /// List format ("0-1,3").
    pub cpuset_cpus: String,
    /// List format.
    pub cpuset_mems: String,
    /// Page size ("2MB") and bytes.
    pub hugepages: Vec<(String, u64)>,
    /// cgroup v2 files and values.
    pub unified: BTreeMap<String, String>,
}

impl Resources {
    /// These limits where they are given, `old` where they are not.
    pub fn over(&self, old: &Self) -> Self {
        let number = |new: i64, old: i64| if new == 0 { old } else { new };
        let text = |new: &str, old: &str| if new.is_empty() { old.to_owned() } else { new.to_owned() };
        let mut hugepages = old.hugepages.clone();
        for (size, bytes) in &self.hugepages {
            match hugepages.iter_mut().find(|(known, _)| known == size) {
                Some((_, limit)) => *limit = *bytes,
                None => hugepages.push((size.clone(), *bytes)),
            }
        }
        // Without swap of its own the container had as much of both together as of memory: so it stays.
        let no_swap = old.memory_limit > 0 && old.memory_swap_limit == old.memory_limit;
        let swap = if no_swap { number(self.memory_limit, old.memory_swap_limit) } else { old.memory_swap_limit };
        Self {
            cpu_period: number(self.cpu_period, old.cpu_period),
            cpu_quota: number(self.cpu_quota, old.cpu_quota),
            cpu_shares: number(self.cpu_shares, old.cpu_shares),
            memory_limit: number(self.memory_limit, old.memory_limit),
            memory_swap_limit: number(self.memory_swap_limit, swap),
            oom_score_adj: self.oom_score_adj.filter(|adj| *adj != 0).or(old.oom_score_adj),
            cpuset_cpus: text(&self.cpuset_cpus, &old.cpuset_cpus),
            cpuset_mems: text(&self.cpuset_mems, &old.cpuset_mems),
            hugepages,
            unified: old.unified.iter().chain(&self.unified).map(|(k, v)| (k.clone(), v.clone())).collect(),
        }
    }

    /// The cpuset files (named alike on cgroup v1 and v2) and values of the lists that are given.
    pub fn cpusets(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let lists = [("cpuset.cpus", self.cpuset_cpus.as_str()), ("cpuset.mems", self.cpuset_mems.as_str())];
        lists.into_iter().filter(|(_, list)| !list.is_empty())
    }
}

/// A pod as asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// Identity.
    pub metadata: PodMetadata,
    /// Hostname; "" with the host's network.
    pub hostname: String,
    /// Folder of the containers' logs; None: no logs.
    pub log_directory: Option<Utf8PathBuf>,
    /// None: the host's resolv.conf.
    pub dns: Option<DnsConfig>,
    /// Host ports.
    pub port_mappings: Vec<PortMapping>,
    /// Labels, given back unchanged.
    pub labels: BTreeMap<String, String>,
    /// Annotations, given back unchanged.
    pub annotations: BTreeMap<String, String>,
    /// A cgroupfs path, a slice name with systemd, or "".
    pub cgroup_parent: String,
    /// Namespaced sysctls.
    pub sysctls: BTreeMap<String, String>,
    /// What the sandbox's own processes may do.
    pub security: SandboxSecurity,
    /// Pod overhead, as told by the kubelet.
    pub overhead: Resources,
    /// Sum of the containers' limits, as told by the kubelet.
    pub resources: Resources,
}

/// Security settings of the sandbox itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SandboxSecurity {
    /// Namespaces.
    pub namespaces: Namespaces,
    /// Containers may ask for privileges.
    pub privileged: bool,
    /// Seccomp of the sandbox's init.
    pub seccomp: Profile,
    /// AppArmor of the sandbox's init.
    pub apparmor: Profile,
    /// SELinux label.
    pub selinux: Option<SelinuxOptions>,
    /// User of the sandbox's init.
    pub run_as_user: Option<i64>,
    /// Group of the sandbox's init.
    pub run_as_group: Option<i64>,
    /// Read-only root of the sandbox's init.
    pub readonly_rootfs: bool,
    /// Groups of the sandbox's init.
    pub supplemental_groups: Vec<i64>,
    /// See [`SupplementalGroupsPolicy`].
    pub supplemental_groups_policy: SupplementalGroupsPolicy,
}

/// How mounts travel between host and container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Propagation {
    /// Not at all.
    #[default]
    Private,
    /// rslave.
    HostToContainer,
    /// rshared.
    Bidirectional,
}

/// An image by what the caller calls it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageSpec {
    /// Reference or id.
    pub image: String,
    /// What the user wrote.
    pub user_specified_image: String,
    /// Handler it is for.
    pub runtime_handler: String,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// What it was found to be: a reference with a digest, or the id; "" until then.
    #[serde(default)]
    pub image_ref: String,
}

/// A mount of a container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute path in the container.
    pub container_path: String,
    /// Path on the host; "" with `image`.
    pub host_path: String,
    /// Read-only.
    pub readonly: bool,
    /// Read-only with everything below.
    pub recursive_read_only: bool,
    /// Ask for an SELinux relabel.
    pub selinux_relabel: bool,
    /// Propagation.
    pub propagation: Propagation,
    /// Maps of an idmapped mount.
    pub uid_mappings: Vec<IdMapping>,
    /// Maps of an idmapped mount.
    pub gid_mappings: Vec<IdMapping>,
    /// An image as a volume.
    pub image: Option<ImageSpec>,
    /// Path inside that image.
    pub image_sub_path: String,
    /// More options (nosuid, ...).
    pub options: Vec<String>,
}

/// A device of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Path in the container.
    pub container_path: String,
    /// Path on the host: a node, or a folder of nodes.
    pub host_path: String,
    /// Of "rwm".
    pub permissions: String,
}

/// An environment variable; its value is neither stored nor shown.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EnvVar {
    /// Name.
    pub name: String,
    /// Value; empty after a restart of the daemon.
    #[serde(skip)]
    pub value: String,
}

impl std::fmt::Debug for EnvVar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}=(hidden)", self.name)
    }
}

/// A container as asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerConfig {
    /// Name within the pod.
    pub name: String,
    /// How often it was made before.
    pub attempt: u32,
    /// Image.
    pub image: ImageSpec,
    /// Replaces the image's entry point.
    pub command: Vec<String>,
    /// Replaces the image's command.
    pub args: Vec<String>,
    /// "" : the image's.
    pub working_dir: String,
    /// Beside the image's.
    pub envs: Vec<EnvVar>,
    /// Mounts in the order asked for.
    pub mounts: Vec<Mount>,
    /// Devices.
    pub devices: Vec<Device>,
    /// Fully qualified CDI device names.
    pub cdi_devices: Vec<String>,
    /// Labels, given back unchanged.
    pub labels: BTreeMap<String, String>,
    /// Annotations, given back unchanged.
    pub annotations: BTreeMap<String, String>,
    /// Relative to the pod's log folder; "": no log.
    pub log_path: String,
    /// Keep stdin open for attach.
    pub stdin: bool,
    /// Close it after the first attach.
    pub stdin_once: bool,
    /// A terminal.
    pub tty: bool,
    /// Signal number to stop with; None: the image's, else SIGTERM.
    pub stop_signal: Option<i32>,
    /// Limits.
    pub resources: Resources,
    /// What it may do.
    pub security: ContainerSecurity,
}

/// Security settings of a container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ContainerSecurity {
    /// Capabilities to add ("ALL", "NET_ADMIN").
    pub add_capabilities: Vec<String>,
    /// Capabilities to drop.
    pub drop_capabilities: Vec<String>,
    /// Ambient capabilities to add.
    pub ambient_capabilities: Vec<String>,
    /// Everything.
    pub privileged: bool,
    /// Namespaces.
    pub namespaces: Namespaces,
    /// SELinux label.
    pub selinux: Option<SelinuxOptions>,
    /// Numeric user.
    pub run_as_user: Option<i64>,
    /// Numeric group; needs a user.
    pub run_as_group: Option<i64>,
    /// User by name.
    pub run_as_username: String,
    /// Read-only root file system.
    pub readonly_rootfs: bool,
    /// More groups.
    pub supplemental_groups: Vec<i64>,
    /// See [`SupplementalGroupsPolicy`].
    pub supplemental_groups_policy: SupplementalGroupsPolicy,
    /// no_new_privs.
    pub no_new_privs: bool,
    /// Paths hidden from the container.
    pub masked_paths: Vec<String>,
    /// Paths it can't write.
    pub readonly_paths: Vec<String>,
    /// Seccomp.
    pub seccomp: Profile,
    /// AppArmor.
    pub apparmor: Profile,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_limits_go_over_the_old_ones() {
        let old = Resources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit: 64 << 20,
            memory_swap_limit: 64 << 20,
            oom_score_adj: Some(900),
            cpuset_cpus: "0".into(),
            hugepages: vec![("2MB".into(), 0)],
            unified: [("memory.high".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(Resources { oom_score_adj: Some(0), ..Default::default() }.over(&old), old);
        let asked = Resources { cpu_quota: -1, memory_limit: 128 << 20, ..Default::default() };
        let merged = asked.over(&old);
        assert_eq!((merged.cpu_quota, merged.cpu_period, merged.cpu_shares), (-1, 100_000, 512));
        assert_eq!((merged.memory_limit, merged.memory_swap_limit), (128 << 20, 128 << 20), "still no swap");
        let swap = Resources { memory_swap_limit: 96 << 20, ..old.clone() };
        assert_eq!(asked.over(&swap).memory_swap_limit, 96 << 20);
        let more = Resources {
            hugepages: vec![("1GB".into(), 5), ("2MB".into(), 7)],
            unified: [("pids.max".to_owned(), "9".to_owned())].into(),
            ..Default::default()
        };
        let merged = more.over(&old);
        assert_eq!(merged.hugepages, [("2MB".to_owned(), 7), ("1GB".to_owned(), 5)]);
        assert_eq!(merged.unified.len(), 2);
    }
}
