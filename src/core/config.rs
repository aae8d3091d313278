//! The node's configuration: every key with a default, each of its types documented here and in `docs/configuration.md`.
//!
//! Read by every command before it does anything, again by the daemon at SIGHUP: from files, environment and flags
//! ([`Sources`]). What does not fit is refused, all of it at once, by file, line and key.

mod bfc;
mod check;
mod faults;
mod keys;
pub mod legacy;
mod load;
mod nri;
mod proxmox;
mod proxmox_guests;
mod proxmox_lxc;
mod proxmox_vm;
mod routing;
mod storage;
mod stream;
mod text;

use std::time::Duration;

use camino::Utf8PathBuf;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::Result;
use super::policy::Policy;

pub use bfc::{BfcImages, PlainRootfs};
pub use keys::{Key, keys as all_keys, schema};
pub use load::{Loaded, Origin, Problem, Problems, Sources};
pub use nri::Nri;
pub use proxmox::Proxmox;
pub use proxmox_guests::{Addresses, Orphans};
pub use proxmox_lxc::{CtNetwork, CtProfile, NetworkKind, ProxmoxLxcHandler};
pub use proxmox_vm::{ProxmoxVmHandler, VmNetwork};
pub use routing::{Condition, Route, Router};
pub use storage::{LayerDriver, UnpackSandbox, ZfsImages};
pub use stream::{Span, Stream};
pub use text::{Entry, default_text, differences, dump, reference};

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Version of this format: 1.
    pub version: u32,
    /// Sockets and folders.
    pub server: Server,
    /// Log output.
    pub log: Log,
    /// How containers run.
    pub runtime: Runtime,
    /// Programs of the handlers.
    pub handlers: Handlers,
    /// Where images come from.
    pub images: Images,
    /// How pods are connected.
    pub network: Network,
    /// The Proxmox API.
    pub proxmox: Proxmox,
    /// Plugins of the node.
    pub nri: Nri,
    /// What Prometheus reads.
    pub metrics: Metrics,
    /// Traces for OpenTelemetry.
    pub tracing: Tracing,
    /// Which handler pods get that name none: the first rule that fits decides, once, when the pod is made; where none fits,
    /// `runtime.default_handler`.
    pub routing: Vec<Route>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            version: 1,
            server: Server::default(),
            log: Log::default(),
            runtime: Runtime::default(),
            handlers: Handlers::default(),
            images: Images::default(),
            network: Network::default(),
            proxmox: Proxmox::default(),
            nri: Nri::default(),
            metrics: Metrics::default(),
            tracing: Tracing::default(),
            routing: Vec::new(),
        }
    }
}

/// Sockets and folders.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// CRI socket.
    #[schemars(with = "String")]
    pub listen: Utf8PathBuf,
    /// Socket of our own CLI, with its own (local) pods.
    #[schemars(with = "String")]
    pub local_listen: Utf8PathBuf,
    /// What must survive a reboot: records, images, layers.
    #[schemars(with = "String")]
    pub root: Utf8PathBuf,
    /// What lives as long as the boot: sockets, bundles, FIFOs.
    #[schemars(with = "String")]
    pub state: Utf8PathBuf,
    /// Largest gRPC message in bytes, either way.
    pub grpc_max_message_size: usize,
    /// Where exec, attach and port-forward are served.
    pub stream: Stream,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: "/run/proxmox-lxcri/proxmox-lxcri.sock".into(),
            local_listen: "/run/proxmox-lxcri/local.sock".into(),
            root: "/var/lib/proxmox-lxcri".into(),
            state: "/run/proxmox-lxcri".into(),
            grpc_max_message_size: 80 << 20,
            stream: Stream::default(),
        }
    }
}

/// Log output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// "info", or per module: "info,proxmox_lxcri::integrations=debug".
    pub level: String,
    /// "text", "json", or "journald" (its own socket, with fields).
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
    /// The journal's own protocol: pod, container and the like are fields (`journalctl F_POD=...`).
    Journald,
}

