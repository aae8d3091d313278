//! Root file systems: an image's disk, read-only, below a layer of the container's own on the guest's disk.
//!
//! ```text
//! RUN/images/SERIAL       the disk, found by its serial number
//! RUN/roots/CONTAINER     the overlay
//! DATA/containers/CONTAINER/{upper,work}
//! ```
//! All that is to be known later is in the kernel's list of mounts. Called by the session; fails with the object. A crash leaves
//! mounts, which the same call takes up.

use std::path::{Path, PathBuf};

use lxcri_guest_proto::v1;
use proxmox_lxcri_monitor::failure::{Failure, Result};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::beneath;
use crate::settings::Settings;

/// File systems of images.
const FILE_SYSTEMS: [&str; 4] = ["erofs", "ext4", "squashfs", "xfs"];
/// Before the serial number in a SCSI disk's page 0x80.
const VPD_HEADER: usize = 4;

/// Makes the folder where images and root file systems are mounted one whose mounts come to the monitor, which has a mount
/// namespace of its own.
pub fn prepare(settings: &Settings) -> Result<()> {
    for name in ["images", "roots"] {
        let path = settings.run_dir.join(name);
        std::fs::create_dir_all(&path).map_err(|e| Failure::io(path.display(), &e))?;
        if !mounts()?.iter().any(|m| m.path == path) {
            let failed = |e| Failure::errno(path.display(), e);
            rustix::mount::mount_bind(&path, &path).map_err(failed)?;
            rustix::mount::mount_change(&path, MountPropagationFlags::SHARED).map_err(failed)?;
        }
    }
    Ok(())
}

/// MakeRoot.
pub fn make(settings: &Settings, call: &v1::MakeRoot) -> Result<v1::Root> {
    let id = beneath::component(&call.container_id)?;
    let serial = serial(&call.serial)?;
    let fs_type = call.fs_type.as_str();
    if !FILE_SYSTEMS.contains(&fs_type) {
        return Err(Failure::invalid(format!("{fs_type:?}: not one of {}", FILE_SYSTEMS.join(", "))));
    }
    let image = settings.run_dir.join("images").join(serial);
    let root = settings.run_dir.join("roots").join(id);
    let own = settings.data_dir.join("containers").join(id);
    let (upper, work) = (own.join("upper"), own.join("work"));
    let mounted = mounts()?;
    if !mounted.iter().any(|m| m.path == image) {
        let disk = find(&settings.block_devices, serial)?;
        make_folder(&image)?;
        rustix::mount::mount(&disk, &image, fs_type, MountFlags::RDONLY | MountFlags::NODEV, None)
            .map_err(|e| Failure::errno(format_args!("mount image {serial} ({})", disk.display()), e))?;
    }
    if !mounted.iter().any(|m| m.path == root) {
        [&upper, &work, &root].into_iter().try_for_each(|p| make_folder(p))?;
        for path in [&image, &upper, &work] {
            // What overlay's options can't say.
            if path.as_os_str().as_encoded_bytes().iter().any(|b| b",:\\\"".contains(b)) {
                return Err(Failure::invalid(format!("{}: not a path for overlay", path.display())));
            }
        }
        let options = format!("lowerdir={},upperdir={},workdir={}", image.display(), upper.display(), work.display());
        let options = std::ffi::CString::new(options).map_err(|_| Failure::invalid("a path with a zero byte"))?;
        rustix::mount::mount("overlay", &root, "overlay", MountFlags::empty(), Some(options.as_c_str()))
            .map_err(|e| Failure::errno(format_args!("mount the root file system of {id}"), e))?;
    }
    Ok(v1::Root { path: text(&root)?, upper: text(&upper)? })
}

/// RemoveRoot.
pub fn remove(settings: &Settings, id: &str) -> Result<()> {
    let id = beneath::component(id)?;
    let root = settings.run_dir.join("roots").join(id);
    unmount(&root)?;
    beneath::remove(&root)?;
    beneath::remove(&settings.data_dir.join("containers").join(id))
}

/// DropImage.
pub fn drop_image(settings: &Settings, call: &v1::DropImage) -> Result<()> {
    let serial = serial(&call.serial)?;
    let image = settings.run_dir.join("images").join(serial);
    // The overlay has a mount of its own of it: the kernel would unmount ours without a word.
    let lower = format!("lowerdir={},", text(&image)?);
    if let Some(user) = mounts()?.iter().find(|m| m.options.contains(&lower)) {
        return Err(Failure::state(format!("image {serial}: {} is on it", user.path.display())));
    }
    unmount(&image)?;
    beneath::remove(&image)
}

