//! Files and processes of the server's containers: templates unpacked for the container's users, `lxc-start -F` under our own
//! supervision.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::guests::{Kind, Runner};
use super::state::Server;

impl Server {
    /// Folder of a guest's root file system, as its configuration has it.
    pub fn rootfs(&self, vmid: u32) -> PathBuf {
        let volume = self.lock().guests.get(&vmid).and_then(|g| g.config.get("rootfs").cloned()).unwrap_or_default();
        let name = volume.split([':', ',']).nth(1).unwrap_or("none").to_owned();
        self.volumes_of(vmid).join(format!("{name}.subvol"))
    }

    /// Folder of the volumes of a number.
    fn volumes_of(&self, vmid: u32) -> PathBuf {
        self.folder.join(format!("local/images/{vmid}"))
    }

    /// The next name that is free for a volume: what nobody has freed keeps its own.
    pub fn new_subvol(&self, vmid: u32) -> String {
        let names = (0..).map(|n| format!("subvol-{vmid}-disk-{n}"));
        let free = |name: &String| !self.volumes_of(vmid).join(format!("{name}.subvol")).exists();
        names.into_iter().find(free).expect("a number")
    }

    pub async fn unpack(&self, vmid: u32, template: &Path) -> Result<(), String> {
        let root = self.rootfs(vmid);
        std::fs::create_dir_all(&root).map_err(|e| e.to_string())?;
        if !matches!(self.runner, Runner::Lxc(_)) {
            return Ok(());
        }
        let out = Command::new("tar").arg("xpf").arg(template).arg("-C").arg(&root).arg("--numeric-owner").output();
        let out = out.map_err(|e| format!("tar: {e}"))?;
        if !out.status.success() {
            return Err(format!(
                "unable to create CT {vmid} - command 'tar xpf' failed: {}",
                String::from_utf8_lossy(&out.stderr)
            ));
        }
        shift(&root).map_err(|e| format!("chown: {e}"))
    }

    pub async fn copy_files(&self, from: u32, to: u32) -> Result<(), String> {
        let (from, to) = (self.rootfs(from), self.rootfs(to));
        std::fs::create_dir_all(to.parent().expect("a parent")).map_err(|e| e.to_string())?;
        let out = Command::new("cp").arg("-a").arg(from).arg(to).output().map_err(|e| e.to_string())?;
        if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
    }

    /// Frees the volumes that the guest's configuration names, which one that is half made does not; `unreferenced`: all of its number.
    pub fn remove_files(&self, vmid: u32, unreferenced: bool) {
        let (half, kind) = self.lock().guests.get(&vmid).map_or((false, Kind::Ct), |g| (g.half, g.kind));
        if !half {
            let _ = std::fs::remove_dir_all(self.rootfs(vmid));
        }
        if unreferenced || kind == Kind::Vm {
            let _ = std::fs::remove_dir_all(self.volumes_of(vmid));
        }
        // Nothing but an empty folder.
        let _ = std::fs::remove_dir(self.volumes_of(vmid));
        let _ = std::fs::remove_dir_all(self.vm_folder(vmid));
        if let Runner::Lxc(path) = &self.runner {
            let _ = std::fs::remove_dir_all(path.join(vmid.to_string()));
        }
    }

