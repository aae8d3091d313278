//! The ZFS driver under a whole daemon: pools that are away, full, suspended or do not answer, neighbours' datasets, and cuts of
//! pods.
//!
//! Run by `cargo test --test zfs`, as root, on pools of zfs-fuse in the tests' environment. A crash leaves nothing: see
//! `support`.

#![allow(clippy::disallowed_methods)] // tests start programs and write files plainly

mod support;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use support::crictl::{BUSYBOX, Crictl, container_config, pod_config, read_log, stream_lines};
use support::node::{Node, Options};
use support::{daemon_program, describe, isolated, run, wait_for};

/// Makes the programs hang, or `zpool` tell a suspended pool, while a file of that name is in /tmp.
const PROGRAM: &str = "#!/bin/sh\n\
    [ ! -e /tmp/hang ] || sleep 30\n\
    [ $1 != clone ] || while [ -e /tmp/slow-clone ]; do : > /tmp/cloning; sleep 0.1; done\n\
    case $0:$1 in */zpool:list) [ ! -e /tmp/suspended ] || { echo SUSPENDED; exit; } ;; esac\n\
    exec /usr/sbin/${0##*/} \"$@\"\n";

fn options() -> Options {
    std::fs::create_dir_all("/tmp/bin").expect("folder");
    let programs = ["/tmp/bin/zfs", "/tmp/bin/zpool"];
    for program in programs {
        std::fs::write(program, PROGRAM).expect("a program");
        std::fs::set_permissions(program, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    }
    Options { zfs: true, pool_size: "1G".into(), zfs_programs: programs.map(String::from), ..Options::default() }
}

fn zfs(args: &[&str]) -> String {
    run(Command::new("/usr/sbin/zfs").args(args))
}

fn zpool(args: &[&str]) -> String {
    run(Command::new("/usr/sbin/zpool").args(args))
}

/// Status and reason of a condition.
fn condition(crictl: &Crictl, name: &str) -> (bool, String) {
    let info = crictl.json(&["info"]);
    let all = info["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let one = all.into_iter().find(|c| c["type"] == name).unwrap_or_else(|| panic!("no {name}: {info}"));
    (one["status"] == true, one["reason"].as_str().unwrap_or_default().to_owned())
}

fn until(crictl: &Crictl, name: &str, expected: (bool, &str)) {
    wait_for(&format!("{name} {expected:?}"), Duration::from_secs(40), || {
        (condition(crictl, name) == (expected.0, expected.1.to_owned())).then_some(())
    });
}

/// Our own command line.
fn lxcri(node: &Node, args: &[&str]) -> (bool, String) {
    let mut command = Command::new(daemon_program());
    let out = command.args(args).arg("--local-socket").arg(node.local_socket()).output().expect("our command line");
    (out.status.success(), describe(&out))
}

fn clean(node: &Node) {
    wait_for("a clean store", Duration::from_secs(30), || {
        let (good, said) = lxcri(node, &["storage", "check"]);
        assert!(good || said.contains("destroy"), "{said}");
        (good && !said.contains("being destroyed")).then_some(())
    });
}

fn quick<T>(what: &str, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = call();
    // crictl's own start is in it; a busy machine needs a part of it, too.
    assert!(start.elapsed() < Duration::from_secs(5), "{what} took {:?}", start.elapsed());
    done
}

fn runs(crictl: &Crictl, pod: &str, name: &str) {
    let id = crictl.create(pod, "p", name, BUSYBOX, "echo written > /new && cat /new");
    crictl.run(&["start", &id]);
    assert_eq!(crictl.wait_exit(&id)["exitCode"], 0);
}

#[test]
fn a_pool_that_is_away_is_told_and_taken_up_again() {
    isolated("a_pool_that_is_away_is_told_and_taken_up_again", || {
        let node = Node::start(options());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        runs(&crictl, &pod, "before");
        let ids = crictl.run(&["ps", "-aq"]);
        crictl.run(&["rm", &ids]);
        clean(&node);

        // Whoever asks the pool at this moment keeps it busy.
        wait_for("the export", Duration::from_secs(20), || {
            let export = Command::new("/usr/sbin/zpool").args(["export", "tank"]).status();
            export.expect("zpool").success().then_some(())
        });
        until(&crictl, "RuntimeReady", (false, "StoragePoolMissing"));
        assert_eq!(condition(&crictl, "StorageReady"), (false, "StoragePoolMissing".into()));
        let file = crictl.file("away", &support::crictl::container_config("away", BUSYBOX, "true"));
        let (good, said) =
            quick("a refusal", || crictl.try_run(&["create", "--no-pull", &pod, &file, &crictl.pod_file("p")]));
        assert!(!good && said.contains("code = Unavailable") && said.contains("zpool import tank"), "{said}");
        quick("images", || crictl.run(&["images"]));
        zpool(&["import", "-d", "/tmp/pool", "tank"]);
        until(&crictl, "RuntimeReady", (true, ""));
        runs(&crictl, &pod, "after");

        std::fs::write("/tmp/suspended", "").expect("file");
        until(&crictl, "RuntimeReady", (false, "StoragePoolSuspended"));
        let (good, said) = crictl.try_run(&["pull", support::crictl::BIG]);
        assert!(!good && said.contains("code = Unavailable") && said.contains("zpool clear tank"), "{said}");
        std::fs::remove_file("/tmp/suspended").expect("file");
        until(&crictl, "StorageReady", (true, ""));
        runs(&crictl, &pod, "again");
        clean(&node);
    });
}

#[test]
fn a_full_pool_is_told_and_leaves_nothing_half() {
    isolated("a_full_pool_is_told_and_leaves_nothing_half", || {
        let node = Node::start(Options { pool_size: "384M".into(), ..options() });
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let (good, said) = crictl.try_run(&["pull", support::crictl::BIG]);
        // Its layers unpack to more than there is.
        zfs(&["create", "-o", "mountpoint=/tmp/ballast", "tank/ballast"]);
        let fill = Command::new("dd").args(["if=/dev/urandom", "of=/tmp/ballast/x", "bs=1M"]).output().expect("dd");
        assert!(!fill.status.success(), "the pool took everything");
        until(&crictl, "StorageReady", (false, "StoragePoolFull"));
        assert_eq!(condition(&crictl, "RuntimeReady"), (true, String::new()), "{said}");
        let (second, said) = crictl.try_run(&["pull", support::crictl::BIG]);
        assert!(good || (!second && said.contains("code = ResourceExhausted")), "{said}");
        std::fs::remove_file("/tmp/ballast/x").expect("ballast");
        until(&crictl, "StorageReady", (true, ""));
        // What was freed can be used some transactions later.
        wait_for("room in the pool", Duration::from_secs(60), || {
            Command::new("/usr/sbin/zfs")
                .args(["create", "tank/probe"])
                .output()
                .expect("zfs")
                .status
                .success()
                .then_some(())
        });
        let pod = crictl.run_pod("p");
        runs(&crictl, &pod, "c");
        clean(&node);
    });
}

/// A pod with a word about what its containers may write.
fn run_limited(crictl: &Crictl, node: &Node, name: &str, limit: Option<&str>) -> String {
    let mut config = pod_config(name, &node.pod_logs(name));
    if let Some(limit) = limit {
        config["annotations"]["lxcri.proxmox.com/ephemeral-storage"] = limit.into();
    }
    crictl.run(&["runp", &crictl.file(&format!("pod-{name}"), &config)])
}

#[test]
fn a_container_writes_no_more_than_it_may() {
    isolated("a_container_writes_no_more_than_it_may", || {
        let options = Options { zfs_lines: "container_quota = \"24Mi\"".into(), ..options() };
        let mut node = Node::start(options);
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let dir = node.dir.clone();
        let create = |pod: &str, name: &str, script: &str| {
            let file = crictl.file(&format!("{name}-c"), &container_config("c", BUSYBOX, script));
            let pod_file = dir.join(format!("pod-{name}.json")).display().to_string();
            crictl.try_run(&["create", "--no-pull", pod, &file, &pod_file])
        };
        // What it says can't be kept in a file of the same, full, root.
        let fill = "said=$(dd if=/dev/urandom of=/big bs=64k count=640 2>&1); echo $?; wc -c < /big; \
            echo \"$said\" | grep -ci quota";
        // The node's default; the pod's own; none at all.
        for (name, limit, most) in
            [("default", None, Some(24 << 20)), ("own", Some("8Mi"), Some(8 << 20)), ("none", Some("0"), None)]
        {
            let pod = run_limited(&crictl, &node, name, limit);
            let (made, id) = create(&pod, name, &format!("{fill}; echo still && sleep 1000"));
            assert!(made, "{id}");
            let id = id.trim();
            crictl.run(&["start", id]);
            let log = node.pod_logs(name).join("c/0.log");
            let said = wait_for("what it could write", Duration::from_secs(120), || {
                let lines = log.exists().then(|| stream_lines(&read_log(&log), "stdout"))?;
                (lines.len() >= 3).then_some(lines)
            });
            let written: u64 = said[1].trim().parse().expect("bytes");
            match most {
                // A transaction that is under way may be written whole.
                Some(most) => {
                    assert!((most / 2..most + (12 << 20)).contains(&written), "{name}: {said:?}");
                    assert_eq!((said[0].as_str(), said[2].as_str()), ("1", "1"), "{name}: {said:?}");
                }
                None => assert_eq!((said[0].as_str(), written), ("0", 40 << 20), "{name}: {said:?}"),
            }
            // The limit outlives the daemon, and what is full can be removed.
            let limit = || zfs(&["get", "-Hp", "-o", "value", "refquota", &format!("tank/lxcri/containers/{id}")]);
            let before = limit();
            assert_eq!(before.trim() == "0", most.is_none(), "{before}");
            // Both lists of ours show it.
            let shown = match most {
                Some(most) => format!(" {}.0Mi", most >> 20),
                None => " -".into(),
            };
            for verb in ["ps", "stats"] {
                let mut command = std::process::Command::new(support::daemon_program());
                let out = command.arg("--local-socket").arg(node.local_socket()).arg(verb).output().expect(verb);
                let said = String::from_utf8_lossy(&out.stdout).into_owned();
                let line = said.lines().find(|l| l.starts_with(&id[..13]));
                assert!(line.is_some_and(|l| l.contains(&shown)), "{verb}: {said}");
            }
            if name == "default" {
                node.crash_daemon();
                assert_eq!(limit(), before);
                // What is full can be forked, and has a little room then.
                let (forked, said) = lxcri(&node, &["pod", "fork", "default", "--as", "fork-of-full"]);
                assert!(forked, "{said}");
                let (_, listed) = lxcri(&node, &["ps", "--all"]);
                let fork = listed.lines().find(|l| l.contains("/fork-of-full ")).expect("the fork");
                let fork = fork.split_whitespace().next().expect("its id");
                let (removed, said) = lxcri(&node, &["rm", "--force", fork]);
                assert!(removed, "{said}");
            }
            crictl.run(&["rmp", "-f", &pod]);
        }
        // Nor one that has no room for the files that every container gets.
        for odd in ["much", "1", "1Ki"] {
            let pod = run_limited(&crictl, &node, "odd", Some(odd));
            let (made, said) = create(&pod, "odd", "true");
            assert!(!made && said.contains("InvalidArgument") && said.contains("ephemeral-storage"), "{said}");
            assert!(said.contains(odd), "{said}");
            crictl.run(&["rmp", "-f", &pod]);
        }
        clean(&node);
    });
}

/// A pod with a user namespace is refused by name on zfs-fuse, which knows none.
#[test]
fn user_namespaces_are_refused_by_name() {
    isolated("user_namespaces_are_refused_by_name", || {
        let node = Node::start(options());
        let crictl = node.crictl();
        let info = crictl.json(&["info"]);
        let handlers = info["runtimeHandlers"].as_array().expect("handlers");
        assert!(handlers.iter().all(|h| h["features"]["user_namespaces"] != true), "{info}");
        let map = serde_json::json!([{"host_id": 300_000, "container_id": 0, "length": 65_536}]);
        let mut config = pod_config("u", &node.pod_logs("u"));
        config["linux"]["security_context"]["namespace_options"] =
            serde_json::json!({"pid": 1, "userns_options": {"mode": 0, "uids": map, "gids": map}});
        let (made, said) = crictl.try_run(&["runp", &crictl.file("pod-u", &config)]);
        assert!(!made && said.contains("zfs-fuse knows no user namespaces"), "{said}");
        clean(&node);
    });
}

/// Why they are refused, and no copy with shifted owners is made instead: zfs-fuse decides by the host's ids, for which root of a
/// user namespace is a user as any other. Such a root could do none of what images do as root when they start.
#[test]
fn shifted_owners_do_not_make_user_namespaces() {
    isolated("shifted_owners_do_not_make_user_namespaces", || {
        let _node = Node::start(options());
        zfs(&["create", "-o", "mountpoint=/tmp/shifted", "tank/shifted"]);
        std::fs::create_dir_all("/tmp/elsewhere").expect("a folder");
        // Its user namespace is there when it prints.
        let mut command = Command::new("unshare");
        command.args(["--user", "sh", "-c", "echo; exec sleep 1000"]);
        let mut holder = command.stdout(std::process::Stdio::piped()).spawn().expect("unshare");
        std::io::Read::read_exact(holder.stdout.as_mut().expect("its output"), &mut [0]).expect("a line");
        let pid = holder.id().to_string();
        for map in ["uid_map", "gid_map"] {
            std::fs::write(format!("/proc/{pid}/{map}"), "0 300000 65536").expect("a map");
        }
        let inside = |args: &[&str]| {
            let mut command = Command::new("nsenter");
            command.args(["--user", "--target", &pid, "--setuid", "0", "--setgid", "0"]).args(args);
            let out = command.output().expect("nsenter");
            (out.status.success(), support::describe(&out))
        };
        for (folder, whole) in [("/tmp/elsewhere", true), ("/tmp/shifted", false)] {
            let (own, others) = (format!("{folder}/own"), format!("{folder}/others"));
            for (path, id) in [(&own, 300_000), (&others, 300_999)] {
                std::fs::write(path, "some").expect("a file");
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("its mode");
                std::os::unix::fs::chown(path, Some(id), Some(id)).expect("its owner");
            }
            let (done, said) = inside(&["cat", &own]);
            assert!(done, "{said}");
            for args in [["chown", "999", own.as_str()], ["cat", "--", &others], ["chmod", "644", &others]] {
                let (done, said) = inside(&args);
                assert!(done == whole, "{args:?}: {said}");
            }
        }
        holder.kill().and_then(|()| holder.wait()).expect("killed");
    });
}

#[test]
fn a_checkpoint_has_what_a_container_changed() {
    isolated("a_checkpoint_has_what_a_container_changed", || {
        let node = Node::start(options());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let script = "echo new > /made; rm /etc/passwd; mkdir /d; ln -s /nowhere /d/link; echo x >> /etc/group; echo up; \
            while :; do sleep 0.1; done";
        let id = crictl.create(&pod, "p", "c", BUSYBOX, script);
        crictl.run(&["start", &id]);
        wait_for("its files", Duration::from_secs(30), || {
            let log = node.pod_logs("p").join("c/0.log");
            (log.exists() && !stream_lines(&read_log(&log), "stdout").is_empty()).then_some(())
        });
        let archive = node.dir.join("c.tar");
        crictl.run(&["checkpoint", &format!("--export={}", archive.display()), &id]);
        assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");
        let out = node.dir.join("out");
        std::fs::create_dir(&out).expect("a folder");
        run(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&out));
        let deleted = std::fs::read_to_string(out.join("deleted.files")).expect("what is gone");
        assert!(deleted.contains("\"/etc/passwd\""), "{deleted}");
        let listed = run(Command::new("tar").arg("-tf").arg(out.join("rootfs-diff.tar")));
        let listed: Vec<_> = listed.lines().map(|l| l.trim_end_matches('/')).collect();
        for path in ["made", "d", "d/link", "etc/group"] {
            assert!(listed.contains(&path), "{path}: {listed:?}");
        }
        assert!(!listed.contains(&"bin/busybox") && !listed.contains(&"etc/passwd"), "{listed:?}");
        let made = run(Command::new("tar").arg("-xOf").arg(out.join("rootfs-diff.tar")).arg("made"));
        assert_eq!(made, "new\n");
        crictl.run(&["rmp", "-f", &pod]);
        clean(&node);
    });
}

#[test]
fn lists_never_wait_for_zfs() {
    isolated("lists_never_wait_for_zfs", || {
        let mut node = Node::start(options());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let id = crictl.create(&pod, "p", "c", BUSYBOX, "dd if=/dev/urandom of=/big bs=64k count=64; sync; sleep 1000");
        crictl.run(&["start", &id]);
        let written = || -> u64 {
            let stats = crictl.json(&["stats", "--id", &id]);
            let text = stats["stats"][0]["writableLayer"]["usedBytes"]["value"].clone();
            text.as_str().and_then(|t| t.parse().ok()).unwrap_or(0)
        };
        wait_for("what it has written", Duration::from_secs(60), || (written() >= 4 << 20).then_some(()));
        let ended = crictl.create(&pod, "p", "ended", BUSYBOX, "true");
        crictl.run(&["start", &ended]);
        crictl.wait_exit(&ended);

        std::fs::write("/tmp/hang", "").expect("file");
        for args in [
            ["ps", "-a"].as_slice(),
            &["pods"],
            &["images"],
            &["stats", "-a"],
            &["statsp"],
            &["imagefsinfo"],
            &["inspect", &id],
            &["info"],
            // It goes at once; its dataset goes when it can.
            &["rm", &ended],
        ] {
            quick(&args.join(" "), || crictl.run(args));
        }
        assert!(quick("stats", written) >= 4 << 20, "the last value is told");
        until(&crictl, "RuntimeReady", (false, "StoragePoolHangs"));
        quick("stop", || crictl.run(&["stop", "-t", "0", &id]));
        std::fs::remove_file("/tmp/hang").expect("file");
        until(&crictl, "RuntimeReady", (true, ""));
        clean(&node);
        node.crash_daemon();
        clean(&node);
    });
}

#[test]
fn neighbours_are_left_alone() {
    isolated("neighbours_are_left_alone", || {
        let mut node = Node::prepare(options());
        // As a Proxmox `zfspool` storage makes them on the same pool, and somebody's own below ours.
        zfs(&["create", "-o", "canmount=noauto", "tank/subvol-100-disk-0"]);
        zfs(&["snapshot", "tank/subvol-100-disk-0@__base__"]);
        // A dataset that an admin has made gets what one of ours has, but for what he has set himself.
        zfs(&["create", "-o", "atime=on", "tank/lxcri"]);
        node.start_daemon();
        node.stop_daemon();
        let told = zfs(&["get", "-H", "-o", "value", "com.sun:auto-snapshot,canmount,atime", "tank/lxcri"]);
        assert_eq!(told.split_whitespace().collect::<Vec<_>>(), ["false", "noauto", "on"]);
        zfs(&["create", "tank/lxcri/mine"]);
        // Our tag comes to it from above, and its name begins as those of ours do.
        zfs(&["create", "tank/lxcri/layers/recv-mine"]);
        zfs(&["snapshot", "tank/lxcri/layers/recv-mine@backup"]);
        let foreign = || {
            let all = zfs(&["list", "-H", "-o", "name", "-t", "filesystem,snapshot", "-r", "tank"]);
            all.lines().filter(|l| l.contains("subvol") || l.contains("mine")).map(str::to_owned).collect::<Vec<_>>()
        };
        let before = foreign();
        node.start_daemon();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        runs(&crictl, &pod, "c");
        // What a snapshot tool does everywhere keeps a dataset from going, and nothing else.
        let dataset = zfs(&["list", "-H", "-o", "name", "-r", "tank/lxcri/containers"]);
        let dataset = dataset.lines().last().expect("a container's dataset").to_owned();
        zfs(&["snapshot", &format!("{dataset}@autosnap_1")]);
        quick("rmp", || crictl.run(&["rmp", "-f", &pod]));
        crictl.run(&["rmi", BUSYBOX]);
        wait_for("what can't be destroyed to be told", Duration::from_secs(30), || {
            let (good, said) = lxcri(&node, &["storage", "check"]);
            (!good && said.contains("can't be destroyed")).then_some(())
        });
        zfs(&["destroy", &format!("{dataset}@autosnap_1")]);
        clean(&node);
        // Nor does somebody's clone of a layer keep the image from coming back.
        crictl.run(&["pull", BUSYBOX]);
        let layers = zfs(&["list", "-H", "-o", "name", "-t", "snapshot", "-r", "tank/lxcri/layers"]);
        let ready = layers.lines().rfind(|l| l.ends_with("@ready")).expect("a layer").to_owned();
        zfs(&["clone", &ready, "tank/theirs"]);
        crictl.run(&["rmi", BUSYBOX]);
        wait_for("what can't be destroyed to be told", Duration::from_secs(30), || {
            let (good, said) = lxcri(&node, &["storage", "check"]);
            (!good && said.contains("can't be destroyed")).then_some(())
        });
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("again");
        let id = crictl.create(&pod, "again", "c", BUSYBOX, "true");
        crictl.run(&["start", &id]);
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 0);
        crictl.run(&["rmp", "-f", &pod]);
        zfs(&["destroy", "tank/theirs"]);
        crictl.run(&["rmi", BUSYBOX]);
        clean(&node);
        node.crash_daemon();
        assert_eq!(foreign(), before);
        // Nothing of ours is mounted by `zfs mount -a`, which Proxmox calls.
        run(Command::new("sh").args(["-c", "zfs mount -a; ! grep lxcri/containers /proc/mounts"]));

        // Another installation does not take what is this one's.
        node.stop_daemon();
        std::fs::write(node.dir.join("lib/installation"), "b".repeat(32)).expect("another installation");
        let out = Command::new(daemon_program()).args(["serve", "--config"]).arg(node.dir.join("config.toml")).output();
        let out = out.expect("the daemon");
        assert!(
            !out.status.success() && describe(&out).contains("belongs to another installation"),
            "{}",
            describe(&out)
        );
    });
}

