//! The handler proxmox-vm with the tests' Proxmox server, which really runs its virtual machines by QEMU without KVM: pods as VMs, and
//! the pods' containers inside of them, by the guest's agent and the pods' relays.
//!
//! Run by `cargo test --test proxmox_vm`, as root. A crash leaves nothing: see `support`. One VM serves many checks: a boot without KVM
//! is what takes the time.

#![allow(clippy::disallowed_methods, clippy::print_stdout)] // tests write files and look into /proc plainly

mod support;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::crictl::{BUSYBOX, Crictl, pod_config};
use support::node::{Node, Options};
use support::streams::{OnTerminal, Running, create_with, fed, log_lines};
use support::{describe, wait_for};

/// Without KVM, on a machine that has other things to do.
const LONG: Duration = Duration::from_secs(60);

fn in_vms(name: &str, body: impl FnOnce()) {
    let more: &[support::Given] =
        &[("LXCRI_RELAY", support::relay_program), ("LXCRI_GUEST_TEMPLATE", support::guest_template)];
    support::isolated_in("trixie-vm", name, support::monitor_program, more, body);
}

fn start(lines: &str) -> Node {
    let proxmox_lines = [String::new(), lines.to_owned()];
    Node::start(Options { handler: "proxmox-vm".into(), proxmox_lines, ..Options::default() })
}

/// A pod whose VM may take its time.
fn run_pod(crictl: &Crictl, name: &str) -> String {
    crictl.run(&["--timeout", "280s", "runp", &crictl.pod_file(name)])
}

/// What a kubelet keeps of pod "p".
struct Kubelet(PathBuf);

impl Kubelet {
    fn new(node: &Node) -> Self {
        Self(node.dir.join("kubelet/pods/uid-p"))
    }

    fn volume(&self, plugin: &str, name: &str) -> PathBuf {
        self.0.join("volumes").join(format!("kubernetes.io~{plugin}")).join(name)
    }

    /// A new state of a volume, exchanged at once.
    fn write(&self, folder: &Path, state: &str, files: &[(&str, &str, u32)]) {
        std::fs::create_dir_all(folder.join(state)).expect("a state");
        for (name, text, mode) in files {
            let file = folder.join(state).join(name);
            std::fs::write(&file, text).expect("a file");
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(*mode)).expect("its mode");
            let _ = std::os::unix::fs::symlink(format!("..data/{name}"), folder.join(name));
        }
        std::os::unix::fs::symlink(state, folder.join("..data_tmp")).expect("a link");
        std::fs::rename(folder.join("..data_tmp"), folder.join("..data")).expect("exchanged");
    }
}

fn mount(host: &Path, inside: &str, readonly: bool) -> Value {
    json!({"host_path": host, "container_path": inside, "readonly": readonly})
}

/// What a refused create says.
fn refused(crictl: &Crictl, pod: &str, change: &Value) -> String {
    let mut config = support::crictl::container_config("refused", BUSYBOX, "exec sleep 1000");
    for (key, value) in change.as_object().expect("an object") {
        config[key] = value.clone();
    }
    let file = crictl.file("container-refused", &config);
    let (made, said) = crictl.try_run(&["create", "--no-pull", pod, &file, &crictl.pod_file("p")]);
    assert!(!made && said.contains("Unimplemented"), "{change}: {said}");
    said
}

#[test]
fn a_pod_is_a_vm() {
    in_vms("a_pod_is_a_vm", || {
        let mut node = start("");
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let begun = Instant::now();
        let pod = run_pod(&crictl, "p");
        println!("figure: a pod's VM is ready after {} ms (TCG)", begun.elapsed().as_millis());
        assert_eq!(crictl.json(&["inspectp", &pod])["status"]["network"]["ip"], "10.90.0.100");
        containers_and_their_ends(&node, &crictl, &pod);
        two_containers_and_their_volumes(&mut node, &pod);
        what_a_vm_has_not(&crictl, &pod);

        crictl.run(&["rmp", "-f", &pod]);
        let pve = node.pve.as_ref().expect("a Proxmox");
        assert_eq!(pve.guests(), [8000, 9099], "the template, and the image's disk");
        let volumes: Vec<String> = pve.volumes();
        assert!(!volumes.contains(&"9000".to_owned()), "{volumes:?}");
        if let Some(violations) = pve.violations() {
            assert!(violations.is_empty(), "{violations:?}");
        }
        let log = std::fs::read_to_string(node.log_file()).expect("the daemon's log");
        assert!(!log.contains("secret="), "a secret in the log");
    });
}

