//! Fields of requests that few pods use: images as volumes, CDI devices, limits and mounts that can't be had, programs that
//! are not there. Through the real crictl and crun.
//!
//! Run by `cargo test --test fields`, as root. A crash leaves nothing: see `support`.

// A test writes files as it likes.
#![allow(clippy::disallowed_methods)]

mod support;

use serde_json::{Value, json};
use support::crictl::BUSYBOX;
use support::isolated;
use support::node::{Node, Options};
use support::pod::Pod;

fn limits(resources: Value) -> impl FnOnce(&mut Value) {
    move |c| c["linux"]["resources"] = resources
}

fn mounts(list: Value) -> impl FnOnce(&mut Value) {
    move |c| c["mounts"] = list
}

#[test]
fn images_are_volumes() {
    isolated("images_are_volumes", || {
        let mut node = Node::start(Options::default());
        let pod = Pod::run(&node, "p1");
        let volume = |more: Value| {
            let mut mount = json!({"container_path": "/vol", "image": {"image": BUSYBOX}, "readonly": true});
            mount.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
            mounts(json!([mount]))
        };
        let script = "ls /vol; grep ' /vol ' /proc/self/mountinfo; touch /vol/x; /vol/bin/busybox true; echo $?";
        let (_, lines) = pod.output("whole", script, volume(json!({})));
        let text = lines.join("\n");
        assert!(lines.iter().any(|l| l == "bin") && lines.iter().any(|l| l == "etc"), "{text}");
        for word in ["ro,nosuid,nodev,noexec", "Read-only file system", "126"] {
            assert!(text.contains(word), "{word:?}: {text}");
        }
        let (_, lines) = pod.output("part", "ls /vol/passwd", volume(json!({"image_sub_path": "etc"})));
        assert_eq!(lines, ["/vol/passwd"]);

        // What can't be had.
        let absent = "registry.k8s.io/not/pulled:1";
        pod.refused("NotFound", &[absent, "/vol"], volume(json!({"image": {"image": absent}})));
        pod.refused("InvalidArgument", &["no/such"], volume(json!({"image_sub_path": "no/such"})));
        pod.refused("InvalidArgument", &["etc/passwd", "folder"], volume(json!({"image_sub_path": "etc/passwd"})));
        pod.refused("InvalidArgument", &["../..", "leads out"], volume(json!({"image_sub_path": "../../etc"})));
        pod.refused("InvalidArgument", &["/vol"], volume(json!({"propagation": 2})));

        // It stays as long as its container, without its image and beyond the daemon's life.
        let holder = pod.create("holder", "sleep 1000", volume(json!({}))).expect("created");
        pod.crictl.run(&["start", &holder]);
        let status = pod.crictl.container_status(&holder);
        assert_eq!(status["mounts"][0]["image"]["image"], BUSYBOX, "{status}");
        pod.crictl.run(&["rmi", BUSYBOX]);
        node.crash_daemon();
        let pull = "registry.k8s.io/pause:3.10";
        let _ = pod.crictl.try_run(&["pull", pull]);
        let _ = pod.crictl.try_run(&["rmi", pull]);
        assert_eq!(pod.crictl.run(&["exec", "-s", &holder, "ls", "/vol/etc/passwd"]), "/vol/etc/passwd");
        // Nothing of it is mounted where the node sees it.
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        assert!(!mounts.contains("rootfs/volumes"), "{mounts}");
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

#[test]
fn cdi_devices_are_found_by_name() {
    isolated("cdi_devices_are_found_by_name", || {
        std::fs::create_dir_all("/tmp/cdi").expect("folder");
        std::fs::write(
            "/tmp/cdi/vendor.yaml",
            "cdiVersion: 0.6.0\nkind: vendor.com/thing\ncontainerEdits:\n  env: [VENDOR=yes]\ndevices:\n- name: one\n  containerEdits:\n    deviceNodes:\n    - path: /dev/thing\n      hostPath: /dev/fuse\n      permissions: rw\n    mounts:\n    - hostPath: /tmp/cdi\n      containerPath: /thing\n      options: [ro, nosuid, nodev, bind]\n    additionalGids: [4242]\n    hooks:\n    - hookName: createRuntime\n      path: /bin/sh\n      args: [sh, -c, 'echo hooked > /tmp/hooked']\n",
        )
        .expect("a CDI file");
        let node = Node::start(Options {
            runtime: "cdi_spec_dirs = [\"/tmp/none\", \"/tmp/cdi\"]\n".into(),
            ..Options::default()
        });
        let pod = Pod::run(&node, "p1");
        let by_name = |name: &'static str| move |c: &mut Value| c["CDI_devices"] = json!([{"name": name}]);
        let script = "echo $VENDOR; ls /thing; id -G; stat -c %t:%T /dev/thing; cat < /dev/null";
        for (name, change) in [
            ("field", Box::new(by_name("vendor.com/thing=one")) as Box<dyn FnOnce(&mut Value)>),
            (
                "annotation",
                Box::new(|c: &mut Value| c["annotations"] = json!({"cdi.k8s.io/x": "vendor.com/thing=one"})),
            ),
        ] {
            let (code, lines) = pod.output(name, script, change);
            let text = lines.join("\n");
            assert_eq!(code, 0, "{text}");
            assert_eq!(lines[..2], ["yes", "vendor.yaml"], "{text}");
            assert!(lines[2].split(' ').any(|g| g == "4242"), "{text}");
            assert_eq!(lines[3], "a:e5", "{text}");
            assert_eq!(std::fs::read_to_string("/tmp/hooked").expect("file"), "hooked\n");
            std::fs::remove_file("/tmp/hooked").expect("file");
        }
        pod.refused("FailedPrecondition", &["vendor.com/thing=two", "/tmp/cdi"], by_name("vendor.com/thing=two"));
        pod.refused("InvalidArgument", &["thing", "vendor/class"], by_name("thing=two"));
        std::fs::copy("/tmp/cdi/vendor.yaml", "/tmp/cdi/again.yaml").expect("copy");
        pod.refused("FailedPrecondition", &["again.yaml", "vendor.yaml"], by_name("vendor.com/thing=one"));
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

#[test]
fn hooks_of_the_nodes_folders_run_for_the_containers_that_they_name() {
    isolated("hooks_of_the_nodes_folders_run_for_the_containers_that_they_name", || {
        std::fs::create_dir_all("/tmp/hooks.d").expect("folder");
        let file = |name: &str, text: &str| std::fs::write(format!("/tmp/hooks.d/{name}"), text).expect("a file");
        let hook = r#"{"version": "1.0.0", "stages": ["createRuntime"],
            "hook": {"path": "/bin/sh", "args": ["sh", "-c", "echo $WHAT $(cat | tr -d '[:space:]') >> /tmp/hooked"], "env": ["WHAT=hooked", "PATH=/usr/bin:/bin"]},
            "when": {"annotations": {"^example\\.com/hook$": "^yes$"}, "commands": ["^/bin/sh$"]}}"#;
        file("10-hook.json", hook);
        let node = Node::start(Options {
            runtime: "hooks_dirs = [\"/tmp/none\", \"/tmp/hooks.d\"]\n".into(),
            ..Options::default()
        });
        let pod = Pod::run(&node, "p1");
        let annotated =
            |value: &'static str| move |c: &mut Value| c["annotations"] = json!({"example.com/hook": value});
        assert_eq!(pod.output("no", "echo ran", annotated("no")).0, 0);
        assert!(!std::path::Path::new("/tmp/hooked").exists(), "a hook ran for a container that it does not name");
        assert_eq!(pod.output("yes", "echo ran", annotated("yes")).0, 0);
        let told = std::fs::read_to_string("/tmp/hooked").expect("the hook ran");
        // The runtime gives it the container's state.
        assert!(
            told.starts_with("hooked {") && told.contains("\"status\":\"created\"") && told.lines().count() == 1,
            "{told}"
        );
        // One that fails fails the container, by name; so does one that can't be understood.
        file("10-hook.json", &hook.replace("echo $WHAT", "exit 3; echo"));
        pod.refused("Internal", &["hook"], annotated("yes"));
        file("20-broken.json", "{\"version\": \"1.0.0\"}");
        pod.refused("FailedPrecondition", &["/tmp/hooks.d/20-broken.json", "missing field"], annotated("no"));
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

#[test]
fn classes_of_block_io_and_rdt_are_those_of_annotations() {
    isolated("classes_of_block_io_and_rdt_are_those_of_annotations", || {
        let disk = support::plant_disk("disk-1");
        let classes = "Classes:\n  slow:\n    - Devices: [\"/dev/shm/disk-[0-9]\"]\n      ThrottleReadBps: 10Mi\n      ThrottleWriteIOPS: 77\n";
        std::fs::write("/tmp/blockio.yaml", classes).expect("a file");
        let runtime = "blockio_config_file = \"/tmp/blockio.yaml\"\nrdt_classes = [\"gold\"]\n";
        let node = Node::start(Options { runtime: runtime.into(), ..Options::default() });
        let pod = Pod::run(&node, "p1");
        let annotated =
            |name: &'static str, value: &'static str| move |c: &mut Value| c["annotations"] = json!({name: value});
        const BLOCKIO: &str = "io.kubernetes.cri.blockio-class";
        let files = "cat /sys/fs/cgroup/blkio/blkio.throttle.read_bps_device /sys/fs/cgroup/blkio/blkio.throttle.write_iops_device \
                     /sys/fs/cgroup/io.max 2> /dev/null; true";
        let (_, lines) = pod.output("slow", files, annotated(BLOCKIO, "slow"));
        let v1 = vec![format!("{disk} 10485760"), format!("{disk} 77")];
        let v2 = vec![format!("{disk} rbps=10485760 wbps=max riops=max wiops=77")];
        assert!(lines == v1 || lines == v2, "{disk}: {lines:?}");
        assert_eq!(pod.output("free", files, |_| {}).1, Vec::<String>::new());
        let unknown = annotated(BLOCKIO, "fast");
        pod.refused("FailedPrecondition", &[BLOCKIO, "fast", "/tmp/blockio.yaml", "slow"], unknown);
        // The file is read for each container.
        std::fs::write("/tmp/blockio.yaml", "Classes: 7\n").expect("a file");
        pod.refused("FailedPrecondition", &["/tmp/blockio.yaml"], annotated(BLOCKIO, "slow"));
        const RDT: &str = "io.kubernetes.cri.rdt-class";
        pod.refused("FailedPrecondition", &[RDT, "silver", "runtime.rdt_classes"], annotated(RDT, "silver"));
        let there = std::path::Path::new("/sys/fs/resctrl/gold").is_dir();
        assert!(!there, "this machine has the group that is to be missed");
        pod.refused("FailedPrecondition", &[RDT, "gold", "/sys/fs/resctrl"], annotated(RDT, "gold"));
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

#[test]
fn what_cannot_be_had_is_named() {
    isolated("what_cannot_be_had_is_named", || {
        let node = Node::start(Options::default());
        let pod = Pod::run(&node, "p1");
        let invalid = "InvalidArgument";
        pod.refused(invalid, &["cpuset_cpus", "9999"], limits(json!({"cpuset_cpus": "9999"})));
        pod.refused(invalid, &["cpuset_mems", "999"], limits(json!({"cpuset_mems": "0,999"})));
        pod.refused(invalid, &["cpuset_cpus", "a-b"], limits(json!({"cpuset_cpus": "a-b"})));
        pod.refused(invalid, &["memory_limit_in_bytes", "1000"], limits(json!({"memory_limit_in_bytes": 1000})));
        let swap = json!({"memory_limit_in_bytes": 64 << 20, "memory_swap_limit_in_bytes": 32 << 20});
        pod.refused(invalid, &["memory_swap_limit_in_bytes"], limits(swap));
        pod.refused(invalid, &["oom_score_adj", "1001"], limits(json!({"oom_score_adj": 1001})));
        let pages = json!({"hugepage_limits": [{"page_size": "3MB", "limit": 3 << 20}]});
        let text = pod.create("pages", "true", limits(pages)).expect_err("refused");
        assert!(text.contains("hugepages-3MB"), "{text}");
        let one = |path: &str| mounts(json!([{"container_path": path, "host_path": "/tmp"}]));
        pod.refused(invalid, &["root"], one("/"));
        pod.refused(invalid, &["/a/../.."], one("/a/../.."));
        pod.refused(invalid, &["/proc"], one("/proc"));
        let rro = json!([{"container_path": "/x", "host_path": "/tmp", "recursive_read_only": true}]);
        pod.refused(invalid, &["read-only"], mounts(rro));
        let label = |kind: &'static str| {
            move |c: &mut Value| c["linux"]["security_context"]["selinux_options"] = json!({"type": kind})
        };
        pod.refused("FailedPrecondition", &["SELinux", "my_t"], label("my_t"));
        for kind in ["", "spc_t"] {
            assert_eq!(pod.output(&format!("label{kind}"), "true", label(kind)).0, 0);
        }
        // And what fits: the host's own /dev, /proc and /sys; limits at the edge; zero huge pages of any size.
        let host = json!([
            {"container_path": "/dev", "host_path": "/dev"},
            {"container_path": "/proc", "host_path": "/proc"},
            {"container_path": "/sys", "host_path": "/sys"},
        ]);
        let (code, lines) = pod.output("host", "echo ok > /dev/null; ls /dev/pts /proc/1/status", mounts(host));
        assert_eq!(code, 0, "{lines:?}");
        let edge = json!({"cpuset_cpus": "0", "memory_limit_in_bytes": 32 << 20, "hugepage_limits": [{"page_size": "3MB", "limit": 0}]});
        assert_eq!(pod.output("edge", "true", limits(edge)).0, 0);
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

#[test]
fn serving_and_pinging_need_no_capability() {
    isolated("serving_and_pinging_need_no_capability", || {
        let node = Node::start(Options::default());
        let pod = Pod::run(&node, "p1");
        let files = "cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range";
        let (_, lines) = pod.output("c", files, |_| {});
        assert_eq!(lines, ["0", "0\t2147483647"]);
        pod.crictl.run(&["rmp", "-f", &pod.id]);
        // What the pod asks for itself wins.
        let mut config = support::crictl::pod_config("p2", &node.pod_logs("p2"));
        config["linux"]["sysctls"] = json!({"net.ipv4.ip_unprivileged_port_start": "80"});
        config["linux"]["resources"] = json!({"memory_limit_in_bytes": 64 << 20});
        config["linux"]["cgroup_parent"] = json!("/lxcri-own/p2");
        let file = pod.crictl.file("pod-own", &config);
        let id = pod.crictl.run(&["runp", &file]);
        let pod = Pod { id, file, logs: node.pod_logs("p2"), crictl: node.crictl() };
        assert_eq!(pod.output("c", files, |_| {}).1[0], "80");
        // The pod's own group has the limits that came with RunPodSandbox.
        let limit =
            ["/sys/fs/cgroup/memory/lxcri-own/p2/memory.limit_in_bytes", "/sys/fs/cgroup/lxcri-own/p2/memory.max"]
                .iter()
                .find_map(|f| std::fs::read_to_string(f).ok());
        assert_eq!(limit.as_deref().map(str::trim), Some((64 << 20).to_string().as_str()));
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}

#[test]
fn a_program_that_cannot_run_fails_at_its_start() {
    isolated("a_program_that_cannot_run_fails_at_its_start", || {
        let node = Node::start(Options::default());
        let pod = Pod::run(&node, "p1");
        for (name, program) in [
            ("absent", "/no/such/program"),
            ("nowhere", "no-such-program"),
            ("folder", "/etc"),
            ("file", "/etc/passwd"),
        ] {
            let id = pod.create(name, "", |c| c["command"] = json!([program])).expect("created");
            assert_eq!(pod.crictl.container_state(&id), "CONTAINER_CREATED");
            let (done, text) = pod.crictl.try_run(&["start", &id]);
            assert!(!done && text.contains(program), "{text}");
            let status = pod.crictl.container_status(&id);
            assert_eq!(status["state"], "CONTAINER_EXITED", "{status}");
            assert_eq!(
                (status["exitCode"].as_i64(), status["reason"].as_str()),
                (Some(128), Some("StartError")),
                "{status}"
            );
            assert!(status["message"].as_str().is_some_and(|m| m.contains(program)), "{status}");
            pod.crictl.run(&["rm", &id]);
        }
        // An exec of such a program fails and says so; the container runs on.
        let id = pod.create("runs", "exec sleep 1000", |_| {}).expect("created");
        pod.crictl.run(&["start", &id]);
        let (done, text) = pod.crictl.try_run(&["exec", "-s", &id, "no-such-program"]);
        assert!(!done && text.contains("no-such-program"), "{text}");
        assert_eq!(pod.crictl.container_state(&id), "CONTAINER_RUNNING");
        pod.crictl.run(&["rmp", "-f", &pod.id]);
    });
}
