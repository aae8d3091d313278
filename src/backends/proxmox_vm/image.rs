//! Images' disks: an ext4 file system made once of an image's root file system, on the one disk of a VM that is never started, and
//! attached read-only to the VMs of all pods that use the image.
//!
//! Such a VM is how a token gets a volume that it may also free. It has a number of our range, from the last on, the image's digest as
//! its name, our identity in its notes, and Proxmox's protection from the moment on that its disk is whole. A crash leaves one without
//! protection, which is made anew, and [`ProxmoxVmBackend::drop_images`] removes what no pod has used for a while.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use camino::Utf8Path;

use super::plan::{IMAGE_SLOTS, property};
use super::{ProxmoxVmBackend, locked};
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::Image;
use crate::fail_point;
use crate::integrations::proxmox_api::{
    ErrorKind, GuestChange, GuestId, GuestKind, Identity, NewGuest, VmConfig, VmSpec, Vmid, Volume,
};
use crate::utils::process::Spawn;

/// Makes file systems.
pub const MKE2FS: &str = "/usr/sbin/mke2fs";
/// Longest making of one.
const MAKING: Duration = Duration::from_secs(900);
/// Before the digest in an image's identity.
pub const OF_IMAGE: &str = "image-";
/// Digits of the digest in names and serial numbers; Proxmox takes 20 characters of the latter.
const DIGITS: usize = 14;
const BLOCK: u64 = 4096;

/// A disk of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// `STORAGE:NAME`.
    pub volume: String,
    /// By which the guest finds it.
    pub serial: String,
}

fn set(key: &str, value: &str) -> GuestChange {
    GuestChange { set: [(key.to_owned(), value.to_owned())].into(), ..GuestChange::default() }
}

/// The disk of a VM that is whole.
fn whole(config: &VmConfig, identity: &Identity) -> Option<String> {
    let ours = Identity::find(config.description()).as_ref() == Some(identity);
    let protected = config.get("protection") == Some("1");
    config.volumes.get("scsi0").filter(|_| ours && protected).map(|disk| disk.volume.clone())
}

impl ProxmoxVmBackend {
    /// Gives a pod's VM the image's disk; its serial number. `rootfs`: a root file system of the image that nobody has written to.
    pub(super) async fn give_image(&self, vmid: Vmid, image: &Image, rootfs: BorrowedFd<'_>) -> Result<String> {
        // Nobody takes it away before it is attached, and whoever needs the same one waits for it.
        let _giving = self.giving.read().await;
        let digits: String = image.id.hex().chars().take(DIGITS).collect();
        let disk = {
            let one = locked(&self.images).entry(digits.clone()).or_default().clone();
            let mut known = one.lock().await;
            self.image_disk(&mut known, &digits, image, rootfs).await?
        };
        self.attach(vmid, &disk).await?;
        Ok(disk.serial)
    }

    /// The image's disk, which is whole when this returns.
    async fn image_disk(
        &self,
        known: &mut Option<Vmid>,
        digits: &str,
        image: &Image,
        rootfs: BorrowedFd<'_>,
    ) -> Result<Disk> {
        let (name, serial) = (format!("{OF_IMAGE}{digits}"), format!("lxcri-{digits}"));
        let identity =
            Identity { installation: self.config.installation.clone(), pod: format!("{OF_IMAGE}{}", image.id.hex()) };
        let node = &self.config.node;
        let (first, last) = self.config.vmids;
        let candidates: Vec<Vmid> = match *known {
            Some(vmid) => vec![vmid],
            None => {
                let all = self.api.guest_list(GuestKind::Vm, node).await.map_err(Error::from)?;
                // Notes can be copied with their VM: what is beyond our numbers is somebody's.
                let ours = all.into_iter().filter(|g| g.name == name && (first..=last).contains(&g.vmid));
                ours.map(|g| g.vmid).collect()
            }
        };
        for vmid in candidates {
            let config = match self.api.vm_config(node, vmid).await {
                Ok(config) => config,
                Err(e) if e.is_not_found() => continue,
                Err(e) => return Err(e.into()),
            };
            if let Some(volume) = whole(&config, &identity) {
                *known = Some(vmid);
                return Ok(Disk { volume, serial });
            }
            if Identity::find(config.description()).as_ref() == Some(&identity) {
                tracing::warn!(%vmid, image = image.id.as_str(), "an image's disk was left half made: it is made anew");
                self.delete_vm(node, vmid).await?;
                self.vms.release(vmid);
            }
        }
        *known = None;
        let (vmid, volume) = self.make_disk(image, &name, &identity, rootfs).await?;
        *known = Some(vmid);
        Ok(Disk { volume, serial })
    }

