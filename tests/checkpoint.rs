//! CheckpointContainer through the real crictl, crun and criu: what is in the archive, that the container runs on as if
//! nothing had been, that a restore of the archive goes on where it was, and that refusals leave nothing.
//!
//! Run by `cargo test --test checkpoint`, as root. A crash leaves nothing: see `support`.

// Tests start programs as they like.
#![allow(clippy::disallowed_methods, clippy::print_stdout)]

mod support;

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use k8s_cri::v1::CheckpointContainerRequest;
use serde_json::{Value, json};
use support::client::{Client, block_on};
use support::crictl::{BUSYBOX, Crictl, container_config, read_log, stream_lines};
use support::isolated;
use support::node::{Node, Options};
use support::streams::*;

/// Counts, ten times a second; the numbers are its log.
const COUNTER: &str =
    "echo secret-on-disk > /made; rm /etc/passwd; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";

fn numbers(node: &Node, name: &str) -> Vec<u64> {
    let log = read_log(&node.pod_logs("p").join(name).join("0.log"));
    stream_lines(&log, "stdout").iter().filter_map(|l| l.parse().ok()).collect()
}

fn wait_numbers(node: &Node, name: &str, above: u64) -> u64 {
    support::wait_for("the counter", LONG, || numbers(node, name).last().copied().filter(|n| *n > above))
}

fn contents(archive: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(std::fs::File::open(archive).expect("the archive"));
    let mut found = BTreeMap::new();
    for entry in archive.entries().expect("a tar archive") {
        let mut entry = entry.expect("an entry");
        let name = entry.path().expect("a path").display().to_string();
        let mut data = Vec::new();
        entry.read_to_end(&mut data).expect("its content");
        found.insert(name, data);
    }
    found
}

/// A counter in a pod, with a mount below a link of the image's.
fn counter(crictl: &Crictl, node: &Node, name: &str, more: &Value) -> (String, String) {
    crictl.run(&["pull", BUSYBOX]);
    let pod = crictl.run_pod("p");
    let volume = node.dir.join("volume");
    std::fs::create_dir_all(&volume).expect("a volume");
    let mut config = container_config(name, BUSYBOX, COUNTER);
    config["mounts"] = json!([{"host_path": volume, "container_path": "/var/run/secrets/volume"}]);
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    let id = crictl.run(&["create", "--no-pull", &pod, &crictl.file(name, &config), &crictl.pod_file("p")]);
    crictl.run(&["start", &id]);
    (pod, id)
}

fn leftovers(node: &Node) -> Vec<PathBuf> {
    let folders = [node.dir.join("lib/checkpoints"), node.dir.join("out")];
    folders.iter().flat_map(|f| std::fs::read_dir(f).into_iter().flatten().flatten()).map(|e| e.path()).collect()
}

