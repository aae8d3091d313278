//! A control plane (etcd, kube-apiserver, kube-controller-manager, kube-scheduler) and its nodes.
//!
//! Who asks is known by a token: nodes are nodes to the API (Node authorizer, NodeRestriction), all else is an administrator.
//! Reads of the tests go through `kubectl proxy`, which costs less than a kubectl each.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use serde_json::Value;

use super::harness::keep;
use super::node::{Node, Plan};
use super::process::Process;
use crate::support::node::registry_of;
use crate::support::{given, run, wait_for};

/// What a control plane is made of.
pub struct ControlPlane {
    /// Address of the API server, which is this machine's.
    pub ip: String,
    /// Feature gates of all of it ("A=true,B=false").
    pub gates: String,
    /// Pods' networks are given out to nodes from this; empty: none are.
    pub pod_cidr: String,
}

impl Default for ControlPlane {
    fn default() -> Self {
        Self { ip: "192.0.2.1".into(), gates: String::new(), pod_cidr: String::new() }
    }
}

/// A running cluster.
pub struct Cluster {
    pub dir: PathBuf,
    nodes: Mutex<Vec<Node>>,
    proxy_port: u16,
    // In the order of their end: what asks before what answers.
    _programs: Vec<Process>,
    _registry: Registry,
}

/// A registry with the tests' images.
pub struct Registry {
    pid: i32,
    pub address: String,
}

impl Registry {
    pub fn start(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("the registry's folder");
        let (pid, address) = registry_of(&given("LXCRI_IMAGES").join("registry"), dir);
        Self { pid, address }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

impl Cluster {
    /// A control plane with one node, both in the environment's own network namespace.
    pub fn lone(change: impl FnOnce(&mut Plan, &mut ControlPlane)) -> Self {
        let registry = Registry::start(Path::new("/tmp/kube"));
        let (mut plan, mut control) = (Plan::lone(&registry.address), ControlPlane::default());
        change(&mut plan, &mut control);
        Self::start(registry, control, vec![plan])
    }

    /// Starts everything and waits until all nodes are Ready.
    pub fn start(registry: Registry, control: ControlPlane, plans: Vec<Plan>) -> Self {
        let dir = PathBuf::from("/tmp/kube");
        let mut nodes: Vec<Node> = plans.into_iter().map(Node::prepare).collect();
        let names: Vec<String> = nodes.iter().map(|n| n.plan.name.clone()).collect();
        write_credentials(&dir, &control.ip, &names);
        let mut programs = start_control_plane(&dir, &control);
        // The daemons start while the API server does.
        nodes.iter_mut().for_each(Node::start_daemon);
        let api = programs.iter_mut().find(|(n, _)| *n == "kube-apiserver").expect("the API server");
        api.1.wait_until("readiness", Duration::from_secs(90), || {
            let mut kubectl = kubectl(&dir);
            kubectl.args(["get", "--raw", "/readyz"]).output().is_ok_and(|o| o.status.success())
        });
        let mut proxy = kubectl(&dir);
        proxy.args(["proxy", "--port", "8001"]);
        let proxy_port = 8001;
        programs.push(("proxy", Process::start("proxy", &dir, &mut proxy)));
        for node in &mut nodes {
            let kubeconfig = dir.join(format!("{}.kubeconfig", node.plan.name));
            node.start_kubelet(Some(&kubeconfig));
        }
        programs.reverse();
        let programs = programs.into_iter().map(|(_, p)| p).collect();
        let cluster = Self { dir, nodes: Mutex::new(nodes), proxy_port, _programs: programs, _registry: registry };
        for name in &names {
            cluster.wait_node_ready(name);
        }
        cluster
    }

    /// Waits until the API says that a node is Ready.
    pub fn wait_node_ready(&self, name: &str) {
        wait_for(&format!("node {name} to be Ready"), Duration::from_secs(90), || {
            let node = self.get(&format!("/api/v1/nodes/{name}"))?;
            (condition(&node, "Ready")? == "True").then_some(())
        });
    }

    /// The nodes; scenarios that stop daemons or kubelets run alone.
    pub fn nodes(&self) -> MutexGuard<'_, Vec<Node>> {
        self.nodes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// kubectl as an administrator.
    pub fn kubectl(&self) -> Command {
        kubectl(&self.dir)
    }

    /// GET of an API path; None: not there, or no answer.
    pub fn get(&self, path: &str) -> Option<Value> {
        serde_json::from_str(&self.get_text(path)?).ok()
    }

    /// GET of an API path as text.
    pub fn get_text(&self, path: &str) -> Option<String> {
        let mut socket = TcpStream::connect(("127.0.0.1", self.proxy_port)).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
        // HTTP/1.0: the end of the answer is the end of the connection.
        let request = format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n\r\n");
        socket.write_all(request.as_bytes()).ok()?;
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).ok()?;
        let text = String::from_utf8_lossy(&answer);
        let (head, body) = text.split_once("\r\n\r\n")?;
        head.lines().next()?.contains(" 200 ").then(|| body.to_owned())
    }

    /// Keeps all logs for whoever looks into a failure.
    pub fn keep_logs(&self) {
        keep(&self.dir, "control-plane");
        for node in self.nodes().iter() {
            keep(&node.dir, &node.plan.name);
        }
    }
}

/// The status of a condition of an object.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a str> {
    object["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == kind)?["status"].as_str()
}

fn kubectl(dir: &Path) -> Command {
    let mut command = Command::new(given("LXCRI_KUBERNETES").join("kubectl"));
    command.arg("--kubeconfig").arg(dir.join("admin.kubeconfig")).arg("--cache-dir").arg(dir.join("kubectl-cache"));
    command
}

fn write_credentials(dir: &Path, ip: &str, nodes: &[String]) {
    std::fs::create_dir_all(dir).expect("the cluster's folder");
    let mut tokens = String::from("admin-token,admin,admin,\"system:masters\"\n");
    for node in nodes {
        tokens += &format!("{node}-token,system:node:{node},{node},\"system:nodes\"\n");
    }
    std::fs::write(dir.join("tokens.csv"), tokens).expect("tokens");
    run(Command::new("openssl").args(["genrsa", "-out"]).arg(dir.join("service-accounts.key")).arg("2048"));
    for user in std::iter::once("admin").chain(nodes.iter().map(String::as_str)) {
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("https://{ip}:6443"), "insecure-skip-tls-verify": true}}],
            "users": [{"name": "u", "user": {"token": format!("{user}-token")}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        std::fs::write(dir.join(format!("{user}.kubeconfig")), config.to_string()).expect("a kubeconfig");
    }
}

