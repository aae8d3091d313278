//! The handler lxc with the real liblxc: what its containers are beside what `crictl_life` and critest try on every
//! handler.
//!
//! Run by `cargo test --test lxc`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods, clippy::print_stdout)] // tests call liblxc's own tools, and tell figures

mod support;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use support::crictl::{BUSYBOX, Crictl, container_config, pod_config, read_log, stream_lines};
use support::node::{Node, Options};
use support::{isolated, snapshot, wait_for};

fn lxc_node() -> Node {
    Node::start(Options { handler: "lxc".into(), ..Options::default() })
}

/// Creates a container from a configuration; its id, or what crictl said.
fn create(crictl: &Crictl, pod_id: &str, pod: &str, config: &Value) -> Result<String, String> {
    let name = config["metadata"]["name"].as_str().expect("a name");
    let file = crictl.file(&format!("c-{name}"), config);
    let (good, said) = crictl.try_run(&["create", "--no-pull", pod_id, &file, &crictl.pod_file(pod)]);
    if good { Ok(said.trim().to_owned()) } else { Err(said) }
}

fn tool(node: &Node, program: &str, args: &[&str]) -> String {
    // Where liblxc listens for its tools.
    let net = format!("--net={}", node.dir.join("run/lxc.net").display());
    let mut command = Command::new("nsenter");
    command.args([net.as_str(), program]).arg("-P").arg(node.dir.join("run/lxc")).args(args);
    support::run(&mut command)
}

fn log_of(node: &Node, pod: &str, name: &str) -> Vec<String> {
    stream_lines(&read_log(&node.pod_logs(pod).join(name).join("0.log")), "stdout")
}

/// Pids of the processes that liblxc runs in.
fn holders() -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains("proxmox-lxcri-lxc create") {
            found.push(pid);
        }
    }
    found
}

#[test]
fn liblxcs_own_tools_see_the_container() {
    isolated("liblxcs_own_tools_see_the_container", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let mut before = snapshot::take(&node);
        let pod = crictl.run_pod("p");
        assert_eq!(crictl.json(&["inspectp", &pod])["status"]["runtimeHandler"], "lxc");
        let id = crictl.create(&pod, "p", "c", BUSYBOX, "trap 'exit 4' TERM; echo $$; while :; do sleep 0.05; done");
        crictl.run(&["start", &id]);
        wait_for("the program's pid", Duration::from_secs(20), || log_of(&node, "p", "c").first().cloned());
        assert_eq!(log_of(&node, "p", "c"), ["1"], "the program is not the first process");
        let pid = crictl.json(&["inspect", &id])["info"]["pid"].to_string();
        assert!(tool(&node, "lxc-ls", &[]).contains(&id));
        let info = tool(&node, "lxc-info", &["-n", &id]);
        assert!(info.contains("RUNNING") && info.contains(&pid), "{info} lacks {pid}");
        assert_eq!(tool(&node, "lxc-attach", &["-n", &id, "--", "/bin/sh", "-c", "echo $((40+2))"]).trim(), "42");
        wait_for("no other process of liblxc's", Duration::from_secs(10), || (holders().len() == 1).then_some(()));

        // Its parent dies: the container runs on, its end is still told truly, and nothing is left.
        for holder in holders() {
            let pid = rustix::process::Pid::from_raw(holder).expect("a pid");
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
        }
        wait_for("the parent's end", Duration::from_secs(10), || holders().is_empty().then_some(()));
        assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");
        let (good, said) = crictl.try_run(&["exec", "-s", &id, "true"]);
        assert!(!good && said.contains("liblxc says that it does not run"), "{said}");
        crictl.run(&["stop", "-t", "20", &id]);
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 4);
        crictl.run(&["rmp", "-f", &pod]);
        before.entry("interfaces").or_default().push("lxcri-t0".into());
        snapshot::assert_back_to(&before, &node);
    });
}

