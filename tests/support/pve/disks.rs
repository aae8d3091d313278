//! Disks of the server's VMs: files of the folder storage, as the real plug-in names them. With [`Runner::Qemu`] they are what
//! `qemu-img` makes of them, otherwise their names and sizes are all there is.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use super::guests::{Kind, Runner, missing};
use super::state::Server;

/// A disk of a configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Disk {
    /// `STORE:GIB` of one that is to be made, or `STORE:NAME`.
    pub volume: String,
    pub import: Option<String>,
    pub format: Option<String>,
    pub size: Option<String>,
    rest: Vec<String>,
}

/// Whether a key without its number is one of a disk.
pub fn is_disk(key: &str) -> bool {
    ["scsi", "virtio", "ide", "sata", "efidisk"].contains(&key)
}

impl Disk {
    pub fn parse(text: &str) -> Option<Self> {
        let mut disk = Self::default();
        for part in text.split(',') {
            match part.split_once('=') {
                None | Some(("volume" | "file", _)) if disk.volume.is_empty() => {
                    disk.volume = part.trim_start_matches("volume=").trim_start_matches("file=").to_owned();
                }
                Some(("import-from", value)) => disk.import = Some(value.to_owned()),
                Some(("format", value)) => disk.format = Some(value.to_owned()),
                Some(("size", value)) => disk.size = Some(value.to_owned()),
                Some(_) => disk.rest.push(part.to_owned()),
                None => return None,
            }
        }
        (!disk.volume.is_empty()).then_some(disk)
    }

    fn write(&self) -> String {
        let size = self.size.iter().map(|s| format!("size={s}"));
        [self.volume.clone()].into_iter().chain(self.rest.iter().cloned()).chain(size).collect::<Vec<_>>().join(",")
    }

    /// GiB of one that is to be made.
    pub fn new_gib(&self) -> Option<f64> {
        self.volume.split_once(':')?.1.parse().ok()
    }

    pub fn is_read_only(&self) -> bool {
        self.rest.iter().any(|r| r == "ro=1")
    }

    /// Its serial number.
    pub fn serial(&self) -> Option<&str> {
        self.rest.iter().find_map(|r| r.strip_prefix("serial="))
    }

    /// The VM whose volume it is, by its name; None: one that is to be made, or something else.
    pub fn owner(&self) -> Option<u32> {
        let file = self.volume.rsplit('/').next()?;
        file.split('-').nth(1)?.parse().ok().filter(|_| self.new_gib().is_none())
    }

    /// Format by its file's name.
    pub fn kind(&self) -> &'static str {
        if self.volume.ends_with(".qcow2") { "qcow2" } else { "raw" }
    }
}

/// Bytes of a size as configurations have it.
pub fn bytes(size: &str) -> Option<u64> {
    let unit = size.chars().last()?;
    let power = match unit {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => 0,
    };
    let number: f64 = size.trim_end_matches(['K', 'M', 'G', 'T']).parse().ok()?;
    Some((number * 2f64.powi(power)) as u64)
}

/// The other way round, in the largest unit that fits.
fn size(bytes: u64) -> String {
    let units = [(30, 'G'), (20, 'M'), (10, 'K')];
    let fits = units.iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    fits.map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

/// The disks of a configuration.
pub fn of(config: &BTreeMap<String, String>) -> Vec<(String, Disk)> {
    let disks = config.iter().filter(|(k, _)| is_disk(k.trim_end_matches(|c: char| c.is_ascii_digit())));
    let disks = disks.filter_map(|(k, v)| Some((k.clone(), Disk::parse(v)?)));
    disks.filter(|(_, d)| !d.rest.iter().any(|r| r == "media=cdrom")).collect()
}

fn qemu_img(args: &[&str]) -> Result<(), String> {
    let out = Command::new("qemu-img").args(args).output().map_err(|e| format!("qemu-img: {e}"))?;
    if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).trim().to_owned()) }
}

