//! Images on the command line, under a whole daemon: what is there, fetched, copied, written to archives and taken from them.
//!
//! Run by `make test-images`, as root. A crash leaves nothing: see `support`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod support;

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::crictl::BUSYBOX;
use support::node::{Node, Options, writable_registry};
use support::{daemon_program, describe, isolated};

fn bad(node: &Node, args: &[&str], words: &str) {
    let (good, said) = node.lxcri(args);
    assert!(!good && said.contains(words), "{args:?}: not {words:?} in {said}");
}

fn json(node: &Node, args: &[&str]) -> Value {
    serde_json::from_str(&node.good(args)).unwrap()
}

#[test]
fn images_are_listed_told_and_removed_by_every_name() {
    isolated("images_are_listed_told_and_removed_by_every_name", || {
        let node = Node::start(Options::default());
        assert_eq!(json(&node, &["images", "-o", "json"]), serde_json::json!([]));
        let id = node.good(&["pull", BUSYBOX]);
        assert!(id.starts_with("sha256:") && id.lines().count() == 1, "{id}");
        node.good(&["tag", BUSYBOX, "mine.example/app:2"]);
        node.good(&["pin", "mine.example/app:2"]);
        let table = node.good(&["images"]);
        assert!(table.lines().count() == 2 && table.contains("(+1)") && table.contains("yes"), "{table}");
        let all = node.good(&["images", "-a"]);
        assert!(all.lines().count() == 4 && all.contains("mine.example/app:2") && all.contains("@sha256:"), "{all}");
        let list = json(&node, &["images", "--output", "json"]);
        assert_eq!((&list[0]["id"], list[0]["tags"].as_array().unwrap().len()), (&Value::from(id.clone()), 2));
        let yaml = node.good(&["images", "-o", "yaml"]);
        assert!(yaml.contains(&format!("id: {id}")) || yaml.contains(&format!("id: \"{id}\"")), "{yaml}");
        bad(&node, &["images", "-o", "xml"], "possible values");
        // Nobody reads on: no failure, and no panic.
        let piped = format!(
            "{} --local-socket {} images -a | true; exit ${{PIPESTATUS[0]}}",
            daemon_program().display(),
            node.local_socket().display()
        );
        let piped = Command::new("/bin/bash").args(["-c", &piped]).output().unwrap();
        assert!(piped.status.success(), "{}", describe(&piped));

        node.good(&["run", "-d", "--host-network", "--name", "one", "mine.example/app:2", "sleep", "100000"]);
        let told = json(&node, &["inspect", "mine.example/app:2"]);
        assert_eq!(told["id"], Value::from(id.clone()));
        assert_eq!(told["containers"].as_array().unwrap().len(), 1);
        assert!(told["chains"].as_array().unwrap().len() == 1 && told["config"].is_object(), "{told}");
        assert!(node.good(&["inspect", "-o", "yaml", &id]).contains("containers:"));
        bad(&node, &["inspect", "no/such"], "image no/such is not here");
        let gone = node.good(&["rmi", "mine.example/app:2"]);
        for name in [id.as_str(), BUSYBOX, "mine.example/app:2", "@sha256:"] {
            assert!(gone.contains(name), "{name} is not told: {gone}");
        }
        bad(&node, &["rmi", BUSYBOX], "is not here");
        // One that is not there does not keep the next from its turn.
        bad(&node, &["rm", "-f", "none", "one"], "none");
        assert!(!node.good(&["ps", "--all"]).contains("one"));
    });
}

