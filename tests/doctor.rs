//! A host on which all is well, and each fault planted in it: the check of its name says so, with what to do.
//!
//! Files are below a folder of the test's own, programs are scripts that say what the real ones say. What needs a Proxmox is in
//! `tests/operate.rs`.

use std::time::{Duration, SystemTime};

use camino::{Utf8Path, Utf8PathBuf};

use proxmox_lxcri::core::config::{Config, LayerDriver};
use proxmox_lxcri::daemon::doctor::{Finding, Host, LIMITS, State, examine, table};

struct Planted {
    _folder: tempfile::TempDir,
    root: Utf8PathBuf,
    host: Host,
    config: Config,
}

const CONFLIST: &str =
    r#"{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"bridge","ipam":{"type":"host-local"}}]}"#;
const OURS: &str = "0123456789abcdef0123456789abcdef";

impl Planted {
    /// Nothing is wrong here.
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let root = Utf8PathBuf::from_path_buf(folder.path().to_owned()).expect("UTF-8");
        let mut planted = Self { host: Host::at(&root), root, _folder: folder, config: Config::default() };
        let p = &planted;
        p.file("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n");
        p.file("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids\n");
        p.file("sys/module/apparmor/parameters/enabled", "Y\n");
        p.file("proc/cmdline", "BOOT_IMAGE=/vmlinuz quiet\n");
        p.file("usr/sbin/apparmor_parser", "");
        p.file("proc/sys/net/ipv4/ip_forward", "1\n");
        p.file("proc/sys/net/bridge/bridge-nf-call-iptables", "1\n");
        p.file("etc/subuid", "root:100000:65536\nkubelet:196608:7208960\n");
        p.file("etc/subgid", "root:100000:65536\nkubelet:196608:7208960\n");
        for (file, _, least, _) in LIMITS {
            p.file(file.trim_start_matches('/'), &format!("{least}\n"));
        }
        p.file("etc/cni/net.d/10-pods.conflist", CONFLIST);
        p.file("opt/cni/bin/bridge", "");
        p.file("usr/lib/cni/host-local", "");
        let (crun, helper) = (p.program("crun", "echo crun version 1.21"), p.program("helper", "echo 6.0.4"));
        let (monitor, zfs) = (p.program("monitor", ""), p.zfs("100000000000", OURS, "local"));
        let zpool = p.program("zpool", "echo ONLINE");
        let root = p.root.clone();
        let config = &mut planted.config;
        config.handlers.crun.path = crun;
        (config.handlers.lxc.helper, config.handlers.lxc.init) = (Some(helper.clone()), Some(helper));
        config.runtime.monitor_path = Some(monitor);
        config.images.driver = LayerDriver::Zfs;
        config.images.zfs.dataset = "lxcri-test-pool/x".into();
        (config.images.zfs.zfs_path, config.images.zfs.zpool_path) = (zfs, zpool);
        config.server.root = root.join("lib");
        config.server.listen = root.join("cri.sock");
        config.server.local_listen = root.join("local.sock");
        planted.file("lib/installation", &format!("{OURS}\n"));
        planted
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.root.join(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
        write(&path, text, 0o644);
    }

    fn remove(&self, path: &str) {
        std::fs::remove_file(self.root.join(path)).expect("a file");
    }

    fn program(&self, name: &str, script: &str) -> Utf8PathBuf {
        let path = self.root.join(name);
        write(&path, &format!("#!/bin/sh\n{script}\n"), 0o755);
        path
    }

    /// What `zfs` says of the dataset. As one that has no `version`: the kernel's pools are not asked for.
    fn zfs(&self, available: &str, owner: &str, source: &str) -> Utf8PathBuf {
        let set = "lxcri-test-pool/x";
        let script = format!(
            "case $1 in version) echo \"unrecognized command 'version'\" >&2; exit 2 ;;\n\
             get) printf '{set}\\tavailable\\t{available}\\t-\\n{set}\\tlxcri:owner\\t{owner}\\t{source}\\n' ;; esac"
        );
        self.program("zfs", &script)
    }