/// What Prometheus reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Whether there is a listener for them.
    pub enabled: bool,
    /// Where it listens (address:port). Nobody has to say who he is there: on another address than this machine's own, let a firewall
    /// choose who comes.
    #[schemars(with = "String")]
    pub address: std::net::SocketAddr,
}

impl Default for Metrics {
    fn default() -> Self {
        Self { enabled: false, address: (std::net::Ipv4Addr::LOCALHOST, 9537).into() }
    }
}

/// Traces for OpenTelemetry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tracing {
    /// The collector, which takes OTLP over gRPC: "http://127.0.0.1:4317", or with TLS "https://collector.example:4317"; "": no traces are
    /// sent.
    pub endpoint: String,
    /// CA that the collector's certificate is from (PEM), with https; not set: those that the node trusts.
    #[schemars(with = "Option<String>")]
    pub ca_file: Option<Utf8PathBuf>,
    /// Of a million calls that come without a trace of their own so many begin one. Calls that are part of one (the kubelet's) go by
    /// what their caller has decided.
    pub sampling_per_million: u32,
}

/// Who makes cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// systemd, by scopes and slices: what a Proxmox node has.
    Systemd,
    /// The runtime itself, by folders.
    Cgroupfs,
}

/// How containers run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Runtime {
    /// Handler of pods that name none.
    pub default_handler: String,
    /// Not set: systemd where it runs as init on cgroup v2, else cgroupfs.
    pub cgroup_driver: Option<CgroupDriver>,
    /// The monitor's program; not set: beside ours, else /usr/libexec/proxmox-lxcri/.
    #[schemars(with = "Option<String>")]
    pub monitor_path: Option<Utf8PathBuf>,
    /// Longest log line in bytes before it is cut in several.
    pub log_line_max: u32,
    /// Largest log of a container in bytes, whether a kubelet rotates it or not: one that would be larger is replaced by an empty one, which
    /// says so. 0: no limit.
    pub log_size_max: u64,
    /// Seconds that output of an exec is still read after its end.
    pub exec_sync_drain: u64,
    /// Largest number of processes of a container; 0: no limit but that of its pod, which the kubelet sets.
    pub pids_limit: i64,
    /// Capabilities of containers that ask for nothing.
    pub default_capabilities: Vec<String>,
    /// Folder of Localhost seccomp profiles with relative names (absolute ones are the kubelet's).
    #[schemars(with = "String")]
    pub seccomp_root: Utf8PathBuf,
    /// Folders of CDI files (JSON, YAML), a later one wins.
    #[schemars(with = "Vec<String>")]
    pub cdi_spec_dirs: Vec<Utf8PathBuf>,
    /// Folders of OCI hooks (oci-hooks(5)), a later one wins. What is in them runs as root, for the containers that it names.
    #[schemars(with = "Vec<String>")]
    pub hooks_dirs: Vec<Utf8PathBuf>,
    /// Classes of block I/O (YAML, goresctrl's format, as containerd and CRI-O read it); not set: there are none. Read for each
    /// container that asks for one by annotation.
    #[schemars(with = "Option<String>")]
    pub blockio_config_file: Option<Utf8PathBuf>,
    /// Groups of Intel RDT (folders of /sys/fs/resctrl) that annotations may ask for.
    pub rdt_classes: Vec<String>,
    /// Pods with a network of their own may listen on ports below 1024 without a capability.
    pub enable_unprivileged_ports: bool,
    /// They may ping without a capability.
    pub enable_unprivileged_icmp: bool,
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            default_handler: "crun".into(),
            cgroup_driver: None,
            monitor_path: None,
            log_line_max: 16 << 10,
            log_size_max: 1 << 30,
            exec_sync_drain: 2,
            pids_limit: 0,
            default_capabilities: [
                "CHOWN",
                "DAC_OVERRIDE",
                "FSETID",
                "FOWNER",
                "MKNOD",
                "NET_RAW",
                "SETGID",
                "SETUID",
                "SETFCAP",
                "SETPCAP",
                "NET_BIND_SERVICE",
                "SYS_CHROOT",
                "KILL",
                "AUDIT_WRITE",
            ]
            .map(String::from)
            .to_vec(),
            seccomp_root: "/var/lib/kubelet/seccomp".into(),
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            hooks_dirs: Vec::new(),
            blockio_config_file: None,
            rdt_classes: Vec::new(),
            enable_unprivileged_ports: true,
            enable_unprivileged_icmp: true,
        }
    }
}

