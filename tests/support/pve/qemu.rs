//! Processes of the server's VMs: QEMU without KVM, with the sockets and files of a VM in a folder of its own: `qmp`, `qga`, and
//! `serial0`, into which the first serial port writes.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Pve;
use super::disks;
use super::guests::{Kind, Runner, missing};
use super::state::Server;

/// Longest wait for an answer of QEMU's monitor.
const PATIENCE: Duration = Duration::from_secs(10);

/// One command to QEMU's monitor; what it returns.
fn ask(socket: &Path, command: &str, arguments: Value) -> Result<Value, String> {
    let stream = UnixStream::connect(socket).map_err(|e| format!("VM qmp: {e}"))?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
    let mut lines = BufReader::new(stream.try_clone().map_err(|e| e.to_string())?);
    let mut writer = stream;
    let mut answer = move |sent: Option<Value>| {
        if let Some(value) = sent {
            writeln!(writer, "{value}").map_err(|e| e.to_string())?;
        }
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line).map_err(|e| format!("VM qmp: {e}"))? == 0 {
                return Err("VM qmp: the monitor is gone".to_owned());
            }
            let value: Value = serde_json::from_str(&line).map_err(|e| format!("VM qmp: {e}"))?;
            if let Some(desc) = value["error"]["desc"].as_str() {
                return Err(desc.to_owned());
            }
            // What is no answer is an event.
            if value.get("QMP").is_some() || value.get("return").is_some() {
                return Ok(value["return"].clone());
            }
        }
    };
    answer(None)?;
    answer(Some(json!({ "execute": "qmp_capabilities" })))?;
    answer(Some(json!({ "execute": command, "arguments": arguments })))
}

fn ip(args: &str) -> Result<(), String> {
    let out = Command::new("ip").args(args.split(' ')).output().map_err(|e| format!("ip: {e}"))?;
    if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).trim().to_owned()) }
}

/// A VM's end of its network on a bridge; None: it is on none.
fn make_tap(vmid: u32, n: u32, net: &super::nets::Net) -> Result<Option<String>, String> {
    let Some(link) = super::nets::link(net) else { return Ok(None) };
    if !Path::new("/sys/class/net").join(&link).exists() {
        return Err(format!("bridge '{link}' does not exist"));
    }
    let tap = format!("tap{vmid}i{n}");
    ip(&format!("tuntap add dev {tap} mode tap"))?;
    ip(&format!("link set {tap} master {link} up"))?;
    Ok(Some(tap))
}

fn remove_taps(vmid: u32) {
    for n in 0..8 {
        if Path::new(&format!("/sys/class/net/tap{vmid}i{n}")).exists() {
            let _ = ip(&format!("link delete tap{vmid}i{n}"));
        }
    }
}

impl Server {
    /// Folder with a VM's sockets and its console's file.
    pub fn vm_folder(&self, vmid: u32) -> PathBuf {
        self.folder.join(format!("qemu-server/{vmid}"))
    }

    /// One command to a VM's monitor.
    pub fn qmp(&self, vmid: u32, command: &str, arguments: Value) -> Result<Value, String> {
        ask(&self.vm_folder(vmid).join("qmp"), command, arguments)
    }

    /// "running", "paused" and so on.
    pub fn qmp_status(&self, vmid: u32) -> Value {
        let recorded = self.lock().guests.get(&vmid).map(super::vms::recorded_status).unwrap_or_default();
        if recorded == "stopped" || !matches!(self.runner, Runner::Qemu) {
            return recorded;
        }
        self.qmp(vmid, "query-status", json!({})).map_or(recorded, |answer| answer["status"].clone())
    }