#[test]
fn an_archive_holds_all_and_can_be_restored() {
    isolated("an_archive_holds_all_and_can_be_restored", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        let (pod, id) = counter(&crictl, &node, "count", &json!({}));
        let before = wait_numbers(&node, "count", 5);
        // An exec under way is neither part of it nor harmed by it.
        let exec = Running(crictl.command(&["exec", &id, "sleep", "8001"]).spawn().expect("crictl"));
        let exec_pid = wait_there("sleep 8001");
        std::fs::create_dir(node.dir.join("out")).expect("a folder");
        let path = node.dir.join("out/c.tar");
        let export = format!("--export={}", path.display());
        let begun = Instant::now();
        crictl.run(&["checkpoint", &export, &id]);
        println!("\nfigure: a checkpoint of a shell in {:?}", begun.elapsed());
        assert_eq!(std::fs::metadata(&path).expect("the archive").permissions().mode() & 0o7777, 0o600);
        assert_eq!(leftovers(&node), std::slice::from_ref(&path));

        // It runs on: the same process, no number left out or said twice.
        assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");
        wait_numbers(&node, "count", before + 10);
        let all = numbers(&node, "count");
        assert_eq!(all, (1..=all.len() as u64).collect::<Vec<_>>());
        assert_eq!(pids_of("sleep 8001"), [exec_pid]);
        drop(exec);
        wait_gone("sleep 8001");

        let files = contents(&path);
        let has = |name: &str| files.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", files.keys()));
        let parsed = |name: &str| serde_json::from_slice::<Value>(has(name)).expect("JSON");
        for image in ["inventory.img", "pstree.img", "core-1.img", "pages-1.img", "descriptors.json"] {
            has(&format!("checkpoint/{image}"));
        }
        assert!(String::from_utf8_lossy(has("dump.log")).contains("Dumping finished successfully"));
        let config = parsed("config.dump");
        assert_eq!((config["id"].as_str(), config["name"].as_str()), (Some(id.as_str()), Some("count")));
        assert_eq!(config["rootfsImageName"], BUSYBOX);
        assert!(config["checkpointedTime"].as_str().is_some_and(|t| t.ends_with('Z') && t.contains('T')), "{config}");
        let args = &parsed("spec.dump")["process"]["args"];
        assert!(args[2].as_str().is_some_and(|a| a.contains("secret-on-disk")), "{args}");
        assert_eq!(parsed("bind.mounts")[0]["destination"], "/var/run/secrets/volume");
        assert!(parsed("deleted.files").as_array().is_some_and(|d| d.contains(&json!("/etc/passwd"))));
        assert!(parsed("status.dump")["StartedAt"].as_i64().is_some_and(|t| t > 0));
        assert!(String::from_utf8_lossy(has("container.log")).contains(" stdout F 5\n"));
        let address = crictl.json(&["inspectp", &pod])["status"]["network"]["ip"].as_str().expect("an IP").to_owned();
        assert!(String::from_utf8_lossy(has("network.status")).contains(&address));
        let diff = node.dir.join("diff.tar");
        std::fs::write(&diff, has("rootfs-diff.tar")).expect("written");
        assert_eq!(contents(&diff)["made"], b"secret-on-disk\n");

        // A second one takes the first one's place.
        crictl.run(&["checkpoint", &export, &id]);
        crictl.run(&["stopp", &pod]);
        restore(&node, &path, before);
        crictl.run(&["rmp", "-f", &pod]);
    });
}

/// Lets crun restore the archive beside the runtime, on the image's files, with its output in a file.
fn restore(node: &Node, archive: &Path, before: u64) {
    let dir = node.dir.join("restore");
    let (bundle, root) = (dir.join("bundle"), dir.join("bundle/rootfs"));
    std::fs::create_dir_all(&root).expect("folders");
    support::run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(&dir));
    // The image, what the container had changed, and what it had removed.
    let layer = std::fs::read_dir(node.dir.join("lib")).expect("lib").flatten().find_map(|_| {
        let found =
            Command::new("find").arg(node.dir.join("lib")).args(["-path", "*/layers/*/fs", "-type", "d"]).output();
        String::from_utf8(found.ok()?.stdout).ok()?.lines().next().map(PathBuf::from)
    });
    let layer = layer.expect("the image's layer");
    support::run(Command::new("cp").arg("-a").arg(layer.join(".")).arg(&root));
    support::run(Command::new("tar").arg("-xf").arg(dir.join("rootfs-diff.tar")).arg("-C").arg(&root));
    let mut spec: Value = serde_json::from_slice(&std::fs::read(dir.join("spec.dump")).expect("spec")).expect("JSON");
    spec["root"]["path"] = json!(root);
    spec["linux"]["cgroupsPath"] = json!("/tests/restored");
    // The pod's namespaces went with the pod.
    support::run(Command::new("ip").args(["netns", "add", "restored"]));
    for namespace in spec["linux"]["namespaces"].as_array_mut().expect("namespaces") {
        if namespace["type"] == "network" {
            namespace["path"] = json!("/run/netns/restored");
        } else {
            namespace.as_object_mut().expect("a namespace").remove("path");
        }
    }
    for mount in spec["mounts"].as_array_mut().expect("mounts") {
        if mount["type"] == "bind" && !Path::new(mount["source"].as_str().unwrap_or("")).exists() {
            let (to, name) = (mount["destination"].as_str().unwrap_or("").to_owned(), dir.join("source"));
            let name = name.join(to.trim_start_matches('/').replace('/', "-"));
            if to == "/dev/shm" {
                std::fs::create_dir_all(&name).expect("a folder");
            } else {
                std::fs::create_dir_all(name.parent().expect("a parent")).expect("a folder");
                std::fs::write(&name, "").expect("a file");
            }
            mount["source"] = json!(name);
        }
    }
    std::fs::write(bundle.join("config.json"), spec.to_string()).expect("config.json");
    // With v1 criu puts processes back where they were, whatever it is told: the groups must be there.
    let id = std::fs::read(dir.join("config.dump")).expect("config.dump");
    let id: Value = serde_json::from_slice(&id).expect("JSON");
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").expect("cgroups").flatten() {
        let parent = hierarchy.path().join("tests");
        let group = parent.join(id["id"].as_str().expect("an id"));
        if parent.is_dir() && std::fs::create_dir(&group).is_ok() {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(value) = std::fs::read(parent.join(file)) {
                    std::fs::write(group.join(file), value).expect("the group's cpuset");
                }
            }
        }
    }
    // The names that the streams had are in criu's images; descriptors are given under them.
    let text = std::fs::read_to_string(dir.join("criu.conf")).expect("criu.conf");
    let name = |line: &str| line.strip_prefix("external ")?.split(" #").next().map(str::to_owned);
    let names: Vec<String> = text.lines().filter_map(name).collect();
    assert!(text.contains("# stdout") && names.len() == 2, "{text}");
    let script = r#"
        cd "$1"; shift; fd=10; : > criu.conf
        for name; do
            mkfifo -m 600 p$fd; eval "exec $fd<>p$fd"; cat p$fd < /dev/null >> restored.out 2> /dev/null &
            echo "inherit-fd fd[$fd]:$name" >> criu.conf; fd=$((fd+1))
        done
        exec env CRIU_CONFIG_FILE=$PWD/criu.conf crun --root $PWD/crun restore --detach --bundle $PWD/bundle \
            --image-path $PWD/checkpoint --work-path $PWD --manage-cgroups-mode ignore --tcp-established --file-locks \
            --ext-unix-sk restored < /dev/null
    "#;
    let out = Command::new("bash").args(["-c", script, "restore"]).arg(&dir).args(&names).output().expect("bash");
    let words = std::fs::read_to_string(dir.join("restore.log")).unwrap_or_default();
    let errors: Vec<_> = words.lines().filter(|l| l.contains("Error")).collect();
    assert!(out.status.success(), "{}\n{errors:?}", support::describe(&out));
    let said = || std::fs::read_to_string(dir.join("restored.out")).unwrap_or_default();
    support::wait_for("the restored counter", LONG, || (said().lines().count() > 5).then_some(()));
    let first: u64 = said().lines().find_map(|l| l.parse().ok()).expect("a number");
    assert!(first > before, "it began at {first}, and had been at {before}");
    support::run(Command::new("crun").arg("--root").arg(dir.join("crun")).args(["delete", "--force", "restored"]));
}

