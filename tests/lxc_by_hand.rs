//! `backend lxc ...` with the real liblxc: containers that people make by hand, without pod and daemon.
//!
//! Run by `cargo test --test lxc_by_hand`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // tests call the program and liblxc's own tools

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::{isolated, wait_for};

/// Writes a root file system with Debian's static busybox as everything.
fn busybox_root(at: &Path) {
    for folder in ["bin", "sbin", "etc", "dev", "proc", "sys", "tmp", "root", "run", "var"] {
        std::fs::create_dir_all(at.join(folder)).expect("a folder");
    }
    std::fs::copy("/bin/busybox", at.join("bin/busybox")).expect("busybox");
    for name in ["sh", "sleep", "cat", "id", "pwd", "pidof", "echo", "kill"] {
        std::os::unix::fs::symlink("busybox", at.join("bin").join(name)).expect("a link");
    }
    std::os::unix::fs::symlink("../bin/busybox", at.join("sbin/init")).expect("a link");
    std::fs::write(at.join("etc/inittab"), "::respawn:/bin/sleep 1000\n").expect("inittab");
}

/// The command line beside a daemon, and what containers are made of.
struct Hand {
    node: Node,
    /// A root file system.
    root: String,
    /// A configuration without networks.
    plain: String,
}

impl Hand {
    fn new() -> Self {
        let node = Node::start(Options { handler: "lxc".into(), ..Options::default() });
        let text = |p: PathBuf| p.into_os_string().into_string().expect("UTF-8");
        let root = node.dir.join("root");
        busybox_root(&root);
        let plain = node.dir.join("plain.conf");
        std::fs::write(&plain, "lxc.net.0.type = empty\n").expect("a configuration");
        Self { node, root: text(root), plain: text(plain) }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(support::daemon_program());
        command.args(["backend", "lxc", "--config"]).arg(self.node.dir.join("config.toml")).args(args);
        command
    }

    fn try_run(&self, args: &[&str]) -> (Option<i32>, String) {
        let out = self.command(args).output().expect("the program");
        let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        (out.status.code(), said.trim().to_owned())
    }

    fn good(&self, args: &[&str]) -> String {
        let (code, said) = self.try_run(args);
        assert_eq!(code, Some(0), "{args:?}: {said}");
        said
    }

    fn refused(&self, args: &[&str], words: &str) {
        let (code, said) = self.try_run(args);
        assert!(code == Some(1) && said.contains(words), "{args:?}: {code:?}: {said}");
        assert!(!said.contains("--lxcpath"), "a helper's command line says nothing to whoever asked: {said}");
    }
}

