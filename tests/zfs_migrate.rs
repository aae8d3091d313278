//! `storage migrate` on a pool of zfs-fuse: images with whiteouts, links and attributes and an ended container's files are the same
//! after it, it is refused while anything runs, and killed in the middle it goes on where it was.
//!
//! Run by `cargo test --test zfs_migrate`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // tests start programs and write files plainly

mod support;

use std::process::Command;
use std::time::Duration;

use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::{daemon_program, describe, isolated, wait_for};

/// `storage migrate`, killed at a named point if there is one.
fn migrate(node: &Node, killed_at: Option<&str>) -> (bool, String) {
    let mut command = Command::new(daemon_program());
    command.args(["storage", "migrate", "--config"]).arg(node.dir.join("config.toml"));
    if let Some(point) = killed_at {
        command.env("LXCRI_FAILPOINT", point);
    }
    let out = command.output().expect("our command line");
    (out.status.success(), describe(&out))
}

fn refused(node: &Node, killed_at: Option<&str>, words: &str) {
    let (good, said) = migrate(node, killed_at);
    assert!(!good && said.contains(words), "{words}: {said}");
}

const CHANGES: &str = "echo made > /made; chown 3:4 /made; chmod 2755 /made; ln /made /second; rm /etc/passwd; \
    rm -r /var; mkdir /var; echo new > /var/only; ln -s nowhere /link; mkfifo /fifo";
const LOOK: &str = "stat -c '%n %a %u:%g %h' /made /second; cat /second; ls /etc/passwd 2>&1; ls /var; readlink /link";

#[test]
fn what_was_in_the_overlay_store_is_the_same_in_the_pool() {
    isolated("what_was_in_the_overlay_store_is_the_same_in_the_pool", || {
        let mut node = Node::prepare(Options { zfs: true, pool_size: "1G".into(), ..Options::default() });
        let path = node.dir.join("config.toml");
        let zfs = std::fs::read_to_string(&path).expect("config.toml");
        let overlay = zfs.replace("driver = \"zfs\"", "driver = \"overlay\"");
        assert_ne!(zfs, overlay);
        std::fs::write(&path, &overlay).expect("config.toml");
        node.start_daemon();
        node.good(&["run", "--host-network", "--name", "one", BUSYBOX, "/bin/sh", "-c", CHANGES]);
        node.good(&["container", "commit", "one", "local/made:1", "sh", "-c", LOOK]);
        node.good(&[
            "run",
            "--host-network",
            "--name",
            "ended",
            "local/made:1",
            "sh",
            "-c",
            "echo mine > /mine; rm /made",
        ]);
        node.good(&["run", "-d", "--host-network", "--name", "runs", "local/made:1", "sh", "-c", "sleep 10000"]);
        let told = node.good(&["run", "--rm", "--host-network", "local/made:1"]);
        assert!(told.starts_with("/made 2755 3:4 2\n/second 2755 3:4 2\nmade\n"), "{told}");

        refused(&node, None, "images.driver is \"overlay\"");
        std::fs::write(&path, &zfs).expect("config.toml");
        refused(&node, None, "another daemon");
        let images = |node: &Node| {
            let mut all: Vec<_> = node
                .good(&["images"])
                .lines()
                .map(|l| l.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
                .collect();
            all.sort();
            all
        };
        let before = images(&node);
        node.stop_daemon();
        refused(&node, None, "(\"runs\") runs: stop it first");
        std::fs::write(&path, &overlay).expect("config.toml");
        node.start_daemon();
        node.good(&["rm", "-f", "runs"]);
        node.stop_daemon();
        std::fs::write(&path, &zfs).expect("config.toml");

        for point in ["zfs.layer.unpacked", "zfs.layer.after_snapshot", "zfs.clone.after"] {
            refused(&node, Some(point), "signal: 9");
        }
        let (moved, said) = migrate(&node, None);
        assert!(
            moved && said.contains("local/made:1: ") && said.contains("layers moved, the same on both sides"),
            "{said}"
        );
        assert!(said.matches("container ").count() >= 2 && said.contains("all is in tank/lxcri"), "{said}");
        let (again, said) = migrate(&node, None);
        assert!(again && said.contains(": 0 of "), "{said}");

        node.start_daemon();
        assert_eq!(images(&node), before);
        assert_eq!(node.good(&["run", "--rm", "--host-network", "local/made:1"]), told);
        wait_for("a clean store", Duration::from_secs(60), || {
            let (good, said) = node.lxcri(&["storage", "check"]);
            (good && said.contains("zfs: clean")).then_some(())
        });
        // What the ended container had written came along.
        let said = node.good(&["pod", "diff", "ended"]);
        assert!(said.contains("ended A /mine") && said.contains("ended D /made"), "{said}");
        for name in ["one", "ended"] {
            node.good(&["rm", name]);
        }
    });
}

/// Of a comparison that fails only what that run made is removed: an image may be nowhere else than in the pool.
#[test]
fn a_tree_that_differs_takes_nothing_with_it_that_was_there() {
    isolated("a_tree_that_differs_takes_nothing_with_it_that_was_there", || {
        let mut node = Node::prepare(Options { zfs: true, pool_size: "1G".into(), ..Options::default() });
        let path = node.dir.join("config.toml");
        let zfs = std::fs::read_to_string(&path).expect("config.toml");
        let overlay = zfs.replace("driver = \"zfs\"", "driver = \"overlay\"");
        let made = |node: &Node, name: &str| {
            let script = format!("echo {name} > /made-{name}");
            node.good(&["run", "--host-network", "--name", name, BUSYBOX, "/bin/sh", "-c", &script]);
            node.good(&["container", "commit", name, &format!("local/{name}:1")]);
            node.good(&["rm", name]);
        };
        let layers = || {
            let mut command = Command::new("/usr/sbin/zfs");
            let all = support::run(command.args(["list", "-H", "-o", "name", "-r", "tank/lxcri/layers"]));
            all.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        std::fs::write(&path, &overlay).expect("config.toml");
        node.start_daemon();
        made(&node, "first");
        node.stop_daemon();
        std::fs::write(&path, &zfs).expect("config.toml");
        let (moved, said) = migrate(&node, None);
        assert!(moved, "{said}");
        node.start_daemon();
        made(&node, "only");
        node.stop_daemon();
        let before = layers();

        // One image that is to be moved; its base differs by now, which is that of the other one as well.
        std::fs::write(&path, &overlay).expect("config.toml");
        node.start_daemon();
        made(&node, "more");
        node.good(&["rmi", "local/first:1"]);
        node.good(&["rmi", BUSYBOX]);
        node.stop_daemon();
        std::fs::write(&path, &zfs).expect("config.toml");
        let script = "cd $0 && for f in */fs/etc/group; do echo odd >> $f; done";
        support::run(Command::new("sh").args(["-c", script]).arg(node.dir.join("lib/overlay/layers")));
        for _ in 0..2 {
            refused(&node, None, "/etc/group: its ");
            // At once, not with the daemon's next start.
            assert_eq!(layers(), before);
        }
        node.start_daemon();
        let told = node.good(&["run", "--rm", "--host-network", "local/only:1", "cat", "/made-only"]);
        assert_eq!(told, "only");
    });
}