    fn arguments(&self, vmid: u32, folder: &Path) -> Result<Vec<String>, String> {
        let config = self.lock().guests.get(&vmid).map(|g| g.config.clone()).ok_or_else(|| missing(Kind::Vm, vmid))?;
        let get = |key: &str, or: &str| config.get(key).cloned().unwrap_or_else(|| or.to_owned());
        let file = |name: &str| folder.join(name).display().to_string();
        let mut all = vec![
            "-name".into(),
            format!("{},debug-threads=on", get("name", &format!("VM{vmid}"))),
            "-machine".into(),
            get("machine", "pc"),
            // A node's KVM is not everywhere.
            "-accel".into(),
            "tcg".into(),
            "-cpu".into(),
            "max".into(),
            "-m".into(),
            get("memory", "512"),
            "-smp".into(),
            get("cores", "1"),
            "-display".into(),
            "none".into(),
            "-vga".into(),
            "none".into(),
            "-nodefaults".into(),
            "-no-user-config".into(),
            "-qmp".into(),
            format!("unix:{},server=on,wait=off", file("qmp")),
            "-device".into(),
            "virtio-scsi-pci,id=scsihw0".into(),
        ];
        if config.contains_key("serial0") {
            all.extend(["-serial".into(), format!("file:{}", file("serial0"))]);
        }
        if super::agent::is_configured(&config) {
            all.extend(["-chardev".into(), format!("socket,path={},server=on,wait=off,id=qga0", file("qga"))]);
            all.extend(["-device".into(), "virtio-serial,id=qga0bus".into()]);
            all.extend(["-device".into(), "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0".into()]);
        }
        let boot = get("boot", "order=");
        let order: Vec<&str> = boot.trim_start_matches("order=").split(';').collect();
        for (key, disk) in disks::of(&config) {
            let image =
                self.disk_file(&disk.volume).ok_or_else(|| format!("volume '{}' does not exist", disk.volume))?;
            let ro = if disk.is_read_only() { ",readonly=on" } else { "" };
            let drive = format!("file={},if=none,id=drive-{key},format={}{ro}", image.display(), disk.kind());
            let index = order.iter().position(|k| *k == key).map(|n| format!(",bootindex={}", 100 + n));
            let device = match key.split_at(key.trim_end_matches(|c: char| c.is_ascii_digit()).len()) {
                ("scsi", n) => format!("scsi-hd,bus=scsihw0.0,scsi-id={n},drive=drive-{key},id={key}"),
                ("virtio", _) => format!("virtio-blk-pci,drive=drive-{key},id={key}"),
                _ => return Err(format!("{key}: not what this server can")),
            };
            let serial = disk.serial().map(|s| format!(",serial={s}")).unwrap_or_default();
            let device = format!("{device}{}{serial}", index.unwrap_or_default());
            all.extend(["-drive".into(), drive, "-device".into(), device]);
        }
        for (n, net) in super::nets::nets(&config) {
            let Some(tap) = make_tap(vmid, n, &net)? else { continue };
            let mac = ["virtio", "macaddr"].into_iter().find_map(|k| net.get(k)).cloned().unwrap_or_default();
            all.extend(["-netdev".into(), format!("tap,id=net{n},ifname={tap},script=no,downscript=no")]);
            all.extend(["-device".into(), format!("virtio-net-pci,netdev=net{n},mac={mac}")]);
        }
        Ok(all)
    }

    /// Gives a running VM a disk.
    pub fn plug(&self, vmid: u32, key: &str) -> Result<(), String> {
        let disk = self.disk(vmid, key)?;
        let file = self.disk_file(&disk.volume).filter(|f| f.exists());
        let file = file.ok_or_else(|| format!("volume '{}' does not exist", disk.volume))?;
        let node = format!("drive-{key}");
        let drive = json!({
            "node-name": node, "driver": disk.kind(), "read-only": disk.is_read_only(),
            "file": { "driver": "file", "filename": file },
        });
        self.qmp(vmid, "blockdev-add", drive)?;
        let id: u32 = key.trim_start_matches("scsi").parse().map_err(|_| format!("{key}: no SCSI disk"))?;
        let mut device = json!({ "driver": "scsi-hd", "bus": "scsihw0.0", "scsi-id": id, "drive": node, "id": key });
        if let Some(serial) = disk.serial() {
            device["serial"] = json!(serial);
        }
        self.qmp(vmid, "device_add", device).map(drop)
    }