/// The seven verbs on containers that no pod has, and what they refuse.
#[test]
fn containers_made_by_hand() {
    isolated("containers_made_by_hand", || {
        let hand = Hand::new();
        let (node, root, plain) = (&hand.node, hand.root.as_str(), hand.plain.as_str());
        let try_run = |args: &[&str]| hand.try_run(args);
        let good = |args: &[&str]| hand.good(args);
        let refused = |args: &[&str], words: &str| hand.refused(args, words);

        good(&["create", "one", "--root", root, "--file", plain, "--set", "lxc.uts.name=first"]);
        refused(&["create", "one", "--root", root], "there already");
        refused(&["create", "../x", "--root", root], "a name is up to");
        refused(&["create", "two", "--root", "/"], "can't be a container's");
        refused(
            &["create", "two", "--root", root, "--set", "lxc.uts.name=a\nlxc.hook.start = /bin/false"],
            "can't be in",
        );
        refused(&["create", "two", "--root", root, "--set", "lxc.no.such=1"], "refuses");
        refused(&["create", "two"], "--template or --root");
        assert!(good(&["list"]).contains("one") && good(&["info", "one"]).contains("STOPPED"));
        refused(&["exec", "one", "true"], "STOPPED");
        good(&["start", "one"]);
        refused(&["start", "one"], "RUNNING");
        let info: Value = serde_json::from_str(&good(&["info", "one"])).expect("JSON");
        let pid = info["pid"].as_i64().filter(|p| *p > 0).expect("a pid");
        assert!(std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|p| p.ends_with("busybox")));
        // liblxc's own tools see it where it is.
        let mut ls = Command::new("lxc-ls");
        assert!(support::run(ls.arg("-P").arg(node.dir.join("lib/lxc"))).contains("one"));
        assert_eq!(
            good(&[
                "exec",
                "--env",
                "A=b c",
                "one",
                "sh",
                "-c",
                "echo $A; cat /proc/1/comm; cat /proc/sys/kernel/hostname"
            ]),
            "b c\ninit\nfirst"
        );
        assert_eq!(try_run(&["exec", "one", "sh", "-c", "exit 7"]).0, Some(7));
        // Whoever is root in it can reach the program that enters it, and not write into the node's file.
        let mut enters = hand.command(&["exec", "one", "sleep", "4321"]).spawn().expect("the program");
        support::streams::wait_there("sleep 4321");
        let helper = *helpers("attach").first().expect("the helper");
        let mount = rustix::fs::statvfs(format!("/proc/{helper}/exe")).expect("its program's mount");
        assert!(mount.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
        for pid in support::streams::pids_of("sleep 4321") {
            kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("kill");
        }
        assert_eq!(enters.wait().expect("its end").code(), Some(137));
        assert_eq!(try_run(&["exec", "one", "sh", "-c", "kill -9 $$"]).0, Some(137));
        let (code, said) = try_run(&["exec", "one", "/no/such"]);
        assert!(code == Some(127) && said.contains("/no/such"), "{said}");
        refused(&["delete", "one"], "stop it first");

        // A pod's containers are seen, and nobody else's to touch.
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let id = crictl.create(&pod, "p", "c", BUSYBOX, "exec sleep 1000");
        crictl.run(&["start", &id]);
        let list = good(&["list"]);
        assert!(list.lines().any(|l| l.contains(&id) && l.contains("RUNNING") && l.contains("a pod")), "{list}");
        for verb in ["start", "stop", "delete"] {
            refused(&[verb, &id], "is a pod's");
        }
        refused(&["exec", &id, "true"], "is a pod's");
        refused(&["create", &id, "--root", root], "a pod's container has the name");
        crictl.run(&["rmp", "-f", &pod]);

        good(&["stop", "--timeout", "20", "one"]);
        good(&["stop", "one"]);
        let kept = node.dir.join("lib/lxc/one/snaps/snap0");
        std::fs::create_dir_all(&kept).expect("a snapshot");
        refused(&["delete", "one"], "snaps is not empty");
        assert!(good(&["info", "one"]).contains("STOPPED"), "half of it is gone");
        std::fs::remove_dir(&kept).expect("removed");
        good(&["delete", "one"]);
        refused(&["info", "one"], "there is none");
        assert!(Path::new(root).join("bin/busybox").exists(), "a root file system that was not ours is gone");

        // Nor does liblxc's own tool take it away.
        good(&["create", "two", "--root", root, "--file", plain]);
        support::run(Command::new("lxc-destroy").arg("-P").arg(node.dir.join("lib/lxc")).args(["-n", "two"]));
        assert!(Path::new(root).join("bin/busybox").exists(), "lxc-destroy removed what was not the container's");

        // By a template: its root file system goes with it.
        good(&["create", "made", "--template", "busybox", "--file", plain]);
        let made = node.dir.join("lib/lxc/made/rootfs");
        assert!(made.join("bin").is_dir());
        good(&["start", "made"]);
        assert_eq!(good(&["exec", "made", "echo", "inside"]), "inside");
        good(&["delete", "--force", "made"]);
        assert!(!node.dir.join("lib/lxc/made").exists());
        let locks = Path::new("/run/lxc/lock").join(node.dir.join("lib/lxc").strip_prefix("/").expect("a full path"));
        let locks: Vec<_> =
            std::fs::read_dir(&locks).expect("liblxc's locks").flatten().map(|e| e.file_name()).collect();
        assert_eq!(locks, [".two"], "locks of containers that are gone; two was removed by liblxc's own tool");
        refused(&["create", "bad", "--template", "no-such-template", "--file", plain], "failed");
    });
}

