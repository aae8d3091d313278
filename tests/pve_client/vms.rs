//! Virtual machines: their calls against records, and one that QEMU really runs.

use std::process::Stdio;
use std::time::Duration;

use proxmox_lxcri::integrations::proxmox_api::{
    ApiError, CloneSpec, Ended, ErrorKind, GuestChange, GuestId, GuestKind, NewGuest, Proxmox, VmNet, VmSpec, Volume,
};

use super::support;
use super::support::pve::{self, Options, Pve, TOKEN, What};
use super::{NODE, ct, end, node, vmid};

fn vm(id: u64) -> GuestId<'static> {
    GuestId::vm(NODE, vmid(id))
}

/// A disk that can have snapshots.
fn disk(mib: u64) -> Volume {
    Volume { other: "format=qcow2".parse().expect("an option"), ..Volume::allocate("local", mib) }
}

fn spec() -> VmSpec {
    VmSpec {
        name: Some("v1".into()),
        disks: vec![disk(1024)],
        agent: true,
        guest: NewGuest {
            memory: Some(64),
            nets: vec![VmNet { model: "virtio".into(), bridge: Some("vmbr0".into()), ..VmNet::default() }],
            tags: "k8s;ns-default".parse().expect("tags"),
            description: Some("a=1;b=2&c\nof the test".into()),
            pool: Some("k8s".into()),
            ..NewGuest::default()
        },
        ..VmSpec::default()
    }
}

async fn create(api: &Proxmox, id: u64, spec: &VmSpec) -> Result<Ended, ApiError> {
    api.vm_create(NODE, vmid(id), spec).await?.wait().await
}

fn set(key: &str, value: &str) -> GuestChange {
    GuestChange { set: [(key.to_owned(), value.to_owned())].into(), ..GuestChange::default() }
}

