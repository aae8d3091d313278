//! The first process of a guest: everything from the kernel's start to the agent's, and the agent again whenever it ends.
//!
//! Run by the kernel twice. In the initial RAM file system ([`ram`]): loads the disk's modules and goes over to the guest's disk, found by its
//! label. There ([`disk`]): mounts what Linux programs expect, reads what the node has put on the configuration's disk, sets the address,
//! and stays. A failure ends it with its reason on the console; the kernel then panics, which the node sees.

use std::ffi::CString;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};
use zeroize::Zeroizing;

use crate::config::Config;
use crate::roots;

/// Modules in the initial RAM file system, in the order of their loading.
const MODULES: &str = "/modules";
/// Label of the file system on the guest's disk.
const LABEL: &[u8] = b"lxcri-root";
/// Serial number of the disk with the configuration.
const CONFIG_SERIAL: &str = "lxcri-config";
/// Disks that have not come by then do not come.
const DISKS: Duration = Duration::from_secs(30);
/// The wait before an agent that has ended is started again.
const AGAIN: Duration = Duration::from_millis(500);
const SECRET: &str = "/run/lxcri-secret";
const BUSYBOX: &str = "/bin/busybox";
/// From linux/input-event-codes.h.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

type Result<T> = std::result::Result<T, String>;

/// Never comes back with success.
pub fn run() -> Result<()> {
    if Path::new(MODULES).is_dir() { ram() } else { disk() }
}

fn say(message: &str) {
    let up = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let _ = writeln!(std::io::stderr(), "lxcri: {message} ({} s)", up.split(' ').next().unwrap_or_default());
}

fn mount(source: &str, target: &str, fs_type: &str, options: &str) -> Result<()> {
    let _ = std::fs::create_dir_all(target);
    let options = CString::new(options).map_err(|e| e.to_string())?;
    match rustix::mount::mount(source, target, fs_type, MountFlags::empty(), Some(options.as_c_str())) {
        // The kernel's own (devtmpfs).
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(e) => Err(format!("mount {target}: {e}")),
    }
}