/// What was mounted at a path, as often as it was; nothing is no error.
fn unmount(path: &Path) -> Result<()> {
    while mounts()?.iter().any(|m| m.path == path) {
        match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::BUSY) => return Err(Failure::state(format!("{}: in use", path.display()))),
            Err(e) => return Err(Failure::errno(path.display(), e)),
        }
    }
    Ok(())
}

fn make_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Failure::io(path.display(), &e))
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).ok_or_else(|| Failure::invalid(format!("{}: not UTF-8", path.display())))
}

/// A serial number as Proxmox and QEMU take it, and as it can be a folder's name.
fn serial(serial: &str) -> Result<&str> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if serial.len() > 36 || !serial.bytes().all(plain) {
        return Err(Failure::invalid(format!("{serial:?}: not a serial number")));
    }
    beneath::component(serial)
}

/// The device node of the disk with a serial number.
pub fn find(block_devices: &Path, serial: &str) -> Result<PathBuf> {
    let all = std::fs::read_dir(block_devices).map_err(|e| Failure::io(block_devices.display(), &e))?;
    for entry in all.filter_map(std::result::Result::ok) {
        let folder = entry.path();
        // virtio-blk and NVMe in plain text, SCSI (and so ATA) in a page of its own.
        let plain = ["serial", "device/serial"].iter().filter_map(|f| std::fs::read(folder.join(f)).ok());
        let page = std::fs::read(folder.join("device/vpd_pg80")).ok().and_then(|p| Some(p.get(VPD_HEADER..)?.to_vec()));
        let is = |bytes: Vec<u8>| bytes.trim_ascii() == serial.as_bytes();
        // A partition's folder has none.
        if plain.chain(page).any(is) {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(Failure::not_found(format!("no disk has the serial number {serial}")))
}

struct Mount {
    path: PathBuf,
    options: String,
}

fn mounts() -> Result<Vec<Mount>> {
    let table = "/proc/self/mountinfo";
    let text = std::fs::read_to_string(table).map_err(|e| Failure::io(table, &e))?;
    Ok(text.lines().filter_map(parse).collect())
}

/// `36 35 98:0 /root /path options shared:1 - type source options`, with octal escapes in paths.
fn parse(line: &str) -> Option<Mount> {
    let (own, of_the_type) = line.split_once(" - ")?;
    let path = unescape(own.split(' ').nth(4)?);
    let options = unescape(of_the_type.splitn(3, ' ').nth(2)?);
    Some(Mount { path: path.into(), options: format!("{options},") })
}

fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let number = after.get(..3).and_then(|n| std::str::from_utf8(n).ok());
        match number.and_then(|n| u8::from_str_radix(n, 8).ok()) {
            Some(value) if byte == b'\\' => {
                out.push(value);
                rest = &after[3..];
            }
            _ => {
                out.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_list() {
        let line =
            "48 30 0:35 / /run/a\\040b rw,relatime shared:9 master:1 - overlay overlay rw,lowerdir=/x,upperdir=/y";
        let mount = parse(line).expect("a mount");
        assert_eq!(mount.path, Path::new("/run/a b"));
        assert_eq!(mount.options, "rw,lowerdir=/x,upperdir=/y,");
        assert_eq!(unescape("\\134x\\9\\"), "\\x\\9\\");
        assert!(parse("nonsense").is_none() && !mounts().expect("the list").is_empty());
    }

    #[test]
    fn disks_are_found_by_their_serial_numbers() {
        let dir = tempfile::tempdir().expect("a folder");
        let put = |name: &str, file: &str, bytes: &[u8]| {
            let path = dir.path().join(name).join(file);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
            std::io::Write::write_all(&mut std::fs::File::create(path).expect("a file"), bytes).expect("written");
        };
        put("vda", "serial", b"lxcri-abc\n");
        put("sda", "device/vpd_pg80", b"\0\x80\0\x09lxcri-def");
        put("sdb", "device/vpd_pg80", b"\0");
        put("nvme0n1", "device/serial", b"lxcri-ghi           \n");
        put("sda1", "partition", b"1\n");
        for (number, name) in [("lxcri-abc", "/dev/vda"), ("lxcri-def", "/dev/sda"), ("lxcri-ghi", "/dev/nvme0n1")] {
            assert_eq!(find(dir.path(), number).expect("a disk"), Path::new(name));
        }
        assert!(find(dir.path(), "lxcri-xyz").is_err());
        for bad in ["", "a/b", "..", "a,b", "a:b", &"x".repeat(37)] {
            assert!(serial(bad).is_err(), "{bad:?}");
        }
    }
}
