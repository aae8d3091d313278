//! Files and processes of the server's containers: templates unpacked for the container's users, `lxc-start -F` under our own
//! supervision.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::guests::Runner;
use super::state::Server;

impl Server {
    /// Folder of a guest's root file system.
    pub fn rootfs(&self, vmid: u32) -> PathBuf {
        self.folder.join(format!("local/images/{vmid}/subvol-{vmid}-disk-0.subvol"))
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

    pub fn remove_files(&self, vmid: u32) {
        let _ = std::fs::remove_dir_all(self.folder.join(format!("local/images/{vmid}")));
        let _ = std::fs::remove_dir_all(self.vm_folder(vmid));
        if let Runner::Lxc(path) = &self.runner {
            let _ = std::fs::remove_dir_all(path.join(vmid.to_string()));
        }
    }

    /// Runs a container; its supervisor and its init.
    pub async fn run(&self, vmid: u32) -> Result<(Option<Child>, u32), String> {
        let Runner::Lxc(path) = &self.runner else { return Ok((None, 0)) };
        let (root, init, nets) = {
            let state = self.lock();
            let config = &state.guests[&vmid].config;
            let init = config.get("entrypoint").cloned().unwrap_or_else(|| "/sbin/init".into());
            (self.rootfs(vmid), init, super::nets::lines(vmid, config)?)
        };
        let name = vmid.to_string();
        let config = format!(
            "lxc.rootfs.path = dir:{}\nlxc.uts.name = CT{vmid}\nlxc.init.cmd = {init}\n{nets}lxc.mount.auto = proc:mixed sys:mixed\n\
             lxc.idmap = u 0 100000 65536\nlxc.idmap = g 0 100000 65536\nlxc.console.path = none\nlxc.pty.max = 0\nlxc.tty.max = 0\nlxc.apparmor.profile = unconfined\n\
             lxc.cgroup.dir.container = lxc/{vmid}\nlxc.cgroup.dir.container.inner = ns\nlxc.cgroup.dir.monitor = lxc.monitor/{vmid}\n",
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
