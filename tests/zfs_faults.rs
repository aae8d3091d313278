//! The ZFS driver where others have a hand in the pool, programs are late, callers go away, and streams are not what they say:
//! nothing stays frozen, nothing of others is touched, nothing is left.
//!
//! Run by `cargo test --test zfs_faults`, as root, on pools of zfs-fuse in the tests' environment. A crash leaves nothing: see
//! `support`.

#![allow(clippy::disallowed_methods)] // tests start programs and write files plainly

mod support;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::json;
use sha2::Digest as _;
use support::crictl::{BUSYBOX, Crictl, container_config};
use support::node::{Node, Options};
use support::{daemon_program, describe, isolated, run, wait_for};

/// Sleeps before or after a verb, for as long as /tmp/before-VERB or /tmp/after-VERB says. Waits at a [`Gate`]. Has no pool to list
/// while there is /tmp/away.
const PROGRAM: &str = "#!/bin/sh\n\
    gate() { [ ! -e /tmp/gate-$1 ] || : > /tmp/met-$1; while [ -e /tmp/gate-$1 ]; do sleep 0.05; done; }\n\
    [ $1 != list ] || [ ! -e /tmp/away ] || { echo \"cannot open 'tank': no such pool\" >&2; exit 1; }\n\
    gate before-$1\n\
    [ ! -e /tmp/gate-after-$1 ] || { /usr/sbin/${0##*/} \"$@\"; code=$?; gate after-$1; exit $code; }\n\
    [ ! -e /tmp/before-$1 ] || sleep $(cat /tmp/before-$1)\n\
    [ -e /tmp/after-$1 ] || exec /usr/sbin/${0##*/} \"$@\"\n\
    /usr/sbin/${0##*/} \"$@\"; code=$?; sleep $(cat /tmp/after-$1); exit $code\n";
const LONG: Duration = Duration::from_secs(30);

