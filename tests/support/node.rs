//! A node of one test: folders, configuration, registry, network and the daemon's process. Lives in the tests'
//! environment; dropping it ends the daemon and the registry and, when the test fails, shows and keeps the logs.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::pve::{self, Pve};
use super::{daemon_program, describe, given, wait_for};

/// Our own command line with a daemon's socket: whether it succeeded, and its output or what it said of its failure.
pub fn lxcri(socket: &Path, args: &[&str]) -> (bool, String) {
    let mut command = Command::new(daemon_program());
    let out = command.arg("--local-socket").arg(socket).args(args).output().expect("our command line");
    let good = out.status.success();
    (good, if good { String::from_utf8_lossy(&out.stdout).into() } else { describe(&out) })
}

/// The same, which has to succeed: its output.
pub fn good(socket: &Path, args: &[&str]) -> String {
    let (good, said) = lxcri(socket, args);
    assert!(good, "{args:?}: {said}");
    said.trim().to_owned()
}

/// What a test wants to be otherwise.
pub struct Options {
    /// Path of crun in the configuration.
    pub crun: String,
    /// Where CNI plugins are looked for.
    pub plugin_dirs: Vec<String>,
    /// The CNI network list; its file is written before the daemon starts.
    pub network: String,
    /// Put on a file system of its own of so many MiB: the folder that holds images and records.
    pub root_size_mib: Option<u32>,
    /// Handler of pods that name none: where LXCRI_TEST_HANDLER says so "lxc", for every test.
    pub handler: String,
    /// More lines of the table `[runtime]`.
    pub runtime: String,
    /// More lines of the tables `[handlers.crun]`, `[network]` and `[images]`.
    pub more_lines: [String; 3],
    /// More tables of the configuration.
    pub more_config: String,
    /// Layers are kept in a ZFS pool (`tank`, by zfs-fuse): where LXCRI_TEST_STORAGE=zfs, for every test.
    pub zfs: bool,
    /// The pool's size.
    pub pool_size: String,
    /// File that says at which named point the daemon or a monitor dies.
    pub failpoint_file: Option<PathBuf>,
    /// More lines of the tables `[proxmox]` and `[handlers.proxmox-lxc]` or `[handlers.proxmox-vm]`.
    pub proxmox_lines: [String; 2],
    /// The programs `zfs` and `zpool`.
    pub zfs_programs: [String; 2],
    /// More lines of the table `[images.zfs]`.
    pub zfs_lines: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            crun: "/usr/bin/crun".into(),
            plugin_dirs: vec!["/usr/lib/cni".into()],
            network: bridge_network(),
            root_size_mib: None,
            handler: std::env::var("LXCRI_TEST_HANDLER").unwrap_or_else(|_| "crun".into()),
            runtime: String::new(),
            more_lines: Default::default(),
            more_config: String::new(),
            zfs: std::env::var("LXCRI_TEST_STORAGE").is_ok_and(|s| s == "zfs"),
            pool_size: "8G".into(),
            failpoint_file: None,
            proxmox_lines: Default::default(),
            zfs_programs: ["/usr/sbin/zfs".into(), "/usr/sbin/zpool".into()],
            zfs_lines: String::new(),
        }
    }
}