    async fn found(&self) -> Vec<Finding> {
        examine(&self.host, &self.config).await
    }
}

fn write(path: &Utf8Path, text: &str, mode: u32) {
    use proxmox_lxcri::utils::atomic::{self, Durability};
    atomic::write(path.as_std_path(), text.as_bytes(), mode, Durability::Process).expect("a file");
}

/// The one thing that is wrong.
async fn wrong(planted: &Planted) -> Finding {
    let mut all = planted.found().await;
    all.retain(|f| f.state != State::Good);
    assert_eq!(all.len(), 1, "{all:#?}");
    let finding = all.remove(0);
    assert!(!finding.advice.is_empty(), "no advice: {finding:?}");
    finding
}

#[tokio::test]
async fn nothing_is_wrong_where_nothing_is() {
    let planted = Planted::new();
    let found = planted.found().await;
    assert!(found.iter().all(|f| f.state == State::Good), "{found:#?}");
    for check in [
        "kernel",
        "cgroups",
        "apparmor",
        "ip_forward",
        "bridge",
        "clock",
        "subuid",
        "limits",
        "crun",
        "liblxc",
        "monitor",
        "cni",
        "storage",
        "zfs",
        "socket",
    ] {
        assert!(found.iter().any(|f| f.check == check), "{check} was not looked at");
    }
    assert!(table(&found).ends_with("faults: 0, warnings: 0\n"), "{}", table(&found));
}

type Plant = fn(&mut Planted);

