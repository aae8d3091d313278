//! What the tests with real parts share: each test runs alone in the tests' environment (`tests/env/enter`: a Debian
//! trixie root, own PID, mount, cgroup and network namespaces), where it starts the real daemon, a real registry and
//! the real crictl.
//!
//! A test calls [`isolated`] with its own name; outside the environment that makes what is needed (cached), starts the
//! same test again inside, and passes its result on. A failing test leaves its logs in `target/test-logs/<test>/`;
//! everything else ends with the environment, even when the test is killed.

// Each test file uses a part of this.
#![allow(dead_code)]
// Tests start programs, write files and print as they like: the helpers that the lints point to belong to the product.
#![allow(clippy::disallowed_methods, clippy::print_stdout)]

pub mod client;
pub mod crictl;
pub mod manager;
pub mod node;
pub mod pod;
pub mod pve;
pub mod snapshot;
pub mod streams;
pub mod ws;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Runs `body` alone in the tests' environment. `name` is the test's path as `--exact` wants it.
pub fn isolated(name: &str, body: impl FnOnce()) {
    isolated_with(name, monitor_program, body);
}

/// The same with a monitor of the test's choice.
pub fn isolated_with(name: &str, monitor: impl FnOnce() -> PathBuf, body: impl FnOnce()) {
    let root = std::env::var("LXCRI_TEST_ROOT").unwrap_or_else(|_| "trixie".into());
    isolated_in(&root, name, monitor, &[], body);
}

/// A node below /dev/shm for the first disk of this machine; its number. In a file system of its own, which goes with the test's
/// environment: /dev is the machine's.
pub fn plant_disk(name: &str) -> String {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/dev/shm"]));
    let disks = std::fs::read_dir("/sys/block").expect("/sys/block").flatten();
    let number = disks.filter_map(|d| std::fs::read_to_string(d.path().join("dev")).ok()).next().expect("a disk");
    let (major, minor) = number.trim().split_once(':').expect("a number");
    let device = makedev(major.parse().expect("a number"), minor.parse().expect("a number"));
    mknodat(CWD, Path::new("/dev/shm").join(name), FileType::BlockDevice, Mode::RUSR, device).expect("a device node");
    number.trim().to_owned()
}

/// A variable of the environment, and who makes the path that is in it.
pub type Given = (&'static str, fn() -> PathBuf);

/// The same in a Debian root of the test's choice, with more paths for [`given`].
pub fn isolated_in(release: &str, name: &str, monitor: impl FnOnce() -> PathBuf, more: &[Given], body: impl FnOnce()) {
    if std::env::var_os("LXCRI_TEST_ENV").is_some() {
        // After the words "test NAME ... ": a figure begins its line.
        println!();
        return body();
    }
    let root = repository();
    let tool = |name: &str, args: &[&str]| {
        let out = run(Command::new(root.join("tests/tools").join(name)).args(args));
        PathBuf::from(out.lines().last().unwrap_or_default())
    };
    let logs = target_folder().join("test-logs").join(name);
    let _ = std::fs::remove_dir_all(&logs);
    std::fs::create_dir_all(&logs).expect("the folder for logs");
    let test = std::env::current_exe().expect("the test's own program");
    let status = Command::new(root.join("tests/env/enter"))
        .arg("--root")
        .arg(release)
        .args(["--net", "--"])
        .arg(&test)
        .args(["--exact", name, "--include-ignored", "--nocapture", "--test-threads=1"])
        .env("LXCRI_BIN", daemon_program())
        .env("LXCRI_MONITOR", monitor())
        .env("LXCRI_LXC", lxc_helper())
        .env("LXCRI_LXC_INIT", lxc_init())
        .env("LXCRI_CRI_TOOLS", tool("cri-tools", &[]))
        .env("LXCRI_IMAGES", tool("images", &[]))
        .env("LXCRI_ZFS_FUSE", tool("zfs-fuse", &[]))
        .env("LXCRI_LOGS", &logs)
        .envs(more.iter().map(|(variable, path)| (variable, path())))
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .output()
        .expect("tests/env/enter starts");
    let said = format!("{}{}", String::from_utf8_lossy(&status.stdout), String::from_utf8_lossy(&status.stderr));
    let _ = std::fs::write(logs.join("test.log"), &said);
    assert!(status.status.success(), "{name} failed ({}); logs: {}\n{said}", status.status, logs.display());
    assert!(said.contains("1 passed"), "{name} did not run in the environment:\n{said}");
    // Figures that a test prints are for whoever reads its output.
    said.lines().filter(|l| l.starts_with("figure: ")).for_each(|l| println!("{l}"));
    let _ = std::fs::remove_dir_all(&logs);
}

/// This repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Cargo's target folder: the test's program is in `<target>/<profile>/deps`.
pub fn target_folder() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own program");
    test.ancestors().nth(3).expect("<target>/<profile>/deps/<test>").to_owned()
}