/// A bridge with host-local addresses and host ports. Its leases are in /var/lib/cni, which is the environment's own.
pub fn bridge_network() -> String {
    serde_json::json!({
        "cniVersion": "1.0.0", "name": "lxcri-test",
        "plugins": [
            {"type": "bridge", "bridge": "lxcri-t0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
             "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ]
    })
    .to_string()
}

/// A node with a running daemon.
pub struct Node {
    /// Everything of this node is below it.
    pub dir: PathBuf,
    daemon: Option<Child>,
    failpoint_file: Option<PathBuf>,
    /// Starts the daemon as systemd does, with what an earlier one has parked.
    pub manager: Option<super::manager::Manager>,
    /// The Proxmox that it is a node of, with handlers proxmox-lxc and proxmox-vm.
    pub pve: Option<Pve>,
    registry: i32,
    /// `127.0.0.1:<port>` of the registry.
    pub registry_address: String,
}

impl Node {
    /// Starts everything and waits until the daemon answers.
    pub fn start(options: Options) -> Self {
        let mut node = Self::prepare(options);
        node.start_daemon();
        node
    }

    /// A node whose daemon is not started yet.
    pub fn prepare(mut options: Options) -> Self {
        let dir = PathBuf::from("/tmp/node");
        for d in ["cni", "certs.d", "logs", "lib", "run"] {
            std::fs::create_dir_all(dir.join(d)).expect("the node's folders");
        }
        if let Some(mib) = options.root_size_mib {
            let size = format!("size={mib}m");
            super::run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.join("lib")));
        }
        if options.zfs {
            let pool = super::repository().join("tests/env/pool");
            super::run(Command::new(pool).arg(given("LXCRI_ZFS_FUSE")).arg(&options.pool_size));
        }
        make_cgroup("tests");
        let (registry, registry_address) = start_registry(&dir);
        // Every registry name is this one; `unreachable.test` is nowhere.
        for (name, address) in [
            ("registry.k8s.io", registry_address.as_str()),
            ("gcr.io", &registry_address),
            ("k8s.gcr.io", &registry_address),
            ("unreachable.test", "127.0.0.1:1"),
        ] {
            let folder = dir.join("certs.d").join(name);
            std::fs::create_dir_all(&folder).expect("certs.d");
            let hosts = format!(
                "server = \"http://{address}\"\n\n[host.\"http://{address}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
            );
            std::fs::write(folder.join("hosts.toml"), hosts).expect("hosts.toml");
        }
        let pve = match options.handler.as_str() {
            "proxmox-lxc" => Some(start_proxmox(&mut options.more_config, &options.proxmox_lines)),
            "proxmox-vm" => Some(start_vm_proxmox(&mut options.more_config, &options.proxmox_lines)),
            _ => None,
        };
        std::fs::write(dir.join("cni/10-test.conflist"), &options.network).expect("the network list");
        std::fs::write(dir.join("config.toml"), config(&dir, &options)).expect("config.toml");
        let failpoint_file = options.failpoint_file;
        Self { dir, daemon: None, failpoint_file, manager: None, pve, registry, registry_address }
    }

    /// The CRI socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("cri.sock")
    }

    /// The socket of our own command line.
    pub fn local_socket(&self) -> PathBuf {
        self.dir.join("local.sock")
    }

    /// Our own command line: whether it succeeded, and its output or what it said of its failure.
    pub fn lxcri(&self, args: &[&str]) -> (bool, String) {
        lxcri(&self.local_socket(), args)
    }

    /// The same, which has to succeed: its output.
    pub fn good(&self, args: &[&str]) -> String {
        good(&self.local_socket(), args)
    }

    /// The daemon's log of all its runs.
    pub fn log_file(&self) -> PathBuf {
        self.dir.join("daemon.log")
    }

    /// Folder for the logs of a pod's containers.
    pub fn pod_logs(&self, pod: &str) -> PathBuf {
        self.dir.join("logs").join(pod)
    }

    /// Starts the daemon and waits until it answers on its socket.
    pub fn start_daemon(&mut self) {
        assert!(self.try_start_daemon(), "the daemon ended at its start");
    }

    /// Starts the daemon and waits until it answers on its socket, or (false) has ended.
    pub fn try_start_daemon(&mut self) -> bool {
        let log = || File::options().create(true).append(true).open(self.log_file()).expect("the daemon's log");
        let program = super::daemon_program();
        let mut command = self.manager.as_ref().map_or_else(|| Command::new(&program), |m| m.command(&program));
        let child = command
            .args(["serve", "--config"])
            .arg(self.dir.join("config.toml"))
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .envs(self.failpoint_file.as_ref().map(|f| ("LXCRI_FAILPOINT_FILE", f)))
            .spawn()
            .expect("the daemon starts");
        self.daemon = Some(child);
        wait_for("the daemon's answer", Duration::from_secs(60), || {
            if self.daemon_has_ended() {
                return Some(false);
            }
            self.crictl().try_run(&["version"]).0.then_some(true)
        })
    }

    /// Whether there is none, or one that has ended by itself or was killed by others.
    pub fn daemon_has_ended(&mut self) -> bool {
        let ended = self.daemon.as_mut().is_none_or(|d| d.try_wait().ok().flatten().is_some());
        if ended {
            self.daemon = None;
        }
        ended
    }

    /// The daemon's pid.
    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("the daemon runs").id()
    }

    /// Ends the registry: nothing can be fetched any more.
    pub fn stop_registry(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(std::mem::take(&mut self.registry)) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }

    /// kill -9.
    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        daemon.kill().expect("kill -9");
        daemon.wait().expect("its end");
    }

    /// SIGTERM, then waits for its end; its status must be a success.
    pub fn stop_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        let pid = rustix::process::Pid::from_child(&daemon);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
        let status = wait_for("the daemon's end", Duration::from_secs(20), || daemon.try_wait().expect("its status"));
        assert!(status.success(), "the daemon ended with {status}");
    }

    /// kill -9 and a new daemon.
    pub fn crash_daemon(&mut self) {
        self.kill_daemon();
        self.start_daemon();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        self.stop_registry();
        if std::thread::panicking() {
            self.keep_logs();
        }
    }
}