/// How a fault is planted, which check finds it, how bad it is, and what it says.
const FAULTS: &[(&str, Plant, &str, State, &str)] = &[
    ("no crun", |p| p.remove("crun"), "crun", State::Fault, "is not there"),
    ("a crun that hangs up", |p| drop(p.program("crun", "exit 1")), "crun", State::Fault, "does not work"),
    (
        "old crun",
        |p| drop(p.program("crun", "echo crun version 1.5")),
        "crun",
        State::Fault,
        "is crun 1.5.0, older than 1.8.0",
    ),
    (
        "crun without features",
        |p| drop(p.program("crun", "echo crun version 1.8.1")),
        "crun",
        State::Warning,
        "user namespaces",
    ),
    ("no CNI plugin", |p| p.remove("opt/cni/bin/bridge"), "cni", State::Fault, "network pods needs bridge"),
    ("no address manager", |p| p.remove("usr/lib/cni/host-local"), "cni", State::Fault, "needs host-local"),
    ("no network", |p| p.remove("etc/cni/net.d/10-pods.conflist"), "cni", State::Fault, "has no configuration"),
    (
        "broken conflist",
        |p| p.file("etc/cni/net.d/10-pods.conflist", "{"),
        "cni",
        State::Fault,
        "10-pods.conflist: not JSON",
    ),
    (
        "cgroup v1",
        |p| p.file("proc/self/mounts", "c /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"),
        "cgroups",
        State::Fault,
        "version 1",
    ),
    (
        "hybrid cgroups",
        |p| p.file("proc/self/mounts", "c /sys/fs/cgroup/cpu cgroup rw 0 0\nc /sys/fs/cgroup/unified cgroup2 rw 0 0\n"),
        "cgroups",
        State::Fault,
        "hybrid",
    ),
    ("no cgroups", |p| p.file("proc/self/mounts", "t /tmp tmpfs rw 0 0\n"), "cgroups", State::Fault, "no cgroups"),
    (
        "a controller is missing",
        |p| p.file("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io\n"),
        "cgroups",
        State::Fault,
        "memory, pids are missing",
    ),
    ("no parser", |p| p.remove("usr/sbin/apparmor_parser"), "apparmor", State::Fault, "apparmor_parser is missing"),
    (
        "AppArmor is off though its package is there",
        |p| p.file("sys/module/apparmor/parameters/enabled", "N\n"),
        "apparmor",
        State::Fault,
        "configured",
    ),
    (
        "AppArmor is off though the kernel was asked for it",
        |p| {
            p.remove("sys/module/apparmor/parameters/enabled");
            p.remove("usr/sbin/apparmor_parser");
            p.file("proc/cmdline", "quiet lsm=landlock,apparmor\n");
        },
        "apparmor",
        State::Fault,
        "configured",
    ),
    (
        "pool absent",
        |p| drop(p.program("zpool", "echo \"cannot open 'lxcri-test-pool': no such pool\" >&2; exit 1")),
        "zfs",
        State::Fault,
        "no pool lxcri-test-pool",
    ),
    ("pool suspended", |p| drop(p.program("zpool", "echo SUSPENDED")), "zfs", State::Fault, "suspended"),
    ("pool degraded", |p| drop(p.program("zpool", "echo DEGRADED")), "zfs", State::Warning, "degraded"),
    ("pool full", |p| drop(p.zfs("1000000", OURS, "local")), "zfs", State::Fault, "is full: 0 MiB"),
    ("pool nearly full", |p| drop(p.zfs("1000000000", OURS, "local")), "zfs", State::Warning, "nearly full: 953 MiB"),
    (
        "dataset tag foreign",
        |p| drop(p.zfs("100000000000", "ffff", "local")),
        "zfs",
        State::Fault,
        "another installation (ffff)",
    ),
    ("dataset without a tag", |p| drop(p.zfs("100000000000", "-", "-")), "zfs", State::Warning, "no tag of ours"),
    ("no zfs", |p| p.remove("zfs"), "zfs", State::Fault, "does not answer"),
    (
        "liblxc absent",
        |p| drop(p.program("helper", "echo no liblxc.so.1 >&2; exit 1")),
        "liblxc",
        State::Warning,
        "no liblxc.so.1",
    ),
    (
        "liblxc absent, and it is the default",
        |p| {
            p.program("helper", "exit 1");
            p.config.runtime.default_handler = "lxc".into();
        },
        "liblxc",
        State::Fault,
        "can't be used",
    ),
    (
        "no helper",
        |p| p.config.handlers.lxc.helper = Some("/nowhere/helper".into()),
        "liblxc",
        State::Warning,
        "is not there",
    ),
    ("no monitor", |p| p.remove("monitor"), "monitor", State::Fault, "is not there"),
    (
        "clock years behind",
        |p| p.host.now = SystemTime::UNIX_EPOCH + Duration::from_secs(86_400),
        "clock",
        State::Fault,
        "years behind",
    ),
    ("clock not kept", |p| p.host.synchronized = Some(false), "clock", State::Warning, "nothing keeps"),
    (
        "subuid overlap with guests",
        |p| p.file("etc/subuid", "kubelet:65536:7208960\n"),
        "subuid",
        State::Fault,
        "also those of unprivileged containers",
    ),
    (
        "subgid overlap with somebody",
        |p| p.file("etc/subgid", "kubelet:196608:65536\nme:200000:1000\n"),
        "subuid",
        State::Fault,
        "those of me",
    ),
    (
        "no range for the handler's containers",
        |p| {
            p.config.handlers.proxmox_lxc.enabled = true;
            p.file("etc/subuid", "kubelet:196608:65536\n");
        },
        "subuid",
        State::Fault,
        "does not give root",
    ),
    (
        "ip_forward off",
        |p| p.file("proc/sys/net/ipv4/ip_forward", "0\n"),
        "ip_forward",
        State::Fault,
        "ip_forward is 0",
    ),
    (
        "bridge past iptables",
        |p| p.file("proc/sys/net/bridge/bridge-nf-call-iptables", "0\n"),
        "bridge",
        State::Warning,
        "is 0",
    ),
    (
        "few watches",
        |p| p.file("proc/sys/fs/inotify/max_user_instances", "128\n"),
        "limits",
        State::Warning,
        "max_user_instances is 128",
    ),
    (
        "no file of block I/O classes",
        |p| p.config.runtime.blockio_config_file = Some("/etc/none.yaml".into()),
        "blockio",
        State::Warning,
        "none.yaml",
    ),
    (
        "a broken file of block I/O classes",
        |p| {
            p.file("etc/blockio.yaml", "Classes:\n  a: [{Weight: 5}]\n");
            p.config.runtime.blockio_config_file = Some("/etc/blockio.yaml".into());
        },
        "blockio",
        State::Warning,
        "Weight 5",
    ),
    (
        "a block I/O class of no device",
        |p| {
            p.file("etc/blockio.yaml", "Classes:\n  a: [{Devices: [/dev/no-such-*], Weight: 50}]\n");
            p.config.runtime.blockio_config_file = Some("/etc/blockio.yaml".into());
        },
        "blockio",
        State::Warning,
        "no block device is /dev/no-such-*",
    ),
    ("no resctrl", |p| p.config.runtime.rdt_classes = vec!["gold".into()], "rdt", State::Warning, "not mounted"),
    (
        "no such group of resctrl",
        |p| {
            p.config.runtime.rdt_classes = vec!["gold".into(), "silver".into()];
            let mounts = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\nresctrl /sys/fs/resctrl resctrl rw 0 0\n";
            p.file("proc/self/mounts", mounts);
            p.file("sys/fs/resctrl/gold/schemata", "");
        },
        "rdt",
        State::Warning,
        "no group silver",
    ),
    ("old kernel", |p| p.host.release = "5.4.0-1".into(), "kernel", State::Fault, "older than 5.15"),
    ("a file in the socket's place", |p| p.file("cri.sock", ""), "socket", State::Fault, "no socket"),
];