/// The daemon under test: `LXCRI_BIN`, else the one that cargo has built for this test.
pub fn daemon_program() -> PathBuf {
    std::env::var_os("LXCRI_BIN").map_or_else(|| env!("CARGO_BIN_EXE_proxmox-lxcri").into(), PathBuf::from)
}

/// A program of examples/, which `cargo test` without a target's name has built. Not built here: `cargo build` chooses other features
/// of what we depend on, with which the library and then every test would be made again.
pub fn example(name: &str) -> PathBuf {
    let profile = std::env::current_exe().expect("the test's own program").ancestors().nth(2).map(Path::to_owned);
    let program = profile.expect("<target>/<profile>/deps/<test>").join("examples").join(name);
    assert!(program.is_file(), "{} is not there: cargo test --workspace --no-run", program.display());
    program
}

/// The monitor: `LXCRI_MONITOR`, else built now.
pub fn monitor_program() -> PathBuf {
    static_program("LXCRI_MONITOR", "proxmox-lxcri-monitor", "proxmox-lxcri-monitor")
}

/// The relay of a pod's virtual machine: `LXCRI_RELAY`, else built now.
pub fn relay_program() -> PathBuf {
    static_program("LXCRI_RELAY", "proxmox-lxcri-guest-relay", "proxmox-lxcri-guest-relay")
}

/// The disk of the template of virtual machines: `GUEST_TEMPLATE`, else made now, of the agent that `GUEST_AGENT` names or that is
/// built now.
pub fn guest_template() -> PathBuf {
    if let Some(path) = std::env::var_os("GUEST_TEMPLATE") {
        return path.into();
    }
    let agent = static_program("GUEST_AGENT", "proxmox-lxcri-guest-agent", "proxmox-lxcri-guest-agent");
    run(Command::new(repository().join("tests/tools/guest-template")).arg(agent)).trim().into()
}

/// What becomes the first process of a liblxc container: `LXCRI_LXC_INIT`, else built now.
pub fn lxc_init() -> PathBuf {
    static_program("LXCRI_LXC_INIT", "proxmox-lxcri-lxc", "proxmox-lxcri-lxc-init")
}

/// The helper that loads liblxc: `LXCRI_LXC`, else built now.
pub fn lxc_helper() -> PathBuf {
    if let Some(path) = std::env::var_os("LXCRI_LXC") {
        return path.into();
    }
    build(&["-p", "proxmox-lxcri-lxc", "--bin", "proxmox-lxcri-lxc"]);
    target_folder().join("monitor/proxmox-lxcri-lxc")
}

fn static_program(variable: &str, package: &str, name: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let target = "x86_64-unknown-linux-musl";
    build(&["-p", package, "--bin", name, "--target", target]);
    target_folder().join(target).join("monitor").join(name)
}

fn build(what: &[&str]) {
    run(Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--profile", "monitor"])
        .args(what)
        .current_dir(repository()));
}

/// A monitor with fail points, built now, beside the others.
pub fn monitor_with_failpoints() -> PathBuf {
    let folder = target_folder().join("failpoints");
    run(Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "-p", "proxmox-lxcri-monitor", "--features", "failpoints", "--target-dir"])
        .arg(&folder)
        .current_dir(repository()));
    folder.join("debug/proxmox-lxcri-monitor")
}

/// A path that [`isolated`] passed into the environment.
pub fn given(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set: call this within `isolated`")).into()
}

/// Runs a program and gives its stdout; panics with all it said when it fails.
pub fn run(command: &mut Command) -> String {
    let out = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(out.status.success(), "{command:?}: {}", describe(&out));
    String::from_utf8(out.stdout).expect("UTF-8 output")
}

/// Status and both streams of a program that has ended.
pub fn describe(out: &Output) -> String {
    let text = |b: &[u8]| String::from_utf8_lossy(b).trim().to_owned();
    format!("{}\nstdout: {}\nstderr: {}", out.status, text(&out.stdout), text(&out.stderr))
}

/// Waits until `condition` gives something; panics after `limit` with `what` was waited for.
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} in vain for {what}");
        std::thread::sleep(Duration::from_millis(20)); // the poll of a condition with a deadline
    }
}

/// A file of a cgroup below the root: its name in version 1, where the first word is the controller, and in version 2.
pub fn cgroup_file(group: &str, v1: &str, v2: &str) -> std::path::PathBuf {
    let root = std::path::Path::new("/sys/fs/cgroup");
    if root.join("cgroup.procs").exists() {
        return root.join(group).join(v2);
    }
    let controller = v1.split('.').next().unwrap_or_default();
    root.join(controller).join(group).join(v1)
}