    async fn make_disk(
        &self,
        image: &Image,
        name: &str,
        identity: &Identity,
        rootfs: BorrowedFd<'_>,
    ) -> Result<(Vmid, String)> {
        let named = |e: Error| e.context(format!("make the disk of image {}", image.id));
        let folder = format!("/proc/{}/fd/{}", std::process::id(), rootfs.as_raw_fd());
        let of = folder.clone();
        let content = blocking(move || measure(Path::new(&of)).map_err(|e| Error::io("measure the image", e))).await?;
        let vmid = self.make_holder(image, name, identity, content.mib()).await.map_err(named)?;
        fail_point!("vm.image_made");
        let filled = async {
            let path = self.disk_path(vmid, "scsi0").await?;
            format(image.id.hex(), &folder, &path, &content).await?;
            fail_point!("vm.image_filled");
            let id = GuestId::vm(&self.config.node, vmid);
            self.api.guest_update(id, &set("protection", "1")).await.map_err(Error::from)?;
            let config = self.api.vm_config(&self.config.node, vmid).await.map_err(Error::from)?;
            whole(&config, identity).ok_or_else(|| Error::internal("it is not what it was made as"))
        };
        match filled.await {
            Ok(volume) => {
                tracing::info!(%vmid, image = image.id.as_str(), mib = content.mib(), "made the disk of an image");
                Ok((vmid, volume))
            }
            Err(e) => {
                match self.delete_vm(&self.config.node, vmid).await {
                    Ok(()) => self.vms.release(vmid),
                    Err(left) => tracing::warn!(%vmid, error = left.chain(), "half of an image's disk stays for now"),
                }
                Err(named(e))
            }
        }
    }

    /// The VM that has the disk.
    async fn make_holder(&self, image: &Image, name: &str, identity: &Identity, mib: u64) -> Result<Vmid> {
        let config = &self.config;
        let tag = image.repo_tags.first().or(image.repo_digests.first());
        let tag: String = tag.map(|t| t.chars().filter(|c| !c.is_control()).take(500).collect()).unwrap_or_default();
        let words = format!("Disk of image {tag}\n\nNot to be started: pods' VMs have its disk, read-only.");
        let disk = Volume {
            other: "backup=0,format=raw".parse().map_err(property)?,
            ..Volume::allocate(&config.storage, mib)
        };
        let spec = VmSpec {
            name: Some(name.to_owned()),
            disks: vec![disk],
            guest: NewGuest {
                memory: Some(16),
                cores: Some(1),
                tags: "k8s;lxcri-image".parse().map_err(property)?,
                description: Some(identity.notes(&words)?),
                pool: Some(config.pool.clone()).filter(|p| !p.is_empty()),
                ..NewGuest::default()
            },
            ..VmSpec::default()
        };
        for vmid in self.vms.free().await?.rev() {
            let made = async { self.api.vm_create(&config.node, vmid, &spec).await?.wait().await.map(drop) };
            match made.await {
                Ok(()) => return Ok(vmid),
                Err(e) if *e.kind() == ErrorKind::AlreadyExists => self.vms.release(vmid),
                Err(e) => {
                    // What may come of it yet is found by its name.
                    self.vms.failed(vmid, &e, true);
                    self.vms.release(vmid);
                    return Err(e.into());
                }
            }
        }
        Err(self.vms.none_free("an image's disk"))
    }

    /// Gives a running VM an image's disk.
    async fn attach(&self, vmid: Vmid, disk: &Disk) -> Result<()> {
        let named = |e: Error| e.context(format!("give VM {vmid} the disk {}", disk.volume));
        let config = self.api.vm_config(&self.config.node, vmid).await.map_err(|e| named(e.into()))?;
        if config.volumes.values().any(|d| d.other.get("serial") == Some(disk.serial.as_str())) {
            return Ok(());
        }
        let free = IMAGE_SLOTS.map(|n| format!("scsi{n}")).find(|key| !config.volumes.contains_key(key));
        let key = free.ok_or_else(|| {
            let what = format!("a pod can't have more than {} images", IMAGE_SLOTS.count());
            named(Error::new(Kind::ResourceExhausted, what))
        })?;
        let attached = Volume {
            volume: disk.volume.clone(),
            ro: Some(true),
            other: format!("backup=0,serial={}", disk.serial).parse().map_err(property)?,
            ..Volume::default()
        };
        let change = GuestChange { digest: Some(config.digest), ..set(&key, &attached.write().map_err(property)?) };
        let id = GuestId::vm(&self.config.node, vmid);
        let pending = self.api.guest_update(id, &change).await.map_err(|e| named(e.into()))?;
        if pending.iter().any(|p| p.key == key) {
            let back = GuestChange { delete: vec![key], ..GuestChange::default() };
            let _ = self.api.guest_update(id, &back).await;
            return Err(named(Error::precondition(
                "it takes no disks while it runs: the template's `hotplug` needs disk",
            )));
        }
        fail_point!("vm.attached");
        Ok(())
    }
}