fn kind<T: std::fmt::Debug>(result: Result<T, ApiError>) -> ErrorKind {
    result.expect_err("refused").kind().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vms_life() {
    let (pve, api) = node().await;
    let task = api.vm_create(NODE, vmid(100), &spec()).await.expect("created");
    assert_eq!((task.upid().kind(), task.upid().id()), ("qmcreate", "100"));
    task.wait().await.expect("made");
    let config = api.vm_config(NODE, vmid(100)).await.expect("config");
    assert_eq!((config.description(), config.get("memory")), ("a=1;b=2&c\nof the test", Some("64")));
    assert_eq!(
        (config.get("onboot"), config.get("serial0"), config.get("boot")),
        (Some("0"), Some("socket"), Some("order=scsi0"))
    );
    assert_eq!(config.volumes["scsi0"].volume, "local:100/vm-100-disk-0.qcow2");
    assert!(config.nets[&0].macaddr.is_some(), "the API chooses one: {:?}", config.nets);

    // Containers and VMs have their numbers together, and are not mistaken for one another.
    assert_eq!(kind(create(&api, 100, &spec()).await), ErrorKind::AlreadyExists);
    assert!(api.guest_exists(vm(100)).await.expect("asked") && !api.guest_exists(ct(vmid(100))).await.expect("asked"));
    assert!(api.guest_start(ct(vmid(100))).await.expect_err("a VM").is_not_found());
    assert_eq!(api.guest_list(GuestKind::Ct, NODE).await.expect("list").len(), 0);
    assert_eq!(api.guest_list(GuestKind::Vm, NODE).await.expect("list")[0].name, "v1");
    assert_eq!(api.guests().await.expect("guests")[0].kind, "qemu");

    api.guest_start(vm(100)).await.expect("started");
    api.guest_start(vm(100)).await.expect("it runs already, which is fine");
    assert!(api.guest_status(vm(100)).await.expect("status").is_running());
    assert_eq!(api.guest_update(vm(100), &set("description", "new")).await.expect("at once").len(), 0);
    let pending = api.guest_update(vm(100), &set("memory", "128")).await.expect("accepted");
    assert_eq!(pending.iter().map(|p| p.key.as_str()).collect::<Vec<_>>(), ["memory"]);
    let stale = GuestChange { digest: Some(config.digest), ..set("name", "v2") };
    assert_eq!(kind(api.guest_update(vm(100), &stale).await), ErrorKind::Changed);
    assert_eq!(kind(api.guest_delete(vm(100), false).await), ErrorKind::StillRunning);

    // One that stands still counts as running, and can't be asked for anything.
    pve.pause_vm(100, true);
    let status = api.guest_status(vm(100)).await.expect("status");
    assert!(status.is_running() && status.is_paused());
    assert_eq!(kind(api.guest_shutdown(vm(100), 5, false).await), ErrorKind::Paused);
    assert_eq!(kind(api.agent_interfaces(vm(100)).await), ErrorKind::NoAgent);
    api.guest_shutdown(vm(100), 5, true).await.expect("killed");
    api.guest_stop(vm(100)).await.expect("it is stopped already, which is fine");
    api.guest_start(vm(100)).await.expect("started");
    assert_eq!(api.vm_config(NODE, vmid(100)).await.expect("config").get("memory"), Some("128"));
    api.guest_stop(vm(100)).await.expect("stopped");

    api.guest_resize(vm(100), "scsi0", "+1G").await.expect("resize").wait().await.expect("resized");
    let less = api.guest_resize(vm(100), "scsi0", "1G").await.expect("accepted").wait().await;
    assert_eq!(kind(less), ErrorKind::TaskFailed);
    let config = api.vm_config(NODE, vmid(100)).await.expect("config");
    assert_eq!(config.volumes["scsi0"].size.as_deref(), Some("2G"));

    for (name, notes) in [("s1", "first"), ("s2", "")] {
        api.guest_snapshot(vm(100), name, notes).await.expect("snapshot").wait().await.expect("taken");
    }
    assert_eq!(kind(api.guest_make_template(vm(100)).await), ErrorKind::Failed, "it has snapshots");
    api.guest_rollback(vm(100), "s1", false).await.expect("rollback").wait().await.expect("back");
    for name in ["s1", "s2"] {
        api.guest_delete_snapshot(vm(100), name).await.expect("delete").wait().await.expect("deleted");
    }
    assert!(api.guest_snapshots(vm(100)).await.expect("list").is_empty());

    // A copy, a template, and a clone that goes on from its disks.
    let named = |name: &str| CloneSpec { name: Some(name.into()), pool: Some("k8s".into()), ..CloneSpec::default() };
    api.guest_clone(vm(100), vmid(101), &named("v2")).await.expect("clone").wait().await.expect("copied");
    let copy = api.vm_config(NODE, vmid(101)).await.expect("config");
    assert_eq!(
        (copy.get("name"), copy.volumes["scsi0"].volume.as_str()),
        (Some("v2"), "local:101/vm-101-disk-0.qcow2")
    );
    assert_ne!(copy.nets[&0].macaddr, config.nets[&0].macaddr);
    api.guest_make_template(vm(101)).await.expect("a template");
    assert!(api.guest_status(vm(101)).await.expect("status").template);
    assert_eq!(kind(api.guest_start(vm(101)).await), ErrorKind::TaskFailed, "a template never runs");
    api.guest_clone(vm(101), vmid(102), &named("v3")).await.expect("clone").wait().await.expect("cloned");
    let linked = api.vm_config(NODE, vmid(102)).await.expect("config");
    assert_eq!(linked.volumes["scsi0"].volume, "local:101/base-101-disk-0.qcow2/102/vm-102-disk-0.qcow2");
    let elsewhere = CloneSpec { storage: Some("local".into()), ..named("v4") };
    assert_eq!(kind(api.guest_clone(vm(101), vmid(103), &elsewhere).await), ErrorKind::Failed);
    let taken = api.guest_clone(vm(101), vmid(102), &named("v3")).await;
    assert_eq!(kind(taken), ErrorKind::AlreadyExists);

    api.guest_start(vm(102)).await.expect("started");
    for id in [102, 101, 100] {
        api.guest_delete(vm(id), true).await.expect("also one that runs");
        api.guest_delete(vm(id), true).await.expect("it is gone already, which is fine");
        assert!(!api.guest_exists(vm(id)).await.expect("asked"));
    }
    assert!(pve.volumes().is_empty(), "{:?}", pve.volumes());
    end(pve);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_token_may_and_no_storage_can() {
    let (pve, api) = node().await;
    let raw = VmSpec { disks: vec![Volume::allocate("local", 64)], agent: false, ..spec() };
    create(&api, 100, &raw).await.expect("made");
    for (key, value) in [("args", "-s"), ("lock", "backup"), ("serial1", "/dev/ttyS0")] {
        assert_eq!(kind(api.guest_update(vm(100), &set(key, value)).await), ErrorKind::RootOnly, "{key}");
    }
    let path = Volume { volume: "/dev/sda".into(), ..Volume::default() };
    assert_eq!(kind(create(&api, 101, &VmSpec { disks: vec![path], ..spec() }).await), ErrorKind::RootOnly);
    let mut other = spec();
    other.guest.nets[0].bridge = Some("vmbr9".into());
    let e = create(&api, 101, &other).await.expect_err("another bridge");
    assert!(matches!(e.kind(), ErrorKind::Permission { path, .. } if path.ends_with("vmbr9")), "{e}");
    let mut outside = spec();
    outside.guest.pool = None;
    let e = create(&api, 101, &outside).await.expect_err("outside the pool");
    assert!(matches!(e.kind(), ErrorKind::Permission { path, .. } if path == "/vms/101"), "{e}");
    for privilege in ["VM.Config.HWType", "VM.Config.Disk", "VM.Config.CPU"] {
        pve.take_away(privilege);
        let mut more = spec();
        more.guest.cores = Some(1);
        let e = create(&api, 101, &more).await.expect_err("not allowed");
        assert!(matches!(e.kind(), ErrorKind::Permission { privileges, .. } if privileges[0] == privilege), "{e}");
    }
    pve.take_away("");

    let none = |volume: &str| {
        let import = format!("import-from={volume}").parse().expect("an option");
        VmSpec { disks: vec![Volume { other: import, ..Volume::allocate("local", 0) }], ..spec() }
    };
    let e = create(&api, 101, &none("local:import/none.raw")).await.expect_err("accepted, then failed");
    assert!(e.is_not_found() && api.vmid_is_free(vmid(101)).await.expect("asked"), "{e}");
    pve.fill("local", true);
    assert_eq!(kind(create(&api, 101, &spec()).await), ErrorKind::NoSpace);
    pve.fill("local", false);
    let snapshot = api.guest_snapshot(vm(100), "s1", "").await.expect("accepted").wait().await;
    assert!(snapshot.expect_err("of a file of raw data").message().contains("not available"));
    let linked = api.guest_clone(vm(100), vmid(101), &CloneSpec::default()).await;
    assert!(matches!(kind(linked), ErrorKind::Permission { .. }), "in no pool");
    assert_eq!(kind(api.agent_interfaces(vm(100)).await), ErrorKind::NoAgent, "none is configured");

    pve.lock_guest(100, Some("backup"));
    for result in [api.guest_delete(vm(100), true).await, api.guest_start(vm(100)).await] {
        assert_eq!(kind(result), ErrorKind::Locked("backup".into()));
    }
    pve.lock_guest(100, None);
    api.guest_update(vm(100), &set("protection", "1")).await.expect("protected");
    assert_eq!(kind(api.guest_delete(vm(100), true).await), ErrorKind::Locked("protection".into()));
    pve.fault("POST", "/qemu$", 1, What::HalfDone);
    let e = create(&api, 102, &spec()).await.expect_err("died");
    assert!(*e.kind() == ErrorKind::TaskFailed && e.has_died(), "{e}");
    end(pve);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_of_the_guest_agent() {
    let (pve, api) = node().await;
    create(&api, 100, &spec()).await.expect("made");
    let sh = |script: &str| ["/bin/sh", "-c", script].map(String::from).to_vec();
    let limit = Duration::from_secs(20);
    let run = async |script: &str, input: &[u8]| api.agent_exec(vm(100), &sh(script), input, limit).await;
    assert_eq!(kind(run("true", b"").await), ErrorKind::NotRunning);
    api.guest_start(vm(100)).await.expect("started");
    assert_eq!(api.agent_interfaces(vm(100)).await.expect("interfaces")[0].inet.as_deref(), Some("127.0.0.1/8"));

    let out = run("echo out; echo err >&2; exit 3", b"").await.expect("run");
    assert_eq!((out.code, out.stdout.as_slice(), out.stderr.as_slice()), (3, &b"out\n"[..], &b"err\n"[..]));
    assert_eq!(run("kill -9 $$", b"").await.expect("run").code, 137);
    let every: Vec<u8> = (0..=255).cycle().take(60_000).collect();
    assert_eq!(run("cat", &every).await.expect("run").stdout, every, "every byte goes and comes back");
    let words = ["/bin/sh", "-c", "printf '%s|' \"$@\"", "sh", "a b", "c;d&e=f", "", "\u{e9}"].map(String::from);
    let out = api.agent_exec(vm(100), &words, b"", limit).await.expect("run");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "a b|c;d&e=f||\u{e9}|");

    let long = api.agent_exec(vm(100), &sh("sleep 2"), b"", Duration::from_millis(100)).await;
    assert_eq!(kind(long), ErrorKind::Timeout);
    let before = pve.count("POST", "/agent/exec");
    assert_eq!(kind(run("cat", &[0; 65537]).await), ErrorKind::Invalid);
    assert_eq!(pve.count("POST", "/agent/exec"), before, "it was not sent");
    let e = api.agent_exec(vm(100), &["/no/such".into()], b"", limit).await.expect_err("no answer");
    assert!(*e.kind() == ErrorKind::NoAnswer && e.status() == Some(596), "{e:?}");
    assert_eq!(pve.count("POST", "/agent/exec"), before + 1, "not repeated");
    // A look at it may fail while it goes on; what an agent has told once is gone.
    pve.fault("GET", "/exec-status", 1, What::Status(596, "Connection timed out".into()));
    assert_eq!(run("echo here", b"").await.expect("run").stdout, b"here\n");
    pve.fault("GET", "/exec-status", 1, What::CutAfter);
    assert_eq!(run("sleep 0.1", b"").await.expect("run").code, 0);
    pve.take_away("VM.GuestAgent.Unrestricted");
    let e = run("true", b"").await.expect_err("not allowed");
    assert!(matches!(e.kind(), ErrorKind::Permission { path, .. } if path == "/vms/100"), "{e}");
    end(pve);
}

/// A disk with a guest of 50 bytes: it turns on the power button, says so on its first serial port, waits for the button to be
/// pressed, and turns itself off.
fn boot_sector() -> Vec<u8> {
    const CODE: &[u8] = &[
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xba, 0x02, 0x06, // mov dx, 0x602       ACPI's events that are on
        0xb8, 0x00, 0x01, // mov ax, 0x100       the power button
        0xef, // out dx, ax
        0xbe, 0x2c, 0x7c, // mov si, text
        0xac, // next: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x06, // jz wait
        0xba, 0xf8, 0x03, // mov dx, 0x3f8       the first serial port
        0xee, // out dx, al
        0xeb, 0xf5, // jmp next
        0xfb, // wait: sti
        0xf4, // hlt                 until the timer ticks
        0xba, 0x00, 0x06, // mov dx, 0x600       ACPI's events that have come
        0xed, // in ax, dx
        0xf6, 0xc4, 0x01, // test ah, 1
        0x74, 0xf5, // jz wait
        0xba, 0x04, 0x06, // mov dx, 0x604       ACPI's control
        0xb8, 0x00, 0x20, // mov ax, 0x2000      off
        0xef, // out dx, ax
        0xf4, // hlt
    ];
    let mut disk = CODE.to_vec();
    disk.extend(b"the guest runs\r\n\0");
    disk.resize(510, 0);
    disk.extend([0x55, 0xaa]);
    disk.resize(1 << 20, 0);
    disk
}

/// A file with what the command line has to know of the server.
fn configuration(pve: &Pve) -> camino::Utf8PathBuf {
    let hosts = pve.file("config.toml");
    let text = format!(
        "[proxmox]\nendpoints = [\"{}\"]\nnode = \"pve1\"\ntoken_id = \"{TOKEN}\"\ntoken_file = \"{}\"\nca_file = \"{}\"\n",
        pve.url(),
        pve.file("token"),
        pve.file("ca.pem"),
    );
    std::fs::write(&hosts, text).expect("the configuration");
    hosts
}

#[test]
fn vms_really_run_by_the_command_line() {
    let pve = Pve::start(Options { runner: pve::Runner::Qemu, ..Options::default() });
    std::fs::write(pve.file("local/import/boot.raw"), boot_sector()).expect("a disk");
    let hosts = configuration(&pve);
    let output = |args: &[&str]| {
        let mut command = std::process::Command::new(support::daemon_program());
        command.args(["--config", hosts.as_str(), "proxmox", "vm"]).args(args).stdin(Stdio::null());
        command.output().expect("the program starts")
    };
    let ok = |args: &[&str]| {
        let out = output(args);
        assert!(out.status.success(), "{args:?}: {}", support::describe(&out));
        String::from_utf8(out.stdout).expect("text").trim().to_owned()
    };
    let refused = |args: &[&str]| {
        let out = output(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {}", support::describe(&out));
        support::describe(&out)
    };
    let booted = |id: u32| {
        let greeted = || pve.console(id).contains("the guest runs").then_some(());
        support::wait_for("the guest's words", Duration::from_secs(60), greeted);
    };

    let disk = "local:0,import-from=local:import/boot.raw,format=qcow2";
    let create = ["create", "--name", "v1", "--memory", "32", "--disk", disk, "--agent", "--pool", "k8s", "--start"];
    assert_eq!(ok(&create), "100");
    booted(100);
    assert!(ok(&["list"]).lines().any(|l| l.starts_with("100") && l.contains("running") && l.contains("v1")));
    let info = ok(&["info", "100"]);
    assert!(info.contains("status: running") && info.contains("size=1M"), "{info}");
    assert!(refused(&["exec", "100", "true"]).contains("guest agent is not running"));
    pve.pause_vm(100, true);
    assert!(ok(&["info", "100"]).contains("status: paused"));
    assert!(refused(&["shutdown", "100"]).contains("is paused"));
    pve.pause_vm(100, false);
    ok(&["resize", "100", "scsi0", "+1M"]);
    ok(&["snapshot", "100", "s1"]);
    assert_eq!(ok(&["update", "100", "cores=2"]), "cores takes effect at the next start");
    // The guest itself ends it.
    ok(&["shutdown", "100", "--timeout", "30"]);
    assert!(ok(&["info", "100"]).contains("status: stopped"));
    ok(&["rollback", "100", "s1", "--start"]);
    booted(100);
    pve.monitor(100, "quit");
    support::wait_for("its end", Duration::from_secs(10), || {
        ok(&["info", "100"]).contains("status: stopped").then_some(())
    });
    assert!(refused(&["template", "100"]).contains("snapshots"));
    ok(&["delsnapshot", "100", "s1"]);
    ok(&["template", "100"]);
    assert_eq!(ok(&["clone", "100", "--name", "v2", "--pool", "k8s"]), "101");
    assert!(ok(&["config", "101"]).contains("/101/vm-101-disk-0.qcow2"), "a linked clone");
    ok(&["start", "101"]);
    booted(101);
    assert!(refused(&["delete", "101"]).contains("is running"));
    ok(&["delete", "101", "--force"]);
    ok(&["delete", "100"]);
    assert_eq!(output(&["exists", "100"]).status.code(), Some(1));
    assert!(pve.volumes().is_empty(), "{:?}", pve.volumes());
    let found = pve.violations().unwrap_or_default();
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn commands_by_the_command_line() {
    let pve = Pve::start(Options::default());
    let api = Proxmox::new(&pve.settings()).expect("a client");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        create(&api, 100, &spec()).await.expect("made");
        api.guest_start(vm(100)).await.expect("started");
    });
    let hosts = configuration(&pve);
    let input = pve.file("input");
    std::fs::write(&input, "what it reads\n").expect("the input");
    let exec = |args: &[&str]| {
        let mut command = std::process::Command::new(support::daemon_program());
        command.args(["--config", hosts.as_str(), "proxmox", "vm", "exec"]).args(args);
        command.stdin(std::fs::File::open(&input).expect("the input")).output().expect("the program starts")
    };
    let out = exec(&["--stdin", "100", "--", "sh", "-c", "cat; echo err >&2; exit 7"]);
    assert_eq!(
        (out.status.code(), out.stdout.as_slice()),
        (Some(7), &b"what it reads\n"[..]),
        "{}",
        support::describe(&out)
    );
    assert_eq!(String::from_utf8_lossy(&out.stderr), "err\n");
    assert_eq!(exec(&["100", "cat"]).stdout, b"", "our input is its only if it is to be");
    assert_eq!(exec(&["100", "no-such-program"]).status.code(), Some(127));
    // The API's own answer, which says little.
    let out = exec(&["--direct", "100", "/no/such"]);
    assert!(
        out.status.code() == Some(1) && support::describe(&out).contains("Broken pipe"),
        "{}",
        support::describe(&out)
    );
}
