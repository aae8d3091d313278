//! The template in QEMU without KVM: boots, is connected to, runs a container from an image's disk, is switched off.
//!
//! The template is made by tests/tools/guest-template (GUEST_TEMPLATE names one that is made) with the agent that GUEST_AGENT names, which
//! has to be the static build: a guest has no libraries for another.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)]

mod harness;

use std::cell::Cell;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::*;
use lxcri_guest_proto::v1::{self, answer::Answer as Body, call::Call as Op, purpose};
use lxcri_monitor_proto::v1::{self as monitor, reply, request};

/// A boot without KVM, on a machine that has other things to do.
const BOOT: Duration = Duration::from_secs(180);

/// The static agent: given, or built now.
fn static_agent() -> PathBuf {
    if let Some(path) = std::env::var_os("GUEST_AGENT") {
        return path.into();
    }
    let (package, target) = ("proxmox-lxcri-guest-agent", "x86_64-unknown-linux-musl");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--profile", "monitor", "-p", package, "--target", target])
        .status()
        .unwrap();
    assert!(status.success());
    let target_folder = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned();
    target_folder.join(target).join("monitor").join(package)
}

fn template() -> PathBuf {
    if let Some(path) = std::env::var_os("GUEST_TEMPLATE") {
        return path.into();
    }
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/tools/guest-template");
    let out = Command::new(tool).arg(static_agent()).stderr(Stdio::inherit()).output().unwrap();
    assert!(out.status.success());
    String::from_utf8(out.stdout).unwrap().trim().into()
}

struct Vm {
    dir: tempfile::TempDir,
    qemu: Child,
    address: SocketAddr,
    started: Instant,
}