impl Node {
    fn keep_logs(&self) {
        if let Some(keep) = std::env::var_os("LXCRI_LOGS") {
            let keep = Path::new(&keep);
            let _ = Command::new("cp").arg("-r").arg(self.dir.join("logs")).arg(self.log_file()).arg(keep).status();
            let _ = Command::new("cp").arg("-r").arg(self.dir.join("run")).arg(keep.join("run")).output();
        }
        let Ok(log) = File::open(self.log_file()) else { return };
        let lines: Vec<_> = BufReader::new(log).lines().map_while(Result::ok).collect();
        println!("--- the end of the daemon's log:");
        for line in lines.iter().skip(lines.len().saturating_sub(80)) {
            println!("{line}");
        }
    }
}

/// A Proxmox that runs its containers by Debian's `lxc`; adds what the daemon has to know of it, and more lines of the tables
/// `[proxmox]` and `[handlers.proxmox-lxc]`.
pub fn start_proxmox(config: &mut String, lines: &[String; 2]) -> Pve {
    // As on a Proxmox node: root may give containers this range.
    for file in ["/etc/subuid", "/etc/subgid"] {
        std::fs::write(file, "root:100000:65536\n").expect("a range of users");
    }
    ["lxc", "lxc.monitor", "lxc.pivot"].into_iter().for_each(make_cgroup);
    let lxc = PathBuf::from("/var/lib/lxc");
    std::fs::create_dir_all(&lxc).expect("lxc's folder");
    let pve = Pve::start(pve::Options { runner: pve::Runner::Lxc(lxc), ..pve::Options::default() });
    config.push_str(&format!(
        "[proxmox]\nendpoints = [\"{}\"]\nnode = \"pve1\"\ntoken_id = \"{}\"\ntoken_file = \"{}\"\nca_file = \"{}\"\n{}\n\
         [handlers.proxmox-lxc]\nenabled = true\nvmids = \"9000-9999\"\nstorage = \"local\"\npool = \"k8s\"\n{}\n",
        pve.url(),
        pve::TOKEN,
        pve.file("token"),
        pve.file("ca.pem"),
        quick(&lines[0]),
        lines[1],
    ));
    pve
}

/// Lines of the table `[proxmox]`, with a short time for one request where they have none: for as long after its start a daemon waits for
/// guests that an earlier one may have asked for.
fn quick(lines: &str) -> String {
    if lines.contains("timeout") { lines.to_owned() } else { format!("timeout = \"5s\"\n{lines}") }
}

/// A Proxmox that runs virtual machines by QEMU, with a bridge and a template; adds what the daemon has to know of it, and more lines of
/// the tables `[proxmox]` and `[handlers.proxmox-vm]`.
pub fn start_vm_proxmox(config: &mut String, lines: &[String; 2]) -> Pve {
    let pve = Pve::start(pve::Options { runner: pve::Runner::Qemu, ..pve::Options::default() });
    pve.add_bridge("vmbr0", "10.90.0.1/24");
    pve.add_template(8000, &given("LXCRI_GUEST_TEMPLATE"));
    config.push_str(&format!(
        "[proxmox]\nendpoints = [\"{}\"]\nnode = \"pve1\"\ntoken_id = \"{}\"\ntoken_file = \"{}\"\nca_file = \"{}\"\n{}\n\
         [handlers.proxmox-vm]\nenabled = true\ntemplate = 8000\nvmids = \"9000-9099\"\nstorage = \"local\"\npool = \"k8s\"\n\
         memory = 192\nstart_timeout = \"240s\"\nkubelet_root = \"/tmp/node/kubelet\"\nrelay_path = \"{}\"\n{}\n\
         [handlers.proxmox-vm.network]\nbridge = \"vmbr0\"\naddress = \"10.90.0.100-10.90.0.199/24\"\ngateway = \"10.90.0.1\"\n",
        pve.url(),
        pve::TOKEN,
        pve.file("token"),
        pve.file("ca.pem"),
        quick(&lines[0]),
        given("LXCRI_RELAY").display(),
        lines[1],
    ));
    pve
}