#[test]
fn archives_go_out_and_come_back() {
    isolated("archives_go_out_and_come_back", || {
        let node = Node::start(Options::default());
        node.good(&["pull", BUSYBOX]);
        let file = |name: &str| node.dir.join(name).to_str().unwrap().to_owned();
        let (archive, docker) = (file("out.tar"), file("docker.tar"));
        node.good(&["export", BUSYBOX, &archive]);
        bad(&node, &["export", BUSYBOX, &archive], "is there already");
        node.good(&["export", "-f", BUSYBOX, &archive]);
        bad(&node, &["export", "no/such", &file("x")], "image no/such is not here");
        assert!(!Path::new(&file("x")).exists());
        // Other tools read it, and what they make of it is read here.
        let skopeo = |from: &str, to: &str| {
            let out =
                Command::new("/usr/bin/skopeo").args(["--insecure-policy", "copy", "-q", from, to]).output().unwrap();
            assert!(out.status.success(), "{}", describe(&out));
        };
        skopeo(&format!("oci-archive:{archive}"), &format!("docker-archive:{docker}:other.example/b:1"));
        skopeo(&format!("oci-archive:{archive}"), &format!("oci:{}:latest", file("layout")));
        let list = ["run", "--rm", "--host-network", BUSYBOX, "sh", "-c", "ls -lRn --full-time /bin /usr | sha256sum"];
        let files = node.good(&list);
        node.good(&["rmi", BUSYBOX]);
        let said = node.good(&["import", &archive]);
        assert!(said.contains(BUSYBOX), "{said}");
        let again = node.good(&list);
        assert_eq!(files, again, "the same files with the same attributes");
        assert!(node.good(&["import", "--pin", &docker]).contains("other.example/b:1"));
        assert!(node.good(&["import", &file("layout")]).contains("localhost/layout:latest"));
        assert!(
            node.good(&["import", "--as", "c.example/d:1", &format!("oci:{}", file("layout"))])
                .contains("c.example/d:1")
        );
        std::fs::write(file("text"), "no archive").unwrap();
        bad(&node, &["import", &file("text")], "no archive of images");
        bad(&node, &["import", &file("missing")], "missing");
        bad(&node, &["import", "/tmp"], "without an oci-layout");
        // An archive for standard output; one that is cut is not taken.
        let whole = std::fs::read(&archive).unwrap();
        std::fs::write(file("cut.tar"), &whole[..whole.len() / 2]).unwrap();
        bad(&node, &["import", &file("cut.tar")], "");
    });
}

#[test]
fn images_are_copied_to_registries() {
    isolated("images_are_copied_to_registries", || {
        let node = Node::start(Options::default());
        let (pid, other) = writable_registry(&node.dir);
        // From registry to registry, without a copy here: the digest stays.
        let said = node.good(&["push", BUSYBOX, &format!("{other}/copy/busybox:1")]);
        let digest = said.split_whitespace().nth(1).unwrap().to_owned();
        assert!(digest.starts_with("sha256:") && said.contains("from registry registry.k8s.io"), "{said}");
        assert_eq!(json(&node, &["images", "-o", "json"]), serde_json::json!([]));
        let again = node.good(&["push", BUSYBOX, &format!("{other}/copy/busybox:2")]);
        assert!(again.contains(&digest) && again.contains(" 0 blobs sent"), "{again}");
        // Within a registry blobs are taken over.
        let moved = node.good(&["push", &format!("{other}/copy/busybox:1"), &format!("{other}/another:1")]);
        assert!(moved.contains(&digest) && moved.contains(" 0 blobs sent"), "{moved}");
        node.good(&["pull", &format!("{other}/another@{digest}")]);
        node.good(&["run", "--rm", "--host-network", &format!("{other}/copy/busybox:2"), "true"]);
        // What no registry has goes out of the store.
        let run =
            ["run", "-d", "--host-network", "--name", "one", BUSYBOX, "sh", "-c", "echo made > /made; sleep 100000"];
        node.good(&run);
        support::wait_for("its file", std::time::Duration::from_secs(30), || {
            node.lxcri(&["exec", "one", "test", "-e", "/made"]).0.then_some(())
        });
        node.good(&["container", "commit", "one", "local/made:1", "cat", "/made"]);
        let said = node.good(&["push", "local/made:1", &format!("{other}/made:1")]);
        assert!(said.contains("from this node's store"), "{said}");
        assert_eq!(node.good(&["run", "--rm", "--host-network", &format!("{other}/made:1")]), "made");
        bad(&node, &["push", "local/made:1", "127.0.0.1:1/x:1"], "connection failed");
        bad(&node, &["push", "local/made:1", &format!("{other}/x@{digest}")], "a name with a tag is needed");
        bad(&node, &["push", &format!("{other}/no/such:1"), &format!("{other}/x:1")], "404");
        node.good(&["rm", "-f", "one"]);
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    });
}

