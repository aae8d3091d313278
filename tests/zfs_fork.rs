//! `pod fork` under a whole daemon on a pool of zfs-fuse: forks of a cut and of now, what they share with the pod that they are
//! of, and that neither harms the other when it goes.
//!
//! Run by `cargo test --test zfs_fork`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // tests start programs plainly

mod support;

use std::time::Duration;

use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::{isolated, wait_for};

/// Id and address of the container of a pod, as `ps` tells them.
fn container(node: &Node, pod: &str) -> (String, String) {
    let listed = node.good(&["ps"]);
    let line =
        listed.lines().find(|l| l.contains(&format!("tests/{pod} "))).unwrap_or_else(|| panic!("{pod}: {listed}"));
    let columns: Vec<&str> = line.split_whitespace().collect();
    (columns[0].to_owned(), columns[3].to_owned())
}

#[test]
fn forks_begin_as_the_pod_was_and_go_their_own_way() {
    isolated("forks_begin_as_the_pod_was_and_go_their_own_way", || {
        let node = Node::start(Options { zfs: true, pool_size: "1G".into(), ..Options::default() });
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let script = "echo $GREETING >> /greetings; [ -e /state ] || echo first > /state; echo up > /up; sleep 10000";
        let id = crictl.create(&pod, "p", "c", BUSYBOX, script);
        crictl.run(&["start", &id]);
        let up = |id: &str| {
            wait_for("its files", Duration::from_secs(30), || {
                node.lxcri(&["exec", id, "test", "-e", "/up"]).0.then_some(())
            });
        };
        up(&id);
        node.good(&["pod", "snapshot", "p", "one"]);
        crictl.run(&["exec", "-s", &id, "sh", "-c", "echo second > /state"]);

        let refused = |args: &[&str], words: &str| {
            let (good, said) = node.lxcri(args);
            assert!(!good && said.contains(words), "{args:?}: {said}");
        };
        refused(&["pod", "fork", "p", "none"], "no snapshot \"none\"");
        refused(&["pod", "fork", "nobody"], "no pod");
        refused(&["pod", "snapshot", "p", "x", "--as", "y"], "--as names a fork");
        refused(&["pod", "fork", "p", "one", "--as", "../x"], "a fork's name \"../x\"");
        node.good(&["pod", "fork", "p", "one", "--as", "then"]);
        refused(&["pod", "fork", "p", "--as", "then"], "already");
        node.good(&["pod", "fork", "p", "--as", "now"]);
        let ((of, old_ip), (then, then_ip), (now_c, now_ip)) =
            (container(&node, "p"), container(&node, "then"), container(&node, "now"));
        assert!(id.starts_with(&of));
        assert!(old_ip != then_ip && then_ip != now_ip && old_ip != now_ip, "{old_ip} {then_ip} {now_ip}");
        let read = |id: &str, file: &str| node.good(&["exec", id, "cat", file]);
        for (id, state) in [(&then, "first"), (&now_c, "second")] {
            up(id);
            assert_eq!(read(id, "/state"), state);
            // The old pod's greeting and its own: the environment's values came along.
            wait_for("its greeting", Duration::from_secs(20), || {
                (read(id, "/greetings") == "hello\nhello").then_some(())
            });
        }
        node.good(&["exec", &now_c, "sh", "-c", "echo third > /state"]);
        assert_eq!((read(&then, "/state"), read(&of, "/state")), ("first".into(), "second".into()));
        // A kubelet knows nothing of them.
        assert_eq!(crictl.run(&["pods", "-q"]), pod);
        assert_eq!(node.good(&["pod", "snapshots", "p"]), "one");
        // Neither needs the pod that it is of, nor the other.
        crictl.run(&["rmp", "-f", &pod]);
        assert_eq!((read(&then, "/state"), read(&now_c, "/state")), ("first".into(), "third".into()));
        node.good(&["rm", "--force", &then]);
        assert_eq!(read(&now_c, "/state"), "third");
        node.good(&["rm", "--force", &now_c]);
        wait_for("a clean store", Duration::from_secs(60), || {
            let said = node.good(&["storage", "check"]);
            (said.contains("0 root file systems") && !said.contains("destroyed")).then_some(())
        });
    });
}