fn containers_and_their_ends(node: &Node, crictl: &Crictl, pod: &str) {
    let script = "echo $GREETING; hostname; cat /etc/hosts >&2; trap 'exit 7' TERM; while :; do sleep 0.1; done";
    let begun = Instant::now();
    let id = create_with(crictl, pod, "c", script, &json!({}));
    println!("figure: a container runs after {} ms (TCG)", begun.elapsed().as_millis());
    let log = node.pod_logs("p").join("c/0.log");
    let said =
        wait_for("its words", LONG, || log.exists().then(|| log_lines(node, "c", "stdout")).filter(|l| l.len() > 1));
    assert_eq!(said, ["hello", "p"]);
    wait_for("its hosts", LONG, || log_lines(node, "c", "stderr").iter().any(|l| l == "10.90.0.100\tp").then_some(()));
    assert_eq!(crictl.run(&["exec", "-s", &id, "sh", "-c", "echo $((40+2))"]), "42");
    let (good, said) = crictl.try_run(&["exec", "-s", &id, "sh", "-c", "exit 5"]);
    assert!(!good && said.contains("exited with 5"), "{said}");
    let begun = Instant::now();
    let out = fed(crictl, &["exec", "-i", &id, "sh", "-c", "cat; exit 9"], b"through\n".to_vec());
    println!("figure: an exec, to its end, {} ms (TCG)", begun.elapsed().as_millis());
    assert!(out.stdout == b"through\n" && !out.status.success(), "{}", describe(&out));
    let mut terminal = OnTerminal::start(&crictl.command(&["exec", "-it", &id, "sh"]), 101, 33);
    terminal.until("# ");
    terminal.type_in("echo si''ze $(stty size)\n");
    terminal.until("size 33 101");
    terminal.type_in("exit 3\n");
    assert!(!terminal.status().success());
    let stats = crictl.json(&["stats", "--id", &id])["stats"][0].take();
    let number = |v: &Value| v["value"].as_str().and_then(|v| v.parse::<u64>().ok()).unwrap_or_default();
    assert!(number(&stats["cpu"]["usageCoreNanoSeconds"]) > 0, "{stats}");
    assert!(number(&stats["memory"]["workingSetBytes"]) > 0, "{stats}");
    crictl.run(&["stop", "-t", "20", &id]);
    assert_eq!(crictl.wait_exit(&id)["exitCode"], 7);
    crictl.run(&["rm", &id]);
    let absent = json!({"command": ["/no/such/program"]});
    let mut config = support::crictl::container_config("absent", BUSYBOX, "");
    config["command"] = absent["command"].clone();
    let file = crictl.file("container-absent", &config);
    let id = crictl.run(&["create", "--no-pull", pod, &file, &crictl.pod_file("p")]);
    let (good, said) = crictl.try_run(&["start", &id]);
    assert!(!good && said.contains("/no/such/program"), "{said}");
    let once = json!({"stdin": true, "stdin_once": true});
    let id = create_with(crictl, pod, "attached", "echo up; cat; exit 4", &once);
    let out = fed(crictl, &["attach", "-i", &id], b"one\ntwo\n".to_vec());
    assert!(String::from_utf8_lossy(&out.stdout).contains("one\ntwo\n"), "{}", describe(&out));
    assert_eq!(crictl.wait_exit(&id)["exitCode"], 4);
}