#[test]
fn a_pod_is_cut_compared_and_put_back() {
    isolated("a_pod_is_cut_compared_and_put_back", || {
        let mut node = Node::start(options());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let script = "echo one > /one; mkdir /d; i=0; while :; do i=$((i+1)); echo $i > /n; sleep 0.05; done";
        let id = crictl.create(&pod, "p", "c", BUSYBOX, script);
        crictl.run(&["start", &id]);
        let exec = |script: &str| crictl.run(&["exec", "-s", &id, "sh", "-c", script]);
        wait_for("its first files", Duration::from_secs(20), || {
            crictl.try_run(&["exec", "-s", &id, "test", "-e", "/n"]).0.then_some(())
        });
        let good = |args: &[&str]| {
            let (good, said) = lxcri(&node, args);
            assert!(good, "{args:?}: {said}");
            said
        };
        good(&["pod", "snapshot", "p", "first"]);
        // zfs-fuse tells times of change in whole seconds: what changes now is to be told from what was cut.
        let second = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let cut = second();
        wait_for("another second", Duration::from_secs(3), || (second() > cut).then_some(()));
        exec("rm /one; echo two > /two; echo x > /d/x");
        let said = good(&["pod", "diff", "p", "first"]);
        for line in ["c D /one", "c A /two", "c A /d/x", "c C /d", "c C /n"] {
            assert!(said.contains(line), "{line}: {said}");
        }
        let said = good(&["pod", "diff", "p"]);
        assert!(!said.contains("/one") && said.contains("c A /two") && said.contains("c A /n"), "{said}");
        let (again, said) = lxcri(&node, &["pod", "snapshot", "p", "first"]);
        assert!(!again && said.contains("already"), "{said}");
        for bad in ["a/b", "a@b", "-x y", "", "ä"] {
            assert!(!lxcri(&node, &["pod", "snapshot", "p", "--", bad]).0, "{bad:?}");
        }
        let refused = |args: &[&str], words: &str| {
            let (good, said) = lxcri(&node, args);
            assert!(!good && said.contains(words), "{args:?}: {said}");
        };
        // Variables that are not set: neither the only pod nor its present state is meant.
        refused(&["pod", "snapshot", "", "x"], "is empty");
        refused(&["pod", "fork", "p", ""], "an empty name");
        refused(&["pod", "diff", "p", ""], "an empty name");
        refused(&["pod", "snapshots", "p", "x"], "nothing to name");
        good(&["pod", "snapshot", "p", "second"]);
        assert!(good(&["pod", "snapshots", "p"]).contains("first\nsecond"));
        refused(&["pod", "rollback", "p", "first"], "stop it first");
        crictl.run(&["stop", "-t", "0", &id]);
        node.crash_daemon();
        let (listed, said) = lxcri(&node, &["pod", "snapshots", "p"]);
        assert!(listed && said.contains("first\nsecond"), "{said}");
        let refused = |args: &[&str], words: &str| {
            let (good, said) = lxcri(&node, args);
            assert!(!good && said.contains(words), "{args:?}: {said}");
        };
        let (missing, said) = lxcri(&node, &["pod", "rollback", "p", "third"]);
        assert!(!missing && said.contains("third"), "{said}");
        clean(&node);
        // zfs-fuse can't roll back what is mounted, and lets go of it a moment after the container's end.
        // What would stop it halfway is found before anything is changed.
        let dataset = format!("tank/lxcri/containers/{id}");
        zfs(&["hold", "keep", &format!("{dataset}@lxcri-second")]);
        refused(&["pod", "rollback", "p", "first"], "is newer and held");
        zfs(&["release", "keep", &format!("{dataset}@lxcri-second")]);
        zfs(&["snapshot", &format!("{dataset}@backup")]);
        refused(&["pod", "rollback", "p", "first"], "is newer and not ours");
        zfs(&["destroy", &format!("{dataset}@backup")]);
        let (_, said) = lxcri(&node, &["pod", "snapshots", "p"]);
        assert!(said.contains("first\nsecond"), "{said}");
        wait_for("the rollback", Duration::from_secs(20), || {
            lxcri(&node, &["pod", "rollback", "p", "first"]).0.then_some(())
        });
        let (listed, said) = lxcri(&node, &["pod", "snapshots", "p"]);
        assert!(listed && !said.contains("second"), "{said}");
        let (compared, said) = lxcri(&node, &["pod", "diff", "p", "first"]);
        assert!(compared && !said.contains("/one") && !said.contains("/two"), "{said}");
        crictl.run(&["rmp", "-f", &pod]);
        clean(&node);
        let log = read_log(&node.pod_logs("p").join("c/0.log"));
        assert!(stream_lines(&log, "stderr").is_empty(), "{log:?}");
    });
}