    /// Runs a VM; its end is noted whoever has brought it about.
    pub async fn run_vm(self: &Arc<Self>, vmid: u32) -> Result<(), String> {
        if !matches!(self.runner, Runner::Qemu) {
            if let Some(guest) = self.lock().guests.get_mut(&vmid) {
                (guest.running, guest.paused) = (Some(Instant::now()), false);
            }
            return Ok(());
        }
        let folder = self.vm_folder(vmid);
        std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
        for socket in ["qmp", "qga"] {
            let _ = std::fs::remove_file(folder.join(socket));
        }
        let log = std::fs::File::create(folder.join("log")).map_err(|e| e.to_string())?;
        let arguments = self.arguments(vmid, &folder)?;
        let (tell, told) = std::sync::mpsc::channel();
        let server = self.clone();
        // The thread that starts it waits for it: with the thread it would end, too.
        std::thread::spawn(move || {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]).args(arguments);
            let mut child = match command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn() {
                Ok(child) => child,
                Err(e) => return drop(tell.send(Err(format!("setpriv: {e}")))),
            };
            let pid = child.id();
            if let Some(guest) = server.lock().guests.get_mut(&vmid) {
                (guest.running, guest.pid) = (Some(Instant::now()), pid);
            }
            let _ = tell.send(Ok(()));
            let _ = child.wait();
            remove_taps(vmid);
            if let Some(guest) = server.lock().guests.get_mut(&vmid).filter(|g| g.pid == pid) {
                (guest.running, guest.pid, guest.paused) = (None, 0, false);
            }
        });
        told.recv().map_err(|e| e.to_string())??;
        let deadline = Instant::now() + PATIENCE;
        while self.qmp(vmid, "query-status", json!({})).is_err() {
            let ended = self.lock().guests.get(&vmid).is_none_or(|g| g.running.is_none());
            if ended || Instant::now() > deadline {
                let said = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
                return Err(format!("start failed: QEMU exited with code 1: {}", said.trim()));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn vm_runs(&self, vmid: u32) -> bool {
        self.lock().guests.get(&vmid).is_some_and(|g| g.running.is_some())
    }

    /// Waits for a VM's end.
    async fn vm_ends(&self, vmid: u32, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.vm_runs(vmid) {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        true
    }

    /// `gently`: how long it may take by itself, and whether it is killed then.
    pub async fn stop_vm(&self, vmid: u32, gently: Option<(f64, bool)>) -> Result<(), String> {
        if !matches!(self.runner, Runner::Qemu) {
            if let Some(guest) = self.lock().guests.get_mut(&vmid) {
                (guest.running, guest.paused) = (None, false);
            }
            return Ok(());
        }
        if !self.vm_runs(vmid) {
            return Ok(());
        }
        let Some((seconds, force)) = gently else {
            let _ = self.qmp(vmid, "quit", json!({}));
            return if self.vm_ends(vmid, PATIENCE).await {
                Ok(())
            } else {
                Err("VM quit/powerdown failed - got timeout".into())
            };
        };
        self.qmp(vmid, "system_powerdown", json!({}))?;
        if self.vm_ends(vmid, Duration::from_secs_f64(seconds)).await {
            return Ok(());
        }
        if !force {
            return Err("VM quit/powerdown failed - got timeout".into());
        }
        self.kill_vm(vmid, rustix::process::Signal::TERM);
        if self.vm_ends(vmid, PATIENCE).await { Ok(()) } else { Err("VM still running".into()) }
    }

    fn kill_vm(&self, vmid: u32, signal: rustix::process::Signal) {
        let pid = self.lock().guests.get(&vmid).map_or(0, |g| if g.kind == Kind::Vm { g.pid } else { 0 });
        if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Ends all VMs, at the server's end.
    pub fn kill_vms(&self) {
        let all: Vec<u32> = self.lock().guests.keys().copied().collect();
        for vmid in all {
            self.kill_vm(vmid, rustix::process::Signal::KILL);
        }
        let deadline = Instant::now() + PATIENCE;
        while self.lock().guests.values().any(|g| g.kind == Kind::Vm && g.pid > 0) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// What tests do to it.
impl Pve {
    /// What a VM's first serial port has written since its last start.
    pub fn console(&self, vmid: u32) -> String {
        std::fs::read_to_string(self.state.vm_folder(vmid).join("serial0")).unwrap_or_default()
    }

    /// One command to a VM's monitor, as somebody on the node gives it.
    pub fn monitor(&self, vmid: u32, command: &str) -> Value {
        self.state.qmp(vmid, command, json!({})).unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    /// A VM's CPUs stand still, or go on.
    pub fn pause_vm(&self, vmid: u32, paused: bool) {
        if matches!(self.state.runner, Runner::Qemu) {
            self.monitor(vmid, if paused { "stop" } else { "cont" });
        }
        if let Some(guest) = self.state.lock().guests.get_mut(&vmid) {
            guest.paused = paused;
        }
    }
}
