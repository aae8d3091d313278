//! Pods with a user namespace through the real crictl: ids inside and out, root file system, volumes, streams, execs,
//! processes, network, and what is refused.
//!
//! Run by `cargo test --test userns`, as root. A crash leaves nothing: see `support`.

// A test starts programs and writes files plainly.
#![allow(clippy::disallowed_methods)]

mod support;

use std::io::Read;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use support::crictl::{BIG, BUSYBOX, Crictl, container_config, pod_config, read_log, stream_lines};
use support::node::{Node, Options};
use support::{describe, isolated, snapshot, wait_for};

const UID: u32 = 300_000;
const GID: u32 = 400_000;
const LENGTH: u32 = 65_536;

fn map(host_id: u32) -> Value {
    json!([{"host_id": host_id, "container_id": 0, "length": LENGTH}])
}

fn userns() -> Value {
    json!({"mode": 0, "uids": map(UID), "gids": map(GID)})
}

/// PID namespace modes of the CRI.
const POD: u32 = 0;
const CONTAINER: u32 = 1;
const TARGET: u32 = 3;

fn pod(node: &Node, name: &str, pid: u32) -> Value {
    let mut config = pod_config(name, &node.pod_logs(name));
    config["linux"]["security_context"]["namespace_options"] = json!({"pid": pid, "userns_options": userns()});
    config
}

fn container(name: &str, image: &str, pid: u32, script: &str) -> Value {
    let mut config = container_config(name, image, script);
    config["linux"]["security_context"]["namespace_options"] = json!({"pid": pid, "userns_options": userns()});
    config
}

/// As a kubelet asks for a volume of such a pod.
fn volume(host: &Path, container: &str) -> Value {
    json!({"host_path": host, "container_path": container, "uidMappings": map(UID), "gidMappings": map(GID)})
}

struct Pod<'a> {
    crictl: &'a Crictl,
    name: String,
    file: String,
    id: String,
}

impl<'a> Pod<'a> {
    fn run(crictl: &'a Crictl, config: &Value) -> Self {
        let name = config["metadata"]["name"].as_str().expect("a name").to_owned();
        let file = crictl.file(&format!("pod-{name}"), config);
        let id = crictl.run(&["runp", &file]);
        Self { crictl, name, file, id }
    }

    fn create(&self, config: &Value) -> String {
        let name = format!("{}-{}", self.name, config["metadata"]["name"].as_str().expect("a name"));
        self.crictl.run(&["create", "--no-pull", &self.id, &self.crictl.file(&name, config), &self.file])
    }

    fn start(&self, config: &Value) -> String {
        let id = self.create(config);
        self.crictl.run(&["start", &id]);
        id
    }

    /// Runs it to its end, which must be a success; gives what it said on stdout.
    fn output(&self, node: &Node, config: &Value) -> Vec<String> {
        let id = self.start(config);
        let status = self.crictl.wait_exit(&id);
        let name = config["metadata"]["name"].as_str().expect("a name");
        let log = read_log(&node.pod_logs(&self.name).join(name).join("0.log"));
        assert_eq!(status["exitCode"], 0, "{status}\n{log:#?}");
        stream_lines(&log, "stdout")
    }

    /// What creating it fails with.
    fn refusal(&self, config: &Value) -> String {
        let file = self.crictl.file("refused", config);
        let (done, said) = self.crictl.try_run(&["create", "--no-pull", &self.id, &file, &self.file]);
        assert!(!done, "{config} was made: {said}");
        said
    }

    fn remove(self) {
        self.crictl.run(&["stopp", &self.id]);
        self.crictl.run(&["rmp", "-f", &self.id]);
    }
}

fn lines_of(node: &Node, pod: &str, container: &str, count: usize) -> Vec<String> {
    let log = node.pod_logs(pod).join(container).join("0.log");
    wait_for(&format!("{count} lines of {container}"), Duration::from_secs(30), || {
        let lines = log.exists().then(|| stream_lines(&read_log(&log), "stdout"))?;
        (lines.len() >= count).then_some(lines)
    })
}

fn owner(path: &Path) -> (u32, u32) {
    let meta = std::fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (meta.uid(), meta.gid())
}

fn host_pid(crictl: &Crictl, id: &str) -> u64 {
    crictl.json(&["inspect", id])["info"]["pid"].as_u64().expect("a pid")
}