fn start_control_plane(dir: &Path, control: &ControlPlane) -> Vec<(&'static str, Process)> {
    let programs = given("LXCRI_KUBERNETES");
    // One program under several names: said here, whatever the cache's symbolic links say.
    let bin = dir.join("bin");
    std::fs::create_dir_all(&bin).expect("a folder");
    for name in ["kube-apiserver", "kube-controller-manager", "kube-scheduler"] {
        let _ = symlink(programs.join("hyperkube"), bin.join(name));
    }
    let mut started = Vec::new();
    let mut start = |name: &'static str, program: PathBuf, args: Vec<String>| {
        let process = Process::start(name, dir, Command::new(program).args(args));
        started.push((name, process));
    };
    let own = |f: &str| dir.join(f).display().to_string();
    let etcd = [
        "--data-dir".into(),
        own("etcd"),
        "--listen-client-urls=http://127.0.0.1:2379".into(),
        "--advertise-client-urls=http://127.0.0.1:2379".into(),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        "--unsafe-no-fsync".into(),
        "--log-level=warn".into(),
    ];
    start("etcd", given("LXCRI_ETCD").join("etcd"), etcd.into());
    let gates = |mut args: Vec<String>| {
        if !control.gates.is_empty() {
            args.push(format!("--feature-gates={}", control.gates));
        }
        args
    };
    let key = own("service-accounts.key");
    let api = vec![
        "--etcd-servers=http://127.0.0.1:2379".into(),
        "--secure-port=6443".into(),
        format!("--advertise-address={}", control.ip),
        format!("--cert-dir={}", own("pki")),
        "--service-cluster-ip-range=10.96.0.0/16".into(),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        format!("--service-account-key-file={key}"),
        format!("--service-account-signing-key-file={key}"),
        format!("--token-auth-file={}", own("tokens.csv")),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged".into(),
        "--endpoint-reconciler-type=none".into(),
        "--kubelet-preferred-address-types=InternalIP".into(),
    ];
    start("kube-apiserver", bin.join("kube-apiserver"), gates(api));
    let config = format!("--kubeconfig={}", own("admin.kubeconfig"));
    let mut manager = vec![
        config.clone(),
        format!("--service-account-private-key-file={key}"),
        format!("--root-ca-file={}", own("pki/apiserver.crt")),
        "--leader-elect=false".into(),
        "--kube-api-qps=200".into(),
        "--kube-api-burst=400".into(),
    ];
    if !control.pod_cidr.is_empty() {
        manager.push("--allocate-node-cidrs".into());
        manager.push(format!("--cluster-cidr={}", control.pod_cidr));
    }
    // Reads the API server's certificate at its start.
    let certificate = dir.join("pki/apiserver.crt");
    wait_for("the API server's certificate", Duration::from_secs(60), || certificate.exists().then_some(()));
    start("kube-controller-manager", bin.join("kube-controller-manager"), gates(manager));
    let scheduler =
        vec![config, "--leader-elect=false".into(), "--kube-api-qps=200".into(), "--kube-api-burst=400".into()];
    start("kube-scheduler", bin.join("kube-scheduler"), gates(scheduler));
    started
}