#[test]
fn a_process_is_as_it_was_asked_for() {
    isolated("a_process_is_as_it_was_asked_for", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let script = "id -u; id -g; id -G; pwd; grep -E 'CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp:' /proc/self/status; \
                      cat /proc/self/oom_score_adj; echo \"$ODD\"; ls -l /proc/self/fd | wc -l; exec sleep 1000";
        let mut config = container_config("c", BUSYBOX, script);
        config["working_dir"] = json!("/made/here");
        config["envs"] = json!([{"key": "ODD", "value": "a\nlxc.hook.start = /bin/false\t\"quoted\" 'too' # \\040"}]);
        config["linux"]["resources"] = json!({"oom_score_adj": 321});
        config["linux"]["security_context"] = json!({
            "namespace_options": {"pid": 1},
            "run_as_user": {"value": 1001}, "run_as_group": {"value": 1002}, "supplemental_groups": [7, 1234],
            "no_new_privs": true, "seccomp": {"profile_type": 0},
            "capabilities": {"drop_capabilities": ["ALL"], "add_capabilities": ["NET_BIND_SERVICE", "SETUID"],
                             "add_ambient_capabilities": ["NET_BIND_SERVICE"]},
        });
        let id = create(&crictl, &pod, "p", &config).expect("created");
        crictl.run(&["start", &id]);
        let seen = wait_for("the script's last line", Duration::from_secs(20), || {
            let log = log_of(&node, "p", "c");
            (log.len() >= 15).then_some(log)
        });
        let bind = format!("{:016x}", 1u64 << 10);
        let both = format!("{:016x}", 1u64 << 10 | 1 << 7);
        let expected = [
            "1001".to_owned(),
            "1002".to_owned(),
            "1002 7 1234".to_owned(),
            "/made/here".to_owned(),
            format!("CapInh:\t{bind}"),
            // grep is not the container's program: what it has comes from the ambient set.
            format!("CapPrm:\t{bind}"),
            format!("CapEff:\t{bind}"),
            format!("CapBnd:\t{both}"),
            format!("CapAmb:\t{bind}"),
            "NoNewPrivs:\t1".to_owned(),
            "Seccomp:\t2".to_owned(),
            "321".to_owned(),
            "a".to_owned(),
            "lxc.hook.start = /bin/false\t\"quoted\" 'too' # \\040".to_owned(),
        ];
        assert_eq!(seen[..14], expected);
        // Three streams, and what ls itself opens: nothing of the runtime's.
        assert_eq!(seen[14].trim(), "5", "descriptors of the runtime are in the container: {seen:?}");

        // An exec is the same, and in the container's namespaces and group.
        let exec = crictl.run(&[
            "exec",
            "-s",
            &id,
            "sh",
            "-c",
            "id -G; pwd; grep -E 'CapBnd|Seccomp:' /proc/self/status; exit 0",
        ]);
        assert_eq!(exec, format!("1002 7 1234\n/made/here\nCapBnd:\t{both}\nSeccomp:\t2"));
        let (good, said) = crictl.try_run(&["exec", "-s", &id, "/no/such/program"]);
        assert!(!good && said.contains("/no/such/program"), "{said}");
        crictl.run(&["rmp", "-f", &pod]);
    });
}

#[test]
fn odd_paths_and_devices_in_the_way() {
    isolated("odd_paths_and_devices_in_the_way", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let (folder, file) = (node.dir.join("s #x'y\"\\z"), node.dir.join("precious"));
        std::fs::create_dir(&folder).expect("folder");
        std::fs::write(folder.join("f"), "found").expect("file");
        std::fs::create_dir(folder.join("secret")).expect("folder");
        std::fs::write(folder.join("secret/f"), "hidden").expect("file");
        std::fs::write(&file, "precious").expect("file");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).expect("mode");
        let mount = |from: &Path, to: &str, readonly: bool| json!({"host_path": from, "container_path": to, "readonly": readonly});
        let mut config =
            container_config("c", BUSYBOX, "cat \"/d #x'y/f\"; cat '/d #x'*/secret/f 2>&1; exec sleep 1000");
        config["mounts"] = json!([mount(&folder, "/d #x'y", false)]);
        config["linux"]["security_context"] =
            json!({"masked_paths": ["/d #x'y/secret", "/d #x'y/f2", "/etc/hostname"]});
        let id = create(&crictl, &pod, "p", &config).expect("created");
        crictl.run(&["start", &id]);
        wait_for("its words", Duration::from_secs(20), || {
            let said = log_of(&node, "p", "c").concat();
            (said.contains("found") && said.contains("No such file")).then_some(())
        });
        // Made before the root file system is closed, as other runtimes do it.
        let mut config = container_config("closed", BUSYBOX, "pwd; mkdir /x 2>&1; exec sleep 1000");
        config["working_dir"] = json!("/not/in/the/image");
        config["linux"]["security_context"] = json!({"readonly_rootfs": true});
        let id = create(&crictl, &pod, "p", &config).expect("created");
        crictl.run(&["start", &id]);
        let said = wait_for("its words", Duration::from_secs(20), || {
            Some(log_of(&node, "p", "closed")).filter(|said| said.len() >= 2)
        });
        assert!(said[0] == "/not/in/the/image" && said[1].contains("Read-only"), "{said:?}");
        // What liblxc would cut are a mount's options.
        let mut config = container_config("long", BUSYBOX, "true");
        config["mounts"] = json!([mount(&folder, &format!("/v/{}", " ".repeat(1010)), true)]);
        let refused = create(&crictl, &pod, "p", &config).expect_err("refused");
        assert!(refused.contains("InvalidArgument") && refused.contains("liblxc reads"), "{refused}");
        // Something of the node's is where a device shall be.
        let mut config = container_config("device", BUSYBOX, "sleep 1000");
        config["mounts"] = json!([mount(&file, "/f", false)]);
        config["devices"] = json!([{"host_path": "/dev/null", "container_path": "/f", "permissions": "rwm"}]);
        config["linux"]["security_context"] = json!({"run_as_user": {"value": 1000}});
        let done = create(&crictl, &pod, "p", &config).and_then(|id| match crictl.try_run(&["start", &id]) {
            (true, _) => Ok(()),
            (false, said) => Err(said),
        });
        let refused = done.expect_err("refused");
        assert!(refused.contains("something else is there"), "{refused}");
        let meta = std::fs::metadata(&file).expect("it is there");
        assert_eq!(
            (meta.mode() & 0o7777, meta.uid(), std::fs::read(&file).expect("read")),
            (0o600, 0, b"precious".to_vec())
        );
    });
}