/// A cgroup below the root, in all hierarchies: the pods' parent, made as a kubelet makes its own, which a runtime need not
/// remove, and those that liblxc leaves.
fn make_cgroup(name: &str) {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.procs").exists() {
        std::fs::create_dir_all(root.join(name)).expect("the cgroup");
        return;
    }
    for hierarchy in std::fs::read_dir(root).expect("/sys/fs/cgroup").flatten() {
        let group = hierarchy.path().join(name);
        std::fs::create_dir_all(&group).expect("the cgroup");
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(value) = std::fs::read(hierarchy.path().join(file)) {
                std::fs::write(group.join(file), value).expect("the cgroup's cpuset");
            }
        }
    }
}

fn config(dir: &Path, options: &Options) -> String {
    let dir = dir.display();
    let quoted: Vec<_> = options.plugin_dirs.iter().map(|d| format!("{d:?}")).collect();
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
default_handler = "{handler}"
cgroup_driver = "cgroupfs"
monitor_path = "{monitor}"
{runtime}

[handlers.crun]
path = "{crun}"
{crun_lines}

[handlers.lxc]
helper = "{lxc}"
init = "{lxc_init}"

[network]
plugin_dirs = [{plugins}]
conf_dir = "{dir}/cni"
embedded = false
{network_lines}

[images]
config_path = ["{dir}/certs.d"]
driver = "{driver}"
{image_lines}

[images.zfs]
dataset = "tank/lxcri"
zfs_path = "{zfs}"
zpool_path = "{zpool}"
timeout = 40
health_interval = 1
{zfs_lines}

{more}
"#,
        driver = if options.zfs { "zfs" } else { "overlay" },
        zfs = options.zfs_programs[0],
        zpool = options.zfs_programs[1],
        crun_lines = options.more_lines[0],
        network_lines = options.more_lines[1],
        image_lines = options.more_lines[2],
        more = options.more_config,
        zfs_lines = options.zfs_lines,
        runtime = options.runtime,
        level = std::env::var("LXCRI_TEST_LOG").unwrap_or_else(|_| "info,proxmox_lxcri=debug".into()),
        monitor = given("LXCRI_MONITOR").display(),
        crun = options.crun,
        handler = options.handler,
        lxc = given("LXCRI_LXC").display(),
        lxc_init = given("LXCRI_LXC_INIT").display(),
        plugins = quoted.join(", "),
    )
}

/// Pid and address of a registry that serves the tests' images.
fn start_registry(dir: &Path) -> (i32, String) {
    registry_of(&given("LXCRI_IMAGES").join("registry"), dir)
}

/// The same for a registry's data folder, to which nothing is written; its log is in `dir`.
pub fn registry_of(data: &Path, dir: &Path) -> (i32, String) {
    started(
        Command::new(super::repository().join("tests/tools/registry"))
            .arg(data)
            .arg(dir.join("registry.log"))
            .arg("readonly"),
    )
}

/// One that takes what is pushed; all of it is in `dir`.
pub fn writable_registry(dir: &Path) -> (i32, String) {
    let program = super::repository().join("tests/tools/registry");
    started(Command::new(program).arg(dir.join("pushed")).arg(dir.join("pushed.log")))
}

fn started(registry: &mut Command) -> (i32, String) {
    let out = super::run(registry);
    let (pid, url) = out.trim().split_once(' ').expect("PID URL");
    (pid.parse().expect("a pid"), url.trim_start_matches("http://").to_owned())
}