fn two_containers_and_their_volumes(node: &mut Node, pod: &str) {
    let crictl = node.crictl();
    let kubelet = Kubelet::new(node);
    let (config, secret) = (kubelet.volume("configmap", "cfg"), kubelet.volume("secret", "key"));
    let (scratch, message) = (kubelet.volume("empty-dir", "tmp"), kubelet.0.join("containers/writer/0123abcd"));
    kubelet.write(&config, "..1", &[("color", "red", 0o644), ("gone", "1", 0o644)]);
    kubelet.write(&secret, "..1", &[("key", "hidden", 0o400)]);
    std::fs::create_dir_all(&scratch).expect("an emptyDir");
    std::fs::set_permissions(&scratch, std::fs::Permissions::from_mode(0o777)).expect("its mode");
    std::fs::create_dir_all(message.parent().expect("a folder")).expect("a folder");
    std::fs::write(&message, "").expect("a termination log");
    std::fs::set_permissions(&message, std::fs::Permissions::from_mode(0o666)).expect("its mode");
    let server = create_with(
        &crictl,
        pod,
        "server",
        "exec nc -ll -p 8080 -e cat",
        &json!({"mounts": [mount(&scratch, "/shared", false)]}),
    );
    let mounts = json!({"mounts": [
        mount(&config, "/config", true), mount(&secret, "/secret", true), mount(&scratch, "/shared", false),
        mount(&message, "/dev/termination-log", false),
    ]});
    let script = "stat -c %a /secret/..data/key; cat /secret/key; echo; echo both > /shared/file; echo done; \
                  until [ -e /shared/end ]; do sleep 0.1; done; echo last words > /dev/termination-log; exit 3";
    let writer = create_with(&crictl, pod, "writer", script, &mounts);
    wait_for("its words", LONG, || (log_lines(node, "writer", "stdout") == ["400", "hidden", "done"]).then_some(()));
    let inside = |id: &str, command: &str| crictl.run(&["exec", "-s", id, "sh", "-c", command]);
    assert_eq!(inside(&server, "cat /shared/file"), "both");
    // The pod's network is one, and a port of it is forwarded.
    assert_eq!(inside(&writer, "echo hi | nc -w 5 127.0.0.1 8080"), "hi");
    let forward = crictl.command(&["port-forward", pod, "18080:8080"]).stdout(Stdio::null()).spawn().expect("crictl");
    let _forward = Running(forward);
    wait_for("the forwarded port", LONG, || (talk(18080, b"ping").ok()? == b"ping").then_some(()));

    assert_eq!(inside(&writer, "cat /config/color"), "red");
    kubelet.write(&config, "..2", &[("color", "blue", 0o644)]);
    wait_for("the change", LONG, || (inside(&writer, "cat /config/color") == "blue").then_some(()));
    // A new daemon finds all of it, and goes on with it.
    node.crash_daemon();
    let crictl = node.crictl();
    let inside = |id: &str, command: &str| crictl.run(&["exec", "-s", id, "sh", "-c", command]);
    assert_eq!(crictl.container_state(&writer), "CONTAINER_RUNNING");
    // kill -9 of the relay: another one takes its place, and the containers know nothing of it.
    let relay = relays();
    assert_eq!(relay.len(), 1);
    rustix::process::kill_process(relay[0], rustix::process::Signal::KILL).expect("kill -9");
    wait_for("another relay", LONG, || {
        (crictl.try_run(&["exec", "-s", &server, "true"]).0 && relays() != relay).then_some(())
    });
    assert_eq!(crictl.container_state(&writer), "CONTAINER_RUNNING");
    // One that can't be started: only it would know what runs, so nothing is taken for ended. Then it goes on.
    let program = std::env::var("LXCRI_RELAY").expect("the relay's program");
    rustix::mount::mount_bind("/dev/null", &program).expect("nothing in its place");
    rustix::process::kill_process(relays()[0], rustix::process::Signal::KILL).expect("kill -9");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(crictl.container_state(&writer), "CONTAINER_RUNNING");
    assert!(!crictl.try_run(&["exec", "-s", &server, "true"]).0, "an exec without a relay");
    rustix::mount::unmount(&program, rustix::mount::UnmountFlags::DETACH).expect("the relay's program again");
    wait_for("a relay again", LONG, || crictl.try_run(&["exec", "-s", &server, "true"]).0.then_some(()));
    assert_eq!(crictl.container_state(&writer), "CONTAINER_RUNNING");
    kubelet.write(&config, "..3", &[("color", "green", 0o644)]);
    wait_for("the change", LONG, || (inside(&writer, "cat /config/color") == "green").then_some(()));
    inside(&server, "touch /shared/end");
    assert_eq!(crictl.wait_exit(&writer)["exitCode"], 3);
    assert_eq!(std::fs::read_to_string(&message).expect("the message"), "last words\n");
}

/// Processes that stand for pods' monitors.
fn relays() -> Vec<rustix::process::Pid> {
    let all = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let is = |pid: &i32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == "lxcri-relay"
    };
    pids.filter(is).filter_map(rustix::process::Pid::from_raw).collect()
}

fn talk(port: u16, data: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(LONG))?;
    stream.write_all(data)?;
    stream.shutdown(Shutdown::Write)?;
    let mut got = Vec::new();
    stream.read_to_end(&mut got)?;
    Ok(got)
}