#[test]
fn a_hangup_ends_it_and_links_to_closed_paths_are_followed() {
    isolated("a_hangup_ends_it_and_links_to_closed_paths_are_followed", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let mut config = pod_config("p", &node.pod_logs("p"));
        config["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
        let pod = crictl.run(&["runp", &crictl.file("pod-shared", &config)]);
        // In shared processes it is not the first one, which the kernel would shield.
        let mut config = container_config("up", BUSYBOX, "ls /; kill -HUP $$; sleep 1000");
        config["linux"]["security_context"] = json!({"namespace_options": {"pid": 0}});
        let id = create(&crictl, &pod, "p", &config).expect("created");
        crictl.run(&["start", &id]);
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 129);
        // Started once more, it would end by a code of the helper's.
        let record = node.dir.join("run/pods").join(&pod).join("containers").join(&id).join("exit.json");
        let record: Value = serde_json::from_slice(&std::fs::read(record).expect("its record")).expect("JSON");
        assert_eq!(record["signal"], 1, "{record}");

        let script = "mkdir /real; echo hidden >/real/f; ln -s real /one; ln -s /one /two; ln -s /proc/version /four; \
                      echo ready; exec sleep 1000";
        let made = create(&crictl, &pod, "p", &container_config("made", BUSYBOX, script)).expect("created");
        crictl.run(&["start", &made]);
        wait_for("its changes", Duration::from_secs(20), || log_of(&node, "p", "made").first().cloned());
        let mut commit = Command::new(support::daemon_program());
        commit.arg("--local-socket").arg(node.local_socket()).args(["container", "commit", &made, "local/linked:1"]);
        support::run(&mut commit);
        let script = "cat /real/f | wc -c; touch /bin/x || echo closed; wc -c </proc/version; exec sleep 1000";
        let mut config = container_config("c", "local/linked:1", script);
        config["linux"]["security_context"] =
            json!({"masked_paths": ["/two", "/four"], "readonly_paths": ["/one/../bin"]});
        let id = create(&crictl, &pod, "p", &config).expect("created");
        crictl.run(&["start", &id]);
        let said = wait_for("its words", Duration::from_secs(20), || {
            let said = log_of(&node, "p", "c");
            (said.len() > 2).then_some(said)
        });
        assert_eq!(said, ["0", "closed", "0"]);
        crictl.run(&["rmp", "-f", &pod]);
    });
}

