//! `container commit` under a whole daemon: what a container has changed becomes an image that runs, the same changes are the
//! same layer, and refusals leave nothing. Forks, which the overlay driver has not, are refused by name.
//!
//! Run by `cargo test --test commit`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // tests start programs and write files plainly

mod support;

use std::time::Duration;

use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::{isolated, wait_for};

/// All that layers have to carry.
const CHANGES: &str = "\
    echo made > /made; chown 12:34 /made; chmod 4750 /made; ln /made /etc/second; ln -s ../made /etc/link; \
    rm /etc/passwd; rm -r /var; mkdir /var; echo new > /var/only; mkfifo /fifo; \
    touch -d '2001-02-03 04:05:06' /old; mkdir -p /deep/er; : > \"/deep/er/$(printf 'x%.0s' $(seq 150))\"; \
    echo ready > /ready; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
/// Tells what became of them.
const LOOK: &str = "\
    stat -c '%n %a %u:%g %h' /made /etc/second; readlink /etc/link; cat /etc/second; ls /etc/passwd 2>&1; ls /var; \
    stat -c %F /fifo; stat -c %Y /old; ls /deep/er | wc -c; echo $ADDED";

#[test]
fn what_a_container_changed_becomes_an_image_that_runs() {
    isolated("what_a_container_changed_becomes_an_image_that_runs", || {
        let mut node = Node::start(Options::default());
        let run = ["run", "-d", "--host-network", "--name", "one", BUSYBOX, "/bin/sh", "-c", CHANGES];
        let id = node.good(&run);
        wait_for("its changes", Duration::from_secs(60), || {
            node.lxcri(&["exec", "one", "test", "-e", "/ready"]).0.then_some(())
        });
        let said = node.good(&[
            "container",
            "commit",
            "-e",
            "ADDED=by commit",
            "--message",
            "why",
            "one",
            "local/made:1",
            "sh",
            "-c",
            LOOK,
        ]);
        assert!(said.contains("docker.io/local/made:1"), "{said}");
        let first = said.split_whitespace().next().expect("an id").to_owned();
        let told = node.good(&["run", "--rm", "--host-network", "local/made:1"]);
        let expected = "/made 4750 12:34 2\n/etc/second 4750 12:34 2\n../made\nmade\n\
            ls: /etc/passwd: No such file or directory\nonly\nfifo\n981173106\n151\nby commit";
        assert_eq!(told, expected);

        // The container runs on.
        let count = || node.good(&["logs", "one"]).lines().count();
        let before = count();
        wait_for("the container to go on", Duration::from_secs(20), || (count() > before + 3).then_some(()));

        // The same changes are the same layer.
        let said = node.good(&["container", "commit", &id, "local/made:2"]);
        let second = said.split_whitespace().next().expect("an id").to_owned();
        let config = |id: &str| -> serde_json::Value {
            let blob = node.dir.join("lib/images/blobs/sha256").join(id.trim_start_matches("sha256:"));
            serde_json::from_slice(&std::fs::read(blob).expect("the config")).expect("JSON")
        };
        let (one, two) = (config(&first), config(&second));
        assert_eq!(one["rootfs"]["diff_ids"], two["rootfs"]["diff_ids"]);
        assert_ne!(one["config"], two["config"]);
        assert_eq!(one["history"].as_array().and_then(|h| h.last()).map(|h| &h["comment"]), Some(&"why".into()));

        // An image of an image, after a restart, and of a container that has ended.
        node.crash_daemon();
        node.good(&["run", "--host-network", "--name", "two", "local/made:1", "sh", "-c", "rm /made; echo x > /x"]);
        node.good(&[
            "container",
            "commit",
            "two",
            "local/made:3",
            "sh",
            "-c",
            "cat /x /etc/second; ls /made 2>&1; true",
        ]);
        let told = node.good(&["run", "--rm", "--host-network", "local/made:3"]);
        assert_eq!(told, "x\nmade\nls: /made: No such file or directory");

        let refused = |args: &[&str], words: &str| {
            let (good, said) = node.lxcri(args);
            assert!(!good && said.contains(words), "{args:?}: {said}");
        };
        refused(&["container", "commit", "nobody", "local/made:4"], "no container");
        refused(&["container", "commit", "one", "UPPER:x"], "UPPER");
        refused(&["container", "commit", "one", &format!("a@{first}")], "a name with a tag is needed");
        refused(&["container", "commit", "-e", "SECRET", "one", "local/made:4"], "not NAME=VALUE");
        refused(&["pod", "fork", "one"], "overlay driver has no forks");
        assert_eq!(node.crictl().run(&["images", "-q"]).lines().count(), 4);
        node.crictl().run(&["rmi", BUSYBOX]);
        refused(&["container", "commit", "one", "local/made:4"], "not here any more");
        // Images made of it have all that they need.
        let told = node.good(&["run", "--rm", "--host-network", "local/made:3"]);
        assert!(told.starts_with("x\nmade"), "{told}");
        for pod in ["one", "two"] {
            node.good(&["rm", "-f", pod]);
        }
        assert_eq!(node.good(&["ps", "-a"]).lines().count(), 1, "nothing is left");
    });
}