/// The same as a library, without a daemon.
#[test]
fn containers_made_by_a_library_call() {
    isolated("containers_made_by_a_library_call", || {
        use proxmox_lxcri::backends::lxc::LxcConfig;
        use proxmox_lxcri::backends::lxc::by_hand::{ByHand, New, Source};

        let dir = std::path::PathBuf::from("/tmp/by-hand");
        let root = dir.join("root");
        busybox_root(&root);
        let path = |p: &Path| camino::Utf8PathBuf::from_path_buf(p.to_owned()).expect("UTF-8");
        let config = LxcConfig {
            helper: path(&support::given("LXCRI_LXC")),
            init: path(&support::given("LXCRI_LXC_INIT")),
            library: String::new(),
            timeout: Duration::from_secs(30),
            holders: "proxmox-lxcri-lxc".into(),
        };
        let containers = ByHand::new(config, &path(&dir.join("lib")), &path(&dir.join("run")));
        support::client::block_on(async {
            let new = New {
                name: "one".into(),
                source: Source::Root(path(&root)),
                config: None,
                set: vec![("lxc.net.0.type".into(), "empty".into())],
            };
            containers.create(&new).await.expect("create");
            containers.create(&new).await.expect_err("it is there");
            containers.start("one").await.expect("start");
            let list = containers.list().await.expect("list");
            assert!(list.len() == 1 && list[0].state == "RUNNING" && !list[0].of_pod, "{list:?}");
            let command = ["sh", "-c", "echo $A; exit 3"].map(String::from);
            let (program, arguments) = containers.exec("one", &command, &["A=b".into()]).await.expect("exec");
            let out = Command::new(program).args(arguments).output().expect("the helper");
            assert_eq!((out.status.code(), &*out.stdout), (Some(3), &b"b\n"[..]), "{}", support::describe(&out));
            containers.stop("one", Duration::from_secs(10)).await.expect("stop");
            assert_eq!(containers.info("one").await.expect("info").state, "STOPPED");
            containers.delete("one", false).await.expect("delete");
            containers.info("one").await.expect_err("it is gone");
            // One that could not be made leaves nothing, and its name is free.
            let bad = New { set: vec![("lxc.no.such".into(), "1".into())], ..new.clone() };
            containers.create(&bad).await.expect_err("no such key");
            assert!(!dir.join("lib/lxc/one").exists());
        });
        assert!(root.join("bin/busybox").exists());
    });
}

/// A folder that is somebody's own stays, whatever the container's configuration says of it.
#[test]
fn nothing_takes_a_root_file_system_of_ones_own_away() {
    isolated("nothing_takes_a_root_file_system_of_ones_own_away", || {
        let hand = Hand::new();
        let root = hand.root.as_str();
        for line in ["lxc.ephemeral=1", "lxc.rootfs.managed=1", "lxc.rootfs.path=dir:/tmp", " lxc.ephemeral = 1"] {
            hand.refused(&["create", "one", "--root", root, "--set", line], "own");
        }
        for folder in ["lib/lxc", "lib", "run/lxc"] {
            let folder = hand.node.dir.join(folder);
            let folder = folder.to_str().expect("UTF-8");
            std::fs::create_dir_all(folder).expect("a folder");
            hand.refused(&["create", "one", "--root", folder], "containers are kept in");
        }
        // Files say it as well, now or later.
        let (file, included) = (hand.node.dir.join("file.conf"), hand.node.dir.join("included.conf"));
        std::fs::write(&included, "").expect("a file");
        let text = format!(
            "lxc.net.0.type = empty\nlxc.ephemeral = 1\nlxc.rootfs.managed = 1\nlxc.include = {}\n",
            included.display()
        );
        std::fs::write(&file, text).expect("a file");
        hand.good(&["create", "one", "--root", root, "--file", file.to_str().expect("UTF-8")]);
        std::fs::write(&included, "lxc.ephemeral = 1\nlxc.rootfs.managed = 1\n").expect("a file");
        hand.good(&["start", "one"]);
        hand.good(&["stop", "--timeout", "0", "one"]);
        assert!(hand.good(&["info", "one"]).contains("STOPPED"));
        hand.good(&["delete", "one"]);
        assert!(Path::new(root).join("bin/busybox").exists());

        // Made by liblxc's own tools, and unmanaged: nothing is removed half, and nothing called done that is not.
        hand.good(&["create", "two", "--template", "busybox", "--file", &hand.plain]);
        let folder = hand.node.dir.join("lib/lxc/two");
        let mut config = std::fs::read_to_string(folder.join("config")).expect("its configuration");
        config.push_str("lxc.rootfs.managed = 0\n");
        std::fs::write(folder.join("config"), config).expect("its configuration");
        hand.refused(&["delete", "two"], "rootfs is not empty");
        assert!(folder.join("rootfs/bin").is_dir() && hand.good(&["info", "two"]).contains("STOPPED"));
        std::fs::rename(folder.join("rootfs"), hand.node.dir.join("elsewhere")).expect("moved");
        hand.good(&["delete", "two"]);
        assert!(!folder.exists());
    });
}