#[test]
fn new_limits_and_a_terminal() {
    isolated("new_limits_and_a_terminal", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let mut config =
            container_config("c", BUSYBOX, "tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo three; exec sleep 1000");
        config["tty"] = json!(true);
        config["linux"]["resources"] =
            json!({"memory_limit_in_bytes": 64 << 20, "cpu_quota": 50_000, "cpu_period": 100_000});
        let id = create(&crictl, &pod, "p", &config).expect("created");
        crictl.run(&["start", &id]);
        let seen = wait_for("the script's last line", Duration::from_secs(20), || {
            let log = log_of(&node, "p", "c");
            (log.len() >= 2).then_some(log)
        });
        assert_eq!(seen.iter().map(|l| l.trim()).collect::<Vec<_>>(), ["/dev/pts/0", "three"]);
        let group = |controller: &str, file: &str| {
            let path = Path::new("/sys/fs/cgroup").join(controller).join("tests").join(&id).join(file);
            std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).trim().to_owned()
        };
        assert_eq!(group("memory", "memory.limit_in_bytes"), (64 << 20).to_string());
        assert_eq!(group("cpu", "cpu.cfs_quota_us"), "50000");
        for memory in [128 << 20, 32 << 20] {
            crictl.run(&["update", "--memory", &memory.to_string(), "--cpu-quota", "20000", &id]);
            assert_eq!(group("memory", "memory.limit_in_bytes"), memory.to_string());
            assert_eq!(group("cpu", "cpu.cfs_quota_us"), "20000");
        }
        crictl.run(&["rmp", "-f", &pod]);
    });
}

#[test]
fn what_it_can_not_do_is_refused_by_name() {
    isolated("what_it_can_not_do_is_refused_by_name", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let refused = |config: &Value, words: &[&str]| {
            let said = create(&crictl, &pod, "p", config).expect_err("refused");
            assert!(words.iter().all(|w| said.contains(w)), "{said} lacks one of {words:?}");
        };
        let base = || container_config("c", BUSYBOX, "sleep 1000");
        let mut config = base();
        config["mounts"] = json!([{"host_path": "/tmp", "container_path": "/x", "propagation": 2}]);
        refused(&config, &["Unimplemented", "Bidirectional"]);
        std::fs::create_dir_all("/var/lib/kubelet/seccomp").expect("a folder");
        std::fs::write("/var/lib/kubelet/seccomp/log.json", r#"{"defaultAction": "SCMP_ACT_LOG"}"#).expect("a profile");
        let mut config = base();
        config["linux"]["security_context"]["seccomp"] = json!({"profile_type": 2, "localhost_ref": "log.json"});
        refused(&config, &["Unimplemented", "SCMP_ACT_LOG"]);
        let mut config = base();
        config["command"] = json!(["/no/such/program"]);
        let id = create(&crictl, &pod, "p", &config).expect("created: StartContainer tells");
        let (good, said) = crictl.try_run(&["start", &id]);
        assert!(!good && said.contains("/no/such/program"), "{said}");
        crictl.run(&["rm", "-f", &id]);

        let id = create(&crictl, &pod, "p", &base()).expect("created");
        crictl.run(&["start", &id]);
        let (good, said) = crictl.try_run(&["checkpoint", "--export", "/tmp/archive.tar", &id]);
        assert!(!good && said.contains("Unimplemented") && said.contains("handler lxc"), "{said}");
        assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");
        crictl.run(&["rmp", "-f", &pod]);
    });
}

#[test]
fn a_user_namespace_and_mounts_with_flags() {
    isolated("a_user_namespace_and_mounts_with_flags", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let users = json!({"mode": 0, "uids": [{"host_id": 300_000, "container_id": 0, "length": 65_536}],
                           "gids": [{"host_id": 300_000, "container_id": 0, "length": 65_536}]});
        let mut pod = pod_config("u", &node.pod_logs("u"));
        pod["linux"]["security_context"]["namespace_options"]["userns_options"] = users.clone();
        let pod_file = crictl.file("pod-u", &pod);
        let pod_id = crictl.run(&["runp", &pod_file]);
        let volume = node.dir.join("volume");
        std::fs::create_dir_all(volume.join("below")).expect("a volume");
        std::fs::write(volume.join("file"), "kept").expect("a file");
        support::run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(volume.join("below")));
        let script = "cat /proc/self/uid_map; id -u; stat -c %u /v/file; echo new > /v/new; \
                      echo x > /ro/x || echo kept out; echo x > /ro/below/x || echo kept out there, too; exec sleep 1000";
        let mut config = container_config("c", BUSYBOX, script);
        config["linux"]["security_context"]["namespace_options"]["userns_options"] = users.clone();
        config["mounts"] = json!([
            {"host_path": volume, "container_path": "/v", "uidMappings": users["uids"], "gidMappings": users["gids"]},
            {"host_path": volume, "container_path": "/ro", "readonly": true, "recursive_read_only": true},
        ]);
        let file = crictl.file("c-u", &config);
        let id = crictl.run(&["create", "--no-pull", &pod_id, &file, &pod_file]);
        crictl.run(&["start", &id]);
        let seen = wait_for("the script's last line", Duration::from_secs(20), || {
            let log = log_of(&node, "u", "c");
            (log.len() >= 5).then_some(log)
        });
        let map = seen[0].split_whitespace().collect::<Vec<_>>();
        assert_eq!(map, ["0", "300000", "65536"]);
        // The volume's ids are the pod's: root's on disk, root's inside.
        assert_eq!(seen[1..], ["0", "0", "kept out", "kept out there, too"]);
        use std::os::unix::fs::MetadataExt;
        assert_eq!(std::fs::metadata(volume.join("new")).expect("the file").uid(), 0);
        assert_eq!(crictl.run(&["exec", "-s", &id, "id", "-u"]), "0");
        let pid = crictl.json(&["inspect", &id])["info"]["pid"].as_i64().expect("a pid");
        assert_eq!(std::fs::metadata(format!("/proc/{pid}")).expect("the process").uid(), 300_000);
        crictl.run(&["rmp", "-f", &pod_id]);
        support::run(Command::new("umount").arg(volume.join("below")));
    });
}

