//! Ways out of a container that have worked on some runtime or other, tried on this one: leaked descriptors, the runtime's
//! own program, mounts through links that change, log paths, hostile images, names and paths.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod images_support;
mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use images_support::{Item, build, layer, write_layout};
use proxmox_lxcri::integrations::layers::pipeline::digest_of;
use serde_json::{Value, json};
use support::crictl::{BUSYBOX, read_log};
use support::node::{Node, Options};
use support::pod::Pod;
use support::{isolated, wait_for};
use tar::EntryType;

/// What nothing in a container may ever read.
const MARKER: &str = "only-the-node-may-read-this";

/// A pod on a node that has the marker.
fn pod_on(node: &Node) -> Pod {
    std::fs::create_dir_all("/tmp/node/outside").unwrap();
    std::fs::write("/tmp/node/outside/marker", MARKER).unwrap();
    Pod::run(node, "p")
}

/// These keys instead of a configuration's own.
fn with(keys: &Value) -> impl FnOnce(&mut Value) {
    move |config| config.as_object_mut().unwrap().extend(keys.as_object().cloned().unwrap_or_default())
}

/// Runs it to its end if it can be: all that it and crictl said.
fn outcome(pod: &Pod, name: &str, script: &str, change: &Value) -> String {
    let id = match pod.create(name, script, with(change)) {
        Ok(id) => id,
        Err(text) => return text,
    };
    let (started, text) = pod.crictl.try_run(&["start", &id]);
    if started { pod.ended(name, &id).1.join("\n") } else { text }
}

#[track_caller]
fn refused(pod: &Pod, code: &str, word: &str, change: &Value) {
    let started = Instant::now();
    pod.refused(code, &[word], with(change));
    assert!(started.elapsed() < Duration::from_secs(30), "{word:?}: {:?}", started.elapsed());
}