impl Server {
    /// The file of a volume of the folder storage: `STORE:9000/base-9000-disk-0.qcow2/100/vm-100-disk-0.qcow2` is a linked
    /// clone, whose own part are the last two words; `STORE:import/NAME` something to import.
    pub fn disk_file(&self, volume: &str) -> Option<PathBuf> {
        let (store, name) = volume.split_once(':')?;
        let folder = self.lock().stores.get(store)?.folder.clone();
        let words: Vec<&str> = name.split('/').collect();
        match words.as_slice() {
            ["import", file] => Some(folder.join("import").join(file)),
            [.., vmid, file] => Some(folder.join("images").join(vmid).join(file)),
            _ => None,
        }
    }

    fn disks(&self, vmid: u32) -> Result<Vec<(String, Disk)>, String> {
        let state = self.lock();
        Ok(of(&state.guests.get(&vmid).ok_or_else(|| missing(Kind::Vm, vmid))?.config))
    }

    /// A VM's disk.
    pub fn disk(&self, vmid: u32, key: &str) -> Result<Disk, String> {
        let found = self.disks(vmid)?.into_iter().find(|(k, _)| k == key);
        found.map(|(_, disk)| disk).ok_or_else(|| format!("disk '{key}' does not exist"))
    }

    fn set_disk(&self, vmid: u32, key: &str, disk: &Disk) {
        if let Some(guest) = self.lock().guests.get_mut(&vmid) {
            guest.config.insert(key.to_owned(), disk.write());
        }
    }

    fn really(&self) -> bool {
        matches!(self.runner, Runner::Qemu)
    }

    /// A free name on the storage.
    fn new_volume(&self, store: &str, vmid: u32, format: &str) -> Result<(String, PathBuf), String> {
        for n in 0..64 {
            let volume = format!("{store}:{vmid}/vm-{vmid}-disk-{n}.{format}");
            let file = self.disk_file(&volume).ok_or_else(|| format!("storage '{store}' does not exist"))?;
            if !file.exists() {
                std::fs::create_dir_all(file.parent().expect("a folder")).map_err(|e| e.to_string())?;
                return Ok((volume, file));
            }
        }
        Err("no name left".into())
    }

    /// Makes the disks that a VM's configuration asks for.
    pub fn allocate(&self, vmid: u32) -> Result<(), String> {
        for (key, mut disk) in self.disks(vmid)? {
            let (Some(gib), Some((store, _))) = (disk.new_gib(), disk.volume.split_once(':')) else { continue };
            let store = store.to_owned();
            if self.lock().stores.get(&store).is_some_and(|s| s.full) {
                return Err("unable to create image: No space left on device".into());
            }
            let format = disk.format.take().unwrap_or_else(|| "raw".into());
            let (volume, file) = self.new_volume(&store, vmid, &format)?;
            disk.volume = volume;
            let target = file.display().to_string();
            if let Some(source) = disk.import.take() {
                let from = self.disk_file(&source).filter(|f| f.is_file());
                let from = from.ok_or_else(|| format!("cannot import from '{source}' - volume does not exist"))?;
                let length = from.metadata().map_err(|e| e.to_string())?.len();
                if self.really() {
                    qemu_img(&["convert", "-O", &format, &from.display().to_string(), &target])?;
                } else {
                    std::fs::copy(&from, &file).map_err(|e| e.to_string())?;
                }
                disk.size = Some(size(length));
            } else {
                let length = (gib * (1u64 << 30) as f64) as u64;
                if self.really() {
                    qemu_img(&["create", "-q", "-f", &format, &target, &length.to_string()])?;
                } else {
                    std::fs::File::create(&file).map_err(|e| e.to_string())?;
                }
                disk.size = Some(size(length));
            }
            self.set_disk(vmid, &key, &disk);
        }
        Ok(())
    }