/// A profile's words, one call each: allowed, an errno, another errno, killed, and by an argument.
#[test]
fn a_seccomp_profile_call_by_call() {
    isolated("a_seccomp_profile_call_by_call", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        std::fs::create_dir_all("/var/lib/kubelet/seccomp").expect("a folder");
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["sync"], "action": "SCMP_ACT_KILL"},
            {"names": ["sethostname"], "action": "SCMP_ACT_TRAP"},
            {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13,
             "args": [{"index": 1, "value": 0o4000, "valueTwo": 0o4000, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13,
             "args": [{"index": 2, "value": 0o4000, "valueTwo": 0o4000, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
             "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
        ]});
        std::fs::write("/var/lib/kubelet/seccomp/calls.json", profile.to_string()).expect("a profile");
        let script = "touch /f && echo touch $?; mkdir /d 2>&1; ln -s /f /l 2>&1; chmod 755 /f && echo chmod $?; \
                      chmod 4755 /f 2>&1; rmdir /none 2>&1; sync; echo sync $?; hostname x; echo hostname $?; echo end; exec sleep 1000";
        let mut config = container_config("c", BUSYBOX, script);
        config["linux"]["security_context"]["seccomp"] = json!({"profile_type": 2, "localhost_ref": "calls.json"});
        config["linux"]["security_context"]["capabilities"] = json!({"add_capabilities": ["SYS_ADMIN"]});
        let id = create(&crictl, &pod, "p", &config).expect("created");
        crictl.run(&["start", &id]);
        let seen = wait_for("the script's last line", Duration::from_secs(20), || {
            let log = log_of(&node, "p", "c");
            log.last().is_some_and(|l| l == "end").then_some(log)
        });
        let has = |words: &[&str]| seen.iter().any(|l| words.iter().all(|w| l.contains(w)));
        for words in [
            &["touch 0"][..],
            &["/d", "No space left"],
            &["/l", "not permitted"],
            &["chmod 0"],
            &["/f", "Permission denied"],
            &["/none", "No such file"],
            // SIGSYS
            &["sync 159"],
            &["hostname 159"],
        ] {
            assert!(has(words), "{words:?} is not in {seen:#?}");
        }
        // Execs are under it, too.
        let (good, said) = crictl.try_run(&["exec", "-s", &id, "mkdir", "/e"]);
        assert!(!good && said.contains("No space left"), "{said}");
        crictl.run(&["rmp", "-f", &pod]);
    });
}

/// A program for amd64 that makes a system call of i386's, and ends well.
fn i386_caller() -> Vec<u8> {
    // mov eax, 20 (getpid); int 0x80; mov eax, 60 (exit); xor edi, edi; syscall
    let code = [0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05];
    let (at, headers) = (0x40_0000u64, 64 + 56u64);
    let size = headers + code.len() as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2u16, 62].iter().flat_map(|n| n.to_le_bytes()));
    elf.extend(1u32.to_le_bytes());
    elf.extend([at + headers, 64, 0].iter().flat_map(|n| n.to_le_bytes()));
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 1, 0, 0, 0].iter().flat_map(|n| n.to_le_bytes()));
    elf.extend([1u32, 5].iter().flat_map(|n| n.to_le_bytes()));
    elf.extend([0, at, at, size, size, 0x1000].iter().flat_map(|n| n.to_le_bytes()));
    elf.extend(code);
    elf
}