/// Its processes put a link in the place of a folder while the folder is walked.
#[test]
fn a_comparison_stays_in_the_container() {
    isolated("a_comparison_stays_in_the_container", || {
        let node = Node::start(options());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        std::fs::create_dir_all("/tmp/secret/of-the-node").expect("folder");
        let pod = crictl.run_pod("p");
        let script = "mkdir /many; i=0; while [ $i -lt 2000 ]; do i=$((i+1)); : > /many/f$i; done; ln -s /tmp/secret /l; \
            : > /ready; while :; do mv /var /x; mv /l /var; mv /var /l; mv /x /var; done";
        let id = crictl.create(&pod, "p", "c", BUSYBOX, script);
        crictl.run(&["start", &id]);
        wait_for("its files", Duration::from_secs(60), || {
            crictl.try_run(&["exec", "-s", &id, "test", "-e", "/ready"]).0.then_some(())
        });
        for n in 0..30 {
            let (good, said) = lxcri(&node, &["pod", "diff", "p"]);
            assert!(good, "{said}");
            assert!(!said.contains("of-the-node"), "the node's files, by comparison {n}");
        }
        crictl.run(&["rmp", "-f", &pod]);
        clean(&node);
    });
}

#[test]
fn a_container_that_is_being_made_is_no_problem_of_the_store() {
    isolated("a_container_that_is_being_made_is_no_problem_of_the_store", || {
        let node = Node::start(options());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let file = crictl.file("late", &container_config("late", BUSYBOX, "true"));
        std::fs::write("/tmp/slow-clone", "").expect("a file");
        let args = ["create", "--no-pull", &pod, &file, &crictl.pod_file("p")];
        let mut create = crictl.command(&args).stdout(std::process::Stdio::null()).spawn().expect("crictl");
        wait_for("the clone to be under way", Duration::from_secs(30), || {
            std::path::Path::new("/tmp/cloning").exists().then_some(())
        });
        let (good, said) = lxcri(&node, &["storage", "check"]);
        assert!(good && said.contains("zfs: clean"), "{said}");
        // Its layers stay with it when the image goes meanwhile.
        crictl.run(&["rmi", BUSYBOX]);
        std::fs::remove_file("/tmp/slow-clone").expect("the file");
        assert!(create.wait().expect("crictl").success());
        clean(&node);
        crictl.run(&["pull", BUSYBOX]);
        crictl.run(&["rmp", "-f", &pod]);
        crictl.run(&["rmi", BUSYBOX]);
        clean(&node);
        let left = zfs(&["list", "-H", "-o", "name", "-r", "tank/lxcri/layers", "tank/lxcri/containers"]);
        assert_eq!(left.lines().collect::<Vec<_>>(), ["tank/lxcri/containers", "tank/lxcri/layers"]);
    });
}

#[test]
fn a_configuration_without_a_dataset_is_refused() {
    isolated("a_configuration_without_a_dataset_is_refused", || {
        let node = Node::prepare(options());
        let path = node.dir.join("config.toml");
        let text = std::fs::read_to_string(&path).expect("config.toml");
        for (dataset, part) in
            [("", "images.zfs.dataset"), ("tank/a b", "\\\"tank/a b\\\" is no dataset's name"), ("nopool/x", "nopool")]
        {
            std::fs::write(&path, text.replace("tank/lxcri", dataset)).expect("config.toml");
            let out =
                Command::new(daemon_program()).args(["serve", "--config"]).arg(&path).output().expect("the daemon");
            let said = describe(&out).replace('"', "\\\"");
            assert!(!out.status.success() && said.contains(part), "{dataset:?}: {said}");
        }
    });
}