/// What is in a root file system, as a file system will have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Content {
    bytes: u64,
    inodes: u64,
}

impl Content {
    fn inode_count(self) -> u64 {
        self.inodes + self.inodes / 8 + 64
    }

    /// MiB of a disk that it fits on.
    fn mib(self) -> u64 {
        let bytes = self.bytes.saturating_add(self.bytes / 20).saturating_add(self.inode_count() * 256);
        bytes.div_ceil(1 << 20) + 8
    }
}

/// Bytes of a file that are not holes, which take no room. (Blocks tell it not: a compressing file system has fewer.)
fn data_of(path: &Path, meta: &std::fs::Metadata) -> std::io::Result<u64> {
    use rustix::fs::{SeekFrom, seek};
    if meta.blocks().saturating_mul(512) >= meta.size() {
        return Ok(meta.size());
    }
    let file = std::fs::File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let (mut at, mut sum) = (0, 0_u64);
    loop {
        let start = match seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(sum),
            Err(e) => return Err(e.into()),
        };
        at = seek(&file, SeekFrom::Hole(start))?;
        // Of a piece its first and last block count as a whole.
        sum = sum.saturating_add(at - start).saturating_add(2 * BLOCK);
    }
}

fn measure(folder: &Path) -> std::io::Result<Content> {
    let mut content = Content { bytes: BLOCK, inodes: 1 };
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let mut names = 0;
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let meta = entry.path().symlink_metadata()?;
            names += 8 + entry.file_name().len() as u64 + 4;
            content.inodes += 1;
            let size = if meta.is_file() { data_of(&entry.path(), &meta)? } else { meta.size() };
            // One block for attributes that do not fit into an inode.
            content.bytes =
                content.bytes.saturating_add(size.div_ceil(BLOCK).saturating_mul(BLOCK)).saturating_add(BLOCK);
            if meta.is_dir() {
                folders.push(entry.path());
            }
        }
        content.bytes += (2 * names).div_ceil(BLOCK) * BLOCK;
    }
    Ok(content)
}

/// Writes the file system: the same bytes for the same image, whoever makes it and when.
async fn format(digest: &str, from: &str, disk: &Utf8Path, content: &Content) -> Result<()> {
    let uuid = match digest.get(..32) {
        Some(d) => format!("{}-{}-{}-{}-{}", &d[..8], &d[8..12], &d[12..16], &d[16..20], &d[20..]),
        None => return Err(Error::internal(format!("{digest:?} is no digest"))),
    };
    let (inodes, size) = (content.inode_count().to_string(), format!("{}M", content.mib()));
    let extended = format!("hash_seed={uuid},lazy_itable_init=0,nodiscard");
    let args = [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-I",
        "256",
        "-m",
        "0",
        "-O",
        "^has_journal,^resize_inode",
        "-N",
        &inodes,
        "-U",
        &uuid,
        "-E",
        &extended,
        "-d",
        from,
        disk.as_str(),
        &size,
    ];
    let made = Spawn::new(MKE2FS, args).env("PATH", crate::backends::pods::PATH).env("SOURCE_DATE_EPOCH", "0");
    made.deadline(MAKING).run_ok().await?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // files of a test
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn an_image_fits_on_its_disk() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(dir.path().join("a/b")).expect("folders");
        std::os::unix::fs::symlink("nowhere", dir.path().join("a/link")).expect("a link");
        std::fs::write(dir.path().join("a/b/big"), vec![1; 10 << 20]).expect("a file");
        // A hole of a terabyte takes no room.
        let sparse = std::fs::File::create(dir.path().join("a/sparse")).expect("a file");
        sparse.set_len(1 << 40).and_then(|()| sparse.write_all_at(b"x", 1 << 39)).expect("a hole");
        let content = measure(dir.path()).expect("measured");
        assert_eq!(content.inodes, 6);
        assert!(content.bytes >= 10 << 20 && (18..=20).contains(&content.mib()), "{content:?}");
    }

    #[test]
    fn only_a_disk_that_is_whole_and_ours_is_taken() {
        let identity = Identity { installation: "i".into(), pod: "image-ab".into() };
        let config = |protection: &str, installation: &str| {
            let of = Identity { installation: installation.into(), ..identity.clone() };
            let json = serde_json::json!({
                "digest": "d", "scsi0": "local:910009/vm-910009-disk-0.raw,size=9M", "protection": protection,
                "description": of.notes("Disk of image x").expect("notes"),
            });
            VmConfig::parse(&json).expect("a configuration")
        };
        assert_eq!(whole(&config("1", "i"), &identity).as_deref(), Some("local:910009/vm-910009-disk-0.raw"));
        assert_eq!(whole(&config("0", "i"), &identity), None);
        assert_eq!(whole(&config("1", "other"), &identity), None);
    }
}