fn options() -> Options {
    std::fs::create_dir_all("/tmp/bin").expect("folder");
    let programs = ["/tmp/bin/zfs", "/tmp/bin/zpool"];
    for program in programs {
        std::fs::write(program, PROGRAM).expect("a program");
        std::fs::set_permissions(program, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    }
    Options { zfs: true, pool_size: "1G".into(), zfs_programs: programs.map(String::from), ..Options::default() }
}

/// While it lives, a verb of `zfs` is slow.
struct Slow(String);

impl Slow {
    fn verb(when: &str, verb: &str, seconds: u32) -> Self {
        let file = format!("/tmp/{when}-{verb}");
        std::fs::write(&file, seconds.to_string()).expect("a file");
        Self(file)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// While it lives, a verb waits: "before-snapshot", "after-get".
struct Gate(&'static str);

impl Gate {
    fn shut(place: &'static str) -> Self {
        std::fs::write(format!("/tmp/gate-{place}"), "").expect("a file");
        Self(place)
    }

    fn wait_for_one(&self) {
        let met = format!("/tmp/met-{}", self.0);
        wait_for(&met, LONG, || Path::new(&met).exists().then_some(()));
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(format!("/tmp/gate-{}", self.0));
    }
}

fn zfs(args: &[&str]) -> String {
    run(Command::new("/usr/sbin/zfs").args(args))
}

fn listed(root: &str) -> Vec<String> {
    let all = zfs(&["list", "-H", "-o", "name", "-t", "filesystem,snapshot", "-r", root]);
    all.lines().map(str::to_owned).collect()
}

fn command(node: &Node, args: &[&str]) -> Command {
    let mut command = Command::new(daemon_program());
    command.arg("--local-socket").arg(node.local_socket()).args(args).stdin(Stdio::null());
    command
}

fn lxcri(node: &Node, args: &[&str]) -> (bool, String) {
    let out = command(node, args).output().expect("our command line");
    (out.status.success(), describe(&out))
}

fn good(node: &Node, args: &[&str]) -> String {
    let out = command(node, args).output().expect("our command line");
    assert!(out.status.success(), "{args:?}: {}", describe(&out));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

fn refused(node: &Node, args: &[&str], words: &str) {
    let (good, said) = lxcri(node, args);
    assert!(!good && said.contains(words), "{args:?}: {said}");
}

/// Nothing is wrong, and nothing is under way any more.
fn clean(node: &Node) {
    let mut last = String::new();
    let until = Instant::now() + LONG;
    while Instant::now() < until {
        let (good, said) = lxcri(node, &["storage", "check"]);
        if good && !said.contains("being destroyed") {
            return;
        }
        last = said;
        std::thread::sleep(Duration::from_millis(200)); // the poll of a condition with a limit
    }
    panic!("not clean: {last}");
}

/// A container that writes a number into its log and /n again and again.
fn counting(node: &Node, crictl: &Crictl, pod: &str, name: &str) -> String {
    let script = "i=0; while :; do i=$((i+1)); echo $i; echo $i > /n; sleep 0.05; done";
    let id = crictl.create(pod, "p", name, BUSYBOX, script);
    crictl.run(&["start", &id]);
    assert!(counts(node, name, Duration::from_secs(20)));
    id
}

fn counts(node: &Node, name: &str, within: Duration) -> bool {
    let log = node.pod_logs("p").join(name).join("0.log");
    let length = || std::fs::metadata(&log).map_or(0, |m| m.len());
    let (before, until) = (length(), Instant::now() + within);
    while Instant::now() < until {
        if length() > before {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20)); // the poll of a condition with a limit
    }
    false
}

#[test]
fn nothing_stays_frozen() {
    isolated("nothing_stays_frozen", || {
        let mut node = Node::start(options());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        counting(&node, &crictl, &pod, "c");
        let frozen = |node: &Node| {
            let still = || (!counts(node, "c", Duration::from_millis(700))).then_some(());
            wait_for("the container to be frozen", LONG, still);
        };
        // The caller goes.
        let slow = Slow::verb("before", "snapshot", 6);
        let mut client = command(&node, &["pod", "snapshot", "p", "one"]).spawn().expect("our command line");
        frozen(&node);
        client.kill().and_then(|()| client.wait()).expect("killed");
        wait_for("the cut of a caller that has gone", LONG, || {
            good(&node, &["pod", "snapshots", "p"]).contains("one").then_some(())
        });
        assert!(counts(&node, "c", LONG), "it stays frozen");
        // Another cut does not let it run under the first.
        let mut first = command(&node, &["pod", "snapshot", "p", "two"]).spawn().expect("our command line");
        frozen(&node);
        let mut second = command(&node, &["pod", "snapshot", "p", "three"]).spawn().expect("our command line");
        drop(slow);
        while first.try_wait().expect("its state").is_none() {
            let early = counts(&node, "c", Duration::from_millis(100));
            assert!(
                !early
                    || first.try_wait().expect("its state").is_some()
                    || listed("tank").iter().any(|n| n.ends_with("-two"))
            );
        }
        assert!(first.wait().expect("its end").success() && second.wait().expect("its end").success());
        // The daemon is killed over it.
        let slow = Slow::verb("before", "snapshot", 60);
        let mut client = command(&node, &["pod", "snapshot", "p", "four"]).spawn().expect("our command line");
        frozen(&node);
        node.kill_daemon();
        drop(slow);
        client.wait().expect("its end");
        assert!(!counts(&node, "c", Duration::from_millis(500)));
        node.start_daemon();
        assert!(counts(&node, "c", LONG), "it stays frozen");
        crictl.run(&["rmp", "-f", &pod]);
        clean(&node);
    });
}

#[test]
fn cuts_are_in_order_and_others_snapshots_stay() {
    isolated("cuts_are_in_order_and_others_snapshots_stay", || {
        let mut node = Node::start(options());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let first = counting(&node, &crictl, &pod, "a");
        for name in ["b", "a", "c"] {
            good(&node, &["pod", "snapshot", "p", name]);
        }
        node.crash_daemon();
        assert_eq!(good(&node, &["pod", "snapshots", "p"]), "b\na\nc");
        let dataset = format!("tank/lxcri/containers/{first}");
        zfs(&["snapshot", &format!("{dataset}@autosnap_daily")]);
        crictl.run(&["stop", "-t", "0", &first]);
        refused(&node, &["pod", "rollback", "p", "a"], "autosnap_daily");
        assert_eq!(good(&node, &["pod", "snapshots", "p"]), "b\na\nc");
        zfs(&["destroy", &format!("{dataset}@autosnap_daily")]);
        // Of two containers one runs, which zfs-fuse can't put back: neither is.
        let second = counting(&node, &crictl, &pod, "b");
        good(&node, &["pod", "snapshot", "p", "both"]);
        good(&node, &["pod", "snapshot", "p", "last"]);
        assert!(!lxcri(&node, &["pod", "rollback", "p", "both"]).0);
        let cuts =
            listed(&dataset).iter().filter_map(|n| n.split_once('@').map(|(_, s)| s.to_owned())).collect::<Vec<_>>();
        assert!(cuts.contains(&"lxcri-last".to_owned()), "one of two was put back: {cuts:?}");
        crictl.run(&["stop", "-t", "0", &second]);
        wait_for("the rollback", LONG, || lxcri(&node, &["pod", "rollback", "p", "a"]).0.then_some(()));
        assert_eq!(good(&node, &["pod", "snapshots", "p"]), "b\na\nboth\nlast", "those of the other container stay");
        clean(&node);
        // The name is there in the pool of one of them.
        zfs(&["snapshot", &format!("{dataset}@lxcri-odd")]);
        refused(&node, &["pod", "snapshot", "p", "odd"], "odd");
        crictl.run(&["rmp", "-f", &pod]);
        clean(&node);
    });
}

#[test]
fn what_zfs_does_too_late_is_taken_away() {
    isolated("what_zfs_does_too_late_is_taken_away", || {
        let mut node = Node::prepare(options());
        let path = node.dir.join("config.toml");
        let text = std::fs::read_to_string(&path).expect("config.toml");
        assert!(text.contains("timeout = 40"));
        std::fs::write(&path, text.replace("timeout = 40", "timeout = 3")).expect("config.toml");
        node.start_daemon();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        counting(&node, &crictl, &pod, "c");
        let slow = Slow::verb("after", "clone", 8);
        let file = crictl.file("late", &container_config("late", BUSYBOX, "true"));
        let (made, said) = crictl.try_run(&["create", "--no-pull", &pod, &file, &crictl.pod_file("p")]);
        assert!(!made && said.contains("DeadlineExceeded"), "{said}");
        drop(slow);
        let slow = Slow::verb("after", "snapshot", 8);
        refused(&node, &["pod", "snapshot", "p", "one"], "not done after");
        drop(slow);
        assert!(counts(&node, "c", LONG), "it stays frozen");
        good(&node, &["pod", "snapshot", "p", "one"]);
        assert_eq!(good(&node, &["pod", "snapshots", "p"]), "one");
        crictl.run(&["rmp", "-f", &pod]);
        clean(&node);
        crictl.run(&["rmi", BUSYBOX]);
        clean(&node);
        assert_eq!(listed("tank"), ["tank", "tank/lxcri", "tank/lxcri/containers", "tank/lxcri/layers"]);
    });
}

/// A pool that is back is read anew: what an operation from before does at that moment is not forgotten.
#[test]
fn what_changes_while_the_pool_is_read_is_known() {
    isolated("what_changes_while_the_pool_is_read_is_known", || {
        let node = Node::start(options());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        counting(&node, &crictl, &pod, "c");
        let storage_is = |ready: bool| {
            wait_for(&format!("StorageReady: {ready}"), LONG, || {
                let info = crictl.json(&["info"]);
                let all = info["status"]["conditions"].as_array().expect("conditions").clone();
                all.iter().any(|c| c["type"] == "StorageReady" && c["status"] == ready).then_some(())
            });
        };
        let cut = Gate::shut("before-snapshot");
        let mut client = command(&node, &["pod", "snapshot", "p", "one"]).spawn().expect("our command line");
        cut.wait_for_one();
        std::fs::write("/tmp/away", "").expect("a file");
        storage_is(false);
        let list = Gate::shut("after-get");
        std::fs::remove_file("/tmp/away").expect("removed");
        list.wait_for_one();
        drop(cut);
        assert!(client.wait().expect("its end").success());
        drop(list);
        storage_is(true);
        assert_eq!(good(&node, &["pod", "snapshots", "p"]), "one");
        clean(&node);
        crictl.run(&["rmp", "-f", &pod]);
        clean(&node);
    });
}

#[test]
fn a_layer_with_a_snapshot_of_others_stays_whole() {
    isolated("a_layer_with_a_snapshot_of_others_stays_whole", || {
        let mut node = Node::start(options());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let layer = listed("tank/lxcri/layers").into_iter().find(|n| n.ends_with("@ready")).expect("a layer");
        let layer = layer.trim_end_matches("@ready").to_owned();
        let others = format!("{layer}@autosnap_daily");
        zfs(&["snapshot", &others]);
        crictl.run(&["rmi", BUSYBOX]);
        wait_for("that it can't be destroyed", LONG, || {
            lxcri(&node, &["storage", "check"]).1.contains("can't be destroyed").then_some(())
        });
        let runs = |name: &str| {
            crictl.run(&["pull", BUSYBOX]);
            let pod = crictl.run_pod("p");
            let id = crictl.create(&pod, "p", name, BUSYBOX, "exit 3");
            crictl.run(&["start", &id]);
            assert_eq!(crictl.wait_exit(&id)["exitCode"], 3);
            crictl.run(&["rmp", "-f", &pod]);
        };
        runs("back");
        clean(&node);
        // Half of it is gone, as an older daemon or a crash leaves it.
        crictl.run(&["rmi", BUSYBOX]);
        node.kill_daemon();
        zfs(&["destroy", &format!("{layer}@ready")]);
        node.start_daemon();
        let begun = Instant::now();
        let (pulled, said) = crictl.try_run(&["pull", BUSYBOX]);
        assert!(!pulled && said.contains("does not go") && said.contains("autosnap_daily"), "{said}");
        assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
        zfs(&["destroy", &others]);
        runs("anew");
        clean(&node);
    });
}

#[test]
fn a_dataset_of_others_is_not_taken() {
    isolated("a_dataset_of_others_is_not_taken", || {
        let mut node = Node::prepare(options());
        zfs(&["create", "-o", "mountpoint=/tmp/data", "tank/data"]);
        zfs(&["create", "tank/data/subvol-100-disk-0"]);
        zfs(&["create", "tank/mine"]);
        // However little is in it.
        zfs(&["create", "-o", "mountpoint=/tmp/few", "tank/few"]);
        std::fs::write("/tmp/few/a-file", "x").expect("a file");
        let path = node.dir.join("config.toml");
        let text = std::fs::read_to_string(&path).expect("config.toml");
        let look = || zfs(&["get", "-r", "-H", "-o", "name,property,value,source", "mountpoint,lxcri:owner", "tank"]);
        let before = look();
        let serve = |dataset: &str| {
            std::fs::write(&path, text.replace("tank/lxcri", dataset)).expect("config.toml");
            describe(
                &Command::new(daemon_program()).args(["serve", "--config"]).arg(&path).output().expect("the daemon"),
            )
        };
        for dataset in ["tank/data", "tank", "tank/few"] {
            let said = serve(dataset);
            assert!(said.contains("is not empty") && said.contains("lxcri:owner="), "{dataset}: {said}");
            assert_eq!(look(), before, "{dataset}");
        }
        assert_eq!(std::fs::read_to_string("/tmp/few/a-file").expect("their file"), "x");
        // An empty one is what it was made for; what is in it when it was not ours is nobody's to take.
        std::fs::write(&path, text.replace("tank/lxcri", "tank/mine")).expect("config.toml");
        node.start_daemon();
        node.stop_daemon();
        zfs(&["destroy", "tank/mine/layers"]);
        zfs(&["create", "tank/mine/layers"]);
        let said = serve("tank/mine");
        assert!(said.contains("tank/mine/layers is there and is not of this installation"), "{said}");
    });
}

fn frame(out: &mut Vec<u8>, kind: u8, content: &[u8]) {
    out.push(kind);
    out.extend((content.len() as u32).to_be_bytes());
    out.extend(content);
}

fn hex(data: &[u8]) -> String {
    sha2::Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect()
}

/// An image with one layer, whatever that is, as `image send` writes them.
fn image(name: &str, layer: &[u8]) -> Vec<u8> {
    let diff = format!("sha256:{}", hex(name.as_bytes()));
    let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let config = json!({"os": "linux", "architecture": architecture, "config": {},
                        "rootfs": {"type": "layers", "diff_ids": [diff]}});
    let head = json!({"driver": "zfs", "names": [name],
                      "config": base64::prelude::BASE64_STANDARD.encode(config.to_string()),
                      "layers": [{"diff_id": diff, "bytes": 1, "inodes": 1, "sent": true}]});
    let mut out = b"lxcri-image-1\n".to_vec();
    frame(&mut out, b'H', head.to_string().as_bytes());
    frame(&mut out, b'L', &[0, 0, 0, 0]);
    for piece in layer.chunks(256 << 10) {
        frame(&mut out, b'D', piece);
    }
    frame(&mut out, b'E', &sha2::Sha256::digest(layer));
    let sum = sha2::Sha256::digest(&out);
    frame(&mut out, b'Z', &sum);
    out
}

#[test]
fn streams_that_are_more_than_a_layer_leave_nothing() {
    isolated("streams_that_are_more_than_a_layer_leave_nothing", || {
        let node = Node::start(options());
        zfs(&["create", "-o", "mountpoint=/tmp/source", "tank/source"]);
        std::fs::write("/tmp/source/file", "text").expect("a file");
        zfs(&["create", "-o", "mountpoint=/tmp/victim", "-o", "refreservation=50M", "tank/source/child"]);
        zfs(&["snapshot", "-r", "tank/source@other"]);
        zfs(&["snapshot", "-r", "tank/source@ready"]);
        let send = |args: &[&str]| {
            let out = Command::new("/usr/sbin/zfs").arg("send").args(args).output().expect("zfs send");
            assert!(out.status.success(), "{}", describe(&out));
            out.stdout
        };
        let streams = [
            ("t/name:1", send(&["tank/source@other"]), "no snapshot @ready"),
            ("t/tree:1", send(&["-R", "tank/source@other"]), "no snapshot @ready"),
            ("t/all:1", send(&["-R", "tank/source@ready"]), "more than"),
        ];
        wait_for("the source to go", LONG, || {
            Command::new("/usr/sbin/zfs")
                .args(["destroy", "-r", "tank/source"])
                .status()
                .is_ok_and(|s| s.success())
                .then_some(())
        });
        for (name, stream, words) in streams {
            let file = Path::new("/tmp/stream");
            File::create(file).and_then(|mut f| f.write_all(&image(name, &stream))).expect("a stream");
            let mut recv = command(&node, &["image", "recv"]);
            let out = recv.stdin(File::open(file).expect("a stream")).output().expect("image recv");
            let said = describe(&out);
            assert!(!out.status.success() && said.contains(words), "{name}: {said}");
            clean(&node);
            assert_eq!(listed("tank/lxcri/layers"), ["tank/lxcri/layers"], "{name}");
        }
        assert!(!good(&node, &["images"]).contains("t/"));
    });
}