fn back_to(mut before: snapshot::Snapshot, node: &Node) {
    // The bridge stays, as bridges do.
    before.entry("interfaces").or_default().push("lxcri-t0".into());
    snapshot::assert_back_to(&before, node);
}

#[test]
fn a_pod_with_a_user_namespace_lives_like_any_other() {
    isolated("a_pod_with_a_user_namespace_lives_like_any_other", || {
        let mut node = Node::start(Options::default());
        let crictl = node.crictl();
        let info = crictl.json(&["info"]);
        let handlers = info["runtimeHandlers"].as_array().expect("handlers");
        assert!(handlers.iter().all(|h| h["features"]["user_namespaces"] == true), "{info}");
        crictl.run(&["pull", BUSYBOX]);
        let before = snapshot::take(&node);

        let volume_dir = node.dir.join("volume");
        std::fs::create_dir(&volume_dir).expect("a volume");
        for (name, id) in [("of-root", 0), ("of-1000", 1000)] {
            std::fs::write(volume_dir.join(name), name).expect("a file");
            chown(volume_dir.join(name), Some(id), Some(id)).expect("its owner");
        }
        let mut config = pod(&node, "u", CONTAINER);
        config["linux"]["sysctls"] = json!({"kernel.msgmax": "4321", "net.ipv4.ip_unprivileged_port_start": "7"});
        let u = Pod::run(&crictl, &config);
        let status = crictl.json(&["inspectp", &u.id]);
        let shown = &status["status"]["linux"]["namespaces"]["options"]["usernsOptions"];
        assert_eq!(shown["uids"][0]["hostId"], UID, "{status}");

        // Inside: root, who owns the image and the volumes, and can write to all of them.
        let script = "set -e; tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map; id -u; id -g; \
            stat -c %u:%g / /bin/busybox /etc/hosts /dev/shm /vol/of-root /vol/of-1000 /raw/of-root; \
            echo new > /new; chown 33:44 /new; echo grown >> /etc/passwd; \
            echo new > /vol/new; echo theirs > /vol/theirs; chown 33:44 /vol/theirs; echo x > /dev/shm/x; \
            echo '# mine' >> /etc/hosts; echo reopened > /dev/stdout; echo err > /dev/stderr; \
            cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_unprivileged_port_start; \
            echo x > /ro/x 2> /dev/null || echo ro; echo x > /rro/x 2> /dev/null || echo rro; \
            head -c 2 /dev/zero | wc -c; test -d /sys/class/net/eth0; test -d /dev/mqueue; \
            mknod /tmp-null c 1 3 2> /dev/null || echo no mknod; echo ready; \
            trap 'exit 5' TERM; while :; do sleep 0.1; done";
        let mut main = container("main", BUSYBOX, CONTAINER, script);
        let with = |mut mount: Value, key: &str| {
            mount["readonly"] = true.into();
            if key == "rro" {
                mount["recursive_read_only"] = true.into();
            }
            mount
        };
        let raw = json!({"host_path": volume_dir, "container_path": "/raw"});
        main["mounts"] = json!([
            volume(&volume_dir, "/vol"),
            with(volume(&volume_dir, "/ro"), "ro"),
            with(volume(&volume_dir, "/rro"), "rro"),
            raw,
        ]);
        let main_id = u.start(&main);
        let expected = [
            &format!(" 0 {UID} {LENGTH}"),
            &format!(" 0 {GID} {LENGTH}"),
            "0",
            "0",
            "0:0",
            "0:0",
            "0:0",
            "0:0",
            "0:0",
            "1000:1000",
            "65534:65534",
            "reopened",
            "4321",
            "7",
            "ro",
            "rro",
            "2",
            "no mknod",
            "ready",
        ];
        assert_eq!(lines_of(&node, "u", "main", expected.len()), expected);

        // Outside: a nobody's processes and files; volumes keep the ids that they had.
        let pid = host_pid(&crictl, &main_id);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
        assert!(status.contains(&format!("Uid:\t{UID}\t{UID}")), "{status}");
        assert!(status.contains(&format!("Gid:\t{GID}\t{GID}")), "{status}");
        let upper = node.dir.join("lib/overlay/containers").join(&main_id).join("fs");
        assert_eq!(owner(&upper), (UID, GID));
        assert_eq!(owner(&upper.join("new")), (UID + 33, GID + 44));
        assert_eq!(owner(&upper.join("etc/passwd")), (UID, GID));
        assert_eq!(owner(&volume_dir.join("new")), (0, 0));
        assert_eq!(owner(&volume_dir.join("theirs")), (33, 44));

        // Execs are inside, and can open their streams, too.
        let exec =
            crictl.run(&["exec", "-s", &main_id, "sh", "-c", "id -u; echo o > /dev/stdout; cat /proc/self/uid_map"]);
        let exec: Vec<_> = exec.split_whitespace().collect();
        assert_eq!(exec, ["0", "o", "0", &UID.to_string(), &LENGTH.to_string()]);
        let exec = crictl.output(&["exec", &main_id, "sh", "-c", "echo o > /dev/stdout; echo e > /dev/stderr; exit 7"]);
        let said = describe(&exec);
        assert!(
            !exec.status.success() && said.contains("stdout: o") && said.contains('e') && said.contains('7'),
            "{said}"
        );

        // Another user, whose supplementary groups and streams are mapped, too.
        let mut other = container(
            "other",
            BUSYBOX,
            CONTAINER,
            "id -u; id -G; echo mine > /dev/stdout; cat /vol/of-1000; touch /vol/of-root 2> /dev/null || echo not mine",
        );
        other["linux"]["security_context"]["run_as_user"] = json!({"value": 1000});
        other["linux"]["security_context"]["run_as_group"] = json!({"value": 1000});
        other["linux"]["security_context"]["supplemental_groups"] = json!([1234]);
        other["mounts"] = json!([volume(&volume_dir, "/vol")]);
        chown(&volume_dir, Some(0), Some(0)).expect("the volume");
        assert_eq!(u.output(&node, &other), ["1000", "1000 1234", "mine", "of-1000not mine"]);

        // A terminal belongs to the container's user.
        let mut tty = container("tty", BUSYBOX, CONTAINER, "stat -c %u:%g $(tty); echo on > $(tty)");
        tty["tty"] = true.into();
        tty["linux"]["security_context"]["run_as_user"] = json!({"value": 1000});
        let lines = u.output(&node, &tty);
        let lines: Vec<_> = lines.iter().map(|l| l.trim_end()).collect();
        assert_eq!(lines, ["1000:5", "on"]);

        // The network is connected both ways.
        let listener = std::net::TcpListener::bind("10.88.0.1:0").expect("a listener on the bridge");
        let port = listener.local_addr().expect("its address").port();
        let caller = container("caller", BUSYBOX, CONTAINER, &format!("echo hello | nc 10.88.0.1 {port}"));
        let caller = u.start(&caller);
        let mut heard = String::new();
        listener.accept().expect("a call").0.read_to_string(&mut heard).expect("its words");
        assert_eq!(heard, "hello\n");
        assert_eq!(crictl.wait_exit(&caller)["exitCode"], 0);

        // The daemon dies; all goes on, and the pod takes another container.
        node.crash_daemon();
        assert_eq!(crictl.container_state(&main_id), "CONTAINER_RUNNING");
        assert_eq!(crictl.run(&["exec", "-s", &main_id, "cat", "/new"]), "new");
        let late = container("late", BUSYBOX, CONTAINER, "stat -c %u:%g /bin; cat /dev/shm/x; hostname");
        assert_eq!(u.output(&node, &late), ["0:0", "x", "u"]);
        crictl.run(&["stop", "-t", "10", &main_id]);
        assert_eq!(crictl.wait_exit(&main_id)["exitCode"], 5);
        let again = container("again", BUSYBOX, CONTAINER, "trap '' TERM; while :; do sleep 0.1; done");
        let again = u.start(&again);
        crictl.run(&["stop", "-t", "0", &again]);
        assert_eq!(crictl.wait_exit(&again)["exitCode"], 137);
        u.remove();
        back_to(before.clone(), &node);

        // A daemon that dies before the pod is removed leaves nothing either.
        let u = Pod::run(&crictl, &pod(&node, "gone", POD));
        u.start(&container("c", BUSYBOX, POD, "sleep 1000"));
        node.crash_daemon();
        u.remove();
        back_to(before, &node);
    });
}