    /// Makes a disk, or a container's volume, larger.
    pub fn resize(&self, kind: Kind, vmid: u32, key: &str, to: &str) -> Result<(), String> {
        let volume = {
            let state = self.lock();
            let guest = state.guests.get(&vmid).ok_or_else(|| missing(kind, vmid))?;
            guest.config.get(key).cloned().ok_or_else(|| format!("disk '{key}' does not exist"))?
        };
        let mut disk = Disk::parse(&volume).ok_or("unable to parse the volume")?;
        let now = disk.size.as_deref().and_then(bytes).unwrap_or_default();
        let asked = bytes(to.trim_start_matches('+')).ok_or("bad size")?;
        let new = if to.starts_with('+') { now + asked } else { asked };
        if new < now {
            return Err(match kind {
                Kind::Ct => "unable to shrink disk size".into(),
                Kind::Vm => "shrinking disks is not supported".into(),
            });
        }
        if kind == Kind::Vm && self.really() {
            let file = self.disk_file(&disk.volume).ok_or("no such volume")?;
            let running = self.lock().guests.get(&vmid).is_some_and(|g| g.running.is_some());
            if running {
                let arguments = serde_json::json!({ "device": format!("drive-{key}"), "size": new });
                self.qmp(vmid, "block_resize", arguments)?;
            } else {
                qemu_img(&["resize", "-q", "-f", disk.kind(), &file.display().to_string(), &new.to_string()])?;
            }
        }
        disk.size = Some(size(new));
        self.set_disk(vmid, key, &disk);
        Ok(())
    }

    /// `-c` takes, `-a` goes back to, `-d` removes a snapshot of all disks of a VM. A file of raw data can have none.
    pub fn snapshot_disks(&self, vmid: u32, how: &str, name: &str) -> Result<(), String> {
        let disks = self.disks(vmid)?;
        if disks.iter().any(|(_, d)| d.kind() != "qcow2") {
            return Err("snapshot feature is not available".into());
        }
        let running = self.lock().guests.get(&vmid).is_some_and(|g| g.running.is_some());
        for (key, disk) in disks {
            let arguments = serde_json::json!({ "device": format!("drive-{key}"), "name": name });
            match how {
                _ if !self.really() => {}
                "-c" if running => drop(self.qmp(vmid, "blockdev-snapshot-internal-sync", arguments)?),
                "-d" if running => drop(self.qmp(vmid, "blockdev-snapshot-delete-internal-sync", arguments)?),
                how => {
                    let file = self.disk_file(&disk.volume).ok_or("no such volume")?;
                    qemu_img(&["snapshot", how, name, &file.display().to_string()])?;
                }
            }
        }
        Ok(())
    }

    /// A template's disks have names of their own.
    pub fn rename_disks(&self, vmid: u32) -> Result<(), String> {
        for (key, mut disk) in self.disks(vmid)? {
            let from = self.disk_file(&disk.volume).ok_or("no such volume")?;
            disk.volume = disk.volume.replace(&format!("/vm-{vmid}-"), &format!("/base-{vmid}-"));
            let to = self.disk_file(&disk.volume).ok_or("no such volume")?;
            std::fs::rename(from, to).map_err(|e| e.to_string())?;
            self.set_disk(vmid, &key, &disk);
        }
        Ok(())
    }

    /// Disks of a clone: copies, or (of a template) what goes on from its disks.
    pub fn copy_disks(&self, from: u32, to: u32, full: bool, snapshot: &str) -> Result<(), String> {
        // The clone's configuration names the disks of what it is made of.
        for (key, mut disk) in self.disks(to)? {
            let source = self.disk_file(&disk.volume).ok_or("no such volume")?;
            let store = disk.volume.split(':').next().unwrap_or_default().to_owned();
            let base = disk.volume.split_once(':').map(|(_, name)| name.to_owned()).unwrap_or_default();
            let is_base = base.contains(&format!("base-{from}-"));
            if !full && !is_base {
                return Err(format!("Linked clone feature is not supported for '{}' ({key})", disk.volume));
            }
            let kind = disk.kind();
            let format = if full { kind } else { "qcow2" };
            let (volume, file) = self.new_volume(&store, to, format)?;
            let (source, target) = (source.display().to_string(), file.display().to_string());
            match (self.really(), full) {
                (false, _) => drop(std::fs::File::create(&file).map_err(|e| e.to_string())?),
                (true, true) if snapshot.is_empty() => qemu_img(&["convert", "-U", "-O", format, &source, &target])?,
                (true, true) => qemu_img(&["convert", "-U", "-l", snapshot, "-O", format, &source, &target])?,
                (true, false) => qemu_img(&["create", "-q", "-f", "qcow2", "-b", &source, "-F", kind, &target])?,
            }
            let own = volume.split_once(':').map(|(_, name)| name.to_owned()).unwrap_or_default();
            disk.volume = if full { volume } else { format!("{store}:{base}/{own}") };
            self.set_disk(to, &key, &disk);
        }
        Ok(())
    }
}