/// liblxc's policies let other architectures in, with the default action; a profile that does not name one means that nobody gets by
/// it there.
#[test]
fn architectures_that_a_profile_does_not_name_are_closed() {
    isolated("architectures_that_a_profile_does_not_name_are_closed", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        std::fs::create_dir_all("/var/lib/kubelet/seccomp").expect("a folder");
        let volume = node.dir.join("volume");
        std::fs::create_dir_all(&volume).expect("a folder");
        std::fs::write(volume.join("i386"), i386_caller()).expect("a program");
        std::fs::set_permissions(volume.join("i386"), std::fs::Permissions::from_mode(0o755)).expect("its mode");
        let own = json!(["SCMP_ARCH_X86_64"]);
        let both = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]);
        for (n, (name, list, code)) in
            [("own", own, "159"), ("none", json!(null), "159"), ("both", both, "0")].into_iter().enumerate()
        {
            let mut profile = json!({"defaultAction": "SCMP_ACT_ALLOW",
                                     "syscalls": [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}]});
            if !list.is_null() {
                profile["architectures"] = list;
            }
            let file = format!("arch-{n}.json");
            std::fs::write(Path::new("/var/lib/kubelet/seccomp").join(&file), profile.to_string()).expect("a profile");
            let mut config = container_config(name, BUSYBOX, "/v/i386; echo $?; exec sleep 1000");
            config["mounts"] = json!([{"host_path": volume, "container_path": "/v"}]);
            // Not root, with no capabilities, and as the first process' maker left it.
            config["linux"]["security_context"] = json!({
                "run_as_user": {"value": 1000}, "no_new_privs": true, "capabilities": {"drop_capabilities": ["ALL"]},
                "seccomp": {"profile_type": 2, "localhost_ref": file},
            });
            let id = create(&crictl, &pod, "p", &config).expect("created");
            crictl.run(&["start", &id]);
            let said = wait_for("its word", Duration::from_secs(20), || log_of(&node, "p", name).last().cloned());
            assert_eq!(said, code, "{name}");
            let (good, said) = crictl.try_run(&["exec", "-s", &id, "/v/i386"]);
            assert_eq!(good, code == "0", "{name}: {said}");
        }
        crictl.run(&["rmp", "-f", &pod]);
    });
}