/// A template writes where it has made a folder itself, and `delete` removes what it has made.
#[test]
fn a_template_takes_nobodys_folder() {
    isolated("a_template_takes_nobodys_folder", || {
        let hand = Hand::new();
        let precious = hand.node.dir.join("precious");
        std::fs::create_dir_all(&precious).expect("a folder");
        std::fs::write(precious.join("letters"), "mine").expect("a file");
        let whole = || {
            let names = std::fs::read_dir(&precious).expect("it is there").map(|e| e.expect("an entry").file_name());
            names.collect::<Vec<_>>() == ["letters"]
        };
        let line = format!("lxc.rootfs.path = dir:{}\n", precious.display());
        let file = hand.node.dir.join("with-root.conf");
        std::fs::write(&file, format!("lxc.net.0.type = empty\n{line}")).expect("a file");
        let file = file.to_str().expect("UTF-8");
        hand.refused(&["create", "x", "--template", "busybox", "--file", file], "lxc.rootfs.path");
        let set = format!("lxc.rootfs.path=dir:{}", precious.display());
        hand.refused(
            &["create", "x", "--template", "busybox", "--file", &hand.plain, "--set", &set],
            "lxc.rootfs.path",
        );
        assert!(whole() && !hand.node.dir.join("lib/lxc/x").exists());
        // As another container is.
        hand.good(&["create", "one", "--root", &hand.root, "--file", &hand.plain]);
        let ones = hand.node.dir.join("lib/lxc/one/config");
        hand.refused(
            &["create", "two", "--template", "busybox", "--file", ones.to_str().expect("UTF-8")],
            "lxc.rootfs.path",
        );
        hand.good(&["delete", "one"]);
        // Written into its configuration later.
        hand.good(&["create", "two", "--template", "busybox", "--file", &hand.plain]);
        let config = hand.node.dir.join("lib/lxc/two/config");
        let before = std::fs::read_to_string(&config).expect("its configuration");
        std::fs::write(&config, format!("{before}{line}")).expect("its configuration");
        hand.refused(&["delete", "two"], "not in the container's folder");
        assert!(whole());
        std::fs::write(&config, before).expect("its configuration");
        hand.good(&["delete", "two"]);
        assert!(whole() && !hand.node.dir.join("lib/lxc/two").exists());
    });
}