#[tokio::test]
async fn each_planted_fault_is_named_with_what_to_do() {
    for (name, plant, check, state, says) in FAULTS {
        let mut planted = Planted::new();
        plant(&mut planted);
        let finding = wrong(&planted).await;
        assert_eq!((finding.check, finding.state), (*check, *state), "{name}: {finding:?}");
        assert!(finding.message.contains(says), "{name}: {finding:?}");
    }
}

#[tokio::test]
async fn classes_that_are_there_are_named() {
    let mut planted = Planted::new();
    planted.file("etc/blockio.yaml", "Classes:\n  slow: [{Weight: 50}]\n  fast: [{Weight: 500}]\n");
    planted.config.runtime.blockio_config_file = Some("/etc/blockio.yaml".into());
    planted.config.runtime.rdt_classes = vec!["gold".into()];
    let mounts = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\nresctrl /sys/fs/resctrl resctrl rw 0 0\n";
    planted.file("proc/self/mounts", mounts);
    planted.file("sys/fs/resctrl/gold/schemata", "");
    let found = planted.found().await;
    for (check, message) in [("blockio", "classes: fast, slow"), ("rdt", "groups: gold")] {
        let finding = found.iter().find(|f| f.check == check).expect(check);
        assert_eq!((finding.state, finding.message.as_str()), (State::Good, message));
    }
}

#[tokio::test]
async fn an_occupied_socket_is_told_from_one_that_was_left() {
    let planted = Planted::new();
    let path = planted.config.server.listen.clone();
    let other = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    // Says nothing that a runtime would.
    let peer = std::thread::spawn(move || other.accept().map(|(stream, _)| drop(stream)));
    let finding = wrong(&planted).await;
    assert_eq!(finding.check, "socket");
    assert!(finding.message.contains("occupied by something that is no runtime"), "{finding:?}");
    peer.join().expect("the peer").expect("a connection");
    // Nobody listens any more, the file stays.
    let found = planted.found().await;
    assert!(
        found.iter().any(|f| f.state == State::Good && f.message.contains("left from a daemon that is gone")),
        "{found:#?}"
    );
}

#[test]
fn what_programs_say_does_not_steer_the_terminal() {
    let bad = Finding { check: "crun", state: State::Fault, message: "a\x1b[31mb".into(), advice: "c\nd".into() };
    let text = table(&[bad]);
    assert!(!text.contains('\x1b') && text.lines().count() == 3, "{text}");
}