impl Vm {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        make_image(&path("image.ext4"));
        let secret: String = SECRET.iter().map(|b| format!("{b:02x}")).collect();
        let config =
            format!("lxcri-guest 1\nsecret={secret}\nlisten=0.0.0.0:10750\naddress=10.0.2.15/24\ngateway=10.0.2.2\n");
        let mut disk = config.into_bytes();
        disk.resize(1 << 20, 0);
        std::fs::write(path("config.raw"), disk).unwrap();
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                template().to_str().unwrap(),
                path("root.qcow2").to_str().unwrap(),
            ],
        );
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let started = Instant::now();
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-machine", "pc", "-accel", "tcg", "-cpu", "max", "-m", "128", "-smp", "1", "-display", "none", "-vga",
            "none",
        ]);
        qemu.args(["-nodefaults", "-no-user-config", "-device", "virtio-scsi-pci,id=scsihw0", "-serial"]);
        qemu.arg(format!("file:{}", path("console").display()));
        qemu.args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp").display())]);
        qemu.args(["-netdev", &format!("user,id=net0,restrict=on,hostfwd=tcp:{address}-10.0.2.15:10750")]);
        qemu.args(["-device", "virtio-net-pci,netdev=net0"]);
        for (n, name, format, options) in
            [(0, "root.qcow2", "qcow2", "bootindex=100"), (1, "config.raw", "raw,readonly=on", "serial=lxcri-config")]
        {
            qemu.args(["-drive", &format!("file={},if=none,id=disk{n},format={format}", path(name).display())]);
            qemu.args(["-device", &format!("scsi-hd,bus=scsihw0.0,scsi-id={n},drive=disk{n},{options}")]);
        }
        let qemu = qemu.stdin(Stdio::null()).spawn().unwrap();
        Self { dir, qemu, address, started }
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.path().join("console")).unwrap_or_default()).into_owned()
    }

    fn connect(&mut self) -> Node {
        loop {
            // QEMU takes a connection before there is anybody in the guest.
            match Node::connect(self.address, SECRET, Duration::from_secs(2)) {
                Ok(node) => return node,
                Err(e) => {
                    let ended = self.qemu.try_wait().unwrap();
                    let late = self.started.elapsed() > BOOT;
                    assert!(!late && ended.is_none(), "no agent: {e}; QEMU: {ended:?}; console:\n{}", self.console());
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Commands to QEMU's monitor, which must not fail.
    fn qmp(&self, commands: &[&str]) {
        let stream = UnixStream::connect(self.dir.path().join("qmp")).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut writer = stream;
        lines.next().unwrap().unwrap();
        for command in [r#"{"execute":"qmp_capabilities"}"#].iter().chain(commands) {
            writeln!(writer, "{command}").unwrap();
            let answer = lines
                .by_ref()
                .map(Result::unwrap)
                .find(|l| l.contains("\"return\"") || l.contains("\"error\""))
                .unwrap();
            assert!(answer.contains("\"return\""), "{command}: {answer}");
        }
    }

    /// A disk that comes while the guest runs.
    fn plug(&self, name: &str, serial: &str) {
        let file = self.dir.path().join(name);
        self.qmp(&[
            &format!(r#"{{"execute":"blockdev-add","arguments":{{"node-name":"{serial}","driver":"raw","read-only":true,"file":{{"driver":"file","filename":"{}"}}}}}}"#, file.display()),
            &format!(r#"{{"execute":"device_add","arguments":{{"driver":"scsi-hd","bus":"scsihw0.0","scsi-id":"5","drive":"{serial}","serial":"{serial}","id":"{serial}"}}}}"#),
        ]);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// A figure of the guest's, in KiB.
fn kib(node: &mut Node, file: &str, field: &str) -> u64 {
    let Body::Contents(read) = node.done(Op::Read(v1::Read { paths: vec![file.into()] })) else {
        panic!("no contents")
    };
    assert_eq!(read.contents[0].errno, 0, "{file}");
    let text = String::from_utf8(read.contents[0].content.clone()).unwrap();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap_or_else(|| panic!("no {field} in {file}:\n{text}"));
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_container_runs_in_a_virtual_machine() {
    let mut vm = Vm::start();
    let mut node = vm.connect();
    let connected = vm.started.elapsed();
    let hello = node.hello();
    assert_eq!((hello.run_dir.as_str(), hello.data_dir.as_str()), ("/run/lxcri", "/var/lib/lxcri"));
    assert_ne!(hello.boot_id, std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim());
    let place = Place { run: hello.run_dir, data: hello.data_dir, cgroups: "/sys/fs/cgroup", volume: Cell::new(true) };
    let monitor = node.greet().pid;
    let file = |content: &[u8]| v1::File { path: "key".into(), content: content.into(), mode: 0o444, uid: 0, gid: 0 };
    let sync =
        |content: &[u8]| Op::Sync(v1::Sync { volume: "config".into(), files: vec![file(content)], folder: None });
    node.done(sync(b"one\n"));
    // The image's disk comes while the guest runs, as a node brings it; the kernel takes a moment to see it.
    vm.plug("image.ext4", SERIAL);
    let root = Op::MakeRoot(v1::MakeRoot { container_id: "c1".into(), serial: SERIAL.into(), fs_type: "ext4".into() });
    let end = Instant::now() + LONG;
    while let Body::Error(error) = node.call(root.clone()) {
        assert!(Instant::now() < end, "{error:?}");
    }
    let log = node.log("c1", 0);
    place.launch(&mut node, "c1", "id -u; cat /volume/key; cat /proc/uptime; cat; exit 42");
    node.until("its output", |n| output(&n.text(log), "stdout").lines().count() >= 3);
    let running = vm.started.elapsed();
    let said = output(&node.text(log), "stdout");
    assert!(said.starts_with("1000\none\n"), "{said}");

    let (input, out) = (node.descriptor(true), node.descriptor(false));
    let mut exec = place.exec(&mut node, "c1", "e1", "cat; cat /volume/..data/key; exit 7", false);
    (exec.has_stdin, exec.has_stdout) = (true, true);
    node.done(sync(b"two\n"));
    let before = Instant::now();
    assert!(matches!(node.ask(request::Op::Exec(exec), &[input, out]), reply::Body::ExecStarted(_)));
    node.send(input, b"typed\n");
    node.end(input);
    assert_eq!(node.exec_exited("e1").code, 7);
    let exec_time = before.elapsed();
    node.until("its output", |n| n.ended.contains(&out.number()));
    assert_eq!(node.text(out), "typed\ntwo\n");
    let refused = node.open(purpose::Purpose::Port(v1::Port { port: 9 }));
    node.until("its refusal", |n| n.resets.contains_key(&refused.number()));

    let agent_kib = kib(&mut node, "/proc/self/smaps_rollup", "Pss:");
    let monitor_kib = kib(&mut node, &format!("/proc/{monitor}/smaps_rollup"), "Pss:");
    let total = kib(&mut node, "/proc/meminfo", "MemTotal:");
    let available = kib(&mut node, "/proc/meminfo", "MemAvailable:");
    // kill -9 of the agent, by a container that sees the guest's processes: the init starts it again, and the other container
    // knows nothing of it.
    let agent = kib(&mut node, &format!("/proc/{monitor}/status"), "PPid:");
    let killer = place.plan(&mut node, "c2", &format!("kill -9 {agent}; sleep 1000"), false);
    let path = format!("{}/bundles/c2/config.json", place.run);
    let Body::Contents(read) = node.done(Op::Read(v1::Read { paths: vec![path] })) else { panic!("no contents") };
    let mut config: serde_json::Value = serde_json::from_slice(&read.contents[0].content).unwrap();
    config["process"]["user"] = serde_json::json!({"uid": 0, "gid": 0});
    config["process"]["capabilities"] =
        serde_json::json!({"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]});
    config["linux"]["namespaces"] = serde_json::json!([{"type": "mount"}]);
    config.as_object_mut().unwrap().remove("hostname");
    node.write("bundles/c2/config.json", config.to_string().as_bytes());
    let created = node.ask(request::Op::Create(killer), &[]);
    assert!(matches!(created, reply::Body::Created(_)), "{created:?}");
    node.begin("c2");
    let end = Instant::now() + LONG;
    while node.turn(Instant::now() + Duration::from_millis(50)).is_ok() {
        assert!(Instant::now() < end, "the agent lives");
    }
    let mut node = vm.connect();
    let hello = node.greet();
    assert_eq!((hello.pid, hello.containers.len()), (monitor, 2));
    assert!(vm.console().contains("lxcri: the agent has ended"), "{}", vm.console());
    place.delete(&mut node, "c2");

    let close = request::Op::CloseStdin(monitor::CloseStdin { container_id: "c1".into() });
    assert!(matches!(node.ask(close, &[]), reply::Body::Done(_)));
    assert_eq!(node.exited("c1").code, 42);
    place.delete(&mut node, "c1");
    node.done(Op::DropImage(v1::DropImage { serial: SERIAL.into() }));

    // Steps of the boot and the container's own words, in seconds as the guest's clock has them.
    let console = vm.console();
    let steps: Vec<&str> = console.lines().filter_map(|l| l.find("lxcri: ").map(|at| &l[at..])).collect();
    steps.iter().for_each(|step| println!("figure: {step}"));
    let begins = steps.first().and_then(|l| l.split('(').nth(1)?.split(' ').next()?.parse::<f64>().ok()).unwrap();
    let says = said.lines().nth(2).and_then(|l| l.split(' ').next()?.parse::<f64>().ok()).unwrap();
    println!("figure: from the guest's init to the first container {:.2} s (TCG)", says - begins);
    let ms = |d: Duration| d.as_millis();
    println!(
        "figure: start of QEMU to connection {} ms, to the first container's output {} ms (TCG)",
        ms(connected),
        ms(running)
    );
    println!("figure: an exec, to its end, {} ms (TCG)", ms(exec_time));
    println!(
        "figure: agent {agent_kib} KiB, its monitor {monitor_kib} KiB; guest: {available} of {total} KiB available"
    );
    assert!(agent_kib + monitor_kib < 4096, "agent {agent_kib} KiB, monitor {monitor_kib} KiB");

    // The node presses the button.
    vm.qmp(&[r#"{"execute":"system_powerdown"}"#]);
    let end = Instant::now() + BOOT;
    while vm.qemu.try_wait().unwrap().is_none() {
        assert!(Instant::now() < end, "is not switched off:\n{}", vm.console());
        std::thread::sleep(Duration::from_millis(50));
    }
}