#[test]
fn images_are_named_pinned_and_pruned() {
    isolated("images_are_named_pinned_and_pruned", || {
        let node = Node::start(Options::default());
        let run = ["run", "-d", "--host-network", "--name", "one", BUSYBOX, "sleep", "100000"];
        node.good(&run);
        let busybox = node.good(&["pull", BUSYBOX]);
        let made = |name: &str| {
            let said = node.good(&["container", "commit", "one", name, "sh", "-c", &format!("echo {name}")]);
            said.split_whitespace().next().expect("an id").to_owned()
        };
        let (a, b, c) = (made("local/a:1"), made("local/b:1"), made("local/c:1"));
        // One more name, the daemon killed or not; a name that another image had.
        assert!(node.good(&["tag", "local/a:1", "other.example/x"]).contains("other.example/x:latest"));
        assert!(node.good(&["tag", &b, "local/a:1"]).starts_with(&b));
        assert_eq!(node.good(&["run", "--rm", "--host-network", "local/a:1"]), "local/b:1");
        assert_eq!(node.good(&["run", "--rm", "--host-network", "other.example/x"]), "local/a:1");
        let refused = |args: &[&str], words: &str| {
            let (good, said) = node.lxcri(args);
            assert!(!good && said.contains(words), "{args:?}: {said}");
        };
        refused(&["tag", "no/such", "x"], "image no/such is not here");
        refused(&["tag", &a, "UPPER"], "UPPER");
        refused(&["tag", &a, &format!("x@{a}")], "a digest is no name to give");
        refused(&["pin", "no/such"], "image no/such is not here");
        refused(&["rmi", "no/such"], "image no/such is not here");
        // One without a name; what is named, pinned or used stays.
        node.good(&["tag", &b, "other.example/x"]);
        let dry = node.good(&["prune", "--dry-run"]);
        assert_eq!((dry.lines().count(), dry.trim()), (1, a.as_str()));
        assert_eq!(node.good(&["prune"]).trim(), format!("removed {a}"));
        node.good(&["pin", "local/c:1"]);
        let gone = node.good(&["prune", "--all"]);
        assert!(gone.contains(&b) && !gone.contains(&c) && !gone.contains(busybox.trim()), "{gone}");
        node.good(&["unpin", &c]);
        let gone = node.good(&["rmi", &c]);
        assert!(gone.contains(&c) && gone.contains("local/c:1"), "every name is told: {gone}");
        let left = node.good(&["images"]);
        assert_eq!(left.lines().count(), 2, "{left}");
        assert_eq!(node.good(&["exec", "one", "echo", "lives"]), "lives");
    });
}