/// Paths in volumes are closed, or refused by name; and what an unprivileged container has read-only is a privileged one's to write.
#[test]
fn closed_paths_in_volumes_and_a_sysfs_for_each() {
    isolated("closed_paths_in_volumes_and_a_sysfs_for_each", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let mut config = pod_config("p", &node.pod_logs("p"));
        config["linux"]["security_context"]["privileged"] = json!(true);
        let pod = crictl.run(&["runp", &crictl.file("pod-p", &config)]);
        let volume = node.dir.join("volume");
        std::fs::create_dir_all(volume.join("real")).expect("a folder");
        std::fs::create_dir_all(volume.join("open")).expect("a folder");
        std::fs::write(volume.join("real/f"), "secret").expect("a file");
        std::fs::write(volume.join("open/f"), "secret").expect("a file");
        std::os::unix::fs::symlink("real", volume.join("link")).expect("a link");
        std::os::unix::fs::symlink("real/f", volume.join("file")).expect("a link");
        let made = |name: &str, script: &str, change: &dyn Fn(&mut Value)| {
            let mut config = container_config(name, BUSYBOX, script);
            config["mounts"] = json!([{"host_path": volume, "container_path": "/v"}]);
            change(&mut config);
            let file = crictl.file(&format!("c-{name}"), &config);
            let pod_file = crictl.file("pod-p", &pod_config("p", &node.pod_logs("p")));
            let (good, said) = crictl.try_run(&["create", "--no-pull", &pod, &file, &pod_file]);
            if !good {
                return Err(said);
            }
            let id = said.trim().to_owned();
            crictl.run(&["start", &id]);
            crictl.wait_exit(&id);
            Ok(log_of(&node, "p", name))
        };
        for (list, path) in [("masked_paths", "/v/link"), ("masked_paths", "/v/file"), ("readonly_paths", "/v/link/f")]
        {
            let refused = made("bad", "cat /v/real/f", &|config| {
                config["linux"]["security_context"][list] = json!([path]);
            });
            let said = refused.expect_err(path);
            assert!(said.contains("Unimplemented") && said.contains(path), "{said}");
        }
        let script = "cat /v/real/f 2>/dev/null || echo hidden; wc -c </v/open/f; touch /v/open/new || echo closed; \
                      wc -c </proc/uptime; echo 1400 >/sys/class/net/eth0/mtu || echo closed, too";
        let said = made("plain", script, &|config| {
            config["linux"]["security_context"]["masked_paths"] = json!(["/v/real", "/v/open/f", "/proc/uptime"]);
            config["linux"]["security_context"]["readonly_paths"] = json!(["/v/open"]);
        });
        assert_eq!(said.expect("made"), ["hidden", "0", "closed", "0", "closed, too"]);
        let said = made("strong", "echo 1400 >/sys/class/net/eth0/mtu && cat /sys/class/net/eth0/mtu", &|config| {
            config["linux"]["security_context"]["privileged"] = json!(true);
        });
        assert_eq!(said.expect("made"), ["1400"]);
        // A volume where liblxc would mount terminals, and one on a link of the kernel's.
        let said = made("pts", "ls /dev/pts", &|config| {
            config["mounts"] = json!([{"host_path": volume, "container_path": "/dev/pts"}]);
        });
        assert_eq!(said.expect("made"), ["file", "link", "open", "real"]);
        let refused = made("environ", "true", &|config| {
            config["mounts"] = json!([{"host_path": volume.join("real/f"), "container_path": "/proc/self/environ"}]);
        });
        let said = refused.expect_err("refused");
        assert!(said.contains("Unimplemented") && said.contains("/proc/self/environ"), "{said}");
        // A failure in words, without liblxc's time and place.
        let refused = made("file", "true", &|config| {
            config["mounts"] = json!([{"host_path": volume.join("real/f"), "container_path": "/etc"}]);
        });
        let said = refused.expect_err("refused");
        assert!(said.contains("Not a directory") && !said.contains("utils.c") && !said.contains("--plan"), "{said}");
        crictl.run(&["rmp", "-f", &pod]);
    });
}

/// A container of a pod with the node's IPC namespace has the node's /dev/shm, and with it the usual flags.
#[test]
fn the_nodes_shared_memory_has_its_flags() {
    isolated("the_nodes_shared_memory_has_its_flags", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let mut config = pod_config("p", &node.pod_logs("p"));
        config["linux"]["security_context"]["namespace_options"]["ipc"] = json!(2);
        let pod = crictl.run(&["runp", &crictl.file("pod-ipc", &config)]);
        let mut config = container_config("c", BUSYBOX, "grep ' /dev/shm ' /proc/mounts; exec sleep 1000");
        config["linux"]["security_context"] = json!({"namespace_options": {"ipc": 2, "pid": 1}});
        let id = create(&crictl, &pod, "p", &config).expect("created");
        crictl.run(&["start", &id]);
        let said = wait_for("its word", Duration::from_secs(20), || log_of(&node, "p", "c").first().cloned());
        assert!(["nosuid", "nodev", "noexec"].iter().all(|flag| said.contains(flag)), "{said}");
        crictl.run(&["rmp", "-f", &pod]);
    });
}

/// A file system in user space that never answers, where lxcfs is mounted.
#[test]
fn an_lxcfs_that_hangs_holds_up_nobody() {
    isolated("an_lxcfs_that_hangs_holds_up_nobody", || {
        let node = lxc_node();
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        std::fs::create_dir_all("/var/lib/lxcfs").expect("a folder");
        let fuse = std::fs::File::options().read(true).write(true).open("/dev/fuse").expect("/dev/fuse");
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", std::os::fd::AsRawFd::as_raw_fd(&fuse));
        let data = std::ffi::CString::new(data).expect("a text");
        rustix::mount::mount(
            "lxcfs",
            "/var/lib/lxcfs",
            "fuse",
            rustix::mount::MountFlags::empty(),
            Some(data.as_c_str()),
        )
        .expect("mounted");
        for n in 0..3 {
            let begun = std::time::Instant::now();
            let refused = create(&crictl, &pod, "p", &container_config(&format!("c{n}"), BUSYBOX, "true"));
            let said = refused.expect_err("it hangs");
            assert!(said.contains("Unavailable") && said.contains("lxcfs"), "{said}");
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
            crictl.run(&["version"]);
        }
        // Its process ends: there is no lxcfs any more.
        drop(fuse);
        let id = wait_for("a container without lxcfs", Duration::from_secs(20), || {
            create(&crictl, &pod, "p", &container_config("c", BUSYBOX, "echo ran")).ok()
        });
        crictl.run(&["start", &id]);
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 0);
        crictl.run(&["rmp", "-f", &pod]);
        rustix::mount::unmount("/var/lib/lxcfs", rustix::mount::UnmountFlags::DETACH).expect("unmounted");
    });
}