/// Leaked descriptors of the node (as in CVE-2024-21626): by the working folder of a container, of an exec whose folder
/// was replaced, and as they are.
#[test]
fn no_descriptor_of_the_node_is_left() {
    isolated("no_descriptor_of_the_node_is_left", || {
        let node = Node::start(Options::default());
        let pod = pod_on(&node);
        let look = "for up in . .. ../.. ../../.. ../../../.. ../../../../../../../..; do \
                    cat /proc/self/cwd/$up/tmp/node/outside/marker /proc/self/cwd/$up/outside/marker $up/marker 2> /dev/null; done; \
                    ls -l /proc/1/fd | sed -n 's/.*-> //p'";
        for n in 3..12 {
            let said = outcome(&pod, &format!("cwd-{n}"), look, &json!({"working_dir": format!("/proc/self/fd/{n}")}));
            assert!(!said.contains(MARKER), "descriptor {n}: {said}");
        }
        let id = pod.create("inside", "while sleep 1; do :; done", with(&json!({"working_dir": "/work"}))).unwrap();
        pod.crictl.run(&["start", &id]);
        let exec = |script: &str| pod.crictl.try_run(&["exec", "-s", &id, "/bin/sh", "-c", script]);
        for n in 3..12 {
            let link = format!("cd /; rmdir /work 2> /dev/null; rm -f /work; ln -s /proc/self/fd/{n} /work");
            // The exec's own folder is the link that the last one has left.
            let (_, said) = exec(&format!("{look}; {link}"));
            assert!(!said.contains(MARKER), "descriptor {n}: {said}");
        }
        // The three streams, and the pipe or folder that `ls` itself has.
        let fresh = pod.create("fresh", "while sleep 1; do :; done", with(&json!({}))).unwrap();
        pod.crictl.run(&["start", &fresh]);
        let said = pod.crictl.run(&["exec", "-s", &fresh, "/bin/sh", "-c", "ls /proc/1/fd; echo; ls /proc/self/fd"]);
        let numbers: Vec<u32> = said.split_whitespace().map(|n| n.parse().unwrap()).collect();
        assert!(numbers.iter().all(|n| *n <= 3), "{said}");
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

/// A socket of no file belongs to a network namespace: whoever is root in the node's could connect (as in CVE-2020-15257).
#[test]
fn nothing_of_the_runtime_listens_in_the_nodes_network() {
    isolated("nothing_of_the_runtime_listens_in_the_nodes_network", || {
        let node = Node::start(Options::default());
        let pod = pod_on(&node);
        let id = pod.create("c", "while sleep 1; do :; done", with(&json!({}))).unwrap();
        pod.crictl.run(&["start", &id]);
        let exec = pod.crictl.run(&["exec", "-s", &id, "/bin/sh", "-c", "echo still entered"]);
        assert!(exec.contains("still entered"), "{exec}");
        let all = std::fs::read_to_string("/proc/net/unix").unwrap();
        let names = all.lines().filter_map(|l| l.split_whitespace().nth(7));
        let dir = node.dir.display().to_string();
        let ours: Vec<&str> =
            names.filter(|n| n.starts_with('@') && (n.contains(&dir) || n.ends_with("/command"))).collect();
        assert!(ours.is_empty(), "{ours:?}");
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

/// The node's /dev/null, which is put back as it was whatever a container has done to it.
struct NodesNull(u32, u32, u32);

impl NodesNull {
    fn as_it_is() -> (u32, u32, u32) {
        let null = std::fs::metadata("/dev/null").unwrap();
        (null.mode() & 0o7777, null.uid(), null.gid())
    }

    fn assert_unchanged(&self, after: &str) {
        assert_eq!(Self::as_it_is(), (self.0, self.1, self.2), "the node's /dev/null after {after}");
    }
}

impl Drop for NodesNull {
    fn drop(&mut self) {
        let _ = Command::new("chown").arg(format!("{}:{}", self.1, self.2)).arg("/dev/null").status();
        let _ = Command::new("chmod").arg(format!("{:o}", self.0)).arg("/dev/null").status();
    }
}

#[test]
fn the_nodes_null_device_is_nobodys_to_change() {
    isolated("the_nodes_null_device_is_nobodys_to_change", || {
        let node = Node::start(Options::default());
        let pod = pod_on(&node);
        let (mode, uid, gid) = NodesNull::as_it_is();
        let null = NodesNull(mode, uid, gid);
        // As a stream, and as what a masked path shows.
        let script = "chmod 600 /proc/self/fd/0; chown 55 /proc/self/fd/0; chmod 641 /proc/keys; chown 55 /proc/keys; echo tried";
        let masked = json!({"linux": {"security_context": {"masked_paths": ["/proc/keys"]}}});
        let said = outcome(&pod, "chmod", script, &masked);
        assert!(said.contains("tried"), "{said}");
        null.assert_unchanged("chmod of a stream and a masked path");
        // A user of its own, whose streams the runtime gives to it.
        let user =
            json!({"linux": {"security_context": {"run_as_user": {"value": 1000}, "run_as_group": {"value": 1000}}}});
        assert!(outcome(&pod, "user", "echo tried", &user).contains("tried"));
        null.assert_unchanged("a user of its own");
        // Something else at its place, from the start and later, and execs then.
        std::fs::write("/tmp/node/outside/file", "").unwrap();
        let mount = json!({"mounts": [{"container_path": "/dev/null", "host_path": "/tmp/node/outside/file"}]});
        for (name, script, change) in
            [("mounted", "sleep 1000", mount), ("replaced", "rm /dev/null; echo x > /dev/null; sleep 1000", json!({}))]
        {
            let id = pod.create(name, script, with(&change)).unwrap();
            pod.crictl.run(&["start", &id]);
            null.assert_unchanged(name);
            pod.crictl.run(&["exec", "-s", &id, "true"]);
            pod.crictl.run(&["exec", &id, "chmod", "600", "/proc/self/fd/0"]);
            null.assert_unchanged("an exec there");
            pod.crictl.run(&["rm", "-f", &id]);
        }
    });
}

#[test]
fn what_is_mounted_over_proc_gets_no_label_and_no_score() {
    isolated("what_is_mounted_over_proc_gets_no_label_and_no_score", || {
        let node = Node::start(Options::default());
        let pod = pod_on(&node);
        std::fs::write("/tmp/node/outside/oom", "orig").unwrap();
        let over = json!({
            "mounts": [{"container_path": "/proc/1/oom_score_adj", "host_path": "/tmp/node/outside/oom"}],
            "linux": {"resources": {"oom_score_adj": 777}, "security_context": {"namespace_options": {"pid": 1}}},
        });
        // Refused, or set where it belongs: never told to a volume.
        outcome(&pod, "over", "echo ran", &over);
        assert_eq!(std::fs::read_to_string("/tmp/node/outside/oom").unwrap(), "orig");
    });
}

/// Writing to the runtime's program while it enters a container (as in CVE-2019-5736).
#[test]
fn the_runtimes_programs_can_not_be_replaced() {
    isolated("the_runtimes_programs_can_not_be_replaced", || {
        let node = Node::start(Options::default());
        let pod = pod_on(&node);
        let ours = ["LXCRI_MONITOR", "LXCRI_BIN", "LXCRI_LXC", "LXCRI_LXC_INIT"].map(support::given);
        let programs: Vec<_> = ours.into_iter().chain(["/usr/bin/crun".into()]).collect();
        let state = || -> Vec<_> {
            let of = |path: &std::path::PathBuf| {
                let meta = std::fs::metadata(path).unwrap();
                (digest_of(&std::fs::read(path).unwrap()), meta.mtime(), meta.mtime_nsec(), meta.mode())
            };
            programs.iter().map(of).collect()
        };
        let before = state();
        // Whoever shows up in the container has its program opened for writing, by name and by a descriptor kept.
        let script = "while :; do for p in /proc/[0-9]*; do [ $p = /proc/1 ] || [ $p = /proc/$$ ] || \
                      { exec 9< $p/exe && echo evil >> /proc/self/fd/9; echo evil >> $p/exe; } 2> /dev/null; done; done";
        let all = json!({"linux": {"security_context": {"namespace_options": {"pid": 1}, "capabilities": {"add_capabilities": ["ALL"]}}}});
        let id = pod.create("writer", script, with(&all)).unwrap();
        pod.crictl.run(&["start", &id]);
        for n in 0..8 {
            // The program itself, as the exec's: then it is what the container's processes see for longest.
            let command = if n % 2 == 0 { "/proc/self/exe" } else { "/bin/true" };
            let _ = pod.crictl.try_run(&["exec", "-s", &id, command]);
        }
        let swapped = pod.create("linked", "", with(&json!({"command": ["/proc/self/exe"], "args": ["--version"]})));
        if let Ok(id) = swapped {
            let _ = pod.crictl.try_run(&["start", &id]);
        }
        assert_eq!(state(), before);
        // It still does its work.
        assert_eq!(outcome(&pod, "after", "echo fine", &json!({})), "fine");
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

/// Destinations of mounts that go through a link in a volume, which leads out and changes all the time.
#[test]
fn mounts_land_inside_whatever_links_do() {
    isolated("mounts_land_inside_whatever_links_do", || {
        let node = Node::start(Options::default());
        let pod = pod_on(&node);
        let volume = Path::new("/tmp/node/volume");
        std::fs::create_dir_all(volume.join("folder")).unwrap();
        symlink("/tmp/node/outside", volume.join("link")).unwrap();
        symlink("../../../../../../tmp/node/outside", volume.join("up")).unwrap();
        std::fs::create_dir_all("/tmp/node/source").unwrap();
        let mounted = |destination: &str| {
            json!({"mounts": [
                {"host_path": volume, "container_path": "/vol"},
                {"host_path": "/tmp/node/source", "container_path": destination},
            ]})
        };
        let outside = || -> Vec<String> {
            let names = std::fs::read_dir("/tmp/node/outside").unwrap();
            let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        for (n, destination) in ["/vol/link/in", "/vol/up/in", "/vol/link", "/vol/link/../in2"].iter().enumerate() {
            let said = outcome(
                &pod,
                &format!("still-{n}"),
                "cat /vol/link/marker /vol/up/marker /marker",
                &mounted(destination),
            );
            assert!(!said.contains(MARKER), "{destination}: {said}");
            assert_eq!(outside(), ["marker"], "{destination}");
        }
        // Exchanged as fast as the kernel can.
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                let (a, b) = (volume.join("folder"), volume.join("link"));
                while !stop.load(Ordering::Relaxed) {
                    rustix::fs::renameat_with(rustix::fs::CWD, &a, rustix::fs::CWD, &b, flags).unwrap();
                }
            });
            for n in 0..6 {
                let said = outcome(
                    &pod,
                    &format!("race-{n}"),
                    "cat /vol/*/marker /vol/link/in/marker",
                    &mounted("/vol/link/in"),
                );
                assert!(!said.contains(MARKER), "{said}");
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(outside(), ["marker"]);
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains("/tmp/node/outside"), "{mounts}");
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

/// A container with the node's log folder puts a link, a FIFO or a device where a log is to be.
#[test]
fn logs_are_not_written_through_links() {
    isolated("logs_are_not_written_through_links", || {
        let node = Node::start(Options::default());
        let pod = pod_on(&node);
        let target = Path::new("/tmp/node/outside/marker");
        std::fs::create_dir_all(&pod.logs).unwrap();
        symlink(target, pod.logs.join("link.log")).unwrap();
        symlink("/tmp/node/outside", pod.logs.join("folder")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, pod.logs.join("fifo.log"), rustix::fs::Mode::RUSR).unwrap();
        for path in ["link.log", "folder/marker", "folder/new.log", "fifo.log"] {
            let started = Instant::now();
            let said = outcome(
                &pod,
                "writes",
                "echo escaped",
                &json!({"log_path": path, "metadata": {"name": path, "attempt": 1}}),
            );
            assert!(said.contains("code = "), "{path}: {said}");
            assert!(started.elapsed() < Duration::from_secs(30), "{path}");
        }
        // While it runs: the log is replaced and rotated.
        let script = "while :; do echo escaped; sleep 0.1; done";
        let id = pod.create("rotated", script, with(&json!({}))).unwrap();
        pod.crictl.run(&["start", &id]);
        let log = pod.logs.join("rotated/0.log");
        wait_for("the first line", Duration::from_secs(30), || (!read_log(&log).is_empty()).then_some(()));
        std::fs::rename(&log, pod.logs.join("rotated/0.log.old")).unwrap();
        symlink(target, &log).unwrap();
        let (reopened, said) = pod.crictl.try_run(&["logs", "-r", &id]);
        assert!(!reopened, "{said}");
        std::fs::remove_file(&log).unwrap();
        let (reopened, said) = pod.crictl.try_run(&["logs", "-r", &id]);
        assert!(reopened, "{said}");
        wait_for("lines in the new log", Duration::from_secs(30), || (!read_log(&log).is_empty()).then_some(()));
        assert_eq!(std::fs::read_to_string(target).unwrap(), MARKER);
        assert_eq!(std::fs::read_dir("/tmp/node/outside").unwrap().count(), 1);
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

/// Images whose files are not what they seem: nothing hangs, no device is opened, nothing of the node is read.
#[test]
fn hostile_images_are_refused_by_name() {
    isolated("hostile_images_are_refused_by_name", || {
        let node = Node::start(Options::default());
        let pod = pod_on(&node);
        let device = |major, minor| {
            let mut item = Item::new(EntryType::Char, "etc/passwd", 0o666);
            item.header.set_device_major(major).unwrap();
            item.header.set_device_minor(minor).unwrap();
            item
        };
        let huge = vec![b'x'; 8 << 20];
        let images: BTreeMap<&str, Vec<Item>> = BTreeMap::from([
            ("fifo", vec![Item::new(EntryType::Fifo, "etc/passwd", 0o644)]),
            ("zero", vec![device(1, 5)]),
            ("tty", vec![device(5, 0)]),
            ("huge", vec![Item::file("etc/passwd", &huge)]),
            ("folder", vec![Item::dir("etc/passwd")]),
            ("loop", vec![Item::symlink("etc/passwd", "passwd")]),
            ("shadow", vec![Item::symlink("etc/passwd", "../../../../../../tmp/node/outside/passwd")]),
            (
                "links",
                vec![
                    Item::symlink("absolute", "/tmp/node/outside"),
                    Item::symlink("up", "../../../../../../tmp/node/outside"),
                    Item::symlink("magic", "/proc/self/root/tmp"),
                ],
            ),
        ]);
        std::fs::write("/tmp/node/outside/passwd", "spy:x:4242:4242::/:/bin/sh\n").unwrap();
        for (name, items) in &images {
            let layout = Path::new("/tmp/node/layouts").join(name);
            std::fs::create_dir_all(&layout).unwrap();
            write_layout(&layout, &[(build(&[layer(items)], "amd64", false), None)]);
            let source = format!("oci:{}", layout.display());
            let name = format!("hostile.test/{name}:1");
            support::run(
                Command::new(support::given("LXCRI_BIN"))
                    .arg("--config")
                    .arg(node.dir.join("config.toml"))
                    .args(["pull", &source, "--as", &name]),
            );
        }
        let of = |name: &str| json!({"image": {"image": format!("hostile.test/{name}:1")}});
        for name in ["fifo", "zero", "tty", "huge", "folder"] {
            refused(&pod, "InvalidArgument", "etc/passwd", &of(name));
        }
        let text = pod.create("loop", "true", with(&of("loop"))).expect_err("a loop");
        assert!(text.contains("etc/passwd"), "{text}");
        // Inside there is no such file, so nobody of that name.
        let mut spy = of("shadow");
        spy["linux"] = json!({"security_context": {"run_as_username": "spy", "namespace_options": {"pid": 1}}});
        refused(&pod, "InvalidArgument", "spy", &spy);
        for path in ["absolute", "up", "magic", "absolute/marker"] {
            let mount = json!({"container_path": "/v", "image": {"image": "hostile.test/links:1"}, "image_sub_path": path, "readonly": true});
            refused(&pod, "InvalidArgument", path, &json!({"mounts": [mount]}));
        }
        for device in
            ["vendor.com/gpu=../../x", "../x=y", "vendor.com/gpu=a b", "vendor.com/gpu=", "=x", "vendor.com/gpu=x\ny"]
        {
            refused(&pod, "InvalidArgument", "CDI", &json!({"CDI_devices": [{"name": device}]}));
            refused(&pod, "InvalidArgument", "CDI", &json!({"annotations": {"cdi.k8s.io/x": device}}));
        }
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

/// Names, annotations and cgroups that lead elsewhere, or into the log.
#[test]
fn hostile_pods_change_nothing_elsewhere() {
    isolated("hostile_pods_change_nothing_elsewhere", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let groups = || {
            let mut list = support::run(Command::new("find").args(["/sys/fs/cgroup", "-type", "d"]));
            list.retain(|c| c != '\r');
            list.lines().map(String::from).collect::<std::collections::BTreeSet<_>>()
        };
        let before = groups();
        let run = |change: &dyn Fn(&mut Value)| {
            let mut config = support::crictl::pod_config("p", &node.dir.join("logs/p"));
            change(&mut config);
            crictl.try_run(&["runp", &crictl.file("hostile", &config)])
        };
        for parent in ["../../..", "/tests/../../..", "/tests/..", "/a\nb", "/tests/../../../../tmp/x"] {
            let (done, text) = run(&|c| c["linux"]["cgroup_parent"] = parent.into());
            assert!(!done && text.contains("code = InvalidArgument"), "{parent:?}: {text}");
        }
        for (key, value) in [("log_directory", "logs"), ("log_directory", "/tmp/node/logs/../../../etc")] {
            let (done, text) = run(&|c| c[key] = value.into());
            if done {
                crictl.run(&["rmp", "-f", text.trim()]);
            }
            assert!(value.starts_with('/') || !done, "{value}: {text}");
        }
        assert_eq!(groups(), before);
        // A line of a log is one line, whatever is in it.
        let forged = "x\n2026-01-01T00:00:00.000000Z ERROR forged: all is lost\n\x1b[2J";
        let (done, text) = run(&|c| {
            c["annotations"] = json!({"note": forged, forged: "x", "big": "y".repeat(200_000)});
            c["labels"] = json!({"label": forged});
            c["hostname"] = "p".into();
            c["metadata"]["name"] = forged.into();
        });
        if done {
            crictl.run(&["rmp", "-f", text.trim()]);
        }
        let (done, text) = run(&|c| c["hostname"] = forged.into());
        assert!(!done, "{text}");
        let log = std::fs::read_to_string(node.log_file()).unwrap();
        assert!(!log.lines().any(|l| l.starts_with("2026-01-01T00:00:00.000000Z ERROR forged")), "{log}");
        assert!(!log.contains("\x1b[2J"), "an escape sequence is in the log");
    });
}