#[test]
fn processes_are_shared_inside_of_a_user_namespace() {
    isolated("processes_are_shared_inside_of_a_user_namespace", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let before = snapshot::take(&node);
        let shared = Pod::run(&crictl, &pod(&node, "shared", POD));
        let sleeper = shared.start(&container("sleeper", BUSYBOX, POD, "exec sleep 4321"));
        let seen = shared
            .output(&node, &container("looker", BUSYBOX, POD, "ps -o pid,user,args; stat -c %u /proc/1; [ $$ != 1 ]"));
        assert!(seen.iter().any(|l| l.contains("root") && l.contains("sleep 4321")), "{seen:?}");
        assert!(seen.iter().any(|l| l.contains("pod-init")), "{seen:?}");
        // The init is a nobody in there, and nobody of the host's.
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/user")).expect("a namespace");
        let wanted = namespace(&host_pid(&crictl, &sleeper).to_string());
        let inits: Vec<_> = std::fs::read_dir("/proc")
            .expect("/proc")
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "pod-init\n"))
            .collect();
        let [init] = inits.as_slice() else { panic!("one init: {inits:?}") };
        assert_eq!(namespace(init), wanted);
        assert_ne!(wanted, namespace("self"));
        let status = std::fs::read_to_string(format!("/proc/{init}/status")).expect("its status");
        let nobody = UID + 65_534;
        assert!(status.contains(&format!("Uid:\t{nobody}\t{nobody}\t{nobody}\t{nobody}")), "{status}");
        crictl.run(&["stop", "-t", "1", &sleeper]);
        assert_eq!(crictl.wait_exit(&sleeper)["exitCode"], 143);
        shared.remove();

        // As `kubectl debug --target` does it.
        let own = Pod::run(&crictl, &pod(&node, "own", CONTAINER));
        let target = own.start(&container("target", BUSYBOX, CONTAINER, "exec sleep 8765"));
        let mut debug = container("debug", BUSYBOX, TARGET, "ps -o pid,args | grep 'sleep 8765' | grep -v grep");
        debug["linux"]["security_context"]["namespace_options"]["target_id"] = target.as_str().into();
        let seen = own.output(&node, &debug);
        assert!(seen.len() == 1 && seen[0].trim_start().starts_with("1 "), "{seen:?}");
        own.remove();
        back_to(before, &node);
    });
}