/// Pulls an OCI layout under a name.
fn pull_layout(node: &Node, layout: &Path, name: &str) {
    let mut pull = Command::new(support::daemon_program());
    let source = format!("oci:{}", layout.display());
    support::run(pull.arg("--local-socket").arg(node.local_socket()).args(["pull", &source, "--as", name]));
}

/// Starts a system container, waits until its console says `booted`, asks it something, and stops it; its console says
/// `last` then.
fn boots_and_powers_off(node: &Node, config: &Value, booted: &str, inside: impl FnOnce(&str), last: &str) {
    let crictl = node.crictl();
    let pod = crictl.run_pod("p");
    let id = create(&crictl, &pod, "p", config).expect("created");
    let begun = std::time::Instant::now();
    crictl.run(&["start", &id]);
    let said = |words: &str| {
        wait_for(words, Duration::from_secs(60), || {
            log_of(node, "p", "c").iter().any(|l| l.trim() == words).then_some(())
        });
    };
    said(booted);
    println!("\nfigure: a system container of {} has booted within {:?}", config["image"]["image"], begun.elapsed());
    assert_eq!(crictl.run(&["exec", "-s", &id, "sh", "-c", "echo $container"]), "lxc");
    inside(&id);
    let begun = std::time::Instant::now();
    crictl.run(&["stop", "-t", "60", &id]);
    let status = crictl.wait_exit(&id);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_ne!(status["exitCode"], 137, "{status}");
    said(last);
    println!("figure: it powers off within {:?}", begun.elapsed());
    crictl.run(&["rmp", "-f", &pod]);
}

/// An image whose entry point is an init: it boots, takes execs, logs its console and powers off when it is stopped.
#[test]
fn a_system_container_with_busybox() {
    isolated("a_system_container_with_busybox", || {
        let node = lxc_node();
        let layout = node.dir.join("layout");
        support::run(Command::new(support::repository().join("scripts/mkoci")).arg(&layout));
        pull_layout(&node, &layout, "t/busybox:1");
        let tab = node.dir.join("inittab");
        let lines = "::sysinit:/bin/echo booted\n::respawn:/bin/sleep 4242\n::shutdown:/bin/echo powers off\n";
        std::fs::write(&tab, lines).expect("inittab");
        let mut config = container_config("c", "t/busybox:1", "");
        config["command"] = json!(["/bin/init"]);
        config["mounts"] = json!([{"host_path": tab, "container_path": "/etc/inittab", "readonly": true}]);
        let inside = |id: &str| {
            assert_eq!(node.crictl().run(&["exec", "-s", id, "cat", "/proc/1/comm"]), "init");
        };
        boots_and_powers_off(&node, &config, "booted", inside, "powers off");
    });
}

/// Debian with OpenRC, by the image's own command. systemd wants cgroup v2: the node guest has it.
#[test]
fn a_system_container_with_openrc() {
    let name = "a_system_container_with_openrc";
    // Made outside, where the package tools are; the path is handed in beside the logs.
    let made = || {
        let said = support::run(&mut Command::new(support::repository().join("tests/tools/system")));
        let file = support::target_folder().join("test-logs").join(name).join("system");
        std::fs::write(file, said.lines().last().unwrap_or_default()).expect("the path");
        support::monitor_program()
    };
    support::isolated_with(name, made, || {
        let node = lxc_node();
        let images = std::fs::read_to_string(support::given("LXCRI_LOGS").join("system")).expect("the path");
        pull_layout(&node, &Path::new(&images).join("openrc"), "t/openrc:1");
        let mut config = container_config("c", "t/openrc:1", "");
        config["command"] = json!([]);
        let inside = |id: &str| {
            assert_eq!(node.crictl().run(&["exec", "-s", id, "cat", "/proc/1/comm"]), "openrc-init");
            let status = node.crictl().run(&["exec", "-s", id, "rc-service", "works", "status"]);
            assert!(status.contains("started"), "{status}");
        };
        boots_and_powers_off(&node, &config, "the service works", inside, "the service has stopped");
    });
}
