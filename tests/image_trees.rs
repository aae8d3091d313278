//! Unpacked images are what `umoci unpack` makes of them, byte for byte, with everything that a file system tells of a file:
//! five images of Debian's packages, made by umoci, buildah and skopeo (`tests/tools/image-trees`).
//!
//! Run by `make test-images`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod images_support;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use images_support::World;
use proxmox_lxcri::core::ids::ContainerId;
use proxmox_lxcri::core::ports::{ImageSource, ImageStore, RootfsOptions};
use proxmox_lxcri::integrations::layers::pipeline::digest_of;

/// All that can be told of each path below `root`.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    // Inode numbers say which names are one file.
    let mut first_names: HashMap<u64, PathBuf> = HashMap::new();
    let mut paths = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()) {
            if path.symlink_metadata().unwrap().is_dir() {
                folders.push(path.clone());
            }
            paths.push(path);
        }
    }
    paths.sort();
    for path in paths {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_owned();
        let mut attributes: Vec<String> = xattr::list(&path)
            .unwrap()
            .map(|key| format!("{key:?}={:?}", xattr::get(&path, &key).unwrap().unwrap_or_default()))
            .collect();
        attributes.sort();
        let kind = meta.file_type();
        let content = match () {
            () if kind.is_file() => format!("{} {}", meta.size(), digest_of(&std::fs::read(&path).unwrap())),
            () if kind.is_symlink() => format!("-> {:?}", std::fs::read_link(&path).unwrap()),
            () if kind.is_char_device() || kind.is_block_device() => format!("device {}", meta.rdev()),
            () => String::new(),
        };
        let same = match kind.is_dir() {
            true => name.clone(),
            false => first_names.entry(meta.ino()).or_insert_with(|| name.clone()).clone(),
        };
        let owner = (meta.uid(), meta.gid());
        // A layer need not have an entry for the root: its time is that of the unpacking then.
        let time = if path == root { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) };
        found.insert(name, format!("{:o} {owner:?} {time:?} {attributes:?} {content} {same:?}", meta.mode()));
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_are_those_of_umoci() {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/image-trees");
    let out = Command::new(tool).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let folder = PathBuf::from(String::from_utf8(out.stdout).unwrap().trim());
    let layout = camino::Utf8PathBuf::from_path_buf(folder.join("oci")).unwrap();
    let world = World::new().await;
    for (name, least) in [("small", 200), ("edited", 100), ("zones", 500), ("perl", 300), ("opaque", 200)] {
        let source = ImageSource::OciLayout(layout.clone(), Some(name.into()));
        let image =
            world.images.load(&source, None).await.unwrap_or_else(|e| panic!("{name}: {}", e.chain())).remove(0);
        let id = ContainerId::new();
        world.layers.create_rootfs(&id, &image.chains, &RootfsOptions::default()).await.unwrap();
        let mount = world.layers.mount_rootfs(&id).await.unwrap();
        let ours = tree(Path::new(&format!("/proc/self/fd/{}/", mount.as_raw_fd())));
        let theirs = tree(&folder.join(name).join("rootfs"));
        assert!(theirs.len() >= least, "{name}: {} files", theirs.len());
        let all: std::collections::BTreeSet<&PathBuf> = ours.keys().chain(theirs.keys()).collect();
        let differ: Vec<String> = all
            .into_iter()
            .filter(|path| ours.get(*path) != theirs.get(*path))
            .map(|path| format!("{path:?}\n  ours   {:?}\n  umoci's {:?}", ours.get(path), theirs.get(path)))
            .collect();
        assert!(
            differ.is_empty(),
            "{name}: {} of {} differ:\n{}",
            differ.len(),
            theirs.len(),
            differ[..differ.len().min(20)].join("\n")
        );
        drop(mount);
        world.layers.remove_rootfs(&id).await.unwrap();
    }
}