/// Asks until there is something, for [`DISKS`].
fn wait_for<T>(what: &str, find: impl Fn() -> Option<T>) -> Result<T> {
    let end = Instant::now() + DISKS;
    loop {
        if let Some(found) = find() {
            return Ok(found);
        }
        if Instant::now() >= end {
            return Err(format!("no {what} in {} s", DISKS.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

// ---------------------------------------------------------------------------------------- in the initial RAM file system

fn ram() -> Result<()> {
    mount("dev", "/dev", "devtmpfs", "mode=755")?;
    mount("proc", "/proc", "proc", "")?;
    mount("sys", "/sys", "sysfs", "")?;
    say("begins");
    let list = std::fs::read_to_string(format!("{MODULES}/list")).map_err(|e| format!("list of modules: {e}"))?;
    for name in list.lines() {
        let path = format!("{MODULES}/{name}");
        let loaded = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::system::finit_module(file, c"", 0));
        match loaded {
            Ok(()) | Err(Errno::EXIST) => {}
            // What is missing for it is told by what does not come.
            Err(e) => say(&format!("module {name}: {e}")),
        }
    }
    say("modules are loaded");
    let disk = wait_for("disk of the guest", || labelled(Path::new("/sys/class/block")))?;
    let failed = |what: &str, e: Errno| format!("{what}: {e}");
    std::fs::create_dir_all("/root").map_err(|e| e.to_string())?;
    rustix::mount::mount(&disk, "/root", "ext4", MountFlags::NOATIME, None).map_err(|e| failed("mount the disk", e))?;
    for name in ["dev", "proc", "sys"] {
        let (from, to) = (format!("/{name}"), format!("/root/{name}"));
        rustix::mount::mount_move(&from, &to).map_err(|e| failed(&to, e))?;
    }
    // Its memory is free then.
    #[allow(clippy::disallowed_methods)] // our own files
    let _ = std::fs::remove_dir_all(MODULES);
    let _ = std::fs::remove_file("/init");
    rustix::process::chdir("/root").map_err(|e| failed("/root", e))?;
    rustix::mount::mount_move(".", "/").map_err(|e| failed("/", e))?;
    rustix::process::chroot(".").and_then(|()| rustix::process::chdir("/")).map_err(|e| failed("chroot", e))?;
    #[allow(clippy::disallowed_methods)] // exec, not a child
    Err(format!("/sbin/init: {}", Command::new("/sbin/init").exec()))
}

/// The device with the label.
fn labelled(block_devices: &Path) -> Option<PathBuf> {
    let all = std::fs::read_dir(block_devices).ok()?;
    let names = all.filter_map(std::result::Result::ok).map(|e| Path::new("/dev").join(e.file_name()));
    names.into_iter().find(|path| label(path).is_some_and(|label| label == LABEL))
}

/// The label of an ext4 file system: 16 bytes at 0x78 of the super block, which is at 1024 and has 0xef53 at 0x38.
fn label(device: &Path) -> Option<Vec<u8>> {
    let mut block = [0; 2048];
    std::fs::File::open(device).ok()?.read_exact(&mut block).ok()?;
    let (magic, label) = (block.get(1024 + 0x38..1024 + 0x3a)?, block.get(1024 + 0x78..1024 + 0x88)?);
    let end = label.iter().position(|b| *b == 0).unwrap_or(label.len());
    (magic == [0x53, 0xef]).then(|| label[..end].to_vec())
}

// ---------------------------------------------------------------------------------------- on the disk

fn disk() -> Result<()> {
    say("on the guest's disk");
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::mount::mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .map_err(|e| format!("/: {e}"))?;
    mount("run", "/run", "tmpfs", "mode=755")?;
    mount("tmp", "/tmp", "tmpfs", "mode=1777")?;
    mount("pts", "/dev/pts", "devpts", "mode=620,ptmxmode=666,gid=5")?;
    mount("shm", "/dev/shm", "tmpfs", "mode=1777")?;
    mount("mqueue", "/dev/mqueue", "mqueue", "")?;
    mount("cgroup", "/sys/fs/cgroup", "cgroup2", "nsdelegate,memory_recursiveprot")?;
    // One by one: what the kernel has not is no reason to have none.
    for controller in ["cpu", "cpuset", "memory", "pids", "io", "hugetlb"] {
        let file = std::fs::File::options().write(true).open("/sys/fs/cgroup/cgroup.subtree_control");
        let _ = file.and_then(|mut f| f.write_all(format!("+{controller}").as_bytes()));
    }
    let config = read_config()?;
    write_secret(&config.secret).map_err(|e| format!("{SECRET}: {e}"))?;
    network(&config)?;
    say("starts the agent");
    let mut agent = start_agent(&config).map_err(|e| format!("start the agent: {e}"))?;
    // What is not there is not missed before somebody presses it.
    if let Err(e) = busybox(&["modprobe", "-a", "button", "evdev"]) {
        say(&e);
    }
    watch_power_button();
    loop {
        // Everybody's orphans are ours.
        loop {
            match rustix::process::wait(rustix::process::WaitOptions::empty()) {
                Ok(Some((pid, _))) if pid.as_raw_nonzero().get() == agent => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(format!("wait: {e}")),
            }
        }
        say("the agent has ended");
        std::thread::sleep(AGAIN);
        agent = start_agent(&config).map_err(|e| format!("start the agent: {e}"))?;
    }
}

fn read_config() -> Result<Config> {
    let find = || roots::find(Path::new("/sys/class/block"), CONFIG_SERIAL).ok();
    let disk = wait_for("disk with the configuration", find)?;
    let mut text = Zeroizing::new(Vec::new());
    let file = std::fs::File::open(&disk).map_err(|e| format!("{}: {e}", disk.display()))?;
    file.take(crate::config::MAX).read_to_end(&mut text).map_err(|e| format!("{}: {e}", disk.display()))?;
    Config::parse(&text).map_err(|e| format!("configuration: {e}"))
}

fn write_secret(secret: &[u8; 32]) -> std::io::Result<()> {
    std::fs::File::options().write(true).create_new(true).mode(0o600).open(SECRET)?.write_all(secret)
}

/// Addresses on the one interface that is a device's.
fn network(config: &Config) -> Result<()> {
    busybox(&["ip", "link", "set", "lo", "up"])?;
    if config.addresses.is_empty() {
        return Ok(());
    }
    busybox(&["modprobe", "virtio_net"])?;
    let is_device = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        entry.path().join("device").try_exists().ok()?.then(|| entry.file_name().into_string().ok())?
    };
    let find = || std::fs::read_dir("/sys/class/net").ok()?.filter_map(is_device).min();
    let name = wait_for("network interface", find)?;
    for address in &config.addresses {
        busybox(&["ip", "address", "add", address, "dev", &name])?;
    }
    busybox(&["ip", "link", "set", &name, "up"])?;
    for gateway in &config.gateways {
        let family = if gateway.contains(':') { "-6" } else { "-4" };
        busybox(&["ip", family, "route", "add", "default", "via", gateway, "dev", &name])?;
    }
    Ok(())
}

#[allow(clippy::disallowed_methods)] // before anything else runs
fn busybox(arguments: &[&str]) -> Result<()> {
    let out = Command::new(BUSYBOX).args(arguments).env_clear().stdin(Stdio::null()).output();
    let out = out.map_err(|e| format!("{BUSYBOX}: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("{}: {}", arguments.join(" "), String::from_utf8_lossy(&out.stderr).trim()))
}

#[allow(clippy::disallowed_methods)] // its own program, under its own name
fn start_agent(config: &Config) -> std::io::Result<i32> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("proxmox-lxcri-guest-agent").args(["--listen", &config.listen.to_string(), "--secret", SECRET]);
    command.args(["--run-dir", "/run/lxcri", "--data-dir", "/var/lib/lxcri"]);
    let child = command.env_clear().current_dir("/").stdin(Stdio::null()).spawn()?;
    // Waited for with all others.
    Ok(child.id() as i32)
}

/// A node that shuts the guest down presses it.
fn watch_power_button() {
    let Ok(all) = std::fs::read_dir("/dev/input") else { return };
    for entry in all.filter_map(std::result::Result::ok) {
        if !entry.file_name().to_string_lossy().starts_with("event") {
            continue;
        }
        let watch = move || {
            let Ok(mut events) = std::fs::File::open(entry.path()) else { return };
            // struct input_event: two longs of time, type, code, value.
            let mut event = [0; 24];
            while events.read_exact(&mut event).is_ok() {
                let half = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
                if (half(16), half(18), event[20]) == (EV_KEY, KEY_POWER, 1) {
                    power_off();
                }
            }
        };
        let _ = std::thread::Builder::new().stack_size(64 * 1024).spawn(watch);
    }
}

fn power_off() {
    say("is switched off");
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_file_systems() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("disk");
        let mut disk = vec![0; 4096];
        let put = |disk: &[u8]| std::fs::File::create(&path).and_then(|mut f| f.write_all(disk)).expect("written");
        put(&disk);
        assert_eq!(label(&path), None);
        disk[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
        disk[1024 + 0x78..1024 + 0x78 + LABEL.len()].copy_from_slice(LABEL);
        put(&disk);
        assert_eq!(label(&path).as_deref(), Some(LABEL));
        put(&disk[..1500]);
        assert_eq!(label(&path), None);
    }
}