#[test]
fn refusals_have_their_codes_and_leave_nothing() {
    isolated("refusals_have_their_codes_and_leave_nothing", || {
        let mut node = Node::start(Options::default());
        let crictl = node.crictl();
        let (_pod, id) = counter(&crictl, &node, "count", &json!({}));
        wait_numbers(&node, "count", 2);
        std::fs::create_dir(node.dir.join("out")).expect("a folder");
        let path = node.dir.join("out/c.tar").display().to_string();
        let call = |id: &str, location: &str, timeout: i64| {
            let request = CheckpointContainerRequest { container_id: id.into(), location: location.into(), timeout };
            let socket = node.socket();
            block_on(async move {
                let answer = Client::connect(&socket).await.runtime.checkpoint_container(request).await;
                answer.map(drop).map_err(|s| (s.code(), s.message().to_owned()))
            })
        };
        let refused = |id: &str, location: &str, timeout: i64, code: tonic::Code, word: &str| {
            let (was, message) = call(id, location, timeout).expect_err("a refusal");
            assert!(was == code && message.contains(word), "{was:?}: {message}");
        };
        refused("nobody", &path, 0, tonic::Code::NotFound, "nobody");
        refused(&id, "c.tar", 0, tonic::Code::InvalidArgument, "location");
        refused(&id, "/no/such/folder/c.tar", 0, tonic::Code::InvalidArgument, "folder");
        refused(&id, &path, -1, tonic::Code::InvalidArgument, "timeout");
        let fifo = node.dir.join("fifo").display().to_string();
        support::run(Command::new("mkfifo").arg(&fifo));
        refused(&id, &fifo, 0, tonic::Code::InvalidArgument, "something else");
        // A full disk, and one that can't be written.
        let small = node.dir.join("small");
        std::fs::create_dir(&small).expect("folder");
        let mount = |flags: &str| {
            support::run(Command::new("mount").args(["-t", "tmpfs", "-o", flags, "tmpfs"]).arg(&small));
        };
        let there = small.join("c.tar").to_string_lossy().into_owned();
        mount("size=64k");
        refused(&id, &there, 0, tonic::Code::ResourceExhausted, "c.tar");
        assert_eq!(std::fs::read_dir(&small).expect("list").count(), 0);
        mount("size=64k,ro");
        refused(&id, &there, 0, tonic::Code::FailedPrecondition, "Read-only");

        // criu is missing, then breaks down in the middle.
        let criu = Path::new("/usr/sbin/criu");
        let aside = Path::new("/usr/sbin/criu.aside");
        std::fs::rename(criu, aside).expect("criu aside");
        refused(&id, &path, 0, tonic::Code::FailedPrecondition, "criu is not installed");
        std::fs::write(criu, "#!/bin/sh\nexit 1\n").expect("another criu");
        std::fs::set_permissions(criu, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        refused(&id, &path, 0, tonic::Code::Internal, "runs on");
        // Slow: the caller's time is up, the container is not frozen for good, and no archive appears.
        std::fs::write(criu, "#!/bin/sh\nsleep 3\nexec /usr/sbin/criu.aside \"$@\"\n").expect("another criu");
        refused(&id, &path, 1, tonic::Code::DeadlineExceeded, "1s");
        refused(&id, &path, 1, tonic::Code::FailedPrecondition, "already");
        support::wait_for("the end of the abandoned one", LONG, || leftovers(&node).is_empty().then_some(()));
        std::fs::rename(aside, criu).expect("criu back");
        let now = numbers(&node, "count").last().copied().unwrap_or_default();
        wait_numbers(&node, "count", now + 5);
        assert_eq!(leftovers(&node), Vec::<PathBuf>::new());
        support::wait_for("that it works again", LONG, || call(&id, &path, 60).ok());

        // What a daemon that was killed in the middle has left goes at the next start.
        let left = node.dir.join("lib/checkpoints/x");
        std::fs::create_dir_all(left.join("archive")).expect("a folder");
        let half = node.dir.join("out/.c.tar.half");
        std::fs::write(&half, "half").expect("half an archive");
        std::fs::write(left.join("unfinished"), half.display().to_string()).expect("a note");
        node.crash_daemon();
        assert_eq!(leftovers(&node), [PathBuf::from(&path)]);
        crictl.run(&["stop", "-t", "0", &id]);
        let socket = node.socket();
        let code = block_on(async move {
            let request = CheckpointContainerRequest { container_id: id, location: path, timeout: 0 };
            Client::connect(&socket).await.runtime.checkpoint_container(request).await.map_err(|s| s.code()).err()
        });
        assert_eq!(code, Some(tonic::Code::FailedPrecondition));
    });
}

#[test]
fn a_container_with_a_terminal() {
    isolated("a_container_with_a_terminal", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        let (_pod, id) = counter(&crictl, &node, "tty", &json!({"tty": true, "stdin": true}));
        let now = || {
            let log = read_log(&node.pod_logs("p").join("tty/0.log"));
            stream_lines(&log, "stdout").iter().filter_map(|l| l.trim().parse::<u64>().ok()).next_back()
        };
        let before = support::wait_for("the counter", LONG, now);
        let path = node.dir.join("c.tar");
        crictl.run(&["checkpoint", &format!("--export={}", path.display()), &id]);
        assert!(contents(&path).contains_key("checkpoint/tty-info.img"));
        support::wait_for("the counter to go on", Duration::from_secs(20), || now().filter(|n| *n > before + 5));
    });
}

#[test]
fn a_container_that_makes_and_removes_files_all_the_time() {
    isolated("a_container_that_makes_and_removes_files_all_the_time", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let script = "i=0; while :; do mkdir -p /w/d$i; echo $i > /w/d$i/f; rm -rf /w/d$((i-20)); i=$((i+1)); done";
        let config = crictl.file("busy", &container_config("busy", BUSYBOX, script));
        let id = crictl.run(&["create", "--no-pull", &pod, &config, &crictl.pod_file("p")]);
        crictl.run(&["start", &id]);
        // A name as long as names get.
        let path = node.dir.join("c".repeat(255));
        for _ in 0..6 {
            crictl.run(&["checkpoint", &format!("--export={}", path.display()), &id]);
            assert!(contents(&path).contains_key("rootfs-diff.tar"));
        }
        assert_eq!((crictl.container_state(&id).as_str(), leftovers(&node)), ("CONTAINER_RUNNING", Vec::new()));
    });
}