/// Programs of the handlers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Handlers {
    /// Handler `crun`.
    pub crun: CrunHandler,
    /// Handler `lxc`.
    pub lxc: LxcHandler,
    /// Handler `proxmox-lxc`.
    #[serde(rename = "proxmox-lxc")]
    pub proxmox_lxc: ProxmoxLxcHandler,
    /// Handler `proxmox-vm`.
    #[serde(rename = "proxmox-vm")]
    pub proxmox_vm: ProxmoxVmHandler,
}

impl Handlers {
    /// The policies, each with its handler's name.
    pub fn policies(&self) -> [(&'static str, &Policy); 4] {
        [
            ("crun", &self.crun.policy),
            ("lxc", &self.lxc.policy),
            ("proxmox-lxc", &self.proxmox_lxc.policy),
            ("proxmox-vm", &self.proxmox_vm.policy),
        ]
    }
}

/// Handler `crun`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CrunHandler {
    /// The OCI runtime, absolute.
    #[schemars(with = "String")]
    pub path: Utf8PathBuf,
    /// Longest time that one call of it may take, in seconds.
    pub timeout: u64,
    /// Longest time that a checkpoint's dump may take, in seconds.
    pub checkpoint_timeout: u64,
    /// What its pods have to be like.
    pub policy: Policy,
}

impl Default for CrunHandler {
    fn default() -> Self {
        Self { path: "/usr/bin/crun".into(), timeout: 60, checkpoint_timeout: 1800, policy: Policy::default() }
    }
}

/// Handler `lxc`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LxcHandler {
    /// The program that loads liblxc; not set: beside ours, else /usr/libexec/proxmox-lxcri/.
    #[schemars(with = "Option<String>")]
    pub helper: Option<Utf8PathBuf>,
    /// The program that becomes a container's first process; not set: as `helper`.
    #[schemars(with = "Option<String>")]
    pub init: Option<Utf8PathBuf>,
    /// liblxc (5 to 7); not set: as the loader finds liblxc.so.1.
    #[schemars(with = "Option<String>")]
    pub library: Option<Utf8PathBuf>,
    /// Longest time that one call of the helper may take, in seconds.
    pub timeout: u64,
    /// What its pods have to be like.
    pub policy: Policy,
}

impl Default for LxcHandler {
    fn default() -> Self {
        Self { helper: None, init: None, library: None, timeout: 60, policy: Policy::default() }
    }
}

/// Where images come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Images {
    /// Folders with `<host>/hosts.toml`, first match wins.
    #[schemars(with = "Vec<String>")]
    pub config_path: Vec<Utf8PathBuf>,
    /// The node's own credentials: an `auth.json` as Docker and Podman write it. Nobody else may read it.
    #[schemars(with = "Option<String>")]
    pub auth_file: Option<Utf8PathBuf>,
    /// Folders with credential helpers (`docker-credential-<name>`), first match wins.
    #[schemars(with = "Vec<String>")]
    pub credential_helper_dirs: Vec<Utf8PathBuf>,
    /// Longest run of a credential helper, in seconds.
    pub credential_helper_timeout: u64,
    /// Ways to registries' hosts: "host", "host:port", "*.domain" or "*" = "direct", "http://PROXY:PORT", "https://PROXY:PORT"
    /// or "unix:/SOCKET". For the others the daemon's environment counts (HTTPS_PROXY, HTTP_PROXY, NO_PROXY).
    pub proxies: std::collections::BTreeMap<String, String>,
    /// Which images may be pulled (TOML): rules by repository; not set: all. Read at each pull.
    #[schemars(with = "Option<String>")]
    pub policy_file: Option<Utf8PathBuf>,
    /// Layers of one image fetched at once.
    pub max_concurrent_downloads: usize,
    /// Seconds without a byte before a pull, or an image from another node, is given up.
    pub progress_timeout: u64,
    /// Registry of names without one.
    pub default_registry: String,
    /// How layers and root file systems are kept: "overlay" or "zfs".
    pub driver: LayerDriver,
    /// Whether layers are unpacked by confined processes: "auto", "required" (not at all without Landlock), "off".
    pub unpack_sandbox: UnpackSandbox,
    /// The program that unpacks; not set: this one.
    #[schemars(with = "Option<String>")]
    pub unpacker_path: Option<Utf8PathBuf>,
    /// Settings of the driver `zfs`.
    pub zfs: ZfsImages,
    /// Images in Binary File Containers.
    pub bfc: BfcImages,
}