#[test]
fn what_is_stored_is_compared_with_what_came() {
    isolated("what_is_stored_is_compared_with_what_came", || {
        // The driver zfs has a check of its own, and tests of it.
        let node = Node::start(Options { zfs: false, ..Options::default() });
        let id = node.good(&["pull", BUSYBOX]);
        let layers = node.dir.join("lib/overlay/layers");
        let layer = std::fs::read_dir(&layers).unwrap().next().unwrap().unwrap().path();
        support::wait_for("its sum", std::time::Duration::from_secs(20), || layer.join("sum").exists().then_some(()));
        node.good(&["run", "-d", "--host-network", "--name", "one", BUSYBOX, "sleep", "100000"]);
        let said = node.good(&["storage", "check"]);
        assert!(said.contains("overlay: clean") && said.contains("1 layers, 1 root file systems"), "{said}");
        // A layer without a sum gets one; another content with the same size and time is found, and so is a damaged blob.
        std::fs::remove_file(layer.join("sum")).unwrap();
        assert!(node.good(&["storage", "check"]).contains("1 layers had no sum"));
        let file = layer.join("fs/etc/passwd");
        let (old, time) = (std::fs::read(&file).unwrap(), std::fs::metadata(&file).unwrap().modified().unwrap());
        let set = |content: &[u8]| {
            std::fs::write(&file, content).unwrap();
            std::fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
        };
        let mut other = old.clone();
        other[0] ^= 1;
        set(&other);
        bad(&node, &["storage", "check"], "");
        let told = |words: &str| {
            let out = Command::new(daemon_program())
                .arg("--local-socket")
                .arg(node.local_socket())
                .args(["storage", "check"])
                .output();
            let said = String::from_utf8_lossy(&out.unwrap().stdout).into_owned();
            assert!(said.contains(words), "not {words:?} in {said}");
        };
        told("is not what was unpacked");
        set(&old);
        node.good(&["storage", "check"]);
        let blob = node.dir.join("lib/images/blobs/sha256").join(id.trim_start_matches("sha256:"));
        let config = std::fs::read(&blob).unwrap();
        std::fs::write(&blob, b"{}").unwrap();
        told("is damaged");
        std::fs::remove_file(&blob).unwrap();
        told("No such file");
        std::fs::write(&blob, config).unwrap();
        node.good(&["storage", "check", "--repair"]);
        node.good(&["rm", "-f", "one"]);
    });
}

/// A terminal has a bar for each layer; what is here already is told as such.
#[test]
fn a_pull_is_shown_on_a_terminal() {
    isolated("a_pull_is_shown_on_a_terminal", || {
        let node = Node::start(Options::default());
        let pull =
            format!("{} --local-socket {} pull {BUSYBOX}", daemon_program().display(), node.local_socket().display());
        let shown = || {
            let out = Command::new("/usr/bin/script")
                .args(["-qec", &pull, "/dev/null"])
                .env("TERM", "xterm")
                .output()
                .unwrap();
            assert!(out.status.success(), "{}", describe(&out));
            String::from_utf8_lossy(&out.stdout).into_owned()
        };
        let first = shown();
        assert!(first.contains("done") && first.contains("sha256:") && first.contains('['), "{first}");
        let second = shown();
        assert!(!second.contains('[') || !second.contains("done"), "{second}");
        let quiet = node.good(&["pull", "-q", BUSYBOX]);
        assert!(quiet.starts_with("sha256:") && quiet.lines().count() == 1);
        bad(&node, &["pull", "registry.k8s.io/no/such:1"], "no/such");
        bad(&node, &["pull", "--keyfile", "/etc/passwd", BUSYBOX], "for containers");
    });
}