#[test]
fn images_and_volumes_are_mapped_as_a_whole() {
    isolated("images_and_volumes_are_mapped_as_a_whole", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        for image in [BIG, BUSYBOX] {
            crictl.run(&["pull", image]);
        }
        let before = snapshot::take(&node);
        let p = Pod::run(&crictl, &pod(&node, "p", CONTAINER));
        let script = "sha256sum -c -s /big/SHA256SUMS && echo all there; stat -c '%a %u:%g' /big/set-uid; \
            find /big /bin /etc ! -user 0 -o ! -group 0 | head; echo again >> /big/first && tail -n 1 /big/first; \
            rm -r /big/opaque && mkdir /big/opaque && ls -A /big/opaque; mv /big/empty /big/moved && ls -d /big/moved";
        let said = p.output(&node, &container("big", BIG, CONTAINER, script));
        assert_eq!(said, ["all there", "4755 0:0", "again", "/big/moved"]);

        // An image as a volume, as a kubelet asks for it.
        let script = "stat -c %u:%g /img /img/big/first; cat /img/big/usr0/* > /dev/null; ls /img/bin | grep -c '^sh$'";
        let mut viewer = container("viewer", BUSYBOX, CONTAINER, script);
        viewer["mounts"] = json!([volume(Path::new(""), "/img")]);
        (viewer["mounts"][0]["image"], viewer["mounts"][0]["readonly"]) = (json!({"image": BIG}), true.into());
        assert_eq!(p.output(&node, &viewer), ["0:0", "0:0", "1"]);
        viewer["mounts"][0]["gidMappings"] = map(GID + 1);
        let said = p.refusal(&named(&viewer, "viewer2"));
        assert!(said.contains("Unimplemented") && said.contains("/img") && said.contains("other ids"), "{said}");

        // Mounts below a volume are mapped with it; later ones travel in.
        let dir = node.dir.join("deep");
        std::fs::create_dir_all(dir.join("below")).expect("a volume");
        support::run(Command::new("mount").args(["-t", "tmpfs", "below"]).arg(dir.join("below")));
        std::fs::write(dir.join("below/file"), "x").expect("a file");
        let script = "stat -c %u:%g /deep/below/file; touch /deep/below/new; echo waiting; \
            until [ -e /deep/later/file ]; do sleep 0.05; done; echo came";
        let mut deep = container("deep", BUSYBOX, CONTAINER, script);
        deep["mounts"] = json!([volume(&dir, "/deep")]);
        deep["mounts"][0]["propagation"] = 1.into();
        std::fs::create_dir(dir.join("later")).expect("a folder");
        let id = p.start(&deep);
        assert_eq!(lines_of(&node, "p", "deep", 2), ["0:0", "waiting"]);
        assert_eq!(owner(&dir.join("below/new")), (0, 0));
        support::run(Command::new("mount").args(["-t", "tmpfs", "later"]).arg(dir.join("later")));
        std::fs::write(dir.join("later/file"), "x").expect("a file");
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 0);
        assert_eq!(lines_of(&node, "p", "deep", 3)[2], "came");

        // What can't be mapped is named.
        support::run(Command::new("mount").args(["-t", "proc", "later"]).arg(dir.join("later")));
        let said = p.refusal(&named(&deep, "deep2"));
        assert!(said.contains("mount at") && said.contains("deep/later") && said.contains("(proc)"), "{said}");
        assert!(said.contains("FailedPrecondition"), "{said}");
        for name in ["later", "later", "below"] {
            support::run(Command::new("umount").arg(dir.join(name)));
        }
        p.remove();
        back_to(before, &node);
    });
}