impl Images {
    /// Bytes that a container may write if nobody says; 0: no limit.
    pub fn container_quota(&self) -> Result<u64> {
        match self.driver {
            LayerDriver::Overlay => Ok(0),
            LayerDriver::Zfs => self.zfs.container_quota(),
        }
    }
}

impl Default for Images {
    fn default() -> Self {
        Self {
            config_path: vec!["/etc/proxmox-lxcri/certs.d".into(), "/etc/containerd/certs.d".into()],
            auth_file: None,
            credential_helper_dirs: vec!["/usr/local/bin".into(), "/usr/bin".into()],
            credential_helper_timeout: 30,
            proxies: Default::default(),
            policy_file: None,
            max_concurrent_downloads: 3,
            progress_timeout: 60,
            default_registry: "docker.io".into(),
            driver: LayerDriver::default(),
            unpack_sandbox: UnpackSandbox::default(),
            unpacker_path: None,
            zfs: ZfsImages::default(),
            bfc: BfcImages::default(),
        }
    }
}

impl Images {
    /// `progress_timeout` as a duration.
    pub fn progress_timeout(&self) -> Duration {
        Duration::from_secs(self.progress_timeout.max(1))
    }
}

/// How pods are connected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Folders of CNI plugins.
    #[schemars(with = "Vec<String>")]
    pub plugin_dirs: Vec<Utf8PathBuf>,
    /// Folder of CNI configurations.
    #[schemars(with = "String")]
    pub conf_dir: Utf8PathBuf,
    /// Use a bridge network of our own when `conf_dir` holds no configuration.
    pub embedded: bool,
    /// Its IPv4 subnet.
    pub embedded_subnet: String,
    /// Template of a CNI network list (Go's `{{.PodCIDR}}`, `.PodCIDRRanges`, `.Routes`, as containerd has them): made
    /// into a file in `conf_dir` when a kubelet tells the node's pod networks and no other configuration is there.
    #[schemars(with = "Option<String>")]
    pub conf_template: Option<Utf8PathBuf>,
    /// Longest run of one plugin, in seconds.
    pub plugin_timeout: u64,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            plugin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            conf_dir: "/etc/cni/net.d".into(),
            embedded: false,
            embedded_subnet: "10.213.0.0/20".into(),
            conf_template: None,
            plugin_timeout: 60,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_is_the_default() {
        assert_eq!(Config::parse("", "x").expect("empty"), Config::default());
        assert_eq!(Config::default().faults(), [], "defaults fit");
    }

    #[test]
    fn refusals_name_key_and_line() {
        let e = Config::parse("version = 1\n[server]\nlisten_on = \"/x\"\n", "c.toml").expect_err("unknown key");
        assert!(e.chain().contains("c.toml:3: server.listen_on"), "{}", e.chain());
        let e = Config::parse("[server]\nroot = \"var\"\n", "c.toml").expect_err("relative");
        assert!(e.chain().contains("server.root"), "{}", e.chain());
        let e = Config::parse("[runtime]\ndefault_handler = \"runc\"\n", "c.toml").expect_err("unknown handler");
        assert!(e.chain().contains("runc"), "{}", e.chain());
    }
}
