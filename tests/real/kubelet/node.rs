//! A node: a daemon and its kubelet, with folders of their own and, where several nodes share the machine, a network
//! namespace and a cgroup of their own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::process::Process;
use crate::support::node::start_proxmox;
use crate::support::pve::Pve;
use crate::support::{daemon_program, given, repository, run};

/// What a node is made of.
#[derive(Clone)]
pub struct Plan {
    pub name: String,
    /// Its address, which is in its network namespace already.
    pub ip: String,
    /// Name of its network namespace in /run/netns; None: the environment's own.
    pub netns: Option<String>,
    /// `127.0.0.1:<port>` or another address at which the node reaches the registry.
    pub registry: String,
    /// The CNI network list; None: made from the template when the kubelet tells the pods' networks.
    pub network: Option<Value>,
    /// The kubelet's feature gates.
    pub gates: Vec<(&'static str, bool)>,
    /// Keys of the KubeletConfiguration that differ.
    pub kubelet: Value,
    /// With `deploy/kubelet/90-proxmox-lxcri.conf`, whose gates then win.
    pub deployed: bool,
    /// Address of the system bus that the kubelet finds logind on.
    pub bus: Option<String>,
    /// Images and records on a file system of their own of so many MiB.
    pub root_mib: Option<u32>,
    /// It is a node of the tests' Proxmox, with handler proxmox-lxc.
    pub proxmox: bool,
}

impl Plan {
    /// A lone node in the environment's own namespace.
    pub fn lone(registry: &str) -> Self {
        Self {
            name: "node-1".into(),
            ip: "192.0.2.1".into(),
            netns: None,
            registry: registry.into(),
            network: Some(bridge()),
            gates: vec![("PodAndContainerStatsFromCRI", true)],
            kubelet: json!({}),
            deployed: true,
            bus: None,
            root_mib: None,
            proxmox: false,
        }
    }
}

fn bridge() -> Value {
    json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
        {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
         "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]})
}

/// The plain routed network of a cluster: each node's pods in the node's own subnet, routes between nodes made by hand.
const TEMPLATE: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "@DATA@", "ranges": [[{"subnet": "{{.PodCIDR}}"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;

/// A running node.
pub struct Node {
    pub plan: Plan,
    pub dir: PathBuf,
    pub daemon: Option<Process>,
    pub kubelet: Option<Process>,
    kubeconfig: Option<PathBuf>,
    /// The Proxmox, where it is a node of one.
    pub pve: Option<Pve>,
}

impl Node {
    /// Folders and configuration; nothing runs yet.
    pub fn prepare(plan: Plan) -> Self {
        let dir = PathBuf::from("/tmp").join(&plan.name);
        for d in ["cni", "certs.d", "lib", "run", "kubelet", "manifests", "logs", "plugins", "bfc"] {
            std::fs::create_dir_all(dir.join(d)).expect("the node's folders");
        }
        if let Some(mib) = plan.root_mib {
            let size = format!("size={mib}m");
            run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.join("lib")));
        }
        for name in ["registry.k8s.io", "gcr.io", "k8s.gcr.io"] {
            let folder = dir.join("certs.d").join(name);
            std::fs::create_dir_all(&folder).expect("certs.d");
            let r = &plan.registry;
            let hosts =
                format!("server = \"http://{r}\"\n\n[host.\"http://{r}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
            std::fs::write(folder.join("hosts.toml"), hosts).expect("hosts.toml");
        }
        let template = dir.join("cni-template.json");
        let text = TEMPLATE.replace("@DATA@", &dir.join("leases").display().to_string());
        std::fs::write(&template, text).expect("the network's template");
        if let Some(network) = &plan.network {
            std::fs::write(dir.join("cni/10-pods.conflist"), network.to_string()).expect("the network list");
        }
        let mut config = daemon_config(&dir, &plan);
        let pve = plan.proxmox.then(|| start_proxmox(&mut config, &Default::default()));
        std::fs::write(dir.join("config.toml"), config).expect("config.toml");
        make_cgroup(&plan.name);
        Self { plan, dir, daemon: None, kubelet: None, kubeconfig: None, pve }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("cri.sock")
    }

    /// A program that is started in the node's network namespace and, where it has one, its cgroup.
    pub fn command(&self, program: &Path) -> Command {
        let Some(netns) = &self.plan.netns else { return Command::new(program) };
        let mut command = Command::new("sh");
        let script = r#"for h in /sys/fs/cgroup/*/ /sys/fs/cgroup/; do
  [ ! -d "$h$1/daemon-of" ] || echo $$ > "$h$1/daemon-of/cgroup.procs"
done 2> /dev/null
net=$2; shift 2; exec nsenter --net="/run/netns/$net" -- "$@""#;
        command.args(["-c", script, "-", &self.plan.name, netns]).arg(program);
        command
    }

    pub fn start_daemon(&mut self) {
        let mut command = self.command(&daemon_program());
        command.args(["serve", "--config"]).arg(self.dir.join("config.toml"));
        let mut daemon = Process::start("daemon", &self.dir, &mut command);
        daemon.wait_until("its answer", Duration::from_secs(60), || {
            self.crictl(&["version"]).output().is_ok_and(|o| o.status.success())
        });
        self.daemon = Some(daemon);
    }

    pub fn crictl(&self, args: &[&str]) -> Command {
        let endpoint = format!("unix://{}", self.socket().display());
        let mut command = Command::new(given("LXCRI_CRI_TOOLS").join("crictl"));
        command.args(["--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint]).args(args);
        command
    }

    /// What crictl prints as JSON.
    pub fn crictl_json(&self, args: &[&str]) -> Value {
        let args: Vec<_> = args.iter().copied().chain(["-o", "json"]).collect();
        serde_json::from_str(&run(&mut self.crictl(&args))).expect("crictl's JSON")
    }

    /// kill -9, then another one.
    pub fn crash_daemon(&mut self) {
        self.daemon.take().expect("the daemon runs").kill();
        self.start_daemon();
    }

    /// Starts the kubelet and waits until it is healthy. Without a kubeconfig it stands alone.
    pub fn start_kubelet(&mut self, kubeconfig: Option<&Path>) {
        self.kubeconfig = kubeconfig.map(Path::to_owned);
        self.restart_kubelet();
    }

    /// The same again after its end.
    pub fn restart_kubelet(&mut self) {
        let config = self.dir.join("kubelet.yaml");
        std::fs::write(&config, self.kubelet_config().to_string()).expect("the kubelet's configuration");
        let mut command = self.command(&given("LXCRI_KUBERNETES").join("kubelet"));
        command.arg("--config").arg(&config).arg("--root-dir").arg(self.dir.join("kubelet"));
        command.args(["--hostname-override", &self.plan.name, "--node-ip", &self.plan.ip, "-v", "4"]);
        command.arg("--cert-dir").arg(self.dir.join("kubelet/pki"));
        // Without one of ours it must not find the machine's.
        let bus = self.plan.bus.as_deref().unwrap_or("unix:path=/nowhere");
        command.env("DBUS_SYSTEM_BUS_ADDRESS", bus);
        if self.plan.deployed {
            command.arg("--config-dir").arg(self.deployed_config());
        }
        if let Some(kubeconfig) = &self.kubeconfig {
            command.arg("--kubeconfig").arg(kubeconfig);
        }
        let mut kubelet = Process::start("kubelet", &self.dir, &mut command);
        kubelet.wait_until("health", Duration::from_secs(60), || self.kubelet_get("/healthz").as_deref() == Some("ok"));
        self.kubelet = Some(kubelet);
    }

    /// A folder with the configuration that `deploy/` has, but for this node's socket and driver.
    fn deployed_config(&self) -> PathBuf {
        let name = "90-proxmox-lxcri.conf";
        let mut text = std::fs::read_to_string(repository().join("deploy/kubelet").join(name)).expect("deploy/kubelet");
        for (from, to) in [
            ("unix:///run/proxmox-lxcri/proxmox-lxcri.sock", format!("unix://{}", self.socket().display())),
            ("cgroupDriver: systemd", "cgroupDriver: cgroupfs".to_owned()),
        ] {
            assert!(text.contains(from), "{name} has no {from}");
            text = text.replace(from, &to);
        }
        let folder = self.dir.join("kubelet.conf.d");
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join(name), text).expect("a part of the kubelet's configuration");
        folder
    }

    /// Something of the kubelet's own server, over its read-only port.
    pub fn kubelet_get(&self, path: &str) -> Option<String> {
        let url = format!("http://{}:10255{path}", self.plan.ip);
        let out = self.command(Path::new("curl")).args(["-sf", "--max-time", "20", &url]).output().ok()?;
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// The same, as JSON.
    pub fn kubelet_json(&self, path: &str) -> Option<Value> {
        serde_json::from_str(&self.kubelet_get(path)?).ok()
    }

    fn kubelet_config(&self) -> Value {
        let dir = self.dir.display();
        let mut config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            // The tests' machine may have cgroup v1.
            "failCgroupV1": false,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": if self.plan.netns.is_some() { format!("/{}", self.plan.name) } else { "/".into() },
            "containerRuntimeEndpoint": format!("unix://{dir}/cri.sock"),
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "address": self.plan.ip,
            "readOnlyPort": 10255,
            "healthzBindAddress": self.plan.ip,
            "staticPodPath": format!("{dir}/manifests"),
            "podLogsDir": format!("{dir}/logs/pods"),
            "volumePluginDir": format!("{dir}/plugins"),
            "clusterDomain": "cluster.local",
            "clusterDNS": ["10.96.0.10"],
            "failSwapOn": false,
            "seccompDefault": true,
            "maxPods": 150,
            "registerWithTaints": [],
            "syncFrequency": "10s",
            "fileCheckFrequency": "1s",
            "nodeStatusUpdateFrequency": "5s",
            "serializeImagePulls": false,
            "crashLoopBackOff": {"maxContainerRestartPeriod": "20s"},
            // Not of the machine's own disk and memory.
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "100Mi", "imagefs.available": "50Mi"},
            "featureGates": self.plan.gates.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect::<serde_json::Map<_, _>>(),
            "logging": {"flushFrequency": "1s"},
        });
        for (key, value) in self.plan.kubelet.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        config
    }
}

/// A cgroup that is the root of a node's own, with a part for its daemon and kubelet.
fn make_cgroup(name: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let make = |hierarchy: &Path| {
        let mut parent = hierarchy.to_owned();
        for part in [name, "daemon-of"] {
            let folder = parent.join(part);
            std::fs::create_dir_all(&folder).expect("a cgroup");
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(value) = std::fs::read(parent.join(file)) {
                    let _ = std::fs::write(folder.join(file), value);
                }
            }
            parent = folder;
        }
    };
    if root.join("cgroup.procs").exists() {
        return make(root);
    }
    std::fs::read_dir(root).expect("/sys/fs/cgroup").flatten().for_each(|h| make(&h.path()));
}

fn daemon_config(dir: &Path, plan: &Plan) -> String {
    let template = match plan.network {
        Some(_) => String::new(),
        None => format!("conf_template = \"{}/cni-template.json\"", dir.display()),
    };
    format!(
        r#"version = 1

[log]
level = "{level}"

[server]
listen = "{dir}/cri.sock"
local_listen = "{dir}/local.sock"
root = "{dir}/lib"
state = "{dir}/run"

[runtime]
cgroup_driver = "cgroupfs"
monitor_path = "{monitor}"

[handlers.lxc]
helper = "{lxc}"
init = "{lxc_init}"

[network]
plugin_dirs = ["/usr/lib/cni"]
conf_dir = "{dir}/cni"
{template}

[images]
config_path = ["{dir}/certs.d"]

[images.bfc]
enabled = true
directories = ["{dir}/bfc"]
"#,
        level = std::env::var("LXCRI_TEST_LOG").unwrap_or_else(|_| "info,proxmox_lxcri=debug".into()),
        monitor = given("LXCRI_MONITOR").display(),
        lxc = given("LXCRI_LXC").display(),
        lxc_init = given("LXCRI_LXC_INIT").display(),
        dir = dir.display(),
    )
}