fn named(config: &Value, name: &str) -> Value {
    let mut config = config.clone();
    config["metadata"]["name"] = name.into();
    config
}

#[test]
fn what_can_not_be_is_refused_by_name() {
    isolated("what_can_not_be_is_refused_by_name", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let before = snapshot::take(&node);
        let two = json!([
            {"host_id": UID, "container_id": 0, "length": 10}, {"host_id": GID, "container_id": 10, "length": 10}
        ]);
        let off = json!([{"host_id": UID, "container_id": 1, "length": 10}]);
        let empty = json!([{"host_id": UID, "container_id": 0, "length": 0}]);
        let options = |uids: &Value, gids: &Value| json!({"mode": 0, "uids": uids, "gids": gids});
        let cases = [
            (json!({"userns_options": options(&two, &map(GID))}), "InvalidArgument", "exactly one uid mapping"),
            (json!({"userns_options": options(&map(UID), &two)}), "InvalidArgument", "exactly one gid mapping"),
            (json!({"userns_options": options(&json!([]), &json!([]))}), "InvalidArgument", "exactly one uid mapping"),
            (json!({"userns_options": options(&off, &off)}), "InvalidArgument", "does not map 0"),
            (json!({"userns_options": options(&empty, &empty)}), "InvalidArgument", "is empty"),
            (json!({"userns_options": {"mode": 1}}), "InvalidArgument", "Container is not possible"),
            (json!({"userns_options": {"mode": 3}}), "InvalidArgument", "Target is not possible"),
            (json!({"network": 2, "userns_options": userns()}), "Unimplemented", "host's network namespace"),
            (json!({"pid": 2, "userns_options": userns()}), "Unimplemented", "host's PID namespace"),
            (json!({"ipc": 2, "userns_options": userns()}), "Unimplemented", "host's IPC namespace"),
        ];
        for (n, (namespaces, code, word)) in cases.iter().enumerate() {
            let mut config = pod(&node, &format!("refused-{n}"), CONTAINER);
            config["linux"]["security_context"]["namespace_options"] = namespaces.clone();
            let (done, said) = crictl.try_run(&["runp", &crictl.file("refused", &config)]);
            assert!(!done && said.contains(code) && said.contains(word), "{namespaces}: {said}");
        }
        assert_eq!(snapshot::added(&before, &snapshot::take(&node)), Vec::<String>::new(), "something was made");

        let p = Pod::run(&crictl, &pod(&node, "p", CONTAINER));
        let with = |change: &dyn Fn(&mut Value)| {
            let mut config = container("c", BUSYBOX, CONTAINER, "exit 0");
            change(&mut config["linux"]["security_context"]);
            config
        };
        let none = with(&|s| s["namespace_options"] = json!({"pid": CONTAINER}));
        let other = with(&|s| s["namespace_options"]["userns_options"]["uids"] = map(UID + 1));
        let stranger = with(&|s| s["run_as_user"] = json!({"value": LENGTH}));
        let group = with(&|s| s["supplemental_groups"] = json!([LENGTH + 7]));
        for (config, word) in [
            (&none, "is not the sandbox's"),
            (&other, "is not the sandbox's"),
            (&stranger, "user 65536 has no number"),
            (&group, "group 65543 has no number"),
        ] {
            let said = p.refusal(config);
            assert!(said.contains("InvalidArgument") && said.contains(word), "{said}");
        }
        // A pod of the host's users takes none that bring their own.
        p.remove();
        let mut plain = pod(&node, "plain", CONTAINER);
        plain["linux"]["security_context"]["namespace_options"]["userns_options"] = json!({"mode": 2});
        let plain = Pod::run(&crictl, &plain);
        let said = plain.refusal(&container("c", BUSYBOX, CONTAINER, "exit 0"));
        assert!(said.contains("InvalidArgument") && said.contains("the host's"), "{said}");
        plain.remove();
        back_to(before, &node);
    });
}