/// A configuration that was cut or damaged has no root file system, and liblxc would take the node's own: its mounts would become
/// private, with which no pod can be made.
#[test]
fn a_damaged_configuration_never_runs_on_the_nodes_root() {
    isolated("a_damaged_configuration_never_runs_on_the_nodes_root", || {
        let hand = Hand::new();
        support::run(Command::new("mount").args(["--make-rshared", "/"]));
        let shared = || support::run(Command::new("findmnt").args(["-n", "-o", "PROPAGATION", "/"]));
        hand.good(&["create", "one", "--root", &hand.root, "--file", &hand.plain]);
        let config = hand.node.dir.join("lib/lxc/one/config");
        let whole = std::fs::read_to_string(&config).expect("the configuration");
        for cut in ["", "garbage\n", "lxc.console.path = none\n"] {
            std::fs::write(&config, cut).expect("written");
            hand.refused(&["start", "one"], "lxc.rootfs.path");
            assert_eq!(shared().trim(), "shared", "with {cut:?}");
        }
        std::fs::write(&config, whole.replace(&hand.root, "/tmp")).expect("written");
        hand.refused(&["start", "one"], "it was made with");
        std::fs::write(&config, whole).expect("written");
        hand.good(&["start", "one"]);
        // What the user says of the PATH is what counts.
        let said = hand.good(&["exec", "--env", "PATH=/bin:/x", "one", "sh", "-c", "echo $PATH"]);
        assert_eq!(said, "/bin:/x");
        // Whose streams are the node's null device.
        let mode =
            || std::fs::metadata("/dev/null").map(|m| std::os::unix::fs::MetadataExt::mode(&m) & 0o777).expect("there");
        let before = mode();
        let mut command = hand.command(&["exec", "one", "sh", "-c", "chmod 600 /proc/self/fd/0"]);
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().expect("the program");
        let after = mode();
        support::run(Command::new("chmod").args([&format!("{before:o}"), "/dev/null"]));
        assert!(status.success() && after == before, "{status}, {before:o}, {after:o}");
        hand.good(&["delete", "--force", "one"]);

        // A full disk while one is made.
        let small = hand.node.dir.join("lib/lxc");
        support::run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(&small));
        std::fs::write(small.join("fill"), vec![0; 60 << 10]).expect("most of it");
        let (code, said) = hand.try_run(&["create", "two", "--root", &hand.root, "--file", &hand.plain]);
        if code == Some(0) {
            hand.good(&["start", "two"]);
        } else {
            assert!(said.contains("No space left"), "{said}");
            assert!(!small.join("two").exists(), "{said}");
        }
        std::fs::remove_file(small.join("fill")).expect("room");
        if code != Some(0) {
            hand.good(&["create", "two", "--root", &hand.root, "--file", &hand.plain]);
        }
        hand.good(&["delete", "--force", "two"]);
        support::run(Command::new("umount").arg(&small));
    });
}

#[test]
fn an_init_that_reboots_is_stopped_and_an_interrupt_ends_all() {
    isolated("an_init_that_reboots_is_stopped_and_an_interrupt_ends_all", || {
        let hand = Hand::new();
        // Busybox's init reboots on SIGTERM.
        let root = hand.root.as_str();
        hand.good(&["create", "one", "--root", root, "--file", &hand.plain, "--set", "lxc.signal.halt=SIGTERM"]);
        hand.good(&["start", "one"]);
        hand.good(&["exec", "one", "sh", "-c", "while ! pidof sleep; do sleep 0.05; done"]);
        hand.good(&["stop", "--timeout", "20", "one"]);
        std::thread::sleep(Duration::from_millis(500));
        assert!(hand.good(&["info", "one"]).contains("STOPPED"), "it was started again");

        let template = hand.node.dir.join("slow");
        std::fs::write(&template, "#!/bin/sh\nsleep 4322\n").expect("a template");
        support::run(Command::new("chmod").arg("755").arg(&template));
        let template = template.to_str().expect("UTF-8");
        let interrupted = |args: &[&str], signal: Signal, there: &dyn Fn() -> bool| {
            let mut command = hand.command(args);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program");
            wait_for("its work", Duration::from_secs(20), || there().then_some(()));
            let begun = Instant::now();
            kill_process(Pid::from_child(&child), signal).expect("kill");
            assert_eq!(child.wait().expect("its end").code(), Some(1));
            assert!(begun.elapsed() < Duration::from_secs(5));
        };
        let sleeps = || !support::streams::pids_of("sleep 4322").is_empty();
        interrupted(&["create", "two", "--template", template, "--file", &hand.plain], Signal::INT, &sleeps);
        wait_for("the template's end", Duration::from_secs(5), || (!sleeps()).then_some(()));
        hand.good(&["delete", "two"]);

        // One whose init does not listen.
        hand.good(&["create", "deaf", "--root", root, "--file", &hand.plain, "--set", "lxc.signal.halt=SIGCONT"]);
        hand.good(&["start", "deaf"]);
        interrupted(&["stop", "--timeout", "600", "deaf"], Signal::TERM, &|| !helpers("halt").is_empty());
        wait_for("the helper's end", Duration::from_secs(5), || helpers("halt").is_empty().then_some(()));
        assert!(hand.good(&["info", "deaf"]).contains("RUNNING"));
        hand.good(&["delete", "--force", "deaf"]);
        let logs = std::fs::read_dir("/run").expect("/run").flatten();
        let logs: Vec<_> = logs.map(|e| e.file_name()).filter(|n| n.as_encoded_bytes().ends_with(b".log")).collect();
        assert!(logs.is_empty(), "{logs:?}");
    });
}