fn what_a_vm_has_not(crictl: &Crictl, pod: &str) {
    let said = refused(crictl, pod, &json!({"mounts": [mount(Path::new("/etc"), "/x", true)]}));
    assert!(said.contains("/etc is a path of the node"), "{said}");
    let csi = Path::new("/tmp/node/kubelet/pods/uid-p/volumes/kubernetes.io~csi/pv/mount");
    assert!(refused(crictl, pod, &json!({"mounts": [mount(csi, "/x", false)]})).contains("kubernetes.io~csi"));
    let device = json!({"devices": [{"host_path": "/dev/null", "container_path": "/dev/x", "permissions": "r"}]});
    assert!(refused(crictl, pod, &device).contains("devices of the node"));
    let shared = json!({"linux": {"security_context": {"namespace_options": {"pid": 0}}}});
    assert!(refused(crictl, pod, &shared).contains("shareProcessNamespace"));
    let mut config = pod_config("host", Path::new("/tmp/node/logs/host"));
    config["linux"]["security_context"]["namespace_options"]["network"] = json!(2);
    let (made, said) = crictl.try_run(&["runp", &crictl.file("pod-host", &config)]);
    assert!(!made && said.contains("the node's network namespace"), "{said}");
    let mut config = pod_config("port", Path::new("/tmp/node/logs/port"));
    config["port_mappings"] = json!([{"protocol": 0, "container_port": 80, "host_port": 8080}]);
    let (made, said) = crictl.try_run(&["runp", &crictl.file("pod-port", &config)]);
    assert!(!made && said.contains("host port 8080"), "{said}");
}

#[test]
fn vms_that_others_end_and_vms_that_are_nobodys() {
    in_vms("vms_that_others_end_and_vms_that_are_nobodys", || {
        let node = start("orphans = \"remove\"\norphans_after = \"2s\"\nimages_after = \"3s\"");
        let crictl = node.crictl();
        let pve = node.pve.as_ref().expect("a Proxmox");
        crictl.run(&["pull", BUSYBOX]);
        let ours = std::fs::read_to_string(node.dir.join("lib/installation")).expect("an identity");
        let notes = |installation: &str| {
            format!("Pod a/b\n\nproxmox-lxcri: installation={} pod={}\n", installation.trim(), "ab".repeat(32))
        };
        pve.add_vm_with_notes(9050, &notes(&ours));
        pve.add_vm_with_notes(9051, &notes(&"cd".repeat(16)));
        pve.add_vm_with_notes(9052, "k8s");
        pve.add_vm_with_notes(200, &notes(&ours));
        let pod = run_pod(&crictl, "p");
        let id = create_with(&crictl, &pod, "c", "exec sleep 1000", &json!({}));
        wait_for("the orphan's end", LONG, || (!pve.guests().contains(&9050)).then_some(()));
        assert_eq!(pve.guests(), [200, 8000, 9000, 9051, 9052, 9099]);

        // A reset ends what ran in it; the pod goes on, and others can run.
        pve.monitor(9000, "system_reset");
        let status = crictl.wait_exit(&id);
        assert_eq!(status["exitCode"], 255, "{status}");
        assert_eq!(crictl.json(&["inspectp", &pod])["status"]["state"], "SANDBOX_READY");
        let id = create_with(&crictl, &pod, "d", "exec sleep 1000", &json!({}));
        assert_eq!(crictl.run(&["exec", "-s", &id, "cat", "/etc/hostname"]), "p");

        pve.stop_guest(9000);
        let status = crictl.wait_exit(&id);
        assert_eq!(status["exitCode"], 255, "{status}");
        assert!(status["message"].as_str().is_some_and(|m| m.contains("VM 9000")), "{status}");
        wait_for("NOTREADY", LONG, || {
            (crictl.json(&["inspectp", &pod])["status"]["state"] == "SANDBOX_NOTREADY").then_some(())
        });
        crictl.run(&["rmp", "-f", &pod]);
        // Nobody uses the image any more.
        wait_for("the end of its disk", LONG, || (pve.guests() == [200, 8000, 9051, 9052]).then_some(()));

        // Without its template no pod can be, and nothing is left of one that was begun.
        pve.destroy_guest(8000);
        let (made, said) = crictl.try_run(&["runp", &crictl.pod_file("q")]);
        assert!(!made && said.contains("clone VM 8000"), "{said}");
        assert_eq!(pve.guests(), [200, 9051, 9052]);
        if let Some(violations) = pve.violations() {
            assert!(violations.is_empty(), "{violations:?}");
        }
    });
}