#[test]
fn powers_end_at_the_user_namespace() {
    isolated("powers_end_at_the_user_namespace", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let before = snapshot::take(&node);
        let mut config = pod(&node, "p", CONTAINER);
        config["linux"]["security_context"]["privileged"] = true.into();
        let p = Pod::run(&crictl, &config);
        let dir = node.dir.join("volume");
        std::fs::create_dir_all(dir.join("out")).expect("a volume");
        support::run(Command::new("mount").args(["--bind"]).args([&dir, &dir]));
        support::run(Command::new("mount").args(["--make-shared"]).arg(&dir));

        // Privileged: root of everything inside, of nothing outside.
        let script = "mkdir /m; mount -t tmpfs x /m && echo mounted; hostname other && hostname; \
            echo 1 > /proc/sys/net/ipv4/ip_forward && echo forwards; \
            echo 1 > /proc/sys/kernel/panic 2> /dev/null || echo no panic; \
            dmesg > /dev/null 2>&1 || echo no dmesg; echo x > /dev/null && echo null; \
            mount -t tmpfs x /vol/out && echo x > /vol/out/file && echo out; exec sleep 1000";
        let mut strong = container("strong", BUSYBOX, CONTAINER, script);
        strong["linux"]["security_context"]["privileged"] = true.into();
        strong["mounts"] = json!([volume(&dir, "/vol")]);
        strong["mounts"][0]["propagation"] = 2.into();
        let id = p.start(&strong);
        let said = lines_of(&node, "p", "strong", 7);
        assert_eq!(said, ["mounted", "other", "forwards", "no panic", "no dmesg", "null", "out"]);
        // A mount that is let out reaches the node, as it does without a user namespace.
        assert_eq!(owner(&dir.join("out/file")), (UID, GID));
        let exec = crictl.command(&["exec", "-i", "-t", &id, "sh", "-c", "'tty; stat -c %u:%g $(tty)'"]);
        let words = [exec.get_program()].into_iter().chain(exec.get_args());
        let line: Vec<_> = words.map(|w| w.to_str().expect("UTF-8")).collect();
        // crictl wants a terminal of its own.
        let terminal = support::run(Command::new("script").args(["-qec", &line.join(" "), "/dev/null"]));
        assert_eq!(terminal.replace("^@", "").split_whitespace().collect::<Vec<_>>(), ["/dev/pts/0", "0:5"]);

        let mut weak = container(
            "weak",
            BUSYBOX,
            CONTAINER,
            "echo x > /x 2> /dev/null || echo read only; stat -c '%F %t:%T %u:%g' /dev/mine; cat /dev/mine | head -c 1 | wc -c",
        );
        weak["linux"]["security_context"]["readonly_rootfs"] = true.into();
        weak["devices"] = json!([{"host_path": "/dev/zero", "container_path": "/dev/mine", "permissions": "r"}]);
        let expected = ["read only", "character special file 1:5 0:0", "1"];
        assert_eq!(p.output(&node, &weak), expected);
        p.remove();
        support::run(Command::new("umount").args(["-R"]).arg(&dir));
        back_to(before, &node);
    });
}