/// Whoever ends `exec` ends the command; and a container whose process does not answer hides no other.
#[test]
fn an_exec_ends_with_its_caller_and_a_silent_container_hides_none() {
    isolated("an_exec_ends_with_its_caller_and_a_silent_container_hides_none", || {
        let hand = Hand::new();
        for name in ["one", "two"] {
            hand.good(&["create", name, "--root", &hand.root, "--file", &hand.plain, "--set", "lxc.uts.name = x"]);
            hand.good(&["start", name]);
        }
        let exec = |args: &[&str], line: &str| {
            let mut command = hand.command(&[&["exec", "one"], args].concat());
            let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the program");
            support::streams::wait_there(line);
            child
        };
        let mut child = exec(&["sleep", "777"], "sleep 777");
        kill_process(Pid::from_child(&child), Signal::TERM).expect("kill");
        assert_eq!(child.wait().expect("its end").code(), Some(143));
        support::streams::wait_gone("sleep 777");
        // What the command makes of it is its own affair.
        let child =
            exec(&["sh", "-c", "trap 'echo heard; exit 5' TERM; sleep 776 >/dev/null 2>&1 & wait"], "sleep 776");
        kill_process(Pid::from_child(&child), Signal::TERM).expect("kill");
        let out = child.wait_with_output().expect("its end");
        assert_eq!((out.status.code(), &*out.stdout), (Some(5), &b"heard\n"[..]));
        let mut child = exec(&["sleep", "775"], "sleep 775");
        kill_process(Pid::from_child(&child), Signal::KILL).expect("kill");
        child.wait().expect("its end");
        support::streams::wait_gone("sleep 775");
        assert_eq!(hand.good(&["exec", "--env", "TERM=dumb", "one", "sh", "-c", "echo $TERM"]), "dumb");

        let title = format!("[lxc monitor] {} one", hand.node.dir.join("lib/lxc").display());
        let is_it = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|b| *b == 0).next() == Some(title.as_bytes())
        };
        let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
        let monitor = pids.filter_map(|e| e.file_name().to_str()?.parse().ok()).find(is_it).expect("its monitor");
        let monitor = Pid::from_raw(monitor).expect("a pid");
        kill_process(monitor, Signal::STOP).expect("stop");
        let begun = Instant::now();
        let list = hand.good(&["list"]);
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        let state = |list: &str, name: &str| {
            let line = list.lines().find(|l| l.split_whitespace().next() == Some(name)).expect("a line").to_owned();
            line.split_whitespace().nth(1).map(str::to_owned)
        };
        assert_eq!(state(&list, "one").as_deref(), Some("UNKNOWN"), "{list}");
        assert_eq!(state(&list, "two").as_deref(), Some("RUNNING"), "{list}");
        hand.refused(&["exec", "one", "true"], "UNKNOWN");
        kill_process(monitor, Signal::CONT).expect("go on");
        assert_eq!(state(&hand.good(&["list"]), "one").as_deref(), Some("RUNNING"));
        for name in ["one", "two"] {
            hand.good(&["delete", "--force", name]);
        }
    });
}

/// Two that make one of the same name at once: one of them has it, and it starts.
#[test]
fn two_makers_of_one_name() {
    isolated("two_makers_of_one_name", || {
        let hand = Hand::new();
        let other = hand.node.dir.join("other");
        busybox_root(&other);
        let other = other.to_str().expect("UTF-8");
        for _ in 0..5 {
            let make = |root: &str| {
                let mut command = hand.command(&["create", "one", "--root", root, "--file", &hand.plain]);
                command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program")
            };
            let mut both = [make(&hand.root), make(other)];
            let codes: Vec<_> = both.iter_mut().map(|c| c.wait().expect("its end").code()).collect();
            assert!(codes.contains(&Some(0)) && codes.contains(&Some(1)), "{codes:?}");
            hand.good(&["start", "one"]);
            hand.good(&["delete", "--force", "one"]);
        }
    });
}

/// Pids of the helper at one of its verbs.
fn helpers(verb: &str) -> Vec<i32> {
    let lxc = support::given("LXCRI_LXC");
    let runs = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).nth(1) == Some(verb.as_bytes()) && line.starts_with(lxc.as_os_str().as_encoded_bytes())
    };
    let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
    pids.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(runs).collect()
}
