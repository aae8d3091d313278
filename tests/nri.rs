//! Plugins on NRI's own Go library (`tests/nri_plugin`): what they change in containers, what they hear of, what they are refused, and that
//! one that hangs or dies is missed by nobody. Through the real daemon, crun, liblxc and crictl.
//!
//! Run by `cargo test --test nri`, as root. A crash leaves nothing: see `support`.

// A test writes files, starts programs and fails as it likes.
#![allow(clippy::disallowed_methods)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::node::{Node, Options};
use support::pod::Pod;
use support::wait_for;

const PLUGINS: &str = "/tmp/nri/plugins";
const SETTINGS: &str = "/tmp/nri/conf.d";
const LIMIT: &str = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2> /dev/null; true";

fn isolated(name: &str, body: impl FnOnce()) {
    let tool = || {
        let out = support::run(&mut Command::new(support::repository().join("tests/tools/nri-plugin")));
        PathBuf::from(out.lines().last().unwrap_or_default()).join("nri-plugin")
    };
    support::isolated_in("trixie", name, support::monitor_program, &[("LXCRI_NRI_PLUGIN", tool)], body);
}

/// Where a plugin writes down what it was told.
fn log_of(name: &str) -> String {
    format!("/tmp/nri/{name}.log")
}

fn heard(name: &str) -> Vec<String> {
    std::fs::read_to_string(log_of(name)).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// Waits until a plugin was told something that begins so; the line.
#[track_caller]
fn hears(name: &str, begin: &str) -> String {
    wait_for(&format!("{name}: {begin}"), Duration::from_secs(20), || {
        heard(name).into_iter().find(|line| line.starts_with(begin))
    })
}

/// Puts a plugin into the folder, with its settings.
fn install(name: &str, mut settings: Value) {
    for folder in [PLUGINS, SETTINGS] {
        std::fs::create_dir_all(folder).expect("a folder");
    }
    settings["Log"] = json!(log_of(name));
    std::fs::copy(support::given("LXCRI_NRI_PLUGIN"), Path::new(PLUGINS).join(name)).expect("a program");
    std::fs::write(Path::new(SETTINGS).join(format!("{name}.conf")), settings.to_string()).expect("settings");
}

fn options(more: &str) -> Options {
    let more_config = format!(
        "[nri]\nenabled = true\nplugin_dir = \"{PLUGINS}\"\nplugin_config_dir = \"{SETTINGS}\"\nsocket = \"/tmp/nri/run/nri.sock\"\n{more}\n"
    );
    Options { more_config, handler: "crun".into(), ..Options::default() }
}

/// Nothing but the script.
fn plain(_: &mut Value) {}

/// A container that stays.
fn stays(pod: &Pod, name: &str) -> String {
    pod.running(name, "sleep 1000", plain)
}

fn output(pod: &Pod, name: &str, script: &str) -> Vec<String> {
    pod.output(name, script, plain).1
}

/// With these resources.
fn limited(resources: &Value) -> impl FnOnce(&mut Value) {
    move |config| config["linux"]["resources"] = resources.clone()
}

fn limit(pod: &Pod, id: &str) -> String {
    pod.crictl.run(&["exec", "-s", id, "/bin/sh", "-c", LIMIT])
}

fn shown_limit(pod: &Pod, id: &str) -> Value {
    pod.crictl.container_status(id)["resources"]["linux"]["memoryLimitInBytes"].clone()
}

#[test]
fn plugins_change_containers_and_hear_of_them() {
    isolated("plugins_change_containers_and_hear_of_them", || {
        std::fs::create_dir_all("/tmp/nri/data").expect("a folder");
        std::fs::write("/tmp/nri/data/file", "mounted\n").expect("a file");
        install(
            "10-first",
            json!({
                "Env": {"PLUGGED": "yes"}, "Mounts": {"/plugged": "/tmp/nri/data"}, "Memory": 64 << 20, "Pids": 77,
                "Hook": "/tmp/nri/state", "UpdateMemory": 48 << 20, "Trigger": "/tmp/nri/trigger",
            }),
        );
        install("20-second", json!({"Device": "/dev/plugged 10 229", "Other": "long", "OtherMemory": 80 << 20}));
        let mut node = Node::start(options(""));
        assert_eq!(heard("10-first"), ["Configure proxmox-lxcri", "Synchronize"]);
        let pod = Pod::run(&node, "p1");
        let run = hears("10-first", "RunPodSandbox");
        assert!(run.starts_with("RunPodSandbox p1 crun 10.88."), "{run}");
        let script = format!(
            "echo $PLUGGED $GREETING; cat /plugged/file; touch /plugged/x; stat -c %t:%T /dev/plugged; {LIMIT}; cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2> /dev/null; true"
        );
        let lines = output(&pod, "short", &script);
        let wanted = ["yes hello", "mounted", "a:e5", "67108864", "77"];
        for line in wanted {
            assert!(lines.iter().any(|l| l == line), "{line}: {lines:?}");
        }
        assert!(lines.iter().any(|l| l.contains("Read-only file system")), "{lines:?}");
        assert!(std::fs::read_to_string("/tmp/nri/state").expect("the hook ran").contains("\"ociVersion\""));
        // The second one was shown what the first had set, and who.
        let seen = hears("20-second", "CreateContainer p1 short /bin/sh,-c,");
        assert!(seen.contains("GREETING=hello") && seen.contains("PLUGGED=yes"), "{seen}");
        hears("20-second", "ValidateContainerAdjustment short owner=10-first");
        hears("10-first", "StopContainer short 0");

        // A kubelet's update is a plugin's to change; the record has what is in force.
        let id = stays(&pod, "long");
        assert_eq!((limit(&pod, &id).as_str(), shown_limit(&pod, &id)), ("67108864", json!("67108864")));
        pod.crictl.run(&["update", "--memory", "33554432", &id]);
        hears("20-second", "UpdateContainer long 50331648");
        hears("20-second", "PostUpdateContainer long 50331648");
        assert_eq!((limit(&pod, &id).as_str(), shown_limit(&pod, &id)), ("50331648", json!("50331648")));
        // Another container is changed when one is made, and by a plugin's own wish.
        output(&pod, "other", "true");
        wait_for("the other's limit", Duration::from_secs(20), || (limit(&pod, &id) == "83886080").then_some(()));
        std::fs::write("/tmp/nri/trigger", format!("{id} {}\n", 96 << 20)).expect("a file");
        assert_eq!(hears("10-first", "Updated"), "Updated 0 <nil>");
        assert_eq!((limit(&pod, &id).as_str(), shown_limit(&pod, &id)), ("100663296", json!("100663296")));

        // Another daemon's plugins are told what there is.
        node.crash_daemon();
        let told = wait_for("a second synchronization", Duration::from_secs(20), || {
            heard("20-second").into_iter().filter(|l| l.starts_with("Synchronize")).nth(1)
        });
        for word in ["pod=p1", "container=long CONTAINER_RUNNING", "container=short CONTAINER_STOPPED"] {
            assert!(told.contains(word), "{word}: {told}");
        }
        pod.crictl.run(&["stop", "-t", "0", &id]);
        pod.crictl.run(&["rm", &id]);
        pod.crictl.run(&["rmp", "-f", &pod.id]);
        let lines = heard("20-second");
        let of = |word: &str| lines.iter().filter(|l| l.contains(word)).cloned().collect::<Vec<_>>();
        let events: Vec<_> = of(" long").iter().filter_map(|l| l.split(' ').next().map(str::to_owned)).collect();
        let wanted = [
            "CreateContainer",
            "ValidateContainerAdjustment",
            "PostCreateContainer",
            "StartContainer",
            "PostStartContainer",
            "UpdateContainer",
            "PostUpdateContainer",
            "StopContainer",
            "RemoveContainer",
        ];
        assert_eq!(
            events.iter().filter(|e| *e != "Synchronize").collect::<Vec<_>>(),
            wanted.iter().collect::<Vec<_>>()
        );
        let last: Vec<_> = lines.iter().rev().take(1).collect();
        assert_eq!(last, ["RemovePodSandbox p1"]);
        assert_eq!(of("StopPodSandbox").len(), 1);
    });
}

#[test]
fn what_can_not_be_is_refused_by_name() {
    isolated("what_can_not_be_is_refused_by_name", || {
        install("10-a", json!({"Container": "both", "Env": {"X": "1"}}));
        install("20-b", json!({"Container": "both", "Env": {"X": "2"}}));
        install("30-no", json!({"Container": "refused", "Refuse": "not on a Sunday"}));
        install("40-sysctl", json!({"Container": "sysctl", "Sysctl": {"net.core.somaxconn": "1"}}));
        install("50-judge", json!({"Container": "rejected", "Env": {"Y": "1"}, "Reject": "nobody sets Y"}));
        install("60-odd", json!({"Container": "odd", "Cpus": "9999"}));
        install("65-class", json!({"Container": "class", "Blockio": "slow"}));
        install("66-group", json!({"Container": "group", "Rdt": "gold"}));
        install("70-late", json!({"Container": "later"}));
        let node = Node::start(options(""));
        let pod = Pod::run(&node, "p1");
        pod.refused_as("both", "FailedPrecondition", &["\"10-a\" and \"20-b\"", "env \"X\"", "both"], plain);
        pod.refused_as("refused", "FailedPrecondition", &["30-no", "not on a Sunday"], plain);
        pod.refused_as("sysctl", "Unimplemented", &["40-sysctl", "linux.sysctl"], plain);
        pod.refused_as("rejected", "FailedPrecondition", &["50-judge", "nobody sets Y"], plain);
        pod.refused_as("odd", "InvalidArgument", &["cpuset_cpus", "9999"], plain);
        pod.refused_as("class", "FailedPrecondition", &["plugins", "slow", "runtime.blockio_config_file"], plain);
        pod.refused_as("group", "FailedPrecondition", &["plugins", "gold", "/sys/fs/resctrl"], plain);
        // Nothing is left of them, and the next one is made.
        assert_eq!(pod.crictl.json(&["ps", "-a"])["containers"], json!([]));
        assert_eq!(output(&pod, "good", "echo $X$Y ran"), ["ran"]);
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

#[test]
fn a_plugins_class_of_block_io_is_the_containers() {
    isolated("a_plugins_class_of_block_io_is_the_containers", || {
        let disk = support::plant_disk("disk");
        let classes = "Classes:\n  slow: [{Devices: [/dev/shm/disk], ThrottleReadBps: 5Mi}]\n";
        std::fs::write("/tmp/blockio.yaml", classes).expect("a file");
        install("10-class", json!({"Blockio": "slow", "Memory": 64 << 20}));
        let runtime = "blockio_config_file = \"/tmp/blockio.yaml\"\n".to_owned();
        for handler in ["crun", "lxc"] {
            let node = Node::start(Options { handler: handler.into(), runtime: runtime.clone(), ..options("") });
            // A log of its own.
            let pod = Pod::run(&node, handler);
            let files =
                "cat /sys/fs/cgroup/blkio/blkio.throttle.read_bps_device /sys/fs/cgroup/io.max 2> /dev/null; true";
            let lines = output(&pod, "c", files);
            let (v1, v2) = (format!("{disk} 5242880"), format!("{disk} rbps=5242880"));
            assert!(lines.len() == 1 && (lines[0] == v1 || lines[0].starts_with(&v2)), "{handler}: {lines:?}");
            pod.crictl.run(&["rmp", "-f", &pod.id]);
        }
    });
}

#[test]
fn a_handlers_policy_counts_for_what_plugins_set() {
    isolated("a_handlers_policy_counts_for_what_plugins_set", || {
        install("10-much", json!({"Container": "much", "Memory": 1 << 30}));
        let node = Node::start(options("[handlers.crun.policy]\nmax_memory = 134217728"));
        let pod = Pod::run(&node, "p1");
        let asked = json!({"memory_limit_in_bytes": 64 << 20});
        let told = pod.create("much", "true", limited(&asked)).expect_err("refused");
        assert!(told.contains("handlers.crun.policy.max_memory") && told.contains("plugins"), "{told}");
        pod.create("enough", "true", limited(&asked)).expect("created");
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

#[test]
fn one_that_hangs_or_dies_is_missed_by_nobody() {
    isolated("one_that_hangs_or_dies_is_missed_by_nobody", || {
        std::fs::create_dir_all(PLUGINS).expect("a folder");
        let silent = Path::new(PLUGINS).join("05-silent");
        std::fs::write(&silent, "#!/bin/sh\necho $$ > /tmp/nri/silent.pid\nsleep 1000\n").expect("a program");
        std::fs::set_permissions(&silent, std::fs::Permissions::from_mode(0o755)).expect("a mode");
        std::fs::write(Path::new(PLUGINS).join("README"), "not a plugin").expect("a file");
        install("10-hangs", json!({"Hang": "CreateContainer", "Env": {"HUNG": "1"}}));
        install("20-dies", json!({"Die": "CreateContainer", "Env": {"DEAD": "1"}}));
        install("30-stops", json!({"Die": "StopContainer"}));
        install("40-good", json!({"Env": {"GOOD": "1"}}));
        install("50-stuck", json!({"Hang": "Synchronize"}));
        let node = Node::start(options("registration_timeout = \"1s\"\nrequest_timeout = \"700ms\""));
        let pid = std::fs::read_to_string("/tmp/nri/silent.pid").expect("it was started");
        let gone = |pid: &str| !Path::new("/proc").join(pid.trim()).exists();
        wait_for("the end of what did not register", Duration::from_secs(10), || gone(&pid).then_some(()));
        let pod = Pod::run(&node, "p1");
        let script = "echo $HUNG$DEAD$GOOD";
        let first = Instant::now();
        assert_eq!(output(&pod, "c1", script), ["1"]);
        let first = first.elapsed();
        assert!(first < Duration::from_secs(15), "{first:?}");
        assert_eq!(heard("10-hangs").iter().filter(|l| l.starts_with("CreateContainer")).count(), 1);
        assert_eq!(output(&pod, "c2", script), ["1"]);
        // They are not asked again, and their programs are gone.
        assert_eq!(heard("10-hangs").iter().filter(|l| l.starts_with("CreateContainer")).count(), 1);
        wait_for("the end of the programs", Duration::from_secs(10), || {
            let out = Command::new("pgrep").args(["-f", PLUGINS]).output().expect("pgrep");
            (String::from_utf8_lossy(&out.stdout).lines().count() == 1).then_some(())
        });
        hears("40-good", "StopContainer c2");
        pod.crictl.run(&["rmp", "-f", &pod.id]);
        hears("40-good", "RemovePodSandbox p1");
    });
}

#[test]
fn nothing_is_made_without_a_plugin_that_is_required() {
    isolated("nothing_is_made_without_a_plugin_that_is_required", || {
        install("10-hangs", json!({"Hang": "CreateContainer"}));
        let node = Node::start(options("request_timeout = \"700ms\"\nrequired_plugins = [\"hangs\"]"));
        let pod = Pod::run(&node, "p1");
        pod.refused_as("c1", "Unavailable", &["10-hangs", "CreateContainer", "no answer"], plain);
        pod.refused_as("c2", "FailedPrecondition", &["\"hangs\"", "nri.required_plugins"], plain);
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

/// A plugin that connects by itself; dropping it ends it.
struct Connecting(Child);

impl Connecting {
    fn start(name: &str, mut settings: Value) -> Self {
        settings["Log"] = json!(log_of(name));
        let (index, base) = name.split_once('-').expect("NN-NAME");
        let child = Command::new(support::given("LXCRI_NRI_PLUGIN"))
            .args([base, index, &settings.to_string(), "/tmp/nri/run/nri.sock"])
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(format!("/tmp/node/logs/{name}.stderr")).expect("a file"))
            .spawn();
        Self(child.expect("it starts"))
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn plugins_connect_and_are_told_what_there_is() {
    isolated("plugins_connect_and_are_told_what_there_is", || {
        std::fs::create_dir_all("/tmp/nri").expect("a folder");
        let node = Node::start(options("connecting_plugins = true"));
        let mode = std::fs::metadata("/tmp/nri/run/nri.sock").expect("the socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let pod = Pod::run(&node, "p1");
        let id = stays(&pod, "before");
        let plugin = Connecting::start("30-late", json!({"Env": {"LATE": "1"}, "Trigger": "/tmp/nri/trigger"}));
        let told = hears("30-late", "Synchronize");
        assert!(told.contains("pod=p1 container=before CONTAINER_RUNNING"), "{told}");
        assert_eq!(output(&pod, "c1", "echo late$LATE"), ["late1"]);
        std::fs::write("/tmp/nri/trigger", format!("{id} {}\n", 96 << 20)).expect("a file");
        assert_eq!(hears("30-late", "Updated"), "Updated 0 <nil>");
        assert_eq!(limit(&pod, &id), "100663296");
        drop(plugin);
        assert_eq!(output(&pod, "c2", "echo late$LATE"), ["late"]);
        // Another one, and a stranger that says nothing.
        let _silent = std::os::unix::net::UnixStream::connect("/tmp/nri/run/nri.sock").expect("connected");
        let _second = Connecting::start("40-second", json!({"Env": {"LATE": "2"}}));
        hears("40-second", "Synchronize");
        assert_eq!(output(&pod, "c3", "echo late$LATE"), ["late2"]);
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

#[test]
fn without_nri_no_plugin_is_started() {
    isolated("without_nri_no_plugin_is_started", || {
        install("10-first", json!({"Env": {"PLUGGED": "yes"}}));
        let off = options("connecting_plugins = false").more_config.replace("enabled = true", "enabled = false");
        let node = Node::start(Options { more_config: off, ..options("") });
        let pod = Pod::run(&node, "p1");
        assert_eq!(output(&pod, "c", "echo off$PLUGGED"), ["off"]);
        assert!(heard("10-first").is_empty() && !Path::new("/tmp/nri/run").exists());
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

#[test]
fn containers_of_liblxc_take_part() {
    isolated("containers_of_liblxc_take_part", || {
        std::fs::create_dir_all("/tmp/nri/data").expect("a folder");
        std::fs::write("/tmp/nri/data/file", "mounted\n").expect("a file");
        let container = "c";
        install(
            "10-first",
            json!({"Container": container, "Env": {"PLUGGED": "yes"}, "Mounts": {"/plugged": "/tmp/nri/data"}, "Memory": 64 << 20}),
        );
        install("20-hooks", json!({"Container": "hooked", "Hook": "/tmp/nri/state"}));
        let node = Node::start(Options { handler: "lxc".into(), ..options("") });
        let pod = Pod::run(&node, "p1");
        let lines = output(&pod, container, &format!("echo $PLUGGED; cat /plugged/file; {LIMIT}"));
        for line in ["yes", "mounted", "67108864"] {
            assert!(lines.iter().any(|l| l == line), "{line}: {lines:?}");
        }
        hears("10-first", "RunPodSandbox p1 lxc");
        hears("10-first", "PostStartContainer c CONTAINER_RUNNING");
        pod.refused_as("hooked", "Unimplemented", &["hooks", "liblxc"], plain);
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}