    /// Runs a container; its supervisor and its init.
    pub async fn run(&self, vmid: u32) -> Result<(Option<Child>, u32), String> {
        let Runner::Lxc(path) = &self.runner else { return Ok((None, 0)) };
        let root = self.rootfs(vmid);
        let (init, nets, limits) = {
            let state = self.lock();
            let config = &state.guests[&vmid].config;
            let init = config.get("entrypoint").cloned().unwrap_or_else(|| "/sbin/init".into());
            let word = if is_v2() { "lxc.cgroup2" } else { "lxc.cgroup" };
            let limits = limits(config).into_iter().map(|(file, value)| format!("{word}.{file} = {value}\n"));
            (init, super::nets::lines(vmid, config)?, limits.collect::<String>())
        };
        let name = vmid.to_string();
        let config = format!(
            "lxc.rootfs.path = dir:{}\nlxc.uts.name = CT{vmid}\nlxc.init.cmd = {init}\n{nets}lxc.mount.auto = proc:mixed sys:mixed\n\
             lxc.idmap = u 0 100000 65536\nlxc.idmap = g 0 100000 65536\nlxc.console.path = none\nlxc.pty.max = 0\nlxc.tty.max = 0\nlxc.apparmor.profile = unconfined\n\
             lxc.cgroup.dir.container = lxc/{vmid}\nlxc.cgroup.dir.container.inner = ns\nlxc.cgroup.dir.monitor = lxc.monitor/{vmid}\n{limits}",
            root.display()
        );
        std::fs::create_dir_all(path.join(&name)).map_err(|e| e.to_string())?;
        std::fs::write(path.join(&name).join("config"), config).map_err(|e| e.to_string())?;
        let log = path.join(&name).join("log");
        let mut child = Command::new("lxc-start")
            .args(["-F", "-n", &name, "-l", "INFO"])
            .arg("-P")
            .arg(path)
            .arg("-o")
            .arg(&log)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("lxc-start: {e}"))?;
        let deadline = Instant::now() + std::time::Duration::from_secs(60);
        loop {
            let failed = !matches!(child.try_wait(), Ok(None)) || Instant::now() > deadline;
            if failed {
                let _ = child.kill();
                let _ = child.wait();
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                let errors: Vec<_> = said.lines().filter(|l| l.contains("ERROR")).take(4).collect();
                return Err(format!("startup for container '{vmid}' failed: {}", errors.join("; ")));
            }
            let out = Command::new("lxc-info").args(["-n", &name, "-P"]).arg(path).args(["-s", "-p", "-H"]).output();
            let text = out.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
            let pid = text.lines().find_map(|l| l.split_whitespace().last()?.parse().ok());
            if let Some(pid) = pid.filter(|_| text.contains("RUNNING")) {
                return Ok((Some(child), pid));
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Ends what runs, at the server's end.
    pub fn end_guests(&self) {
        for helper in &mut self.lock().helpers {
            let _ = helper.kill();
            let _ = helper.wait();
        }
        self.kill_vms();
        let children: Vec<_> =
            self.lock().guests.iter_mut().filter_map(|(id, g)| Some((*id, g.child.take()?))).collect();
        for (vmid, mut child) in children {
            if let Runner::Lxc(path) = &self.runner {
                let _ = Command::new("lxc-stop").args(["-n", &vmid.to_string(), "--kill", "-P"]).arg(path).output();
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Whether the node's cgroups are of version 2.
fn is_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.procs").exists()
}

/// Files of a container's cgroup, as the node writes them.
fn limits(config: &BTreeMap<String, String>) -> Vec<(&'static str, String)> {
    let number = |key: &str| config.get(key).and_then(|v| v.parse::<f64>().ok());
    let mib = |n: f64| ((n * 1048576.0) as u64).to_string();
    let cpus = number("cpulimit").filter(|n| *n > 0.0).map(|n| ((n * 100_000.0) as u64).to_string());
    let units = number("cpuunits").unwrap_or(100.0);
    let mut files = Vec::new();
    if is_v2() {
        files.extend(number("memory").map(|n| ("memory.max", mib(n))));
        files.extend(number("swap").map(|n| ("memory.swap.max", mib(n))));
        files.push(("cpu.max", format!("{} 100000", cpus.unwrap_or_else(|| "max".into()))));
        files.push(("cpu.weight", units.to_string()));
    } else {
        files.extend(number("memory").map(|n| ("memory.limit_in_bytes", mib(n))));
        files.push(("cpu.cfs_quota_us", cpus.unwrap_or_else(|| "-1".into())));
        files.push(("cpu.shares", (units * 10.24).ceil().to_string()));
    }
    files
}

impl Server {
    /// Writes the limits of a container that runs.
    pub fn limit(&self, vmid: u32, config: &BTreeMap<String, String>) -> Result<(), String> {
        if !matches!(self.runner, Runner::Lxc(_)) {
            return Ok(());
        }
        for (file, value) in limits(config) {
            let controller = if is_v2() { "" } else { file.split('.').next().unwrap_or_default() };
            let path = Path::new("/sys/fs/cgroup").join(controller).join(format!("lxc/{vmid}/{file}"));
            // Without accounting of swap there is no such file.
            if path.exists() {
                std::fs::write(&path, value).map_err(|e| format!("{}: {e}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// Gives everything to the container's range of users.
fn shift(root: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{MetadataExt, lchown};
    let meta = std::fs::symlink_metadata(root)?;
    lchown(root, Some(meta.uid() + 100_000), Some(meta.gid() + 100_000))?;
    if meta.is_dir() {
        for entry in std::fs::read_dir(root)? {
            shift(&entry?.path())?;
        }
    }
    Ok(())
}
